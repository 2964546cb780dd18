"""Opening an epoch: compare Kafka's chain with our own table, fence off older writers, find where to resume.

Not here: holding the slot, which must have happened before (pipeline.py). Rules (docs/design/0002):

1. The chain in Kafka must equal or extend the table's. A table that knows more means that Kafka lost its
   tail: it is published again where its records are still there (level.py), else the stream is DIVERGED,
   because targets may never see what the slot has already forgotten.
2. `epoch_opened` is appended, and the partition read up to it. The first valid one wins; a loser reads on
   and tries again. What an older writer appends after it is void for every reader. Our own entries count
   only once they have been read back without a later epoch before them (Watch).
3. Entries Kafka has and the table lacks go into the table before anything else is written.
4. Positions compare only within one timeline of one system.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, TopicPartition

from vsql_producers.publish import Publisher
from vsql_producers.replication import Identity
from vsql_shared import failpoints, lsn
from vsql_shared.audit.bases import said_base
from vsql_shared.audit.chain import (
    EMPTY_HEAD,
    Accepted,
    ChainHead,
    ChainReader,
    ChainWriter,
    new_incarnation,
)
from vsql_shared.audit.checkpoint import Log
from vsql_shared.audit.dsse import AUDIT_ENTRY, SignedDocument, document_hash, verify_document
from vsql_shared.audit.entries import EPOCH_OPENED, AuditEntry, peek_chain
from vsql_shared.audit.store import insert_entries, recall_head
from vsql_shared.crypto.signing import Signer, TrustStore
from vsql_shared.errors import ChainError, DecodeError, DivergedError, SignatureError, TransientError
from vsql_shared.kafka.clients import from_exception, kafka_error, watermarks
from vsql_shared.pg.connect import Connection

_log = logging.getLogger(__name__)
_SILENCE_SECONDS = 30.0
_POLL_SECONDS = 0.005
_ATTEMPTS = 20
# Entries the table lacks are stored in groups of so many: a table restored from a backup may lack a million.
_GROUP = 1_000


class Writing(NamedTuple):
    """Who writes which chain, and where it lies."""

    cluster: str
    chain: str
    node: str
    signer: Signer | None
    trust: TrustStore
    topic: str
    partition: int


class Opened(NamedTuple):
    """An epoch of ours: its writer, and what tells whether it still is."""

    writer: ChainWriter
    watch: Watch


class AuditTail:
    """One partition of the audit topic, read forward in order."""

    def __init__(
        self, consumer: Consumer, topic: str, partition: int, start: int | None, tick: Callable[[], None]
    ) -> None:
        self._consumer = consumer
        self._tick = tick
        self._name = f"{topic}/{partition}"
        self._at = TopicPartition(topic, partition, OFFSET_BEGINNING if start is None else start)
        self._next = 0 if start is None else start
        self._assigned = False

    def _assign(self) -> None:
        """Only when something is to be read: `start` may lie outside of the bounds, and that is an error."""
        try:
            self._consumer.assign([self._at])
        except KafkaException as error:
            raise from_exception(error, f"read {self._name}") from error
        self._assigned = True

    def bounds(self) -> tuple[int, int]:
        """First offset and the one after the last."""
        try:
            return watermarks(self._consumer, self._at, timeout=10)
        except KafkaException as error:
            raise from_exception(error, f"read the end of {self._name}") from error

    @property
    def position(self) -> int:
        """Every record below this offset has been read."""
        return self._next

    def take(self) -> list[tuple[int, bytes]]:
        """What has arrived; waits for nothing."""
        out: list[tuple[int, bytes]] = []
        if not self._assigned:
            self._assign()
        for message in self._consumer.consume(500, timeout=0):
            if (error := message.error()) is not None:
                raise kafka_error(error, f"read {self._name}")
            offset, value = message.offset(), message.value()
            if offset is not None:
                self._next = offset + 1
                if value is not None:
                    out.append((offset, value))
        return out

    def read_below(self, end: int) -> Iterator[tuple[int, bytes]]:
        """Records below offset `end`, as (offset, value); tombstones are passed over."""
        silent_until = time.monotonic() + _SILENCE_SECONDS
        while self._next < end:
            found = self.take()
            self._tick()
            if found:
                silent_until = time.monotonic() + _SILENCE_SECONDS
            elif time.monotonic() > silent_until:
                raise TransientError(f"Kafka: {self._name} gives nothing below offset {end}")
            else:
                time.sleep(_POLL_SECONDS)
            yield from found


class Watch:
    """Reads our chain behind our own writing, to see whether the epoch is still ours.

    A process that was stopped after it had read the chain may append its `epoch_opened` much later, when its
    slot has long been taken over; from there on our entries are void for every reader. So an entry of ours
    counts only once everything before it has been read (docs/design/0003).
    """

    def __init__(self, writing: Writing, tail: AuditTail, incarnation: bytes) -> None:
        self._writing, self._tail, self._incarnation = writing, tail, incarnation

    def read(self) -> int:
        """Entries below this offset are known to stand. Raises FencedOff when another epoch was opened."""
        for _, value in self._tail.take():
            # Only a genuine one: anybody who can write to the topic could stop us otherwise.
            try:
                entry = self._opening_of_another(value)
            except (DecodeError, SignatureError) as error:
                _log.error("a record that is no entry of ours lies among them: %s", error)
                continue
            if entry is None:
                continue
            raise FencedOff(
                f"another process opened epoch {entry.epoch} of chain {entry.chain}",
                hint="this one reads the chain again and opens a new epoch",
            )
        return self._tail.position

    def _opening_of_another(self, value: bytes) -> AuditEntry | None:
        document = SignedDocument.decode(value)
        if document.payload_type != AUDIT_ENTRY or peek_chain(document.payload)[1] != self._writing.chain:
            return None
        entry = AuditEntry.decode(document.payload)
        if entry.event_type != EPOCH_OPENED or entry.incarnation == self._incarnation:
            return None
        verify_document(self._writing.trust, self._writing.node, document, AUDIT_ENTRY)
        return entry


class FencedOff(TransientError):
    """Another writer opened an epoch after ours."""


def check_source(head: ChainHead, identity: Identity, switch_points: dict[int, int]) -> None:
    """Raise DivergedError when the chain's positions mean nothing on this server any more (rule 4)."""
    if not head.system_identifier:
        return
    if head.system_identifier != identity.system_identifier:
        raise DivergedError(
            f"the chain was written on system {head.system_identifier}, this server is"
            f" {identity.system_identifier}",
            hint="this is another database cluster; initialise the targets anew",
        )
    if head.timeline == identity.timeline:
        if identity.wal_lsn < head.lsn_end:
            raise DivergedError(
                f"this server's WAL ends at {lsn.text(identity.wal_lsn)}, and changes up to"
                f" {lsn.text(head.lsn_end)} were sent",
                hint="it was restored from an older state; targets hold what it lost: initialise them anew",
            )
        return
    switched = switch_points.get(head.timeline)
    if switched is None or switched < head.lsn_end:
        where = "unknown" if switched is None else lsn.text(switched)
        raise DivergedError(
            f"timeline {identity.timeline} left timeline {head.timeline} at {where}, and changes up to"
            f" {lsn.text(head.lsn_end)} were sent",
            hint="targets hold changes this server lost; verify them, then initialise anew",
        )


