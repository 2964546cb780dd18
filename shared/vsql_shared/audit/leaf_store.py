"""Keeps leaf hashes in this node's database, for as long as they are wanted.

Table vsql_sync.batch_leaves. Not here: their bytes (leaves.py), comparing them (leaf_diff.py). Rules:

* Rows are written in the transaction of what they belong to: a manifest's row, or the applying transaction.
* One binary COPY for all batches of a transaction, one row for each topic-partition.
* Any service of the node prunes, whichever comes first; the others pass. Emptying a slot locks that slot
  alone, and is tried again later where a reader or a long transaction holds it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import psycopg

from vsql_shared.audit.leaf_slots import Slot, Steps, plan
from vsql_shared.changes import PartLeaves
from vsql_shared.errors import TransientError
from vsql_shared.names import advisory_key
from vsql_shared.pg.connect import Connection, errors

LOOK_SECONDS = 30.0
"""Between two looks: this long more is written than may be kept, at most."""
# Who holds an old slot is a reader of leaves, or a transaction as old as it: neither is waited for.
_LOCK_MS = 200
_COPY = (
    "COPY vsql_sync.batch_leaves (slot, chain, sequence, part, leaves, indexes) FROM STDIN (FORMAT binary)"
)
_TYPES = ("int2", "text", "int8", "int4", "bytea", "bytea")

_log = logging.getLogger(__name__)

Kept = tuple[int, PartLeaves]
"""A manifest's sequence, and what is kept of one of its topic-partitions."""


def write_leaves(conn: Connection, slot: int | None, chain: str, kept: Sequence[Kept]) -> None:
    """Keep leaves in the open transaction; nothing where no slot is written to."""
    if slot is None or not kept:
        return
    with conn.cursor() as cursor, cursor.copy(_COPY) as copy:
        copy.set_types(_TYPES)
        for sequence, one in kept:
            copy.write_row((slot, chain, sequence, one.part, one.leaves, one.indexes))


class LeafKeeper:
    """Prunes what is kept, and says which slot is written to."""

    def __init__(self, conn: Connection, keep: timedelta, most: int, *, every: float = LOOK_SECONDS) -> None:
        """`keep`: how long (0: nothing is kept); `most`: bytes of all leaves in this database."""
        self._conn, self._keep, self._most, self._every = conn, keep, most, every
        self._next = float("-inf")
        self.slot: int | None = None
        """What is written goes here; None: nothing is kept."""
        self.nbytes = 0
        """Of all leaves in this database, at the last look."""

    def keep(self, now: float) -> bool:
        """Look after the slots when it is time; `now` is any clock that does not go back.

        False where it is not time, or where another service is at it, or somebody is in the way.
        """
        if now < self._next:
            return False
        self._next = now + self._every
        try:
            with errors("pruning kept leaves"), self._conn.transaction():
                return self._look()
        except TransientError as error:
            if not isinstance(error.__cause__, psycopg.errors.LockNotAvailable):
                raise
            _log.warning("a reader or a long transaction is in the way of pruning leaves; tried again later")
            return False

    def _look(self) -> bool:
        conn = self._conn
        mine = conn.execute(
            "SELECT pg_catalog.pg_try_advisory_xact_lock(%s)", (advisory_key("leaves", "prune"),)
        ).fetchone()
        slots = self._slots()
        self.nbytes = sum(one.nbytes for one in slots)
        if mine is None or not mine[0]:
            # Slots end seldom: the present one is right, or was a moment ago.
            self.slot = (
                next((one.number for one in slots if one.ended_at is None), None) if self._keep else None
            )
            return False
        steps = plan(slots, self._now(), self._keep, self._most)
        self._do(steps, {one.number for one in slots if one.ended_at is None})
        self.nbytes -= sum(one.nbytes for one in slots if one.number in steps.empty)
        self.slot = steps.current
        return True

    def _now(self) -> datetime:
        """The database's clock: slots have their times from it."""
        row = self._conn.execute("SELECT pg_catalog.now()").fetchone()
        return datetime.max.replace(tzinfo=UTC) if row is None else row[0]

    def _slots(self) -> list[Slot]:
        rows = self._conn.execute(
            "SELECT slot, begun_at, ended_at, (SELECT pg_catalog.pg_total_relation_size(c.oid)"
            " FROM pg_catalog.pg_class c WHERE c.relnamespace = 'vsql_sync'::pg_catalog.regnamespace"
            " AND c.relname = 'batch_leaves_' || pg_catalog.lpad(slot::text, 2, '0'))"
            " FROM vsql_sync.leaf_slots ORDER BY begun_at"
        ).fetchall()
        return [Slot(*row) for row in rows]

    def _do(self, steps: Steps, open_slots: set[int]) -> None:
        conn = self._conn
        conn.execute(f"SET LOCAL lock_timeout = {_LOCK_MS}")
        for number in steps.empty:
            conn.execute(f"TRUNCATE vsql_sync.batch_leaves_{number:02}")
        if steps.empty:
            conn.execute("DELETE FROM vsql_sync.leaf_slots WHERE slot = ANY(%s)", (list(steps.empty),))
            _log.info("leaves were pruned", extra={"slots": len(steps.empty)})
        if steps.current is not None and steps.current not in open_slots:
            conn.execute("UPDATE vsql_sync.leaf_slots SET ended_at = now() WHERE ended_at IS NULL")
            conn.execute("INSERT INTO vsql_sync.leaf_slots (slot) VALUES (%s)", (steps.current,))
