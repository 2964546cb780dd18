"""Rule 5: a lost end of the chain is published again if all its records are there, else it is DIVERGED."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from tests.services.conftest import NewSource
from tests.services.producer_node import SourceNode, make_shorter
from tests.stack import Stack
from tests.streams import Record
from vsql_shared import names

TABLE = "CREATE TABLE t (id bigint PRIMARY KEY, note text); CREATE TABLE u (id bigint PRIMARY KEY)"
QUICK = "[limits]\nbatch_linger_ms = 1\nbatch_max_rows = 50\nstatus_interval_ms = 100\n"


def source(new_source: NewSource) -> tuple[SourceNode, list[Record]]:
    """A source that has sent several batches, stopped; and the audit topic's records."""
    node = new_source(TABLE, ["t", "u"], config=QUICK)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    for number in range(6):
        first = number * 100
        node.execute(f"INSERT INTO t SELECT g, 'x' FROM generate_series({first}, {first + 99}) g")
        node.execute(f"INSERT INTO u VALUES ({number})")
    node.wait_confirmed()
    node.stop(worker)
    return node, [r for r in node.records() if r.topic == names.audit_topic(node.cluster)]


@pytest.mark.parametrize("kept", [0, 1, -4, -1])
def test_a_lost_end_of_the_chain_is_published_again_byte_by_byte(new_source: NewSource, kept: int) -> None:
    node, entries = source(new_source)
    make_shorter(node, names.audit_topic(node.cluster), entries[:kept])
    worker = node.start(log="second")
    node.execute("INSERT INTO t VALUES (1000, 'after')")
    node.wait_confirmed()
    assert "published again" in node.log("second")
    node.stop(worker)
    there = [r for r in node.records() if r.topic == names.audit_topic(node.cluster)]
    assert [(r.key, r.value) for r in there[: len(entries)]] == [(r.key, r.value) for r in entries]
    keys = [int.from_bytes(values[0] or b"", "big") for _, values in node.read().rows("t")]
    assert keys == [*range(600), 1000]
    # The place of the head was noted: the next start reads on from there.
    worker = node.start(log="third")
    node.execute("INSERT INTO t VALUES (1001, 'after')")
    node.wait_confirmed()
    node.stop(worker)
    assert "published again" not in node.log("third")


@pytest.mark.parametrize("known", [True, False], ids=["known to the table", "under way in the crash"])
def test_an_end_of_the_chain_that_stands_alone_in_a_topic_made_anew_is_taken(
    new_source: NewSource, known: bool
) -> None:
    """The topic went while the stream ran, and what it sent next began the new one."""
    node, before = source(new_source)
    heads = node.query("SELECT * FROM vsql_sync.chain_heads")
    send(node, 1000)
    topic = names.audit_topic(node.cluster)
    entries = [r for r in node.records() if r.topic == topic]
    if not known:
        _forget_after(node, len(before), heads)
    make_shorter(node, topic, entries[len(before) :])
    assert "was found again" in send(node, 1001)
    assert "was found again" not in send(node, 1002)
    there = [r.value for r in node.records() if r.topic == topic]
    assert there[: len(entries) - len(before)] == [r.value for r in entries[len(before) :]]
    stored = node.query("SELECT document FROM vsql_sync.vsql_sync_audit ORDER BY sequence")
    assert [bytes(one) for (one,) in stored] == [*(r.value for r in before), *there]


def send(node: SourceNode, key: int) -> str:
    """Run the stream until it has sent one row more; its log."""
    worker = node.start(log=str(key))
    node.execute(f"INSERT INTO t VALUES ({key}, 'after')")
    node.wait_confirmed()
    node.stop(worker)
    return node.log(str(key))


def _forget_after(node: SourceNode, sequence: int, heads: list[tuple[object, ...]]) -> None:
    """As a crash between Kafka's answer and the commit leaves the tables, for those who may not delete."""
    ((table,),) = node.query(
        "SELECT DISTINCT tableoid::regclass::text FROM vsql_sync.vsql_sync_audit WHERE sequence > %s",
        sequence,
    )
    node.execute(
        f"ALTER TABLE {table} DISABLE RULE no_delete; DELETE FROM {table} WHERE sequence > {sequence};"
        f" ALTER TABLE {table} ENABLE ALWAYS RULE no_delete;"
        " ALTER TABLE vsql_sync.chain_heads DISABLE TRIGGER ALL; DELETE FROM vsql_sync.chain_heads"
    )
    for head in heads:
        node.query(
            f"INSERT INTO vsql_sync.chain_heads VALUES ({', '.join(['%s'] * len(head))}) RETURNING 1", *head
        )
    node.execute("ALTER TABLE vsql_sync.chain_heads ENABLE TRIGGER ALL")


def lose_topic(node: SourceNode) -> str:
    topic = f"{node.cluster}.pub.node-a.public.u"
    admin = AdminClient({"bootstrap.servers": node.kafka})
    admin.delete_topics([topic])[topic].result(20)
    return "are missing from"


def lose_first_records(node: SourceNode) -> str:
    place = TopicPartition(f"{node.cluster}.pub.node-a.public.t", 0, 3)
    admin = AdminClient({"bootstrap.servers": node.kafka})
    admin.delete_records([place])[place].result(20)
    return "are missing from"


def alter_a_record(node: SourceNode) -> str:
    topic = f"{node.cluster}.pub.node-a.public.u"
    records = [record for record in node.records() if record.topic == topic]
    size = len(records[2].value or b"")
    make_shorter(node, topic, [*records[:2], records[2].flip(size - 5), *records[3:]])
    return "are not those that were sent"


def lose_keys(node: SourceNode) -> str:
    topic = names.keys_topic(node.cluster)
    admin = AdminClient({"bootstrap.servers": node.kafka})
    admin.delete_topics([topic])[topic].result(20)
    return "the announcement of its data key"


@pytest.mark.parametrize("harm", [lose_topic, lose_first_records, alter_a_record, lose_keys])
def test_where_something_is_missing_nothing_is_published_and_it_is_said(
    new_source: NewSource, harm: Callable[[SourceNode], str]
) -> None:
    node, entries = source(new_source)
    wanted = harm(node)
    topic = names.audit_topic(node.cluster)
    make_shorter(node, topic, entries[:1])
    worker = node.start(log="second")
    node.wait(lambda: node.state()[0] == "diverged", what=node.log("second"))
    said = node.state()[1]["last_error"]
    assert wanted in said, said
    assert "sequence" in said
    assert "initialise the targets anew" in said
    node.stop(worker)
    assert len([record for record in node.records() if record.topic == topic]) == 1


def test_another_history_in_kafka_is_diverged(new_source: NewSource, stack: Stack) -> None:
    del stack
    node, entries = source(new_source)
    # Two entries of the table are gone and the chain went on from the first: the broker has another truth.
    node.execute(
        "ALTER TABLE vsql_sync.chain_heads DISABLE TRIGGER ALL;"
        " UPDATE vsql_sync.chain_heads SET entry_hash = sha256('x')"
    )
    worker = node.start(log="second")
    node.wait(lambda: node.state()[0] == "diverged", what=node.log("second"))
    assert "lost the end of chain" in node.state()[1]["last_error"]
    node.stop(worker)
    assert len([r for r in node.records() if r.topic == names.audit_topic(node.cluster)]) == len(entries)
