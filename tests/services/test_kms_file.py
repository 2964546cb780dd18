"""KEKs in a file."""

from __future__ import annotations

import base64
import stat
from pathlib import Path

import pytest

from vsql_shared.errors import KeyUnavailableError
from vsql_shared.kms.base import AES_GCM, AES_KWP, KekProvider
from vsql_shared.kms.file import FileKek, generate_kek_file, rotate_kek_file

SECRET = bytes(range(32))
CONTEXT = b"cluster chain dek"
LINE = base64.b64encode(bytes(32)).decode()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    generate_kek_file(tmp_path / "kek", "my-kek")
    return tmp_path / "kek"


def test_a_generated_file_is_private_named_and_never_overwritten(path: Path) -> None:
    content = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert content.startswith(b"vsql-sync-kek-file 1 aes-256 my-kek\n1 ")
    with pytest.raises(KeyUnavailableError, match="not overwritten"):
        generate_kek_file(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["", "two words", "line\nbreak"])
def test_a_name_that_would_break_the_files_first_line_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeyUnavailableError, match="cannot name a KEK"):
        generate_kek_file(tmp_path / "kek", name)
    assert not (tmp_path / "kek").exists()


def test_a_wrapped_data_key_comes_back_and_is_wrapped_differently_each_time(path: Path) -> None:
    kek = FileKek(path, "my-kek")
    assert isinstance(kek, KekProvider)
    one, other = kek.wrap(SECRET, CONTEXT), kek.wrap(SECRET, CONTEXT)
    assert one.data != other.data
    assert (one.algorithm, one.kek_id) == (AES_GCM, kek.kek_id) == ("AES-256-GCM", "my-kek/1")
    assert kek.unwrap(one.data, one.algorithm, CONTEXT, one.kek_id) == SECRET


def test_every_flipped_bit_and_every_cut_of_a_wrapping_is_refused(path: Path) -> None:
    kek = FileKek(path)
    wrapped = kek.wrap(SECRET, CONTEXT)
    for bit in range(len(wrapped.data) * 8):
        altered = bytearray(wrapped.data)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(KeyUnavailableError, match="does not unwrap"):
            kek.unwrap(bytes(altered), AES_GCM, CONTEXT, wrapped.kek_id)
    for cut in range(len(wrapped.data)):
        for algorithm in (AES_GCM, AES_KWP):
            with pytest.raises(KeyUnavailableError, match="does not unwrap"):
                kek.unwrap(wrapped.data[:cut], algorithm, CONTEXT, wrapped.kek_id)


def test_a_wrapping_moved_to_another_context_does_not_open(path: Path) -> None:
    kek = FileKek(path)
    wrapped = kek.wrap(SECRET, CONTEXT)
    with pytest.raises(KeyUnavailableError, match="another chain"):
        kek.unwrap(wrapped.data, AES_GCM, b"another", wrapped.kek_id)


def test_a_rotated_kek_wraps_without_a_restart_and_old_wrappings_still_open(path: Path) -> None:
    kek = FileKek(path)
    old = kek.wrap(SECRET, CONTEXT)
    assert rotate_kek_file(path) == "my-kek/2"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["kek"]
    new = kek.wrap(SECRET, CONTEXT)
    assert (old.kek_id, new.kek_id) == ("my-kek/1", "my-kek/2")
    for wrapped in (old, new):
        assert kek.unwrap(wrapped.data, AES_GCM, CONTEXT, wrapped.kek_id) == SECRET
    assert [(v.kek_id, v.strength_bits, v.active) for v in kek.versions()] == [
        ("my-kek/1", 256, False),
        ("my-kek/2", 256, True),
    ]


def test_removing_a_version_shreds_what_it_wrapped_at_once(path: Path) -> None:
    kek = FileKek(path)
    old = kek.wrap(SECRET, CONTEXT)
    rotate_kek_file(path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[2])
    with pytest.raises(KeyUnavailableError, match="does not hold my-kek/1"):
        kek.unwrap(old.data, AES_GCM, CONTEXT, old.kek_id)


