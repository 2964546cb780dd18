"""What once went wrong in PostgreSQL's own logical replication, each as a scenario of ours."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.nodes import TwoNodes
from tests.stack import Stack
from tests.topology.stops import stands
from tests.topology.subscription.scenes import anomalies, commit, running, same

pytestmark = [pytest.mark.topology, pytest.mark.timeout(300)]

CONFIG = "[limits]\nretry_backoff_max_ms = 1000\nstatus_interval_ms = 300\n"
SCHEMA = """
CREATE FUNCTION twice(x int) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT x * 2';
CREATE TABLE indexed (a int PRIMARY KEY, b int);
CREATE INDEX ON indexed (b) WHERE a > twice(1);
CREATE UNIQUE INDEX ON indexed (twice(b));
CREATE TABLE beside (a int PRIMARY KEY, b int);
CREATE TABLE reidentified (id int PRIMARY KEY, a int NOT NULL, b int NOT NULL, v text);
CREATE UNIQUE INDEX by_a ON reidentified (a);
CREATE UNIQUE INDEX by_b ON reidentified (b);
CREATE SCHEMA moving; CREATE TABLE moving.things (a int PRIMARY KEY);
CREATE TABLE shrunk (a int, gone1 text, b text, gone2 int, c int);
ALTER TABLE shrunk REPLICA IDENTITY FULL;
CREATE TABLE computed (a int, d int GENERATED ALWAYS AS (a * 2) STORED, b text);
ALTER TABLE computed REPLICA IDENTITY FULL;
CREATE TABLE grown (a int, b text); ALTER TABLE grown REPLICA IDENTITY FULL;
CREATE TABLE grown_here (a int PRIMARY KEY, b text);
CREATE TABLE watched (a int PRIMARY KEY);
CREATE TABLE unique_twice (a int PRIMARY KEY, b int UNIQUE);
"""
SOURCE = """
CREATE UNLOGGED TABLE unlogged (a int PRIMARY KEY);
CREATE TABLE target_wider (a int PRIMARY KEY, b int);
INSERT INTO reidentified VALUES (1, 10, 100, 'one'), (2, 20, 200, 'two');
INSERT INTO shrunk VALUES (1, 'x', 'one', 1, NULL), (1, 'y', 'one', 2, NULL), (2, 'z', NULL, 3, 5);
INSERT INTO computed (a, b) VALUES (1, 'one'), (2, 'two');
INSERT INTO grown SELECT g, 'g' FROM generate_series(1, 3) g;
"""
TARGET = """
CREATE TABLE target_wider (c int DEFAULT 7, b int, a int PRIMARY KEY,
    d int GENERATED ALWAYS AS (b * 10) STORED);
CREATE FUNCTION complain() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    BEGIN
        INSERT INTO public.indexed VALUES (NEW.a, NULL), (NEW.a, NULL);
    EXCEPTION WHEN unique_violation THEN NULL;
    END;
    RETURN NEW;
