"""Bringing Kafka level with our audit table: entries it lost are published again, byte by byte (rule 5).

A broker that lost the end of the audit partition (a topic made anew, a disk restored from a backup) leaves a
table that knows more than Kafka. The slot has forgotten what those manifests cover, so they are worth
publishing again, if everything they promise is still there. Procedure:

0. If the chain's end is there after all, at another place or behind a gap, it is taken as it is: what is
   missing before it cannot be published behind it, and the table has it.
1. Kafka's part of the chain must be a beginning of the table's; else two histories exist, and nobody may
   choose.
2. Every missing document must extend it, signed. Every record of every missing manifest is read at its
   offsets, and its sub-root computed from what is there; the announcement of every data key they need is
   looked for. Nothing is published before all of it was found.
3. The missing entries are appended as they were signed, and the place of the last one is noted.

Not here: the chain's reading (epoch.py). Raises DivergedError, which names the first thing that is missing.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

from vsql_producers.epoch import AuditTail, LostEnd, Writing, accept, base_head, read_chain
from vsql_producers.publish import Publisher
from vsql_shared import names
from vsql_shared.audit import merkle
from vsql_shared.audit.chain import ChainHead, ChainReader, Prepared
from vsql_shared.audit.dsse import AUDIT_ENTRY, SignedDocument, document_hash
from vsql_shared.audit.entries import AuditEntry, peek_chain
from vsql_shared.audit.rows import StoredDocument
from vsql_shared.audit.store import has_document, insert_entries, iterate, move_offset, recall_head
from vsql_shared.changes import PartitionRoot
from vsql_shared.errors import DecodeError, DivergedError, TransientError, VsqlSyncError
from vsql_shared.kafka.clients import from_exception, is_unknown_topic, kafka_error, watermarks
from vsql_shared.pg.connect import Connection
from vsql_shared.wire.framing import without_frame
from vsql_shared.wire.pack import decode_header, decode_tuples, header_digest

_log = logging.getLogger(__name__)
_SILENCE_SECONDS = 30.0
_TIMEOUT_SECONDS = 10.0
# Manifests whose records are looked for at a time: bounds memory; each topic is read once for all of them.
_CHUNK = 1_000

Tick = Callable[[], None]


class _Range(NamedTuple):
    """What one manifest says of one topic-partition."""

    entry: AuditEntry
    part: PartitionRoot


def read_or_level(
    conn: Connection, writing: Writing, consumer: Consumer, publisher: Publisher, tick: Tick
) -> tuple[ChainReader, AuditTail]:
    """Read the chain; where Kafka is behind the table, publish what it lost and read again."""
    try:
        return read_chain(conn, writing, consumer, tick)
    except LostEnd as lost:
        _log.warning("%s", lost.message)
        _publish_missing(conn, writing, consumer, publisher, tick, lost)
    return read_chain(conn, writing, consumer, tick)


def _publish_missing(
    conn: Connection, writing: Writing, consumer: Consumer, publisher: Publisher, tick: Tick, lost: LostEnd
) -> None:
    known = recall_head(conn, writing.chain)
    if known is None:
        raise lost
    head = known[0]
    if _find_end(conn, writing, consumer, tick, head):
        return
    there = kafka_head(conn, writing, consumer, tick)
    # 1. Linked hashes: equal at the last common entry is equal up to it.
    _require_beginning(conn, writing, there, head, lost)
    first = there.sequence + 1
    # 2. All of it, before anything is published.
    reader = ChainReader(writing.cluster, writing.chain, writing.node, writing.trust, there)
    _require_records(iterate(conn, writing.chain, first), reader, writing, consumer, tick, lost)
    # 3. As they were signed.
    offset = -1
    for stored in iterate(conn, writing.chain, first):
        offset = publisher.publish_entry(Prepared(stored.entry, stored.encoded, stored.entry_hash))
    move_offset(conn, writing.chain, head.entry_hash, offset)
    _log.warning(
        "entries Kafka had lost were published again",
        extra={"first": first, "last": head.sequence, "chain": writing.chain},
    )


def _find_end(conn: Connection, writing: Writing, consumer: Consumer, tick: Tick, head: ChainHead) -> bool:
    """Note where the table's last entry lies now, and take what follows it.

    A topic made anew while this stream was running may begin with an entry that was under way.
    """
    reader = ChainReader(writing.cluster, writing.chain, writing.node, writing.trust, head)
    tail = AuditTail(consumer, writing.topic, writing.partition, None, tick)
    place, after = -1, list[tuple[bytes, int | None]]()
    for at, value in tail.read_below(tail.bounds()[1]):
        if _chain_of(value) != writing.chain:
            continue
        if document_hash(value) == head.entry_hash:
            place = at
        elif has_document(conn, writing.chain, value):
            continue
        elif accept(reader, value, f"{writing.topic}/{writing.partition}/{at}") is not None:
            after.append((value, at))
            if len(after) >= _CHUNK:
                insert_entries(conn, after)
                after.clear()
    if place < 0 and reader.head is head:
        return False
    move_offset(conn, writing.chain, head.entry_hash, place)
    insert_entries(conn, after)
    _log.error(
        "the chain's end was found again; of what Kafka lost before it, the audit table is the only copy:"
        " a target that had not read it, or joins, will be diverged",
        extra={"chain": writing.chain, "sequence": reader.head.sequence},
    )
    return True


def _chain_of(value: bytes) -> str:
    """The chain a record claims to be of; '' where it is no entry."""
    try:
        document = SignedDocument.decode(value)
        return peek_chain(document.payload)[1] if document.payload_type == AUDIT_ENTRY else ""
    except DecodeError:
        return ""


def kafka_head(conn: Connection, writing: Writing, consumer: Consumer, tick: Tick) -> ChainHead:
    """Read the whole partition, as a new reader would: from where the chain was pruned, if it was."""
    start = base_head(conn, writing)
    reader = ChainReader(
        writing.cluster, writing.chain, writing.node, writing.trust, start, pruned=start.sequence
    )
    tail = AuditTail(consumer, writing.topic, writing.partition, None, tick)
    for at, value in tail.read_below(tail.bounds()[1]):
        accept(reader, value, f"{writing.topic}/{writing.partition}/{at}")
    return reader.head


def _require_beginning(
    conn: Connection, writing: Writing, there: ChainHead, head: ChainHead, lost: LostEnd
) -> None:
    if there == base_head(conn, writing):
        return  # Kafka has nothing of it
    ours = next(iterate(conn, writing.chain, there.sequence), None)
    if there.sequence > head.sequence or ours is None or ours.entry_hash != there.entry_hash:
        raise DivergedError(
            f"{lost.message}; and its entry {there.sequence} is not the one in the audit table",
            hint="two histories of one chain exist: run `syncctl audit verify`, restore the topic or the"
            " table, or initialise the targets anew",
        )


def _require_records(
    missing: Iterator[StoredDocument],
    reader: ChainReader,
    writing: Writing,
    consumer: Consumer,
    tick: Tick,
    lost: LostEnd,
) -> None:
    keys = _announced(writing, consumer, tick)
    while chunk := list(islice(missing, _CHUNK)):
        ranges: dict[tuple[str, int], list[_Range]] = defaultdict(list)
        for stored in chunk:
            entry = stored.entry
            # A table that was altered must not speak to the targets in our name.
            if accept(reader, stored.encoded, "vsql_sync.vsql_sync_audit") is None:
                raise _gone(lost, entry, "the audit table's document is not the one that was signed")
            if entry.dek_id and entry.dek_id not in keys:
                topic = names.keys_topic(writing.cluster)
                raise _gone(lost, entry, f"the announcement of its data key is not in topic {topic}")
            for part in entry.partitions:
                ranges[part.topic, part.partition].append(_Range(entry, part))
        for (topic, partition), wanted in ranges.items():
            wanted.sort(key=lambda one: one.part.first_offset)
            _require_ranges(consumer, TopicPartition(topic, partition), wanted, tick, lost)


def _gone(lost: LostEnd, entry: AuditEntry, what: str) -> DivergedError:
    return DivergedError(
        f"{lost.message}; they cannot be published again: of sequence {entry.sequence} (epoch {entry.epoch},"
        f" batch {entry.batch}), {what}",
        hint="restore the topics from a copy and give `retry`, or initialise the targets anew",
    )


def _announced(writing: Writing, consumer: Consumer, tick: Tick) -> set[str]:
    """Names of the data keys the keys topic announces."""
    place = TopicPartition(names.keys_topic(writing.cluster), 0)
    low, high = _bounds(consumer, place) or (0, 0)
    records = _records(consumer, place, low, high - 1, tick)
    return {bytes(key).decode(errors="replace") for _, key, value in records if key and value}


def _require_ranges(
    consumer: Consumer, place: TopicPartition, wanted: list[_Range], tick: Tick, lost: LostEnd
) -> None:
    """Read one topic-partition once, and hold each manifest's range against it."""
    name = f"{place.topic}/{place.partition}"
    bounds = _bounds(consumer, place)
    for entry, part in wanted:
        if bounds is None or part.first_offset < bounds[0] or part.last_offset >= bounds[1]:
            what = "which is not there" if bounds is None else f"which holds {bounds[0]} to {bounds[1] - 1}"
            offsets = f"{part.first_offset} to {part.last_offset}"
            raise _gone(lost, entry, f"records {offsets} are missing from {name}, {what}")
    last = max(one.part.last_offset for one in wanted)
    records = _records(consumer, place, wanted[0].part.first_offset, last, tick)
    offset, value = -1, b""
    for entry, part in wanted:
        leaves: list[bytes] = []
        packs = 0
        while offset < part.last_offset:
            found = next(records, None)
            if found is None:
                break
            offset, _, value = found
            if part.first_offset <= offset <= part.last_offset:
                mine = leaves_of(entry, value)
                packs, leaves = packs + bool(mine), leaves + mine
        if packs != part.packs or len(leaves) != part.records or merkle.root(leaves) != part.sub_root:
            raise _gone(lost, entry, f"the records in {name} are not those that were sent")


