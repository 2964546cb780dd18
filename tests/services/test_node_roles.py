"""The roles: each can do its work and nothing else; installing without superuser says what is missing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from psycopg import sql
from pydantic import SecretStr

from tests.conftest import NewDatabase
from tests.stack import POSTGRES_VERSIONS, Stack
from vsql_shared.changes import TableName
from vsql_shared.errors import DatabaseError, RefusedError
from vsql_shared.pg import commands, control, migrate, nodes, roles, status, transactions
from vsql_shared.pg.connect import Connection, connect, errors, parse_conninfo

PAYMENTS = TableName("public", "payments")


def _open(conninfo: str) -> Connection:
    return connect(conninfo, application_name="test")


def _install(conninfo: str) -> None:
    with _open(conninfo) as conn:
        migrate.install(conn)
        nodes.register_local(conn, 1, "node-a", "c", None)
        roles.create(conn)
        conn.execute("CREATE TABLE public.payments (id int PRIMARY KEY, amount int, pan text)")
        conn.execute("INSERT INTO public.payments VALUES (1, 10, 'p')")
        conn.execute(
            "INSERT INTO vsql_sync.streams (chain, direction, publication, origin)"
            " VALUES ('p.a', 'in', 'p', 'a')"
        )


@pytest.fixture(params=POSTGRES_VERSIONS, ids=lambda version: f"pg{version}")
def version(request: pytest.FixtureRequest) -> int:
    """Each version in turn."""
    return int(request.param)


@pytest.fixture
def node(new_database: NewDatabase, version: int) -> str:
    """A node's database with one table and one stream."""
    conninfo = new_database("roles", version)
    _install(conninfo)
    return conninfo


class Users:
    """Login users of one test, each a member of one role."""

    def __init__(self, admin: Connection) -> None:
        self._admin = admin
        self._made: list[str] = []

    def make(self, conninfo: str, role: str, attributes: str = "") -> str:
        """A connection string of a new user in `role`."""
        name = f"t_{parse_conninfo(conninfo)['dbname']}_{role.removeprefix('vsql_sync_')}"
        self._admin.execute(f"CREATE ROLE {name} LOGIN {attributes} IN ROLE {role}".encode())
        self._made.append(name)
        return conninfo + f" user={name}"

    def drop(self) -> None:
        """Remove them."""
        for name in self._made:
            self._admin.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(name)))


@pytest.fixture
def users(stack: Stack, version: int) -> Iterator[Users]:
    """Users that are dropped after the test."""
    with _open(stack.postgres(version).conninfo) as admin:
        made = Users(admin)
        yield made
        made.drop()


def test_two_nodes_on_one_server_share_the_roles(new_database: NewDatabase) -> None:
    for _ in range(2):
        conninfo = new_database("roles")
        _install(conninfo)
        with _open(conninfo) as conn:
            roles.create(conn)
            assert roles.missing(conn) == []
            assert roles.exist(conn)


def test_the_service_roles_are_groups_without_login(new_database: NewDatabase, version: int) -> None:
    conninfo = new_database("roles", version)
    _install(conninfo)
    with _open(conninfo) as conn:
        rows = conn.execute(
            "SELECT rolname, rolreplication, rolsuper, rolbypassrls FROM pg_roles"
            " WHERE rolname = ANY(%s) ORDER BY 1",
            (list(roles.ROLES),),
        ).fetchall()
        assert rows == [(name, name == roles.PRODUCER, False, False) for name in sorted(roles.ROLES)]


