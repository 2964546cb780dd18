"""P12: whatever becomes of a stream's slot is said, and none is made anew over a gap."""

from __future__ import annotations

import signal
import subprocess
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from tests.services.conftest import NewSource
from tests.services.producer_node import SourceNode
from tests.stack import PostgresServer, Stack
from tests.stack.fetch import client_tools
from tests.stack.postgres import postgres_user
from tests.syncctl import syncctl
from vsql_shared.errors import RefusedError
from vsql_shared.pg import slots
from vsql_shared.pg.connect import connect

TABLE = "CREATE TABLE t (id bigint PRIMARY KEY, note text)"
QUICK = (
    "[limits]\nbatch_linger_ms = 1\nstatus_interval_ms = 100\ncommand_poll_ms = 100\n"
    "retry_backoff_max_ms = 500\n"
)


def _running(node: SourceNode, log: str = "worker") -> subprocess.Popen[bytes]:
    worker = node.start(log=log)
    node.wait(lambda: node.state()[0] == "running", what=node.log(log))
    return worker


def _sent(node: SourceNode, rows: int = 10) -> None:
    worker = _running(node, "first")
    node.execute(f"INSERT INTO t SELECT g, 'sent' FROM generate_series(1, {rows}) g")
    node.wait_confirmed()
    node.stop(worker)


def _diverged(node: SourceNode, said: str, log: str = "diverged") -> None:
    """A worker that starts finds the gap, says so durably, and sends nothing."""
    before = len(node.read().entries)
    worker = node.start(log=log)
    node.wait(lambda: node.state()[0] == "diverged", what=node.log(log))
    assert said in node.state()[1]["last_error"]
    state = node.query("SELECT state, state_reason FROM vsql_sync.streams WHERE direction = 'out'")
    assert (state[0][0], said in state[0][1]) == ("DIVERGED", True)
    node.stop(worker)
    assert len(node.read().entries) == before


def _slots(node: SourceNode) -> list[tuple[str, str]]:
    return [
        (kind, database)
        for kind, database in node.query(
            "SELECT slot_type, coalesce(database, '') FROM pg_replication_slots WHERE slot_name = %s",
            node.slot,
        )
    ]


def test_a_slot_dropped_while_the_producer_runs_is_a_gap_and_not_made_anew(new_source: NewSource) -> None:
    node = new_source(TABLE, ["t"], config=QUICK)
    worker = _running(node)
    node.execute("INSERT INTO t VALUES (1, 'sent')")
    node.wait_confirmed()
    entries = len(node.read().entries)
    worker.send_signal(signal.SIGSTOP)
    node.query(
        "SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots WHERE slot_name = %s",
        node.slot,
    )
    node.query("SELECT pg_drop_replication_slot(%s)::text", node.slot)
    node.execute("INSERT INTO t VALUES (2, 'never sent')")
    worker.send_signal(signal.SIGCONT)
    node.wait(lambda: node.state()[0] == "diverged", what=node.log())
    assert "was created and is gone" in node.state()[1]["last_error"]
    assert _slots(node) == []
    assert len(node.read().entries) == entries
    shown = _syncctl(node, "status")
    assert f"way back: 1. `syncctl stream retire --chain {node.chain}" in shown
    node.stop(worker)


def test_a_slot_dropped_while_the_producer_is_stopped_is_shown_before_it_starts(
    new_source: NewSource,
) -> None:
    node = new_source(TABLE, ["t"], config=QUICK)
    _sent(node)
    assert "is gone" not in _syncctl(node, "status")
    node.query("SELECT pg_drop_replication_slot(%s)::text", node.slot)
    assert f"slot {node.slot} is gone" in _syncctl(node, "status")
    _diverged(node, "was created and is gone")
    # The next one finds it marked, and says the same.
    _diverged(node, "was created and is gone", "again")
    assert _slots(node) == []


def _syncctl(node: SourceNode, *args: str) -> str:
    done = syncctl("--config", str(node.config), *args, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("version", "runs"), [(15, False), (18, True)])
@pytest.mark.timeout(180)
def test_a_slot_whose_wal_was_removed_is_a_gap(
    new_source: NewSource, stack: Stack, version: int, runs: bool
) -> None:
    server = stack.own_postgres(version, {"max_slot_wal_keep_size": "1MB"})
    try:
        node = new_source(TABLE, ["t"], config=QUICK, conninfo=server.conninfo())
        worker = _running(node)
        node.execute("INSERT INTO t VALUES (1, 'sent')")
        node.wait_confirmed()
        if runs:
            worker.send_signal(signal.SIGSTOP)
        else:
            node.stop(worker)
        for number in range(2, 7):
            node.execute(f"INSERT INTO t VALUES ({number}, 'never sent'); SELECT pg_switch_wal()")
        with psycopg.connect(node.conninfo, autocommit=True) as conn:
            conn.execute("CHECKPOINT")
        lost = "SELECT wal_status FROM pg_replication_slots WHERE slot_name = %s"
        node.wait(lambda: node.query(lost, node.slot) == [("lost",)], 30, "the slot was not invalidated")
        if runs:
            worker.send_signal(signal.SIGCONT)
        else:
            worker = node.start(log="second")
        node.wait(lambda: node.state()[0] == "diverged", what=node.log())
        assert "was invalidated (wal_removed): its WAL is gone" in node.state()[1]["last_error"]
        assert len(node.read().changes) == 1
        node.stop(worker)
    finally:
        server.remove()


