"""Rules 24 and 25 of docs/design/0005: no way to write a PCI table commits here alone.

No service runs, so that a commit that waits never returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psycopg
import pytest

from tests.services.waiting_commits import Client, watcher
from tests.stack import Stack
from tests.stack.postgres import PostgresServer
from vsql_shared import names
from vsql_shared.errors import RefusedError
from vsql_shared.pg import (
    many_writers,
    migrate,
    nodes,
    publications,
    standby_names,
    synchronous,
    write_primary,
)
from vsql_shared.pg.connect import Connection, connect
from vsql_shared.pg.publications import PublicationRequest
from vsql_shared.pg.table_spec import parse_column, parse_spec, parse_table
from vsql_shared.strategies import Strategies

TABLES = """
CREATE TABLE public.cards (id int PRIMARY KEY, pan text);
CREATE TABLE public.plain (id int PRIMARY KEY, note text);
CREATE TABLE public.parts (id int, pan text, PRIMARY KEY (id)) PARTITION BY RANGE (id);
CREATE TABLE public.parts_1 PARTITION OF public.parts FOR VALUES FROM (0) TO (10) PARTITION BY RANGE (id);
CREATE TABLE public.parts_1a PARTITION OF public.parts_1 FOR VALUES FROM (0) TO (10);
CREATE TABLE public.stock (id int PRIMARY KEY, pan text);
CREATE TABLE public.again (id int PRIMARY KEY, pan text);
CREATE TABLE public.quieting (id int);
CREATE FUNCTION public.be_quiet() RETURNS trigger LANGUAGE plpgsql
    AS $$ BEGIN PERFORM set_config('synchronous_commit', 'off', true); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER quiet AFTER INSERT ON public.quieting DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION public.be_quiet();
INSERT INTO public.stock SELECT n, 'x' FROM generate_series(1, 50) n;
CREATE ROLE owner_of_stock LOGIN;
CREATE FUNCTION public.quietly(n int) RETURNS void LANGUAGE sql SET synchronous_commit = off
    AS $$ INSERT INTO public.cards VALUES (n, 'x') $$;
