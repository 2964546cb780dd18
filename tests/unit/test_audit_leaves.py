"""Leaves that are kept: their bytes, how long they stay, and what a peer says of its own."""

from __future__ import annotations

import hashlib
import json
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
from vsql_shared.audit.divergence import (
    MAX_NAMED,
    Batches,
    Divergence,
    Pair,
    affordable,
    comparable,
    judge,
    pair,
    runs,
)
from vsql_shared.audit.entries import BY_ROW, ORDER
from vsql_shared.audit.leaf_answers import Kept, parse_kept, parse_parts
from vsql_shared.audit.leaf_slots import MOST_EMPTIED, SLOTS, Slot, Steps, plan
from vsql_shared.audit.leaves import hashes, part_leaves, sub_root
from vsql_shared.changes import PartitionRoot, PartLeaves
from vsql_shared.errors import ChainError, RecordError

NOW = datetime(2026, 5, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
TOPIC = "shop.orders.node-a.public.orders"


def digest(number: int, salt: str = "") -> bytes:
    return hashlib.sha256(b"%d%b" % (number, salt.encode())).digest()


# What is kept


@given(count=st.integers(1, 500))
def test_what_is_kept_is_the_hashes_in_their_order_and_nothing_beside_them(count: int) -> None:
    leaves = [digest(number) for number in range(count)]
    kept = part_leaves(3, leaves)
    assert kept == PartLeaves(3, b"".join(leaves))
    assert (hashes(kept), sub_root(kept)) == (leaves, merkle.root(leaves))


@pytest.mark.parametrize("size", [0, 1, 31, 33, 63])
def test_kept_bytes_that_are_no_hashes_are_refused(size: int) -> None:
    with pytest.raises(RecordError):
        hashes(PartLeaves(0, bytes(size)))


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
    "one that is not empty yet is passed over": (
        [slot(5, 9, 8), slot(3, 9.5, 9), slot(4, 1.6, None)],
        Steps((), 6),
    ),
    "one that is too old is passed over, too, while it is being emptied": (
        [slot(5, 30, 29), slot(4, 1.6, None)],
        Steps((5,), 6),
    ),
    "where none is free the present one goes on": (
        [slot(4, 1.6, None), *(slot(number, 9, 8) for number in range(32) if number != 4)],
        Steps((), 4),
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
    looks=st.lists(
        st.tuples(st.floats(0.01, 200.0), st.integers(0, 120), st.booleans()), min_size=1, max_size=200
    )
)
def test_slots_stay_within_time_and_bytes_whatever_is_written_and_whoever_is_in_the_way(
    looks: list[tuple[float, int, bool]],
) -> None:
    """A look is: hours since the one before, bytes written after it, whether emptying succeeds."""
    keep, most = DAY, 1_000
    slots: dict[int, Slot] = {}
    now = NOW
    for passed, size, free in looks:
        now += passed * HOUR
        before = dict(slots)
        steps = plan(list(slots.values()), now, keep, most)
        assert len(steps.empty) <= MOST_EMPTIED
        assert all(slots[number].ended_at is not None for number in steps.empty)
        assert steps.current is not None, "nothing is written"
        assert steps.current not in slots or slots[steps.current].ended_at is None, "into one that has ended"
        if steps.current not in slots:
            slots = {n: one._replace(ended_at=one.ended_at or now) for n, one in slots.items()}
            slots[steps.current] = Slot(steps.current, now, None, 0)
        if free:
            for number in steps.empty:
                del slots[number]
            kept = [one for one in before.values() if one.number in slots and one.ended_at is not None]
            old = [one for one in kept if one.ended_at is not None and one.ended_at < now - keep]
            assert not old or len(steps.empty) == MOST_EMPTIED
            held = sum(one.nbytes for one in slots.values())
            assert held <= most or len(steps.empty) == MOST_EMPTIED or not kept
        present = slots[steps.current]
        slots[steps.current] = present._replace(nbytes=present.nbytes + size)
    for _ in range(SLOTS // MOST_EMPTIED + 1):
        for number in plan(list(slots.values()), now, keep, most).empty:
            del slots[number]
    assert all(one.ended_at is None or one.ended_at >= now - keep for one in slots.values())


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
    "too few columns": [(5, 0)],
    "too many columns": [(5, 0, bytes(32), bytes(4))],
    "a batch nobody asked for": [(7, 0, bytes(32))],
    "a negative part": [(5, -1, bytes(32))],
    "a part beyond any": [(5, 1 << 31, bytes(32))],
    "text": [(5, 0, "x" * 32)],
    "null": [(5, 0, None)],
    "more than was said": [(5, 0, bytes(96))],
    "more than was said, in rows": [(5, 0, bytes(32))] * 3,
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
@example(rows=[[5, 1, bytes(32)], [5, 0, bytes(32)]])
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
        parse_parts(([5, number, b""] for number in range(10**9)), {5: 320})


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
    return [part_leaves(one, hashed[one::2]) for one in (0, 1)]


def named(found: Divergence) -> list[tuple[str, int, int]]:
    return [(one.what, one.partition, one.position) for one in found.divergent]


def test_altered_missing_and_extra_records_are_named_with_their_place() -> None:
    source, target = parts(count=10), parts("", "", "x", count=11)
    target[1] = part_leaves(1, hashes(target[1])[1:])
    found = findings()
    judge(found, one_pair(source, target), source, target)
    assert named(found) == [("altered", 0, 1), ("extra", 0, 5), ("missing", 1, 0)]
    assert {(one.topic, one.offsets) for one in found.divergent} == {(TOPIC, (10, 19))}
    assert found.divergent[0].source_leaf == digest(2).hex()
    assert found.divergent[0].target_leaf == digest(2, "x").hex()
    assert (found.unfit, found.ok) == ([], False)


@given(source=st.lists(st.integers(0, 30), min_size=1), target=st.lists(st.integers(0, 30), min_size=1))
def test_named_is_what_one_side_alone_has_whatever_was_moved_doubled_or_dropped(
    source: list[int], target: list[int]
) -> None:
    ours, theirs = ([part_leaves(0, [digest(n) for n in one])] for one in (source, target))
    found = findings()
    judge(found, one_pair(ours, theirs), ours, theirs)
    said = [{one.source_leaf for one in found.divergent}, {one.target_leaf for one in found.divergent}]
    assert said[0] - {None} == {digest(n).hex() for n in set(source) - set(target)}
    assert said[1] - {None} == {digest(n).hex() for n in set(target) - set(source)}
    assert found.ok == (source == target)
    for one in found.divergent:
        if one.source_leaf is not None:
            assert hashes(ours[0])[one.position].hex() == one.source_leaf


def test_what_differs_widely_is_named_in_part_and_said_to_be_more() -> None:
    ours, theirs = [[part_leaves(0, [digest(n, s) for n in range(MAX_NAMED + 1)])] for s in ("", "x")]
    found = findings()
    judge(found, one_pair(ours, theirs), ours, theirs)
    assert (len(found.divergent), found.more, found.ok) == (MAX_NAMED, True, False)


# What lies in the tables, beside what was signed: (source's, target's, nodes that are named).
UNFIT: dict[str, tuple[list[PartLeaves], list[PartLeaves], list[str]]] = {
    "a leaf altered at the target": (parts(), parts("x"), ["node-b"]),
    "a leaf altered at the source": (parts("x"), parts(), ["node-a"]),
    "at both": (parts("x"), parts("x"), ["node-a", "node-b"]),
    "two leaves exchanged at the target": (
        parts(),
        [part_leaves(0, hashes(parts()[0])[::-1]), parts()[1]],
        ["node-b"],
    ),
    "a partition gone at the target": (parts(), parts()[:1], ["node-b"]),
    "a partition gone at the source": (parts()[1:], parts(), ["node-a"]),
    "a partition twice at the target": (parts(), [*parts(), parts()[1]], ["node-b"]),
    "a partition twice at the source": ([parts()[0], *parts()], parts(), ["node-a"]),
    "a partition of another number at the target": (
        parts(),
        [parts()[0], parts()[1]._replace(part=7)],
        ["node-b"],
    ),
    "a partition of another number at the source": (
        [parts()[0], parts()[1]._replace(part=7)],
        parts(),
        ["node-a"],
    ),
    "a leaf cut off at the target": (parts(), parts(count=9), ["node-b"]),
    "bytes that are no hashes": (parts(), [PartLeaves(0, bytes(33))], ["node-b"]),
    "nothing": ([], [], ["node-a", "node-b"]),
}


@pytest.mark.parametrize("case", UNFIT)
def test_leaves_that_do_not_fit_their_signed_root_are_not_believed_and_accuse_nobody_of_another_record(
    case: str,
) -> None:
    source, target, nodes = UNFIT[case]
    found = findings()
    judge(found, one_pair(parts(), parts()), source, target)
    assert [one.node for one in found.unfit] == nodes
    assert (found.divergent, found.ok) == ([], False)


# What a target keeps of a batch that members applied, → whether that is a finding.
IN_PART: dict[str, tuple[list[PartLeaves], bool]] = {
    "one member's part": (parts()[:1], False),
    "the other one's": (parts()[1:], False),
    "a part that was altered": (parts("x")[:1], True),
    "a part under another number": ([parts()[0]._replace(part=1)], True),
    "a part that is none of it": ([parts()[0]._replace(part=7)], True),
    "bytes that are no hashes": ([PartLeaves(0, bytes(33))], True),
    "a part without hashes": ([PartLeaves(0, b"")], True),
}


@pytest.mark.parametrize("by_members", [True, False])
@pytest.mark.parametrize("case", IN_PART)
def test_members_keep_apart_so_a_batch_of_which_some_parts_are_gone_accuses_nobody(
    case: str, by_members: bool
) -> None:
    kept, bad = IN_PART[case]
    one, found = one_pair(parts(), parts()), findings()
    if by_members:
        one = Pair(replace(one.manifest, detail=json.dumps({ORDER: BY_ROW})), one.ack)
    judge(found, one, parts(), kept)
    assert found.ok == (by_members and not bad)
    assert found.not_kept == ({"node-b": [Batches(1, 1)]} if found.ok else {})


def test_the_same_records_in_another_order_are_said_to_be_so() -> None:
    source = parts()
    target = [part_leaves(0, hashes(source[0])[::-1]), source[1]]
    found = findings()
    judge(found, one_pair(source, target), source, target)
    assert [one.what for one in found.unfit] == ["the same records in another order, or in another number"]


def test_a_partition_of_another_number_where_roots_differ_names_no_record_that_both_have() -> None:
    source, target = parts(), parts("x")
    moved = [target[0], target[1]._replace(part=7)]
    found = findings()
    judge(found, one_pair(source, target), source, moved)
    assert named(found) == [("altered", 0, 0)]
    assert found.divergent[0].target_leaf == digest(0, "x").hex()


def sized(source: int, target: int, *, differs: bool, most: int = 1 << 20) -> tuple[Divergence, int]:
    """Sides that say they keep so many bytes of a batch of 10 records; how many batches are fetched."""
    found = findings()
    one = one_pair(parts(), parts("x") if differs else parts())
    said = [{one.manifest.sequence: Kept(size, bytes(32))} for size in (source, target)]
    return found, len(affordable(found, comparable(found, [one], *said), said[1], most))


def test_a_side_that_says_it_keeps_another_size_than_was_signed_is_named_and_nothing_is_fetched() -> None:
    for sizes, nodes in (((320, 352), ["node-b"]), ((1 << 62, 320), ["node-a"]), ((320, 320), [])):
        found, fetched = sized(*sizes, differs=False)
        assert ([one.node for one in found.unfit], fetched) == (nodes, not nodes)
        assert found.tuples == 10


def test_a_target_that_says_it_keeps_without_end_hides_no_other_batch() -> None:
    found, fetched = sized(320, 1 << 62, differs=True)
    assert ([one.node for one in found.unfit], fetched, found.more) == (["node-b"], 0, True)
    large, small = one_pair(parts(), parts("x")), one_pair(parts(), parts("", "x"))
    small = Pair(replace(small.manifest, batch=2, sequence=3), small.ack)
    said = {large.manifest.sequence: Kept(1 << 62, bytes(32)), 3: Kept(320, bytes(32))}
    assert affordable(findings(), [large, small], said, 1 << 20) == [small]


def test_batches_whose_roots_differ_are_fetched_before_those_whose_tables_alone_do() -> None:
    equal, differs = one_pair(parts(), parts()), one_pair(parts(), parts("x"))
    differs = Pair(replace(differs.manifest, batch=2, sequence=3), differs.ack)
    said = {equal.manifest.sequence: Kept(320, bytes(32)), 3: Kept(320, bytes(32))}
    found = findings()
    assert affordable(found, [equal, differs], said, 320) == [differs]
    assert found.more
    assert affordable(findings(), [equal, differs], said, 640) == [equal, differs]


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
    assert (found.rooted, found.complete, found.no_manifest) == (2, False, [])
    first, third = made[0].entry.sequence, made[2].entry.sequence
    said = Kept(96, bytes(32))
    both = comparable(found, pairs, {first: said, third: said}, {third: said})
    assert [one.manifest.batch for one in both] == [3]
    assert (found.not_kept, found.compared, found.tuples) == ({"node-b": [Batches(1, 1)]}, 1, 3)


# Batches of five whose manifest the source's database leaves out, of which the target has acknowledged 1 to 4
# → what is said of them.
LEFT_OUT: dict[str, tuple[set[int], list[Batches]]] = {
    "none": (set(), []),
    "the last one, which nobody has acknowledged": ({5}, []),
    "one between": ({2}, [Batches(2, 2)]),
    "the first ones": ({1, 2}, [Batches(1, 2)]),
    "the last ones, which the target has signed": ({3, 4, 5}, [Batches(3, 4)]),
    "all": ({1, 2, 3, 4, 5}, [Batches(1, 4)]),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_a_manifest_the_sources_database_leaves_out_hides_no_difference(case: str) -> None:
    left_out, expected = LEFT_OUT[case]
    history, acks = History(), History(ACKS, B)
    history.open()
    acks.open()
    made = [history.batch() for _ in range(5)]
    for one in made[:4]:
        acks.acknowledge(one)
    found = Divergence(CHAIN, "node-a", "node-b", 1, 5)
    known = [(one.entry, one.entry_hash) for one in made if one.entry.batch not in left_out]
    pair(found, known, [one.entry for one in acks.entries])
    assert (found.no_manifest, found.ok) == (expected, not expected)


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
