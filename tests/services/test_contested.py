"""Changes of tables that every node writes, one by one, against what another session is about to do.

Node B is a database prepared by `add-peer`; what A did comes from a slot, at commit times the test chooses.
The races are forced: a local session holds what the applier must wait for.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest

from tests.conftest import NewDatabase
from tests.services.apply_source import Source
from tests.stack import Stack
from tests.waiting import until
from vsql_consumers import purging, state, writers
from vsql_consumers.apply import Applier
from vsql_consumers.frames import BINARY, read_change
from vsql_shared.changes import Op
from vsql_shared.errors import (
    DatabaseError,
    DivergedError,
    RefusedError,
    RowError,
    TransientError,
    VsqlSyncError,
)
from vsql_shared.pg import migrate, nodes, peers, publications
from vsql_shared.pg.connect import Connection, connect
from vsql_shared.pg.peers import PeerRequest
from vsql_shared.pg.publications import PublicationRequest
from vsql_shared.pg.table_spec import parse_spec

TABLE = "CREATE TABLE public.t (id int PRIMARY KEY, note text); ALTER TABLE public.t REPLICA IDENTITY FULL"
REQUEST = PeerRequest(2, "node-b", mode="bidirectional")
KEY_A, KEY_B = bytes(range(32)), bytes(range(1, 33))
SECOND = 1_000_000


def now() -> int:
    """µs since 1970; the databases are on this machine."""
    return time.time_ns() // 1000


@dataclass
class Nodes:
    """A, which has a slot, and B, which applies what A did."""

    a: Connection
    b: Connection
    cluster: str
    conninfo: tuple[str, str]
    source: Source = field(init=False)
    applying: Connection = field(init=False)
    applier: Applier = field(init=False)
    sessions: list[psycopg.Connection[tuple[Any, ...]]] = field(default_factory=list)

    def add_peer(self) -> None:
        """Both are prepared, and B is open."""
        peers.add(self.a, self.b, peers.look(self.a, self.b, REQUEST))
        self.b.execute("UPDATE vsql_sync.multi_writer_tables SET writable = true")

    def begin(self) -> None:
        """A's slot, and B's applier."""
        self.source = Source.make(self.conninfo[0])
        self.source.conn.execute("CREATE PUBLICATION everything FOR TABLE public.t")
        self.source.slot = f"contested_{self.source.conn.info.backend_pid}"
        make = "SELECT pg_create_logical_replication_slot(%s, 'pgoutput')"
        self.source.conn.execute(make, (self.source.slot,))
        self.applying = connect(self.conninfo[1], application_name="applying")
        self.applier = Applier(self.applying, "pub.node-a")
        stream = state.load_stream(self.b, self.cluster, "pub.node-a")
        self.applier.setup(stream.origin_name)
        self.applier.contend(writers.load(self.b, stream))

    def session(self) -> psycopg.Connection[tuple[Any, ...]]:
        """A client of B, in a transaction."""
        self.sessions.append(psycopg.connect(self.conninfo[1]))
        return self.sessions[-1]

    def apply(self, at: int, *statements: str, late: bool = False, pci: bool = False) -> dict[str, int]:
        """Do statements on A as one transaction, and apply it at B as if it had been committed at a time.

        `pci`: the manifest says that it has PCI data.
        """
        with self.source.conn.transaction():
            for statement in statements:
                self.source.conn.execute(statement)
        (batch,) = self.source.batches()
        batch.transactions = [one._replace(commit_time=at) for one in batch.transactions]
        batch.contains_pci = pci
        if late:
            (verdicts,) = self.applier.apply([batch], late=True)
        else:
            verdicts = self.applier.apply_transaction(batch, 0, len(batch.ops))
        self.applier.finish(batch.lsn_end, at, lambda _: None)
        return verdicts

    def apply_behind(
        self, holder: psycopg.Connection[tuple[Any, ...]], at: int, *statements: str
    ) -> dict[str, int]:
        """Apply while `holder` has what must be waited for; it commits once the applier waits."""
        found: list[dict[str, int] | VsqlSyncError] = []

        def run() -> None:
            try:
                found.append(self.apply(at, *statements))
            except VsqlSyncError as error:
                found.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        until(self._waits, 20, lambda: f"the applier does not wait: {found}")
        holder.commit()
        thread.join(20)
        (verdicts,) = found
        assert isinstance(verdicts, dict), verdicts
        return verdicts

    def _waits(self) -> bool:
        row = self.b.execute(
            "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s",
            (self.applying.info.backend_pid,),
        ).fetchone()
        return row is not None and row[0] is True

    def rows(self) -> list[tuple[Any, ...]]:
        """B's."""
        return self.b.execute("SELECT * FROM public.t ORDER BY id").fetchall()

    def end(self) -> None:
        self.b.execute("SELECT pg_terminate_backend(%s, 5000)", (self.applying.info.backend_pid,))
        self.b.execute(
            "SELECT pg_replication_origin_drop(roname) FROM pg_replication_origin"
            " WHERE roname IN (SELECT origin_name FROM vsql_sync.streams)"
        )
        for conn in (*self.sessions, self.source.conn, self.applying, self.a, self.b):
            conn.close()


