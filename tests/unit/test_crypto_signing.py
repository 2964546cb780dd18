"""Signing keys, their files, and the pinned keys that decide what a signature is worth."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from vsql_shared.crypto.signing import (
    PinnedKey,
    Signer,
    TrustStore,
    fingerprint,
    generate_signing_key,
    load_public_key,
    load_signer,
)
from vsql_shared.errors import KeyUnavailableError, SignatureError
from vsql_shared.private_files import open_to_others

MESSAGE = b"DSSEv1 1 a 1 b"


def signer_of(node: str) -> Signer:
    return Signer(Ed25519PrivateKey.generate(), node)


def pin(signer: Signer, *, node: str = "", revoked: bool = False) -> PinnedKey:
    return PinnedKey(node or signer.node, signer.public_key, signer.fingerprint, revoked)


def test_a_fingerprint_is_that_of_ssh_keygen_style_over_the_raw_key() -> None:
    raw = bytes(range(32))
    expected = "SHA256:" + base64.b64encode(hashlib.sha256(raw).digest()).decode()[:-1]
    assert fingerprint(raw) == expected
    assert "=" not in fingerprint(raw)


def test_a_generated_pair_is_private_and_belongs_together(tmp_path: Path) -> None:
    private, public = generate_signing_key(tmp_path)
    assert (private.name, public.name) == ("vsql-sync-signing.key", "vsql-sync-signing.pub")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    signer = load_signer(private, "node-a")
    assert load_public_key(public) == signer.public_key
    TrustStore([pin(signer)]).verify("node-a", signer.fingerprint, signer.sign(MESSAGE), MESSAGE)


@pytest.mark.parametrize("taken", ["vsql-sync-signing.key", "vsql-sync-signing.pub"])
def test_an_existing_key_file_is_never_overwritten_nor_half_replaced(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).write_text("precious")
    with pytest.raises(KeyUnavailableError, match="exists and is not overwritten"):
        generate_signing_key(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [taken]
    assert (tmp_path / taken).read_text() == "precious"


def test_a_link_to_a_file_elsewhere_is_not_followed_when_a_key_is_written(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "vsql-sync-signing.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KeyUnavailableError, match="not overwritten"):
        generate_signing_key(tmp_path / "keys")
    assert not (tmp_path / "elsewhere").exists()


def test_a_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyUnavailableError, match=r"cannot create .*nowhere.*No such file"):
        generate_signing_key(tmp_path / "nowhere")


def encrypted_pem() -> bytes:
    return Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"passphrase"),
    )


def ec_pem() -> bytes:
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def ec_public_pem() -> bytes:
    return (
        ec.generate_private_key(ec.SECP256R1())
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"", "no private key in PEM form", id="empty"),
        pytest.param(b"\x00\xff garbage", "no private key in PEM form", id="garbage"),
        pytest.param(encrypted_pem(), "encrypted with a passphrase", id="passphrase"),
        pytest.param(ec_pem(), r"another kind \(EllipticCurve|another kind \(EC", id="ecdsa"),
    ],
)
def test_a_file_that_holds_no_usable_signing_key_is_refused(
    tmp_path: Path, content: bytes, says: str
) -> None:
    path = tmp_path / "bad.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(KeyUnavailableError, match=says) as refused:
        load_signer(path, "node-a")
    assert str(path) in refused.value.message
    assert refused.value.hint


def test_a_missing_key_file_is_named_with_the_command_that_makes_one(tmp_path: Path) -> None:
    for strict in (True, False):
        with pytest.raises(KeyUnavailableError, match=r"cannot read key file .*none\.key") as refused:
            load_signer(tmp_path / "none.key", "node-a", strict=strict)
        assert "syncctl key generate" in refused.value.hint


def test_a_directory_in_place_of_a_key_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyUnavailableError, match="Is a directory"):
        load_signer(tmp_path, "node-a", strict=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to root and then be another user")
@pytest.mark.parametrize(("mode", "taken"), [(0o640, True), (0o440, True), (0o600, False), (0o644, False)])
def test_a_key_an_orchestrator_mounts_is_taken_as_the_configuration_s_check_says(
    mode: int, taken: bool
) -> None:
    """Root's file, ours by the group: what `config check` lets pass must not end a service at its start."""
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        private, _ = generate_signing_key(folder)
        os.chown(private, 0, 65_534)
        private.chmod(mode)
        os.setegid(65_534)
        os.seteuid(65_534)
        try:
            assert open_to_others(private.stat()) is (mode == 0o644)
            if taken:
                assert load_signer(private, "node-a").node == "node-a"
            else:
                with pytest.raises(KeyUnavailableError):
                    load_signer(private, "node-a")
        finally:
            os.seteuid(0)
            os.setegid(0)
    finally:
        shutil.rmtree(folder)


def test_a_pipe_in_a_key_s_place_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "key", 0o600)
    with pytest.raises(KeyUnavailableError, match="is no file"):
        load_signer(tmp_path / "key", "node-a")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_that_others_may_read_is_refused_in_strict_mode_only(tmp_path: Path, mode: int) -> None:
    private, _ = generate_signing_key(tmp_path)
    private.chmod(mode)
    with pytest.raises(KeyUnavailableError, match=f"mode 0{mode:o}") as refused:
        load_signer(private, "node-a", strict=True)
    assert refused.value.hint == f"chmod 600 {private}"
    assert load_signer(private, "node-a", strict=False).node == "node-a"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"nothing", "no public key in PEM form", id="garbage"),
        pytest.param(ec_public_pem(), "no Ed25519 public key", id="ecdsa"),
        pytest.param(encrypted_pem(), "no public key in PEM form", id="private"),
    ],
)
def test_a_file_that_holds_no_ed25519_public_key_is_refused(
    tmp_path: Path, content: bytes, says: str
) -> None:
    path = tmp_path / "bad.pub"
    path.write_bytes(content)
    with pytest.raises(KeyUnavailableError, match=says):
        load_public_key(path)


