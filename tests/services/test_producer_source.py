"""Rule 6: a source whose positions mean something else now is noticed; nothing is sent, nothing skipped."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.services.conftest import NewSource
from tests.services.producer_node import SourceNode
from tests.stack import PostgresServer, Stack

TABLE = "CREATE TABLE t (id bigint PRIMARY KEY, note text)"


def _backup(server: PostgresServer) -> None:
    """An older state of the whole server, as a snapshot of its disk would be."""
    server.stop("fast")
    subprocess.run(["cp", "-a", server.data_dir, f"{server.data_dir}-old"], check=True)
    server.start()


def _restore(server: PostgresServer) -> None:
    server.stop("fast")
    shutil.rmtree(server.data_dir)
    subprocess.run(["cp", "-a", f"{server.data_dir}-old", server.data_dir], check=True)
    server.start()


def _sent(node: SourceNode, first: int, last: int) -> None:
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.execute(f"INSERT INTO t SELECT g, repeat('x', 200) FROM generate_series({first}, {last}) g")
    node.wait_confirmed()
    node.stop(worker)


def _set_back(new_source: NewSource, stack: Stack, last: int) -> SourceNode:
    """A source that has sent rows up to `last`, restored from when it had sent 10."""
    server = stack.own_postgres(18)
    node = new_source(TABLE, ["t"], conninfo=server.conninfo("postgres"))
    _sent(node, 1, 10)
    _backup(server)
    _sent(node, 11, last)
    _restore(server)
    return node


@pytest.mark.parametrize("more", [0, 5000], ids=["at once", "after its WAL went past the old end"])
@pytest.mark.timeout(180)
def test_rule_6_a_source_restored_from_an_older_state_is_diverged(
    new_source: NewSource, stack: Stack, more: int
) -> None:
    node = _set_back(new_source, stack, 200)
    entries = len(node.read().manifests)
    if more:
        node.execute(f"INSERT INTO t SELECT g, repeat('y', 200) FROM generate_series(1000, {1000 + more}) g")
    node.start()
    node.wait(lambda: node.state()[0] == "diverged", what="the restored source was not noticed")
    assert "older state" in node.state()[1]["last_error"]
    assert node.query("SELECT state FROM vsql_sync.streams WHERE direction = 'out'") == [("DIVERGED",)]
    assert len(node.read().manifests) == entries


@pytest.mark.timeout(180)
def test_rule_6_a_restored_source_is_diverged_although_only_others_wal_goes_past_the_old_end(
    new_source: NewSource, stack: Stack
) -> None:
    """Confirmed, that WAL would put the slot beyond the chain's end, and a restart would see nothing."""
    node = _set_back(new_source, stack, 12)
    node.execute("INSERT INTO t VALUES (1000, 'at a position that the chain has already')")
    node.execute("SELECT pg_logical_emit_message(false, 'noise', repeat('x', 1000000))")
    node.start()
    node.wait(lambda: node.state()[0] == "diverged", what="the restored source was not noticed")
    assert "older state" in node.state()[1]["last_error"]


@pytest.mark.timeout(120)
def test_rule_7_logical_messages_are_never_control(new_source: NewSource) -> None:
    node = new_source(TABLE, ["t"])
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.execute("INSERT INTO t VALUES (1, 'before')")
    for prefix in ("vsql_sync", "vsql_sync.ddl", "pgoutput"):
        node.execute(f"SELECT pg_logical_emit_message(true, '{prefix}', 'DROP TABLE t')")
        node.execute(f"SELECT pg_logical_emit_message(false, '{prefix}', 'DROP TABLE t')")
    node.execute("INSERT INTO t VALUES (2, 'after')")
    node.wait_confirmed()
    node.stop(worker)
    read = node.read()
    assert len(read.rows("t")) == 2
    assert sum(manifest.row_count for manifest in read.manifests) == 2
