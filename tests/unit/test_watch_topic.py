"""What the audit topic is held against, without Kafka: every entry, what targets say, and what is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.audit_history import (
    ACKS,
    CHAIN,
    CLUSTER,
    A,
    B,
    History,
    acknowledged,
    entry,
    ordinary,
    signer,
    trust,
)
from tests.audit_segments import base
from vsql_shared.audit import tree
from vsql_shared.audit.base import Base
from vsql_shared.audit.checkpoint import Checkpoint, Log
from vsql_shared.audit.dsse import AUDIT_ENTRY, sign_document
from vsql_shared.audit.entries import CHECKPOINT_COSIGNED, TRAIL_PRUNED, canonical_json, peek_chain
from vsql_shared.audit.verify import Problem
from vsql_shared.audit.watch import MAX_NAME, NOBODYS
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
    if not state.lost(NOW)[1]:
        return found
    lost, waiting = state.lost(NOW + SETTLE_SECONDS + 1)
    assert not waiting
    return found + lost


def test_a_true_topic_has_no_break_and_says_what_was_cosigned() -> None:
    acks = acknowledged(SOURCE)
    head = Checkpoint(Log(CLUSTER, CHAIN), SIZE, tree.root_of(SOURCE.head.tree))
    fields: dict[str, Any] = {"batch_lsn_start": 5, "batch_lsn_end": 5, "source_node_id": "node-a"}
    detail = canonical_json({"note": head.sign(B, 1).encode()})
    acks.add(event_type=CHECKPOINT_COSIGNED, target_node_id="node-b", detail=detail, **fields)
    state = reading()
    assert read(SOURCE.documents + acks.documents, state) == []
    assert state.cosigned == {CHAIN: {"node-b": (SIZE, head.root.hex())}}


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


def holed(*places: int) -> list[bytes]:
    """The topic without these entries."""
    return [raw for place, raw in enumerate(SOURCE.documents, 1) if place not in places]


# What somebody does to the topic → the chain and entry that are named, and words of what is said.
BREAKS: dict[str, tuple[Callable[[], list[bytes]], str, int | None, str]] = {
    "an entry is altered": (lambda: flipped(4), NOBODYS, None, "audit/0/4"),
    "an entry is taken out": (lambda: holed(5), CHAIN, 5, "Kafka lost entries"),
    "two change places": (
        lambda: [*SOURCE.documents[:3], SOURCE.documents[4], SOURCE.documents[3], *SOURCE.documents[5:]],
        CHAIN,
        5,
        "Kafka lost entries",
    ),
    "the beginning is gone": (lambda: SOURCE.documents[3:], CHAIN, 1, "Kafka lost entries"),
    "the end is gone": (lambda: SOURCE.documents[:6], CHAIN, 7, "Kafka lost entries"),
    "everything is gone": (list, CHAIN, 1, "Kafka lost entries"),
    "another history of the same node": (
        lambda: other().documents,
        CHAIN,
        2,
        "the trail has another entry 2",
    ),
    "an entry by another key is appended": (resigned, NOBODYS, None, f"audit/0/{SIZE}"),
    "garbage is appended": (
        lambda: [*SOURCE.documents, b"garbage"],
        NOBODYS,
        None,
        "not a signed document",
    ),
    "a target acknowledges another history": (
        lambda: [*SOURCE.documents, *acknowledged(other()).documents],
        CHAIN,
        2,
        "than target node-b in",
    ),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_manipulated_topic_is_found_and_the_place_is_named(case: str) -> None:
    make, chain, sequence, words = BREAKS[case]
    found = read(make(), reading())
    assert (found[0].chain, found[0].sequence) == (chain, sequence), found
    assert words in found[0].what, found


def test_an_altered_entry_is_missing_too() -> None:
    assert [(one.chain, one.sequence) for one in read(flipped(4), reading())] == [(NOBODYS, None), (CHAIN, 5)]


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
    assert state.still_ahead(late) == []
    assert not state.waits


def test_an_entry_the_trail_never_gets_is_a_break() -> None:
    stored = {place: digest for place, digest in STORED.items() if place[1] < SIZE}
    state = reading(trail=SIZE - 1)
    read(SOURCE.documents, state, stored, last=SIZE - 1)
    late = state.overdue(NOW + SETTLE_SECONDS + 1)
    assert state.compare(late, stored, {CHAIN: SIZE - 1}, NOW) == []
    assert [(one.chain, one.sequence) for one in state.still_ahead(late)] == [(CHAIN, SIZE)]
    assert not state.waits


# Chains of acknowledgements: the table has them first.

STORED_ACKS = {(ACKS, one.entry.sequence): one.entry_hash for one in ACKNOWLEDGED.entries}
LAST = len(ACKNOWLEDGED.entries)


def of_target(documents: list[bytes], trail: int = LAST) -> tuple[TopicPass, list[Problem]]:
    """Node B's pass over its own acknowledgements."""
    state = TopicPass(CLUSTER, "node-b", {0: 100}, {ACKS: trail})
    return state, fed(state, documents)


