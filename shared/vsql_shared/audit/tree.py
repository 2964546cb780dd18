"""The tree of a chain that grows: RFC 9162 over its entries, in memory that does not grow with it.

Not here: trees whose leaves are all at hand, verifying proofs (merkle.py), what is signed (checkpoint.py).
Pure. Rules:

* A leaf's data is the entry's hash; leaf number i is the entry of sequence i + 1 (docs/design/0016).
* A `Tree` is the roots of the complete subtrees a size is made of, the largest first: one for each 1 in the
  size's binary form. That is all that is needed to go on, and to know the root.
* Proofs come from one pass over the leaves: they are roots of ranges, which lie side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import NamedTuple

from vsql_shared.audit.merkle import EMPTY_ROOT, HASH_SIZE, leaf_hash, node_hash
from vsql_shared.errors import DecodeError, RecordError

Tree = tuple[bytes, ...]
"""Roots of the complete subtrees, the largest first."""

MAX_SIZE = (1 << 63) - 1
"""Leaves; what a sequence can count to."""


class Range(NamedTuple):
    """Leaves `low` to `high` - 1 of a tree: one of its subtrees."""

    low: int
    high: int


def is_known(tree: Tree, size: int) -> bool:
    """Whether `tree` is one of this size. A head that was stored without its tree has none."""
    return len(tree) == size.bit_count()


def grow(tree: Tree, size: int, entry_hash: bytes) -> Tree:
    """The tree of `size` leaves with one more; an unknown tree stays unknown (empty)."""
    if not is_known(tree, size):
        return ()
    current, kept = leaf_hash(entry_hash), len(tree)
    # Like adding one to a binary number: each 1 at the end becomes 0 and carries.
    while size & 1:
        kept -= 1
        current, size = node_hash(tree[kept], current), size >> 1
    return (*tree[:kept], current)


def root_of(tree: Tree) -> bytes:
    """MTH of RFC 9162, section 2.1.1, from the complete subtrees."""
    if not tree:
        return EMPTY_ROOT
    current = tree[-1]
    for left in reversed(tree[:-1]):
        current = node_hash(left, current)
    return current


def tree_of(entry_hashes: Iterable[bytes], before: Tree = (), passed: int = 0) -> tuple[Tree, int]:
    """The tree over entry hashes in the order of the chain, and its size; `before`: as in `range_roots`."""
    tree, size = before, passed
    for one in entry_hashes:
        tree, size = grow(tree, size, one), size + 1
    return tree, size


def encode_tree(tree: Tree) -> bytes:
    """As it is stored: the hashes one after the other."""
    return b"".join(tree)


def decode_tree(stored: bytes) -> Tree:
    """Raises DecodeError where that is no row of hashes."""
    if len(stored) % HASH_SIZE:
        raise DecodeError(f"stored tree of {len(stored)} bytes, expected hashes of {HASH_SIZE}")
    return tuple(stored[at : at + HASH_SIZE] for at in range(0, len(stored), HASH_SIZE))


def _split(low: int, high: int) -> int:
    """Where a subtree of two or more leaves is divided."""
    return low + (1 << ((high - low - 1).bit_length() - 1))


def inclusion_ranges(index: int, size: int) -> list[Range]:
    """The subtrees whose roots are the inclusion proof, in the proof's order (leaf upwards)."""
    if not 0 <= index < size:
        raise RecordError(f"no leaf {index} in a tree of {size}")
    low, high, path = 0, size, []
    while high - low > 1:
        middle = _split(low, high)
        if index < middle:
            path.append(Range(middle, high))
            high = middle
        else:
            path.append(Range(low, middle))
            low = middle
    return path[::-1]


def consistency_ranges(old_size: int, size: int) -> list[Range]:
    """The subtrees whose roots are the consistency proof, in the proof's order."""
    if not 0 < old_size <= size:
        raise RecordError(f"no consistency proof from {old_size} to {size} leaves")
    low, high, path, whole = 0, size, [], True
    while high > old_size:
        middle = _split(low, high)
        if old_size <= middle:
            path.append(Range(middle, high))
            high = middle
        else:
            path.append(Range(low, middle))
            low, whole = middle, False
    # The old tree's own root is known to whoever asks; one of its subtrees is not.
    return path[::-1] if whole else [Range(low, high), *path[::-1]]


def subtrees(size: int) -> list[Range]:
    """The leaves of each root in a `Tree` of this size."""
    out, low = [], 0
    for bit in range(size.bit_length() - 1, -1, -1):
        if size >> bit & 1:
            out.append(Range(low, low + (1 << bit)))
            low += 1 << bit
    return out


def range_roots(
    entry_hashes: Iterable[bytes], wanted: Sequence[Range], before: Tree = (), passed: int = 0
) -> list[bytes]:
    """The roots of ranges, in the order asked for, from one pass over the chain's entry hashes.

    `before` is the tree of the `passed` entries that come before the first hash: they were pruned, and ranges
    may begin among them at the roots that are left. Raises RecordError where one does not, when ranges
    overlap, or when the chain ends before the last one does.
    """
    ordered = sorted(set(wanted))
    if any(one.high > other.low for one, other in pairwise(ordered)):
        raise RecordError("subtrees of one proof overlap")
    known = dict(zip(subtrees(passed), before, strict=True)) if passed else {}
    leaves, at = iter(entry_hashes), passed
    found: dict[Range, bytes] = {}
    for part in ordered:
        if part in known:
            found[part] = known[part]
            continue
        inside = [one for one in known if part.low <= one.low and one.high <= part.high]
        tree, size = tuple(known[one] for one in inside), sum(one.high - one.low for one in inside)
        if part.low < passed and (not inside or inside[0].low != part.low or part.high <= passed):
            raise RecordError(f"entries below {passed} were pruned, a proof needs some of them")
        _pass(leaves, part.low + size - at)
        tree, size = tree_of(islice(leaves, part.high - part.low - size), tree, size)
        if size != part.high - part.low:
            raise RecordError(f"the chain ends at {part.low + size}, a proof needs {part.high} entries")
        found[part], at = root_of(tree), part.high
    return [found[part] for part in wanted]


def _pass(leaves: Iterator[bytes], count: int) -> None:
    """Take entries no proof asks for."""
    for _ in islice(leaves, count):
        pass
