"""Sends sealed batches to Kafka: packs first, and the manifest when all of them are acknowledged.

Not here: what a manifest says (the caller builds it from the offsets) and the audit table (progress.py).
Rules:

* The manifest is the commit record: it goes out only after Kafka acknowledged every pack of its batch, and
  after the manifest before it was sent. Batches are pipelined, so packs of several are under way at a time.
* A delivery that failed, or whose result is unknown, raises: the caller opens a new epoch, and no batch
  number of this one is used again.
* Memory is bounded by the number of batches under way and by the client's own queue.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from vsql_producers.seal import SealedBatch, SealedTopic
from vsql_shared import failpoints, names
from vsql_shared.audit.chain import Prepared
from vsql_shared.changes import PartitionRoot
from vsql_shared.errors import BrokerError, TransientError, VsqlSyncError
from vsql_shared.kafka.clients import from_exception, kafka_error

_BURIED_AT_ONCE = 1_000
"""Tombstones between two looks at what else must go on."""

MakeManifest = Callable[[SealedBatch, tuple[PartitionRoot, ...]], Prepared]


class Acknowledged(NamedTuple):
    """A chain entry that Kafka has, with what it is about (None: no batch)."""

    prepared: Prepared
    offset: int
    batch: SealedBatch | None
    sent_at: float


class _Receipts:
    """Offsets of one topic-partition's packs, as they are acknowledged."""

    __slots__ = ("first", "last", "missing", "topic")

    def __init__(self, topic: SealedTopic) -> None:
        self.topic = topic
        self.missing = len(topic.messages)
        self.first = self.last = -1

    def root(self) -> PartitionRoot:
        packs, topic = len(self.topic.messages), self.topic
        return PartitionRoot(
            topic.topic, topic.partition, self.first, self.last, packs, topic.records, topic.sub_root
        )


class _Flight:
    """A batch whose packs are under way."""

    __slots__ = ("batch", "receipts", "sent_at")

    def __init__(self, batch: SealedBatch) -> None:
        self.batch = batch
        self.receipts = [_Receipts(topic) for topic in batch.topics]
        self.sent_at = time.monotonic()

    @property
    def landed(self) -> bool:
        return not any(receipts.missing for receipts in self.receipts)


class _Sent:
    """A chain entry under way; `offset` is negative until Kafka has it."""

    __slots__ = ("batch", "offset", "prepared", "sent_at")

    def __init__(self, prepared: Prepared, batch: SealedBatch | None, sent_at: float) -> None:
        self.prepared, self.batch, self.sent_at = prepared, batch, sent_at
        self.offset = -1


