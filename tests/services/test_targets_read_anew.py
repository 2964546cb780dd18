"""A target's key ends, and the source reads its acknowledgements anew: what counts meanwhile, and afterwards.

The source's reader of acknowledgements with a real database and a real topic, step by step and without a
worker: what commits may return for is looked at between any two steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from tests.audit_history import ACKS, CHAIN, CLUSTER, A, B, History, acknowledged, signer
from tests.conftest import NewDatabase
from tests.services.test_audit_watch_pruned import HISTORY, archive_rows, prune
from tests.stack import Stack
from vsql_producers.synchronous import quorum_sequence
from vsql_producers.targets import Targets
from vsql_shared.audit.chain import ChainHead, Prepared
from vsql_shared.audit.entries import BATCH_SKIPPED, SIGNING_KEY_ENDED, canonical_json
from vsql_shared.audit.key_ends import REVOKED, KeyEnd
from vsql_shared.audit.store import insert_entries
from vsql_shared.crypto.signing import End, Signer
from vsql_shared.names import ack_chain
from vsql_shared.pg import key_ends, nodes, signers
from vsql_shared.pg.connect import Connection, connect

NEXT_B, C = signer("node-b", "next"), signer("node-c")
OTHER = "invoices.node-a"
STREAM = (
    "INSERT INTO vsql_sync.streams (chain, direction, publication, origin)"
    " VALUES (%s, 'out', split_part(%s, '.', 1), 'node-a')"
)


class Source:
    """Node A's database and the audit topic, with readers of what its targets acknowledge."""

    def __init__(self, conn: Connection, kafka: str, topic: str, closing: ExitStack) -> None:
        self.conn, self._kafka, self._topic, self._closing = conn, kafka, topic, closing
        admin = AdminClient({"bootstrap.servers": kafka})
        admin.create_topics([NewTopic(topic, num_partitions=1, replication_factor=1)])[topic].result(20)
        self._laid = 0
        self._now = time.monotonic()
        self._consumers: dict[int, Consumer] = {}

    def stream(self, chain: str, *targets: str) -> None:
        """An outgoing stream with these targets."""
        self.conn.execute(STREAM, (chain, chain))
        for target in targets:
            self.conn.execute(
                "INSERT INTO vsql_sync.stream_targets (chain, target) VALUES (%s, %s)", (chain, target)
            )

    def lay(self, *entries: Prepared) -> None:
        """Append entries to the topic."""
        producer = Producer({"bootstrap.servers": self._kafka, "enable.idempotence": True})
        for one in entries:
            producer.produce(self._topic, one.encoded, partition=0)
        assert producer.flush(20) == 0
        self._laid += len(entries)

    def reader(self, chain: str = CHAIN) -> Targets:
        """A reader as a worker that starts has it."""
        consumer = Consumer(
            {
                "bootstrap.servers": self._kafka,
                "group.id": self._topic,
                "enable.auto.commit": False,
                "auto.offset.reset": "error",
            }
        )
        self._closing.callback(consumer.close)
        made = Targets(self.conn, consumer, CLUSTER, chain, self._topic, 0, allow_unsigned=False)
        self._consumers[id(made)] = consumer
        made.refresh()
        return made

    def settle(self, targets: Targets, check: Callable[[], None] = lambda: None) -> None:
        """Let a reader come to the end of the topic, and look at its keys; `check` between its steps."""
        consumer, quiet = self._consumers[id(targets)], 0
        deadline = time.monotonic() + 60
        while quiet < 10:
            assert time.monotonic() < deadline, "the topic is not read to its end"
            targets.verify({})
            check()
            self._now += 10  # every look is due
            targets.poll(self._now)
            check()
            (at,) = consumer.position([TopicPartition(self._topic, 0)])
            quiet = quiet + 1 if at.offset >= self._laid else 0
            time.sleep(0.02)

    def counted(self, chain: str = CHAIN, target: str = "node-b") -> tuple[int, bool]:
        """What of a target's acknowledgements anything may be forgotten for."""
        rows = self.conn.execute(
            "SELECT acked_sequence, held FROM vsql_sync.counted_targets WHERE (chain, target) = (%s, %s)",
            (chain, target),
        ).fetchall()
        return rows[0][0], rows[0][1]

    def steal(self) -> None:
        """What the source's operator does when B's key was stolen."""
        signers.revoke(self.conn, B.fingerprint, "stolen")
        nodes.pin(self.conn, "node-b", NEXT_B.public_key)


