"""The pinned public keys of nodes, and their end: retired (handed over) or revoked (stolen, or suspected so).

Not here: pinning (nodes.py), and what a signature is worth (crypto/signing.py). Rules:

* Nothing is deleted: what a key signed while it counted must stay verifiable.
* A retired key counts for what its node says it signed up to that moment. A revoked one counts only up to the
  entry of each chain that this node had seen by then, whatever time stands in an entry: a thief backdates.
* Once the node's next key has signed where a key ended (key_ends.py), that counts instead, chain by chain.
* Of this node's own key its end is fixed here and now: no entry is added behind it (SQL 021). So its workers
  are to be stopped before, unless it cannot wait.
* A mark for tombstones that came from a peer's acknowledgements goes with the key.
* Each end is one line of the operators' log.
"""

from __future__ import annotations

from collections.abc import Iterable

from psycopg.types.json import Jsonb

from vsql_shared.audit.chain import writer_of
from vsql_shared.audit.rows import microseconds
from vsql_shared.crypto.signing import End, PinnedKey, fingerprint
from vsql_shared.errors import ChainError, RefusedError, UserError
from vsql_shared.pg import key_ends, oplog
from vsql_shared.pg.connect import Connection, errors


def load(conn: Connection, node: str | None = None) -> list[PinnedKey]:
    """The keys of one node, or all."""
    with errors("reading the pinned keys"):
        rows = conn.execute(
            "SELECT node_name, public_key, fingerprint, revoked_at IS NOT NULL, retired_at, trusted_to"
            " FROM vsql_sync.signers WHERE %(node)s::text IS NULL OR node_name = %(node)s"
            " ORDER BY fingerprint",
            {"node": node},
        ).fetchall()
    keys = [
        PinnedKey(name, bytes(key), print_, revoked, microseconds(retired) if retired else None, trusted_to)
        for name, key, print_, revoked, retired, trusted_to in rows
    ]
    return key_ends.with_ends(conn, keys)


def former(conn: Connection, node: str) -> tuple[PinnedKey, ...]:
    """A node's keys that have ended, by what this database knows."""
    return tuple(key for key in load(conn, node) if key.revoked or key.retired_at is not None)


def adopt(conn: Connection, keys: Iterable[PinnedKey]) -> None:
    """Pin keys of a peer that ended before it was added here; inside the caller's transaction.

    They count for what they signed until their end. What this database knows of a key already stands.
    """
    for key in keys:
        if fingerprint(key.public_key) != key.fingerprint:
            raise RefusedError(
                f"a former key of {key.node} does not have the fingerprint beside it",
                hint="vsql_sync.signers was altered there",
            )
        owner = conn.execute(
            "SELECT node_name FROM vsql_sync.signers WHERE fingerprint = %s", (key.fingerprint,)
        ).fetchone()
        if owner is not None and owner[0] != key.node:
            raise RefusedError(f"key {key.fingerprint} is pinned for node {owner[0]}, not for {key.node}")
        added = conn.execute(
            "INSERT INTO vsql_sync.signers"
            " (fingerprint, node_name, public_key, retired_at, retired_reason, revoked_at, revoked_reason,"
            " trusted_to)"
            " VALUES (%(print)s, %(node)s, %(key)s,"
            " CASE WHEN %(retired)s::float8 IS NOT NULL THEN"
            " least(now(), to_timestamp(%(retired)s::float8 / 1e6)) END,"
            " CASE WHEN %(retired)s::float8 IS NOT NULL THEN %(reason)s END,"
            " CASE WHEN %(revoked)s THEN now() END, CASE WHEN %(revoked)s THEN %(reason)s END, %(to)s)"
            " ON CONFLICT (fingerprint) DO NOTHING",
            {
                "print": key.fingerprint, "node": key.node, "key": key.public_key,
                "retired": key.retired_at, "revoked": key.revoked, "to": Jsonb(dict(key.trusted_to)),
                "reason": "ended before the peer was added",
            },
        ).rowcount  # fmt: skip
        if added:
            new = {"fingerprint": key.fingerprint, "ended": "revoked" if key.revoked else "retired"}
            oplog.record(conn, "signer.pin", "node", key.node, new=new)


def retire(conn: Connection, fingerprint: str, reason: str, handover: bytes = b"") -> str:
    """A node hands over to another key; returns its name. `handover`: the key's own word for the next one."""
    with errors("ending a signing key"), conn.transaction():
        owner = _end(conn, "retire", fingerprint, reason)
        if handover:
            conn.execute(
                "UPDATE vsql_sync.signers SET handover = %s WHERE fingerprint = %s", (handover, fingerprint)
            )
    return owner


