"""An INSERT that was parked, and what adds to its row since: one order brings it back, and all goes on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psycopg
import pytest

from tests.nodes import Node, TwoNodes
from tests.stack import Stack
from tests.waiting import until

TABLES = """
CREATE TABLE account (id int PRIMARY KEY, note text, bal int NOT NULL);
CREATE TABLE beside (id int PRIMARY KEY);
ALTER TABLE account REPLICA IDENTITY FULL; ALTER TABLE beside REPLICA IDENTITY FULL
"""
CONFIG = (
    "[limits]\nbatch_linger_ms = 5\nretry_backoff_ms = 100\nstatus_interval_ms = 200\ncommand_poll_ms = 200\n"
    '[[conflict.crdt.columns]]\ntable = "account"\ncolumn = "bal"\nfunction = "delta_apply"\n'
)
_until = partial(until, timeout=60)


@pytest.fixture
def pair(stack: Stack, tmp_path: Path) -> Iterator[TwoNodes]:
    made = TwoNodes(stack, tmp_path, TABLES, config=CONFIG)
    try:
        made.create(["account(*)", "beside(*)"], mode="bidirectional")
        for node in (made.a, made.b):
            node.start("producer")
            node.start("consumer")
        is_open = "SELECT bool_and(writable) FROM vsql_sync.multi_writer_tables"
        _until(lambda: made.b.query(is_open) == [(True,)], tell=lambda: made.b.tail("consumer"))
        yield made
        made.stop()
    finally:
        made.end()


def _commit(node: Node, *statements: str) -> int:
    """One transaction; its xid."""
    with psycopg.connect(node.conninfo) as conn:
        for statement in statements:
            conn.execute(statement.encode())
        row = conn.execute("SELECT pg_current_xact_id()::text::bigint & 4294967295").fetchone()
        return 0 if row is None else int(row[0])


def _blocked(pair: TwoNodes, table: str) -> None:
    _until(
        lambda: pair.b.query(
            "SELECT 1 FROM vsql_sync.stream_status WHERE chain = %s AND state = 'blocked'"
            " AND detail->'blocked'->>'table' = %s",
            pair.chain,
            f"public.{table}",
        ),
        tell=lambda: pair.b.tail("consumer"),
    )


def test_one_replay_of_the_insert_lets_all_go_on_that_adds_to_its_row(pair: TwoNodes) -> None:
    pair.b.execute("ALTER TABLE beside ADD CONSTRAINT none CHECK (id <> 7)")
    begun = _commit(pair.a, "INSERT INTO account VALUES (1, 'x', 100)", "INSERT INTO beside VALUES (7)")
    words = ("--chain", pair.chain, "--transaction", str(begun), "--reason", "ticket 1", "--yes")
    _blocked(pair, "beside")
    pair.b.ctl("stream", "park", *words, "--timeout", "30")
    pair.wait_in_step()
    for amount in (5, 7, 9):
        _commit(pair.a, f"UPDATE account SET bal = bal + {amount} WHERE id = 1")
    _blocked(pair, "account")
    # What does not fit is tried, says so, and stays parked; the stream stays where it is.
    failed = pair.b.ctl("stream", "replay", *words, "--timeout", "30", check=False)
    assert failed.returncode != 0
    assert "CheckViolation" in failed.stderr
    _blocked(pair, "account")
    assert pair.b.query("SELECT * FROM account") == []
    pair.b.execute("ALTER TABLE beside DROP CONSTRAINT none")
    answer = pair.b.ctl_json("stream", "replay", *words, "--timeout", "30")["answer"]
    assert answer == "done: replayed: 2 applied"
    pair.b.execute("INSERT INTO account VALUES (2, 'of b', 1)")
    pair.wait_in_step()
    _until(lambda: pair.differences() == [], tell=lambda: "\n".join(pair.differences()))
    assert pair.b.query("SELECT bal FROM account ORDER BY id") == [(121,), (1,)]