@pytest.fixture
def source(new_schema: NewDatabase, stack: Stack) -> Iterator[Source]:
    """Node A, which knows nodes B and C."""
    with ExitStack() as closing:
        conn = closing.enter_context(connect(new_schema("anew"), application_name="test"))
        nodes.register_local(conn, 1, "node-a", CLUSTER, A.public_key)
        for one in (B, C):
            nodes.pin(conn, one.node, one.public_key)
        topic = f"{stack.new_cluster_name('anew')}.audit"
        yield Source(conn, stack.kafka().bootstrap_servers, topic, closing)


def manifests(source: Source, chain: str = CHAIN) -> list[Prepared]:
    """Three of them, in the source's table."""
    history = History(chain)
    history.open()
    made = [history.batch() for _ in range(3)]
    insert_entries(source.conn, [(one, None) for one in history.documents])
    return made


def acks(chain: str, *of: Prepared, by: Signer = B, **other: object) -> History:
    """A target's chain that acknowledges these."""
    history = History(ack_chain(chain, by.node), by)
    history.open()
    for one in of:
        history.acknowledge(one, target_node_id=by.node, **other)
    return history


def word(chain: str, head: ChainHead) -> History:
    """B's next key goes on behind `head`, and says that the former one ended there."""
    history = History(chain, NEXT_B, head=head)
    history.open(77)
    (detail,) = KeyEnd(B.fingerprint, REVOKED, {chain: End(head.sequence, head.entry_hash)}).as_details()
    history.add(
        event_type=SIGNING_KEY_ENDED, batch_lsn_start=5, batch_lsn_end=5, detail=canonical_json(detail)
    )
    return history


def thief(chain: str, true: History, *of: Prepared) -> History:
    """What a thief acknowledges behind it with the stolen key."""
    history = History(chain, B, head=true.head)
    history.open()
    for one in of:
        history.acknowledge(one)
    return history


def test_commits_wait_for_a_target_while_its_acknowledgements_are_read_anew(source: Source) -> None:
    source.stream(CHAIN, "node-b", "node-c")
    made = manifests(source)
    first, last = made[0].entry.sequence, made[2].entry.sequence
    true = acks(CHAIN, made[0])
    source.lay(*true.entries, *thief(ACKS, true, *made[1:]).entries, *acks(CHAIN, *made, by=C).entries)
    targets = source.reader()
    source.settle(targets)
    assert quorum_sequence(targets.answers(), None) == last, "nobody knows yet"
    source.steal()
    spoken = word(ACKS, true.head)
    source.lay(*spoken.entries)
    seen: set[int] = set()

    def look() -> None:
        seen.add(quorum_sequence(targets.answers(), None))

    targets.refresh()
    source.settle(targets, look)
    assert {-1, first} <= seen <= {-1, 0, first}, "a commit returned that node B has not applied"
    rows = (
        "SELECT acked_sequence, synced_sequence, held FROM vsql_sync.stream_targets WHERE target = 'node-b'"
    )
    assert source.conn.execute(rows).fetchall() == [(first, first, None)]
    # What it leaves out holds it, also of what the thief had acknowledged.
    spoken.acknowledge(made[1], event_type=BATCH_SKIPPED)
    spoken.acknowledge(made[2])
    source.lay(*spoken.entries[-2:])
    source.settle(targets, look)
    assert {-1, first} <= seen <= {-1, 0, first}
    ((acked, synced, held),) = source.conn.execute(rows).fetchall()
    assert (acked, synced) == (last, first)
    assert "skipped" in held


def test_a_target_whose_acknowledgements_were_forgotten_is_still_needed(source: Source) -> None:
    """The producer ends between the two: the next one finds nothing acknowledged."""
    source.stream(CHAIN, "node-b", "node-c")
    made = manifests(source)
    source.lay(*acks(CHAIN, *made).entries, *acks(CHAIN, *made, by=C).entries)
    source.settle(source.reader())
    source.steal()
    source.conn.execute("SELECT vsql_sync.forget_acknowledgements(%s, 'node-b')", (CHAIN,))
    again = source.reader()
    seen: set[int] = set()
    source.settle(again, lambda: seen.add(quorum_sequence(again.answers(), None)))
    assert seen == {-1}


def test_what_was_let_pass_is_not_held_again(source: Source) -> None:
    source.stream(CHAIN, "node-b")
    made = manifests(source)
    true = acks(CHAIN, *made, event_type=BATCH_SKIPPED)
    source.lay(*true.entries)
    targets = source.reader()
    source.settle(targets)
    targets.forgive()
    source.steal()
    unseen = thief(ACKS, true)
    source.lay(*unseen.entries, *word(ACKS, unseen.head).entries)
    targets.refresh()
    source.settle(targets)
    assert quorum_sequence(targets.answers(), None) == made[2].entry.sequence
    held = source.conn.execute("SELECT held FROM vsql_sync.stream_targets").fetchall()
    assert held == [(None,)]


