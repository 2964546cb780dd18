"""The audit trail archived in locked storage and pruned: what starts from it afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

from tests.moto_server import ENVIRONMENT, REGION, moto_server, s3_bucket
from tests.nodes import Node, TwoNodes
from tests.pairs import Pairs
from tests.stack import Stack, kill_tree
from tests.streams import alter_topic
from tests.topology.test_joining import ADD_C, COMMON, TABLES
from tests.waiting import until
from vsql_shared import names
from vsql_shared.kafka.clients import watermarks

pytestmark = pytest.mark.topology

BUCKET = "trail"


@pytest.fixture
def archive(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of an object store with a bucket that locks."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with moto_server(tmp_path_factory.mktemp("moto")) as address:
        s3_bucket(address, BUCKET)
        yield address


@pytest.fixture
def pair(pairs: Pairs, archive: str, monkeypatch: pytest.MonkeyPatch) -> TwoNodes:
    """In step; B cosigns each second, a segment ends at each such head, and nothing has to stay on-line."""
    monkeypatch.setenv("VSQL_SYNC__AUDIT__CHECKPOINT_EVERY", "1s")
    monkeypatch.setenv("VSQL_SYNC__AUDIT__ONLINE_MONTHS", "0")
    monkeypatch.setenv("VSQL_SYNC__AUDIT__VERIFY_EVERY", "2s")
    monkeypatch.setenv("VSQL_SYNC__AUDIT__VERIFY_PAUSE", "100ms")
    section = f'[audit.archive]\nbucket = "{BUCKET}"\nregion = "{REGION}"\nendpoint = "{archive}"\n'
    made = pairs(TABLES, config=f"[limits]\nbatch_linger_ms = 1\n{section}segment_entries = 1\n")
    made.create(["t(*)", "u(*)"])
    made.start()
    made.wait_in_step()
    insert(made, 0, 6)
    return made


def insert(pair: TwoNodes, first: int, count: int) -> None:
    """Rows in batches of their own, applied and acknowledged."""
    for number in range(first, first + count):
        pair.a.execute(f"INSERT INTO t VALUES ({number}, 'x'); INSERT INTO u VALUES ({number}, {number})")
        pair.wait_in_step()
    head = pair.heads()[0]
    acked = "SELECT 1 FROM vsql_sync.stream_targets WHERE chain = %s AND acked_sequence >= %s"
    until(lambda: pair.a.query(acked, pair.chain, head))


def cosigned(pair: TwoNodes) -> int:
    """Wait until A has the cosignature of a head that is not the last one; the size."""
    size = "SELECT coalesce(max(size), 0) FROM vsql_sync.audit_cosigned WHERE chain = %s"
    return int(
        until(
            lambda: pair.a.query(size, pair.chain)[0][0],
            tell=lambda: f"{pair.a.tail('producer')}\n{pair.b.tail('consumer')}",
        )
    )


def prunable(pair: TwoNodes) -> int:
    """Have a head cosigned, and then an epoch and a batch behind it: what A starts from stays."""
    size = cosigned(pair)
    pair.a.stop("producer")
    pair.a.start("producer")
    insert(pair, 100 + size, 1)
    return size


def on_topic(pair: TwoNodes) -> list[tuple[int, bool]]:
    """A's chain on the audit topic, in order: sequence, and whether it is a tombstone."""
    consumer = Consumer({"bootstrap.servers": pair.a.kafka, "group.id": "look"})
    topic = names.audit_topic(pair.cluster)
    found: list[tuple[int, bool]] = []
    for number in consumer.list_topics(topic, timeout=20).topics[topic].partitions:
        place = TopicPartition(topic, number, OFFSET_BEGINNING)
        high = watermarks(consumer, place, 20)[1]
        consumer.assign([place])
        at = -1
        while at < high - 1:
            message = consumer.poll(10)
            assert message is not None
            assert message.error() is None
            at = message.offset() or 0
            chain, _, _, sequence = bytes(message.key() or b"").decode().split("/")
            if chain == pair.chain:
                found.append((int(sequence), message.value() is None))
    consumer.close()
    return found


def compact(pair: TwoNodes, upto: int) -> None:
    """Have Kafka take away what is buried."""
    alter_topic(
        pair.a.kafka,
        names.audit_topic(pair.cluster),
        segment_ms="100",
        min_cleanable_dirty_ratio="0.0001",
        max_compaction_lag_ms="100",
    )
    number = [600]

    def gone() -> bool:
        insert(pair, number[0], 1)  # a segment is closed by what is written behind it
        number[0] += 1
        return not [one for one, dead in on_topic(pair) if one <= upto and not dead]

    until(gone, 120)


def require_whole(pair: TwoNodes) -> None:
    """Wait until A's services have read chain and topic once more, and have never found a break."""
    (since,) = pair.a.query("SELECT clock_timestamp()")[0]
    again = "SELECT count(*) FROM vsql_sync.audit_watch WHERE chain IN ('', %s) AND whole_at > %s"
    breaks = "SELECT source, chain, sequence, what FROM vsql_sync.audit_breaks"
    until(
        lambda: pair.a.query(again, pair.chain, since) == [(2,)] or pair.a.query(breaks),
        120,
        tell=lambda: pair.a.tail("producer"),
    )
    assert pair.a.query(breaks) == []


