"""Cuts runs of transactions into batches: what is signed, verified and applied as a unit. Pure.

Not here: sealing, numbers of batches, time (the caller passes it). Rules:

* A batch is whole transactions, or a fragment of one transaction that is larger than a batch; a fragment
  batch holds nothing else, and all but its last fragment say `continues`.
* A transaction in which a table was described anew begins a batch: what came before it must be applicable
  before the target has what the new definition needs.
* Limits are changes, bytes, and the time the first whole transaction has waited. A transaction that does not
  fit behind the ones before it begins the next batch. No batch is empty.
* Memory is bounded by one batch of whole transactions, one of the open transaction, and one run.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate

from vsql_producers.transactions import RelationChange, Run
from vsql_shared.changes import TableName, Transaction


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Bounds of a batch: changes, bytes of frames, seconds; `linger_max` while more is there to be read."""

    rows: int
    nbytes: int
    linger: float
    linger_max: float = 0.0


@dataclass(slots=True)
class Batch:
    """Frames in source order; transaction i's begin at `starts[i]`.

    `end_lsn` is where the last whole transaction ends, 0 when there is none (a fragment that continues).
    """

    transactions: list[Transaction] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    frames: list[bytes] = field(default_factory=list)
    relations: list[RelationChange] = field(default_factory=list)
    nbytes: int = 0
    end_lsn: int = 0
    continues: bool = False
    fragment: bool = False
    """A part of one transaction, its last one included."""
    by_row: bool = False
    """Found when it was arranged: the order of each row is all the order it needs (docs/design/0015)."""

    def append(self, transaction: Transaction, frames: list[bytes], relations: list[RelationChange]) -> None:
        """Put (more of) a transaction at the end."""
        at = len(self.frames)
        if not self.transactions or self.transactions[-1] != transaction:
            self.transactions.append(transaction)
            self.starts.append(at)
        self.relations += [change._replace(position=change.position + at) for change in relations]
        self.frames += frames
        self.nbytes += sum(map(len, frames))


class Batches:
    """The batch that is being filled and the transaction that is being received."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._whole = Batch()
        self._open = Batch()
        self._fragmented = False
        self._described: dict[TableName, bytes] = {}
        self.deadline: float | None = None
        """When the batch that is being filled has waited long enough; None while it is empty."""

    @property
    def is_empty(self) -> bool:
        """Whether everything that was added has been given out."""
        return not self._whole.frames and not self._open.frames and not self._fragmented

    @property
    def oldest_commit_time(self) -> int:
        """Commit time of the oldest transaction held here, 0 when there is none."""
        for batch in (self._whole, self._open):
            if batch.transactions:
                return batch.transactions[0].commit_time
        return 0

    def add(self, run: Run, now: float) -> list[Batch]:
        """Take a run; returns the batches it fills."""
        out: list[Batch] = []
        if run.relations and self._redefines(run) and self._whole.frames:
            out.append(self._take_whole())
        if self._add_small(run, now):
            return out
        self._open.append(run.transaction, run.frames, run.relations)
        if self._whole.frames and self._over(
            len(self._whole.frames) + len(self._open.frames), self._whole.nbytes + self._open.nbytes
        ):
            out.append(self._take_whole())
        while self._over(len(self._open.frames), self._open.nbytes) and len(self._open.frames) > 1:
            out.append(self._take_fragment())
        if run.end_lsn:
            self._end_transaction(run.end_lsn, now, out)
        return out

    def _redefines(self, run: Run) -> bool:
        """Whether a table that was described before has another descriptor in this run; notes them all."""
        found = False
        for change in run.relations:
            name, digest = change.descriptor.name, change.descriptor.hash
            found = found or self._described.get(name, digest) != digest
            self._described[name] = digest
        return found

    def _add_small(self, run: Run, now: float) -> bool:
        """The common case at less cost: a whole transaction that fits behind the others and fills nothing."""
        whole, frames = self._whole, run.frames
        if not run.end_lsn or not frames or self._open.frames or self._fragmented:
            return False
        rows, nbytes = len(whole.frames) + len(frames), whole.nbytes + sum(map(len, frames))
        if rows >= self._limits.rows or nbytes >= self._limits.nbytes:
            return False
        if not whole.frames:
            self.deadline = now + self._limits.linger
        if run.relations:
            at = len(whole.frames)
            whole.relations += [change._replace(position=change.position + at) for change in run.relations]
        whole.transactions.append(run.transaction)
        whole.starts.append(len(whole.frames))
        whole.frames += frames
        whole.nbytes, whole.end_lsn = nbytes, run.end_lsn
        return True

    def due(self, now: float, *, more: bool = False) -> list[Batch]:
        """The batch of whole transactions if it has waited long enough; `more`: more WAL is there already.

        Behind, a batch's size is worth more than its delay: signing, publishing and recording cost the same
        for ten rows as for thousands.
        """
        if self.deadline is None:
            return []
        extra = (
            max(0.0, self._limits.linger_max - self._limits.linger) if more and self._limits.linger else 0.0
        )
        return [self._take_whole()] if now >= self.deadline + extra else []

    def rest(self) -> list[Batch]:
        """What is whole, at a stop; a transaction that is still open will be sent again after the restart."""
        return [self._take_whole()] if self._whole.frames else []

    def _over(self, rows: int, nbytes: int) -> bool:
        return rows > self._limits.rows or nbytes > self._limits.nbytes

    def _end_transaction(self, end_lsn: int, now: float, out: list[Batch]) -> None:
        batch, self._open = self._open, Batch()
        if self._fragmented:
            batch.end_lsn, batch.fragment, self._fragmented = end_lsn, True, False
            out.append(batch)
            return
        if not self._whole.frames:
            self._whole, self.deadline = batch, now + self._limits.linger
        else:
            self._whole.append(batch.transactions[0], batch.frames, batch.relations)
        self._whole.end_lsn = end_lsn
        # Without a linger the batch is due at once, together with whatever else the same read brought.
        if len(self._whole.frames) >= self._limits.rows or self._whole.nbytes >= self._limits.nbytes:
            out.append(self._take_whole())

    def _take_whole(self) -> Batch:
        batch, self._whole, self.deadline = self._whole, Batch(), None
        return batch

    def _take_fragment(self) -> Batch:
        """Cut as many frames off the open transaction as fit.

        At least one and never its last known one: the last fragment needs a row, too.
        """
        source = self._open
        fitting = bisect_right(list(accumulate(map(len, source.frames))), self._limits.nbytes)
        count = max(1, min(fitting, self._limits.rows, len(source.frames) - 1))
        fragment = Batch(continues=True, fragment=True)
        before = [change for change in source.relations if change.position < count]
        fragment.append(source.transactions[0], source.frames[:count], before)
        after = [c._replace(position=c.position - count) for c in source.relations if c.position >= count]
        self._open = Batch()
        self._open.append(source.transactions[0], source.frames[count:], after)
        self._fragmented = True
        return fragment