"""
NAME = "vsql_0123456789abcdef"


def join_targets(conn: Connection, publication: str, *targets: str) -> None:
    """A stream with its slot, and targets that need no copy: what commits can wait for."""
    chain = f"{publication}.node-a"
    conn.execute(
        "INSERT INTO vsql_sync.streams (chain, direction, publication, origin, slot_name, slot_created)"
        " VALUES (%s, 'out', %s, 'node-a', 'none', true)",
        (chain, publication),
    )
    for target in targets or ("node-b",):
        conn.execute("INSERT INTO vsql_sync.stream_targets (chain, target) VALUES (%s, %s)", (chain, target))


@pytest.fixture(scope="module")
def server(stack: Stack) -> PostgresServer:
    return stack.own_postgres(18, {"max_prepared_transactions": 0})


@pytest.fixture(scope="module")
def conninfo(server: PostgresServer) -> str:
    with psycopg.connect(server.conninfo(), autocommit=True) as conn:
        conn.execute("CREATE DATABASE a")
    made = server.conninfo("a")
    with connect(made, application_name="test") as conn:
        migrate.install(conn)
        nodes.register_local(conn, 1, "node-a", "c", bytes(range(32)))
        conn.execute(TABLES.encode())
        conn.execute("ALTER TABLE public.stock OWNER TO owner_of_stock")
        conn.execute("GRANT ALL ON SCHEMA public TO owner_of_stock")
        tables = ("cards", "parts", "stock", "again")
        request = PublicationRequest(
            "pub", tuple(map(parse_spec, tables)), tuple(parse_column(f"{name}.pan") for name in tables)
        )
        publications.create(conn, request)
        also = PublicationRequest("mixed", (parse_spec("cards"), parse_spec("plain")))
        publications.create(conn, also)
        join_targets(conn, "pub")
        synchronous.enable(conn, "pub", None, accept_others=False)
    return made


@pytest.fixture
def admin(conninfo: str) -> Iterator[Connection]:
    with connect(conninfo, application_name="admin") as conn:
        yield conn


@pytest.fixture
def client(conninfo: str) -> Iterator[Client]:
    with watcher(conninfo) as watching, Client(conninfo, watching) as made:
        yield made


WRITES = {
    "insert": "INSERT INTO cards VALUES (1, 'x')",
    "update": "UPDATE stock SET pan = 'y' WHERE id = 1",
    "delete": "DELETE FROM stock WHERE id = 2",
    "truncate": "TRUNCATE cards",
    "merge": "MERGE INTO stock USING (VALUES (3)) v (n) ON id = n WHEN MATCHED THEN UPDATE SET pan = 'z'",
    "upsert": "INSERT INTO stock VALUES (4, 'x') ON CONFLICT (id) DO UPDATE SET pan = 'u'",
    "common table expression": "WITH d AS (DELETE FROM stock WHERE id = 5 RETURNING id) SELECT FROM d",
    "partitioned table": "INSERT INTO parts VALUES (1, 'x')",
    "middle of the tree": "INSERT INTO parts_1 VALUES (2, 'x')",
    "leaf": "INSERT INTO parts_1a VALUES (3, 'x')",
    "truncated leaf": "TRUNCATE parts_1a",
    "setting turned off before": "SET synchronous_commit = off; INSERT INTO cards VALUES (2, 'x')",
    "set local off afterwards": "BEGIN; INSERT INTO cards VALUES (3, 'x');"
    " SET LOCAL synchronous_commit = off; COMMIT",
    "set off afterwards": "BEGIN; INSERT INTO cards VALUES (4, 'x'); SET synchronous_commit = off; COMMIT",
    "function with a setting of its own": "SELECT quietly(5)",
    "replica session": "SET session_replication_role = replica; INSERT INTO cards VALUES (6, 'x')",
    "savepoint released": "BEGIN; SAVEPOINT s; INSERT INTO cards VALUES (7, 'x'); RELEASE s; COMMIT",
    "another savepoint rolled back": "BEGIN; INSERT INTO cards VALUES (8, 'x'); SAVEPOINT s;"
    " INSERT INTO cards VALUES (9, 'x'); ROLLBACK TO s; SET LOCAL synchronous_commit = local; COMMIT",
    "constraints made immediate": "BEGIN; INSERT INTO cards VALUES (10, 'x'); SET CONSTRAINTS ALL IMMEDIATE;"
    " COMMIT",
    "another table's deferred trigger": "BEGIN; INSERT INTO cards VALUES (12, 'x');"
    " INSERT INTO quieting VALUES (1); COMMIT",
    "do block": "DO $$ BEGIN INSERT INTO cards VALUES (11, 'x'); END $$",
}


@pytest.mark.parametrize("how", WRITES)
def test_a_commit_to_a_pci_table_waits(client: Client, how: str) -> None:
    assert not client.commits(WRITES[how])


PASSING = {
    "another table": "INSERT INTO plain VALUES (1, 'x') ON CONFLICT DO NOTHING",
    "no row": "UPDATE cards SET pan = 'q' WHERE id = -1",
    "rolled back": "BEGIN; INSERT INTO cards VALUES (100, 'x'); ROLLBACK",
    "rolled back to a savepoint": "BEGIN; INSERT INTO plain VALUES (2, 'x') ON CONFLICT DO NOTHING;"
    " SAVEPOINT s; INSERT INTO cards VALUES (101, 'x'); ROLLBACK TO s; COMMIT",
    "the next transaction of the session": "BEGIN; INSERT INTO cards VALUES (102, 'x'); ROLLBACK;"
    " INSERT INTO plain VALUES (3, 'x') ON CONFLICT DO NOTHING",
}


@pytest.mark.parametrize("how", PASSING)
def test_nothing_else_waits(client: Client, how: str) -> None:
    assert client.commits(PASSING[how])


def test_what_was_applied_from_another_node_does_not_wait(client: Client, admin: Connection) -> None:
    admin.execute("SELECT pg_replication_origin_create('elsewhere')")
    try:
        assert client.commits(
            "SELECT pg_replication_origin_session_setup('elsewhere'); INSERT INTO cards VALUES (103, 'x');"
            " SELECT pg_replication_origin_session_reset()"
        )
    finally:
        admin.execute("SELECT pg_replication_origin_drop('elsewhere')")


def test_a_renamed_table_waits(client: Client, admin: Connection) -> None:
    admin.execute('ALTER TABLE public.cards RENAME TO "Other ""cards"')
    try:
        assert not client.commits('INSERT INTO "Other ""cards" VALUES (200, \'x\')')
    finally:
        admin.execute('ALTER TABLE public."Other ""cards" RENAME TO cards')


def test_a_new_partition_waits(client: Client, admin: Connection) -> None:
    admin.execute("CREATE TABLE public.parts_2 PARTITION OF public.parts FOR VALUES FROM (10) TO (20)")
    admin.execute("CREATE TABLE public.later (id int NOT NULL, pan text)")
    admin.execute("ALTER TABLE public.parts ATTACH PARTITION public.later FOR VALUES FROM (20) TO (30)")
    admin.execute(
        "CREATE SCHEMA more CREATE TABLE parts_4 PARTITION OF public.parts FOR VALUES FROM (30) TO (40)"
    )
    assert not client.commits("INSERT INTO parts_2 VALUES (11, 'x')")
    assert not client.commits("INSERT INTO later VALUES (21, 'x')")
    assert not client.commits("INSERT INTO more.parts_4 VALUES (31, 'x')")


def test_a_session_with_an_old_snapshot_waits(conninfo: str, admin: Connection) -> None:
    synchronous.disable(admin, "pub", "a test")
    with psycopg.connect(conninfo) as old:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT count(*) FROM pg_class").fetchone()
        synchronous.enable(admin, "pub", None, accept_others=False)
        old.execute("INSERT INTO cards VALUES (300, 'x')")
        setting = old.execute("SHOW synchronous_commit").fetchone()
        assert setting == ("remote_apply",)
        old.rollback()


def _by_hand(admin: Connection, statement: str) -> None:
    """As a superuser who passes by our event triggers."""
    with admin.transaction():
        admin.execute("SET LOCAL session_replication_role = replica")
        admin.execute(statement.encode())


def test_a_table_taken_out_of_the_publication_takes_no_write(client: Client, admin: Connection) -> None:
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="wait for its targets"):
        admin.execute("ALTER PUBLICATION pub DROP TABLE public.cards")
    _by_hand(admin, "ALTER PUBLICATION pub DROP TABLE public.cards")
    try:
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="does not send it any more"):
            client.commits("INSERT INTO cards VALUES (400, 'x')")
        assert [one.table for one in synchronous.unwaited(admin)] == ["public.cards"]
    finally:
        _by_hand(admin, "ALTER PUBLICATION pub ADD TABLE public.cards")


def test_an_old_snapshot_does_not_hide_that_it_was_taken_out(conninfo: str, admin: Connection) -> None:
    with psycopg.connect(conninfo) as old:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT count(*) FROM pg_publication_rel").fetchone()
        _by_hand(admin, "ALTER PUBLICATION pub DROP TABLE public.cards")
        try:
            with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
                old.execute("INSERT INTO cards VALUES (401, 'x')")
        finally:
            old.rollback()
            _by_hand(admin, "ALTER PUBLICATION pub ADD TABLE public.cards")


def test_one_taken_out_between_write_and_commit_is_not_committed(conninfo: str, admin: Connection) -> None:
    with psycopg.connect(conninfo) as client:
        client.execute("INSERT INTO cards VALUES (402, 'x')")
        _by_hand(admin, "ALTER PUBLICATION pub DROP TABLE public.cards")
        try:
            with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
                client.commit()
        finally:
            _by_hand(admin, "ALTER PUBLICATION pub ADD TABLE public.cards")


# A statement fires the triggers of the table it names: how a table comes under another one, and out again.
THROUGH = {
    "inheritance": (
        "CREATE TABLE public.over (pan text)",
        "ALTER TABLE public.cards INHERIT public.over",
        "ALTER TABLE public.cards NO INHERIT public.over",
    ),
    "a partitioned table": (
        "CREATE TABLE public.over (id int NOT NULL, pan text) PARTITION BY RANGE (id)",
        "ALTER TABLE public.over ATTACH PARTITION public.cards FOR VALUES FROM (MINVALUE) TO (MAXVALUE)",
        "ALTER TABLE public.over DETACH PARTITION public.cards",
    ),
}


@pytest.mark.parametrize("how", THROUGH)
def test_a_table_does_not_come_under_one_that_is_not_waited_for(admin: Connection, how: str) -> None:
    make, join, leave = THROUGH[how]
    admin.execute(make.encode())
    try:
        with pytest.raises(psycopg.errors.FeatureNotSupported, match=r"written through public\.over"):
            admin.execute(join.encode())
        assert synchronous.unwaited(admin) == []
        _by_hand(admin, join)
        try:
            assert [one.table for one in synchronous.unwaited(admin)] == ["public.cards"]
            with pytest.raises(RefusedError, match="written through"):
                synchronous.enable(admin, "pub", None, accept_others=False)
        finally:
            _by_hand(admin, leave)
    finally:
        admin.execute("DROP TABLE public.over")


def test_a_partition_that_is_published_alone_is_not_waited_for(admin: Connection) -> None:
    """Who writes it through its root fires no trigger of its own."""
    admin.execute("CREATE TABLE public.tree (id int PRIMARY KEY, pan text) PARTITION BY RANGE (id)")
    admin.execute("CREATE TABLE public.tree_1 PARTITION OF public.tree FOR VALUES FROM (0) TO (10)")
    request = PublicationRequest(
        "leaf", (parse_spec("tree_1"),), (parse_column("tree_1.pan"),), via_leaf=True
    )
    publications.create(admin, request)
    join_targets(admin, "leaf")
    try:
        with pytest.raises(RefusedError, match=r"written through public\.tree"):
            synchronous.enable(admin, "leaf", None, accept_others=True)
    finally:
        standby_names.drop(admin, names.slot_name("c", "leaf", "node-a"))


ANEW = ("DROP TABLE public.again", "CREATE TABLE public.again (id int PRIMARY KEY, pan text)")


def test_a_table_made_anew_waits_once_it_is_published(client: Client, admin: Connection) -> None:
    for statement in ANEW:
        admin.execute(statement.encode())
    assert client.commits("INSERT INTO again VALUES (1, 'x')")
    admin.execute("ALTER PUBLICATION pub ADD TABLE ONLY public.again")
    assert synchronous.unwaited(admin) == []
    assert not client.commits("INSERT INTO again VALUES (2, 'x')")


def test_a_table_made_anew_by_hand_is_found_and_mended(client: Client, admin: Connection) -> None:
    for statement in (*ANEW, "ALTER PUBLICATION pub ADD TABLE ONLY public.again"):
        _by_hand(admin, statement)
    assert [one.table for one in synchronous.unwaited(admin)] == ["public.again"]
    synchronous.enable(admin, "pub", None, accept_others=False)
    assert synchronous.unwaited(admin) == []
    assert not client.commits("INSERT INTO again VALUES (3, 'x')")
    gone = (
        "SELECT FROM vsql_sync.synchronous_tables"
        " WHERE NOT EXISTS (SELECT FROM pg_class WHERE oid = table_oid)"
    )
    assert admin.execute(gone).fetchone() is None


def test_what_was_found_before_keeps_nothing_else_from_being_done(admin: Connection) -> None:
    """Two findings are mended one after the other, and what has to do with neither passes."""
    row = admin.execute("SELECT tgname FROM pg_trigger WHERE tgname LIKE 'vsql_sync_on%' LIMIT 1").fetchone()
    assert row is not None
    for table in ("cards", "stock"):
        _by_hand(admin, f"ALTER TABLE public.{table} DISABLE TRIGGER {row[0]}")
    try:
        admin.execute("CREATE TEMP TABLE passing (id int)")
        admin.execute("ALTER TABLE passing ADD COLUMN more int")
        admin.execute("ALTER TABLE public.plain ALTER COLUMN note SET DEFAULT 'x'")
        with pytest.raises(psycopg.errors.FeatureNotSupported):
            admin.execute("ALTER TABLE public.cards ALTER COLUMN pan SET DEFAULT 'x'")
    finally:
        for table in ("cards", "stock"):
            admin.execute(f"ALTER TABLE public.{table} ENABLE ALWAYS TRIGGER {row[0]}".encode())
    assert synchronous.unwaited(admin) == []


def test_who_writes_alone_is_looked_at_in_both_orders(admin: Connection) -> None:
    info = publications.find(admin, "pub")
    assert info is not None
    said = list(many_writers.problems(admin, "this node", info, Strategies()))
    assert any("wait for other nodes" in one for one in said)
    synchronous.disable(admin, "pub", "a test")
    try:
        write_primary.decide(admin, nodes.local(admin).name, "accept_lww", [])
        with pytest.raises(RefusedError, match="accept_lww"):
            synchronous.enable(admin, "pub", None, accept_others=False)
    finally:
        write_primary.clear(admin)
        synchronous.enable(admin, "pub", None, accept_others=False)


ENDS = {
    "switched off": "ALTER TABLE public.stock DISABLE TRIGGER {0}",
    "for clients only": "ALTER TABLE public.stock ENABLE TRIGGER {0}",
    "dropped": "DROP TRIGGER {0} ON public.stock",
    "all of them off": "ALTER TABLE public.stock DISABLE TRIGGER USER",
}


@pytest.mark.parametrize("how", ENDS)
def test_an_owner_cannot_switch_the_trigger_off(conninfo: str, admin: Connection, how: str) -> None:
    row = admin.execute(
        "SELECT tgname FROM pg_trigger WHERE tgrelid = 'public.stock'::regclass"
        " AND tgname LIKE 'vsql_sync_on%'"
    ).fetchone()
    assert row is not None
    with (
        psycopg.connect(conninfo, user="owner_of_stock", autocommit=True) as owner,
        pytest.raises(psycopg.errors.FeatureNotSupported, match="wait for its targets"),
    ):
        owner.execute(ENDS[how].format(row[0]).encode())
    assert synchronous.unwaited(admin) == []


# Value of synchronous_standby_names → what is wrong with it for us; '' where nothing is.
VALUES = {
    f"FIRST 1 ({NAME})": "",
    NAME: "",
    f"1 ({NAME})": "",
    f'FIRST 1 ("{NAME.upper()}")': "",
    f"FIRST 2 ({NAME}, other)": "",
    f'ANY 2 ("a (1), ""b""", {NAME})': "",
    "": "has no",
    "other": "has no",
    f'"{NAME} "': "has no",
    "*": "has a *",
    '"*"': "has a *",
    f"FIRST 2 ({NAME}, *)": "has a *",
    f"{NAME}, other": "asks for 1 of 2",
    f"FIRST 1 ({NAME}, other)": "asks for 1 of 2",
    f"FIRST 1 (other, {NAME})": "asks for 1 of 2",
    f"ANY 1 ({NAME}, other)": "asks for 1 of 2",
    f"any 2 (a, b, {NAME})": "asks for 2 of 3",
    f"FIRST 2 ({NAME}, {NAME.upper()})": "twice",
    f"FIRST 3 ({NAME}, other)": "asks for 3 of 2",
}


