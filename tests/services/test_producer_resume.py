"""Whatever ends a producer, the next one goes on where the chain ends: nothing lost, nothing doubled."""

from __future__ import annotations

import signal

import pytest
from confluent_kafka import Producer

from tests.services.conftest import NewSource
from tests.services.producer_node import SourceNode
from vsql_shared import names
from vsql_shared.audit.chain import ChainWriter, new_incarnation
from vsql_shared.audit.entries import EPOCH_OPENED
from vsql_shared.audit.store import load_head
from vsql_shared.crypto.signing import load_signer
from vsql_shared.pg.connect import connect

TABLE = "CREATE TABLE t (id bigint PRIMARY KEY, note text)"
SMALL_BATCHES = """
[limits]
batch_max_rows = 50
batch_linger_ms = 1
status_interval_ms = 100
command_poll_ms = 100
"""


def ids(node: SourceNode) -> list[int]:
    """Keys as they were read back, in order."""
    return [int.from_bytes(values[0] or b"", "big") for _, values in node.read().rows("t")]


def load(node: SourceNode, first: int, last: int) -> None:
    """Insert keys first … last in transactions of 1 to 120 rows."""
    at = first
    while at <= last:
        end = min(last, at + (at * 7) % 120)
        node.execute(f"INSERT INTO t SELECT g, repeat('x', 50) FROM generate_series({at}, {end}) g")
        at = end + 1


POINTS = [
    "producer.slot-held=kill",
    "producer.opening=kill",
    "producer.epoch-opened=kill",
    "producer.packs-acked=kill:2",
    "producer.manifest-acked=kill:3",
    "producer.audit-committed=kill:2",
    "producer.confirmed=kill:2",
]


@pytest.mark.parametrize("point", POINTS)
def test_a_producer_killed_at_any_point_is_resumed_exactly(new_source: NewSource, point: str) -> None:
    node = new_source(TABLE, ["t"], config=SMALL_BATCHES)
    first = node.start(failpoints=point)
    node.wait(lambda: first.poll() is not None or node.state()[0] == "running")
    if first.poll() is None:
        load(node, 1, 1500)
        node.wait(lambda: first.poll() is not None, what="the failpoint was not reached")
    assert first.returncode == -9
    before = ids(node)
    assert before == list(range(1, len(before) + 1))
    second = node.start(log="second")
    node.wait(lambda: node.state()[0] == "running", what=node.log("second"))
    load(node, 1501, 2000)
    if not node.query("SELECT 1 FROM t WHERE id = 1"):
        load(node, 1, 1500)
    node.wait_confirmed()
    node.stop(second)
    back = ids(node)
    assert sorted(back) == list(range(1, 2001))
    assert len(back) == 2000
    stored = node.query("SELECT count(*) FROM vsql_sync.vsql_sync_audit WHERE chain = %s", node.chain)
    assert stored[0][0] == len(node.read().entries)


def test_rule_1_a_late_manifest_of_a_replaced_process_is_void_and_its_rows_are_sent_again(
    new_source: NewSource,
) -> None:
    node = new_source(TABLE, ["t"], config=SMALL_BATCHES)
    # A falls asleep with the packs of its second batch in Kafka, and their manifest not yet sent; and again
    # with the manifest handed to the client, which must reach Kafka before A finds its session gone.
    points = "producer.packs-acked=sleep:5000:2,producer.manifest-sent=sleep:2000:2"
    old = node.start(failpoints=points, log="old")
    node.wait(lambda: node.state()[0] == "running", what=node.log("old"))
    node.execute("INSERT INTO t VALUES (1, 'a')")
    node.wait_confirmed()
    node.execute("INSERT INTO t VALUES (2, 'late')")
    node.wait(lambda: '"failpoint"' in node.log("old"), what="A did not fall asleep")
    old.send_signal(signal.SIGSTOP)  # it must not wake up before B is at work, however slow the machine
    node.cut_off()
    new = node.start()
    node.wait(lambda: len(node.read().entries) >= 3, what="B opened no epoch")
    node.execute("INSERT INTO t VALUES (3, 'b')")
    old.send_signal(signal.SIGCONT)
    node.wait(lambda: node.read().void > 0, what="A's manifest never came")
    node.wait_confirmed()
    # A has learnt that it was replaced, and waits for B's lock.
    node.wait(lambda: "already has a producer" in node.log("old"), what=node.log("old"))
    node.stop(new)
    node.stop(old)
    assert ids(node) == [1, 2, 3]


