"""Kafka clients, made from the settings in one place, and Kafka's errors in our words.

Not here: what is sent and read. Rules: a client's own chatter goes to our log, never to the terminal; an
error that Kafka calls retriable, or that means a broker is away, is a TransientError, the rest a BrokerError.
"""

# ruff: noqa: SLF001 - librdkafka's client-side codes are public names that begin with an underscore
from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from typing_extensions import override

from vsql_shared.errors import BrokerError, TransientError, VsqlSyncError
from vsql_shared.kafka.refusals import Complaints

if TYPE_CHECKING:
    from vsql_shared.config import Settings
    from vsql_shared.config.kafka import ClientOption

# Codes that mean "a broker is not there (yet)" although librdkafka does not flag them retriable.
_AWAY = frozenset(
    {
        KafkaError._TRANSPORT,
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._TIMED_OUT,
        KafkaError._MSG_TIMED_OUT,
        KafkaError._TIMED_OUT_QUEUE,
        KafkaError._RESOLVE,
        KafkaError._DESTROY,
        KafkaError._UNKNOWN_BROKER,
        KafkaError._UNKNOWN_PARTITION,  # of a topic that was made a moment ago
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.BROKER_NOT_AVAILABLE,
        KafkaError.NOT_ENOUGH_REPLICAS,
        KafkaError.NOT_ENOUGH_REPLICAS_AFTER_APPEND,
        KafkaError.REQUEST_TIMED_OUT,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.NOT_COORDINATOR,
    }
)
_REFUSALS = {
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: "authorization",
    KafkaError.SASL_AUTHENTICATION_FAILED: "authentication",
    KafkaError._AUTHENTICATION: "authentication",
    KafkaError._SSL: "tls",
}


def kafka_error(error: KafkaError, doing: str) -> VsqlSyncError:
    """Kafka's error as ours; `doing` says what was tried, e.g. "create topic x"."""
    text = f"Kafka: cannot {doing}: {error.str()} ({error.name()})"
    if error.code() in _AWAY or error.retriable():
        return TransientError(text, hint="vsql-sync goes on by itself when the brokers answer")
    if error.code() in (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED):
        hint = "grant this principal what `syncctl kafka acls` prints"
        return BrokerError(text, hint=hint).refusing("authorization")
    if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
        return BrokerError(
            text, hint="lower limits.message_max_bytes, or raise the broker's message.max.bytes"
        )
    return BrokerError(text).refusing(_REFUSALS.get(error.code(), ""))


def is_unknown_topic(exception: KafkaException) -> bool:
    """Whether a call failed because the topic, or the partition, is not there."""
    error = exception.args[0] if exception.args else None
    return isinstance(error, KafkaError) and error.code() in (
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_TOPIC,
        KafkaError._UNKNOWN_PARTITION,
    )


def from_exception(exception: KafkaException, doing: str) -> VsqlSyncError:
    """The same for an exception of the client."""
    error = exception.args[0] if exception.args else None
    if isinstance(error, KafkaError):
        return kafka_error(error, doing)
    return BrokerError(f"Kafka: cannot {doing}: {exception}")


# librdkafka repeats itself several times a second, in each client, while a broker is away.
_REPEAT_SECONDS = 60.0


def watermarks(consumer: Consumer, place: TopicPartition, timeout: float) -> tuple[int, int]:
    """First offset and the one after the last of a partition, as its leader says within `timeout` seconds.

    Raises KafkaException. Now and then the client does not know a partition that is there, while it renews
    what it knows of the brokers (confluent-kafka-python, issue 1043): the brokers are asked before it is
    believed.
    """
    tries = 3
    while True:
        try:
            low, high = consumer.get_watermark_offsets(place, timeout=timeout)
        except KafkaException as error:
            tries -= 1
            if error.args[0].code() != KafkaError._UNKNOWN_PARTITION or not tries:
                raise
            found = consumer.list_topics(place.topic, timeout=timeout).topics.get(place.topic)
            if found is None or place.partition not in found.partitions:
                raise
        else:
            return int(low), int(high)


class _NowAndThen(logging.Filter):
    """Passes a kind of line once a minute, as a warning at most: what needs an answer reaches us by calls."""

    def __init__(self) -> None:
        super().__init__()
        self._passed: dict[str, float] = {}

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        # "FAIL [client] [thread]: …" from its log; from its error callback the code stands beside the text.
        kind = str(getattr(record, "code", "")) or record.getMessage().partition(" ")[0]
        if record.created - self._passed.get(kind, 0.0) < _REPEAT_SECONDS:
            return False
        self._passed[kind] = record.created
        if record.levelno > logging.WARNING:
            record.levelno, record.levelname = logging.WARNING, "WARNING"
        return True


_chatter = logging.getLogger(f"{__name__}.librdkafka")
_chatter.addFilter(_NowAndThen())
# Where there is no log, as in syncctl, it would go to the terminal.
_chatter.addHandler(logging.NullHandler())


def _on_error(error: KafkaError) -> None:
    _chatter.warning("%s", error.str(), extra={"code": error.name()})


_complaints: WeakKeyDictionary[AdminClient, Complaints] = WeakKeyDictionary()


def _options(config: dict[str, ClientOption]) -> dict[str, Any]:
    return {**config, "error_cb": _on_error, "logger": _chatter}


def make_producer(settings: Settings, client_id: str, *, at_once: bool = False) -> Producer:
    """An idempotent producer (acks=all). `at_once`: a message waits for no other one."""
    config = dict(settings.kafka.client_config("producer", settings.limits))
    config["client.id"] = client_id
    # Packs are large already: waiting for more of them only adds latency.
    config.setdefault("linger.ms", 0 if at_once else 1)
    config.setdefault("socket.nagle.disable", True)
    config.setdefault("queue.buffering.max.messages", 100_000)
    config.setdefault("message.timeout.ms", 60_000)
    return Producer(_options(config))


def make_consumer(
    settings: Settings, client_id: str, group_id: str, *, partition_eof: bool = False, wait_ms: int = 50
) -> Consumer:
    """A consumer that is assigned partitions by hand; offsets are committed by us.

    With `partition_eof` it says when it has read a partition to its end. `wait_ms`: how long a broker holds
    its answer while nothing comes.
    """
    config = dict(settings.kafka.client_config("consumer", settings.limits))
    config |= {"client.id": client_id, "group.id": group_id, "enable.partition.eof": partition_eof}
    config.setdefault("fetch.wait.max.ms", wait_ms)
    config.setdefault("socket.nagle.disable", True)
    config.setdefault("fetch.error.backoff.ms", 50)
    config.setdefault("topic.metadata.refresh.interval.ms", 30_000)
    return Consumer(_options(config))


def make_admin(settings: Settings) -> AdminClient:
    """A client that creates and describes topics; it is the first to meet brokers that refuse us."""
    config = dict(settings.kafka.client_config("admin", settings.limits))
    complaints = Complaints(_on_error)
    options = {**_options(config), "error_cb": complaints}
    admin = AdminClient(options)
    _complaints[admin] = complaints
    return admin


def complaint(admin: AdminClient) -> KafkaError | None:
    """Why brokers refuse this client, as far as it was told."""
    found = _complaints.get(admin)
    admin.poll(0)  # what it has to say waits until it is asked
    return found.last if found is not None else None
