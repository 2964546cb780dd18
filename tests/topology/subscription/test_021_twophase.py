"""Prepared transactions (021 to 023): they leave the source at COMMIT PREPARED, as ordinary transactions.

Native replication may prepare them at the target, too; ours never does: a target holds no locks for a
transaction whose end is open. The servers are this file's own, because they are killed between the phases.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import psycopg
import pytest

from tests.nodes import TwoNodes
from tests.stack import PostgresServer, Stack
from tests.topology.subscription.scenes import commit, running, same

pytestmark = [pytest.mark.topology, pytest.mark.timeout(300)]

SCHEMA = "CREATE TABLE t (a int PRIMARY KEY, b text);"
# A large transaction is spilled to disk before it is prepared, and sent in fragments.
CONFIG = "[limits]\nbatch_max_rows = 500\nretry_backoff_max_ms = 1000\n"
SETTINGS = {"logical_decoding_work_mem": 64, "max_prepared_transactions": 10}


@dataclass
class Scene:
    """The pair and its servers."""

    pair: TwoNodes
    source: PostgresServer
    target: PostgresServer

    def prepare(self, name: str, *statements: str) -> None:
        """Leave a transaction prepared at the source, and let what came before it arrive."""
        with psycopg.connect(self.pair.a.conninfo, autocommit=True) as connection:
            for statement in ("BEGIN", *statements, f"PREPARE TRANSACTION '{name}'"):
                connection.execute(statement)
        self.pair.wait_in_step(timeout=60)

    def end(self, name: str, how: str) -> None:
        """COMMIT or ROLLBACK what was prepared, and wait for the target."""
        self.pair.a.query(f"{how} PREPARED '{name}'")
        self.pair.wait_in_step(timeout=60)

    def keys(self, low: int, high: int) -> list[int]:
        """Which keys of a range are at the target."""
        return [
            row[0]
            for row in self.pair.b.query("SELECT a FROM t WHERE a BETWEEN %s AND %s ORDER BY a", low, high)
        ]


@pytest.fixture(scope="module")
def scene(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Two servers; rows that were prepared and committed before the first copy."""
    source, target = (stack.own_postgres(18, SETTINGS) for _ in range(2))
    try:
        with psycopg.connect(source.conninfo(), autocommit=True) as connection:
            connection.execute(SCHEMA)
            for statement in (
                "BEGIN",
                "INSERT INTO t SELECT generate_series(1, 10), 'first'",
                "PREPARE TRANSACTION 'before'",
                "COMMIT PREPARED 'before'",
            ):
                connection.execute(statement)
        with psycopg.connect(target.conninfo(), autocommit=True) as connection:
            connection.execute(SCHEMA)
        where = (source.conninfo(), target.conninfo())
        folder = tmp_path_factory.mktemp("twophase")
        with running(stack, folder, "", ["t(*)"], config=CONFIG, conninfos=where) as pair:
            yield Scene(pair, source, target)
    finally:
        source.remove()
        target.remove()


def test_021_rows_come_at_commit_prepared_and_nothing_is_prepared_at_the_target(scene: Scene) -> None:
    scene.prepare("one", "INSERT INTO t VALUES (11, 'prepared')", "UPDATE t SET b = 'seen' WHERE a = 1")
    commit(scene.pair, "INSERT INTO t VALUES (12, 'meanwhile')")
    assert scene.keys(11, 12) == [12], "others do not wait for it"
    assert scene.pair.b.query("SELECT * FROM pg_prepared_xacts") == []
    scene.end("one", "COMMIT")
    assert scene.keys(11, 12) == [11, 12]
    assert ("1", "seen") in same(scene.pair, "t")


def test_021_what_is_rolled_back_after_preparing_never_leaves_the_source(scene: Scene) -> None:
    audited = scene.pair.audited_rows()
    scene.prepare(
        "two", "INSERT INTO t SELECT generate_series(10000, 12000), 'never'", "DELETE FROM t WHERE a = 2"
    )
    scene.end("two", "ROLLBACK")
    commit(scene.pair, "INSERT INTO t VALUES (13, 'after')")
    assert scene.keys(10000, 12000) == []
    assert scene.pair.audited_rows() == audited + 1
    assert ("2", "first") in same(scene.pair, "t")


