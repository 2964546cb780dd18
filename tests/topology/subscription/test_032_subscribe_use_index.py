"""Under full identity the target finds rows by an index of its own where it has one that can be used."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.nodes import TwoNodes
from tests.stack import Stack
from tests.topology.subscription.scenes import anomalies, commit, running, same

pytestmark = [pytest.mark.topology, pytest.mark.timeout(300)]

ROWS = 4000
NAMES = ("plain", "nullable", "several", "hashed", "keyed", "partial", "expression", "split")
SOURCE = "".join(
    f"CREATE TABLE {name} (a int{' NOT NULL' if name == 'keyed' else ''}, b text, c numeric);"
    f"ALTER TABLE {name} REPLICA IDENTITY FULL;"
    f"INSERT INTO {name} SELECT {'g' if name == 'keyed' else f'NULLIF(g % {ROWS // 2}, 7)'}, 'b' || g % 100,"
    f" 1.0 FROM generate_series(1, {ROWS}) g;"
    for name in NAMES
)
TARGET = "".join(
    f"CREATE TABLE {name} (c numeric, b text, a bigint{' NOT NULL' if name == 'keyed' else ''});"
    for name in NAMES
    if name != "split"
)
TARGET += """
CREATE INDEX ON plain (a); CREATE INDEX ON nullable (a, b);
CREATE INDEX ON several (b); CREATE INDEX ON several (a, c);
CREATE INDEX ON hashed USING hash (a); CREATE UNIQUE INDEX ON keyed (a);
CREATE INDEX ON partial (a) WHERE b IS NULL; CREATE INDEX ON expression ((a + 1));
CREATE TABLE split (a int, b text, c numeric) PARTITION BY HASH (a);
CREATE TABLE split_0 PARTITION OF split FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE split_1 PARTITION OF split FOR VALUES WITH (MODULUS 2, REMAINDER 1);
CREATE INDEX ON split (a);
"""
CHANGES = (
    "UPDATE {0} SET c = 2 WHERE a BETWEEN 10 AND 14; DELETE FROM {0} WHERE a BETWEEN 20 AND 22",
    "UPDATE {0} SET b = NULL WHERE a = 30; UPDATE {0} SET b = 'was null' WHERE a = 30",
    "UPDATE {0} SET a = NULL, c = 1.00 WHERE a = 40; DELETE FROM {0} WHERE a = 41",
)


@pytest.fixture(scope="module")
def pair(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    folder = tmp_path_factory.mktemp("use-index")
    with running(stack, folder, "", NAMES, source=SOURCE, target=TARGET, versions=(16, 18)) as made:
        made.b.query("ANALYZE")
        yield made


def _scans(pair: TwoNodes, table: str) -> tuple[int, int]:
    """How often the target read a table, its partitions included: in whole, and by an index."""
    return pair.b.query(
        "SELECT sum(seq_scan)::int, coalesce(sum(idx_scan), 0)::int FROM pg_stat_user_tables"
        " WHERE relname = %s OR relname LIKE %s",
        table,
        f"{table}\\_%",
    )[0]


def _settled(pair: TwoNodes, table: str) -> tuple[int, int]:
    """The same once it no longer grows: a session reports its figures up to ten seconds late."""
    deadline, before = time.monotonic() + 15, _scans(pair, table)
    time.sleep(1)
    while time.monotonic() < deadline and (found := _scans(pair, table)) != before:
        before = found
        time.sleep(2)
    return before


@pytest.mark.parametrize("table", ["plain", "nullable", "several", "hashed", "split"])
def test_an_index_that_is_not_unique_finds_the_rows(pair: TwoNodes, table: str) -> None:
    before = _settled(pair, table)
    commit(pair, *(change.format(table) for change in CHANGES))
    deadline = time.monotonic() + 15
    while _scans(pair, table)[1] - before[1] < 20 and time.monotonic() < deadline:
        time.sleep(0.5)
    whole, by_index = _scans(pair, table)
    assert by_index - before[1] >= 20
    assert whole == before[0]
    assert len(same(pair, table)) == ROWS - 8
    assert anomalies(pair, table) == {}


def test_a_unique_index_of_columns_that_are_never_null_is_the_key(pair: TwoNodes) -> None:
    commit(
        pair, CHANGES[0].format("keyed"), CHANGES[1].format("keyed"), "UPDATE keyed SET a = -a WHERE a = 50"
    )
    assert len(same(pair, "keyed")) == ROWS - 3
    assert anomalies(pair, "keyed") == {}


@pytest.mark.parametrize("table", ["partial", "expression"])
def test_an_index_that_cannot_say_which_row_is_meant_is_passed_over(pair: TwoNodes, table: str) -> None:
    commit(pair, *(change.format(table) for change in CHANGES))
    assert len(same(pair, table)) == ROWS - 8
    assert anomalies(pair, table) == {}


def test_rows_are_found_still_when_the_index_is_dropped(pair: TwoNodes) -> None:
    pair.b.execute("DROP INDEX keyed_a_idx")
    commit(pair, "UPDATE keyed SET c = 3 WHERE a BETWEEN 100 AND 102; DELETE FROM keyed WHERE a = 103")
    pair.b.execute("CREATE INDEX ON keyed (c)")
    commit(pair, "DELETE FROM keyed WHERE a = 104; UPDATE keyed SET a = 105000 WHERE a = 105")
    assert {("100",), ("105000",)} <= {(row[0],) for row in same(pair, "keyed")}
