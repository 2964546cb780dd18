"""Looks at the published sequences, and puts what it saw into the stream.

Not here: what is said of a value (sequence_state.py). Rules (docs/design/0007):

* A batch that ends with a whole transaction takes a look with it, after the last of its rows arrived and
  before it is sealed: at the target its rows and these values are one transaction.
* Where no rows come, the interval of the settings brings a look, and so does a stop.
* A session of its own, with a lock timeout: an unfinished TRUNCATE … RESTART IDENTITY locks its sequence,
  whose numbers nobody can take meanwhile. It is passed over, and looked at when it is free. What was taken
  before is not known: with rows it goes as `unsure`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import psycopg
from psycopg import sql

from vsql_producers.batches import Batch
from vsql_producers.pgoutput import make_frame
from vsql_producers.sequence_state import Look, Sequence
from vsql_producers.signals import signal_descriptor
from vsql_producers.transactions import SEQUENCE_KEY, RelationChange
from vsql_shared import lsn
from vsql_shared.changes import SEQUENCES, Op, Transaction
from vsql_shared.config import Settings
from vsql_shared.errors import DatabaseError
from vsql_shared.pg import sequences as catalog
from vsql_shared.pg.connect import Connection, connect, errors
from vsql_shared.wire.signals import SequenceState, SequenceValue, encode_sequence

_log = logging.getLogger(__name__)

_LOCK_TIMEOUT_MS = 100
# Sequences come, go and change their names: their list is read again after so many seconds.
_LIST_SECONDS = 5.0
# After a lock was met: how long locked sequences are left out before they are tried again.
_LOCKED_SECONDS = 1.0

# A NULL: it gave out nothing since it was made or restarted. The position is read after the value.
_LOOK = """
SELECT s.seqrelid::bigint, pg_catalog.pg_sequence_last_value(s.seqrelid::pg_catalog.regclass),
    c.relfilenode::bigint, s.seqincrement, pg_catalog.pg_current_wal_insert_lsn()::text
FROM pg_catalog.pg_sequence s JOIN pg_catalog.pg_class c ON c.oid = s.seqrelid
WHERE s.seqrelid = ANY (%s)
"""
# What is known of a sequence although it is locked.
_MADE = (
    "SELECT seqrelid::bigint, seqincrement, seqstart FROM pg_catalog.pg_sequence WHERE seqrelid = ANY (%s)"
)
# Looking takes a ROW EXCLUSIVE lock, as nextval does; these are the ones it waits for.
_FREE = """ AND s.seqrelid NOT IN (
    SELECT l.relation FROM pg_catalog.pg_locks l WHERE l.locktype = 'relation' AND l.granted
    AND l.mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
    AND l.relation IS NOT NULL)
