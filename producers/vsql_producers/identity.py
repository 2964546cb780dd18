"""Who signs this node's chains, and whose signatures count on them. Read from the settings and the database.

Not here: trust in other nodes (targets.py).
"""

from __future__ import annotations

from vsql_shared.config import Settings
from vsql_shared.crypto.signing import PinnedKey, Signer, TrustStore
from vsql_shared.kms import open_signer
from vsql_shared.pg import key_ends
from vsql_shared.pg.connect import Connection


def own_signer(settings: Settings) -> Signer | None:
    """The node's signing key; None in dev mode without one."""
    return open_signer(settings)


def own_trust(conn: Connection, node: str, chain: str, signer: Signer | None) -> TrustStore:
    """Whose signatures count on a chain of ours: our key, and those we had before, each up to its end.

    Raises EnvironmentFault when our key has ended: it signs nothing any more.
    """
    key_ends.require_signing(conn, signer)
    keys = key_ends.own_pins(conn, node, chain)
    if signer is not None and signer.fingerprint not in {key.fingerprint for key in keys}:
        keys.append(PinnedKey(node, signer.public_key, signer.fingerprint, revoked=False))
    return TrustStore(keys, allow_unsigned=signer is None)