def _prepared(a: str, b: str, cluster: str, ddl: str = TABLE) -> Nodes:
    made = Nodes(connect(a, application_name="a"), connect(b, application_name="b"), cluster, (a, b))
    for conn, number, name, key in ((made.a, 1, "node-a", KEY_A), (made.b, 2, "node-b", KEY_B)):
        migrate.install(conn)
        nodes.register_local(conn, number, name, cluster, key)
        conn.execute(ddl)
    publications.create(made.a, PublicationRequest("pub", (parse_spec("t"),)))
    return made


@pytest.fixture
def two(new_database: NewDatabase, cluster_name: str) -> Iterator[Nodes]:
    made = _prepared(new_database("a"), new_database("b"), cluster_name)
    made.add_peer()
    made.begin()
    yield made
    made.end()


def test_a_row_that_was_waited_for_is_judged_by_its_new_version(two: Nodes) -> None:
    two.apply(now(), "INSERT INTO t VALUES (1, 'of a')")
    two.b.execute("UPDATE public.t SET note = 'of b'")
    at = now()
    holder = two.session()
    holder.execute("UPDATE public.t SET note = 'of b, younger'")
    assert two.apply_behind(holder, at, "UPDATE t SET note = 'of a, older'") == {"lost": 1}
    assert two.rows() == [(1, "of b, younger")]
    kept = two.b.execute("SELECT conflict_type, resolution FROM vsql_sync.conflict_log").fetchall()
    assert kept == [("update_origin_differs", "KEPT_LOCAL")]


def test_a_delete_of_a_missing_row_waits_for_whoever_inserts_it(two: Nodes) -> None:
    two.apply(now() - 60 * SECOND, "INSERT INTO t VALUES (1, 'of a')")
    two.b.execute("DELETE FROM public.t")
    holder = two.session()
    holder.execute("INSERT INTO public.t VALUES (1, 'again')")
    # Younger than what is about to be committed: as where its time is taken long before it is seen.
    assert two.apply_behind(holder, now() + 60 * SECOND, "DELETE FROM t") == {"applied": 1}
    assert two.rows() == []


def test_an_insert_waits_for_a_tombstone_that_is_about_to_be_left(two: Nodes) -> None:
    at = now()
    holder = two.session()
    holder.execute("INSERT INTO public.t VALUES (1, 'short')")
    holder.execute("DELETE FROM public.t")
    assert two.apply_behind(holder, at, "INSERT INTO t VALUES (1, 'of a')") == {"lost": 1}
    assert two.rows() == []


def test_an_insert_and_delete_at_once_leave_a_younger_tombstone_alone(two: Nodes) -> None:
    at = now()
    two.b.execute("INSERT INTO public.t VALUES (1, 'of b')")
    two.b.execute("DELETE FROM public.t")
    assert two.apply(at, "INSERT INTO t VALUES (1, 'of a')", "DELETE FROM t") == {"lost": 2}
    assert two.apply(at + 1, "INSERT INTO t VALUES (1, 'of a')") == {"lost": 1}
    assert two.rows() == []


