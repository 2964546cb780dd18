"""What the owner of the broker can do to the topics; node B refuses it, names it, applies nothing.

One pair of nodes; B is stopped while A writes, the topics are copied to a second broker with one alteration
to the first records B has not seen, B reads that copy. A refusal leaves B's progress where it was, so every
attack starts from the same point.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient

from tests.nodes import TwoNodes
from tests.pairs import Pairs
from tests.stack import KafkaBroker, Stack
from tests.streams import Record, append, cluster_topics, copy_topics, create_like, read_topics

pytestmark = pytest.mark.topology

TABLES = "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE u (id int PRIMARY KEY, v text);"
Change = Callable[[list[Record], int], list[Record]]


@dataclass
class Scene:
    """The pair, the second broker, and the true records; `seen` is how many B had applied already."""

    pair: TwoNodes
    other: KafkaBroker
    records: list[Record]
    seen: dict[tuple[str, int], int]
    rows_before: list[tuple[Any, ...]]

    def new(self, suffix: str) -> list[int]:
        """Positions (in `records`) of records of a topic B has not read yet."""
        return [
            i
            for i, r in enumerate(self.records)
            if r.topic.endswith(suffix) and r.offset >= self.seen.get((r.topic, r.partition), 0)
        ]


@pytest.fixture(scope="module")
def scene(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Both nodes in step; then B stopped, and three batches of A's in Kafka that B has not seen."""
    pair = TwoNodes(stack, tmp_path_factory.mktemp("tamper"), TABLES)
    pair.create(["t(*)", "u(*)"])
    pair.start()
    pair.a.execute("INSERT INTO t SELECT g, 'before' FROM generate_series(1, 100) g")
    pair.wait_in_step()
    pair.b.stop("consumer")
    seen = {(r.topic, r.partition): r.offset + 1 for r in read_topics(pair.a.kafka, pair.cluster)}
    for step in range(3):
        head = pair.heads()[0]
        pair.a.execute(
            f"INSERT INTO t SELECT {step + 1} * 1000 + g, 'after' FROM generate_series(1, 150) g;"
            f"INSERT INTO u SELECT {step + 1} * 1000 + g, 'after' FROM generate_series(1, 150) g;"
        )
        deadline = time.monotonic() + 30
        while pair.heads()[0] == head and time.monotonic() < deadline:
            time.sleep(0.05)
    records = read_topics(pair.a.kafka, pair.cluster)
    other = stack.own_kafka()
    yield Scene(pair, other, records, seen, _rows(pair))
    pair.end()


def _rows(pair: TwoNodes) -> list[tuple[Any, ...]]:
    return pair.b.query("SELECT 't', count(*), sum(id) FROM t UNION ALL SELECT 'u', count(*), sum(id) FROM u")


def _flip_tuple(scene: Scene) -> list[Record]:
    i = scene.new(".t")[0]
    return [r.flip(len(r.value or b"") - 30) if n == i else r for n, r in enumerate(scene.records)]


def _flip_header(scene: Scene) -> list[Record]:
    i = scene.new(".t")[0]
    return [r.flip(8, 1) if n == i else r for n, r in enumerate(scene.records)]


def _drop(suffix: str) -> Callable[[Scene], list[Record]]:
    def change(scene: Scene) -> list[Record]:
        i = scene.new(suffix)[0]
        return [r for n, r in enumerate(scene.records) if n != i]

    return change


def _swap(suffix: str) -> Callable[[Scene], list[Record]]:
    def change(scene: Scene) -> list[Record]:
        i, j = scene.new(suffix)[:2]
        records = list(scene.records)
        records[i], records[j] = records[j], records[i]
        return records

    return change


def _repeat_inside(suffix: str) -> Callable[[Scene], list[Record]]:
    def change(scene: Scene) -> list[Record]:
        i = scene.new(suffix)[0]
        return scene.records[: i + 1] + [scene.records[i]] * 2 + scene.records[i + 1 :]

    return change


def _replay_old_pack(scene: Scene) -> list[Record]:
    old = next(r for r in scene.records if r.topic.endswith(".t"))
    i = scene.new(".t")[0]
    return [*scene.records[:i], old, *scene.records[i:]]


def _move_to_other_table(scene: Scene) -> list[Record]:
    i, j = scene.new(".t")[0], scene.new(".u")[0]
    return [replace(scene.records[i], topic=r.topic) if n == j else r for n, r in enumerate(scene.records)]


def _flip_manifest(scene: Scene) -> list[Record]:
    i = scene.new(".audit")[0]
    return [r.flip(200, 3) if n == i else r for n, r in enumerate(scene.records)]


def _forge_manifest(scene: Scene) -> list[Record]:
    i = scene.new(".audit")[0]
    forged = scene.records[i].flip(len(scene.records[i].value or b"") - 5)
    return [*scene.records[:i], forged, *scene.records[i:]]


def _garbage(suffix: str) -> Callable[[Scene], list[Record]]:
    def change(scene: Scene) -> list[Record]:
        i = scene.new(suffix)[0]
        return [*scene.records[:i], replace(scene.records[i], value=b"\x00garbage" * 9), *scene.records[i:]]

    return change