def fed(state: TopicPass, documents: list[bytes]) -> list[Problem]:
    """What reading these gives, without the end of the pass."""
    named = []
    found = []
    for document in documents:
        outcome = state.feed(trust(), document, "audit/0/9")
        if isinstance(outcome, Problem):
            found.append(outcome)
        elif outcome is not None:
            named.append(outcome)
    return found + state.compare(named, STORED | STORED_ACKS, {CHAIN: SIZE, ACKS: LAST}, NOW)


def test_an_acknowledgement_that_is_stored_a_moment_before_kafka_has_it_is_no_break() -> None:
    state, found = of_target(ACKNOWLEDGED.documents[:-1])
    assert (found, state.lost(NOW)) == ([], ([], True))
    # It lies behind the ends of the pass, which is read on.
    assert fed(state, ACKNOWLEDGED.documents[-1:]) == []
    assert state.lost(NOW + 5) == ([], False)


def test_as_long_as_kafka_moves_nothing_is_lost() -> None:
    state, _ = of_target(ACKNOWLEDGED.documents[:2])
    for number, document in enumerate(ACKNOWLEDGED.documents[2:-1]):
        assert state.lost(NOW + number * SETTLE_SECONDS) == ([], True)
        fed(state, [document])
    still = NOW + 100 * SETTLE_SECONDS
    assert state.lost(still) == ([], True)
    lost, waiting = state.lost(still + SETTLE_SECONDS + 1)
    assert ([(one.chain, one.sequence) for one in lost], waiting) == ([(ACKS, LAST)], False)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 1, 2, 3, 4], [0, 1, 4, 2, 3, 4], [0, 1, 2, 3, 4, 2]])
def test_acknowledgements_that_come_twice_or_are_compacted_are_no_break(order: list[int]) -> None:
    documents = ACKNOWLEDGED.documents[:5]
    state, found = of_target([documents[at] for at in order], trail=5)
    assert (found, state.lost(NOW)) == ([], ([], False))


def test_a_fork_in_a_chain_of_acknowledgements_is_found() -> None:
    fork = History(ACKS, B)
    fork.open()
    fork.acknowledge(SOURCE.entries[3])
    state, found = of_target([*ACKNOWLEDGED.documents, fork.documents[1]])
    assert [(one.chain, one.sequence) for one in found] == [(ACKS, 2)]
    assert state.lost(NOW) == ([], False)


# What is forged hides nothing.


def rubbish(chain: str) -> bytes:
    """What claims to be an entry of a chain, signed by a stranger."""
    payload = entry(chain=chain.replace("\0", "?")).encode().replace(b"order?", b"order\0")
    assert peek_chain(payload)[1] == chain
    return sign_document(signer("node-a", "stolen"), AUDIT_ENTRY, payload)


@pytest.mark.parametrize(
    "forged",
    [b"garbage", rubbish(CHAIN), rubbish("order\0.node-a"), rubbish(f"{'x' * 5000}.node-a"), rubbish("x")],
    ids=["garbage", "own chain", "NUL", "long", "no chain"],
)
def test_a_forged_record_is_noted_under_no_name_and_hides_no_later_break(forged: bytes) -> None:
    found = read([forged, *other().documents], reading())
    assert [(one.chain, one.sequence) for one in found] == [(NOBODYS, None), (CHAIN, 2)]
    found = read([forged, forged, *holed(5)], reading())
    assert [(one.chain, one.sequence) for one in found] == [(NOBODYS, None), (CHAIN, 5)]


def test_no_name_that_cannot_be_stored_is_asked_for() -> None:
    name = "x" * MAX_NAME + ".node-a"
    mine, told = History(name, A), History(f"{name}.ack.node-b", B)
    mine.open()
    told.open()
    told.acknowledge(SOURCE.entries[1])
    state = reading()
    outcomes = [state.feed(trust(), raw, "audit/0/1") for raw in [*mine.documents, *told.documents]]
    assert [one.chain for one in outcomes if isinstance(one, Problem)] == [NOBODYS]
    assert [one for one in outcomes if one is not None and not isinstance(one, Problem)] == []


