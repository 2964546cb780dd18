"""A publication that is applied partitioned: members added and killed under load; order per row kept.

Starting two nodes takes longer than most tests here: those that leave the stream as they found it share a
pair (`pair`), the others make one of their own (`pairs`).
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from confluent_kafka.admin import AdminClient

from tests.nodes import Node, TwoNodes
from tests.pairs import Pairs
from tests.stack import Stack, kill_tree, spawn
from tests.streams import Record, append, cluster_topics, read_topics
from tests.waiting import until
from vsql_shared.audit.rows import parse

pytestmark = pytest.mark.topology

TABLES = """
CREATE TABLE t (id int PRIMARY KEY, version int NOT NULL, v text);
CREATE TABLE u (a int, b text, version int NOT NULL, PRIMARY KEY (a, b));
"""
ALTERED = "CREATE TABLE altered (id int PRIMARY KEY, v text);"
PARTITIONED = ("--apply", "partitioned")
MEMBERS = {"VSQL_SYNC__KAFKA__PARTITIONS": "4", "VSQL_SYNC__APPLY__MEMBERS": "2"}
_CHANGE = re.compile(r"table public\.(t|u): (INSERT|UPDATE|DELETE): (.*)")
_VERSION = re.compile(r"version\[integer\]:(\d+)")
_KEY = {"t": re.compile(r"id\[integer\]:\d+"), "u": re.compile(r"a\[integer\]:\d+ b\[text\]:'[^']*'")}


def make(pairs: Pairs, tables: str = TABLES, **env: str) -> TwoNodes:
    """Both nodes, made; their services get the environment."""
    pair = pairs(tables)
    for node in (pair.a, pair.b):
        node.env = {**MEMBERS, **env}
    return pair


class Shared:
    """The pair that tests share: made for the first of them, and anew after one that failed."""

    def __init__(self, stack: Stack, folders: pytest.TempPathFactory) -> None:
        self._stack, self._folders = stack, folders
        self._pair: TwoNodes | None = None

    def pair(self) -> TwoNodes:
        """The pair, running."""
        if self._pair is None:
            made = TwoNodes(self._stack, self._folders.mktemp("shared"), TABLES + ALTERED)
            self._pair = made
            for node in (made.a, made.b):
                node.env = {**MEMBERS, "VSQL_SYNC__LIMITS__RETRY_BACKOFF_MAX_MS": "300"}
            made.create(["t(*)", "u(*)", "altered(*)"], copy=False, publication_args=PARTITIONED)
            made.start()
        return self._pair

    def end(self) -> None:
        """Kill its services."""
        if self._pair is not None:
            self._pair.end()
            self._pair = None


@pytest.fixture(scope="module")
def shared(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """What `pair` lends."""
    found = Shared(stack, tmp_path_factory)
    yield found
    found.end()


@pytest.fixture
def pair(shared: Shared, request: pytest.FixtureRequest) -> Iterator[TwoNodes]:
    """Two nodes in step, of empty tables; others had them before."""
    failed, found = request.session.testsfailed, shared.pair()
    found.a.execute("TRUNCATE t, u, altered")
    found.wait_in_step()
    yield found
    if request.session.testsfailed > failed:
        shared.end()


def load(conninfo: str, over: threading.Event, seed: int, made: list[int]) -> None:
    """Transactions over rows of both tables until told to stop: each change raises its row's version.

    With pauses: the services need the processors more.
    """
    random_ = random.Random(seed)
    with psycopg.connect(conninfo) as conn:
        while not over.is_set():
            for _ in range(random_.randint(1, 12)):
                row = random_.randrange(300)
                conn.execute(
                    "INSERT INTO t VALUES (%s, 1, 'x')"
                    " ON CONFLICT (id) DO UPDATE SET version = t.version + 1",
                    (row,),
                )
                conn.execute(
                    "INSERT INTO u VALUES (%s, 'k', 1)"
                    " ON CONFLICT (a, b) DO UPDATE SET version = u.version + 1",
                    (row,),
                )
            made[0] += 1
            conn.commit()
            over.wait(0.005)


def unanswered(pair: TwoNodes) -> int:
    """Changes of A's batches that B has neither acknowledged nor, by an operator's decision, skipped."""
    skipped = "SELECT coalesce(sum(row_count), 0) FROM vsql_sync.vsql_sync_audit WHERE event_type = %s"
    passed = int(pair.b.query(skipped, "batch_skipped")[0][0])
    return pair.audited_rows() - pair.acknowledged_rows() - passed


def marked(pair: TwoNodes) -> tuple[int, int]:
    """(batches of the source that members may apply, all of them)."""
    found = pair.a.query(
        'SELECT count(*) FILTER (WHERE position(\'"order":"row"\'::bytea in document) > 0), count(*)'
        " FROM vsql_sync.vsql_sync_audit WHERE event_type = 'replication_batch' AND chain = 'pub.node-a'"
    )
    return found[0][0], found[0][1]


def decode(node: Node) -> list[str]:
    """What was written on a node since its slot was made, in the order of its commits."""
    changes = "SELECT data FROM pg_logical_slot_get_changes('seen_' || current_database(), NULL, NULL)"
    return [row[0] for row in node.query(changes)]


def require_order(changes: list[str]) -> int:
    """Each row's versions only grow; how many changes there were."""
    last: dict[tuple[str, str], int] = {}
    count = 0
    for text in changes:
        match = _CHANGE.fullmatch(text)
        if match is None or match[2] == "DELETE":
            continue
        key, version = _KEY[match[1]].search(match[3]), _VERSION.search(match[3])
        assert key is not None
        assert version is not None
        place = (match[1], key[0])
        assert int(version[1]) > last.get(place, 0), f"{text} after version {last.get(place)}"
        last[place] = int(version[1])
        count += 1
    return count


