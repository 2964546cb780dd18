"""From a batch to sealed packs: arrange its frames by table, then encrypt pack by pack. No I/O.

Not here: keys' lives (keys.py), the manifest's signature (audit/), sending (publish.py). Rules:

* Every record has an index of its own in the batch, in the order of the source over all tables; descriptors
  and pieces take one, too.
* A descriptor is sealed as the first record that names its hash, in every epoch, in every partition and under
  every data key.
* Rows of a table that is spread lie in the partition of their identity; what a batch holds then says whether
  the order of each row is all the order it needs (`by_row`).
* A plaintext that is too large for one message is cut into pieces; all but the last say so.
* Hot: lists in, lists out. A frame becomes clear fields and plaintext by slicing; nothing is parsed.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate, pairwise, repeat
from operator import itemgetter
from typing import NamedTuple

from vsql_producers.batches import Batch
from vsql_producers.pgoutput import (
    KIND,
    LSN,
    PLAINTEXT_AT,
    RELATION_ID,
    frame_lsn,
    frame_prefix,
    make_frame,
)
from vsql_producers.spread import NO_PLACE, Spread
from vsql_producers.transactions import Descriptor
from vsql_shared import names
from vsql_shared.audit import merkle
from vsql_shared.audit.leaves import part_leaves
from vsql_shared.changes import Op, PartLeaves, TableName, Transaction
from vsql_shared.crypto.dek import SealingKey
from vsql_shared.crypto.seal import seal_tuples
from vsql_shared.errors import DecodeError
from vsql_shared.wire.pack import PackHeader, encode_header, encode_pack, header_digest

# As wire.pack.CLEAR, with the LSN as the eight bytes that stand in the frame.
_CLEAR = struct.Struct(">H8sIc")
_relation_of = itemgetter(RELATION_ID)
# What a tuple adds to its plaintext (tag, nonce, clear fields, length), and a transaction of its own in the
# header, rounded up.
TUPLE_OVERHEAD = 80


@dataclass(slots=True)
class Part:
    """A batch's records of one table and partition under one descriptor: parallel lists in source order."""

    descriptor: Descriptor
    partition: int = 0
    frames: list[bytes] = field(default_factory=list)
    indexes: list[int] = field(default_factory=list)
    transactions: list[int] = field(default_factory=list)


class PackLimits(NamedTuple):
    """Bounds of a pack: tuples, bytes of tuples; and the largest plaintext that is not cut."""

    tuples: int
    nbytes: int
    plaintext: int


class Place(NamedTuple):
    """What all packs of one epoch have in common."""

    cluster: str
    chain: str
    origin: str
    epoch: int
    frame: bytes = b""
    """A schema registry's, before each pack; none without one."""


class SealedTopic(NamedTuple):
    """The messages of one topic-partition, in order, and the root over their tuples."""

    topic: str
    partition: int
    messages: list[bytes]
    records: int
    sub_root: bytes


class SealedBatch(NamedTuple):
    """A batch ready to send, with everything its manifest says but the offsets."""

    number: int
    dek_id: str
    topics: list[SealedTopic]
    tables: tuple[str, ...]
    pci_columns: tuple[str, ...]
    row_count: int
    record_count: int
    nbytes: int
    end_lsn: int
    continues: bool
    transactions: int
    oldest_commit_time: int
    kek_id: str = ""
    by_row: bool = False
    last: Transaction | None = None
    """The transaction that ends where the batch does."""
    described: str = ""
    """SHA-256 of the tables and columns this batch describes, in hex; empty: it describes none."""
    leaves: tuple[PartLeaves, ...] = ()
    """What each topic-partition's records hash to, in the order of `topics`."""


class Relations:
    """Which descriptor each relation id follows now, and which the present data key has sent, and where.

    `spread`: how rows of tables that allow it are distributed over partitions; None: not at all.
    """

    def __init__(self, spread: Spread | None = None) -> None:
        self.spread = spread
        self.current: dict[bytes, Descriptor] = {}
        self.sent: set[tuple[bytes, int]] = set()
        self.last: dict[TableName, bytes] = {}
        """Table → its last descriptor that was sent."""
        self.described: set[bytes] = set()
        """Hashes of all descriptors of this epoch, under whatever key."""
        self.fresh: list[Descriptor] = []
        """Those the batch that was arranged last is the first to have."""

    def copy(self) -> Relations:
        """As it stands now."""
        found = Relations(self.spread)
        found.current, found.sent = dict(self.current), set(self.sent)
        found.last, found.described = dict(self.last), set(self.described)
        return found