def test_a_genuine_entry_that_is_sent_again_is_no_break_and_hides_none() -> None:
    again = [*SOURCE.documents[:5], SOURCE.documents[1], *SOURCE.documents[5:]]
    assert read(again, reading()) == []
    assert [one.sequence for one in read([*again[:6], other().documents[1]], reading(5))] == [2]


def test_what_a_target_says_falsely_is_one_break_and_hides_nothing_of_the_chain() -> None:
    lies = acknowledged(other()).documents
    found = read([*lies, *holed(6)], reading())
    assert [(one.chain, one.sequence) for one in found] == [(CHAIN, 2), (CHAIN, 6)]


def test_what_a_target_says_of_chains_there_are_not_is_no_flood() -> None:
    made_up = [History(f"x{number}.node-a.ack.node-b", B) for number in range(5)]
    for one in made_up:
        one.open()
        one.acknowledge(SOURCE.entries[1])
    state = reading()
    assert read([*SOURCE.documents, *(raw for one in made_up for raw in one.documents)], state) == []
    assert (state.waits, state.cosigned) == (False, {})


def test_an_entry_of_another_cluster_by_the_same_key_hides_nothing() -> None:
    elsewhere = History(cluster="shop2")
    elsewhere.open()
    found = read([elsewhere.documents[0], *holed(6)], reading())
    assert [(one.chain, one.sequence) for one in found] == [(NOBODYS, None), (CHAIN, 6)]


def test_losers_of_a_race_for_an_epoch_count_for_nothing() -> None:
    loser = History()
    loser.open(9)
    assert read([SOURCE.documents[0], loser.documents[0], *SOURCE.documents[1:]], reading()) == []


def test_forged_records_in_a_targets_name_and_chains_of_others_count_for_nothing() -> None:
    forged = History(ACKS, signer("node-b", "stolen"))
    forged.open()
    forged.acknowledge(other().entries[1])
    strange = History("bills.node-x", signer("node-x"))
    strange.open()
    assert read([*SOURCE.documents, *forged.documents, *strange.documents], reading()) == []


def test_rubbish_makes_one_break_a_pass_and_no_flood() -> None:
    strangers = [History(f"x{number}.node-a", signer("node-a", "stolen")) for number in range(5)]
    for one in strangers:
        one.open()
    forged = [b"garbage", b"more", *(one.documents[0] for one in strangers), rubbish(CHAIN)]
    found = read([*SOURCE.documents, *forged], reading())
    assert [one.chain for one in found] == [NOBODYS]


def test_a_chain_of_this_node_that_the_trail_does_not_have_is_found() -> None:
    hidden = History("bills.node-a")
    hidden.open()
    hidden.note()
    state = reading()
    assert read([*SOURCE.documents, *hidden.documents], state) == []
    assert [(one.chain, one.sequence) for one in state.overdue(NOW + SETTLE_SECONDS + 1)] == [
        ("bills.node-a", 1)
    ]


# Chains that were pruned begin at the base they say themselves.

BASE = base(SOURCE, 4)


def say(history: History, made: Base) -> None:
    """What its producer does with an order to prune the chain."""
    detail = canonical_json(made.detail())
    history.add(event_type=TRAIL_PRUNED, batch_lsn_start=9, batch_lsn_end=9, detail=detail)


def saying(made: Base) -> History:
    history = ordinary()
    say(history, made)
    history.batch()
    return history


PRUNED = saying(BASE)
LONGER = len(PRUNED.entries)
LEFT = {(CHAIN, one.entry.sequence): one.entry_hash for one in PRUNED.entries[4:]}
"""What the trail has when the first four entries are pruned."""


def reading_from(made: Base) -> TopicPass:
    return TopicPass(CLUSTER, "node-a", {0: 100}, {CHAIN: LONGER}, bases={CHAIN: made})


def read_pruned(documents: list[bytes], state: TopicPass | None = None) -> list[Problem]:
    return read(documents, state or reading_from(BASE), LEFT, LONGER)


@pytest.mark.parametrize("left", [[], [0], [1, 3], [0, 1, 2, 3]], ids=["nothing", "one", "holes", "all"])
def test_what_is_left_below_the_base_of_a_pruned_chain_is_passed_over(left: list[int]) -> None:
    documents = [
        *(PRUNED.documents[at] for at in left),
        *PRUNED.documents[4:],
        *acknowledged(PRUNED).documents,
    ]
    assert read_pruned(documents) == []


