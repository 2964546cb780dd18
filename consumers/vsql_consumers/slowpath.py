"""Write changes one by one, in the order of the source: slow, exact, and able to say which one is at fault.

Not here: savepoints and counting (apply.py). It runs at READ COMMITTED, each statement with a snapshot of its
own, so that it sees what others committed while it waited. Rules:

1. An insert first looks for its key: a row that is there is updated (anomaly insert_exists). Else it is
   inserted; if the key appeared meanwhile, it is decided again.
2. An update or delete whose row is not there has the verdict "missing".
3. Without a unique key one row is found by all columns (NULL equals NULL, the row that is equal byte by byte
   first), locked, and written where it lies.
4. A value of a domain that did not change is not assigned again: the domain may have become stricter since.
5. Only an error here is a real one; it names the change, never a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import psycopg

from vsql_consumers import faults
from vsql_consumers.fold import Unchanged, unchanged
from vsql_consumers.frames import (
    LEARN_AT_MOST,
    NULL,
    Fields,
    Layout,
    LayoutChange,
    read_change,
    read_copied,
)
from vsql_consumers.stage import Stage, Stages, run
from vsql_consumers.statements import NEW, OLD, Plan
from vsql_consumers.window import in_words
from vsql_shared.changes import Op, RowPlace
from vsql_shared.errors import DecodeError, RowError, TransientError

if TYPE_CHECKING:
    from vsql_shared.pg.connect import Connection

_CHUNK_ROWS = 100
TRIES = 5
# Marks in statements that are kept; no identifier can hold a zero byte.
_NUMBER, _FOUND = "\0k", "\0f"
_SET = f"s.k = {_NUMBER}"

INSERT_EXISTS, UPDATE_MISSING, DELETE_MISSING = "insert_exists", "update_missing", "delete_missing"


class Change(NamedTuple):
    """A change as it is replayed; `at` is its position among those given."""

    at: int
    op: int
    old: Fields | None
    new: Fields | None


Anomaly = Callable[[int, str], None]
"""Called with a change's position and the kind of anomaly."""
Named = Callable[[int], RowPlace]
"""A change's table, batch, index and transaction."""


@dataclass(slots=True)
class Replay:
    """One replay of changes of one table."""

    conn: Connection
    plan: Plan
    stages: Stages
    anomaly: Anomaly
    named: Named
    make_writer: MakeWriter
    whole: bool = False
    """Every change brings its whole row, and the old one: what an UPDATE did not send is filled in from that,
    for it may have to become an insert, and old rows are staged whole."""

    def run(self, ops: Sequence[int], plaintexts: Sequence[bytes], layout: Layout, first: int = 0) -> Layout:
        """Replay; positions count from `first`. Returns the last layout. Raises our errors."""
        last = layout
        for last, read in _read(ops, plaintexts, layout, len(self.plan.columns)):
            changes = [_filled(change) for change in read] if self.whole else read
            for start in range(0, len(changes), _CHUNK_ROWS):
                self._chunk(changes[start : start + _CHUNK_ROWS], last, first)
        return last

    def _chunk(self, changes: Sequence[Change], layout: Layout, first: int) -> None:
        old = tuple(range(len(self.plan.columns))) if self.whole else self.plan.match
        stage = self.stages.ready(self.plan, layout, old)
        writer = self.make_writer(self.conn, self.plan, layout, stage)
        numbers = self._stage(stage, changes, first)
        for number, change in zip(numbers, changes, strict=True):
            try:
                kind = writer.write(number, change)
            except psycopg.Error as error:
                raise self._fault(error, first + change.at) from None
            except RowError as error:
                error.place = error.place or self.named(first + change.at)
                raise
            if kind is None:
                where = in_words(self.named(first + change.at))
                raise TransientError(f"{where} keeps meeting concurrent writers")
            if kind:
                self.anomaly(first + change.at, kind)

    def _stage(self, stage: Stage, changes: Sequence[Change], first: int) -> list[int]:
        """Stage changes together; if that fails one by one, to find the one at fault."""
        self.conn.execute("SAVEPOINT vsql_staged", prepare=False)
        try:
            numbers = self._fill(stage, changes)
        except psycopg.Error as error:
            if not faults.is_row_error(error):
                raise self._fault(error, first + changes[0].at) from None
            self.conn.execute("ROLLBACK TO SAVEPOINT vsql_staged", prepare=False)
        else:
            self.conn.execute("RELEASE SAVEPOINT vsql_staged", prepare=False)
            return numbers
        numbers = []
        for change in changes:
            try:
                numbers += self._fill(stage, [change])
            except psycopg.Error as error:
                raise self._fault(error, first + change.at) from None
        return numbers

    def _fill(self, stage: Stage, changes: Sequence[Change]) -> list[int]:
        empty: Fields = [NULL] * len(self.plan.columns)
        numbers = []
        stage.rows = []
        for change in changes:
            number = self.stages.number()
            olds = change.old or change.new or empty
            old = [olds[n] for n in stage.old]
            if None in old:
                raise DecodeError("an UPDATE leaves out a column of its key and has no old tuple")
            stage.add(number, change.new or empty, old)
            numbers.append(number)
        self.stages.fill(stage)
        return numbers

    def _fault(self, error: psycopg.Error, at: int) -> Exception:
        place = self.named(at)
        return faults.fault(error, f"writing {in_words(place)}", place)


