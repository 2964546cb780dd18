"""The stream's replication slot, held against what the stream knows of it (docs/operations/slots.md).

Not here: making it and reading from it (replication.py). Rules:

* A slot is made once. One that is missing, invalidated, another one of the same name, or ahead of what this
  stream ever confirmed, may hide changes that were never sent: DivergedError, and never another slot.
* What a stream confirmed is known before PostgreSQL is told: by a manifest in the chain, or, where nothing
  was there to send, by `streams.confirmed_lsn`. A crash in between leaves the slot behind, never ahead.
* One that another session holds is waited for, and the message says who has it.
"""

from __future__ import annotations

from typing import NamedTuple

from vsql_producers.replication import Identity
from vsql_shared import lsn
from vsql_shared.audit.chain import ChainHead
from vsql_shared.errors import DatabaseError, DivergedError, TransientError
from vsql_shared.pg.connect import Connection, errors

WAY_BACK = "`syncctl status` shows the way back (docs/operations/slots.md)"
# pg_replication_slots.invalidation_reason → what would have kept the slot. 15 and 16 only say it is lost.
_PREVENTION = {
    "wal_removed": "its WAL grew beyond max_slot_wal_keep_size; raise it, or see why the stream stood still",
    "rows_removed": "a standby's slot needs hot_standby_feedback = on there, and primary_slot_name",
    "wal_level_insufficient": "wal_level must stay logical on every server that may become the primary",
    "idle_timeout": "raise idle_replication_slot_timeout, or let the stream run",
}


class Slot(NamedTuple):
    """What pg_replication_slots says of the slot of this name."""

    confirmed_lsn: int
    lost: str
    """Why it cannot be used any more, as PostgreSQL says it; '' while it can."""
    foreign: str
    """What it is instead of a permanent pgoutput slot of this database; '' where it is one."""


def find(conn: Connection, name: str) -> Slot | None:
    """The slot of this name, whosever it is; None where there is none."""
    with errors("looking for the replication slot"):
        row = conn.execute(
            "SELECT confirmed_flush_lsn::text, wal_status, to_jsonb(s) ->> 'invalidation_reason', slot_type,"
            " plugin, database, database = current_database(), temporary"
            " FROM pg_catalog.pg_replication_slots s WHERE slot_name = %s",
            (name,),
        ).fetchone()
    if row is None:
        return None
    confirmed, wal_status, reason, kind, plugin, database, ours, temporary = row
    foreign = ""
    if kind != "logical":
        foreign = f"a {kind} slot"
    elif plugin != "pgoutput":
        foreign = f"a slot of plugin {plugin}"
    elif not ours:
        foreign = f"a slot of database {database}"
    elif temporary:
        foreign = "a temporary slot"
    lost = reason or ("wal_removed" if wal_status == "lost" else "")
    return Slot(lsn.parse(confirmed) if confirmed else 0, lost, foreign)


def require_free(slot: Slot | None, name: str) -> Slot:
    """A slot that may become a stream's, which has sent nothing yet. Raises DatabaseError for another's."""
    if slot is None or slot.foreign:
        raise DatabaseError(
            f"replication slot {name} is {slot.foreign if slot else 'not there after it was made'}",
            hint="two clusters must not share a name on one server; drop that slot if nobody needs it",
        )
    return slot


def require_usable(slot: Slot | None, name: str) -> Slot:
    """Raise DivergedError unless the slot this stream once made is still there."""
    if slot is None:
        raise DivergedError(
            f"replication slot {name} was created and is gone: changes since then may not have been sent",
            hint=f"find out who dropped it; {WAY_BACK}",
        )
    if slot.foreign:
        raise DivergedError(
            f"replication slot {name} was created and is gone, and {slot.foreign} has its name: changes since"
            " then may not have been sent",
            hint=f"find out who made that one; {WAY_BACK}",
        )
    if slot.lost:
        prevention = _PREVENTION.get(slot.lost, "PostgreSQL's log says why")
        raise DivergedError(
            f"replication slot {name} was invalidated ({slot.lost}): its WAL is gone",
            hint=f"{prevention}; {WAY_BACK}",
        )
    return slot


def explain(
    lost: DivergedError, head: ChainHead, identity: Identity, points: dict[int, int]
) -> DivergedError:
    """The same error, with the promotion or restore that took the slot away where there was one."""
    if head.timeline in (0, identity.timeline):
        return lost
    left = points.get(head.timeline)
    where = "" if left is None else f" at {lsn.text(left)}"
    return DivergedError(
        f"{lost.message}; since it was last used, timeline {head.timeline} became {identity.timeline}{where}:"
        " this server was promoted or restored, and the slot did not come along",
        hint=f"from PostgreSQL 17 on failover slots do; {WAY_BACK}",
    )


def require_not_ahead(slot: Slot, name: str, known: int) -> None:
    """Raise DivergedError where the slot confirms more than `known`, which is all this stream ever did."""
    if slot.confirmed_lsn > known:
        raise DivergedError(
            f"replication slot {name} stands at {lsn.text(slot.confirmed_lsn)}, and this stream confirmed"
            f" {lsn.text(known)} at most: somebody advanced it or made it anew, and changes between the two"
            " may not have been sent",
            hint=f"find out who did; {WAY_BACK}",
        )


def require_primary(conn: Connection) -> None:
    """Raise TransientError on a standby: it has no slot of ours to judge before it is promoted."""
    with errors("asking whether the server is a standby"):
        row = conn.execute("SELECT pg_catalog.pg_is_in_recovery()").fetchone()
    if row is not None and row[0]:
        raise TransientError(
            "this server is a standby: nothing is read from it",
            hint="the stream goes on when it is promoted, or when [connection] names the primary",
        )


def held(conn: Connection, name: str) -> TransientError:
    """The error of a slot another session uses, with that session."""
    with errors("looking who uses the replication slot"):
        row = conn.execute(
            "SELECT a.pid, a.application_name, a.client_addr::text FROM pg_catalog.pg_replication_slots s"
            " JOIN pg_catalog.pg_stat_activity a ON a.pid = s.active_pid WHERE s.slot_name = %s",
            (name,),
        ).fetchone()
    who = f"session {row[0]} ({row[1] or 'no name'}, {row[2] or 'local'})" if row else "another session"
    return TransientError(
        f"replication slot {name} is used by {who}", hint="it is taken over when that one ends"
    )
