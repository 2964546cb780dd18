"""A refused connection leaves one line in the operators' log, and an order to sign its hash."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import NewDatabase
from vsql_shared.errors import BrokerError, DatabaseError, KeyUnavailableError, TransientError, VsqlSyncError
from vsql_shared.pg import roles
from vsql_shared.pg.connect import Connection, connect, errors
from vsql_shared.service.refused_connections import CAUSES_AT_MOST, RefusedConnections

CHAIN = "orders.node-a"


@pytest.fixture
def place(new_schema: NewDatabase) -> str:
    """A database with our schema and an outgoing stream."""
    conninfo = new_schema("refused")
    with connect(conninfo, application_name="test") as conn:
        conn.execute(
            "INSERT INTO vsql_sync.streams (chain, direction, publication, origin)"
            " VALUES (%s, 'out', 'orders', 'node-a')",
            (CHAIN,),
        )
    return conninfo


@pytest.fixture
def conn(place: str) -> Iterator[Connection]:
    with connect(place, application_name="test") as conn:
        yield conn


def noted(conn: Connection) -> list[tuple[object, ...]]:
    """Lines of the log, each with the order that names it."""
    return conn.execute(
        "SELECT l.target_type, l.new_value ->> 'cause', l.error_message FROM vsql_sync.audit_log l"
        " JOIN vsql_sync.commands c ON (c.args ->> 'audit_log')::bigint = l.id"
        " WHERE l.action = 'connection.refused' AND NOT l.success AND c.verb = 'note-refusal'"
        " AND c.role = 'producer' AND c.chain = l.target_id ORDER BY l.id"
    ).fetchall()


def refused(text: str = "refuses user x", cause: str = "authentication") -> BrokerError:
    return BrokerError(text).refusing(cause)


def test_once_for_a_cause_and_again_when_it_comes_back(place: str, conn: Connection) -> None:
    worker = RefusedConnections("producer", CHAIN, lambda: connect(place, application_name="worker"))
    for _ in range(3):
        worker.take(refused())
    once = [("kafka", "authentication", "refuses user x")]
    assert noted(conn) == once
    worker.take(DatabaseError("no pg_hba.conf entry").refusing("authentication"))
    worker.take(refused("no TLS", "tls"))
    assert [line[:2] for line in noted(conn)[1:]] == [("postgresql", "authentication"), ("kafka", "tls")]
    # Another start: what still waits to be signed is not said again.
    other = RefusedConnections("producer", CHAIN, lambda: connect(place, application_name="worker"))
    other.take(refused())
    assert len(noted(conn)) == 3
    conn.execute(
        "INSERT INTO vsql_sync.command_results (command_id, chain, direction, ok)"
        " SELECT id, chain, 'out', true FROM vsql_sync.commands"
    )
    worker.take(refused())
    assert len(noted(conn)) == 3
    worker.let_in()
    worker.take(refused())
    assert noted(conn)[3:] == once


def test_what_is_no_refusal_leaves_nothing(place: str, conn: Connection) -> None:
    worker = RefusedConnections("producer", CHAIN, lambda: connect(place, application_name="worker"))
    others: tuple[VsqlSyncError, ...] = (
        BrokerError("message too large"), DatabaseError("no such table"),
        TransientError("away"), KeyUnavailableError("no KEK"),
    )  # fmt: skip
    for error in others:
        worker.take(error)
    assert noted(conn) == []


def test_a_database_that_is_away_stops_nothing_and_it_is_noted_later(place: str, conn: Connection) -> None:
    away = True

    def reach() -> Connection:
        if away:
            raise TransientError("away")
        return connect(place, application_name="worker")

    worker = RefusedConnections("producer", CHAIN, reach)
    worker.take(refused())
    assert noted(conn) == []
    away = False
    worker.take(refused())
    assert len(noted(conn)) == 1


def test_words_that_change_with_every_try_do_not_fill_the_log(place: str, conn: Connection) -> None:
    for _ in range(2):
        worker = RefusedConnections("producer", CHAIN, lambda: connect(place, application_name="worker"))
        for number in range(CAUSES_AT_MOST + 5):
            worker.take(refused(f"after {number} ms " + "x" * 5_000))
    lines = noted(conn)
    assert len(lines) == CAUSES_AT_MOST
    assert all(len(str(line[2])) <= 500 for line in lines)


def test_a_service_notes_refusals_of_its_streams_and_nothing_else(conn: Connection) -> None:
    if not roles.exist(conn):
        roles.create(conn)
    roles.grant_schema(conn)
    call = "SELECT vsql_sync.note_refused_connection"
    for role, arguments, words in (
        (roles.PRODUCER, f"('consumer', '{CHAIN}', 'kafka', 'tls', '')", "no refused connection of a stream"),
        (roles.PRODUCER, "('producer', 'x.y', 'kafka', 'tls', '')", "no refused connection of a stream"),
        (
            roles.CONSUMER,
            f"('producer', '{CHAIN}', 'kafka', 'other', '')",
            "no refused connection of a stream",
        ),
        (roles.CONSUMER, f"('producer', '{CHAIN}', 'mars', 'tls', '')", "no refused connection of a stream"),
        (roles.VIEWER, f"('producer', '{CHAIN}', 'kafka', 'tls', '')", "permission denied"),
    ):
        with pytest.raises(DatabaseError, match=words), errors("trying"):
            conn.execute(f"BEGIN; SET LOCAL ROLE {role}; {call}{arguments}".encode())
        conn.execute("ROLLBACK")
    good = f"('producer', '{CHAIN}', 'kafka', 'tls', 'x')"
    conn.execute(f"BEGIN; SET LOCAL ROLE {roles.PRODUCER}; {call}{good}; COMMIT".encode())
    assert len(noted(conn)) == 1