class Publisher:
    """One epoch's way into Kafka."""

    def __init__(
        self, producer: Producer, audit_topic: str, audit_partition: int, tick: Callable[[], None]
    ) -> None:
        """`tick` is called while this object waits, for what must go on meanwhile."""
        self._producer = producer
        self._audit_topic, self._audit_partition = audit_topic, audit_partition
        self._tick = tick
        self._flights: deque[_Flight] = deque()
        # In the order of the chain, which is the order they were made and sent in.
        self._sent: deque[_Sent] = deque()
        self._make_manifest: MakeManifest | None = None
        self._failure: VsqlSyncError | None = None

    @property
    def inflight(self) -> int:
        """Batches and entries sent and not yet acknowledged, a batch with its manifest."""
        return len(self._flights) + len(self._sent)

    def begin(self, make_manifest: MakeManifest) -> None:
        """The epoch is open: batches may be sent from now on."""
        self._make_manifest = make_manifest

    def send(self, batch: SealedBatch) -> None:
        """Queue a batch's packs."""
        flight = _Flight(batch)
        for receipts in flight.receipts:
            delivered = partial(self._on_pack, receipts)
            for message in receipts.topic.messages:
                self._produce(receipts.topic.topic, receipts.topic.partition, None, message, delivered)
        for receipts in flight.receipts:
            # Kafka's client has them now; what is left here are counts.
            receipts.topic = receipts.topic._replace(messages=[b""] * len(receipts.topic.messages))
        flight.batch = batch._replace(topics=[])
        self._flights.append(flight)

    def send_entry(self, prepared: Prepared, batch: SealedBatch | None = None, sent_at: float = 0.0) -> None:
        """Queue a chain entry behind the one made before it; `poll` gives it back when Kafka has it."""
        entry = prepared.entry
        sent = _Sent(prepared, batch, sent_at or time.monotonic())
        self._sent.append(sent)
        key = names.audit_key(entry.chain, entry.epoch, entry.incarnation, entry.sequence)
        delivered = partial(self._on_entry, sent)
        self._produce(self._audit_topic, self._audit_partition, key, prepared.encoded, delivered)

    def publish_entry(self, prepared: Prepared) -> int:
        """Append a chain entry by itself and wait; returns its offset."""
        entry = prepared.entry
        key = names.audit_key(entry.chain, entry.epoch, entry.incarnation, entry.sequence)
        return self.publish_now(self._audit_topic, self._audit_partition, key, prepared.encoded)

    def publish_now(self, topic: str, partition: int, key: bytes, value: bytes) -> int:
        """Send one message and wait for its acknowledgement; returns its offset."""
        offsets: list[int] = []

        def delivered(error: KafkaError | None, message: Message) -> None:
            if error is not None:
                self._fail(error, f"write to topic {topic}")
            else:
                offsets.append(_offset(message))

        self._produce(topic, partition, key, value, delivered)
        while not offsets:
            self._producer.poll(0.05)
            self._raise_failure()
            self._tick()
        return offsets[0]

    def bury(self, keys: Iterable[bytes]) -> int:
        """Write tombstones for entries of the audit partition, and wait for all; returns how many."""
        sent = acknowledged = 0

        def delivered(error: KafkaError | None, _: Message) -> None:
            nonlocal acknowledged
            acknowledged += 1
            if error is not None:
                self._fail(error, f"write to topic {self._audit_topic}")

        for key in keys:
            self._produce(self._audit_topic, self._audit_partition, key, None, delivered)
            sent += 1
            if not sent % _BURIED_AT_ONCE:
                self._producer.poll(0)
                self._raise_failure()
                self._tick()
        while acknowledged < sent:
            self._producer.poll(0.05)
            self._raise_failure()
            self._tick()
        return sent

    def poll(self, seconds: float) -> list[Acknowledged]:
        """Serve Kafka's answers for up to `seconds`; returns the entries it has got, in the chain's order."""
        self._producer.poll(seconds)
        self._raise_failure()
        while self._flights and self._flights[0].landed:
            self._send_manifest(self._flights.popleft())
        out: list[Acknowledged] = []
        while self._sent and self._sent[0].offset >= 0:
            sent = self._sent.popleft()
            out.append(Acknowledged(sent.prepared, sent.offset, sent.batch, sent.sent_at))
            if sent.batch is not None:
                failpoints.hit("producer.manifest-acked")
        return out

    def close(self) -> None:
        """Drop what is queued and let go of the brokers: what was not acknowledged belongs to no manifest."""
        self._producer.purge(in_queue=True, in_flight=True, blocking=False)
        self._producer.poll(0)

    def _send_manifest(self, flight: _Flight) -> None:
        failpoints.hit("producer.packs-acked")
        assert self._make_manifest is not None  # noqa: S101 - `begin` comes before `send`
        roots = tuple(receipts.root() for receipts in flight.receipts)
        self.send_entry(self._make_manifest(flight.batch, roots), flight.batch, flight.sent_at)
        failpoints.hit("producer.manifest-sent")

    def _produce(
        self,
        topic: str,
        partition: int,
        key: bytes | None,
        value: bytes | None,
        delivered: Callable[[KafkaError | None, Message], None],
    ) -> None:
        while True:
            try:
                self._producer.produce(topic, value, key=key, partition=partition, on_delivery=delivered)
                return
            except BufferError:
                # The client's queue is full: the brokers are slower than the WAL, or away.
                self._producer.poll(0.1)
                self._raise_failure()
                self._tick()
            except KafkaException as error:
                raise from_exception(error, f"write to topic {topic}") from error

    def _on_pack(self, receipts: _Receipts, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self._fail(error, f"write to topic {receipts.topic.topic}")
            return
        offset = _offset(message)
        if offset <= receipts.last:
            self._failure = self._failure or TransientError(
                f"Kafka: topic {receipts.topic.topic} acknowledged offset {offset} after {receipts.last}",
                hint="the batch is sent again in a new epoch",
            )
            return
        if receipts.first < 0:
            receipts.first = offset
        receipts.last = offset
        receipts.missing -= 1

    def _on_entry(self, sent: _Sent, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self._fail(error, f"write to topic {self._audit_topic}")
        else:
            sent.offset = _offset(message)

    def _fail(self, error: KafkaError, doing: str) -> None:
        self._failure = self._failure or kafka_error(error, doing)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


def _offset(message: Message) -> int:
    offset = message.offset()
    if offset is None or offset < 0:
        raise BrokerError("Kafka acknowledged a message without an offset", hint="acks must be all")
    return offset