class _Arranger:
    """Distributes one batch's frames over parts, and numbers them."""

    def __init__(self, relations: Relations, max_plaintext: int) -> None:
        self._relations = relations
        self._max_plaintext = max_plaintext
        self._by_key: dict[bytes, Part] = {}
        self._spread: dict[bytes, dict[int, Part]] = {}
        self.parts: list[Part] = []
        self.count = 0
        self.by_row = relations.spread is not None

    def change(self, key: bytes, descriptor: Descriptor) -> None:
        """From here on frames of `key` belong to another part."""
        self._relations.current[key] = descriptor
        self._by_key.pop(key, None)
        self._spread.pop(key, None)

    def add(self, transaction: int, frames: list[bytes]) -> None:
        """Take consecutive frames of one transaction."""
        keys = list(map(_relation_of, frames))
        if keys.count(keys[0]) == len(keys) and not self._is_spread(keys[0]):
            part = self._part(keys[0], transaction, frames[0])
            part.indexes += range(self.count, self.count + len(frames))
            part.transactions += repeat(transaction, len(frames))
            part.frames += frames
            self.count += len(frames)
            return
        for key, frame in zip(keys, frames, strict=True):
            self._one(self._by_key.get(key) or self._part(key, transaction, frame), transaction, frame)

    def add_large(self, transaction: int, frames: list[bytes]) -> None:
        """The same where some frame may be too large for one message."""
        for frame in frames:
            self._cut(self._part(frame[RELATION_ID], transaction, frame), transaction, frame)

    def _cut(self, part: Part, transaction: int, frame: bytes) -> None:
        """Take a frame whole, or in pieces of which the last one carries the true operation."""
        prefix = frame[:PLAINTEXT_AT]
        piece_prefix = frame_prefix(Op.PIECE, frame[RELATION_ID], frame_lsn(frame))
        at = PLAINTEXT_AT
        while len(frame) - at > self._max_plaintext:
            self._one(part, transaction, piece_prefix + frame[at : at + self._max_plaintext])
            at += self._max_plaintext
        self._one(part, transaction, prefix + frame[at:])

    def _one(self, part: Part, transaction: int, frame: bytes) -> None:
        part.frames.append(frame)
        part.indexes.append(self.count)
        part.transactions.append(transaction)
        self.count += 1

    def _is_spread(self, key: bytes) -> bool:
        descriptor = self._relations.current.get(key)
        return self._relations.spread is not None and descriptor is not None and bool(descriptor.key)

    def _part(self, key: bytes, transaction: int, frame: bytes) -> Part:
        part = self._by_key.get(key)
        if part is not None:
            return part
        descriptor = self._relations.current.get(key)
        if descriptor is None:
            raise DecodeError(f"a row of relation {key.hex()}, which was not described")
        spread = self._relations.spread
        if spread is None or not descriptor.key:
            self.by_row = False
            part = self._by_key[key] = self._new_part(key, descriptor, 0, transaction, frame)
            return part
        place = spread.place(descriptor.name, descriptor.key, frame)
        if place == NO_PLACE:
            self.by_row, place = False, 0
        parts = self._spread.setdefault(key, {})
        part = parts.get(place)
        if part is None:
            part = parts[place] = self._new_part(key, descriptor, place, transaction, frame)
        return part

    def _new_part(
        self, key: bytes, descriptor: Descriptor, partition: int, transaction: int, frame: bytes
    ) -> Part:
        """A part, with its descriptor as the first record where the partition has not had it."""
        relations = self._relations
        part = Part(descriptor, partition)
        self.parts.append(part)
        if (descriptor.hash, partition) not in relations.sent:
            relations.sent.add((descriptor.hash, partition))
            if descriptor.hash not in relations.described:
                relations.described.add(descriptor.hash)
                relations.fresh.append(descriptor)
            # Whatever came under another definition must be applied before.
            if relations.last.setdefault(descriptor.name, descriptor.hash) != descriptor.hash:
                relations.last[descriptor.name], self.by_row = descriptor.hash, False
            self._cut(part, transaction, make_frame(Op.RELATION, key, frame_lsn(frame), descriptor.encoded))
        return part


def arrange(batch: Batch, relations: Relations, max_plaintext: int) -> list[Part]:
    """Parts of a batch; changes `relations` as the batch does, so batches must come in order."""
    relations.fresh.clear()
    arranger = _Arranger(relations, max_plaintext)
    large = batch.nbytes > max_plaintext and max(map(len, batch.frames)) - PLAINTEXT_AT > max_plaintext
    add = arranger.add_large if large else arranger.add
    changes = iter(batch.relations)
    change = next(changes, None)
    for transaction, (start, stop) in enumerate(pairwise([*batch.starts, len(batch.frames)])):
        at = start
        while change is not None and change.position < stop:
            if change.position > at:
                add(transaction, batch.frames[at : change.position])
                at = change.position
            arranger.change(change.key, change.descriptor)
            change = next(changes, None)
        add(transaction, batch.frames[at:stop])
    batch.by_row = arranger.by_row and not batch.fragment
    return arranger.parts


