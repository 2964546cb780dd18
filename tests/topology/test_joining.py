"""A target that joins a stream whose old records Kafka has deleted begins with its copy, or is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient

from tests.nodes import PUBLICATION, Node, TwoNodes
from tests.pairs import Pairs
from tests.stack import Stack, kill_tree
from tests.streams import cluster_topics
from tests.waiting import until
from vsql_shared import names
from vsql_shared.kafka.clients import watermarks

pytestmark = pytest.mark.topology

TABLES = "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE u (id int PRIMARY KEY, n numeric(10,2));"
ADD_C = (
    "node",
    "add-peer",
    "--peer-node-id",
    "3",
    "--peer-name",
    "node-c",
    "--mode",
    "uni-directional",
    "--yes",
)
COMMON = ("SELECT v FROM t ORDER BY id", "SELECT n FROM u ORDER BY id")


@pytest.fixture
def pair(pairs: Pairs) -> TwoNodes:
    """A and B at work, with three batches behind them."""
    made = pairs(TABLES, config="[limits]\nbatch_linger_ms = 1")
    made.create(["t(*)", "u(*)"])
    made.start()
    made.wait_in_step()
    for number in range(3):
        made.a.execute(f"INSERT INTO t VALUES ({number}, 'early'); INSERT INTO u VALUES ({number}, {number})")
        made.wait_in_step()
    return made


@pytest.fixture
def third(pair: TwoNodes, stack: Stack) -> Iterator[Node]:
    """Node C, initialised, with the tables and nobody's peer."""
    node = Node(
        pair.folder, pair.cluster, 3, "node-c", stack.new_database(18, "c"), pair.a.kafka, pair.a.extra
    )
    node.execute(TABLES)
    node.write_config(pair.folder / "kek.key")
    node.ctl("key", "generate", "--output", str(node.keys))
    node.ctl(
        "node", "init", "--node-id", "3", "--node-name", "node-c", "--cluster", pair.cluster,
        "--connection", node.conninfo,
    )  # fmt: skip
    yield node
    for process in node.services.values():
        kill_tree(process)


def _shown(check: Callable[[], Any], node: Node) -> Any:
    """Wait for what a node does; its services' last lines where it does not."""
    return until(check, tell=lambda: f"{node.tail('consumer')}\n{node.tail('producer')}")


def join(pair: TwoNodes, third: Node) -> None:
    """What an operator does to add C, on both nodes."""
    pair.a.ctl(*ADD_C, "--peer-connection", third.conninfo)
    pair.a.ctl("start")
    third.ctl("start")


def in_step(pair: TwoNodes, third: Node) -> None:
    """Wait until C, too, has applied all that A had committed."""
    pair.wait_in_step()

    def level() -> bool:
        rows = third.query("SELECT sequence FROM vsql_sync.apply_progress WHERE chain = %s", pair.chain)
        return bool(rows) and rows[0][0] >= pair.heads()[0]

    _shown(level, third)
    for statement in COMMON:
        assert third.query(statement) == pair.a.query(statement)


def delete_records(pair: TwoNodes) -> None:
    """Delete everything the live stream's data topics hold, as retention does."""
    prefix = f"{pair.cluster}.{PUBLICATION}.node-a.public."
    consumer = Consumer({"bootstrap.servers": pair.a.kafka, "group.id": "bounds"})
    ends = []
    for topic in cluster_topics(pair.a.kafka, pair.cluster):
        if topic.startswith(prefix):
            high = watermarks(consumer, TopicPartition(topic, 0), 20)[1]
            ends.append(TopicPartition(topic, 0, high))
    consumer.close()
    assert len(ends) == 2
    client = AdminClient({"bootstrap.servers": pair.a.kafka})  # answers come while somebody holds it
    for answer in client.delete_records(ends).values():
        assert answer.result(20).low_watermark > 0


def own_entries(third: Node, chain: str) -> list[tuple[Any, ...]]:
    """What C says of the live stream: event, batch, changes."""
    return third.query(
        "SELECT event_type, batch, row_count FROM vsql_sync.vsql_sync_audit"
        " WHERE chain = %s AND batch > 0 ORDER BY sequence",
        names.ack_chain(chain, "node-c"),
    )