@pytest.mark.parametrize("value", VALUES)
def test_a_list_by_which_others_let_commits_return_is_none(admin: Connection, value: str) -> None:
    row = admin.execute("SELECT coalesce(vsql_sync.standby_problem(%s, %s), '')", (value, NAME)).fetchone()
    assert row is not None
    assert VALUES[value] in row[0]
    assert bool(VALUES[value]) == bool(row[0])


def _set_names(admin: Connection, value: str) -> None:
    admin.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{value}'".encode())
    admin.execute("SELECT pg_reload_conf()")
    for _ in range(200):
        row = admin.execute("SHOW synchronous_standby_names").fetchone()
        if row == (value,):
            return
        admin.execute("SELECT pg_sleep(0.02)")
    raise AssertionError(value)


@pytest.mark.parametrize("value", ["*", "", "somebody_else", "FIRST 1 ({0}, other)"])
def test_a_write_is_refused_where_it_would_not_wait_for_us(
    conninfo: str, admin: Connection, value: str
) -> None:
    before = admin.execute("SHOW synchronous_standby_names").fetchone()
    assert before is not None
    found = synchronous.load(admin, "pub")
    assert found is not None
    _set_names(admin, value.format(found.standby_name))
    try:
        with (
            psycopg.connect(conninfo, autocommit=True) as client,
            pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="synchronous_standby_names"),
        ):
            client.execute("INSERT INTO cards VALUES (500, 'x')")
        assert "synchronous_standby_names" in (synchronous.server_problem(admin, found.standby_name) or "")
    finally:
        _set_names(admin, before[0])


