"""Verify a collected batch against its signed manifest. Nothing is decrypted here.

Not here: the manifest's own signature and place in the chain (audit/chain.py) and which packs belong to
it (collect.py). Pure: bytes and values in, a batch in source order out; raises, never returns a bool.

Procedure (what each step stops):

1. Every clear field of every pack is what manifest and topic say: cluster, chain, origin, table, partition,
   epoch, batch, data key (a pack moved, renamed or sealed under another key).
2. Packs and records per topic-partition are as many as the manifest says (dropped or inserted records).
3. Leaves give the signed sub-root, sub-roots the signed root (altered or reordered records).
4. The indexes of the batch are exactly 0 … n - 1 (a record repeated, or taken out by an untruthful count).
5. Operations are known and as many changes as row_count says.
6. Transactions agree in all packs, and records follow them in commit order.

Hot: a batch at a time, lists in and lists out, at most a few comprehensions over its records.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import itemgetter, le
from typing import TYPE_CHECKING, NamedTuple

from vsql_shared import names
from vsql_shared.audit import merkle
from vsql_shared.audit.leaves import part_leaves
from vsql_shared.changes import ALL_OPS, Op, PartitionRoot, PartLeaves, TableName, Transaction
from vsql_shared.crypto.dek import ALGORITHM
from vsql_shared.errors import DecodeError, RecordError
from vsql_shared.wire.pack import PackHeader, SealedTuple, decode_tuples, header_digest

if TYPE_CHECKING:
    from vsql_shared.audit.entries import AuditEntry

_TX, _INDEX, _OP, _LEAF = itemgetter(0), itemgetter(2), itemgetter(3), itemgetter(7)


def record_name(topic: str, partition: int, offset: int) -> str:
    """How a Kafka record is named in errors, status and decisions: `topic/partition/offset`."""
    return f"{topic}/{partition}/{offset}"


class Pack(NamedTuple):
    """A message of a data topic with its header read; its tuples begin at `body`."""

    offset: int
    message: bytes
    header: PackHeader
    body: int


@dataclass(slots=True)
class Part:
    """The packs of one topic-partition that belong to a batch, in offset order."""

    root: PartitionRoot
    packs: list[Pack] = field(default_factory=list)


@dataclass(slots=True)
class VerifiedBatch:
    """Sealed records in source order (by index), parallel lists; every one covered by the signed root."""

    entry: AuditEntry
    merkle_root: bytes
    transactions: list[Transaction]
    tuples: list[SealedTuple]
    tx_of: list[int]
    headers: list[PackHeader]
    offsets: list[int]
    packs: list[PackHeader]  # each pack's header once
    sub_roots: dict[tuple[str, int], bytes] = field(default_factory=dict)  # of the parts, as found here
    changes: int = 0
    leaves: list[PartLeaves] = field(default_factory=list)  # of the parts, in their order

    def name(self, index: int) -> str:
        """Topic, partition and offset of the pack that holds record `index`."""
        header = self.headers[index]
        topic = names.data_topic(header.cluster, header.chain, *header.table)
        return record_name(topic, header.partition, self.offsets[index])


def verify_batch(
    entry: AuditEntry, parts: Sequence[Part], origin: str, *, whole: bool = True
) -> VerifiedBatch:
    """The batch of a verified manifest, in source order. Raises RecordError naming what does not agree.

    Not `whole`: some of its partitions. Then what is said of all of them together is left to whoever puts
    them together (parts.py); a manifest's own root is over its sub-roots, or it is none (audit/entries.py).
    """
    if entry.algorithm != ALGORITHM:
        raise RecordError(
            f"batch {entry.batch} is sealed with {entry.algorithm[:40]!r}, expected {ALGORITHM}",
            record=batch_name(entry),
        )
    expected = _Expected(entry, origin)
    transactions, places = _transactions(entry, parts)
    tuples: list[SealedTuple] = []
    tx_of: list[int] = []
    headers: list[PackHeader] = []
    offsets: list[int] = []
    sub_roots: list[bytes] = []
    kept: list[PartLeaves] = []
    numbers = {(root.topic, root.partition): at for at, root in enumerate(entry.partitions)}
    for part in parts:
        first = len(tuples)
        for pack in part.packs:
            expected.check(part.root, pack)
            records = _records(part.root, pack)
            tuples += records
            tx_of += _place(part.root, pack, records, places)
            headers += [pack.header] * len(records)
            offsets += [pack.offset] * len(records)
        records = tuples[first:]
        leaves = list(map(_LEAF, records))
        sub_roots.append(_sub_root(part, leaves))
        number = numbers[part.root.topic, part.root.partition]
        kept.append(part_leaves(number, leaves))
    root = merkle.batch_root(sub_roots) if whole else entry.merkle_root
    if root != entry.merkle_root:
        raise RecordError(
            f"batch {entry.batch} has root {root.hex()}, the manifest says {entry.merkle_root.hex()}",
            record=batch_name(entry),
        )
    packs = [pack.header for part in parts for pack in part.packs]
    roots = {
        (part.root.topic, part.root.partition): root for part, root in zip(parts, sub_roots, strict=True)
    }
    batch = VerifiedBatch(
        entry, root, transactions, tuples, tx_of, headers, offsets, packs, roots, leaves=kept
    )
    if whole:
        _in_source_order(batch)
    else:
        _in_order(batch)
    _check_contents(batch, whole=whole)
    return batch


def batch_name(entry: AuditEntry) -> str:
    """How a batch is named where no single record can be."""
    return f"{entry.chain} sequence {entry.sequence} (epoch {entry.epoch}, batch {entry.batch})"


class _Expected:
    """Step 1: what a pack's header must say, given the manifest."""

    def __init__(self, entry: AuditEntry, origin: str) -> None:
        self._entry = entry
        self._constant = (entry.cluster, entry.chain, origin, entry.epoch, entry.batch, entry.dek_id)
        self._tables = set(entry.tables_affected)
        self._topics: dict[TableName, str] = {}

    def check(self, root: PartitionRoot, pack: Pack) -> None:
        h = pack.header
        found = (h.cluster, h.chain, h.origin, h.epoch, h.batch, h.dek_id)
        if found != self._constant:
            labels = ("cluster", "chain", "origin", "epoch", "batch", "dek_id")
            at = next(
                i for i, pair in enumerate(zip(found, self._constant, strict=True)) if pair[0] != pair[1]
            )
            self._refuse(root, pack, f"{labels[at]} {found[at]!r}, the manifest says {self._constant[at]!r}")
        if h.partition != root.partition or self._topic(h.table) != root.topic:
            self._refuse(root, pack, f"table {h.table} partition {h.partition}, which do not belong here")
        if str(h.table) not in self._tables:
            self._refuse(root, pack, f"table {h.table}, which the manifest does not list")

    def _topic(self, table: TableName) -> str:
        topic = self._topics.get(table)
        if topic is None:
            topic = names.data_topic(self._entry.cluster, self._entry.chain, table.schema, table.table)
            self._topics[table] = topic
        return topic

    def _refuse(self, root: PartitionRoot, pack: Pack, found: str) -> None:
        raise RecordError(
            f"a pack of batch {self._entry.batch} names {found}",
            record=record_name(root.topic, root.partition, pack.offset),
        )


