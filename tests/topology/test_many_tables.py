"""Two hundred tables of mixed shape under random work of three sessions: equal, counted, proved."""

from __future__ import annotations

import os
import time

import pytest

from tests.nodes import TwoNodes
from tests.pairs import Pairs
from tests.topology import many_tables
from tests.topology.many_tables import Session

pytestmark = pytest.mark.topology

TABLES = 200
# Bounds of a start: about ten times what an otherwise idle machine of two cores needs. They fail where
# something is done, or waited for, table by table.
COPY_SECONDS, RESTART_SECONDS = 120, 60
KINDS = (
    "insert", "update", "delete", "key change", "truncate", "savepoint undone", "rolled back",
    "over several tables",
)  # fmt: skip


def _seed() -> int:
    return int(os.environ.get("VSQL_SYNC_TEST_SEED") or time.time_ns() % 1_000_000)


def _in_chain(pair: TwoNodes) -> set[str]:
    """Tables of which the source's chain holds changes."""
    return {name for (name,) in pair.a.query(
        "SELECT DISTINCT unnest(tables_affected) FROM vsql_sync.vsql_sync_audit"
        " WHERE chain = %s AND event_type = 'replication_batch'", pair.chain
    )}  # fmt: skip


def _drive(pairs: Pairs, seconds: float, versions: tuple[int, int]) -> None:
    seed = _seed()
    print(f"\nVSQL_SYNC_TEST_SEED={seed} draws the same work")
    took: dict[str, float] = {}
    began = time.monotonic()

    def lap(name: str) -> None:
        nonlocal began
        now = time.monotonic()
        took[name], began = now - began, now

    made = many_tables.tables(TABLES)
    pair = pairs("", version=versions[0], target_version=versions[1])
    pair.a.execute(many_tables.source_ddl(made))
    pair.b.execute(many_tables.target_ddl(made))
    Session(pair.a.conninfo, made, seed).fill(rows=10)
    lap("tables and rows")
    pair.create([f"{shape.table}(*)" for shape in made])
    lap("init, publication, peer")
    pair.start()
    pair.wait_in_step(timeout=COPY_SECONDS)
    lap("first copy of all tables")
    assert pair.differences() == []

    counts = many_tables.work(pair.a.conninfo, made, seed, seconds / 2)
    pair.wait_in_step(timeout=120 + seconds)
    pair.stop()
    began = time.monotonic()
    pair.start()
    pair.a.execute(
        f"INSERT INTO {made[0].table} ({made[0].columns}) VALUES (1000000, 1, 'after the restart')"
    )
    pair.wait_in_step(timeout=RESTART_SECONDS)
    lap("restart, up to an epoch that is open")
    counts += many_tables.work(pair.a.conninfo, made, seed + 1, seconds / 2)
    began = time.monotonic()
    pair.wait_in_step(timeout=120 + seconds)
    lap("rest of the backlog")
    print({name: round(seconds, 1) for name, seconds in took.items()}, dict(counts), pair.audited_rows())

    assert all(counts[kind] for kind in KINDS), counts
    assert pair.differences() == []
    assert pair.audited_rows() == pair.acknowledged_rows() > counts["committed"]
    assert len(_in_chain(pair)) == TABLES
    # A partition that is published by its root is described by the walsender, and loses nothing.
    assert "passed over" not in pair.a.log_file("producer").read_text()
    for node in (pair.a, pair.b):
        assert node.ctl("audit", "verify").returncode == 0
    pair.stop()


@pytest.mark.timeout(600)
def test_two_hundred_tables_end_equal_after_a_minute_of_random_work(pairs: Pairs) -> None:
    _drive(pairs, 60, (18, 18))


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("versions", [(18, 18), (15, 17)], ids=["18 to 18", "15 to 17"])
def test_two_hundred_tables_end_equal_after_five_minutes_of_random_work(
    pairs: Pairs, versions: tuple[int, int]
) -> None:
    _drive(pairs, 300, versions)