def test_a_name_taken_off_between_write_and_commit_is_noticed(conninfo: str, admin: Connection) -> None:
    before = admin.execute("SHOW synchronous_standby_names").fetchone()
    assert before is not None
    with psycopg.connect(conninfo) as client:
        client.execute("INSERT INTO cards VALUES (501, 'x')")
        _set_names(admin, "")
        try:
            with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
                client.commit()
        finally:
            _set_names(admin, before[0])


def test_enabling_refuses_lists_of_others_and_takes_them_when_told(admin: Connection) -> None:
    synchronous.disable(admin, "pub", "a test")
    try:
        for value, said in (("*", "any standby"), ("backup, other", "backup, other")):
            _set_names(admin, value)
            with pytest.raises(RefusedError, match=said):
                synchronous.enable(admin, "pub", None, accept_others=False)
        _set_names(admin, "*")
        with pytest.raises(RefusedError, match="any standby"):
            synchronous.enable(admin, "pub", None, accept_others=True)
        _set_names(admin, 'ANY 1 (backup, "first")')
        made = synchronous.enable(admin, "pub", None, accept_others=True)
        row = admin.execute("SHOW synchronous_standby_names").fetchone()
        assert row == (f'FIRST 3 (backup, "first", {made.standby_name})',)
    finally:
        synchronous.disable(admin, "pub", "a test")
        _set_names(admin, "")
        synchronous.enable(admin, "pub", None, accept_others=False)


