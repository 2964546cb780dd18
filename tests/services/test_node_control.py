"""Commands, orders and status: what operators ask of streams, and what they are shown."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta

import pytest

from tests.conftest import NewDatabase
from tests.waiting import until
from vsql_shared import names
from vsql_shared.errors import RefusedError, TransientError, UserError
from vsql_shared.pg import commands, control, migrate, nodes, retire, status, transactions
from vsql_shared.pg.connect import Connection, connect

LIVE = "pub.node-a"


@pytest.fixture
def conninfo(new_database: NewDatabase) -> str:
    """A node with an outgoing and an incoming stream."""
    text = new_database("control")
    with connect(text, application_name="test") as conn:
        migrate.install(conn)
        nodes.register_local(conn, 1, "node-a", "c", None)
        conn.execute(
            "INSERT INTO vsql_sync.streams (chain, direction, publication, origin, slot_name)"
            " VALUES (%s, 'out', 'pub', 'node-a', 'vsql_none'), ('pub.node-b', 'in', 'pub', 'node-b', NULL)",
            (LIVE,),
        )
    return text


@pytest.fixture
def conn(conninfo: str) -> Iterator[Connection]:
    with connect(conninfo, application_name="test") as opened:
        yield opened


def _actions(conn: Connection) -> list[str]:
    rows = conn.execute("SELECT action FROM vsql_sync.audit_log WHERE action LIKE 'stream.%' ORDER BY id")
    return [row[0] for row in rows]


def test_a_command_is_run_once_by_each_worker_it_names_across_restarts(conn: Connection) -> None:
    first = commands.request(conn, "producer", "rotate-dek", {"force": True}, "why", LIVE)
    everyone = commands.request(conn, "producer", "retry", {}, "")
    assert [(one.id, one.verb) for one in commands.pending(conn, LIVE, "producer")] == [
        (first, "rotate-dek"),
        (everyone, "retry"),
    ]
    assert commands.pending(conn, LIVE, "producer")[0].args == {"force": True}
    assert commands.pending(conn, "pub.node-b", "consumer") == []
    assert commands.finish(conn, first, LIVE, "out", True, "rotated")
    assert not commands.finish(conn, first, LIVE, "out", False, "a second time")
    assert [one.id for one in commands.pending(conn, LIVE, "producer")] == [everyone]
    assert commands.pending(conn, LIVE, "producer", everyone) == []
    assert commands.answers(conn, first) == [commands.Answer(LIVE, "out", True, "rotated")]


def test_a_command_for_all_is_not_for_streams_made_later(conn: Connection) -> None:
    commands.request(conn, "consumer", "retry", {}, "")
    conn.execute(
        "INSERT INTO vsql_sync.streams (chain, direction, publication, origin)"
        " VALUES ('late', 'in', 'p', 'x')"
    )
    assert commands.pending(conn, "late", "consumer") == []
    assert len(commands.pending(conn, "pub.node-b", "consumer")) == 1


def test_a_listener_is_woken_by_a_command(conn: Connection, conninfo: str) -> None:
    with connect(conninfo, application_name="worker") as worker:
        worker.execute(f"LISTEN {commands.CHANNEL}".encode())
        number = commands.request(conn, "producer", "retry", {}, "")
        notes = list(worker.notifies(timeout=5, stop_after=1))
        assert [note.payload for note in notes] == [str(number)]


def test_waiting_ends_with_the_last_answer_or_with_the_time(conn: Connection, conninfo: str) -> None:
    number = commands.request(conn, "producer", "retry", {}, "", LIVE)
    began = time.monotonic()
    assert commands.wait(conn, number, 1, 0.3) == []
    assert time.monotonic() - began < 3

    def answer() -> None:
        with connect(conninfo, application_name="worker") as worker:
            commands.finish(worker, number, LIVE, "out", True)

    thread = threading.Thread(target=answer)
    thread.start()
    assert len(commands.wait(conn, number, 1, 10)) == 1
    thread.join()


def test_start_pause_and_resume_change_what_is_wanted_tell_the_workers_and_are_logged(
    conn: Connection,
) -> None:
    both = [(LIVE, "out"), ("pub.node-b", "in")]
    assert control.start(conn).streams == both
    assert control.start(conn).streams == []
    paused = control.pause(conn, " IR-7 ")
    assert paused.streams == both
    assert len(paused.command_ids) == 2
    wanted = conn.execute("SELECT DISTINCT desired, desired_reason FROM vsql_sync.streams").fetchall()
    assert wanted == [("paused", "IR-7")]
    assert control.resume(conn, [LIVE]).streams == [(LIVE, "out")]
    assert control.start(conn).streams == [("pub.node-b", "in")]
    assert [one.verb for one in commands.pending(conn, LIVE, "producer")] == ["pause", "resume"]
    assert _actions(conn) == [
        "stream.start", "stream.start", "stream.pause", "stream.pause", "stream.resume", "stream.start",
    ]  # fmt: skip


def test_a_finished_copy_is_not_started_again(conn: Connection) -> None:
    conn.execute("UPDATE vsql_sync.streams SET state = 'FINISHED' WHERE chain = %s", (LIVE,))
    assert control.start(conn).streams == [("pub.node-b", "in")]


def test_orders_that_make_no_sense_are_refused_and_not_logged(conn: Connection) -> None:
    for act, expected in (
        (lambda: control.pause(conn, "  "), "needs a reason"),
        (lambda: control.start(conn, ["nope"]), "there is no stream nope"),
        (lambda: control.skip_batch(conn, LIVE, 3, "x"), "no incoming stream"),
        (lambda: control.skip_batch(conn, "pub.node-b", 0, "x"), "no sequence number"),
        (lambda: control.skip_batch(conn, "pub.node-b", 1, ""), "needs a reason"),
        (lambda: control.ignore_record(conn, "pub.node-b", "t/1", "x"), "TOPIC/PARTITION/OFFSET"),
        (lambda: control.ignore_record(conn, "pub.node-b", "t/x/1", "x"), "TOPIC/PARTITION/OFFSET"),
    ):
        with pytest.raises(UserError, match=expected):
            act()
    assert _actions(conn) == []


def test_a_decision_is_written_once_told_to_the_consumer_and_logged(conn: Connection) -> None:
    first = control.ignore_record(conn, "pub.node-b", "c.pub.node-b.public.t/0/42", "forged")
    second = control.skip_batch(conn, "pub.node-b", 7, "key lost")
    rows = conn.execute(
        "SELECT id, kind, topic, partition, kafka_offset, sequence, reason"
        " FROM vsql_sync.decisions ORDER BY id"
    ).fetchall()
    assert rows == [
        (first, "ignore-record", "c.pub.node-b.public.t", 0, 42, None, "forged"),
        (second, "skip-batch", None, None, None, 7, "key lost"),
    ]
    told = commands.pending(conn, "pub.node-b", "consumer")
    assert [(one.verb, one.args["decision"]) for one in told] == [("retry", first), ("retry", second)]
    # Each names its line of the log, whose hash the worker puts into its chain.
    lines = conn.execute(
        "SELECT id FROM vsql_sync.audit_log WHERE action LIKE 'stream.%' ORDER BY id"
    ).fetchall()
    assert [(one.args["audit_log"],) for one in told] == lines
    with pytest.raises(RefusedError, match="was decided before"):
        control.skip_batch(conn, "pub.node-b", 7, "again")
    assert _actions(conn) == ["stream.ignore-record", "stream.skip-batch"]


BLOCKED = {"transaction": {"xid": 741, "lsn": "0/16B3748", "time": 1_700_000_000_000_001}, "sequence": 9}


def test_only_the_transaction_that_blocks_a_stream_is_passed_over(conn: Connection) -> None:
    def tries(given: str, chain: str = "pub.node-b", reason: str = "x") -> str:
        with pytest.raises(UserError) as refused:
            transactions.skip(conn, chain, given, reason)
        return str(refused.value)

    assert "is not blocked, it is not running" in tries("741")
    status.write_status(conn, "pub.node-b", "in", "running", {"blocked": BLOCKED})
    assert "is not blocked, it is running" in tries("741")
    status.write_status(
        conn, "pub.node-b", "in", "blocked", {"blocked": {"transaction": None, "sequence": 9}}
    )
    assert "stream skip-batch --sequence 9" in tries("741")
    status.write_status(conn, "pub.node-b", "in", "blocked", {"blocked": BLOCKED})
    assert "blocked by transaction 741 at 0/16B3748, not by 742" in tries("742")
    assert "not by 0/16B3749" in tries("0/16B3749")
    assert "is no transaction" in tries("last")
    assert "is no transaction" in tries("99999999999")
    assert "needs a reason" in tries("741", reason=" ")
    assert "no incoming stream" in tries("741", chain=LIVE)
    conn.execute("UPDATE vsql_sync.streams SET kind = 'copy' WHERE chain = 'pub.node-b'")
    assert "is a first copy" in tries("741")
    assert _actions(conn) == []


@pytest.mark.parametrize("given", ["741", "0/16B3748", "0/16b3748"])
def test_a_transaction_is_decided_on_once_whether_skipped_or_parked(conn: Connection, given: str) -> None:
    status.write_status(conn, "pub.node-b", "in", "blocked", {"blocked": BLOCKED})
    made = transactions.skip(conn, "pub.node-b", given, " test data ")
    row = conn.execute(
        "SELECT id, kind, xid, commit_lsn::text, extract(epoch FROM commit_time) * 1000000, reason"
        " FROM vsql_sync.decisions"
    ).fetchall()
    assert row == [(made.decision, "skip-transaction", 741, "0/16B3748", 1_700_000_000_000_001, "test data")]
    (told,) = commands.pending(conn, "pub.node-b", "consumer")
    assert (told.id, told.verb, told.args["decision"]) == (made.command, "retry", made.decision)
    with pytest.raises(RefusedError, match="was decided before"):
        transactions.park(conn, "pub.node-b", "741", "again")
    assert _actions(conn) == ["stream.skip-transaction"]


def test_a_retry_reaches_every_direction_of_a_stream_and_is_logged(conn: Connection) -> None:
    changed = transactions.retry(conn, LIVE, "mended")
    assert changed.streams == [(LIVE, "out")]
    assert [one.verb for one in commands.pending(conn, LIVE, "producer")] == ["retry"]
    with pytest.raises(RefusedError, match="no stream nope"):
        transactions.retry(conn, "nope", "mended")
    with pytest.raises(UserError, match="needs a reason"):
        transactions.retry(conn, LIVE, "")
    assert _actions(conn) == ["stream.retry"]


def test_what_is_not_parked_is_not_replayed_and_an_xid_that_came_twice_is_not_enough(
    conn: Connection,
) -> None:
    for number, position in ((1, "0/10"), (2, "0/20")):
        conn.execute(
            "INSERT INTO vsql_sync.parked (decision, chain, xid, commit_lsn, commit_time)"
            " VALUES (%s, 'pub.node-b', 741, %s, now())",
            (number, position),
        )
    for given, expected in (("742", "it is not parked"), ("0/30", "it is not parked"), ("741", "by its LSN")):
        with pytest.raises(RefusedError, match=expected):
            transactions.replay(conn, "pub.node-b", given, "now")
    made = transactions.replay(conn, "pub.node-b", "0/20", "now")
    assert (made.decision, made.transaction) == (2, {"xid": 741, "lsn": "0/20"})
    (told,) = commands.pending(conn, "pub.node-b", "consumer")
    assert (told.verb, told.args["parked"]) == ("replay", 2)
    conn.execute("UPDATE vsql_sync.parked SET replayed_at = now() WHERE decision = 2")
    with pytest.raises(RefusedError, match="was replayed at"):
        transactions.replay(conn, "pub.node-b", "0/20", "again")
    assert [one.decision for one in transactions.parked(conn)] == [1, 2]
    assert _actions(conn) == ["stream.replay-transaction"]


def test_a_slot_that_a_retired_stream_left_behind_is_shown_and_dropped_by_the_next_attempt(
    conn: Connection, conninfo: str
) -> None:
    conn.execute(
        "UPDATE vsql_sync.streams SET slot_name = 'vsql_left', state = 'DIVERGED' WHERE chain = %s", (LIVE,)
    )
    conn.execute("SELECT pg_create_logical_replication_slot('vsql_left', 'pgoutput')")
    with closing(connect(conninfo, application_name="reader", replication="database")) as reader:
        reader.execute(
            "START_REPLICATION SLOT vsql_left LOGICAL 0/0 (proto_version '2', publication_names 'pub')"
        )
        first = retire.retire(conn, LIVE, "slot lost", 1)
        assert [name for name, _ in first.streams] == [LIVE]
        assert f"is used by session {reader.info.backend_pid} and holds WAL" in first.slot
    assert status.read(conn)[0].slot is not None

    def dropped() -> bool:
        return "was dropped" in retire.retire(conn, LIVE, "slot lost", 1).slot

    until(dropped)
    assert status.read(conn)[0].slot is None
    with pytest.raises(RefusedError, match="is ended already"):
        retire.retire(conn, LIVE, "slot lost", 1)
    assert _actions(conn) == ["stream.retire"]


def test_a_target_s_stream_is_not_retired_while_its_worker_applies(conn: Connection, conninfo: str) -> None:
    """Its operator empties the tables next: what was applied after that would stay."""
    chain = "pub.node-b"
    ended: list[str] = []

    def end() -> None:
        with connect(conninfo, application_name="operator") as operator:
            ended.extend(name for name, _ in retire.retire(operator, chain, "gap", 20).streams)

    with connect(conninfo, application_name="worker") as worker:
        worker.execute("SELECT pg_advisory_lock(%s)", (names.advisory_key(chain, "in"),))
        thread = threading.Thread(target=end)
        thread.start()
        state = "SELECT state FROM vsql_sync.streams WHERE chain = %s"
        until(lambda: conn.execute(state, (chain,)).fetchone() == ("FINISHED",))
        time.sleep(0.5)
        assert ended == []
    thread.join()
    assert ended == [chain]


def test_a_target_s_worker_that_does_not_end_is_said(conn: Connection, conninfo: str) -> None:
    chain = "pub.node-b"
    with connect(conninfo, application_name="worker") as worker:
        worker.execute("SELECT pg_advisory_lock(%s)", (names.advisory_key(chain, "in"),))
        with pytest.raises(TransientError, match="its worker is still at work"):
            retire.retire(conn, chain, "gap", 0.3)


def test_a_worker_that_falls_silent_is_shown_as_not_running(conn: Connection) -> None:
    status.write_status(conn, LIVE, "out", "running", {"rows": 5})
    assert status.read(conn)[0].state == "running"
    status.write_status(conn, LIVE, "out", "waiting", {"rows": 6})
    shown = status.read(conn)[0]
    assert (shown.state, shown.stale, shown.detail) == ("waiting", False, {"rows": 6})
    conn.execute("UPDATE vsql_sync.stream_status SET updated_at = now() - interval '1 minute'")
    shown = status.read(conn)[0]
    assert (shown.state, shown.stale, shown.detail) == ("not running", True, {"rows": 6})
    assert not status.read(conn, timedelta(hours=1))[0].stale
    status.write_status(conn, LIVE, "out", "stopped", {})
    conn.execute("UPDATE vsql_sync.stream_status SET updated_at = now() - interval '1 minute'")
    assert status.read(conn)[0].state == "stopped"


def test_the_slot_is_shown_as_postgresql_has_it(conn: Connection) -> None:
    assert status.read(conn)[0].slot is None
    name = f"s_{conn.info.dbname}"
    conn.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (name,))
    conn.execute("UPDATE vsql_sync.streams SET slot_name = %s WHERE chain = %s", (name, LIVE))
    slot = status.read(conn)[0].slot
    assert slot is not None
    assert (slot["active"], slot["wal_status"]) == (False, "reserved")
    assert slot["lag_bytes"] >= 0


def test_an_order_says_which_workers_answered(conn: Connection, conninfo: str) -> None:
    control.start(conn)
    status.write_status(conn, LIVE, "out", "running", {})
    changed = control.pause(conn, "why")

    def worker() -> None:
        with connect(conninfo, application_name="worker") as other:
            for one in commands.pending(other, LIVE, "producer"):
                commands.finish(other, one.id, LIVE, "out", True, "paused")

    thread = threading.Thread(target=worker)
    thread.start()
    told = {one["chain"]: one["answer"] for one in control.outcome(conn, changed, 10)}
    thread.join()
    assert told[LIVE] == "done: paused"
    assert "does not run now" in told["pub.node-b"]
