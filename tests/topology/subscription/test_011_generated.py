"""Generated columns: computed by the target, or carried where they are listed; a difference is reported."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.nodes import TwoNodes
from tests.stack import Stack
from tests.topology.subscription.scenes import anomalies, commit, rows, running, same

pytestmark = [pytest.mark.topology, pytest.mark.timeout(300)]

SCHEMA = """
CREATE TABLE computed (a int PRIMARY KEY, b int GENERATED ALWAYS AS (a * 2) STORED, c text);
CREATE TABLE full_stored (a int, b int GENERATED ALWAYS AS (a * 2) STORED, c text);
ALTER TABLE full_stored REPLICA IDENTITY FULL;
CREATE TABLE nothing_else (g int GENERATED ALWAYS AS (42) STORED);
ALTER TABLE nothing_else REPLICA IDENTITY FULL;
CREATE TABLE virtual_too (a int PRIMARY KEY, b int GENERATED ALWAYS AS (a + 1) VIRTUAL);
CREATE TABLE became (a int PRIMARY KEY, b int);
CREATE TABLE key_of_it (a int, b int GENERATED ALWAYS AS (a % 7) STORED NOT NULL, PRIMARY KEY (a, b));
"""
SOURCE = """
CREATE TABLE carried (a int PRIMARY KEY, b int GENERATED ALWAYS AS (a * 22) STORED, c int);
CREATE TABLE source_only (a int PRIMARY KEY, b int GENERATED ALWAYS AS (a * 2) STORED);
CREATE TABLE target_only (a int PRIMARY KEY);
CREATE TABLE differs (a int PRIMARY KEY, b int GENERATED ALWAYS AS (a * 2) STORED);
CREATE TABLE hollow (a int PRIMARY KEY, b int GENERATED ALWAYS AS (a * 2) STORED);
CREATE FUNCTION own(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT $1 + 1';
CREATE TABLE by_function (a int PRIMARY KEY, b int GENERATED ALWAYS AS (own(a)) STORED);
CREATE TABLE virtual_differs (a int PRIMARY KEY, b int GENERATED ALWAYS AS (a + 1) VIRTUAL);
CREATE TABLE full_differs (a int, b int GENERATED ALWAYS AS (a * 2) STORED);
ALTER TABLE full_differs REPLICA IDENTITY FULL;
INSERT INTO computed (a, c) SELECT g, 'copied' FROM generate_series(1, 3) g;
INSERT INTO carried (a) VALUES (1), (2);
INSERT INTO source_only VALUES (1); INSERT INTO target_only VALUES (1); INSERT INTO full_stored VALUES (1);
INSERT INTO nothing_else DEFAULT VALUES;
INSERT INTO virtual_too VALUES (1);
"""
TARGET = """
CREATE TABLE carried (c int, b int, a int PRIMARY KEY);
CREATE TABLE source_only (a int PRIMARY KEY);
CREATE TABLE target_only (a int PRIMARY KEY, twice int GENERATED ALWAYS AS (a * 2) STORED);
CREATE TABLE differs (a int PRIMARY KEY, b int GENERATED ALWAYS AS (a * 3) STORED);
CREATE TABLE hollow (a int PRIMARY KEY, b int);
CREATE FUNCTION own(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT $1 + 2';
CREATE TABLE by_function (a int PRIMARY KEY, b int GENERATED ALWAYS AS (own(a)) STORED);
CREATE TABLE virtual_differs (a int PRIMARY KEY, b int GENERATED ALWAYS AS (a + 2) VIRTUAL);
CREATE TABLE full_differs (a int, b int GENERATED ALWAYS AS (a * 3) STORED);
CREATE TABLE heard (b int);
CREATE FUNCTION hear() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO public.heard VALUES (new.b); RETURN NULL; END $$;
CREATE TRIGGER hear AFTER INSERT OR UPDATE ON computed FOR EACH ROW EXECUTE FUNCTION hear();
ALTER TABLE computed ENABLE ALWAYS TRIGGER hear;
"""
TABLES = (
    "computed", "full_stored", "nothing_else", "virtual_too", "became", "carried(a, b, c)", "source_only",
    "target_only", "differs", "hollow(a)", "by_function", "virtual_differs", "full_differs",
    "key_of_it(a, b)",
)  # fmt: skip
REPORT = "generated_differs"


@pytest.fixture(scope="module")
def pair(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    folder = tmp_path_factory.mktemp("generated")
    with running(stack, folder, SCHEMA, TABLES, source=SOURCE, target=TARGET) as made:
        yield made


def test_a_column_both_generate_is_computed_by_the_target_and_seen_by_its_triggers(pair: TwoNodes) -> None:
    commit(
        pair,
        "INSERT INTO computed (a, c) VALUES (4, 'live'), (5, 'live')",
        "UPDATE computed SET c = 'set' WHERE a = 4; UPDATE computed SET a = 60 WHERE a = 5",
    )
    assert same(pair, "computed")[-1] == ("60", "120", "live")
    assert {8, 10, 120} <= {row[0] for row in pair.b.query("SELECT b FROM heard")}
    assert anomalies(pair, "computed") == {}


def test_a_listed_generated_column_is_carried_to_an_ordinary_one(pair: TwoNodes) -> None:
    commit(pair, "INSERT INTO carried (a) VALUES (3)", "UPDATE carried SET a = 20, c = 1 WHERE a = 2")
    assert same(pair, "carried") == [("1", "22", None), ("20", "440", "1"), ("3", "66", None)]
    assert anomalies(pair, "carried") == {}
    # It may even be part of the key.
    commit(pair, "INSERT INTO key_of_it VALUES (8), (9)", "UPDATE key_of_it SET a = 10 WHERE a = 9")
    assert same(pair, "key_of_it") == [("10", "3"), ("8", "1")]


def test_a_generated_column_of_one_node_alone_is_no_difference(pair: TwoNodes) -> None:
    commit(pair, "INSERT INTO source_only VALUES (2); UPDATE source_only SET a = 30 WHERE a = 1")
    # FULL tables of the publication have PostgreSQL 18 send all stored columns: this one is passed over.
    commit(pair, "INSERT INTO target_only VALUES (2); UPDATE target_only SET a = 30 WHERE a = 1")
    assert rows(pair, "SELECT a FROM source_only") == ([(2,), (30,)], [(2,), (30,)])
    assert pair.b.query("SELECT a, twice FROM target_only ORDER BY a") == [(2, 4), (30, 60)]
    assert (anomalies(pair, "source_only"), anomalies(pair, "target_only")) == ({}, {})


def test_full_identity_with_a_stored_column_updates_and_is_found(pair: TwoNodes) -> None:
    commit(
        pair,
        "INSERT INTO full_stored (a, c) VALUES (1, NULL), (2, 'x')",
        "UPDATE full_stored SET c = 'y' WHERE a = 2; DELETE FROM full_stored"
        " WHERE ctid = (SELECT min(ctid) FROM full_stored)",
    )
    assert same(pair, "full_stored") == [("1", "2", None), ("2", "4", "y")]
    assert anomalies(pair, "full_stored") == {}


def test_a_table_of_generated_columns_only_keeps_its_rows(pair: TwoNodes) -> None:
    commit(pair, "INSERT INTO nothing_else DEFAULT VALUES; INSERT INTO nothing_else DEFAULT VALUES")
    commit(pair, "DELETE FROM nothing_else WHERE ctid = (SELECT min(ctid) FROM nothing_else)")
    assert same(pair, "nothing_else") == [("42",), ("42",)]


def test_virtual_columns_are_computed_where_they_are_read(pair: TwoNodes) -> None:
    commit(pair, "INSERT INTO virtual_too VALUES (5)", "UPDATE virtual_too SET a = 7 WHERE a = 1")
    assert same(pair, "virtual_too") == [("5", "6"), ("7", "8")]
    assert anomalies(pair, "virtual_too") == {}


@pytest.mark.parametrize("table", ["differs", "hollow", "by_function", "virtual_differs", "full_differs"])
def test_a_column_that_comes_out_differently_is_reported_and_the_stream_goes_on(
    pair: TwoNodes, table: str
) -> None:
    commit(pair, f"INSERT INTO {table} VALUES (1), (2)", f"UPDATE {table} SET a = 9 WHERE a = 1")
    commit(pair, f"DELETE FROM {table} WHERE a = 2")
    assert rows(pair, f"SELECT a FROM {table}") == ([(9,)], [(9,)])
    source, target = rows(pair, f"SELECT b FROM {table}")
    assert source != target
    assert anomalies(pair, table) == {REPORT: 3}
    deadline = time.monotonic() + 30  # a status is written now and then
    while REPORT not in pair.b.ctl("status", "--output", "json").stdout:
        assert time.monotonic() < deadline, "the report is not in the status"
    assert f'"table": "public.{table}", "columns": "\\"b\\""' in pair.b.log_file("consumer").read_text()


def test_a_column_that_becomes_generated_at_the_target_under_way_is_reported(pair: TwoNodes) -> None:
    commit(pair, "INSERT INTO became VALUES (1, 5)")
    assert anomalies(pair, "became") == {}
    pair.b.execute("ALTER TABLE became DROP b, ADD b int GENERATED ALWAYS AS (a) STORED")
    commit(pair, "INSERT INTO became VALUES (2, 5); UPDATE became SET b = 6 WHERE a = 1")
    assert rows(pair, "SELECT * FROM became") == ([(1, 6), (2, 5)], [(1, 1), (2, 2)])
    assert anomalies(pair, "became") == {REPORT: 2}


def test_what_postgresql_would_refuse_at_an_update_is_refused_when_it_is_published(pair: TwoNodes) -> None:
    pair.a.execute(
        "CREATE TABLE full_virtual (a int NOT NULL, b int GENERATED ALWAYS AS (a) VIRTUAL);"
        "ALTER TABLE full_virtual REPLICA IDENTITY FULL"
    )
    for table, words in (("full_virtual", "virtual"), ("key_of_it", "list the columns")):
        refused = pair.a.ctl("publication", "create", "other", "--table", table, check=False)
        assert refused.returncode != 0
        assert words in refused.stderr