def test_a_row_of_ones_own_that_came_and_went_is_written_as_a_set(two: Nodes) -> None:
    at = now()
    two.apply(at, "INSERT INTO t SELECT g, 'one' FROM generate_series(1, 10) g")
    two.apply(at + 1, "DELETE FROM t")
    before = two.applier.ways["replayed"]
    assert two.apply(at + 2, "INSERT INTO t SELECT g, 'two' FROM generate_series(1, 10) g") == {"applied": 10}
    assert two.applier.ways["replayed"] == before == 0
    assert len(two.rows()) == 10


@pytest.mark.parametrize(
    "first", ["INSERT INTO t VALUES (1, 'one')", "INSERT INTO t VALUES (1, 'x'), (2, 'y')"]
)
def test_a_clock_that_went_back_on_a_row_stops_the_stream(two: Nodes, first: str) -> None:
    at = now()
    two.apply(at, first)
    with pytest.raises(DivergedError, match=r"clock of node node-a went back.*public\.t"):
        two.apply(at - 1, "UPDATE t SET note = 'two'")
    assert all(note != "two" for _, note in two.rows())


def test_writing_the_row_here_is_the_way_out_of_a_clock_that_went_back(two: Nodes) -> None:
    at = now()
    two.apply(at, "INSERT INTO t VALUES (1, 'one')")
    two.b.execute("UPDATE public.t SET note = 'of b'")
    assert two.apply(at - 1, "UPDATE t SET note = 'two'") == {"lost": 1}
    assert two.rows() == [(1, "of b")]


def test_what_was_parked_does_not_undo_what_its_writer_did_since(two: Nodes) -> None:
    at = now()
    two.apply(at, "INSERT INTO t VALUES (1, 'one')")
    assert two.apply(at - SECOND, "UPDATE t SET note = 'parked'", late=True) == {"lost": 1}
    assert two.rows() == [(1, "one")]


@pytest.mark.parametrize("late", [False, True])
def test_rows_of_a_batch_with_pci_data_are_not_in_the_log_even_when_it_was_parked(
    two: Nodes, late: bool
) -> None:
    at = now()
    two.b.execute("INSERT INTO public.t VALUES (1, 'of b')")
    assert two.apply(at, "INSERT INTO t VALUES (1, 'a secret')", late=late, pci=True) == {"lost": 1}
    assert two.apply(at + 1, "UPDATE t SET note = 'no secret'", late=late) == {"lost": 1}
    logged = two.b.execute(
        "SELECT conflict_type, remote_tuple->>'note', local_tuple->>'note' FROM vsql_sync.conflict_log"
        " ORDER BY id"
    ).fetchall()
    assert logged == [("insert_exists", None, None), ("update_origin_differs", "no secret", "of b")]


def test_marks_of_pci_data_made_while_the_stream_runs_keep_rows_out_of_the_log(two: Nodes) -> None:
    two.b.execute("INSERT INTO public.t VALUES (1, 'of b')")
    two.b.execute(
        "INSERT INTO vsql_sync.pci_columns (table_schema, table_name, column_name)"
        " VALUES ('public', 't', 'note')"
    )
    assert two.apply(now() - SECOND, "INSERT INTO t VALUES (1, 'a secret')") == {"lost": 1}
    logged = two.b.execute("SELECT local_tuple, remote_tuple FROM vsql_sync.conflict_log").fetchall()
    assert logged == [(None, None)]