def test_rule_2_of_two_openers_the_first_valid_entry_wins_and_nothing_is_lost(new_source: NewSource) -> None:
    node = new_source(TABLE, ["t"], config=SMALL_BATCHES)
    # A has read the chain and signed its opening entry, and sends it only when B has long been at work.
    old = node.start(failpoints="producer.opening=sleep:5000:1", log="old")
    node.wait(lambda: '"failpoint"' in node.log("old"), what="A did not fall asleep")
    old.send_signal(signal.SIGSTOP)
    node.cut_off()
    new = node.start()
    node.wait(lambda: node.state()[0] == "running")
    for number in range(1, 6):
        node.execute(f"INSERT INTO t VALUES ({number}, 'b')")
    node.wait_confirmed()
    old.send_signal(signal.SIGCONT)
    node.wait(lambda: node.read().void > 0, what="A's entry never came")
    node.execute("INSERT INTO t VALUES (6, 'b')")
    node.wait_confirmed()
    node.stop(new)
    node.stop(old)
    assert ids(node) == [1, 2, 3, 4, 5, 6]


def test_an_epoch_opened_by_a_process_that_lost_its_slot_fences_us_off_before_we_confirm(
    new_source: NewSource,
) -> None:
    """A wakes up and appends an opening that *is* valid: B's later entries are void, and B must notice."""
    node = new_source(TABLE, ["t"], config=SMALL_BATCHES)
    worker = node.start(failpoints="producer.manifest-acked=sleep:3000:2")
    node.wait(lambda: node.state()[0] == "running")
    node.execute("INSERT INTO t VALUES (1, 'a')")
    node.wait_confirmed()
    append_opening(node)
    node.execute("INSERT INTO t VALUES (2, 'sent in an epoch that is over')")
    node.wait_confirmed()
    node.stop(worker)
    assert "another process opened epoch" in node.log()
    back = node.read()
    assert back.void > 0
    assert [entry.event_type for entry in back.entries].count(EPOCH_OPENED) == 3
    assert ids(node) == [1, 2]


def append_opening(node: SourceNode) -> None:
    """Append a valid `epoch_opened` with the node's own key, as a stopped process of it would."""
    path = node.settings.audit.signing_key_path
    assert path is not None
    with connect(node.conninfo, application_name="test") as conn:
        head = load_head(conn, node.chain)
    writer = ChainWriter(load_signer(path, "node-a"), node.cluster, node.chain, head, new_incarnation())
    made = writer.open_epoch(
        lsn=head.lsn_end, system_identifier=head.system_identifier, timeline=head.timeline
    )
    entry = made.entry
    producer = Producer({"bootstrap.servers": node.kafka, "enable.idempotence": True})
    key = names.audit_key(entry.chain, entry.epoch, entry.incarnation, entry.sequence)
    producer.produce(names.audit_topic(node.cluster), made.encoded, key=key, partition=0)
    assert producer.flush(20) == 0


def test_garbage_and_forged_entries_on_the_audit_topic_do_not_stop_a_producer(new_source: NewSource) -> None:
    node = new_source(TABLE, ["t"], config=SMALL_BATCHES)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    producer = Producer({"bootstrap.servers": node.kafka})
    producer.produce(names.audit_topic(node.cluster), b"garbage", key=b"x", partition=0)
    assert producer.flush(20) == 0
    node.execute("INSERT INTO t VALUES (1, 'a')")
    node.wait_confirmed()
    node.stop(worker)
    worker = node.start(log="second")
    node.execute("INSERT INTO t VALUES (2, 'b')")
    node.wait_confirmed()
    node.stop(worker)


def test_a_slot_that_was_dropped_is_a_gap_and_not_made_anew(new_source: NewSource) -> None:
    node = new_source(TABLE, ["t"], config=SMALL_BATCHES)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.stop(worker)
    node.query("SELECT pg_drop_replication_slot(%s)::text", node.slot)
    worker = node.start(log="second")
    node.wait(lambda: node.state()[0] == "diverged", what=node.log("second"))
    assert "is gone" in node.state()[1]["last_error"]
    assert node.query("SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s", node.slot) == [(0,)]
    node.stop(worker)


def test_a_second_worker_of_a_stream_is_told_who_has_it(new_source: NewSource) -> None:
    node = new_source(TABLE, ["t"], config=SMALL_BATCHES)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    second = node.start(log="second")
    node.wait(lambda: "holds its lock" in node.log("second"), what=node.log("second"))
    assert f"vsql-sync producer {node.chain}" in node.log("second")
    node.stop(second)
    node.stop(worker)
