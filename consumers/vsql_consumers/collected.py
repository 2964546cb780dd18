"""What the collector takes, keeps and gives: decisions, partitions, entries, whole batches. Pure values.

Not here: what follows from them (collect.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from vsql_consumers.verify import Pack, Part, record_name
from vsql_shared.errors import RecordError

if TYPE_CHECKING:
    from vsql_shared.audit.chain import ChainHead
    from vsql_shared.audit.entries import AuditEntry
    from vsql_shared.changes import PartitionRoot, Transaction

TopicPartition: TypeAlias = tuple[str, int]

# Bytes a buffered pack costs beyond its message: objects, header, deque.
_PACK_OVERHEAD = 1_024


class Decided(NamedTuple):
    """A decision on a source transaction: its number, and the verdict on the changes: skipped, parked."""

    id: int
    verdict: str


@dataclass(frozen=True, slots=True)
class Decisions:
    """What an operator decided about refused records: kept for good, read again at every start.

    `ignored`: records (topic, partition, offset) that are passed over. `skipped`: sequences of the chain that
    are passed over, with their records. `skipped_batches`: (epoch, batch) of entries skipped before.
    `transactions`: those that are not applied.
    """

    ignored: frozenset[tuple[str, int, int]] = frozenset()
    skipped: frozenset[int] = frozenset()
    skipped_batches: frozenset[tuple[int, int]] = frozenset()
    transactions: Mapping[Transaction, Decided] = field(default_factory=dict)


class Ready(NamedTuple):
    """The next entry of the chain, whole. A batch has `parts`.

    `entry` is None for an entry that was skipped unread: only its place in the chain is known.
    """

    sequence: int
    head: ChainHead
    audit_offset: int
    """Next offset to read in the audit partition."""
    offsets: Mapping[TopicPartition, int]
    """Next offset to read in each data partition it names."""
    entry: AuditEntry | None
    encoded: bytes
    entry_hash: bytes
    parts: list[Part]
    skipped: bool


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A message of a data topic that cannot be a pack of this chain."""

    offset: int
    reason: str


@dataclass(slots=True)
class Partition:
    """A data partition: all below `next` was delivered; `waiting` lies in offset order."""

    topic: str
    number: int
    next: int
    lost: tuple[int, int] = (0, 0)
    """Offsets [from, to) that Kafka deleted before they were delivered."""
    waiting: deque[Pack | Unreadable] = field(default_factory=deque)
    paused: bool = False
    passing: deque[tuple[int, int]] = field(default_factory=deque)
    """Offsets [first, last] of manifests whose records here are somebody else's to apply, in order."""

    def passes(self, offset: int) -> bool:
        """Whether the record at `offset` is of a batch that is applied by somebody else."""
        while self.passing and self.passing[0][1] < offset:
            self.passing.popleft()
        return bool(self.passing) and self.passing[0][0] <= offset

    @property
    def key(self) -> TopicPartition:
        """Topic and number."""
        return self.topic, self.number


@dataclass(slots=True)
class Entry:
    """An accepted entry that was not given out yet; a manifest's parts fill up as packs arrive."""

    sequence: int
    head: ChainHead
    audit_offset: int
    entry: AuditEntry | None
    encoded: bytes
    entry_hash: bytes
    parts: list[Part]
    taken: int = 0  # bytes of its packs


class Flow(NamedTuple):
    """Partitions to pause, and to resume."""

    pause: list[TopicPartition]
    resume: list[TopicPartition]


class Awaited(NamedTuple):
    """What the next batch still needs of a partition: offsets `next` to `last`."""

    topic: str
    partition: int
    next: int
    last: int


def check_kept(place: Partition, sequence: int, root: PartitionRoot) -> None:
    """Raise RecordError when Kafka deleted records a manifest names before they were delivered."""
    begin, end = place.lost
    if root.first_offset < end and begin <= root.last_offset:
        first = max(begin, root.first_offset)
        raise RecordError(
            f"Kafka begins at offset {end}; entry {sequence} needs offset {first} on",
            record=record_name(place.topic, place.number, first),
            hint="records were deleted before they were applied",
        )


def cost(pack: Pack | Unreadable) -> int:
    """Bytes a buffered message costs."""
    return _PACK_OVERHEAD + (len(pack.message) if isinstance(pack, Pack) else 0)


def refuse(place: Partition, offset: int, what: str) -> RecordError:
    """The error that names a record which is not to be."""
    return RecordError(
        f"refused {what}",
        record=record_name(place.topic, place.number, offset),
        hint="decide with `syncctl`: ignore this record, or skip the batch",
    )
