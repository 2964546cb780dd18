"""Forget deleted rows that no change can meet any more: tombstones of tables that two nodes write.

Not here: who writes tombstones (contested.py, SQL 019). The rule (docs/design/0022; the schedules are in
tests/unit/test_contest.py), for two nodes and tables without generations:

1. A mark: all transactions below an id have ended here, and this is our WAL behind them.
2. Once the peer has acknowledged a batch that ends at or behind the mark, it has applied all of that, and its
   acknowledgement says where in its own WAL. What its clients wrote behind that place is younger than every
   tombstone below the mark, for it waited for its clock before it applied them.
3. Once we have applied the peer's stream up to that place, nothing older can come: tombstones below the mark
   go. Never by age; not while something of the stream is parked, for what is parked comes late.

An acknowledgement by a key of the peer that has ended counts once its next key has said where (page 25).
Tombstones with generations stay: without them a key would begin anew here, and an insert fall at the peer.
So do those of tables with columns that add up, whose keys are never used again.
A node that gets nothing from its peer forgets nothing: step 3 needs its changes. That costs room, no row.
It waits for nobody: the same thread may have a transaction open that wrote tombstones.
"""

# ruff: noqa: S608 - names are quoted
from __future__ import annotations

from typing import TYPE_CHECKING

from vsql_shared.changes import quote_ident

if TYPE_CHECKING:
    from vsql_consumers.state import Stream
    from vsql_shared.pg.connect import Connection

PURGED_AT_ONCE = 10_000
"""Tombstones a statement deletes at most."""
_MARK = """
INSERT INTO vsql_sync.purge_marks (publication, below, lsn)
SELECT %(publication)s, pg_snapshot_xmin(pg_current_snapshot()), pg_current_wal_insert_lsn()
ON CONFLICT (publication) DO NOTHING
"""
_APPLIED_THERE = """
UPDATE vsql_sync.purge_marks m SET peer_lsn = t.acked_target_lsn
  FROM vsql_sync.streams s JOIN vsql_sync.counted_targets t ON t.chain = s.chain
 WHERE m.publication = %(publication)s AND m.peer_lsn IS NULL
   AND s.publication = m.publication AND s.direction = 'out' AND s.kind = 'live'
   AND t.target = %(peer)s AND t.mismatch IS NULL AND t.acked_lsn >= m.lsn
   AND t.acked_target_lsn > '0/0'
"""
# While the peer has not said where a key of it ended, and where its acknowledgements do not hold: what a mark
# took from them may be a thief's.
_HELD = """
DELETE FROM vsql_sync.purge_marks m USING vsql_sync.streams s
  JOIN vsql_sync.counted_targets t ON t.chain = s.chain
 WHERE m.publication = %(publication)s AND s.publication = m.publication
   AND s.direction = 'out' AND s.kind = 'live' AND t.target = %(peer)s AND (t.held OR t.mismatch IS NOT NULL)
"""
_DUE = """
SELECT m.below::text FROM vsql_sync.purge_marks m JOIN vsql_sync.apply_progress p ON p.chain = %(chain)s
 WHERE m.publication = %(publication)s AND p.lsn_end >= m.peer_lsn
   AND NOT EXISTS (SELECT FROM vsql_sync.parked d WHERE d.chain = p.chain AND d.replayed_at IS NULL)
"""
_TABLES = (
    "SELECT tombstones FROM vsql_sync.multi_writer_tables WHERE publication = %(publication)s"
    " AND strategy NOT IN ('first_write_wins', 'node_priority') AND delta_columns = '{}' ORDER BY tombstones"
)


def purge(conn: Connection, stream: Stream) -> int:
    """One step; how many tombstones went, from PURGED_AT_ONCE on there may be more.

    `conn` is in no transaction; again and again is no harm.
    """
    place = {"publication": stream.publication, "peer": stream.origin, "chain": stream.chain}
    conn.execute(_HELD, place)
    conn.execute(_APPLIED_THERE, place)
    due = conn.execute(_DUE, place).fetchone()
    gone = 0
    if due is not None:
        for (name,) in conn.execute(_TABLES, place).fetchall():
            deleted = conn.execute(_delete(f"vsql_sync.{quote_ident(name)}"), {"below": due[0]}).rowcount
            if deleted == PURGED_AT_ONCE:
                return deleted  # the mark stays, and the next step goes on
            gone += deleted
        conn.execute("DELETE FROM vsql_sync.purge_marks WHERE publication = %(publication)s", place)
    conn.execute(_MARK, place)
    return gone


def _delete(table: str) -> bytes:
    """Tombstones of transactions below an id. One that is left anew meanwhile has another id, and stays.

    Ids are compared in full: a mark may wait for its peer for longer than half of all ids of 32 bits. What an
    open transaction holds is passed over: it leaves the tombstone anew, or it goes with the next mark.
    """
    older = (
        "age({0}.xmin) > (SELECT pg_current_xact_id()::text::bigint + age(pg_current_xact_id()::xid)"
        " - %(below)s::bigint)"
    )
    found = (
        f"SELECT g.ctid FROM {table} g WHERE {older.format('g')} LIMIT {PURGED_AT_ONCE}"
        " FOR UPDATE SKIP LOCKED"
    )
    return f"DELETE FROM {table} t WHERE {older.format('t')} AND t.ctid = ANY (ARRAY({found}))".encode()
