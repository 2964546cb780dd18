"""Constraints and triggers of the target: which hold for rows that arrive, which do not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.nodes import TwoNodes
from tests.stack import Stack
from tests.topology.subscription.scenes import anomalies, commit, running, same

pytestmark = [pytest.mark.topology, pytest.mark.timeout(300)]

SCHEMA = """
CREATE TABLE parents (id int PRIMARY KEY, v text);
CREATE TABLE children (id int PRIMARY KEY, parent int REFERENCES parents ON DELETE CASCADE ON UPDATE CASCADE);
CREATE TABLE fired (id int PRIMARY KEY, v text, n int);
CREATE TABLE swallowed (id int PRIMARY KEY, v text);
CREATE TABLE column_wise (id int PRIMARY KEY, v text, n int);
CREATE TABLE swapped (id int PRIMARY KEY, place int UNIQUE DEFERRABLE INITIALLY DEFERRED, code text UNIQUE);
CREATE TABLE ring (id int PRIMARY KEY DEFERRABLE INITIALLY IMMEDIATE, next int, seq int NOT NULL UNIQUE);
ALTER TABLE ring ADD FOREIGN KEY (next) REFERENCES ring (seq) DEFERRABLE INITIALLY DEFERRED;
ALTER TABLE ring REPLICA IDENTITY USING INDEX ring_seq_key;
CREATE TABLE tree (id int PRIMARY KEY, up int REFERENCES tree);
CREATE TABLE booked (id int PRIMARY KEY, during int4range, EXCLUDE USING gist (during WITH &&));
CREATE TABLE booked_late (id int PRIMARY KEY, during int4range,
    EXCLUDE USING gist (during WITH &&) DEFERRABLE INITIALLY DEFERRED);
CREATE TABLE checked (id int PRIMARY KEY, n int CHECK (n > 0));
CREATE TABLE parts (a int, b text UNIQUE, c int);
CREATE UNIQUE INDEX parts_some ON parts (a) WHERE c > 0;
CREATE UNIQUE INDEX parts_lower ON parts (lower(b));
ALTER TABLE parts REPLICA IDENTITY FULL;
"""
TARGET = """
CREATE TABLE seen (what text, id int);
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO public.seen VALUES (tg_argv[0] || ' ' || lower(tg_op), coalesce(new.id, old.id));
    RETURN coalesce(new, old); END $$;
