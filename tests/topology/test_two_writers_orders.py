"""Both nodes write under the orders that need generations, from the first copy on: both end equal."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.nodes import Node, TwoNodes
from tests.stack import Stack
from tests.waiting import until

KEYS = 24
ROUNDS = 120


def _rows(node: Node) -> list[tuple[object, ...]]:
    return node.query("SELECT * FROM t ORDER BY id")


def _write(node: Node, seed: int, failures: list[str], rounds: int = ROUNDS) -> None:
    """Random inserts, updates, deletes and moved keys of the same few rows."""
    draw = random.Random(seed)
    with psycopg.connect(node.conninfo, autocommit=True) as conn:
        for number in range(rounds):
            key, other, note = draw.randint(1, KEYS), draw.randint(1, KEYS), f"{node.name} {number}"
            insert = f"INSERT INTO t (id, note) VALUES ({key}, '{note}') ON CONFLICT"
            statement = draw.choice(
                [
                    f"{insert} DO NOTHING",
                    f"{insert} (id) DO UPDATE SET note = excluded.note",
                    f"UPDATE t SET note = '{note}' WHERE id IN ({key}, {other})",
                    f"DELETE FROM t WHERE id = {key}",
                    f"UPDATE t SET id = {other}, note = '{note}' WHERE id = {key}",
                ]
            )
            try:
                conn.execute(statement.encode())
            except (psycopg.errors.UniqueViolation, psycopg.errors.DeadlockDetected):
                continue
            except psycopg.Error as error:
                failures.append(str(error))
                return


@pytest.fixture(params=["first_write_wins", "node_priority"])
def pair(request: pytest.FixtureRequest, stack: Stack, tmp_path: Path) -> Iterator[TwoNodes]:
    pair = TwoNodes(
        stack,
        tmp_path,
        "CREATE TABLE t (id int PRIMARY KEY, note text, vsql_generation bigint NOT NULL DEFAULT 0);"
        "ALTER TABLE t REPLICA IDENTITY FULL",
        config=f'[limits]\nbatch_linger_ms = 1\n[conflict]\ndefault_strategy = "{request.param}"\n',
    )
    pair.a.execute(f"INSERT INTO t SELECT g, 'from the beginning' FROM generate_series(1, {KEYS}) g")
    pair.create(["t(*)"], mode="bidirectional")
    yield pair
    pair.end()


def _open(node: Node) -> bool:
    """Clients may write, and both nodes begin new keys above the same floor."""
    found = node.query("SELECT bool_and(writable AND next_floor IS NULL) FROM vsql_sync.multi_writer_tables")
    return found == [(True,)]


def _equal(pair: TwoNodes) -> bool:
    """Each has applied all the other has committed, and the rows are the same."""
    for source, target in ((pair.a, pair.b), (pair.b, pair.a)):
        chain = f"pub.{source.name}"
        head = source.query("SELECT max(sequence) FROM vsql_sync.vsql_sync_audit WHERE chain = %s", chain)
        if head != target.query("SELECT sequence FROM vsql_sync.apply_progress WHERE chain = %s", chain):
            return False
    return _rows(pair.a) == _rows(pair.b)


def _say(pair: TwoNodes) -> str:
    return "\n".join(
        [
            f"a: {_rows(pair.a)}",
            f"b: {_rows(pair.b)}",
            *(node.tail("consumer", 8) for node in (pair.a, pair.b)),
        ]
    )


def test_under_an_order_by_generations_both_end_equal(pair: TwoNodes) -> None:
    """What a deletes before the copy leaves tombstones that b never gets."""
    failures: list[str] = []
    _write(pair.a, 7, failures, 60)
    for node in (pair.a, pair.b):
        node.start("producer")
        node.start("consumer")
    for node in (pair.a, pair.b):
        until(lambda node=node: _open(node), 90, lambda: _say(pair))  # type: ignore[misc]  # a default binds
    threads = [
        threading.Thread(target=_write, args=(node, at, failures)) for at, node in enumerate((pair.a, pair.b))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    until(lambda: _equal(pair), 90, lambda: _say(pair))
    logged = [node.query("SELECT count(*) FROM vsql_sync.conflict_log")[0][0] for node in (pair.a, pair.b)]
    assert sum(logged) > 0
    floors = [
        node.query("SELECT generation_floor FROM vsql_sync.multi_writer_tables") for node in (pair.a, pair.b)
    ]
    assert floors[0] == floors[1] != [(0,)]
