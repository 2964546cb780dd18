"""Both nodes write: whatever the interleaving, both end with the same rows."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.nodes import Node, TwoNodes
from tests.stack import Stack
from tests.waiting import until

TABLE = """CREATE TABLE t (id int PRIMARY KEY, note text, n int);
ALTER TABLE t REPLICA IDENTITY FULL"""


def _made(stack: Stack, tmp_path: Path) -> TwoNodes:
    pair = TwoNodes(stack, tmp_path, TABLE, config="[limits]\nbatch_linger_ms = 1\n")
    pair.a.execute("INSERT INTO t SELECT g, 'from the beginning', g FROM generate_series(1, 20) g")
    pair.create(["t(*)"], mode="bidirectional")
    return pair


@pytest.fixture
def pair(stack: Stack, tmp_path: Path) -> Iterator[TwoNodes]:
    pair = _made(stack, tmp_path)
    # Nothing of this would be sent, and copied rows would be younger.
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        pair.b.execute("INSERT INTO t VALUES (1000, 'too early', 1)")
    for node in (pair.a, pair.b):
        node.start("producer")
        node.start("consumer")
    until(lambda: _rows(pair.b) == _rows(pair.a), 60, lambda: pair.b.tail("consumer"))
    until(lambda: _open(pair.b), 30, lambda: pair.b.tail("consumer"))
    yield pair
    pair.end()


def _open(node: Node) -> bool:
    return node.query("SELECT bool_and(writable) FROM vsql_sync.multi_writer_tables") == [(True,)]


def _rows(node: Node) -> list[tuple[object, ...]]:
    return node.query("SELECT * FROM t ORDER BY id")


def _equal(pair: TwoNodes) -> bool:
    """Each has acknowledged all the other has committed, and the rows are the same."""
    for source, target in ((pair.a, pair.b), (pair.b, pair.a)):
        head = source.query(
            "SELECT max(sequence) FROM vsql_sync.vsql_sync_audit WHERE chain = %s", f"pub.{source.name}"
        )
        if head != target.query(
            "SELECT sequence FROM vsql_sync.apply_progress WHERE chain = %s", f"pub.{source.name}"
        ):
            return False
    return _rows(pair.a) == _rows(pair.b)


def _say(pair: TwoNodes) -> str:
    return "\n".join(
        [f"a: {_rows(pair.a)}", f"b: {_rows(pair.b)}", pair.a.tail("consumer", 8), pair.b.tail("consumer", 8),
         pair.a.tail("producer", 8), pair.b.tail("producer", 8)]
    )  # fmt: skip


def test_what_either_writes_arrives_at_the_other_and_does_not_come_back(pair: TwoNodes) -> None:
    pair.a.execute("INSERT INTO t VALUES (100, 'of a', 1)")
    pair.b.execute("INSERT INTO t VALUES (200, 'of b', 1); DELETE FROM t WHERE id = 1")
    pair.a.execute("UPDATE t SET id = 300 WHERE id = 2")
    until(lambda: _equal(pair), 60, lambda: _say(pair))
    ids = {row[0] for row in _rows(pair.a)}
    assert ids == {*range(3, 21), 100, 200, 300}
    for node in (pair.a, pair.b):
        sent = node.query(
            "SELECT sum(row_count) FROM vsql_sync.vsql_sync_audit WHERE chain = %s", f"pub.{node.name}"
        )
        assert sent == [(2,)]
    kinds = "SELECT conflict_type, resolution FROM vsql_sync.conflict_log"
    # B deleted a row that A wrote: as in PostgreSQL, nobody asks whether B had seen it.
    assert pair.a.query(kinds) == [("delete_origin_differs", "APPLIED_REMOTE")]
    assert pair.b.query(kinds) == []


def test_fragments_and_a_key_that_moves_into_anothers_arrive(pair: TwoNodes) -> None:
    """Both ends write the same keys while neither has heard of the other."""
    for node in (pair.a, pair.b):
        node.stop("consumer")
    pair.a.execute("UPDATE t SET note = 'of a' WHERE id <= 10; INSERT INTO t VALUES (50, 'of a', 1)")
    pair.b.execute("UPDATE t SET note = 'of b' WHERE id <= 10; INSERT INTO t VALUES (60, 'of b', 1)")
    pair.a.execute("UPDATE t SET id = 60 WHERE id = 50; DELETE FROM t WHERE id = 5")
    pair.b.execute("INSERT INTO t SELECT g, repeat('x', 100), g FROM generate_series(1000, 30000) g")
    for node in (pair.a, pair.b):
        node.start("consumer")
    until(lambda: _equal(pair), 90, lambda: _say(pair))
    row = pair.a.query("SELECT note FROM t WHERE id = 60")
    assert row == [("of a",)]  # the younger one, at both
    logged = pair.b.query("SELECT count(*) FROM vsql_sync.conflict_log")[0][0]
    assert logged > 0


def test_both_may_write_from_the_moment_they_are_let(stack: Stack, tmp_path: Path) -> None:
    """A writes all through the first copy, B as soon as it is open: nothing is left out."""
    pair, stop = _made(stack, tmp_path), threading.Event()

    def write(node: Node) -> None:
        number = 0
        with psycopg.connect(node.conninfo, autocommit=True) as conn:
            while not stop.wait(0.01):
                number += 1
                row = (number % 20 + 1, f"{node.name} {number}")
                with contextlib.suppress(psycopg.errors.ObjectNotInPrerequisiteState):
                    conn.execute(
                        "INSERT INTO t VALUES (%s, %s, 0)"
                        " ON CONFLICT (id) DO UPDATE SET note = excluded.note, n = t.n + 1",
                        row,
                    )

    threads = [threading.Thread(target=write, args=(node,)) for node in (pair.a, pair.b)]
    for thread in threads:
        thread.start()
    try:
        for node in (pair.a, pair.b):
            node.start("producer")
            node.start("consumer")
        until(lambda: _open(pair.b), 60, lambda: _say(pair))
        time.sleep(2)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    until(lambda: _equal(pair), 90, lambda: _say(pair))
    pair.end()


def _write(node: Node, seed: int, failures: list[str]) -> None:
    """Random inserts, updates, deletes and moved keys, mostly of the same few rows."""
    draw = random.Random(seed)
    with psycopg.connect(node.conninfo, autocommit=True) as conn:
        for number in range(150):
            key = draw.randrange(1, 25)
            statement, values = draw.choice(
                [
                    (
                        "INSERT INTO t VALUES (%s, %s, 0) ON CONFLICT DO NOTHING",
                        (key, f"{node.name} {number}"),
                    ),
                    ("UPDATE t SET note = %s, n = n + 1 WHERE id = %s", (f"{node.name} {number}", key)),
                    ("UPDATE t SET note = %s, n = n + 1 WHERE id = %s", (f"{node.name} {number}", key)),
                    ("DELETE FROM t WHERE id = %s", (key,)),
                    ("UPDATE t SET id = %s WHERE id = %s", (draw.randrange(1, 25), key)),
                ]
            )
            try:
                conn.execute(statement, values)
            except (psycopg.errors.UniqueViolation, psycopg.errors.DeadlockDetected):
                continue
            except psycopg.Error as error:
                failures.append(str(error))
                return


@pytest.mark.parametrize("seed", [1, 2])
def test_under_the_last_write_wins_both_end_equal(pair: TwoNodes, seed: int) -> None:
    failures: list[str] = []
    threads = [
        threading.Thread(target=_write, args=(node, seed * 10 + at, failures))
        for at, node in enumerate((pair.a, pair.b))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    until(lambda: _equal(pair), 90, lambda: _say(pair))
    found = pair.a.query("SELECT count(*) FROM vsql_sync.conflict_log")[0][0]
    found += pair.b.query("SELECT count(*) FROM vsql_sync.conflict_log")[0][0]
    assert found > 0
