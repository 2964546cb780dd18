"""What stays bounded: memory whatever passes, WAL whatever others write, waiting whatever is away."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import psycopg
import pytest

from tests.nodes import TwoNodes
from tests.pairs import Pairs
from tests.stack import Stack

pytestmark = pytest.mark.topology

ROWS = "CREATE TABLE t (id bigint PRIMARY KEY, v text NOT NULL)"
LIMIT_MB = 300


def _peaks(pair: TwoNodes) -> dict[str, float]:
    """Peak resident MB of every process of both services (VmHWM)."""
    found: dict[str, float] = {}
    for node in (pair.a, pair.b):
        for role, process in node.services.items():
            service = psutil.Process(process.pid)
            for each in [service, *service.children(recursive=True)]:
                line = next(
                    text
                    for text in Path(f"/proc/{each.pid}/status").read_text().splitlines()
                    if text.startswith("VmHWM")
                )
                found[f"{role} of {node.name}, pid {each.pid}"] = int(line.split()[1]) / 1024
    return found


def _insert(pair: TwoNodes, first: int, rows: int, per_tx: int) -> None:
    with psycopg.connect(pair.a.conninfo, autocommit=True) as connection:
        for start in range(first, first + rows, per_tx):
            connection.execute(
                "INSERT INTO t SELECT g, repeat(md5(g::text), 6)"
                " FROM generate_series(%s::bigint, %s::bigint) g",
                (start, start + per_tx - 1),
            )


def _pass_rows(pairs: Pairs, rows: int) -> None:
    pair = pairs(ROWS)
    pair.create(["t(*)"])
    pair.start()
    _insert(pair, 1, rows, 1000)
    pair.wait_in_step(timeout=600)
    _insert(pair, rows + 1, rows, rows)  # the same again, in one transaction
    pair.wait_in_step(timeout=600)
    peaks = _peaks(pair)
    assert pair.b.query("SELECT count(*) FROM t") == [(2 * rows,)]
    assert len(peaks) >= 4, "a supervisor and a worker on each side"
    assert max(peaks.values()) < LIMIT_MB, peaks
    pair.stop()


@pytest.mark.timeout(240)
def test_memory_stays_bounded_with_many_transactions_and_with_a_large_one(pairs: Pairs) -> None:
    _pass_rows(pairs, 100_000)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_memory_stays_bounded_with_a_million_rows_and_one_transaction_of_a_million(pairs: Pairs) -> None:
    _pass_rows(pairs, 1_000_000)


def _confirmed(pair: TwoNodes) -> int:
    return int(
        pair.a.query(
            "SELECT r.confirmed_flush_lsn - '0/0'::pg_lsn FROM vsql_sync.streams s"
            " JOIN pg_replication_slots r USING (slot_name) WHERE s.chain = %s AND s.direction = 'out'",
            pair.chain,
        )[0][0]
    )


def _idle(stack: Stack, pairs: Pairs, seconds: float) -> None:
    pair = pairs(ROWS)
    pair.create(["t(*)"])
    pair.start()
    pair.wait_in_step()
    elsewhere = stack.new_database(18, "elsewhere")
    entries = pair.heads()[0]
    positions = [_confirmed(pair)]
    end = time.monotonic() + seconds
    with psycopg.connect(elsewhere, autocommit=True) as connection:
        connection.execute("CREATE TABLE noise (v text)")
        while time.monotonic() < end:
            for _ in range(20):
                connection.execute("INSERT INTO noise SELECT repeat('x', 1000) FROM generate_series(1, 200)")
                time.sleep(0.05)
            positions.append(_confirmed(pair))
    assert positions[-1] - positions[0] > 1_000_000, "WAL of another database passed and was confirmed"
    assert len(set(positions)) > len(positions) // 2, positions
    assert pair.heads()[0] == entries, "an idle stream appends no audit entries"
    pair.stop()


@pytest.mark.timeout(120)
def test_an_idle_stream_confirms_wal_of_other_databases(stack: Stack, pairs: Pairs) -> None:
    _idle(stack, pairs, 8)


@pytest.mark.long
@pytest.mark.timeout(240)
def test_an_idle_stream_confirms_wal_for_a_whole_minute(stack: Stack, pairs: Pairs) -> None:
    _idle(stack, pairs, 60)


@pytest.mark.timeout(240)
def test_kafka_and_both_databases_may_go_away_and_come_back(stack: Stack, pairs: Pairs) -> None:
    broker = stack.own_kafka()
    servers = [stack.own_postgres(18, fast=True) for _ in range(2)]
    pair = pairs(
        ROWS, kafka=broker.bootstrap_servers,
        conninfos=(servers[0].conninfo("postgres"), servers[1].conninfo("postgres")),
    )  # fmt: skip
    pair.create(["t(*)"])
    pair.start()
    _insert(pair, 1, 100, 10)
    pair.wait_in_step()
    broker.kill()
    _insert(pair, 101, 100, 10)
    time.sleep(2)
    broker.start()
    pair.wait_in_step(timeout=90)
    for number, server in enumerate(servers):
        server.stop("immediate")
        time.sleep(1)
        server.start()
        _insert(pair, 201 + 100 * number, 100, 10)
        pair.wait_in_step(timeout=90)
    assert pair.differences() == []
    assert pair.acknowledged_rows() == pair.audited_rows() == 400
    assert all(process.poll() is None for node in (pair.a, pair.b) for process in node.services.values())
    pair.stop()