def _transactions(
    entry: AuditEntry, parts: Iterable[Part]
) -> tuple[list[Transaction], dict[Transaction, int]]:
    """Step 6, first half: the batch's transactions in commit order, each with one xid and one time."""
    found = {tx for part in parts for pack in part.packs for tx in pack.header.transactions}
    ordered = sorted(found, key=itemgetter(1))
    for one, two in pairwise(ordered):
        if one.commit_lsn == two.commit_lsn:
            raise RecordError(
                f"two transactions of batch {entry.batch} commit at one position", record=batch_name(entry)
            )
    return ordered, {tx: place for place, tx in enumerate(ordered)}


def _records(root: PartitionRoot, pack: Pack) -> list[SealedTuple]:
    try:
        return decode_tuples(pack.message, pack.body, header_digest(pack.message[: pack.body]))
    except DecodeError as error:
        raise RecordError(
            f"malformed pack: {error.message}", record=record_name(root.topic, root.partition, pack.offset)
        ) from error


def _place(
    root: PartitionRoot, pack: Pack, records: Sequence[SealedTuple], places: dict[Transaction, int]
) -> list[int]:
    """Number of each record's transaction in the batch."""
    local = [places[tx] for tx in pack.header.transactions]
    try:
        return [local[record[0]] for record in records]
    except IndexError:
        raise RecordError(
            "a record names a transaction its pack does not have",
            record=record_name(root.topic, root.partition, pack.offset),
        ) from None


