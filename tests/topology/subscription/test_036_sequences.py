"""Sequences (036_sequences of PostgreSQL's own suite): the target is ready to take over at every commit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from tests.nodes import Node, NodeFailedError, TwoNodes
from tests.pairs import Pairs

pytestmark = pytest.mark.topology

SCHEMA = """
CREATE TABLE owned (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text);
CREATE SEQUENCE numbers START 100 INCREMENT 7;
CREATE TABLE defaulted (id bigint DEFAULT nextval('numbers') PRIMARY KEY, v text);
CREATE TABLE down (id int PRIMARY KEY, v text);
CREATE SEQUENCE "Down Going" AS int INCREMENT -1 CACHE 20 OWNED BY down.id;
CREATE SEQUENCE alone;
CREATE SEQUENCE never START 5;
CREATE SEQUENCE private;
"""
TABLES = ["owned(*)", "defaulted(*)", "down(*)"]
CARRIED = ["alone", "defaulted", "down", "owned"]
ARGS = ["--sequences", "--sequence", "alone", "--sequence", "never"]
CONFIG = "[limits]\nsequence_interval_ms = 500\n"


def at(node: Node, name: str) -> tuple[Any, ...]:
    return node.query(f"SELECT last_value, is_called FROM {name}")[0]


def wait_for(what: Callable[[], bool], pair: TwoNodes, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            raise NodeFailedError(f"{pair.a.tail('producer')}\n{pair.b.tail('consumer')}")
        time.sleep(0.1)


def behind(node: Node) -> list[str]:
    """Tables of a node with rows beyond what its sequence has given out; rows are looked at first."""
    found = []
    for table, column, end, sequence, sign in (
        ("owned", "id", "max", "owned_id_seq", 1),
        ("defaulted", "id", "max", "numbers", 1),
        ("down", "id", "min", '"Down Going"', -1),
    ):
        used = node.query(f"SELECT {end}({column}) FROM {table}")[0][0]
        value, called = at(node, sequence)
        if used is not None and (not called or (value - used) * sign < 0):
            found.append(f"{table}: row {used}, sequence {value}")
    return found


@pytest.mark.timeout(300)
def test_no_row_is_ever_beyond_the_sequence_of_the_target(pairs: Pairs) -> None:
    pair = pairs(SCHEMA, config=CONFIG)
    pair.a.execute("INSERT INTO owned (v) SELECT 'x' FROM generate_series(1, 50)")
    pair.create(TABLES, publication_args=ARGS)
    for node, role, privileges in ((pair.a, "producer", "SELECT"), (pair.b, "consumer", "SELECT, UPDATE")):
        for sequence, granted in (("owned_id_seq", True), ('"Down Going"', True), ("private", False)):
            query = "SELECT has_sequence_privilege(%s, %s, %s)"
            assert node.query(query, f"vsql_sync_{role}", sequence, privileges) == [(granted,)]
    pair.start()
    pair.wait_in_step()
    # The first copy is there, and its sequences with it; "never" gave out nothing on either side.
    assert at(pair.b, "owned_id_seq") == (50, True)
    wait_for(lambda: at(pair.b, "never") == (5, False), pair)
    with psycopg.connect(pair.a.conninfo, autocommit=True) as conn:
        for _ in range(12):
            conn.execute("INSERT INTO owned (v) SELECT 'y' FROM generate_series(1, 40)")
            conn.execute("INSERT INTO defaulted (v) SELECT 'y' FROM generate_series(1, 3)")
            conn.execute("INSERT INTO down SELECT nextval('\"Down Going\"'), 'y'")
            assert behind(pair.b) == []
    pair.wait_in_step()
    assert behind(pair.b) == []
    for sequence in ("owned_id_seq", "numbers", '"Down Going"'):
        assert at(pair.a, sequence) == at(pair.b, sequence)
    # Without any row: the interval carries it. One that was not named stays.
    pair.a.query("SELECT nextval('alone'), nextval('private') FROM generate_series(1, 9)")
    wait_for(lambda: at(pair.b, "alone") == (9, True), pair)
    assert at(pair.b, "private") == (1, False)
    assert at(pair.b, "never") == (5, False)
    # A stop carries what came last.
    pair.a.query("SELECT setval('alone', 1000)")
    assert pair.a.stop("producer") == 0
    head = pair.heads()[0]
    wait_for(lambda: pair.heads()[1] >= head, pair)
    assert at(pair.b, "alone") == (1000, True)
    for node in (pair.a, pair.b):
        assert node.ctl("audit", "verify").returncode == 0
    pair.stop()


@pytest.mark.timeout(300)
def test_a_sequence_goes_back_only_where_the_source_s_was_set_back(pairs: Pairs) -> None:
    pair = pairs(SCHEMA, config=CONFIG)
    pair.create(TABLES, publication_args=ARGS)
    pair.start()
    pair.a.execute("INSERT INTO owned (v) SELECT 'x' FROM generate_series(1, 500)")
    pair.a.query("SELECT setval('alone', 700), setval('numbers', 9000)")
    pair.wait_in_step()
    wait_for(lambda: at(pair.b, "alone") == (700, True), pair)
    # The target ran ahead by itself: nothing of the source's takes that back.
    pair.b.query("SELECT setval('numbers', 20000)")
    pair.a.execute("INSERT INTO defaulted (v) VALUES ('z')")
    pair.wait_in_step()
    assert at(pair.b, "numbers") == (20000, True)
    # Set back on the source, by each of the ways there are.
    pair.a.query("SELECT setval('alone', 7)")
    wait_for(lambda: at(pair.b, "alone") == (7, True), pair)
    pair.a.execute("ALTER SEQUENCE alone RESTART WITH 3")
    wait_for(lambda: at(pair.b, "alone") == (3, False), pair)
    pair.a.execute("TRUNCATE owned RESTART IDENTITY; INSERT INTO owned (v) VALUES ('first')")
    wait_for(lambda: at(pair.b, "owned_id_seq") == (1, True), pair)
    pair.wait_in_step()
    assert pair.b.query("SELECT id, v FROM owned") == [(1, "first")]
    # While a sequence is locked by somebody's unfinished restart, everything else goes on.
    with psycopg.connect(pair.a.conninfo) as conn:
        conn.execute("ALTER SEQUENCE alone RESTART WITH 44")
        pair.a.execute("INSERT INTO owned (v) VALUES ('second')")
        pair.wait_in_step()
        assert at(pair.b, "owned_id_seq") == (2, True)
        assert at(pair.b, "alone") == (3, False)
    wait_for(lambda: at(pair.b, "alone") == (44, False), pair)
    assert pair.b.query("SELECT set_back > 0 FROM vsql_sync.sequence_sync WHERE sequence_name = 'alone'") == [
        (True,)
    ]
    # While nobody looked: rows that are still to come used more than the sequence shows now.
    pair.a.stop("producer")
    pair.a.execute("INSERT INTO owned (v) SELECT 'late' FROM generate_series(1, 5)")
    pair.a.query("SELECT setval('owned_id_seq', 1)")
    pair.a.start("producer")
    pair.wait_in_step()
    assert (at(pair.b, "owned_id_seq"), behind(pair.b)) == ((7, True), [])
    # Rows were committed before it was locked, and nobody had looked in between.
    pair.a.stop("producer")
    pair.a.query("SELECT setval('owned_id_seq', 7)")
    pair.a.execute("INSERT INTO owned (v) SELECT 'before the lock' FROM generate_series(1, 5)")
    with psycopg.connect(pair.a.conninfo) as conn:
        conn.execute("ALTER SEQUENCE owned_id_seq RESTART WITH 1000")
        pair.a.start("producer")
        pair.wait_in_step()
        assert (at(pair.b, "owned_id_seq"), behind(pair.b)) == ((12, True), [])
        conn.rollback()
    pair.stop()


@pytest.mark.timeout(300)
def test_what_cannot_be_carried_is_said_by_name_and_goes_on_once_it_is_mended(pairs: Pairs) -> None:
    pair = pairs(SCHEMA, config=f"{CONFIG}retry_backoff_max_ms = 1000\n")
    pair.b.execute(
        "DROP SEQUENCE alone; ALTER SEQUENCE never INCREMENT -1 MINVALUE -10 MAXVALUE 10;"
        ' ALTER SEQUENCE owned_id_seq RENAME TO "Of Owned";'
    )
    with pytest.raises(NodeFailedError) as refused:
        pair.create(TABLES, publication_args=ARGS)
    for what in ("sequence public.alone: does not exist", "sequence public.never: runs the other way"):
        assert what in str(refused.value)
    pair.b.execute(
        "CREATE SEQUENCE alone AS smallint; ALTER SEQUENCE never INCREMENT 1 NO MINVALUE NO MAXVALUE START 5;"
    )
    pair.a.ctl(
        "node", "add-peer", "--peer-node-id", "2", "--peer-name", "node-b", "--peer-connection",
        pair.b.conninfo, "--mode", "uni-directional", "--yes",
    )  # fmt: skip
    for node in (pair.a, pair.b):
        node.ctl("start")
    pair.start()
    pair.a.execute("INSERT INTO owned (v) VALUES ('x')")
    pair.wait_in_step()
    # Found by the column it belongs to.
    assert at(pair.b, '"Of Owned"') == (1, True)
    pair.a.query("SELECT setval('alone', 40000)")
    pair.a.execute("INSERT INTO owned (v) VALUES ('waits')")
    wait_for(lambda: "public.alone lies beyond its bounds" in pair.b.tail("consumer", 200), pair)
    assert pair.b.query("SELECT count(*) FROM owned") == [(1,)]
    pair.b.execute("ALTER SEQUENCE alone AS bigint")
    wait_for(lambda: at(pair.b, "alone") == (40000, True), pair)
    pair.wait_in_step()
    assert behind_of(pair.b, "owned", '"Of Owned"') == (2, 2)
    (stream,) = [s for s in pair.b.ctl_json("status")["streams"] if s["kind"] == "live"]
    assert {"schema": "public", "sequence": "alone", "last_value": 40000}.items() <= next(
        one for one in stream["sequences"] if one["sequence"] == "alone"
    ).items()
    pair.stop()


def behind_of(node: Node, table: str, sequence: str) -> tuple[int, int]:
    return node.query(f"SELECT max(id) FROM {table}")[0][0], at(node, sequence)[0]
