"""What the owner of the broker can do to the topics; node B refuses it, names it, applies nothing.

Two scenes. In the first, B is stopped while A writes, the topics are copied to a second broker with one
alteration to the first records B has not seen, B reads that copy. A refusal leaves B's progress where it was,
so every attack starts from the same point. In the second, records are appended to the topics of a running
stream that must not change what it does.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions  # type: ignore[attr-defined]  # no stubs say so

from tests.nodes import TwoNodes
from tests.pairs import Pairs
from tests.stack import KafkaBroker, Stack
from tests.streams import (
    MESSAGE_MAX_BYTES,
    Record,
    alter_topic,
    append,
    cluster_topics,
    copy_topics,
    create_like,
    read_topics,
)
from tests.topology.attacks import REFUSED, Taken, entry_of, forged_entry
from tests.waiting import until
from vsql_shared import names

pytestmark = pytest.mark.topology

TABLES = """CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE u (id int PRIMARY KEY, v text);
CREATE TABLE w (id int PRIMARY KEY, v text);"""
PUBLISHED = ["t(*)", "u(*)"]


@dataclass
class Scene:
    """The pair, the second broker, and the true records."""

    pair: TwoNodes
    broker: KafkaBroker
    taken: Taken
    rows_before: list[tuple[Any, ...]]

    def topic(self, suffix: str) -> str:
        """A topic of the stream by its end."""
        return self.taken.records[self.taken.new(suffix)[0]].topic

    @contextmanager
    def b_reads(self, records: list[Record], then: Callable[[str], None] = lambda _: None) -> Iterator[None]:
        """B's consumer on the second broker, which holds these records; `then` may do more to it before."""
        pair, address = self.pair, self.broker.bootstrap_servers
        _clear_broker(self.broker, pair.cluster)
        create_like(pair.a.kafka, address, pair.cluster)
        for topic in {r.topic for r in records if len(r.value or b"") > 1_000_000}:
            alter_topic(address, topic, max_message_bytes=str(MESSAGE_MAX_BYTES))
        append(address, records)
        then(address)
        true_config = pair.b.config.read_text()
        pair.b.query("DELETE FROM vsql_sync.stream_status")
        pair.b.config.write_text(true_config.replace(pair.b.kafka, address))
        try:
            pair.b.start("consumer")
            yield
        finally:
            if "consumer" in pair.b.services:
                pair.b.stop("consumer")
            pair.b.config.write_text(true_config)
            pair.b.query("UPDATE vsql_sync.streams SET state = 'CATCHING_UP' WHERE state = 'DIVERGED'")


