"""Generations of rows, kept by triggers: above all a node knew of the key, also where it was about to change.

And what is needed for a table to have them, to be chosen a strategy, and to be asked about by hand.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.conftest import NewDatabase
from tests.services.both_write import Both, copied, joined, prepared, table
from tests.waiting import until
from vsql_consumers import purging, state, writers
from vsql_shared.changes import TableName
from vsql_shared.errors import DatabaseError, RefusedError
from vsql_shared.pg import migrate, peers
from vsql_shared.pg.connect import connect
from vsql_shared.pg.peers import PeerRequest
from vsql_shared.strategies import Strategies

T = TableName("public", "t")
FIRST = Strategies("first_write_wins")
ROOM = 2**40


def _databases(new_schema: NewDatabase, cluster: str, ddl: str, *tables: str) -> Both:
    return prepared(new_schema("a"), new_schema("b"), cluster, ddl, *tables)


@pytest.fixture
def first(new_schema: NewDatabase, cluster_name: str) -> Iterator[Both]:
    """Both write t, and who was first stands."""
    ddl = table("t", "id int PRIMARY KEY, note text", "first_write_wins")
    made = joined(_databases(new_schema, cluster_name, ddl, "t"), FIRST)
    yield made
    made.end()


def _generations(both: Both) -> tuple[dict[int, int], dict[int, int]]:
    """Node a's: of rows, and of tombstones whose row is not there; above the floor."""
    rows = both.a.rows(f"SELECT id, vsql_generation - {ROOM} FROM public.t")
    (name,) = both.a.rows("SELECT tombstones FROM vsql_sync.multi_writer_tables WHERE table_name = 't'")[0]
    buried = both.a.rows(
        f"SELECT id, vsql_generation - {ROOM} FROM vsql_sync.{name} WHERE id NOT IN (SELECT id FROM public.t)"
    )
    return dict(rows), dict(buried)


def test_every_version_of_a_key_has_one_more_than_the_one_before(first: Both) -> None:
    first.a.do("INSERT INTO public.t (id) VALUES (1), (2), (3)")
    assert _generations(first) == ({1: 1, 2: 1, 3: 1}, {})
    first.a.do("UPDATE public.t SET note = 'again' WHERE id <= 2")
    first.a.do("DELETE FROM public.t WHERE id = 2")
    assert _generations(first) == ({1: 2, 3: 1}, {2: 3})
    first.a.do(
        "INSERT INTO public.t (id) SELECT generate_series(2, 4) ON CONFLICT (id) DO UPDATE SET note = 'x'"
    )
    assert _generations(first) == ({1: 2, 2: 4, 3: 2, 4: 1}, {})
    for _ in range(2):
        first.a.do("UPDATE public.t SET note = 'y' WHERE id = 4")
    first.a.do("DELETE FROM public.t WHERE id = 4")
    first.a.do("UPDATE public.t SET id = 4 WHERE id = 3")  # 4 has a tombstone of 4, the row is of 2
    assert _generations(first) == ({1: 2, 2: 4, 4: 5}, {3: 3})


def test_what_one_command_deletes_and_inserts_under_one_key_is_above_it_too(first: Both) -> None:
    first.a.do("INSERT INTO public.t (id) VALUES (1)")
    first.a.do("UPDATE public.t SET note = 'x'")
    first.a.do(
        "WITH gone AS (DELETE FROM public.t RETURNING id) INSERT INTO public.t (id) SELECT id FROM gone"
    )
    assert _generations(first) == ({1: 4}, {})
    first.a.do(
        "MERGE INTO public.t USING (VALUES (1, 'gone'), (2, 'anew')) s (n, what) ON s.n = t.id"
        " WHEN MATCHED THEN DELETE WHEN NOT MATCHED THEN INSERT (id, note) VALUES (1, s.what)"
    )
    assert _generations(first) == ({1: 6}, {})
    first.exchange()
    assert first.b.rows(f"SELECT note, vsql_generation - {ROOM} FROM public.t") == [("anew", 6)]


def test_a_generation_that_a_client_gives_is_not_taken(first: Both) -> None:
    first.a.do("INSERT INTO public.t (id, vsql_generation) VALUES (1, 77)")
    first.a.do("UPDATE public.t SET vsql_generation = -5, note = 'x'")
    assert _generations(first) == ({1: 2}, {})


