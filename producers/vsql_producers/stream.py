"""A stream as the database has it: its row in vsql_sync.streams, and the lock that admits one worker.

Not here: what a stream does. Rules: one worker per stream and direction, held by a session advisory lock on
the connection that also writes the audit trail, so that whoever lost the lock cannot write behind its
successor's back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vsql_shared import lsn, names
from vsql_shared.errors import DatabaseError, TransientError
from vsql_shared.pg.connect import Connection, errors


@dataclass(frozen=True, slots=True)
class Stream:
    """An outgoing stream."""

    chain: str
    kind: str
    publication: str
    origin: str
    target: str
    slot_name: str
    audit_partition: int
    ack_partition: int
    desired: str
    state: str
    reason: str
    slot_created: bool
    confirmed_lsn: int | None
    """The slot was never told more, manifests aside; None: made by a version that did not note it."""
    slot_from: int | None = None
    """Where the slot began when it was made; None: as above."""


def load(conn: Connection, chain: str) -> Stream:
    """The outgoing stream of this name. Raises DatabaseError when there is none."""
    with errors("reading vsql_sync.streams"):
        row = conn.execute(
            "SELECT chain, kind, publication, origin, target, coalesce(slot_name, ''), audit_partition,"
            " ack_partition, desired, state, coalesce(state_reason, ''), slot_created,"
            " confirmed_lsn::text, slot_from::text FROM vsql_sync.streams"
            " WHERE chain = %s AND direction = 'out'",
            (chain,),
        ).fetchone()
    if row is None:
        raise DatabaseError(
            f"stream {chain} is not an outgoing stream of this node",
            hint="make one with `syncctl publication create`, see `syncctl status`",
        )
    columns: tuple[Any, ...] = (*row[:-2], *(lsn.parse(at) if at else None for at in row[-2:]))
    return Stream(*columns)


class Taken(TransientError):
    """Another worker of this stream is at work."""


def lock(conn: Connection, chain: str) -> None:
    """Take the stream's lock. Raises Taken, naming the session that has it."""
    key = names.advisory_key(chain, "out")
    with errors("taking the stream's lock"):
        row = conn.execute("SELECT pg_try_advisory_lock(%s)", (key,)).fetchone()
        if row is not None and row[0]:
            return
        holder = conn.execute(
            "SELECT a.pid, a.application_name, a.client_addr::text FROM pg_catalog.pg_locks l"
            " JOIN pg_catalog.pg_stat_activity a USING (pid) WHERE l.locktype = 'advisory' AND l.granted"
            " AND l.classid::bigint = (%s::bigint >> 32) & 4294967295"
            " AND l.objid::bigint = %s::bigint & 4294967295",
            (key, key),
        ).fetchone()
    who = f"session {holder[0]} ({holder[1]}, {holder[2] or 'local'})" if holder else "another session"
    raise Taken(
        f"stream {chain} already has a producer: {who} holds its lock",
        hint="stop that one; this one goes on when the lock is free",
    )


def set_state(conn: Connection, chain: str, state: str, reason: str | None = None) -> None:
    """Write the stream's durable state; FINISHED is its last one."""
    with errors("writing the stream's state"):
        conn.execute(
            "UPDATE vsql_sync.streams SET state = %s, state_reason = %s"
            " WHERE chain = %s AND direction = 'out' AND state <> 'FINISHED'"
            " AND (state, state_reason) IS DISTINCT FROM (%s, %s)",
            (state, reason, chain, state, reason),
        )


def slot_made(conn: Connection, chain: str, confirmed_lsn: int) -> None:
    """From now on a missing slot is a gap, and so is one that stands beyond this."""
    with errors("noting the replication slot"):
        conn.execute(
            "UPDATE vsql_sync.streams SET slot_created = true, (confirmed_lsn, slot_from) = (%s, %s)"
            " WHERE chain = %s AND direction = 'out'",
            (lsn.text(confirmed_lsn), lsn.text(confirmed_lsn), chain),
        )


def note_confirmed(conn: Connection, chain: str, position: int) -> None:
    """Note that everything below `position` may be confirmed, before PostgreSQL is told."""
    with errors("noting the confirmed position"):
        conn.execute(
            "UPDATE vsql_sync.streams SET confirmed_lsn = %s WHERE chain = %s AND direction = 'out'",
            (lsn.text(position), chain),
        )