REFUSALS: dict[str, tuple[Callable[[Connection], None], str]] = {
    "a table without PCI columns": (lambda _: None, "public.plain: no PCI column"),
    "applied partitioned": (
        lambda conn: _set(conn, "apply_mode = 'partitioned'"), "applied partitioned",
    ),
    "written by every node": (lambda conn: _set(conn, "mode = 'bidirectional'"), "every node writes it"),
}  # fmt: skip


def _set(conn: Connection, what: str) -> None:
    conn.execute(f"UPDATE vsql_sync.publications SET {what} WHERE name = 'mixed'".encode())


@pytest.mark.parametrize("why", REFUSALS)
def test_only_pci_tables_of_one_writer_wait(admin: Connection, why: str) -> None:
    change, said = REFUSALS[why]
    change(admin)
    try:
        with pytest.raises(RefusedError, match=said):
            synchronous.enable(admin, "mixed", None, accept_others=False)
    finally:
        _set(admin, "(mode, apply_mode) = ('uni-directional', 'transactional')")


def test_prepared_transactions_and_waiting_do_not_go_together(stack: Stack) -> None:
    """COMMIT PREPARED fires no trigger, and waits as its own session likes."""
    with connect(stack.new_database(18, "prepared"), application_name="test") as conn:
        migrate.install(conn)
        nodes.register_local(conn, 1, "node-a", "c", bytes(range(32)))
        conn.execute("CREATE TABLE public.cards (id int PRIMARY KEY, pan text)")
        request = PublicationRequest("pub", (parse_spec("cards"),), (parse_column("cards.pan"),))
        publications.create(conn, request)
        with pytest.raises(RefusedError, match="COMMIT PREPARED"):
            synchronous.enable(conn, "pub", None, accept_others=False)
        row = conn.execute("SELECT vsql_sync.synchronous_problem(%s)", (NAME,)).fetchone()
        assert row is not None
        assert "COMMIT PREPARED" in row[0]


