"""The base of a pruned chain: what it must be signed by, and what its readers make of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from importlib import resources
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.audit_history import CHAIN, CLUSTER, START, A, B, History, ordinary, signer, trust
from tests.audit_segments import KEYS, base, head_at
from vsql_consumers.joining import JoinScan, pruned_at
from vsql_shared.audit import merkle, tree
from vsql_shared.audit.base import GONE, Base, Kept, base_in, head_value, parse_head
from vsql_shared.audit.chain import Accepted, ChainReader, Void
from vsql_shared.audit.checkpoint import Log
from vsql_shared.audit.dsse import AUDIT_ENTRY, SignedDocument, verify_document
from vsql_shared.audit.entries import TRAIL_PRUNED, AuditEntry, canonical_json, signed_place
from vsql_shared.audit.history import KafkaHistory
from vsql_shared.audit.verify import ChainReport, Report
from vsql_shared.changes import TableName
from vsql_shared.crypto.signing import PinnedKey, TrustStore
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
    "no kept": lambda one: one.pop("kept"),
    "kept that is none": lambda one: one.update(kept=[]),
    "a kept member more": lambda one: one["kept"].update(x=1),
    "a kept number that is none": lambda one: one["kept"].update(count=True),
    "a kept number below zero": lambda one: one["kept"].update(count=-1),
    "a short kept digest": lambda one: one["kept"].update(digest="00"),
    "tables that are none": lambda one: one.update(tables="public.orders"),
    "a table that is no name": lambda one: one.update(tables=[7]),
    "half a character in a name": lambda one: one.update(tables=["\ud800"]),
    "a name with NUL": lambda one: one.update(tables=["a\0b"]),
    "a name too long": lambda one: one.update(tables=["x" * 1025]),
    "an empty name": lambda one: one.update(tables=[""]),
    "a table twice": lambda one: one.update(tables=["public.a", "public.a"]),
    "tables in another order": lambda one: one.update(tables=["public.b", "public.a"]),
    "a checkpoint without end": lambda one: one.update(checkpoint="x" * (1 << 17)),
}


def test_half_a_character_in_a_checkpoint_is_one_error_of_ours() -> None:
    with pytest.raises(DecodeError, match="no character"):
        Base.decode(replace(BASE, note=f"\ud800{BASE.note}").encode()).verify(LOG, KEYS)


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


def test_what_is_kept_below_a_base_is_counted_and_held_in_order() -> None:
    assert BASE.kept == Kept()  # the history's note is its entry 8
    one, two = b"1" * 32, b"2" * 32
    taken = Kept().take(one).take(two)
    assert base(HISTORY, 9).kept == Kept().take(HISTORY.entries[7].entry_hash)
    assert taken == Kept(2, sha256(sha256(bytes(32) + one).digest() + two).digest())
    assert len({taken, Kept().take(two).take(one), Kept().take(one), Kept().take(two)}) == 4


def test_what_is_kept_is_what_the_database_does_not_let_go() -> None:
    text = resources.files("vsql_schemas").joinpath("sql/018_retention.sql").read_text("utf-8")
    named = re.search(r"AND event_type NOT IN\s*\(([^)]*)\)", text)
    assert named is not None
    assert set(re.findall(r"'(\w+)'", named[1])) == GONE


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


def found(documents: list[bytes], by: TrustStore | None = None) -> Base | None:
    return pruned_at(lambda: iter(documents), LOG, by or trust(A))


def test_a_joining_target_finds_the_base_its_chain_leads_on_from() -> None:
    made = pruned()
    assert found(made.documents[6:]) == BASE
    # What compaction has left below it changes nothing; a chain that is whole is read whole.
    assert found([*made.documents[:2], *made.documents[6:]]) == BASE
    assert found(made.documents) is None
    assert found(ordinary().documents) is None
    # What its writer has not signed says nothing, and ends nothing.
    assert found(made.documents[6:], trust(signer("node-a", "x"))) is None
    assert found([b"", b"x" * 100, *made.documents[6:]]) == BASE
    later = base(made, 12)
    say(made, later)
    assert found(made.documents[6:]) == BASE
    for left in (made.documents[12:], made.documents[10:11] + made.documents[12:]):
        assert found(left) == later
    # Without what lies between the base and the entry that says it, the chain does not lead there.
    assert found(made.documents[13:]) is None


@pytest.mark.parametrize("case", ["another size", "another tree", "no tree", "not signed by its writer"])
def test_a_joining_target_begins_behind_no_base_whose_checkpoint_does_not_hold(case: str) -> None:
    assert found(pruned(FORGED[case]).documents[6:]) is None


def say(made: History, by: Base) -> None:
    """Have the chain say that it was pruned there."""
    detail = canonical_json(by.detail())
    made.add(event_type=TRAIL_PRUNED, batch_lsn_start=9, batch_lsn_end=9, detail=detail)


NEW = signer("node-a", "next")
"""The key that followed A's, which a thief has now."""


