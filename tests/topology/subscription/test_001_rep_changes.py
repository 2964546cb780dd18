"""Inserts, updates and deletes of tables of common shapes; what a publication has and what not."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.nodes import TwoNodes
from tests.stack import Stack
from tests.topology.subscription.scenes import anomalies, commit, rows, running, same

pytestmark = [pytest.mark.topology, pytest.mark.timeout(300)]

SCHEMA = """
CREATE TABLE keyed (id int PRIMARY KEY, note text);
CREATE TABLE included (a int, b text, CONSTRAINT included_key PRIMARY KEY (a) INCLUDE (b));
CREATE TABLE twins (a int, b text); ALTER TABLE twins REPLICA IDENTITY FULL;
CREATE TABLE texts (x text UNIQUE); ALTER TABLE texts REPLICA IDENTITY FULL;
CREATE TABLE empty_handed (); ALTER TABLE empty_handed REPLICA IDENTITY FULL;
CREATE TABLE turning (id int PRIMARY KEY, k int NOT NULL, v text);
CREATE UNIQUE INDEX turning_k ON turning (k);
CREATE TABLE toasted (id int PRIMARY KEY, big text, n int);
ALTER TABLE toasted ALTER big SET STORAGE EXTERNAL;
CREATE TABLE lonely (id int PRIMARY KEY, v text);
CREATE TABLE leaving (id int PRIMARY KEY);
CREATE TABLE only_grows (a int); ALTER TABLE only_grows REPLICA IDENTITY NOTHING;
CREATE TABLE also_grows (id int PRIMARY KEY, v text);
CREATE TABLE at_home (id int PRIMARY KEY);
"""
SOURCE = """
CREATE TABLE shuffled (a int PRIMARY KEY, b text, c int);
INSERT INTO keyed SELECT g, 'n' || g FROM generate_series(1, 30) g;
INSERT INTO twins VALUES (1, 'x'), (1, 'x'), (2, NULL), (2, NULL), (2, NULL);
INSERT INTO texts VALUES ('a'), ('b'), (NULL), (NULL);
INSERT INTO empty_handed DEFAULT VALUES;
INSERT INTO shuffled VALUES (1, 'first', 10), (2, 'second', 20);
INSERT INTO toasted SELECT g, repeat(g || 'x', 3000), 0 FROM generate_series(1, 4) g;
INSERT INTO included SELECT g, 'i' || g FROM generate_series(1, 9) g;
"""
TARGET = """
CREATE TABLE shuffled (c int, own text DEFAULT 'local', b varchar, a bigint PRIMARY KEY,
    filled timestamptz DEFAULT now());
