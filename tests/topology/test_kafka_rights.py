"""The table of Kafka's rights in docs/operations/privileges.md: enough for the services, and no more.

A broker with passwords and an authorizer that refuses what no ACL allows; the ACLs are the rows of the table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from confluent_kafka import KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # no stubs say so
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from tests.nodes import PUBLICATION, TwoNodes
from tests.stack import Stack
from tests.waiting import until

pytestmark = pytest.mark.topology

DOCUMENT = Path(__file__).parents[2] / "docs" / "operations" / "privileges.md"
USERS = {"admin": "a-word", "producer": "p-word", "consumer": "c-word"}
TABLE = "CREATE TABLE t (id int PRIMARY KEY, v text)"
_ROW = re.compile(r"\| (producer|consumer) \| (topic|group) `([^`]+)`(, prefixed)? \| ([A-Za-z, ]+) \|")


def client(address: str, user: str) -> dict[str, str | int | float | bool]:
    """A client's configuration as one of the users."""
    return {
        "bootstrap.servers": address,
        "security.protocol": "SASL_PLAINTEXT",
        "sasl.mechanism": "PLAIN",
        "sasl.username": user,
        "sasl.password": USERS[user],
    }


def documented(cluster: str) -> list[AclBinding]:
    """The table's rows as ACLs."""
    found = []
    for user, kind, name, prefixed, operations in _ROW.findall(DOCUMENT.read_text()):
        for operation in operations.split(", "):
            word = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", operation).upper()
            found.append(
                AclBinding(
                    ResourceType[kind.upper()],
                    name.replace("<cluster>", cluster).replace("<publication>", PUBLICATION),
                    ResourcePatternType.PREFIXED if prefixed else ResourcePatternType.LITERAL,
                    f"User:{user}",
                    "*",
                    AclOperation[word],
                    AclPermissionType.ALLOW,
                )
            )
    return found


@dataclass
class Guarded:
    """A pair of nodes on a broker with rights, in step after a first copy."""

    pair: TwoNodes

    def admin(self, user: str) -> AdminClient:
        return AdminClient(client(self.pair.a.kafka, user))

    def topics(self) -> set[str]:
        return set(self.admin("admin").list_topics(timeout=20).topics)


@pytest.fixture(scope="module")
def guarded(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """A source and a target that use the rights of the table, and no other."""
    users = " ".join(f'user_{name}="{word}"' for name, word in USERS.items())
    broker = stack.own_kafka(
        {
            "listener.security.protocol.map": "CLIENTS:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT",
            "sasl.enabled.mechanisms": "PLAIN",
            "sasl.mechanism.inter.broker.protocol": "PLAIN",
            "listener.name.clients.plain.sasl.jaas.config": (
                "org.apache.kafka.common.security.plain.PlainLoginModule required"
                f' username="admin" password="{USERS["admin"]}" {users};'
            ),
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:admin;User:ANONYMOUS",
        },
        client_config={name: str(text) for name, text in client("", "admin").items() if text},
    )
    security = {
        user: '[kafka.security]\nprotocol = "SASL_PLAINTEXT"\nmechanism = "PLAIN"\n'
        f'username = "{user}"\npassword = "{USERS[user]}"\n'
        for user in ("producer", "consumer")
    }
    pair = TwoNodes(
        stack,
        tmp_path_factory.mktemp("rights"),
        TABLE,
        kafka=broker.bootstrap_servers,
        config=security["producer"],
        target_config=security["consumer"],
    )
    made = Guarded(pair)
    try:
        admin = made.admin("admin")  # its answers end with it
        for future in admin.create_acls(documented(pair.cluster)).values():
            future.result(20)
        pair.a.execute("INSERT INTO t SELECT g, 'copied' FROM generate_series(1, 100) g")
        pair.create(["t(*)"])
        pair.start()
        pair.wait_in_step()
        pair.a.execute("INSERT INTO t VALUES (999, 'the first of the live stream makes its topic')")
        pair.wait_in_step()
        yield made
    finally:
        pair.end()
        broker.remove()


@pytest.mark.timeout(240)
def test_the_documented_rights_are_enough_for_a_copy_and_a_stream(guarded: Guarded) -> None:
    pair = guarded.pair
    pair.a.execute("INSERT INTO t VALUES (1000, 'streamed')")
    pair.wait_in_step()
    assert pair.differences() == []
    for node in (pair.a, pair.b):
        node.ctl("audit", "verify", "--kafka")
        for role in node.services:
            assert "AUTHORIZATION" not in node.log_file(role).read_text().upper(), node.tail(role)
    assert f"{pair.cluster}.{pair.chain}.public.t" in guarded.topics()
    assert not [name for name in guarded.topics() if ".copy." in name], "the copy's topics were deleted"


@pytest.mark.timeout(240)
def test_the_documented_rights_are_enough_to_park_a_transaction_and_to_replay_it(guarded: Guarded) -> None:
    pair = guarded.pair
    pair.b.execute("ALTER TABLE t ADD CONSTRAINT no CHECK (id <> 2000)")
    pair.a.execute("INSERT INTO t VALUES (2000, 'parked')")
    found = until(
        lambda: pair.b.query(
            "SELECT detail->'blocked'->'transaction'->>'lsn' FROM vsql_sync.stream_status"
            " WHERE state = 'blocked' AND detail->'blocked' IS NOT NULL"
        )
    )
    words = (
        "--chain",
        pair.chain,
        "--transaction",
        found[0][0],
        "--reason",
        "rights",
        "--yes",
        "--timeout",
        "30",
    )
    pair.b.ctl("stream", "park", *words)
    pair.wait_in_step()
    pair.b.execute("ALTER TABLE t DROP CONSTRAINT no")
    assert "1 applied" in pair.b.ctl("stream", "replay", *words).stdout
    assert pair.differences() == []
    assert f"{pair.cluster}.parked" in guarded.topics()


@pytest.mark.timeout(240)
def test_only_the_producer_s_principal_deletes_records_and_only_of_data_topics(guarded: Guarded) -> None:
    """What retention does (delete_records), asked for by each principal itself."""
    pair = guarded.pair
    data, audit = f"{pair.cluster}.{pair.chain}.public.t", f"{pair.cluster}.audit"

    def delete(user: str, topic: str) -> None:
        place, admin = TopicPartition(topic, 0, 0), guarded.admin(user)
        admin.delete_records([place])[place].result(20)

    delete("producer", data)
    for user, topic in (("consumer", data), ("producer", audit), ("consumer", audit)):
        _refused(lambda user=user, topic=topic: delete(user, topic))  # type: ignore[misc]  # bound now


@pytest.mark.timeout(240)
def test_the_consumer_s_principal_writes_acknowledgements_and_nothing_else(guarded: Guarded) -> None:
    pair = guarded.pair
    for topic in (f"{pair.cluster}.{pair.chain}.public.t", f"{pair.cluster}.keys"):
        producer = Producer(client(pair.a.kafka, "consumer"))
        errors: list[KafkaError | None] = []

        def told(error: KafkaError | None, _: object, errors: list[KafkaError | None] = errors) -> None:
            errors.append(error)

        producer.produce(topic, b"x", on_delivery=told)
        producer.flush(20)
        assert [error and error.name() for error in errors] == ["TOPIC_AUTHORIZATION_FAILED"]


def _refused(act: Callable[[], None]) -> None:
    with pytest.raises(KafkaException) as refused:
        act()
    assert refused.value.args[0].name() == "TOPIC_AUTHORIZATION_FAILED"