def _behind(both: Both, isolation: str, holder: str, waiter: str) -> psycopg.Error | None:
    """Do a statement in a transaction that began before another one ended which it waits for."""
    failed: list[psycopg.Error] = []
    with (
        psycopg.connect(both.a.conninfo) as holding,
        psycopg.connect(both.a.conninfo) as waiting,
    ):
        waiting.execute(f"SET default_transaction_isolation = '{isolation}'".encode())
        waiting.commit()
        waiting.execute("SELECT 1")
        holding.execute(holder.encode())

        def run() -> None:
            try:
                waiting.execute(waiter.encode())
                waiting.commit()
            except psycopg.Error as error:
                failed.append(error)
                waiting.rollback()

        thread = threading.Thread(target=run)
        thread.start()
        waits = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s"
        pid = (waiting.info.backend_pid,)
        until(lambda: both.a.conn.execute(waits, pid).fetchall() == [(True,)], 20, lambda: f"{failed}")
        holding.commit()
        thread.join(20)
    return failed[0] if failed else None


RACES = {
    "insert": ("DELETE FROM public.t WHERE id = 1", "INSERT INTO public.t (id, note) VALUES (1, 'anew')"),
    "copy": (
        "DELETE FROM public.t WHERE id = 1",
        "INSERT INTO public.t (id, note) SELECT g, 'anew' FROM generate_series(1, 1) g",
    ),
    "key change": (
        "DELETE FROM public.t WHERE id = 1",
        "UPDATE public.t SET id = 1, note = 'anew' WHERE id = 9",
    ),
    "key left": (
        "UPDATE public.t SET id = 5 WHERE id = 1",
        "INSERT INTO public.t (id, note) VALUES (1, 'anew')",
    ),
}


@pytest.mark.parametrize(("holder", "waiter"), RACES.values(), ids=RACES.keys())
def test_who_waits_for_a_key_is_above_what_was_deleted_meanwhile(
    first: Both, holder: str, waiter: str
) -> None:
    first.a.do("INSERT INTO public.t (id) VALUES (1), (9)")
    for _ in range(4):
        first.a.do("UPDATE public.t SET note = 'x' WHERE id = 1")
    assert _behind(first, "read committed", holder, waiter) is None
    assert first.a.rows(f"SELECT note, vsql_generation - {ROOM} FROM public.t WHERE id = 1") == [("anew", 7)]


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_who_cannot_see_what_was_deleted_meanwhile_has_to_repeat(first: Both, isolation: str) -> None:
    first.a.do("INSERT INTO public.t (id) VALUES (1), (9)")
    holder, waiter = RACES["insert"]
    failed = _behind(first, isolation, holder, waiter)
    assert isinstance(failed, psycopg.errors.SerializationFailure)
    assert _generations(first) == ({9: 1}, {1: 2})
    with psycopg.connect(first.a.conninfo) as conn:
        conn.execute(f"SET default_transaction_isolation = '{isolation}'".encode())
        conn.commit()
        conn.execute(waiter.encode())
    assert _generations(first) == ({1: 3, 9: 1}, {})


def test_keys_of_any_type_are_compared_as_the_table_does(new_schema: NewDatabase, cluster_name: str) -> None:
    columns, key = '"a b" public.citext, fit public.fits, n numeric, c char(3)', '"a b", fit, n, c'
    ddl = (
        "CREATE EXTENSION citext SCHEMA public;"
        "CREATE DOMAIN public.fit AS varchar(5); CREATE DOMAIN public.fits AS public.fit CHECK (VALUE <> '');"
        + table("t", f"{columns}, PRIMARY KEY ({key})", "node_priority")
    )
    made = joined(_databases(new_schema, cluster_name, ddl, "t"), Strategies("node_priority"))
    made.a.do("INSERT INTO public.t VALUES ('Key', 's', 1.0, 'c')")
    made.a.do("DELETE FROM public.t")
    made.a.do("INSERT INTO public.t VALUES ('KEY', 's', 1.00, 'c'), ('key', 'l', 1, 'c')")
    assert made.a.rows(f"SELECT vsql_generation - {ROOM} FROM public.t ORDER BY 1") == [(1,), (3,)]
    made.exchange()
    assert made.b.rows(f"SELECT vsql_generation - {ROOM} FROM public.t ORDER BY 1") == [(1,), (3,)]
    made.end()