def leaves_of(entry: AuditEntry, message: bytes) -> list[bytes]:
    """Leaves of a pack of this manifest; none of a pack of another batch, or of what is no pack."""
    try:
        message = without_frame(message)
        header, body = decode_header(message)
        if (header.chain, header.epoch, header.batch) != (entry.chain, entry.epoch, entry.batch):
            return []
        return [one.leaf for one in decode_tuples(message, body, header_digest(message[:body]))]
    except DecodeError:
        return []


def _bounds(consumer: Consumer, place: TopicPartition) -> tuple[int, int] | None:
    """First offset and the one after the last; None where there is no such topic."""
    try:
        return watermarks(consumer, place, _TIMEOUT_SECONDS)
    except KafkaException as error:
        if is_unknown_topic(error):
            return None
        raise from_exception(error, f"read the end of {place.topic}") from error


def _records(
    consumer: Consumer, place: TopicPartition, first: int, last: int, tick: Tick
) -> Iterator[tuple[int, bytes, bytes]]:
    """(offset, key, value) of the records first … last."""
    if last < first:
        return
    start = TopicPartition(place.topic, place.partition, first or OFFSET_BEGINNING)
    try:
        consumer.assign([start])
    except KafkaException as error:
        raise from_exception(error, f"read {place.topic}") from error
    at, silent_until = first - 1, time.monotonic() + _SILENCE_SECONDS
    while at < last:
        tick()
        for message in _taken(consumer, place):
            at = message.offset() or 0
            silent_until = time.monotonic() + _SILENCE_SECONDS
            if at <= last:
                yield at, bytes(message.key() or b""), bytes(message.value() or b"")
        if time.monotonic() > silent_until:
            raise TransientError(
                f"Kafka: {place.topic}/{place.partition} gives nothing below offset {last + 1}"
            )


def _taken(consumer: Consumer, place: TopicPartition) -> Iterable[Message]:
    for message in consumer.consume(200, timeout=0.1):
        if (error := message.error()) is not None:
            raise _not_readable(error, place.topic)
        yield message


def _not_readable(error: KafkaError, topic: str) -> VsqlSyncError:
    """Kafka's error; of a missing right, how to have it for this time."""
    ours = kafka_error(error, f"read {topic}, to see what is left of the chain Kafka lost")
    if error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
        ours.hint = "grant what `syncctl kafka acls --recovery` prints; it is tried again"
    return ours
