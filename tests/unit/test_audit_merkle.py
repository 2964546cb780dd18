"""Merkle trees: published vectors, proofs for every size up to 64, and forged proofs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsql_shared.audit import merkle
from vsql_shared.errors import RecordError

# Leaves and roots of the reference implementation of Certificate Transparency (RFC 6962 and 9162 hash alike).
CT_LEAVES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
CT_ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
CT_PATH_OF_0_IN_8 = [
    "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
    "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
    "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
]
LEAVES = [merkle.leaf_hash(b"%d" % number) for number in range(65)]
SIZES = range(1, 65)


def recursive_root(leaves: list[bytes]) -> bytes:
    """MTH as the RFC writes it."""
    if not leaves:
        return sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return sha256(b"\x01" + recursive_root(leaves[:split]) + recursive_root(leaves[split:])).digest()


@pytest.mark.parametrize("size", range(9))
def test_root_is_that_of_the_reference_implementation(size: int) -> None:
    assert merkle.root([merkle.leaf_hash(data) for data in CT_LEAVES[:size]]).hex() == CT_ROOTS[size]


def test_proofs_are_those_of_the_reference_implementation() -> None:
    leaves = [merkle.leaf_hash(data) for data in CT_LEAVES]
    assert [one.hex() for one in merkle.inclusion_proof(leaves, 0)] == CT_PATH_OF_0_IN_8
    assert [one.hex() for one in merkle.consistency_proof(leaves, 1)] == CT_PATH_OF_0_IN_8


@pytest.mark.parametrize("size", [0, *SIZES])
def test_root_is_that_of_the_recursive_definition(size: int) -> None:
    assert merkle.root(LEAVES[:size]) == recursive_root(LEAVES[:size])
    assert merkle.levels(LEAVES[:size] or [merkle.EMPTY_ROOT])[-1] == [merkle.root(LEAVES[:size])]


def test_batch_root_hashes_sub_roots_as_leaf_data() -> None:
    assert merkle.batch_root(LEAVES[:3]) == recursive_root(
        [sha256(b"\0" + one).digest() for one in LEAVES[:3]]
    )
    assert merkle.batch_root(LEAVES[:1]) != LEAVES[0]


def test_node_cannot_pass_for_a_leaf() -> None:
    assert merkle.leaf_hash(LEAVES[0] + LEAVES[1]) != merkle.node_hash(LEAVES[0], LEAVES[1])


@pytest.mark.parametrize("size", SIZES)
def test_every_leaf_has_a_proof_and_no_other_place(size: int) -> None:
    root = merkle.root(LEAVES[:size])
    for index in range(size):
        proof = merkle.inclusion_proof(LEAVES[:size], index)
        merkle.verify_inclusion(index, size, LEAVES[index], proof, root)
        with pytest.raises(RecordError):
            merkle.verify_inclusion(index, size, LEAVES[64], proof, root)
        if size > 1:
            with pytest.raises(RecordError):
                merkle.verify_inclusion((index + 1) % size, size, LEAVES[index], proof, root)
            with pytest.raises(RecordError):
                merkle.verify_inclusion(index, size, LEAVES[index], proof[:-1], root)
        with pytest.raises(RecordError):
            merkle.verify_inclusion(index, size, LEAVES[index], [*proof, LEAVES[0]], root)


@pytest.mark.parametrize("size", SIZES)
def test_every_older_tree_is_a_prefix_and_no_other_tree_is(size: int) -> None:
    root = merkle.root(LEAVES[:size])
    for old in range(1, size + 1):
        old_root, proof = merkle.root(LEAVES[:old]), merkle.consistency_proof(LEAVES[:size], old)
        merkle.verify_consistency(old, size, old_root, root, proof)
        forgeries: list[tuple[int, bytes, bytes, Sequence[bytes]]] = [
            (old, LEAVES[64], root, proof),
            (old, old_root, LEAVES[64], proof),
            (old, old_root, root, [*proof, LEAVES[0]]),
        ]
        if proof:
            forgeries.append((old, old_root, root, proof[:-1]))
            forgeries.append((old, old_root, root, [LEAVES[64], *proof[1:]]))
        for number, before, after, path in forgeries:
            with pytest.raises(RecordError):
                merkle.verify_consistency(number, size, before, after, path)


IMPOSSIBLE: list[Callable[[], object]] = [
    lambda: merkle.inclusion_proof(LEAVES[:4], 4),
    lambda: merkle.inclusion_proof([], 0),
    lambda: merkle.inclusion_proof(LEAVES[:4], -1),
    lambda: merkle.verify_inclusion(4, 4, LEAVES[0], [], LEAVES[0]),
    lambda: merkle.verify_inclusion(-1, 4, LEAVES[0], [], LEAVES[0]),
    lambda: merkle.consistency_proof(LEAVES[:4], 5),
    lambda: merkle.consistency_proof(LEAVES[:4], 0),
    lambda: merkle.verify_consistency(0, 4, LEAVES[0], LEAVES[0], []),
    lambda: merkle.verify_consistency(5, 4, LEAVES[0], LEAVES[0], []),
    lambda: merkle.verify_consistency(3, 4, LEAVES[0], LEAVES[0], []),
    lambda: merkle.verify_consistency(4, 4, LEAVES[0], LEAVES[0], [LEAVES[1]]),
]


@pytest.mark.parametrize("case", range(len(IMPOSSIBLE)))
def test_impossible_sizes_are_refused(case: int) -> None:
    with pytest.raises(RecordError):
        IMPOSSIBLE[case]()


def asker(leaves: list[bytes], asked: list[int] | None = None) -> Callable[[int, Sequence[int]], list[bytes]]:
    levels = merkle.levels(leaves)

    def answer(height: int, indexes: Sequence[int]) -> list[bytes]:
        if asked is not None:
            asked.append(len(indexes))
        return [levels[height][index] for index in indexes]

    return answer


@given(size=st.integers(1, 200), data=st.data())
def test_differing_leaves_are_located_whatever_their_number(size: int, data: st.DataObject) -> None:
    ours = [merkle.leaf_hash(b"%d" % number) for number in range(size)]
    changed = data.draw(st.sets(st.integers(0, size - 1), max_size=8))
    theirs = [merkle.leaf_hash(b"x" + one) if at in changed else one for at, one in enumerate(ours)]
    asked: list[int] = []
    assert merkle.locate_differences(size, asker(ours), asker(theirs, asked)) == sorted(changed)
    assert len(asked) <= (size - 1).bit_length() + 1
    assert sum(asked) <= 1 + 2 * len(changed) * len(asked)


def test_nothing_differs_in_the_empty_tree() -> None:
    assert merkle.locate_differences(0, asker([LEAVES[0]]), asker([LEAVES[0]])) == []


def test_short_answer_of_a_peer_is_refused() -> None:
    with pytest.raises(RecordError, match="got 0"):
        merkle.locate_differences(4, asker(LEAVES[:4]), lambda _height, _indexes: [])
