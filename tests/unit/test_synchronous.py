"""Rules 23 and 26 of docs/design/0005 on values: what lets commits return, and whose word counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_pgoutput_transactions import ORIGIN, begin, commit, describe, relation, row, truncate
from vsql_ctl.commands.sync import together_lines
from vsql_producers.pgoutput import RelationMessage, TypeMessage
from vsql_producers.synchronous import Answer, Ledger, left_out, quorum_sequence
from vsql_producers.targets import Target
from vsql_producers.transactions import Descriptor, NotCarried, Transactions
from vsql_shared.audit.chain import EMPTY_HEAD, ChainReader, ChainWriter
from vsql_shared.audit.entries import BATCH_APPLIED, BATCH_COVERED, BATCH_SKIPPED
from vsql_shared.crypto.signing import TrustStore
from vsql_shared.pg.standby_names import standby_list


def test_nothing_is_applied_before_its_acknowledgement() -> None:
    ledger = Ledger(100)
    ledger.published(1, 200)
    ledger.published(2, 300)
    ledger.nothing_outstanding(900)
    assert ledger.applied == 100
    ledger.acknowledged(1)
    assert ledger.applied == 200
    ledger.nothing_outstanding(900)
    assert ledger.applied == 200
    ledger.acknowledged(2)
    ledger.nothing_outstanding(900)
    assert ledger.applied == 900


def test_a_ledger_begins_behind_the_last_acknowledgement() -> None:
    ledger = Ledger(100, [(7, 200), (8, 300)])
    ledger.nothing_outstanding(500)
    assert ledger.applied == 100
    ledger.acknowledged(7)
    assert (ledger.applied, len(ledger)) == (200, 1)


@given(st.lists(st.one_of(
    st.tuples(st.just("publish"), st.integers(1, 50)),
    st.tuples(st.just("acknowledge"), st.integers(0, 30)),
    st.tuples(st.just("idle"), st.integers(0, 50)),
), max_size=60))  # fmt: skip
def test_applied_never_passes_an_unacknowledged_commit_and_never_goes_back(
    steps: list[tuple[str, int]],
) -> None:
    ledger, ends, position, acked = Ledger(0), [], 0, 0
    for verb, number in steps:
        before = ledger.applied
        if verb == "publish":
            position += number
            ends.append(position)
            ledger.published(len(ends), position)
        elif verb == "acknowledge":
            acked = max(acked, min(number, len(ends)))
            ledger.acknowledged(acked)
        else:
            position += number
            ledger.nothing_outstanding(position)
        assert ledger.applied >= before
        assert ledger.applied < min(ends[acked:], default=position + 1)


ANSWERS = {
    "no target": ([], None, -1),
    "one that has joined": ([Answer(5, True, True)], None, 5),
    "the first copy is under way": ([Answer(0, False, True)], None, -1),
    "one joins beside another": ([Answer(5, True, True), Answer(0, False, True)], None, 5),
    "all of them": ([Answer(5, True, True), Answer(3, True, True)], None, 3),
    "any of them": ([Answer(5, True, True), Answer(3, True, True)], 1, 5),
    "any two of three": ([Answer(5, True, True), Answer(3, True, True), Answer(9, True, True)], 2, 5),
    "more than there are": ([Answer(5, True, True)], 2, -1),
    "one that does not hold is still needed": ([Answer(5, True, True), Answer(9, True, False)], None, -1),
    "one that does not hold is no voice": ([Answer(5, True, True), Answer(9, True, False)], 1, 5),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_the_quorum_is_of_targets_whose_word_counts(case: str) -> None:
    answers, quorum, expected = ANSWERS[case]
    assert quorum_sequence(answers, quorum) == expected
    assert quorum_sequence(reversed(answers), quorum) == expected


def test_the_list_asks_for_all_of_its_names() -> None:
    assert standby_list([]) == ""
    assert standby_list(["vsql_0123456789abcdef"]) == "FIRST 1 (vsql_0123456789abcdef)"
    assert standby_list(["any", 'a "b"', "Ü"]) == 'FIRST 3 ("any", "a ""b""", "Ü")'