CREATE TRIGGER ordinary AFTER INSERT OR UPDATE OR DELETE ON fired FOR EACH ROW EXECUTE FUNCTION note('plain');
CREATE TRIGGER always AFTER INSERT OR UPDATE OR DELETE ON fired FOR EACH ROW EXECUTE FUNCTION note('always');
ALTER TABLE fired ENABLE ALWAYS TRIGGER always;
CREATE TRIGGER replica AFTER INSERT OR DELETE ON fired FOR EACH ROW EXECUTE FUNCTION note('replica');
ALTER TABLE fired ENABLE REPLICA TRIGGER replica;
CREATE TRIGGER disabled AFTER INSERT ON fired FOR EACH ROW EXECUTE FUNCTION note('disabled');
ALTER TABLE fired DISABLE TRIGGER disabled;
CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RETURN CASE WHEN new.v LIKE 'no%' THEN NULL ELSE new END; END $$;
CREATE TRIGGER swallow BEFORE INSERT OR UPDATE ON swallowed FOR EACH ROW EXECUTE FUNCTION swallow();
ALTER TABLE swallowed ENABLE REPLICA TRIGGER swallow;
CREATE TRIGGER columns BEFORE UPDATE OF n ON column_wise FOR EACH ROW EXECUTE FUNCTION note('columns');
ALTER TABLE column_wise ENABLE ALWAYS TRIGGER columns;
CREATE UNIQUE INDEX swapped_own ON swapped (upper(code));
CREATE INDEX fired_own ON fired (v, n);
"""
TABLES = (
    "parents", "children", "fired", "swallowed", "column_wise", "swapped", "ring", "tree", "booked",
    "booked_late", "checked", "parts",
)  # fmt: skip


@pytest.fixture(scope="module")
def pair(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    folder = tmp_path_factory.mktemp("constraints")
    with running(stack, folder, SCHEMA, TABLES, target=TARGET, versions=(18, 15)) as made:
        yield made


def test_foreign_keys_are_the_sources_to_hold_and_their_actions_come_as_changes(pair: TwoNodes) -> None:
    commit(
        pair,
        "INSERT INTO parents SELECT g, 'p' FROM generate_series(1, 6) g",
        "INSERT INTO children SELECT g, 1 + g % 6 FROM generate_series(1, 30) g",
    )
    pair.b.execute("SET session_replication_role = replica; DELETE FROM parents WHERE id = 2")
    commit(
        pair,
        "INSERT INTO children VALUES (100, 2)",
        "DELETE FROM parents WHERE id = 3; UPDATE parents SET id = 40 WHERE id = 4",
    )
    assert len(same(pair, "children")) == 26
    assert pair.b.query("SELECT count(*) FROM children c LEFT JOIN parents p ON p.id = parent"
                        " WHERE p.id IS NULL") == [(6,)]  # fmt: skip
    assert anomalies(pair, "children") == {}


def test_of_the_targets_triggers_those_for_replicas_fire_once_for_each_change(pair: TwoNodes) -> None:
    commit(
        pair,
        "INSERT INTO fired VALUES (1, 'a', 1), (2, 'b', 2); UPDATE fired SET n = 3 WHERE id = 2",
        "UPDATE fired SET v = 'c', n = 4 WHERE id = 2; DELETE FROM fired WHERE id = 1",
    )
    same(pair, "fired")
    fired = pair.b.query(
        "SELECT what, array_agg(id ORDER BY id) FROM seen WHERE what !~ 'columns' GROUP BY 1"
    )
    assert dict(fired) == {
        "always insert": [1, 2],
        "always update": [2, 2],
        "always delete": [1],
        "replica insert": [1, 2],
        "replica delete": [1],
    }


def test_a_trigger_before_a_row_may_keep_it_out(pair: TwoNodes) -> None:
    commit(
        pair,
        "INSERT INTO swallowed VALUES (1, 'yes'), (2, 'no'), (3, 'yes')",
        "UPDATE swallowed SET v = 'not so' WHERE id = 1; UPDATE swallowed SET v = 'yes!' WHERE id = 3",
        "DELETE FROM swallowed WHERE id = 2",
    )
    assert pair.b.query("SELECT id, v FROM swallowed ORDER BY id") == [(1, "yes"), (3, "yes!")]


def test_a_trigger_of_certain_columns_fires_for_every_update_since_rows_arrive_whole(pair: TwoNodes) -> None:
    commit(pair, "INSERT INTO column_wise VALUES (1, 'a', 1)", "UPDATE column_wise SET v = 'b'")
    same(pair, "column_wise")
    assert pair.b.query("SELECT count(*) FROM seen WHERE what = 'columns update'") == [(1,)]


def test_unique_values_swapped_within_one_transaction_arrive(pair: TwoNodes) -> None:
    commit(
        pair,
        "INSERT INTO swapped SELECT g, g, 'c' || g FROM generate_series(1, 10) g",
        "UPDATE swapped SET place = 11 - place",
        "UPDATE swapped SET code = 'tmp' WHERE id = 1; UPDATE swapped SET code = 'c1' WHERE id = 2;"
        " UPDATE swapped SET code = 'c2' WHERE id = 1",
        "UPDATE swapped SET id = -1 WHERE id = 3; UPDATE swapped SET id = 3 WHERE id = 4;"
        " UPDATE swapped SET id = 4 WHERE id = -1; DELETE FROM swapped WHERE id = 5;"
        " INSERT INTO swapped VALUES (5, 99, 'c5')",
    )
    assert len(same(pair, "swapped")) == 10
    assert anomalies(pair, "swapped") == {}


def test_deferred_keys_and_foreign_keys_of_the_own_table_may_be_broken_until_the_commit(
    pair: TwoNodes,
) -> None:
    commit(
        pair,
        "INSERT INTO ring SELECT g, g % 5 + 1, g FROM generate_series(1, 5) g",
        "SET CONSTRAINTS ALL DEFERRED; UPDATE ring SET id = id + 1, next = seq",
        "UPDATE ring SET seq = seq + 100, next = next + 101; DELETE FROM ring WHERE seq = 103;"
        " UPDATE ring SET next = NULL WHERE seq IN (102, 105); INSERT INTO ring VALUES (9, 9, 9)",
        "INSERT INTO tree VALUES (1, NULL), (2, 1), (3, 2)",
        "UPDATE tree SET up = NULL WHERE id = 2; DELETE FROM tree WHERE id = 1;"
        " UPDATE tree SET up = 3 WHERE id = 2",
    )
    assert len(same(pair, "ring")) == 5
    assert same(pair, "tree") == [("2", "3"), ("3", "2")]
    assert anomalies(pair, "ring") == {}


def test_ranges_that_exclude_one_another_are_exchanged(pair: TwoNodes) -> None:
    commit(
        pair,
        "INSERT INTO booked SELECT g, int4range(g * 10, g * 10 + 10) FROM generate_series(1, 5) g",
        "UPDATE booked SET during = NULL WHERE id = 1; UPDATE booked SET during = '[10,20)' WHERE id = 2;"
        " UPDATE booked SET during = '[20,30)' WHERE id = 1",
        "DELETE FROM booked WHERE id = 3; INSERT INTO booked VALUES (6, '[30,40)')",
        "INSERT INTO booked_late SELECT g, int4range(g * 10, g * 10 + 10) FROM generate_series(1, 5) g",
        "UPDATE booked_late SET during = int4range((6 - id) * 10, (6 - id) * 10 + 10)",
    )
    assert len(same(pair, "booked")) == 5
    assert same(pair, "booked_late")[0] == ("1", "[50,60)")


def test_rows_a_check_of_today_would_refuse_arrive_and_leave(pair: TwoNodes) -> None:
    commit(pair, "INSERT INTO checked VALUES (1, 1), (2, 2)")
    for node in (pair.a, pair.b):
        node.execute("ALTER TABLE checked DROP CONSTRAINT checked_n_check")
    commit(pair, "UPDATE checked SET n = -1")
    for node in (pair.a, pair.b):
        node.execute("ALTER TABLE checked ADD CHECK (n > 0) NOT VALID")
    commit(pair, "DELETE FROM checked WHERE id = 1; UPDATE checked SET n = 5 WHERE id = 2")
    assert same(pair, "checked") == [("2", "5")]


def test_partial_and_expression_indexes_identify_no_row(pair: TwoNodes) -> None:
    commit(
        pair,
        "INSERT INTO parts VALUES (1, 'a', 1), (1, 'b', -1), (1, NULL, 0), (1, NULL, 0)",
        "UPDATE parts SET c = -5 WHERE b = 'b'; DELETE FROM parts WHERE ctid = "
        "(SELECT min(ctid) FROM parts WHERE b IS NULL)",
        "UPDATE parts SET c = -1 WHERE b = 'a'; UPDATE parts SET c = 1 WHERE b = 'b'",
    )
    assert len(same(pair, "parts")) == 3
    assert anomalies(pair, "parts") == {}