def _sub_root(part: Part, leaves: Sequence[bytes]) -> bytes:
    """Steps 2 and 3 for one topic-partition."""
    root = part.root
    where = f"{root.topic}/{root.partition}/{root.first_offset}-{root.last_offset}"
    if len(part.packs) != root.packs or len(leaves) != root.records:
        raise RecordError(
            f"{len(part.packs)} packs with {len(leaves)} records,"
            f" the manifest says {root.packs} with {root.records}",
            record=where,
            hint="records were dropped or inserted",
        )
    if part.packs and (part.packs[0].offset, part.packs[-1].offset) != (root.first_offset, root.last_offset):
        raise RecordError(
            f"packs at offsets {part.packs[0].offset} to {part.packs[-1].offset}, the manifest says"
            f" {root.first_offset} to {root.last_offset}",
            record=where,
        )
    found = merkle.root(leaves)
    if found != root.sub_root:
        raise RecordError(
            f"records have root {found.hex()}, the manifest says {root.sub_root.hex()}",
            record=where,
            hint="a record was altered or reordered",
        )
    return found


def _in_source_order(batch: VerifiedBatch) -> None:
    """Step 4: order by index; each of 0 … n - 1 exactly once."""
    indexes = list(map(_INDEX, batch.tuples))
    wanted = list(range(len(indexes)))
    if indexes == wanted:
        return
    order = sorted(wanted, key=indexes.__getitem__)
    for place, position in enumerate(order):
        if indexes[position] != place:
            kind = "repeated" if place and indexes[order[place - 1]] == indexes[position] else "missing"
            at = indexes[position] if kind == "repeated" else place
            raise RecordError(
                f"record {at} of batch {batch.entry.batch} is {kind}", record=batch_name(batch.entry)
            )
    _arrange(batch, order)


def _in_order(batch: VerifiedBatch) -> None:
    """Step 4 of some partitions: order by index, each once at most."""
    indexes = list(map(_INDEX, batch.tuples))
    order = sorted(range(len(indexes)), key=indexes.__getitem__)
    for one, two in pairwise(order):
        if indexes[one] == indexes[two]:
            raise RecordError(
                f"record {indexes[one]} of batch {batch.entry.batch} is repeated",
                record=batch_name(batch.entry),
            )
    _arrange(batch, order)


def _arrange(batch: VerifiedBatch, order: Sequence[int]) -> None:
    batch.tuples = [batch.tuples[i] for i in order]
    batch.tx_of = [batch.tx_of[i] for i in order]
    batch.headers = [batch.headers[i] for i in order]
    batch.offsets = [batch.offsets[i] for i in order]


def _check_contents(batch: VerifiedBatch, *, whole: bool) -> None:
    """Steps 5 and 6, second half."""
    ops = list(map(_OP, batch.tuples))
    unknown = set(ops) - ALL_OPS
    if unknown:
        at = next(i for i, op in enumerate(ops) if op in unknown)
        raise RecordError(f"record {at} has an unknown operation {ops[at]}", record=batch.name(at))
    batch.changes = changes = len(ops) - ops.count(Op.RELATION) - ops.count(Op.PIECE)
    if whole and changes != batch.entry.row_count:
        raise RecordError(
            f"batch {batch.entry.batch} has {changes} changes, the manifest says {batch.entry.row_count}",
            record=batch_name(batch.entry),
        )
    tx_of = batch.tx_of
    if len(batch.transactions) > 1 and not all(map(le, tx_of, tx_of[1:])):
        at = next(i for i in range(1, len(tx_of)) if tx_of[i - 1] > tx_of[i])
        raise RecordError(
            f"record {at} of batch {batch.entry.batch} goes back to an earlier transaction",
            record=batch.name(at),
        )
