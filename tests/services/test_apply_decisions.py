"""A row that does not fit, and what an operator decides about it: real nodes, `syncctl`, both trails.

One pair of nodes for all tests, each with a table of its own; every test leaves a stream that runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import psycopg
import pytest
from confluent_kafka import TopicPartition

from tests.nodes import TwoNodes
from tests.stack import Stack
from tests.streams import Record, append, read_topics
from tests.waiting import until
from vsql_shared import names
from vsql_shared.audit.entries import TRANSACTION_REPLAYED
from vsql_shared.audit.rows import parse
from vsql_shared.config import load_settings
from vsql_shared.kafka.clients import make_admin

CASES = (
    "named", "taken", "skipped", "cut", "late", "own", "parked", "killed", "between", "gone", "busy", "mixed",
    "away", "again", "pieces",
)  # fmt: skip
ROWS = 20
CONFIG = (
    f"[limits]\nbatch_max_rows = {ROWS}\nbatch_linger_ms = 200\nbatch_linger_max_ms = 200\n"
    "retry_backoff_ms = 100\nstatus_interval_ms = 200\ncommand_poll_ms = 200\n"
)
SECRET = "marker-4711"
pytestmark = pytest.mark.timeout(180)
_until = partial(until, timeout=60)


@pytest.fixture(scope="module")
def pair(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    """Two nodes without first copy, whose services run."""
    tables = [f"{case}{end}" for case in CASES for end in ("", "_too")]
    schema = "".join(f"CREATE TABLE {table} (id int PRIMARY KEY, v text);" for table in tables)
    made = TwoNodes(stack, tmp_path_factory.mktemp("decisions"), schema, config=CONFIG)
    try:
        made.create([f"{table}(*)" for table in tables], copy=False)
        made.start()
        ready = "SELECT 1 FROM vsql_sync.streams WHERE slot_created AND state = 'SYNCHRONIZED'"
        _until(lambda: made.a.query(ready))
        made.a.execute("INSERT INTO named VALUES (0, 'begin')")
        in_step(made)
        yield made
        made.stop()
    finally:
        made.end()


def commit(pair: TwoNodes, *scripts: str) -> list[int]:
    """Run each script as a transaction of the source; their xids."""
    xids = []
    with psycopg.connect(pair.a.conninfo) as connection:
        for script in scripts:
            connection.execute(script.encode())
            row = connection.execute("SELECT pg_current_xact_id()::text::bigint & 4294967295").fetchone()
            connection.commit()
            xids.append(int(row[0]) if row else 0)
    return xids


def apart(pair: TwoNodes, *scripts: str) -> list[int]:
    """The same, each in a batch of its own."""
    xids = []
    for script in scripts:
        head = pair.heads()[0] + 1
        xids += commit(pair, script)
        _until(partial(_reached, pair, head))
    return xids


def _reached(pair: TwoNodes, head: int) -> bool:
    return pair.heads()[0] >= head


def in_step(pair: TwoNodes) -> None:
    """Wait until all that was committed is applied, and acknowledged in the target's own trail."""
    pair.wait_in_step()
    acked = (
        "SELECT 1 FROM vsql_sync.apply_progress p WHERE chain = %s AND batch ="
        " (SELECT max(batch) FROM vsql_sync.vsql_sync_audit WHERE chain = %s)"
    )
    _until(lambda: pair.b.query(acked, pair.chain, names.ack_chain(pair.chain, "node-b")))


def blocked(pair: TwoNodes, table: str) -> dict[str, Any]:
    """Wait until the stream is blocked by a row of a table; what it says."""
    rows = _until(
        lambda: pair.b.query(
            "SELECT detail->'blocked' FROM vsql_sync.stream_status WHERE chain = %s AND state = 'blocked'"
            " AND detail->'blocked'->>'table' = %s",
            pair.chain,
            f"public.{table}",
        ),
        tell=lambda: pair.b.tail("consumer"),
    )
    found: dict[str, Any] = rows[0][0]
    return found


def ids(pair: TwoNodes, table: str) -> list[int]:
    """Rows of the target."""
    return [row[0] for row in pair.b.query(f"SELECT id FROM {table} ORDER BY 1")]