END $$;
CREATE TRIGGER complain BEFORE INSERT ON watched FOR EACH ROW EXECUTE FUNCTION complain();
ALTER TABLE watched ENABLE ALWAYS TRIGGER complain;
"""
TABLES = (
    "indexed", "beside", "reidentified", "moving.things", "shrunk", "computed", "grown", "grown_here",
    "watched", "unique_twice", "target_wider",
)  # fmt: skip


@pytest.fixture(scope="module")
def pair(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    """All tables of this file in one publication."""
    folder = tmp_path_factory.mktemp("bugs")
    tables = [f"{name}(*)" for name in TABLES]
    with running(
        stack, folder, SCHEMA, tables, source=SOURCE, target=TARGET, config=CONFIG, versions=(17, 18)
    ) as made:
        yield made


def test_indexes_over_functions_of_the_user_are_no_obstacle(pair: TwoNodes) -> None:
    commit(
        pair,
        "INSERT INTO indexed SELECT g, g FROM generate_series(1, 20) g",
        "UPDATE indexed SET b = -b WHERE a > 10; DELETE FROM indexed WHERE a < 4",
        "UPDATE indexed SET a = a + 100, b = b + 1000 WHERE a = 7",
    )
    assert len(same(pair, "indexed")) == 17


def test_temporary_and_unlogged_tables_leave_nothing_in_the_stream(pair: TwoNodes) -> None:
    audited = pair.audited_rows()
    commit(
        pair,
        "CREATE TEMPORARY TABLE passing (a int PRIMARY KEY); INSERT INTO passing VALUES (1);"
        "INSERT INTO unlogged VALUES (1); INSERT INTO beside VALUES (1, 1);"
        "UPDATE passing SET a = 2; DELETE FROM unlogged; TRUNCATE unlogged, passing",
    )
    assert pair.audited_rows() == audited + 1
    for table in ("unlogged", "pg_temp.nothing"):
        refused = pair.a.ctl("publication", "create", "other", "--table", f"{table}(*)", check=False)
        assert refused.returncode != 0
    assert (
        "unlogged"
        in pair.a.ctl("publication", "create", "other", "--table", "unlogged(*)", check=False).stderr
    )


def test_a_replica_identity_changed_under_way_counts_from_the_next_change_on(pair: TwoNodes) -> None:
    commit(
        pair,
        "ALTER TABLE reidentified REPLICA IDENTITY USING INDEX by_a",
        "UPDATE reidentified SET v = 'by a' WHERE id = 1;UPDATE reidentified SET a = 21, id = 3 WHERE id = 2",
        "ALTER TABLE reidentified REPLICA IDENTITY USING INDEX by_b;"
        "UPDATE reidentified SET v = 'by b', a = a + 1, id = id + 10; UPDATE reidentified SET b = -b",
        "ALTER TABLE reidentified REPLICA IDENTITY FULL; UPDATE reidentified SET b = b + 1, v = v || ' full'",
        "ALTER TABLE reidentified REPLICA IDENTITY DEFAULT; DELETE FROM reidentified WHERE id = 13",
    )
    assert same(pair, "reidentified") == [("11", "11", "-99", "by b full")]
    assert anomalies(pair, "reidentified") == {}


def test_rows_of_a_table_whose_schema_has_another_name_for_a_while_arrive(pair: TwoNodes) -> None:
    """The WAL names the schema as it was when a row was written, which the publication does not know."""
    commit(
        pair,
        "INSERT INTO moving.things VALUES (1); ALTER SCHEMA moving RENAME TO moved;"
        "INSERT INTO moved.things VALUES (3);"
        "CREATE SCHEMA moving; CREATE TABLE moving.things (a int PRIMARY KEY);"
        "INSERT INTO moving.things VALUES (99); DROP SCHEMA moving CASCADE;"
        "ALTER SCHEMA moved RENAME TO moving;"
        "INSERT INTO moving.things VALUES (2)",
        "UPDATE moving.things SET a = a + 10",
    )
    assert same(pair, "moving.things") == [("11",), ("12",), ("13",)]


def test_dropped_columns_are_not_looked_at_where_rows_are_found_by_all_columns(pair: TwoNodes) -> None:
    pair.b.execute("ALTER TABLE shrunk DROP gone1; ALTER TABLE shrunk DROP gone2")
    commit(
        pair,
        "ALTER TABLE shrunk DROP gone2; ALTER TABLE shrunk DROP gone1; UPDATE shrunk SET c = 3 WHERE a = 1",
        "DELETE FROM shrunk WHERE a = 2",
    )
    assert same(pair, "shrunk") == [("1", "one", "3"), ("1", "one", "3")]
    assert anomalies(pair, "shrunk") == {}


def test_generated_columns_are_not_looked_at_where_rows_are_found_by_all_columns(pair: TwoNodes) -> None:
    commit(pair, "UPDATE computed SET a = a + 1; DELETE FROM computed WHERE b = 'one'")
    assert same(pair, "computed") == [("3", "6", "two")]
    assert anomalies(pair, "computed") == {}


def test_rows_older_than_a_column_with_a_default_are_found_by_all_columns(pair: TwoNodes) -> None:
    """Such rows do not hold the value themselves, neither at the source nor at the target."""
    for node in (pair.b, pair.a):
        node.execute("ALTER TABLE grown ADD c int DEFAULT 5, ADD d text")
    commit(
        pair,
        "UPDATE grown SET b = 'u' WHERE a = 1; DELETE FROM grown WHERE a = 2;"
        "UPDATE grown SET c = 6 WHERE a = 3",
    )
    assert same(pair, "grown") == [("1", "u", "5", None), ("3", "g", "6", None)]
    assert anomalies(pair, "grown") == {}


def test_a_column_only_the_source_added_is_named_and_the_stream_goes_on_when_it_is_there(
    pair: TwoNodes,
) -> None:
    commit(pair, "INSERT INTO grown_here VALUES (1, 'before')")
    pair.a.execute("ALTER TABLE grown_here ADD c int DEFAULT 5; INSERT INTO grown_here VALUES (2, 'with c')")
    stands(pair.b, pair.chain, "grown_here lacks column", '"c"')
    assert pair.b.query("SELECT count(*) FROM grown_here") == [(1,)]
    pair.b.execute("ALTER TABLE grown_here ADD c int DEFAULT 5")
    commit(pair, "UPDATE grown_here SET b = b || '!'")
    assert same(pair, "grown_here") == [("1", "before!", "5"), ("2", "with c!", "5")]


def test_an_error_a_trigger_swallows_does_not_take_progress_with_it(pair: TwoNodes) -> None:
    """The subtransaction of the trigger aborts; rows, receipt and position of the one around it stand."""
    before = pair.acknowledged_rows()
    commit(pair, "INSERT INTO watched VALUES (1001), (1002)", "INSERT INTO watched VALUES (1003)")
    pair.b.stop("consumer")
    pair.b.start("consumer")
    commit(pair, "INSERT INTO watched VALUES (1004)")
    assert len(same(pair, "watched")) == 4
    assert pair.acknowledged_rows() == before + 4, "nothing came twice"
    assert pair.b.query("SELECT count(*) FROM indexed WHERE a > 1000") == [(0,)]


def test_a_target_with_other_columns_in_another_order_keeps_its_own(pair: TwoNodes) -> None:
    commit(
        pair,
        "INSERT INTO target_wider VALUES (1, 1), (2, 2); UPDATE target_wider SET a = 3 WHERE a = 1",
        "ALTER TABLE target_wider REPLICA IDENTITY FULL; UPDATE target_wider SET b = 9 WHERE a = 2",
    )
    assert pair.b.query("SELECT a, b, c, d FROM target_wider ORDER BY a") == [(2, 9, 7, 90), (3, 1, 7, 10)]


def test_unique_values_change_hands_within_and_between_transactions(pair: TwoNodes) -> None:
    commit(
        pair,
        "INSERT INTO unique_twice VALUES (1, 1), (2, 2)",
        "DELETE FROM unique_twice WHERE a = 1; UPDATE unique_twice SET b = 1;"
        "INSERT INTO unique_twice VALUES (1, 2)",
        "UPDATE unique_twice SET b = NULL WHERE a = 1; UPDATE unique_twice SET b = 2 WHERE a = 2;"
        "UPDATE unique_twice SET b = 1 WHERE a = 1",
    )
    assert same(pair, "unique_twice") == [("1", "1"), ("2", "2")]
