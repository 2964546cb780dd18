"""The whole pair on brokers that trust nobody: TLS, SCRAM or certificates, and only the ACLs syncctl prints.

One scene: the producer has a password, the consumer a certificate; the ACLs are those `syncctl kafka acls`
gives and no other. Then what each principal may not, and every way to come in that is refused.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AclOperation, AdminClient  # type: ignore[attr-defined]  # no stubs say so

from tests.certificates import Authority
from tests.guarded_kafka import PASSWORDS, GuardedKafka, section
from tests.nodes import Node, TwoNodes
from tests.stack import Stack
from tests.streams import append, read_topics
from tests.waiting import until
from vsql_shared import names
from vsql_shared.audit.rows import parse
from vsql_shared.config import load_settings
from vsql_shared.kafka.topics import ensure_topic

pytestmark = pytest.mark.topology

TABLE = "CREATE TABLE t (id int PRIMARY KEY, v text)"
QUICK = "[limits]\nretry_backoff_max_ms = 1000\nstatus_interval_ms = 300\n"
CONSUMER = "User:CN=consumer"


@dataclass
class Guarded:
    """A pair of nodes on a broker with rights, in step after a first copy."""

    kafka: GuardedKafka
    pair: TwoNodes

    @property
    def data(self) -> str:
        """The table's topic."""
        return f"{self.pair.cluster}.{self.pair.chain}.public.t"

    def topics(self) -> set[str]:
        return set(self.kafka.admin.list_topics(timeout=20).topics)

    def insert(self, number: int) -> None:
        """One row at A."""
        self.pair.a.execute(f"INSERT INTO t VALUES ({number}, 'row')")


