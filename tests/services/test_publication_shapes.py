"""What may be published of filtered, partitioned, secured and PCI-scoped tables, before anything moves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import NewDatabase
from vsql_shared.changes import TableName
from vsql_shared.errors import RefusedError
from vsql_shared.pg import catalog, migrate, nodes, pci, publication_changes, publications, roles
from vsql_shared.pg.connect import Connection, connect
from vsql_shared.pg.peer_tables import security_notes, target_problems
from vsql_shared.pg.publication_notes import limitations
from vsql_shared.pg.publications import PublicationInfo, PublicationRequest
from vsql_shared.pg.table_spec import parse_column, parse_spec

TABLES = """
CREATE TABLE public.orders (id int PRIMARY KEY, region text, total int);
CREATE TABLE public.whole (id int, region text); ALTER TABLE public.whole REPLICA IDENTITY FULL;
CREATE TABLE public.secured (id int PRIMARY KEY); ALTER TABLE public.secured ENABLE ROW LEVEL SECURITY;
CREATE TYPE public.mood AS ENUM ('ok');
CREATE TABLE public.moods (id int PRIMARY KEY, mood public.mood);
CREATE FUNCTION public.mine(int) RETURNS boolean IMMUTABLE LANGUAGE sql AS 'SELECT $1 > 0';
CREATE TABLE public.facts (id int, at int, pan text, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
CREATE TABLE public.facts_1 PARTITION OF public.facts FOR VALUES FROM (0) TO (10);
CREATE TABLE public.facts_2 PARTITION OF public.facts FOR VALUES FROM (10) TO (20);
CREATE TABLE public.mixed (id int PRIMARY KEY, v int) PARTITION BY RANGE (id);
CREATE TABLE public.mixed_1 PARTITION OF public.mixed FOR VALUES FROM (0) TO (10);
CREATE TABLE public.mixed_2 (id int PRIMARY KEY, v int NOT NULL);
CREATE UNIQUE INDEX mixed_2_v ON public.mixed_2 (v);
ALTER TABLE public.mixed_2 REPLICA IDENTITY USING INDEX mixed_2_v;
ALTER TABLE public.mixed ATTACH PARTITION public.mixed_2 FOR VALUES FROM (10) TO (20);
CREATE TABLE public.full_root (id int PRIMARY KEY, v int) PARTITION BY RANGE (id);
CREATE TABLE public.full_leaf PARTITION OF public.full_root DEFAULT;
ALTER TABLE public.full_root REPLICA IDENTITY FULL;
CREATE TABLE public.keyless (id int) PARTITION BY RANGE (id);
CREATE TABLE public.keyless_1 PARTITION OF public.keyless DEFAULT;
ALTER TABLE public.keyless_1 REPLICA IDENTITY FULL;
"""


@pytest.fixture(params=[15, 18], ids=["pg15", "pg18"])
def conn(request: pytest.FixtureRequest, new_database: NewDatabase) -> Iterator[Connection]:
    """A node with the tables above."""
    with connect(new_database("shapes", request.param), application_name="test") as opened:
        migrate.install(opened)
        nodes.register_local(opened, 1, "node-a", "c", None)
        opened.execute(TABLES)
        yield opened


def _create(conn: Connection, *tables: str, name: str = "pub", **options: Any) -> PublicationInfo:
    specs = tuple(parse_spec(text) for text in tables)
    return publications.create(conn, PublicationRequest(name, specs, **options))


def _sent(conn: Connection, name: str = "pub") -> dict[str, tuple[list[str], str | None]]:
    rows = conn.execute(
        "SELECT tablename::text, attnames::text[], rowfilter FROM pg_publication_tables WHERE pubname = %s",
        (name,),
    )
    return {table: (columns, where) for table, columns, where in rows}


def test_filters_are_kept_as_postgresql_prints_them_and_asking_again_is_no_act(conn: Connection) -> None:
    made = _create(conn, "orders(id) WHERE id>10 and id % 2 = 0", "whole WHERE (region LIKE 'U%')")
    assert [table.where for table in made.tables] == [
        "((id > 10) AND ((id % 2) = 0))",
        "(region ~~ 'U%'::text)",
    ]
    assert _sent(conn) == {
        "orders": (["id"], "((id > 10) AND ((id % 2) = 0))"),
        "whole": (["id", "region"], "(region ~~ 'U%'::text)"),
    }
    assert (
        _create(conn, "orders(id) WHERE (id > 10 AND (id % 2) = 0)", "whole WHERE region LIKE 'U%'") == made
    )
    acts = "SELECT action FROM vsql_sync.audit_log WHERE target_type = 'publication' ORDER BY id"
    assert conn.execute(acts).fetchall() == [("publication.create",)]
    changed = _create(conn, "orders(id)", "whole WHERE (region = 'X')")
    assert publications.find(conn, "pub") == changed
    assert _sent(conn)["orders"] == (["id"], None)
    assert len(conn.execute(acts).fetchall()) == 2


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("orders WHERE (region = 'US')", "reads column region, which is not part of the replica identity"),
        ("orders WHERE (mine(id))", "PostgreSQL refuses the row filter"),
        ("orders WHERE (public.mine(id))", "User-defined or built-in mutable functions are not allowed"),
        ("orders WHERE (id = (SELECT 1))", "PostgreSQL refuses the row filter"),
        ("orders WHERE (nope > 1)", 'column "nope" does not exist'),
        ("orders WHERE (id)", "must be type boolean"),
        ("orders WHERE (ctid IS NOT NULL)", "System columns are not allowed"),
        ("orders WHERE (random() < 0.5)", "mutable functions are not allowed"),
        ("moods WHERE (mood = 'ok')", "User-defined types are not allowed"),
        ("orders WHERE (id > 'x')", "invalid input syntax"),
        ("orders WHERE (true), ONLY whole WHERE (true)", "syntax error"),
        ("orders WHERE true) WITH (publish = 'insert') --", "parentheses|a comment"),
        ("facts WHERE (pan IS NULL)", "public.facts_1: the row filter reads column pan"),
    ],
)
def test_a_filter_postgresql_or_the_stream_could_not_keep_is_refused(
    conn: Connection, table: str, expected: str
) -> None:
    with pytest.raises(RefusedError, match=expected):
        _create(conn, table)
    assert conn.execute("SELECT count(*) FROM pg_publication").fetchall() == [(0,)]


def test_filters_of_insert_only_publications_may_read_any_column(conn: Connection) -> None:
    roles.create(conn)
    _create(conn, "orders(id) WHERE (region = 'US')", insert_only=True)
    readable = "SELECT has_column_privilege('vsql_sync_producer', 'public.orders', %s, 'SELECT')"
    assert [conn.execute(readable, (c,)).fetchone() for c in ("id", "region", "total")] == [
        (True,), (True,), (False,),
    ]  # fmt: skip
    conn.execute("UPDATE public.orders SET region = 'EU'")


def test_by_leaf_the_leaves_travel_and_may_be_named_with_lists_of_their_own(conn: Connection) -> None:
    roles.create(conn)
    made = _create(conn, "facts", "mixed_1(id) WHERE (id > 3)", via_leaf=True)
    assert made.via_leaf
    assert set(_sent(conn)) == {"facts_1", "facts_2", "mixed_1"}
    assert _sent(conn)["mixed_1"] == (["id"], "(id > 3)")
    carried = [str(table.name) for table in publications.carried(conn, made)]
    assert carried == ["public.facts_1", "public.facts_2", "public.mixed_1"]
    reads = "SELECT has_table_privilege('vsql_sync_producer', 'public.facts_2', 'SELECT')"
    assert conn.execute(reads).fetchone() == (True,)
    conn.execute("UPDATE public.facts SET pan = 'x'")


@pytest.mark.parametrize(
    ("tables", "via_leaf", "expected"),
    [
        (["facts(id, at)"], True, "a column list of a partitioned table needs publishing by root"),
        (["facts WHERE (id > 1)"], True, "a row filter of a partitioned table needs publishing by root"),
        (["facts", "facts_1"], True, "public.facts_1: is a partition of public.facts, which is named too"),
        (["facts_1"], False, "publish the partitioned table, or by leaf"),
        (["mixed"], False, "public.mixed_2: its replica identity differs from that of public.mixed"),
        (["full_root"], False, "ALTER TABLE public.full_leaf REPLICA IDENTITY FULL"),
        (["keyless"], False, "public.keyless: has no replica identity of its own"),
    ],
)
def test_partitions_whose_rows_would_be_missed_are_refused(
    conn: Connection, tables: list[str], via_leaf: bool, expected: str
) -> None:
    with pytest.raises(RefusedError, match=expected):
        _create(conn, *tables, via_leaf=via_leaf)


def test_partitions_of_other_identities_travel_by_leaf(conn: Connection) -> None:
    _create(conn, "mixed", "full_root", "keyless", via_leaf=True)
    assert set(_sent(conn)) == {"mixed_1", "mixed_2", "full_leaf", "keyless_1"}


def test_where_pci_is_excluded_every_list_is_closed(conn: Connection) -> None:
    pan = parse_column("facts.pan")
    request = PublicationRequest("pub", (parse_spec("orders"), parse_spec("facts")), (pan,), exclude_pci=True)
    made = publications.create(conn, request)
    assert {table.name.table: table.columns for table in made.tables} == {
        "orders": ("id", "region", "total"), "facts": ("id", "at"),
    }  # fmt: skip
    conn.execute("ALTER TABLE public.orders ADD COLUMN late text")
    assert _sent(conn)["orders"][0] == ["id", "region", "total"]
    with pytest.raises(RefusedError, match="REPLICA IDENTITY FULL needs every column published"):
        _create(conn, "whole", name="more", exclude_pci=True)
    publication_changes.add_column(conn, "pub", TableName("public", "orders"), "late")
    assert _sent(conn)["orders"][0] == ["id", "region", "total", "late"]
    with pytest.raises(RefusedError, match="is published already"):
        publication_changes.add_column(conn, "pub", TableName("public", "orders"), "late")
    with pytest.raises(RefusedError, match="marked as PCI data"):
        publication_changes.add_column(conn, "pub", *pan)
    with pytest.raises(RefusedError, match="no column nope"):
        publication_changes.add_column(conn, "pub", TableName("public", "orders"), "nope")


def test_marks_of_a_table_hold_for_its_partitions(conn: Connection) -> None:
    pci.mark(conn, [parse_column("facts.pan")])
    made = _create(conn, "facts_1", via_leaf=True, exclude_pci=True)
    assert made.tables[0].columns == ("id", "at")
    open_one = _create(conn, "facts_2", name="open", via_leaf=True)
    assert open_one.pci == {TableName("public", "facts_2"): ["pan"]}
    with pytest.raises(RefusedError, match="needs publishing by root"):
        _create(conn, "facts", name="root", via_leaf=True, exclude_pci=True)


def test_limitations_are_said_when_it_is_made(conn: Connection) -> None:
    made = _create(conn, "facts WHERE (id > 1)", "secured", "whole WHERE (region = 'US')")
    said = "\n".join(limitations(conn, made))
    for words in (
        "public.facts: TRUNCATE is not filtered",
        "public.facts: a row that an UPDATE takes out of the filter is deleted at the targets",
        "public.facts: an UPDATE that brings a row into the filter must write large values of pan anew",
        "public.facts: PostgreSQL does not send TRUNCATE of a single partition",
        "public.facts: rows a table holds when it is attached",
        "public.secured: has row-level security",
    ):
        assert words in said
    assert "public.whole: an UPDATE that brings" not in said


def test_a_target_that_lacks_a_leaf_is_refused_before_anything_moves(
    conn: Connection, new_database: NewDatabase
) -> None:
    made = _create(conn, "facts", "secured", via_leaf=True)
    with connect(new_database("target"), application_name="test") as peer:
        peer.execute(
            "CREATE TABLE public.facts_1 (id int, at int, pan text, PRIMARY KEY (id, at));"
            "CREATE TABLE public.secured (id int PRIMARY KEY)"
        )
        assert target_problems(conn, peer, made) == [
            "public.facts_2: does not exist on the peer; create it there"
        ]
        assert catalog.describe(peer, TableName("public", "facts")) is None
        (note,) = security_notes(conn, peer, [table.name for table in made.tables])
        assert note.startswith("public.secured: has row-level security on this node")