def test_another_streams_reader_releases_nothing(source: Source) -> None:
    """The word of one stream is heard by another's reader, and is known from elsewhere."""
    for chain in (CHAIN, OTHER):
        source.stream(chain, "node-b")
    made, others = manifests(source), manifests(source, OTHER)
    true, other = acks(CHAIN, made[0]), acks(OTHER, *others)
    source.lay(*true.entries, *thief(ACKS, true, *made[1:]).entries, *other.entries)
    for chain in (CHAIN, OTHER):
        source.settle(source.reader(chain))
    first = made[0].entry.sequence
    assert source.counted() == (made[2].entry.sequence, False)
    source.steal()
    spoken = word(ACKS, true.head)
    source.lay(*spoken.entries, *word(ack_chain(OTHER, "node-b"), other.head).entries)
    source.settle(source.reader(OTHER), lambda: _is(source.counted(), {(0, True)}))
    assert source.counted(OTHER) == (others[2].entry.sequence, False)
    noted = source.conn.execute("SELECT DISTINCT chain FROM vsql_sync.signed_ends").fetchall()
    assert noted == [(ack_chain(OTHER, "node-b"),)]
    document = spoken.entries[-1].encoded
    assert key_ends.note(source.conn, signers.load(source.conn), CLUSTER, "node-b", document)
    assert source.counted() == (0, True), "nobody has read there yet"
    source.settle(source.reader(), lambda: _is(source.counted(), {(0, True), (first, False)}))
    assert source.counted() == (first, False)


def _is(found: tuple[int, bool], one_of: set[tuple[int, bool]]) -> None:
    assert found in one_of


def test_a_word_that_passed_while_the_key_still_counted_here_is_found(source: Source) -> None:
    """A database administrator wrote the next key in beside the former, which an operator ended later."""
    source.stream(CHAIN, "node-b")
    made = manifests(source)
    true = acks(CHAIN, *made)
    source.conn.execute(
        "INSERT INTO vsql_sync.signers (fingerprint, node_name, public_key) VALUES (%s, 'node-b', %s)",
        (NEXT_B.fingerprint, NEXT_B.public_key),
    )
    source.lay(*true.entries, *word(ACKS, true.head).entries)
    targets = source.reader()
    source.settle(targets)
    signers.retire(source.conn, B.fingerprint, "yearly")
    assert source.counted() == (0, True)
    targets.refresh()
    source.settle(targets)
    assert source.counted() == (made[2].entry.sequence, False)


def test_a_key_that_was_ended_a_moment_ago_acknowledges_nothing(source: Source) -> None:
    """The reader's next look at keys is not due."""
    source.stream(CHAIN, "node-b")
    made = manifests(source)
    true = acks(CHAIN, made[0])
    source.lay(*true.entries)
    source.settle(source.reader())
    targets = source.reader()
    source.steal()
    stolen = thief(ACKS, true, *made[1:])
    source.lay(*stolen.entries)
    last = made[2].entry.sequence
    now, deadline = 0.0, time.monotonic() + 60
    while targets.detail(last)["node-b"]["acked_sequence"] < last:
        assert time.monotonic() < deadline
        targets.verify({})
        assert quorum_sequence(targets.answers(), None) <= made[0].entry.sequence
        targets.poll(now)  # writes down what was read; a look at the keys is not due by this clock
        now += 0.3
        if targets.detail(last)["node-b"]["passed_over"]:
            break
        time.sleep(0.02)
    assert quorum_sequence(targets.answers(), None) == -1
    acked = source.conn.execute("SELECT acked_sequence FROM vsql_sync.stream_targets").fetchall()
    assert acked == [(made[0].entry.sequence,)]


def test_what_names_manifests_that_were_pruned_is_no_mismatch(source: Source) -> None:
    """They were compared before they went; now all is read from the first acknowledgement."""
    source.stream(CHAIN, "node-b")
    archive_rows(source.conn)
    insert_entries(source.conn, [(one, None) for one in HISTORY.documents])
    true = acknowledged(HISTORY)
    source.lay(*true.entries)
    targets = source.reader()
    source.settle(targets)
    last = true.entries[-1].entry.ref_sequence
    assert source.counted() == (last, False)
    prune(source.conn)
    source.steal()
    unseen = thief(ACKS, true)  # the target's own, signed before it knew
    source.lay(*unseen.entries, *word(ACKS, unseen.head).entries)
    targets.refresh()
    source.settle(targets)
    assert source.counted() == (last, False)
    assert source.conn.execute("SELECT mismatch FROM vsql_sync.stream_targets").fetchall() == [(None,)]
