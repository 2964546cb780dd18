"""What a node's database answers about the leaves it keeps: rows become values, or a typed error.

Not here: the questions' SQL (leaf_diff.py) and what follows from the answers (divergence.py). Pure. Rules:

* A peer's database is somebody else's: every row is held against what was asked, in type, number and size,
  before anything is made of it. What does not fit is refused (RecordError), and nothing grows beyond what was
  asked for.
* What is of the right form may still be untrue. Nothing is believed here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import TypeVar

from vsql_shared.audit.differences import FAN_OUT, FEW, Answer, Leaf, Node, Place, Question
from vsql_shared.audit.merkle import HASH_SIZE
from vsql_shared.changes import PartLeaves
from vsql_shared.errors import RecordError

Row = Sequence[object]
NODE, LEAF = "n", "l"
"""Kinds of rows in an answer."""
MAX_PARTS = 100_000
"""Topic-partitions of one batch."""
_MAX_LONG = (1 << 63) - 1
_MAX_INT = (1 << 31) - 1
_EMPTY = Node(0, hashlib.sha256(b"").digest())
_T = TypeVar("_T")


def parse_answers(
    questions: Sequence[Question], rows: Iterable[Row], sequences: Container[int]
) -> list[Answer]:
    """Answers to one exchange, of leaves of these manifests.

    Rows are ("n", hex digits, count, hash, …) for a node that has leaves, and ("l", hex digits, -, hash,
    sequence, part, index) for a leaf. Raises RecordError for rows that answer nothing that was asked.
    """
    nodes: dict[str, dict[str, Node]] = {one.prefix: {} for one in questions if not one.leaves}
    leaves: dict[str, list[Leaf]] = {one.prefix: [] for one in questions if one.leaves}
    for row in rows:
        if len(row) != 7:
            raise RecordError(f"an answer of {len(row)} columns, expected 7")
        kind, digits, digest = row[0], _typed(row[1], str, "digits"), _hash(row[3])
        if kind == NODE:
            _add_node(nodes, digits, Node(_between(row[2], 1, _MAX_LONG, "count"), digest))
        elif kind == LEAF:
            _add_leaf(leaves, digits, Leaf(digest, _place(row, sequences)))
        else:
            raise RecordError("an answer that is neither node nor leaf")
    return [
        Answer(leaves=tuple(leaves[one.prefix]))
        if one.leaves
        else Answer(
            children=tuple(
                nodes[one.prefix].get(f"{one.prefix}{digit:x}", _EMPTY) for digit in range(FAN_OUT)
            )
        )
        for one in questions
    ]


def _add_node(nodes: dict[str, dict[str, Node]], digits: str, node: Node) -> None:
    """Each child once, of a node that was asked about: that bounds how many there are."""
    children = nodes.get(digits[:-1])
    if children is None or digits[-1:] not in "0123456789abcdef" or digits in children or not digits:
        raise RecordError(f"an answer about {digits[:80]!r}, which was not asked, or twice")
    children[digits] = node


def _add_leaf(leaves: dict[str, list[Leaf]], digits: str, leaf: Leaf) -> None:
    found = leaves.get(digits)
    if found is None or not leaf.digest.hex().startswith(digits):
        raise RecordError(f"a leaf below {digits[:80]!r}, which was not asked, or elsewhere")
    if len(found) >= FEW:
        raise RecordError(f"more than {FEW} leaves below {digits!r}, as many as were said to be there")
    found.append(leaf)


def _place(row: Row, sequences: Container[int]) -> Place:
    sequence = _between(row[4], 1, _MAX_LONG, "sequence")
    if sequence not in sequences:
        raise RecordError(f"a leaf of entry {sequence}, which was not asked about")
    part = _between(row[5], 0, MAX_PARTS - 1, "part")
    return Place(sequence, part, _between(row[6], 0, (1 << 32) - 1, "index"))


def parse_kept(rows: Iterable[Row], sequences: Container[int]) -> dict[int, int]:
    """Manifest → bytes of the leaves that are kept of it. Rows are (sequence, bytes), each manifest once."""
    found: dict[int, int] = {}
    for row in rows:
        if len(row) != 2:
            raise RecordError(f"an answer of {len(row)} columns, expected 2")
        sequence = _between(row[0], 1, _MAX_LONG, "sequence")
        if sequence not in sequences or sequence in found:
            raise RecordError(f"kept leaves of entry {sequence}, which was not asked about, or twice")
        found[sequence] = _between(row[1], 1, _MAX_LONG, "size")
    return found


def parse_parts(rows: Iterable[Row], kept: Mapping[int, int]) -> dict[int, list[PartLeaves]]:
    """Manifest → what is kept of its topic-partitions, by their place; at most what `kept` says in bytes.

    Rows are (sequence, part, leaves, indexes).
    """
    found: dict[int, list[PartLeaves]] = {sequence: [] for sequence in kept}
    left = dict(kept)
    for row in rows:
        if len(row) != 4:
            raise RecordError(f"an answer of {len(row)} columns, expected 4")
        sequence = _between(row[0], 1, _MAX_LONG, "sequence")
        part = _between(row[1], 0, _MAX_INT, "part")
        leaves, indexes = _typed(row[2], bytes, "leaves"), _typed(row[3], bytes, "indexes")
        if sequence not in left or len(leaves) > left[sequence] or len(indexes) > max(4, len(leaves) // 8):
            raise RecordError(
                f"leaves of entry {sequence}, which were not asked for, or are more than were said"
            )
        # A row without leaves would cost nothing of what is left.
        left[sequence] -= max(len(leaves), HASH_SIZE)
        found[sequence].append(PartLeaves(part, leaves, indexes))
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