def forbid(pair: TwoNodes, table: str, value: int) -> None:
    """Have the target refuse a row."""
    pair.b.execute(f"ALTER TABLE {table} ADD CONSTRAINT {table}_no CHECK (id <> {value})")


def allow(pair: TwoNodes, table: str) -> None:
    """Have the target take it again."""
    pair.b.execute(f"ALTER TABLE {table} DROP CONSTRAINT {table}_no")


def order(pair: TwoNodes, verb: str, transaction: object) -> Any:
    """`syncctl stream VERB` on the target; what it prints as JSON."""
    words = ["--chain", pair.chain, "--transaction", str(transaction), "--reason", "ticket 1", "--yes"]
    return pair.b.ctl_json("stream", verb, *words, "--timeout", "30")


def refused(pair: TwoNodes, *words: str) -> str:
    """A `syncctl stream` that is refused: what it says."""
    done = pair.b.ctl("stream", *words, "--reason", "ticket 1", "--yes", check=False)
    assert done.returncode in (2, 4), done.stdout + done.stderr
    return done.stderr


def said(pair: TwoNodes, xid: int) -> list[dict[str, Any]]:
    """What the acknowledgements say of a transaction that was passed over; their verdicts sum up."""
    rows = pair.b.query(
        "SELECT document FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND event_type = 'batch_applied'"
        " ORDER BY sequence",
        names.ack_chain(pair.chain, "node-b"),
    )
    found = []
    for (document,) in rows:
        entry = parse(bytes(document)).entry
        assert sum(count for _, count in entry.verdicts) == entry.row_count
        found += [one for one in json.loads(entry.detail).get("passed_over", ()) if one["xid"] == xid]
    return found


def verified(pair: TwoNodes) -> dict[str, Any]:
    """Both trails hold, and agree; the comparison of the stream. Raises when they do not."""
    found = pair.a.ctl_json("audit", "verify", "--peer-connection", pair.b.conninfo)
    assert found["ok"]
    one: dict[str, Any] = next(one for one in found["comparisons"] if one["chain"] == pair.chain)
    assert one["problem"] is None
    return one


def test_a_row_is_named_what_came_before_is_applied_and_altering_the_table_is_enough(pair: TwoNodes) -> None:
    pair.b.stop("consumer")
    forbid(pair, "named", 3)
    xids = apart(
        pair,
        "INSERT INTO named VALUES (1, 'a')",
        "INSERT INTO named VALUES (2, 'b')",
        f"INSERT INTO named_too VALUES (1, 'x'); INSERT INTO named VALUES (4, 'd'), (3, '{SECRET}')",
        "INSERT INTO named VALUES (5, 'e')",
    )
    pair.b.start("consumer")  # all of them are there at once, and are merged
    found = blocked(pair, "named")
    assert ids(pair, "named") == [0, 1, 2], "what came before is applied"
    assert ids(pair, "named_too") == [], "nothing of the batch is"
    assert (found["sqlstate"], found["change"], found["transaction"]["xid"]) == ("23514", 2, xids[2])
    assert found["record"].startswith("public.named (batch ")
    assert "named_no" in found["error"]
    shown = pair.b.ctl("status").stdout
    assert f"transaction {xids[2]} at " in shown
    assert SECRET not in shown + json.dumps(found) + pair.b.log_file("consumer").read_text()
    allow(pair, "named")
    in_step(pair)
    assert ids(pair, "named") == [0, 1, 2, 3, 4, 5]
    verified(pair)


def test_a_row_in_the_way_is_removed_and_a_retry_goes_on(pair: TwoNodes) -> None:
    pair.b.execute("ALTER TABLE taken ADD UNIQUE (v); INSERT INTO taken VALUES (900, 'mine')")
    commit(pair, "INSERT INTO taken VALUES (1, 'mine')")
    assert blocked(pair, "taken")["sqlstate"] == "23505"
    pair.b.execute("DELETE FROM taken WHERE id = 900")
    words = ("stream", "retry", "--chain", pair.chain, "--reason", "row removed", "--timeout", "30")
    (answer,) = pair.b.ctl_json(*words)["retried"]
    assert answer["answer"].startswith("done")
    in_step(pair)
    assert ids(pair, "taken") == [1]
    line = pair.b.query("SELECT new_value->>'reason' FROM vsql_sync.audit_log WHERE action = 'stream.retry'")
    assert ("row removed",) in line
    verified(pair)