def owners(pair: TwoNodes) -> dict[int, int | None]:
    """Share → member."""
    return dict(pair.b.query("SELECT share, member FROM vsql_sync.shares"))


def members(node: Node) -> list[int]:
    """Processes of members of a node's consumer service."""
    return [one.pid for one in node.processes("consumer") if "--member" in one.cmdline()]


Second = Callable[[Node], None]


@pytest.fixture
def second(tmp_path: Path) -> Iterator[Second]:
    """Start a second consumer service of a node, as another host would: it stands by, its members do not."""
    started: list[subprocess.Popen[bytes]] = []

    def start(node: Node) -> None:
        config, log = tmp_path / "second.toml", tmp_path / f"second-{len(started)}.log"
        text = node.config.read_text().replace(f"{node.name}-state", f"{node.name}-state-2")
        config.write_text(text.replace("[server]\n", "[server]\nstandby = true\n"))
        command = [sys.executable, "-m", "vsql_consumers", "--config", str(config)]
        started.append(spawn(command, log=log, env=node.env))
        until(lambda: "standing by: another" in log.read_text(), tell=log.read_text)

    yield start
    for process in started:
        kill_tree(process)


@pytest.mark.timeout(240)
def test_members_are_added_and_killed_under_load_and_each_row_keeps_its_order(
    pairs: Pairs, second: Second
) -> None:
    pair = make(pairs)
    pair.create(["t(*)", "u(*)"], publication_args=PARTITIONED)
    pair.b.query("SELECT pg_create_logical_replication_slot('seen_' || current_database(), 'test_decoding')")
    pair.start()
    pair.wait_in_step()
    over, made = threading.Event(), [0]
    loading = threading.Thread(target=load, args=(pair.a.conninfo, over, 5, made))
    loading.start()
    try:
        until(lambda: set(owners(pair).values()) == {0, 1}, tell=lambda: pair.b.tail("consumer"))
        os.kill(members(pair.b)[0], signal.SIGKILL)
        second(pair.b)
        until(lambda: len(set(owners(pair).values())) == 4, tell=lambda: pair.b.tail("consumer"))
        os.kill(members(pair.b)[-1], signal.SIGKILL)
        before = made[0]
        until(lambda: made[0] > before + 200)
    finally:
        over.set()
        loading.join()
    pair.wait_in_step(timeout=60)
    assert pair.differences() == []
    # The entries follow the commit they are about.
    until(lambda: unanswered(pair) == 0, 20, lambda: pair.b.tail("consumer"))
    assert require_order(decode(pair.b)) > 100
    assert pair.b.query("SELECT count(*) FROM vsql_sync.anomalies") == [(0,)]
    assert pair.b.query("SELECT count(*) FROM vsql_sync.part_receipts") == [(0,)]
    for node in (pair.a, pair.b):
        assert node.ctl("audit", "verify").returncode == 0


