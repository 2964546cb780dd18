"""Keeps leaf hashes in this node's database, for as long as they are wanted.

Table vsql_sync.batch_leaves. Not here: their bytes (leaves.py), comparing them (leaf_diff.py). Rules:

* Rows are written in the transaction of what they belong to: a manifest's row, or the applying transaction.
* One binary COPY for all batches of a transaction, one row for each topic-partition.
* Any service of the node prunes, whichever comes first; the others pass. Where the present slot is comes
  first, then beginning the next one, in a short transaction of its own, then emptying, slot by slot: whoever
  holds an old slot (a reader, a dump, a long transaction) keeps that slot, and nothing else.
* Evidence that cannot be pruned stops no stream: it is said in the log and in the status. What is written
  while there is no slot to write to is counted there, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import TypeVar

import psycopg

from vsql_shared.audit.leaf_slots import SLOTS, Slot, plan
from vsql_shared.changes import PartLeaves
from vsql_shared.errors import VsqlSyncError
from vsql_shared.names import advisory_key
from vsql_shared.pg.connect import Connection, errors

LOOK_SECONDS = 30.0
"""Between two looks: this long more is written than may be kept, at most."""
_SOON_SECONDS = 0.5
"""Until the next look of one that found no slot because another service is about to begin it."""
# Who holds an old slot is a reader of leaves, or a transaction as old as it: neither is waited for.
_LOCK_MS = 200
_COPY = "COPY vsql_sync.batch_leaves (slot, chain, sequence, part, leaves) FROM STDIN (FORMAT binary)"
_TYPES = ("int2", "text", "int8", "int4", "bytea")
# So few travel as statements of their own.
_SMALL = 4
_NOW = """
SELECT now(), has_table_privilege('vsql_sync.batch_leaves_00', 'TRUNCATE'),
       (SELECT max(slot) FROM vsql_sync.leaf_slots WHERE ended_at IS NULL)
"""
# A slot that holds rows and is not listed was written to with older settings: it is emptied first.
_SLOTS = """
SELECT n.slot, coalesce(s.begun_at, to_timestamp(0)),
       CASE WHEN s.slot IS NULL THEN to_timestamp(0) ELSE s.ended_at END, pg_total_relation_size(c.oid)
FROM generate_series(0, %s) n (slot)
JOIN pg_class c ON c.relnamespace = 'vsql_sync'::regnamespace
               AND c.relname = 'batch_leaves_' || lpad(n.slot::text, 2, '0')
LEFT JOIN vsql_sync.leaf_slots s ON s.slot = n.slot
WHERE s.slot IS NOT NULL OR pg_relation_size(c.oid) > 0
ORDER BY 2, 1
"""
# What was planned to be emptied may have been emptied, and begun anew, by another service since.
_AS_PLANNED = (
    "SELECT coalesce((SELECT begun_at FROM vsql_sync.leaf_slots WHERE slot = %s), to_timestamp(0)) = %s"
)

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

Kept = tuple[int, PartLeaves]
"""A manifest's sequence, and what is kept of one of its topic-partitions."""


def write_leaves(conn: Connection, slot: int | None, chain: str, kept: Sequence[Kept]) -> None:
    """Keep leaves in the open transaction; nothing where no slot is written to."""
    if slot is None or not kept:
        return
    if len(kept) <= _SMALL:
        for sequence, one in kept:
            conn.execute(
                "INSERT INTO vsql_sync.batch_leaves (slot, chain, sequence, part, leaves)"
                " VALUES (%s, %s, %s, %s, %s)",
                (slot, chain, sequence, one.part, one.leaves),
            )
        return
    with conn.cursor() as cursor, cursor.copy(_COPY) as copy:
        copy.set_types(_TYPES)
        for sequence, one in kept:
            copy.write_row((slot, chain, sequence, one.part, one.leaves))


