"""Ed25519 signatures of nodes (RFC 8032): key files, the signer, and the store of pinned public keys.

Not here: what is signed (audit/ builds the DSSE pre-authentication encoding) and where pinned keys lie
(the table vsql_sync.signers). Rules:

* A private key file is PKCS#8 PEM, created with mode 0600 and never overwritten. In strict mode a file
  that others can read is refused: what was readable once may have been copied.
* A public key counts only because an operator pinned it in this node's own database; nothing that came
  through Kafka adds one.
* A node with a pinned key signs always: where unsigned documents are allowed (dev mode), they are
  allowed only for nodes without any pinned key, so a signature cannot be stripped off.
* A retired key counts for what was signed up to that moment; a revoked one for the entries of each chain this
  node had seen by then. What a document says of its time and place is read only after its signature held.
* Once the node's next key has signed where a key ended in a chain (audit/key_ends.py), that counts there
  instead: up to that entry, and only what leads to it.
* Verification raises SignatureError; there is no boolean to forget.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from vsql_shared.errors import KeyEndedError, KeyUnavailableError, SignatureError
from vsql_shared.private_files import read_private

PUBLIC_KEY_SIZE = 32
SIGNATURE_SIZE = 64
DEFAULT_KEY_NAME = "vsql-sync-signing"
_GENERATE = "make one with `syncctl key generate --output DIR`"


def fingerprint(public_key_raw: bytes) -> str:
    """Name of a public key: `SHA256:` and the base64 (no padding) of the SHA-256 of its raw 32 bytes."""
    digest = hashlib.sha256(public_key_raw).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


class Signer:
    """The signing key of a node. It signs; it does not show its private half."""

    def __init__(self, private_key: Ed25519PrivateKey, node: str) -> None:
        self._private_key = private_key
        self.node = node
        self.public_key = private_key.public_key().public_bytes_raw()
        self.fingerprint = fingerprint(self.public_key)

    def sign(self, message: bytes) -> bytes:
        """The 64-byte signature of `message`; deterministic."""
        return self._private_key.sign(message)


def generate_signing_key(directory: Path, name: str = DEFAULT_KEY_NAME) -> tuple[Path, Path]:
    """Write a new key pair, `<name>.key` (0600) and `<name>.pub`; an existing file is never replaced."""
    private_key = Ed25519PrivateKey.generate()
    private_path, public_path = directory / f"{name}.key", directory / f"{name}.pub"
    private_pem = private_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    if public_path.exists():  # before the private half exists, so that no half-made pair is left
        raise _exists(public_path)
    write_new_file(private_path, private_pem, 0o600)
    write_new_file(public_path, public_pem(private_key.public_key().public_bytes_raw()).encode(), 0o644)
    return private_path, public_path


def write_new_file(path: Path, content: bytes, mode: int) -> None:
    """Create `path` with `mode` from its first moment; O_EXCL, so nothing is followed or replaced."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        raise KeyUnavailableError(
            f"cannot create {path}: {error.strerror}", hint="name a directory this user may write to"
        ) from error
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _exists(path: Path) -> KeyUnavailableError:
    return KeyUnavailableError(
        f"{path} exists and is not overwritten", hint="choose another directory, or move the old key away"
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise KeyUnavailableError(
            f"cannot read key file {path}: {error.strerror}",
            hint="check the path and who may read it; it is the .pub file of `syncctl key generate`",
        ) from error


def load_signer(path: Path, node: str, *, strict: bool = True) -> Signer:
    """The signing key of `node` from a PKCS#8 PEM file.

    Raises KeyUnavailableError: unreadable, open to others (`strict`), encrypted, or not an Ed25519 key.
    """
    content = read_private(path, strict=strict, hint=f"check the path and who may read it, or {_GENERATE}")
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except TypeError as error:
        raise KeyUnavailableError(
            f"key file {path} is encrypted with a passphrase",
            hint=f"decrypt it (openssl pkey -in {path}) into a file with mode 0600",
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyUnavailableError(
            f"key file {path} holds no private key in PEM form", hint=f"expected PKCS#8 PEM; {_GENERATE}"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        kind = type(key).__name__.removesuffix("PrivateKey")
        raise KeyUnavailableError(
            f"key file {path} holds a key of another kind ({kind}), expected Ed25519", hint=_GENERATE
        )
    return Signer(key, node)


def load_public_key(path: Path) -> bytes:
    """The raw 32 bytes of an Ed25519 public key in PEM form. Raises KeyUnavailableError."""
    try:
        key = serialization.load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyUnavailableError(
            f"{path} holds no public key in PEM form", hint="expected the .pub file of `syncctl key generate`"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise KeyUnavailableError(
            f"{path} holds no Ed25519 public key", hint="expected the .pub file of `syncctl key generate`"
        )
    return key.public_bytes_raw()


def public_pem(public_key_raw: bytes) -> str:
    """A raw public key as PEM, the form other tools read."""
    key = Ed25519PublicKey.from_public_bytes(public_key_raw)
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ).decode()


class End(NamedTuple):
    """The last entry a key signed in a chain, and its hash; sequence 0: it signed none."""

    sequence: int
    entry_hash: bytes


@dataclass(frozen=True)
class PinnedKey:
    """A public key an operator accepted for a node (a row of vsql_sync.signers)."""

    node: str
    public_key: bytes
    fingerprint: str
    revoked: bool
    retired_at: int | None = None
    """µs since 1970."""
    trusted_to: Mapping[str, int] = field(default_factory=dict)
    """Of a revoked key: chain → sequence of the last entry it still counts for."""
    ends: Mapping[str, End] = field(default_factory=dict)
    """Of a key that has ended, as the node's next key signed it: chain → the last entry it counts for."""

    @property
    def ended(self) -> bool:
        """Whether an operator here ended it."""
        return self.revoked or self.retired_at is not None


class Signed(NamedTuple):
    """What a document says of when and where it was signed; sequence 0: it is no entry of a chain."""

    chain: str
    sequence: int
    at: int


class Way(NamedTuple):
    """The entries between a reader's place in a chain and a signed end behind it."""

    after: int
    hashes: frozenset[bytes]


class TrustStore:
    """The pinned keys of all nodes; says whether a document was signed by the node it claims.

    `allow_unsigned` is dev mode's: documents without signature pass for nodes without a pinned key.
    `ways`: of a chain in which a key ended, the hashes of the entries that lead to that end.
    """

    def __init__(
        self,
        keys: Iterable[PinnedKey],
        allow_unsigned: bool = False,
        ways: Mapping[str, Way] | None = None,
    ) -> None:
        self._allow_unsigned = allow_unsigned
        self._ways = ways or {}
        self._pins: dict[tuple[str, str], PinnedKey] = {}
        self._public: dict[tuple[str, str], Ed25519PublicKey] = {}
        for pin in keys:
            self._add(pin)

    def _add(self, pin: PinnedKey) -> None:
        # The table is the operator's, but whoever can write it must not slip a key under a known name.
        if len(pin.public_key) != PUBLIC_KEY_SIZE or fingerprint(pin.public_key) != pin.fingerprint:
            raise SignatureError(
                f"pinned key {pin.fingerprint} of node {pin.node} does not have this fingerprint",
                hint="vsql_sync.signers was altered; pin the key again with `syncctl node add-peer`",
            )
        name = (pin.node, pin.fingerprint)
        known = self._pins.get(name)
        if known is None or not known.ended:  # ended once is ended
            self._pins[name] = pin
        self._public[name] = Ed25519PublicKey.from_public_bytes(pin.public_key)

    def verify(
        self,
        node: str,
        signer: str,
        signature: bytes,
        message: bytes,
        signed: Callable[[], Signed] | None = None,
    ) -> None:
        """Raise SignatureError unless `signature` over `message` is by a valid key of `node`.

        `signed` reads time and place from the message; without it, a key that has ended counts for nothing.

        1. Unsigned: only where allowed, and never for a node with a pinned key (a stripped signature).
        2. The signer is pinned for this very node (a valid peer speaking for another one).
        3. The signature verifies (altered bytes).
        4. The key counted then and there: it is not retired before, nor revoked (a stolen key).
        """
        if not signer and not signature:
            self._check_unsigned(node)
            return
        pin = self._pins.get((node, signer))
        if pin is None:
            raise self._unknown(node, signer)
        try:
            self._public[node, signer].verify(signature, message)
        except InvalidSignature as error:
            raise SignatureError(
                f"the signature of node {node} (key {signer}) does not verify: altered, or not its own"
            ) from error
        if pin.ended:
            _check_counted(pin, signed() if signed is not None else None)

    def strays(self, node: str, signer: str, chain: str, sequence: int, entry_hash: bytes) -> str:
        """Why a genuine entry by a key that has ended does not lead to its signed end; '' where it does."""
        pin = self._pins.get((node, signer))
        end = pin.ends.get(chain) if pin is not None and pin.ended else None
        if end is None or sequence > end.sequence:  # what lies behind the end is no matter of hashes
            return ""
        if sequence == end.sequence and entry_hash != end.entry_hash:
            return f"not the entry {sequence} key {signer} ended with"
        way = self._ways.get(chain)
        if way is not None and sequence > way.after and entry_hash not in way.hashes:
            return f"does not lead to the entry key {signer} ended with"
        return ""

    def proven_from(self, node: str, chain: str) -> int:
        """The highest signed end of a chain: what ended keys signed is proven once that is read."""
        pins = (pin for pin in self._pins.values() if pin.node == node and pin.ended)
        return max((pin.ends[chain].sequence for pin in pins if chain in pin.ends), default=0)

    def require_not_followed(self, node: str, signer: str, chain: str, head_at: int) -> None:
        """Raise KeyEndedError when a chain has passed a retired key's end already; `head_at`: µs since 1970.

        Its owner could sign for then, dated back, what a key that followed has not.
        """
        pin = self._pins.get((node, signer))
        if pin is None or chain in pin.ends:
            return
        if pin.retired_at is not None and head_at > pin.retired_at:
            raise KeyEndedError(
                f"signed by the retired key {pin.fingerprint} of node {pin.node}, behind entries of later",
                hint="find out who has that key",
            )

    def keys_of(self, node: str) -> list[tuple[str, bytes]]:
        """(node, public key) of every key pinned for a node, ended ones too."""
        return [(pin.node, pin.public_key) for pin in self._pins.values() if pin.node == node]

    def known_up_to(self, node: str, signer: str, chain: str) -> int:
        """Of a key that has ended: the last entry of a chain it still counts for, as far as that is known."""
        pin = self._pins.get((node, signer))
        if pin is None or not pin.ended:
            return 0
        if chain in pin.ends:
            return pin.ends[chain].sequence
        return pin.trusted_to.get(chain, 0) if pin.revoked else 0

    def _check_unsigned(self, node: str) -> None:
        if any(pin.node == node for pin in self._pins.values()):
            raise SignatureError(f"node {node} has a pinned key and this document is unsigned")
        if not self._allow_unsigned:
            raise SignatureError(
                f"document of node {node} is unsigned",
                hint='configure audit.signing_key_path there; unsigned documents pass only in mode = "dev"',
            )

    def _unknown(self, node: str, signer: str) -> SignatureError:
        owners = sorted({pin.node for pin in self._pins.values() if pin.fingerprint == signer})
        if owners:
            return SignatureError(
                f"expected a key of node {node}, not of {', '.join(owners)}: {signer[:100]}"
            )
        return SignatureError(
            f"signer {signer[:100]!r} is not pinned for node {node}",
            hint="compare its fingerprint with the node's operator, then `syncctl node add-peer`",
        )


def _check_counted(pin: PinnedKey, signed: Signed | None) -> None:
    """Raise SignatureError unless a key that has ended counted for what it signed."""
    hint = "if the node has a new key, pin it with `syncctl node add-peer`"
    end = pin.ends.get(signed.chain) if signed is not None and signed.sequence else None
    if signed is not None and end is not None:
        if signed.sequence > end.sequence:
            raise KeyEndedError(
                f"signed by key {pin.fingerprint} of node {pin.node} behind its end, entry {end.sequence}",
                hint=hint,
                said=True,
            )
        return
    if pin.revoked:
        known = pin.trusted_to.get(signed.chain, 0) if signed is not None else 0
        if signed is None or not 0 < signed.sequence <= known:
            raise KeyEndedError(
                f"signed by the revoked key {pin.fingerprint} of node {pin.node}, and not known before",
                hint=hint,
            )
    elif signed is None or pin.retired_at is None or signed.at > pin.retired_at:
        raise KeyEndedError(
            f"signed by key {pin.fingerprint} of node {pin.node} after it was retired", hint=hint
        )