def test_a_column_that_only_one_node_has_yet_does_not_part_them(two: Nodes) -> None:
    """A adds it later: what A wrote before without it has the default there."""
    two.b.execute("ALTER TABLE public.t ADD extra int DEFAULT 7, ADD needed int NOT NULL DEFAULT 1")
    two.b.execute("INSERT INTO public.t VALUES (1, 'of b', 5, 5), (2, 'of b', 5, 5)")
    assert two.apply(now(), "INSERT INTO t VALUES (1, 'of a')") == {"applied": 1}
    assert two.rows() == [(1, "of a", 7, 1), (2, "of b", 5, 5)]
    two.b.execute("ALTER TABLE public.t ALTER needed DROP DEFAULT")
    two.b.execute("UPDATE public.t SET extra = 6, needed = 6 WHERE id = 1")
    assert two.apply(now(), "UPDATE t SET note = 'of a again'") == {"applied": 1}
    assert two.rows()[0] == (1, "of a again", 7, 6)  # no row can be without it


def test_a_move_of_which_both_halves_fall_is_one_lost_change(two: Nodes) -> None:
    at = now()
    two.b.execute("INSERT INTO public.t VALUES (2, 'of b'), (300, 'of b')")
    assert two.apply(at - 1, "INSERT INTO t VALUES (2, 'of a')") == {"lost": 1}
    assert two.apply(at, "UPDATE t SET id = 300") == {"lost": 1}
    assert two.rows() == [(2, "of b"), (300, "of b")]


def test_a_key_that_a_trigger_changes_leaves_a_tombstone(two: Nodes) -> None:
    two.b.execute(
        "CREATE FUNCTION public.move() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN NEW.id := OLD.id + 100; RETURN NEW; END $$;"
        "INSERT INTO public.t VALUES (1, 'one');"
        "CREATE TRIGGER move BEFORE UPDATE ON public.t FOR EACH ROW EXECUTE FUNCTION public.move();"
        "UPDATE public.t SET note = 'two'"
    )
    row = two.b.execute("SELECT tombstones FROM vsql_sync.multi_writer_tables").fetchone()
    assert row is not None
    assert two.b.execute(f"SELECT id FROM vsql_sync.{row[0]}").fetchall() == [(1,)]


def test_a_truncate_is_refused_here_and_where_it_comes_from_elsewhere(two: Nodes) -> None:
    two.apply(now(), "INSERT INTO t VALUES (1, 'one')")
    for conn in (two.a, two.b):
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="cannot be truncated"):
            conn.execute("TRUNCATE public.t")
    with pytest.raises(RowError, match=r"public\.t was truncated on node node-a"):
        two.apply(now(), "SET LOCAL session_replication_role = replica", "TRUNCATE t")
    assert two.rows() == [(1, "one")]


def test_a_closed_table_refuses_clients_and_takes_what_is_applied(two: Nodes) -> None:
    two.b.execute("UPDATE vsql_sync.multi_writer_tables SET writable = false")
    for statement in (
        "INSERT INTO public.t VALUES (9, 'no')",
        "UPDATE public.t SET id = 1",
        "DELETE FROM public.t",
    ):
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="not open for writing yet"):
            two.b.execute(statement)
    assert two.apply(now(), "INSERT INTO t VALUES (1, 'of a')") == {"applied": 1}


@pytest.mark.parametrize(
    ("change", "why", "stays"),
    [
        ("CREATE UNIQUE INDEX u ON public.t (note)", "only the primary key may be unique", True),
        ("ALTER TABLE public.t ADD CONSTRAINT x EXCLUDE (note WITH =)", "only the primary key may be", True),
        ("ALTER TABLE public.t REPLICA IDENTITY DEFAULT", "must bring the whole row", True),
        ("ALTER TABLE public.t RENAME id TO number", "is not the one its tombstones have", True),
        ("ALTER TABLE public.t DROP CONSTRAINT t_pkey", "has no primary key", True),
        ("ALTER TABLE public.t DISABLE TRIGGER ALL", "lost without a trace while it is switched off", True),
        ("ALTER TABLE public.t DISABLE TRIGGER vsql_sync_moved", "trigger vsql_sync_moved", True),
        ("ALTER TABLE public.t ALTER note TYPE int USING 0", "would get this node's time", False),
        ("ALTER TABLE public.t ADD at float8 DEFAULT random()", "would get this node's time", False),
    ],
)
def test_a_definition_that_would_part_the_nodes_is_refused(
    two: Nodes, change: str, why: str, stays: bool
) -> None:
    with pytest.raises(psycopg.errors.FeatureNotSupported, match=why):
        two.b.execute(change)
    two.b.execute("DROP EVENT TRIGGER vsql_sync_definitions; DROP EVENT TRIGGER vsql_sync_rewrites")
    two.b.execute(change)
    stream = state.load_stream(two.b, two.cluster, "pub.node-a")
    if stays:  # without event triggers a stream's start finds what can still be seen
        with pytest.raises(DatabaseError, match=r"public\.t is written by every node"):
            writers.load(two.b, stream)