CREATE INDEX shuffled_own ON shuffled (lower(own));
"""
TABLES = (
    "keyed", "included", "twins", "texts", "empty_handed", "turning", "toasted", "lonely", "leaving",
    "shuffled",
)  # fmt: skip


@pytest.fixture(scope="module")
def pair(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    folder = tmp_path_factory.mktemp("rep-changes")
    with running(stack, folder, SCHEMA, TABLES, source=SOURCE, target=TARGET) as made:
        yield made


def test_rows_with_a_key_are_inserted_changed_moved_and_deleted(pair: TwoNodes) -> None:
    commit(
        pair,
        "INSERT INTO keyed SELECT g, 'n' FROM generate_series(31, 60) g",
        "UPDATE keyed SET id = -id WHERE id <= 20; DELETE FROM keyed WHERE id > 50",
        "UPDATE keyed SET id = id + 1000, note = NULL WHERE id % 5 = 0; UPDATE keyed SET id = id",
        "UPDATE included SET b = b || '!' WHERE a < 4; UPDATE included SET a = a + 100 WHERE a > 6",
        "DELETE FROM included WHERE a = 5",
    )
    assert len(same(pair, "included", "keyed")) == 50
    assert anomalies(pair, "keyed") == {}


def test_one_of_several_equal_rows_is_changed_or_deleted_for_each_change(pair: TwoNodes) -> None:
    commit(
        pair,
        "INSERT INTO twins VALUES (1, 'x'), (1, 'x'), (3, 'y')",
        "UPDATE twins SET b = 'one' WHERE ctid = (SELECT min(ctid) FROM twins WHERE a = 1)",
        "DELETE FROM twins WHERE ctid = (SELECT max(ctid) FROM twins WHERE b IS NULL)",
        "UPDATE twins SET a = 2, b = NULL WHERE a = 3",
        "UPDATE texts SET x = 'bb' WHERE x = 'b'; DELETE FROM texts WHERE ctid = "
        "(SELECT min(ctid) FROM texts WHERE x IS NULL); INSERT INTO texts VALUES ('c')",
    )
    assert len(same(pair, "texts", "twins")) == 7
    assert anomalies(pair, "twins") == {}


def test_a_table_without_columns_keeps_its_number_of_rows(pair: TwoNodes) -> None:
    commit(pair, "INSERT INTO empty_handed DEFAULT VALUES; INSERT INTO empty_handed DEFAULT VALUES")
    assert rows(pair, "SELECT count(*) FROM empty_handed") == ([(3,)], [(3,)])
    commit(pair, "DELETE FROM empty_handed WHERE ctid = (SELECT min(ctid) FROM empty_handed)")
    assert rows(pair, "SELECT count(*) FROM empty_handed") == ([(2,)], [(2,)])


def test_a_target_with_other_order_wider_types_and_columns_of_its_own_keeps_those(pair: TwoNodes) -> None:
    pair.b.execute("UPDATE shuffled SET own = 'mine' WHERE a = 1")
    commit(
        pair,
        "UPDATE shuffled SET b = 'changed' WHERE a = 1; UPDATE shuffled SET c = c + 1, a = 7 WHERE a = 2",
        "INSERT INTO shuffled VALUES (3, 'third', NULL)",
    )
    same(pair, "shuffled")
    assert pair.b.query("SELECT a, own, filled IS NOT NULL FROM shuffled ORDER BY a") == [
        (1, "mine", True),
        (3, "local", True),
        (7, "local", True),
    ]


def test_the_replica_identity_may_change_between_two_changes(pair: TwoNodes) -> None:
    commit(
        pair,
        "INSERT INTO turning SELECT g, g + 100, 'v' FROM generate_series(1, 9) g",
        "UPDATE turning SET v = 'by key' WHERE id = 1",
        "ALTER TABLE turning REPLICA IDENTITY FULL; UPDATE turning SET v = 'by all' WHERE id = 2",
        "ALTER TABLE turning REPLICA IDENTITY USING INDEX turning_k; UPDATE turning SET v = 'by k', id = 30"
        " WHERE id = 3; DELETE FROM turning WHERE id = 4",
        "ALTER TABLE turning REPLICA IDENTITY DEFAULT; UPDATE turning SET k = -k WHERE id = 5",
    )
    assert len(same(pair, "turning")) == 8
    assert anomalies(pair, "turning") == {}


def test_a_large_value_that_an_update_leaves_alone_stays_as_it_is(pair: TwoNodes) -> None:
    commit(
        pair,
        "UPDATE toasted SET n = n + 1; UPDATE toasted SET id = id + 10 WHERE id < 3",
        "ALTER TABLE toasted REPLICA IDENTITY FULL; UPDATE toasted SET n = n + 1; DELETE FROM toasted"
        " WHERE id = 4",
    )
    assert {len(row[1]) for row in same(pair, "toasted")} == {6000}
    assert len(same(pair, "toasted")) == 3


def test_changes_of_rows_the_target_lacks_are_counted_and_the_stream_goes_on(pair: TwoNodes) -> None:
    commit(pair, "INSERT INTO lonely SELECT g, 'v' FROM generate_series(1, 5) g")
    pair.b.execute("DELETE FROM lonely WHERE id IN (2, 3); INSERT INTO lonely VALUES (6, 'mine')")
    commit(
        pair,
        "UPDATE lonely SET v = 'changed' WHERE id = 2; DELETE FROM lonely WHERE id = 3",
        "INSERT INTO lonely VALUES (6, 'theirs'); UPDATE lonely SET v = 'last' WHERE id = 1",
    )
    assert anomalies(pair, "lonely") == {"update_missing": 1, "delete_missing": 1, "insert_exists": 1}
    source, target = rows(pair, "SELECT id, v FROM lonely WHERE id <> 2")
    assert source == target
    assert (6, "theirs") in target


def test_a_table_taken_out_of_the_publication_is_left_alone_from_then_on(pair: TwoNodes) -> None:
    commit(pair, "INSERT INTO leaving VALUES (1)", "INSERT INTO at_home VALUES (1)")
    assert same(pair, "leaving") == [("1",)]
    assert rows(pair, "SELECT id FROM at_home") == ([(1,)], [])
    commit(
        pair,
        "ALTER PUBLICATION pub DROP TABLE leaving",
        "INSERT INTO leaving VALUES (2); INSERT INTO keyed VALUES (5000)",
    )
    assert rows(pair, "SELECT id FROM leaving") == ([(1,), (2,)], [(1,)])
    assert ("5000", None) in same(pair, "keyed")


def test_a_second_publication_may_be_of_inserts_only(pair: TwoNodes) -> None:
    pair.a.execute("INSERT INTO also_grows VALUES (1, 'before'); INSERT INTO only_grows VALUES (1), (1)")
    pair.a.ctl(
        "publication", "create", "growing", "--insert-only", "--table", "only_grows", "--table", "also_grows"
    )
    pair.a.ctl(
        "node", "add-peer", "--peer-node-id", "2", "--peer-name", "node-b", "--peer-connection",
        pair.b.conninfo, "--publication", "growing", "--yes",
    )  # fmt: skip
    for node in (pair.a, pair.b):
        node.ctl("start")
    pair.a.execute("INSERT INTO also_grows VALUES (2, 'during'); INSERT INTO only_grows VALUES (2)")
    _until(pair, "SELECT count(*) FROM also_grows WHERE id = 2", 1)
    pair.a.execute("UPDATE also_grows SET v = 'changed' WHERE id = 1; DELETE FROM also_grows WHERE id = 2")
    pair.a.execute("INSERT INTO also_grows VALUES (3, 'after')")
    _until(pair, "SELECT count(*) FROM also_grows WHERE id = 3", 1)
    assert pair.b.query("SELECT * FROM also_grows ORDER BY id") == [
        (1, "before"),
        (2, "during"),
        (3, "after"),
    ]
    assert pair.b.query("SELECT a FROM only_grows ORDER BY a") == [(1,), (1,), (2,)]


def _until(pair: TwoNodes, query: str, wanted: int) -> None:
    """Wait for the second stream, which `wait_in_step` does not look at."""
    deadline = time.monotonic() + 60
    while pair.b.query(query) != [(wanted,)]:
        assert time.monotonic() < deadline, pair.b.tail("consumer")
        time.sleep(0.2)
