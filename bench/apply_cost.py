"""What applying costs: Python's µs a row for frames and folding, and rows/s into a real PostgreSQL 18.

Run by hand on a quiet machine:  python -m bench.apply_cost [rows]
CPU time of this process is given beside wall time: on a busy machine trust the CPU.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.services.apply_pair import own_function
from tests.services.apply_source import add_change, empty_batch
from tests.stack import Stack
from vsql_consumers.apply import Applier
from vsql_consumers.fold import Folded, fold
from vsql_consumers.frames import field_chunks, insert_chunks
from vsql_shared.changes import Column, Op, OpenedBatch, Relation, TableName, Transaction
from vsql_shared.wire.pack import encode_relation, relation_hash

_STAMP = (1184, "timestamp with time zone")
COLUMNS = (
    ("id", 20, "bigint"),
    ("customer", 20, "bigint"),
    ("status", 25, "text"),
    ("created", *_STAMP),
    ("note", 25, "text"),
    ("amount", 20, "bigint"),
    ("address", 25, "text"),
    ("updated", *_STAMP),
)
ORDERS = Relation(
    TableName("public", "orders"), "d", tuple(Column(n, n == "id", oid, -1, t) for n, oid, t in COLUMNS)
)
DDL = "CREATE TABLE public.orders (" + ", ".join(f"{n} {t}" for n, _, t in COLUMNS) + ", PRIMARY KEY (id))"
BATCH_ROWS = 5_000


def row(number: int, rng: random.Random) -> bytes:
    """An order of about 165 bytes on the wire."""
    eight = number.to_bytes(8, "big")
    note, address = b"n" * rng.randint(5, 25), b"a" * rng.randint(45, 75)
    values = (eight, eight, b"status", bytes(8), note, eight, address, bytes(8))
    return b"N\0\x08" + b"".join(b"b" + len(v).to_bytes(4, "big") + v for v in values)


def cost(name: str, rows: int, act: Callable[[], object]) -> None:
    """Print the least CPU and wall time a row of five runs."""
    cpu = wall = float("inf")
    for _ in range(5):
        start, cpu_start = time.perf_counter(), time.process_time()
        act()
        cpu = min(cpu, time.process_time() - cpu_start)
        wall = min(wall, time.perf_counter() - start)
    print(f"{name:44} {cpu / rows * 1e6:6.2f} µs CPU a row  {wall / rows * 1e6:6.2f} µs")


def batches(op: int, rows: list[bytes], per_transaction: int) -> list[OpenedBatch]:
    """Batches of rows, in transactions of a size."""
    digest = relation_hash(encode_relation(ORDERS))
    out: list[OpenedBatch] = []
    for start in range(0, len(rows), BATCH_ROWS):
        part = rows[start : start + BATCH_ROWS]
        batch = empty_batch(len(out) + 1)
        add_change(batch, ORDERS, op, part[0])
        count = len(part)
        batch.row_count = count
        batch.ops, batch.relation_of, batch.plaintexts = [op] * count, [digest] * count, part
        batch.tx_of = [n // per_transaction for n in range(count)]
        batch.transactions = [Transaction(n, 1_000 + n, 0) for n in range(batch.tx_of[-1] + 1)]
        out.append(batch)
    return out


def rate(name: str, applier: Applier, given: list[OpenedBatch], merged: int) -> None:
    """Apply batches, `merged` in one target transaction, and print the rate."""
    count = sum(batch.row_count for batch in given)
    start, cpu = time.perf_counter(), time.process_time()
    for at in range(0, len(given), merged):
        applier.apply(given[at : at + merged])
        applier.finish(1_000 + at, 0, lambda _: None)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"{name:44} {cpu / count * 1e6:6.2f} µs CPU a row  {count / wall:10,.0f} rows/s")


def main(count: int) -> None:
    """Run everything once."""
    rng = random.Random(1)
    rows = [row(n, rng) for n in range(count)]
    print(f"{count} rows of {sum(map(len, rows)) / count:.0f} bytes, 8 columns")
    layout = b"b" * 8
    cost("INSERT to COPY frames", count, lambda: insert_chunks(rows, layout, 2**20))

    def updates(given: list[bytes]) -> None:
        for step in fold([Op.UPDATE] * len(given), given, layout, (0,)):
            assert isinstance(step, Folded)
            field_chunks([fields for part in step.updates.values() for fields in part], 8, 2**20)

    cost("UPDATE folded to frames, every key once", count, lambda: updates(rows))
    few = [row(n % 500, rng) for n in range(count)]
    cost("UPDATE folded to frames, 500 keys", count, lambda: updates(few))
    with Stack() as stack:
        conninfo = stack.new_database(18, "bench")
        with psycopg.connect(conninfo, autocommit=True) as conn:
            conn.execute("SET client_min_messages = warning")
            conn.execute(DDL.encode())
            conn.execute(("CREATE SCHEMA vsql_sync; " + own_function("applier_level")).encode())
            applier = Applier(conn, "bench.a")
            applier.setup(f"vsql_bench_{conn.info.backend_pid}")
            rate("inserts, 100-row transactions", applier, batches(Op.INSERT, rows, 100), 4)
            conn.execute("ANALYZE public.orders")
            rate("updates, single-row transactions", applier, batches(Op.UPDATE, rows, 1), 4)
            rng.shuffle(rows)
            rate("updates, single-row, in random order", applier, batches(Op.UPDATE, rows, 1), 4)
            deletes = [b"K" + row[1:] for row in rows]
            rate("deletes, single-row transactions", applier, batches(Op.DELETE, deletes, 1), 4)
            print({way: n for way, n in applier.ways.items() if n})
            conn.execute("SELECT pg_replication_origin_session_reset()")
            conn.execute("SELECT pg_replication_origin_drop(%s)", (f"vsql_bench_{conn.info.backend_pid}",))
        stack.drop_database(conninfo)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