@pytest.mark.timeout(180)
def test_what_needs_the_order_of_the_source_is_applied_alone_between_the_others(pairs: Pairs) -> None:
    pair = make(pairs, VSQL_SYNC__LIMITS__BATCH_LINGER_MS="0", VSQL_SYNC__LIMITS__BATCH_MAX_ROWS="50")
    pair.create(["t(*)", "u(*)"], copy=False, publication_args=PARTITIONED)
    pair.start()
    pair.wait_in_step()
    with psycopg.connect(pair.a.conninfo, autocommit=True) as conn:
        for number in range(30):
            conn.execute(
                "INSERT INTO t SELECT n, 1, 'x' FROM generate_series(%s::int, %s::int) n",
                (number * 40, number * 40 + 39),
            )
            conn.execute("UPDATE t SET id = id + 100000 WHERE id = %s", (number * 40,))
            if number % 10 == 5:
                conn.execute("TRUNCATE t, u")
            if number % 10 == 7:
                conn.execute(
                    "INSERT INTO u SELECT n, 'large', 1 FROM generate_series(1, 300) n ON CONFLICT DO NOTHING"
                )
            if number == 15:
                conn.execute("ALTER TABLE t ADD COLUMN later int")
                pair.b.execute("ALTER TABLE t ADD COLUMN later int")
            conn.execute("DELETE FROM t WHERE id % 7 = 3")
    pair.wait_in_step(timeout=60)
    assert pair.differences() == []
    # The entries follow the commit they are about.
    until(lambda: unanswered(pair) == 0, 20, lambda: pair.b.tail("consumer"))
    by_row, all_of_them = marked(pair)
    assert 0 < by_row < all_of_them
    assert pair.b.query("SELECT count(*) FROM vsql_sync.anomalies") == [(0,)]


@pytest.mark.timeout(120)
def test_one_who_applies_whole_transactions_takes_the_same_stream(pairs: Pairs) -> None:
    pair = make(pairs)
    pair.create(["t(*)", "u(*)"], copy=False, publication_args=PARTITIONED)
    pair.b.query("UPDATE vsql_sync.streams SET apply_mode = 'transactional'")
    pair.start()
    over, made = threading.Event(), [0]
    loading = threading.Thread(target=load, args=(pair.a.conninfo, over, 6, made))
    loading.start()
    try:
        until(lambda: made[0] > 100)
    finally:
        over.set()
        loading.join()
    pair.wait_in_step(timeout=60)
    assert pair.differences() == []
    assert marked(pair)[0] > 0
    assert pair.b.query("SELECT count(*) FROM vsql_sync.shares") == [(0,)]


def _blocked(node: Node) -> dict[str, Any]:
    """What a blocked or refused stream says of itself; empty while it is neither."""
    rows = node.query(
        "SELECT coalesce(detail -> 'blocked', detail -> 'refused') FROM vsql_sync.stream_status"
        " WHERE chain = 'pub.node-a' AND state IN ('blocked', 'refused')"
    )
    return dict(rows[0][0]) if rows else {}