def test_a_chain_whose_rows_are_still_there_is_compared_below_its_base_too() -> None:
    """The base is said, and the rows wait for the next `audit prune`."""
    everything = {(CHAIN, one.entry.sequence): one.entry_hash for one in PRUNED.entries}
    assert read(PRUNED.documents, reading_from(BASE), everything, LONGER) == []
    lies = acknowledged(other()).documents
    found = read([*PRUNED.documents, *lies], reading_from(BASE), everything, LONGER)
    assert [(one.chain, one.sequence) for one in found] == [(CHAIN, 2)]


def test_a_target_that_acknowledged_another_last_pruned_entry_is_found_by_the_base() -> None:
    lies = History(ACKS, B)
    lies.open()
    for made in other().entries[1:4]:
        lies.acknowledge(made)
    found = read_pruned([*PRUNED.documents[4:], *lies.documents])
    assert [(one.chain, one.sequence) for one in found] == [(CHAIN, 4)]
    assert "than target node-b in" in found[0].what


# What the topic has of a chain that was pruned at entry 4 → the entry that is named, and words of it.
CUTS: dict[str, tuple[list[bytes], int, str]] = {
    "cut further than it was pruned": (PRUNED.documents[5:], 5, "Kafka lost entries"),
    "cut between base and end": ([*PRUNED.documents[4:7], *PRUNED.documents[8:]], 8, "Kafka lost entries"),
    "cut at its end": (PRUNED.documents[4:-1], LONGER, "Kafka lost entries"),
    "all is gone": ([], 5, "Kafka lost entries"),
}


@pytest.mark.parametrize("case", CUTS)
def test_a_cut_of_a_pruned_chain_is_named_at_its_place(case: str) -> None:
    documents, sequence, words = CUTS[case]
    found = read_pruned(documents)
    assert [(one.chain, one.sequence) for one in found] == [(CHAIN, sequence)]
    assert words in found[0].what


def test_a_beginning_that_was_cut_off_without_a_base_is_named_at_its_first_entry() -> None:
    found = read(PRUNED.documents[4:], TopicPass(CLUSTER, "node-a", {0: 100}, {CHAIN: LONGER}), LEFT, LONGER)
    assert (found[0].chain, found[0].sequence) == (CHAIN, 1)


def by_a_stranger() -> list[bytes]:
    """The topic of a chain that says nothing, and the base in its name, signed by another key."""
    forged = History(by=signer("node-a", "stolen"), head=SOURCE.head)
    forged.open()
    say(forged, BASE)
    return [*SOURCE.documents[4:], *forged.documents]


UNSAID: dict[str, list[bytes]] = {
    "nothing is said": SOURCE.documents[4:],
    "another base is said": saying(base(SOURCE, 3)).documents[4:],
    "another head is said": saying(Base(base(SOURCE, 3).head, BASE.note, BASE.tables, BASE.kept)).documents[
        4:
    ],
    "a stranger says it": by_a_stranger(),
}


@pytest.mark.parametrize("case", UNSAID)
def test_a_base_the_topic_does_not_say_lets_no_beginning_go(case: str) -> None:
    state = TopicPass(CLUSTER, "node-a", {0: 100}, {CHAIN: SIZE}, bases={CHAIN: BASE})
    for document in UNSAID[case]:
        state.feed(trust(), document, "audit/0/1")
    (found,), waiting = state.lost(NOW)
    assert (found.chain, found.sequence, waiting) == (CHAIN, 5, False)
    assert "no entry of it says that it was pruned up to 4" in found.what
    assert CHAIN in state.broken


def test_a_loser_of_a_race_below_the_base_counts_for_nothing() -> None:
    loser = History(head=base(SOURCE, 3).head)
    loser.open(9)
    assert read_pruned([*PRUNED.documents[:4], *loser.documents, *PRUNED.documents[4:]]) == []


@pytest.mark.parametrize(
    ("now", "further"),
    [
        ({CHAIN: base(SOURCE, 5)}, True),
        ({CHAIN: BASE}, False),
        ({CHAIN: base(SOURCE, 3)}, False),
        ({}, False),
    ],
    ids=["higher", "the same", "an older one", "none"],
)
def test_only_a_higher_base_gives_up_what_a_pass_found(now: dict[str, Base], further: bool) -> None:
    assert reading_from(BASE).pruned_further(now) is further