def test_a_signer_shows_nothing_of_its_private_half(tmp_path: Path) -> None:
    private, _ = generate_signing_key(tmp_path)
    signer = load_signer(private, "node-a")
    key = serialization.load_pem_private_key(private.read_bytes(), None)
    assert isinstance(key, Ed25519PrivateKey)
    raw = key.private_bytes_raw()
    shown = (
        repr(signer) + str(signer) + repr({k: v for k, v in vars(signer).items() if not k.startswith("_")})
    )
    assert raw.hex() not in shown
    assert repr(raw)[2:-1] not in shown


def test_a_signature_of_an_unknown_key_is_refused() -> None:
    known, stranger = signer_of("node-a"), signer_of("node-a")
    with pytest.raises(SignatureError, match="not pinned for node node-a"):
        TrustStore([pin(known)]).verify("node-a", stranger.fingerprint, stranger.sign(MESSAGE), MESSAGE)


def test_a_valid_peer_cannot_sign_for_another_node() -> None:
    a, b = signer_of("node-a"), signer_of("node-b")
    trust = TrustStore([pin(a), pin(b)])
    with pytest.raises(SignatureError, match="expected a key of node node-a, not of node-b"):
        trust.verify("node-a", b.fingerprint, b.sign(MESSAGE), MESSAGE)


def test_claiming_anothers_fingerprint_does_not_make_its_signature() -> None:
    a, b = signer_of("node-a"), signer_of("node-b")
    with pytest.raises(SignatureError, match="does not verify"):
        TrustStore([pin(a), pin(b)]).verify("node-a", a.fingerprint, b.sign(MESSAGE), MESSAGE)


def test_a_revoked_key_is_refused_even_when_it_is_pinned_twice() -> None:
    a = signer_of("node-a")
    for pins in ([pin(a, revoked=True)], [pin(a, revoked=True), pin(a)], [pin(a), pin(a, revoked=True)]):
        with pytest.raises(SignatureError, match="revoked key"):
            TrustStore(pins).verify("node-a", a.fingerprint, a.sign(MESSAGE), MESSAGE)


def test_a_node_may_have_an_old_revoked_and_a_new_valid_key() -> None:
    old, new = signer_of("node-a"), signer_of("node-a")
    trust = TrustStore([pin(old, revoked=True), pin(new)])
    trust.verify("node-a", new.fingerprint, new.sign(MESSAGE), MESSAGE)
    with pytest.raises(SignatureError, match="revoked"):
        trust.verify("node-a", old.fingerprint, old.sign(MESSAGE), MESSAGE)


def test_every_flipped_bit_of_a_signature_or_message_is_refused() -> None:
    a = signer_of("node-a")
    trust = TrustStore([pin(a)])
    signature = a.sign(MESSAGE)
    for source, other in ((signature, MESSAGE), (MESSAGE, signature)):
        for bit in range(len(source) * 8):
            changed = bytearray(source)
            changed[bit // 8] ^= 1 << bit % 8
            pair = (bytes(changed), other) if source is signature else (other, bytes(changed))
            with pytest.raises(SignatureError):
                trust.verify("node-a", a.fingerprint, *pair)


@pytest.mark.parametrize("signature", [b"", b"\x00" * 63, b"\x00" * 64, b"\x00" * 65])
def test_a_signature_of_a_wrong_size_is_refused_as_a_signature(signature: bytes) -> None:
    a = signer_of("node-a")
    with pytest.raises(SignatureError):
        TrustStore([pin(a)]).verify("node-a", a.fingerprint, signature, MESSAGE)


def test_a_signature_without_a_signer_is_no_unsigned_document() -> None:
    a = signer_of("node-a")
    with pytest.raises(SignatureError, match="not pinned"):
        TrustStore([], allow_unsigned=True).verify("node-a", "", a.sign(MESSAGE), MESSAGE)


def test_unsigned_documents_pass_only_where_allowed() -> None:
    TrustStore([], allow_unsigned=True).verify("node-a", "", b"", MESSAGE)
    with pytest.raises(SignatureError, match="unsigned") as refused:
        TrustStore([]).verify("node-a", "", b"", MESSAGE)
    assert "audit.signing_key_path" in refused.value.hint


@pytest.mark.parametrize("revoked", [False, True])
def test_stripping_the_signature_of_a_node_with_a_pinned_key_is_refused_even_in_dev(revoked: bool) -> None:
    trust = TrustStore([pin(signer_of("node-a"), revoked=revoked)], allow_unsigned=True)
    with pytest.raises(SignatureError, match="has a pinned key and this document is unsigned"):
        trust.verify("node-a", "", b"", MESSAGE)
    trust.verify("node-b", "", b"", MESSAGE)


@pytest.mark.parametrize("public_key", [b"\x01" * 32, b"\x01" * 31, b""])
def test_a_key_slipped_under_a_known_fingerprint_is_refused(public_key: bytes) -> None:
    a = signer_of("node-a")
    with pytest.raises(SignatureError, match="does not have this fingerprint"):
        TrustStore([PinnedKey("node-a", public_key, a.fingerprint, False)])
