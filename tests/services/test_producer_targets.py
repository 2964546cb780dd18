"""What targets acknowledge is held against our own manifests, and shown; a lie is marked and stays marked."""

from __future__ import annotations

import subprocess
from typing import Any

import psycopg
import pytest

from tests.services.conftest import NewSource
from tests.services.producer_node import CHAIN, PeerNode, SourceNode, make_shorter
from vsql_producers.joining import uncovered
from vsql_shared import names
from vsql_shared.audit.entries import BATCH_COVERED, BATCH_SKIPPED
from vsql_shared.crypto.signing import fingerprint, generate_signing_key, load_public_key, load_signer

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


def at_work(new_source: NewSource) -> tuple[SourceNode, PeerNode, subprocess.Popen[bytes]]:
    """The same, running."""
    node, target = with_target(new_source)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    return node, target, worker


def acknowledged(new_source: NewSource) -> tuple[SourceNode, PeerNode, subprocess.Popen[bytes], int]:
    """The same, with one row sent and acknowledged; and the sequence of its manifest."""
    node, target, worker = at_work(new_source)
    node.execute("INSERT INTO t VALUES (1, 'a')")
    node.wait_confirmed()
    target.acknowledge(CHAIN)
    acked = node.read().manifests[-1].sequence
    node.wait(lambda: said(node).get("acked_sequence") == acked)
    return node, target, worker, acked


def test_acknowledgements_move_the_target_forward_across_restarts(new_source: NewSource) -> None:
    node, target, worker = at_work(new_source)
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
    assert said(node) == {"acked_sequence": last, "lag_batches": 0, "mismatch": None, "passed_over": None}
    node.stop(worker)


def test_acknowledgements_in_a_topic_made_anew_are_found_wherever_they_lie(new_source: NewSource) -> None:
    """Before the place up to which they were read in the old one, some of them were never read."""
    node, target, worker, _ = acknowledged(new_source)
    node.execute("INSERT INTO t VALUES (2, 'b')")
    node.wait_confirmed()
    node.stop(worker)
    target.begin_anew()
    target.acknowledge(CHAIN)
    topic = names.audit_topic(node.cluster)
    records = [one for one in node.records() if one.topic == topic]
    acks = [one for one in records if b".ack." in (one.key or b"")]
    assert len(acks) == 4
    make_shorter(node, topic, [*acks, *(one for one in records if one not in acks)])
    worker = node.start(log="second")
    last = node.read().manifests[-1].sequence
    node.wait(lambda: said(node).get("acked_sequence") == last)
    assert said(node)["mismatch"] is None
    node.execute("INSERT INTO t VALUES (3, 'c')")
    node.wait_confirmed()
    target.acknowledge(CHAIN)
    last = node.read().manifests[-1].sequence
    node.wait(lambda: said(node).get("acked_sequence") == last)
    node.stop(worker)


def test_a_root_that_differs_is_said_loudly_and_stays(new_source: NewSource) -> None:
    node, target, worker = at_work(new_source)
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


def test_what_a_target_did_not_sign_is_passed_over_and_marks_nothing(new_source: NewSource) -> None:
    node, target, worker, _ = acknowledged(new_source)
    for forged in (b"", b"no entry", b"x" * 100_000, forge(node, target)):
        target.send((b"", forged))
    node.wait(lambda: bool(said(node).get("passed_over")))
    assert said(node)["mismatch"] is None
    assert node.log().count("passed over a record") == 1
    node.execute("INSERT INTO t VALUES (2, 'b')")
    node.wait_confirmed()
    target.acknowledge(CHAIN)
    last = node.state()[1]["sequence"]
    node.wait(lambda: said(node).get("acked_sequence") == last)
    assert said(node) == {"acked_sequence": last, "lag_batches": 0, "mismatch": None, "passed_over": None}
    node.stop(worker)