def _only_t(message: RelationMessage, types: Mapping[int, TypeMessage]) -> Descriptor | None:
    return describe(message, types) if message.table == "t" else None


NOT_CARRIED = {
    "a row": (begin(1), relation(1, table="renamed"), row(1), commit(1)),
    "a row beside one that is": (begin(1), relation(1), relation(2, table="u"), row(1), row(2), commit(1)),
    "a TRUNCATE": (begin(1), relation(1, table="renamed"), truncate(1), commit(1)),
}


@pytest.mark.parametrize("what", NOT_CARRIED)
def test_what_a_synchronous_stream_would_pass_over_stops_it(what: str) -> None:
    transactions = Transactions(_only_t, 0)
    transactions.strict = True
    with pytest.raises(NotCarried):
        transactions.feed(list(NOT_CARRIED[what]))


def test_our_own_schema_and_other_nodes_changes_pass_a_synchronous_stream() -> None:
    transactions = Transactions(_only_t, 0)
    transactions.strict = True
    ours = (begin(1), relation(2, "vsql_sync", "streams"), row(2), truncate(2), commit(1))
    theirs = (begin(20), ORIGIN, relation(3, table="u"), row(3), truncate(3), commit(20))
    assert transactions.feed([*ours, *theirs]) == []
    assert transactions.received_lsn == 28


LEFT_OUT = {
    "all applied": (BATCH_APPLIED, (("applied", 3),), ""),
    "the first copy has it": (BATCH_COVERED, (("covered", 7),), ""),
    "skipped": (BATCH_SKIPPED, (), "skipped batch 4"),
    "one was parked": (BATCH_APPLIED, (("applied", 2), ("parked", 1)), "1 parked"),
    "one was shredded": (BATCH_APPLIED, (("shredded", 3),), "3 shredded"),
    "one found no row": (BATCH_APPLIED, (("applied", 2), ("missing", 1)), "1 missing"),
    "one lost": (BATCH_APPLIED, (("lost", 1),), "1 lost"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_an_acknowledgement_of_less_than_everything_holds_its_target(case: str) -> None:
    event_type, verdicts, said = LEFT_OUT[case]
    writer = ChainWriter(None, "c", "pub.a.ack.b", EMPTY_HEAD, bytes(16), node="b")
    opened = writer.open_epoch(lsn=1, system_identifier="1", timeline=1).entry
    entry = replace(opened, event_type=event_type, verdicts=verdicts, batch=4, ref_sequence=9, sequence=2)
    assert said in left_out(entry)
    target = Target("b", ChainReader("c", "pub.a.ack.b", "b", TrustStore([]), EMPTY_HEAD), [], None, 8, "")
    target.synced_sequence = 8
    target.advance(entry)
    assert target.synced_sequence == (9 if not said else 8)
    # What comes after does not go round it.
    target.advance(replace(opened, event_type=BATCH_APPLIED, verdicts=(("applied", 1),), ref_sequence=10))
    assert target.synced_sequence == (10 if not said else 8)


def test_the_status_says_which_other_publication_holds_commits_up_and_what_a_copy_waits_for() -> None:
    def one(publication: str, state: str, degraded_at: str | None = None) -> dict[str, object]:
        stream = {"state": state}
        return {
            "publication": publication,
            "worker": "running",
            "stream": stream,
            "degraded_at": degraded_at,
        }

    seen = {
        "publications": [one("cards", "synchronous"), one("medical", "waiting")],
        "waiting_commits": 1,
        "copies": ["node-c"],
        "loud": ["role app has synchronous_commit = on"],
    }
    lines = list(together_lines(seen))
    assert lines[0].startswith("cards: its commits wait for targets of medical, too")
    assert "copy for node-c cannot begin" in lines[1]
    assert "role app" in lines[2]
    assert len(lines) == 3
    degraded = [one("cards", "synchronous"), one("medical", "degraded", "now")]
    assert list(together_lines({**seen, "publications": degraded, "copies": [], "loud": []})) == []
