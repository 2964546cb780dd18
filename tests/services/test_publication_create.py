"""Publications: the grammar, the column lists, PCI scope, and everything that is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import NewDatabase
from vsql_shared.changes import TableName
from vsql_shared.errors import RefusedError, UserError
from vsql_shared.pg import migrate, nodes, publications
from vsql_shared.pg.connect import Connection, connect
from vsql_shared.pg.publications import PublicationRequest
from vsql_shared.pg.table_spec import TableSpec, parse_column, parse_spec, parse_table

TABLES = """
CREATE TABLE public.payments (id bigint PRIMARY KEY, amount numeric, pan text, cvv text,
    twice numeric GENERATED ALWAYS AS (amount * 2) STORED,
    thrice numeric GENERATED ALWAYS AS (amount * 3) VIRTUAL);
CREATE TABLE public.merchants (id int PRIMARY KEY, name text);
CREATE TABLE public.bare (x int, y int);
CREATE TABLE public.chosen (x int NOT NULL, y int);
CREATE UNIQUE INDEX chosen_x ON public.chosen (x);
CREATE TABLE public.whole (x int, pan text);
ALTER TABLE public.whole REPLICA IDENTITY FULL;
CREATE UNLOGGED TABLE public.volatile (id int PRIMARY KEY);
CREATE VIEW public.seen AS SELECT 1 AS one;
CREATE SCHEMA "Sales Dept";
CREATE TABLE "Sales Dept"."Order Items" ("Id" int PRIMARY KEY, "a,b" text);
CREATE TABLE public.parted (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
CREATE TABLE public.parted_1 PARTITION OF public.parted FOR VALUES FROM (0) TO (10);
CREATE TABLE public.parent (id int PRIMARY KEY);
CREATE TABLE public.child (extra int) INHERITS (public.parent);
"""


@pytest.fixture
def conn(new_database: NewDatabase) -> Iterator[Connection]:
    """A node with the tables above."""
    with connect(new_database("pub"), application_name="test") as opened:
        migrate.install(opened)
        nodes.register_local(opened, 1, "node-a", "c", None)
        opened.execute(TABLES)
        yield opened


def _pci(conn: Connection, name: str) -> dict[TableName, list[str]]:
    found = publications.find(conn, name)
    assert found is not None
    return found.pci


def _create(
    conn: Connection, *tables: str, name: str = "pub", exclude_pci: bool = False, insert_only: bool = False
) -> publications.PublicationInfo:
    specs = tuple(parse_spec(text) for text in tables)
    request = PublicationRequest(name, specs, exclude_pci=exclude_pci, insert_only=insert_only)
    return publications.create(conn, request)


def _published(conn: Connection, name: str = "pub") -> dict[str, list[str]]:
    rows = conn.execute(
        "SELECT schemaname || '.' || tablename, attnames::text[] FROM pg_publication_tables"
        " WHERE pubname = %s",
        (name,),
    )
    return dict(rows.fetchall())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("*", TableSpec(None)),
        (" Payments ", TableSpec(TableName("public", "payments"))),
        ("merchants(*)", TableSpec(TableName("public", "merchants"))),
        ("sales.T(Id, b)", TableSpec(TableName("sales", "t"), ("id", "b"))),
        ('"Sales"."Order ""x"""("A,b" , c)', TableSpec(TableName("Sales", 'Order "x"'), ("A,b", "c"))),
        ("straße(größe)", TableSpec(TableName("public", "straße"), ("größe",))),
    ],
)
def test_tables_are_written_as_in_sql(text: str, expected: TableSpec) -> None:
    assert parse_spec(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "()", "t(", "t()", "t(a", "t(a,)", "a.b.c", "1t", "t; DROP TABLE x", '"', '""', "*(a)", "t(a a)",
     "t(a,a)", "x" * 64, "t(a) b", "sales.*", "."],
)  # fmt: skip
def test_what_names_no_table_is_refused_in_words(text: str) -> None:
    with pytest.raises(UserError):
        parse_spec(text)


def test_columns_of_tables_are_written_with_dots() -> None:
    assert parse_column("payments.PAN") == (TableName("public", "payments"), "pan")
    assert parse_column('s."T".c') == (TableName("s", "T"), "c")
    for text in ("pan", "a.b.c.d", "a.", ""):
        with pytest.raises(UserError):
            parse_column(text)
    with pytest.raises(UserError):
        parse_table("t(a)")


