"""Commits wait once `enable` has returned, others' do not for it; it is refused where they would for ever."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import psycopg
import pytest

from tests.services.test_synchronous_triggers import join_targets
from tests.services.waiting_commits import Client, watcher
from tests.stack import Stack
from tests.stack.postgres import PostgresServer
from tests.waiting import until
from vsql_shared import names
from vsql_shared.errors import RefusedError
from vsql_shared.pg import migrate, nodes, publications, standby_names, synchronous
from vsql_shared.pg.connect import Connection, connect
from vsql_shared.pg.publications import PublicationRequest
from vsql_shared.pg.table_spec import parse_column, parse_spec

TABLES = """
CREATE TABLE public.cards (id int PRIMARY KEY, pan text);
CREATE TABLE public.medical (id int PRIMARY KEY, pan text);
CREATE TABLE public.plain (id int GENERATED ALWAYS AS IDENTITY, note text);
"""
PLAIN = "INSERT INTO plain (note) VALUES ('x')"


@pytest.fixture(scope="module")
def server(stack: Stack) -> PostgresServer:
    return stack.own_postgres(18, {"max_prepared_transactions": 0})


@pytest.fixture(scope="module")
def conninfo(server: PostgresServer) -> str:
    with psycopg.connect(server.conninfo(), autocommit=True) as conn:
        conn.execute("CREATE DATABASE a")
        conn.execute("CREATE ROLE loud LOGIN")
    made = server.conninfo("a")
    with connect(made, application_name="test") as conn:
        migrate.install(conn)
        nodes.register_local(conn, 1, "node-a", "c", bytes(range(32)))
        conn.execute(TABLES.encode())
        for name in ("cards", "medical"):
            request = PublicationRequest(name, (parse_spec(name),), (parse_column(f"{name}.pan"),))
            publications.create(conn, request)
        join_targets(conn, "cards")
        join_targets(conn, "medical", "node-b", "node-c")
    return made


@pytest.fixture
def admin(conninfo: str) -> Iterator[Connection]:
    """Who finds nothing set, and leaves nothing."""
    with connect(conninfo, application_name="admin") as conn:
        conn.execute("SET synchronous_commit = local")
        set_both(conn, "", "on")
        yield conn
        conn.execute("SET synchronous_commit = local")
        set_both(conn, "", "local")
        for one in synchronous.everything(conn):
            synchronous.disable(conn, one.publication, "a test's end")


@pytest.fixture
def client(conninfo: str) -> Iterator[Client]:
    with watcher(conninfo) as watching, Client(conninfo, watching) as made:
        yield made


def set_both(conn: Connection, listed: str, default: str) -> None:
    """Give the server these settings, and wait until its sessions read them."""
    for name, value in (("synchronous_standby_names", listed), ("synchronous_commit", default)):
        conn.execute(f"ALTER SYSTEM SET {name} = '{value}'".encode())
    conn.execute("SELECT pg_reload_conf()")

    def is_read() -> bool:
        row = conn.execute(
            "SELECT count(*) FROM pg_settings WHERE (name, reset_val) IN"
            " (('synchronous_standby_names', %s), ('synchronous_commit', %s))",
            (listed, default),
        ).fetchone()
        return row == (2,)

    until(is_read)
    # What commits wait by is read by the checkpointer, before a checkpoint.
    conn.execute("CHECKPOINT")
    conn.execute("CHECKPOINT")


def test_it_is_enabled_when_the_checkpointer_has_read_the_list(
    conninfo: str, admin: Connection, client: Client
) -> None:
    found = admin.execute("SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'").fetchone()
    assert found is not None
    with connect(conninfo, application_name="enabling") as conn:
        enabling = threading.Thread(
            target=synchronous.enable, args=(conn, "cards", None), kwargs={"accept_others": False}
        )
        os.kill(found[0], signal.SIGSTOP)
        try:
            enabling.start()
            waits = (
                "SELECT FROM pg_stat_activity WHERE application_name = 'enabling' AND query = 'CHECKPOINT'"
            )
            until(lambda: admin.execute(waits).fetchone() is not None or not enabling.is_alive())
            assert enabling.is_alive()
            assert synchronous.everything(admin) == []
        finally:
            os.kill(found[0], signal.SIGCONT)
            enabling.join(60)
    assert not client.commits("INSERT INTO cards VALUES (1, 'x')")


def test_other_commits_wait_for_nobody_by_it_and_ending_it_needs_no_producer(
    admin: Connection, client: Client
) -> None:
    """With PostgreSQL's own default, and another standby in the list, that is away."""
    set_both(admin, "backup", "on")
    admin.execute("RESET synchronous_commit")
    with pytest.raises(RefusedError, match="names backup"):
        synchronous.enable(admin, "cards", None, accept_others=False)
    synchronous.enable(admin, "cards", None, accept_others=True)
    assert client.commits(PLAIN)
    assert not client.commits("INSERT INTO cards VALUES (2, 'x')")
    synchronous.disable(admin, "cards", "a test")
    assert client.commits("INSERT INTO cards VALUES (3, 'x')")


