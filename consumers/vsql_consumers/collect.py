"""Collect whole batches, in the order of their chain, out of records that arrive in any order.

Not here: Kafka, signatures' keys, decryption, and whether a whole batch is the one that was signed
(verify.py). A pure state machine: `feed` takes records, `next_ready` gives entries and batches. Rules
(docs/design/0001-wire-and-chain.md, "Batches and manifests"):

* The chain leads: a batch exists once its manifest was accepted, and comes out when every topic-partition it
  names was delivered up to its last offset. A data partition is read from the first offset a manifest names.
* A pack belongs to a manifest by (epoch, batch) and its offset. Of what does not belong: an older epoch
  without manifest is an orphan, passed over and counted; what may still get a manifest waits; everything
  else (replayed, reordered, forged, no pack at all) is refused with its record named.
* What was refused stays refused: everything before it is still given out, then every call raises. The owner
  makes a new collector from the stored progress when an operator has decided.
* An operator's decision is exact: one record is passed over, or one entry of the chain.
* Memory: beyond the limit every partition is paused but those the next batch needs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from vsql_consumers.collected import (
    Awaited,
    Decisions,
    Entry,
    Flow,
    Partition,
    Ready,
    TopicPartition,
    Unreadable,
    check_kept,
    cost,
    refuse,
)
from vsql_consumers.verify import Pack, Part, record_name
from vsql_shared.audit.chain import Accepted, ChainHead, ChainReader, Void
from vsql_shared.audit.dsse import AUDIT_ENTRY, open_document
from vsql_shared.audit.entries import EPOCH_OPENED, REPLICATION_BATCH, AuditEntry, signed_place
from vsql_shared.audit.tree import grow
from vsql_shared.changes import PartitionRoot
from vsql_shared.errors import ChainError, DecodeError, RecordError, SignatureError, VerificationError
from vsql_shared.wire.framing import without_frame
from vsql_shared.wire.pack import decode_header

if TYPE_CHECKING:
    from vsql_shared.crypto.signing import TrustStore

# Entries of the chain read ahead of the batch being collected; some kilobytes each.
MAX_ENTRIES_AHEAD = 1_024

Choose: TypeAlias = Callable[[AuditEntry, PartitionRoot], bool]


class Collector:
    """Collects one chain from a stored position on; see the module for the rules."""

    def __init__(
        self,
        reader: ChainReader,
        trust: TrustStore,
        audit: TopicPartition,
        audit_offset: int,
        offsets: Mapping[TopicPartition, int],
        buffer_bytes: int,
        decisions: Decisions | None = None,
        choose: Choose | None = None,
    ) -> None:
        """`choose`: which parts of a batch are collected; None: all."""
        self._reader, self._trust = reader, trust
        self._audit, self.audit_next = audit, audit_offset
        self._limit = buffer_bytes
        self._decisions = decisions or Decisions()
        self._choose = choose
        self._skipped_batches = set(self._decisions.skipped_batches)
        self._partitions = {key: Partition(*key, offset) for key, offset in offsets.items()}
        self._wanted: list[tuple[str, int, int]] = [(*key, offset) for key, offset in offsets.items()]
        self._entries: deque[Entry] = deque()
        # The position up to which entries were given out; what counts for packs without a manifest.
        self._epoch, self._batch = reader.head.epoch, reader.head.batch
        self._last_of_epoch: dict[int, int] = {}
        self._refused: VerificationError | None = None
        self.audit_paused = False
        self._over = False
        self.buffered = self.orphans = self.voids = self.ignored = 0

    @property
    def read_head(self) -> ChainHead:
        """How far the chain was read; batches up to here may still be under way."""
        return self._reader.head

    @property
    def entries_ahead(self) -> int:
        """Entries read and not given out."""
        return len(self._entries)

    def read_chain_from(self, offset: int) -> None:
        """Take the chain's entries from another offset on than the stored one: the topic was cut."""
        self.audit_next = offset

    def feed(self, topic: str, partition: int, offset: int, value: bytes | None) -> None:
        """Take the next record of a partition; a record that was delivered before is passed over."""
        if (topic, partition) == self._audit:
            if offset >= self.audit_next:
                self.audit_next = offset + 1
                self._feed_entry(offset, value)
            return
        place = self._partitions.get((topic, partition))
        if place is None or offset < place.next:
            return
        place.next = offset + 1
        if (topic, partition, offset) in self._decisions.ignored:
            self.ignored += 1
            return
        place.waiting.append(self._read_pack(offset, value))
        self.buffered += cost(place.waiting[-1])

    def delivered(self, topic: str, partition: int, next_offset: int) -> None:
        """Note that nothing more comes below `next_offset` (the end of the partition was reached)."""
        if (topic, partition) == self._audit:
            self.audit_next = max(self.audit_next, next_offset)
        place = self._partitions.get((topic, partition))
        if place is not None:
            place.next = max(place.next, next_offset)

    def deleted_below(self, topic: str, partition: int, low: int) -> None:
        """Note that Kafka deleted what lay below `low`: a batch that needs some of it is refused."""
        place = self._partitions.get((topic, partition))
        if place is not None and place.next < low:
            begin = place.lost[0] if place.lost[1] == place.next else place.next
            place.lost, place.next = (begin, low), low

    def next_offset(self, topic: str, partition: int, most: int) -> int:
        """Where to go on reading a partition that ends at `most`."""
        place = self._partitions.get((topic, partition))
        return most if place is None else min(place.next, most)

    def next_ready(self) -> Ready | None:
        """The next entry or whole batch; None when more records are needed.

        Raises VerificationError, again and again, once everything before the refused record was given out.
        """
        if self._entries:
            ready = self._try_head(self._entries[0])
            if ready is not None:
                return ready
        for place in self._partitions.values():
            self._sweep(place)
        if self._refused is not None and not self._entries:
            raise self._refused
        return None

    def wanted(self) -> list[tuple[str, int, int]]:
        """Data partitions to read from now on: (topic, partition, first offset); each is told once."""
        wanted, self._wanted = self._wanted, []
        return wanted

    def flow(self) -> Flow:
        """What to pause and resume since the last call, so that the buffer stays within its limit."""
        if self.buffered > self._limit:
            self._over = True
        elif self.buffered <= self._limit // 2:  # half, so that partitions do not flutter
            self._over = False
        needed = {(a.topic, a.partition) for a in self.awaited()}
        flow = Flow([], [])
        for place in self._partitions.values():
            pause = self._over and place.key not in needed
            if pause != place.paused:
                place.paused = pause
                (flow.pause if pause else flow.resume).append(place.key)
        most = MAX_ENTRIES_AHEAD // 2 if self.audit_paused else MAX_ENTRIES_AHEAD
        pause = len(self._entries) >= most or self._refused is not None
        if pause != self.audit_paused:
            self.audit_paused = pause
            (flow.pause if pause else flow.resume).append(self._audit)
        return flow

    def awaited(self) -> list[Awaited]:
        """What the next batch in order still needs."""
        if not self._entries:
            return []
        found = []
        for part in self._entries[0].parts:
            root = part.root
            place = self._partitions[root.topic, root.partition]
            if place.next <= root.last_offset:
                found.append(Awaited(root.topic, root.partition, place.next, root.last_offset))
        return found

    def check_log(self, topic: str, partition: int, low: int, high: int) -> None:
        """Hold what is awaited against the partition's first and next offset in Kafka.

        Raises RecordError when Kafka no longer has, or never had, a record the manifest names.
        """
        for wanted in self.awaited():
            if (wanted.topic, wanted.partition) != (topic, partition):
                continue
            entry = self._entries[0]
            root = next(p.root for p in entry.parts if (p.root.topic, p.root.partition) == (topic, partition))
            if low > max(wanted.next, root.first_offset):
                raise RecordError(
                    f"Kafka begins at offset {low}; entry {entry.sequence} needs offset {wanted.next} on",
                    record=record_name(topic, partition, max(wanted.next, root.first_offset)),
                    hint="records were deleted before they were applied",
                )
            if high <= root.last_offset:
                raise RecordError(
                    f"Kafka ends at offset {high}; entry {entry.sequence} needs offset {root.last_offset}",
                    record=record_name(topic, partition, high),
                    hint="records that were acknowledged are gone from the topic",
                )

    # The chain

    def _feed_entry(self, offset: int, value: bytes | None) -> None:
        if self._refused is not None or value is None:  # what compaction leaves of a pruned entry
            return
        if (*self._audit, offset) in self._decisions.ignored:
            self.ignored += 1
            return
        where = record_name(*self._audit, offset)
        try:
            outcome = self._accept(value, where, offset)
        except DecodeError as error:
            self._refused = RecordError(
                f"no entry of a chain: {error.message}", record=where, hint=error.hint
            )
            return
        except VerificationError as error:
            error.record = error.record or where
            self._refused = error
            return
        if isinstance(outcome, Void):
            self.voids += 1
        elif outcome is not None:
            self._take_entry(outcome, value, offset)

    def _accept(self, value: bytes, where: str, offset: int) -> Accepted | Void | None:
        """The chain reader's answer; one an operator skips is passed over, or bridged where it is gone."""
        try:
            return self._reader.accept(value, where)
        except (ChainError, SignatureError, DecodeError):
            due = self._reader.head.sequence + 1
            if due not in self._decisions.skipped:
                raise
            entry = self._genuine(value)
            if entry is None or entry.sequence == due:
                self.ignored += 1  # the very entry the operator wants passed over
                return None
            if not self._bridge(entry, offset):
                raise
            return self._reader.accept(value, where)

    def _genuine(self, value: bytes) -> AuditEntry | None:
        """The entry, if it is one of this chain by its own writer, wherever it stands."""
        try:
            entry = AuditEntry.decode(
                open_document(self._trust, self._reader.writer_node, value, AUDIT_ENTRY, signed_place)
            )
        except (SignatureError, DecodeError):
            return None
        ours = (entry.cluster, entry.chain) == (self._reader.cluster, self._reader.chain)
        return entry if ours else None

    def _bridge(self, entry: AuditEntry, offset: int) -> bool:
        """Step over one entry that is missing or cannot be read, if `entry` is the genuine one after it.

        Its own place is then taken from what its successor, signed by the same node, says of it.
        """
        head = self._reader.head
        opens = entry.event_type == EPOCH_OPENED
        if (entry.sequence, entry.epoch) != (head.sequence + 2, head.epoch + opens):
            return False
        batch = entry.batch - 1 if entry.event_type == REPLICATION_BATCH else head.batch
        bridged = replace(
            head,
            sequence=head.sequence + 1,
            entry_hash=entry.prev_event_hash,
            batch=batch,
            tree=grow(head.tree, head.sequence, entry.prev_event_hash),
        )
        if opens:
            bridged = replace(bridged, unfinished_from=entry.ref_sequence)
        if batch > head.batch:
            self._skipped_batches.add((head.epoch, batch))
        self._reader.head = bridged
        self._entries.append(Entry(bridged.sequence, bridged, offset, None, b"", entry.prev_event_hash, []))
        return True

    def _take_entry(self, accepted: Accepted, encoded: bytes, offset: int) -> None:
        entry = accepted.entry
        parts = self._parts(entry) if entry.event_type == REPLICATION_BATCH else []
        for part in parts:
            key = (part.root.topic, part.root.partition)
            if key not in self._partitions:
                self._partitions[key] = Partition(*key, part.root.first_offset)
                self._wanted.append((*key, part.root.first_offset))
        self._entries.append(
            Entry(entry.sequence, accepted.new_head, offset + 1, entry, encoded, accepted.entry_hash, parts)
        )

    def _parts(self, entry: AuditEntry) -> list[Part]:
        """The parts of a batch that are collected here; the others' records are passed over."""
        parts = []
        for root in entry.partitions:
            if self._choose is None or self._choose(entry, root):
                parts.append(Part(root))
            elif (place := self._partitions.get((root.topic, root.partition))) is not None:
                place.passing.append((root.first_offset, root.last_offset))
        return parts

    def next_batch_of(self, partition: int) -> int:
        """The next entry with a batch that asks for partitions of this number; else the next one to come."""
        for entry in self._entries:
            if any(part.root.partition == partition for part in entry.parts):
                return entry.sequence
        return self._reader.head.sequence + 1

    def forget_idle(self) -> list[TopicPartition]:
        """Forget, and name, the data partitions that no entry read so far asks for: they are read no more."""
        needed = {(p.root.topic, p.root.partition) for entry in self._entries for p in entry.parts}
        idle = [key for key in self._partitions if key not in needed]
        for key in idle:
            self.buffered -= sum(map(cost, self._partitions.pop(key).waiting))
        self._wanted = [one for one in self._wanted if one[:2] in self._partitions]
        return idle

    # Packs

    def _read_pack(self, offset: int, value: bytes | None) -> Pack | Unreadable:
        if value is None:
            return Unreadable(offset, "an empty message, which is no pack")
        try:
            value = without_frame(value)
            header, body = decode_header(value)
        except DecodeError as error:
            return Unreadable(offset, error.message)
        if (header.cluster, header.chain) != (self._reader.cluster, self._reader.chain):
            return Unreadable(offset, f"a pack of chain {header.chain!r} of cluster {header.cluster!r}")
        return Pack(offset, value, header, body)

    def _try_head(self, head: Entry) -> Ready | None:
        if head.sequence in self._decisions.skipped or head.entry is None:
            return self._skip(head)
        whole = True
        for part in head.parts:
            place = self._partitions[part.root.topic, part.root.partition]
            check_kept(place, head.sequence, part.root)
            self._gather(head, head.entry, part, place)
            whole = whole and place.next > part.root.last_offset
        if not whole:
            return None
        offsets = {(p.root.topic, p.root.partition): p.root.last_offset + 1 for p in head.parts}
        return self._give(head, offsets, skipped=False)

    def _gather(self, head: Entry, entry: AuditEntry, part: Part, place: Partition) -> None:
        """Move packs up to the manifest's last offset into the batch; refuse what is not its own."""
        root, waiting = part.root, place.waiting
        while waiting and waiting[0].offset <= root.last_offset:
            pack = waiting[0]
            if isinstance(pack, Unreadable):
                raise refuse(place, pack.offset, pack.reason)
            mine = (pack.header.epoch, pack.header.batch) == (entry.epoch, entry.batch)
            if mine and pack.offset >= root.first_offset:
                waiting.popleft()
                part.packs.append(pack)
                head.taken += cost(pack)
            elif mine:
                raise refuse(
                    place, pack.offset, f"a pack of batch {entry.batch} before its first, {root.first_offset}"
                )
            elif pack.header.epoch > entry.epoch or (
                pack.header.epoch == entry.epoch and pack.header.batch > entry.batch
            ):
                raise refuse(
                    place,
                    pack.offset,
                    f"a pack of epoch {pack.header.epoch}, batch {pack.header.batch} where those of epoch"
                    f" {entry.epoch}, batch {entry.batch} are",
                )
            else:
                self._pass_over(place, pack)

    def _sweep(self, place: Partition) -> None:
        """Pass over orphans that lie at the front; refuse what can get no manifest any more."""
        while place.waiting:
            pack = place.waiting[0]
            if isinstance(pack, Unreadable):
                raise refuse(place, pack.offset, pack.reason)
            header = pack.header
            if header.epoch > self._epoch or (header.epoch == self._epoch and header.batch > self._batch):
                return
            self._pass_over(place, pack)

    def _pass_over(self, place: Partition, pack: Pack) -> None:
        """Drop a pack that belongs to no manifest to come, or refuse it: its manifest has come already."""
        epoch, batch = pack.header.epoch, pack.header.batch
        last = self._batch if epoch == self._epoch else self._last_of_epoch.get(epoch)
        skipped = (epoch, batch) in self._skipped_batches or place.passes(pack.offset)
        if not skipped and (epoch == self._epoch or (last is not None and batch <= last)):
            raise refuse(
                place, pack.offset, f"a pack of epoch {epoch}, batch {batch}, outside of its manifest's range"
            )
        place.waiting.popleft()
        self.buffered -= cost(pack)
        self.orphans += not skipped

    def _skip(self, head: Entry) -> Ready:
        """Give out an entry the operator skips; its packs, here or still to come, are passed over."""
        offsets: dict[TopicPartition, int] = {}
        if head.entry is not None and head.entry.batch:
            self._skipped_batches.add((head.entry.epoch, head.entry.batch))
        for part in head.parts:
            place = self._partitions[part.root.topic, part.root.partition]
            while place.waiting and place.waiting[0].offset <= part.root.last_offset:
                self.buffered -= cost(place.waiting.popleft())
            # Not beyond what was delivered: the log may end before the offset the manifest names.
            offsets[place.key] = min(place.next, part.root.last_offset + 1)
        return self._give(head, offsets, skipped=True)

    def _give(self, head: Entry, offsets: Mapping[TopicPartition, int], *, skipped: bool) -> Ready:
        self._entries.popleft()
        self.buffered -= head.taken
        if head.head.epoch != self._epoch:
            self._last_of_epoch[self._epoch] = self._batch
        self._epoch, self._batch = head.head.epoch, head.head.batch
        parts = [] if skipped else head.parts
        return Ready(
            head.sequence,
            head.head,
            head.audit_offset,
            offsets,
            head.entry,
            head.encoded,
            head.entry_hash,
            parts,
            skipped,
        )
