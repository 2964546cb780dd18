"""Schedules that stopped or hung a producer, misled its readers, or were feared to."""

from __future__ import annotations

import json
import signal
import time
from hashlib import sha256

import psycopg

from tests.services.conftest import NewSource
from tests.services.producer_node import CHAIN, PeerNode
from tests.stack import Stack
from vsql_shared.audit.entries import OPERATOR_ACTION
from vsql_shared.crypto.signing import fingerprint, generate_signing_key, load_public_key, load_signer
from vsql_shared.pg import control, oplog
from vsql_shared.pg.connect import connect

TABLE = "CREATE TABLE t (id bigint PRIMARY KEY, note text)"
QUICK = (
    "[limits]\nbatch_linger_ms = 1\nstatus_interval_ms = 100\ncommand_poll_ms = 100\n"
    "retry_backoff_max_ms = 500\n"
)


def test_a_bound_type_that_only_the_wal_still_knows_does_not_stop_the_stream_for_ever(
    new_source: NewSource,
) -> None:
    node = new_source(TABLE, ["t"], config=QUICK)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.stop(worker)
    node.execute("ALTER TABLE t ADD COLUMN ref regclass")
    node.execute("INSERT INTO t VALUES (1, 'a', 'pg_class')")
    node.execute("ALTER TABLE t DROP COLUMN ref")
    node.execute("INSERT INTO t VALUES (2, 'b')")
    worker = node.start(log="second")
    node.wait_confirmed(30)
    node.stop(worker)
    assert [values[:2] for _, values in node.read().rows("t")] == [(b"1", b"a"), (b"2", b"b")]


def test_a_table_taken_out_of_the_publication_again_stops_nothing_any_more(new_source: NewSource) -> None:
    node = new_source(TABLE + "; CREATE TABLE secret (id int PRIMARY KEY)", ["t"], config=QUICK)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.execute("ALTER PUBLICATION pub ADD TABLE secret")
    node.execute("INSERT INTO secret VALUES (1); INSERT INTO t VALUES (1, 'with it'); TRUNCATE secret")
    node.wait(lambda: "public.secret" in str(node.state()[1].get("last_error")))
    node.execute("ALTER PUBLICATION pub DROP TABLE secret")
    node.wait_confirmed(30)
    node.stop(worker)
    back = node.read()
    assert {change.table.table for change in back.changes} == {"t"}
    assert len(back.changes) == 1
    assert not [topic for topic in node.topics() if topic.endswith(".secret")]


def test_a_paused_stream_lets_its_server_shut_down(new_source: NewSource, stack: Stack) -> None:
    server = stack.own_postgres(18)
    try:
        node = new_source(TABLE, ["t"], config=QUICK, conninfo=server.conninfo())
        worker = node.start()
        node.wait(lambda: node.state()[0] == "running")
        node.execute("UPDATE vsql_sync.streams SET desired = 'paused'")
        node.wait(lambda: node.state()[0] == "paused")
        node.execute("INSERT INTO t SELECT g, repeat('x', 500) FROM generate_series(1, 20000) g")
        began = time.monotonic()
        server.stop("fast")
        assert time.monotonic() - began < 30
        server.start()
        node.execute("UPDATE vsql_sync.streams SET desired = 'running'")
        node.wait_confirmed(60)
        node.stop(worker)
        assert len(node.read().rows("t")) == 20_000
    finally:
        server.remove()


def test_a_stop_ends_in_time_while_kafka_takes_nothing(new_source: NewSource, stack: Stack) -> None:
    broker = stack.own_kafka()
    try:
        config = QUICK + 'kafka_queue_bytes = "1MiB"\n'
        node = new_source(TABLE, ["t"], config=config, kafka=broker.bootstrap_servers)
        node.config.write_text(node.config.read_text().replace("[server]", '[server]\nstop_timeout = "5s"'))
        worker = node.start()
        node.wait(lambda: node.state()[0] == "running")
        node.execute("INSERT INTO t VALUES (0, 'first')")
        node.wait_confirmed()
        broker.pause()
        node.execute("INSERT INTO t SELECT g, repeat('x', 500) FROM generate_series(1, 20000) g")
        time.sleep(3)
        began = time.monotonic()
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0
        assert time.monotonic() - began < 8
        broker.unpause()
        worker = node.start(log="second")
        node.wait_confirmed()
        node.stop(worker)
        assert len(node.read().rows("t")) == 20_001
    finally:
        broker.remove()


