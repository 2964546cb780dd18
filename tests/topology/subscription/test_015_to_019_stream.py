"""Transactions larger than the walsender's memory: spilled, with subtransactions, aborts and DDL inside.

Native replication streams them while they run; ours come at their commit, in fragments of one target
transaction. So a transaction that rolls back never leaves the source, and one that commits is there at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from tests.nodes import TwoNodes
from tests.stack import Stack
from tests.topology.subscription.scenes import commit, running, same

pytestmark = [pytest.mark.topology, pytest.mark.timeout(300)]

NAMES = ("large", "aside", "nested", "altered", "aborted", "truncated", "altered_back")
SCHEMA = "".join(f"CREATE TABLE {name} (a int PRIMARY KEY, b text);\n" for name in NAMES)
# What the transactions add on the way is at the target before; it has columns of its own, too.
TARGET = """
ALTER TABLE large ADD own timestamptz DEFAULT now(), ADD other bigint DEFAULT 999;
ALTER TABLE nested ADD c int, ADD d int; ALTER TABLE altered ADD c int, ADD d text, ADD e int DEFAULT 5;
ALTER TABLE aborted ADD c int; ALTER TABLE altered_back ADD c int, ADD d int, ADD e int;
"""
# Several fragments of each large transaction, and a walsender that spills what it cannot hold.
CONFIG = "[limits]\nbatch_max_rows = 700\n"
LITTLE = """
DO $$ BEGIN
    EXECUTE format('ALTER DATABASE %I SET logical_decoding_work_mem = 64', current_database());
