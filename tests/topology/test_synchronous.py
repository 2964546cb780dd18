"""Commits that wait: what a client sees return is on the target, whatever is killed; nothing else waits."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.nodes import PUBLICATION, Node, TwoNodes
from tests.pairs import Pairs
from tests.services.waiting_commits import Client, watcher
from tests.stack import Stack
from tests.stack.postgres import PostgresServer
from tests.waiting import until

pytestmark = pytest.mark.topology

TABLES = (
    "CREATE TABLE cards (id int PRIMARY KEY, pan text); CREATE TABLE plain (id int PRIMARY KEY, note text);"
)
FAILPOINTS = "VSQL_SYNC_FAILPOINTS"


@pytest.fixture(scope="module")
def source(stack: Stack) -> PostgresServer:
    return stack.own_postgres(18, {"max_prepared_transactions": 0})


@pytest.fixture
def database(source: PostgresServer, stack: Stack) -> Iterator[str]:
    """Of node A; the server's list of standbys is empty before and after."""
    name = stack.new_cluster_name("a").replace("-", "_")
    with psycopg.connect(source.conninfo(), autocommit=True) as conn:
        conn.execute("ALTER SYSTEM SET synchronous_standby_names = ''")
        conn.execute("SELECT pg_reload_conf()")
        conn.execute(f"CREATE DATABASE {name}".encode())
    yield source.conninfo(name)
    with psycopg.connect(source.conninfo(), autocommit=True) as conn:
        conn.execute("ALTER SYSTEM SET synchronous_standby_names = ''")
        conn.execute("SELECT pg_reload_conf()")


def enable(pair: TwoNodes) -> None:
    """Once A knows that the first copy is done."""
    copying = (
        "SELECT FROM vsql_sync.streams WHERE direction = 'out' AND kind = 'copy' AND state <> 'FINISHED'"
    )
    until(lambda: not pair.a.query(copying))
    pair.a.ctl("sync", "enable", PUBLICATION)


@pytest.fixture
def pair(pairs: Pairs, database: str, stack: Stack) -> TwoNodes:
    """A and B at work, commits to cards wait for B."""
    made = pairs(TABLES, conninfos=(database, stack.new_database(18, "b")))
    made.create(["cards(*)"], publication_args=("--pci-column", "cards.pan"))
    made.start()
    made.wait_in_step()
    enable(made)
    return made


@pytest.fixture
def client(pair: TwoNodes) -> Iterator[Client]:
    with watcher(pair.a.conninfo) as watching, Client(pair.a.conninfo, watching) as made:
        yield made


def rows(pair: TwoNodes) -> set[int]:
    """What B has."""
    return {row[0] for row in pair.b.query("SELECT id FROM cards")}


def insert(pair: TwoNodes, number: int) -> None:
    """Commit a row to cards, and wait for it as long as it takes."""
    with psycopg.connect(pair.a.conninfo, autocommit=True) as conn:
        conn.execute("INSERT INTO cards VALUES (%s, 'x')", (number,))


def kill(node: Node, role: str) -> None:
    """Kill -9 a service and its workers."""
    for process in node.processes(role):
        with contextlib.suppress(Exception):
            os.kill(process.pid, signal.SIGKILL)
    node.services.pop(role).wait()


def detail(pair: TwoNodes) -> dict[str, Any]:
    """What the stream says of commits that wait."""
    row = pair.a.query(
        "SELECT detail FROM vsql_sync.stream_status WHERE direction = 'out' AND chain = %s", pair.chain
    )
    return dict(row[0][0].get("synchronous") or {})


def test_what_returns_is_on_the_target(pair: TwoNodes) -> None:
    for number in range(20):
        insert(pair, number)
        assert number in rows(pair)
    assert detail(pair).get("standby", "").startswith("vsql_")