def test_a_skipped_transaction_is_missing_whole_and_the_rest_of_its_batch_is_applied(pair: TwoNodes) -> None:
    before = verified(pair)["passed_over"]
    forbid(pair, "skipped", 3)
    xids = commit(
        pair,
        "INSERT INTO skipped VALUES (1, 'a')",
        "INSERT INTO skipped VALUES (2, 'b'), (3, 'c'); INSERT INTO skipped_too VALUES (1, 'x')",
        "INSERT INTO skipped VALUES (4, 'd'); UPDATE skipped SET v = 'late' WHERE id = 2",
    )
    found = blocked(pair, "skipped")["transaction"]
    # Nothing but the transaction that blocks this stream can be skipped.
    assert "is blocked by transaction" in refused(
        pair, "skip", "--chain", pair.chain, "--transaction", str(xids[0])
    )
    assert "no incoming stream" in refused(
        pair, "skip", "--chain", "no.node-a", "--transaction", str(xids[1])
    )
    assert "is no transaction" in refused(pair, "skip", "--chain", pair.chain, "--transaction", "all")
    done = order(pair, "skip", found["lsn"])
    assert done["transaction"] == {"xid": xids[1], "lsn": found["lsn"]}
    in_step(pair)
    assert ids(pair, "skipped") == [1, 4], "the later update found its row missing"
    assert ids(pair, "skipped_too") == []
    (one,) = said(pair, xids[1])
    assert (one["verdict"], one["changes"], one["decision"]) == ("skipped", 3, done["decision"])
    assert verified(pair)["passed_over"] == before + 3
    marked = pair.b.query("SELECT table_name, reason FROM vsql_sync.table_sync WHERE state = 'DIVERGED'")
    assert {name for name, reason in marked if str(xids[1]) in reason} == {"skipped", "skipped_too"}
    decided = "SELECT reason, honoured_at IS NOT NULL FROM vsql_sync.decisions WHERE id = %s"
    assert pair.b.query(decided, done["decision"]) == [("ticket 1", True)]
    assert "is not blocked" in refused(pair, "skip", "--chain", pair.chain, "--transaction", str(xids[1]))
    # What was decided stays so: nothing of it comes back, and nothing blocks again.
    pair.b.stop("consumer")
    pair.b.start("consumer")
    commit(pair, "INSERT INTO skipped VALUES (5, 'e')")
    in_step(pair)
    assert ids(pair, "skipped") == [1, 4, 5]


def test_a_transaction_in_fragments_is_skipped_with_all_of_them(pair: TwoNodes) -> None:
    last = 3 * ROWS
    forbid(pair, "cut", last - 5)
    xids = commit(
        pair,
        f"INSERT INTO cut SELECT g, 'x' FROM generate_series(1, {last}) g;"
        "INSERT INTO cut_too VALUES (1, 'x')",
        f"INSERT INTO cut VALUES ({last + 1}, 'after')",
    )
    assert blocked(pair, "cut")["transaction"]["xid"] == xids[0]
    order(pair, "skip", xids[0])
    in_step(pair)
    assert ids(pair, "cut") == [last + 1]
    assert ids(pair, "cut_too") == []
    fragments = said(pair, xids[0])
    assert len(fragments) > 2
    assert sum(one["changes"] for one in fragments) == last + 1
    verified(pair)


def test_a_check_at_the_end_of_a_transaction_names_the_one_it_refuses(pair: TwoNodes) -> None:
    pair.b.execute(
        "CREATE FUNCTION public.no_three() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$BEGIN IF NEW.id = 3 THEN RAISE EXCEPTION 'not %', '{SECRET}'; END IF; RETURN NULL; END$$;"
        "CREATE CONSTRAINT TRIGGER late_check AFTER INSERT ON late DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION public.no_three();"
        "ALTER TABLE late ENABLE ALWAYS TRIGGER late_check"
    )
    xids = commit(
        pair,
        *(f"INSERT INTO late VALUES ({number}, 'x')" for number in (1, 2, 3, 4)),
    )
    rows = _until(
        lambda: pair.b.query(
            "SELECT detail->'blocked' FROM vsql_sync.stream_status WHERE chain = %s AND state = 'blocked'",
            pair.chain,
        )
    )
    found = rows[0][0]
    assert (found["sqlstate"], found["transaction"]["xid"]) == ("P0001", xids[2])
    assert SECRET not in json.dumps(found)
    order(pair, "skip", xids[2])
    in_step(pair)
    assert ids(pair, "late") == [1, 2, 4]
    verified(pair)


