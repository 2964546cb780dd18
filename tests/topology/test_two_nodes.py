"""The main job on real servers: what node A commits arrives at node B, once, whole and proved."""

from __future__ import annotations

import threading

import pytest

from tests.pairs import Pairs
from tests.topology import workload

pytestmark = pytest.mark.topology


def _drive(pairs: Pairs, version: int, changes: int, max_tx: int) -> None:
    pair = pairs(workload.TABLES_SQL, version=version)
    workload.prepare(pair.a.conninfo)
    pair.create(workload.TABLES)
    pair.start()
    pair.wait_in_step()
    made = workload.run(pair.a.conninfo, changes, max_tx)
    pair.wait_in_step(timeout=900)
    assert pair.differences() == []
    assert pair.audited_rows() == made
    for node in (pair.a, pair.b):
        assert node.ctl("audit", "verify").returncode == 0
    pair.stop()


@pytest.mark.parametrize(
    ("version", "changes", "max_tx"),
    [(18, 60_000, 20_000), (15, 10_000, 3_000), (16, 2_000, 500), (17, 2_000, 500)],
)
@pytest.mark.timeout(300)
def test_every_change_arrives_once_and_the_chain_counts_them(
    pairs: Pairs, version: int, changes: int, max_tx: int
) -> None:
    _drive(pairs, version, changes, max_tx)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("version", "changes"), [(18, 1_000_000), (15, 100_000), (16, 100_000), (17, 100_000)]
)
def test_a_million_changes_arrive_once(pairs: Pairs, version: int, changes: int) -> None:
    _drive(pairs, version, changes, 50_000)


@pytest.mark.timeout(180)
def test_first_copy_and_changes_made_during_it_give_equal_tables(pairs: Pairs) -> None:
    pair = pairs(workload.TABLES_SQL)
    workload.prepare(pair.a.conninfo)
    workload.run(pair.a.conninfo, 40_000, 5_000)
    pair.create(workload.TABLES)
    during = threading.Thread(
        target=workload.run, args=(pair.a.conninfo, 20_000, 300), kwargs={"first": 10_000_000}
    )
    during.start()
    pair.start()
    during.join()
    pair.wait_in_step(timeout=120)
    assert pair.differences() == []
    pair.stop()