def _flip_announcement(scene: Scene) -> list[Record]:
    # Every one: which of them is the live stream's, and not the first copy's, is nobody's to know here.
    return [r.flip(len(r.value or b"") // 2) if r.topic.endswith(".keys") else r for r in scene.records]


def _drop_announcements(scene: Scene) -> list[Record]:
    return [r for r in scene.records if not r.topic.endswith(".keys")]


ATTACKS: dict[str, tuple[Callable[[Scene], list[Record]], str]] = {
    "a bit of a sealed tuple is changed": (_flip_tuple, r"\.t"),
    "a bit of a pack's clear header is changed": (_flip_header, r"\.t"),
    "a pack is dropped": (_drop(".t"), r"\.t|sequence|batch"),
    "two packs change places": (_swap(".t"), r"\.t"),
    "a pack is there three times": (_repeat_inside(".t"), r"\.t"),
    "an old pack is replayed": (_replay_old_pack, r"\.t"),
    "a pack is moved to another table's topic": (_move_to_other_table, r"\.u|\.t"),
    "bytes that are no pack are inserted": (_garbage(".t"), r"\.t"),
    "a bit of a manifest is changed": (_flip_manifest, r"audit"),
    "a manifest is dropped": (_drop(".audit"), r"audit"),
    "two manifests change places": (_swap(".audit"), r"audit"),
    "a forged manifest is appended": (_forge_manifest, r"audit"),
    "bytes that are no entry are inserted": (_garbage(".audit"), r"audit"),
    "a bit of a key announcement is changed": (_flip_announcement, r"keys"),
    "all key announcements are dropped": (_drop_announcements, r"key|announce"),
}


def _refusal(pair: TwoNodes, timeout: float = 45) -> str:
    """What B's consumer says it refused; fails when it applied instead."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        rows = pair.b.query(
            "SELECT coalesce(detail->'refused'->>'error', '')"
            " || ' [' || coalesce(detail->'refused'->>'record', '')"
            " || ']' FROM vsql_sync.stream_status WHERE chain = %s AND direction = 'in' AND state = 'refused'"
            " AND updated_at > now() - interval '5 seconds'",
            pair.chain,
        )  # fmt: skip
        if rows:
            return str(rows[0][0])
        time.sleep(0.2)
    raise AssertionError(f"not refused within {timeout} s\n{pair.b.tail('consumer')}")


def _clear_broker(broker: KafkaBroker, cluster: str) -> None:
    admin = AdminClient({"bootstrap.servers": broker.bootstrap_servers})
    names = list(cluster_topics(broker.bootstrap_servers, cluster))
    if names:
        for future in admin.delete_topics(names).values():
            future.result(20)
    deadline = time.monotonic() + 20
    while cluster_topics(broker.bootstrap_servers, cluster) and time.monotonic() < deadline:
        time.sleep(0.1)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("attack", list(ATTACKS))
def test_an_altered_copy_of_the_topics_is_refused_and_nothing_of_the_batch_applied(
    scene: Scene, attack: str
) -> None:
    change, names = ATTACKS[attack]
    pair, other = scene.pair, scene.other
    _clear_broker(other, pair.cluster)
    create_like(pair.a.kafka, other.bootstrap_servers, pair.cluster)
    append(other.bootstrap_servers, change(scene))
    true_config = pair.b.config.read_text()
    pair.b.query("DELETE FROM vsql_sync.stream_status")
    pair.b.config.write_text(true_config.replace(pair.b.kafka, other.bootstrap_servers))
    try:
        pair.b.start("consumer")
        said = _refusal(pair)
        assert re.search(names, said), said
        assert _rows(pair) == scene.rows_before
    finally:
        if "consumer" in pair.b.services:
            pair.b.stop("consumer")
        pair.b.config.write_text(true_config)


@pytest.mark.timeout(120)
def test_what_is_appended_to_the_live_topics_is_refused_until_an_operator_decides(pairs: Pairs) -> None:
    pair = pairs(TABLES)
    pair.create(["t(*)", "u(*)"])
    pair.start()
    pair.a.execute("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 10) g")
    pair.wait_in_step()
    records = read_topics(pair.a.kafka, pair.cluster)
    victim = [r for r in records if r.topic.endswith(".t")][-1]
    append(pair.a.kafka, [replace(victim, value=(victim.value or b"")[:-7] + b"forged!")])
    pair.a.execute("INSERT INTO t SELECT g, 'x' FROM generate_series(11, 20) g")
    said = _refusal(pair)
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


@pytest.mark.timeout(120)
def test_an_unaltered_copy_on_another_broker_is_applied(scene: Scene) -> None:
    """The control: what the attacks are refused for is the alteration, not the copying."""
    pair, other = scene.pair, scene.other
    _clear_broker(other, pair.cluster)
    copy_topics(pair.a.kafka, other.bootstrap_servers, pair.cluster)
    ends = {(r.topic, r.partition): r.offset for r in read_topics(other.bootstrap_servers, pair.cluster)}
    assert ends == {(r.topic, r.partition): r.offset for r in scene.records}
