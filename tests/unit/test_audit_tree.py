"""The growing tree of a chain: published vectors, and agreement with the tree that has all leaves at hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsql_shared.audit import merkle, tree
from vsql_shared.errors import DecodeError, RecordError

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "rfc9162_trees.json").read_text()
)
LEAVES = [bytes.fromhex(text) for text in VECTORS["leaves"]]
ENTRIES = [number.to_bytes(32, "big") for number in range(70)]
HASHES = [merkle.leaf_hash(one) for one in ENTRIES]


def grown(data: list[bytes]) -> tree.Tree:
    made: tree.Tree = ()
    for size, one in enumerate(data):
        made = tree.grow(made, size, one)
    return made


@pytest.mark.parametrize("size", range(9))
def test_root_is_that_of_the_published_tree(size: int) -> None:
    assert tree.root_of(grown(LEAVES[:size])).hex() == VECTORS["roots"][size]


@pytest.mark.parametrize("case", VECTORS["inclusion"], ids=str)
def test_inclusion_proofs_are_the_published_ones(case: dict[str, Any]) -> None:
    wanted = tree.inclusion_ranges(case["leaf"], case["size"])
    proof = tree.range_roots(LEAVES, wanted)
    assert [one.hex() for one in proof] == case["proof"]
    root = bytes.fromhex(VECTORS["roots"][case["size"]])
    merkle.verify_inclusion(case["leaf"], case["size"], merkle.leaf_hash(LEAVES[case["leaf"]]), proof, root)


@pytest.mark.parametrize("case", VECTORS["consistency"], ids=str)
def test_consistency_proofs_are_the_published_ones(case: dict[str, Any]) -> None:
    proof = tree.range_roots(LEAVES, tree.consistency_ranges(case["old"], case["size"]))
    assert [one.hex() for one in proof] == case["proof"]
    roots = [bytes.fromhex(VECTORS["roots"][size]) for size in (case["old"], case["size"])]
    merkle.verify_consistency(case["old"], case["size"], roots[0], roots[1], proof)


@pytest.mark.parametrize("size", range(1, 70))
def test_growing_and_proving_agree_with_the_tree_at_hand(size: int) -> None:
    made = grown(ENTRIES[:size])
    assert tree.root_of(made) == merkle.root(HASHES[:size])
    assert len(made) == size.bit_count()
    for index in range(size):
        wanted = tree.inclusion_ranges(index, size)
        assert tree.range_roots(ENTRIES, wanted) == merkle.inclusion_proof(HASHES[:size], index)
    for old in range(1, size + 1):
        wanted = tree.consistency_ranges(old, size)
        assert tree.range_roots(ENTRIES, wanted) == merkle.consistency_proof(HASHES[:size], old)


@given(data=st.lists(st.binary(min_size=32, max_size=32), max_size=300), cut=st.integers(0, 300))
def test_a_tree_goes_on_from_what_was_stored(data: list[bytes], cut: int) -> None:
    before, after = data[:cut], data[cut:]
    stored = tree.encode_tree(grown(before))
    assert len(stored) == 32 * len(before).bit_count()
    made = tree.decode_tree(stored)
    for size, one in enumerate(after, len(before)):
        made = tree.grow(made, size, one)
    assert made == grown(data)
    assert tree.root_of(made) == merkle.root([merkle.leaf_hash(one) for one in data])


@given(size=st.integers(1, 1 << 62), data=st.data())
def test_a_proof_in_a_tree_of_any_size_has_at_most_63_hashes_side_by_side(
    size: int, data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, size - 1))
    parts = [*tree.inclusion_ranges(index, size), tree.Range(index, index + 1)]
    assert len(parts) <= 64
    assert sum(part.high - part.low for part in parts) == size
    old = data.draw(st.integers(1, size))
    found = tree.consistency_ranges(old, size)
    assert len(found) <= 63
    ordered = sorted(found)
    assert all(one.high == other.low for one, other in pairwise(ordered))


def test_an_unknown_tree_stays_unknown() -> None:
    assert not tree.is_known((), 9)
    assert tree.grow((), 9, ENTRIES[0]) == ()
    assert tree.is_known((), 0)


REFUSED: list[Callable[[], object]] = [
    lambda: tree.inclusion_ranges(4, 4),
    lambda: tree.inclusion_ranges(-1, 4),
    lambda: tree.consistency_ranges(0, 4),
    lambda: tree.consistency_ranges(5, 4),
    lambda: tree.range_roots(ENTRIES[:3], [tree.Range(0, 4)]),
    lambda: tree.range_roots(ENTRIES[:3], [tree.Range(3, 4)]),
    lambda: tree.range_roots(ENTRIES, [tree.Range(0, 4), tree.Range(2, 4)]),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_impossible_proofs_are_refused(case: int) -> None:
    with pytest.raises(RecordError):
        REFUSED[case]()


def test_a_stored_tree_of_half_a_hash_is_refused() -> None:
    with pytest.raises(DecodeError, match="33 bytes"):
        tree.decode_tree(bytes(33))