def test_a_table_made_anew_is_not_taken_for_the_one_before(two: Nodes) -> None:
    two.b.execute("DROP TABLE public.t")
    two.b.execute(TABLE)
    stream = state.load_stream(two.b, two.cluster, "pub.node-a")
    with pytest.raises(DatabaseError, match="is not in publication pub any more"):
        writers.load(two.b, stream)
    two.b.execute("ALTER PUBLICATION pub ADD TABLE public.t")
    with pytest.raises(DatabaseError, match="lacks triggers that were made for it"):
        writers.load(two.b, stream)


@pytest.mark.parametrize(
    ("ddl", "why"),
    [
        ("CREATE TABLE public.t (id int PRIMARY KEY, u int UNIQUE)", "t_u_key"),
        ("CREATE TABLE public.t (id int PRIMARY KEY DEFERRABLE, u int)", "deferrable"),
        ("CREATE TABLE public.t (id int, u int)", "has no primary key"),
    ],
)
def test_tables_that_could_part_the_nodes_are_refused_at_add_peer(
    new_database: NewDatabase, cluster_name: str, ddl: str, why: str
) -> None:
    full = f"{ddl}; ALTER TABLE public.t REPLICA IDENTITY FULL"
    made = _prepared(new_database("a"), new_database("b"), cluster_name, full)
    with made.a, made.b, pytest.raises(RefusedError, match=why):
        peers.look(made.a, made.b, REQUEST)


def test_what_comes_to_the_peer_while_it_is_added_is_found(
    new_database: NewDatabase, cluster_name: str
) -> None:
    made = _prepared(new_database("a"), new_database("b"), cluster_name)
    with made.a, made.b:
        plan = peers.look(made.a, made.b, REQUEST)
        made.b.execute("INSERT INTO public.t VALUES (1, 'meanwhile')")
        with pytest.raises(RefusedError, match=r"public\.t: holds rows on the peer"):
            peers.add(made.a, made.b, plan)
        assert made.b.execute("SELECT count(*) FROM vsql_sync.streams").fetchall() == [(0,)]


def test_a_file_with_a_key_is_not_enough_where_both_write(
    new_database: NewDatabase, cluster_name: str
) -> None:
    made = _prepared(new_database("a"), new_database("b"), cluster_name)
    with made.a, made.b:
        there = nodes.local(made.b)
        with pytest.raises(RefusedError, match="--peer-connection"):
            peers.add_target(made.a, there, REQUEST)
        with pytest.raises(RefusedError, match="--peer-connection"):
            peers.add_origin(made.b, nodes.local(made.a), REQUEST, [])


def test_a_row_whose_time_nobody_knows_falls_only_to_what_is_surely_younger(
    stack: Stack, cluster_name: str
) -> None:
    server = stack.own_postgres(18, {"wal_level": "logical", "track_commit_timestamp": "on"})
    for name in ("a", "b"):
        with psycopg.connect(server.conninfo(), autocommit=True) as conn:
            conn.execute(f"CREATE DATABASE {name}")
    made = _prepared(server.conninfo("a"), server.conninfo("b"), cluster_name)
    made.add_peer()
    made.b.execute("INSERT INTO public.t VALUES (1, 'of b')")
    made.a.close()
    made.b.close()
    for value in ("off", "on"):  # what was committed before is forgotten
        server.configure({"track_commit_timestamp": value})
        server.restart()
    made.a, made.b = (connect(server.conninfo(name), application_name=name) for name in ("a", "b"))
    made.begin()
    at = now()
    with pytest.raises(DivergedError, match="does not have any more"):
        made.apply(at, "INSERT INTO t VALUES (1, 'before')", "DELETE FROM t")
    made.b.execute("SELECT vsql_sync.note_horizon()")
    assert made.apply(now() + SECOND, "INSERT INTO t VALUES (1, 'of a')") == {"applied": 1}
    assert made.rows() == [(1, "of a")]
    made.end()