END $$;
"""


def _rows(first: int, last: int) -> str:
    return f"SELECT g, repeat(md5(g::text), 3) FROM generate_series({first}, {last}) g"


@pytest.fixture(scope="module")
def pair(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    """All tables of this file in one publication, each with two rows to begin with."""
    folder = tmp_path_factory.mktemp("stream")
    first = "".join(f"INSERT INTO {name} VALUES (1, 'foo'), (2, 'bar');\n" for name in NAMES)
    tables = [f"{name}(*)" for name in NAMES]
    with running(stack, folder, SCHEMA, tables, source=LITTLE + first, target=TARGET, config=CONFIG) as made:
        yield made


def _spilled(pair: TwoNodes) -> int:
    return int(
        pair.a.query(
            "SELECT coalesce(sum(spill_txns), 0) FROM pg_stat_replication_slots"
            " JOIN vsql_sync.streams USING (slot_name) WHERE chain = %s",
            pair.chain,
        )[0][0]
    )


def test_015_a_transaction_the_walsender_spills_arrives_whole(pair: TwoNodes) -> None:
    before = _spilled(pair)
    commit(
        pair,
        f"INSERT INTO large {_rows(3, 5000)}; UPDATE large SET b = b || 'x' WHERE a % 2 = 0;"
        " DELETE FROM large WHERE a % 3 = 0;",
    )
    assert len(same(pair, "large")) == 3334
    assert pair.b.query("SELECT count(*) FROM large WHERE own IS NOT NULL AND other = 999") == [(3334,)]
    assert _spilled(pair) > before, "the walsender held it in memory: this proves nothing"


def test_015_interleaved_large_transactions_arrive_in_commit_order(pair: TwoNodes) -> None:
    with psycopg.connect(pair.a.conninfo) as first, psycopg.connect(pair.a.conninfo) as second:
        first.execute(f"INSERT INTO large {_rows(10001, 12500)}")
        second.execute(f"INSERT INTO aside {_rows(10001, 12500)}")
        commit(pair, "INSERT INTO aside VALUES (3, 'between')")
        assert same(pair, "aside")[-1] == ("3", "between"), "small ones do not wait for large ones"
        second.execute("UPDATE aside SET b = 'second' WHERE a <= 3")
        first.execute("DELETE FROM large WHERE a > 12000")
        second.commit()
        # Rows both of them change: what is left of them tells the order.
        first.execute("UPDATE aside SET b = b || ' then first' WHERE a <= 3")
        first.commit()
    commit(pair)
    assert len(same(pair, "large")) == 3334 + 2000
    assert {text for key, text in same(pair, "aside") if int(key) <= 3} == {"second then first"}


def test_016_changes_of_all_subtransactions_arrive(pair: TwoNodes) -> None:
    steps = [f"INSERT INTO nested {_rows(3, 500)}"]
    for number in range(1, 5):
        low = 500 * number
        steps += [
            f"SAVEPOINT s{number}",
            f"INSERT INTO nested {_rows(low + 1, low + 500)}",
            "UPDATE nested SET b = b || 'y' WHERE a % 2 = 0",
            "DELETE FROM nested WHERE a % 3 = 0",
        ]
    commit(pair, "; ".join(steps))
    assert len(same(pair, "nested")) == 1667
    assert pair.b.query("SELECT count(c), count(d) FROM nested") == [(0, 0)]


def test_017_columns_added_inside_of_a_transaction_are_carried_from_there_on(pair: TwoNodes) -> None:
    commit(
        pair,
        "INSERT INTO altered VALUES (3, 'three'); ALTER TABLE altered ADD c int; SAVEPOINT s1;"
        "INSERT INTO altered VALUES (4, 'four', -4)",
        f"INSERT INTO altered (a, b, c) SELECT a, b, -a FROM ({_rows(5, 1000)}) AS r (a, b);"
        "ALTER TABLE altered ADD d text; SAVEPOINT s1;"
        f"INSERT INTO altered (a, b, c, d) SELECT a, b, -a, 'd' FROM ({_rows(1001, 2000)}) AS r (a, b);"
        "ALTER TABLE altered ADD e int; SAVEPOINT s2;"
        f"INSERT INTO altered SELECT a, b, -a, 'd', a * 2 FROM ({_rows(2001, 2500)}) AS r (a, b);"
        "UPDATE altered SET e = 0 WHERE a = 3",
    )
    sides = [
        node.query("SELECT count(*), count(c), count(d), count(*) FILTER (WHERE e >= 4002) FROM altered")
        for node in (pair.a, pair.b)
    ]
    assert sides == [[(2500, 2497, 1500, 500)]] * 2
    # A column the source had not got yet keeps the target's default, until the row's next change.
    assert pair.b.query("SELECT a, e FROM altered WHERE a IN (1, 3, 4) ORDER BY a") == [
        (1, 5),
        (3, 0),
        (4, 5),
    ]


def test_018_what_a_savepoint_took_back_never_arrives(pair: TwoNodes) -> None:
    commit(
        pair,
        f"INSERT INTO aborted {_rows(3, 900)}; SAVEPOINT s1; INSERT INTO aborted {_rows(901, 1800)};"
        f"SAVEPOINT s2; INSERT INTO aborted {_rows(1801, 2700)}; SAVEPOINT s3; DELETE FROM aborted;"
        f"ROLLBACK TO s2; INSERT INTO aborted {_rows(1801, 1802)}; ROLLBACK TO s1;"
        f"INSERT INTO aborted {_rows(5000, 5001)}; SAVEPOINT s4; UPDATE aborted SET b = 'kept' WHERE a = 1",
    )
    assert len(same(pair, "aborted")) == 902
    # Released subtransactions go with the one around them.
    commit(
        pair,
        f"INSERT INTO aborted {_rows(6001, 6002)}; SAVEPOINT s1; INSERT INTO aborted {_rows(6003, 6900)};"
        f"SAVEPOINT s2; INSERT INTO aborted {_rows(6901, 7800)}; SAVEPOINT s3; RELEASE s2; ROLLBACK TO s1",
    )
    assert len(same(pair, "aborted")) == 904
    audited = pair.audited_rows()
    with psycopg.connect(pair.a.conninfo) as connection:
        connection.execute(f"INSERT INTO aborted {_rows(8000, 12000)}; SAVEPOINT s; DELETE FROM aborted")
        connection.rollback()
    commit(pair, "INSERT INTO aborted VALUES (12001, 'after')")
    assert len(same(pair, "aborted")) == 905
    assert pair.audited_rows() == audited + 1, "what was rolled back is in no manifest"


def test_018_a_truncate_that_was_taken_back_empties_nothing(pair: TwoNodes) -> None:
    commit(
        pair,
        f"INSERT INTO truncated {_rows(3, 1500)}; SAVEPOINT s; TRUNCATE truncated; ROLLBACK TO s;"
        "DELETE FROM truncated WHERE a > 1000",
    )
    assert len(same(pair, "truncated")) == 1000
    commit(pair, f"TRUNCATE truncated; SAVEPOINT s; INSERT INTO truncated {_rows(1, 1500)}")
    assert len(same(pair, "truncated")) == 1500


def test_019_columns_a_savepoint_took_back_leave_no_trace(pair: TwoNodes) -> None:
    commit(
        pair,
        f"INSERT INTO altered_back {_rows(3, 500)}; ALTER TABLE altered_back ADD c int; SAVEPOINT s1;"
        f"INSERT INTO altered_back SELECT a, b, -a FROM ({_rows(501, 1000)}) AS r (a, b);"
        "ALTER TABLE altered_back ADD d int; SAVEPOINT s2;"
        f"INSERT INTO altered_back SELECT a, b, -a, a FROM ({_rows(1001, 1500)}) AS r (a, b);"
        "ALTER TABLE altered_back ADD e int; SAVEPOINT s3;"
        f"INSERT INTO altered_back SELECT a, b, -a, a, 1 FROM ({_rows(1501, 2000)}) AS r (a, b);"
        "ALTER TABLE altered_back DROP c; ROLLBACK TO s1;"
        f"INSERT INTO altered_back SELECT a, b, a FROM ({_rows(501, 1000)}) AS r (a, b)",
    )
    assert len(same(pair, "altered_back")) == 1000
    assert pair.b.query("SELECT count(c), min(c), count(d), count(e) FROM altered_back") == [(500, 501, 0, 0)]
