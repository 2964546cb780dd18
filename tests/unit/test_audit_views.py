"""Two targets compare what one source showed them: a split view is found at its first entry."""

from __future__ import annotations

import pytest

from tests.audit_history import CHAIN, B, History, acknowledged, ordinary, signer
from vsql_shared.audit.rows import StoredDocument, parse
from vsql_shared.audit.views import compare_views
from vsql_shared.names import ack_chain

C = signer("node-c")
OURS, THEIRS = ack_chain(CHAIN, "node-b"), ack_chain(CHAIN, "node-c")


def seen(source: History, by: str = "node-b", first: int = 1, last: int = 99) -> list[StoredDocument]:
    """Acknowledgements of the manifests from one sequence to another."""
    acks = History(ack_chain(CHAIN, by), B if by == "node-b" else C)
    acks.open()
    for made in source.entries:
        if made.entry.batch and first <= made.entry.sequence <= last:
            acks.acknowledge(made, target_node_id=by)
    return [parse(encoded) for encoded in acks.documents]


def split(at: int) -> tuple[History, History]:
    """Two histories that are one up to entry `at` - 1."""
    one, two = History(), History()
    for number in range(1, 10):
        for history in (one, two):
            if number == 1:
                history.open()
            else:
                history.batch(2 if number < at or history is one else 3)
    return one, two


def test_targets_that_saw_one_history_agree_however_far_each_is() -> None:
    source = ordinary(8)
    for first, last in ((1, 99), (3, 8), (6, 6), (50, 60)):
        assert compare_views(CHAIN, OURS, seen(source), THEIRS, seen(source, "node-c", first, last)) is None
    everything = [parse(encoded) for encoded in acknowledged(source).documents]
    assert compare_views(CHAIN, OURS, everything, THEIRS, seen(source, "node-c")) is None


@pytest.mark.parametrize("at", range(2, 10))
@pytest.mark.parametrize("behind", [0, 1, 3])
def test_a_split_is_named_at_its_first_entry(at: int, behind: int) -> None:
    one, two = split(at)
    for ours, theirs in ((one, two), (two, one)):
        found = compare_views(CHAIN, OURS, seen(ours), THEIRS, seen(theirs, "node-c", 1 + behind))
        first = max(at, 1 + behind)
        assert found is not None
        assert (found.chain, found.sequence) == (CHAIN, first)
        for history in (ours, theirs):
            assert history.entries[first - 1].entry_hash.hex() in found.what


def interleaved(first: str) -> History:
    """Batches and entries without one in turn: manifests at even sequences, or at odd ones."""
    history = History()
    history.open()
    if first == "note":
        history.note()
    for _ in range(5):
        history.batch()
        history.note()
    return history


def test_two_histories_whose_manifests_share_no_sequence_are_a_split_too() -> None:
    one, two = interleaved("batch"), interleaved("note")
    manifests = [{made.entry.sequence for made in each.entries if made.entry.batch} for each in (one, two)]
    assert not manifests[0] & manifests[1]
    for ours, theirs in ((one, two), (two, one)):
        found = compare_views(CHAIN, OURS, seen(ours), THEIRS, seen(theirs, "node-c"))
        assert found is not None
        assert "split view" in found.what
        assert compare_views(CHAIN, OURS, seen(ours), THEIRS, seen(ours, "node-c", 4)) is None
        # One of both has but one batch, and it stands elsewhere than the other's.
        assert compare_views(CHAIN, OURS, seen(ours), THEIRS, seen(theirs, "node-c", 8, 9)) is not None


def test_batches_skipped_unread_name_no_history() -> None:
    one, two = split(4)
    acks = seen(two, "node-c", 1, 3)
    unread = History(THEIRS, C, head=History().head)
    unread.open()
    unread.add(
        event_type="batch_skipped", batch=4, ref_epoch=1, ref_sequence=5, batch_lsn_start=1, batch_lsn_end=1
    )
    assert compare_views(CHAIN, OURS, seen(one), THEIRS, acks) is None
    assert compare_views(CHAIN, OURS, seen(one), THEIRS, [parse(e) for e in unread.documents]) is None
