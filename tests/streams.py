"""Topics as an attacker on the broker would handle them: read everything, copy it elsewhere, changed or not.

records = read_topics(bootstrap, cluster)               # every record of the cluster's topics
copy_topics(source, target, cluster, change)            # offsets stay as long as nothing is dropped
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from confluent_kafka import Consumer, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without saying so
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    ResourceType,
)

from vsql_shared.kafka.clients import watermarks

MESSAGE_MAX_BYTES = 8_000_000
"""Below what the test brokers take (tests/stack/kafka.py)."""


@dataclass(frozen=True)
class Record:
    """One record as it lies in a topic-partition."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None

    def flip(self, position: int, bit: int = 0) -> Record:
        """The same record with one bit of its value changed."""
        assert self.value is not None
        data = bytearray(self.value)
        data[position] ^= 1 << bit
        return replace(self, value=bytes(data))


def cluster_topics(bootstrap: str, cluster: str) -> dict[str, int]:
    """The cluster's topics and their numbers of partitions."""
    found = AdminClient({"bootstrap.servers": bootstrap}).list_topics(timeout=20).topics
    return {
        name: len(meta.partitions) for name, meta in sorted(found.items()) if name.startswith(f"{cluster}.")
    }


def read_topics(bootstrap: str, cluster: str, timeout: float = 60) -> list[Record]:
    """Every record of the cluster's topics, ordered by topic, partition and offset."""
    consumer = Consumer(
        {"bootstrap.servers": bootstrap, "group.id": "reader", "enable.auto.commit": False,
         "auto.offset.reset": "earliest", "enable.partition.eof": False}
    )  # fmt: skip
    records: list[Record] = []
    try:
        starts: dict[tuple[str, int], int] = {}
        ends: dict[tuple[str, int], int] = {}
        for topic, partitions in cluster_topics(bootstrap, cluster).items():
            for partition in range(partitions):
                low, high = watermarks(consumer, TopicPartition(topic, partition), 20)
                if high > low:
                    # The source deletes what all targets have: a partition need not begin at 0.
                    starts[topic, partition], ends[topic, partition] = low, high
        consumer.assign([TopicPartition(*place, low) for place, low in starts.items()])
        deadline = time.monotonic() + timeout
        while ends and time.monotonic() < deadline:
            for message in consumer.consume(1000, timeout=1.0):
                if message.error():
                    raise KafkaException(message.error())
                record = _record(message)
                records.append(record)
                if record.offset + 1 >= ends.get((record.topic, record.partition), 0):
                    ends.pop((record.topic, record.partition), None)
        if ends:
            raise TimeoutError(f"not read to the end: {sorted(ends)}")
    finally:
        consumer.close()
    return sorted(records, key=lambda r: (r.topic, r.partition, r.offset))


def _record(message: Message) -> Record:
    topic, partition, offset = message.topic(), message.partition(), message.offset()
    assert topic is not None
    assert partition is not None
    assert offset is not None
    return Record(topic, partition, offset, message.key(), message.value())


def create_like(source: str, target: str, cluster: str) -> None:
    """Create the cluster's topics at `target` with the shape they have at `source`."""
    there = AdminClient({"bootstrap.servers": source})
    here = AdminClient({"bootstrap.servers": target})
    for name, partitions in cluster_topics(source, cluster).items():
        resource = ConfigResource(ResourceType.TOPIC, name)
        config = {
            key: entry.value
            for key, entry in there.describe_configs([resource])[resource].result(20).items()
            if not entry.is_default and entry.value is not None
        }
        topic = NewTopic(name, num_partitions=partitions, replication_factor=1, config=config)
        here.create_topics([topic])[name].result(20)


def append(bootstrap: str, records: Iterable[Record]) -> None:
    """Append records in the given order, each to its topic and partition."""
    producer = Producer(
        {"bootstrap.servers": bootstrap, "enable.idempotence": True, "log_level": 3,
         "message.max.bytes": MESSAGE_MAX_BYTES}
    )  # fmt: skip
    failures: list[str] = []

    def delivered(error: object, _message: object) -> None:
        if error is not None:
            failures.append(str(error))

    for record in records:
        producer.produce(
            record.topic, record.value, record.key, partition=record.partition, on_delivery=delivered
        )
        producer.poll(0)
    producer.flush(60)
    if failures:
        raise RuntimeError(failures[0])


def alter_topic(bootstrap: str, name: str, **settings: str) -> None:
    """Change a topic's settings; "_" in a name stands for a dot."""
    changes = [
        ConfigEntry(key.replace("_", "."), value, incremental_operation=AlterConfigOpType.SET)
        for key, value in settings.items()
    ]
    resource = ConfigResource(ResourceType.TOPIC, name, incremental_configs=changes)
    admin = AdminClient({"bootstrap.servers": bootstrap})  # its answers end with it
    admin.incremental_alter_configs([resource])[resource].result(20)


def copy_topics(
    source: str, target: str, cluster: str, change: Callable[[list[Record]], list[Record]] = lambda r: r
) -> None:
    """Copy all topics of a cluster to another broker, with `change` applied to the list of records."""
    create_like(source, target, cluster)
    append(target, change(read_topics(source, cluster)))
