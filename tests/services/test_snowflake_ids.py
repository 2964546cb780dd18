"""Ids that no two nodes give: never twice, never back, whoever asks at once and whatever the clock does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime

import psycopg
import pytest

from tests.stack import POSTGRES_VERSIONS, Stack
from tests.waiting import until
from vsql_shared.pg import nodes, roles
from vsql_shared.pg.connect import Connection, connect
from vsql_shared.pg.migrate import install

NUMBER = 37
EPOCH_MS = 1_704_067_200_000
VALUES, TURNS = "vsql_sync.snowflake_values", "vsql_sync.snowflake_turns"
DEFAULT = "bigint PRIMARY KEY DEFAULT vsql_sync.snowflake_id()"
ID = "SELECT vsql_sync.snowflake_id()"
NOT_NOW = psycopg.errors.ObjectNotInPrerequisiteState


def _made(stack: Stack, schema_of: Callable[[int], str], version: int) -> str:
    conninfo = stack.new_database(version, "ids", schema_of(version))
    with connect(conninfo, application_name="test") as conn:
        nodes.register_local(conn, NUMBER, "node-a", "c", None)
        roles.create(conn)
    return conninfo


@pytest.fixture(scope="module")
def base(stack: Stack, schema_of: Callable[[int], str]) -> Iterator[str]:
    """A node's database; sequences only go up, so tests share it."""
    conninfo = _made(stack, schema_of, 18)
    yield conninfo
    stack.drop_database(conninfo)


@pytest.fixture
def conn(base: str) -> Iterator[Connection]:
    """A session of its owner; ids are made anew from the clock."""
    with connect(base, application_name="test") as conn:
        _set(conn, ahead_ms=-1000)
        yield conn


def _set(conn: Connection, ahead_ms: int) -> None:
    """As if the last id had been given that long after what the clock says now."""
    conn.execute(f"SELECT setval('{VALUES}', (vsql_sync.snowflake_clock() + %s) << 12)", (ahead_ms,))


def _one(conn: Connection, statement: str = ID, *values: object) -> int:
    row = conn.execute(statement.encode(), values).fetchone()
    assert row is not None
    return int(row[0])


def _many(conn: Connection, count: int) -> list[int]:
    rows = conn.execute("SELECT vsql_sync.snowflake_id() FROM generate_series(1, %s)", (count,))
    return [row[0] for row in rows]


def _run_as(conn: Connection, role: str, statement: str) -> None:
    with conn.transaction():
        conn.execute(f'SET LOCAL ROLE "{role}"'.encode())
        conn.execute(statement.encode())


def _ms(number: int) -> int:
    return (number >> 22) + EPOCH_MS


@pytest.mark.parametrize("version", POSTGRES_VERSIONS, ids=lambda version: f"pg{version}")
def test_an_id_has_time_node_and_count(stack: Stack, schema_of: Callable[[int], str], version: int) -> None:
    conninfo = _made(stack, schema_of, version)
    try:
        with connect(conninfo, application_name="test") as conn:
            conn.execute(
                "CREATE TABLE public.t (id bigint PRIMARY KEY DEFAULT vsql_sync.snowflake_id(), n int)"
            )
            before = _one(conn, "SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint")
            conn.execute("INSERT INTO public.t (n) SELECT g FROM generate_series(1, 10000) g")
            after = _one(conn, "SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint")
            ids = [row[0] for row in conn.execute("SELECT id FROM public.t ORDER BY n")]
            assert ids == sorted(set(ids)), "in the order they were given"
            assert before <= _ms(ids[0]) <= _ms(ids[-1]) <= after
            parts = conn.execute("SELECT * FROM vsql_sync.snowflake_parts(%s)", (ids[0],)).fetchone()
            assert parts == (datetime.fromtimestamp(_ms(ids[0]) / 1000, UTC), NUMBER, ids[0] & 4095)
            assert all((one >> 12) & 1023 == NUMBER and one > 0 for one in ids)
    finally:
        stack.drop_database(conninfo)


