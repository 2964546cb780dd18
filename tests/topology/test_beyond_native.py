"""Where PostgreSQL's own logical replication stops and ours goes on; or stops, too, and says why."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator

import psycopg
import pytest

from tests.nodes import TwoNodes
from tests.stack import Stack
from tests.topology.stops import stands
from tests.topology.subscription.scenes import anomalies, commit, running, same

pytestmark = [pytest.mark.topology, pytest.mark.timeout(300)]

# No equality operator an index could use: the rows are found by their text.
NO_EQUALITY = {
    "json": "json",
    "xml": "xml",
    "point": "point",
    "box": "box",
    "polygon": "polygon",
    "path": "path",
}
CONFIG = "[limits]\nretry_backoff_max_ms = 1000\nstatus_interval_ms = 300\n"
SCHEMA = "".join(
    f"CREATE TABLE no_eq_{name} (a int, v {kind}); ALTER TABLE no_eq_{name} REPLICA IDENTITY FULL;\n"
    for name, kind in NO_EQUALITY.items()
)
SCHEMA += """
CREATE TABLE no_eq_all (j json, p point, b box, t xml[]); ALTER TABLE no_eq_all REPLICA IDENTITY FULL;
CREATE DOMAIN positive AS int; CREATE DOMAIN short AS varchar(20);
CREATE TABLE checked (id int PRIMARY KEY, v int, note text);
CREATE TABLE of_domain (id positive PRIMARY KEY, v positive, s short, note text);
CREATE TABLE of_domain_full (id int, v positive, s short, note text);
ALTER TABLE of_domain_full REPLICA IDENTITY FULL;
CREATE TABLE only_generated (a int GENERATED ALWAYS AS (42) STORED, b text GENERATED ALWAYS AS ('x') STORED);
CREATE TABLE hidden (id int PRIMARY KEY, v text);
CREATE TABLE renamed (id int PRIMARY KEY, v text);
"""
TABLES = (
    *(f"no_eq_{name}" for name in NO_EQUALITY),
    "no_eq_all", "checked", "of_domain", "of_domain_full", "hidden", "renamed",
)  # fmt: skip
VALUES = {
    "json": ('{"a":1}', '{"a": 1}', '{"b": null}', "[1e2]"),
    "xml": ("<a/>", "<a></a>", "<b>x</b>", "text"),
    "point": ("(1,2)", "(1.0000000000000002,2)", "(-0,0)", "(0,0)"),
    "box": ("(1,1),(0,0)", "(2,0.5),(0,0)", "(3,3),(1,1)", "(0,0),(0,0)"),
    "polygon": ("((0,0),(1,1))", "((0,0),(1,1),(1,0))", "((5,5))", "((1,1),(0,0))"),
    "path": ("[(0,0),(1,1)]", "((0,0),(1,1))", "[(2,2)]", "[(1,1),(0,0)]"),
}
# As old databases are: rows from before their rules.
OLD_ROWS = """
INSERT INTO checked VALUES (1, -1, 'old'), (2, -2, 'old'), (3, -3, 'old'), (4, 4, 'new');
INSERT INTO of_domain VALUES (-1, -1, 'far too long', 'old'), (-2, -2, 'y', 'old'), (3, -3, 'z', 'old'),
    (4, 4, '', '');
INSERT INTO of_domain_full VALUES (1, -1, 'far too long', 'old'), (2, -2, 'y', 'old'), (2, -2, 'y', 'old'),
    (4, 4, '', '');
