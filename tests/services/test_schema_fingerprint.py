"""vsql_sync.compute_fingerprint and its friends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import NewDatabase
from vsql_shared.pg import migrate
from vsql_shared.pg.connect import Connection, connect


@pytest.fixture
def conn(new_database: NewDatabase) -> Iterator[Connection]:
    with connect(new_database("fp"), application_name="test") as opened:
        migrate.install(opened)
        yield opened


def _fingerprint(conn: Connection, definition: str) -> str | None:
    conn.execute("DROP TABLE IF EXISTS public.t")
    conn.execute(f"CREATE TABLE public.t ({definition})".encode())
    row = conn.execute("SELECT vsql_sync.compute_fingerprint('public', 't')").fetchone()
    assert row is not None
    return None if row[0] is None else str(row[0])


def test_a_missing_table_has_none_and_a_table_without_columns_has_one(conn: Connection) -> None:
    assert conn.execute("SELECT vsql_sync.compute_fingerprint('public', 'gone')").fetchall() == [(None,)]
    assert _fingerprint(conn, "") is not None


def test_the_same_definition_gives_the_same_fingerprint_whatever_was_dropped_before(conn: Connection) -> None:
    plain = _fingerprint(conn, "a int, b text DEFAULT 'x'")
    _fingerprint(conn, "a int, dropped int, b text DEFAULT 'x'")
    conn.execute("ALTER TABLE public.t DROP COLUMN dropped")
    assert conn.execute("SELECT vsql_sync.compute_fingerprint('public', 't')").fetchall() == [(plain,)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a numeric(10,2)", "a numeric(10,3)"),
        ("a int[]", "a text[]"),
        ("a int", "a int NOT NULL"),
        ("a int", "a int DEFAULT 0"),
        ("a int", "a int GENERATED ALWAYS AS IDENTITY"),
        ("a text", 'a text COLLATE "C"'),
        ("a int, b int", "b int, a int"),
        ("a int, b int", '"a:int,b" int'),
        ('"a|b" int', "a int, b int"),
        ("a text DEFAULT E'\\\\x'", "a text DEFAULT 'x'"),
    ],
)
def test_different_definitions_have_different_fingerprints(conn: Connection, one: str, other: str) -> None:
    assert _fingerprint(conn, one) != _fingerprint(conn, other)


def test_names_that_need_quotes_are_found(conn: Connection) -> None:
    conn.execute('CREATE SCHEMA "My Schema"; CREATE TABLE "My Schema"."Order ""Items""" ("é x" int)')
    row = conn.execute("SELECT vsql_sync.compute_fingerprint('My Schema', 'Order \"Items\"')").fetchone()
    assert row is not None
    assert len(row[0]) == 64


def test_capturing_stores_replaces_and_forgets(conn: Connection) -> None:
    _fingerprint(conn, "a int")
    query = "SELECT fingerprint, column_count FROM vsql_sync.schema_fingerprints"
    first = conn.execute("SELECT vsql_sync.capture_fingerprint('public', 't')").fetchall()[0][0]
    assert conn.execute(query).fetchall() == [(first, 1)]
    conn.execute("ALTER TABLE public.t ADD COLUMN b int")
    second = conn.execute("SELECT vsql_sync.capture_fingerprint('public', 't')").fetchall()[0][0]
    assert conn.execute(query).fetchall() == [(second, 2)]
    conn.execute("DROP TABLE public.t")
    assert conn.execute("SELECT vsql_sync.capture_fingerprint('public', 't')").fetchall() == [(None,)]
    assert conn.execute(query).fetchall() == []
