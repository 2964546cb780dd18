"""Tables that may be applied partitioned, and every reason why one may not, at either side."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import NewDatabase
from vsql_shared.changes import TableName
from vsql_shared.errors import RefusedError
from vsql_shared.pg import migrate, nodes, publications, row_order
from vsql_shared.pg.connect import Connection, connect
from vsql_shared.pg.peer_tables import target_problems
from vsql_shared.pg.publications import PARTITIONED, PublicationRequest
from vsql_shared.pg.table_spec import parse_spec

COLLATION = """
CREATE COLLATION blind (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
CREATE TABLE t (id text COLLATE blind PRIMARY KEY);
"""
UNFIT = {
    "a numeric key": ("CREATE TABLE t (id numeric PRIMARY KEY)", "key column id is numeric"),
    "a float in the key": ("CREATE TABLE t (a int, b float8, PRIMARY KEY (a, b))", "key column b is double"),
    "an array": ("CREATE TABLE t (id int[] PRIMARY KEY)", "key column id is integer"),
    "a key that is blind to case": (COLLATION, "nondeterministic collation"),
    "a unique index that is blind to case": (
        COLLATION.replace(" COLLATE blind", "") + "CREATE UNIQUE INDEX blindly ON t (id COLLATE blind)",
        "blindly binds rows"),
    "whole rows": ("CREATE TABLE t (a int); ALTER TABLE t REPLICA IDENTITY FULL", "has no key"),
    "another unique column": ("CREATE TABLE t (id int PRIMARY KEY, v text UNIQUE)", "t_v_key binds rows"),
    "a unique part of the key": (
        "CREATE TABLE t (a int, b int UNIQUE, PRIMARY KEY (a, b))", "t_b_key binds rows"),
    "a partial unique index": (
        "CREATE TABLE t (id int PRIMARY KEY, v int); CREATE UNIQUE INDEX one ON t (v) WHERE v > 0",
        "one binds rows"),
    "a unique expression": (
        "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE UNIQUE INDEX low ON t (lower(v))",
        "low binds rows"),
    "an exclusion constraint": (
        "CREATE TABLE t (id int PRIMARY KEY, at int4range, CONSTRAINT ex EXCLUDE USING gist (at WITH &&))",
        "ex binds rows"),
}  # fmt: skip
TRIGGER = """
CREATE TABLE t (id int PRIMARY KEY, v text);
CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE TRIGGER seen BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION f();
ALTER TABLE t ENABLE ALWAYS TRIGGER seen;
"""
FIT = """
CREATE TABLE plain (id bigint PRIMARY KEY, v numeric, w float8);
CREATE TABLE two (a uuid, b text, v int, PRIMARY KEY (a, b), UNIQUE (a, b, v));
CREATE TABLE chosen (x date NOT NULL, y int);
CREATE UNIQUE INDEX chosen_x ON chosen (x);
ALTER TABLE chosen REPLICA IDENTITY USING INDEX chosen_x;
CREATE TABLE other (id int PRIMARY KEY, ref bigint REFERENCES plain);
CREATE TABLE parted (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (10);
"""


@pytest.fixture
def conn(new_database: NewDatabase) -> Iterator[Connection]:
    """An empty node."""
    with connect(new_database("order"), application_name="test") as opened:
        migrate.install(opened)
        nodes.register_local(opened, 1, "node-a", "c", None)
        yield opened


def _make(conn: Connection, script: str) -> None:
    """Run a script as users do, whose tables lie in public; our own sessions see pg_catalog only."""
    conn.execute("SET search_path = public")
    conn.execute(script)
    conn.execute("SET search_path = pg_catalog")


def _create(conn: Connection, *tables: str, sequences: bool = False) -> publications.PublicationInfo:
    specs = tuple(parse_spec(text) for text in tables)
    request = PublicationRequest("pub", specs, apply_mode=PARTITIONED, sequences=sequences)
    return publications.create(conn, request)


@pytest.mark.parametrize(("definition", "said"), UNFIT.values(), ids=list(UNFIT))
def test_a_table_whose_rows_depend_on_each_other_is_not_published_partitioned(
    conn: Connection, definition: str, said: str
) -> None:
    _make(conn, definition)
    with pytest.raises(RefusedError, match=said):
        _create(conn, "t(*)")
    assert publications.find(conn, "pub") is None
    assert row_order.fit(conn, [TableName("public", "t")]) == frozenset()
    # Whole transactions in order need nothing of this.
    request = PublicationRequest("pub", (parse_spec("t(*)"),))
    assert publications.create(conn, request).apply_mode == "transactional"


def test_tables_with_a_plain_key_are(conn: Connection) -> None:
    _make(conn, FIT)
    made = _create(conn, "plain(*)", "two(*)", "chosen(*)", "other(*)", "parted(*)")
    assert publications.find(conn, "pub") == made
    assert made.apply_mode == PARTITIONED
    names = [table.name for table in made.tables]
    assert row_order.fit(conn, names) == frozenset(names)
    _make(conn, "CREATE UNIQUE INDEX later ON parted_1 (v)")
    assert TableName("public", "parted") not in row_order.fit(conn, names)


def test_sequences_do_not_travel_with_rows_that_have_no_common_order(conn: Connection) -> None:
    _make(conn, "CREATE TABLE t (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY)")
    with pytest.raises(RefusedError, match="cannot carry sequences"):
        _create(conn, "t(*)", sequences=True)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ("CREATE TABLE t (id int PRIMARY KEY, v text UNIQUE)", "t_v_key binds rows"),
        ("CREATE TABLE t (id bigint PRIMARY KEY, v text)", "is bigint on the peer and integer here"),
        (TRIGGER, "trigger seen fires"),
    ],
    ids=["a unique column", "another type", "a trigger"],
)
def test_a_target_that_binds_rows_is_refused(
    conn: Connection, new_database: NewDatabase, there: str, said: str
) -> None:
    _make(conn, "CREATE TABLE t (id int PRIMARY KEY, v text)")
    made = _create(conn, "t(*)")
    with connect(new_database("peer"), application_name="test") as peer:
        _make(peer, there)
        found = target_problems(conn, peer, made)
        assert [line for line in found if said in line], found
