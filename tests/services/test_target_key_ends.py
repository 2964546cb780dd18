"""A target's key ends while the source runs: what it acknowledged counts as far as its next key signs."""

from __future__ import annotations

import json

from tests.services.conftest import NewSource
from tests.services.producer_node import CHAIN, PeerNode, SourceNode
from tests.services.test_producer_targets import acknowledged, said
from vsql_shared import names
from vsql_shared.audit.chain import EMPTY_HEAD, ChainHead, ChainReader, ChainWriter, new_incarnation
from vsql_shared.audit.entries import SIGNING_KEY_ENDED, ZERO_HASH, canonical_json
from vsql_shared.audit.key_ends import REVOKED, KeyEnd
from vsql_shared.crypto.signing import End, PinnedKey, Signer, TrustStore, generate_signing_key, load_signer
from vsql_shared.pg import nodes, signers
from vsql_shared.pg.connect import connect

ACKS = names.ack_chain(CHAIN, "node-b")


def next_key(node: SourceNode, target: PeerNode) -> Signer:
    """The target's next key."""
    folder = node.folder / "next"
    folder.mkdir()
    private, _ = generate_signing_key(folder)
    return load_signer(private, target.name)


def end_here(node: SourceNode, old: Signer, new: Signer) -> None:
    """What the source's operator does: revoke the old key, pin the next one."""
    with connect(node.conninfo, application_name="operator") as conn:
        signers.revoke(conn, old.fingerprint, "stolen")
        nodes.pin(conn, "node-b", new.public_key)


def go_on(node: SourceNode, target: PeerNode, old: Signer, new: Signer, head: ChainHead) -> ChainHead:
    """The target's next key opens its chain behind `head` and says that the old one ended there."""
    writer = ChainWriter(new, node.cluster, ACKS, head, new_incarnation())
    opened = writer.open_epoch(lsn=1, system_identifier="1", timeline=1, source_node_id="node-a")
    (detail,) = KeyEnd(old.fingerprint, REVOKED, {ACKS: End(head.sequence, head.entry_hash)}).as_details()
    told = writer.prepare(
        event_type=SIGNING_KEY_ENDED,
        source_node_id="node-a",
        target_node_id="node-b",
        batch_lsn_start=1,
        batch_lsn_end=1,
        detail=canonical_json(detail),
    )
    for one in (opened, told):
        entry = one.entry
        key = names.audit_key(entry.chain, entry.epoch, entry.incarnation, entry.sequence)
        target.send((key, one.encoded))
    return writer.tip


def counted(node: SourceNode) -> tuple[int, bool]:
    rows = node.query("SELECT acked_sequence, held FROM vsql_sync.counted_targets")
    return rows[0][0], rows[0][1]


def head_of(node: SourceNode, key: Signer) -> ChainHead:
    """The target's chain as the old key wrote it."""
    trust = TrustStore([PinnedKey("node-b", key.public_key, key.fingerprint, revoked=False)])
    reader = ChainReader(node.cluster, ACKS, "node-b", trust)
    for record in node.records():
        if record.topic == names.audit_topic(node.cluster) and record.value is not None:
            reader.accept(record.value, "x")
    return reader.head


def test_acknowledgements_count_again_once_the_next_key_says_where_the_old_one_ended(
    new_source: NewSource,
) -> None:
    node, target, worker, acked = acknowledged(new_source)
    old = target.signer
    new = next_key(node, target)
    assert counted(node) == (acked, False)
    # Unseen by the source when it ends the key: genuine, and not counted yet.
    node.execute("INSERT INTO t VALUES (2, 'b')")
    node.wait_confirmed()
    node.stop(worker)  # one that runs looks at the keys every few seconds
    end_here(node, old, new)
    target.acknowledge(CHAIN)
    worker = node.start(log="second")
    node.wait(lambda: bool(said(node).get("passed_over")))
    assert counted(node) == (0, True)
    head = go_on(node, target, old, new, head_of(node, old))
    last = node.read().manifests[-1].sequence
    node.wait(lambda: counted(node) == (last, False), what="the end is not heard")
    assert said(node)["mismatch"] is None
    # With the stolen key, behind the end: nothing.
    thief = ChainWriter(old, node.cluster, ACKS, head, new_incarnation())
    forged = thief.open_epoch(lsn=1, system_identifier="1", timeline=1, source_node_id="node-a")
    target.send((b"forged", forged.encoded))
    target.go_on(CHAIN, new, head)
    node.execute("INSERT INTO t VALUES (3, 'c')")
    node.wait_confirmed()
    target.acknowledge(CHAIN)
    last = node.read().manifests[-1].sequence
    node.wait(lambda: counted(node) == (last, False))
    assert said(node)["mismatch"] is None
    node.stop(worker)


def test_what_a_thief_acknowledged_before_the_end_was_known_is_taken_back(new_source: NewSource) -> None:
    node, target, worker, acked = acknowledged(new_source)
    old = target.signer
    true = head_of(node, old)
    node.execute("INSERT INTO t VALUES (2, 'never applied there')")
    node.wait_confirmed()
    target.acknowledge(CHAIN)  # by the thief: the key is right, and nobody knows
    lied = node.read().manifests[-1].sequence
    node.wait(lambda: said(node).get("acked_sequence") == lied)
    new = next_key(node, target)
    end_here(node, old, new)
    assert counted(node) == (0, True)
    go_on(node, target, old, new, true)
    node.wait(lambda: counted(node) == (acked, False), what="what the thief said still counts")
    assert said(node)["mismatch"] is None
    node.stop(worker)
    node.start(log="second")
    node.wait(lambda: said(node).get("acked_sequence") == acked)
    node.kill_workers()
    assert counted(node) == (acked, False)


def test_a_word_that_covers_nothing_leaves_nothing_acknowledged(new_source: NewSource) -> None:
    """The next key says the old one never signed there: its acknowledgements are nobody's."""
    node, target, worker, _ = acknowledged(new_source)
    old, new = target.signer, next_key(node, target)
    end_here(node, old, new)
    writer = ChainWriter(new, node.cluster, ACKS, EMPTY_HEAD, new_incarnation())
    opened = writer.open_epoch(lsn=1, system_identifier="1", timeline=1, source_node_id="node-a")
    (detail,) = KeyEnd(old.fingerprint, REVOKED, {ACKS: End(0, ZERO_HASH)}).as_details()
    assert json.loads(canonical_json(detail))["ends"]
    told = writer.prepare(
        event_type=SIGNING_KEY_ENDED, source_node_id="node-a", target_node_id="node-b",
        batch_lsn_start=1, batch_lsn_end=1, detail=canonical_json(detail),
    )  # fmt: skip
    # Something of the target that the source cannot place goes before it.
    target.send((b"1", opened.encoded), (b"x", b"garbage"), (b"2", told.encoded))
    node.wait(lambda: counted(node) == (0, False), what="the end is not heard")
    node.stop(worker)