class LeafKeeper:
    """Prunes what is kept, and writes into the slot that is written to."""

    def __init__(self, conn: Connection, keep: timedelta, most: int, *, every: float = LOOK_SECONDS) -> None:
        """`keep`: how long (0: nothing is kept); `most`: bytes of all leaves in this database."""
        self._conn, self._keep, self._most, self._every = conn, keep, most, every
        self._next = float("-inf")
        self.slot: int | None = None
        """What is written goes here; None: nothing is kept."""
        self.nbytes = 0
        """Of all leaves in this database, at the last look."""
        self.unkept = 0
        """Topic-partitions of batches written without leaves though they are wanted: there was no slot."""
        self.problem = ""
        """What stood in the way at the last look."""
        self._said = ""

    @property
    def figures(self) -> dict[str, object]:
        """For the status."""
        said: dict[str, object] = {"leaf_bytes": self.nbytes, "leaves_not_kept": self.unkept}
        return said | ({"leaf_problem": self.problem} if self.problem else {})

    def write(self, conn: Connection, chain: str, kept: Sequence[Kept]) -> None:
        """Keep leaves in the open transaction of `conn`."""
        write_leaves(conn, self.slot, chain, kept)
        if self.slot is None and self._keep:
            self.unkept += len(kept)

    def keep(self, now: float) -> bool:
        """Look after the slots when it is time; `now` is any clock that does not go back.

        False where it is not time, where another service is at it, or something is in the way. Raises
        TransientError where the database is lost.
        """
        if now < self._next:
            return False
        self._next, self.problem = now + self._every, ""
        planned = self._try("looking for a slot", self._look)
        if self.slot is None and self._keep:
            self._next = now + min(self._every, _SOON_SECONDS)
        for one in planned or ():
            self._try(f"emptying slot {one.number}", partial(self._empty, one))
        return planned is not None and not self.problem

    def _try(self, doing: str, step: Callable[[], _T]) -> _T | None:
        """One transaction. What fails in it, and leaves the session alive, is said, and that is all."""
        try:
            with errors(f"{doing} of kept leaves"), self._conn.transaction():
                self._conn.execute(f"SET LOCAL lock_timeout = {_LOCK_MS}")
                return step()
        except VsqlSyncError as error:
            if self._conn.closed:
                raise
            waited = isinstance(error.__cause__, psycopg.errors.LockNotAvailable)
            why = "a reader or a long transaction is in the way" if waited else error.message
            self._say(f"{doing}: {why}")
            return None

    def _say(self, problem: str) -> None:
        self.problem = self.problem or problem
        level = logging.DEBUG if problem == self._said else logging.WARNING
        _log.log(level, "kept leaves are not looked after, tried again later: %s", problem)
        self._said = problem

    def _look(self) -> list[Slot] | None:
        """Where to write, beginning the next slot where it is time; and slots to be emptied.

        None: another service is at it.
        """
        conn, alone = self._conn, self._alone()  # first: what is read is then what the last one left
        ((now, may_empty, current),) = conn.execute(_NOW).fetchall()
        # Before anything that may fail: whoever is in the way of pruning is not in the way of writing.
        self.slot = current if self._keep else None
        if not may_empty:
            self._say("TRUNCATE on vsql_sync.batch_leaves_00 … _31 is not granted: run `syncctl node init`")
        slots = [Slot(*row) for row in conn.execute(_SLOTS, (SLOTS - 1,)).fetchall()]
        self.nbytes = sum(one.nbytes for one in slots)
        if not alone:
            return None
        steps = plan(slots, now, self._keep, self._most)
        if steps.current is not None and steps.current != current:
            conn.execute("UPDATE vsql_sync.leaf_slots SET ended_at = now() WHERE ended_at IS NULL")
            conn.execute("INSERT INTO vsql_sync.leaf_slots (slot) VALUES (%s)", (steps.current,))
        self.slot = steps.current
        return [one for one in slots if one.number in steps.empty]

    def _alone(self) -> bool:
        """Until the transaction ends, no other service looks after the slots."""
        key = advisory_key("leaves", "prune")
        ((mine,),) = self._conn.execute("SELECT pg_try_advisory_xact_lock(%s)", (key,)).fetchall()
        return bool(mine)

    def _empty(self, one: Slot) -> None:
        conn = self._conn
        if not self._alone():
            return
        ((as_planned,),) = conn.execute(_AS_PLANNED, (one.number, one.begun_at)).fetchall()
        if not as_planned:
            return
        conn.execute(f"TRUNCATE vsql_sync.batch_leaves_{one.number:02}")
        conn.execute("DELETE FROM vsql_sync.leaf_slots WHERE slot = %s", (one.number,))
        self.nbytes -= one.nbytes
        _log.info("leaves were pruned", extra={"slot": one.number})
