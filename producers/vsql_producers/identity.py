"""Who signs this node's chains, and whose signatures count on them. Read from the settings and the database.

Not here: trust in other nodes (targets.py).
"""

from __future__ import annotations

from vsql_shared.config import Settings
from vsql_shared.crypto.signing import PinnedKey, Signer, TrustStore
from vsql_shared.kms import open_signer
from vsql_shared.pg.connect import Connection, errors


def own_signer(settings: Settings) -> Signer | None:
    """The node's signing key; None in dev mode without one."""
    return open_signer(settings)


def own_trust(conn: Connection, node: str, signer: Signer | None) -> TrustStore:
    """Whose signatures count on our own chain: our key, and those we had before."""
    with errors("reading the pinned keys"):
        rows = conn.execute(
            "SELECT node_name, public_key, fingerprint, revoked_at IS NOT NULL FROM vsql_sync.signers"
            " WHERE node_name = %s",
            (node,),
        ).fetchall()
    # What this node signed with a key it has revoked since is still its own chain: it must be readable.
    keys = [PinnedKey(name, bytes(public), print_, revoked=False) for name, public, print_, _ in rows]
    if signer is not None:
        keys.append(PinnedKey(node, signer.public_key, signer.fingerprint, revoked=False))
    return TrustStore(keys, allow_unsigned=signer is None)
