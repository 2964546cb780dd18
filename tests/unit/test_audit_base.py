"""The base of a pruned chain: what it must be signed by, and what its readers make of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.audit_history import CHAIN, CLUSTER, A, B, History, ordinary, signer, trust
from tests.audit_segments import KEYS, base, head_at
from vsql_consumers.joining import JoinScan, pruned_at
from vsql_shared.audit import merkle, tree
from vsql_shared.audit.base import Base, base_in, head_value, parse_head
from vsql_shared.audit.chain import EMPTY_HEAD, Accepted, ChainReader, Void
from vsql_shared.audit.checkpoint import Log
from vsql_shared.audit.entries import TRAIL_PRUNED, canonical_json
from vsql_shared.audit.history import KafkaHistory
from vsql_shared.audit.verify import ChainReport, Report
from vsql_shared.changes import TableName
from vsql_shared.errors import ChainError, DecodeError, RecordError, SignatureError

HISTORY = ordinary()
LOG = Log(CLUSTER, CHAIN)
BASE = base(HISTORY, 6)


def test_a_base_comes_back_as_it_was_stored_and_verifies() -> None:
    assert Base.decode(BASE.encode()) == BASE
    assert Base.decode(canonical_json(BASE.detail())) == BASE
    assert BASE.verify(LOG, KEYS).checkpoint.size == 6
    assert parse_head(json.loads(json.dumps(head_value(HISTORY.head)))) == HISTORY.head


FORGED: dict[str, Base] = {
    "not cosigned": base(HISTORY, 6, A),
    "not signed by its writer": base(HISTORY, 6, B),
    "signed by a stranger": base(HISTORY, 6, signer("node-a", "x"), B),
    "cosigned by a stranger": base(HISTORY, 6, A, signer("node-b", "x")),
    "another size": Base(head_at(HISTORY, 5), BASE.note),
    "another tree": Base(replace(BASE.head, tree=tuple(bytes(32) for _ in BASE.head.tree)), BASE.note),
    "no tree": Base(replace(BASE.head, tree=()), BASE.note),
    "another chain": Base(BASE.head, BASE.note.replace("orders", "bills")),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_base_that_is_not_signed_as_it_must_be_is_refused(case: str) -> None:
    with pytest.raises((ChainError, SignatureError)):
        FORGED[case].verify(LOG, KEYS)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a member more": lambda one: one.update(x=1),
    "another format": lambda one: one.update(format=2),
    "a format that is none": lambda one: one.update(format=True),
    "no head": lambda one: one.pop("head"),
    "a member of the head more": lambda one: one["head"].update(x=1),
    "a member of the head less": lambda one: one["head"].pop("batch"),
    "a text for a number": lambda one: one["head"].update(batch="1"),
    "true for a number": lambda one: one["head"].update(batch=True),
    "a fraction": lambda one: one["head"].update(batch=1.5),
    "a number below zero": lambda one: one["head"].update(lsn_end=-1),
    "no entry": lambda one: one["head"].update(sequence=0),
    "too many entries": lambda one: one["head"].update(sequence=1 << 63),
    "a timeline beyond": lambda one: one["head"].update(timeline=1 << 31),
    "a short hash": lambda one: one["head"].update(entry_hash="00"),
    "upper case": lambda one: one["head"].update(incarnation="AB" * 16),
    "a tree of numbers": lambda one: one["head"].update(tree=[1]),
    "a tree that is none": lambda one: one["head"].update(tree="00"),
    "a system that is none": lambda one: one["head"].update(system_identifier=7),
    "a checkpoint that is no text": lambda one: one.update(checkpoint=7),
    "a checkpoint without end": lambda one: one.update(checkpoint="x" * (1 << 17)),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_malformed_base_is_one_error_of_ours(case: str) -> None:
    value = json.loads(BASE.encode())
    CHANGES[case](value)
    with pytest.raises(DecodeError):
        Base.decode(json.dumps(value))


def test_a_base_has_one_encoding() -> None:
    for text in (f" {BASE.encode()}", json.dumps(json.loads(BASE.encode()))):
        with pytest.raises(DecodeError, match="not in its one encoding"):
            Base.decode(text)


@given(st.text(max_size=60))
def test_no_text_leads_to_another_error_than_ours(text: str) -> None:
    with pytest.raises(DecodeError):
        Base.decode(text)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda one: st.lists(one, max_size=3) | st.dictionaries(
                        st.sampled_from(["head", "checkpoint", "tree", "sequence"]), one, max_size=3)),
       st.sampled_from([*json.loads(BASE.encode())["head"]]))  # fmt: skip
def test_no_value_of_a_head_leads_to_another_error_than_ours(value: Any, name: str) -> None:
    changed = json.loads(BASE.encode())["head"] | {name: value}
    try:
        found = parse_head(changed)
    except DecodeError:
        return
    assert head_value(found) == changed


def pruned(by: Base = BASE) -> History:
    """The ordinary history with an entry that says where it was pruned, and a batch behind it."""
    made = ordinary()
    made.add(event_type=TRAIL_PRUNED, batch_lsn_start=9, batch_lsn_end=9, detail=canonical_json(by.detail()))
    made.batch()
    return made


def test_an_entry_says_where_its_chain_was_pruned_and_others_say_nothing() -> None:
    said = [base_in(one.entry) for one in pruned().entries]
    assert [one for one in said if one is not None] == [BASE]
    broken = ordinary()
    with pytest.raises(DecodeError):
        base_in(broken.add(event_type=TRAIL_PRUNED, batch_lsn_start=9, batch_lsn_end=9, detail="{}").entry)


@pytest.mark.parametrize("left", range(7))
def test_a_reader_goes_on_from_the_base_whatever_compaction_has_left_below_it(left: int) -> None:
    made = pruned()
    reader = ChainReader(CLUSTER, CHAIN, "node-a", trust(A), BASE.head, pruned=6)
    outcomes = [reader.accept(one, "") for one in [*made.documents[left:6], *made.documents[6:]]]
    assert [type(one) for one in outcomes] == [Void] * (6 - left) + [Accepted] * (len(made.documents) - 6)
    assert reader.head == made.head


def test_a_joining_target_finds_the_base_in_the_chain() -> None:
    made = pruned()
    assert pruned_at(made.documents[6:], LOG, trust(A)) == BASE.head
    assert pruned_at(ordinary().documents, LOG, trust(A)) == EMPTY_HEAD
    # What its writer has not signed says nothing.
    assert pruned_at(made.documents, LOG, trust(signer("node-a", "x"))) == EMPTY_HEAD
    assert pruned_at([b"", b"x" * 100, *made.documents], LOG, trust(A)) == BASE.head
    later = base(made, 12)
    made.add(
        event_type=TRAIL_PRUNED, batch_lsn_start=9, batch_lsn_end=9, detail=canonical_json(later.detail())
    )
    assert pruned_at(made.documents[12:], LOG, trust(A)) == later.head
    with pytest.raises(ChainError, match="the checkpoint of its base"):
        pruned_at(pruned(FORGED["another size"]).documents, LOG, trust(A))


def test_a_join_begins_behind_an_opening_though_every_covered_batch_was_pruned() -> None:
    made = pruned()
    made.open()
    opened = made.head
    made.batch()
    reader = ChainReader(CLUSTER, CHAIN, "node-a", trust(A), base(made, 13).head, pruned=13)
    scan = JoinScan(reader, {TableName("public", "orders"): 1})
    for at, document in enumerate(made.documents[11:]):
        if not scan.feed(at, document, ""):
            break
    assert scan.point is not None
    assert (scan.point.position.head, scan.point.batches, scan.point.receipts) == (opened, 0, ())


def test_a_topic_is_compared_from_the_base_on() -> None:
    made = pruned()
    last = made.entries[-1]
    report = Report((ChainReport(CHAIN, sequence=13, entry_hash=last.entry_hash),), ())
    for documents, wrong in ((made.documents[6:], 0), (made.documents, 0), (made.documents[7:], 1)):
        history = KafkaHistory(CLUSTER, "node-a", trust(A), report, {CHAIN: BASE.head})
        for one in documents:
            history.feed(one, "")
        assert len(history.problems()) == wrong


HASHES = [number.to_bytes(32, "big") for number in range(40)]


@pytest.mark.parametrize("passed", range(40))
def test_proofs_from_what_a_pruning_left_are_those_of_the_whole_chain(passed: int) -> None:
    before, _ = tree.tree_of(HASHES[:passed])
    for size in range(max(passed, 1), 41):
        assert tree.tree_of(HASHES[passed:size], before, passed) == tree.tree_of(HASHES[:size])
        for index in range(passed, size):
            wanted = tree.inclusion_ranges(index, size)
            assert tree.range_roots(HASHES[passed:size], wanted, before, passed) == tree.range_roots(
                HASHES[:size], wanted
            )
        for old in range(max(passed, 1), size + 1):
            wanted = tree.consistency_ranges(old, size)
            assert tree.range_roots(HASHES[passed:size], wanted, before, passed) == tree.range_roots(
                HASHES[:size], wanted
            )


def test_a_proof_of_what_was_pruned_is_refused() -> None:
    before, _ = tree.tree_of(HASHES[:7])
    with pytest.raises(RecordError, match="entries below 7 were pruned"):
        tree.range_roots(HASHES[7:], tree.inclusion_ranges(3, 40), before, 7)


def test_the_subtrees_of_a_size_are_those_of_its_tree() -> None:
    for size in range(40):
        ranges = tree.subtrees(size)
        assert [one.high - one.low for one in ranges] == sorted(
            (one.high - one.low for one in ranges), reverse=True
        )
        roots = tuple(merkle.root([merkle.leaf_hash(one) for one in HASHES[r.low : r.high]]) for r in ranges)
        assert roots == tree.tree_of(HASHES[:size])[0]
