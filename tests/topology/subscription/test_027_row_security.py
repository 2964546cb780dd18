"""Services with their roles' rights only: row security hides nothing in silence. Inheritance."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import psycopg
import pytest

from tests.nodes import TwoNodes
from tests.stack import Stack
from tests.topology.subscription.scenes import anomalies, commit, rows, same
from tests.topology.subscription.waiting import QUICK, says

pytestmark = [pytest.mark.topology, pytest.mark.timeout(300)]

SCHEMA = """
CREATE TABLE secured (id int PRIMARY KEY, owner text);
CREATE TABLE parent (id int PRIMARY KEY, v text);
CREATE TABLE child (extra int, PRIMARY KEY (id)) INHERITS (parent);
CREATE TABLE unpublished (PRIMARY KEY (id)) INHERITS (parent);
"""
SECURITY = """
ALTER TABLE secured ENABLE ROW LEVEL SECURITY;
CREATE POLICY mine ON secured USING (owner = current_user);
"""
ROWS = """
INSERT INTO secured SELECT g, 'somebody' FROM generate_series(1, 10) g;
INSERT INTO parent VALUES (1, 'p'); INSERT INTO child VALUES (1, 'c', 1), (2, 'c', 2);
INSERT INTO unpublished VALUES (1, 'u');
"""


@pytest.fixture(scope="module")
def users() -> dict[str, str]:
    """Names of the services' users; users belong to the server, which others use too."""
    return {role: f"test_{role}_{secrets.token_hex(4)}" for role in ("producer", "consumer")}


@pytest.fixture(scope="module")
def pair(stack: Stack, tmp_path_factory: pytest.TempPathFactory, users: dict[str, str]) -> Iterator[TwoNodes]:
    """Nodes whose services have their roles' rights only; nothing runs yet."""
    made = TwoNodes(stack, tmp_path_factory.mktemp("security"), SCHEMA, config=QUICK)
    try:
        for node in (made.a, made.b):
            node.execute(SECURITY)
        made.a.execute(ROWS)
        made.b.execute("INSERT INTO unpublished VALUES (1, 'its own'), (7, 'its own')")
        made.create(["secured", "parent", "child"])
        made.a.execute(f"CREATE ROLE {users['producer']} LOGIN REPLICATION IN ROLE vsql_sync_producer")
        made.b.execute(f"CREATE ROLE {users['consumer']} LOGIN IN ROLE vsql_sync_consumer")
        made.a.start("producer", {"VSQL_SYNC__CONNECTION__PRODUCER_USER": users["producer"]})
        made.b.start("consumer", {"VSQL_SYNC__CONNECTION__CONSUMER_USER": users["consumer"]})
        yield made
        made.stop()
    finally:
        made.end()
        with psycopg.connect(stack.postgres(18).conninfo, autocommit=True) as connection:
            for user in users.values():
                connection.execute(f"DROP ROLE IF EXISTS {user}".encode())


def test_a_table_with_row_security_stops_by_name_until_the_services_users_bypass_it(
    pair: TwoNodes, users: dict[str, str]
) -> None:
    # A policy would make the copy shorter, and changes at the target miss their rows.
    said = says(pair.a, "out", "row-level security", kind="copy")
    assert "secured" in said
    assert pair.b.query("SELECT * FROM secured") == []
    pair.a.execute(f"ALTER ROLE {users['producer']} BYPASSRLS")
    assert "secured" in says(pair.b, "in", "row-level security", kind="copy")
    pair.b.execute(f"ALTER ROLE {users['consumer']} BYPASSRLS")
    pair.wait_in_step(timeout=90)
    assert len(same(pair, "secured")) == 10
    commit(pair, "UPDATE secured SET owner = 'x' WHERE id < 5; DELETE FROM secured WHERE id > 8")
    assert len(same(pair, "secured")) == 8
    assert anomalies(pair, "secured") == {}


def test_it_is_said_before_when_the_tables_are_published_and_the_peer_is_added(pair: TwoNodes) -> None:
    note = pair.a.ctl("publication", "create", "said", "--table", "secured").stderr
    assert "public.secured: has row-level security; the producer's user must bypass it" in note
    pair.a.ctl("publication", "drop", "said", "--yes")
    again = pair.a.ctl(
        "node", "add-peer", "--peer-node-id", "2", "--peer-name", "node-b", "--peer-connection",
        pair.b.conninfo, "--mode", "uni-directional", "--yes",
    )  # fmt: skip
    assert "public.secured: has row-level security on the peer" in again.stdout + again.stderr


def test_rows_of_a_parent_and_of_its_children_are_each_tables_own(pair: TwoNodes) -> None:
    only = "SELECT * FROM ONLY parent"
    pair.wait_in_step(timeout=90)
    assert rows(pair, only) == ([(1, "p")], [(1, "p")])
    assert len(same(pair, "child")) == 2
    commit(
        pair,
        "INSERT INTO parent VALUES (2, 'p'); UPDATE parent SET v = v || '!'; DELETE FROM parent WHERE id = 2",
        "INSERT INTO child VALUES (5, 'c', 5); UPDATE ONLY parent SET v = 'alone'",
        "INSERT INTO unpublished VALUES (9, 'u')",
    )
    assert rows(pair, only) == ([(1, "alone")], [(1, "alone")])
    assert len(same(pair, "child")) == 2
    assert pair.b.query("SELECT * FROM unpublished ORDER BY id") == [(1, "its own"), (7, "its own")]
    commit(pair, "TRUNCATE parent; INSERT INTO child VALUES (6, 'c', 6)")
    assert rows(pair, only) == ([], [])
    assert len(same(pair, "child")) == 1
    assert pair.b.query("SELECT * FROM unpublished ORDER BY id") == [(1, "its own"), (7, "its own")]
    assert anomalies(pair, "parent") == anomalies(pair, "child") == {}
