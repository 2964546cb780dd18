"""Definitions that change at the source while rows wait: each row arrives as it was decoded.

What the target lacks for a new row stops the stream behind the last row it can take, and says so; once the
DBA has made the change there, the stream goes on without a command. Rows wait in the WAL (the producer is
down, and reads all of them at once) or in Kafka (the consumer is down, and finds all of them at once).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.nodes import TwoNodes
from tests.stack import Stack
from tests.topology.stops import stands
from tests.topology.subscription.scenes import anomalies, commit, running, same

pytestmark = [pytest.mark.topology, pytest.mark.timeout(300)]

CONFIG = "[limits]\nretry_backoff_max_ms = 500\nstatus_interval_ms = 300\n"
PLACES = ("wal", "kafka")
CHANGES = ("added", "filled", "dropped", "needed", "typed", "renamed", "keyed", "listed")
SCHEMA = "".join(
    f"CREATE TABLE {place}_{change} (id int PRIMARY KEY, v int NOT NULL, k int);\n"
    for place in PLACES
    for change in CHANGES
)
TABLES = [f"{place}_{change}(*)" for place in PLACES for change in CHANGES if change != "listed"]
LISTED = [f"{place}_listed(id, v)" for place in PLACES]


@pytest.fixture(scope="module")
def pair(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    """A table for each change and each place where rows may wait."""
    folder = tmp_path_factory.mktemp("drift")
    drops = "".join(f"ALTER TABLE {place}_dropped ALTER v DROP NOT NULL;" for place in PLACES)
    with running(
        stack, folder, SCHEMA, [*TABLES, *LISTED], target=drops, config=CONFIG, versions=(17, 18)
    ) as made:
        yield made


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    """Where the rows wait."""
    return str(request.param)


def sent(pair: TwoNodes) -> None:
    """Wait until the producer has sent everything that is committed now."""
    lsn = pair.a.query("SELECT pg_current_wal_insert_lsn()")[0][0]
    deadline = time.monotonic() + 60
    while not pair.a.query(
        "SELECT 1 FROM vsql_sync.streams JOIN pg_replication_slots r USING (slot_name)"
        " WHERE chain = %s AND direction = 'out' AND r.confirmed_flush_lsn >= %s::pg_lsn",
        pair.chain,
        lsn,
    ):
        assert time.monotonic() < deadline, pair.a.tail("producer")
        time.sleep(0.1)


@contextmanager
def waiting(pair: TwoNodes, place: str) -> Iterator[None]:
    """What is written inside waits at this place until the end."""
    node, role = (pair.a, "producer") if place == "wal" else (pair.b, "consumer")
    node.stop(role)
    yield
    if place == "kafka":
        sent(pair)
    node.start(role)


def backlog(pair: TwoNodes, place: str, table: str, *scripts: str) -> None:
    """Let the scripts, one transaction each, be a backlog; `{}` is the table."""
    with waiting(pair, place):
        for script in scripts:
            pair.a.execute(script.format(*[table] * script.count("{}")))


def mend(pair: TwoNodes, table: str, script: str) -> None:
    """What the DBA does at the target; nothing else is done to make the stream go on."""
    pair.b.execute(script.format(table))
    commit(pair)


def ids(pair: TwoNodes, table: str) -> list[int]:
    """Rows of the target."""
    return [row[0] for row in pair.b.query(f"SELECT id FROM {table} ORDER BY id")]


def test_a_column_more_stops_behind_the_rows_without_it(pair: TwoNodes, place: str) -> None:
    table = f"{place}_added"
    backlog(
        pair, place, table,
        "INSERT INTO {} VALUES (1, 1), (2, 2)",
        "ALTER TABLE {} ADD note text",
        "INSERT INTO {} (id, v, note) VALUES (3, 3, 'n'); UPDATE {} SET note = 'late' WHERE id = 1",
    )  # fmt: skip
    said = stands(pair.b, pair.chain, f"public.{table} lacks column", '"note"', "add what is missing")
    assert ids(pair, table) == [1, 2], "what came before does not wait"
    assert said[:40] in pair.b.ctl("status").stdout
    compared = pair.a.ctl(
        "schema", "compare", "--peer-connection", pair.b.conninfo, "--table", table, "--output", "json",
        check=False,
    )  # fmt: skip
    (found,) = json.loads(compared.stdout)["tables"]
    assert found["differences"] == [{"column": "note", "difference": "only on this node"}]
    mend(pair, table, "ALTER TABLE {} ADD note text")
    assert same(pair, table) == [("1", "1", None, "late"), ("2", "2", None, None), ("3", "3", None, "n")]


def test_a_column_more_with_a_default_has_it_where_the_same_is_done(pair: TwoNodes, place: str) -> None:
    table = f"{place}_filled"
    alter = "ALTER TABLE {} ADD kind text NOT NULL DEFAULT 'old'; ALTER TABLE {} ALTER kind SET DEFAULT 'new'"
    backlog(
        pair, place, table,
        "INSERT INTO {} VALUES (1, 1)", alter,
        "INSERT INTO {} VALUES (2, 2); UPDATE {} SET v = 3 WHERE id = 1",
    )  # fmt: skip
    stands(pair.b, pair.chain, f"public.{table} lacks column", '"kind"')
    assert ids(pair, table) == [1]
    mend(pair, table, alter.replace("{}", table))
    assert same(pair, table) == [("1", "3", None, "old"), ("2", "2", None, "new")]


def test_a_column_less_needs_nothing_where_the_target_can_do_without(pair: TwoNodes, place: str) -> None:
    table = f"{place}_dropped"
    backlog(
        pair, place, table,
        "INSERT INTO {} VALUES (1, 1)", "ALTER TABLE {} DROP v",
        "INSERT INTO {} VALUES (2, 2); UPDATE {} SET k = 3 WHERE id = 1",
    )  # fmt: skip
    commit(pair)
    assert pair.b.query(f"SELECT id, v, k FROM {table} ORDER BY 1") == [(1, 1, 3), (2, None, 2)]


def test_a_column_less_that_the_target_needs_stops_and_goes_on(pair: TwoNodes, place: str) -> None:
    table = f"{place}_needed"
    backlog(
        pair, place, table,
        "INSERT INTO {} VALUES (1, 1)", "ALTER TABLE {} DROP v", "INSERT INTO {} VALUES (2, 2)",
    )  # fmt: skip
    stands(pair.b, pair.chain, "NotNullViolation", "column v", f"public.{table}", "NOT NULL")
    assert ids(pair, table) == [1]
    mend(pair, table, "ALTER TABLE {} DROP v")
    assert same(pair, table) == [("1", None), ("2", "2")]


def test_a_type_that_takes_more_stops_at_the_first_value_beyond(pair: TwoNodes, place: str) -> None:
    table = f"{place}_typed"
    backlog(
        pair, place, table,
        "INSERT INTO {} VALUES (1, 1)", "ALTER TABLE {} ALTER v TYPE text USING 'was ' || v",
        "INSERT INTO {} VALUES (2, 'two'); UPDATE {} SET v = 'new' WHERE id = 1",
    )  # fmt: skip
    said = stands(pair.b, pair.chain, "InvalidTextRepresentation", f"public.{table}")
    assert "two" not in said, "no value of a row"
    assert pair.b.query(f"SELECT id, v FROM {table}") == [(1, 1)], "as it was when it was decoded"
    mend(pair, table, "ALTER TABLE {} ALTER v TYPE text USING 'was ' || v")
    assert same(pair, table) == [("1", "new", None), ("2", "two", None)]


def test_a_column_that_is_renamed_twice_is_followed_name_by_name(pair: TwoNodes, place: str) -> None:
    table = f"{place}_renamed"
    backlog(
        pair, place, table,
        "INSERT INTO {} VALUES (1, 1)", "ALTER TABLE {} RENAME v TO w",
        "INSERT INTO {} VALUES (2, 2)", "UPDATE {} SET w = 10 WHERE id = 1", "ALTER TABLE {} RENAME w TO x",
        "INSERT INTO {} VALUES (3, 3); DELETE FROM {} WHERE x = 2",
    )  # fmt: skip
    stands(pair.b, pair.chain, f"public.{table} lacks column", '"w"')
    assert pair.b.query(f"SELECT id, v FROM {table}") == [(1, 1)]
    pair.b.execute(f"ALTER TABLE {table} RENAME v TO w")
    stands(pair.b, pair.chain, f"public.{table} lacks column", '"x"')
    assert pair.b.query(f"SELECT id, w FROM {table} ORDER BY 1") == [(1, 10), (2, 2)]
    mend(pair, table, "ALTER TABLE {} RENAME w TO x")
    assert same(pair, table) == [("1", "10", None), ("3", "3", None)]


def test_another_key_is_followed_and_rows_are_found_by_the_one_they_were_written_with(
    pair: TwoNodes, place: str
) -> None:
    table = f"{place}_keyed"
    backlog(
        pair, place, table,
        "INSERT INTO {} VALUES (1, 11), (2, 12), (3, 13)", "UPDATE {} SET k = 1 WHERE id = 1",
        "ALTER TABLE {} DROP CONSTRAINT " + table + "_pkey, ADD PRIMARY KEY (v)",
        "UPDATE {} SET k = 2, id = 20 WHERE v = 12; DELETE FROM {} WHERE v = 13",
    )  # fmt: skip
    commit(pair)
    assert same(pair, table) == [("1", "11", "1"), ("20", "12", "2")]
    assert anomalies(pair, table) == {}


def test_a_column_list_keeps_a_new_column_here(pair: TwoNodes, place: str) -> None:
    table = f"{place}_listed"
    backlog(
        pair, place, table,
        "INSERT INTO {} VALUES (1, 1)", "ALTER TABLE {} ADD secret text DEFAULT 's', DROP k",
        "INSERT INTO {} (id, v) VALUES (2, 2); UPDATE {} SET secret = 't', v = 3 WHERE id = 1",
    )  # fmt: skip
    commit(pair)
    assert pair.b.query(f"SELECT * FROM {table} ORDER BY 1") == [(1, 3, None), (2, 2, None)]
