"""What keeping leaf hashes costs a row, on either side: paired timings, CPU of this process and the server.

    python -m bench.leaf_cost [rows]

Each round does the same twice, with and without leaves: a transaction of four batches of 5,000 rows. The
difference is what one of both sides pays; the hashes themselves are computed anyhow. CPU time is given, not
wall time: on a busy machine nothing else says anything.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.stack import Stack
from vsql_shared.audit.leaf_store import LeafKeeper, write_leaves
from vsql_shared.audit.leaves import part_leaves
from vsql_shared.changes import PartLeaves
from vsql_shared.pg.connect import Connection, connect
from vsql_shared.pg.migrate import install

BATCH_ROWS = 5_000
GROUP = 4
_ROUNDS = 7


def joined(rows: int) -> float:
    """µs of CPU a row for joining hashes."""
    leaves = [os.urandom(32) for _ in range(BATCH_ROWS)]
    best = float("inf")
    for _ in range(_ROUNDS):
        began = time.process_time()
        for _ in range(rows // BATCH_ROWS):
            part_leaves(0, leaves)
        best = min(best, time.process_time() - began)
    return best / rows * 1e6


class Written:
    """Transactions of a few batches, with leaves or without."""

    def __init__(self, conn: Connection, kept: Sequence[PartLeaves]) -> None:
        self._conn, self._kept = conn, kept
        self._backend = psutil.Process(conn.info.backend_pid)
        self._keeper = LeafKeeper(conn, timedelta(days=7), 10**10)
        self._keeper.keep(0.0)
        self._sequence = 0

    def run(self, batches: int, *, keep: bool) -> tuple[float, float]:
        """(CPU seconds here, CPU seconds of the server's backend)."""
        before = self._backend.cpu_times()
        began = time.process_time()
        for _ in range(0, batches, GROUP):
            with self._conn.transaction():
                self._conn.execute("UPDATE public.bench SET n = n + 1")
                numbered = [(self._sequence + at, self._kept[at % len(self._kept)]) for at in range(GROUP)]
                write_leaves(self._conn, self._keeper.slot if keep else None, "bench.a", numbered)
            self._sequence += GROUP
        here = time.process_time() - began
        after = self._backend.cpu_times()
        return here, after.user + after.system - before.user - before.system


def written(rows: int, conninfo: str) -> tuple[float, float]:
    """µs a row of both: median of the differences between rounds with and without leaves."""
    leaves = [os.urandom(32) for _ in range(BATCH_ROWS)]
    kept = [part_leaves(0, leaves) for _ in range(GROUP)]
    with connect(conninfo, application_name="bench") as conn:
        install(conn)
        conn.execute("CREATE TABLE public.bench AS SELECT 0 AS n")
        writer = Written(conn, kept)
        batches = rows // BATCH_ROWS
        writer.run(batches, keep=True)
        here, there = [], []
        for number in range(_ROUNDS):
            order = (True, False) if number % 2 else (False, True)
            took = {keep: writer.run(batches, keep=keep) for keep in order}
            here.append(took[True][0] - took[False][0])
            there.append(took[True][1] - took[False][1])
        size = conn.execute("SELECT pg_total_relation_size('vsql_sync.batch_leaves_00')").fetchone()
        total = conn.execute("SELECT sum(octet_length(leaves)) FROM vsql_sync.batch_leaves_00").fetchone()
        print(f"on disk: {size[0] / float(total[0]):.2f} × the hashes" if size and total else "")
    return statistics.median(here) / rows * 1e6, statistics.median(there) / rows * 1e6


def show(name: str, value: float) -> None:
    """One line."""
    print(f"{name:40} {value:7.3f} µs CPU a row")


def main(rows: int) -> None:
    """Print every figure once."""
    show("join", joined(rows))
    with Stack() as stack:
        conninfo = stack.new_database(18, "leafcost")
        here, there = written(rows, conninfo)
        show("write: this process", here)
        show("write: the server's backend", there)
        stack.drop_database(conninfo)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
