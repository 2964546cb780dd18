"""Rule 6 and P12 on real standbys: what a promotion does to a stream, with and without failover slots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from tests.services.conftest import NewSource
from tests.services.producer_node import SourceNode
from tests.stack import PostgresServer, Stack
from tests.stack.standby import SLOT, make_standby, promote
from vsql_shared.audit.entries import EPOCH_OPENED

TABLE = "CREATE TABLE t (id bigint PRIMARY KEY, note text)"
QUICK = (
    "[limits]\nbatch_linger_ms = 1\nstatus_interval_ms = 200\ncommand_poll_ms = 100\n"
    "retry_backoff_max_ms = 500\n"
)
pytestmark = pytest.mark.timeout(240)


@contextmanager
def _servers(stack: Stack, version: int) -> Iterator[list[PostgresServer]]:
    """A primary; standbys that are added to the list are removed with it."""
    made = [stack.own_postgres(version)]
    try:
        yield made
    finally:
        for server in reversed(made):
            server.remove()


def _running(node: SourceNode, log: str) -> None:
    node.start(log=log)
    node.wait(lambda: node.state()[0] == "running", what=node.log(log))


def _send(node: SourceNode, first: int, last: int) -> None:
    node.execute(f"INSERT INTO t SELECT g, 'sent' FROM generate_series({first}, {last}) g")
    node.wait_confirmed()


def _ids(node: SourceNode) -> list[int]:
    return [int.from_bytes(values[0] or b"") for _, values in node.read().rows("t")]


def _wait_replayed(primary: SourceNode, standby: PostgresServer) -> None:
    """The standby has everything the primary has written."""
    wanted = primary.query("SELECT pg_current_wal_flush_lsn()::text")[0][0]
    with psycopg.connect(standby.conninfo(), autocommit=True) as conn:
        reached = "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn"
        primary.wait(lambda: conn.execute(reached, (wanted,)).fetchone() == (True,), 60, "no replay")


def _wait_synced(node: SourceNode, standby: PostgresServer) -> None:
    """The slot came to the standby, for good. It needs a record of the running transactions behind it."""
    with psycopg.connect(standby.conninfo(), autocommit=True) as conn:

        def synced() -> bool:
            node.query("SELECT pg_log_standby_snapshot()")
            return conn.execute(
                "SELECT synced AND NOT temporary FROM pg_replication_slots WHERE slot_name = %s", (node.slot,)
            ).fetchone() == (True,)

        node.wait(synced, 90, "the slot was not synchronized")


@pytest.mark.parametrize("version", [pytest.param(17, marks=pytest.mark.long), 18])
def test_a_stream_goes_on_with_the_same_slot_after_its_standby_was_promoted(
    new_source: NewSource, stack: Stack, version: int
) -> None:
    with _servers(stack, version) as servers:
        primary = servers[0]
        node = new_source(TABLE, ["t"], config=QUICK, conninfo=primary.conninfo())
        _running(node, "first")
        servers.append(standby := make_standby(primary))
        primary.configure({"synchronized_standby_slots": SLOT})
        node.query("SELECT pg_reload_conf()")
        _send(node, 1, 100)
        _wait_synced(node, standby)
        _send(node, 101, 200)
        old = (node.conninfo, node.config.read_text())
        primary.kill()
        node.kill_workers()
        node.connect_to(standby.conninfo())
        worker = node.start(log="second")
        node.wait(lambda: "this server is a standby" in node.log("second"), what=node.log("second"))
        promote(standby)
        node.wait(lambda: node.state()[0] == "running", what=node.log("second"))
        _send(node, 201, 300)
        node.stop(worker)
        assert _ids(node) == list(range(1, 301)), "nothing lost, nothing twice, in order"
        opened = [entry for entry in node.read().entries if entry.event_type == EPOCH_OPENED]
        assert (opened[0].timeline, opened[-1].timeline) == (1, 2)
        assert {entry.system_identifier for entry in opened} == {opened[0].system_identifier}
        # Its clients were told nothing: the old primary comes back, and so does its producer.
        primary.start()
        node.conninfo, entries = old[0], len(node.read().entries)
        node.config.write_text(old[1])
        node.start(log="third")
        node.wait(lambda: node.state()[0] == "diverged", what=node.log("third"))
        assert "timeline 1 left timeline 2 at unknown" in node.state()[1]["last_error"]
        assert len(node.read().entries) == entries


@pytest.mark.parametrize("version", [15, pytest.param(16, marks=pytest.mark.long), 18])
def test_a_slot_that_did_not_come_along_with_a_promotion_is_a_gap(
    new_source: NewSource, stack: Stack, version: int
) -> None:
    with _servers(stack, version) as servers:
        primary = servers[0]
        node = new_source(TABLE, ["t"], config=QUICK, conninfo=primary.conninfo())
        _running(node, "first")
        servers.append(standby := make_standby(primary, sync_slots=False))
        _send(node, 1, 100)
        _wait_replayed(node, standby)
        primary.kill()
        node.kill_workers()
        promote(standby)
        node.connect_to(standby.conninfo())
        node.execute("INSERT INTO t VALUES (101, 'before anybody looked')")
        worker = node.start(log="second")
        node.wait(lambda: node.state()[0] == "diverged", what=node.log("second"))
        said = node.state()[1]["last_error"]
        assert "was created and is gone" in said
        assert "timeline 1 became 2 at" in said
        assert node.query("SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s", node.slot) == [
            (0,)
        ]
        node.stop(worker)
        assert _ids(node) == list(range(1, 101))


@pytest.mark.parametrize("version", [15, 18])
def test_a_promoted_standby_that_lacks_what_was_sent_is_a_fork(
    new_source: NewSource, stack: Stack, version: int
) -> None:
    with _servers(stack, version) as servers:
        primary = servers[0]
        node = new_source(TABLE, ["t"], config=QUICK, conninfo=primary.conninfo())
        _running(node, "first")
        servers.append(standby := make_standby(primary))
        _send(node, 1, 100)
        if version >= 17:
            _wait_synced(node, standby)
        standby.stop()
        _send(node, 101, 200)
        primary.kill()
        node.kill_workers()
        standby.start()
        promote(standby)
        node.connect_to(standby.conninfo())
        node.execute("INSERT INTO t SELECT g, 'another 101' FROM generate_series(101, 5000) g")
        entries = len(node.read().entries)
        worker = node.start(log="second")
        node.wait(lambda: node.state()[0] == "diverged", what=node.log("second"))
        assert "timeline 2 left timeline 1 at" in node.state()[1]["last_error"]
        assert "targets hold changes this server lost" in node.state()[1]["last_error"]
        assert len(node.read().entries) == entries
        node.stop(worker)
        assert _ids(node) == list(range(1, 201))
