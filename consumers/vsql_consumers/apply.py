"""Opened batches in, rows in PostgreSQL out, in one target transaction under the stream's origin.

Not here: what progress and receipts hold (the caller writes them in the same transaction, through `finish`),
how changes are folded (fold.py), and SQL (statements.py). Rules:

1. Changes wait table by table; a TRUNCATE, another descriptor of the table and the end of `apply` end the
   wait. Tables are independent of each other: foreign keys are not checked in a replica session. A table
   whose changes keep their order ends the wait of all.
2. Inserts are copied straight into the table where the bytes allow it; everything else is folded by key and
   written as sets. What does not fit is undone to a savepoint and replayed change by change, in order.
3. Changes of transactions that the table's first copy has already seen are passed over; their verdict is
   "applied": their effect is there. So are those of transactions an operator decided not to apply, with the
   verdict he chose.
4. The catalog is read again for a table that changed since: before a transaction's first write its tables are
   locked against DDL and their versions compared.
5. After any error the transaction is rolled back and nothing is kept of it: the same batches may be given
   again.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import psycopg

from vsql_consumers import faults
from vsql_consumers.contested import LOST, Contest
from vsql_consumers.frames import read_truncate
from vsql_consumers.origin import OriginSession
from vsql_consumers.plans import Plans
from vsql_consumers.signals import Signals
from vsql_consumers.stage import Stages, run
from vsql_consumers.statements import Plan, truncate_sql
from vsql_consumers.window import Window, in_words, runs, transactions
from vsql_consumers.write import GENERATED_DIFFERS, ApplyLimits, OnAnomaly, Tally, Writer
from vsql_shared.changes import SIGNALS, Op, OpenedBatch, TableName
from vsql_shared.errors import DecodeError, RowError

if TYPE_CHECKING:
    from vsql_shared.pg.connect import Connection

log = logging.getLogger(__name__)
# Back to deferred: the next transaction may break for a moment what it mends before its end.
_CHECK = ("SET CONSTRAINTS ALL IMMEDIATE", "SET CONSTRAINTS ALL DEFERRED")
# A run of changes joins its window in pieces of this many, so that the window's bounds are kept.
_STRIDE = 1_000

Verdicts = dict[str, int]
APPLIED, MISSING = "applied", "missing"


@dataclass(slots=True)
class _TruncateGroup:
    """Tables one TRUNCATE named that have come so far."""

    options: int
    size: int
    tables: list[tuple[Plan, bool]]
    """With each whether its first copy has already seen the TRUNCATE, or it is passed over."""


class Applier:
    """Applies batches of one chain. One instance per connection, in one thread."""

    def __init__(
        self,
        conn: Connection,
        chain: str,
        *,
        limits: ApplyLimits | None = None,
        on_anomaly: OnAnomaly = "continue",
        skip: Mapping[TableName, int] | None = None,
    ) -> None:
        """`skip`: table → position of its first copy; what commits before is in it."""
        self._conn, self._chain = conn, chain
        self._limits = limits or ApplyLimits()
        self._skip = dict(skip or {})
        self._session = OriginSession(conn)
        self._stages = Stages(conn, self._limits.copy_chunk_bytes)
        self._writer = Writer(conn, self._stages, self._limits, on_anomaly)
        self._contest: Contest | None = None
        self._plans = Plans(conn, self._stages)
        self._signals = Signals(conn, chain)
        self._windows: dict[TableName, Window] = {}
        self._group: _TruncateGroup | None = None
        self._unsettled: Counter[str] = Counter()
        self.anomalies: Counter[str] = Counter()
        """Anomalies committed so far, by kind."""
        self.ways: Counter[str] = Counter()
        """Changes by the way they were written (copied, folded, upserted, replayed), rolled back or not."""

    def setup(self, origin_name: str) -> None:
        """Prepare the session and take the replication origin. Raises our errors."""
        self._session.setup(origin_name)

    def contend(self, contest: Contest | None) -> None:
        """From now on every node writes these tables (None: only the source). Between transactions.

        A transaction is then applied by itself: `apply` is given one, or fragments of one.
        """
        self._contest = self._writer.contest = contest

    def apply(
        self, batches: Sequence[OpenedBatch], *, singly: bool = False, late: bool = False
    ) -> list[Verdicts]:
        """Write the batches' changes in the open transaction (one is begun if none is); verdicts of each.

        `singly`: source transactions do not wait together, and constraints are checked after each: slower,
        and every refusal names its transaction. `late`: others of the stream were applied
        since. Raises DatabaseError, TransientError and DecodeError; the
        transaction is then rolled back.
        """
        with self._rolled_back(f"applying {self._chain}"):
            self._session.begin()
            self._plans.prepare(batches)
            self._writer.tally = Tally()
            self._begin_contest(batches, late=late)
            for number, batch in enumerate(batches):
                if singly:
                    self._route_singly(batches, number, batch)
                else:
                    self._route(batches, number, batch, runs(batch))
            self._flush_all()
            return self._verdicts(batches)

    def apply_transaction(self, batch: OpenedBatch, start: int, stop: int) -> Verdicts:
        """Write changes [start, stop) of a batch, one source transaction, in the open transaction; verdicts.

        Raises as `apply` does.
        """
        with self._rolled_back(f"applying {self._chain}"):
            self._session.begin()
            self._plans.prepare([batch])
            self._writer.tally = Tally()
            self._begin_contest([batch], start)
            self._route([batch], 0, batch, runs(batch, start, stop))
            self._flush_all()
            self._settle_tally()
            passed = batch.passed.get(batch.tx_of[start])
            counts = Counter({passed: stop - start} if passed else {})
            if not passed:
                counts[MISSING] = self._writer.tally.missing[0]
                counts[LOST] = 0 if self._contest is None else self._contest.lost
                counts[APPLIED] = stop - start - counts.total()
            return {verdict: count for verdict, count in counts.items() if count}

    def _begin_contest(self, batches: Sequence[OpenedBatch], at: int = 0, *, late: bool = False) -> None:
        """What comes now is of the transaction of change `at`."""
        contest = self._contest
        if contest is None:
            return
        contest.lost, contest.late = 0, late
        contest.pci = any(batch.contains_pci for batch in batches)
        if batches and batches[0].ops:
            contest.now = batches[0].transactions[batches[0].tx_of[at]]

    def begin_with(self, first: Callable[[Connection], None]) -> None:
        """Begin a transaction whose first act is the caller's: locks it must hold before it writes."""
        with self._rolled_back(f"beginning with {self._chain}"):
            self._session.begin()
            first(self._conn)

    def finish(
        self, origin_lsn: int, origin_time_us: int, before_commit: Callable[[Connection], None]
    ) -> int:
        """Commit, with what `before_commit` writes; where the commit ends in the target's WAL."""
        with self._rolled_back(f"committing {self._chain}"):
            if self._group is not None:
                raise DecodeError("a TRUNCATE's tables did not all come before its transaction ended")
            self._session.begin()
            self._signals.before_commit()
            before_commit(self._conn)
            at = self._session.commit(origin_lsn, origin_time_us)
            self._signals.after_commit()
        self._stages.settle()
        self._plans.settle()
        self.anomalies += self._unsettled
        self._unsettled.clear()
        return at

    def abort(self) -> None:
        """Roll back; nothing since the last `finish` is kept."""
        self._session.rollback()
        self._stages.forget()
        self._plans.forget()
        self._signals.forget()
        self._windows.clear()
        self._group = None
        self._unsettled.clear()

    def rest(self) -> None:
        """Nothing comes for a while: drop the staging tables (stage.py says why)."""
        with self._rolled_back(f"tidying up after {self._chain}"):
            self._stages.drop_all()

    @contextmanager
    def _rolled_back(self, doing: str) -> Iterator[None]:
        """On any error inside: roll back; psycopg's errors become ours."""
        try:
            yield
        except psycopg.Error as error:
            self.abort()
            raise faults.fault(error, doing) from None
        except BaseException:
            self.abort()
            raise

    def _route_singly(self, batches: Sequence[OpenedBatch], number: int, batch: OpenedBatch) -> None:
        """Write a batch transaction by transaction; what only a check at its end refuses names it too."""
        for start, stop in transactions(batch):
            try:
                self._route(batches, number, batch, runs(batch, start, stop))
                self._flush_all()
                if not batch.continues or stop < len(batch.ops):
                    run(self._conn, _CHECK)
            except psycopg.Error as error:
                place = batch.place(start)._replace(table=faults.table_of(error), change=None)
                raise faults.fault(error, f"checking {in_words(place)}", place) from None

    def _route(
        self,
        batches: Sequence[OpenedBatch],
        number: int,
        batch: OpenedBatch,
        parts: Iterable[tuple[int, int]],
    ) -> None:
        """Put a batch's changes where they wait."""
        for start, stop in parts:
            op = batch.ops[start]
            if op in SIGNALS:
                self._signal(op, batch, start, stop)
                continue
            plan = self._plans.of(batch, batch.relation_of[start])
            if op == Op.TRUNCATE:
                for at in range(start, stop):
                    self._truncate(plan, batch, at)
                continue
            if self._group is not None:
                raise DecodeError(f"a TRUNCATE of {self._group.size} tables is interrupted by other changes")
            if op in (Op.UPDATE, Op.DELETE) and not plan.identified:
                raise DecodeError(f"an update or delete of {plan.name}, which has no replica identity")
            for first, last in self._to_write(plan.name, batch, start, stop):
                self._wait(Window(plan, batches, op == Op.COPY), number, first, last, op)

    def _signal(self, op: int, batch: OpenedBatch, start: int, stop: int) -> None:
        """Changes [start, stop) that are no rows: messages keep their place among them.

        Messages begin where the first copy begins: what was said before was said to others.
        """
        name = batch.relations[batch.relation_of[start]].name
        if name != SIGNALS[op] or self._group is not None:
            raise DecodeError(
                f"a record of {name} claims to be what {SIGNALS[op]} is for, or interrupts a TRUNCATE"
            )
        if op == Op.MESSAGE:
            begin = min(self._skip.values(), default=0)
            meant = [
                one.commit_lsn >= begin and number not in batch.passed
                for number, one in enumerate(batch.transactions)
            ]
            late = [at for at in range(start, stop) if meant[batch.tx_of[at]]]
            if late:
                self._flush_all()
                self._signals.emit([batch.plaintexts[at] for at in late])
            return
        for plaintext in batch.plaintexts[start:stop]:
            self._signals.take(plaintext)

    def _to_write(
        self, name: TableName, batch: OpenedBatch, start: int, stop: int
    ) -> Iterator[tuple[int, int]]:
        """What of changes [start, stop) the table's first copy has not seen, and nobody has passed over."""
        before = self._skip.get(name, 0)
        if not batch.passed and before <= min((t.commit_lsn for t in batch.transactions), default=before):
            yield start, stop
            return
        left = [t.commit_lsn < before or n in batch.passed for n, t in enumerate(batch.transactions)]
        at = start
        for left_out, changes in groupby(batch.tx_of[start:stop], left.__getitem__):
            end = at + sum(1 for _ in changes)
            if not left_out:
                yield at, end
            at = end

    def _wait(self, new: Window, number: int, start: int, stop: int, op: int) -> None:
        """Let changes wait in their table's window; write it first where they cannot join it."""
        plan, limits = new.plan, self._limits
        if plan.target.ordered:
            self._flush_all()
        for first in range(start, stop, _STRIDE):
            last = min(stop, first + _STRIDE)
            window = self._windows.get(plan.name)
            if window is not None and not _joins(window, new, op, limits.direct_rows):
                self._flush(plan.name)
                window = None
            if window is None:
                window = self._windows[plan.name] = Window(plan, new.batches, new.copied)
            window.add(number, first, last, op)
            if window.rows >= limits.window_rows or window.size >= limits.window_bytes:
                self._flush(plan.name)
        if plan.target.ordered:
            self._flush_all()

    def _flush(self, name: TableName) -> None:
        window = self._windows.pop(name, None)
        if window is not None:
            self._signals.before_rows()
            self._writer.write(window)

    def _flush_all(self) -> None:
        for name in list(self._windows):
            self._flush(name)

    def _truncate(self, plan: Plan, batch: OpenedBatch, at: int) -> None:
        """Take one table of a TRUNCATE; the last one runs it."""
        options, position, size = read_truncate(batch.plaintexts[at])
        group = self._group
        if group is None:
            group = self._group = _TruncateGroup(options, size, [])
        if (options, size, position) != (group.options, group.size, len(group.tables)):
            raise DecodeError(f"a TRUNCATE of {group.size} tables lacks table {len(group.tables)}")
        before, number = self._skip.get(plan.name, 0), batch.tx_of[at]
        left_out = number in batch.passed or batch.transactions[number].commit_lsn < before
        group.tables.append((plan, left_out))
        if len(group.tables) < size:
            return
        self._flush_all()
        self._group = None
        if self._contest is not None and not all(seen for _, seen in group.tables):
            raise RowError(
                f"{plan.name} was truncated on node {self._contest.origin}, and every node writes it",
                hint="somebody passed by the trigger that refuses it; skip the transaction, then DELETE",
                place=batch.place(at),
            )
        statements = truncate_sql(
            [found for found, seen in group.tables if not seen], len(group.tables), options
        )
        self._signals.before_rows()
        run(self._conn, statements)

    def _settle_tally(self) -> None:
        tally = self._writer.tally
        _write_anomalies(self._conn, self._chain, tally)
        self.ways += tally.ways
        for (_, kind), count in tally.anomalies.items():
            self._unsettled[kind] += count

    def _verdicts(self, batches: Sequence[OpenedBatch]) -> list[Verdicts]:
        self._settle_tally()
        tally = self._writer.tally
        verdicts = []
        for number, batch in enumerate(batches):
            counts = Counter({MISSING: tally.missing[number]})
            if self._contest is not None:
                counts[LOST] = self._contest.lost
            for transaction, count in batch.passed_over().items():
                counts[batch.passed[transaction]] += count
            counts[APPLIED] = len(batch.ops) - counts.total()
            verdicts.append({verdict: count for verdict, count in counts.items() if count})
        return verdicts


