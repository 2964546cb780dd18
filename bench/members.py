"""Apply a backlog with one member and with two: what a second one brings, as the ratio of the rates.

    python -m bench.members [--rows 200000] [--runs 3] [--members 1 2] [--output FILE.json]

The backlog lies in Kafka, sealed, before the consumer starts, and the producer is stopped: what is measured
is the target alone, from when all members are there to the last entry. Inserts in 100-row transactions, then
one update of each row. Two members need two cores for themselves and their database sessions; on a machine
that also runs Kafka and both databases the ratio stays below what they would bring elsewhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psycopg

from bench.workload import ORDERS_SQL, load_orders, prepare
from tests.nodes import TwoNodes
from tests.stack import Stack

_PARTITIONS = 8
_SECONDS = 600.0
# In transactions of 100 rows; one transaction of all would be applied alone.
_UPDATE = """DO $$ BEGIN
FOR i IN {first}..{last} BY 100 LOOP
    UPDATE orders SET status = 'settled', updated_at = now()
        WHERE id BETWEEN i AND least(i + 99, {last});
    COMMIT;
END LOOP; END $$"""


def main() -> int:
    """Run it; prints a line per run and the ratios to the first number of members."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--members", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with Stack() as stack, tempfile.TemporaryDirectory(prefix="vsql-bench-") as folder:
        result = run(stack, Path(folder), args.rows, args.runs, args.members)
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    for name, ratio in result["ratios"].items():
        print(f"{name}: {ratio:.2f}")
    return 0


def run(stack: Stack, folder: Path, rows: int, runs: int, members: list[int]) -> dict[str, Any]:
    """The measurement itself, on servers of its own."""
    source, target = stack.own_postgres(18), stack.own_postgres(18)
    for server, name in ((source, "a"), (target, "b")):
        with psycopg.connect(server.conninfo("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
    pair = TwoNodes(stack, folder, ORDERS_SQL, conninfos=(source.conninfo("a"), target.conninfo("b")))
    pair.a.env = {"VSQL_SYNC__KAFKA__PARTITIONS": str(_PARTITIONS)}
    prepare(pair.a.conninfo)
    pair.create(["orders(*)"], publication_args=["--apply", "partitioned"])
    pair.start()
    pair.wait_in_step()
    pair.stop()
    lines: list[dict[str, Any]] = []
    first = 0
    for number in range(runs):
        for count in members if number % 2 == 0 else members[::-1]:
            line: dict[str, Any] = {"run": number, "members": count, "rows": rows}
            load_orders(pair.a.conninfo, first, rows, 100)
            line["inserts_per_s"] = round(rows / _apply(pair, count))
            pair.a.query(_UPDATE.format(first=first, last=first + rows - 1))
            first += rows
            line["updates_per_s"] = round(rows / _apply(pair, count))
            lines.append(line)
            print(json.dumps(line), flush=True)
    if found := pair.differences():
        raise AssertionError(f"the databases differ: {found}")
    return {"workload": "backlog in Kafka, target alone", "runs": lines, "ratios": _ratios(lines, members)}


def _apply(pair: TwoNodes, members: int) -> float:
    """Seal the backlog, then apply it; seconds from when all members are there to the last entry."""
    pair.a.start("producer")
    position = pair.a.query("SELECT pg_current_wal_insert_lsn()")[0][0]
    _until(
        pair,
        "SELECT EXISTS (SELECT FROM pg_replication_slots WHERE confirmed_flush_lsn >= %s::pg_lsn)",
        position,
        source=True,
    )
    pair.a.stop("producer")
    head = pair.heads()[0]
    pair.b.env = {"VSQL_SYNC__APPLY__MEMBERS": str(members)}
    pair.b.start("consumer")
    there = "SELECT count(*) = %s FROM pg_stat_activity WHERE application_name LIKE 'vsql-sync member%%'"
    _until(pair, there, members)
    started = time.perf_counter()
    _until(pair, "SELECT sequence >= %s FROM vsql_sync.apply_progress WHERE chain = 'pub.node-a'", head)
    took = time.perf_counter() - started
    pair.b.stop("consumer")
    return took


def _until(pair: TwoNodes, statement: str, *params: object, source: bool = False) -> None:
    conninfo = pair.a.conninfo if source else pair.b.conninfo
    deadline = time.monotonic() + _SECONDS
    with psycopg.connect(conninfo, autocommit=True) as connection:
        while time.monotonic() < deadline:
            row = connection.execute(statement, params).fetchone()
            if row is not None and row[0]:
                return
            time.sleep(0.02)
    raise TimeoutError(f"not within {_SECONDS:.0f} s: {statement}")


def _ratios(lines: list[dict[str, Any]], members: list[int]) -> dict[str, float]:
    """Median rates, each against those of the first number of members."""
    found: dict[str, float] = {}
    for what in ("inserts_per_s", "updates_per_s"):
        rates = {
            count: statistics.median(line[what] for line in lines if line["members"] == count)
            for count in members
        }
        for count in members[1:]:
            found[f"{what}, {count} members against {members[0]}"] = rates[count] / rates[members[0]]
    return found


if __name__ == "__main__":
    raise SystemExit(main())