@pytest.mark.timeout(180)
def test_a_row_that_does_not_fit_stops_its_share_by_name_and_goes_on_when_it_does(pair: TwoNodes) -> None:
    pair.b.execute("ALTER TABLE t ADD CONSTRAINT small CHECK (version < 1000)")
    with psycopg.connect(pair.a.conninfo, autocommit=True) as conn:
        conn.execute("INSERT INTO t SELECT n, 1, 'x' FROM generate_series(1, 100) n")
        conn.execute("UPDATE t SET version = 5000 WHERE id = 7")
        conn.execute("UPDATE t SET v = 'after' WHERE id <> 7")
    said = until(lambda: _blocked(pair.b), tell=lambda: pair.b.tail("consumer"))
    assert said["sqlstate"] == "23514"
    # The other shares go on; those of one member in a batch stop together, so half of the rows, as keys fall.
    until(lambda: pair.b.query("SELECT count(*) FROM t WHERE v = 'after'")[0][0] > 10)
    pair.b.execute("ALTER TABLE t DROP CONSTRAINT small")
    pair.b.ctl("stream", "retry", "--chain", pair.chain, "--reason", "widened")
    pair.wait_in_step(timeout=60)
    assert pair.differences() == []
    until(lambda: unanswered(pair) == 0, 20, lambda: pair.b.tail("consumer"))
    assert pair.b.query("SELECT count(*) FROM vsql_sync.shares WHERE stopped_at IS NOT NULL") == [(0,)]


@pytest.mark.timeout(180)
def test_a_transaction_that_is_skipped_is_skipped_in_its_share_and_acknowledged_so(pair: TwoNodes) -> None:
    pair.b.execute("ALTER TABLE t ADD CONSTRAINT small CHECK (version < 1000)")
    with psycopg.connect(pair.a.conninfo, autocommit=True) as conn:
        conn.execute("INSERT INTO t SELECT n, 1, 'x' FROM generate_series(1, 100) n")
        conn.execute("UPDATE t SET version = 5000 WHERE id = 7")
        conn.execute("UPDATE t SET v = 'after' WHERE id <> 7")
    said = until(lambda: _blocked(pair.b), tell=lambda: pair.b.tail("consumer"))
    pair.b.ctl(
        "stream", "skip", "--chain", pair.chain, "--transaction", said["transaction"]["lsn"],
        "--reason", "not ours", "--yes",
    )  # fmt: skip
    pair.wait_in_step(timeout=60)
    assert [row[0] for row in pair.b.query("SELECT version FROM t WHERE id = 7")] == [1]
    assert pair.b.query("SELECT count(*) FROM t WHERE v = 'after'") == [(99,)]
    until(lambda: unanswered(pair) == 0, 20, lambda: pair.b.tail("consumer"))
    assert pair.b.ctl("audit", "verify").returncode == 0
    pair.b.execute("ALTER TABLE t DROP CONSTRAINT small")


def _last_pack(pair: TwoNodes) -> Record:
    """The last of t's partition 2: of the epoch that is open."""
    packs = [
        record for record in read_topics(pair.a.kafka, pair.cluster)
        if record.topic.endswith(".public.t") and record.partition == 2
    ]  # fmt: skip
    return max(packs, key=lambda record: record.offset)


@pytest.mark.timeout(180)
def test_a_record_slipped_into_one_partition_is_refused_by_name(pair: TwoNodes) -> None:
    pair.a.execute("INSERT INTO t SELECT n, 1, 'x' FROM generate_series(1, 100) n")
    pair.wait_in_step()
    until(lambda: len(set(owners(pair).values())) == 2)
    pack = _last_pack(pair)
    append(pair.a.kafka, [pack])
    pair.a.execute("UPDATE t SET version = 2")
    said = until(lambda: _blocked(pair.b), tell=lambda: pair.b.tail("consumer"))
    assert said["record"].startswith(f"{pack.topic}/2/")
    _ignore(pair, said["record"])
    pair.wait_in_step(timeout=60)
    assert pair.differences() == []


def _ignore(pair: TwoNodes, record: str) -> None:
    """An operator has the stream pass over a record."""
    pair.b.ctl(
        "stream", "ignore-record", "--chain", pair.chain, "--record", record,
        "--reason", "replayed by hand", "--yes",
    )  # fmt: skip


