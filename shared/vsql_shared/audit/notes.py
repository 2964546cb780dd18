"""Signed notes (c2sp.org/signed-note) with Ed25519 signatures and checkpoint cosignatures (tlog-cosignature).

Not here: what a note says (checkpoint.py) and which keys are to be trusted (the caller). Pure. Rules:

* A note is text that ends in a newline, an empty line, and one line a signature. It has one encoding here.
* A signature line names its key by name and key id; both must be a known key's, else it is passed over. A
  line of a known key that does not verify refuses the whole note.
* Verification raises SignatureError, malformed notes DecodeError. What `verify_note` gives are the
  signatures that verified; none at all is an error.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from vsql_shared.crypto.signing import PUBLIC_KEY_SIZE
from vsql_shared.errors import DecodeError, SignatureError

if TYPE_CHECKING:
    from vsql_shared.crypto.signing import Signer

SIGNATURE: Final = 0x01
"""Ed25519 over the note's text: a log signs its own checkpoint."""
COSIGNATURE: Final = 0x04
"""Ed25519 over time and text (cosignature/v1): somebody else has verified it."""

MAX_NOTE_SIZE = 64 << 10
"""Bytes; a checkpoint with a hundred signatures has a quarter of it."""
MAX_SIGNATURES = 100
_DASH = "— "
_KEY_ID_SIZE = 4
_TIME_SIZE = 8


@dataclass(frozen=True, slots=True)
class NoteKey:
    """A public key under the name and for the kind of signature it makes."""

    name: str
    kind: int
    public_key: bytes

    @property
    def key_id(self) -> bytes:
        """The first four bytes of SHA-256(name ‖ newline ‖ kind ‖ public key)."""
        material = self.name.encode() + b"\n" + bytes([self.kind]) + self.public_key
        return hashlib.sha256(material).digest()[:_KEY_ID_SIZE]

    @property
    def vkey(self) -> str:
        """The key as other tools take it: `name+id+base64(kind ‖ key)`."""
        material = base64.b64encode(bytes([self.kind]) + self.public_key).decode()
        return f"{self.name}+{self.key_id.hex()}+{material}"


def parse_vkey(text: str) -> NoteKey:
    """The key of a `vkey`. Raises DecodeError, also where its id is not the key's."""
    name, _, rest = text.strip().partition("+")
    key_id, _, material = rest.partition("+")
    raw = unbase64(material, "vkey")
    if not is_key_name(name) or len(raw) != 1 + PUBLIC_KEY_SIZE or raw[0] not in (SIGNATURE, COSIGNATURE):
        raise DecodeError("not the vkey of an Ed25519 key: expected name+id+base64 with kind 01 or 04")
    key = NoteKey(name, raw[0], raw[1:])
    if key.key_id.hex() != key_id:
        raise DecodeError(f"vkey {name}: its id is {key_id[:20]}, the key in it has {key.key_id.hex()}")
    return key


class NoteSignature(NamedTuple):
    """One signature line, not verified: name, key id, and what the key's kind makes of the rest."""

    name: str
    key_id: bytes
    blob: bytes


class Verified(NamedTuple):
    """A signature that verified; `at` is a cosignature's time in seconds since 1970, else None."""

    key: NoteKey
    at: int | None


@dataclass(frozen=True, slots=True)
class SignedNote:
    """A text with its signatures."""

    text: str
    signatures: tuple[NoteSignature, ...]

    def encode(self) -> str:
        """The note as it is written to a file."""
        lines = (
            f"{_DASH}{one.name} {base64.b64encode(one.key_id + one.blob).decode()}\n"
            for one in self.signatures
        )
        return f"{self.text}\n{''.join(lines)}"

    @classmethod
    def decode(cls, encoded: str) -> Self:
        """Parse without verifying. Raises DecodeError."""
        try:
            size = len(encoded.encode())
        except UnicodeEncodeError as error:  # JSON has halves of surrogate pairs
            raise DecodeError("signed note holds what is no character") from error
        if size > MAX_NOTE_SIZE:
            raise DecodeError(f"signed note longer than {MAX_NOTE_SIZE} bytes")
        if any(char < " " and char != "\n" for char in encoded):
            raise DecodeError("signed note holds a control character")
        text, mark, tail = encoded.rpartition("\n\n")
        if not mark or not tail.endswith("\n"):
            raise DecodeError("not a signed note: expected text, an empty line, and signature lines")
        lines = tail.removesuffix("\n").split("\n")
        if len(lines) > MAX_SIGNATURES:
            raise DecodeError(f"signed note with {len(lines)} signatures, at most {MAX_SIGNATURES} are read")
        return cls(text + "\n", tuple(map(_signature, lines)))

    def add(self, signature: NoteSignature) -> SignedNote:
        """The note with one more signature; one by the same key takes the former one's place."""
        kept = [
            one for one in self.signatures if (one.name, one.key_id) != (signature.name, signature.key_id)
        ]
        return SignedNote(self.text, (*kept, signature))