def test_021_savepoints_inside_of_a_prepared_transaction(scene: Scene) -> None:
    scene.prepare(
        "nested", "INSERT INTO t VALUES (21, 'kept')", "SAVEPOINT s", "INSERT INTO t VALUES (22, 'gone')",
        "ROLLBACK TO SAVEPOINT s", "SAVEPOINT s2", "INSERT INTO t VALUES (23, 'kept')",
        "RELEASE SAVEPOINT s2",
    )  # fmt: skip
    scene.end("nested", "COMMIT")
    assert scene.keys(21, 29) == [21, 23]
    same(scene.pair, "t")


def test_021_an_empty_prepared_transaction_and_an_empty_name_are_passed_over(scene: Scene) -> None:
    head = scene.pair.heads()[0]
    for how in ("COMMIT", "ROLLBACK"):
        scene.prepare("empty", "SELECT FROM t WHERE a = 1 FOR SHARE")
        scene.end("empty", how)
    scene.prepare("", "INSERT INTO t VALUES (31, 'nobody')")
    scene.end("", "ROLLBACK")
    assert scene.pair.heads()[0] == head, "no batch without a change"
    commit(scene.pair, "INSERT INTO t VALUES (32, 'after')")
    assert scene.keys(31, 39) == [32]


@pytest.mark.parametrize("how", ["COMMIT", "ROLLBACK"])
def test_021_both_servers_and_both_services_die_between_prepare_and_the_end(scene: Scene, how: str) -> None:
    first = 100 if how == "COMMIT" else 200
    scene.prepare(f"crash {how}", f"INSERT INTO t SELECT generate_series({first}, {first} + 49), 'x'")
    scene.pair.kill()
    for server in (scene.source, scene.target):
        server.kill()
        server.start()
    scene.pair.start()
    scene.end(f"crash {how}", how)
    commit(scene.pair, f"INSERT INTO t VALUES ({first} + 90, 'after')")
    assert len(scene.keys(first, first + 99)) == (51 if how == "COMMIT" else 1)
    same(scene.pair, "t")


@pytest.mark.parametrize("which", ["source", "target"])
def test_021_one_server_dies_between_prepare_and_commit(scene: Scene, which: str) -> None:
    first = 300 if which == "source" else 400
    scene.prepare(f"crash {which}", f"INSERT INTO t SELECT generate_series({first}, {first} + 1), 'x'")
    server = scene.source if which == "source" else scene.target
    server.restart("immediate")
    scene.end(f"crash {which}", "COMMIT")
    assert scene.keys(first, first + 9) == [first, first + 1]
    same(scene.pair, "t")


def test_023_a_large_prepared_transaction_survives_a_new_producer_and_arrives_whole(scene: Scene) -> None:
    scene.prepare(
        "large", "INSERT INTO t SELECT g, repeat(md5(g::text), 3) FROM generate_series(1001, 5000) g",
        "UPDATE t SET b = b || 'x' WHERE a % 2 = 0 AND a > 1000",
        "DELETE FROM t WHERE a % 3 = 0 AND a > 1000",
    )  # fmt: skip
    assert scene.pair.a.stop("producer") == 0
    commit_after = "INSERT INTO t VALUES (50, 'while it was down')"
    scene.pair.a.execute(commit_after)
    scene.pair.a.start("producer")
    scene.pair.wait_in_step(timeout=60)
    assert scene.keys(1001, 5000) == []
    assert scene.keys(50, 50) == [50]
    scene.end("large", "COMMIT")
    assert len(scene.keys(1001, 5000)) == 2667
    same(scene.pair, "t")
    for node in (scene.pair.a, scene.pair.b):
        assert node.ctl("audit", "verify").returncode == 0
