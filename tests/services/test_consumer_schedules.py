"""Schedules that break a naive consumer, forced on real servers: fences, set-back databases, full queues.

Node A's producer only feeds it; what is looked at is node B.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from confluent_kafka import Producer
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.audit_history import A, B, incarnation, manifest_fields, trust
from tests.nodes import PUBLICATION, TwoNodes
from tests.stack import Stack
from tests.streams import read_topics
from tests.waiting import until
from vsql_consumers.acknowledge import Acknowledger, Place
from vsql_consumers.source import read_chain
from vsql_shared import names
from vsql_shared.audit.chain import EMPTY_HEAD, ChainWriter
from vsql_shared.audit.dsse import SignedDocument
from vsql_shared.audit.entries import AuditEntry
from vsql_shared.audit.rows import parse
from vsql_shared.config import load_settings
from vsql_shared.kafka.clients import make_admin, make_producer
from vsql_shared.kafka.topics import ensure_topic
from vsql_shared.pg import commands, oplog
from vsql_shared.pg.connect import connect

TABLES = "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE u (id int PRIMARY KEY, n numeric(10,2));"


@pytest.fixture
def pair(stack: Stack, tmp_path: Path) -> Iterator[TwoNodes]:
    """A pair without first copy, whose producer runs."""
    made = TwoNodes(stack, tmp_path, TABLES, target_config='[limits]\nkafka_queue_bytes = "1MiB"')
    try:
        made.create(["t(*)", "u(*)"], copy=False)
        made.a.start("producer")
        until(
            lambda: made.a.query(
                "SELECT 1 FROM vsql_sync.streams WHERE slot_created AND state = 'SYNCHRONIZED'"
            )
        )
        yield made
    finally:
        made.end()


def _own_entries(pair: TwoNodes) -> list[tuple[Any, ...]]:
    return pair.b.query(
        "SELECT event_type, batch FROM vsql_sync.vsql_sync_audit WHERE chain = %s ORDER BY sequence",
        names.ack_chain(pair.chain, "node-b"),
    )


def _acts(pair: TwoNodes) -> list[dict[str, Any]]:
    rows = pair.b.query(
        "SELECT document FROM vsql_sync.vsql_sync_audit WHERE event_type = 'operator_action'"
        " ORDER BY sequence"
    )
    return [json.loads(parse(bytes(row[0])).entry.detail) for row in rows]


@pytest.mark.timeout(240)
def test_nothing_is_acknowledged_before_the_origin_is_ours(pair: TwoNodes) -> None:
    """The process before us may still commit: what it leaves after we looked would never be acknowledged."""
    origin = pair.b.query("SELECT origin_name FROM vsql_sync.streams WHERE direction = 'in'")[0][0]
    with psycopg.connect(pair.b.conninfo, autocommit=True) as before:
        before.execute("SELECT pg_replication_origin_create(%s)", (origin,))
        before.execute("SELECT pg_replication_origin_session_setup(%s)", (origin,))
        pair.a.execute("INSERT INTO t VALUES (1, 'a')")
        pair.b.start("consumer")
        until(
            lambda: pair.b.query(
                "SELECT 1 FROM vsql_sync.stream_status"
                " WHERE state = 'waiting' AND detail->>'last_error' LIKE '%%origin%%'"
            )
        )
        assert _own_entries(pair) == []
    pair.wait_in_step()
    batches = until(lambda: [batch for event, batch in _own_entries(pair) if event == "batch_applied"])
    assert batches == list(range(1, len(batches) + 1))


@pytest.mark.timeout(240)
def test_forged_entries_of_our_own_chain_do_not_keep_the_consumer_from_starting(pair: TwoNodes) -> None:
    """Whoever may write to the audit topic writes acknowledgements in our name: badly signed, or cut off."""
    pair.b.start("consumer")
    pair.a.execute("INSERT INTO t VALUES (1, 'a')")
    pair.wait_in_step()
    pair.b.stop("consumer")
    chain, topic = names.ack_chain(pair.chain, "node-b"), names.audit_topic(pair.cluster)
    newest = "SELECT document FROM vsql_sync.vsql_sync_audit WHERE chain = %s ORDER BY sequence DESC LIMIT 1"
    genuine = SignedDocument.decode(bytes(pair.b.query(newest, chain)[0][0]))
    entry = AuditEntry.decode(genuine.payload)
    later = replace(entry, sequence=entry.sequence + 1).encode()
    producer = Producer({"bootstrap.servers": pair.a.kafka})
    for payload in (later, genuine.payload[:-1]):
        producer.produce(topic, replace(genuine, payload=payload).encode(), key=b"forged", partition=0)
    assert producer.flush(20) == 0
    pair.a.execute("INSERT INTO t VALUES (2, 'b')")
    pair.b.start("consumer")
    pair.wait_in_step()
    # They follow what was applied.
    until(lambda: len([event for event, _ in _own_entries(pair) if event == "batch_applied"]) >= 2)
    assert [batch for event, batch in _own_entries(pair) if event == "batch_applied"] == [1, 2]
    assert pair.b.ctl("audit", "verify").returncode == 0


@pytest.mark.timeout(240)
def test_a_table_of_which_the_first_copy_lacks_a_batch_stays_diverged(stack: Stack, tmp_path: Path) -> None:
    made = TwoNodes(stack, tmp_path, TABLES)
    try:
        made.a.execute("INSERT INTO t VALUES (1, 'a'); INSERT INTO u VALUES (1, 1)")
        made.create(["t(*)", "u(*)"])
        made.a.start("producer")
        copy = names.copy_chain(PUBLICATION, "node-a", "node-b")
        found = "SELECT sequence FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND tables_affected = %s"
        sequence = until(lambda: made.a.query(found, copy, ["public.t"]))[0][0]
        made.b.ctl(
            "stream", "skip-batch", "--chain", copy, "--sequence", str(sequence), "--reason", "lost", "--yes"
        )
        made.b.start("consumer")
        ended = "SELECT 1 FROM vsql_sync.streams WHERE kind = 'copy' AND state = 'FINISHED'"
        until(lambda: made.b.query(ended))
        states = dict(made.b.query("SELECT table_name, state FROM vsql_sync.table_sync"))
        assert states == {"t": "DIVERGED", "u": "SYNCHRONIZED"}
        reason = "SELECT 1 FROM vsql_sync.table_sync WHERE table_name = 't' AND reason LIKE '%%skipped%%'"
        assert made.b.query(reason) == [(1,)]
    finally:
        made.end()


@pytest.mark.timeout(240)
def test_a_command_ends_a_back_off_and_stands_signed_in_the_chain(pair: TwoNodes) -> None:
    pair.b.execute("ALTER TABLE t RENAME TO t_away")
    pair.a.execute("INSERT INTO t VALUES (1, 'a')")
    pair.b.start("consumer")
    missing = "SELECT 1 FROM vsql_sync.stream_status WHERE state = 'waiting' AND detail->>'last_error' <> ''"
    until(lambda: pair.b.query(missing))
    pair.b.execute("ALTER TABLE t_away RENAME TO t")
    began = time.monotonic()
    with connect(pair.b.conninfo, application_name="test") as conn:
        asked = commands.request(conn, "consumer", "retry", {}, "mended", pair.chain)
        until(lambda: pair.b.query("SELECT 1 FROM t"), timeout=15)
        assert time.monotonic() - began < 15  # the back-off is 30 s
        answers = commands.wait(conn, asked, 1, 20)
        assert [answer.ok for answer in answers] == [True]
        given = oplog.command(conn, asked)
    pair.b.ctl("pause", "--reason", "incident")
    details = _acts(pair)
    assert [one["act"] for one in details] == ["retry", "pause"]
    assert details[0]["sha256"] == hashlib.sha256((given or "").encode()).hexdigest()
    line = int(details[1]["record"].removeprefix("audit_log/"))
    with connect(pair.b.conninfo, application_name="test") as conn:
        said = oplog.line(conn, line)
    assert said is not None
    assert "incident" in said
    assert details[1]["sha256"] == hashlib.sha256(said.encode()).hexdigest()
    assert pair.b.ctl("audit", "verify").returncode == 0


@pytest.mark.timeout(240)
def test_a_database_that_was_set_back_applies_again_and_does_not_acknowledge_twice(pair: TwoNodes) -> None:
    """A failover to a standby that lacked the last commits, after their acknowledgements were sent."""
    pair.b.start("consumer")
    pair.a.execute("INSERT INTO t VALUES (1, 'a')")
    pair.wait_in_step()
    pair.b.stop("consumer")
    name = conninfo_to_dict(pair.b.conninfo)["dbname"]
    with psycopg.connect(make_conninfo(pair.b.conninfo, dbname="postgres"), autocommit=True) as admin:
        older = f"{name}_older"
        copy = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        admin.execute(copy.format(sql.Identifier(older), sql.Identifier(str(name))))
        pair.b.start("consumer")
        for number in (2, 3):
            pair.a.execute(f"INSERT INTO t VALUES ({number}, 'b')")
            pair.wait_in_step()
        pair.b.stop("consumer")
        admin.execute(sql.SQL("DROP DATABASE {}").format(sql.Identifier(str(name))))
        admin.execute(
            sql.SQL("ALTER DATABASE {} RENAME TO {}").format(sql.Identifier(older), sql.Identifier(str(name)))
        )
    assert pair.b.query("SELECT id FROM t") == [(1,)]
    pair.b.start("consumer")
    pair.wait_in_step()
    pair.a.execute("INSERT INTO t VALUES (4, 'c')")
    pair.wait_in_step()
    assert pair.differences() == []
    batches = until(
        lambda: (found := [batch for event, batch in _own_entries(pair) if batch])[-1:] == [4] and found
    )
    assert batches == [1, 2, 3, 4]
    assert pair.b.ctl("audit", "verify").returncode == 0


@pytest.mark.timeout(240)
def test_a_topic_that_is_shorter_than_what_was_applied_is_said_at_once(pair: TwoNodes) -> None:
    pair.b.start("consumer")
    pair.a.execute("INSERT INTO t VALUES (1, 'a')")
    pair.wait_in_step()
    pair.b.stop("consumer")
    pair.b.query("UPDATE vsql_sync.apply_progress SET audit_offset = audit_offset + 1000")
    pair.b.start("consumer")
    reason = until(
        lambda: pair.b.query("SELECT state_reason FROM vsql_sync.streams WHERE state = 'DIVERGED'")
    )
    assert "lost the end" in reason[0][0]


def _diverge(pair: TwoNodes) -> None:
    """Have B find the audit topic shorter than what it has applied."""
    pair.b.start("consumer")
    pair.a.execute("INSERT INTO t VALUES (1, 'a')")
    pair.wait_in_step()
    pair.b.stop("consumer")
    pair.b.query("UPDATE vsql_sync.apply_progress SET audit_offset = audit_offset + 1000")
    pair.b.start("consumer")
    until(lambda: pair.b.query(DIVERGED))


DIVERGED = "SELECT state_reason FROM vsql_sync.streams WHERE state = 'DIVERGED'"


@pytest.mark.timeout(240)
def test_a_retry_that_does_not_help_is_signed_and_answered_once(pair: TwoNodes) -> None:
    _diverge(pair)
    with connect(pair.b.conninfo, application_name="test") as conn:
        asked = commands.request(conn, "consumer", "retry", {}, "restored?", pair.chain)
        answers = commands.wait(conn, asked, 1, 20)
        assert [answer.ok for answer in answers] == [True]
        assert [one["act"] for one in _acts(pair)] == ["retry"]
        reason = until(lambda: pair.b.query(DIVERGED))
        assert "lost the end" in reason[0][0]
        time.sleep(2)
        assert [one["command"] for one in _acts(pair)] == [asked]
        pair.b.query("UPDATE vsql_sync.apply_progress SET audit_offset = audit_offset - 1000")
        again = commands.request(conn, "consumer", "retry", {}, "restored", pair.chain)
        assert [answer.ok for answer in commands.wait(conn, again, 1, 20)] == [True]
    pair.a.execute("INSERT INTO t VALUES (2, 'b')")
    pair.wait_in_step()
    assert [one["command"] for one in _acts(pair)] == [asked, again]
    assert pair.b.ctl("audit", "verify", "--kafka").returncode == 0


@pytest.mark.parametrize("where", ["consumer.act-signed", "consumer.act-obeyed"])
@pytest.mark.timeout(240)
def test_a_retry_survives_the_worker_that_obeyed_it(pair: TwoNodes, where: str) -> None:
    _diverge(pair)
    pair.b.stop("consumer")
    pair.b.query("UPDATE vsql_sync.apply_progress SET audit_offset = audit_offset - 1000")
    pair.b.log_file("consumer").unlink()
    with connect(pair.b.conninfo, application_name="test") as conn:
        asked = commands.request(conn, "consumer", "retry", {}, "restored", pair.chain)
        env = {"VSQL_SYNC_ALLOW_FAILPOINTS": "1", "VSQL_SYNC_FAILPOINTS": f"{where}=kill"}
        pair.b.start("consumer", env)
        until(lambda: '"code": -9' in pair.b.tail("consumer", 200))
        pair.b.stop("consumer")
        assert commands.answers(conn, asked) == []
        assert {one["command"] for one in _acts(pair)} == {asked}
        pair.b.start("consumer")
        assert [answer.ok for answer in commands.wait(conn, asked, 1, 30)] == [True]
    pair.a.execute("INSERT INTO t VALUES (2, 'b')")
    pair.wait_in_step()
    assert {(one["act"], one["command"]) for one in _acts(pair)} == {("retry", asked)}
    assert pair.b.query(DIVERGED) == []
    assert pair.b.ctl("audit", "verify", "--kafka").returncode == 0


@pytest.mark.timeout(240)
def test_more_acknowledgements_than_kafkas_queue_holds_are_all_written_in_order(pair: TwoNodes) -> None:
    """As after a crash at the end of a source transaction of a hundred million rows."""
    count, settings = 3_000, load_settings(pair.b.config)
    assert settings.limits.kafka_queue_bytes == 1 << 20
    chain = "huge.node-a"
    ack_chain, topic = names.ack_chain(chain, "node-b"), names.audit_topic(pair.cluster)
    writer = ChainWriter(A, pair.cluster, chain, EMPTY_HEAD, incarnation(1))
    writer.commit(writer.open_epoch(lsn=1, system_identifier="1", timeline=1).entry_hash)
    ensure_topic(make_admin(settings), topic, "audit", settings)
    place = Place(pair.cluster, chain, ack_chain, "node-a", "node-b", topic, 0)
    with connect(pair.b.conninfo, application_name="test") as conn:
        for number in range(1, count + 1):
            made = writer.next(**manifest_fields(number))
            writer.commit(made.entry_hash)
            conn.execute(
                "INSERT INTO vsql_sync.receipts (chain, sequence, epoch, batch, manifest, merkle_root,"
                " verdicts) VALUES (%s, %s, 1, %s, %s, %s, %s)",
                (chain, made.entry.sequence, number, made.encoded, made.entry.merkle_root, '{"applied": 2}'),
            )
        acknowledger = Acknowledger(conn, make_producer(settings, "test"), place, B, trust())
        acknowledger.start(lambda at: read_chain(settings, "test", "test", (topic, 0), ack_chain, at), 0)
        acknowledger.settle()
        acknowledger.close()
        assert conn.execute("SELECT count(*) FROM vsql_sync.receipts").fetchone() == (0,)
        # Entries of the table that Kafka lost are as many as may be, too.
        again = Acknowledger(conn, make_producer(settings, "test"), place, B, trust())
        again.start(lambda _: [], 0)
        again.close()
    found = [r for r in read_topics(pair.a.kafka, pair.cluster) if r.key and ack_chain.encode() in r.key]
    assert len(found) == 2 * (count + 1)