"""


class Sequences:
    """The sequences of one publication, during one epoch."""

    def __init__(self, conn: Connection, publication: str, *, interval: float = 5.0) -> None:
        """`conn` is this object's own."""
        self._conn, self._publication = conn, publication
        self._interval = interval
        self._descriptor = signal_descriptor(SEQUENCES)
        self._known: dict[int, Sequence] = {}
        self._idle: dict[int, tuple[int, Look]] = {}
        """Those that gave out nothing: their file, and what their row says."""
        self._looked: dict[int, Look] = {}
        self._list_at = self._look_at = self._locked_until = 0.0

    @classmethod
    def open(
        cls, conn: Connection, settings: Settings, publication: str, closing: Callable[..., object]
    ) -> Sequences | None:
        """Sequences of a publication that has any to carry, with a session of their own."""
        with errors("reading the publication's sequences"):
            row = conn.execute(
                "SELECT p.sequences OR EXISTS (SELECT FROM vsql_sync.publication_sequences q"
                " WHERE q.publication = p.name) FROM vsql_sync.publications p WHERE p.name = %s",
                (publication,),
            ).fetchone()
        if row is None or not row[0]:
            return None
        own = connect(
            settings.connection.conninfo("producer"),
            application_name=f"vsql-sync sequences {publication}",
            lock_timeout_ms=_LOCK_TIMEOUT_MS,
        )
        closing(own.close)
        return cls(own, publication, interval=settings.limits.sequence_interval_ms / 1000)

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._known)

    def copied(self, transaction: Transaction) -> Batch | None:
        """How far they are after a snapshot, as the last batch of its copy; None where there are none."""
        values = [one._replace(state=SequenceState.AHEAD) for one in self.look(transaction.commit_lsn)]
        values += self._unseen()
        if not values:
            return None
        batch = Batch(end_lsn=transaction.commit_lsn)
        self._append(batch, transaction, values)
        return batch

    def attach(self, batch: Batch) -> None:
        """Put what is to be said into a batch that is about to be sent."""
        if batch.continues:
            return
        values = self.look(batch.end_lsn)
        self._append(batch, batch.transactions[-1], [*values, *self._unseen()])

    def alone(self, now: float, position: int, sent_lsn: int, *, at_once: bool = False) -> Batch | None:
        """A batch of its own where it is time and something is to be said; nothing may be outstanding.

        `position`: where the last transaction that was sent ended; `sent_lsn`: nothing below is missing.
        """
        if now < self._look_at and not at_once:
            return None
        values = self.look(sent_lsn)
        if not values:
            return None
        batch = Batch()
        self._append(batch, Transaction(0, position, time.time_ns() // 1000), values)
        return batch

    def _append(self, batch: Batch, transaction: Transaction, values: list[SequenceValue]) -> None:
        if values:
            at = max((one.lsn for one in self._looked.values()), default=transaction.commit_lsn)
            frames = [make_frame(Op.SEQUENCE, SEQUENCE_KEY, at, encode_sequence(one)) for one in values]
            batch.append(transaction, frames, [RelationChange(0, SEQUENCE_KEY, self._descriptor)])

    def look(self, sent_lsn: int) -> list[SequenceValue]:
        """Look at all of them; what is to be said where the stream stands at `sent_lsn`."""
        now = time.monotonic()
        self._look_at = now + self._interval
        if now >= self._list_at:
            self._list_at = now + _LIST_SECONDS
            self._read_list()
        said = []
        self._looked = self._read(now)
        for oid, seen in self._looked.items():
            value = self._known[oid].look(seen, sent_lsn)
            if value is not None:
                said.append(value)
        return said

    def _unseen(self) -> list[SequenceValue]:
        """What is to be said of those the last look had to leave out."""
        oids = [oid for oid in self._known if oid not in self._looked]
        if not oids:
            return []
        with errors("looking for locked sequences"):
            made = self._conn.execute(_MADE, (oids,)).fetchall()
        return [self._known[oid].unseen(increment, start) for oid, increment, start in made]

    def _read_list(self) -> None:
        with errors("listing the published sequences"):
            found = catalog.published(self._conn, self._publication)
        closed = [one.name for one in found if not one.readable]
        if closed:
            names = ", ".join(map(str, closed))
            raise DatabaseError(
                f"the producer's role may not read sequence {names}",
                hint=f"GRANT SELECT ON SEQUENCE {names} TO vsql_sync_producer",
            )
        before, self._known = self._known, {}
        for one in found:
            known = before.get(one.oid)
            same = known is not None and (known.name, known.owner) == (one.name, one.owner)
            self._known[one.oid] = known if same and known is not None else Sequence(one.name, one.owner)
        self._idle = {oid: row for oid, row in self._idle.items() if oid in self._known}

    def _read(self, now: float) -> dict[int, Look]:
        found = {}
        with errors("looking at the published sequences"):
            for oid, value, file, increment, at in self._rows(now):
                if value is not None:
                    self._idle.pop(oid, None)
                    found[oid] = Look(increment, value, True, lsn.parse(at))
                elif (idle := self._read_idle(oid, file, increment, lsn.parse(at))) is not None:
                    found[oid] = idle
        return found

    def _rows(self, now: float) -> list[tuple[int, int | None, int, int, str]]:
        oids = list(self._known)
        try:
            if now >= self._locked_until:
                return self._conn.execute(_LOOK, (oids,)).fetchall()
        except psycopg.errors.LockNotAvailable:
            self._locked_until = now + _LOCKED_SECONDS
        except psycopg.errors.UndefinedTable:
            self._list_at = 0.0  # dropped a moment ago
            return []
        try:
            return self._conn.execute(_LOOK + _FREE, (oids,)).fetchall()
        except psycopg.errors.LockNotAvailable:
            return []  # one was locked between the two looks

    def _read_idle(self, oid: int, file: int, increment: int, at: int) -> Look | None:
        """One that gave out nothing: its row is read once, and when it was made anew."""
        known = self._idle.get(oid)
        if known is not None and known[0] == file and known[1].increment == increment:
            return known[1]._replace(lsn=at)
        name = self._known[oid].name
        query = sql.SQL("SELECT last_value, is_called, pg_catalog.pg_current_wal_insert_lsn()::text FROM {}")
        try:
            row = self._conn.execute(query.format(sql.Identifier(name.schema, name.table))).fetchone()
        except (psycopg.errors.LockNotAvailable, psycopg.errors.UndefinedTable):
            return None
        if row is None:
            return None
        look = Look(increment, row[0], row[1], lsn.parse(row[2]))
        if not look.is_called:
            self._idle[oid] = (file, look)
        return look