@pytest.fixture(scope="module")
def scene(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Both nodes in step; then B stopped, and three batches of a new epoch of A's that B has not seen."""
    pair = TwoNodes(stack, tmp_path_factory.mktemp("tamper"), TABLES)
    try:
        pair.create(PUBLISHED)
        pair.start()
        pair.a.execute("INSERT INTO t SELECT g, 'before' FROM generate_series(1, 100) g")
        pair.a.execute("INSERT INTO u VALUES (1, 'before')")
        pair.wait_in_step()
        other = _second_stream(pair)
        pair.b.stop("consumer")
        seen = {(r.topic, r.partition): r.offset + 1 for r in read_topics(pair.a.kafka, pair.cluster)}
        pair.a.stop("producer")
        pair.a.start("producer")
        for step in range(3):
            head = pair.heads()[0]
            pair.a.execute(
                f"INSERT INTO t SELECT {step + 1} * 1000 + g, 'after' FROM generate_series(1, 150) g;"
                f"INSERT INTO u SELECT {step + 1} * 1000 + g, 'after' FROM generate_series(1, 150) g;"
            )
            until(lambda head=head: _manifests(pair) > head)  # type: ignore[misc]  # bound now
        records = read_topics(pair.a.kafka, pair.cluster)
        strange = _of_another_cluster(stack, tmp_path_factory.mktemp("strange"))
        taken = Taken(pair.chain, records, seen, strange, other)
        yield Scene(pair, stack.own_kafka(), taken, _rows(pair))
    finally:
        pair.end()


def _manifests(pair: TwoNodes) -> int:
    """Sequence of the last manifest of A's chain."""
    return int(
        pair.a.query(
            "SELECT coalesce(max(sequence), 0) FROM vsql_sync.vsql_sync_audit"
            " WHERE chain = %s AND event_type = 'replication_batch'",
            pair.chain,
        )[0][0]
    )


def _second_stream(pair: TwoNodes) -> list[Record]:
    """Packs of another publication of the same node to the same target."""
    pair.a.ctl("publication", "create", "other", "--table", "w(*)")
    pair.a.ctl(
        "node", "add-peer", "--peer-node-id", "2", "--peer-name", "node-b", "--peer-connection",
        pair.b.conninfo, "--publication", "other", "--no-copy", "--yes",
    )  # fmt: skip
    for node in (pair.a, pair.b):
        node.ctl("start")
    pair.a.execute("INSERT INTO w VALUES (1, 'another stream')")
    until(lambda: pair.b.query("SELECT count(*) FROM w") == [(1,)])
    return [r for r in read_topics(pair.a.kafka, pair.cluster) if r.topic.endswith(".public.w")]


def _of_another_cluster(stack: Stack, folder: Path) -> list[Record]:
    """Records of a cluster whose nodes, publication and tables have the same names."""
    pair = TwoNodes(stack, folder, TABLES)
    try:
        pair.create(PUBLISHED, copy=False)
        pair.start()
        pair.a.execute("INSERT INTO t VALUES (1, 'strange'); INSERT INTO u VALUES (1, 'strange')")
        pair.wait_in_step()
        return read_topics(pair.a.kafka, pair.cluster)
    finally:
        pair.end()


def _rows(pair: TwoNodes) -> list[tuple[Any, ...]]:
    return pair.b.query("SELECT 't', count(*), sum(id) FROM t UNION ALL SELECT 'u', count(*), sum(id) FROM u")


def _said(pair: TwoNodes, *states: str, timeout: float = 45) -> str:
    """What B's consumer says when it stands in one of these states; fails when it does not."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        rows = pair.b.query(
            "SELECT coalesce(detail->'refused'->>'error', detail->>'last_error', '')"
            " || ' [' || coalesce(detail->'refused'->>'record', '')"
            " || ']' FROM vsql_sync.stream_status WHERE chain = %s AND direction = 'in' AND state = ANY(%s)"
            " AND updated_at > now() - interval '5 seconds'",
            pair.chain,
            list(states),
        )  # fmt: skip
        if rows:
            return str(rows[0][0])
        time.sleep(0.2)
    raise AssertionError(f"not {' or '.join(states)} within {timeout} s\n{pair.b.tail('consumer')}")


def _clear_broker(broker: KafkaBroker, cluster: str) -> None:
    admin = AdminClient({"bootstrap.servers": broker.bootstrap_servers})
    names_there = list(cluster_topics(broker.bootstrap_servers, cluster))
    if names_there:
        for future in admin.delete_topics(names_there).values():
            future.result(20)
    until(lambda: not cluster_topics(broker.bootstrap_servers, cluster))


# A copy with one alteration


@pytest.mark.timeout(300)
@pytest.mark.parametrize("attack", list(REFUSED))
def test_an_altered_copy_of_the_topics_is_refused_and_nothing_of_the_batch_applied(
    scene: Scene, attack: str
) -> None:
    change, named = REFUSED[attack]
    with scene.b_reads(change(scene.taken)):
        said = _said(scene.pair, "refused")
        assert re.search(named, said), said
        assert _rows(scene.pair) == scene.rows_before


@pytest.mark.timeout(300)
def test_records_deleted_before_they_were_read_are_missed_by_name(scene: Scene) -> None:
    topic = scene.topic(".t")
    begin = scene.taken.records[scene.taken.new(".t")[0]].offset

    def truncate(address: str) -> None:
        _delete_below(address, topic, begin + 1)

    with scene.b_reads(scene.taken.records, truncate):
        said = _said(scene.pair, "refused")
        assert topic in said, said
        assert _rows(scene.pair) == scene.rows_before


@pytest.mark.timeout(300)
def test_an_audit_topic_truncated_before_it_was_read_is_diverged(scene: Scene) -> None:
    topic = scene.topic(".audit")
    begin = scene.taken.records[scene.taken.new(".audit")[0]].offset

    def truncate(address: str) -> None:
        alter_topic(address, topic, cleanup_policy="delete")
        _delete_below(address, topic, begin + 1)
        alter_topic(address, topic, cleanup_policy="compact")

    with scene.b_reads(scene.taken.records, truncate):
        said = _said(scene.pair, "diverged")
        assert topic in said, said
        assert "is not among what is left" in said
        assert _rows(scene.pair) == scene.rows_before


def _delete_below(address: str, topic: str, offset: int) -> None:
    place = TopicPartition(topic, 0, offset)
    admin = AdminClient({"bootstrap.servers": address})
    admin.delete_records([place])[place].result(20)


@pytest.mark.timeout(300)
def test_an_audit_topic_of_a_changed_shape_is_named_and_waited_for(scene: Scene) -> None:
    topic = scene.topic(".audit")
    with scene.b_reads(scene.taken.records, lambda at: alter_topic(at, topic, cleanup_policy="delete")):
        said = _said(scene.pair, "waiting")
        assert topic in said, said
        assert "cleanup.policy" in said
        assert _rows(scene.pair) == scene.rows_before


def _ends(records: Sequence[Record]) -> dict[tuple[str, int], int]:
    """The last offset of each partition; nodes go on asking each other for the time."""
    return {(r.topic, r.partition): r.offset for r in records if not r.topic.endswith(".clocks")}


@pytest.mark.timeout(300)
def test_an_unaltered_copy_on_another_broker_is_applied(scene: Scene) -> None:
    """The control, and the last: what the attacks are refused for is the alteration, not the copying."""
    pair, other = scene.pair, scene.broker.bootstrap_servers
    _clear_broker(scene.broker, pair.cluster)
    copy_topics(pair.a.kafka, other, pair.cluster)
    assert _ends(read_topics(other, pair.cluster)) == _ends(scene.taken.records)
    with scene.b_reads(scene.taken.records):
        until(lambda: _rows(pair) != scene.rows_before and pair.differences() == [])


# A running stream


@pytest.fixture(scope="module")
def live(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    """A pair in step, in its second epoch."""
    pair = TwoNodes(stack, tmp_path_factory.mktemp("live"), TABLES)
    try:
        pair.create(PUBLISHED, copy=False)
        pair.start()
        pair.a.execute("INSERT INTO t VALUES (0, 'first epoch'); INSERT INTO u VALUES (0, 'first epoch')")
        pair.wait_in_step()
        pair.a.stop("producer")
        pair.a.start("producer")
        yield pair
    finally:
        pair.end()


def _entries_of_an_ended_epoch(pair: TwoNodes) -> None:
    records = [r for r in _audit(pair) if entry_of(r).chain == pair.chain and entry_of(r).epoch == 1]
    assert {entry_of(r).event_type for r in records} >= {"epoch_opened", "replication_batch"}
    append(pair.a.kafka, records)


def _true_announcements(pair: TwoNodes) -> None:
    append(pair.a.kafka, [r for r in read_topics(pair.a.kafka, pair.cluster) if r.topic.endswith(".keys")])


def _tombstones(pair: TwoNodes) -> None:
    records = read_topics(pair.a.kafka, pair.cluster)
    keyed = [r for r in records if r.topic.endswith((".keys", ".audit")) and r.value is not None]
    append(pair.a.kafka, [replace(r, value=None) for r in keyed])


def _another_partition(pair: TwoNodes) -> None:
    topic = names.data_topic(pair.cluster, pair.chain, "public", "t")
    admin = AdminClient({"bootstrap.servers": pair.a.kafka})
    admin.create_partitions([NewPartitions(topic, 2)])[topic].result(20)
    until(lambda: cluster_topics(pair.a.kafka, pair.cluster)[topic] == 2)
    append(pair.a.kafka, [Record(topic, 1, 0, None, b"forged")])


def _a_chain_nobody_has(pair: TwoNodes) -> None:
    append(pair.a.kafka, [forged_entry(_audit(pair)[0], chain="strange.node-x")])


def _forged_acknowledgements(pair: TwoNodes) -> None:
    acks = [r for r in _audit(pair) if entry_of(r).chain == names.ack_chain(pair.chain, "node-b")]
    last = entry_of(acks[-1])
    fields = {"sequence": last.sequence + 1, "ref_sequence": last.ref_sequence + 1, "batch": last.batch + 1}
    append(pair.a.kafka, [forged_entry(acks[-1], claim_pinned=claim, **fields) for claim in (False, True)])


def _group_set_back(pair: TwoNodes) -> None:
    """The group's offsets, which only lag tools read; B starts anew with them."""
    pair.b.stop("consumer")
    places = [
        TopicPartition(names.data_topic(pair.cluster, pair.chain, "public", "t"), 0, 0),
        TopicPartition(names.audit_topic(pair.cluster), 0, 0),
    ]
    group = ConsumerGroupTopicPartitions(names.group_id(pair.cluster, pair.chain, "node-b"), places)
    admin = AdminClient({"bootstrap.servers": pair.a.kafka})
    for future in admin.alter_consumer_group_offsets([group]).values():
        future.result(20)
    pair.b.start("consumer")


def _audit(pair: TwoNodes) -> list[Record]:
    records = read_topics(pair.a.kafka, pair.cluster)
    return [r for r in records if r.topic.endswith(".audit") and r.value is not None]


WITHOUT_EFFECT: dict[str, Callable[[TwoNodes], None]] = {
    "entries of an ended epoch are sent again": _entries_of_an_ended_epoch,
    "true key announcements are sent again": _true_announcements,
    "entries of a chain nobody has are appended": _a_chain_nobody_has,
    "acknowledgements of the target are forged": _forged_acknowledgements,
    "every entry and key announcement gets a tombstone": _tombstones,
    "the group's offsets are set back": _group_set_back,
    "a data topic gets another partition with forged records": _another_partition,
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("attack", list(WITHOUT_EFFECT))
def test_what_has_no_meaning_is_passed_over_and_the_stream_goes_on(live: TwoNodes, attack: str) -> None:
    WITHOUT_EFFECT[attack](live)
    number = list(WITHOUT_EFFECT).index(attack) + 1
    live.a.execute(f"INSERT INTO t VALUES ({number}, 'after'); UPDATE u SET v = 'after {number}'")
    live.wait_in_step(timeout=60)
    assert live.differences() == []
    assert live.a.query("SELECT mismatch FROM vsql_sync.stream_targets WHERE target = 'node-b'") == [(None,)]


@pytest.mark.timeout(300)
def test_a_data_topic_deleted_under_a_running_stream_is_missed_and_nothing_after_it_applied(
    live: TwoNodes,
) -> None:
    topic = names.data_topic(live.cluster, live.chain, "public", "u")
    admin = AdminClient({"bootstrap.servers": live.a.kafka})
    live.b.stop("consumer")
    sent = _manifests(live)
    live.a.execute("INSERT INTO u VALUES (50, 'in the topic that goes')")
    until(lambda: _manifests(live) > sent)
    admin.delete_topics([topic])[topic].result(20)
    until(lambda: topic not in cluster_topics(live.a.kafka, live.cluster))
    live.b.start("consumer")
    assert topic in _said(live, "refused")
    live.a.execute("INSERT INTO u VALUES (51, 'in the one that is made anew')")
    until(lambda: topic in cluster_topics(live.a.kafka, live.cluster), 90)
    live.b.query("DELETE FROM vsql_sync.stream_status")
    assert topic in _said(live, "refused", "diverged")
    assert live.b.query("SELECT count(*) FROM u WHERE id >= 50") == [(0,)]


@pytest.mark.timeout(300)
def test_what_is_appended_to_the_live_topics_is_refused_until_an_operator_decides(pairs: Pairs) -> None:
    pair = pairs(TABLES)
    pair.create(PUBLISHED)
    pair.start()
    pair.a.execute("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 10) g")
    pair.wait_in_step()
    records = read_topics(pair.a.kafka, pair.cluster)
    victim = [r for r in records if r.topic.endswith(".t")][-1]
    append(pair.a.kafka, [replace(victim, value=(victim.value or b"")[:-7] + b"forged!")])
    pair.a.execute("INSERT INTO t SELECT g, 'x' FROM generate_series(11, 20) g")
    said = _said(pair, "refused")
    where = re.search(r"([a-z0-9.-]+\.t)\D+(\d+)\D+(\d+)", said)
    assert where, said
    assert pair.b.query("SELECT count(*) FROM t") == [(10,)]
    pair.b.ctl(
        "stream", "ignore-record", "--chain", pair.chain, "--record", "/".join(where.groups()),
        "--reason", "forged", "--yes",
    )  # fmt: skip
    pair.wait_in_step(timeout=60)
    assert pair.differences() == []
    assert pair.b.ctl("audit", "verify").returncode == 0
    pair.stop()
