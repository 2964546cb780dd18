"""Fold the changes of one table: what several changes of one row come to, key by key. Pure.

Not here: how a folded step is written (setwise.py), and what happens when it cannot be (slowpath.py). Rules:

1. Keys are compared as the bytes the source sent. Two spellings of one value are two keys; the database then
   finds a conflict and the step is replayed change by change.
2. A change of the key ends a fold; consecutive ones make a step of their own while no key occurs twice.
3. Folding never yields nothing: insert + delete leaves a delete, which expects no row.
4. A value that was not sent (unchanged TOAST) is taken from what was folded before it.
5. What no source can have done in that order (a second insert, an update of what was deleted) ends the fold,
   so that the database judges it.
6. delete + insert is a replacement: the row is deleted and written anew, with the columns only the target
   has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, TypeAlias

from vsql_consumers.frames import (
    LEARN_AT_MOST,
    Fields,
    Layout,
    LayoutChange,
    read_change,
    read_copied,
)
from vsql_shared.changes import Op
from vsql_shared.errors import DecodeError

Unchanged: TypeAlias = tuple[int, ...]
"""Positions of the columns whose values were not sent."""


@dataclass(slots=True)
class Folded:
    """Changes [start, stop) as sets of rows with different keys, to be written in this order.

    Deleted rows carry at least the key's fields. `vanished` were inserted and deleted within the fold: they
    are deleted, and no row is expected.
    """

    start: int
    stop: int
    layout: Layout
    deletes: list[Fields] = field(default_factory=list)
    vanished: list[Fields] = field(default_factory=list)
    updates: dict[Unchanged, list[Fields]] = field(default_factory=dict)
    inserts: list[Fields] = field(default_factory=list)


@dataclass(slots=True)
class Moved:
    """Changes [start, stop), updates that change the key: (old tuple, new tuple) by unchanged columns."""

    start: int
    stop: int
    layout: Layout
    moves: dict[Unchanged, list[tuple[Fields, Fields]]] = field(default_factory=dict)


Step: TypeAlias = Folded | Moved

# What the changes of one key have come to. In the first four the row is expected to be there before them.
_UPDATED, _DELETED, _REPLACED, _INSERTED, _VANISHED, _REAPPEARED = range(6)
_FIRST = {Op.INSERT: _INSERTED, Op.UPDATE: _UPDATED, Op.DELETE: _DELETED}
_THEN = {
    (_UPDATED, Op.UPDATE): _UPDATED,
    (_UPDATED, Op.DELETE): _DELETED,
    (_DELETED, Op.INSERT): _REPLACED,
    (_REPLACED, Op.UPDATE): _REPLACED,
    (_REPLACED, Op.DELETE): _DELETED,
    (_INSERTED, Op.UPDATE): _INSERTED,
    (_INSERTED, Op.DELETE): _VANISHED,
    (_VANISHED, Op.INSERT): _REAPPEARED,
    (_REAPPEARED, Op.UPDATE): _REAPPEARED,
    (_REAPPEARED, Op.DELETE): _VANISHED,
}


def fold(
    ops: Sequence[int], plaintexts: Sequence[bytes], layout: Layout, key: tuple[int, ...]
) -> Iterator[Step]:
    """Fold INSERTs, UPDATEs and DELETEs of one table; `key` are the positions of the key's columns.

    Yields steps that cover all changes, in order. Raises DecodeError.
    """
    folding = _Folding(layout, key)
    for at, (op, data) in enumerate(zip(ops, plaintexts, strict=True)):
        for _ in range(LEARN_AT_MOST + 1):
            try:
                old, new = read_change(op, data, folding.layout)
                break
            except LayoutChange as change:
                if step := folding.end(at):
                    yield step
                folding.layout = change.layout
        else:
            raise DecodeError("the two tuples of a change have different markers for a column")
        if step := folding.add(at, op, old, new):
            yield step
    if step := folding.end(len(ops)):
        yield step


def only_inserts(plaintexts: Sequence[bytes], layout: Layout, *, copied: bool = False) -> Iterator[Folded]:
    """INSERTs, or rows of a first copy, as they are: for tables without a key, or where none occurs twice."""
    rows: list[Fields] = []
    start = 0
    for at, data in enumerate(plaintexts):
        try:
            fields = _inserted(data, layout, copied=copied)
        except LayoutChange as change:
            if rows:
                yield Folded(start, at, layout, inserts=rows)
            rows, start, layout = [], at, change.layout
            fields = _inserted(data, layout, copied=copied)
        rows.append(fields)
    if rows:
        yield Folded(start, len(plaintexts), layout, inserts=rows)


def _inserted(data: bytes, layout: Layout, *, copied: bool) -> Fields:
    if copied:
        return read_copied(data, len(layout))
    _, new = read_change(Op.INSERT, data, layout)
    return new or []


class _Folding:
    """The step that is being gathered."""

    def __init__(self, layout: Layout, key: tuple[int, ...]) -> None:
        self.layout = layout
        self._key = key
        self._key_of: Callable[[Fields], Any] = itemgetter(*key)
        self._start = 0
        self._entries: dict[Any, list[Any]] = {}
        self._moves: list[tuple[Fields, Fields]] = []
        self._left: set[Any] = set()
        self._taken: set[Any] = set()

    def add(self, at: int, op: int, old: Fields | None, new: Fields | None) -> Step | None:
        """Take one change; returns the step it ended, if it did."""
        if old is not None and new is not None:
            key = self._key_of(old)
            if key != self._key_of(new) and self._moves_row(old, new):
                return self._add_move(at, key, old, new)
        else:
            key = self._key_of(old or new or [])
        step = self.end(at) if self._moves else None
        fields = new or old or []
        entry = self._entries.get(key)
        if entry is not None:
            state = _THEN.get((entry[0], op))
            if state is not None:
                entry[0], entry[1] = state, _filled(fields, entry[1]) if None in fields else fields
                return step
            step = self.end(at)
        self._entries[key] = [_FIRST[op], fields]
        return step

    def _moves_row(self, old: Fields, new: Fields) -> bool:
        """Whether the key really changed: a part of it that was not sent did not."""
        for column in self._key:
            if new[column] is None:
                new[column] = old[column]
        return bool(self._key_of(old) != self._key_of(new))

    def _add_move(self, at: int, old_key: Any, old: Fields, new: Fields) -> Step | None:
        """A key that was left may be taken again in the same step; one that was taken is not left again."""
        new_key = self._key_of(new)
        again = old_key in self._left or old_key in self._taken or new_key in self._taken
        step = self.end(at) if self._entries or again else None
        self._moves.append((old, new))
        self._left.add(old_key)
        self._taken.add(new_key)
        return step

    def end(self, at: int) -> Step | None:
        """The step up to change `at`, if it has any; the next one starts there."""
        step: Step | None = None
        if self._moves:
            step = self._moved(at)
        elif self._entries:
            step = self._folded(at)
        self._entries, self._moves = {}, []
        self._left, self._taken = set(), set()
        self._start = at
        return step

    def _moved(self, at: int) -> Moved:
        step = Moved(self._start, at, self.layout)
        for old, new in self._moves:
            step.moves.setdefault(unchanged(new), []).append((old, new))
        return step

    def _folded(self, at: int) -> Folded:
        step = Folded(self._start, at, self.layout)
        updates = step.updates
        for state, fields in self._entries.values():
            if state == _UPDATED:
                mask = self._mask(fields) if None in fields else ()
                updates.setdefault(mask, []).append(fields)
                continue
            if state in (_DELETED, _REPLACED):
                step.deletes.append(fields)
            elif state in (_VANISHED, _REAPPEARED):
                step.vanished.append(fields)
            if state in (_INSERTED, _REPLACED, _REAPPEARED):
                step.inserts.append(fields)
        return step

    def _mask(self, fields: Fields) -> Unchanged:
        mask = unchanged(fields)
        if not set(mask).isdisjoint(self._key):
            raise DecodeError("an UPDATE leaves out a column of its key and has no old tuple")
        return mask


def unchanged(fields: Fields) -> Unchanged:
    """Positions of the values that were not sent."""
    return tuple(column for column, value in enumerate(fields) if value is None)


def _filled(new: Fields, before: Fields) -> Fields:
    return [earlier if value is None else value for value, earlier in zip(new, before, strict=True)]
