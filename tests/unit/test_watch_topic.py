"""What the audit topic is held against, without Kafka: every entry, what targets say, and what is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.audit_history import ACKS, CHAIN, CLUSTER, B, History, acknowledged, ordinary, signer, trust
from vsql_shared.audit import tree
from vsql_shared.audit.checkpoint import Checkpoint, Log
from vsql_shared.audit.entries import CHECKPOINT_COSIGNED, canonical_json
from vsql_shared.audit.verify import Problem
from vsql_shared.audit.watch_topic import SETTLE_SECONDS, TopicPass

SOURCE = ordinary()
SIZE = len(SOURCE.entries)
ACKNOWLEDGED = acknowledged(SOURCE)
STORED = {(CHAIN, one.entry.sequence): one.entry_hash for one in SOURCE.entries}
NOW = 1_760_000_000.0


def reading(trail: int = SIZE) -> TopicPass:
    return TopicPass(CLUSTER, "node-a", {0: 100}, {CHAIN: trail})


def read(
    documents: list[bytes],
    state: TopicPass,
    stored: dict[tuple[str, int], bytes] | None = None,
    last: int = SIZE,
) -> list[Problem]:
    """Feed a topic, compare with the trail, and end the pass."""
    found, named = [], []
    for offset, document in enumerate(documents):
        outcome = state.feed(trust(), document, f"audit/0/{offset}")
        if isinstance(outcome, Problem):
            found.append(outcome)
        elif outcome is not None:
            named.append(outcome)
    found += state.compare(named, STORED if stored is None else stored, {CHAIN: last}, NOW)
    return found + state.missing()


def test_a_true_topic_has_no_break_and_says_what_was_cosigned() -> None:
    acks = acknowledged(SOURCE)
    head = Checkpoint(Log(CLUSTER, CHAIN), SIZE, tree.root_of(SOURCE.head.tree))
    fields: dict[str, Any] = {"batch_lsn_start": 5, "batch_lsn_end": 5, "source_node_id": "node-a"}
    detail = canonical_json({"note": head.sign(B, 1).encode()})
    acks.add(event_type=CHECKPOINT_COSIGNED, target_node_id="node-b", detail=detail, **fields)
    state = reading()
    assert read(SOURCE.documents + acks.documents, state) == []
    assert state.cosigned == {CHAIN: {"node-b": (SIZE, head.root.hex())}}


def test_a_pass_goes_on_from_what_was_kept_of_it() -> None:
    documents = SOURCE.documents + ACKNOWLEDGED.documents
    for cut in range(len(documents)):
        state = reading()
        for offset, document in enumerate(documents[:cut]):
            state.feed(trust(), document, f"audit/0/{offset}")
        again = TopicPass.from_json(CLUSTER, "node-a", json.dumps(state.to_json()))
        assert again == state
        assert read(documents[cut:], again) == []


def other() -> History:
    """Another history by the same node."""
    history = History()
    history.open()
    for _ in range(SIZE - 1):
        history.batch(7)
    return history


def flipped(at: int) -> list[bytes]:
    documents = list(SOURCE.documents)
    raw = bytearray(documents[at])
    raw[-1] ^= 1
    return [*documents[:at], bytes(raw), *documents[at + 1 :]]


def resigned() -> list[bytes]:
    """Somebody else's chain of the same name."""
    stranger = History(by=signer("node-a", "stolen"))
    stranger.open()
    return [*SOURCE.documents, stranger.documents[0]]


# What somebody does to the topic → the entry that is named, and words of what is said.
BREAKS: dict[str, tuple[Callable[[], list[bytes]], int | None, str]] = {
    "an entry is altered": (lambda: flipped(4), None, "audit/0/4"),
    "an entry is taken out": (lambda: SOURCE.documents[:4] + SOURCE.documents[5:], None, "gap"),
    "two change places": (
        lambda: [*SOURCE.documents[:3], SOURCE.documents[4], SOURCE.documents[3], *SOURCE.documents[5:]],
        None,
        "gap",
    ),
    "the beginning is gone": (lambda: SOURCE.documents[3:], None, "audit/0/0"),
    "the end is gone": (lambda: SOURCE.documents[:6], 7, "Kafka lost entries"),
    "everything is gone": (list, 1, "Kafka lost entries"),
    "another history of the same node": (lambda: other().documents, 2, "the trail has another entry 2"),
    "an entry by another key is appended": (resigned, None, f"audit/0/{SIZE}"),
    "garbage is appended": (lambda: [*SOURCE.documents, b"garbage"], None, "not a signed document"),
    "a target acknowledges another history": (
        lambda: [*SOURCE.documents, *acknowledged(other()).documents],
        2,
        "than target node-b in",
    ),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_manipulated_topic_is_found_and_the_place_is_named(case: str) -> None:
    make, sequence, words = BREAKS[case]
    found = read(make(), reading())
    assert found[0].sequence == sequence, found
    assert words in found[0].what, found


def test_an_entry_that_is_missing_in_the_trail_is_found() -> None:
    without = {place: digest for place, digest in STORED.items() if place != (CHAIN, 5)}
    found = read(SOURCE.documents, reading(), without)
    assert [(one.sequence, "the trail lacks entry 5" in one.what) for one in found] == [(5, True)]


def test_an_entry_that_is_in_kafka_a_moment_earlier_is_no_break_until_it_is_late() -> None:
    stored = {place: digest for place, digest in STORED.items() if place[1] < SIZE}
    state = reading(trail=SIZE - 1)
    assert read(SOURCE.documents, state, stored, last=SIZE - 1) == []
    assert state.overdue(NOW + SETTLE_SECONDS / 2) == []
    late = state.overdue(NOW + SETTLE_SECONDS + 1)
    assert [(one.chain, one.sequence) for one in late] == [(CHAIN, SIZE)]
    # It came in the meantime: no break.
    assert state.compare(late, STORED, {CHAIN: SIZE}, NOW) == []
    assert state.ahead == {}


def test_forged_records_in_a_targets_name_and_chains_of_others_count_for_nothing() -> None:
    forged = History(ACKS, signer("node-b", "stolen"))
    forged.open()
    forged.acknowledge(other().entries[1])
    strange = History("bills.node-x", signer("node-x"))
    strange.open()
    assert read([*SOURCE.documents, *forged.documents, *strange.documents], reading()) == []


def test_rubbish_makes_one_break_for_each_chain_and_no_flood() -> None:
    strangers = [History(f"x{number}.node-a", signer("node-a", "stolen")) for number in range(5)]
    for one in strangers:
        one.open()
    forged = History(by=signer("node-a", "stolen"))
    forged.open()
    forged.batch()
    rubbish = [b"garbage", b"more", *(one.documents[0] for one in strangers), *forged.documents]
    found = read([*SOURCE.documents, *rubbish], reading())
    assert [one.chain for one in found] == ["", CHAIN]
    assert len(read([*SOURCE.documents, *acknowledged(other()).documents], reading())) == 1


def test_a_chain_of_this_node_that_the_trail_does_not_have_is_found() -> None:
    hidden = History("bills.node-a")
    hidden.open()
    hidden.note()
    state = reading()
    assert read([*SOURCE.documents, *hidden.documents], state) == []
    assert [(one.chain, one.sequence) for one in state.overdue(NOW + SETTLE_SECONDS + 1)] == [
        ("bills.node-a", 1)
    ]