def test_a_publication_is_postgresqls_and_ours(conn: Connection) -> None:
    made = _create(conn, "payments(id, amount)", "merchants(*)", '"Sales Dept"."Order Items"')
    assert _published(conn) == {
        "public.payments": ["id", "amount"],
        "public.merchants": ["id", "name"],
        "Sales Dept.Order Items": ["Id", "a,b"],
    }
    assert publications.everything(conn) == [made]


def test_creating_it_again_is_no_act_and_another_list_changes_it(conn: Connection) -> None:
    _create(conn, "payments(id, amount)")
    _create(conn, "payments(amount, id)")
    query = "SELECT action FROM vsql_sync.audit_log WHERE target_type = 'publication' ORDER BY id"
    assert conn.execute(query).fetchall() == [("publication.create",)]
    _create(conn, "merchants")
    assert _published(conn) == {"public.merchants": ["id", "name"]}
    assert conn.execute(query).fetchall() == [("publication.create",), ("publication.change",)]


def test_marked_columns_are_left_out_only_where_asked(conn: Connection) -> None:
    pan, cvv = parse_column("payments.pan"), parse_column("payments.cvv")
    request = PublicationRequest("open", (parse_spec("payments(id, amount, pan)"),), (pan, cvv))
    publications.create(conn, request)
    assert _pci(conn, "open") == {TableName("public", "payments"): ["pan"]}
    _create(conn, "payments(*)", "merchants(*)", name="safe", exclude_pci=True)
    assert _pci(conn, "safe") == {}
    assert _published(conn, "safe") == {
        "public.payments": ["id", "amount"],
        "public.merchants": ["id", "name"],
    }
    _create(conn, "payments(id, pan)", name="some")
    assert _pci(conn, "some") == {TableName("public", "payments"): ["pan"]}


def test_star_is_every_table_there_is_now_and_never_our_own(conn: Connection) -> None:
    conn.execute("DROP TABLE public.bare; ALTER TABLE public.chosen ADD PRIMARY KEY (x)")
    conn.execute("ALTER TABLE public.child ADD PRIMARY KEY (id)")
    made = _create(conn, "*", "payments(id)")
    names = {str(table.name): table.columns for table in made.tables}
    assert names == {
        "public.payments": ("id",), "public.merchants": None, "public.chosen": None, "public.whole": None,
        '"Sales Dept"."Order Items"': None, "public.parted": None, "public.parent": None,
        "public.child": None,
    }  # fmt: skip
    conn.execute("CREATE TABLE public.later (id int PRIMARY KEY)")
    assert not any("later" in name or name.startswith("vsql_sync") for name in _published(conn))


def test_a_partitioned_table_travels_under_its_own_name(conn: Connection) -> None:
    _create(conn, "parted")
    assert _published(conn) == {"public.parted": ["id", "v"]}


def test_children_of_an_inheritance_parent_are_not_published_with_it(conn: Connection) -> None:
    _create(conn, "parent")
    assert _published(conn) == {"public.parent": ["id"]}


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("gone", "there is no such table"),
        ("merchants(id, nope)", "there is no column nope"),
        ("payments(id, thrice)", "generated"),
        ("seen", "is a view"),
        ("volatile", "SET LOGGED"),
        ("parted_1", "publish the partitioned table"),
        ("vsql_sync.nodes", "never published"),
        ("bare", r"ADD PRIMARY KEY \(…\), or ALTER TABLE … REPLICA IDENTITY FULL \(or --insert-only\)"),
        ("bare(x)", r"ADD PRIMARY KEY \(…\) \(or --insert-only\)"),
        ("chosen", "REPLICA IDENTITY USING INDEX chosen_x"),
        ("whole(x)", "FULL sends every column before a change, pan too"),
        ("payments(amount)", "key column id must be in the column list"),
    ],
)
def test_what_cannot_be_published_is_refused_with_the_fix_and_changes_nothing(
    conn: Connection, table: str, expected: str
) -> None:
    with pytest.raises(RefusedError, match=expected):
        _create(conn, '"Sales Dept"."Order Items"', table)
    assert publications.everything(conn) == []
    assert _published(conn) == {}
    assert conn.execute(
        "SELECT count(*) FROM vsql_sync.audit_log WHERE action <> 'node.init'"
    ).fetchall() == [(0,)]