def test_ending_it_lets_waiting_commits_return(client: Client, admin: Connection) -> None:
    client.send("INSERT INTO cards VALUES (600, 'x')")
    assert client.waits()
    assert synchronous.waiting(admin).commits == 1
    try:
        synchronous.disable(admin, "pub", "a test")
        assert client.answered()
        assert client.commits("INSERT INTO cards VALUES (601, 'x')")
    finally:
        synchronous.enable(admin, "pub", None, accept_others=False)


def test_away_from_the_primary_writes_are_refused(conninfo: str, admin: Connection) -> None:
    admin.execute(
        "INSERT INTO vsql_sync.nodes (node_id, node_name, number, cluster, host)"
        " VALUES ('node-p', 'node-p', 9, 'c', 'h') ON CONFLICT DO NOTHING"
    )
    try:
        refused = write_primary.decide(admin, "node-p", "reject", [parse_table("plain")])
        assert {"public.cards", "public.plain", "public.parts", "public.parts_1a"} <= set(refused)
        with psycopg.connect(conninfo, autocommit=True) as client:
            for write in ("INSERT INTO cards VALUES (700, 'x')", "TRUNCATE parts_1a", "DELETE FROM plain"):
                with pytest.raises(psycopg.errors.ReadOnlySqlTransaction, match="only node node-p") as error:
                    client.execute(write.encode())
                assert (
                    error.value.diag.message_hint == "Connect to the database of node node-p for this write."
                )
            admin.execute(
                "CREATE TABLE public.parts_9 PARTITION OF public.parts FOR VALUES FROM (90) TO (100)"
            )
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                client.execute("INSERT INTO parts_9 VALUES (91, 'x')")
            client.execute("SET session_replication_role = replica")
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                client.execute("UPDATE stock SET pan = 'y'")
        with pytest.raises(RefusedError, match="accept_lww"):
            write_primary.decide(admin, "node-p", "accept_lww", [])
    finally:
        write_primary.clear(admin)
    assert write_primary.load(admin) is None
    assert write_primary.decide(admin, "node-a", "reject", []) == []
    write_primary.clear(admin)