def _slip_in(pair: TwoNodes) -> str:
    """Replay a pack of t's partition 2, and wait until its member has left the share; the topic."""
    pack = _last_pack(pair)
    append(pair.a.kafka, [pack])
    left = "SELECT share FROM vsql_sync.shares WHERE stopped_at IS NOT NULL"
    assert until(lambda: pair.b.query(left), tell=lambda: pair.b.tail("consumer")) == [(2,)]
    return pack.topic


@pytest.mark.timeout(180)
def test_a_record_slipped_in_is_refused_at_the_first_batch_that_has_rows_there(pair: TwoNodes) -> None:
    pair.a.execute("INSERT INTO t SELECT n, 1, 'x' FROM generate_series(1, 100) n")
    pair.wait_in_step()
    until(lambda: len(set(owners(pair).values())) == 2)
    topic = _slip_in(pair)
    # The next entry has nothing of that share's.
    pair.a.execute("TRUNCATE u")
    pair.wait_in_step()
    pair.a.execute("UPDATE t SET version = 2")
    said = until(lambda: _blocked(pair.b), tell=lambda: pair.b.tail("consumer"))
    assert said["record"].startswith(f"{topic}/2/")
    assert said["sequence"] == pair.heads()[1] + 1
    _ignore(pair, said["record"])
    pair.wait_in_step(timeout=60)
    assert pair.differences() == []


@pytest.mark.timeout(180)
def test_a_skipped_batch_is_acknowledged_with_what_members_have_applied_of_it(pair: TwoNodes) -> None:
    pair.a.execute("INSERT INTO t SELECT n, 1, 'x' FROM generate_series(1, 100) n")
    pair.wait_in_step()
    until(lambda: len(set(owners(pair).values())) == 2)
    _slip_in(pair)
    pair.a.execute("UPDATE t SET version = 2")
    said = until(lambda: _blocked(pair.b), tell=lambda: pair.b.tail("consumer"))
    updated = "SELECT count(*) FILTER (WHERE version = 2) FROM t"
    others = "SELECT count(*) FROM vsql_sync.shares WHERE sequence >= %s"
    until(lambda: pair.b.query(others, said["sequence"]) == [(3,)])
    applied = pair.b.query(updated)[0][0]
    assert 0 < applied < 100
    pair.b.ctl(
        "stream", "skip-batch", "--chain", pair.chain, "--sequence", str(said["sequence"]),
        "--reason", "replayed by hand", "--yes",
    )  # fmt: skip
    pair.wait_in_step(timeout=60)
    signed = "SELECT document FROM vsql_sync.vsql_sync_audit WHERE event_type = 'batch_skipped'"
    ((document,),) = until(lambda: pair.b.query(signed), tell=lambda: pair.b.tail("consumer"))
    entry = parse(bytes(document)).entry
    assert dict(entry.verdicts) == {"applied": applied, "skipped": 100 - applied}
    assert json.loads(entry.detail) == {"partitions_applied": [0, 1, 3]}
    assert pair.b.query(updated) == [(applied,)]
    # Behind it the share goes on.
    pair.a.execute("UPDATE t SET version = 3")
    pair.wait_in_step(timeout=60)
    assert pair.differences() == []
    assert pair.b.ctl("audit", "verify").returncode == 0


@pytest.mark.timeout(180)
def test_what_a_member_lacks_is_said_by_the_stream_which_goes_on_when_it_is_there(pair: TwoNodes) -> None:
    pair.b.execute("ALTER TABLE t RENAME TO hidden")
    pair.a.execute("INSERT INTO t SELECT n, 1, 'x' FROM generate_series(1, 100) n")
    pair.a.execute("UPDATE t SET version = 2")
    said = (
        "SELECT detail ->> 'last_error' FROM vsql_sync.stream_status"
        " WHERE chain = 'pub.node-a' AND position('public.t' in detail ->> 'last_error') > 0"
    )
    until(lambda: pair.b.query(said), 30, tell=lambda: pair.b.tail("consumer"))
    pair.b.execute("ALTER TABLE hidden RENAME TO t")
    pair.wait_in_step(timeout=60)
    assert pair.differences() == []