"""
RULES = """
ALTER TABLE checked ADD CHECK (v > 0) NOT VALID;
ALTER DOMAIN positive ADD CONSTRAINT above CHECK (value > 0) NOT VALID;
ALTER DOMAIN short ADD CONSTRAINT length CHECK (length(value) < 5) NOT VALID;
"""


@pytest.fixture(scope="module")
def pair(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    """Everything but the generated columns in one publication; the rules come when the rows are copied."""
    folder = tmp_path_factory.mktemp("beyond")
    tables = [f"{name}(*)" for name in TABLES]
    with running(stack, folder, SCHEMA, tables, source=OLD_ROWS, config=CONFIG) as made:
        for node in (made.a, made.b):
            node.execute(RULES)
        yield made


@pytest.mark.parametrize("name", NO_EQUALITY)
def test_rows_are_found_by_all_columns_although_a_type_has_no_equality(pair: TwoNodes, name: str) -> None:
    table, values = f"no_eq_{name}", VALUES[name]
    if name == "xml" and not _has_xml(pair):
        pytest.skip("this PostgreSQL was built without libxml")
    rows = ", ".join(f"({number}, '{value}')" for number, value in enumerate(values))
    commit(
        pair,
        f"INSERT INTO {table} VALUES {rows}, (0, '{values[0]}'), (7, NULL), (NULL, NULL), (7, '{values[3]}')",
        # One of two equal rows, by its place: the source says no more than what it looked like.
        f"UPDATE {table} SET a = 100 WHERE ctid = (SELECT min(ctid) FROM {table} WHERE a = 0)",
        f"UPDATE {table} SET v = '{values[1]}' WHERE a = 0;"
        f"UPDATE {table} SET v = '{values[2]}' WHERE v IS NULL AND a = 7",
        f"DELETE FROM {table} WHERE a IN (1, 3); UPDATE {table} SET a = a + 1",
    )
    assert len(same(pair, table)) == 6
    assert anomalies(pair, table) == {}
    commit(pair, f"DELETE FROM {table}")
    assert same(pair, table) == []


def _has_xml(pair: TwoNodes) -> bool:
    with psycopg.connect(pair.a.conninfo) as connection:
        try:
            connection.execute("SELECT '<a/>'::xml")
        except psycopg.errors.FeatureNotSupported:
            return False
    return True


def test_rows_of_nothing_but_types_without_equality_are_found(pair: TwoNodes) -> None:
    commit(
        pair,
        """INSERT INTO no_eq_all (j, p, b) VALUES ('{"a":1}', '(1,2)', '(1,1),(0,0)'),
           ('{"a":1}', '(1,2)', NULL), (NULL, NULL, NULL), (NULL, NULL, NULL)""",
        "UPDATE no_eq_all SET p = '(3,4)' WHERE b IS NOT NULL; UPDATE no_eq_all SET j = '1' WHERE j IS NULL",
        "DELETE FROM no_eq_all WHERE p[0] = 1",
    )
    assert len(same(pair, "no_eq_all")) == 3
    assert anomalies(pair, "no_eq_all") == {}


def test_rows_from_before_a_check_are_mended_and_deleted(pair: TwoNodes) -> None:
    commit(
        pair,
        "UPDATE checked SET v = 1 WHERE id = 1; DELETE FROM checked WHERE id = 2;"
        "UPDATE checked SET v = 5 WHERE id = 4",
    )
    assert same(pair, "checked") == [("1", "1", "old"), ("3", "-3", "old"), ("4", "5", "new")]


def test_rows_from_before_a_rule_of_their_domain_are_changed_beside_it(pair: TwoNodes) -> None:
    """The source looks at a domain's rules for values that are assigned, not for those a row has."""
    commit(
        pair,
        "UPDATE of_domain SET note = 'seen'",
        "UPDATE of_domain SET v = 3 WHERE id::int = 3; UPDATE of_domain SET id = 10 WHERE id::int = -1",
        "DELETE FROM of_domain WHERE id::int = -2; UPDATE of_domain SET s = 'abc' WHERE id::int = 4",
    )
    assert same(pair, "of_domain") == [
        ("10", "-1", "far too long", "seen"),
        ("3", "3", "z", "seen"),
        ("4", "4", "abc", "seen"),
    ]
    commit(
        pair,
        "UPDATE of_domain_full SET note = 'seen'; DELETE FROM of_domain_full WHERE ctid IN"
        " (SELECT min(ctid) FROM of_domain_full WHERE id = 2)",
        "UPDATE of_domain_full SET v = 9 WHERE id = 1",
    )
    assert same(pair, "of_domain_full") == [
        ("1", "9", "far too long", "seen"),
        ("2", "-2", "y", "seen"),
        ("4", "4", "", "seen"),
    ]
    for table in ("of_domain", "of_domain_full"):
        assert anomalies(pair, table) == {}


