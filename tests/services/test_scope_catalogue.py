"""The catalogue of PCI columns, what follows from it, and what is decided while streams run."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.conftest import NewDatabase
from vsql_producers import drift
from vsql_producers.scope import load_scope, require_no_authentication_data
from vsql_shared.changes import Column, TableName
from vsql_shared.crypto.signing import TrustStore
from vsql_shared.errors import DatabaseError, RefusedError
from vsql_shared.pg import migrate, nodes, pci, publication_changes, publications, scope_facts
from vsql_shared.pg.connect import Connection, connect
from vsql_shared.pg.pci_names import Kind
from vsql_shared.pg.publication_notes import limitations, of_marks
from vsql_shared.pg.publications import PublicationInfo, PublicationRequest
from vsql_shared.pg.table_spec import parse_column, parse_spec

TABLES = """
CREATE TABLE public.payments (id bigint PRIMARY KEY, ref int NOT NULL UNIQUE, amount numeric,
    pan_encrypted bytea, cvv_hash text, cardholder_name text, expiry_encrypted bytea, note text);
CREATE TABLE public.shops (id int PRIMARY KEY, pin_code text, cid uuid);
CREATE TABLE public.facts (id int, at int, v text, cvv text, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
CREATE TABLE public.facts_1 PARTITION OF public.facts FOR VALUES FROM (0) TO (10);
"""
PAYMENTS, SHOPS, FACTS = (TableName("public", name) for name in ("payments", "shops", "facts"))


@pytest.fixture(params=[15, 18], ids=["pg15", "pg18"])
def conn(request: pytest.FixtureRequest, new_schema: NewDatabase) -> Iterator[Connection]:
    """A node with the tables above."""
    with connect(new_schema("scope", request.param), application_name="test") as opened:
        migrate.install(opened)
        nodes.register_local(opened, 1, "node-a", "c", None)
        opened.execute(TABLES)
        yield opened


def _create(
    conn: Connection, *tables: str, exclude_pci: bool = False, set_identity: bool = False
) -> PublicationInfo:
    specs = tuple(map(parse_spec, tables))
    request = PublicationRequest("pub", specs, exclude_pci=exclude_pci, set_identity=set_identity)
    return publications.create(conn, request)


def _logged(conn: Connection, action: str) -> list[tuple[str, str]]:
    return conn.execute(
        "SELECT target_id, coalesce(new_value ->> 'reason', '') FROM vsql_sync.audit_log"
        " WHERE action = %s ORDER BY id",
        (action,),
    ).fetchall()


def test_excluding_pci_leaves_out_what_names_suggest_without_a_mark(conn: Connection) -> None:
    made = _create(conn, "payments(*)", exclude_pci=True)
    assert made.tables[0].columns == ("id", "ref", "amount", "note")
    said = limitations(conn, made)
    assert "public.payments.pan_encrypted looks like a card number and is left out" in said
    made = _create(conn, "payments(id, pan_encrypted)")
    assert any(
        "pan_encrypted looks like a card number and is published" in line for line in limitations(conn, made)
    )


@pytest.mark.parametrize("listed", ["payments(*)", "payments(id, cvv_hash)", "facts", "shops"])
def test_authentication_data_is_refused_by_its_name_excluded_or_not(conn: Connection, listed: str) -> None:
    with pytest.raises(RefusedError, match=r"sensitive authentication data and is never published"):
        _create(conn, listed)
    assert publications.everything(conn) == []


def test_authentication_data_is_refused_by_mark_and_becomes_it_by_a_later_one(conn: Connection) -> None:
    note = [(PAYMENTS, "note")]
    assert pci.mark(conn, note) == note
    assert pci.mark(conn, note, Kind.AUTHENTICATION) == note
    assert pci.mark(conn, note) == []
    with pytest.raises(RefusedError, match="note is marked as sensitive authentication data"):
        _create(conn, "payments(id, note)")
    assert _create(conn, "payments(id, amount)").tables[0].columns == ("id", "amount")
    with pytest.raises(RefusedError, match="never published"):
        publication_changes.add_column(conn, "pub", PAYMENTS, "note")


def test_a_false_match_is_cleared_with_a_reason_that_is_kept(conn: Connection) -> None:
    assert pci.clear(conn, SHOPS, "pin_code", "postal code of India") == "a PIN"
    assert _create(conn, "shops").tables[0].columns is None
    assert _logged(conn, "pci.clear") == [("public.shops.pin_code", "postal code of India")]


def test_a_false_match_that_was_renamed_is_cleared_by_the_name_the_wal_has(conn: Connection) -> None:
    conn.execute("ALTER TABLE public.shops RENAME pin_code TO postal")
    assert pci.clear(conn, SHOPS, "pin_code", "postal code of India") == "a PIN"
    _create(conn, "shops")
    assert load_scope(conn, "pub").cleared == {SHOPS: {"pin_code"}}


def test_what_was_cleared_of_one_thing_is_not_cleared_of_authentication_data(conn: Connection) -> None:
    """The column's type says since what it is."""
    conn.execute("CREATE DOMAIN public.card_number text; CREATE DOMAIN public.cvv text")
    conn.execute("ALTER TABLE public.shops ADD code public.card_number")
    assert pci.clear(conn, SHOPS, "code", "no card's") == "a card number"
    assert _create(conn, "shops(id, code)").tables[0].columns == ("id", "code")
    # PostgreSQL changes no type of a column in a list.
    conn.execute("ALTER PUBLICATION pub DROP TABLE public.shops")
    conn.execute("ALTER TABLE public.shops ALTER code TYPE public.cvv")
    scope = load_scope(conn, "pub")
    assert scope.cleared == {SHOPS: {"code"}}
    assert scope.not_secret == {SHOPS: frozenset()}
    with pytest.raises(DatabaseError, match="sensitive authentication data never does"):
        require_no_authentication_data(scope, SHOPS, [Column("code", False, 1, -1, "public.cvv")])
    with pytest.raises(RefusedError, match="code looks like a card verification code"):
        _create(conn, "shops(id, code)")
    assert pci.clear(conn, SHOPS, "code", "of a parcel") == "a card verification code"
    require_no_authentication_data(
        load_scope(conn, "pub"), SHOPS, [Column("code", False, 1, -1, "public.cvv")]
    )


@pytest.mark.parametrize(
    ("column", "reason", "said"),
    [
        ("payments.pan_encrypted", "no", "a mark stays"),
        ("payments.note", "no", "nothing to clear"),
        ("payments.cvv_hash", "  ", "a reason is needed"),
        ("payments.nothing", "no", "there is no column"),
    ],
)
def test_marks_and_what_nobody_suspects_are_not_cleared(
    conn: Connection, column: str, reason: str, said: str
) -> None:
    pci.mark(conn, [parse_column("payments.pan_encrypted")])
    with pytest.raises(RefusedError, match=said):
        pci.clear(conn, *parse_column(column), reason)
    assert _logged(conn, "pci.clear") == []


def test_a_mark_as_less_does_not_let_authentication_data_pass(conn: Connection) -> None:
    conn.execute(
        "INSERT INTO vsql_sync.pci_columns (table_schema, table_name, column_name)"
        " VALUES ('public', 'payments', 'cvv_hash')"
    )
    with pytest.raises(RefusedError, match="never published"):
        _create(conn, "payments(id, cvv_hash)")


def test_the_catalogue_says_what_is_marked_suggested_and_cleared(conn: Connection) -> None:
    pci.mark(conn, [parse_column("payments.pan_encrypted")])
    pci.clear(conn, SHOPS, "pin_code", "postal code")
    found = {(str(one.table), one.column): (one.kind, one.state) for one in pci.everything(conn)}
    assert found == {
        ("public.facts", "cvv"): (Kind.AUTHENTICATION, "suggested"),
        ("public.payments", "pan_encrypted"): (Kind.CARDHOLDER, "marked"),
        ("public.payments", "cvv_hash"): (Kind.AUTHENTICATION, "suggested"),
        ("public.payments", "cardholder_name"): (Kind.CARDHOLDER, "suggested"),
        ("public.payments", "expiry_encrypted"): (Kind.CARDHOLDER, "suggested"),
        ("public.shops", "pin_code"): (Kind.AUTHENTICATION, "cleared"),
    }


@pytest.mark.parametrize("before", ["FULL", "NOTHING", "USING INDEX payments_ref_key"])
def test_an_identity_is_set_to_an_index_where_it_is_asked_for(conn: Connection, before: str) -> None:
    conn.execute(f"ALTER TABLE public.payments REPLICA IDENTITY {before}".encode())
    with pytest.raises(RefusedError, match="--set-identity"):
        _create(conn, "payments(id, amount)", exclude_pci=True)
    _create(conn, "payments(id, amount)", exclude_pci=True, set_identity=True)
    conn.execute("UPDATE public.payments SET note = 'x'")
    assert _identity(conn) == "d"
    assert [target for target, _ in _logged(conn, "table.replica-identity")] == ["public.payments"]


def test_an_index_serves_where_the_primary_key_is_left_out(conn: Connection) -> None:
    _create(conn, "payments(ref, amount)", set_identity=True)
    assert _identity(conn) == "i"
    conn.execute("UPDATE public.payments SET note = 'x'")


@pytest.mark.parametrize("theirs", ["payments(ref, amount)", "payments WHERE (ref > 5)"])
def test_an_identity_another_publication_cannot_use_is_not_set(conn: Connection, theirs: str) -> None:
    """PostgreSQL would refuse the table's UPDATE and DELETE."""
    conn.execute("ALTER TABLE public.payments DROP cvv_hash")
    conn.execute("ALTER TABLE public.payments REPLICA IDENTITY USING INDEX payments_ref_key")
    _create(conn, theirs)
    other = (parse_spec("payments(id, amount)"),)
    with pytest.raises(RefusedError, match="publication pub has it, too"):
        publications.create(conn, PublicationRequest("other", other, set_identity=True))
    conn.execute("UPDATE public.payments SET note = 'x'")
    assert _identity(conn) == "i"


def test_an_identity_nothing_can_serve_is_refused_with_the_reason(conn: Connection) -> None:
    with pytest.raises(RefusedError, match="key column id must be in the column list"):
        _create(conn, "payments(amount)", set_identity=True)
    assert _identity(conn) == "d"


def _identity(conn: Connection) -> str:
    row = conn.execute(
        "SELECT relreplident::text FROM pg_class WHERE oid = 'public.payments'::regclass"
    ).fetchone()
    assert row is not None
    return str(row[0])


def test_full_stops_a_stream_that_leaves_columns_out_until_it_is_set_back(conn: Connection) -> None:
    _create(conn, "payments(id, amount)", "shops(id)", exclude_pci=True)
    drift.require_none(conn, "pub")
    conn.execute("ALTER TABLE public.payments REPLICA IDENTITY FULL")
    with pytest.raises(DatabaseError, match=r"public\.payments: REPLICA IDENTITY FULL sends every column"):
        drift.require_none(conn, "pub")
    conn.execute("ALTER TABLE public.payments REPLICA IDENTITY DEFAULT")
    drift.require_none(conn, "pub")


def test_full_of_a_partition_stops_its_tables_stream(conn: Connection) -> None:
    _create(conn, "facts(id, at, v)")
    drift.require_none(conn, "pub")
    conn.execute("ALTER TABLE public.facts_1 REPLICA IDENTITY FULL")
    with pytest.raises(DatabaseError, match=r"public\.facts_1: REPLICA IDENTITY FULL sends every column"):
        drift.require_none(conn, "pub")


@pytest.mark.parametrize(
    ("table", "statement"),
    [
        ("payments", "REPLICA IDENTITY USING INDEX payments_ref_key"),
        ("payments", "DROP CONSTRAINT payments_pkey, ADD PRIMARY KEY (ref)"),
        ("facts_1", "REPLICA IDENTITY USING INDEX of_leaf"),
    ],
)
def test_an_identity_with_a_column_that_is_left_out_stops_a_stream(
    conn: Connection, table: str, statement: str
) -> None:
    """PostgreSQL refuses the application's UPDATE from then on; nobody would know why."""
    conn.execute("ALTER TABLE public.facts REPLICA IDENTITY USING INDEX facts_pkey")
    conn.execute("ALTER TABLE public.facts_1 REPLICA IDENTITY USING INDEX facts_1_pkey")
    conn.execute("ALTER TABLE public.facts_1 ALTER v SET NOT NULL")
    conn.execute("CREATE UNIQUE INDEX of_leaf ON public.facts_1 (id, at, v)")
    _create(conn, "payments(id, amount)", "facts(id, at)", "shops", exclude_pci=True)
    drift.require_none(conn, "pub")
    conn.execute(f"ALTER TABLE public.{table} {statement}".encode())
    with pytest.raises(DatabaseError, match=rf"public\.{table}: key column \w+ must be in the column list"):
        drift.require_none(conn, "pub")
    with pytest.raises(psycopg.Error, match="cannot update table"):
        conn.execute(f"UPDATE public.{table} SET {'note' if table == 'payments' else 'cvv'} = 'x'".encode())


def test_an_index_of_a_partition_that_lacks_its_tables_key_stops_the_stream(conn: Connection) -> None:
    """Its rows travel under the table's identity, which the WAL would not hold."""
    conn.execute("ALTER TABLE public.facts REPLICA IDENTITY USING INDEX facts_pkey")
    conn.execute("ALTER TABLE public.facts_1 REPLICA IDENTITY USING INDEX facts_1_pkey")
    conn.execute("ALTER TABLE public.facts_1 ALTER v SET NOT NULL")
    conn.execute("CREATE UNIQUE INDEX of_leaf ON public.facts_1 (at, v)")
    _create(conn, "facts(id, at, v)")
    drift.require_none(conn, "pub")
    conn.execute("ALTER TABLE public.facts_1 REPLICA IDENTITY USING INDEX of_leaf")
    with pytest.raises(DatabaseError, match=r"public\.facts_1: its replica identity differs"):
        drift.require_none(conn, "pub")
    conn.execute("ALTER TABLE public.facts_1 REPLICA IDENTITY FULL")
    conn.execute("ALTER TABLE public.facts_1 REPLICA IDENTITY USING INDEX facts_1_pkey")
    drift.require_none(conn, "pub")


def test_whoever_marks_a_published_column_is_told_what_follows(conn: Connection) -> None:
    _create(conn, "payments(id, amount, note)")
    assert of_marks(conn, pci.mark(conn, [(PAYMENTS, "note")])) == [
        "publication pub has public.payments.note: it goes on, its batches are said to contain PCI data"
    ]
    publications.drop(conn, "pub")
    _create(conn, "payments(id, amount, note)", "facts(id, at, v)", exclude_pci=True)
    facts_1 = TableName("public", "facts_1")
    notes = of_marks(conn, pci.mark(conn, [(PAYMENTS, "amount"), (PAYMENTS, "ref"), (facts_1, "v")]))
    assert [note.partition(",")[0] for note in notes] == [
        "publication pub has public.facts.v",
        "publication pub has public.payments.amount",
    ]
    assert all(
        "its streams stop at the next row: `syncctl publication remove-column pub" in one for one in notes
    )
    assert of_marks(conn, pci.mark(conn, [(PAYMENTS, "amount")])) == []


def test_an_identity_that_covers_less_than_the_list_stops_nothing(conn: Connection) -> None:
    _create(conn, "payments(id, ref, amount)", exclude_pci=True)
    conn.execute("CREATE UNIQUE INDEX wide ON public.payments (ref) INCLUDE (note)")
    conn.execute("ALTER TABLE public.payments REPLICA IDENTITY USING INDEX wide")
    drift.require_none(conn, "pub")
    conn.execute("UPDATE public.payments SET note = 'x'")


def test_generated_columns_that_are_listed_stay_when_another_is_let_in(new_schema: NewDatabase) -> None:
    """PostgreSQL 18 publishes stored ones where they are listed, or where FULL needs them."""
    with connect(new_schema("scope", 18), application_name="test") as conn:
        migrate.install(conn)
        nodes.register_local(conn, 1, "node-a", "c", None)
        columns = "id int PRIMARY KEY, v int, twice int GENERATED ALWAYS AS (v * 2) STORED, w int"
        conn.execute(f"CREATE TABLE public.made ({columns})".encode())
        conn.execute(f"CREATE TABLE public.whole ({columns})".encode())
        conn.execute("ALTER TABLE public.whole REPLICA IDENTITY FULL")
        made = TableName("public", "made")
        _create(conn, "made(id, twice)", "whole")
        publication_changes.add_column(conn, "pub", made, "w")
        assert _columns(conn) == ("id", "twice", "w")
        publication_changes.remove_column(conn, "pub", made, "twice")
        publication_changes.add_column(conn, "pub", made, "twice")
        assert _columns(conn) == ("id", "twice", "w")
        drift.require_none(conn, "pub")
        facts = scope_facts.gather(conn, "pub", TrustStore([], allow_unsigned=True))
        assert {one.name: one.published for one in facts.tables} == {
            "public.made": ("id", "twice", "w"),
            "public.whole": ("id", "v", "twice", "w"),
        }


def _columns(conn: Connection) -> tuple[str, ...] | None:
    """Of the first table of the publication."""
    found = publications.find(conn, "pub")
    assert found is not None
    return found.tables[0].columns


def test_a_column_taken_out_leaves_both_halves_and_can_come_back(conn: Connection) -> None:
    _create(conn, "payments(id, amount, note)", "shops(id)")
    publication_changes.remove_column(conn, "pub", PAYMENTS, "note")
    drift.require_none(conn, "pub")
    assert _listed(conn) == (["id", "amount"], [], ["note"])
    with pytest.raises(RefusedError, match="already"):
        publication_changes.remove_column(conn, "pub", PAYMENTS, "note")
    publication_changes.add_column(conn, "pub", PAYMENTS, "note")
    drift.require_none(conn, "pub")
    assert _listed(conn) == (["id", "amount", "note"], ["note"], [])


def test_a_column_taken_out_of_a_whole_table_closes_its_list(conn: Connection) -> None:
    _create(conn, "shops(id, cid)")
    pci.clear(conn, SHOPS, "pin_code", "postal code")
    _create(conn, "shops")
    publication_changes.remove_column(conn, "pub", SHOPS, "cid")
    conn.execute("ALTER TABLE public.shops ADD later text")
    found = publications.find(conn, "pub")
    assert found is not None
    assert found.tables[0].columns == ("id", "pin_code")
    drift.require_none(conn, "pub")


@pytest.mark.parametrize(
    ("column", "said"), [("id", "cannot be taken out: .*key column id"), ("gone", "already")]
)
def test_keys_stay_and_a_name_the_wal_has_is_taken_out_once(conn: Connection, column: str, said: str) -> None:
    _create(conn, "payments(id, amount)")
    if column == "gone":
        publication_changes.remove_column(conn, "pub", PAYMENTS, column)
    with pytest.raises(RefusedError, match=said):
        publication_changes.remove_column(conn, "pub", PAYMENTS, column)


def test_two_decisions_at_once_do_not_undo_each_other(conn: Connection) -> None:
    """The later one waits, and reads what the earlier one left."""
    _create(conn, "payments(id, amount, note)")
    dsn = make_conninfo(conn.info.dsn, password=conn.info.password or None)
    waiting = "SELECT EXISTS (SELECT FROM pg_locks WHERE pid = %s AND NOT granted)"
    with connect(dsn, application_name="test") as other, ThreadPoolExecutor(1) as pool:
        with conn.transaction():
            publication_changes.remove_column(conn, "pub", PAYMENTS, "note")
            later = pool.submit(publication_changes.add_column, other, "pub", PAYMENTS, "ref")
            deadline = time.monotonic() + 20
            while conn.execute(waiting, (other.info.backend_pid,)).fetchone() != (True,):
                assert time.monotonic() < deadline
                time.sleep(0.02)
        later.result(20)
    assert _listed(conn) == (["id", "ref", "amount"], ["ref"], ["note"])
    drift.require_none(conn, "pub")


def test_full_and_a_list_do_not_go_together_even_where_it_lists_all_columns(conn: Connection) -> None:
    conn.execute("CREATE TABLE public.log (id int, v text); ALTER TABLE public.log REPLICA IDENTITY FULL")
    with pytest.raises(RefusedError, match=r"public\.log: REPLICA IDENTITY FULL needs every column"):
        _create(conn, "log(id, v)")
    assert _create(conn, "log").tables[0].columns is None
    conn.execute("UPDATE public.log SET v = 'x'")
    conn.execute("CREATE PUBLICATION of_another_hand FOR TABLE public.log (id, v)")
    with pytest.raises(psycopg.Error, match="cannot update table"):
        conn.execute("UPDATE public.log SET v = 'x'")


def test_readers_are_those_too_who_may_become_one(conn: Connection) -> None:
    _create(conn, "payments(id, amount)")
    reader, member = (f"scope_{secrets.token_hex(4)}" for _ in range(2))
    conn.execute(
        f"CREATE ROLE {reader} REPLICATION; CREATE ROLE {member}; GRANT {reader} TO {member}".encode()
    )
    try:
        roles = scope_facts.gather(conn, "pub", TrustStore([], allow_unsigned=True)).reader_roles
    finally:
        conn.execute(f"DROP ROLE {reader}, {member}".encode())
    assert {reader, member} <= set(roles)


def _listed(conn: Connection) -> tuple[list[str], list[str], list[str]]:
    row = conn.execute(
        "SELECT columns, added_columns, removed_columns FROM vsql_sync.published_tables"
        " WHERE table_name = 'payments'"
    ).fetchone()
    assert row is not None
    return row[0], row[1], row[2]