def handed_over() -> History:
    """A chain pruned at 3 whose writer has another key behind entry 8."""
    source = ordinary()
    made = History(head=head_at(source, 8))
    made.entries = source.entries[:8]
    made.by = NEW
    made._clock = source.entries[7].entry.event_timestamp
    made.open()
    say(made, base(made, 3, NEW))
    for _ in range(3):
        made.batch()
    return made


def thief(at: int) -> list[bytes]:
    """By A's key, behind entry `at`, dated back: an epoch, and a base at the chain's end.

    The head is of his own making; the checkpoint is of the genuine tree, which everybody can compute.
    """
    made = handed_over()
    late = History(head=head_at(made, at))
    late._clock = START
    late.open()
    end = base(made, 13, A)
    say(late, replace(end, head=replace(end.head, event_timestamp=1, lsn_end=1), tables=()))
    return late.documents


def behind_it() -> list[bytes]:
    """The same, behind the head that base names itself: its time is the thief's own."""
    made = handed_over()
    end = base(made, 13, A)
    named = replace(end, head=replace(end.head, event_timestamp=1, lsn_end=1), tables=())
    late = History(head=named.head)
    late._clock = START
    late.open()
    say(late, named)
    return late.documents


def ended(retired_at: int | None = None) -> TrustStore:
    """A's key retired at a time, or revoked; its successor counts."""
    old = PinnedKey("node-a", A.public_key, A.fingerprint, retired_at is None, retired_at, {CHAIN: 8})
    return TrustStore([old, PinnedKey("node-a", NEW.public_key, NEW.fingerprint, revoked=False)])


RETIRED = handed_over().entries[7].entry.event_timestamp + 1
UNCHAINED: dict[str, tuple[list[bytes], TrustStore]] = {
    "by a revoked key, in the place of a known entry": (thief(5), ended()),
    "by a retired key, dated back": (thief(13), ended(RETIRED)),
    "by a retired key, behind a head it names itself": (behind_it(), ended(RETIRED)),
    "by a writer whose epoch was lost": (thief(8), trust(A, NEW)),
}


@pytest.mark.parametrize("case", UNCHAINED)
def test_a_genuine_signature_on_an_entry_of_no_chain_lets_nobody_begin_behind_it(case: str) -> None:
    forged, keys = UNCHAINED[case]
    document = SignedDocument.decode(forged[-1])
    entry = AuditEntry.decode(verify_document(keys, "node-a", document, AUDIT_ENTRY, signed_place))
    assert entry.event_type == TRAIL_PRUNED  # by itself it verifies
    made = handed_over()
    for late in (forged, forged[-1:]):
        assert found([*made.documents, *late], keys) is None  # nothing is missing: read from the first on
        assert found([*made.documents[3:], *late], keys) == base(made, 3, NEW)
        assert found([*made.documents[:1], *made.documents[3:], *late], keys) == base(made, 3, NEW)