def test_the_consumer_can_apply_with_an_origin_and_only_to_its_tables(node: str, users: Users) -> None:
    with _open(node) as conn:
        roles.grant_target(conn, [PAYMENTS])
        conn.execute("CREATE TABLE public.other (id int PRIMARY KEY)")
    with _open(users.make(node, roles.CONSUMER)) as conn:
        origin = f"vsql_test_{parse_conninfo(node)['dbname']}"
        conn.execute("SET session_replication_role = replica")
        conn.execute("SELECT pg_replication_origin_create(%s)", (origin,))
        conn.execute("SELECT pg_replication_origin_session_setup(%s)", (origin,))
        with conn.transaction():
            conn.execute("SELECT pg_replication_origin_xact_setup('0/10', now())")
            conn.execute("CREATE TEMPORARY TABLE staged (id int) ON COMMIT DROP")
            conn.execute("UPDATE public.payments SET amount = 11")
            conn.execute(
                "INSERT INTO vsql_sync.receipts"
                " (chain, sequence, epoch, batch, manifest, merkle_root, verdicts)"
                " VALUES ('p.a', 1, 1, 1, '', '', '{}')"
            )
        conn.execute(
            "SELECT pg_replication_origin_session_progress(true), pg_show_replication_origin_status()"
        )
        status.write_status(conn, "p.a", "in", "running", {})
        conn.execute("UPDATE vsql_sync.streams SET state = 'SYNCHRONIZED', state_reason = NULL")
        conn.execute("SELECT vsql_sync.ensure_audit_partition(now())")
        for forbidden in (
            "INSERT INTO public.other VALUES (1)",
            "INSERT INTO vsql_sync.signers VALUES ('f', 'x', repeat('x', 32)::bytea)",
            "INSERT INTO vsql_sync.decisions (chain, kind, reason) VALUES ('p.a', 'skip-batch', 'mine')",
            "UPDATE vsql_sync.streams SET origin = 'x'",
            "CREATE TABLE vsql_sync.mine (x int)",
            "DELETE FROM vsql_sync.audit_log",
        ):
            with pytest.raises(DatabaseError, match="permission denied"), errors("trying"):
                conn.execute(forbidden.encode())
        conn.execute("SELECT pg_replication_origin_session_reset()")
        conn.execute("SELECT pg_replication_origin_drop(%s)", (origin,))


def test_the_producer_reads_published_columns_only_and_may_make_a_slot(node: str, users: Users) -> None:
    with _open(node) as conn:
        roles.grant_source(conn, {PAYMENTS: ("id", "amount")})
    with _open(users.make(node, roles.PRODUCER, "REPLICATION")) as conn:
        slot = f"t_{parse_conninfo(node)['dbname']}"
        assert conn.execute("SELECT id, amount FROM public.payments").fetchall() == [(1, 10)]
        conn.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (slot,))
        conn.execute("SELECT pg_drop_replication_slot(%s)", (slot,))
        with pytest.raises(DatabaseError, match="permission denied"), errors("trying"):
            conn.execute("SELECT pan FROM public.payments")
        with pytest.raises(DatabaseError, match="permission denied"), errors("trying"):
            conn.execute("UPDATE public.payments SET amount = 0")
        with pytest.raises(DatabaseError, match="permission denied"), errors("trying"):
            conn.execute("SET session_replication_role = replica")
        # An applier begins behind its origin's progress: whoever sets it makes changes go unapplied.
        with pytest.raises(DatabaseError, match="permission denied"), errors("trying"):
            conn.execute("SELECT pg_replication_origin_advance('vsql_sync', '1/0')")


def test_the_origins_an_earlier_version_gave_the_producer_are_taken_back(node: str) -> None:
    held = "SELECT has_function_privilege(%s, 'pg_catalog.' || f, 'EXECUTE') FROM unnest(%s::text[]) f"
    with _open(node) as conn:
        for function in roles.ORIGIN_FUNCTIONS:
            conn.execute(f"GRANT EXECUTE ON FUNCTION pg_catalog.{function} TO {roles.PRODUCER}".encode())
        missing = roles.missing(conn)
        assert len(missing) == len(roles.ORIGIN_FUNCTIONS)
        assert all(one.startswith("REVOKE EXECUTE ON FUNCTION") for one in missing)
        roles.create(conn)
        assert roles.missing(conn) == []
        for role, has in ((roles.PRODUCER, False), (roles.CONSUMER, True)):
            rows = conn.execute(held, (role, list(roles.ORIGIN_FUNCTIONS))).fetchall()
            assert {one for (one,) in rows} == {has}


