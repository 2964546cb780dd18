"""Drain a backlog: 500,000 inserts in 100-row transactions, vsql-sync against native logical replication.

    python -m bench.drain [--rows 500000] [--runs 3] [--min-ratio 0.3] [--output FILE.json]

Both are stopped while the rows are written, then each drains the same backlog of the same source into a
database of the same target server; the order alternates from run to run. The result is the ratio of the
rates in one run (median over the runs), because machines differ; exit code 1 when it is below --min-ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import psycopg

from bench.workload import ORDERS_SQL, load_orders, prepare
from tests.nodes import TwoNodes
from tests.stack import Stack
from vsql_shared.pg import control
from vsql_shared.pg.connect import connect


class Native:
    """A native subscription from the source to a database of its own on the target's server."""

    def __init__(self, source: str, target: str) -> None:
        self.source, self.target = source, target
        with psycopg.connect(source, autocommit=True) as connection:
            connection.execute("CREATE PUBLICATION native FOR TABLE orders")
            connection.execute("SELECT pg_create_logical_replication_slot('native', 'pgoutput')")
        with psycopg.connect(target, autocommit=True) as connection:
            connection.execute(ORDERS_SQL)
            quoted = source.replace("'", "''")
            connection.execute(
                f"CREATE SUBSCRIPTION native CONNECTION '{quoted}' PUBLICATION native"
                " WITH (create_slot = false, slot_name = 'native', copy_data = false, binary = true,"
                " streaming = parallel, enabled = false)"
            )

    def drain(self, expected: int) -> float:
        """Enable, wait for all rows, disable; seconds."""
        started = time.perf_counter()
        with psycopg.connect(self.target, autocommit=True) as connection:
            connection.execute("ALTER SUBSCRIPTION native ENABLE")
            _wait_rows(connection, expected)
            took = time.perf_counter() - started
            connection.execute("ALTER SUBSCRIPTION native DISABLE")
        return took


def _wait_rows(connection: psycopg.Connection[Any], expected: int, timeout: float = 600) -> None:
    """Wait until the last row is there: max(id) is one index probe, so the waiting costs nothing."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        row = connection.execute("SELECT max(id) FROM orders").fetchone()
        if row is not None and row[0] == expected - 1:
            return
        time.sleep(0.02)
    raise TimeoutError(f"not drained after {timeout} s")


def _drain_ours(pair: TwoNodes, expected: int) -> float:
    with connect(pair.a.conninfo, application_name="bench") as connection:
        started = time.perf_counter()
        control.resume(connection)  # what `syncctl resume` does, without the start of a process
    with psycopg.connect(pair.b.conninfo, autocommit=True) as connection:
        _wait_rows(connection, expected)
    took = time.perf_counter() - started
    pair.wait_in_step()
    pair.a.ctl("pause", "--reason", "benchmark")
    return took


def _memory_mb(pair: TwoNodes) -> dict[str, float]:
    """Peak resident memory of each worker process, MB."""
    found: dict[str, float] = {}
    for node in (pair.a, pair.b):
        for role, process in node.services.items():
            for child in psutil.Process(process.pid).children(recursive=True):
                status = Path(f"/proc/{child.pid}/status").read_text()
                peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
                found[role] = max(found.get(role, 0.0), int(peak.split()[1]) / 1024)
    return found


def main() -> int:
    """Run it; prints a line per run and the median ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--min-ratio", type=float, default=0.0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with Stack() as stack, tempfile.TemporaryDirectory(prefix="vsql-bench-") as folder:
        result = run(stack, Path(folder), args.rows, args.runs)
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"median ratio to native: {result['ratio_to_native']:.2f}")
    return 0 if result["ratio_to_native"] >= args.min_ratio else 1


def run(stack: Stack, folder: Path, rows: int, runs: int) -> dict[str, Any]:
    """The measurement itself, on servers of its own."""
    source, target = stack.own_postgres(18), stack.own_postgres(18)
    for server, names in ((source, ["a"]), (target, ["b", "native"])):
        with psycopg.connect(server.conninfo("postgres"), autocommit=True) as connection:
            for name in names:
                connection.execute(f"CREATE DATABASE {name}")
    pair = TwoNodes(stack, folder, ORDERS_SQL, conninfos=(source.conninfo("a"), target.conninfo("b")))
    prepare(pair.a.conninfo)
    pair.create(["orders(*)"])
    pair.start()
    native = Native(pair.a.conninfo, target.conninfo("native"))
    pair.wait_in_step()
    pair.a.ctl("pause", "--reason", "benchmark")
    lines: list[dict[str, Any]] = []
    for number in range(-1, runs):  # run -1 warms both up and does not count
        first = sum(line["rows"] for line in lines)
        total = rows if number >= 0 else max(rows // 10, 100)
        load_orders(pair.a.conninfo, first, total, 100)
        order = [("native", native.drain), ("vsql-sync", lambda n: _drain_ours(pair, n))]
        seconds = {name: drain(first + total) for name, drain in (order if number % 2 else order[::-1])}
        line: dict[str, Any] = {"run": number, "rows": total}
        line |= {f"{name}_rows_per_s": round(total / took) for name, took in seconds.items()}
        line["ratio"] = seconds["native"] / seconds["vsql-sync"]
        lines.append(line)
        print(json.dumps(line), flush=True)
    if found := pair.differences():
        raise AssertionError(f"the databases differ: {found}")
    result = {
        "workload": "a (backlog, inserts, 100-row transactions)",
        "runs": lines[1:],
        "ratio_to_native": statistics.median(line["ratio"] for line in lines[1:]),
        "peak_rss_mb": _memory_mb(pair),
    }
    pair.stop()
    return result


if __name__ == "__main__":
    sys.exit(main())