def test_parts_of_the_least_and_of_the_greatest_id(conn: Connection) -> None:
    parts = "SELECT extract(epoch FROM given_at)::bigint, node, sequence FROM vsql_sync.snowflake_parts(%s)"
    assert conn.execute(parts.encode(), (0,)).fetchone() == (EPOCH_MS // 1000, 0, 0)
    greatest = conn.execute(parts.encode(), (2**63 - 1,)).fetchone()
    assert greatest == (round((EPOCH_MS + 2**41 - 1) / 1000), 1023, 4095)
    row = conn.execute(
        "SELECT provolatile, proparallel FROM pg_proc WHERE proname = 'snowflake_parts'"
    ).fetchone()
    assert row == ("i", "s"), "so that it can be in an index"


EACH = """DO $$ BEGIN FOR i IN 1..20000 LOOP
    INSERT INTO public.taken (session, n) VALUES ({number}, i); COMMIT;
END LOOP; END $$"""
MANY = "INSERT INTO public.taken (session, n) SELECT {{number}}, g FROM generate_series(1, {}) g"
WAYS = {
    "a transaction for each": EACH,
    "twenty at a time": MANY.format(20),
    "one statement": MANY.format(20_000),
}


@pytest.mark.parametrize("way", WAYS)
def test_eight_sessions_at_once_get_distinct_ids_each_in_its_order(
    base: str, conn: Connection, way: str
) -> None:
    """The table has no key: what is not distinct must be seen here."""
    count, sessions = 20_000, 8
    conn.execute("DROP TABLE IF EXISTS public.taken")
    conn.execute(
        "CREATE TABLE public.taken (id bigint DEFAULT vsql_sync.snowflake_id(), session int, n int,"
        " at bigserial)"
    )
    begin = threading.Barrier(sessions)
    failed: list[BaseException] = []

    def take(number: int) -> None:
        try:
            with connect(base, application_name="test") as mine:
                statement = WAYS[way].format(number=number)
                begin.wait(60)
                for _ in range(count // 20 if way == "twenty at a time" else 1):
                    mine.execute(statement.encode())
        except BaseException as error:  # noqa: BLE001 - a thread's errors are the test's
            failed.append(error)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(sessions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
    assert not failed
    assert conn.execute("SELECT count(*), count(DISTINCT id) FROM public.taken").fetchone() == (
        sessions * count,
        sessions * count,
    )
    back = "SELECT id < lag(id) OVER (PARTITION BY session ORDER BY at) AS back FROM public.taken"
    assert _one(conn, f"SELECT count(*) FROM ({back}) s WHERE back") == 0


def test_nobody_waits_for_the_end_of_a_transaction_that_took_one(base: str, conn: Connection) -> None:
    with connect(base, application_name="holds", autocommit=False) as other:
        first = _one(other)
        conn.execute("SET statement_timeout = '5s'")
        assert _one(conn) > first
        held = conn.execute(
            "SELECT relation::regclass::text FROM pg_locks WHERE pid = %s AND locktype = 'relation'",
            (other.info.backend_pid,),
        ).fetchall()
        assert ("vsql_sync.snowflake_lock",) not in held
        other.rollback()
    assert _one(conn) > first


def test_who_owns_the_database_and_analyzes_it_in_a_transaction_stops_no_ids(
    base: str, conn: Connection
) -> None:
    name = conn.info.dbname
    conn.execute('CREATE ROLE "ids owner" LOGIN')
    try:
        conn.execute(f'ALTER DATABASE "{name}" OWNER TO "ids owner"'.encode())
        with connect(base + " user='ids owner'", application_name="migration", autocommit=False) as owner:
            owner.execute("ANALYZE")
            conn.execute("SET lock_timeout = '1s'")
            first = _one(conn)
            conn.execute("SELECT pg_sleep(0.005)")
            assert _one(conn) >> 22 > first >> 22, "the values were brought up to the clock"
            owner.rollback()
    finally:
        conn.execute(f'ALTER DATABASE "{name}" OWNER TO CURRENT_USER'.encode())
        conn.execute('DROP OWNED BY "ids owner"; DROP ROLE "ids owner"')


def test_an_id_of_a_transaction_that_was_rolled_back_is_not_given_again(base: str, conn: Connection) -> None:
    with connect(base, application_name="rolls back", autocommit=False) as other:
        lost = _many(other, 100)
        other.rollback()
    assert _one(conn) > max(lost)


def test_a_clock_that_went_back_a_little_goes_on_from_the_last_id(conn: Connection) -> None:
    _set(conn, ahead_ms=30_000)
    last = _one(conn, f"SELECT last_value FROM {VALUES}")
    ids = _many(conn, 10_000)
    counters = [(number >> 22 << 12) | (number & 4095) for number in ids]
    assert counters == list(range(last + 1, last + 10_001)), "not one is passed over, none is older"


def test_a_clock_that_went_back_far_is_refused_and_the_error_says_how_far(conn: Connection) -> None:
    _set(conn, ahead_ms=3_600_000)
    last = _one(conn, f"SELECT last_value FROM {VALUES}")
    with pytest.raises(NOT_NOW, match=r"is 3(600\.0|599\.\d) s behind the last id"):
        _one(conn)
    assert _one(conn, f"SELECT last_value FROM {VALUES}") == last, "nothing was taken"
    _set(conn, ahead_ms=59_000)
    assert _one(conn) > 0, "and goes on where the clock is near again"


@pytest.mark.parametrize("turn", [0, 1])
def test_a_session_that_ended_half_way_stops_nobody(conn: Connection, turn: int) -> None:
    """A turn that stayed odd, as also after a crash: the next one mends it."""
    conn.execute(f"SELECT setval('{TURNS}', (SELECT last_value FROM {TURNS}) / 2 * 2 + 2 + %s)", (turn,))
    _set(conn, ahead_ms=10_000)
    last = _one(conn, f"SELECT last_value FROM {VALUES}")
    ids = _many(conn, 5_000)
    counters = [(number >> 22 << 12) | (number & 4095) for number in ids]
    assert counters == list(range(last + 1, last + 5_001)), "also where the long way is behind the last id"
    assert _one(conn, f"SELECT last_value FROM {TURNS}") % 2 == 0


def test_a_value_taken_while_another_session_brings_them_up_to_the_clock_does_not_count(
    base: str, conn: Connection
) -> None:
    """The schedule that would give one twice: a session between its step and the turn's end."""
    _set(conn, ahead_ms=20_000)  # so that everybody would take the short way
    first = _one(conn)
    with ExitStack() as closing:
        other = closing.enter_context(connect(base, application_name="half-way", autocommit=False))
        other.execute("LOCK TABLE vsql_sync.snowflake_lock IN SHARE UPDATE EXCLUSIVE MODE")
        other.execute(f"SELECT nextval('{TURNS}')")
        last = _one(other, f"SELECT last_value FROM {VALUES}")
        third = closing.enter_context(connect(base, application_name="waits"))
        given: list[int] = []
        thread = threading.Thread(target=lambda: given.append(_one(third)))
        thread.start()
        waits = "SELECT count(*) FROM pg_locks WHERE pid = %s AND NOT granted"
        activity = "SELECT state, wait_event_type, wait_event FROM pg_stat_activity WHERE pid = %s"
        pid = third.info.backend_pid
        doing = lambda: f"given {given}, doing {conn.execute(activity, (pid,)).fetchall()}"  # noqa: E731  # read once
        until(lambda: _one(conn, waits, pid), 30, doing)
        assert not given, "it must not have an id while the values are set"
        other.execute(f"SELECT setval('{VALUES}', %s)", (last + 1,))  # as if the clock had said so
        taken = last + 1
        other.execute(f"SELECT nextval('{TURNS}')")
        other.rollback()
        thread.join(30)
    counters = [(number >> 22 << 12) | (number & 4095) for number in (first, *given)]
    assert counters[1] > taken > counters[0]


def test_a_client_that_may_only_insert_gets_its_ids_and_cannot_touch_where_they_come_from(
    base: str, conn: Connection
) -> None:
    conn.execute('CREATE ROLE "ids client" LOGIN')
    try:
        conn.execute(
            "CREATE TABLE public.orders (id bigint PRIMARY KEY DEFAULT vsql_sync.snowflake_id(), n int)"
        )
        conn.execute('GRANT INSERT (n), SELECT ON public.orders TO "ids client"')
        with connect(base + " user='ids client'", application_name="client") as client:
            assert _one(client, "INSERT INTO public.orders (n) VALUES (1) RETURNING id") > 0
            for statement in (
                f"SELECT nextval('{VALUES}')", f"SELECT setval('{VALUES}', 1)", f"SELECT nextval('{TURNS}')",
                "LOCK TABLE vsql_sync.snowflake_lock IN SHARE UPDATE EXCLUSIVE MODE",
                "SELECT vsql_sync.snowflake_advance()", "SELECT vsql_sync.snowflake_restart('mine')",
            ):  # fmt: skip
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    _run_as(client, "ids client", statement)
    finally:
        conn.execute('DROP TABLE IF EXISTS public.orders; DROP OWNED BY "ids client"; DROP ROLE "ids client"')


@pytest.mark.parametrize("role", [role for role in roles.ROLES if role != roles.ADMIN])
def test_no_role_of_ours_moves_the_sequences_or_holds_the_lock(conn: Connection, role: str) -> None:
    for statement in (
        f"SELECT nextval('{VALUES}')", f"SELECT setval('{VALUES}', 1)", f"SELECT nextval('{TURNS}')",
        "LOCK TABLE vsql_sync.snowflake_lock IN SHARE UPDATE EXCLUSIVE MODE",
        "SELECT vsql_sync.snowflake_restart('mine')",
    ):  # fmt: skip
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            _run_as(conn, role, statement)


def test_an_admin_begins_again_after_a_clock_that_was_far_ahead_and_that_is_logged(conn: Connection) -> None:
    _set(conn, ahead_ms=50 * 365 * 86_400_000)
    with pytest.raises(NOT_NOW, match="behind the last id"):
        _one(conn)
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        _run_as(conn, roles.ADMIN, "SELECT vsql_sync.snowflake_restart('  ')")
    _run_as(conn, roles.ADMIN, "SELECT vsql_sync.snowflake_restart('the clock stood at 2076 for a minute')")
    now = _one(conn, "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint")
    assert abs(_ms(_one(conn)) - now) < 5_000
    row = conn.execute(
        "SELECT actor, new_value ->> 'reason' FROM vsql_sync.audit_log WHERE action = 'ids.restart'"
    ).fetchall()
    assert row == [("postgres", "the clock stood at 2076 for a minute")]
    with pytest.raises(NOT_NOW, match="nothing to begin again"):
        conn.execute("SELECT vsql_sync.snowflake_restart('again')")


def test_a_database_that_is_no_node_gives_none(stack: Stack, schema_of: Callable[[int], str]) -> None:
    conninfo = stack.new_database(18, "noids", schema_of(18))
    try:
        with (
            connect(conninfo, application_name="test") as conn,
            pytest.raises(NOT_NOW, match="not a node"),
        ):
            _one(conn)
    finally:
        stack.drop_database(conninfo)


def test_a_crash_of_the_server_gives_no_id_again(stack: Stack) -> None:
    server = stack.own_postgres(18)
    try:
        with connect(server.conninfo(), application_name="test") as conn:
            install(conn)
            nodes.register_local(conn, NUMBER, "node-a", "c", None)
            conn.execute(f"CREATE TABLE public.t (id {DEFAULT})".encode())
            # The clock is far behind: what is there after the crash is all that keeps them apart.
            _set(conn, ahead_ms=30_000)
            conn.execute("INSERT INTO public.t SELECT FROM generate_series(1, 3333)")
            given = _one(conn, "SELECT max(id) FROM public.t")
        server.kill()
        server.start()
        with connect(server.conninfo(), application_name="test") as conn:
            again = _many(conn, 1000)
            assert min(again) > given
            assert len(set(again)) == 1000
    finally:
        server.remove()
