"""Data records go when every target has acknowledged them and they are old enough, and never before."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient

from tests.services.conftest import NewSource
from tests.services.producer_node import CHAIN, PeerNode, SourceNode
from tests.streams import alter_topic
from vsql_producers import retention
from vsql_producers.retention import Retention
from vsql_shared.kafka.clients import make_admin, watermarks
from vsql_shared.pg.connect import Connection, connect

TABLES = "CREATE TABLE t (id bigint PRIMARY KEY, note text); CREATE TABLE u (id bigint PRIMARY KEY)"
QUICK = "[limits]\nbatch_linger_ms = 1\nstatus_interval_ms = 100\ncommand_poll_ms = 100\n"
NOW, LATER = timedelta(0), timedelta(days=1)


def add_target(node: SourceNode, name: str) -> PeerNode:
    """Register a target of the live stream."""
    node.execute(f"INSERT INTO vsql_sync.stream_targets (chain, target) VALUES ('{CHAIN}', '{name}')")
    return PeerNode(node, name)


def source(new_source: NewSource, config: str = "", batches: int = 3) -> SourceNode:
    """A source that has sent some batches of two tables, and whose worker has ended."""
    node = new_source(TABLES, ["t", "u"], config=config + QUICK)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    for number in range(batches):
        node.execute(f"INSERT INTO t VALUES ({number}, 'a'); INSERT INTO u VALUES ({number})")
        node.wait_confirmed()
    node.stop(worker)
    return node


def bounds(node: SourceNode, table: str) -> tuple[int, int]:
    """First and next offset of a table's topic."""
    consumer = Consumer({"bootstrap.servers": node.kafka, "group.id": "bounds"})
    try:
        place = TopicPartition(f"{node.cluster}.pub.node-a.public.{table}", 0)
        low, high = watermarks(consumer, place, 20)
        return int(low), int(high)
    finally:
        consumer.close()


def run(node: SourceNode, conn: Connection, keep: timedelta, admin: Callable[[], AdminClient]) -> int:
    """Turn until nothing is under way; returns how many turns asked Kafka for something."""
    asked, now = 0, 0.0
    one = Retention(conn, admin, CHAIN, keep)
    for _ in range(10):
        before = pruned(node)
        one.turn(now)
        deadline = time.monotonic() + 20
        while one.busy and time.monotonic() < deadline:
            time.sleep(0.05)
            one.turn(now)
        assert not one.busy, "Kafka did not answer"
        asked += pruned(node) > before
        now += retention.LOOK_SECONDS
    return asked


def pruned(node: SourceNode) -> int:
    return int(node.query("SELECT pruned_sequence FROM vsql_sync.streams")[0][0])


def acknowledged(node: SourceNode, name: str, sequence: int) -> None:
    """As the worker notes it after it has verified the target's acknowledgement."""
    node.execute(f"UPDATE vsql_sync.stream_targets SET acked_sequence = {sequence} WHERE target = '{name}'")


def test_without_targets_or_before_its_time_nothing_is_deleted(new_source: NewSource) -> None:
    node = source(new_source)
    before = bounds(node, "t"), bounds(node, "u")
    with connect(node.conninfo, application_name="test") as conn:
        assert run(node, conn, NOW, lambda: make_admin(node.settings)) == 0
        add_target(node, "node-b")
        acknowledged(node, "node-b", 1000)
        assert run(node, conn, LATER, lambda: make_admin(node.settings)) == 0
    assert (bounds(node, "t"), bounds(node, "u")) == before
    assert (before[0][0], pruned(node)) == (0, 0)