def test_a_trigger_that_raises_a_code_of_its_own_blocks_and_can_be_skipped(pair: TwoNodes) -> None:
    _refuse_by_trigger(pair, "own", 3, "UE001")
    xids = commit(
        pair, f"INSERT INTO own VALUES (1, 'a'), (3, '{SECRET}')", "INSERT INTO own VALUES (2, 'b')"
    )
    found = blocked(pair, "own")
    assert (found["sqlstate"], found["transaction"]["xid"]) == ("UE001", xids[0])
    assert SECRET not in json.dumps(found)
    order(pair, "skip", xids[0])
    in_step(pair)
    assert ids(pair, "own") == [2]


def _refuse_by_trigger(pair: TwoNodes, table: str, value: int, code: str) -> None:
    """Have a trigger of the target refuse a row under a code."""
    pair.b.execute(
        f"CREATE FUNCTION public.{table}_no() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN IF NEW.id = {value}"
        f" THEN RAISE EXCEPTION 'not %', NEW.v USING ERRCODE = '{code}', HINT = NEW.v; END IF; RETURN NEW;"
        f" END$$; CREATE TRIGGER no BEFORE INSERT OR UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION"
        f" public.{table}_no(); ALTER TABLE {table} ENABLE ALWAYS TRIGGER no"
    )


def _park(pair: TwoNodes, table: str) -> tuple[int, Any]:
    """Have a transaction of three rows parked, between two others; its xid and what `park` prints."""
    forbid(pair, table, 3)
    xids = commit(
        pair,
        f"INSERT INTO {table} VALUES (1, 'a')",
        f"INSERT INTO {table} VALUES (2, '{SECRET}'), (3, 'c'); INSERT INTO {table}_too VALUES (1, 'x')",
        f"INSERT INTO {table} VALUES (4, 'd')",
    )
    blocked(pair, table)
    done = order(pair, "park", xids[1])
    in_step(pair)
    assert ids(pair, table) == [1, 4]
    return xids[1], done


def _listed(pair: TwoNodes, xid: int) -> dict[str, Any]:
    found = pair.b.ctl_json("stream", "parked", "--chain", pair.chain)["parked"]
    (one,) = [one for one in found if one["xid"] == xid]
    return dict(one)


def _replays(pair: TwoNodes, xid: int) -> list[dict[str, Any]]:
    """The signed entries that say it was replayed."""
    rows = pair.b.query(
        "SELECT document FROM vsql_sync.vsql_sync_audit WHERE event_type = %s", TRANSACTION_REPLAYED
    )
    details = [json.loads(parse(bytes(document)).entry.detail) for (document,) in rows]
    return [detail for detail in details if detail["xid"] == xid]


