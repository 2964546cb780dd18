"""Announcements of keys, and the ring that holds opened ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsql_shared.crypto.announce import (
    KeyAnnouncement,
    KeyRing,
    announce,
    decode_announcement,
    encode_announcement,
    unwrap,
)
from vsql_shared.crypto.dek import KeyLimits, OpeningKey, SealingKey
from vsql_shared.errors import DecodeError, KeyUnavailableError, UnsealError
from vsql_shared.kms.file import FileKek, generate_kek_file

LONG = st.integers(0, 2**63 - 1)
TEXT = st.text(max_size=40)
ANNOUNCEMENTS = st.builds(
    KeyAnnouncement,
    cluster=TEXT,
    chain=TEXT,
    origin=TEXT,
    dek_id=TEXT,
    epoch=LONG,
    kms_provider=TEXT,
    kek_id=TEXT,
    wrap_algorithm=TEXT,
    algorithm=TEXT,
    wrapped_dek=st.binary(max_size=100),
    commitment=st.binary(min_size=32, max_size=32),
    worker=st.integers(0, 65535),
    created_at=LONG,
)


@pytest.fixture
def provider(tmp_path: Path) -> FileKek:
    generate_kek_file(tmp_path / "kek")
    return FileKek(tmp_path / "kek")


def new_key(chain: str = "pub.node-a") -> SealingKey:
    return SealingKey.generate("cluster", chain, 3, KeyLimits())


def announced(provider: FileKek, key: SealingKey | None = None) -> KeyAnnouncement:
    key = key or new_key()
    return announce(key, key.cluster, key.chain, "node-a", 4, provider)


def test_an_announced_key_comes_back_from_its_bytes(provider: FileKek) -> None:
    key = new_key()
    said = announced(provider, key)
    assert (said.origin, said.epoch, said.worker) == ("node-a", 4, 3)
    assert (said.kms_provider, said.kek_id, said.algorithm) == ("file", "vsql-sync-kek/1", "AES-256-GCM")
    opened = unwrap(decode_announcement(encode_announcement(said)), provider)
    assert (opened.dek_id, opened.commitment) == (key.dek_id, key.commitment)
    nonce = bytes(12)
    assert opened.cipher.decrypt(nonce, key.cipher.encrypt(nonce, b"x", b"a"), b"a") == b"x"


def test_an_announcement_holds_the_key_in_no_readable_form(provider: FileKek) -> None:
    key = new_key()
    encoded = encode_announcement(announced(provider, key))
    assert key.secret not in encoded
    assert key.secret.hex().encode() not in encoded


@pytest.mark.parametrize(
    "change",
    [
        {"cluster": "other"},
        {"chain": "pub.node-b"},
        {"dek_id": "dek-other"},
        {"wrapped_dek": bytes(60)},
        {"wrapped_dek": b""},
        {"wrap_algorithm": "AES-256-KWP"},
        {"wrap_algorithm": "ROT13"},
        {"kek_id": "vsql-sync-kek/2"},
        {"kek_id": "another/1"},
    ],
    ids=str,
)
def test_an_altered_announcement_does_not_unwrap(provider: FileKek, change: dict[str, str]) -> None:
    with pytest.raises(KeyUnavailableError):
        unwrap(replace(announced(provider), **change), provider)  # type: ignore[arg-type]  # table of changes


def test_an_announcement_with_anothers_wrapped_key_does_not_unwrap(provider: FileKek) -> None:
    one, other = announced(provider), announced(provider)
    with pytest.raises(KeyUnavailableError, match="does not unwrap"):
        unwrap(replace(one, wrapped_dek=other.wrapped_dek), provider)


def test_an_altered_commitment_is_refused_although_the_key_unwraps(provider: FileKek) -> None:
    said = announced(provider)
    for bit in range(256):
        flipped = bytearray(said.commitment)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(UnsealError, match="commits to"):
            unwrap(replace(said, commitment=bytes(flipped)), provider)


def test_a_key_for_an_unknown_cipher_or_of_another_kms_says_what_to_do(provider: FileKek) -> None:
    said = announced(provider)
    with pytest.raises(KeyUnavailableError, match="knows AES-256-GCM; upgrade"):
        unwrap(replace(said, algorithm="AES-256-SIV"), provider)
    with pytest.raises(KeyUnavailableError, match=r"KMS provider 'pkcs11', this node uses 'file'; set"):
        unwrap(replace(said, kms_provider="pkcs11"), provider)


def test_a_key_is_not_announced_for_a_chain_it_was_not_made_for(provider: FileKek) -> None:
    with pytest.raises(
        KeyUnavailableError, match=r"made for cluster/pub\.node-a, not for cluster/pub\.node-b"
    ):
        announce(new_key(), "cluster", "pub.node-b", "node-b", 1, provider)


@given(ANNOUNCEMENTS)
def test_every_announcement_survives_its_encoding(said: KeyAnnouncement) -> None:
    assert decode_announcement(encode_announcement(said)) == said


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_an_announcement_only_in_its_own_encoding(data: bytes) -> None:
    try:
        said = decode_announcement(data)
    except DecodeError:
        return
    assert encode_announcement(said) == data


@given(ANNOUNCEMENTS, st.data())
def test_mutated_bytes_are_refused_or_are_exactly_what_they_say(
    said: KeyAnnouncement, data: st.DataObject
) -> None:
    encoded = bytearray(encode_announcement(said))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(encoded) - 1))
        encoded[place] = data.draw(st.integers(0, 255))
    try:
        found = decode_announcement(bytes(encoded))
    except DecodeError:
        return
    assert encode_announcement(found) == bytes(encoded)


SAID = KeyAnnouncement("c", "h", "o", "d", 1, "file", "k/1", "w", "a", b"wrapped", bytes(32), 1, 5)


@pytest.mark.parametrize("cut", range(len(encode_announcement(SAID))))
def test_a_truncated_announcement_is_refused(cut: int) -> None:
    with pytest.raises(DecodeError):
        decode_announcement(encode_announcement(SAID)[:cut])


@pytest.mark.parametrize(
    ("encoded", "says"),
    [
        pytest.param(encode_announcement(SAID) + b"\0", "1 bytes after", id="a byte too many"),
        pytest.param(encode_announcement(SAID) * 2, "bytes after", id="twice"),
        pytest.param(b"\x04" + encode_announcement(SAID)[1:], "format 2, expected 1", id="a later format"),
        pytest.param(b"\x82\x00" + encode_announcement(SAID)[1:], "canonical", id="a padded integer"),
        pytest.param(
            encode_announcement(replace(SAID, worker=65536)), "canonical", id="a worker beyond 16 bits"
        ),
        pytest.param(encode_announcement(replace(SAID, worker=-1)), "canonical", id="a negative worker"),
        pytest.param(encode_announcement(replace(SAID, epoch=-1)), "canonical", id="a negative epoch"),
        pytest.param(b"\x02" + b"\xff" * 9 + b"\x01", "not a key announcement", id="a name of 2^62 bytes"),
        pytest.param(b"\x02\x01", "not a key announcement", id="a name of -1 bytes"),
        pytest.param(b"\x02\x04\xff\xfe" + bytes(60), "not a key announcement", id="a name that is no UTF-8"),
    ],
)
def test_a_malformed_announcement_is_refused(encoded: bytes, says: str) -> None:
    with pytest.raises(DecodeError, match=says):
        decode_announcement(encoded)


def opening(name: str) -> OpeningKey:
    key = new_key()
    sealed = SealingKey(
        secret=key.secret,
        dek_id=name,
        created_at=0,
        cluster="cluster",
        chain="pub.node-a",
        worker=0,
        nonce_salt=b"\0\0",
        limits=KeyLimits(),
    )
    return OpeningKey(key.secret, "cluster", "pub.node-a", name, sealed.commitment)


def test_the_ring_drops_the_key_that_was_not_used_longest() -> None:
    ring = KeyRing(capacity=2)
    a, b, c = opening("a"), opening("b"), opening("c")
    ring.add(a)
    ring.add(b)
    assert ring.get("a") is a
    ring.add(c)
    assert ring.get("b") is None
    assert (ring.get("a"), ring.get("c"), len(ring)) == (a, c, 2)
    assert b.cipher is not None  # a batch under way may still hold it


def test_the_ring_gives_no_key_beyond_its_lifetime() -> None:
    now = [100.0]
    ring = KeyRing(capacity=9, lifetime=10, clock=lambda: now[0])
    ring.add(opening("a"))
    now[0] = 109.9
    assert ring.get("a") is not None
    now[0] = 110.0
    assert ring.get("a") is None
    ring.add(opening("b"))
    now[0] = 120.0
    ring.add(opening("c"))
    assert len(ring) == 1


def test_using_a_key_does_not_lengthen_its_life() -> None:
    now = [0.0]
    ring = KeyRing(lifetime=10, clock=lambda: now[0])
    ring.add(opening("a"))
    for now[0] in (4.0, 8.0):
        assert ring.get("a") is not None
    now[0] = 10.0
    assert ring.get("a") is None


def test_two_different_keys_under_one_name_are_refused() -> None:
    ring = KeyRing()
    ring.add(opening("a"))
    with pytest.raises(UnsealError, match="two different data keys are announced as a"):
        ring.add(opening("a"))


def test_the_ring_unwraps_an_announcement_once_and_again_after_clearing(tmp_path: Path) -> None:
    path = tmp_path / "kek"
    generate_kek_file(path)
    provider, ring = FileKek(path), KeyRing()
    said = announced(provider)
    first = ring.open(said, provider)
    path.unlink()
    assert ring.open(said, provider) is first
    ring.clear()
    with pytest.raises(KeyUnavailableError, match="was wiped"):
        _ = first.cipher
    with pytest.raises(KeyUnavailableError, match="cannot read KEK file"):
        ring.open(said, provider)


def test_the_ring_does_not_take_a_known_name_for_a_known_key(provider: FileKek) -> None:
    ring = KeyRing()
    said = announced(provider)
    ring.open(said, provider)
    other = announced(provider)
    with pytest.raises(KeyUnavailableError):
        ring.open(replace(said, commitment=other.commitment, wrapped_dek=other.wrapped_dek), provider)
    with pytest.raises(KeyUnavailableError):
        ring.open(replace(said, chain="pub.node-b"), provider)


def test_a_ring_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one key"):
        KeyRing(capacity=0)
