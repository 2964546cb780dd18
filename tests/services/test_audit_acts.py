"""`syncctl audit verify` and the operators' log: each signed act's line is there, as it was; none is new.

The worker's part (obey, sign, answer) is played here with the product's own functions on a real database; the
topology tests have real workers do it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.audit_history import CHAIN, History
from tests.conftest import NewDatabase
from tests.services.test_audit_cli import Pair
from tests.services.test_audit_trail import store
from vsql_shared.audit.entries import OPERATOR_ACTION, canonical_json
from vsql_shared.pg import acts, commands, control
from vsql_shared.pg.connect import Connection


def obey(conn: Connection, history: History) -> None:
    """What a producer does with each command: an entry, then the answer."""
    for command in commands.pending(conn, CHAIN, "producer"):
        detail = canonical_json(acts.describe(conn, command))
        history.add(event_type=OPERATOR_ACTION, batch_lsn_start=5, batch_lsn_end=5, detail=detail)
        commands.finish(conn, command.id, CHAIN, "out", True)


@pytest.fixture
def ordered(tmp_path: Path, new_database: NewDatabase, capsys: pytest.CaptureFixture[str]) -> Iterator[Pair]:
    """Node A after a pause, a resume and a `retry` nobody logged (command 3)."""
    pair = Pair(tmp_path, new_database("node_a"), new_database("node_b"), capsys)
    conn = pair.conns["node-a"]
    conn.execute(
        "INSERT INTO vsql_sync.streams (chain, direction, publication, origin, desired)"
        " VALUES (%s, 'out', 'orders', 'node-a', 'running')",
        (CHAIN,),
    )
    history = History()
    history.open()
    control.pause(conn, "maintenance")
    control.resume(conn)
    commands.request(conn, "producer", "retry", {}, "by hand", CHAIN)
    obey(conn, history)
    history.batch()
    store(conn, history)
    yield pair
    pair.close()


def filled(text: str, lines: dict[str, int]) -> str:
    """Names of lines in a text → their numbers."""
    for name, number in lines.items():
        text = text.replace(name, str(number))
    return text


def by_force(conn: Connection, statement: str) -> dict[str, int]:
    """As superuser, with the append-only trigger of the operators' log switched off; the lines' numbers."""
    [(pause, resume, last)] = conn.execute(
        "SELECT min(id) FILTER (WHERE action = 'stream.pause'),"
        " min(id) FILTER (WHERE action = 'stream.resume'),"
        " max(id) FROM vsql_sync.audit_log"
    ).fetchall()
    lines = {"PAUSE": pause, "RESUME": resume, "NEW": last + 1}
    with conn.transaction():
        conn.execute("ALTER TABLE vsql_sync.audit_log DISABLE TRIGGER audit_log_append_only")
        assert conn.execute(filled(statement, lines).encode()).rowcount > 0
        conn.execute("ALTER TABLE vsql_sync.audit_log ENABLE ALWAYS TRIGGER audit_log_append_only")
    return lines


_INSERT = "INSERT INTO vsql_sync.audit_log (action, actor, target_type, target_id, new_value)"
_COMMAND = "INSERT INTO vsql_sync.commands (role, chain, verb, args) VALUES ('producer', 'orders.node-a',"
ATTACKS: dict[str, tuple[str, int | None, str]] = {
    "who": ("UPDATE vsql_sync.audit_log SET actor = 'mallory' WHERE id = PAUSE", 2, "audit_log/PAUSE"),
    "why": (
        'UPDATE vsql_sync.audit_log SET new_value = new_value || \'{"reason": "x"}\' WHERE id = RESUME',
        3,
        "audit_log/RESUME",
    ),
    "when, by a microsecond": (
        "UPDATE vsql_sync.audit_log SET occurred_at = occurred_at + interval '1 us' WHERE id = PAUSE",
        2,
        "audit_log/PAUSE",
    ),
    "when, beyond the calendar": (
        "UPDATE vsql_sync.audit_log SET occurred_at = 'infinity' WHERE id = PAUSE",
        2,
        "audit_log/PAUSE",
    ),
    "when, before Christ": (
        (
            "UPDATE vsql_sync.audit_log SET"
            " occurred_at = (occurred_at::timestamp::text || ' BC')::timestamptz WHERE id = PAUSE"
        ),
        2,
        "audit_log/PAUSE",
    ),
    "a number nobody can read": (
        (
            "UPDATE vsql_sync.audit_log SET new_value = ('{\"a\": ' || repeat('9', 6000) || '}')::jsonb"
            " WHERE id = PAUSE"
        ),
        2,
        "audit_log/PAUSE",
    ),
    "two lines: the first is named": ("UPDATE vsql_sync.audit_log SET success = false", 2, "audit_log/PAUSE"),
    "a line deleted": ("DELETE FROM vsql_sync.audit_log WHERE id = RESUME", 3, "audit_log/RESUME,"),
    "a command nobody logged altered": (
        "UPDATE vsql_sync.commands SET requested_by = 'mallory' WHERE id = 3",
        4,
        "commands/3",
    ),
    "a command nobody logged deleted": (
        "DELETE FROM vsql_sync.commands WHERE id = 3",
        4,
        "commands/3, the order of this act (retry), was deleted",
    ),
    "a line inserted": (
        f"{_INSERT} VALUES ('stream.pause', 'olga', 'stream', 'orders.node-a', '{{}}')",
        None,
        "audit_log/NEW",
    ),
    "a line inserted for all streams": (
        f"{_INSERT} VALUES ('key.rotate-dek', 'olga', 'stream', '*', '{{}}')",
        None,
        "audit_log/NEW",
    ),
    "a line copied": (
        (
            f"{_INSERT} SELECT action, actor, target_type, target_id, new_value FROM vsql_sync.audit_log"
            " WHERE id = PAUSE"
        ),
        None,
        "audit_log/NEW",
    ),
    "a line inserted with a command that looks obeyed": (
        (
            f"WITH l AS ({_INSERT} VALUES ('stream.pause', 'olga', 'stream', 'orders.node-a', '{{}}')"
            f" RETURNING id), c AS ({_COMMAND} 'pause', '{{\"audit_log\": NEW}}') RETURNING id)"
            " INSERT INTO vsql_sync.command_results (command_id, chain, direction, ok)"
            " SELECT c.id, 'orders.node-a', 'out', true FROM c, l"
        ),
        None,
        "commands/4",
    ),
    "a command inserted that looks obeyed": (
        (
            f"WITH c AS ({_COMMAND} 'resume', '{{}}') RETURNING id)"
            " INSERT INTO vsql_sync.command_results (command_id, chain, direction, ok)"
            " SELECT c.id, 'orders.node-a', 'out', true FROM c"
        ),
        None,
        "commands/4",
    ),
    "a command turned over to another line": (
        (
            f"WITH l AS ({_INSERT} VALUES ('stream.pause', 'olga', 'stream', 'orders.node-a', '{{}}'))"
            " UPDATE vsql_sync.commands SET args = '{\"audit_log\": NEW}' WHERE id = 1"
        ),
        None,
        "audit_log/NEW",
    ),
}


def test_acts_that_are_as_they_were_signed_verify(ordered: Pair) -> None:
    code, found = ordered.verify("node-a")
    assert (code, found["problems"], found["warnings"]) == (0, [], [])


@pytest.mark.parametrize("attack", ATTACKS)
def test_act_changed_deleted_or_inserted_by_a_superuser_is_named(ordered: Pair, attack: str) -> None:
    statement, sequence, named = ATTACKS[attack]
    lines = by_force(ordered.conns["node-a"], statement)
    code, found = ordered.verify("node-a")
    assert code == 9
    problem = found["problems"][0]
    assert (problem["sequence"], problem["event_id"] is None) == (sequence, sequence is None)
    assert filled(named, lines) in problem["what"]
    assert "mallory" not in str(found), "what a line says stays in it"


def test_order_that_waits_for_its_worker_or_was_refused_by_it_is_no_finding(ordered: Pair) -> None:
    conn = ordered.conns["node-a"]
    control.pause(conn, "its worker is down")
    assert ordered.verify("node-a")[0] == 0
    [command] = commands.pending(conn, CHAIN, "producer")
    commands.finish(conn, command.id, CHAIN, "out", False, "the stream is diverged")
    assert ordered.verify("node-a")[0] == 0


def test_acts_of_other_chains_are_not_looked_at_where_one_is_asked_for(ordered: Pair) -> None:
    conn = ordered.conns["node-a"]
    other = History("bills.node-a")
    other.open()
    store(conn, other)
    by_force(conn, "UPDATE vsql_sync.audit_log SET actor = 'mallory' WHERE id = PAUSE")
    assert ordered.verify("node-a", "--chain", other.chain)[0] == 0
    assert ordered.verify("node-a", "--chain", CHAIN)[0] == 9


def test_acts_of_the_peer_are_verified_with_the_peer(ordered: Pair) -> None:
    by_force(ordered.conns["node-a"], "DELETE FROM vsql_sync.audit_log WHERE id = PAUSE")
    code, found = ordered.verify("node-b", "--peer-connection", ordered.infos["node-a"])
    assert code == 9
    assert "was deleted: it is not there" in found["problems"][0]["what"]
