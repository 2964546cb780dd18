"""Merkle trees as RFC 9162 (Certificate Transparency 2.0), section 2.1, defines them. Bytes only.

Not here: what a leaf is made of (wire/pack.py hashes sealed tuples) or who signs a root (chain.py).

Rules:
* leaf = SHA-256(0x00 ‖ data), node = SHA-256(0x01 ‖ left ‖ right): a node can never pass for a leaf.
* A tree of n leaves splits at the largest power of two below n. Pairing each level from the left and
  carrying an odd last node up unchanged gives the same tree, without recursion.
* Functions take leaf *hashes*; `batch_root` is the one exception and says so.
* Verifying raises RecordError; nothing here returns a bool.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from vsql_shared.errors import RecordError

HASH_SIZE = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()
"""Root of the tree without leaves."""

_LEAF = b"\x00"
_NODE = b"\x01"


def leaf_hash(data: bytes) -> bytes:
    """Hash of one leaf's data."""
    return hashlib.sha256(_LEAF + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash of an inner node."""
    return hashlib.sha256(_NODE + left + right).digest()


def _level_above(level: Sequence[bytes]) -> list[bytes]:
    # Hot: one comprehension a level, nothing looked up inside of it but locals.
    sha, prefix = hashlib.sha256, _NODE
    pairs = iter(level)
    above = [sha(prefix + left + right).digest() for left, right in zip(pairs, pairs, strict=False)]
    if len(level) & 1:
        above.append(level[-1])
    return above


def root(leaf_hashes: Sequence[bytes]) -> bytes:
    """MTH of RFC 9162, section 2.1.1, over leaf hashes."""
    if not leaf_hashes:
        return EMPTY_ROOT
    level = leaf_hashes
    while len(level) > 1:
        level = _level_above(level)
    return level[0]


def levels(leaf_hashes: Sequence[bytes]) -> list[list[bytes]]:
    """Every level of the tree, leaves first, root last; an odd last node appears again one level up."""
    out = [list(leaf_hashes)]
    while len(out[-1]) > 1:
        out.append(_level_above(out[-1]))
    return out


def batch_root(sub_roots: Sequence[bytes]) -> bytes:
    """Root over a batch's partitions: the leaf *inputs* are the sub-roots, in the manifest's order."""
    return root([leaf_hash(sub) for sub in sub_roots])


def _split(size: int) -> int:
    """Largest power of two smaller than `size` (size ≥ 2)."""
    return 1 << ((size - 1).bit_length() - 1)


def inclusion_proof(leaf_hashes: Sequence[bytes], index: int) -> list[bytes]:
    """PATH of RFC 9162, section 2.1.3.1: the siblings from the leaf up. Raises RecordError."""
    if not 0 <= index < len(leaf_hashes):
        raise RecordError(f"leaf {index} of a tree of {len(leaf_hashes)}")
    path: list[bytes] = []
    level: Sequence[bytes] = leaf_hashes
    while len(level) > 1:
        sibling = index ^ 1
        if sibling < len(level):
            path.append(level[sibling])
        level, index = _level_above(level), index >> 1
    return path


class _Walk:
    """Position of a proof's current node while it climbs: what both verifications share.

    `node` and `last` are indexes on the current level, as `fn` and `sn` in the RFC.
    """

    def __init__(self, node: int, last: int, where: str) -> None:
        self.node = node
        self.last = last
        self.where = where

    def sibling_is_left(self) -> bool:
        """Say on which side the next sibling stands, and climb to the parent both have."""
        if self.last == 0:
            raise RecordError(f"{self.where}: longer than the tree is high")
        left = bool(self.node & 1) or self.node == self.last
        # A last node without a sibling was carried up: skip those levels.
        while left and not self.node & 1 and self.node:
            self._climb()
        self._climb()
        return left

    def _climb(self) -> None:
        self.node, self.last = self.node >> 1, self.last >> 1

    def must_be_at_root(self) -> None:
        if self.last != 0:
            raise RecordError(f"{self.where}: too short")


def verify_inclusion(index: int, size: int, leaf: bytes, proof: Sequence[bytes], expected: bytes) -> None:
    """Section 2.1.3.2: raise RecordError unless leaf hash `leaf` is number `index` of that tree."""
    where = f"inclusion proof of leaf {index} of {size}"
    if not 0 <= index < size:
        raise RecordError(f"{where}: no such leaf")
    walk, current = _Walk(index, size - 1, where), leaf
    for sibling in proof:
        current = node_hash(sibling, current) if walk.sibling_is_left() else node_hash(current, sibling)
    walk.must_be_at_root()
    if current != expected:
        raise RecordError(f"{where}: leads to root {current.hex()}, expected {expected.hex()}")


def consistency_proof(leaf_hashes: Sequence[bytes], old_size: int) -> list[bytes]:
    """PROOF of section 2.1.4.1: that the tree of `old_size` leaves is a prefix of this one."""
    size = len(leaf_hashes)
    if not 0 < old_size <= size:
        raise RecordError(f"no consistency proof from {old_size} to {size} leaves")
    proof: list[bytes] = []
    low, high, whole = 0, size, True
    # Iterative SUBPROOF: walk down to the old tree's last complete subtree, noting siblings on the way.
    while high - low > old_size - low:
        middle = low + _split(high - low)
        if old_size <= middle:
            proof.append(root(leaf_hashes[middle:high]))
            high = middle
        else:
            proof.append(root(leaf_hashes[low:middle]))
            low, whole = middle, False
    if not whole:
        proof.append(root(leaf_hashes[low:high]))
    proof.reverse()
    return proof


def verify_consistency(
    old_size: int, size: int, old_root: bytes, new_root: bytes, proof: Sequence[bytes]
) -> None:
    """Section 2.1.4.2: raise RecordError unless tree (old_size, old_root) is a prefix of (size, new_root)."""
    where = f"consistency proof from {old_size} to {size} leaves"
    if not 0 < old_size <= size:
        raise RecordError(f"{where}: impossible sizes")
    if old_size == size:
        if proof or old_root != new_root:
            raise RecordError(f"{where}: the roots differ or the proof is not empty")
        return
    # When the old tree is one complete subtree its root is its own proof and is left out.
    path = [old_root, *proof] if old_size & (old_size - 1) == 0 else list(proof)
    if not path:
        raise RecordError(f"{where}: empty")
    node, last = old_size - 1, size - 1
    while node & 1:
        node, last = node >> 1, last >> 1
    walk, old, new = _Walk(node, last, where), path[0], path[0]
    for sibling in path[1:]:
        if walk.sibling_is_left():
            old, new = node_hash(sibling, old), node_hash(sibling, new)
        else:
            new = node_hash(new, sibling)
    walk.must_be_at_root()
    if old != old_root or new != new_root:
        raise RecordError(f"{where}: does not lead from {old_root.hex()} to {new_root.hex()}")


def locate_differences(
    size: int,
    ours: Callable[[int, Sequence[int]], Sequence[bytes]],
    theirs: Callable[[int, Sequence[int]], Sequence[bytes]],
) -> list[int]:
    """Indexes of the leaves in which two trees of `size` leaves differ.

    Both sides are asked level by level from the root down, (height, node indexes) → hashes, and only
    for children of nodes that differ: log2(size) exchanges, whatever the number of differences.
    `ours` and `theirs` may be `levels(...)` on both sides or a call to the peer.
    """
    if size == 0:
        return []
    suspects = [0]
    for height in range((size - 1).bit_length(), -1, -1):
        width = -(-size >> height)
        asked = [index for index in suspects if index < width]
        mine, others = ours(height, asked), theirs(height, asked)
        if not len(mine) == len(others) == len(asked):
            raise RecordError(f"asked for {len(asked)} tree nodes of height {height}, got {len(others)}")
        differing = [index for index, one, two in zip(asked, mine, others, strict=True) if one != two]
        if height == 0:
            return differing
        suspects = [child for index in differing for child in (2 * index, 2 * index + 1)]
    return []