def test_a_default_that_is_kept_holds_up_all_but_our_own_commands(admin: Connection, client: Client) -> None:
    set_both(admin, "backup", "on")
    admin.execute("RESET synchronous_commit")
    synchronous.enable(admin, "cards", None, accept_others=True, keep_default=True)
    assert not client.commits(PLAIN)
    synchronous.set_region(admin, nodes.local(admin).name, "somewhere")
    synchronous.set_region(admin, nodes.local(admin).name, None)
    synchronous.disable(admin, "cards", "a test")


def test_roles_with_a_default_of_their_own_are_named(admin: Connection) -> None:
    admin.execute("ALTER ROLE loud IN DATABASE a SET synchronous_commit = on")
    try:
        assert standby_names.loud(admin) == ["role loud in database a has synchronous_commit = on"]
        with pytest.raises(RefusedError, match="role loud"):
            synchronous.enable(admin, "cards", None, accept_others=False)
    finally:
        admin.execute("ALTER ROLE loud IN DATABASE a RESET synchronous_commit")
    assert standby_names.loud(admin) == []


def test_the_admins_own_default_hides_not_the_servers(conninfo: str, admin: Connection) -> None:
    admin.execute(f"ALTER ROLE {admin.info.user} SET synchronous_commit = local".encode())
    try:
        with connect(conninfo, application_name="admin") as conn:
            synchronous.enable(conn, "cards", None, accept_others=False)
        row = admin.execute(
            "SELECT setting FROM pg_file_settings WHERE name = 'synchronous_commit'"
            " ORDER BY seqno DESC LIMIT 1"
        ).fetchone()
        assert row == ("local",)
    finally:
        admin.execute(f"ALTER ROLE {admin.info.user} RESET synchronous_commit".encode())


def test_it_is_refused_before_a_target_can_follow(admin: Connection) -> None:
    """A commit that waits keeps the slot of a first copy from being made."""
    chain = names.copy_chain("cards", "node-a", "node-b")
    admin.execute(
        "INSERT INTO vsql_sync.streams (chain, direction, kind, publication, origin, target, state)"
        " VALUES (%s, 'out', 'copy', 'cards', 'node-a', 'node-b', 'COPYING')",
        (chain,),
    )
    try:
        assert synchronous.copies(admin) == ["node-b"]
        with pytest.raises(RefusedError, match="0 targets"):
            synchronous.enable(admin, "cards", None, accept_others=False)
    finally:
        admin.execute("DELETE FROM vsql_sync.streams WHERE chain = %s", (chain,))
    with pytest.raises(RefusedError, match="1 targets"):
        synchronous.enable(admin, "cards", 2, accept_others=False)
    assert synchronous.enable(admin, "medical", 2, accept_others=False).quorum == 2


def test_two_publications_wait_for_each_others_targets_when_that_was_accepted(
    conninfo: str, admin: Connection
) -> None:
    synchronous.enable(admin, "cards", None, accept_others=False)
    with pytest.raises(RefusedError, match="names vsql_"):
        synchronous.enable(admin, "medical", None, accept_others=False)
    synchronous.enable(admin, "medical", None, accept_others=True)
    synchronous.enable(admin, "cards", None, accept_others=False)  # again: it was accepted
    with psycopg.connect(conninfo) as holding:
        holding.execute("LOCK TABLE cards IN ACCESS SHARE MODE")
        with pytest.raises(RefusedError, match="targets of medical"):
            synchronous.disable(admin, "cards", "a test")
    synchronous.disable(admin, "cards", "a test")


def test_an_applied_commit_waits_for_standbys_that_are_not_ours(admin: Connection) -> None:
    def level() -> str:
        row = admin.execute("SELECT vsql_sync.applier_level()").fetchone()
        return str(row[0]) if row else ""

    assert level() == "on"
    made = synchronous.enable(admin, "cards", None, accept_others=False)
    assert level() == "local"
    set_both(admin, f"FIRST 2 ({made.standby_name}, backup)", "local")
    assert level() == "on"