def test_a_slot_that_another_session_holds_is_waited_for_and_its_holder_named(new_source: NewSource) -> None:
    node = new_source(TABLE, ["t"], config=QUICK)
    _sent(node)
    reader = psycopg.connect(
        node.conninfo, autocommit=True, application_name="somebody-else", replication="database"
    )
    with closing(reader):
        pid = reader.info.backend_pid
        reader.execute(
            f"START_REPLICATION SLOT {node.slot} LOGICAL 0/0 (proto_version '2', publication_names 'pub')"
        )
        node.execute("INSERT INTO t VALUES (11, 'later')")
        worker = node.start(log="second")
        held = f"is used by session {pid} (somebody-else, "
        node.wait(lambda: held in str(node.state()[1].get("last_error")), what=node.log("second"))
        assert node.state()[0] == "waiting"
    node.wait_confirmed()
    node.stop(worker)
    assert len(node.read().changes) == 11


def test_another_slot_of_our_name_is_a_gap_once_the_stream_had_its_own(new_source: NewSource) -> None:
    node = new_source(TABLE, ["t"], config=QUICK)
    _sent(node)
    node.query("SELECT pg_drop_replication_slot(%s)::text", node.slot)
    node.query("SELECT pg_create_physical_replication_slot(%s)::text", node.slot)
    try:
        _diverged(node, "is gone, and a physical slot has its name")
        assert _slots(node) == [("physical", "")]
    finally:
        node.query("SELECT pg_drop_replication_slot(%s)::text", node.slot)


def test_a_slot_of_another_database_is_not_taken_by_a_new_stream(new_source: NewSource, stack: Stack) -> None:
    node = new_source(TABLE, ["t"], config=QUICK)
    elsewhere = stack.new_database(18, "elsewhere")
    with psycopg.connect(elsewhere, autocommit=True) as other:
        other.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (node.slot,))
        worker = node.start()
        node.wait(lambda: "is a slot of database" in str(node.state()[1].get("last_error")), what=node.log())
        assert node.state()[0] == "waiting"
        with connect(node.conninfo, application_name="test") as conn:
            missing = slots.missing(conn)
            with pytest.raises(RefusedError, match="of another plugin or database"):
                slots.make(conn, missing[0])
            assert slots.missing(conn) == missing
        other.execute("SELECT pg_drop_replication_slot(%s)", (node.slot,))
    node.wait(lambda: node.state()[0] == "running", what=node.log())
    node.execute("INSERT INTO t VALUES (1, 'sent')")
    node.wait_confirmed()
    node.stop(worker)
    assert len(node.read().changes) == 1


@pytest.mark.parametrize("how", ["advanced", "made anew"])
def test_a_slot_beyond_what_the_stream_confirmed_is_a_gap(new_source: NewSource, how: str) -> None:
    node = new_source(TABLE, ["t"], config=QUICK)
    _sent(node)
    node.execute("INSERT INTO t VALUES (11, 'never sent')")
    if how == "advanced":
        node.query(
            "SELECT end_lsn::text FROM pg_replication_slot_advance(%s, pg_current_wal_lsn())", node.slot
        )
    else:
        node.query("SELECT pg_drop_replication_slot(%s)::text", node.slot)
        node.query("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')::text", node.slot)
    _diverged(node, "somebody advanced it or made it anew")
    assert len(node.read().changes) == 10


def test_a_slot_that_start_made_and_somebody_made_anew_is_a_gap_before_the_first_row(
    new_source: NewSource,
) -> None:
    node = new_source(TABLE, ["t"], config=QUICK)
    with connect(node.conninfo, application_name="test") as conn:
        slots.make(conn, slots.missing(conn)[0])
    node.execute("INSERT INTO t VALUES (1, 'never sent')")
    node.query("SELECT pg_drop_replication_slot(%s)::text", node.slot)
    node.query("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')::text", node.slot)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "diverged", what=node.log())
    assert "somebody advanced it or made it anew" in node.state()[1]["last_error"]
    node.stop(worker)


@pytest.mark.parametrize("place", ["producer.position-noted", "producer.confirmed"])
def test_a_kill_between_noting_and_confirming_a_position_is_no_gap(new_source: NewSource, place: str) -> None:
    node = new_source(TABLE, ["t"], config=QUICK)
    worker = node.start(failpoints=f"{place}=kill:2")
    node.wait(lambda: worker.poll() is not None, what=node.log())
    node.execute("INSERT INTO t VALUES (1, 'after')")
    worker = _running(node, "second")
    node.wait_confirmed()
    node.stop(worker)
    assert len(node.read().changes) == 1


