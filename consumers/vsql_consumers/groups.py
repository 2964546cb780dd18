"""What is applied in one target transaction: batches and entries of the chain, and what is written with them.

Not here: Kafka and the order of stages (pipeline.py). Rules:

* A group ends at an entry after which no source transaction is unfinished; the fragments of one transaction
  are a group of their own, applied as they come. A fragment that is skipped is one all the same: progress
  never stands between two of them.
* The receipts and leaves of fragments are written as they come: a transaction may have any number of them.
* Progress, receipts, leaves, descriptors and table states are written in the applying transaction: all of it
  is there or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from vsql_consumers import quarantine, state
from vsql_consumers.collected import Decided, Ready
from vsql_consumers.members import PartReceipt, shredded_rest
from vsql_consumers.shredded import Shredded
from vsql_consumers.state import Position, Receipt
from vsql_consumers.unseal import Descriptor
from vsql_shared.audit.entries import EPOCH_OPENED, SHREDDED, AuditEntry
from vsql_shared.audit.leaf_store import Kept, LeafKeeper
from vsql_shared.audit.merkle import EMPTY_ROOT
from vsql_shared.changes import OpenedBatch, PartLeaves, TableName, Transaction
from vsql_shared.pg.connect import Connection

Writes = Callable[[Connection], None]


@dataclass(slots=True)
class Group:
    """Entries since the last commit, in order; `position` is where the stream stands after them."""

    position: Position
    live_chain: str
    entries: int = 0
    rows: int = 0
    size: int = 0
    batches: list[OpenedBatch] = field(default_factory=list)
    """Opened, and not yet given to the applier."""
    manifests: list[bytes] = field(default_factory=list)
    """Documents of those."""
    receipts: list[Receipt] = field(default_factory=list)
    stored: bool = False
    """Some receipts are written already, in the open transaction."""
    fragments: bool = False
    """A source transaction has begun that is not complete."""
    descriptors: dict[bytes, Descriptor] = field(default_factory=dict)
    forget_descriptors: bool = False
    copied: dict[TableName, tuple[int, int]] = field(default_factory=dict)
    """First copy: table → position of its snapshot, rows."""
    passed_over: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    """Manifest → what its receipt says of transactions that are not applied."""
    honoured: set[int] = field(default_factory=set)
    """Decisions that these have done."""
    also: list[Writes] = field(default_factory=list)
    """Further writes of the applying transaction."""
    shredded: dict[str, str] = field(default_factory=dict)
    """Table that lacks changes whose key was destroyed → why; by table, as fragments may be any number."""
    leaves: list[Kept] = field(default_factory=list)
    """What records hash to, and is not written yet."""

    @classmethod
    def after(cls, position: Position, live_chain: str) -> Group:
        """An empty group that begins at a position."""
        return cls(replace(position, offsets=dict(position.offsets)), live_chain)

    def move(self, ready: Ready) -> None:
        """Take an entry's place in the chain."""
        self.entries += 1
        position = self.position
        position.head, position.audit_offset = ready.head, ready.audit_offset
        position.offsets.update(ready.offsets)

    def add_batch(self, ready: Ready, opened: OpenedBatch, new: dict[bytes, Descriptor]) -> None:
        """Take an opened batch."""
        self.move(ready)
        self.rows += opened.row_count
        self.size += sum(map(len, opened.plaintexts))
        self.batches.append(opened)
        self.manifests.append(ready.encoded)
        self._keep(opened.sequence, opened.leaves)
        self.descriptors.update(new)
        self.fragments = self.fragments or opened.continues
        if opened.transactions:
            self.position.commit_time = opened.transactions[-1].commit_time

    def _keep(self, sequence: int, leaves: Iterable[PartLeaves]) -> None:
        self.leaves += [(sequence, one) for one in leaves]

    def pass_over(self, opened: OpenedBatch, decided: Mapping[Transaction, Decided]) -> None:
        """Leave transactions of a batch out: said in its receipt, and their tables are marked."""
        numbers = {number: one for number, one in enumerate(opened.transactions) if one in decided}
        opened.passed = {number: decided[one].verdict for number, one in numbers.items()}
        for number, count in opened.passed_over().items():
            one, decision = numbers[number], decided[numbers[number]]
            said = quarantine.passed_over(one, decision, count)
            self.passed_over.setdefault(opened.sequence, []).append(said)
            self.honoured.add(decision.id)
            tables = opened.tables_of(number)
            reason = f"transaction {said['xid']} at {said['lsn']} was {decision.verdict} by an operator"
            self.also.append(
                partial(quarantine.mark_diverged, live_chain=self.live_chain, tables=tables, reason=reason)
            )

    def add_skipped(self, ready: Ready, reason: str, found: Sequence[PartReceipt] = ()) -> None:
        """Take a batch an operator skips: a receipt without a root, and its tables are marked.

        `found`: what members have applied of it.
        """
        before = self.position.head.batch
        self.move(ready)
        entry, chain = ready.entry, self.live_chain
        if entry is None:
            if ready.head.batch > before:
                self.receipts.append(
                    Receipt(ready.sequence, ready.head.epoch, ready.head.batch, b"", EMPTY_ROOT, {})
                )
            self.also.append(lambda conn: quarantine.mark_all_diverged(conn, chain, reason))
        elif entry.batch:
            self.fragments = entry.continues
            self.receipts.append(quarantine.receipt_of_skipped(entry, ready.encoded, found))
            tables = entry.tables_affected
            self.also.append(
                lambda conn: quarantine.mark_diverged(
                    conn, chain, map(quarantine.parse_table, tables), reason
                )
            )

    def add_merged(self, ready: Ready, receipt: Receipt | None, commit_time: int | None) -> None:
        """Take an entry that members have completed, or one that stood between such."""
        self.move(ready)
        entry = ready.entry
        if receipt is None or entry is None:
            return
        self.rows += entry.row_count
        self.receipts.append(receipt)
        if SHREDDED in receipt.detail:
            self._mark_shredded(entry, str(receipt.detail[SHREDDED]["kek_id"]))
        self.position.commit_time = commit_time or self.position.commit_time
        # As if we had read them: where lag tools look.
        self.position.offsets.update(
            {(root.topic, root.partition): root.last_offset + 1 for root in entry.partitions}
        )

    def take_parts(self, ready: Ready, opened: OpenedBatch, new: dict[bytes, Descriptor]) -> None:
        """Take some parts of a batch: the group stays where it is."""
        self.batches.append(opened)
        self.manifests.append(ready.encoded)
        self._keep(opened.sequence, opened.leaves)
        self.descriptors.update(new)

    def write_parts(self, conn: Connection, chain: str, leaves: LeafKeeper | None) -> None:
        """What is written with such parts."""
        self.store_leaves(conn, chain, leaves)
        state.save_descriptors(conn, chain, self.descriptors, forget_others=False)
        for write in self.also:
            write(conn)

    def add_shredded(self, ready: Ready, found: Shredded, committed: Sequence[PartReceipt] = ()) -> None:
        """Take a batch whose data key was destroyed: verified as it lies in Kafka, counted, not opened.

        `committed`: what was applied of it before, where transactions are commits of their own.
        """
        self.move(ready)
        entry = found.verified.entry
        self.fragments = entry.continues
        self._keep(entry.sequence, found.verified.leaves)
        self.receipts.append(
            Receipt(
                entry.sequence, entry.epoch, entry.batch, ready.encoded, found.verified.merkle_root,
                *shredded_rest(entry, found.by.as_detail(), committed),
            )
        )  # fmt: skip
        if found.verified.transactions:
            self.position.commit_time = found.verified.transactions[-1].commit_time
        self._mark_shredded(entry, found.by.kek_id)

    def _mark_shredded(self, entry: AuditEntry, kek_id: str) -> None:
        """Its tables lack changes."""
        reason = f"sequence {entry.sequence}: the data key was destroyed with {kek_id}"
        for table in entry.tables_affected:
            self.shredded[table] = reason

    def take_shredded_parts(self, found: Shredded) -> None:
        """Take some parts of a batch whose data key was destroyed: what they hash to is kept all the same."""
        self._keep(found.verified.entry.sequence, found.verified.leaves)

    def add_entry(self, ready: Ready) -> None:
        """Take an entry without a batch. A new epoch sends every descriptor again."""
        self.move(ready)
        if ready.entry is not None and ready.entry.event_type == EPOCH_OPENED:
            self.descriptors, self.forget_descriptors = {}, True

    def applied(self, verdicts: list[dict[str, int]]) -> None:
        """The applier took the batches: keep what is to be said of them, and let their rows go."""
        for opened, manifest, counts in zip(self.batches, self.manifests, verdicts, strict=True):
            said = self.passed_over.pop(opened.sequence, ())
            self.receipts.append(
                Receipt(
                    opened.sequence, opened.epoch, opened.batch, manifest, opened.merkle_root, counts,
                    quarantine.as_detail(said),
                )
            )  # fmt: skip
        self.batches, self.manifests, self.size = [], [], 0

    def store_receipts(self, conn: Connection, chain: str, leaves: LeafKeeper | None) -> None:
        """Write receipts and leaves so far into the applying transaction, and let them go."""
        state.save_receipts(conn, chain, self.receipts)
        self.receipts, self.stored = [], True
        self.store_leaves(conn, chain, leaves)

    def store_leaves(self, conn: Connection, chain: str, leaves: LeafKeeper | None) -> None:
        """Write the leaves so far into the applying transaction, and let them go; no keeper: keep none."""
        if leaves:
            leaves.write(conn, chain, self.leaves)
        self.leaves = []

    @property
    def is_small(self) -> bool:
        """Whether what it writes is a few statements, none of them a COPY."""
        few = max(len(self.receipts), len(self.leaves), len(self.descriptors)) <= state.SMALL
        return few and not (self.also or self.shredded or self.copied)

    def write(self, conn: Connection, chain: str, leaves: LeafKeeper | None) -> None:
        """Everything the applying transaction holds beside the rows."""
        self.store_leaves(conn, chain, leaves)
        self.receipts.sort(key=lambda receipt: receipt.sequence)
        state.save_receipts(conn, chain, self.receipts)
        state.save_descriptors(conn, chain, self.descriptors, forget_others=self.forget_descriptors)
        for table, reason in self.shredded.items():
            quarantine.mark_diverged(conn, self.live_chain, [quarantine.parse_table(table)], reason)
        for write in self.also:
            write(conn)
        state.save_position(conn, chain, self.position)