def test_a_parked_transaction_waits_sealed_and_is_replayed_once(pair: TwoNodes) -> None:
    before = verified(pair)
    xid, done = _park(pair, "parked")
    assert [(one["verdict"], one["changes"]) for one in said(pair, xid)] == [("parked", 3)]
    listed = _listed(pair, xid)
    assert (listed["changes"], listed["tables"]) == (3, ["public.parked", "public.parked_too"])
    assert (listed["reason"], listed["replayed_at"]) == ("ticket 1", None)
    # As it came, byte by byte: each record of the dead-letter topic lies elsewhere too, and none holds a row.
    records = read_topics(pair.a.kafka, pair.cluster)
    dead = [one for one in records if one.topic == names.parked_topic(pair.cluster)]
    others = {one.value for one in records if one.topic != names.parked_topic(pair.cluster)}
    assert len(dead) > 1
    assert {one.value for one in dead} <= others
    assert not [one for one in dead if SECRET.encode() in (one.value or b"") + (one.key or b"")]
    # While the target refuses it, a replay fails, changes nothing, and the stream goes on.
    failed = refused(pair, "replay", "--chain", pair.chain, "--transaction", str(xid), "--timeout", "30")
    assert "CheckViolation" in failed
    assert SECRET not in failed
    assert ids(pair, "parked_too") == []
    allow(pair, "parked")
    commit(pair, "INSERT INTO parked VALUES (5, 'e')")
    in_step(pair)
    assert order(pair, "replay", done["transaction"]["lsn"])["answer"] == "done: replayed: 3 applied"
    assert ids(pair, "parked") == [1, 2, 3, 4, 5]
    assert ids(pair, "parked_too") == [1]
    again = refused(pair, "replay", "--chain", pair.chain, "--transaction", str(xid))
    assert "was replayed at" in again
    assert [one["changes"] for one in _replays(pair, xid)] == [3]
    assert _listed(pair, xid)["verdicts"] == {"applied": 3}
    after = verified(pair)
    assert after["passed_over"] - before["passed_over"] == after["replayed"] - before["replayed"] == 3
    shown = pair.a.ctl("audit", "verify", "--peer-connection", pair.b.conninfo).stdout
    assert (
        f"{after['passed_over']} changes skipped or parked by operators, {after['replayed']} of them" in shown
    )


def test_a_transaction_in_fragments_is_parked_and_replayed_whole(pair: TwoNodes) -> None:
    last = 3 * ROWS
    forbid(pair, "pieces", last - 5)
    rows = f"SELECT g, 'x' FROM generate_series(1, {last}) g"
    (xid,) = commit(pair, f"INSERT INTO pieces {rows}; INSERT INTO pieces_too VALUES (1, 'x')")
    blocked(pair, "pieces")
    order(pair, "park", xid)
    commit(pair, f"INSERT INTO pieces VALUES ({last + 1}, 'after')")
    in_step(pair)
    assert ids(pair, "pieces") == [last + 1]
    listed = _listed(pair, xid)
    assert (listed["changes"], listed["tables"]) == (last + 1, ["public.pieces", "public.pieces_too"])
    allow(pair, "pieces")
    assert order(pair, "replay", xid)["answer"] == f"done: replayed: {last + 1} applied"
    assert ids(pair, "pieces") == list(range(1, last + 2))
    assert ids(pair, "pieces_too") == [1]
    verified(pair)


@pytest.mark.parametrize("where", ["consumer.before-replay-commit", "consumer.after-replay-commit"])
def test_a_replay_that_is_killed_is_done_once_all_the_same(pair: TwoNodes, where: str) -> None:
    table = "killed"
    pair.a.execute("DELETE FROM killed; DELETE FROM killed_too")
    in_step(pair)
    xid, _ = _park(pair, table)
    allow(pair, table)
    pair.b.stop("consumer")
    pair.b.log_file("consumer").unlink()
    env = {"VSQL_SYNC_ALLOW_FAILPOINTS": "1", "VSQL_SYNC_FAILPOINTS": f"{where}=kill"}
    pair.b.start("consumer", env)
    words = ("--chain", pair.chain, "--transaction", str(xid), "--reason", "x", "--yes", "--timeout", "0")
    pair.b.ctl("stream", "replay", *words)
    _until(lambda: '"code": -9' in pair.b.tail("consumer", 200))
    pair.b.stop("consumer")
    pair.b.start("consumer")
    _until(lambda: ids(pair, table) == [1, 2, 3, 4])
    _until(lambda: [one["changes"] for one in _replays(pair, xid)] == [3])
    commit(pair, f"INSERT INTO {table} VALUES (5, 'e')")
    in_step(pair)
    assert len(_replays(pair, xid)) == 1
    verified(pair)


def test_a_replay_whose_records_are_gone_says_so_and_the_stream_goes_on(pair: TwoNodes) -> None:
    xid, _ = _park(pair, "gone")
    allow(pair, "gone")
    topic = names.parked_topic(pair.cluster)
    place = TopicPartition(topic, 0, -1)
    admin = make_admin(load_settings(pair.a.config))  # its answers end with it
    admin.delete_records([place])[place].result(20)
    failed = refused(pair, "replay", "--chain", pair.chain, "--transaction", str(xid), "--timeout", "30")
    assert "is not in the dead-letter topic" in failed
    commit(pair, "INSERT INTO gone VALUES (6, 'f')")
    in_step(pair)
    assert ids(pair, "gone") == [1, 4, 6]