def needs(parts: list[Part]) -> tuple[int, int]:
    """Tuples and plaintext bytes a data key must have room for."""
    return sum(len(p.frames) for p in parts), sum(sum(map(len, p.frames)) for p in parts)


def seal(
    batch: Batch, parts: list[Part], number: int, key: SealingKey, place: Place, limits: PackLimits
) -> SealedBatch:
    """Encrypt an arranged batch under one key."""
    messages: dict[tuple[str, int], list[bytes]] = {}
    leaves: dict[tuple[str, int], list[bytes]] = {}
    for part in parts:
        table = part.descriptor.name
        topic = names.data_topic(place.cluster, place.chain, table.schema, table.table)
        lies = (topic, part.partition)
        sent, tree = messages.setdefault(lies, []), leaves.setdefault(lies, [])
        for start, stop in _cuts(part.frames, limits):
            message, pack_leaves = _seal_pack(batch, part, slice(start, stop), number, key, place)
            sent.append(message)
            tree += pack_leaves
    topics = [
        SealedTopic(*lies, messages[lies], len(leaves[lies]), merkle.root(leaves[lies]))
        for lies in sorted(messages)
    ]
    return SealedBatch(
        number=number,
        dek_id=key.dek_id,
        topics=topics,
        tables=tuple(sorted({str(part.descriptor.name) for part in parts})),
        pci_columns=tuple(sorted({name for part in parts for name in part.descriptor.pci_columns})),
        row_count=len(batch.frames),
        record_count=sum(topic.records for topic in topics),
        nbytes=sum(sum(map(len, topic.messages)) for topic in topics),
        end_lsn=batch.end_lsn,
        continues=batch.continues,
        transactions=len(batch.transactions),
        oldest_commit_time=batch.transactions[0].commit_time,
        by_row=batch.by_row,
        last=batch.transactions[-1] if batch.end_lsn else None,
        leaves=tuple(part_leaves(number, leaves[lies]) for number, lies in enumerate(sorted(messages))),
    )


def _cuts(frames: list[bytes], limits: PackLimits) -> list[tuple[int, int]]:
    """Where one pack ends and the next begins; a tuple larger than a pack travels alone."""
    size = len(frames)
    largest = max(map(len, frames)) + TUPLE_OVERHEAD
    if largest * min(limits.tuples, size) <= limits.nbytes:
        return [(at, min(at + limits.tuples, size)) for at in range(0, size, limits.tuples)]
    ends = list(accumulate(len(frame) + TUPLE_OVERHEAD for frame in frames))
    cuts, at = [], 0
    while at < size:
        before = ends[at - 1] if at else 0
        stop = min(max(bisect_right(ends, before + limits.nbytes), at + 1), at + limits.tuples)
        cuts.append((at, stop))
        at = stop
    return cuts


def _seal_pack(
    batch: Batch, part: Part, rows: slice, number: int, key: SealingKey, place: Place
) -> tuple[bytes, list[bytes]]:
    frames, indexes, touched = part.frames[rows], part.indexes[rows], part.transactions[rows]
    distinct = list(dict.fromkeys(touched))
    header = encode_header(
        PackHeader(
            cluster=place.cluster,
            chain=place.chain,
            origin=place.origin,
            table=part.descriptor.name,
            partition=part.partition,
            epoch=place.epoch,
            batch=number,
            dek_id=key.dek_id,
            relation=part.descriptor.hash,
            transactions=_pick(batch.transactions, distinct),
        )
    )
    pack = _CLEAR.pack
    if len(distinct) == 1:
        clears = [pack(0, f[LSN], i, f[KIND]) for f, i in zip(frames, indexes, strict=True)]
    else:
        local = {transaction: i for i, transaction in enumerate(distinct)}
        clears = [
            pack(local[t], f[LSN], i, f[KIND]) for t, f, i in zip(touched, frames, indexes, strict=True)
        ]
    records, leaves = seal_tuples(key, header_digest(header), clears, [f[PLAINTEXT_AT:] for f in frames])
    return encode_pack(header, records, place.frame), leaves


def _pick(transactions: list[Transaction], wanted: list[int]) -> tuple[Transaction, ...]:
    return tuple(transactions[i] for i in wanted)