def _read(
    ops: Sequence[int], plaintexts: Sequence[bytes], layout: Layout, columns: int
) -> Iterator[tuple[Layout, list[Change]]]:
    """The changes in runs of one layout."""
    changes: list[Change] = []
    for at, (op, data) in enumerate(zip(ops, plaintexts, strict=True)):
        if op == Op.COPY:
            changes.append(Change(at, Op.INSERT, None, read_copied(data, columns)))
            continue
        for _ in range(LEARN_AT_MOST + 1):
            try:
                old, new = read_change(op, data, layout)
                break
            except LayoutChange as change:
                yield layout, changes
                changes, layout = [], change.layout
        else:
            raise DecodeError("the two tuples of a change have different markers for a column")
        changes.append(Change(at, op, old, new))
    yield layout, changes


def _filled(change: Change) -> Change:
    """With the values that were not sent, from the old row."""
    old, new = change.old, change.new
    if old is None or new is None or None not in new:
        return change
    return change._replace(new=[old[n] if field is None else field for n, field in enumerate(new)])


class RowWriter:
    """Writes staged changes, each by its set's number. Statements are built once, with marks to be filled."""

    SET = _SET

    def __init__(self, conn: Connection, plan: Plan, layout: Layout, stage: Stage) -> None:
        self._conn, self._plan, self._layout, self._stage = conn, plan, layout, stage
        self._texts: dict[tuple[object, ...], str] = {}
        self._old_key = plan.found_by_key(layout, OLD) if plan.index is not None else ""
        self._new_key = plan.found_by_key(layout, NEW) if plan.index is not None else ""

    def write(self, number: int, change: Change) -> str | None:
        """Write one change. Returns "", the kind of anomaly, or None when it could not be decided."""
        if change.op == Op.INSERT:
            return self._insert(number)
        found = self._old_key or self._lock(number, change.old or change.new or [])
        if change.op == Op.DELETE:
            return "" if found and self._delete(number, found) else DELETE_MISSING
        if not found:
            return UPDATE_MISSING
        new = change.new or []
        keep = self._plan.key if self._keeps_key(change.old, new) else ()
        return "" if self._update(number, found, unchanged(new), keep) else UPDATE_MISSING

    def _keeps_key(self, old: Fields | None, new: Fields) -> bool:
        key = self._plan.key
        return self._plan.index is not None and (old is None or all(new[n] in (None, old[n]) for n in key))

    def _insert(self, number: int) -> str | None:
        plan, stage, layout = self._plan, self._stage.name, self._layout
        if not self._new_key:
            self._run(number, "", ("insert",), lambda: plan.insert(stage, _SET, layout))
            return ""
        for _ in range(TRIES):
            if self._update(number, self._new_key, (), ()):
                return INSERT_EXISTS
            if self._run(number, "", ("insert",), lambda: plan.insert(stage, _SET, layout, race=True)):
                return ""
        # A trigger that fires for replicas may swallow a row; without one, others keep writing it.
        return "" if plan.target.ordered else None

    def _update(self, number: int, found: str, unchanged: Unchanged, keep: tuple[int, ...]) -> int:
        plan, stage, layout = self._plan, self._stage.name, self._layout
        unchanged = (*unchanged, *self._same(number, found, unchanged))
        count = self._run(
            number,
            found,
            ("update", unchanged, keep),
            lambda: plan.update(stage, _SET, _FOUND, layout, unchanged, keep=keep),
        )
        if count == 0 and plan.always:
            # An identity column of the row has another value, or the row is not there.
            count = self._run(
                number,
                found,
                ("replace", unchanged),
                lambda: plan.replace(stage, _SET, _FOUND, layout, unchanged),
            )
        return count

    def _same(self, number: int, found: str, without: Unchanged) -> Unchanged:
        """Columns of domains in which the row has the staged value already."""
        plan, stage, layout = self._plan, self._stage.name, self._layout
        columns = tuple(n for n in plan.checked if n not in without)
        if not columns:
            return ()
        text = self._text(("same", columns), lambda: plan.same(stage, _SET, _FOUND, layout, columns))
        text = text.replace(_NUMBER, str(number)).replace(_FOUND, found)
        row = self._conn.execute(text.encode(), prepare=False).fetchone()
        return tuple(n for n, same in zip(columns, row or (), strict=False) if same)

    def _delete(self, number: int, found: str) -> int:
        return self._run(
            number, found, ("delete",), lambda: self._plan.delete(self._stage.name, _SET, _FOUND)
        )

    def _lock(self, number: int, old: Fields) -> str:
        """Lock one row that is as the staged old one; where it lies, or "" when there is none."""
        plan = self._plan
        nulls = () if plan.key else tuple(n for n, field in enumerate(old) if field == NULL)
        text = self._text(
            ("lock", nulls), lambda: plan.lock_one(self._stage.name, _SET, self._layout, OLD, nulls)
        ).replace(_NUMBER, str(number))
        row = self._conn.execute(text.encode(), prepare=False).fetchone()
        return f"t.tableoid = {row[0]:d} AND t.ctid = '{row[1]}'" if row else ""

    @staticmethod
    def _numbered(text: str, number: int) -> bytes:
        return text.replace(_NUMBER, str(number)).encode()

    def _run(self, number: int, found: str, kind: tuple[object, ...], make: Callable[[], str]) -> int:
        text = self._text(kind, make).replace(_NUMBER, str(number)).replace(_FOUND, found)
        return run(self._conn, [text])[0]

    def _text(self, kind: tuple[object, ...], make: Callable[[], str]) -> str:
        text = self._texts.get(kind)
        if text is None:
            text = self._texts[kind] = make()
        return text


MakeWriter = Callable[["Connection", Plan, Layout, Stage], RowWriter]
"""Makes what writes the changes of a table one by one."""