def forge(node: SourceNode, target: PeerNode) -> bytes:
    """An acknowledgement in the target's name by a key that is nobody's."""
    folder = node.folder / "thief"
    folder.mkdir()
    private, _ = generate_signing_key(folder)
    return target.prepare_next(CHAIN, load_signer(private, target.name))


@pytest.mark.parametrize("follows", [False, True])
def test_acknowledgements_by_a_key_that_is_pinned_later_count_then(
    new_source: NewSource, follows: bool
) -> None:
    """With `follows` the target goes on before the source looks at its pins again: a gap."""
    node, target, worker, _ = acknowledged(new_source)
    folder = node.folder / "next"
    folder.mkdir()
    private, public = generate_signing_key(folder)
    target.sign_with(load_signer(private, target.name))
    node.execute("INSERT INTO t VALUES (2, 'b')")
    node.wait_confirmed()
    target.acknowledge(CHAIN)
    node.wait(lambda: bool(said(node).get("passed_over")))
    raw = load_public_key(public)
    pin = f"INSERT INTO vsql_sync.signers (fingerprint, node_name, public_key) VALUES ('{fingerprint(raw)}', "
    node.execute(pin + f"'{target.name}', '\\x{raw.hex()}')")
    if follows:
        node.execute("INSERT INTO t VALUES (3, 'c')")
        node.wait_confirmed()
        target.acknowledge(CHAIN)
    last = node.read().manifests[-1].sequence
    node.wait(lambda: said(node).get("acked_sequence") == last)
    assert said(node) == {"acked_sequence": last, "lag_batches": 0, "mismatch": None, "passed_over": None}
    node.stop(worker)


def test_an_entry_that_is_missing_marks_the_target_whatever_was_forged_before(new_source: NewSource) -> None:
    node, target, worker, acked = acknowledged(new_source)
    target.send((b"", b"no entry"))
    for number in (2, 3):
        node.execute(f"INSERT INTO t VALUES ({number}, 'b')")
        node.wait_confirmed()
        target.acknowledge(CHAIN, lose=number == 2)
    node.wait(lambda: bool(said(node).get("mismatch")))
    assert "gap: expected sequence" in said(node)["mismatch"]
    assert said(node)["acked_sequence"] == acked
    node.stop(worker)


def test_a_batch_is_covered_by_a_finished_copy_only(new_source: NewSource) -> None:
    """Until its end is in our table nothing is concluded: Kafka may have had it before."""
    node, target, worker = at_work(new_source)
    node.execute("INSERT INTO t VALUES (1, 'a')")
    node.wait_confirmed()
    target.acknowledge(CHAIN, event=BATCH_COVERED)
    last = node.read().manifests[-1].sequence
    with psycopg.connect(node.conninfo) as conn:
        asked = (conn, CHAIN, "node-b", 0, last)
        assert uncovered(*asked) is None
    assert said(node)["acked_sequence"] == 0
    assert said(node)["mismatch"] is None
    node.stop(worker)


def test_what_the_first_copy_left_out_is_not_applied_by_being_covered(new_source: NewSource) -> None:
    node = new_source(f"{TABLE}; INSERT INTO t VALUES (1, 'a')", ["t"], config=QUICK)
    target = PeerNode(node, "node-b")
    copy = node.add_copy()
    live = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.execute("INSERT INTO t VALUES (2, 'b')")
    node.wait_confirmed()
    copying = node.start(copy, log="copy")
    ended = "SELECT 1 FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND event_type = 'copy_finished'"
    node.wait(lambda: bool(node.query(ended, copy)), what=node.log("copy"))
    target.acknowledge(CHAIN, event=BATCH_COVERED)
    target.acknowledge(copy, event=BATCH_SKIPPED)
    last = node.read().manifests[-1].sequence
    node.wait(lambda: said(node).get("acked_sequence") == last)
    stood = "SELECT synced_sequence, held FROM vsql_sync.stream_targets WHERE chain = %s"
    ((synced, held),) = node.query(stood, CHAIN)
    assert synced < last
    assert "first copy, it skipped" in held
    node.stop(copying)
    node.stop(live)