@pytest.mark.parametrize("where", ["consumer.before-apply-commit", "consumer.after-apply-commit"])
def test_a_consumer_killed_while_it_parks_leaves_one_to_be_replayed(pair: TwoNodes, where: str) -> None:
    pair.a.execute("DELETE FROM between; DELETE FROM between_too")
    in_step(pair)
    forbid(pair, "between", 3)
    xids = commit(
        pair,
        "INSERT INTO between VALUES (1, 'a')",
        "INSERT INTO between VALUES (2, 'b'), (3, 'c')",
        "INSERT INTO between VALUES (4, 'd')",
    )
    blocked(pair, "between")
    pair.b.stop("consumer")
    pair.b.log_file("consumer").unlink()
    env = {"VSQL_SYNC_ALLOW_FAILPOINTS": "1", "VSQL_SYNC_FAILPOINTS": f"{where}=kill"}
    pair.b.start("consumer", env)
    blocked(pair, "between")
    words = ("--chain", pair.chain, "--transaction", str(xids[1]), "--reason", "x", "--yes", "--timeout", "0")
    pair.b.ctl("stream", "park", *words)
    _until(lambda: '"code": -9' in pair.b.tail("consumer", 200))
    pair.b.stop("consumer")
    pair.b.start("consumer")
    in_step(pair)
    assert ids(pair, "between") == [1, 4]
    assert [one["changes"] for one in said(pair, xids[1])] == [2]
    allow(pair, "between")
    assert order(pair, "replay", xids[1])["answer"] == "done: replayed: 2 applied"
    assert ids(pair, "between") == [1, 2, 3, 4]
    verified(pair)


def test_a_replay_that_meets_what_may_pass_is_answered_and_the_stream_goes_on(pair: TwoNodes) -> None:
    xid, _ = _park(pair, "busy")
    allow(pair, "busy")
    _refuse_by_trigger(pair, "busy", 2, "40001")
    failed = refused(pair, "replay", "--chain", pair.chain, "--transaction", str(xid), "--timeout", "30")
    assert "40001" in failed
    assert "order it again" in failed
    assert SECRET not in failed + pair.b.log_file("consumer").read_text()
    commit(pair, "INSERT INTO busy VALUES (5, 'e')")
    in_step(pair)
    assert ids(pair, "busy") == [1, 4, 5]
    pair.b.execute("DROP TRIGGER no ON busy")
    assert order(pair, "replay", xid)["answer"] == "done: replayed: 3 applied"
    assert ids(pair, "busy") == [1, 2, 3, 4, 5]


def _lies(pair: TwoNodes, decision: int) -> list[Record]:
    """The records of what was parked by a decision."""
    found = pair.b.query("SELECT offsets FROM vsql_sync.parked_batches WHERE decision = %s", decision)
    ((offsets,),) = found
    topic = names.parked_topic(pair.cluster)
    records = read_topics(pair.a.kafka, pair.cluster)
    return [one for one in records if one.topic == topic and one.offset in offsets]