def test_a_change_waits_until_the_databases_clock_is_past_it(two: Nodes) -> None:
    clock = writers.DatabaseClock(two.b, state.load_stream(two.b, two.cluster, "pub.node-a"), 500)
    ahead = now() + SECOND // 4
    clock.wait_for(ahead)
    row = two.b.execute("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint").fetchone()
    assert row is not None
    assert row[0] > ahead
    with pytest.raises(TransientError, match="node node-a committed a change"):
        clock.wait_for(now() + 2 * SECOND)
    (noted,) = two.b.execute("SELECT node_id, waits, most_ahead_us FROM vsql_sync.future_commits").fetchall()
    assert noted[:2] == ("node-a", 2)
    assert 1.5 * SECOND < noted[2] <= 2 * SECOND


def test_a_table_opens_once_its_changes_are_sent_and_its_copy_is_done(two: Nodes) -> None:
    stream = state.load_stream(two.b, two.cluster, "pub.node-a")

    def opened() -> bool:
        two.b.execute("UPDATE vsql_sync.multi_writer_tables SET writable = false")
        writers.DatabaseClock(two.b, stream, 500).look()
        return two.b.execute("SELECT writable FROM vsql_sync.multi_writer_tables").fetchall() == [(True,)]

    assert not opened()
    two.b.execute("UPDATE vsql_sync.streams SET state = 'FINISHED' WHERE kind = 'copy'")
    assert not opened()
    (slot,) = two.b.execute("SELECT slot_name FROM vsql_sync.streams WHERE direction = 'out'").fetchall()
    two.b.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", slot)
    assert opened()


def _tombstones(two: Nodes) -> list[Any]:
    row = two.b.execute("SELECT tombstones FROM vsql_sync.multi_writer_tables").fetchone()
    assert row is not None
    return [row[0] for row in two.b.execute(f"SELECT id FROM vsql_sync.{row[0]} ORDER BY id")]


def _past(two: Nodes) -> None:
    """Both ways are past the mark."""
    two.b.execute(
        "UPDATE vsql_sync.stream_targets SET acked_lsn = pg_current_wal_lsn(), acked_target_lsn = '0/2000'"
        " WHERE chain = 'pub.node-b'"
    )
    state.save_position(two.b, "pub.node-a", state.Position())
    two.b.execute("UPDATE vsql_sync.apply_progress SET lsn_end = '0/2000'")


def test_deleted_rows_are_forgotten_once_both_ways_are_past_them_and_nothing_is_parked(two: Nodes) -> None:
    stream = state.load_stream(two.b, two.cluster, "pub.node-a")
    two.apply(now(), "INSERT INTO t VALUES (1, 'one'), (2, 'two')")
    two.apply(now(), "DELETE FROM t WHERE id = 2")
    two.b.execute("DELETE FROM public.t WHERE id = 1")
    assert purging.purge(two.b, stream) == 0
    two.b.execute("INSERT INTO public.t VALUES (3, 'three')")
    two.b.execute("DELETE FROM public.t WHERE id = 3")  # behind the mark
    two.b.execute(
        "UPDATE vsql_sync.stream_targets SET acked_lsn = pg_current_wal_lsn(), acked_target_lsn = '0/2000'"
        " WHERE chain = 'pub.node-b'"
    )
    state.save_position(two.b, "pub.node-a", state.Position())
    assert purging.purge(two.b, stream) == 0  # the peer has applied them; what it sent before is on its way
    two.b.execute("UPDATE vsql_sync.apply_progress SET lsn_end = '0/2000'")
    two.b.execute(
        "INSERT INTO vsql_sync.parked (decision, chain, xid, commit_lsn, commit_time)"
        " VALUES (1, 'pub.node-a', 9, '0/1', now())"
    )
    assert purging.purge(two.b, stream) == 0
    assert _tombstones(two) == [1, 2, 3]
    two.b.execute("UPDATE vsql_sync.parked SET replayed_at = now()")
    assert purging.purge(two.b, stream) == 2
    assert _tombstones(two) == [3]