def test_an_operator_decides_in_its_own_name_only(node: str, users: Users) -> None:
    conninfo = users.make(node, roles.OPERATOR)
    user = parse_conninfo(conninfo)["user"]
    with _open(conninfo) as conn:
        assert control.start(conn).streams == [("p.a", "in")]
        control.pause(conn, "maintenance")
        control.skip_batch(conn, "p.a", 3, "key lost")
        commands.request(conn, "producer", "rotate-dek", {}, "")
        with _open(node) as worker:
            found = {"xid": 741, "lsn": "0/10", "time": 1}
            status.write_status(worker, "p.a", "in", "blocked", {"blocked": {"transaction": found}})
        transactions.park(conn, "p.a", "741", "ask the owner")
        assert transactions.parked(conn) == []
        assert conn.execute("SELECT DISTINCT decided_by FROM vsql_sync.decisions").fetchall() == [(user,)]
        actors = conn.execute("SELECT DISTINCT actor FROM vsql_sync.audit_log WHERE action LIKE 'stream.%'")
        assert actors.fetchall() == [(user,)]
        with pytest.raises(DatabaseError, match="permission denied"), errors("forging"):
            conn.execute(
                "INSERT INTO vsql_sync.decisions (chain, kind, sequence, reason, decided_by)"
                " VALUES ('p.a', 'skip-batch', 9, 'x', 'somebody else')"
            )
        with pytest.raises(DatabaseError, match="permission denied"), errors("forging"):
            conn.execute("INSERT INTO vsql_sync.audit_log (action, actor) VALUES ('x', 'somebody else')")


def test_a_viewer_sees_state_but_no_rows_of_conflicts(node: str, users: Users) -> None:
    with _open(users.make(node, roles.VIEWER)) as conn:
        assert len(status.read(conn)) == 1
        assert conn.execute("SELECT count(table_name) FROM vsql_sync.conflict_log").fetchall() == [(0,)]
        for forbidden in (
            "SELECT local_tuple FROM vsql_sync.conflict_log",
            "UPDATE vsql_sync.streams SET desired = 'x'",
        ):
            with pytest.raises(DatabaseError, match="permission denied"), errors("trying"):
                conn.execute(forbidden.encode())


def test_the_operators_log_cannot_be_changed_even_by_a_superuser(node: str) -> None:
    with _open(node) as conn:
        for setting in ("origin", "replica"):
            conn.execute(f"SET session_replication_role = {setting}".encode())
            for act in ("DELETE FROM", "TRUNCATE"):
                with pytest.raises(DatabaseError, match="append-only"), errors("changing"):
                    conn.execute(f"{act} vsql_sync.audit_log".encode())


def test_without_superuser_the_missing_statements_are_named_and_suffice(stack: Stack, version: int) -> None:
    server = stack.own_postgres(version)
    try:
        with _open(server.conninfo()) as admin:
            admin.execute("CREATE ROLE owner LOGIN")
            admin.execute("CREATE DATABASE app OWNER owner")
        with _open(server.conninfo("app", "owner")) as conn:
            with pytest.raises(RefusedError, match="no superuser") as caught:
                roles.require_possible(conn)
            statements = caught.value.hint.partition(":\n")[2]
            migrate.install(conn)
            with _open(server.conninfo("app")) as admin:
                admin.execute(statements.encode())
            roles.create(conn)
            assert roles.missing(conn) == []
    finally:
        server.remove()


def test_a_login_password_never_reaches_the_servers_log(stack: Stack) -> None:
    server = stack.own_postgres(18, {"log_statement": "all"}, auth="scram")
    try:
        with _open(server.conninfo()) as conn:
            migrate.install(conn)
            roles.create(conn, {roles.PRODUCER: SecretStr("pr0ducer-secret")})
        login = server.conninfo(user=roles.PRODUCER) + " password=pr0ducer-secret"
        with _open(login) as conn:
            assert conn.execute("SELECT current_user").fetchall() == [(roles.PRODUCER,)]
        log = server.log.read_text()
        assert "ALTER ROLE" in log
        assert "pr0ducer-secret" not in log
    finally:
        server.remove()