def test_what_others_write_to_the_topics_since_does_not_hinder_a_replay(pair: TwoNodes) -> None:
    xid, done = _park(pair, "mixed")
    allow(pair, "mixed")
    records = _lies(pair, done["decision"])
    # As if somebody had written between ours while they were: the same keys, and keys that end in no number.
    others = [
        (Record(one.topic, 0, 0, one.key, b"forged"), one, Record(one.topic, 0, 0, one.key, b"forged"),
         Record(one.topic, 0, 0, (one.key or b"").rpartition(b"/")[0] + "/\u00b2".encode(), b"forged"))
        for one in records
    ]  # fmt: skip
    append(pair.a.kafka, [record for four in others for record in four])
    last = max(one.offset for one in read_topics(pair.a.kafka, pair.cluster) if one.topic == records[0].topic)
    first = last + 1 - 4 * len(records)
    pair.b.query(
        "UPDATE vsql_sync.parked_batches SET offsets = %s WHERE decision = %s",
        [first + 4 * number + 1 for number in range(len(records))],
        done["decision"],
    )
    # A forged announcement of its data key, which an operator passes over.
    ((document,),) = pair.a.query(
        "SELECT document FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND sequence = (SELECT sequence"
        " FROM vsql_sync.vsql_sync_audit WHERE chain = %s ORDER BY sequence DESC LIMIT 1)",
        pair.chain,
        pair.chain,
    )
    dek_id = parse(bytes(document)).entry.dek_id
    append(pair.a.kafka, [Record(names.keys_topic(pair.cluster), 0, 0, dek_id.encode(), b"forged")])
    shown = _until(
        lambda: pair.b.query(
            "SELECT detail->'refused'->>'record' FROM vsql_sync.stream_status WHERE chain = %s"
            " AND state = 'refused'",
            pair.chain,
        )
    )
    words = ("--chain", pair.chain, "--record", shown[0][0], "--reason", "forged", "--yes")
    pair.b.ctl("stream", "ignore-record", *words)
    commit(pair, "INSERT INTO mixed VALUES (5, 'e')")
    in_step(pair)
    assert order(pair, "replay", xid)["answer"] == "done: replayed: 3 applied"
    assert ids(pair, "mixed") == [1, 2, 3, 4, 5]


def test_a_replay_asks_for_no_table_that_only_others_changed(pair: TwoNodes) -> None:
    forbid(pair, "away", 3)
    xids = commit(pair, "INSERT INTO away_too VALUES (1, 'x')", "INSERT INTO away VALUES (2, 'b'), (3, 'c')")
    blocked(pair, "away")
    done = order(pair, "park", xids[1])
    in_step(pair)
    assert ids(pair, "away_too") == [1]
    ((document,),) = pair.a.query(
        "SELECT document FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND sequence = %s",
        pair.chain,
        pair.b.query("SELECT sequence FROM vsql_sync.parked_batches WHERE decision = %s", done["decision"])[
            0
        ][0],
    )
    assert "public.away_too" in parse(bytes(document)).entry.tables_affected, "both are in one batch"
    allow(pair, "away")
    pair.b.execute("ALTER TABLE away_too RENAME TO gone_away")
    assert order(pair, "replay", xids[1])["answer"] == "done: replayed: 2 applied"
    pair.b.execute("ALTER TABLE gone_away RENAME TO away_too")
    assert ids(pair, "away") == [2, 3]


def test_a_batch_that_is_tried_again_and_again_is_copied_once(pair: TwoNodes) -> None:
    forbid(pair, "again", 3)
    xids = commit(
        pair, "INSERT INTO again VALUES (2, 'b'), (3, 'c')", "INSERT INTO again_too VALUES (1, 'x')"
    )
    blocked(pair, "again")
    pair.b.execute("ALTER TABLE again_too RENAME TO gone_again")
    topic = names.parked_topic(pair.cluster)
    before = sum(one.topic == topic for one in read_topics(pair.a.kafka, pair.cluster))
    on = ("--chain", pair.chain, "--reason", "x")
    pair.b.ctl("stream", "park", "--transaction", str(xids[0]), "--yes", "--timeout", "0", *on)
    copied = []
    for _ in range(3):
        _until(
            lambda: pair.b.query(
                "SELECT 1 FROM vsql_sync.stream_status WHERE chain = %s AND state = 'waiting'"
                " AND detail->>'last_error' LIKE '%%again_too is not in the target%%'",
                pair.chain,
            )
        )
        copied.append(sum(one.topic == topic for one in read_topics(pair.a.kafka, pair.cluster)) - before)
        pair.b.ctl("stream", "retry", "--timeout", "30", *on)
    assert copied[0] > 1
    assert copied == [copied[0]] * 3
    pair.b.execute("ALTER TABLE gone_again RENAME TO again_too")
    pair.b.ctl("stream", "retry", "--timeout", "0", *on)
    in_step(pair)
    assert (ids(pair, "again"), ids(pair, "again_too")) == ([], [1])
    allow(pair, "again")
    assert order(pair, "replay", xids[0])["answer"] == "done: replayed: 2 applied"
    assert ids(pair, "again") == [2, 3]
    verified(pair)
