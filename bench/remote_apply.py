"""One commit that waits for the target: vsql-sync's remote_apply beside native logical replication's.

    python -m bench.remote_apply [--commits 500] [--rounds 3] [--fsync] [--clients 1] [--max-ratio 8]

Both replicate a table of their own from the same source to the same target server, and each is the only
synchronous standby while it is measured; the order alternates. A commit is a single-row INSERT. The result is
the ratio of the medians in one round (median over the rounds), because machines differ; exit code 1 above
--max-ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psycopg

from tests.nodes import PUBLICATION, TwoNodes
from tests.stack import Stack
from tests.stack.postgres import PostgresServer
from tests.waiting import until
from vsql_shared import names

_COPYING = "SELECT FROM vsql_sync.streams WHERE direction = 'out' AND kind = 'copy' AND state <> 'FINISHED'"
_TABLE = """
CREATE TABLE {name} (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, pan text NOT NULL, amount bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(), note text NOT NULL
);
"""
_INSERT = "INSERT INTO {name} (pan, amount, note) VALUES (%s, %s, %s)"
_WARM_UP = 50


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median, p90 and p99, in milliseconds."""
    ordered = sorted(seconds)
    return {
        name: round(1000 * ordered[min(len(ordered) - 1, int(len(ordered) * part))], 3)
        for name, part in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
    }


def commit(conninfo: str, table: str, commits: int, *, remote: bool) -> list[float]:
    """Seconds of each commit of one client."""
    taken = []
    with psycopg.connect(conninfo, autocommit=True) as connection:
        if remote:  # native: nothing sets it
            connection.execute("SET synchronous_commit = remote_apply")
        statement = _INSERT.format(name=table).encode()
        for number in range(commits):
            began = time.perf_counter()
            connection.execute(statement, (f"4{number:015}", number, "x" * 60))
            taken.append(time.perf_counter() - began)
    return taken


def measure(conninfo: str, table: str, commits: int, clients: int, *, remote: bool) -> dict[str, float]:
    """Quantiles of `clients` side by side, and commits a second."""
    commit(conninfo, table, _WARM_UP, remote=remote)
    found: list[list[float]] = []

    def client() -> None:
        found.append(commit(conninfo, table, commits // clients, remote=remote))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    taken = [one for some in found for one in some]
    return {**quantiles(taken), "commits_per_s": round(len(taken) / seconds, 1)}


class Standbys:
    """Which walsender commits wait for."""

    def __init__(self, server: PostgresServer) -> None:
        self._conninfo = server.conninfo("a")

    def wait_for(self, name: str) -> None:
        """Have commits wait for this one alone, and wait until it is at work."""
        with psycopg.connect(self._conninfo, autocommit=True) as connection:
            connection.execute(f"ALTER SYSTEM SET synchronous_standby_names = 'FIRST 1 ({name})'".encode())
            connection.execute("SELECT pg_reload_conf()")
            for _ in range(600):
                row = connection.execute(
                    "SELECT FROM pg_stat_replication WHERE application_name = %s AND sync_state = 'sync'"
                    " AND state = 'streaming'",
                    (name,),
                ).fetchone()
                if row is not None:
                    return
                time.sleep(0.1)
        raise TimeoutError(f"standby {name} does not come")


def run(stack: Stack, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The measurement itself, on servers of its own."""
    settings: dict[str, str | int] = {"max_prepared_transactions": 0, "synchronous_commit": "local"}
    source, target = (stack.own_postgres(18, settings, fast=not args.fsync) for _ in range(2))
    for server, databases in ((source, ["a"]), (target, ["b", "native"])):
        with psycopg.connect(server.conninfo("postgres"), autocommit=True) as connection:
            for name in databases:
                connection.execute(f"CREATE DATABASE {name}".encode())
    a = source.conninfo("a")
    pair = TwoNodes(stack, folder, _TABLE.format(name="cards"), conninfos=(a, target.conninfo("b")))
    try:
        pair.create(["cards(*)"], publication_args=("--pci-column", "cards.pan"))
        pair.start()
        pair.wait_in_step()
        until(lambda: not pair.a.query(_COPYING))
        pair.a.ctl("sync", "enable", PUBLICATION)
        _native(a, target.conninfo("native"))
        return _rounds(pair, Standbys(source), a, args)
    finally:
        pair.end()


def _native(source: str, target: str) -> None:
    with psycopg.connect(source, autocommit=True) as connection:
        connection.execute(_TABLE.format(name="plain").encode())
        connection.execute("CREATE PUBLICATION native FOR TABLE plain")
        connection.execute("SELECT pg_create_logical_replication_slot('native', 'pgoutput')")
    with psycopg.connect(target, autocommit=True) as connection:
        connection.execute(_TABLE.format(name="plain").replace(" GENERATED ALWAYS AS IDENTITY", "").encode())
        connection.execute(
            f"CREATE SUBSCRIPTION native CONNECTION '{source}' PUBLICATION native WITH (create_slot = false,"
            " slot_name = 'native', copy_data = false, binary = true, synchronous_commit = 'on')".encode()
        )


def _rounds(pair: TwoNodes, standbys: Standbys, a: str, args: argparse.Namespace) -> dict[str, Any]:
    ours = names.slot_name(pair.cluster, PUBLICATION, pair.a.name)
    lines: list[dict[str, Any]] = []
    for number in range(args.rounds):
        line: dict[str, Any] = {"round": number}
        both = [("native", "native", "plain"), ("vsql_sync", ours, "cards")]
        for name, standby, table in both if number % 2 else both[::-1]:
            standbys.wait_for(standby)
            line[name] = measure(a, table, args.commits, args.clients, remote=name == "native")
        line["ratio"] = round(line["vsql_sync"]["p50"] / line["native"]["p50"], 2)
        lines.append(line)
        print(json.dumps(line), flush=True)
    standbys.wait_for(ours)
    pair.wait_in_step()
    if found := pair.differences():
        raise AssertionError(f"the databases differ: {found}")
    ratio = statistics.median(line["ratio"] for line in lines)
    return {"fsync": args.fsync, "clients": args.clients, "rounds": lines, "ratio_to_native": ratio}


def main() -> int:
    """Run it; prints a line per round and the median ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--commits", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--fsync", action="store_true", help="as in production; else both without fsync")
    parser.add_argument("--max-ratio", type=float, default=0.0, help="fail above it; 0: never")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with Stack() as stack, tempfile.TemporaryDirectory(prefix="vsql-bench-") as folder:
        result = run(stack, Path(folder), args)
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"median ratio to native: {result['ratio_to_native']:.2f}")
    return 1 if args.max_ratio and result["ratio_to_native"] > args.max_ratio else 0


if __name__ == "__main__":
    sys.exit(main())