def test_row_level_security_at_the_target_stops_a_role_it_binds_and_hides_nothing(pair: TwoNodes) -> None:
    """Rows that a policy would hide from the applier would be lost without a word: it stops until it may."""
    role = f"vsql_sync_rls_{secrets.token_hex(4)}"
    pair.b.execute(
        f"CREATE ROLE {role} LOGIN IN ROLE vsql_sync_consumer;"
        "ALTER TABLE hidden ENABLE ROW LEVEL SECURITY; ALTER TABLE hidden FORCE ROW LEVEL SECURITY;"
        "CREATE POLICY nothing ON hidden USING (false) WITH CHECK (false)"
    )
    try:
        pair.b.stop("consumer")
        pair.b.start("consumer", {"VSQL_SYNC__CONNECTION__CONSUMER_USER": role})
        pair.a.execute("INSERT INTO hidden SELECT g, 'v' FROM generate_series(1, 1500) g")
        stands(pair.b, pair.chain, "row-level security", "BYPASSRLS")
        assert pair.b.query("SELECT count(*) FROM hidden") == [(0,)]
        pair.b.execute(f"ALTER ROLE {role} BYPASSRLS")
        commit(pair, "UPDATE hidden SET v = 'w' WHERE id > 3; DELETE FROM hidden WHERE id > 6")
        assert same(pair, "hidden")[2:5] == [("3", "v"), ("4", "w"), ("5", "w")]
        pair.b.stop("consumer")
        pair.b.start("consumer")
        commit(pair)
    finally:
        pair.b.execute(f"DROP ROLE IF EXISTS {role}")


def test_a_column_renamed_between_two_changes_of_a_transaction_is_a_clear_stop(pair: TwoNodes) -> None:
    pair.a.execute(
        "INSERT INTO renamed VALUES (1, 'v'); ALTER TABLE renamed RENAME v TO w;"
        "INSERT INTO renamed VALUES (2, 'w')"
    )
    stands(pair.b, pair.chain, "public.renamed lacks column", '"w"')
    assert pair.b.query("SELECT count(*) FROM renamed") == [(0,)], "nothing of the transaction is there"
    # What an operator can do until definitions travel, too: have both names for a while.
    pair.b.execute("ALTER TABLE renamed ADD w text")
    commit(pair)
    pair.b.execute("UPDATE renamed SET w = v WHERE w IS NULL; ALTER TABLE renamed DROP v")
    commit(pair, "UPDATE renamed SET w = w || '!'")
    assert same(pair, "renamed") == [("1", "v!"), ("2", "w!")]


def test_rows_of_generated_columns_only_arrive_and_are_computed(pair: TwoNodes) -> None:
    pair.a.ctl("publication", "create", "made", "--insert-only", "--table", "only_generated(*)")
    pair.a.ctl(
        "node", "add-peer", "--peer-node-id", "2", "--peer-name", "node-b", "--peer-connection",
        pair.b.conninfo, "--mode", "uni-directional", "--yes",
    )  # fmt: skip
    for node in (pair.a, pair.b):
        node.ctl("start")
    pair.a.execute(
        "INSERT INTO only_generated DEFAULT VALUES;"
        "INSERT INTO only_generated SELECT FROM generate_series(1, 9)"
    )
    deadline = time.monotonic() + 60
    while pair.b.query("SELECT count(*) FROM only_generated") != [(10,)]:
        assert time.monotonic() < deadline, pair.b.tail("consumer")
        time.sleep(0.1)
    assert same(pair, "only_generated") == [("42", "x")] * 10