class LostEnd(DivergedError):
    """Kafka does not have the entry the audit table ends with."""


def read_chain(
    conn: Connection, writing: Writing, consumer: Consumer, tick: Callable[[], None]
) -> tuple[ChainReader, AuditTail]:
    """Read the chain to its end from where the table stands, and bring the table up to it (rules 1 and 3).

    Raises LostEnd where Kafka is behind the table.
    """
    known = recall_head(conn, writing.chain)
    head, offset = known or (EMPTY_HEAD, None)
    # A head whose place is not known is found again from the beginning, or from where the chain was pruned.
    start = base_head(conn, writing) if offset is None else head
    pruned = start.sequence if offset is None else 0
    reader = ChainReader(writing.cluster, writing.chain, writing.node, writing.trust, start, pruned)
    tail = AuditTail(consumer, writing.topic, writing.partition, offset, tick)
    low, end = tail.bounds()
    if offset is not None and not low <= offset < end:
        raise _lost(writing, head, f"it holds offsets {low} to {end - 1}, our last entry lay at {offset}")
    if low:
        _log.warning(
            "Kafka deleted audit entries: a target that had not read them, or joins, will be diverged",
            extra={"topic": writing.topic, "partition": writing.partition, "begins": low},
        )
    accepted: list[tuple[bytes, int | None]] = []
    added = 0
    for entry in _catch_up(writing, reader, tail, head, offset, end):
        accepted.append(entry)
        added += 1
        if len(accepted) >= _GROUP:
            insert_entries(conn, accepted)
            accepted.clear()
    insert_entries(conn, accepted)
    if added:
        _log.info("entries that Kafka had and the table lacked", extra={"entries": added})
    return reader, tail


