"""The table of strategy by kind of conflict in docs/operations/conflicts.md: each cell, on real servers.

A cell is tried with either node first. Both write without knowledge of each other; then all is exchanged, and
both nodes' rows and logs are looked at. Node a has the higher priority.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from typing import Any, TypeAlias

import pytest

from tests.services.both_write import Both, Side, joined, prepared, table
from tests.stack import Stack
from vsql_shared.errors import RefusedError
from vsql_shared.pg import peers, publications
from vsql_shared.pg.peers import PeerRequest
from vsql_shared.pg.publications import PublicationRequest
from vsql_shared.pg.table_spec import parse_spec
from vsql_shared.strategies import STRATEGIES, Strategies, Strategy

PairOf: TypeAlias = Callable[[Strategy], Both]
KEYS = itertools.count(1)
ORDERS = ("ab", "ba")
"""Who writes first."""
STANDS: dict[Strategy, str] = {
    "last_write_wins": "second",
    "first_write_wins": "first",
    "node_priority": "a",
    "keep_local": "own",
    "apply_remote": "other's",
    "manual": "own, and asked",
}
"""Whose write each node has after two that did not know of each other."""


@pytest.fixture(scope="module")
def pair_of(stack: Stack, schema_of: Callable[[int], str]) -> Iterator[PairOf]:
    """A pair for each strategy: tables t, and child, which refers to parent."""
    with ExitStack() as ending:

        @cache
        def made(strategy: Strategy) -> Both:
            there = [stack.new_database(18, name, schema_of(18)) for name in ("a", "b")]
            for conninfo in there:
                ending.callback(stack.drop_database, conninfo)
            ddl = (
                table("t", "id int PRIMARY KEY, note text", strategy)
                + table("parent", "id int PRIMARY KEY", strategy)
                + table("child", "id int PRIMARY KEY, of int REFERENCES public.parent", strategy)
                + table("u", "id int PRIMARY KEY, v int UNIQUE", strategy)
            )
            both = prepared(there[0], there[1], stack.new_cluster_name(), ddl, "t", "parent", "child")
            joined(both, Strategies(strategy))
            ending.callback(both.end)
            return both

        yield made


def _sides(both: Both, order: str) -> tuple[Side, Side]:
    """Who writes first, and who second."""
    return (both.a, both.b) if order == "ab" else (both.b, both.a)


def _known_to_both(both: Both) -> int:
    key = next(KEYS)
    both.a.do(f"INSERT INTO public.t (id, note) VALUES ({key}, 'both')")
    both.exchange()
    return key


def _note(side: Side, key: int) -> str | None:
    """What a node has of a row; None: no row."""
    found = side.rows(f"SELECT note FROM public.t WHERE id = {key}")
    return found[0][0] if found else None


def _logged(side: Side, key: int) -> list[tuple[Any, ...]]:
    """What a node's log has of a row: kind and outcome."""
    return side.rows(
        "SELECT conflict_type, resolution FROM vsql_sync.conflict_log"
        f" WHERE table_name = 't' AND row_key = '{{\"id\": {key}}}' ORDER BY id"
    )


