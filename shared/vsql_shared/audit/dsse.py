"""Signed documents: the envelope of everything on the audit and keys topics.

Not here: what a payload means (entries.py, crypto/announce.py) and where keys come from (crypto/signing.py).

Rules:
* What is signed is DSSE's pre-authentication encoding of (payload type, payload): a signature under one
  kind of document can never serve another.
* A document has one encoding. Decoding encodes again and compares, so a hash names one document only.
* `open_document` gives the payload only after the signature was verified; `SignedDocument.decode` gives
  it unverified, for recognising a document, never for acting on it.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import fastavro

from vsql_shared.errors import DecodeError
from vsql_shared.wire.pack import schema

if TYPE_CHECKING:
    from collections.abc import Callable

    from vsql_shared.crypto.signing import Signed, Signer, TrustStore

FORMAT = 1
AUDIT_ENTRY = "application/vnd.vsql-sync.audit-entry.v1+avro"
KEY_ANNOUNCEMENT = "application/vnd.vsql-sync.key-announcement.v1+avro"
MAX_DOCUMENT_SIZE = 1 << 20
"""Bytes; what Kafka takes by default. A larger document is refused before it is parsed."""


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE v1 pre-authentication encoding: what the signature covers."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


@dataclass(frozen=True, slots=True)
class SignedDocument:
    """A payload with its signature; `signer` and `signature` are empty when unsigned (dev mode)."""

    payload_type: str
    payload: bytes
    signer: str
    signature: bytes

    def encode(self) -> bytes:
        """Canonical Avro."""
        out = io.BytesIO()
        fastavro.schemaless_writer(out, schema("signed_document"), {"format": FORMAT, **asdict(self)})
        return out.getvalue()

    @classmethod
    def decode(cls, encoded: bytes, limit: int = MAX_DOCUMENT_SIZE) -> Self:
        """Parse without verifying. Raises DecodeError: too large, garbage, trailing bytes, not canonical."""
        if len(encoded) > limit:
            raise DecodeError(f"signed document of {len(encoded)} bytes, at most {limit} are read")
        try:
            raw: Any = fastavro.schemaless_reader(io.BytesIO(encoded), schema("signed_document"), None)
        except Exception as error:  # fastavro raises many types on garbage; all mean the same here
            raise DecodeError(f"not a signed document: {type(error).__name__}") from error
        found = raw.pop("format")
        if found != FORMAT:
            raise DecodeError(
                f"signed document of format {found}, expected {FORMAT}", hint="upgrade this node"
            )
        document = cls(**raw)
        # Catches trailing bytes, padded lengths and negative ones alike.
        if document.encode() != encoded:
            raise DecodeError("signed document is not in its canonical encoding")
        return document


def document_hash(encoded: bytes) -> bytes:
    """What the next entry of a chain links to: SHA-256 of the whole encoded document, signature included."""
    return hashlib.sha256(encoded).digest()


def sign_document(signer: Signer | None, payload_type: str, payload: bytes) -> bytes:
    """An encoded document; unsigned without a signer, which only dev-mode readers accept."""
    if signer is None:
        return SignedDocument(payload_type, payload, "", b"").encode()
    signature = signer.sign(pae(payload_type, payload))
    return SignedDocument(payload_type, payload, signer.fingerprint, signature).encode()


def verify_document(
    trust: TrustStore,
    node: str,
    document: SignedDocument,
    payload_type: str,
    signed: Callable[[bytes], Signed] | None = None,
) -> bytes:
    """Give the payload once `node`'s signature over it as `payload_type` is verified.

    1. The type is the expected one (a signed document of another kind put here). DecodeError.
    2. The signature is by a pinned key of `node`. SignatureError.
    3. The key counted where and when the payload says, as `signed` reads it. SignatureError, DecodeError.
    """
    if document.payload_type != payload_type:
        raise DecodeError(f"document of type {document.payload_type[:100]!r}, expected {payload_type!r}")
    payload = document.payload
    place = None if signed is None else partial(signed, payload)
    trust.verify(node, document.signer, document.signature, pae(payload_type, payload), place)
    return payload


def open_document(
    trust: TrustStore,
    node: str,
    encoded: bytes,
    payload_type: str,
    signed: Callable[[bytes], Signed] | None = None,
) -> bytes:
    """Parse, verify, and give the payload. Raises DecodeError or SignatureError."""
    return verify_document(trust, node, SignedDocument.decode(encoded), payload_type, signed)