def test_excluding_a_column_of_a_table_with_full_identity_or_of_the_key_is_refused(conn: Connection) -> None:
    for column, table, expected in (
        ("whole.pan", "whole", "which is left out"),
        ("payments.id", "payments", "is part of the key"),
    ):
        request = PublicationRequest("p", (parse_spec(table),), (parse_column(column),), exclude_pci=True)
        with pytest.raises(RefusedError, match=expected):
            publications.create(conn, request)
    assert conn.execute("SELECT count(*) FROM vsql_sync.pci_columns").fetchall() == [(0,)]


def test_insert_only_needs_no_identity_and_updates_stay_allowed(conn: Connection) -> None:
    made = _create(conn, "bare(x)", insert_only=True)
    assert made.insert_only
    assert publications.find(conn, "pub") == made
    conn.execute("INSERT INTO public.bare VALUES (1, 2)")
    conn.execute("UPDATE public.bare SET y = 3")


def test_every_published_table_can_be_updated_at_the_source(conn: Connection) -> None:
    conn.execute("ALTER TABLE public.chosen REPLICA IDENTITY USING INDEX chosen_x")
    _create(conn, "payments(id, amount)", "chosen", "whole", "parted(id)")
    conn.execute(
        "INSERT INTO public.payments VALUES (1, 2, 'p', 'c'); INSERT INTO public.parted VALUES (1, 'x')"
    )
    conn.execute("INSERT INTO public.chosen VALUES (1, 1); INSERT INTO public.whole VALUES (1, 'p')")
    conn.execute("UPDATE public.payments SET pan = 'q'; UPDATE public.parted SET v = 'y'")
    conn.execute("UPDATE public.chosen SET y = 2; DELETE FROM public.whole")
    kept = conn.execute("SELECT pan, v, y FROM public.payments, public.parted, public.chosen").fetchall()
    assert kept == [("q", "y", 2)]


def test_a_publication_made_by_somebody_else_is_not_taken_over(conn: Connection) -> None:
    conn.execute("CREATE PUBLICATION pub FOR TABLE public.merchants")
    with pytest.raises(RefusedError, match="not made by vsql-sync"):
        _create(conn, "payments(id, amount)")
    assert _published(conn) == {"public.merchants": ["id", "name"]}


def test_a_publication_with_a_stream_is_neither_changed_nor_dropped(conn: Connection) -> None:
    _create(conn, "merchants")
    conn.execute(
        "INSERT INTO vsql_sync.streams (chain, direction, publication, origin)"
        " VALUES ('pub.a', 'out', 'pub', 'a')"
    )
    _create(conn, "merchants")
    with pytest.raises(RefusedError, match=r"has stream pub\.a"):
        _create(conn, "payments(id)")
    with pytest.raises(RefusedError, match=r"has stream pub\.a"):
        publications.drop(conn, "pub")


def test_dropping_removes_both_halves(conn: Connection) -> None:
    _create(conn, "merchants")
    publications.drop(conn, "pub")
    assert publications.everything(conn) == []
    assert conn.execute("SELECT count(*) FROM pg_publication").fetchall() == [(0,)]
    with pytest.raises(RefusedError, match="there is no publication"):
        publications.drop(conn, "pub")


@pytest.mark.parametrize("name", ["", "Pub", "1p", "a.b", "x" * 64, "a b"])
def test_a_name_that_could_not_be_part_of_a_chain_is_refused(conn: Connection, name: str) -> None:
    with pytest.raises(UserError):
        _create(conn, "merchants", name=name)


def test_a_table_named_twice_is_refused(conn: Connection) -> None:
    with pytest.raises(UserError, match="named twice"):
        _create(conn, "merchants", "public.merchants(id)")


def test_a_database_that_is_no_node_is_refused(new_database: NewDatabase) -> None:
    plain = connect(new_database("plain"), application_name="test")
    with plain, pytest.raises(RefusedError, match="node init"):
        _create(plain, "t")