def base_head(conn: Connection, writing: Writing) -> ChainHead:
    """The head before the first entry that Kafka must still have of our chain."""
    base = said_base(conn, writing.trust, Log(writing.cluster, writing.chain))
    return EMPTY_HEAD if base is None else base.head


def _catch_up(
    writing: Writing, reader: ChainReader, tail: AuditTail, head: ChainHead, offset: int | None, end: int
) -> Iterator[tuple[bytes, int | None]]:
    """Entries after the table's head. Raises LostEnd where Kafka does not have that head (rule 1)."""
    seen = head.sequence == 0
    for at, value in tail.read_below(end):
        if offset is not None and not seen:
            # Reading began at the head's own place.
            if at != offset or document_hash(value) != head.entry_hash:
                raise _lost(writing, head, f"offset {offset} holds another record")
            seen = True
            continue
        found = accept(reader, value, f"{writing.topic}/{writing.partition}/{at}")
        if found is not None:
            seen = seen or found.entry_hash == head.entry_hash
            if found.entry.sequence > head.sequence:
                yield value, at
    if not seen:
        raise _lost(writing, head, f"the chain ends at sequence {reader.head.sequence}")


def accept(reader: ChainReader, value: bytes, where: str) -> Accepted | None:
    """An entry of ours that counts. What does not verify cannot be ours, and must not stop us."""
    try:
        found = reader.accept(value, where)
    except (DecodeError, SignatureError) as error:
        _log.error("a record that is no entry of ours lies among them: %s", error)
        return None
    except ChainError as error:
        raise DivergedError(
            f"our own chain does not hold together: {error}",
            hint="run `syncctl audit verify`; two processes may have signed with this node's key",
        ) from error
    return found if isinstance(found, Accepted) else None


def _lost(writing: Writing, head: ChainHead, found: str) -> LostEnd:
    return LostEnd(
        f"Kafka lost the end of chain {writing.chain}: the audit table has sequence {head.sequence},"
        f" but in {writing.topic}/{writing.partition} {found}",
        hint="restore the topic, or initialise the targets anew",
    )


def open_epoch(
    conn: Connection,
    writing: Writing,
    reader: ChainReader,
    tail: AuditTail,
    publisher: Publisher,
    identity: Identity,
    begin: Callable[[ChainHead], int],
    detail: str = "{}",
) -> Opened:
    """Append `epoch_opened` until one of ours is the chain's head (rule 2).

    `begin`: a head → from where on the epoch behind it speaks.
    """
    for _ in range(_ATTEMPTS):
        head = reader.head
        writer = ChainWriter(
            writing.signer, writing.cluster, writing.chain, head, new_incarnation(), node=writing.node
        )
        opening = writer.open_epoch(
            lsn=begin(head),
            system_identifier=identity.system_identifier,
            timeline=identity.timeline,
            detail=detail,
        )
        failpoints.hit("producer.opening")
        offset = publisher.publish_entry(opening)
        accepted: list[tuple[bytes, int | None]] = []
        for at, value in tail.read_below(offset + 1):
            if accept(reader, value, f"{writing.topic}/{writing.partition}/{at}") is not None:
                accepted.append((value, at))
        insert_entries(conn, accepted)
        if reader.head.entry_hash == opening.entry_hash:
            writer.commit(opening.entry_hash)
            _log.info(
                "epoch opened", extra={"epoch": opening.entry.epoch, "sequence": opening.entry.sequence}
            )
            return Opened(writer, Watch(writing, tail, writer.incarnation))
        _log.warning(
            "another writer opened the epoch first; trying again", extra={"epoch": opening.entry.epoch}
        )
    raise TransientError(
        f"chain {writing.chain}: another process keeps opening epochs", hint="stop one of them"
    )