def rows(node: Node, chain: str) -> list[int]:
    return [
        one
        for (one,) in node.query(
            "SELECT sequence FROM vsql_sync.vsql_sync_audit WHERE chain = %s ORDER BY 1", chain
        )
    ]


@pytest.mark.timeout(300)
def test_a_pruned_chain_verifies_goes_on_and_is_joined(pair: TwoNodes, stack: Stack) -> None:
    size = prunable(pair)
    done = pair.a.ctl_json("audit", "archive")
    assert next(one["first"] for one in done if one["chain"] == pair.chain) == 1
    checked = pair.a.ctl_json("audit", "archive", "--verify")
    assert checked["ok"]
    before = pair.a.ctl("audit", "checkpoint", "--chain", pair.chain).stdout
    # An operator, who may give other orders, cannot have the chain say it was pruned.
    order = f"VALUES ('producer', '{pair.chain}', 'prune-chain')"
    pair.a.execute(
        "SET SESSION AUTHORIZATION vsql_sync_operator;"
        f" INSERT INTO vsql_sync.commands (role, chain, verb) {order}"
    )
    refused = (
        "SELECT r.ok, r.message FROM vsql_sync.command_results r JOIN vsql_sync.commands c"
        " ON c.id = r.command_id WHERE c.verb = 'prune-chain'"
    )
    answered = until(lambda: pair.a.query(refused), tell=lambda: pair.a.tail("producer"))
    assert (answered[0][0], "only a member of vsql_sync_admin" in answered[0][1]) == (False, True)
    # Whoever gives up waiting has removed nothing; the next one goes on where the order was obeyed.
    assert pair.a.ctl("audit", "prune", "--timeout", "0", check=False).returncode == 7
    said = "SELECT 1 FROM vsql_sync.vsql_sync_audit WHERE event_type = 'trail_pruned'"
    until(lambda: pair.a.query(said), tell=lambda: pair.a.tail("producer"))
    assert rows(pair.a, pair.chain)[0] == 1
    pair.a.ctl("audit", "verify", "--kafka")
    pruned = {one["chain"]: one for one in pair.a.ctl_json("audit", "prune", "--reason", "a year is over")}
    upto = pruned[pair.chain]["pruned"]
    assert upto >= size
    assert pruned[pair.chain]["removed"] == upto

    # The table, and the topic: what is left begins behind the base.
    assert rows(pair.a, pair.chain)[0] == upto + 1
    assert {sequence for sequence, dead in dict(on_topic(pair)).items() if dead} == set(range(1, upto + 1))

    # The chain is proven as before, here, against Kafka and against the peer.
    for arguments in ((), ("--kafka",), ("--peer-connection", pair.b.conninfo)):
        found = pair.a.ctl_json("audit", "verify", *arguments)
        assert found["problems"] == []
        assert [one["pruned"] for one in found["chains"] if one["chain"] == pair.chain] == [upto]
    old = pair.folder / "old.checkpoint"
    old.write_text(before)
    pair.a.ctl("audit", "prove-prefix", str(old), "--output", str(pair.folder / "prefix"))
    pair.a.ctl("audit", "prove", f"{pair.chain}/{upto + 1}", "--output", str(pair.folder / "proof"))
    assert "in the archive only" in pair.a.ctl("audit", "prove", f"{pair.chain}/1", check=False).stderr
    # The service that read on while it was pruned has found nothing, nor does it now.
    require_whole(pair)

    # A consumer and a producer that start again go on.
    pair.b.stop("consumer")
    pair.a.stop("producer")
    pair.start()
    insert(pair, 500, 2)
    assert pair.differences() == []
    pair.a.ctl("audit", "verify", "--kafka", "--peer-connection", pair.b.conninfo)
    report = pair.a.ctl("publication", "scope-report", "pub")
    assert json.loads(report.stdout)["streams"]
    require_whole(pair)

    compact(pair, upto)
    third = join(pair, stack)
    try:
        _third_in_step(pair, third)
        pair.a.ctl("audit", "verify", "--kafka", "--peer-connection", third.conninfo)
        third.ctl("audit", "verify", "--kafka")
        require_whole(pair)
    finally:
        for process in third.services.values():
            kill_tree(process)


def join(pair: TwoNodes, stack: Stack) -> Node:
    """Node C joins after the pruning."""
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
    pair.a.ctl(*ADD_C, "--peer-connection", node.conninfo)
    pair.a.ctl("start")
    node.ctl("start")
    node.start("consumer")
    return node


def _third_in_step(pair: TwoNodes, third: Node) -> None:
    pair.a.execute("INSERT INTO t VALUES (900, 'late'); UPDATE u SET n = n + 1")
    pair.wait_in_step()

    def level() -> Any:
        found = third.query("SELECT sequence FROM vsql_sync.apply_progress WHERE chain = %s", pair.chain)
        return found and found[0][0] >= pair.heads()[0]

    until(level, tell=lambda: f"{third.tail('consumer')}\n{pair.a.tail('producer')}")
    for statement in COMMON:
        assert third.query(statement) == pair.a.query(statement)
