"""The changes of one table that wait to be written together. Pure.

Not here: what ends a wait (apply.py). A window names its changes by where they lie in the batches given, so
that nothing is copied before it is known how they will be written; `place` says which batch a change came
from.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from vsql_consumers.statements import Plan
from vsql_shared import lsn
from vsql_shared.changes import Op, OpenedBatch, RowPlace

_INSERTS = (Op.INSERT, Op.COPY)


@dataclass(slots=True)
class Window:
    """Changes of one table in source order, as (batch, start, stop) of consecutive ones."""

    plan: Plan
    batches: Sequence[OpenedBatch]
    copied: bool
    only_inserts: bool = True
    rows: int = 0
    size: int = 0
    parts: list[tuple[int, int, int]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    def add(self, batch: int, start: int, stop: int, op: int) -> None:
        """Take changes [start, stop) of a batch, all of one op."""
        if op not in _INSERTS:
            self.only_inserts = False
        self.starts.append(self.rows)
        self.parts.append((batch, start, stop))
        self.rows += stop - start
        self.size += sum(map(len, self.batches[batch].plaintexts[start:stop]))

    def plaintexts(self) -> list[bytes]:
        """The tuples, in order."""
        out: list[bytes] = []
        for batch, start, stop in self.parts:
            out += self.batches[batch].plaintexts[start:stop]
        return out

    def ops(self) -> list[int]:
        """What they are, in order."""
        out: list[int] = []
        for batch, start, stop in self.parts:
            out += self.batches[batch].ops[start:stop]
        return out

    def place(self, at: int) -> tuple[int, int]:
        """Which batch of those given a change lies in, and its index there."""
        part = bisect_right(self.starts, at) - 1
        batch, start, _ = self.parts[part]
        return batch, start + at - self.starts[part]

    def named(self, at: int) -> RowPlace:
        """A change by its names; the version is the one its table was written by."""
        batch, index = self.place(at)
        return self.batches[batch].place(index, self.plan.target.version)

    def naming(self, at: int) -> str:
        """A change in words: its table, batch and index, and its transaction."""
        return in_words(self.named(at))

    def naming_range(self, start: int, stop: int) -> str:
        """Several changes in words."""
        first, last = self.place(start), self.place(max(start, stop - 1))
        return (
            f"{self.plan.name} (batch {self.batches[first[0]].batch}, change {first[1]} to "
            f"batch {self.batches[last[0]].batch}, change {last[1]})"
        )


def in_words(place: RowPlace) -> str:
    """A change, or all changes of a transaction, in words."""
    change = "" if place.change is None else f", change {place.change}"
    what = f"{place.table or 'changes'} (batch {place.batch}{change})"
    if place.transaction is None:
        return what
    return f"{what} of transaction {place.transaction.xid} at {lsn.text(place.transaction.commit_lsn)}"


def transactions(batch: OpenedBatch) -> Iterator[tuple[int, int]]:
    """The changes of each of the batch's transactions, which follow one another, as [start, stop)."""
    start = 0
    for _, changes in groupby(batch.tx_of):
        stop = start + sum(1 for _ in changes)
        yield start, stop
        start = stop


def runs(batch: OpenedBatch, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
    """Consecutive changes of one op and one descriptor, among [start, end), as [start, stop)."""
    ops, relations = batch.ops, batch.relation_of
    count = len(ops) if end is None else end
    while start < count:
        op, relation = ops[start], relations[start]
        stop = start + 1
        while stop < count and ops[stop] == op and relations[stop] == relation:
            stop += 1
        yield start, stop
        start = stop
