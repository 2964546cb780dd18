"""The way back from a lost slot: the steps `syncctl status` prints, on two nodes, until both are equal."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nodes import TwoNodes
from tests.stack import Stack
from tests.topology.test_watching import Watched
from tests.waiting import until

pytestmark = [pytest.mark.topology, pytest.mark.timeout(300)]

TABLES = "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE u (id int PRIMARY KEY, v text)"
CONFIG = "[limits]\nstatus_interval_ms = 300\nretry_backoff_max_ms = 1000\nstall_alert_ms = 3000\n"


def _lose_the_slot(pair: TwoNodes) -> None:
    """With rows behind it that were never sent."""
    pair.a.stop("producer")
    slot = pair.a.query("SELECT slot_name FROM vsql_sync.streams WHERE direction = 'out' AND kind = 'live'")[
        0
    ][0]
    pair.a.query("SELECT pg_drop_replication_slot(%s)::text", slot)
    pair.a.execute("UPDATE t SET v = 'never sent' WHERE id <= 50; DELETE FROM u WHERE id > 90")
    pair.a.start("producer")
    diverged = "SELECT 1 FROM vsql_sync.streams WHERE direction = 'out' AND state = 'DIVERGED'"
    until(lambda: bool(pair.a.query(diverged)), 60)


def test_the_steps_that_status_prints_lead_back_from_a_gap(stack: Stack, tmp_path: Path) -> None:
    pair = TwoNodes(stack, tmp_path, TABLES, config=CONFIG)
    try:
        pair.a.execute("INSERT INTO t SELECT g, 'a' FROM generate_series(1, 100) g")
        pair.a.execute("INSERT INTO u SELECT g, 'a' FROM generate_series(1, 100) g")
        pair.create(["t(*)", "u(*)"])
        pair.start()
        pair.wait_in_step()
        refused = pair.a.ctl("stream", "retire", "--chain", pair.chain, "--reason", "x", "--yes", check=False)
        assert (refused.returncode, "only a DIVERGED stream" in refused.stderr) == (4, True)
        _lose_the_slot(pair)
        producer = Watched(pair.a, "producer")
        until(lambda: producer.figures().get(("stalled", pair.chain)) == 1, 30)
        shown = pair.a.ctl("status").stdout
        assert f"way back: 1. `syncctl stream retire --chain {pair.chain}" in shown
        # 1. and 2.: here and on the target.
        for node in (pair.a, pair.b):
            node.ctl("stream", "retire", "--chain", pair.chain, "--reason", "slot lost, INC-7", "--yes")
        until(lambda: not producer.figures().get(("stalled", pair.chain)), 30)
        again = pair.b.ctl("stream", "retire", "--chain", pair.chain, "--reason", "x", "--yes", check=False)
        assert (again.returncode, "is ended already" in again.stderr) == (4, True)
        # 3. to 6.
        pair.b.execute("TRUNCATE t, u")
        pair.a.ctl("publication", "create", "pub2", "--table", "t(*)", "--table", "u(*)")
        pair.a.ctl(
            "node", "add-peer", "--peer-node-id", "2", "--peer-name", "node-b", "--peer-connection",
            pair.b.conninfo, "--publication", "pub2", "--yes",
        )  # fmt: skip
        for node in (pair.a, pair.b):
            node.ctl("start")
        pair.a.execute("INSERT INTO t SELECT g, 'under the new stream' FROM generate_series(101, 200) g")
        old, pair.chain = pair.chain, "pub2.node-a"
        pair.wait_in_step()
        assert pair.differences() == []
        for node, direction in ((pair.a, "out"), (pair.b, "in")):
            shown = node.ctl("status").stdout
            assert f"{old} ({direction}): retired: slot lost, INC-7" in shown
            assert "DIVERGED" not in shown
            assert node.ctl("audit", "verify").returncode == 0
            acts = "SELECT count(*) FROM vsql_sync.audit_log WHERE action = 'stream.retire'"
            assert node.query(acts) == [(1,)]
        running = "SELECT chain FROM vsql_sync.streams WHERE state <> 'FINISHED'"
        assert pair.a.query(running) == pair.b.query(running) == [("pub2.node-a",)]
        pair.stop()
    finally:
        pair.end()
