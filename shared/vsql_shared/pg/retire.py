"""Ends a stream for good where another one takes over: the way back from a gap (docs/operations/slots.md).

Not here: the stream that takes over; it is a publication of another name, with a first copy of its own, so
that nothing of what is missing has to be guessed. Rules:

* At the origin only a DIVERGED stream is ended: what still runs is never cut off by mistake. Its targets
  cannot know, so there the operator's word counts.
* FINISHED is a stream's last state: no worker runs it again, whatever else is ordered. On a target one that
  is at work has ended before the operator goes on: what it applied to emptied tables would stay.
* The slot is dropped, so that it holds no WAL; another's slot of that name is left alone. One that an attempt
  before left behind (used then, or cut off) is dropped by the next.
* The chain, its entries and its topics stay: they prove what was sent.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import psycopg

from vsql_shared import names
from vsql_shared.errors import RefusedError, TransientError, UserError
from vsql_shared.pg import commands, many_writers, nodes, oplog
from vsql_shared.pg.connect import Connection, errors, translate

_LOOK_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Retired:
    """Streams that were ended: the live one and its first copies; and what became of the slot."""

    streams: list[tuple[str, str]]
    slot: str


def retire(conn: Connection, chain: str, reason: str, wait: float) -> Retired:
    """End a live stream, with its first copies, on this node. `conn` must be in autocommit mode.

    Raises TransientError when one of them is still applied after `wait` seconds.
    """
    reason = reason.strip()
    if not reason:
        raise UserError("ending a stream needs a reason", hint='--reason "slot lost, INC-7"')
    nodes.local(conn)
    rows, slot = _end(conn, chain, reason)
    dropped = _drop(conn, slot) if slot else ""
    deadline = time.monotonic() + wait
    for name, direction in rows:
        if direction == "in":
            _wait_for_worker(conn, name, deadline)
    return Retired(rows, dropped)


def _end(conn: Connection, chain: str, reason: str) -> tuple[list[tuple[str, str]], str | None]:
    """The streams that are ended with this, and the slot that is to go."""
    with errors(f"ending stream {chain}"), conn.transaction():
        direction, slot, old = _lock(conn, chain)
        if old["state"] == "FINISHED":
            return [], slot
        rows = conn.execute(
            "UPDATE vsql_sync.streams SET state = 'FINISHED', state_reason = %s, desired = 'stopped'"
            " WHERE direction = %s AND state <> 'FINISHED'"
            " AND (chain = %s OR kind = 'copy' AND pg_catalog.starts_with(chain, %s))"
            " RETURNING chain, direction",
            (f"retired: {reason}", direction, chain, f"{chain}.copy."),
        ).fetchall()
        new = {"direction": direction, "reason": reason, "streams": sorted(row[0] for row in rows)}
        oplog.record(conn, "stream.retire", "stream", chain, old=old, new=new)
        conn.execute("SELECT pg_catalog.pg_notify(%s, '')", (commands.CHANNEL,))
    return sorted(rows), slot


def _wait_for_worker(conn: Connection, chain: str, deadline: float) -> None:
    """Wait until nobody has the lock of an incoming stream."""
    key = names.advisory_key(chain, "in")
    while True:
        with errors("waiting for the stream's worker"):
            row = conn.execute(
                "SELECT pg_catalog.pg_try_advisory_lock(%s) AND pg_catalog.pg_advisory_unlock(%s)", (key, key)
            ).fetchone()
        if row is not None and row[0]:
            return
        if time.monotonic() > deadline:
            raise TransientError(
                f"stream {chain} is ended, but its worker is still at work",
                hint="stop the consumer (`syncctl daemon stop`, or its container) before you empty tables",
            )
        time.sleep(_LOOK_SECONDS)


def _lock(conn: Connection, chain: str) -> tuple[str, str | None, dict[str, object]]:
    """(direction, slot, what is ended) of a live stream that may be."""
    row = conn.execute(
        "SELECT s.direction, s.slot_name, s.state, s.state_reason, h.sequence, h.lsn_end::text,"
        " s.publication"
        " FROM vsql_sync.streams s LEFT JOIN vsql_sync.chain_heads h ON h.chain = s.chain"
        " WHERE s.chain = %s AND s.kind = 'live' FOR UPDATE OF s",
        (chain,),
    ).fetchone()
    if row is None or (row[2] == "FINISHED" and (row[0] == "in" or _find(conn, row[1]) is None)):
        what = "is ended already" if row else "is no live stream of this node"
        raise RefusedError(f"stream {chain} {what}", hint="see `syncctl status`")
    direction, slot, state, why, sequence, lsn_end, publication = row
    if many_writers.is_shared(conn, publication):
        raise RefusedError(
            f"stream {chain} is one direction of tables that two nodes write; without it they would part",
            hint="bringing one of the two level again is not built yet (docs/operations/conflicts.md)",
        )
    if direction == "out" and state not in ("DIVERGED", "FINISHED"):
        raise RefusedError(
            f"stream {chain} is {state}: only a DIVERGED stream is ended at its origin",
            hint="`syncctl pause` stops one that shall go on later",
        )
    return direction, slot, {"state": state, "why": why, "sequence": sequence, "lsn_end": lsn_end}


def _find(conn: Connection, name: str | None) -> tuple[int | None] | None:
    """Which session uses the stream's slot; None where there is none that is ours."""
    with errors(f"looking at replication slot {name}"):
        row = conn.execute(
            "SELECT active_pid FROM pg_catalog.pg_replication_slots WHERE slot_name = %s"
            " AND plugin = 'pgoutput' AND database = pg_catalog.current_database() AND NOT temporary",
            (name,),
        ).fetchone()
    return None if row is None else (row[0],)


def _drop(conn: Connection, name: str) -> str:
    """Drop the stream's slot, if there is one and it is ours; what became of it, for the operator."""
    row = _find(conn, name)
    if row is None:
        return f"there is no slot {name} of this stream"
    if row[0] is not None:
        return f"slot {name} is used by session {row[0]} and holds WAL: repeat this when that has ended"
    try:
        conn.execute("SELECT pg_catalog.pg_drop_replication_slot(%s)", (name,))
    except psycopg.Error as error:
        why = translate(error, f"dropping slot {name}").message
        return f"{why}; drop it, or it holds WAL: SELECT pg_drop_replication_slot('{name}')"
    return f"slot {name} was dropped"
