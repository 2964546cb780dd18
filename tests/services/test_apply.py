"""Random work on tables of many shapes: what a real slot sends is applied, and both tables are then equal."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import NewDatabase
from tests.services.apply_pair import Connection, MakePair, Pair, finish, pairs
from tests.services.apply_shapes import IN_TEXT, SHAPES, Shape, Work


@pytest.fixture
def make_pair(new_database: NewDatabase) -> Iterator[MakePair]:
    """Pairs of databases."""
    yield from pairs(new_database)


def _drive(pair: Pair, shape: Shape, seed: int, transactions: int = 60) -> None:
    """Random work, carried over in merged groups, batch by batch and in fragments; equal after each."""
    pair.tables(shape.ddl, shape.target_ddl)
    work = Work(pair.source.conn, shape, seed)
    applier = pair.current()
    compared = shape.compared or f"SELECT * FROM {shape.table}"
    for max_rows in (1_000_000, 1, 3):
        work.transactions(transactions)
        batches = pair.source.batches(max_rows)
        if max_rows > 3:
            verdicts = applier.apply(batches)
            finish(applier, batches)
        else:
            verdicts = []
            for batch in batches:
                verdicts += applier.apply([batch])
                if not batch.continues:
                    finish(applier, [batch])
        assert sum(v["applied"] for v in verdicts) == sum(b.row_count for b in batches)
        assert _rows(pair.target, compared) == _rows(pair.source.conn, compared)
    assert pair.anomalies() == {}


def _rows(conn: Connection, query: str) -> list[str]:
    return [row[0] for row in conn.execute(f"SELECT q::text FROM ({query}) q ORDER BY 1")]


@pytest.mark.parametrize("name", SHAPES)
def test_random_work_on_tables_of_many_shapes_arrives(make_pair: MakePair, name: str) -> None:
    _drive(make_pair(), SHAPES[name], seed=len(name))


@pytest.mark.parametrize("name", IN_TEXT)
def test_random_work_sent_as_text_arrives(make_pair: MakePair, name: str) -> None:
    _drive(make_pair(binary=False), SHAPES[name], seed=len(name))


@pytest.mark.parametrize(
    "name", ["every type", "toasted values", "full identity without a key", "several unique keys"]
)
def test_random_work_arrives_on_the_oldest_version(make_pair: MakePair, name: str) -> None:
    _drive(make_pair(15), SHAPES[name], seed=1)
