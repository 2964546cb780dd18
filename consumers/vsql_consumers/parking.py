"""Transactions set aside: their sealed batches go to the dead-letter topic.

Not here: deciding (`syncctl`), when it is done (pipeline.py), and the way back (replaying.py). Rules
(docs/design/0011):

* What goes to the topic is what came: each batch's manifest and packs, byte by byte, sealed and signed (a
  schema registry's frame is no part of a pack). Kafka has acknowledged all of it before the target
  transaction that passes the batch over commits, and that one writes where it lies. A crash in between leaves
  copies nobody names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from vsql_consumers.collected import Decided
from vsql_consumers.verify import Pack, record_name
from vsql_shared import lsn, names
from vsql_shared.audit.entries import AuditEntry
from vsql_shared.audit.rows import timestamp
from vsql_shared.changes import OpenedBatch, Transaction
from vsql_shared.errors import TransientError, VsqlSyncError
from vsql_shared.kafka.clients import from_exception, kafka_error, make_admin, make_producer
from vsql_shared.kafka.topics import ensure_topic
from vsql_shared.pg.connect import Connection

if TYPE_CHECKING:
    from vsql_consumers.means import Means

_Delivered: TypeAlias = Callable[[KafkaError | None, Message], None]

SECONDS = 60.0
"""How long Kafka may acknowledge nothing of a batch."""
MANIFEST = "manifest"
PARKED = "parked"
"""The verdict on changes that wait there."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A whole batch as it came: manifest, and packs by partition."""

    entry: AuditEntry
    document: bytes
    packs: Sequence[tuple[tuple[str, int], Pack]]


class Lies(NamedTuple):
    """Where a batch lies in the dead-letter topic: others write between its records."""

    topic: str
    offsets: list[int]


class Opens(NamedTuple):
    """What a batch is opened with: its data key, and Avro Relations."""

    dek_id: str
    descriptors: list[bytes]


class DeadLetters:
    """Writes batches to the dead-letter topic; the topic is made when the first one is parked."""

    def __init__(self, means: Means) -> None:
        self._means = means
        self._topic = names.parked_topic(means.settings.cluster.name)
        self._producer: Producer | None = None

    def put(self, kept: Kept) -> Lies:
        """Write a batch and wait until Kafka has it."""
        producer = self._open()
        offsets: list[int] = []
        failures: list[VsqlSyncError] = []
        came = time.monotonic()

        def delivered(error: KafkaError | None, message: Message) -> None:
            nonlocal came
            came = time.monotonic()
            if error is not None:
                failures.append(kafka_error(error, f"write to topic {self._topic}"))
            else:
                offsets.append(message.offset() or 0)

        def wait() -> None:
            producer.poll(0.05)
            if failures:
                raise failures[0]
            if time.monotonic() > came + SECONDS:
                raise TransientError(
                    f"Kafka does not acknowledge records of {self._topic}", hint="it is tried again"
                )

        records = list(_records(kept))
        for key, value in records:
            self._produce(producer, key, value, delivered, wait)
        while len(offsets) < len(records):
            wait()
        return Lies(self._topic, sorted(offsets))

    def close(self) -> None:
        """Drop what is queued: nothing names it."""
        if self._producer is not None:
            self._producer.purge(in_queue=True, in_flight=True, blocking=False)
            self._producer.poll(0)

    def _open(self) -> Producer:
        if self._producer is None:
            settings = self._means.settings
            ensure_topic(make_admin(settings), self._topic, "parked", settings)
            self._producer = make_producer(settings, f"vsql-sync-parks-{self._means.stream.chain}")
        return self._producer

    def _produce(
        self, producer: Producer, key: str, value: bytes, delivered: _Delivered, wait: Callable[[], None]
    ) -> None:
        while True:
            try:
                producer.produce(self._topic, value, key=key.encode(), partition=0, on_delivery=delivered)
            except BufferError:
                wait()
            except KafkaException as error:
                raise from_exception(error, f"write to topic {self._topic}") from error
            else:
                return


def prefix(chain: str, epoch: int, batch: int) -> str:
    """What the keys of a batch's records begin with."""
    return f"{chain}/{epoch}/{batch}"


def _records(kept: Kept) -> Iterator[tuple[str, bytes]]:
    """Key and value of each record; the key says where it came from."""
    start = prefix(kept.entry.chain, kept.entry.epoch, kept.entry.batch)
    yield f"{start}/{MANIFEST}", kept.document
    for (topic, partition), pack in kept.packs:
        yield f"{start}/{record_name(topic, partition, pack.offset)}", pack.message


class ParkedBatch(NamedTuple):
    """What this node writes of a transaction's share in a batch: a row of parked_batches."""

    transaction: Transaction
    decision: int
    sequence: int
    entry_hash: bytes
    lies: Lies
    changes: int
    tables: list[str]
    opens: Opens

    def write(self, conn: Connection, *, chain: str) -> None:
        """Write it, in the transaction that passes the changes over."""
        one = self.transaction
        conn.execute(
            "INSERT INTO vsql_sync.parked (decision, chain, xid, commit_lsn, commit_time)"
            " VALUES (%s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
            (self.decision, chain, one.xid, lsn.text(one.commit_lsn), timestamp(one.commit_time)),
        )
        conn.execute(
            "INSERT INTO vsql_sync.parked_batches (decision, sequence, entry_hash, topic, offsets,"
            " changes, tables, dek_id, descriptors) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)"
            " ON CONFLICT DO NOTHING",
            (
                self.decision,
                self.sequence,
                self.entry_hash,
                *self.lies,
                self.changes,
                self.tables,
                *self.opens,
            ),
        )


def parked_parts(
    opened: OpenedBatch, decided: Mapping[Transaction, Decided], lies: Lies, opens: Opens
) -> Iterator[ParkedBatch]:
    """What is to be written of each parked transaction that has changes in a batch."""
    for number, count in opened.passed_over().items():
        one = opened.transactions[number]
        if count and opened.passed[number] == PARKED:
            tables = [str(name) for name in opened.tables_of(number)]
            yield ParkedBatch(
                one, decided[one].id, opened.sequence, opened.entry_hash, lies, count, tables, opens
            )