@pytest.mark.parametrize(
    "kek_id", ["my-kek/2", "other/1", "my-kek", "my-kek/", "my-kek/x", "my-kek/-1", "/1", ""]
)
def test_a_version_the_file_does_not_hold_is_named(path: Path, kek_id: str) -> None:
    kek = FileKek(path)
    wrapped = kek.wrap(SECRET, CONTEXT)
    with pytest.raises(KeyUnavailableError, match=f"does not hold {kek_id}"):
        kek.unwrap(wrapped.data, AES_GCM, CONTEXT, kek_id)


def test_an_unknown_algorithm_is_refused(path: Path) -> None:
    with pytest.raises(KeyUnavailableError, match="'XOR' is unknown"):
        FileKek(path).unwrap(bytes(60), "XOR", CONTEXT, "my-kek/1")


def test_a_file_of_another_kek_than_configured_is_refused(path: Path) -> None:
    with pytest.raises(KeyUnavailableError, match="holds 'my-kek', expected 'vsql-sync-kek'"):
        FileKek(path, "vsql-sync-kek")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_file_that_others_may_read_is_refused_in_strict_mode_only(path: Path, mode: int) -> None:
    path.chmod(mode)
    with pytest.raises(KeyUnavailableError, match=f"mode 0{mode:o}"):
        FileKek(path)
    assert FileKek(path, strict=False).kek_id == "my-kek/1"


def test_a_file_that_goes_away_stops_the_provider(path: Path) -> None:
    kek = FileKek(path)
    path.unlink()
    with pytest.raises(KeyUnavailableError, match="cannot read"):
        kek.wrap(SECRET, CONTEXT)
    with pytest.raises(KeyUnavailableError, match="cannot read KEK file"):
        rotate_kek_file(path)


def test_a_closed_provider_forgets_the_keys_and_reads_them_again(path: Path) -> None:
    kek = FileKek(path)
    kek.close()
    assert kek._keys == {}
    assert kek.kek_id == "my-kek/1"


HEAD = "vsql-sync-kek-file 1 aes-256 my-kek\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param("", "is no KEK file", id="empty"),
        pytest.param("-----BEGIN PRIVATE KEY-----\n", "is no KEK file", id="a PEM file"),
        pytest.param(LINE, "is no KEK file", id="the key alone"),
        pytest.param("vsql-sync-kek-file 2 aes-256 my-kek\n", "is no KEK file", id="a later format"),
        pytest.param("vsql-sync-kek-file 1 aes-128 my-kek\n", "is no KEK file", id="another kind"),
        pytest.param(HEAD, "holds no key", id="no version"),
        pytest.param(HEAD + f"1 {LINE}\n1 {LINE}\n", "line 3: version 1 stands there twice", id="twice"),
        pytest.param(HEAD + f"one {LINE}\n", "line 2 is no KEK version", id="no number"),
        pytest.param(HEAD + f"-1 {LINE}\n", "line 2 is no KEK version", id="a negative number"),
        pytest.param(HEAD + f"1 {LINE[:-4]}\n", "line 2 is no KEK version", id="a short key"),
        pytest.param(HEAD + "1 %%%\n", "line 2 is no KEK version", id="no base64"),
        pytest.param(HEAD + f"1 {LINE}\n\n", "line 3 is no KEK version", id="an empty line"),
        pytest.param(HEAD + f"٣ {LINE}\n", "line 2 is no KEK version", id="digits of another script"),
    ],
)
def test_a_malformed_file_is_refused_without_showing_its_content(
    tmp_path: Path, content: str, says: str
) -> None:
    path = tmp_path / "kek"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(KeyUnavailableError, match=says) as refused:
        FileKek(path)
    assert LINE[:-4] not in str(refused.value)