def _joins(window: Window, new: Window, op: int, direct_rows: int) -> bool:
    """Whether changes may wait together with those of a window.

    Inserts alone are copied; folded with others they cost more, so many of them go first by themselves.
    Without folding, inserts and other changes never mix.
    """
    if window.plan is not new.plan or window.copied != new.copied:
        return False
    inserts = op in (Op.INSERT, Op.COPY)
    if inserts == window.only_inserts:
        return True
    if not new.plan.folds:
        return False
    return inserts or window.rows < direct_rows


def _write_anomalies(conn: Connection, chain: str, tally: Tally) -> None:
    """Add up a transaction's anomalies in vsql_sync.anomalies, and log them: counts only."""
    for (name, kind), count in sorted(tally.anomalies.items()):  # one order, or members wait for each other
        batch = tally.last_batch[name, kind]
        conn.execute(
            "INSERT INTO vsql_sync.anomalies AS a (chain, table_schema, table_name, kind, count, last_batch)"
            " VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT (chain, table_schema, table_name, kind) DO UPDATE"
            " SET count = a.count + excluded.count, last_batch = excluded.last_batch, last_at = now()",
            (chain, name.schema, name.table, kind, count, batch),
        )
        if kind == GENERATED_DIFFERS:
            continue  # said once, with the columns, where the plan was made
        log.warning(
            "changes did not fit the target's rows",
            extra={"chain": chain, "table": str(name), "kind": kind, "count": count, "batch": batch},
        )
