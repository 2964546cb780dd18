"""Logical messages (020_messages of PostgreSQL's own suite): carried for the prefixes a publication names.

What `pg_logical_emit_message` was given on node A is read back on node B by a decoding slot of B's own.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from typing import Any

import psycopg
import pytest

from tests.nodes import Node, TwoNodes
from tests.pairs import Pairs
from tests.stack import kill_tree

pytestmark = pytest.mark.topology

TABLE = "CREATE TABLE t (id bigint PRIMARY KEY, v text);"
SLOT = "reader"
ARGS = ["--message-prefix", "orders", "--message-prefix", "Größe"]


def emit(node: Node, transactional: bool, prefix: str, content: bytes) -> None:
    node.query("SELECT pg_logical_emit_message(%s, %s, %s::bytea)", transactional, prefix, content)


def read_back(node: Node) -> list[tuple[Any, ...]]:
    """What B's WAL says: rows as ('row',), messages as (transactional, prefix, content), in its order."""
    found: list[tuple[Any, ...]] = []
    rows = node.query(
        "SELECT data FROM pg_logical_slot_get_binary_changes(%s, NULL, NULL, 'proto_version', '1',"
        " 'publication_names', 'reader', 'messages', 'true')",
        SLOT,
    )
    for (data,) in rows:
        if data[:1] == b"I":
            found.append(("row",))
        elif data[:1] == b"M":
            end = data.index(b"\0", 10)
            (size,) = struct.unpack_from(">i", data, end + 1)
            assert len(data) == end + 5 + size
            found.append((bool(data[1]), data[10:end].decode(), bytes(data[end + 5 :])))
    return found


def made(pairs: Pairs, **options: Any) -> TwoNodes:
    pair = pairs(TABLE, **options)
    pair.create(["t(*)"], publication_args=ARGS)
    pair.b.query("CREATE PUBLICATION reader FOR TABLE t")
    pair.b.query("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", SLOT)
    return pair


def tail(node: Node, chain: str, limit: int) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "vsql_consumers", "--config", str(node.config), "--tail", chain,
         "--from-start", "--limit", str(limit)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(300)
def test_messages_of_named_prefixes_arrive_in_place_once_and_no_others_leave(pairs: Pairs) -> None:
    pair = made(pairs)
    large = bytes(range(256)) * 12_000  # three of Kafka's messages
    pair.start()
    pair.wait_in_step()
    read_back(pair.b)
    with psycopg.connect(pair.a.conninfo) as conn:
        conn.execute("INSERT INTO t VALUES (1)")
        conn.execute("SELECT pg_logical_emit_message(true, 'orders', 'between')")
        conn.execute("SELECT pg_logical_emit_message(true, 'other', 'stays here')")
        conn.execute("SELECT pg_logical_emit_message(true, 'order', 'stays here')")
        conn.execute("INSERT INTO t VALUES (2)")
        conn.execute("SELECT pg_logical_emit_message(true, 'Größe', %s::bytea)", (large,))
    with psycopg.connect(pair.a.conninfo) as conn:
        conn.execute("INSERT INTO t VALUES (3)")
        conn.execute("SELECT pg_logical_emit_message(true, 'orders', 'rolled back')")
        # Without a transaction it is there although this one rolls back.
        conn.execute("SELECT pg_logical_emit_message(false, 'orders', 'alone')")
        conn.rollback()
    emit(pair.a, False, "other", b"stays here")
    emit(pair.a, True, "orders", b"")
    pair.wait_in_step()
    at_b = [
        ("row",), (True, "orders", b"between"), ("row",), (True, "Größe", large),
        (True, "orders", b"alone"), (True, "orders", b""),
    ]  # fmt: skip
    assert read_back(pair.b) == at_b
    assert pair.audited_rows() == pair.acknowledged_rows() == 6
    shown = [one for one in tail(pair.b, pair.chain, 6) if one["op"] == "message"]
    assert [(m["prefix"], m["transactional"], m["content"]) for m in shown if m["prefix"] == "orders"] == [
        ("orders", True, "between"), ("orders", False, "alone"), ("orders", True, ""),
    ]  # fmt: skip
    assert all("stays here" not in str(one) for one in shown)
    for node in (pair.a, pair.b):
        assert node.ctl("audit", "verify").returncode == 0
    listed = pair.a.ctl_json("publication", "list")
    assert [one["message_prefixes"] for one in listed] == [["Größe", "orders"]]
    pair.stop()


@pytest.mark.timeout(300)
def test_messages_are_there_once_whoever_is_killed(pairs: Pairs) -> None:
    """On 15, whose walsender tells no origin of a message outside of a transaction."""
    pair = made(pairs, version=15, config="[limits]\nretry_backoff_ms = 50\nbatch_linger_ms = 0\n")
    pair.start()
    pair.wait_in_step()
    read_back(pair.b)
    wanted: list[tuple[Any, ...]] = []
    for turn in range(3):
        for number in range(20):
            content = f"{turn}/{number}".encode()
            transactional = number % 2 == 0
            emit(pair.a, transactional, "orders", content)
            wanted.append((True, "orders", content))
            if number == 10:
                for node, role in ((pair.a, "producer"), (pair.b, "consumer"))[turn % 2 :]:
                    kill_tree(node.services.pop(role))
                    node.start(role)
    pair.wait_in_step()
    assert read_back(pair.b) == wanted
    assert pair.audited_rows() == len(wanted)
    pair.stop()
