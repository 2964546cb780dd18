"""Naming the tuples that differ: altered, missing, extra, any number of them, in few exchanges."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsql_shared.audit.differences import (
    FEW,
    Answer,
    Differences,
    Leaf,
    Node,
    Place,
    Question,
    Side,
    locate,
)
from vsql_shared.errors import RecordError


def leaf(number: int, salt: str = "") -> Leaf:
    """Tuples of batches of a thousand, in two partitions."""
    place = Place(1 + number // 1000, number % 2, number % 1000)
    return Leaf(hashlib.sha256(b"%d%b" % (number, salt.encode())).digest(), place)


def compared(ours: list[Leaf], theirs: list[Leaf]) -> Differences:
    return locate(Side(ours).answer, Side(theirs).answer)


@cache
def million() -> tuple[list[Leaf], Side]:
    """Made once: it is most of the time these tests take."""
    leaves = [leaf(number) for number in range(1_000_000)]
    return leaves, Side(leaves)


def test_one_altered_tuple_among_a_million_is_named_in_at_most_21_exchanges() -> None:
    leaves, ours = million()
    theirs = [*leaves[:654_321], leaf(654_321, "altered"), *leaves[654_322:]]
    found = locate(ours.answer, Side(theirs).answer)
    assert found == Differences([leaf(654_321).place], [], [], found.exchanges, more=False)
    assert found.exchanges <= 6


def test_three_altered_one_missing_and_one_extra_among_a_million_are_all_named() -> None:
    altered, gone = (17, 500_000, 999_999), 250_001
    leaves, ours = million()
    theirs = [
        leaf(number, "x") if number in altered else one for number, one in enumerate(leaves) if number != gone
    ]
    added = leaf(1_000_000)
    found = locate(ours.answer, Side([*theirs, added]).answer)
    assert found.altered == sorted(leaf(number).place for number in altered)
    assert (found.missing, found.extra, found.more) == ([leaf(gone).place], [added.place], False)
    assert found.exchanges <= 6


@given(size=st.integers(0, 400), data=st.data())
def test_whatever_differs_is_named_and_nothing_else(size: int, data: st.DataObject) -> None:
    numbers = st.sets(st.integers(0, size - 1), max_size=40) if size else st.just(set[int]())
    altered, gone = data.draw(numbers), data.draw(numbers)
    extra = data.draw(st.integers(0, 40))
    ours = [leaf(number) for number in range(size)]
    theirs = [leaf(number, "x" * (number in altered)) for number in range(size + extra) if number not in gone]
    found = compared(ours, theirs)
    assert found.altered == sorted(leaf(number).place for number in altered - gone)
    assert found.missing == sorted(leaf(number).place for number in gone)
    assert found.extra == sorted(leaf(number).place for number in range(size, size + extra))
    assert found.exchanges <= 5


def test_hashes_at_both_ends_and_with_long_common_beginnings_are_told_apart() -> None:
    ends = [Leaf(bytes(32), Place(1, 0, 0)), Leaf(b"\xff" * 32, Place(1, 0, 1))]
    alike = [Leaf(bytes(30) + number.to_bytes(2, "big"), Place(2, 0, number)) for number in range(1, 200)]
    found = compared([*ends, *alike], [*ends[:1], *alike[1:]])
    assert found.missing == [ends[1].place, alike[0].place]
    assert found.exchanges <= 65


def test_more_than_the_limit_is_said_to_be_more() -> None:
    ours = [leaf(number) for number in range(5_000)]
    theirs = [leaf(number, "x") for number in range(5_000)]
    found = locate(Side(ours).answer, Side(theirs).answer, limit=4)
    assert found.more
    assert 0 < len({*found.altered, *found.missing}) < 5_000


def test_what_a_side_says_of_a_place_is_not_compared_where_hashes_are_equal() -> None:
    ours = [leaf(number) for number in range(100)]
    moved = ours[3]._replace(place=Place(9, 0, 9))
    # The hashes are equal, so nothing is asked: a leaf's hash holds the tuple's place in its batch.
    assert compared(ours, [*ours[:3], moved, *ours[4:]]).exchanges == 1


Answers = Callable[[Sequence[Question]], Sequence[Answer]]
OURS = [leaf(number) for number in range(100)]


def _lying(answer: Callable[[Question], Answer]) -> Answers:
    return lambda questions: [answer(one) for one in questions]


def _many(prefix: str) -> tuple[Leaf, ...]:
    """Leaves that are where they were asked for, more of them than anybody asks for."""
    low = bytes.fromhex(prefix.ljust(60, "0"))
    return tuple(Leaf(low + number.to_bytes(2, "big"), Place(1, 0, number)) for number in range(FEW + 1))


WRONG: dict[str, Answers] = {
    "no answer": lambda _questions: [],
    "too few children": _lying(lambda _one: Answer(children=(Node(1, b""),))),
    "leaves for children": _lying(lambda _one: Answer(leaves=tuple(OURS))),
    "leaves from elsewhere": _lying(
        lambda one: Answer(leaves=tuple(OURS)) if one.leaves else Answer(children=(Node(1, b""),) * 16)
    ),
    "a leaf that is no hash": _lying(
        lambda one: (
            Answer(leaves=(Leaf(b"", Place(1, 0, 0)),))
            if one.leaves
            else Answer(children=(Node(1, b""),) * 16)
        )
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_answer_of_a_wrong_form_is_refused(case: str) -> None:
    with pytest.raises(RecordError):
        locate(Side(OURS).answer, WRONG[case])


def test_more_leaves_than_are_asked_for_are_refused() -> None:
    """A node claims one leaf, the answer has as many as a message can hold."""
    endless = _lying(
        lambda one: Answer(leaves=_many(one.prefix)) if one.leaves else Answer(children=(Node(1, b""),) * 16)
    )
    with pytest.raises(RecordError, match=f"{FEW + 1} leaves of"):
        locate(Side(OURS).answer, endless)


@pytest.mark.parametrize("prefix", ["g", "A", "0" * 65, "٣", "-1"])
def test_a_question_about_no_hash_is_refused(prefix: str) -> None:
    with pytest.raises(RecordError):
        Side(OURS).answer([Question(prefix, leaves=True)])


def test_a_peer_that_always_differs_ends_the_search() -> None:
    """Its nodes claim leaves for ever; there are no more digits than a hash has."""
    endless = _lying(lambda one: Answer() if one.leaves else Answer(children=(Node(1_000, b"?"),) * 16))
    found = locate(Side(OURS).answer, endless, limit=8)
    assert found.more
    assert found.exchanges == 2 * 32 + 1