def test_the_slowest_target_holds_what_it_has_not_acknowledged(new_source: NewSource) -> None:
    node = source(new_source)
    manifests = node.read().manifests
    for name in ("node-b", "node-c"):
        add_target(node, name)
    acknowledged(node, "node-b", manifests[-1].sequence)
    with connect(node.conninfo, application_name="test") as conn:
        assert run(node, conn, NOW, lambda: make_admin(node.settings)) == 0
        acknowledged(node, "node-c", manifests[1].sequence)
        assert run(node, conn, NOW, lambda: make_admin(node.settings)) == 1
        ends = {part.topic: part.last_offset + 1 for part in manifests[1].partitions}
        assert bounds(node, "t")[0] == ends[f"{node.cluster}.pub.node-a.public.t"]
        assert bounds(node, "u")[0] == ends[f"{node.cluster}.pub.node-a.public.u"]
        assert pruned(node) == manifests[1].sequence
        left = [record for record in node.records() if ".public." in record.topic]
        assert {record.topic for record in left} == set(ends)
        assert all(record.offset >= ends[record.topic] for record in left)
        acknowledged(node, "node-c", manifests[2].sequence)
        assert run(node, conn, NOW, lambda: make_admin(node.settings)) == 1
    low, high = bounds(node, "t")
    assert low == high


def test_a_look_takes_a_bounded_number_of_manifests_and_a_topic_that_is_gone_holds_nothing_up(
    new_source: NewSource,
) -> None:
    node = source(new_source)
    add_target(node, "node-b")
    last = node.read().manifests[-1].sequence
    acknowledged(node, "node-b", last)
    gone = f"{node.cluster}.pub.node-a.public.u"
    admin = make_admin(node.settings)
    admin.delete_topics([gone])[gone].result(20)
    with connect(node.conninfo, application_name="test") as conn:
        one = Retention(conn, lambda: admin, CHAIN, NOW, page=2)
        seen, now, deadline = set(), 0.0, time.monotonic() + 30
        while pruned(node) < last and time.monotonic() < deadline:
            one.turn(now)
            seen.add(pruned(node))
            time.sleep(0.05)
    assert pruned(node) == last
    assert len(seen) > 2
    low, high = bounds(node, "t")
    assert low == high


def test_a_worker_deletes_by_itself_and_the_stream_goes_on(new_source: NewSource) -> None:
    """The shortest retention there is takes a minute; the worker looks twice a minute."""
    node = new_source(TABLES, ["t", "u"], config=QUICK)
    node.config.write_text(node.config.read_text().replace("[kafka]", '[kafka]\nretention = "1m"'))
    target = add_target(node, "node-b")
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.execute("INSERT INTO t VALUES (1, 'a')")
    node.wait_confirmed()
    target.acknowledge(CHAIN)
    node.execute("INSERT INTO t VALUES (2, 'not acknowledged')")
    node.wait_confirmed()
    held = bounds(node, "t")[1] - 1
    node.wait(lambda: bounds(node, "t")[0] > 0, 150, "nothing was deleted")
    assert bounds(node, "t")[0] <= held
    node.execute("INSERT INTO t VALUES (3, 'later')")
    node.wait_confirmed()
    node.stop(worker)
    worker = node.start(log="second")
    node.execute("INSERT INTO t VALUES (4, 'after a restart')")
    node.wait_confirmed()
    node.stop(worker)
    left = [record for record in node.records() if record.topic.endswith(".public.t")]
    assert min(record.offset for record in left) <= held
    assert bounds(node, "t")[1] >= held + 3


def test_a_data_topic_with_a_retention_of_kafka_s_own_is_named_and_waited_for(new_source: NewSource) -> None:
    """Made by somebody else, or altered: Kafka would delete what no target has read."""
    node = new_source(TABLES, ["t", "u"], config=QUICK + "retry_backoff_max_ms = 1000\n")
    topic = f"{node.cluster}.pub.node-a.public.t"
    node.make_topic("pub.node-a.public.t")
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.execute("INSERT INTO t VALUES (1, 'a')")
    said = f"topic {topic} is not of the shape it needs: retention.ms = 604800000, expected -1"
    node.wait(lambda: said in (node.state()[1].get("last_error") or ""))
    alter_topic(node.kafka, topic, retention_ms="-1")
    node.wait_confirmed()
    assert len(node.read().rows("t")) == 1
    node.stop(worker)