def test_many_rows_applied_at_once_leave_the_tombstones_their_node_has(first: Both) -> None:
    first.a.do("INSERT INTO public.t (id) SELECT generate_series(1, 50)")
    first.exchange()
    first.a.do("UPDATE public.t SET note = 'x' WHERE id > 10")
    first.a.do("DELETE FROM public.t WHERE id > 20")
    first.a.do("BEGIN; DELETE FROM public.t WHERE id = 1; INSERT INTO public.t (id) VALUES (1); COMMIT")
    first.exchange()
    query = (
        "SELECT id, vsql_generation FROM vsql_sync.{} WHERE id NOT IN (SELECT id FROM public.t)"
        " UNION ALL SELECT id, vsql_generation FROM public.t ORDER BY id"
    )
    found = []
    for side in (first.a, first.b):
        name = side.rows("SELECT tombstones FROM vsql_sync.multi_writer_tables")[0][0]
        found.append(side.rows(query.format(name)))
    assert found[0] == found[1]
    assert [generation - ROOM for _, generation in found[0]] == [3, *[1] * 9, *[2] * 10, *[3] * 30]


def test_what_was_deleted_before_the_first_copy_does_not_stand_against_the_peer(
    new_schema: NewDatabase, cluster_name: str
) -> None:
    """Its tombstone is at one node only, for ever."""
    ddl = table("t", "id int PRIMARY KEY, note text", "first_write_wins")
    made = joined(_databases(new_schema, cluster_name, ddl, "t"), FIRST, opened=False)
    for statement in ("INSERT INTO public.t VALUES (1, 'x')", *["UPDATE public.t SET note = 'y'"] * 3):
        made.a.do(statement)
    made.a.do("DELETE FROM public.t")
    made.a.source.batches()  # the copy's snapshot
    made.b.do("INSERT INTO public.t (id, note) VALUES (1, 'of b')")
    made.exchange()
    assert made.a.rows("SELECT id, note FROM public.t") == [(1, "of b")]
    copied(made)
    for side in (made.a, made.b):
        side.do(f"INSERT INTO public.t (id, note) VALUES (2, 'of {side.name}')")
    made.exchange()
    for side in (made.a, made.b):  # and who was first is asked as if nothing had been
        assert side.rows("SELECT note FROM public.t WHERE id = 2") == [("of node-a",)]
    made.end()


def test_a_peer_that_is_added_again_keeps_its_floors(first: Both) -> None:
    query = "SELECT generation_floor, next_floor FROM vsql_sync.multi_writer_tables"
    before = first.a.rows(query), first.b.rows(query)
    request = PeerRequest(2, "node-b", mode="bidirectional", strategies=FIRST)
    peers.add(first.a.conn, first.b.conn, peers.look(first.a.conn, first.b.conn, request))
    assert before == (first.a.rows(query), first.b.rows(query)) == ([(ROOM, None)], [(ROOM, None)])


def test_tombstones_with_generations_are_not_forgotten(first: Both) -> None:
    stream = state.load_stream(first.a.conn, first.cluster, "pub.node-b")
    first.a.do("INSERT INTO public.t (id) VALUES (1)")
    first.a.do("DELETE FROM public.t")
    purging.purge(first.a.conn, stream)
    first.a.conn.execute(
        "UPDATE vsql_sync.stream_targets SET acked_lsn = pg_current_wal_lsn(), acked_target_lsn = '0/2000'"
    )
    state.save_position(first.a.conn, stream.chain, state.Position())
    first.a.conn.execute("UPDATE vsql_sync.apply_progress SET lsn_end = '0/2000'")
    assert purging.purge(first.a.conn, stream) == 0
    assert _generations(first) == ({}, {1: 2})


