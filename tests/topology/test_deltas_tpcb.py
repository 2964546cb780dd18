"""TPC-B on two nodes at once, through Kafka: accounts, tellers and branches add up to the history, at both.

Clients go on while one consumer is killed and while neither node hears of the other.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import psycopg
import pytest

from tests.nodes import Node, TwoNodes
from tests.stack import Stack, kill_tree
from tests.waiting import until

TABLES = """
CREATE TABLE branches (bid int PRIMARY KEY, bbalance bigint NOT NULL);
CREATE TABLE tellers (tid int PRIMARY KEY, bid int, tbalance numeric(14,2) NOT NULL);
CREATE TABLE accounts (aid int PRIMARY KEY, bid int, abalance int NOT NULL, filler text);
CREATE TABLE history (hid uuid PRIMARY KEY, tid int, bid int, aid int, delta int);
ALTER TABLE branches REPLICA IDENTITY FULL; ALTER TABLE tellers REPLICA IDENTITY FULL;
ALTER TABLE accounts REPLICA IDENTITY FULL; ALTER TABLE history REPLICA IDENTITY FULL
"""
ROWS = """
INSERT INTO branches SELECT g, 0 FROM generate_series(1, 2) g;
INSERT INTO tellers SELECT g, 1 + g % 2, 0 FROM generate_series(1, 10) g;
INSERT INTO accounts SELECT g, 1 + g % 2, 0, 'from the beginning' FROM generate_series(1, 200) g
"""
CONFIG = "[limits]\nbatch_linger_ms = 5\nretry_backoff_max_ms = 1000\n" + "".join(
    f'[[conflict.crdt.columns]]\ntable = "{table}"\ncolumn = "{column}"\nfunction = "{function}"\n'
    for table, column, function in (
        ("branches", "bbalance", "delta_apply"),
        ("tellers", "tbalance", "delta_apply_numeric"),
        ("accounts", "abalance", "spock_delta_apply_int4"),
    )
)
SUMS = """SELECT (SELECT sum(bbalance) FROM branches), (SELECT sum(tbalance) FROM tellers),
(SELECT sum(abalance) FROM accounts), (SELECT sum(delta) FROM history)"""
CLIENTS = 2


def _bank(node: Node, seed: int, done: threading.Event, failures: list[str]) -> None:
    """TPC-B; now and then a change of what does not add up, and one of both."""
    number = 0
    with psycopg.connect(node.conninfo, autocommit=True) as conn:
        while not done.wait(0.2):
            number += 1
            at = number * 7 + seed * 13
            aid, tid, bid, delta = at % 200 + 1, at % 10 + 1, at % 2 + 1, at % 2001 - 1000
            try:
                with conn.transaction():
                    conn.execute("UPDATE accounts SET abalance = abalance + %s WHERE aid = %s", (delta, aid))
                    conn.execute("UPDATE tellers SET tbalance = tbalance + %s WHERE tid = %s", (delta, tid))
                    conn.execute("UPDATE branches SET bbalance = bbalance + %s WHERE bid = %s", (delta, bid))
                    conn.execute(
                        "INSERT INTO history VALUES (gen_random_uuid(), %s, %s, %s, %s)",
                        (tid, bid, aid, delta),
                    )
                if number % 4 == 0:
                    filler = f"{node.name} {seed} {number}"
                    conn.execute("UPDATE accounts SET filler = %s WHERE aid = %s", (filler, at % 3 + 1))
            except psycopg.errors.DeadlockDetected:
                continue
            except psycopg.Error as error:
                failures.append(str(error))
                return


def _is_level(pair: TwoNodes) -> bool:
    """Each has applied all the other has committed, and all rows are the same."""
    for source, target in ((pair.a, pair.b), (pair.b, pair.a)):
        chain = f"pub.{source.name}"
        head = source.query("SELECT max(sequence) FROM vsql_sync.vsql_sync_audit WHERE chain = %s", chain)
        if head != target.query("SELECT sequence FROM vsql_sync.apply_progress WHERE chain = %s", chain):
            return False
    return pair.differences() == []


def _say(pair: TwoNodes) -> str:
    found = [f"{node.name}: {node.query(SUMS)}" for node in (pair.a, pair.b)]
    tails = [node.tail(role, 6) for node in (pair.a, pair.b) for role in ("consumer", "producer")]
    return "\n".join([*found, *pair.differences(), *tails])


def _kill(node: Node, role: str) -> None:
    kill_tree(node.services.pop(role))


@pytest.mark.parametrize(
    "seconds", [8, pytest.param(600, marks=[pytest.mark.long, pytest.mark.timeout(1800)])]
)
def test_two_way_tpc_b_keeps_its_sums(stack: Stack, tmp_path: Path, seconds: int) -> None:
    pair = TwoNodes(stack, tmp_path, TABLES, config=CONFIG)
    pair.a.execute(ROWS)
    pair.create(
        [f"{name}(*)" for name in ("branches", "tellers", "accounts", "history")], mode="bidirectional"
    )
    for node in (pair.a, pair.b):
        node.start("producer")
        node.start("consumer")
    is_open = "SELECT bool_and(writable) FROM vsql_sync.multi_writer_tables"
    until(lambda: pair.b.query(is_open) == [(True,)], 60, lambda: pair.b.tail("consumer"))
    done, failures = threading.Event(), list[str]()
    clients = [
        threading.Thread(target=_bank, args=(node, seed * 2 + at, done, failures))
        for at, node in enumerate((pair.a, pair.b))
        for seed in range(CLIENTS)
    ]
    try:
        for client in clients:
            client.start()
        time.sleep(seconds / 4)
        _kill(pair.b, "consumer")  # in the middle of whatever it applies
        pair.b.start("consumer")
        time.sleep(seconds / 4)
        for node in (pair.a, pair.b):  # both go on, and neither hears of the other
            _kill(node, "consumer")
        time.sleep(seconds / 4)
        for node in (pair.a, pair.b):
            node.start("consumer")
        time.sleep(seconds / 4)
    finally:
        done.set()
        for client in clients:
            client.join(30)
    assert failures == []
    until(lambda: _is_level(pair), 120 + seconds, lambda: _say(pair))
    for node in (pair.a, pair.b):
        ((branches, tellers, accounts, history),) = node.query(SUMS)
        assert branches == tellers == accounts == history
    number = pair.a.query("SELECT count(*) FROM history")[0][0]
    assert number > 4 * seconds
    # The sums are no conflicts; what both wrote of the rest is.
    logged = pair.a.query("SELECT DISTINCT table_name FROM vsql_sync.conflict_log")
    # A few seconds may pass without a conflict.
    assert logged in ([[("accounts",)]] if seconds > 60 else [[("accounts",)], []])
    (shared,) = (
        one for one in pair.a.ctl_json("status")["shared_tables"] if one["table"] == "public.accounts"
    )
    assert shared["adding"] == ["abalance"]
    pair.end()
