"""Which tuples of a range of batches differ between two sides: by few questions, whatever differs.

Not here: where leaf hashes are kept, and how a question travels (docs/design/0019). Pure. Rules:

* Each side's leaves were held against the roots it signed before they come here.
* Leaf hashes are sorted and asked about by their first hex digits, not by position: a tuple that is missing
  or too many shifts no other. A node is the number of its leaves and a hash over all of them.
* One exchange asks about everything that still differs: sixteen children at once, or the leaves themselves
  where few are left. A million tuples take five or six, and each further sixteenfold one more.
* A peer's answer that is not of the form is refused (RecordError); one that is untrue only hides or invents
  its own differences, and its leaves fit its signed root or do not.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import NamedTuple

from vsql_shared.audit.merkle import HASH_SIZE
from vsql_shared.errors import RecordError

FAN_OUT = 16
FEW = 32
"""Leaves of a node, on the side that has more, that are given rather than asked about further."""
MAX_DIFFERENCES = 10_000
"""Nodes followed at a time; what differs more widely is said to, and named in part."""
_MAX_DEPTH = 2 * HASH_SIZE


class Place(NamedTuple):
    """Where a tuple stands: its manifest's sequence, its partition's place there, its index in the batch."""

    sequence: int
    part: int
    number: int


class Leaf(NamedTuple):
    """A tuple's leaf hash and its place."""

    digest: bytes
    place: Place


class Node(NamedTuple):
    """All leaves whose hashes begin with some digits: their number, and a hash over them in order."""

    size: int
    digest: bytes


class Question(NamedTuple):
    """About the leaves whose hashes begin with `prefix` (hex): its sixteen children, or the leaves."""

    prefix: str
    leaves: bool


class Answer(NamedTuple):
    """One of both, as the question asks."""

    children: tuple[Node, ...] = ()
    leaves: tuple[Leaf, ...] = ()


Ask = Callable[[Sequence[Question]], Sequence[Answer]]
"""One exchange."""


class Differences(NamedTuple):
    """What differs, in order of place; `more`: not all of it is here."""

    altered: list[Place]
    missing: list[Place]
    """Ours has them, theirs has not."""
    extra: list[Place]
    """Theirs has them, ours has not."""
    exchanges: int
    more: bool


class Side:
    """One side's leaves, and its answers."""

    def __init__(self, leaves: Iterable[Leaf]) -> None:
        self._leaves = sorted(leaves, key=itemgetter(0))
        self._digests = [leaf.digest for leaf in self._leaves]

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """All questions of one exchange. Raises RecordError for a prefix that is none."""
        return [
            Answer(leaves=tuple(self._leaves[slice(*self._range(one.prefix))]))
            if one.leaves
            else Answer(children=tuple(self._node(f"{one.prefix}{digit:x}") for digit in range(FAN_OUT)))
            for one in questions
        ]

    def _range(self, prefix: str) -> tuple[int, int]:
        if len(prefix) > _MAX_DEPTH or not set(prefix) <= set("0123456789abcdef"):
            raise RecordError(f"{prefix[:80]!r} is no beginning of a hash")
        low = bytes.fromhex(prefix.ljust(_MAX_DEPTH, "0"))
        high = bytes.fromhex(prefix.ljust(_MAX_DEPTH, "f"))
        start = bisect_left(self._digests, low)
        # Behind the last hash of all nothing follows; before it, the first one beyond `high`.
        return start, bisect_left(self._digests, high + b"\0", start)

    def _node(self, prefix: str) -> Node:
        start, stop = self._range(prefix)
        return Node(stop - start, hashlib.sha256(b"".join(self._digests[start:stop])).digest())


def locate(ours: Ask, theirs: Ask, limit: int = MAX_DIFFERENCES) -> Differences:
    """Find what differs between two sides. Raises RecordError for answers of a wrong form."""
    mine: list[Leaf] = []
    other: list[Leaf] = []
    questions, exchanges, more = [Question("", leaves=False)], 0, False
    while questions:
        exchanges += 1
        own, told = ours(questions), theirs(questions)
        if not len(own) == len(told) == len(questions):
            raise RecordError(f"asked {len(questions)} questions, got {len(told)} answers")
        further: list[Question] = []
        for question, left, right in zip(questions, own, told, strict=True):
            if question.leaves:
                mine += _checked(question, left)
                other += _checked(question, right)
            else:
                further += _children(question, left, right)
        questions, more = further[:limit], more or len(further) > limit
    return _named(mine, other, exchanges, more)


def _checked(question: Question, answer: Answer) -> tuple[Leaf, ...]:
    """Leaves that are where they were asked for, and as few as are asked for."""
    if len(answer.leaves) > FEW:
        raise RecordError(f"{len(answer.leaves)} leaves of {question.prefix!r}, at most {FEW} are taken")
    for leaf in answer.leaves:
        if len(leaf.digest) != HASH_SIZE or not leaf.digest.hex().startswith(question.prefix):
            raise RecordError(f"a leaf that does not begin with {question.prefix}")
    return answer.leaves


def _children(question: Question, left: Answer, right: Answer) -> list[Question]:
    """What to ask next about the children that differ."""
    if not len(left.children) == len(right.children) == FAN_OUT:
        raise RecordError(f"{len(right.children)} children of {question.prefix!r}, expected {FAN_OUT}")
    whole = len(question.prefix) + 1 == _MAX_DEPTH
    return [
        Question(f"{question.prefix}{digit:x}", leaves=whole or max(one.size, two.size) <= FEW)
        for digit, (one, two) in enumerate(zip(left.children, right.children, strict=True))
        if one != two
    ]


def _named(mine: list[Leaf], other: list[Leaf], exchanges: int, more: bool) -> Differences:
    """Leaves that one side alone has: altered where both have one at the same place."""
    left, right = set(mine) - set(other), set(other) - set(mine)
    ours, theirs = {leaf.place for leaf in left}, {leaf.place for leaf in right}
    return Differences(sorted(ours & theirs), sorted(ours - theirs), sorted(theirs - ours), exchanges, more)
