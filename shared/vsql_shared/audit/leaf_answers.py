"""What a node's database answers about the leaves it keeps: rows become values, or a typed error.

Not here: the questions' SQL (leaf_diff.py) and what follows from the answers (divergence.py). Pure. Rules:

* A peer's database is somebody else's: every row is held against what was asked, in type, number and size,
  before anything is made of it. What does not fit is refused (RecordError), and nothing grows beyond what was
  asked for.
* What is of the right form may still be untrue. Nothing is believed here.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from vsql_shared.audit.merkle import HASH_SIZE
from vsql_shared.changes import PartLeaves
from vsql_shared.errors import RecordError

Row = Sequence[object]
_MAX_LONG = (1 << 63) - 1
_MAX_INT = (1 << 31) - 1
_T = TypeVar("_T")


class Kept(NamedTuple):
    """What a side says of the leaves it keeps of a batch: their bytes, and a hash over all of them."""

    nbytes: int
    digest: bytes


def parse_kept(rows: Iterable[Row], sequences: Container[int]) -> dict[int, Kept]:
    """Manifest → what is kept of it. Rows are (sequence, bytes, hash), each manifest once."""
    found: dict[int, Kept] = {}
    for row in rows:
        if len(row) != 3:
            raise RecordError(f"an answer of {len(row)} columns, expected 3")
        sequence = _between(row[0], 1, _MAX_LONG, "sequence")
        if sequence not in sequences or sequence in found:
            raise RecordError(f"kept leaves of entry {sequence}, which was not asked about, or twice")
        found[sequence] = Kept(_between(row[1], 1, _MAX_LONG, "size"), _hash(row[2]))
    return found


def parse_parts(rows: Iterable[Row], kept: Mapping[int, int]) -> dict[int, list[PartLeaves]]:
    """Manifest → what is kept of its topic-partitions, by their place; at most what `kept` says in bytes.

    Rows are (sequence, part, leaves).
    """
    found: dict[int, list[PartLeaves]] = {sequence: [] for sequence in kept}
    left = dict(kept)
    for row in rows:
        if len(row) != 3:
            raise RecordError(f"an answer of {len(row)} columns, expected 3")
        sequence = _between(row[0], 1, _MAX_LONG, "sequence")
        part = _between(row[1], 0, _MAX_INT, "part")
        leaves = _typed(row[2], bytes, "leaves")
        if sequence not in left or len(leaves) > left[sequence]:
            raise RecordError(
                f"leaves of entry {sequence}, which were not asked for, or are more than were said"
            )
        # A row without leaves would cost nothing of what is left.
        left[sequence] -= max(len(leaves), HASH_SIZE)
        found[sequence].append(PartLeaves(part, leaves))
    for parts in found.values():
        parts.sort(key=lambda one: one.part)
    return found


def _typed(value: object, kind: type[_T], name: str) -> _T:
    if not isinstance(value, kind):
        raise RecordError(f"{name} of type {type(value).__name__}, expected {kind.__name__}")
    return value


def _between(value: object, least: int, most: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise RecordError(f"{name} out of range")
    return value


def _hash(value: object) -> bytes:
    found = _typed(value, bytes, "hash")
    if len(found) != HASH_SIZE:
        raise RecordError(f"a hash of {len(found)} bytes, expected {HASH_SIZE}")
    return found