BAD = {
    "none": "id int PRIMARY KEY",
    "type": "id int PRIMARY KEY, vsql_generation int NOT NULL DEFAULT 0",
    "null": "id int PRIMARY KEY, vsql_generation bigint",
    "key": "id int, vsql_generation bigint NOT NULL DEFAULT 0, PRIMARY KEY (id, vsql_generation)",
}


@pytest.mark.parametrize("columns", BAD.values(), ids=BAD.keys())
def test_a_table_without_generations_is_refused_the_strategies_that_need_them(
    new_schema: NewDatabase, cluster_name: str, columns: str
) -> None:
    made = _databases(new_schema, cluster_name, table("t", columns, "manual"), "t")
    for strategy in ("first_write_wins", "node_priority"):
        request = PeerRequest(2, "node-b", mode="bidirectional", strategies=Strategies(tables={T: strategy}))
        with pytest.raises(RefusedError, match="ADD vsql_generation bigint NOT NULL DEFAULT 0"):
            peers.look(made.a.conn, made.b.conn, request)
    peers.look(made.a.conn, made.b.conn, PeerRequest(2, "node-b", mode="bidirectional"))
    made.a.conn.close()
    made.b.conn.close()


def test_values_that_are_no_generations_are_refused(new_schema: NewDatabase, cluster_name: str) -> None:
    made = _databases(new_schema, cluster_name, table("t", "id int PRIMARY KEY", "first_write_wins"), "t")
    made.a.conn.execute("INSERT INTO public.t VALUES (1, 9000000000000000000)")
    request = PeerRequest(2, "node-b", mode="bidirectional", strategies=FIRST)
    with pytest.raises(RefusedError, match="has values that are no generations"):
        peers.add(made.a.conn, made.b.conn, peers.look(made.a.conn, made.b.conn, request))
    assert made.a.rows("SELECT count(*) FROM vsql_sync.multi_writer_tables") == [(0,)]
    made.a.conn.close()
    made.b.conn.close()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("DROP COLUMN vsql_generation", "need a column of their own"),
        ("RENAME vsql_generation TO other", "need a column of their own"),
        ("ALTER vsql_generation DROP NOT NULL", "need a column of their own"),
        ("DISABLE TRIGGER vsql_sync_generation", "trigger vsql_sync_generation, which keeps generations"),
        ("ENABLE REPLICA TRIGGER vsql_sync_settled", "trigger"),
    ],
)
def test_generations_that_nobody_would_keep_are_refused(first: Both, change: str, why: str) -> None:
    with pytest.raises(psycopg.errors.FeatureNotSupported, match=why):
        first.b.conn.execute(f"ALTER TABLE public.t {change}".encode())
    for name in ("definitions", "rewrites", "generations"):
        first.b.conn.execute(f"DROP EVENT TRIGGER vsql_sync_{name}".encode())
    first.b.conn.execute(f"ALTER TABLE public.t {change}".encode())
    stream = state.load_stream(first.b.conn, first.cluster, "pub.node-a")
    with pytest.raises(DatabaseError, match=r"public\.t is written by every node"):
        writers.load(first.b.conn, stream)


def test_a_strategy_stays_what_both_nodes_agreed_on(first: Both) -> None:
    a, b = first.a.conn, first.b.conn
    other = PeerRequest(2, "node-b", mode="bidirectional", strategies=Strategies("node_priority"))
    with pytest.raises(
        RefusedError, match="with strategy first_write_wins, and node_priority is asked for"
    ) as said:
        peers.look(a, b, other)
    assert all(f"public.t on {node}" in str(said.value) for node in ("node-a", "node-b"))
    stream = state.load_stream(b, first.cluster, "pub.node-a")
    for said_here in (Strategies(), FIRST, Strategies("manual", {"pub": "first_write_wins"})):
        assert writers.load(b, stream, said_here) is not None
    for said_here in (Strategies("manual"), Strategies("first_write_wins", {}, {T: "keep_local"})):
        with pytest.raises(DatabaseError, match="with strategy first_write_wins, and this node's file says"):
            writers.load(b, stream, said_here)