@pytest.fixture(scope="module")
def guarded(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """A source and a target that use the rights of the table, and no other."""
    folder = tmp_path_factory.mktemp("rights")
    kafka = GuardedKafka(stack, folder)
    pair = TwoNodes(
        stack,
        folder,
        TABLE,
        kafka=kafka.address,
        config=kafka.scram("producer") + QUICK,
        target_config=kafka.mutual("consumer") + QUICK,
    )
    pair.b.kafka = kafka.broker.address("MUTUAL")
    try:
        pair.a.execute("INSERT INTO t SELECT g, 'copied' FROM generate_series(1, 100) g")
        pair.create(["t(*)"])
        as_administrator(pair.a, "kafka", "acls", "--apply", "--producer-principal", "User:producer")
        printed = pair.b.ctl_json("kafka", "acls")
        assert {acl["principal"] for acl in printed["acls"]} == {CONSUMER}, "as its certificate says"
        kafka.allow(printed["acls"])
        pair.start()
        pair.wait_in_step()
        pair.a.execute("INSERT INTO t VALUES (999, 'the first of the live stream makes its topic')")
        pair.wait_in_step()
        yield Guarded(kafka, pair)
    finally:
        pair.end()
        kafka.remove()


def as_administrator(node: Node, *command: str) -> None:
    """Run syncctl with an administrator's password instead of the service's."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VSQL_SYNC__KAFKA__SECURITY__USERNAME", "admin")
        environment.setenv("VSQL_SYNC__KAFKA__SECURITY__PASSWORD", PASSWORDS["admin"])
        node.ctl(*command)


@contextmanager
def other_access(node: Node, address: str, security: str) -> Iterator[None]:
    """The node's configuration with another way to the brokers."""
    true = node.config.read_text()
    changed = re.sub(r"\[kafka\.security\]\n(?:\w+ = .*\n)+", lambda _: security, true)
    node.config.write_text(changed.replace(f'"{node.kafka}"', f'"{address}"'))
    try:
        yield
    finally:
        node.config.write_text(true)


def waits_and_says(node: Node, words: str, timeout: float = 60) -> str:
    """What a stream of the node says when it waits for this; it neither ends nor goes on."""
    deadline = time.monotonic() + timeout
    said: list[tuple[str, str]] = []
    while time.monotonic() < deadline:
        said = node.query("SELECT state, coalesce(detail->>'last_error', '') FROM vsql_sync.stream_status")
        for state, error in said:
            if state == "waiting" and words in error:
                return str(error)
        time.sleep(0.3)
    pytest.fail(f"{words!r} is not said: {said}\n{node.tail('producer')}\n{node.tail('consumer')}")


# What is enough


@pytest.mark.timeout(300)
def test_the_printed_rights_are_enough_for_a_copy_and_a_stream(guarded: Guarded) -> None:
    pair = guarded.pair
    guarded.insert(1000)
    pair.wait_in_step()
    assert pair.differences() == []
    for node in (pair.a, pair.b):
        node.ctl("audit", "verify", "--kafka")
        for role in node.services:
            assert "AUTHORIZATION" not in node.log_file(role).read_text().upper(), node.tail(role)
    assert guarded.data in guarded.topics()
    lines = pair.a.ctl("kafka", "acls").stdout.splitlines()
    assert all(
        line.startswith(f"kafka-acls.sh --bootstrap-server {guarded.kafka.address} --add") for line in lines
    )
    assert not [name for name in guarded.topics() if ".copy." in name], "the copy's topics were deleted"


@pytest.mark.timeout(300)
def test_a_producer_with_a_certificate_and_a_consumer_with_a_password_go_on_as_well(guarded: Guarded) -> None:
    kafka, pair = guarded.kafka, guarded.pair
    mutual = kafka.broker.address("MUTUAL")
    pair.stop()
    with (
        other_access(pair.a, mutual, kafka.mutual("producer")),
        other_access(pair.b, kafka.address, kafka.scram("consumer")),
    ):
        for node in (pair.a, pair.b):
            kafka.allow(node.ctl_json("kafka", "acls")["acls"])
        pair.start()
        guarded.insert(1001)
        pair.wait_in_step()
        pair.stop()
    pair.start()
    assert pair.differences() == []


@pytest.mark.timeout(240)
def test_topics_that_an_administrator_made_need_no_right_to_create(guarded: Guarded) -> None:
    """docs/operations/privileges.md leaves Create out there: Kafka refuses a creation before it looks."""
    pair, kafka = guarded.pair, guarded.kafka
    pair.stop()
    try:
        for topic in (names.audit_topic(pair.cluster), names.keys_topic(pair.cluster)):
            for principal in ("User:producer", CONSUMER):
                kafka.deny(principal, topic, AclOperation.CREATE)
        pair.start()
        guarded.insert(1010)
        pair.wait_in_step()
    finally:
        kafka.no_denials()
    assert pair.differences() == []


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


# What each principal may not


@pytest.mark.timeout(300)
def test_only_the_producer_s_principal_deletes_records_and_only_of_data_topics(guarded: Guarded) -> None:
    """What retention does (delete_records), asked for by each principal itself."""
    audit = f"{guarded.pair.cluster}.audit"

    def delete(user: str, topic: str) -> None:
        place, admin = TopicPartition(topic, 0, 0), AdminClient(guarded.kafka.as_user(user))
        admin.delete_records([place])[place].result(20)

    delete("producer", guarded.data)
    for user, topic in (("consumer", guarded.data), ("producer", audit), ("consumer", audit)):
        _refused(lambda user=user, topic=topic: delete(user, topic))  # type: ignore[misc]  # bound now


@pytest.mark.timeout(300)
def test_the_consumer_s_principal_writes_acknowledgements_and_nothing_else(guarded: Guarded) -> None:
    for topic in (guarded.data, f"{guarded.pair.cluster}.keys"):
        producer = Producer(guarded.kafka.as_user("consumer"))
        errors: list[KafkaError | None] = []

        def told(error: KafkaError | None, _: object, errors: list[KafkaError | None] = errors) -> None:
            errors.append(error)

        producer.produce(topic, b"x", on_delivery=told)
        producer.flush(20)
        assert [error and error.name() for error in errors] == ["TOPIC_AUTHORIZATION_FAILED"]


@pytest.mark.timeout(300)
def test_the_producer_s_principal_reads_neither_data_topics_nor_keys(guarded: Guarded) -> None:
    for topic in (guarded.data, f"{guarded.pair.cluster}.keys"):
        reader = Consumer({**guarded.kafka.as_user("producer"), "group.id": "vsql-sync.audit-verify"})
        try:
            reader.assign([TopicPartition(topic, 0, 0)])
            message = reader.poll(20)
            error = message.error() if message is not None else None
            assert error is not None
            assert error.name() == "TOPIC_AUTHORIZATION_FAILED"
        finally:
            reader.close()


def _refused(act: Callable[[], None]) -> None:
    with pytest.raises(KafkaException) as refused:
        act()
    assert refused.value.args[0].name() == "TOPIC_AUTHORIZATION_FAILED"


def refusals(node: Node) -> list[tuple[str, str, str]]:
    """What the operators' log has of connections that were refused: where, why, in words."""
    return node.query(
        "SELECT target_type, new_value ->> 'cause', error_message FROM vsql_sync.audit_log"
        " WHERE action = 'connection.refused' AND NOT success AND (new_value ->> 'cause') <> 'authorization'"
        " ORDER BY id"
    )


def signed_refusals(node: Node) -> int:
    """How many of them are in the node's chains, signed."""
    rows = node.query(
        "SELECT document FROM vsql_sync.vsql_sync_audit WHERE event_type = 'operator_action'"
        " AND signature IS NOT NULL"
    )
    details = [json.loads(parse(bytes(row[0])).entry.detail) for row in rows]
    acts = {one["record"]: one for one in details if one["act"] == "note-refusal"}
    return sum("audit_log/" in record for record in acts)


# Who does not come in


Access = Callable[[GuardedKafka], tuple[str, str]]


def _wrong_authority(kafka: GuardedKafka) -> tuple[str, str]:
    other = Authority.make("another authority").write(kafka.folder / "other-ca.crt")
    return kafka.address, kafka.scram("admin", ca_path=str(other))


def _strange_client(kafka: GuardedKafka) -> tuple[str, str]:
    return kafka.broker.address("MUTUAL"), kafka.mutual("strange", Authority.make("another authority"))


NOT_LET_IN: dict[str, tuple[Access, str]] = {
    "a wrong password": (
        lambda k: (k.address, k.scram("admin", password="wr0ng secret")),
        r"Kafka at 127.0.0.1:\d+ refuses user admin \(SCRAM-SHA-512\)",
    ),
    "an unknown user": (lambda k: (k.address, k.scram("admin", username="nobody")), r"refuses user nobody"),
    "another mechanism": (
        lambda k: (k.address, k.scram("admin", mechanism="SCRAM-SHA-256")),
        r"SCRAM-SHA-256",
    ),
    "an authority that did not sign": (_wrong_authority, r"no TLS with .*certificate is refused.*ca_path"),
    "a certificate for another name": (
        lambda k: (k.address.replace("127.0.0.1", "localhost"), k.scram("admin")),
        r"no TLS with Kafka at localhost:.*(mismatch|not valid for)",
    ),
    "an expired certificate of the server": (
        lambda k: (k.broker.address("EXPIRED"), k.mutual("late")),
        r"no TLS with .*expired",
    ),
    "an expired certificate of ours": (
        lambda k: (k.broker.address("MUTUAL"), k.mutual("expired", expired=True)),
        r"this side's certificate .* expired at .*renew it",
    ),
    "a certificate of ours by another authority": (_strange_client, r"no TLS with .*refuses this side"),
    "no certificate of ours": (
        lambda k: (k.broker.address("MUTUAL"), section({"protocol": "SSL", "ca_path": str(k.ca)})),
        r"no TLS with .*certificate",
    ),
    "clear text where TLS is": (
        lambda k: (k.address, section({"protocol": "PLAINTEXT"})),
        r"ends the connection although kafka.security.protocol is PLAINTEXT",
    ),
    "TLS where clear text is": (lambda k: (k.open, k.scram("admin")), r"no TLS with|ends the connection"),
    "a user who is no administrator": (
        lambda k: (k.address, k.scram("producer")),
        r"this principal may not Alter the cluster",
    ),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("way", list(NOT_LET_IN))
def test_who_may_not_come_in_is_told_once_why_and_where(guarded: Guarded, way: str) -> None:
    access, words = NOT_LET_IN[way]
    address, security = access(guarded.kafka)
    node = guarded.pair.a
    with other_access(node, address, security):
        done = node.ctl("kafka", "acls", "--apply", "--producer-principal", "User:x", check=False)
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["error:", "hint:"], done.stderr
    said = " ".join(done.stderr.split())
    assert done.returncode == 5, said
    assert re.search(words, said), said
    for secret in (*PASSWORDS.values(), "wr0ng secret", "PRIVATE KEY"):
        assert secret not in said


@pytest.mark.timeout(300)
def test_a_stream_that_is_not_let_in_waits_says_why_and_goes_on_when_it_is(guarded: Guarded) -> None:
    pair, kafka = guarded.pair, guarded.kafka
    pair.a.stop("producer")
    pair.b.stop("consumer")
    with (
        other_access(pair.a, kafka.address, kafka.scram("producer", password="wr0ng secret")),
        other_access(pair.b, kafka.broker.address("EXPIRED"), kafka.mutual("consumer-late")),
    ):
        pair.start()
        assert "refuses user producer" in waits_and_says(pair.a, "refuses user producer")
        assert "expired" in waits_and_says(pair.b, "no TLS with")
        shown = json.dumps(pair.a.ctl_json("status")) + pair.a.log_file("producer").read_text()
        assert "wr0ng secret" not in shown
        # Once, however often it was tried.
        for node, cause in ((pair.a, "authentication"), (pair.b, "tls")):
            until(lambda node=node: refusals(node))  # type: ignore[misc]  # bound now
            assert [line[:2] for line in refusals(node)] == [("kafka", cause)]
            assert "wr0ng secret" not in str(refusals(node))
        pair.stop()
    pair.start()
    guarded.insert(1002)
    pair.wait_in_step()
    assert pair.differences() == []
    for node in (pair.a, pair.b):
        until(lambda node=node: signed_refusals(node) == len(refusals(node)))  # type: ignore[misc]  # bound now
        assert node.ctl("audit", "verify").returncode == 0


@pytest.mark.timeout(300)
def test_a_right_that_is_taken_away_is_named_and_the_stream_goes_on_when_it_is_back(guarded: Guarded) -> None:
    pair, kafka = guarded.pair, guarded.kafka
    kafka.deny(CONSUMER, guarded.data, AclOperation.READ)
    try:
        guarded.insert(1003)
        said = waits_and_says(pair.b, "TOPIC_AUTHORIZATION_FAILED")
        assert guarded.data in said
        assert "syncctl kafka acls" in said
        query = "SELECT error_message FROM vsql_sync.audit_log WHERE new_value ->> 'cause' = 'authorization'"
        assert "TOPIC_AUTHORIZATION_FAILED" in str(until(lambda: pair.b.query(query)))
    finally:
        kafka.no_denials()
    pair.wait_in_step()
    assert pair.differences() == []


@pytest.mark.timeout(300)
def test_a_producer_whose_chain_kafka_lost_waits_for_the_right_to_look_at_its_records(
    guarded: Guarded,
) -> None:
    """The last one: the end of the audit topic is gone, what it named is there."""
    pair, kafka = guarded.pair, guarded.kafka
    guarded.insert(1004)
    pair.wait_in_step()
    pair.stop()
    audit = names.audit_topic(pair.cluster)
    records = [r for r in read_topics(kafka.open, pair.cluster) if r.topic == audit]
    last = max(i for i, r in enumerate(records) if (r.key or b"").startswith(f"{pair.chain}/".encode()))
    kafka.admin.delete_topics([audit])[audit].result(20)
    until(lambda: audit not in guarded.topics())
    ensure_topic(kafka.admin, audit, "audit", load_settings(pair.a.config))
    append(kafka.open, records[:last])
    pair.a.start("producer")
    waits_and_says(pair.a, "kafka acls --recovery")
    as_administrator(
        pair.a, "kafka", "acls", "--recovery", "--apply", "--producer-principal", "User:producer"
    )
    state = "SELECT state FROM vsql_sync.stream_status WHERE chain = %s"
    until(lambda: pair.a.query(state, pair.chain) == [("running",)])
    again = [r for r in read_topics(kafka.open, pair.cluster) if r.topic == audit]
    assert (again[last].key, again[last].value) == (records[last].key, records[last].value)
