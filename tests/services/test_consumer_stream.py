"""The consumer against real servers: end to end, killed where progress becomes durable, refusing, going on.

Node A's producer only feeds it; what is looked at is node B.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from confluent_kafka import Producer

from tests.nodes import TwoNodes
from tests.pairs import Pairs
from tests.stack import Stack
from tests.streams import read_topics
from tests.waiting import until
from vsql_shared import names

TABLES = "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE u (id int PRIMARY KEY, n numeric(10,2));"
FAILPOINTS = (
    "consumer.before-apply-commit",
    "consumer.after-apply-commit",
    "consumer.before-ack-table",
    "consumer.after-ack-table",
    "consumer.before-ack-publish",
    "consumer.after-ack-publish",
    "consumer.before-offset-commit",
)


@pytest.fixture
def pair(stack: Stack, tmp_path: Path) -> Iterator[TwoNodes]:
    """A pair without first copy, whose stream runs."""
    made = TwoNodes(stack, tmp_path, TABLES)
    try:
        made.create(["t(*)", "u(*)"], copy=False)
        made.a.start("producer")
        _until(
            lambda: made.a.query(
                "SELECT 1 FROM vsql_sync.streams WHERE slot_created AND state = 'SYNCHRONIZED'"
            )
        )
        yield made
        made.stop()
    finally:
        made.end()


_until = partial(until, timeout=45)


def _refusal(pair: TwoNodes) -> dict[str, Any]:
    def look() -> Any:
        rows = pair.b.query(
            "SELECT detail->'refused' FROM vsql_sync.stream_status"
            " WHERE chain = %s AND state = 'refused' AND detail ? 'refused'",
            pair.chain,
        )
        return rows and rows[0][0]

    found: dict[str, Any] = _until(look)
    return found


def _acks(pair: TwoNodes) -> list[tuple[Any, ...]]:
    return pair.b.query(
        "SELECT event_type, row_count, batch FROM vsql_sync.vsql_sync_audit"
        " WHERE chain = %s AND batch > 0 ORDER BY sequence",
        names.ack_chain(pair.chain, "node-b"),
    )


def _append(pair: TwoNodes, topic: str, value: bytes) -> None:
    producer = Producer({"bootstrap.servers": pair.a.kafka})
    producer.produce(topic, value, partition=0)
    assert producer.flush(20) == 0


def _topic(pair: TwoNodes, table: str) -> str:
    return names.data_topic(pair.cluster, pair.chain, "public", table)


@pytest.mark.timeout(180)
def test_changes_arrive_are_acknowledged_and_shown_by_tail(pair: TwoNodes) -> None:
    pair.b.start("consumer")
    pair.a.execute(
        "INSERT INTO t SELECT g, 'v' || g FROM generate_series(1, 300) g; INSERT INTO u VALUES (1, 1.5)"
    )
    pair.a.execute("UPDATE t SET v = v || '!' WHERE id <= 10; DELETE FROM u; DELETE FROM t WHERE id = 300")
    pair.wait_in_step()
    assert pair.differences() == []
    acknowledged = _acks(pair)
    assert {event for event, _, _ in acknowledged} == {"batch_applied"}
    assert sum(rows for _, rows, _ in acknowledged) == pair.audited_rows() == 313
    # The producer found the same roots and verdicts in Kafka as the table here has.
    _until(
        lambda: pair.a.query(
            "SELECT 1 FROM vsql_sync.stream_targets WHERE acked_sequence > 0 AND mismatch IS NULL"
        )
    )
    lines = pair.b.ctl("tail", pair.chain, "--from-start", "--limit", "313").stdout.splitlines()
    changes = [json.loads(line) for line in lines]
    assert changes[0]["new"] == {"id": 1, "v": "v1"}
    assert [change["op"] for change in changes].count("update") == 10
    assert changes[-1] | {"xid": 0, "lsn": "", "commit_time": "", "sequence": 0} == {
        "table": "public.t", "op": "delete", "key": {"id": 300}, "xid": 0, "lsn": "", "commit_time": "",
        "sequence": 0,
    }  # fmt: skip


@pytest.mark.timeout(180)
@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_killed_where_progress_becomes_durable_nothing_is_lost_or_doubled(
    pair: TwoNodes, failpoint: str
) -> None:
    pair.b.execute("CREATE TABLE seen (id int)")
    env = {"VSQL_SYNC_ALLOW_FAILPOINTS": "1", "VSQL_SYNC_FAILPOINTS": f"{failpoint}=kill:2"}
    pair.b.start("consumer", env)
    for n in range(6):
        pair.a.execute(f"INSERT INTO t SELECT {n} * 100 + g, 'x' FROM generate_series(1, 50) g")
        time.sleep(0.3)
    # Wherever batches were merged: one more until the failpoint was passed for the second time.
    for n in range(6, 60):
        if '"code": -9' in pair.b.tail("consumer", 200):
            break
        pair.a.execute(f"INSERT INTO t SELECT {n} * 100 + g, 'x' FROM generate_series(1, 50) g")
        time.sleep(0.5)
    assert '"code": -9' in pair.b.tail("consumer", 200)
    pair.b.stop("consumer")
    pair.b.start("consumer")
    pair.a.execute("UPDATE t SET v = 'y' WHERE id % 100 = 1")
    pair.wait_in_step()
    assert pair.differences() == []
    assert pair.b.query("SELECT coalesce(sum(count), 0) FROM vsql_sync.anomalies") == [(0,)]
    acknowledged = _until(
        lambda: (found := _acks(pair))[-1:] and sum(f[1] for f in found) == pair.audited_rows() and found
    )
    batches = [batch for _, _, batch in acknowledged]
    assert batches == list(range(1, len(batches) + 1))
    # Kafka has each entry of the table, in order, once.
    in_kafka = [r.key for r in read_topics(pair.a.kafka, pair.cluster) if r.key and b".ack.node-b/" in r.key]
    in_table = pair.b.query(
        "SELECT epoch, incarnation, sequence FROM vsql_sync.vsql_sync_audit"
        " WHERE chain = %s ORDER BY sequence",
        names.ack_chain(pair.chain, "node-b"),
    )
    ack_chain = names.ack_chain(pair.chain, "node-b")
    assert in_kafka == [names.audit_key(ack_chain, e, i.bytes, s) for e, i, s in in_table]


@pytest.mark.timeout(180)
def test_a_forged_record_stops_the_stream_until_an_operator_has_it_ignored(pair: TwoNodes) -> None:
    pair.b.start("consumer")
    pair.a.execute("INSERT INTO t VALUES (1, 'a')")
    pair.wait_in_step()
    _append(pair, _topic(pair, "t"), b"no pack at all")
    pair.a.execute("INSERT INTO t VALUES (2, 'b')")
    refused = _refusal(pair)
    assert refused["record"] == f"{_topic(pair, 't')}/0/1"
    assert pair.b.query("SELECT id FROM t") == [(1,)]
    signed = pair.b.query("SELECT count(*) FROM vsql_sync.vsql_sync_audit WHERE event_type = 'batch_refused'")
    assert signed == [(1,)]
    pair.b.ctl(
        "stream", "ignore-record", "--chain", pair.chain, "--record", refused["record"], "--reason", "forged",
        "--yes",
    )  # fmt: skip
    pair.wait_in_step()
    assert pair.differences() == []
    # Decided once is decided: a restart reads the record again and passes it over again.
    pair.b.stop("consumer")
    pair.a.execute("INSERT INTO t VALUES (3, 'c')")
    pair.b.start("consumer")
    pair.wait_in_step()
    assert pair.differences() == []


@pytest.mark.timeout(180)
def test_a_replayed_pack_stops_the_stream_and_ignoring_it_loses_nothing(pair: TwoNodes) -> None:
    pair.b.start("consumer")
    pair.a.execute("INSERT INTO t VALUES (1, 'a')")
    pair.wait_in_step()
    pair.b.stop("consumer")
    pair.a.execute("INSERT INTO t VALUES (2, 'lost'); INSERT INTO u VALUES (2, 2)")
    head = _until(lambda: pair.heads()[0] > pair.heads()[1] and pair.heads()[0])
    pack = [r for r in read_topics(pair.a.kafka, pair.cluster) if r.topic == _topic(pair, "t")][-1]
    # The same pack again, before anything of the next batch: replayed, so everything after it waits.
    _append(pair, _topic(pair, "t"), pack.value or b"")
    pair.b.start("consumer")
    refused = _refusal(pair)
    assert refused["record"].startswith(_topic(pair, "t"))
    pair.b.ctl(
        "stream", "ignore-record", "--chain", pair.chain, "--record", refused["record"],
        "--reason", "replayed", "--yes",
    )  # fmt: skip
    pair.wait_in_step()
    assert pair.heads()[1] >= head
    assert pair.differences() == []


@pytest.mark.timeout(180)
def test_a_batch_an_operator_skips_leaves_a_signed_gap_and_marked_tables(pair: TwoNodes) -> None:
    pair.b.start("consumer")
    pair.a.execute("INSERT INTO t VALUES (1, 'a')")
    pair.wait_in_step()
    sequence = pair.heads()[1] + 1
    pair.b.ctl(
        "stream",
        "skip-batch",
        "--chain",
        pair.chain,
        "--sequence",
        str(sequence),
        "--reason",
        "known bad",
        "--yes",
    )
    # A decision is read when the stream begins; the retry that comes with it is answered by a running one.
    pair.b.stop("consumer")
    pair.b.start("consumer")
    pair.a.execute("INSERT INTO t VALUES (2, 'skipped')")
    _until(lambda: pair.heads()[0] >= sequence)  # a batch of its own
    pair.a.execute("INSERT INTO u VALUES (3, 3)")
    _until(lambda: pair.b.query("SELECT 1 FROM u WHERE id = 3"))
    assert pair.b.query("SELECT id FROM t ORDER BY id") == [(1,)]
    skipped = [row for row in _acks(pair) if row[0] == "batch_skipped"]
    assert len(skipped) == 1
    marked = pair.b.query("SELECT table_name, state FROM vsql_sync.table_sync WHERE state = 'DIVERGED'")
    assert ("t", "DIVERGED") in marked
    assert pair.b.query("SELECT count(*) FROM vsql_sync.decisions WHERE honoured_at IS NULL") == [(0,)]


@pytest.mark.timeout(180)
def test_pause_holds_the_stream_and_resume_loses_nothing(pair: TwoNodes) -> None:
    pair.b.start("consumer")
    pair.a.execute("INSERT INTO t VALUES (1, 'a')")
    pair.wait_in_step()
    pair.b.ctl("pause", "--reason", "incident")
    _until(lambda: pair.b.query("SELECT 1 FROM vsql_sync.stream_status WHERE state = 'paused'"))
    pair.a.execute("INSERT INTO t VALUES (2, 'b')")
    time.sleep(1.5)
    assert pair.b.query("SELECT id FROM t") == [(1,)]
    pair.b.ctl("resume")
    pair.wait_in_step()
    assert pair.differences() == []


@pytest.mark.timeout(180)
def test_a_second_worker_of_a_stream_is_refused_and_told_who_holds_it(pair: TwoNodes) -> None:
    import subprocess
    import sys

    pair.b.start("consumer")
    pair.a.execute("INSERT INTO t VALUES (1, 'a')")
    pair.wait_in_step()
    second = subprocess.run(
        [sys.executable, "-m", "vsql_consumers", "--config", str(pair.b.config), "--chain", pair.chain],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert second.returncode == 4
    assert f"vsql-sync consumer {pair.chain}" in second.stderr


@pytest.mark.timeout(180)
def test_a_key_that_is_revoked_stops_the_stream_at_once(pair: TwoNodes) -> None:
    pair.b.start("consumer")
    pair.a.execute("INSERT INTO t VALUES (1, 'a')")
    pair.wait_in_step()
    pair.b.query("UPDATE vsql_sync.signers SET revoked_at = now() WHERE node_name = 'node-a'")
    time.sleep(2)
    pair.a.execute("INSERT INTO t VALUES (2, 'b')")
    assert "revoked" in _refusal(pair)["error"]
    assert pair.b.query("SELECT id FROM t") == [(1,)]


def test_a_consumer_stops_although_kafka_is_gone(stack: Stack, pairs: Pairs) -> None:
    broker = stack.own_kafka()
    pair = pairs(TABLES, kafka=broker.bootstrap_servers)
    pair.create(["t(*)", "u(*)"], copy=False)
    pair.start()
    pair.a.execute("INSERT INTO t VALUES (1, 'x')")
    pair.wait_in_step()
    # Acknowledgements under way have a longer time limit of their own.
    _until(lambda: [r for r in read_topics(pair.b.kafka, pair.cluster) if b".ack." in (r.key or b"")])
    started = pair.b.processes("consumer")
    assert len(started) > 2, "the service, its nursery and a worker"
    broker.kill()
    assert pair.b.stop("consumer", timeout=30) == 0
    gone, left = psutil.wait_procs(started, timeout=5)
    assert left == []
    assert len(gone) == len(started)