def is_key_name(name: str) -> bool:
    """Whether a key may be called so: no spaces, no plus, not empty."""
    return bool(name) and "+" not in name and not any(char.isspace() or char < " " for char in name)


def unbase64(text: str, where: str) -> bytes:
    """Bytes of base64 in its only form. Raises DecodeError."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DecodeError(f"{where}: not base64") from error
    if base64.b64encode(raw).decode() != text:  # padding bits that are not zero: a second encoding
        raise DecodeError(f"{where}: not canonical base64")
    return raw


def _signature(line: str) -> NoteSignature:
    name, _, encoded = line.removeprefix(_DASH).partition(" ")
    if not line.startswith(_DASH) or not is_key_name(name):
        raise DecodeError("a signature line is not `— name base64`")
    raw = unbase64(encoded, f"signature of {name}")
    if len(raw) <= _KEY_ID_SIZE:
        raise DecodeError(f"signature of {name}: {len(raw)} bytes")
    return NoteSignature(name, raw[:_KEY_ID_SIZE], raw[_KEY_ID_SIZE:])


def sign_note(signer: Signer, name: str, text: str) -> NoteSignature:
    """The signature of a log over its own text."""
    key = NoteKey(name, SIGNATURE, signer.public_key)
    return NoteSignature(name, key.key_id, signer.sign(text.encode()))


def cosign_note(signer: Signer, name: str, text: str, at: int) -> NoteSignature:
    """The cosignature of somebody else, made at `at` (seconds since 1970)."""
    key = NoteKey(name, COSIGNATURE, signer.public_key)
    signature = signer.sign(_cosigned(text, at))
    return NoteSignature(name, key.key_id, at.to_bytes(_TIME_SIZE, "big") + signature)


def _cosigned(text: str, at: int) -> bytes:
    return f"cosignature/v1\ntime {at}\n{text}".encode()


def verify_note(note: SignedNote, keys: Iterable[NoteKey]) -> list[Verified]:
    """The signatures by known keys, each verified. Raises SignatureError.

    1. A line is a known key's only when name and id are: others are passed over (other tools' witnesses).
    2. A known key's line verifies, or the note is refused (altered text, altered signature).
    3. At least one is there (a note nobody we know has signed).
    """
    known = {(key.name, key.key_id): key for key in keys}
    found = []
    for one in note.signatures:
        key = known.get((one.name, one.key_id))
        if key is not None:
            found.append(Verified(key, _verify(key, one.blob, note.text)))
    if not found:
        names = ", ".join(sorted({f"{one.name} ({one.key_id.hex()})" for one in note.signatures}))
        raise SignatureError(
            f"no signature by a known key; the note is signed by {names[:500]}",
            hint="compare the key's name and id with what its operator told you",
        )
    return found


def _verify(key: NoteKey, blob: bytes, text: str) -> int | None:
    at, signature, message = None, blob, text.encode()
    if key.kind == COSIGNATURE:
        at, signature = int.from_bytes(blob[:_TIME_SIZE], "big"), blob[_TIME_SIZE:]
        message = _cosigned(text, at)
    try:
        Ed25519PublicKey.from_public_bytes(key.public_key).verify(signature, message)
    except (InvalidSignature, ValueError) as error:  # ValueError: 32 bytes that are no key
        raise SignatureError(
            f"the signature of {key.name} ({key.key_id.hex()}) does not verify: text or signature was altered"
        ) from error
    return at
