"""Leaves that are kept: their bytes, how long they stay, and what a peer says of its own."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.audit_history import ACKS, CHAIN, B, History, ack_fields, manifest_fields
from vsql_shared.audit import merkle
from vsql_shared.audit.chain import Prepared
from vsql_shared.audit.divergence import Batches, Divergence, Pair, comparable, judge, pair, runs
from vsql_shared.audit.leaf_answers import Kept, parse_kept, parse_parts
from vsql_shared.audit.leaf_slots import MOST_EMPTIED, SLOTS, Slot, Steps, plan
from vsql_shared.audit.leaves import Leaf, Place, as_leaves, hashes, part_leaves, sub_root
from vsql_shared.changes import PartitionRoot, PartLeaves
from vsql_shared.errors import ChainError, RecordError

NOW = datetime(2026, 5, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
TOPIC = "shop.orders.node-a.public.orders"


def digest(number: int, salt: str = "") -> bytes:
    return hashlib.sha256(b"%d%b" % (number, salt.encode())).digest()


# What is kept


@given(first=st.integers(0, 2**32 - 600), count=st.integers(1, 500))
def test_indexes_that_follow_each_other_take_four_bytes(first: int, count: int) -> None:
    leaves = [digest(number) for number in range(count)]
    kept = part_leaves(3, leaves, list(range(first, first + count)))
    assert (len(kept.leaves), len(kept.indexes)) == (32 * count, 4)
    assert as_leaves(9, kept) == [Leaf(leaves[n], Place(9, 3, first + n)) for n in range(count)]
    assert sub_root(kept) == merkle.root(leaves)


@given(indexes=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=300))
def test_any_indexes_come_back_as_they_were(indexes: list[int]) -> None:
    leaves = [digest(number) for number in range(len(indexes))]
    assert [leaf.place.number for leaf in as_leaves(1, part_leaves(0, leaves, indexes))] == indexes


ALTERED_BYTES = {
    "no leaves": PartLeaves(0, b"", bytes(4)),
    "a hash cut off": PartLeaves(0, bytes(63), bytes(4)),
    "no indexes": PartLeaves(0, bytes(64), b""),
    "one index too many": PartLeaves(0, bytes(64), bytes(12)),
    "indexes beyond the largest": PartLeaves(0, bytes(64), b"\xff" * 4),
}


@pytest.mark.parametrize("case", ALTERED_BYTES)
def test_kept_bytes_that_do_not_fit_each_other_are_refused(case: str) -> None:
    with pytest.raises(RecordError):
        as_leaves(1, ALTERED_BYTES[case])


# How long


def slot(number: int, begun: float, ended: float | None, nbytes: int = 10) -> Slot:
    """Times in hours before now."""
    return Slot(number, NOW - begun * HOUR, None if ended is None else NOW - ended * HOUR, nbytes)


DAY = timedelta(days=1)
PLANS: dict[str, tuple[list[Slot], Steps]] = {
    "nothing there: the first is begun": ([], Steps((), 0)),
    "the present one goes on": ([slot(4, 1, None)], Steps((), 4)),
    "a sixteenth of the time is over": ([slot(4, 1.6, None)], Steps((), 5)),
    "a sixteenth of the bytes is there": ([slot(4, 0.1, None, 63)], Steps((), 5)),
    "the last number is followed by the first": ([slot(31, 2, None)], Steps((), 0)),
    "what ended before the time is emptied": (
        [slot(1, 27, 25), slot(2, 25, 23), slot(3, 1, None)],
        Steps((1,), 3),
    ),
    "the oldest go where all is too much": (
        [slot(1, 9, 8, 500), slot(2, 8, 7, 400), slot(3, 7, 6, 400), slot(4, 1, None, 10)],
        Steps((1,), 4),
    ),
    "as many as needed": (
        [slot(1, 9, 8, 500), slot(2, 8, 7, 900), slot(3, 7, 6, 900), slot(4, 1, None, 10)],
        Steps((1, 2), 4),
    ),
    "the next one is emptied before it is begun": (
        [slot(5, 9, 8), slot(3, 9.5, 9), slot(4, 1.6, None)],
        Steps((5,), 5),
    ),
    "after a time without any the next is begun": ([slot(7, 9, 8)], Steps((), 8)),
}


@pytest.mark.parametrize("case", PLANS)
def test_what_is_emptied_and_where_is_written(case: str) -> None:
    slots, expected = PLANS[case]
    assert plan(slots, NOW, DAY, 1_000) == expected


def test_nothing_is_written_and_all_is_emptied_where_none_are_kept() -> None:
    slots = [slot(number, 9, None if number == 7 else 8) for number in range(8)]
    assert plan(slots, NOW, timedelta(0), 1_000) == Steps(tuple(range(8)), None)


@given(
    hours=st.lists(st.floats(0.01, 3.0), min_size=1, max_size=200),
    sizes=st.lists(st.integers(0, 120), min_size=200, max_size=200),
)
def test_slots_stay_within_time_and_bytes_whatever_is_written(hours: list[float], sizes: list[int]) -> None:
    keep, most = DAY, 1_000
    slots: dict[int, Slot] = {}
    now = NOW
    for passed, size in zip(hours, sizes, strict=False):
        now += passed * HOUR
        steps = plan(list(slots.values()), now, keep, most)
        assert len(steps.empty) <= MOST_EMPTIED + 1
        for number in steps.empty:
            assert slots.pop(number).ended_at is not None, "the one that is written to was emptied"
        for number, one in slots.items():
            if one.ended_at is None and number != steps.current:
                slots[number] = one._replace(ended_at=now)
        assert steps.current is not None
        present = slots.get(steps.current, Slot(steps.current, now, None, 0))
        slots[steps.current] = present._replace(nbytes=present.nbytes + size)
        assert len(slots) <= SLOTS
        assert sum(one.nbytes for one in slots.values()) <= most + 2 * max(sizes)
        # Few steps at a time: after a long pause old ones go at the next looks.
        old = [one for one in slots.values() if one.ended_at is not None and one.ended_at < now - 3 * keep]
        assert len(old) <= SLOTS - MOST_EMPTIED


# What a peer says

SEQUENCES = range(5, 10)
_SAID = (5, 64, bytes(32))

HOSTILE: dict[str, list[tuple[object, ...]]] = {
    "too few columns": [_SAID[:2]],
    "too many columns": [(*_SAID, None)],
    "nothing": [()],
    "a batch nobody asked about": [(4, 64, bytes(32))],
    "a batch twice": [_SAID, _SAID],
    "a sequence that is no number": [("5", 64, bytes(32))],
    "a sequence that is true": [(True, 64, bytes(32))],
    "no bytes": [(5, 0, bytes(32))],
    "negative bytes": [(5, -1, bytes(32))],
    "bytes beyond any": [(5, 1 << 63, bytes(32))],
    "bytes that are null": [(5, None, bytes(32))],
    "a short hash": [(5, 64, bytes(31))],
    "a hash as text": [(5, 64, "00" * 32)],
    "no hash": [(5, 64, None)],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_a_peer_says_it_keeps_is_refused_where_it_answers_nothing(case: str) -> None:
    with pytest.raises(RecordError):
        parse_kept(HOSTILE[case], SEQUENCES)


SENT: dict[str, list[tuple[object, ...]]] = {
    "too few columns": [(5, 0, bytes(32))],
    "a batch nobody asked for": [(7, 0, bytes(32), bytes(4))],
    "a negative part": [(5, -1, bytes(32), bytes(4))],
    "a part beyond any": [(5, 1 << 31, bytes(32), bytes(4))],
    "text": [(5, 0, "x" * 32, bytes(4))],
    "null": [(5, 0, None, bytes(4))],
    "no indexes": [(5, 0, bytes(32), None)],
    "indexes without end": [(5, 0, bytes(32), bytes(4096))],
    "more than was said": [(5, 0, bytes(96), bytes(4))],
    "more than was said, in rows": [(5, 0, bytes(32), bytes(4))] * 3,
}


@pytest.mark.parametrize("case", SENT)
def test_leaves_that_are_not_what_was_asked_for_are_refused(case: str) -> None:
    with pytest.raises(RecordError):
        parse_parts(SENT[case], {5: 64, 6: 32})


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=4), st.binary(max_size=40), st.floats(),
    st.sampled_from([5, 6, 32, bytes(32), bytes(4)]),
)  # fmt: skip
ROWS = st.lists(st.lists(ANYTHING, max_size=8), max_size=40)


@given(rows=ROWS)
@example(rows=[[5, 32, bytes(32)], [6, 64, bytes(32)]])
def test_whatever_a_peer_says_it_keeps_is_understood_or_a_typed_error(rows: list[list[Any]]) -> None:
    try:
        found = parse_kept(rows, SEQUENCES)
    except RecordError:
        return
    assert set(found) <= set(SEQUENCES)
    assert len(found) == len(rows)


@given(rows=ROWS)
@example(rows=[[5, 1, bytes(32), bytes(4)], [5, 0, bytes(32), bytes(4)]])
def test_whatever_a_peer_sends_of_its_leaves_is_no_more_than_it_said(rows: list[list[Any]]) -> None:
    try:
        found = parse_parts(rows, {5: 64, 6: 32})
    except RecordError:
        return
    assert set(found) == {5, 6}
    assert sum(len(one.leaves) for one in found[5]) <= 64
    assert [one.part for one in found[5]] == sorted(one.part for one in found[5])


def test_rows_without_leaves_cannot_be_sent_without_end() -> None:
    with pytest.raises(RecordError):
        parse_parts(([5, number, b"", b""] for number in range(10**9)), {5: 320})


# What follows


def manifest(parts: list[PartLeaves], history: History) -> Prepared:
    """A manifest over these leaves, each part in a partition of its own."""
    roots = tuple(
        PartitionRoot(TOPIC, one.part, 10, 19, 1, len(one.leaves) // 32, sub_root(one)) for one in parts
    )
    records = sum(root.records for root in roots)
    made = manifest_fields(history.head.batch + 1, records)
    made |= {
        "partitions": roots,
        "merkle_root": merkle.batch_root([root.sub_root for root in roots]),
        "record_count": records,
    }
    return history.add(**made)


def one_pair(source: list[PartLeaves], target: list[PartLeaves], ack: str = "batch_applied") -> Pair:
    """A batch both sides have signed, each over what it has."""
    history, acks = History(), History(ACKS, B)
    history.open()
    acks.open()
    made = manifest(source, history)
    root = merkle.batch_root([sub_root(one) for one in target])
    answered = acks.acknowledge(made, merkle_root=root, event_type=ack)
    return Pair(made.entry, answered.entry)


def findings() -> Divergence:
    return Divergence(CHAIN, "node-a", "node-b", 1, 1)


def parts(*salts: str, count: int = 10) -> list[PartLeaves]:
    """Two partitions of a batch, records dealt to them in turn; a salt alters the record of its place."""
    hashed = [digest(n, salts[n] if n < len(salts) else "") for n in range(count)]
    return [part_leaves(one, hashed[one::2], list(range(one, count, 2))) for one in (0, 1)]


def test_altered_missing_and_extra_records_are_named_with_their_place() -> None:
    source, target = parts(count=10), parts("", "", "x", count=11)
    target[1] = part_leaves(1, hashes(target[1])[1:], [3, 5, 7, 9])
    found = findings()
    judge(found, one_pair(source, target), source, target)
    assert [(one.what, one.partition, one.index) for one in found.divergent] == [
        ("altered", 0, 2),
        ("extra", 0, 10),
        ("missing", 1, 1),
    ]
    assert {(one.topic, one.offsets) for one in found.divergent} == {(TOPIC, (10, 19))}
    assert found.divergent[0].source_leaf == digest(2).hex()
    assert found.divergent[0].target_leaf == digest(2, "x").hex()
    assert (found.unfit, found.ok) == ([], False)


# What lies in the tables, beside what was signed: (source's, target's, nodes that are named).
UNFIT: dict[str, tuple[list[PartLeaves], list[PartLeaves], list[str]]] = {
    "a leaf altered at the target": (parts(), parts("x"), ["node-b"]),
    "a leaf altered at the source": (parts("x"), parts(), ["node-a"]),
    "at both": (parts("x"), parts("x"), ["node-a", "node-b"]),
    "two leaves exchanged at the target": (
        parts(),
        [part_leaves(0, hashes(parts()[0])[::-1], [0, 2, 4, 6, 8]), parts()[1]],
        ["node-b"],
    ),
    "a partition gone at the target": (parts(), parts()[:1], ["node-b"]),
    "a partition gone at the source": (parts()[1:], parts(), ["node-a"]),
    "a partition twice at the target": (parts(), [*parts(), parts()[1]], ["node-b"]),
    "a partition twice at the source": ([parts()[0], *parts()], parts(), ["node-a"]),
    "a leaf cut off at the target": (parts(), parts(count=9), ["node-b"]),
    "bytes that are no hashes": (parts(), [PartLeaves(0, bytes(33), bytes(4))], ["node-b"]),
    "nothing": ([], [], ["node-a", "node-b"]),
}


@pytest.mark.parametrize("case", UNFIT)
def test_leaves_that_do_not_fit_their_signed_root_are_not_believed(case: str) -> None:
    source, target, nodes = UNFIT[case]
    found = findings()
    judge(found, one_pair(parts(), parts()), source, target)
    assert [one.node for one in found.unfit] == nodes
    assert (found.divergent, found.ok) == ([], False)


def test_the_same_records_in_another_order_are_said_to_be_so() -> None:
    source = parts()
    target = [part_leaves(0, hashes(source[0])[::-1], [8, 6, 4, 2, 0]), source[1]]
    found = findings()
    judge(found, one_pair(source, target), source, target)
    assert [one.what for one in found.unfit] == ["the same records in another order"]


def test_indexes_beside_the_leaves_that_were_altered_hide_no_tuple() -> None:
    source, target = parts(), parts("x")
    moved = [target[0]._replace(indexes=source[1].indexes), target[1]]
    found = findings()
    judge(found, one_pair(source, target), source, moved)
    assert {"altered", "missing", "extra"} & {one.what for one in found.divergent}
    assert digest(0, "x").hex() in {one.target_leaf for one in found.divergent}


def test_batches_without_a_root_of_the_targets_are_not_compared() -> None:
    history, acks = History(), History(ACKS, B)
    history.open()
    acks.open()
    made = [history.batch() for _ in range(5)]
    acks.acknowledge(made[0])
    acks.acknowledge(made[1], event_type="batch_skipped", verdicts=(("skipped", 2),))
    acks.acknowledge(made[2], merkle_root=bytes(32))
    found = Divergence(CHAIN, "node-a", "node-b", 1, 5)
    known = [(one.entry, one.entry_hash) for one in made]
    pairs = pair(found, known, [one.entry for one in acks.entries])
    assert (found.batches, found.skipped) == (5, [Batches(2, 2)])
    assert (found.unanswered, found.differing_roots) == ([Batches(4, 5)], [Batches(3, 3)])
    first, third = made[0].entry.sequence, made[2].entry.sequence
    said = Kept(96, bytes(32))
    both = comparable(found, pairs, {first: said, third: said}, {third: said})
    assert [one.manifest.batch for one in both] == [3]
    assert (found.not_kept, found.compared, found.tuples) == ({"node-b": [Batches(1, 1)]}, 1, 3)


def test_an_acknowledgement_of_another_manifest_is_a_finding() -> None:
    history, acks = History(), History(ACKS, B)
    history.open()
    acks.open()
    made = history.batch()
    answered = acks.add(**{**ack_fields(made), "ref_hash": bytes(32)})
    found = findings()
    pair(found, [(made.entry, made.entry_hash)], [answered.entry])
    assert [(one.node, "another manifest" in one.what) for one in found.unfit] == [("node-b", True)]


def test_entries_that_cannot_be_of_one_chain_are_refused() -> None:
    history = History()
    history.open()
    made = [history.batch() for _ in range(2)]
    known = [(one.entry, one.entry_hash) for one in made]
    other = History("bills.node-a")
    other.open()
    acks = History(ACKS, B)
    acks.open()
    first = acks.acknowledge(made[0]).entry
    twice = [first, replace(first, sequence=3)]
    bad: list[tuple[list[tuple[Any, bytes]], list[Any]]] = [
        (known[::-1], []),
        ([known[0], known[0]], []),
        ([(other.batch().entry, bytes(32))], []),
        ([(history.note().entry, bytes(32))], []),
        (known, twice),
    ]
    for manifests, answers in bad:
        with pytest.raises(ChainError):
            pair(findings(), manifests, answers)


@given(numbers=st.sets(st.integers(1, 60)))
def test_runs_hold_the_same_numbers(numbers: set[int]) -> None:
    found = runs(sorted(numbers))
    assert [n for one in found for n in range(one.first, one.last + 1)] == sorted(numbers)
    assert all(left.last + 1 < right.first for left, right in pairwise(found))
