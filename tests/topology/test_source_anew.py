"""A source made anew over its former topics: what neither chain nor slot holds is said to be lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nodes import PUBLICATION, TwoNodes
from tests.stack import Stack
from tests.waiting import until

TABLE = "CREATE TABLE t (id bigint PRIMARY KEY, note text)"


@pytest.fixture(params=[10, 0], ids=["rows", "no row"])
def pair(stack: Stack, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[TwoNodes]:
    """In step; its chain has batches, or an epoch only."""
    pair = TwoNodes(stack, tmp_path, TABLE, config="[limits]\nbatch_linger_ms = 1\n")
    pair.create(["t(*)"])
    pair.start()
    pair.a.execute(f"INSERT INTO t SELECT g, 'before' FROM generate_series(1, {request.param}) g")
    pair.wait_in_step()
    yield pair
    pair.end()


def _make_anew(pair: TwoNodes, *peer_args: str) -> None:
    """Drop everything of ours on A, and do what its operator did at first."""
    pair.a.stop("producer")
    ((slot,),) = pair.a.query("SELECT slot_name FROM vsql_sync.streams WHERE chain = %s", pair.chain)
    pair.a.query("SELECT pg_drop_replication_slot(%s)", slot)
    pair.a.execute(f"DROP PUBLICATION {PUBLICATION}; DROP SCHEMA vsql_sync CASCADE")
    pair.a.execute("INSERT INTO t SELECT g, 'between' FROM generate_series(11, 20) g")
    pair.a.ctl("node", "init", "--node-id", "1", "--node-name", "node-a", "--cluster", pair.cluster)
    pair.a.ctl("publication", "create", PUBLICATION, "--table", "t(*)")
    pair.a.ctl(
        "node", "add-peer", "--peer-node-id", "2", "--peer-connection", pair.b.conninfo, "--yes", *peer_args
    )
    for node in (pair.a, pair.b):
        node.ctl("start")
    pair.a.start("producer")
    pair.a.execute("INSERT INTO t SELECT g, 'after' FROM generate_series(21, 30) g")


def _state(pair: TwoNodes) -> tuple[object, ...]:
    found = pair.b.query(
        "SELECT state, coalesce(state_reason, '') FROM vsql_sync.streams WHERE chain = %s", pair.chain
    )
    return found[0]


def test_a_target_that_went_on_with_a_source_made_anew_is_diverged(pair: TwoNodes) -> None:
    _make_anew(pair, "--no-copy")
    until(lambda: _state(pair)[0] == "DIVERGED", 60, lambda: pair.b.tail("consumer"))
    assert "what was committed between them will never come" in str(_state(pair)[1])
    assert pair.b.query("SELECT count(*) FROM t WHERE note <> 'before'") == [(0,)]
    assert pair.b.ctl_json("audit", "verify")["warnings"] == []
    # The source says it, too, to whoever verifies its trail.
    warnings = pair.a.ctl_json("audit", "verify")["warnings"]
    assert any("replication slot was made" in warning for warning in warnings), warnings