def test_a_slot_that_moves_while_it_is_taken_over_is_read_where_it_then_stands(new_source: NewSource) -> None:
    """The old walsender may still confirm what was published when the slot has been looked at."""
    node = new_source(TABLE, ["t"], config=QUICK)
    _sent(node)
    worker = node.start(failpoints="producer.audit-committed=kill")
    node.wait(lambda: node.state()[0] == "running", what=node.log())
    node.execute("INSERT INTO t VALUES (11, 'published, not confirmed')")
    node.wait(lambda: worker.poll() is not None, what=node.log())
    worker = node.start(failpoints="producer.slot-found=sleep:3000:1", log="second")
    node.wait(lambda: '"failpoint"' in node.log("second"), what=node.log("second"))
    node.query(
        "SELECT pg_replication_slot_advance(%s, (SELECT lsn_end FROM vsql_sync.chain_heads WHERE chain = %s))"
        "::text",
        node.slot,
        node.chain,
    )
    node.wait(lambda: node.state()[0] == "running", what=node.log("second"))
    node.execute("INSERT INTO t VALUES (12, 'later')")
    node.wait_confirmed()
    node.stop(worker)
    assert len(node.read().changes) == 12


def test_a_stream_of_an_older_version_learns_where_its_slot_stands(new_source: NewSource) -> None:
    node = new_source(TABLE, ["t"], config=QUICK)
    _sent(node)
    node.execute("UPDATE vsql_sync.streams SET confirmed_lsn = NULL")
    worker = _running(node, "second")
    node.execute("INSERT INTO t VALUES (11, 'sent')")
    node.wait_confirmed()
    node.stop(worker)
    noted = "SELECT confirmed_lsn IS NOT NULL FROM vsql_sync.streams WHERE direction = 'out'"
    assert node.query(noted) == [(True,)]
    assert len(node.read().changes) == 11


@pytest.mark.timeout(180)
def test_a_dump_restored_on_another_cluster_is_not_taken_for_the_source(
    new_source: NewSource, stack: Stack
) -> None:
    node = new_source(TABLE, ["t"], config=QUICK)
    _sent(node)
    other = stack.own_postgres(18)
    try:
        _move(node, other)
        _diverged(node, "the chain was written on system")
        assert _slots(node) == []
    finally:
        other.remove()


def _move(node: SourceNode, server: PostgresServer) -> None:
    """Dump the node's database, restore it on another server, and connect the node to that one.

    Without grants: their roles belong to the server, and are there if another test made them.
    """
    tools, user = client_tools(), postgres_user()
    made: list[str | Path] = [tools / "pg_dump", "--no-privileges", "--dbname", node.conninfo]
    dump = subprocess.run(made, capture_output=True, check=True, user=user, cwd="/").stdout
    restore: list[str | Path] = [
        tools / "psql",
        "-q",
        "-X",
        "-v",
        "ON_ERROR_STOP=1",
        "--dbname",
        server.conninfo(),
    ]
    done = subprocess.run(restore, input=dump, capture_output=True, check=False, user=user, cwd="/")
    assert done.returncode == 0, done.stderr.decode()
    node.connect_to(server.conninfo())


@pytest.mark.timeout(180)
def test_a_stream_that_stands_still_while_wal_advances_raises_an_alarm(
    new_source: NewSource, stack: Stack
) -> None:
    broker = stack.own_kafka()
    try:
        config = QUICK + "stall_alert_ms = 3000\n"
        node = new_source(TABLE, ["t"], config=config, kafka=broker.bootstrap_servers)
        worker = _running(node)
        node.execute("INSERT INTO t VALUES (1, 'sent')")
        node.wait_confirmed()
        node.execute("UPDATE vsql_sync.streams SET desired = 'paused'")
        node.wait(lambda: node.state()[0] == "paused")
        for _ in range(8):
            node.query(
                "SELECT pg_sleep(0.5), pg_logical_emit_message(false, 'noise', repeat('x', 1000))::text"
            )
        node.execute("UPDATE vsql_sync.streams SET desired = 'running'")
        node.wait_confirmed()
        assert "stalled" not in node.log(), "neither paused nor idle"
        assert node.state()[1]["stalled_seconds"] is None
        broker.pause()
        node.execute("INSERT INTO t VALUES (2, 'stuck')")
        node.wait(lambda: bool(node.state()[1].get("stalled_seconds")), 30, "no alarm")
        assert node.log().count("the stream is stalled") == 1
        assert '"level": "error"' in next(line for line in node.log().splitlines() if "is stalled" in line)
        assert "STALLED: WAL advances, and nothing was confirmed for" in _syncctl(node, "status")
        broker.unpause()
        node.wait_confirmed()
        node.wait(lambda: node.state()[1].get("stalled_seconds", 0) is None, 20, "the alarm stays")
        node.stop(worker)
        assert len(node.read().changes) == 2
    finally:
        broker.remove()