def revoke(conn: Connection, fingerprint: str, reason: str, *, now: bool = False) -> dict[str, int]:
    """Nothing more by this key counts; returns chain → the last entry it is still trusted for here.

    Of this node's own key: refused while a producer is at work, but for `now`.
    """
    with errors("ending a signing key"), conn.transaction():
        key_ends.hold_writers(conn)
        owner = _end(conn, "revoke", fingerprint, reason)
        if not now:
            key_ends.require_drained(conn, owner)
        rows = conn.execute(
            "SELECT chain, max(sequence) FROM (SELECT chain, sequence FROM vsql_sync.chain_heads"
            " UNION ALL SELECT chain, sequence FROM vsql_sync.apply_progress) h GROUP BY chain"
        ).fetchall()
        seen = {chain: sequence for chain, sequence in rows if _is_of(chain, owner)}
        conn.execute(
            "UPDATE vsql_sync.signers SET trusted_to = %s WHERE fingerprint = %s", (Jsonb(seen), fingerprint)
        )
        key_ends.fix_own(conn, owner, fingerprint)
    return seen


def own_heads(conn: Connection, fingerprint: str) -> list[tuple[str, int, str]]:
    """(chain, sequence, hash) of the last entry this node knows of each chain of the key's node.

    Of the node itself: what its peers must be told when a key of it is revoked.
    """
    with errors("reading the heads of chains"):
        owner = conn.execute(
            "SELECT node_name FROM vsql_sync.signers WHERE fingerprint = %s", (fingerprint,)
        ).fetchone()
        rows = conn.execute(
            "SELECT chain, sequence, entry_hash FROM vsql_sync.chain_heads WHERE own ORDER BY chain"
        ).fetchall()
    return [
        (chain, sequence, bytes(entry_hash).hex())
        for chain, sequence, entry_hash in rows
        if owner is not None and _is_of(chain, owner[0])
    ]


def trust_up_to(
    conn: Connection, fingerprint: str, chain: str, sequence: int, told: bytes, reason: str
) -> str:
    """Trust a revoked key for more entries of a chain; its owner. Whoever calls has verified them.

    `told`: the last one's hash. Of this node's own key that moves its end, as long as nobody was told.
    """
    if not reason.strip():
        raise UserError("trusting a revoked key further needs a reason", hint='--reason "…"')
    with errors("trusting a revoked key further"), conn.transaction():
        key_ends.hold_writers(conn)
        row = conn.execute(
            "UPDATE vsql_sync.signers SET trusted_to = trusted_to || jsonb_build_object(%(chain)s::text,"
            " greatest(%(to)s, coalesce((trusted_to ->> %(chain)s)::bigint, 0)))"
            " WHERE fingerprint = %(print)s AND revoked_at IS NOT NULL RETURNING node_name",
            {"chain": chain, "to": sequence, "print": fingerprint},
        ).fetchone()
        if row is None:
            raise RefusedError(f"no key {fingerprint} was revoked here", hint="see `syncctl key inventory`")
        if not _is_of(chain, row[0]):
            raise RefusedError(f"chain {chain} is not one of node {row[0]}")
        key_ends.move_own(conn, row[0], fingerprint, chain, End(sequence, told))
        new = {"fingerprint": fingerprint, "chain": chain, "sequence": sequence, "reason": reason.strip()}
        oplog.record(conn, "signer.trust", "node", row[0], new=new)
    return str(row[0])


def _is_of(chain: str, node: str) -> bool:
    try:
        return writer_of(chain) == node
    except ChainError:
        return False


def _end(conn: Connection, act: str, fingerprint: str, reason: str) -> str:
    if not reason.strip():
        raise UserError("the end of a key needs a reason", hint='--reason "…"; it is kept in the audit log')
    with errors("ending a signing key"), conn.transaction():
        row = conn.execute(
            "SELECT node_name, retired_at IS NOT NULL, revoked_at IS NOT NULL FROM vsql_sync.signers"
            " WHERE fingerprint = %s FOR UPDATE",
            (fingerprint,),
        ).fetchone()
        if row is None:
            raise RefusedError(f"no key {fingerprint} is pinned here", hint="see `syncctl key inventory`")
        if row[2] or (row[1] and act == "retire"):
            raise RefusedError(f"key {fingerprint} of node {row[0]} has ended already")
        column = "retired" if act == "retire" else "revoked"
        conn.execute(
            f"UPDATE vsql_sync.signers SET {column}_at = now(), {column}_reason = %s"  # noqa: S608 - two words
            " WHERE fingerprint = %s",
            (reason.strip(), fingerprint),
        )
        # A mark that took a place in the peer's WAL from an acknowledgement may have it from a thief.
        conn.execute(
            "DELETE FROM vsql_sync.purge_marks m USING vsql_sync.streams s"
            " JOIN vsql_sync.stream_targets t ON t.chain = s.chain"
            " WHERE m.publication = s.publication AND t.target = %s",
            (row[0],),
        )
        new = {"fingerprint": fingerprint, "reason": reason.strip()}
        oplog.record(conn, f"signer.{act}", "node", row[0], new=new)
    return str(row[0])