def test_a_mark_waits_for_transactions_that_are_under_way(two: Nodes) -> None:
    stream = state.load_stream(two.b, two.cluster, "pub.node-a")
    two.b.execute("INSERT INTO public.t VALUES (1, 'one')")
    holder = two.session()
    holder.execute("DELETE FROM public.t WHERE id = 1")
    purging.purge(two.b, stream)
    holder.commit()
    _past(two)
    assert purging.purge(two.b, stream) == 0
    assert _tombstones(two) == [1]


def test_forgetting_waits_for_no_client_and_not_for_what_is_being_applied(two: Nodes) -> None:
    """The applier's open transaction is of the same thread: nobody would ever end it."""
    stream = state.load_stream(two.b, two.cluster, "pub.node-a")
    two.b.execute("INSERT INTO public.t SELECT g, 'here' FROM generate_series(1, 3) g")
    two.b.execute("DELETE FROM public.t")
    two.b.execute("INSERT INTO public.t VALUES (1, 'again'), (2, 'again')")
    purging.purge(two.b, stream)
    _past(two)
    holder = two.session()
    holder.execute("DELETE FROM public.t WHERE id = 1")
    with two.source.conn.transaction():
        two.source.conn.execute("INSERT INTO t VALUES (2, 'of a')")
        two.source.conn.execute("DELETE FROM t WHERE id = 2")
    (batch,) = two.source.batches()
    batch.transactions = [one._replace(commit_time=now()) for one in batch.transactions]
    two.applier.apply_transaction(batch, 0, len(batch.ops))
    two.b.execute("SET lock_timeout = '5s'")
    assert purging.purge(two.b, stream) == 1
    two.applier.finish(batch.lsn_end, now(), lambda _: None)
    holder.commit()
    assert _tombstones(two) == [1, 2]


def test_ids_of_a_mark_are_compared_in_full(two: Nodes) -> None:
    """A mark may wait for its peer for longer than 2^31 transactions: in 32 bits younger ones look older."""
    stream = state.load_stream(two.b, two.cluster, "pub.node-a")
    two.b.execute("INSERT INTO public.t VALUES (1, 'one')")
    two.b.execute("DELETE FROM public.t")
    purging.purge(two.b, stream)
    _past(two)
    # In 32 bits this is a thousand transactions ago, before the tombstone.
    two.b.execute(
        "UPDATE vsql_sync.purge_marks"
        " SET below = (pg_current_xact_id()::text::bigint + (1::bigint << 32) - 1000)::text::xid8"
    )
    assert purging.purge(two.b, stream) == 1


def _copied(inserted: bytes) -> bytes:
    """A row of binary COPY, of the tuple of an INSERT with two binary columns."""
    _, fields = read_change(Op.INSERT, inserted, BINARY * 2)
    return struct.pack("!H", 2) + b"".join(one or b"" for one in fields or [])


def test_a_copied_row_is_written_where_nobody_has_written(two: Nodes) -> None:
    two.source.conn.execute("INSERT INTO t VALUES (1, 'copied'), (2, 'copied')")
    (batch,) = two.source.batches()
    batch.ops = [Op.COPY] * len(batch.ops)
    batch.plaintexts = [_copied(one) for one in batch.plaintexts]
    at = now()
    batch.transactions = [one._replace(commit_time=at) for one in batch.transactions]
    assert two.applier.apply_transaction(batch, 0, len(batch.ops)) == {"applied": 2}
    two.applier.finish(batch.lsn_end, at, lambda _: None)
    assert two.rows() == [(1, "copied"), (2, "copied")]
    assert two.applier.ways["copied"] == 2