def test_with_the_target_down_pci_writes_wait_and_others_do_not(pair: TwoNodes, client: Client) -> None:
    insert(pair, 1)
    pair.b.stop("consumer")
    client.send("INSERT INTO cards VALUES (2, 'x')")
    assert client.waits()
    with watcher(pair.a.conninfo) as watching, Client(pair.a.conninfo, watching) as other:
        assert other.commits("INSERT INTO plain VALUES (1, 'x')")
        # Neither what is rolled back nor others' WAL, which brings keepalives, lets it return.
        assert other.commits("BEGIN; INSERT INTO cards VALUES (3, 'x'); ROLLBACK")
        assert other.commits("INSERT INTO plain SELECT n, 'x' FROM generate_series(2, 3000) n")
        until(lambda: detail(pair).get("state") == "waiting")
    said = pair.a.ctl_json("sync", "status")
    assert said["waiting_commits"] == 1
    assert "node-b" in said["publications"][0]["stream"]["waiting_for"]
    assert "node-b" in pair.a.ctl("status").stdout
    assert client.waits()
    assert 2 not in rows(pair)
    pair.b.start("consumer")
    assert client.answered()
    assert 2 in rows(pair)


def test_a_producer_that_starts_again_lets_nothing_return(pair: TwoNodes, client: Client) -> None:
    insert(pair, 1)
    pair.b.stop("consumer")
    client.send("INSERT INTO cards VALUES (2, 'x')")
    assert client.waits()
    until(lambda: detail(pair).get("waiting_batches") == 1)
    before = detail(pair)["applied_lsn"]
    kill(pair.a, "producer")
    pair.a.start("producer")
    epoch = "SELECT max(epoch) FROM vsql_sync.vsql_sync_audit WHERE chain = %s"
    (first,) = pair.a.query(epoch, pair.chain)
    until(lambda: pair.a.query(epoch, pair.chain)[0] > first)
    until(
        lambda: pair.a.query(
            "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync' AND state = 'streaming'"
        )
    )
    until(lambda: detail(pair).get("waiting_batches") == 1)
    assert client.waits()
    assert pair.a.query(
        "SELECT coalesce(replay_lsn <= %s, true) FROM pg_stat_replication WHERE sync_state = 'sync'", before
    ) == [(True,)]
    pair.b.start("consumer")
    assert client.answered()
    assert 2 in rows(pair)


def test_an_order_lets_commits_return_and_have_to_wait_again(pair: TwoNodes, client: Client) -> None:
    insert(pair, 1)
    pair.b.stop("consumer")
    client.send("INSERT INTO cards VALUES (2, 'x')")
    assert client.waits()
    pair.a.ctl("sync", "degrade", PUBLICATION, "--reason", "node-b lost, INC-7", "--yes")
    assert client.answered()
    client.send("INSERT INTO cards VALUES (3, 'x')")
    assert client.answered()  # it waits for its manifest, and for no target
    said = pair.a.ctl_json("sync", "status")["publications"][0]
    assert said["degraded_reason"] == "node-b lost, INC-7"
    again = pair.a.ctl("sync", "degrade", PUBLICATION, "--reason", "twice", "--yes", check=False)
    assert again.returncode == 4
    pair.a.ctl("sync", "restore", PUBLICATION, "--reason", "node-b is back")
    client.send("INSERT INTO cards VALUES (4, 'x')")
    assert client.waits()
    pair.b.start("consumer")
    assert client.answered()
    assert rows(pair) == {1, 2, 3, 4}
    pair.wait_in_step()
    pair.a.ctl("audit", "verify")
    acts = pair.a.query("SELECT action FROM vsql_sync.audit_log WHERE action LIKE 'sync.%%' ORDER BY id")
    assert [row[0] for row in acts] == ["sync.enable", "sync.degrade", "sync.restore"]


def test_a_target_killed_between_commit_and_acknowledgement_loses_nothing(
    pair: TwoNodes, client: Client
) -> None:
    insert(pair, 1)
    pair.b.stop("consumer")
    pair.b.start(
        "consumer",
        {"VSQL_SYNC_ALLOW_FAILPOINTS": "1", FAILPOINTS: "consumer.after-apply-commit=kill:1"},
    )
    client.send("INSERT INTO cards VALUES (2, 'x')")
    assert client.waits()
    until(lambda: 2 in rows(pair))
    assert client.waits()
    kill(pair.b, "consumer")
    pair.b.start("consumer")
    assert client.answered()
    assert rows(pair) == {1, 2}


