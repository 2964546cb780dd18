"""What one attempt to run a stream works with: settings, connection, keys, clients. Opened and closed once.

Not here: decisions. Everything that is opened through a context is closed by `closing`, in reverse order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from confluent_kafka import Consumer
from confluent_kafka.admin import AdminClient

from vsql_producers.epoch import Writing, check_source
from vsql_producers.keys import DataKeys
from vsql_producers.publish import Publisher
from vsql_producers.scope_record import write_seen
from vsql_producers.seal import Place
from vsql_producers.stream import Stream
from vsql_producers.synchronous import Waits
from vsql_producers.targets import Targets
from vsql_producers.volume import AuditVolume
from vsql_shared import names
from vsql_shared.audit.chain import Prepared
from vsql_shared.audit.leaf_store import LeafKeeper
from vsql_shared.config import Settings
from vsql_shared.kafka.clients import make_admin, make_consumer, make_producer
from vsql_shared.kafka.topics import ensure_topic
from vsql_shared.kms.base import KekProvider
from vsql_shared.observe.metrics import StreamMetrics
from vsql_shared.pg.connect import Connection


def open_consumer(settings: Settings, chain: str, closing: ExitStack) -> Consumer:
    """A consumer that commits nothing."""
    group = names.group_id(settings.cluster.name, chain, "producer")
    consumer = make_consumer(settings, f"vsql-sync-producer-{chain}", group)
    closing.callback(consumer.close)
    return consumer


def _nothing() -> None:
    """Nobody waits for a tick yet."""


@dataclass
class Context:
    """One attempt's resources."""

    settings: Settings
    stream: Stream
    conn: Connection
    provider: KekProvider
    writing: Writing
    targets: Targets
    metrics: StreamMetrics
    closing: ExitStack
    leaves: LeafKeeper
    tick: Callable[[], None] = _nothing
    """What must go on while something else is waited for: reports to the walsender."""
    wait: Callable[[], None] = _nothing
    """… and what says that it is waited for."""
    interrupt: Callable[[], None] = _nothing
    """Raises when the attempt is to be given up, before anything was sent."""
    check_source = staticmethod(check_source)
    volume: AuditVolume = field(default_factory=lambda: AuditVolume(time.monotonic()))
    text_only: bool = False
    """The session before this one met a type that cannot travel in binary."""
    frame: bytes = b""
    """What stands before each pack."""
    waits: Waits | None = None
    """Commits wait for this stream."""
    _admin: AdminClient | None = field(default=None)

    def on_tick(self) -> None:
        """Call the present `interrupt`, `tick` and `wait`."""
        self.interrupt()
        self.tick()
        self.wait()

    def appended(self, prepared: Prepared) -> None:
        """Count an entry that is in Kafka and in the table."""
        self.volume.add(1, len(prepared.encoded))
        self.metrics.audited(1, len(prepared.encoded))

    def place(self, epoch: int) -> Place:
        """Where an epoch's records belong."""
        return Place(self.settings.cluster.name, self.stream.chain, self.stream.origin, epoch, self.frame)

    def write_seen(self, epoch: int) -> Callable[[int, str], str]:
        """What writes down, by batch, what an epoch describes."""
        return partial(write_seen, self.conn, self.stream.chain, epoch)

    def make_publisher(self) -> Publisher:
        """A producer of this attempt."""
        client = f"vsql-sync-producer-{self.stream.chain}"
        publisher = Publisher(
            make_producer(self.settings, client, at_once=self.waits is not None),
            self.writing.topic,
            self.writing.partition,
            self.on_tick,
        )
        self.closing.callback(publisher.close)
        return publisher

    def make_consumer(self) -> Consumer:
        """A reader of the audit topic."""
        return open_consumer(self.settings, self.stream.chain, self.closing)

    def make_keys(self, place: Place, publisher: Publisher) -> DataKeys:
        """The data keys of an epoch; wiped when the attempt ends, however it ends."""
        DataKeys.retire_older(self.conn, place.chain, place.epoch)
        keys = DataKeys(
            self.settings.encryption,
            place,
            self.provider,
            self.writing.signer,
            self.conn,
            publisher.publish_now,
            self.metrics,
            self.settings.cluster.node_id,
        )
        self.closing.callback(keys.forget)
        return keys

    @property
    def admin(self) -> AdminClient:
        """A client that creates topics."""
        if self._admin is None:
            self._admin = make_admin(self.settings)
        return self._admin

    def ensure_data_topic(self, topic: str, partitions: int = 1) -> None:
        """Make sure of a data topic before the first pack for it."""
        ensure_topic(self.admin, topic, "data", self.settings, partitions)

    def ensure_control_topics(self) -> None:
        """Make sure of the audit and keys topics."""
        cluster = self.settings.cluster.name
        ensure_topic(self.admin, names.audit_topic(cluster), "audit", self.settings)
        ensure_topic(self.admin, names.keys_topic(cluster), "keys", self.settings)
