"""One entry into the node's own audit trail, in one round trip, by whoever knows what it must follow.

As `store.insert_entries`, for a writer that keeps its chain's head in memory: what that reads, compares and
writes in turn, is one statement here. Rules: it goes in only behind the very entry it was made to follow, or
not at all (ChainError): a process that lost its epoch cannot write behind its successor's back. Nor behind
the end of a key that was revoked (SQL 021).
"""

from __future__ import annotations

import uuid

from psycopg import sql

from vsql_shared import lsn
from vsql_shared.audit.base import base_in
from vsql_shared.audit.chain import ChainHead, advance
from vsql_shared.audit.rows import COLUMNS, columns_of, parse, timestamp
from vsql_shared.audit.store import insert_entries
from vsql_shared.audit.tree import encode_tree
from vsql_shared.errors import ChainError
from vsql_shared.pg.connect import Connection, errors

_APPEND = sql.SQL(
    # Materialized, and joined: whoever revokes the key meanwhile has waited, or this entry is refused.
    "WITH counted AS MATERIALIZED (SELECT vsql_sync.require_counted(%s, %s, %s)),"
    " moved AS (UPDATE vsql_sync.chain_heads SET (epoch, incarnation, sequence, entry_hash, batch,"
    " lsn_end, unfinished_from, event_timestamp, system_identifier, timeline, tree, kafka_offset,"
    " remembered_at) = (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, NULL, now())"
    " FROM counted WHERE chain = %s AND own AND sequence = %s AND entry_hash = %s RETURNING 1)"
    " INSERT INTO vsql_sync.vsql_sync_audit ({}) SELECT {} FROM moved"
).format(
    sql.SQL(", ").join(map(sql.Identifier, COLUMNS)), sql.SQL(", ").join(sql.Placeholder() for _ in COLUMNS)
)


def append_entry(conn: Connection, encoded: bytes, before: ChainHead) -> None:
    """Add an accepted document behind `before`, and commit; `conn` is in autocommit mode."""
    stored = parse(encoded, None)
    entry = stored.entry
    if before.sequence == 0 or base_in(entry) is not None:
        insert_entries(conn, [(encoded, None)])
        return
    head = advance(before, entry, stored.entry_hash, "vsql_sync.vsql_sync_audit")
    moved = (
        head.epoch,
        uuid.UUID(bytes=head.incarnation),
        head.sequence,
        head.entry_hash,
        head.batch,
        lsn.text(head.lsn_end),
        head.unfinished_from,
        timestamp(head.event_timestamp),
        head.system_identifier,
        head.timeline,
        encode_tree(head.tree),
    )
    counted = (stored.document.signer, entry.chain, entry.sequence)
    behind = (entry.chain, before.sequence, before.entry_hash)
    with errors("writing the audit trail"):
        done = conn.execute(_APPEND, (*counted, *moved, *behind, *columns_of(stored).values()))
    if done.rowcount != 1:
        raise ChainError(
            f"chain {entry.chain}: another process has written to the audit trail",
            record="vsql_sync.chain_heads",
            hint="this process has been replaced; it must stop",
        )