def _expected(strategy: Strategy, side: Side, first: Side, second: Side) -> tuple[Side, str]:
    """Whose write a node has at the end, and the outcome in its log."""
    other = second if side is first else first
    stands = {
        "second": second,
        "first": first,
        "a": first if first.name == "node-a" else second,
        "own": side,
        "other's": other,
        "own, and asked": side,
    }[STANDS[strategy]]
    if strategy == "manual":
        return side, "PENDING"
    return stands, "KEPT_LOCAL" if stands is side else "APPLIED_REMOTE"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_insert_exists(pair_of: PairOf, strategy: Strategy, order: str) -> None:
    both = pair_of(strategy)
    first, second = _sides(both, order)
    key = next(KEYS)
    for side in (first, second):
        side.do(f"INSERT INTO public.t (id, note) VALUES ({key}, 'of {side.name}')")
    both.exchange()
    for side in (first, second):
        stands, outcome = _expected(strategy, side, first, second)
        assert _note(side, key) == f"of {stands.name}"
        assert _logged(side, key) == [("insert_exists", outcome)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_update_origin_differs(pair_of: PairOf, strategy: Strategy, order: str) -> None:
    both = pair_of(strategy)
    first, second = _sides(both, order)
    key = _known_to_both(both)
    for side in (first, second):
        side.do(f"UPDATE public.t SET note = 'of {side.name}' WHERE id = {key}")
    both.exchange()
    for side in (first, second):
        stands, outcome = _expected(strategy, side, first, second)
        assert _note(side, key) == f"of {stands.name}"
        assert _logged(side, key) == [("update_origin_differs", outcome)]


def _update_meets_delete(both: Both, updates: Side, order: str) -> int:
    key = _known_to_both(both)
    for side in _sides(both, order):
        if side is updates:
            side.do(f"UPDATE public.t SET note = 'of {side.name}' WHERE id = {key}")
        else:
            side.do(f"DELETE FROM public.t WHERE id = {key}")
    both.exchange()
    return key


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("updates", "ab")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_update_deleted(pair_of: PairOf, strategy: Strategy, updates: str, order: str) -> None:
    """At the node that deleted the row."""
    both = pair_of(strategy)
    one, here = _sides(both, "ab" if updates == "a" else "ba")
    key = _update_meets_delete(both, one, order)
    stands, outcome = _expected(strategy, here, *_sides(both, order))
    assert _note(here, key) == (f"of {one.name}" if stands is one else None)
    assert _logged(here, key) == [("update_deleted", outcome)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("updates", "ab")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_delete_origin_differs(pair_of: PairOf, strategy: Strategy, updates: str, order: str) -> None:
    """At the node that updated the row."""
    both = pair_of(strategy)
    here = both.a if updates == "a" else both.b
    key = _update_meets_delete(both, here, order)
    stands, outcome = _expected(strategy, here, *_sides(both, order))
    assert _note(here, key) == (f"of {here.name}" if stands is here else None)
    assert _logged(here, key) == [("delete_origin_differs", outcome)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_update_missing(pair_of: PairOf, strategy: Strategy) -> None:
    both = pair_of(strategy)
    key = _known_to_both(both)
    both.b.do(f"DELETE FROM public.t WHERE id = {key}", unsent=True)
    both.a.do(f"UPDATE public.t SET note = 'of a' WHERE id = {key}")
    both.exchange()
    outcome = {"keep_local": "KEPT_LOCAL", "manual": "PENDING"}.get(strategy, "APPLIED_REMOTE")
    assert _note(both.b, key) == ("of a" if outcome == "APPLIED_REMOTE" else None)
    assert _logged(both.b, key) == [("update_missing", outcome)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_delete_missing(pair_of: PairOf, strategy: Strategy) -> None:
    both = pair_of(strategy)
    key = _known_to_both(both)
    both.b.do(f"DELETE FROM public.t WHERE id = {key}", unsent=True)
    both.a.do(f"DELETE FROM public.t WHERE id = {key}")
    both.exchange()
    outcome = "KEPT_LOCAL" if strategy == "keep_local" else "APPLIED_REMOTE"
    assert (_note(both.a, key), _note(both.b, key)) == (None, None)
    assert _logged(both.b, key) == [("delete_missing", outcome)]
    name = both.b.rows("SELECT tombstones FROM vsql_sync.multi_writer_tables WHERE table_name = 't'")[0][0]
    left = both.b.rows(f"SELECT count(*) FROM vsql_sync.{name} WHERE id = {key}")
    assert left == [(0 if outcome == "KEPT_LOCAL" else 1,)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_multiple_unique_conflicts(pair_of: PairOf, strategy: Strategy) -> None:
    """Refused by name: rows of two nodes that collide elsewhere than in the key cannot come to be."""
    a, b = pair_of(strategy).a.conn, pair_of(strategy).b.conn
    name = f"unique_{strategy}"
    publications.create(a, PublicationRequest(name, (parse_spec("u"),)))
    request = PeerRequest(2, mode="bidirectional", publications=(name,), name="node-b")
    with pytest.raises(RefusedError, match="could collide in u_v_key: only the primary key may be unique"):
        peers.look(a, b, request)
    publications.drop(a, name)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_foreign_row_that_is_gone(pair_of: PairOf, strategy: Strategy, order: str) -> None:
    """No conflict of a row: both nodes have the child, and neither its parent."""
    both = pair_of(strategy)
    key = next(KEYS)
    first, second = _sides(both, order)
    first.do(f"INSERT INTO public.parent (id) VALUES ({key})")
    both.exchange()
    first.do(f"DELETE FROM public.parent WHERE id = {key}")
    second.do(f"INSERT INTO public.child (id, of) VALUES ({key}, {key})")
    both.exchange()
    for side in (first, second):
        assert side.rows(f"SELECT of FROM public.child WHERE id = {key}") == [(key,)]
        assert side.rows(f"SELECT id FROM public.parent WHERE id = {key}") == []
        logged = f"SELECT FROM vsql_sync.conflict_log WHERE row_key = '{{\"id\": {key}}}'"
        assert side.rows(logged) == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nodes_that_write_one_row_in_turn_have_it_alike_whatever_the_strategy(
    pair_of: PairOf, strategy: Strategy
) -> None:
    both = pair_of(strategy)
    key = _known_to_both(both)
    for turn in range(3):
        for side in (both.b, both.a):
            side.do(f"UPDATE public.t SET note = '{turn} of {side.name}' WHERE id = {key}")
            both.exchange()
            for one in (both.a, both.b):
                assert _note(one, key) == f"{turn} of {side.name}"
    both.b.do(f"DELETE FROM public.t WHERE id = {key}")
    both.exchange()
    assert (_note(both.a, key), _note(both.b, key)) == (None, None)
    for side in (both.a, both.b):
        side.do(f"INSERT INTO public.t (id, note) VALUES ({key}, 'anew')")
        both.exchange()
        assert (_note(both.a, key), _note(both.b, key)) == ("anew", "anew")
        side.do(f"DELETE FROM public.t WHERE id = {key}")
        both.exchange()
        assert (_note(both.a, key), _note(both.b, key)) == (None, None)
