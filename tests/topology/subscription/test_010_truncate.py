"""TRUNCATE empties at the target what it emptied at the source, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.nodes import TwoNodes
from tests.stack import Stack
from tests.topology.subscription.scenes import commit, rows, running, same

pytestmark = [pytest.mark.topology, pytest.mark.timeout(300)]

SCHEMA = """
CREATE TABLE single (id int PRIMARY KEY);
CREATE TABLE numbered (id serial PRIMARY KEY, ident int GENERATED ALWAYS AS IDENTITY, v text);
CREATE TABLE continued (id serial PRIMARY KEY, v text);
CREATE TABLE parent (id int PRIMARY KEY);
CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES parent);
CREATE TABLE seen (id int PRIMARY KEY);
CREATE TABLE unseen (id int PRIMARY KEY);
CREATE TABLE cause (id int PRIMARY KEY);
CREATE TABLE effect (id int PRIMARY KEY, cause int REFERENCES cause);
CREATE TABLE watched (id serial PRIMARY KEY, v text);
CREATE TABLE first (id int PRIMARY KEY);
CREATE TABLE later (id int PRIMARY KEY, first int);
CREATE TABLE myself (id int PRIMARY KEY, up int REFERENCES myself);
CREATE TABLE trapped (id int PRIMARY KEY);
"""
TARGET = """
CREATE TABLE watching (id int PRIMARY KEY, watched int REFERENCES watched ON DELETE CASCADE);
INSERT INTO watching VALUES (1, NULL);
ALTER TABLE later ADD FOREIGN KEY (first) REFERENCES first;
CREATE TABLE emptied (tag text);
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO public.emptied VALUES (tg_argv[0]); RETURN NULL; END $$;
CREATE TRIGGER always BEFORE TRUNCATE ON trapped EXECUTE FUNCTION note('always');
ALTER TABLE trapped ENABLE ALWAYS TRIGGER always;
CREATE TRIGGER plain BEFORE TRUNCATE ON trapped EXECUTE FUNCTION note('plain');
"""
TABLES = (
    "single", "numbered", "continued", "parent", "child", "seen", "cause", "watched", "first", "later",
    "myself", "trapped",
)  # fmt: skip


@pytest.fixture(scope="module")
def pair(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    folder = tmp_path_factory.mktemp("truncate")
    with running(stack, folder, SCHEMA, TABLES, target=TARGET, versions=(15, 18)) as made:
        yield made


def test_rows_before_a_truncate_go_and_rows_after_it_stay(pair: TwoNodes) -> None:
    commit(pair, "INSERT INTO single SELECT generate_series(1, 500)")
    commit(pair, "INSERT INTO single VALUES (600); TRUNCATE single; INSERT INTO single VALUES (1), (700)")
    assert same(pair, "single") == [("1",), ("700",)]
    commit(pair, "TRUNCATE single; TRUNCATE single")
    assert same(pair, "single") == []


def test_identity_is_restarted_where_the_source_restarted_it(pair: TwoNodes) -> None:
    commit(
        pair,
        "INSERT INTO numbered (v) VALUES ('a'), ('b'); INSERT INTO continued (v) VALUES ('a'), ('b')",
    )
    for table in ("numbered", "continued"):
        pair.b.execute(f"SELECT setval('{table}_id_seq', 50)")
    pair.b.execute("SELECT setval(pg_get_serial_sequence('numbered', 'ident'), 50)")
    commit(pair, "TRUNCATE numbered RESTART IDENTITY; TRUNCATE continued CONTINUE IDENTITY")
    assert pair.b.query("SELECT nextval('numbered_id_seq'), nextval('numbered_ident_seq')") == [(1, 1)]
    assert pair.b.query("SELECT nextval('continued_id_seq')") == [(51,)]
    assert same(pair, "continued", "numbered") == []


def test_tables_with_foreign_keys_between_them_are_truncated_together(pair: TwoNodes) -> None:
    commit(pair, "INSERT INTO parent VALUES (1), (2); INSERT INTO child VALUES (1, 1), (2, 2)")
    commit(pair, "TRUNCATE child, parent; INSERT INTO parent VALUES (3)")
    assert same(pair, "child", "parent") == [("3",)]
    commit(pair, "INSERT INTO child VALUES (3, 3)", "TRUNCATE parent CASCADE; INSERT INTO parent VALUES (4)")
    assert same(pair, "child", "parent") == [("4",)]


def test_a_self_referencing_table_is_truncated(pair: TwoNodes) -> None:
    commit(
        pair, "INSERT INTO myself VALUES (1, 1), (2, 1)", "TRUNCATE myself; INSERT INTO myself VALUES (5, 5)"
    )
    assert same(pair, "myself") == [("5", "5")]


def test_of_a_group_only_the_published_tables_are_emptied(pair: TwoNodes) -> None:
    pair.b.execute("INSERT INTO unseen VALUES (1)")
    commit(pair, "INSERT INTO seen VALUES (1), (2); INSERT INTO unseen VALUES (7)")
    commit(pair, "TRUNCATE seen, unseen")
    assert same(pair, "seen") == []
    assert rows(pair, "SELECT * FROM unseen") == ([], [(1,)])


def test_an_unpublished_table_that_refers_to_a_truncated_one_keeps_its_rows(pair: TwoNodes) -> None:
    commit(pair, "INSERT INTO cause VALUES (1), (2)", "INSERT INTO effect VALUES (1, 1)")
    pair.b.execute("INSERT INTO effect VALUES (9, 2)")
    commit(pair, "TRUNCATE cause CASCADE; INSERT INTO cause VALUES (3)")
    assert same(pair, "cause") == [("3",)]
    assert rows(pair, "SELECT * FROM effect") == ([], [(9, 2)])


def test_a_table_only_the_target_has_may_refer_to_a_truncated_one(pair: TwoNodes) -> None:
    commit(pair, "INSERT INTO watched (v) VALUES ('a'), ('b')")
    pair.b.execute("INSERT INTO watching VALUES (2, 1); SELECT setval('watched_id_seq', 70)")
    commit(pair, "TRUNCATE watched, single RESTART IDENTITY; INSERT INTO watched (v) VALUES ('c')")
    assert same(pair, "watched") == [("1", "c")]
    assert pair.b.query("SELECT id, watched FROM watching ORDER BY id") == [(1, None), (2, 1)]
    assert pair.b.query("SELECT nextval('watched_id_seq')") == [(1,)]


def test_a_table_may_refer_to_a_truncated_one_until_it_is_truncated_itself(pair: TwoNodes) -> None:
    commit(pair, "INSERT INTO first VALUES (1); INSERT INTO later VALUES (1, 1)")
    commit(pair, "TRUNCATE first; TRUNCATE later; INSERT INTO first VALUES (2)")
    assert same(pair, "later", "first") == [("2",)]
    commit(pair, "INSERT INTO later VALUES (2, 2)", "TRUNCATE first", "TRUNCATE later")
    assert same(pair, "first", "later") == []


def test_of_the_targets_truncate_triggers_those_enabled_always_fire(pair: TwoNodes) -> None:
    commit(pair, "INSERT INTO trapped VALUES (1)", "TRUNCATE trapped")
    assert same(pair, "trapped") == []
    assert pair.b.query("SELECT tag FROM emptied") == [("always",)]
