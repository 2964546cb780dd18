"""What targets acknowledge is held against our own manifests, and shown; a lie is marked and stays marked."""

from __future__ import annotations

from typing import Any

from tests.services.conftest import NewSource
from tests.services.producer_node import CHAIN, PeerNode, SourceNode

TABLE = "CREATE TABLE t (id bigint PRIMARY KEY, note text)"
QUICK = "[limits]\nbatch_linger_ms = 1\nstatus_interval_ms = 100\ncommand_poll_ms = 100\n"


def said(node: SourceNode) -> dict[str, Any]:
    """What the status says of the target."""
    found: dict[str, Any] = node.state()[1].get("targets", {}).get("node-b", {})
    return found


def with_target(new_source: NewSource) -> tuple[SourceNode, PeerNode]:
    """A source whose live stream has one target."""
    node = new_source(TABLE, ["t"], config=QUICK)
    node.execute(f"INSERT INTO vsql_sync.stream_targets (chain, target) VALUES ('{CHAIN}', 'node-b')")
    return node, PeerNode(node, "node-b")


def test_acknowledgements_move_the_target_forward_across_restarts(new_source: NewSource) -> None:
    node, target = with_target(new_source)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.execute("INSERT INTO t VALUES (1, 'a')")
    node.wait_confirmed()
    last = node.read().manifests[-1].sequence
    node.wait(lambda: said(node).get("lag_batches") == last)
    target.acknowledge(CHAIN)
    node.wait(lambda: said(node).get("acked_sequence") == last)
    node.stop(worker)
    worker = node.start(log="second")
    node.execute("INSERT INTO t VALUES (2, 'b')")
    node.wait_confirmed()
    target.acknowledge(CHAIN)
    last = node.read().manifests[-1].sequence
    node.wait(lambda: said(node).get("acked_sequence") == last)
    assert said(node) == {"acked_sequence": last, "lag_batches": 0, "mismatch": None}
    node.stop(worker)


def test_a_root_that_differs_is_said_loudly_and_stays(new_source: NewSource) -> None:
    node, target = with_target(new_source)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    for number in range(3):
        node.execute(f"INSERT INTO t VALUES ({number}, 'a')")
        node.wait_confirmed()
    target.acknowledge(CHAIN, root=bytes(32))
    node.wait(lambda: bool(said(node).get("mismatch")))
    assert "computed root" in said(node)["mismatch"]
    assert '"level": "error"' in node.log()
    manifests = node.read().manifests
    assert said(node)["acked_sequence"] == manifests[-2].sequence
    node.execute("INSERT INTO t VALUES (9, 'the stream itself goes on')")
    node.wait_confirmed()
    target.acknowledge(CHAIN)
    node.stop(worker)
    stored = node.query("SELECT acked_sequence, mismatch IS NOT NULL FROM vsql_sync.stream_targets")
    assert stored == [(manifests[-2].sequence, True)]
