"""Staging tables: where rows wait, in the source's types, for the statement that writes them.

Not here: those statements (statements.py). A staging table is temporary and belongs to one descriptor, one
layout and one choice of old columns; its columns are `k`, `o<n>`, `c<n>`. Rules:

* A set of rows has a number `k` that no other set of the session has, so that a table need not be emptied
  between sets; it is truncated when some hundreds of rows were left in it.
* A temporary table of a session that lives for months keeps the database from freezing old transaction ids
  (vacuum never visits it): tables are dropped when they are an hour old, and by `rest`.
* There are at most some hundreds of them: the server's lock table is small, and each that is dropped takes a
  lock.
* A table made in a transaction that was rolled back is gone, and forgotten.
* A wide plan's rows do not fit into a table beside their number and old values: packed.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

from vsql_consumers import packed
from vsql_consumers.frames import NULL, Fields, Layout, field_chunks
from vsql_consumers.packed import RowType
from vsql_consumers.statements import NEW, OLD, Plan
from vsql_shared.changes import TableName

if TYPE_CHECKING:
    from vsql_shared.pg.connect import Connection

_LEFT_ROWS = 1_000
_OLD_SECONDS = 3_600.0
STAGES_MAX = 200
"""Staging tables of a session; the one that was used longest ago gives way."""
_INT4 = b"\0\0\0\4"
# The number of a set is an int4; a session that ever gets there begins anew.
_LAST_SET = 2**31 - 2


@dataclass(slots=True)
class Stage:
    """One staging table; `old`: the columns whose old values are staged."""

    name: str
    plan: Plan
    layout: Layout
    old: tuple[int, ...]
    made_at: float
    row_types: tuple[RowType, ...] = ()
    """Of the columns beside `k`; none unless the plan is wide."""
    left_rows: int = 0
    rows: list[Sequence[bytes | None]] = field(default_factory=list)

    def add(self, number: int, fields: Fields, old: Sequence[bytes | None] | None = None) -> None:
        """Put a row of set `number` in; it is there after `Stages.fill`. No `old`: NULLs."""
        olds = old if old is not None else (NULL,) * len(self.old)
        first = _INT4 + number.to_bytes(4, "big")
        if not self.row_types:
            self.rows.append((first, *olds, *fields))
            return
        by_old = dict(zip(self.old, olds, strict=True))
        values = ((t, [by_old[n] if t.side == OLD else fields[n] for n in t.columns]) for t in self.row_types)
        self.rows.append((first, *(self._pack(row_type, value) for row_type, value in values)))

    @property
    def width(self) -> int:
        """How many columns it has."""
        return 1 + (len(self.row_types) or len(self.old) + len(self.plan.columns))

    def _pack(self, row_type: RowType, fields: Sequence[bytes | None]) -> bytes:
        return packed.pack([self.plan.staged_type(n, self.layout).oid for n in row_type.columns], fields)


class Stages:
    """The staging tables of one session."""

    def __init__(self, conn: Connection, chunk_bytes: int) -> None:
        self._conn = conn
        self._chunk_bytes = chunk_bytes
        self._stages: dict[tuple[TableName, Layout, tuple[int, ...]], Stage] = {}
        self._unsettled: list[tuple[TableName, Layout, tuple[int, ...]]] = []
        self._numbers = self._names = 0

    def number(self) -> int:
        """A number for a set of rows."""
        self._numbers = self._numbers % _LAST_SET + 1
        return self._numbers

    def ready(self, plan: Plan, layout: Layout, old: tuple[int, ...] = ()) -> Stage:
        """The staging table for these rows, empty of rows to fill. Call it before a savepoint."""
        key = (plan.name, layout, old)
        stage = self._stages.get(key)
        if stage is not None and stage.plan is not plan:
            self.drop(plan.name)
            stage = None
        if stage is None:
            if len(self._stages) >= STAGES_MAX:
                self._drop([next(iter(self._stages))])
            stage = self._make(plan, layout, old)
            self._unsettled.append(key)
        self._stages.pop(key, None)
        self._stages[key] = stage  # the last one used is last
        stage.rows = []
        return stage

    def _make(self, plan: Plan, layout: Layout, old: tuple[int, ...]) -> Stage:
        self._names += 1
        name = f"pg_temp.vsql_stage_{self._names}"
        sides = ((OLD, old), (NEW, range(len(plan.columns))))
        columns, row_types = ["k int4"], []
        for side, numbers in sides:
            values = {n: f"{side}{n} {plan.staged_type(n, layout).sql}" for n in numbers}
            if not plan.wide:
                columns += values.values()
                continue
            for group, members in groupby(sorted(numbers), packed.group):
                row_type = RowType(f"{name}_{side}{group}", side, tuple(members))
                self._create(row_type.name, [values[n] for n in row_type.columns])
                columns.append(f"{side}_{group} {row_type.name}")
                row_types.append(row_type)
        self._create(name, columns)
        return Stage(name, plan, layout, old, time.monotonic(), tuple(row_types))

    def _create(self, name: str, columns: Sequence[str]) -> None:
        text = f"CREATE TEMPORARY TABLE {name[8:]} ({', '.join(columns)})"
        self._conn.execute(text.encode(), prepare=False)

    def fill(self, stage: Stage) -> None:
        """Write the rows that were added."""
        if not stage.rows:
            return
        if stage.left_rows >= _LEFT_ROWS:
            self._conn.execute(f"TRUNCATE {stage.name}".encode(), prepare=False)
            stage.left_rows = 0
        chunks = field_chunks(stage.rows, stage.width, self._chunk_bytes)
        stage.left_rows += len(stage.rows)
        stage.rows = []
        copy_in(self._conn, f"COPY {stage.name} FROM STDIN (FORMAT binary)", chunks)

    def drop(self, name: TableName) -> None:
        """Drop what was made for a table."""
        self._drop([key for key in self._stages if key[0] == name])

    def drop_old(self) -> None:
        """Drop the tables that are too old to keep. Within a transaction."""
        before = time.monotonic() - _OLD_SECONDS
        self._drop([key for key, stage in self._stages.items() if stage.made_at < before])

    def drop_all(self) -> None:
        """Drop them all."""
        self._drop(list(self._stages))

    def _drop(self, keys: list[tuple[TableName, Layout, tuple[int, ...]]]) -> None:
        if keys:
            stages = [self._stages.pop(key) for key in keys]
            names = ", ".join(
                name for stage in stages for name in (stage.name, *(one.name for one in stage.row_types))
            )
            self._conn.execute(f"DROP TABLE IF EXISTS {names}".encode(), prepare=False)

    def settle(self) -> None:
        """The transaction was committed: what it made stays."""
        self._unsettled.clear()

    def forget(self) -> None:
        """The transaction was rolled back: what it made is gone."""
        for key in self._unsettled:
            self._stages.pop(key, None)
        self._unsettled.clear()


def copy_in(conn: Connection, statement: str, chunks: Sequence[bytes]) -> None:
    """Run a COPY FROM STDIN with the data given."""
    with conn.cursor() as cursor, cursor.copy(statement.encode()) as copy:
        for chunk in chunks:
            copy.write(chunk)


def run(conn: Connection, statements: Sequence[str]) -> list[int]:
    """Run statements in one round trip; the rows each wrote."""
    if not statements:
        return []
    cursor = conn.execute("; ".join(statements).encode(), prepare=False)
    counts = [cursor.rowcount]
    while cursor.nextset():
        counts.append(cursor.rowcount)
    return counts