@pytest.mark.parametrize("schedule", ["at ease", "killed where it joins"])
@pytest.mark.timeout(300)
def test_a_target_that_joins_late_needs_no_record_its_copy_covers(
    pair: TwoNodes, third: Node, schedule: str
) -> None:
    delete_records(pair)
    join(pair, third)
    if schedule != "at ease":
        for where in ("before", "after"):
            point = f"consumer.{where}-join-commit=kill"
            third.start("consumer", {"VSQL_SYNC_ALLOW_FAILPOINTS": "1", "VSQL_SYNC_FAILPOINTS": point})
            _shown(lambda: '"code": -9' in third.tail("consumer", 200), third)
            third.stop("consumer")
            third.log_file("consumer").unlink()
    third.start("consumer")
    pair.a.execute("INSERT INTO t VALUES (100, 'late'); UPDATE u SET n = n + 1; DELETE FROM t WHERE id = 0")
    in_step(pair, third)
    pair.a.execute("UPDATE t SET v = 'later' WHERE id = 1")
    in_step(pair, third)
    entries = own_entries(third, pair.chain)
    event, begin, covered = entries[0]
    # At least what came before C was added; its copy may be made after what followed.
    assert event == "batch_covered"
    assert begin >= 3
    assert covered >= 6
    upto = "SELECT sum(row_count)::int FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND batch <= %s"
    assert [(covered,)] == pair.a.query(upto, pair.chain, begin)
    assert {event for event, _, _ in entries[1:]} == {"batch_applied"}
    assert [batch for _, batch, _ in entries] == list(range(begin, begin + len(entries)))
    assert sum(rows for _, _, rows in entries) == pair.audited_rows()
    for node in (pair.a, pair.b, third):
        node.ctl("audit", "verify")
    pair.a.ctl("audit", "verify", "--kafka", "--peer-connection", third.conninfo)
    _shown(
        lambda: pair.a.query(
            "SELECT 1 FROM vsql_sync.stream_targets WHERE chain = %s AND target = 'node-c'"
            " AND acked_sequence = %s AND mismatch IS NULL",
            pair.chain,
            pair.heads()[0],
        ),
        pair.a,
    )


@pytest.mark.timeout(300)
def test_records_deleted_beyond_the_copy_are_missed_by_name(pair: TwoNodes, third: Node) -> None:
    join(pair, third)
    copy = names.copy_chain(PUBLICATION, "node-a", "node-c")
    ended = "SELECT 1 FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND event_type = 'copy_finished'"
    _shown(lambda: pair.a.query(ended, copy), pair.a)
    pair.a.execute("INSERT INTO t VALUES (100, 'after the copy'); INSERT INTO u VALUES (100, 1)")
    pair.wait_in_step()
    delete_records(pair)
    third.start("consumer")
    _shown(lambda: third.query("SELECT 1 FROM vsql_sync.stream_status WHERE state = 'refused'"), third)
    detail = third.query("SELECT detail FROM vsql_sync.stream_status WHERE state = 'refused'")[0][0]
    assert detail["refused"]["record"].startswith(f"{pair.cluster}.{PUBLICATION}.node-a.public.t/0/")
    assert "Kafka begins at offset" in detail["refused"]["error"]
    assert third.query("SELECT count(*) FROM t WHERE id = 100") == [(0,)]
    assert [event for event, _, _ in own_entries(third, pair.chain)] == ["batch_covered"]


@pytest.mark.timeout(300)
def test_a_target_joins_after_its_origin_changed_keys(pair: TwoNodes, third: Node) -> None:
    """The chain begins under a key that has ended; the operator agrees to it, too; C trusts it so far."""
    old = pair.a.fingerprint()
    pair.a.stop("producer")
    for node in (pair.a, pair.b):
        node.ctl("key", "retire", "--fingerprint", old, "--reason", "yearly change", "--yes")
    pair.a.new_key()
    pair.a.ctl("node", "add-peer", "--peer-node-id", "2", "--peer-connection", pair.b.conninfo, "--yes")
    pair.a.start("producer")
    add = (*ADD_C[:-1], "--peer-connection", third.conninfo)
    refused = pair.a.ctl(*add, "--fingerprint", third.fingerprint(), check=False)
    assert refused.returncode != 0
    assert f"{old} of node-a before" in refused.stderr
    assert third.query("SELECT * FROM vsql_sync.streams") == []
    pair.a.ctl(*add, "--fingerprint", third.fingerprint(), "--fingerprint", old)
    pair.a.ctl("start")
    third.ctl("start")
    third.start("consumer")
    pair.a.execute("INSERT INTO t VALUES (100, 'by the second key')")
    in_step(pair, third)
    ended = third.query("SELECT fingerprint FROM vsql_sync.signers WHERE retired_at < now()")
    assert ended == [(old,)]
    for one, other in ((pair.a, third), (third, pair.a)):
        one.ctl("audit", "verify", "--kafka", "--peer-connection", other.conninfo)


@pytest.mark.timeout(300)
def test_without_a_copy_nothing_is_passed_over(pair: TwoNodes, third: Node) -> None:
    """`--no-copy` says that the rows are there already; nothing says up to which position."""
    delete_records(pair)
    pair.a.ctl(*ADD_C, "--no-copy", "--peer-connection", third.conninfo)
    third.ctl("start")
    third.start("consumer")
    _shown(lambda: third.query("SELECT 1 FROM vsql_sync.stream_status WHERE state = 'refused'"), third)
    assert own_entries(third, pair.chain) == []