def test_a_copy_that_waits_for_a_lock_says_so_and_ends_at_a_stop(new_source: NewSource) -> None:
    node = new_source(TABLE + "; INSERT INTO t VALUES (1, 'a')", ["t"], config=QUICK)
    chain = node.add_copy()
    live = node.start()
    node.wait(lambda: node.state()[0] == "running")
    said = (
        "SELECT state FROM vsql_sync.stream_status"
        " WHERE chain = %s AND updated_at > clock_timestamp() - '2s'::interval"
    )
    copy = node.start(chain, failpoints="copy.started=sleep:4000:1", log="copy")
    node.wait(lambda: '"failpoint"' in node.log("copy"), what=node.log("copy"))
    with psycopg.connect(node.conninfo) as blocker:
        blocker.execute("LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
        waiting = "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 't'::regclass"
        node.wait(lambda: bool(node.query(waiting)), what=node.log("copy"))
        time.sleep(3)
        assert node.query(said, chain) == [("copying",)]
        copy.send_signal(signal.SIGTERM)
        assert copy.wait(10) == 0
    copy = node.start(chain, log="again")
    end = "SELECT 1 FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND event_type = 'copy_finished'"
    node.wait(lambda: bool(node.query(end, chain)), what=node.log("again"))
    node.stop(copy)
    node.stop(live)
    assert len(node.read(chain).changes) == 1


def test_a_copy_that_waits_for_another_transaction_to_end_stops_when_it_is_told(
    new_source: NewSource,
) -> None:
    node = new_source(TABLE + "; INSERT INTO t VALUES (1, 'a')", ["t"], config=QUICK)
    chain = node.add_copy()
    live = node.start()
    node.wait(lambda: node.state()[0] == "running")
    slots = "SELECT count(*) FROM pg_replication_slots WHERE temporary AND database = current_database()"
    with psycopg.connect(node.conninfo) as blocker:
        # A slot is consistent only when every transaction that was open before it has ended.
        blocker.execute("INSERT INTO t VALUES (2, 'open')")
        copy = node.start(chain, log="copy")
        node.wait(lambda: node.query(slots) == [(1,)], what=node.log("copy"))
        copy.send_signal(signal.SIGTERM)
        assert copy.wait(15) == 0
        node.wait(lambda: node.query(slots) == [(0,)], 10, "the server was not told")
    node.stop(live)


def test_a_column_marked_as_pci_is_named_without_a_restart(new_source: NewSource) -> None:
    node = new_source(TABLE, ["t"], config=QUICK)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.execute("INSERT INTO t VALUES (1, 'a')")
    node.wait_confirmed()
    node.execute("INSERT INTO vsql_sync.pci_columns VALUES ('public', 't', 'note')")
    node.wait(lambda: "was changed" in node.log(), 20, "the mark was not seen")
    node.execute("INSERT INTO t VALUES (2, 'b')")
    node.wait_confirmed()
    node.stop(worker)
    assert [m.pci_columns for m in node.read().manifests] == [(), ("public.t.note",)]


def test_a_mark_follows_its_column_to_another_name(new_source: NewSource) -> None:
    """Also in the very first batch after it, and while the WAL still holds the old name."""
    node = new_source(TABLE, ["t"], config=QUICK, pci_columns=[("t", "note")])
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.execute("INSERT INTO t VALUES (1, 'a')")
    node.wait_confirmed()
    node.execute("ALTER TABLE t RENAME note TO remark; INSERT INTO t VALUES (2, 'b')")
    node.wait_confirmed()
    node.stop(worker)
    node.execute("INSERT INTO t VALUES (3, 'c'); ALTER TABLE t RENAME remark TO words")
    node.execute("INSERT INTO t VALUES (4, 'd')")
    worker = node.start(log="second")
    node.wait_confirmed()
    node.stop(worker)
    assert {m.contains_pci for m in node.read().manifests} == {True}
    named = {name for m in node.read().manifests for name in m.pci_columns}
    assert named == {"public.t.note", "public.t.remark", "public.t.words"}


def test_a_target_that_was_given_another_key_is_believed_under_it(new_source: NewSource) -> None:
    node = new_source(TABLE, ["t"], config=QUICK)
    node.execute(f"INSERT INTO vsql_sync.stream_targets (chain, target) VALUES ('{CHAIN}', 'node-b')")
    target = PeerNode(node, "node-b")
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.execute("INSERT INTO t VALUES (1, 'a')")
    node.wait_confirmed()
    target.acknowledge(CHAIN)
    acked = "SELECT acked_sequence, mismatch FROM vsql_sync.stream_targets"
    node.wait(lambda: node.query(acked)[0][0] > 0)
    folder = node.folder / "another"
    folder.mkdir()
    private, public = generate_signing_key(folder)
    raw = load_public_key(public)
    with psycopg.connect(node.conninfo) as conn:
        conn.execute(
            "INSERT INTO vsql_sync.signers (fingerprint, node_name, public_key) VALUES (%s, %s, %s)",
            (fingerprint(raw), "node-b", raw),
        )
    target.sign_with(load_signer(private, "node-b"))
    node.execute("INSERT INTO t VALUES (2, 'b')")
    node.wait_confirmed()
    last = node.read().manifests[-1].sequence
    target.acknowledge(CHAIN)
    node.wait(lambda: node.query(acked) == [(last, None)], 20, str(node.query(acked)))
    node.stop(worker)


def test_an_operators_acts_stand_signed_in_the_chain_with_a_hash_of_their_line(new_source: NewSource) -> None:
    node = new_source(TABLE, ["t"], config=QUICK)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    with connect(node.conninfo, application_name="test") as conn:
        control.pause(conn, "maintenance")
        node.wait(lambda: node.state()[0] == "paused")
        control.resume(conn)
        node.wait(lambda: len(node.query("SELECT 1 FROM vsql_sync.command_results WHERE ok")) == 2)
        node.execute("INSERT INTO t VALUES (1, 'a')")
        node.wait_confirmed()
        acts = [json.loads(e.detail) for e in node.read().entries if e.event_type == OPERATOR_ACTION]
        assert [one["act"] for one in acts] == ["pause", "resume"]
        for one in acts:
            kind, number = one["record"].split("/")
            assert kind == "audit_log"
            line = oplog.line(conn, int(number))
            assert line is not None
            assert one["sha256"] == sha256(line.encode()).hexdigest()
            assert json.loads(line)["action"] == f"stream.{one['act']}"
            assert "maintenance" not in json.dumps(one)
    early = node.query(
        "SELECT a.sequence FROM vsql_sync.vsql_sync_audit a, vsql_sync.command_results r"
        " WHERE a.event_type = 'operator_action' AND a.written_at > r.finished_at"
        " AND position(convert_to('\"command\":' || r.command_id || ',', 'UTF8') IN a.document) > 0"
    )
    assert early == [], "an act is signed and kept before it is answered"
    node.stop(worker)


def test_the_audit_volume_is_a_days_at_the_present_pace(new_source: NewSource) -> None:
    node = new_source(TABLE, ["t"], config=QUICK)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    for number in range(100):
        node.execute(f"INSERT INTO t VALUES ({number}, 'a')")
    node.wait_confirmed()
    row = node.query("SELECT count(*), sum(octet_length(document)) FROM vsql_sync.vsql_sync_audit")[0]
    node.wait(lambda: node.state()[1].get("audit_entries", 0) >= row[0] - 1)
    said = node.state()[1]["audit_bytes_per_day"]
    # At least what was appended, taken for the pace of a minute.
    assert said >= (int(row[1]) - 1000) * 1440 * 0.9
    node.stop(worker)