@pytest.mark.timeout(120)
def test_where_the_target_binds_rows_members_wait_as_the_stream_does(pair: TwoNodes) -> None:
    pair.a.execute("INSERT INTO t SELECT n, 1, n FROM generate_series(1, 100) n")
    pair.wait_in_step()
    pair.b.stop("consumer")
    pair.b.execute("CREATE UNIQUE INDEX one ON t (v)")
    pair.b.start("consumer")
    until(lambda: "one binds rows" in pair.b.tail("consumer", 200), tell=lambda: pair.b.tail("consumer"))
    pair.a.execute("UPDATE t SET version = 2")
    until(lambda: pair.heads()[0] > pair.heads()[1])
    time.sleep(2)
    assert pair.b.query("SELECT count(*) FROM t WHERE version = 2") == [(0,)]
    pair.b.execute("DROP INDEX one")
    pair.wait_in_step(timeout=60)
    assert pair.differences() == []


@pytest.mark.timeout(120)
def test_a_table_that_gets_another_unique_index_is_applied_alone_from_then_on(pair: TwoNodes) -> None:
    pair.a.execute("INSERT INTO altered SELECT n, n FROM generate_series(1, 100) n")
    pair.wait_in_step()
    before = marked(pair)
    assert before[0] > 0
    pair.a.execute("CREATE UNIQUE INDEX one ON altered (v)")
    pair.a.execute("UPDATE altered SET v = v || 'x' WHERE id < 50")
    pair.wait_in_step()
    after = marked(pair)
    assert after[1] > before[1]
    assert after[0] == before[0]
    assert pair.differences() == []


@pytest.mark.timeout(180)
@pytest.mark.parametrize("point", ["consumer.before-apply-commit", "consumer.after-apply-commit"])
def test_whoever_dies_around_his_commit_is_followed_exactly(pair: TwoNodes, point: str) -> None:
    pair.b.stop("consumer")
    # Coordinator and members, each at its third commit, and each again.
    pair.b.start("consumer", {"VSQL_SYNC_ALLOW_FAILPOINTS": "1", "VSQL_SYNC_FAILPOINTS": f"{point}=kill:3"})
    died = f'"failpoint": "{point}"'
    over, made = threading.Event(), [0]
    loading = threading.Thread(target=load, args=(pair.a.conninfo, over, 7, made))
    loading.start()
    try:
        until(lambda: pair.b.tail("consumer", 900).count(died) >= 6, 60, lambda: pair.b.tail("consumer"))
    finally:
        over.set()
        loading.join()
    kill_tree(pair.b.services.pop("consumer"))
    pair.b.start("consumer")
    pair.wait_in_step(timeout=60)
    assert pair.differences() == []
    until(lambda: unanswered(pair) == 0, 20, lambda: pair.b.tail("consumer"))
    assert pair.b.query("SELECT count(*) FROM vsql_sync.anomalies") == [(0,)]
    assert pair.b.ctl("audit", "verify").returncode == 0


@pytest.mark.timeout(180)
def test_a_topic_that_is_gone_is_refused_by_name(pair: TwoNodes, shared: Shared) -> None:
    pair.b.stop("consumer")
    before = marked(pair)[0]
    pair.a.execute("INSERT INTO t SELECT n, 1, 'x' FROM generate_series(1, 100) n")
    until(lambda: marked(pair)[0] > before)
    pair.a.stop("producer")
    topic = next(name for name in cluster_topics(pair.a.kafka, pair.cluster) if name.endswith(".public.t"))
    admin = AdminClient({"bootstrap.servers": pair.a.kafka})  # named: the answer comes while it lives
    admin.delete_topics([topic])[topic].result(20)
    pair.b.start("consumer")
    said = until(lambda: _blocked(pair.b), tell=lambda: pair.b.tail("consumer"))
    assert said["record"].startswith(f"{topic}/")
    shared.end()  # nothing mends it: the last test of the file
