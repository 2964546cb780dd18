"""Topics: created by us with a fixed shape, and refused when somebody else gave them another.

Five kinds. `audit` and `keys` are compacted and keep everything, `parked` keeps everything; `data` keeps
records until every target has acknowledged them (the producer deletes below that): its retention is no timer
of Kafka's. `clocks` forgets after an hour: what is there is worth nothing after a minute.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without saying so
    AdminClient,
    ConfigResource,
    NewTopic,
    ResourceType,
)

from vsql_shared.errors import BrokerError, TransientError, VsqlSyncError
from vsql_shared.kafka.clients import complaint, from_exception
from vsql_shared.kafka.refusals import explain

if TYPE_CHECKING:
    from vsql_shared.config import Settings

Kind = Literal["data", "audit", "keys", "parked", "clocks"]
TIMEOUT_SECONDS = 30.0
# A broker that is there answers in milliseconds; TLS and SASL take a second at worst.
ANSWER_SECONDS = 5.0
APPEAR_SECONDS = 10.0
# Not held against a topic: a message that is too large for it is refused, and said, when it is sent.
_FREE = "max.message.bytes"
_NOT_CREATED = (KafkaError.TOPIC_ALREADY_EXISTS, KafkaError.TOPIC_AUTHORIZATION_FAILED)
_APPEARING = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.LEADER_NOT_AVAILABLE)


def _wanted(kind: Kind, settings: Settings) -> dict[str, str]:
    shape = {
        "min.insync.replicas": str(settings.kafka.min_insync_replicas),
        "max.message.bytes": str(max(settings.limits.message_max_bytes, 1_048_588)),
        "unclean.leader.election.enable": "false",
    }
    if kind in ("data", "parked"):
        return {**shape, "cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1"}
    if kind == "clocks":
        # A segment goes as a whole, an hour after its last record.
        return {**shape, "cleanup.policy": "delete", "retention.ms": "3600000", "segment.ms": "600000"}
    return {**shape, "cleanup.policy": "compact"}


def ensure_topic(admin: AdminClient, name: str, kind: Kind, settings: Settings, partitions: int = 1) -> None:
    """Create the topic, or check the one that is there.

    Raises BrokerError when the topic exists in another shape (partitions, cleanup policy, Kafka's own
    retention of data, unclean election, too few replicas in sync), TransientError when no broker answers.
    """
    topic = NewTopic(
        name,
        num_partitions=partitions,
        replication_factor=settings.kafka.replication_factor,
        config=_wanted(kind, settings),
    )
    require_broker(admin, settings)
    try:
        admin.create_topics([topic], operation_timeout=TIMEOUT_SECONDS, request_timeout=TIMEOUT_SECONDS)[
            name
        ].result(TIMEOUT_SECONDS)
    except TimeoutError:
        raise _silent(settings, f"creating topic {name}") from None
    except KafkaException as error:
        # Kafka asks for the right before it looks whether there is anything to create.
        refused = error.args[0].code() == KafkaError.TOPIC_AUTHORIZATION_FAILED and not _is_there(admin, name)
        if refused or error.args[0].code() not in _NOT_CREATED:
            raise from_exception(error, f"create topic {name}") from error
        check_topic(admin, name, kind, settings, partitions)


def _is_there(admin: AdminClient, name: str) -> bool:
    """Whether a topic is there, as far as this principal may know."""
    try:
        found = admin.list_topics(name, timeout=TIMEOUT_SECONDS).topics.get(name)
    except KafkaException as error:
        raise from_exception(error, f"look for topic {name}") from error
    return found is not None and found.error is None


def require_broker(admin: AdminClient, settings: Settings) -> None:
    """Raise TransientError unless a broker answers, BrokerError where it refuses us; soon."""
    try:
        admin.describe_cluster(request_timeout=ANSWER_SECONDS).result(ANSWER_SECONDS + 1)
    except TimeoutError:
        raise _no_answer(admin, settings) from None
    except KafkaException as error:
        ours = from_exception(error, "connect")
        raise (_no_answer(admin, settings) if isinstance(ours, TransientError) else ours) from error


def _no_answer(admin: AdminClient, settings: Settings) -> VsqlSyncError:
    """Why nobody answers: they are away, or they refuse us."""
    return explain(settings, complaint(admin)) or _silent(settings, "connecting")


def _silent(settings: Settings, doing: str) -> TransientError:
    return TransientError(
        f"no Kafka broker answers at {settings.kafka.bootstrap_servers} while {doing}",
        hint="check kafka.bootstrap_servers, [kafka.security] and that the brokers run; it is tried again",
    )


def check_topic(admin: AdminClient, name: str, kind: Kind, settings: Settings, partitions: int = 1) -> None:
    """Raise BrokerError unless the topic has the shape this kind needs."""
    found, count = describe_topic(admin, name, settings)
    wanted = _wanted(kind, settings)
    wrong = [
        f"{key} = {found.get(key)}, expected {value}"
        for key, value in wanted.items()
        if key != _FREE and not _fits(key, found.get(key), value)
    ]
    if count != partitions:
        wrong.append(f"{count} partitions, expected {partitions}")
    if wrong:
        raise BrokerError(
            f"topic {name} is not of the shape it needs: {'; '.join(wrong)}",
            hint="if it is empty, delete it: vsql-sync creates it as it must be; else alter it"
            f" (kafka-configs --entity-type topics --entity-name {name} --alter --add-config …)",
        )


def _fits(key: str, found: str | None, wanted: str) -> bool:
    """Whether a topic's setting will do: it is as we make it, or safer."""
    if key == "min.insync.replicas":
        return found is not None and found.isdecimal() and int(found) >= int(wanted)
    return found == wanted


def describe_topic(
    admin: AdminClient, name: str, settings: Settings, appear_seconds: float = APPEAR_SECONDS
) -> tuple[dict[str, str | None], int]:
    """(settings, number of partitions) of a topic that is there.

    One that another process created this moment is there for the controller and not yet for every broker:
    `appear_seconds` are given to it. Who only looks gives none.
    """
    resource = ConfigResource(ResourceType.TOPIC, name)
    deadline = time.monotonic() + appear_seconds
    while True:
        try:
            metadata = admin.list_topics(name, timeout=TIMEOUT_SECONDS).topics[name]
            if metadata.error is not None:
                raise KafkaException(metadata.error)  # noqa: TRY301 - one way for both answers
            future = admin.describe_configs([resource], request_timeout=TIMEOUT_SECONDS)[resource]
            found = {key: entry.value for key, entry in future.result(TIMEOUT_SECONDS).items()}
            return found, len(metadata.partitions)
        except TimeoutError:
            raise _silent(settings, f"describing topic {name}") from None
        except KafkaException as error:
            if error.args[0].code() not in _APPEARING or time.monotonic() >= deadline:
                raise from_exception(error, f"describe topic {name}") from error
        time.sleep(0.1)


def delete_topics(admin: AdminClient, names: list[str]) -> None:
    """Delete topics that are there; a missing one is no error."""
    if not names:
        return
    for name, future in admin.delete_topics(names, operation_timeout=TIMEOUT_SECONDS).items():
        try:
            future.result(TIMEOUT_SECONDS)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise from_exception(error, f"delete topic {name}") from error