def test_tables_of_one_publication_may_have_strategies_of_their_own(
    new_schema: NewDatabase, cluster_name: str
) -> None:
    ddl = table("t", "id int PRIMARY KEY", "node_priority") + table("s", "id int PRIMARY KEY", "manual")
    chosen = Strategies("keep_local", {"pub": "manual"}, {T: "node_priority"})
    made = joined(_databases(new_schema, cluster_name, ddl, "t", "s"), chosen)
    for side in (made.a, made.b):
        assert side.rows(
            "SELECT table_name, strategy FROM vsql_sync.multi_writer_tables ORDER BY table_name"
        ) == [("s", "manual"), ("t", "node_priority")]
    made.end()


def _log(both: Both) -> list[tuple[Any, ...]]:
    return both.a.rows(
        "SELECT row_key, local_tuple->>'note', remote_tuple->>'note', local_generation, remote_generation,"
        " local_origin, remote_origin FROM vsql_sync.conflict_log ORDER BY id"
    )


def test_the_log_has_what_deciding_by_hand_needs(first: Both) -> None:
    for side in (first.a, first.b):
        side.do(f"INSERT INTO public.t (id, note) VALUES (1, 'of {side.name}')")
        side.do("UPDATE public.t SET note = note || ', again'")
        side.do(f"INSERT INTO public.t (id, note) VALUES (2, 'of {side.name}')")
    first.b.do("DELETE FROM public.t WHERE id = 2")
    first.exchange()
    ours, theirs = ("node-a", "node-b")
    assert _log(first) == [
        ({"id": 1}, "of node-a, again", "of node-b", ROOM + 2, ROOM + 1, ours, theirs),
        ({"id": 1}, "of node-a, again", "of node-b, again", ROOM + 2, ROOM + 2, ours, theirs),
        ({"id": 2}, "of node-a", "of node-b", ROOM + 1, ROOM + 1, ours, theirs),
        ({"id": 2}, "of node-a", None, ROOM + 1, ROOM + 2, ours, theirs),
    ]


def test_of_a_table_with_pci_data_the_log_has_no_keys_either(first: Both) -> None:
    first.a.conn.execute(
        "INSERT INTO vsql_sync.pci_columns (table_schema, table_name, column_name)"
        " VALUES ('public', 't', 'note')"
    )
    for side in (first.a, first.b):
        side.do(f"INSERT INTO public.t (id, note) VALUES (1, 'of {side.name}')")
    first.exchange()
    assert _log(first) == [(None, None, None, ROOM + 1, ROOM + 1, "node-a", "node-b")]


def test_a_snapshot_from_before_the_table_was_shared_writes_nothing_into_it(
    new_schema: NewDatabase, cluster_name: str
) -> None:
    """It does not see what its rows begin above."""
    ddl = table("t", "id int PRIMARY KEY", "first_write_wins")
    made = _databases(new_schema, cluster_name, ddl, "t")
    with psycopg.connect(made.a.conninfo) as old:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT 1")
        joined(made, FIRST)
        with pytest.raises(psycopg.errors.SerializationFailure, match="since a moment ago written by every"):
            old.execute("INSERT INTO public.t (id) VALUES (1)")
    made.end()


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read"])
def test_a_table_that_was_taken_out_of_the_list_can_be_written(first: Both, isolation: str) -> None:
    first.a.conn.execute("DELETE FROM vsql_sync.multi_writer_tables")
    with psycopg.connect(first.a.conninfo) as conn:
        conn.execute(f"SET TRANSACTION ISOLATION LEVEL {isolation}".encode())
        conn.execute("INSERT INTO public.t (id) VALUES (1)")
    assert first.a.rows("SELECT id, vsql_generation FROM public.t") == [(1, 1)]


def test_a_node_of_an_earlier_version_is_brought_up_with_its_shared_tables(
    new_database: NewDatabase,
) -> None:
    with connect(new_database("old"), application_name="test") as conn:
        steps = migrate.migrations()
        migrate.install(conn, [one for one in steps if one.version < 20])
        conn.execute(
            "INSERT INTO vsql_sync.multi_writer_tables (table_schema, table_name, publication, tombstones,"
            " key_columns) VALUES ('public', 't', 'pub', 'tombstones_1', '{id}')"
        )
        migrate.install(conn)
        found = conn.execute(
            "SELECT strategy, generation_floor FROM vsql_sync.multi_writer_tables"
        ).fetchall()
        assert found == [("last_write_wins", 0)]
