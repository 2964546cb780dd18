"""What streams say of themselves: written by their workers, read by `syncctl status`.

Rules: a row a worker has not renewed is shown as stale, never as the present state; what PostgreSQL itself
knows (the slot) is read from PostgreSQL. The table is unlogged: after a crash of the server it is empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from psycopg.types.json import Jsonb

from vsql_shared.kafka.rights import StreamName
from vsql_shared.pg.connect import Connection, errors

# Five of the services' default status intervals (limits.status_interval_ms).
STALE_AFTER = timedelta(seconds=10)


@dataclass(frozen=True, slots=True)
class StreamStatus:
    """One stream and direction of this node."""

    chain: str
    direction: str
    kind: str
    publication: str
    origin: str
    target: str
    desired: str
    desired_reason: str | None
    init_state: str
    """streams.state: NEW … SYNCHRONIZED, DIVERGED, FAILED, FINISHED."""
    init_reason: str | None
    slot_name: str | None
    origin_name: str | None
    state: str
    """What the worker said last; "not running" when it says nothing any more."""
    stale: bool
    updated_at: datetime | None
    detail: dict[str, Any]
    """docs/operations/status.md."""
    slot: dict[str, Any] | None
    """The slot as PostgreSQL has it; None where there is none."""
    sequences: list[dict[str, Any]]
    """Incoming: how far each carried sequence was said to be, and how often it was set back."""
    slot_missing: bool
    """Outgoing: a slot was made once and is not there, or another one has its name."""
    diverged: list[dict[str, Any]]
    """Incoming: tables that lack changes, and why; the stream itself may run."""


_READ = """
SELECT s.chain, s.direction, s.kind, s.publication, s.origin, s.target, s.desired, s.desired_reason,
       s.state, s.state_reason, s.slot_name, s.origin_name,
       w.state, w.updated_at < pg_catalog.clock_timestamp() - %s::interval, w.updated_at, w.detail,
       r.slot_name IS NOT NULL, r.active, r.wal_status, r.confirmed_flush_lsn::text,
       pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), r.confirmed_flush_lsn)::bigint,
       r.safe_wal_size,
       coalesce((SELECT pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
           'schema', q.sequence_schema, 'sequence', q.sequence_name, 'last_value', q.last_value,
           'is_called', q.is_called, 'set_back', q.set_back, 'applied_at', q.applied_at)
           ORDER BY q.sequence_schema, q.sequence_name)
         FROM vsql_sync.sequence_sync q WHERE q.chain = s.chain AND s.direction = 'in'), '[]'),
       s.direction = 'out' AND s.slot_created AND s.state <> 'FINISHED' AND r.slot_name IS NULL,
       coalesce((SELECT pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
           'schema', t.table_schema, 'table', t.table_name, 'reason', t.reason)
           ORDER BY t.table_schema, t.table_name)
         FROM vsql_sync.table_sync t
         WHERE t.chain = s.chain AND s.direction = 'in' AND t.state = 'DIVERGED'), '[]')
FROM vsql_sync.streams s
LEFT JOIN vsql_sync.stream_status w USING (chain, direction)
LEFT JOIN pg_catalog.pg_replication_slots r
  ON s.direction = 'out' AND r.slot_name = s.slot_name AND r.database = pg_catalog.current_database()
  AND r.plugin = 'pgoutput'
ORDER BY s.direction DESC, s.publication, s.origin, s.kind DESC, s.chain
"""


def write_status(
    conn: Connection, chain: str, direction: str, state: str, detail: Mapping[str, object]
) -> None:
    """Write the worker's row; `detail` has the keys of docs/operations/status.md."""
    with errors("writing the status"):
        conn.execute(
            "INSERT INTO vsql_sync.stream_status (chain, direction, state, detail) VALUES (%s, %s, %s, %s)"
            " ON CONFLICT (chain, direction) DO UPDATE SET state = excluded.state, detail = excluded.detail,"
            " updated_at = pg_catalog.clock_timestamp()",
            (chain, direction, state, Jsonb(dict(detail))),
        )


def read(conn: Connection, stale_after: timedelta = STALE_AFTER) -> list[StreamStatus]:
    """Every stream of this node, outgoing ones first."""
    with errors("reading the status"):
        return [_status(row) for row in conn.execute(_READ, (stale_after,))]


def _status(row: tuple[Any, ...]) -> StreamStatus:
    said, old, updated_at, detail = row[12:16]
    there, active, wal_status, confirmed, lag, safe = row[16:22]
    # A worker that stopped in order has said so; that stays true.
    stale = said is not None and bool(old) and said != "stopped"
    slot = None
    if there:
        slot = {
            "active": active,
            "wal_status": wal_status,
            "confirmed_lsn": confirmed,
            "lag_bytes": lag,
            "safe_wal_size": safe,
        }
    state = "not running" if said is None or stale else said
    stream = row[:12]
    return StreamStatus(*stream, state, stale, updated_at, detail or {}, slot, *row[22:])  # type: ignore[call-arg]  # 12 of them


def stream_names(conn: Connection) -> list[StreamName]:
    """The streams this node has, live and copy as one."""
    with errors("reading the streams"):
        rows = conn.execute(
            "SELECT DISTINCT direction, publication, origin FROM vsql_sync.streams ORDER BY 1, 2, 3"
        ).fetchall()
    return [StreamName(*row) for row in rows]
