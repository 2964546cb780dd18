"""What others do to PostgreSQL's publication, or to its tables, while a stream or a first copy is at work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import partial

import pytest

from tests.conftest import NewDatabase
from vsql_producers import binary_types, drift
from vsql_producers.scope import load_scope, pci_in
from vsql_producers.snapshot.reader import TableReader
from vsql_producers.snapshot.tables import CopyTable, require_same, tables_to_copy
from vsql_shared.changes import TableName
from vsql_shared.errors import DatabaseError, RefusedError, TransientError
from vsql_shared.pg import migrate, nodes, pci, publication_changes, publications
from vsql_shared.pg.connect import Connection, connect
from vsql_shared.pg.publications import PublicationInfo, PublicationRequest
from vsql_shared.pg.table_spec import parse_column, parse_spec

TABLES = """
CREATE TABLE public.orders (id int PRIMARY KEY, region text, card text, total int);
INSERT INTO public.orders SELECT i, 'US', 'secret', i FROM generate_series(1, 10) i;
CREATE TABLE public.facts (id int, at int, pan text, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
CREATE TABLE public.facts_1 PARTITION OF public.facts FOR VALUES FROM (0) TO (10);
INSERT INTO public.facts SELECT i, 1, 'secret' FROM generate_series(1, 10) i;
"""
ORDERS, FACTS = TableName("public", "orders"), TableName("public", "facts")
LEAF = TableName("public", "facts_1")


@pytest.fixture(params=[15, 18], ids=["pg15", "pg18"])
def conninfo(request: pytest.FixtureRequest, new_database: NewDatabase) -> str:
    return new_database("drift", request.param)


@pytest.fixture
def conn(conninfo: str) -> Iterator[Connection]:
    """A node with the tables above."""
    with connect(conninfo, application_name="test") as opened:
        migrate.install(opened)
        nodes.register_local(opened, 1, "node-a", "c", None)
        opened.execute(TABLES)
        yield opened


def _create(
    conn: Connection,
    *tables: str,
    exclude_pci: bool = False,
    insert_only: bool = False,
    via_leaf: bool = False,
) -> PublicationInfo:
    specs = tuple(parse_spec(text) for text in tables)
    request = PublicationRequest(
        "pub", specs, exclude_pci=exclude_pci, insert_only=insert_only, via_leaf=via_leaf
    )
    return publications.create(conn, request)


def test_a_schema_that_makes_row_filters_void_stops_the_stream(conn: Connection) -> None:
    _create(conn, "orders WHERE (id > 5)", "facts")
    drift.require_none(conn, "pub")
    conn.execute("ALTER PUBLICATION pub ADD TABLES IN SCHEMA public")
    with pytest.raises(DatabaseError, match="has a whole schema"):
        drift.require_none(conn, "pub")
    conn.execute("ALTER PUBLICATION pub DROP TABLES IN SCHEMA public")
    drift.require_none(conn, "pub")
    conn.execute("DROP PUBLICATION pub; CREATE PUBLICATION pub FOR ALL TABLES")
    with pytest.raises(DatabaseError, match="all tables"):
        drift.require_none(conn, "pub")


@pytest.mark.parametrize("insert_only", [False, True])
@pytest.mark.parametrize(
    "publish",
    [
        "insert",
        "insert, truncate",
        "insert, update, truncate",
        "insert, update, delete, truncate",
        "truncate",
    ],
)
def test_operations_that_are_not_those_decided_stop_the_stream(
    conn: Connection, insert_only: bool, publish: str
) -> None:
    made = _create(conn, "orders", insert_only=insert_only)
    decided = "insert, truncate" if insert_only else "insert, update, delete, truncate"
    conn.execute(f"ALTER PUBLICATION pub SET (publish = '{publish}')".encode())
    if publish == decided:
        drift.require_none(conn, "pub")
    else:
        with pytest.raises(DatabaseError, match="does not send the operations"):
            drift.require_none(conn, "pub")
    assert publications.find(conn, "pub") == made


def _copied(conn: Connection) -> list[CopyTable]:
    """The tables to copy, by a session whose snapshot stays what it is from here on."""
    scope = load_scope(conn, "pub")
    conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
    return tables_to_copy(conn, "pub", scope, [bytes(16)] * 9)


def _rows(reader: TableReader) -> list[bytes]:
    rows: list[bytes] = []
    while not reader.done:
        rows += reader.read(1 << 20)
    return rows


def test_a_copy_uses_no_filter_that_was_changed_after_the_look(conn: Connection) -> None:
    _create(conn, "orders WHERE (id > 5)")
    conn.execute("ALTER PUBLICATION pub SET TABLE public.orders")
    with pytest.raises(DatabaseError, match=r"orders: the row filter of PostgreSQL's publication"):
        _copied(conn)


@pytest.mark.parametrize(
    ("published", "act"),
    [
        ("orders", "ALTER TABLE public.orders ALTER COLUMN total TYPE bigint"),
        (
            "orders(id, region, total)",
            "ALTER TABLE public.orders RENAME total TO was; ALTER TABLE public.orders RENAME card TO total",
        ),
        ("orders", "TRUNCATE public.orders"),
        ("orders(id)", "DROP TABLE public.orders; CREATE TABLE public.orders (id int PRIMARY KEY)"),
    ],
    ids=["rewritten", "renamed", "truncated", "made anew"],
)
def test_a_table_altered_between_a_copys_snapshot_and_its_turn_is_not_read(
    conn: Connection, conninfo: str, published: str, act: str
) -> None:
    """Rewritten it would be empty; renamed, another column would be sent under a published name."""
    _create(conn, published)
    with closing(connect(conninfo, application_name="copy")) as copy:
        (table,) = _copied(copy)
        conn.execute(act.encode())
        reader = TableReader(copy, table, 1, partial(require_same, conn, table))
        with pytest.raises(TransientError, match="since the copy's snapshot"):
            _rows(reader)


def test_a_partition_that_is_rewritten_counts_and_a_column_that_is_added_does_not(
    conn: Connection, conninfo: str
) -> None:
    _create(conn, "orders", "facts")
    with closing(connect(conninfo, application_name="copy")) as copy:
        facts, orders = _copied(copy)
        conn.execute("ALTER TABLE public.orders ADD COLUMN late int DEFAULT 1")
        reader = TableReader(copy, orders, 1, partial(require_same, conn, orders))
        assert len(_rows(reader)) == 10
        conn.execute("TRUNCATE public.facts_1")
        with pytest.raises(TransientError, match=r"public\.facts was altered"):
            require_same(conn, facts)


def test_the_binary_form_of_a_dropped_type_is_trusted_by_nobody(conn: Connection) -> None:
    conn.execute("CREATE DOMAIN public.r AS regclass; CREATE DOMAIN public.n AS int")
    r, n = (conn.execute("SELECT to_regtype(%s)::oid::int", (f"public.{d}",)).fetchone() for d in "rn")
    assert r is not None
    assert n is not None
    assert binary_types.ways(conn, [*r, *n, 23]).bound == set(r)
    conn.execute("DROP DOMAIN public.r; DROP DOMAIN public.n")
    assert binary_types.ways(conn, [*r, *n, 23]).bound == {*r, *n}


def test_a_mark_on_a_partition_keeps_the_column_out_of_its_table(conn: Connection) -> None:
    pci.mark(conn, [parse_column("facts_1.pan")])
    made = _create(conn, "facts", exclude_pci=True)
    assert made.tables[0].columns == ("id", "at")
    with pytest.raises(RefusedError, match="marked as PCI data"):
        publication_changes.add_column(conn, "pub", FACTS, "pan")


def test_a_tables_mark_keeps_a_named_partitions_column_out_whenever_it_is_made(conn: Connection) -> None:
    pci.mark(conn, [parse_column("facts.pan")])
    _create(conn, "facts_1", via_leaf=True, exclude_pci=True)
    with pytest.raises(RefusedError, match="marked as PCI data"):
        publication_changes.add_column(conn, "pub", LEAF, "pan")
    pci.mark(conn, [parse_column("facts.at")])
    with pytest.raises(
        DatabaseError, match="column at was marked as PCI data, which the publication excludes"
    ):
        pci_in(load_scope(conn, "pub"), LEAF, ["id", "at"])


def test_manifests_name_what_a_relative_of_the_table_has_marked(conn: Connection) -> None:
    pci.mark(conn, [parse_column("facts.pan")])
    _create(conn, "facts_1", via_leaf=True)
    assert pci_in(load_scope(conn, "pub"), LEAF, ["id", "at", "pan"]) == ("public.facts_1.pan",)


def test_what_was_decided_follows_columns_that_are_renamed(conn: Connection, conninfo: str) -> None:
    """PostgreSQL's publication knows them by number: it still sends them, and holds the same filter."""
    _create(conn, "orders(id, region, total) WHERE (total > 5)", insert_only=True)
    conn.execute("ALTER TABLE public.orders RENAME total TO was")
    drift.require_none(conn, "pub")
    scope = load_scope(conn, "pub")
    for columns in (["id", "region", "total"], ["id", "region", "was"]):
        assert pci_in(scope, ORDERS, columns) == ()
    with pytest.raises(DatabaseError, match="sends column card, which the publication leaves out"):
        pci_in(scope, ORDERS, ["id", "region", "total", "card"])
    with pytest.raises(DatabaseError, match="did not send column region"):
        pci_in(scope, ORDERS, ["id", "was"])
    with closing(connect(conninfo, application_name="copy")) as copy:
        (table,) = _copied(copy)
        assert len(_rows(TableReader(copy, table, 1, partial(require_same, conn, table)))) == 5
    conn.execute("ALTER TABLE public.orders RENAME card TO total")
    with pytest.raises(DatabaseError, match="sends column total, which the publication leaves out"):
        pci_in(load_scope(conn, "pub"), ORDERS, ["id", "region", "total"])
    publication_changes.add_column(conn, "pub", ORDERS, "total")
    conn.execute("ALTER TABLE public.orders RENAME region TO area")
    pci_in(load_scope(conn, "pub"), ORDERS, ["id", "region", "was"])
    conn.execute("ALTER TABLE public.orders RENAME area TO region")
    drift.require_none(conn, "pub")
    found = publications.find(conn, "pub")
    assert found is not None
    assert found.tables[0].columns == ("id", "region", "total", "was")
    assert found.tables[0].where == "(was > 5)"
    conn.execute("ALTER PUBLICATION pub SET TABLE public.orders (id, region, total, was) WHERE (total > '5')")
    with pytest.raises(DatabaseError, match="row filter of PostgreSQL's publication is not what was decided"):
        drift.require_none(conn, "pub")
