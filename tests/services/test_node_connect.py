"""Opening sessions, and what an operator reads when one cannot be opened or a statement fails."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.conftest import NewDatabase
from tests.stack import Postgres, Stack
from vsql_shared.errors import ConfigError, DatabaseError, TransientError, VsqlSyncError
from vsql_shared.pg.connect import connect, describe, errors, own_way, parse_conninfo

SECRET = "sw0rdf1sh-xyzzy"


@pytest.mark.parametrize(
    ("conninfo", "kind", "expected"),
    [
        ("host=127.0.0.1 port=1 dbname=x", TransientError, "Connection refused"),
        ("host=no-such-host.invalid dbname=x", TransientError, "failed to resolve host"),
        ("port=abc", DatabaseError, "an option of the connection string"),
        ("host=127.0.0.1 sslmode=nope", DatabaseError, "an option of the connection string"),
        (f"dbname=x {SECRET}", ConfigError, "cannot be read"),
    ],
)
def test_an_address_that_cannot_work_is_named_in_words(
    conninfo: str, kind: type[VsqlSyncError], expected: str
) -> None:
    with pytest.raises(kind, match=expected) as caught:
        connect(conninfo, application_name="test", connect_timeout="3")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "expected"),
    [("dbname=nowhere", "check the database name"), ("user=nobody_here", "check the user")],
)
def test_a_wrong_database_or_user_says_what_to_check(pg18: Postgres, option: str, expected: str) -> None:
    with pytest.raises(DatabaseError, match=expected):
        connect(f"{pg18.conninfo} {option}", application_name="test")


def test_a_wrong_password_is_refused_and_never_shown(stack: Stack) -> None:
    server = stack.own_postgres(18, auth="scram")
    try:
        parts = parse_conninfo(server.conninfo())
        wrong = f"host=127.0.0.1 port={parts['port']} user=postgres dbname=postgres password={SECRET}"
        with pytest.raises(DatabaseError, match="check user and password") as caught:
            connect(wrong, application_name="test")
        assert SECRET not in str(caught.value)
        with pytest.raises(DatabaseError, match="give a password"):
            connect(wrong.rpartition(" ")[0], application_name="test", passfile="/dev/null")
    finally:
        server.remove()


@pytest.mark.parametrize(
    "misread",
    [
        f"postgresql://u:p@{SECRET}@127.0.0.1/x",
        f"postgresql://u:{SECRET}/x@127.0.0.1/y",
        f"host={SECRET}@h dbname=x",
    ],
)
def test_a_password_that_libpq_takes_for_a_host_is_not_shown(misread: str) -> None:
    with pytest.raises(VsqlSyncError) as caught:
        connect(misread, application_name="test", connect_timeout="3")
    assert SECRET not in str(caught.value)


def test_a_session_does_not_depend_on_the_defaults_of_role_or_database(new_database: NewDatabase) -> None:
    conninfo = new_database("session")
    name = parse_conninfo(conninfo)["dbname"]
    with connect(conninfo, application_name="test") as conn:
        for setting in (
            "timezone = 'Asia/Tokyo'",
            "datestyle = 'German'",
            "search_path = 'evil'",
            "lock_timeout = 5",
        ):
            conn.execute(f"ALTER DATABASE {name} SET {setting}".encode())
    with connect(conninfo, application_name="vsql_test", statement_timeout_ms=1234) as conn:
        shown = {
            name: conn.execute(f"SHOW {name}".encode()).fetchall()[0][0]
            for name in (
                "timezone",
                "datestyle",
                "search_path",
                "lock_timeout",
                "row_security",
                "application_name",
            )
        }
        assert shown == {
            "timezone": "UTC",
            "datestyle": "ISO, YMD",
            "search_path": "pg_catalog",
            "lock_timeout": "0",
            "row_security": "off",
            "application_name": "vsql_test",
        }
        assert conn.execute("SHOW statement_timeout").fetchall() == [("1234ms",)]


def test_a_replication_connection_takes_the_same_session(pg18: Postgres) -> None:
    with connect(pg18.conninfo, application_name="test", replication="database") as conn:
        assert conn.execute("IDENTIFY_SYSTEM").fetchall()[0][3] == "postgres"


def test_the_end_of_a_session_that_holds_a_lock_is_noticed_in_seconds(pg18: Postgres) -> None:
    """Also where bytes were under way: then keepalive says nothing for a quarter of an hour."""
    with connect(pg18.conninfo, application_name="test", holds_lock=True, host="127.0.0.1") as conn:
        assert conn.execute("SHOW tcp_user_timeout").fetchone() == ("8000",)
        assert conn.info.get_parameters()["tcp_user_timeout"] == "30000"
    with connect(pg18.conninfo, application_name="test", host="127.0.0.1") as conn:
        assert conn.execute("SHOW tcp_user_timeout").fetchone() == ("0",), "rows may wait for their reader"


def test_no_message_carries_a_value_of_a_row(new_database: NewDatabase) -> None:
    with connect(new_database("values"), application_name="test") as conn:
        conn.execute("CREATE TABLE public.t (id int PRIMARY KEY, pan text CHECK (length(pan) < 5))")
        conn.execute("INSERT INTO public.t VALUES (1, 'a')")
        for statement in (
            f"SELECT '{SECRET}'::int",
            f"INSERT INTO public.t VALUES (2, '{SECRET}')",
            "INSERT INTO public.t VALUES (1, 'b')",
        ):
            with pytest.raises(DatabaseError, match="while storing") as caught, errors("storing"):
                conn.execute(statement.encode())
            assert SECRET not in str(caught.value)
        with pytest.raises(DatabaseError, match="constraint t_pkey"), errors("storing"):
            conn.execute("INSERT INTO public.t VALUES (1, 'b')")


def test_what_passes_is_transient_and_what_stays_is_not(new_database: NewDatabase) -> None:
    with connect(new_database("kinds"), application_name="test", statement_timeout_ms=50) as conn:
        with pytest.raises(TransientError), errors("sleeping"):
            conn.execute("SELECT pg_sleep(5)")
        with pytest.raises(DatabaseError, match="does not exist"), errors("reading"):
            conn.execute("SELECT * FROM public.nothing")
        conn.close()
        with pytest.raises(TransientError), errors("reading"):
            conn.execute("SELECT 1")


def test_a_description_names_database_address_and_user() -> None:
    shown = describe(f"host=db1 port=5433 dbname=shop user=app password={SECRET}")
    assert shown == "to database shop at db1:5433 as user app"


def test_no_environment_leads_a_session_to_another_address(
    pg18: Postgres, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A host that is this machine may be reached without TLS: libpq must not make another machine of it."""
    parts = parse_conninfo(pg18.conninfo)
    with socket.create_server(("127.0.0.2", 0)) as elsewhere:
        elsewhere.settimeout(0.5)
        service = tmp_path / "services.conf"
        service.write_text("[elsewhere]\nhostaddr=127.0.0.2\nsslmode=disable\n")
        for name, value in (
            ("PGHOSTADDR", "127.0.0.2"),
            ("PGSERVICE", "elsewhere"),
            ("PGSERVICEFILE", str(service)),
        ):
            with monkeypatch.context() as environment:
                environment.setenv("PGSERVICEFILE", str(service))
                environment.setenv(name, value)
                port = elsewhere.getsockname()[1]
                with pytest.raises(TransientError, match="Connection refused"):
                    connect(f"host=localhost port={port} dbname=x", application_name="test")
                host = "localhost" if parts["host"] == "127.0.0.1" else parts["host"]
                with connect(pg18.conninfo, application_name="test", host=host) as conn:
                    assert conn.execute("SELECT 1").fetchall() == [(1,)]
        with pytest.raises(TimeoutError):
            elsewhere.accept()


@pytest.mark.parametrize("mode", ["verify-full", "verify-ca"])
def test_a_checked_certificate_is_not_passed_by_with_kerberos(mode: str) -> None:
    assert own_way({"host": "db1", "sslmode": mode})["gssencmode"] == "disable"
    assert "gssencmode" not in own_way({"host": "db1", "sslmode": "prefer"})