def joined(
    copied: dict[TableName, int], by: Callable[[History], Base] = lambda one: base(one, 13)
) -> JoinScan:
    """A scan of a chain pruned at 13, whose batches end at 950, up to an opening behind it."""
    made = pruned()
    made.open()
    made.batch()
    known = by(made)
    reader = ChainReader(CLUSTER, CHAIN, "node-a", trust(A), known.head, pruned=known.head.sequence)
    scan = JoinScan(reader, copied, known)
    for at, document in enumerate(made.documents[11:]):
        if not scan.feed(at, document, ""):
            break
    return scan


ORDERS = TableName("public", "orders")


@pytest.mark.parametrize("position", [850, 851, 10_000])
def test_a_join_begins_behind_an_opening_though_every_covered_batch_was_pruned(position: int) -> None:
    made = pruned()
    assert base(made, 13).head.lsn_end == 850 + 100 * (made.head.batch - 8)
    scan = joined({ORDERS: position + made.head.lsn_end - 850})
    opened = made.open()
    assert scan.point is not None
    assert (scan.point.position.head.entry_hash, scan.point.receipts) == (opened.entry_hash, ())


NOT_COVERED: dict[str, tuple[dict[TableName, int], Callable[[History], Base]]] = {
    "a copy that ends below the base": ({ORDERS: 1}, lambda one: base(one, 13)),
    "a copy that ends one position below it": (
        {ORDERS: pruned().head.lsn_end - 1},
        lambda one: base(one, 13),
    ),
    "one of several copies": (
        {ORDERS: 10_000, TableName("public", "other"): 1},
        lambda one: base(one, 13),
    ),
    "a table that was not copied": (
        {ORDERS: 10_000},
        lambda one: replace(base(one, 13), tables=("public.orders", "public.refunds")),
    ),
    "a table without a name": ({ORDERS: 10_000}, lambda one: replace(base(one, 13), tables=("x",))),
    "a transaction under way": (
        {ORDERS: 10_000},
        lambda one: replace(base(one, 13), head=replace(base(one, 13).head, unfinished_from=4)),
    ),
}


@pytest.mark.parametrize("case", NOT_COVERED)
def test_what_the_copy_does_not_have_is_not_passed_over_below_a_base(case: str) -> None:
    assert joined(*NOT_COVERED[case]).point is None


def test_a_topic_is_compared_from_the_base_on() -> None:
    made = pruned()
    last = made.entries[-1]
    report = Report((ChainReport(CHAIN, sequence=13, entry_hash=last.entry_hash),), ())
    for documents, wrong in ((made.documents[6:], 0), (made.documents, 0), (made.documents[7:], 1)):
        history = KafkaHistory(CLUSTER, "node-a", trust(A), report, {CHAIN: BASE.head})
        for one in documents:
            history.feed(one, "")
        assert len(history.problems()) == wrong


def test_a_topic_that_was_pruned_while_it_was_read_is_told_from_one_that_lost_entries() -> None:
    """Tombstones for a base that was said after reading began look like a gap."""
    made = pruned()
    report = Report((ChainReport(CHAIN, sequence=13, entry_hash=made.entries[-1].entry_hash),), ())
    for known, now, anew in (
        ({}, {CHAIN: BASE.head}, True),
        ({CHAIN: head_at(made, 3)}, {CHAIN: BASE.head}, True),
        ({CHAIN: BASE.head}, {CHAIN: BASE.head}, False),
        ({CHAIN: BASE.head}, {CHAIN: head_at(made, 3)}, False),
        ({CHAIN: BASE.head}, {}, False),
        ({}, {}, False),
    ):
        history = KafkaHistory(CLUSTER, "node-a", trust(A), report, known)
        for one in made.documents[9:]:
            history.feed(one, "")
        assert len(history.problems()) == 1
        assert history.pruned_further(now) is anew


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
