"""Write the changes of one window: the fastest way that fits, and the next one where it does not.

Not here: which changes wait together (apply.py). The ways, each under a savepoint but the last:

1. Inserts whose bytes the table takes as they are: COPY straight into it.
2. Anything with a key: folded, then written as sets.
3. Inserts some of whose keys are there already: update those, insert the others, as two sets.
4. Change by change, in the order of the source. Tables without a unique key, and tables whose changes keep
   their order, go this way with every update and delete.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

import psycopg

from vsql_consumers import faults, setwise
from vsql_consumers.adding import AddingWriter
from vsql_consumers.contested import Contest, ContestedWriter
from vsql_consumers.fold import Folded, Step, fold, only_inserts
from vsql_consumers.frames import Layout, LayoutChange, copied_chunks, insert_chunks
from vsql_consumers.slowpath import INSERT_EXISTS, Replay, RowWriter
from vsql_consumers.stage import Stage, Stages, copy_in, run
from vsql_consumers.statements import Plan, binary_layout, quoted
from vsql_consumers.window import Window
from vsql_shared.changes import Op, TableName
from vsql_shared.errors import DatabaseError, RowError

if TYPE_CHECKING:
    from vsql_shared.pg.connect import Connection

OnAnomaly: TypeAlias = Literal["continue", "stop"]
COPIED, FOLDED, UPSERTED, REPLAYED = "copied", "folded", "upserted", "replayed"
GENERATED_DIFFERS = "generated_differs"


@dataclass(frozen=True, slots=True)
class ApplyLimits:
    """Bounds of what is held to be written together, for one table."""

    window_rows: int = 20_000
    """Changes that wait."""
    window_bytes: int = 16 * 2**20
    """Bytes of tuples that wait."""
    copy_chunk_bytes: int = 2**20
    """Bytes of COPY data given to the connection at once."""
    direct_rows: int = 1_000
    """Inserts that are copied by themselves when another change of their table comes; fewer are folded."""


@dataclass(slots=True)
class Tally:
    """Changes by the way they were written; verdict "missing" by batch of those given; anomalies."""

    missing: Counter[int] = field(default_factory=Counter)
    ways: Counter[str] = field(default_factory=Counter)
    anomalies: Counter[tuple[TableName, str]] = field(default_factory=Counter)
    last_batch: dict[tuple[TableName, str], int] = field(default_factory=dict)

    def add(self, name: TableName, kind: str, count: int, batch: int) -> None:
        """Count anomalies of a table."""
        self.anomalies[name, kind] += count
        self.last_batch[name, kind] = batch


class _Outcome(Enum):
    """How an attempt ended: written; a unique key was violated; a row did not fit; other rows than given."""

    DONE = 1
    UNIQUE = 2
    FAILED = 3
    MISMATCH = 4


class Writer:
    """Writes windows in the open transaction."""

    def __init__(
        self,
        conn: Connection,
        stages: Stages,
        limits: ApplyLimits,
        on_anomaly: OnAnomaly,
    ) -> None:
        self._conn, self._stages, self._limits, self._on_anomaly = conn, stages, limits, on_anomaly
        self._layouts: dict[TableName, Layout] = {}
        self.tally = Tally()
        self.contest: Contest | None = None
        """Where every node writes the tables."""

    def write(self, window: Window) -> None:
        """Write a window's changes. Raises our errors and psycopg's; the transaction is then lost."""
        plan = window.plan
        if plan.differing and self._on_anomaly == "stop":
            columns = ", ".join(map(quoted, plan.differing))
            raise DatabaseError(
                f"{GENERATED_DIFFERS} at {window.naming(0)}: the source and this node do not generate column"
                f" {columns} by the same expression and functions",
                hint="define it as on the source, and functions it uses; the stream then goes on by itself;"
                ' [apply] on_anomaly = "continue" counts such changes and goes on',
            )
        if plan.differing:
            self._count_generated(window)
        layout = self._layouts.get(plan.name, b"")
        if len(layout) != len(plan.columns):
            layout = binary_layout(plan.relation)
        plaintexts = window.plaintexts()
        if self.contest is not None:
            self._contend(window, plaintexts, layout, self.contest.guard(plan))
            return
        if window.only_inserts:
            self._inserts(window, plaintexts, layout)
            return
        ops = window.ops()
        if not plan.folds:
            self._replay(window, ops, plaintexts, layout, 0)
            return
        for step in fold(ops, plaintexts, layout, plan.key):
            self._step(window, ops, plaintexts, step)

    def _count_generated(self, window: Window) -> None:
        """Rows whose generated columns are not the source's: written, counted, and so reported."""
        written = sum(op != Op.DELETE for op in window.ops())
        if written:
            batch = window.batches[window.place(window.rows - 1)[0]].batch
            self.tally.add(window.plan.name, GENERATED_DIFFERS, written, batch)

    def _inserts(self, window: Window, plaintexts: Sequence[bytes], layout: Layout) -> None:
        tried = self._copy(window, plaintexts, layout)
        if tried is _Outcome.DONE:
            return
        ops = window.ops()
        for step in only_inserts(plaintexts, layout, copied=window.copied):
            self._step(window, ops, plaintexts, step, tried)

    def _copy(self, window: Window, plaintexts: Sequence[bytes], layout: Layout) -> _Outcome | None:
        """Copy inserts straight into the table; None where their bytes do not fit it."""
        plan, chunk_bytes = window.plan, self._limits.copy_chunk_bytes
        if not plan.direct(layout):
            return None
        try:
            if window.copied:
                chunks = copied_chunks(plaintexts, len(plan.columns), chunk_bytes)
            else:
                chunks = insert_chunks(plaintexts, layout, chunk_bytes)
        except LayoutChange:
            return None
        doing = f"copying into {window.naming_range(0, window.rows)}"
        outcome = self._attempt(doing, lambda: copy_in(self._conn, plan.copy(), chunks))
        if outcome is _Outcome.DONE:
            self.tally.ways[COPIED] += window.rows
        return outcome

    def _step(
        self,
        window: Window,
        ops: Sequence[int],
        plaintexts: Sequence[bytes],
        step: Step,
        tried: _Outcome | None = None,
    ) -> None:
        """Write a step; `tried`: how the attempt ended that was made with all of them at once."""
        plan = window.plan
        self._layouts[plan.name] = step.layout
        outcome = tried or self._attempt(
            f"writing {window.naming_range(step.start, step.stop)}", self._write_set(window, step)
        )
        if outcome is _Outcome.DONE:
            self.tally.ways[FOLDED] += step.stop - step.start
            return
        if outcome is not _Outcome.FAILED and self._upsert(window, step):
            return
        part = slice(step.start, step.stop)
        self._replay(window, ops[part], plaintexts[part], step.layout, step.start)

    def _write_set(self, window: Window, step: Step) -> Callable[[], bool]:
        """How to write a step as sets, once its staging table is there."""
        plan, stages, conn = window.plan, self._stages, self._conn
        if isinstance(step, Folded):
            stage = stages.ready(plan, step.layout) if setwise.needs_stage(plan, step) else None
            size = self._limits.copy_chunk_bytes
            return lambda: setwise.write_folded(conn, plan, stages, stage, step, size)
        moving = stages.ready(plan, step.layout, plan.key)
        return lambda: setwise.write_moved(conn, plan, stages, moving, step)

    def _upsert(self, window: Window, step: Step) -> bool:
        """Write inserts as updates where their keys are there; false if that is not what the step is."""
        plan = window.plan
        if not isinstance(step, Folded) or step.deletes or step.vanished or step.updates or not plan.folds:
            return False
        if self._on_anomaly == "stop":
            return False  # change by change, so that the first one can be named
        stage = self._stages.ready(plan, step.layout)
        updated: list[int] = []

        def write() -> bool:
            count = setwise.upsert(self._conn, plan, self._stages, stage, step)
            updated.append(count or 0)
            return count is not None

        doing = f"writing {window.naming_range(step.start, step.stop)}"
        if self._attempt(doing, write) is not _Outcome.DONE:
            return False
        self.tally.ways[UPSERTED] += len(step.inserts)
        if updated[0]:
            batch = window.batches[window.place(step.stop - 1)[0]].batch
            self.tally.add(plan.name, INSERT_EXISTS, updated[0], batch)
        return True

    def _attempt(self, doing: str, act: Callable[[], bool | None]) -> _Outcome:
        """Act under a savepoint; undone unless it is DONE. `act` returns false on a mismatch."""
        self._conn.execute("SAVEPOINT vsql_step", prepare=False)
        try:
            outcome = _Outcome.MISMATCH if act() is False else _Outcome.DONE
        except psycopg.Error as error:
            if not faults.is_row_error(error):
                raise faults.fault(error, doing) from None
            outcome = _Outcome.UNIQUE if error.sqlstate == faults.UNIQUE_VIOLATION else _Outcome.FAILED
        undo = [] if outcome is _Outcome.DONE else ["ROLLBACK TO SAVEPOINT vsql_step"]
        run(self._conn, [*undo, "RELEASE SAVEPOINT vsql_step"])
        return outcome

    def _replay(
        self, window: Window, ops: Sequence[int], plaintexts: Sequence[bytes], layout: Layout, first: int
    ) -> None:
        name = window.plan.name
        self.tally.ways[REPLAYED] += len(ops)

        def anomaly(at: int, kind: str) -> None:
            if self._on_anomaly == "stop":
                raise RowError(
                    f"{kind} at {window.naming(at)}",
                    hint="compare both tables, repair the target's row, then `syncctl stream retry`; "
                    '[apply] on_anomaly = "continue" counts it and goes on',
                    place=window.named(at),
                )
            batch, _ = window.place(at)
            if kind != INSERT_EXISTS:
                self.tally.missing[batch] += 1
            self.tally.add(name, kind, 1, window.batches[batch].batch)

        replay = Replay(
            self._conn,
            window.plan,
            self._stages,
            anomaly,
            window.named,
            self._row_writer,
            whole=self.contest is not None,
        )
        self._layouts[name] = replay.run(ops, plaintexts, layout, first)

    def _contend(
        self, window: Window, plaintexts: Sequence[bytes], layout: Layout, guard: setwise.Guard
    ) -> None:
        """As sets where no other node is met, else change by change.

        A first copy meets nobody: the table is closed until it is done.
        """
        plan, ops = window.plan, window.ops()
        if window.copied and self._copy(window, plaintexts, layout) is _Outcome.DONE:
            return
        if not plan.folds or (guard.adds and not window.only_inserts):
            self._replay(window, ops, plaintexts, layout, 0)
            return
        steps: Iterable[Step] = (
            only_inserts(plaintexts, layout, copied=True)
            if window.copied
            else fold(ops, plaintexts, layout, plan.key)
        )
        for step in steps:
            self._layouts[plan.name] = step.layout
            if isinstance(step, Folded):
                write = partial(
                    setwise.write_guarded, self._conn, plan, self._stages,
                    self._stages.ready(plan, step.layout), step, guard,
                )  # fmt: skip
                doing = f"writing {window.naming_range(step.start, step.stop)}"
                if self._attempt(doing, write) is _Outcome.DONE:
                    self.tally.ways[FOLDED] += step.stop - step.start
                    continue
            part = slice(step.start, step.stop)
            self._replay(window, ops[part], plaintexts[part], step.layout, step.start)

    def _row_writer(self, conn: Connection, plan: Plan, layout: Layout, stage: Stage) -> RowWriter:
        if self.contest is not None and self.contest.require(plan.name).adding:
            return AddingWriter(conn, plan, layout, stage, self.contest)
        if self.contest is not None:
            return ContestedWriter(conn, plan, layout, stage, self.contest)
        return RowWriter(conn, plan, layout, stage)