def test_a_target_in_another_region_is_not_waited_for_and_does_not_count(
    pair: TwoNodes, client: Client
) -> None:
    insert(pair, 1)
    pair.b.stop("consumer")
    client.send("INSERT INTO cards VALUES (2, 'x')")
    assert client.waits()
    pair.a.ctl("sync", "region", "node-a", "us-east")
    pair.a.ctl("sync", "region", "node-b", "eu-west")
    until(lambda: detail(pair).get("state") == "waiting" and not detail(pair)["waiting_for"])
    pair.b.start("consumer")
    pair.wait_in_step()
    acked = "SELECT acked_sequence FROM vsql_sync.stream_targets WHERE chain = %s"
    until(lambda: pair.a.query(acked, pair.chain)[0][0] >= pair.heads()[0])
    assert 2 in rows(pair)
    assert client.waits()
    pair.a.ctl("sync", "region", "node-b", "us-east")
    assert client.answered()


def test_before_the_first_copy_it_is_refused(pairs: Pairs, database: str, stack: Stack) -> None:
    made = pairs(TABLES, conninfos=(database, stack.new_database(18, "b")))
    made.create(["cards(*)"], publication_args=("--pci-column", "cards.pan"))
    refused = made.a.ctl("sync", "enable", PUBLICATION, check=False)
    assert refused.returncode == 4
    assert "first copy" in refused.stderr
    insert(made, 1)  # waits for nobody
    made.start()
    made.wait_in_step()
    enable(made)
    insert(made, 2)
    assert rows(made) == {1, 2}


def test_a_configuration_that_promises_waiting_does_not_start_without(pair: TwoNodes) -> None:
    pair.a.ctl("sync", "disable", PUBLICATION, "--reason", "a test", "--yes")
    pair.a.stop("producer")
    pair.a.config.write_text(pair.a.config.read_text() + '\n[consistency]\npci_sync_mode = "remote_apply"\n')
    process = pair.a.start("producer")
    assert process.wait(60) == 4
    assert f"syncctl sync enable {PUBLICATION}" in pair.a.tail("producer")
    pair.a.services.pop("producer")
    pair.a.ctl("sync", "enable", PUBLICATION)
    pair.a.start("producer")
    insert(pair, 1)
    assert rows(pair) == {1}


class Writer(threading.Thread):
    """A client that commits row after row, and notes which commits it saw return."""

    def __init__(self, conninfo: str) -> None:
        super().__init__(daemon=True)
        self._conninfo = conninfo
        self.seen: list[int] = []
        self.stop = threading.Event()

    def run(self) -> None:
        number = 0
        while not self.stop.is_set():
            with contextlib.suppress(psycopg.Error), psycopg.connect(self._conninfo, autocommit=True) as conn:
                while not self.stop.is_set():
                    number += 1
                    conn.execute("INSERT INTO cards VALUES (%s, 'x')", (number,))
                    if not conn.info.status:
                        self.seen.append(number)
            time.sleep(0.1)


def test_nothing_a_client_saw_committed_is_missing_after_kills(pairs: Pairs, stack: Stack) -> None:
    """Producer, consumer, Kafka and either PostgreSQL, killed in turn while a client commits."""
    kafka = stack.own_kafka()
    servers = [stack.own_postgres(18, {"max_prepared_transactions": 0}) for _ in range(2)]
    conninfos = tuple(server.conninfo() for server in servers)
    pair = pairs(TABLES, conninfos=conninfos, kafka=kafka.bootstrap_servers)
    pair.create(["cards(*)"], publication_args=("--pci-column", "cards.pan"))
    pair.start()
    pair.wait_in_step()
    enable(pair)
    insert(pair, 0)
    writer = Writer(pair.a.conninfo)
    writer.start()

    def more() -> None:
        have = len(writer.seen)
        until(lambda: len(writer.seen) > have + 5, timeout=120, tell=lambda: pair.a.tail("producer"))
        assert set(writer.seen) - rows(pair) == set()

    try:
        more()
        for node, role in ((pair.a, "producer"), (pair.b, "consumer")):
            kill(node, role)
            node.start(role)
            more()
        kafka.kill()
        kafka.start()
        more()
        servers[1].stop("immediate")
        servers[1].start()
        more()
        servers[0].stop("immediate")
        at_crash = set(writer.seen)
        servers[0].start()
        assert at_crash - rows(pair) == set()
        more()
    finally:
        writer.stop.set()
    writer.join(60)
    pair.wait_in_step()
    assert pair.differences() == []
