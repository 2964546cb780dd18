"""What a node's signing key must do, wherever it is, as one function: for a token and for Vault."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from vsql_shared.audit.dsse import AUDIT_ENTRY, open_document, sign_document
from vsql_shared.crypto.signing import SIGNATURE_SIZE, PinnedKey, Signer, TrustStore, fingerprint
from vsql_shared.errors import SignatureError

NODE = "node-a"


def trust(public: bytes) -> TrustStore:
    """A peer that has pinned this one key of the node."""
    return TrustStore([PinnedKey(NODE, public, fingerprint(public), revoked=False)])


def keeps_its_promises(signer: Signer, public: bytes, *, largest: int) -> None:
    """Documents it signs are those of any Ed25519 key: nobody sees where they were signed."""
    assert (signer.node, signer.public_key, signer.fingerprint) == (NODE, public, fingerprint(public))
    for size in (0, 1, 5_000, largest):
        message = bytes(size)
        document = sign_document(signer, AUDIT_ENTRY, message)
        assert open_document(trust(public), NODE, document, AUDIT_ENTRY) == message
        assert sign_document(signer, AUDIT_ENTRY, message) == document  # Ed25519 is deterministic
        altered = document[:-1] + bytes([document[-1] ^ 1])
        with pytest.raises(SignatureError):
            open_document(trust(public), NODE, altered, AUDIT_ENTRY)
    signature = signer.sign(b"message")
    assert len(signature) == SIGNATURE_SIZE
    Ed25519PublicKey.from_public_bytes(public).verify(signature, b"message")  # pure, not pre-hashed
