"""Chains: every reader comes to the same answer, and no altered history passes for another one."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.audit_history import (
    ACKS,
    CHAIN,
    CLUSTER,
    A,
    B,
    History,
    acknowledged,
    entry,
    incarnation,
    manifest_fields,
    ordinary,
    signer,
    trust,
)
from vsql_shared.audit.chain import (
    EMPTY_HEAD,
    Accepted,
    ChainHead,
    ChainReader,
    ChainWriter,
    Prepared,
    Void,
    hole_before,
    new_incarnation,
    writer_of,
)
from vsql_shared.audit.compare import ack_target, compare_roots
from vsql_shared.audit.dsse import AUDIT_ENTRY, sign_document
from vsql_shared.audit.entries import (
    BATCH_COVERED,
    BATCH_SKIPPED,
    EPOCH_OPENED,
    OPERATOR_ACTION,
    TRANSACTION_REPLAYED,
    canonical_json,
)
from vsql_shared.audit.history import KafkaHistory
from vsql_shared.audit.merkle import EMPTY_ROOT
from vsql_shared.audit.rows import StoredDocument, parse
from vsql_shared.audit.verify import ChainReport, Report
from vsql_shared.crypto.signing import TrustStore
from vsql_shared.errors import ChainError, DecodeError, SignatureError, VerificationError


class Outcome(NamedTuple):
    """What a reader made of a history: hashes it accepted, entries it found void, where it stopped."""

    accepted: list[bytes]
    void: int
    stopped_at: int | None
    head: ChainHead


def read(documents: list[bytes], store: TrustStore | None = None, head: ChainHead = EMPTY_HEAD) -> Outcome:
    reader = ChainReader(CLUSTER, CHAIN, "node-a", store or trust(), head)
    accepted: list[bytes] = []
    void = 0
    for at, encoded in enumerate(documents):
        try:
            found = reader.accept(encoded, f"shop.audit/0/{at}")
        except (VerificationError, DecodeError) as error:
            named = f"shop.audit/0/{at}" in str(error)
            return Outcome(accepted, void, at if named else None, reader.head)
        if isinstance(found, Accepted):
            accepted.append(found.entry_hash)
            assert found.new_head == reader.head
        void += isinstance(found, Void)
    return Outcome(accepted, void, None, reader.head)


def hashes(history: History) -> list[bytes]:
    return [one.entry_hash for one in history.entries]


def built(steps: list[str]) -> History:
    history = History()
    history.open()
    for step in steps:
        match step:
            case "batch":
                history.batch()
            case "fragment":
                history.batch(continues=True)
            case "note":
                history.note()
            case _:
                history.open()
    return history


histories = st.lists(st.sampled_from(["batch", "fragment", "note", "open"]), max_size=12).map(built)


@given(history=histories)
def test_valid_history_is_accepted_whole_and_leads_to_the_writers_head(history: History) -> None:
    assert read(history.documents) == Outcome(hashes(history), 0, None, history.head)


@given(history=histories, data=st.data())
def test_reader_that_starts_in_the_middle_comes_to_the_same_head(
    history: History, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(history.entries)))
    head = read(history.documents[:at]).head
    assert read(history.documents[at:], head=head).head == history.head


def only_a_prefix(history: History, documents: list[bytes], at: int) -> None:
    """An attack at entry `at`: what was before it counts, nothing after it does, and it is seen.

    Unseen it goes only if all that follows opens epochs, which a reader cannot tell from lost races.
    """
    outcome = read(documents)
    assert outcome.accepted == hashes(history)[: len(outcome.accepted)]
    assert len(outcome.accepted) <= at
    later = history.entries[at + 1 :]
    if any(one.entry.event_type != EPOCH_OPENED for one in later):
        assert outcome.stopped_at is not None


@settings(max_examples=200)
@given(history=histories, data=st.data())
def test_altered_entry_ends_the_chain(history: History, data: st.DataObject) -> None:
    documents = history.documents
    at = data.draw(st.integers(0, len(documents) - 1))
    place = data.draw(st.integers(0, len(documents[at]) - 1))
    bit = 1 << data.draw(st.integers(0, 7))
    documents[at] = documents[at][:place] + bytes([documents[at][place] ^ bit]) + documents[at][place + 1 :]
    only_a_prefix(history, documents, at)


@given(history=histories, data=st.data())
def test_deleted_entry_ends_the_chain(history: History, data: st.DataObject) -> None:
    documents = history.documents
    at = data.draw(st.integers(0, len(documents) - 1))
    del documents[at]
    only_a_prefix(history, documents, at)


@given(history=histories, data=st.data())
def test_reordered_entries_never_make_another_chain(history: History, data: st.DataObject) -> None:
    documents = history.documents
    one, two = sorted(data.draw(st.lists(st.integers(0, len(documents) - 1), min_size=2, max_size=2)))
    documents[one], documents[two] = documents[two], documents[one]
    outcome = read(documents)
    assert outcome.accepted == hashes(history)[: len(outcome.accepted)]
    if one != two and any(made.entry.event_type != EPOCH_OPENED for made in history.entries[two:]):
        assert outcome.stopped_at is not None


@given(history=histories, data=st.data())
def test_replayed_entry_is_void_or_stops_the_reader_and_never_counts_twice(
    history: History, data: st.DataObject
) -> None:
    documents = history.documents
    source = data.draw(st.integers(0, len(documents) - 1))
    target = data.draw(st.integers(source + 1, len(documents)))
    documents.insert(target, documents[source])
    outcome = read(documents)
    replayed, before = history.entries[source].entry, history.entries[target - 1].entry
    harmless = target == source + 1 or replayed.event_type == EPOCH_OPENED or replayed.epoch < before.epoch
    if harmless:
        assert outcome == Outcome(hashes(history), 1, None, history.head)
    else:
        assert outcome.accepted == hashes(history)[:target]
        assert outcome.stopped_at == target


FORGERIES = {
    "thief": signer("node-a", "thief"),
    "peer": B,
}


@pytest.mark.parametrize("who", FORGERIES)
@given(history=histories)
def test_inserted_entry_of_another_key_is_refused(who: str, history: History) -> None:
    forged = ChainWriter(FORGERIES[who], CLUSTER, CHAIN, history.head, history.head.incarnation)
    made = forged.next(**manifest_fields(history.head.batch + 1))
    outcome = read([*history.documents, made.encoded])
    assert outcome.stopped_at == len(history.entries)
    assert outcome.head == history.head


def test_entries_of_other_chains_are_passed_over() -> None:
    source = ordinary()
    others = acknowledged(source).documents
    mixed = [one for pair in zip(source.documents, others, strict=False) for one in pair]
    mixed += source.documents[len(others) :]
    assert read(mixed).head == source.head


def test_two_racing_openers_have_one_winner_whoever_reads() -> None:
    base = built(["batch"])
    openers = [
        ChainWriter(A, CLUSTER, CHAIN, base.head, incarnation(number)).open_epoch(
            lsn=1, system_identifier="1", timeline=1
        )
        for number in (50, 60)
    ]
    for first, second in (openers, openers[::-1]):
        outcome = read([*base.documents, first.encoded, second.encoded])
        assert outcome.head.incarnation == first.entry.incarnation
        assert outcome.void == 1


def test_loser_of_a_race_is_void_in_all_it_writes_until_it_opens_a_later_epoch() -> None:
    base = built(["batch"])
    winner, loser = (ChainWriter(A, CLUSTER, CHAIN, base.head, incarnation(one)) for one in (50, 60))
    documents = list(base.documents)
    documents += [
        writer.open_epoch(lsn=1, system_identifier="1", timeline=1).encoded for writer in (winner, loser)
    ]
    documents += [loser.prepare(**manifest_fields(2)).encoded, winner.prepare(**manifest_fields(2)).encoded]
    outcome = read(documents)
    assert (outcome.void, outcome.head) == (2, winner.tip)
    again = ChainWriter(A, CLUSTER, CHAIN, outcome.head, incarnation(61))
    documents.append(again.open_epoch(lsn=1, system_identifier="1", timeline=1).encoded)
    documents.append(winner.prepare(**manifest_fields(3)).encoded)
    documents.append(again.prepare(**manifest_fields(3)).encoded)
    outcome = read(documents)
    assert (outcome.void, outcome.head) == (3, again.tip)


def test_late_manifest_of_an_old_process_is_void() -> None:
    history = built(["batch"])
    old = ChainWriter(A, CLUSTER, CHAIN, history.head, incarnation(1))
    late = old.next(**manifest_fields(2))
    history.open()
    outcome = read([*history.documents, late.encoded])
    assert (outcome.void, outcome.stopped_at, outcome.head) == (1, None, history.head)


def test_old_processs_manifest_that_came_first_counts_and_the_opener_that_missed_it_is_void() -> None:
    history = built(["batch"])
    opener = ChainWriter(A, CLUSTER, CHAIN, history.head, incarnation(9))
    opening = opener.open_epoch(lsn=1, system_identifier="1", timeline=1)
    history.batch()
    outcome = read([*history.documents, opening.encoded])
    assert (outcome.void, outcome.head) == (1, history.head)


def test_epoch_names_the_fragments_it_abandons() -> None:
    history = built(["batch", "fragment", "fragment", "note"])
    assert history.head.unfinished_from == 3
    assert history.head.lsn_end == 150
    opening = history.open()
    assert opening.entry.ref_sequence == 3
    assert history.head.unfinished_from == 0
    assert history.head.batch == 3
    assert history.batch().entry.batch == 4


# Entries that follow the head [open, batch] but for one field: (change, words)
BROKEN: list[tuple[dict[str, object], str]] = [
    ({"sequence": 4}, "gap: expected sequence 3, got 4"),
    ({"sequence": 2}, "fork: expected sequence 3, got 2"),
    ({"prev_event_hash": bytes(32)}, "fork"),
    ({"epoch": 2}, "never opened"),
    ({"epoch": 3, "event_type": EPOCH_OPENED}, "never opened"),
    ({"cluster": "other"}, "cluster 'other'"),
    ({"signer_node_id": "node-b"}, "signer 'node-b'"),
    ({"batch": 1}, "batch number 1 after 1"),
    ({"batch": 3}, "batch number 3 after 1"),
    ({"epoch": 2, "event_type": EPOCH_OPENED, "ref_sequence": 2}, "abandons"),
]


@pytest.mark.parametrize("case", range(len(BROKEN)))
def test_genuine_entry_that_does_not_follow_is_an_error(case: int) -> None:
    change, words = BROKEN[case]
    history = built(["batch"])
    right = entry(
        **manifest_fields(2),
        epoch=1,
        incarnation=incarnation(1),
        sequence=3,
        prev_event_hash=history.head.entry_hash,
    )
    plain: dict[str, object] = {}
    if change.get("event_type") == EPOCH_OPENED:
        plain = {
            "batch": 0,
            "row_count": 0,
            "record_count": 0,
            "partitions": (),
            "merkle_root": entry().merkle_root,
        }
    wrong = replace(right, **{**plain, **change})  # type: ignore[arg-type]  # a table of cases
    reader = ChainReader(CLUSTER, CHAIN, "node-a", trust())
    for encoded in history.documents:
        reader.accept(encoded, "before")
    with pytest.raises(ChainError, match=words) as caught:
        reader.accept(sign_document(A, AUDIT_ENTRY, wrong.encode()), "shop.audit/0/7")
    assert caught.value.record == "shop.audit/0/7"
    assert reader.head == history.head
    assert isinstance(reader.accept(sign_document(A, AUDIT_ENTRY, right.encode()), "x"), Accepted)


def test_an_epoch_that_begins_behind_the_chains_end_says_what_was_never_sent() -> None:
    head = ChainHead(epoch=1, sequence=9, lsn_end=100)
    for begins, words in ((100, ""), (101, "ended at 0/64, and epoch 2 begins at 0/65")):
        writer = ChainWriter(A, CLUSTER, CHAIN, head, incarnation(2))
        opened = writer.open_epoch(lsn=begins, system_identifier="7", timeline=1).entry
        assert words in hole_before(head, opened)
        assert bool(words) == bool(hole_before(head, opened))
        # Who begins with the chain misses nothing of it.
        assert hole_before(EMPTY_HEAD, opened) == ""
        # Said once: from here on the chain goes on behind it. It may hold no batch yet.
        assert writer.tip.lsn_end == begins
        assert writer.tip.batch == 0


def test_positions_of_acknowledgements_are_of_two_servers_and_no_holes() -> None:
    head = ChainHead(epoch=1, sequence=9, lsn_end=100)
    writer = ChainWriter(B, CLUSTER, ACKS, head, incarnation(2))
    opened = writer.open_epoch(lsn=5000, system_identifier="7", timeline=1, source_node_id=A.node).entry
    assert hole_before(head, opened) == ""
    assert writer.tip.lsn_end == 100


def test_error_says_where() -> None:
    reader = ChainReader(CLUSTER, CHAIN, "node-a", trust())
    with pytest.raises(DecodeError, match=r"shop\.audit/0/5"):
        reader.accept(b"garbage", "shop.audit/0/5")
    with pytest.raises(SignatureError) as caught:
        reader.accept(sign_document(B, AUDIT_ENTRY, entry().encode()), "shop.audit/0/5")
    assert caught.value.record == "shop.audit/0/5"


def test_document_of_another_kind_on_the_audit_topic_is_refused() -> None:
    reader = ChainReader(CLUSTER, CHAIN, "node-a", trust())
    with pytest.raises(DecodeError, match="of type"):
        reader.accept(sign_document(A, "text/plain", entry().encode()), "x")


def test_acknowledgements_may_pass_over_abandoned_batches_and_never_go_back() -> None:
    source = built(["batch", "fragment", "open", "batch"])
    acks = acknowledged(source)
    assert acks.head.batch == 3
    assert acks.head.lsn_end == source.head.lsn_end
    with pytest.raises(ChainError, match="batch number 1 after 3"):
        acks.acknowledge(source.entries[1])


class TestWriter:
    """ChainWriter: order, links and refusals."""

    def opened(self) -> tuple[ChainWriter, Prepared]:
        writer = ChainWriter(A, CLUSTER, CHAIN, EMPTY_HEAD, new_incarnation())
        return writer, writer.open_epoch(lsn=1, system_identifier="77", timeline=3)

    def test_next_waits_for_commit(self) -> None:
        writer, opening = self.opened()
        with pytest.raises(ChainError, match="not committed"):
            writer.next(**manifest_fields(1))
        with pytest.raises(ChainError, match="not committed"):
            writer.open_epoch(lsn=1, system_identifier="77", timeline=3)
        assert writer.commit(opening.entry_hash) == writer.tip
        assert writer.next(**manifest_fields(1)).entry.sequence == 2

    def test_prepared_entries_are_linked_and_commit_in_order(self) -> None:
        writer, opening = self.opened()
        made = [writer.prepare(**manifest_fields(batch)) for batch in (1, 2, 3)]
        assert writer.head == EMPTY_HEAD
        assert [one.entry.prev_event_hash for one in made] == [
            opening.entry_hash,
            made[0].entry_hash,
            made[1].entry_hash,
        ]
        writer.commit(opening.entry_hash)
        with pytest.raises(ChainError, match="not the next entry"):
            writer.commit(made[1].entry_hash)
        for one in made:
            writer.commit(one.entry_hash)
        assert writer.head == writer.tip
        with pytest.raises(ChainError):
            writer.commit(made[2].entry_hash)

    def test_entries_carry_the_epochs_system_and_timeline(self) -> None:
        writer, _ = self.opened()
        made = writer.prepare(**manifest_fields(1)).entry
        assert (made.system_identifier, made.timeline) == ("77", 3)

    def test_nothing_is_written_before_the_epoch_is_open(self) -> None:
        writer = ChainWriter(A, CLUSTER, CHAIN, built(["batch"]).head, new_incarnation())
        assert not writer.is_open
        with pytest.raises(ChainError, match="not opened"):
            writer.next(**manifest_fields(2))

    def test_refused_entry_leaves_the_writer_as_it_was(self) -> None:
        writer, _ = self.opened()
        tip = writer.tip
        with pytest.raises(ChainError, match="batch number 5"):
            writer.prepare(**manifest_fields(5))
        assert writer.tip == tip

    def test_unsigned_writer_needs_a_name_and_a_signer_has_its_own(self) -> None:
        with pytest.raises(ChainError, match="writer's node"):
            ChainWriter(None, CLUSTER, CHAIN, EMPTY_HEAD, new_incarnation())
        with pytest.raises(ChainError, match="writer's node"):
            ChainWriter(A, CLUSTER, CHAIN, EMPTY_HEAD, new_incarnation(), node="node-b")
        writer = ChainWriter(None, CLUSTER, CHAIN, EMPTY_HEAD, new_incarnation(), node="node-a")
        made = writer.open_epoch(lsn=1, system_identifier="1", timeline=1)
        assert read([made.encoded], TrustStore([], allow_unsigned=True)).head == writer.tip
        assert read([made.encoded]).stopped_at == 0


CHAINS = {
    "orders.node-a": "node-a",
    "orders.node-a.copy.node-b": "node-a",
    "orders.node-a.ack.node-b": "node-b",
    "orders.node-a.copy.node-b.ack.node-b": "node-b",
    "ack.copy": "copy",
    "p.ack.copy.ack.ack.b": "b",
}


@pytest.mark.parametrize("chain", CHAINS)
def test_name_of_a_chain_says_who_writes_it(chain: str) -> None:
    assert writer_of(chain) == CHAINS[chain]


@pytest.mark.parametrize("chain", ["", "orders", "a.b.c", "a.b.c.d", "a.b.ack.c.d", "a.b.copy.c.ack.d.e"])
def test_what_is_no_name_of_a_chain_is_refused(chain: str) -> None:
    with pytest.raises(ChainError, match="not the name"):
        writer_of(chain)


def test_name_of_an_acknowledgement_says_stream_and_target() -> None:
    assert ack_target("orders.node-a.ack.node-b") == ("orders.node-a", "node-b")
    assert ack_target("o.a.copy.b.ack.b") == ("o.a.copy.b", "b")
    assert ack_target("orders.node-a") is None
    assert ack_target("o.ack.b") is None


def stored(history: History) -> list[StoredDocument]:
    return [parse(encoded) for encoded in history.documents]


def test_both_sides_agree_on_every_batch_but_abandoned_ones() -> None:
    source = ordinary(6)
    found = compare_roots(CHAIN, "node-b", stored(source), stored(acknowledged(source)))
    assert (found.problem, found.compared, found.under_way) == (None, 6, 0)


def test_batches_after_the_last_acknowledgement_are_under_way() -> None:
    source = ordinary(6)
    acks = acknowledged(source)
    for step in ("batch", "fragment", "open", "batch", "fragment"):
        source = extended(source, step)
    found = compare_roots(CHAIN, "node-b", stored(source), stored(acks))
    assert (found.problem, found.compared, found.under_way) == (None, 6, 3)


@pytest.mark.parametrize(("pruned", "compared"), [(6, 3), (9, 2), (10, 1), (11, 0)])
def test_from_a_base_on_only_what_the_target_acknowledged_all_of_is_passed_over(
    pruned: int, compared: int
) -> None:
    source = ordinary(6)
    left, acks = stored(source)[pruned:], stored(acknowledged(source))
    found = compare_roots(CHAIN, "node-b", left, acks, pruned)
    assert (found.problem, found.compared) == (None, compared)


@pytest.mark.parametrize("acknowledged_batches", range(1, 6))
def test_a_source_that_begins_behind_all_a_target_has_acknowledged_is_found(
    acknowledged_batches: int,
) -> None:
    source = ordinary(6)
    acks = stored(acknowledged(source))[: 1 + acknowledged_batches]
    problem = compare_roots(CHAIN, "node-b", stored(source)[11:], acks, 11).problem
    assert problem is not None
    assert "as if it was pruned there" in problem.what
    # A target that has acknowledged nothing yet was told nothing.
    assert compare_roots(CHAIN, "node-b", stored(source)[11:], acks[:1], 11).problem is None


def extended(history: History, step: str) -> History:
    if step == "open":
        history.open()
    else:
        history.batch(continues=step == "fragment")
    return history


# What a target may say wrongly: (field, value, words)
LIES: list[tuple[dict[str, object], str]] = [
    ({"merkle_root": b"x" * 32}, "the target computed root"),
    ({"row_count": 1, "verdicts": (("applied", 1),)}, "row_count"),
    ({"batch_lsn_end": 9_999}, "batch_lsn_end"),
    ({"ref_hash": b"x" * 32}, "with hash"),
    ({"ref_epoch": 7}, "with hash"),
    ({"ref_sequence": 1}, "does not have there"),
    ({"ref_sequence": 99}, "does not have there"),
]


@pytest.mark.parametrize("case", range(len(LIES)))
def test_acknowledgement_that_does_not_match_its_manifest_is_named(case: int) -> None:
    change, words = LIES[case]
    source = built(["batch", "batch"])
    acks = History(ACKS, B)
    acks.open()
    acks.acknowledge(source.entries[1])
    acks.acknowledge(source.entries[2], **change)
    problem = compare_roots(CHAIN, "node-b", stored(source), stored(acks)).problem
    assert problem is not None
    assert (problem.chain, problem.sequence) == (ACKS, 3)
    assert words in problem.what


def test_batch_that_was_never_acknowledged_is_named() -> None:
    source = built(["batch", "note", "batch", "batch"])
    acks = History(ACKS, B)
    acks.open()
    acks.acknowledge(source.entries[1])
    acks.acknowledge(source.entries[4])
    problem = compare_roots(CHAIN, "node-b", stored(source), stored(acks)).problem
    assert problem is not None
    assert (problem.chain, problem.sequence) == (CHAIN, 4)


def test_batch_an_operator_skipped_counts_as_decided() -> None:
    source = built(["batch", "batch", "batch"])
    acks = History(ACKS, B)
    acks.open()
    acks.acknowledge(source.entries[1])
    acks.acknowledge(source.entries[2], event_type=BATCH_SKIPPED, verdicts=(), merkle_root=b"x" * 32)
    acks.acknowledge(source.entries[3])
    found = compare_roots(CHAIN, "node-b", stored(source), stored(acks))
    assert (found.problem, found.compared) == (None, 3)


def _passing_over(count: int, *named: object) -> dict[str, object]:
    """An acknowledgement's fields where changes of its batch were passed over."""
    return {
        "verdicts": (("applied", 5 - count), ("skipped", count)),
        "row_count": 5,
        "detail": canonical_json({"passed_over": list(named)}),
    }


def test_changes_an_operator_had_skipped_are_counted_and_so_is_what_was_replayed() -> None:
    source = History()
    source.open()
    source.batch(5)
    source.batch(5)
    acks = History(ACKS, B)
    acks.open()
    one = {"xid": 741, "lsn": "0/1", "decision": 1, "verdict": "skipped", "changes": 2}
    acks.acknowledge(source.entries[1], **_passing_over(3, one, {**one, "xid": 742, "changes": 1}))
    replayed = canonical_json({"xid": 740, "changes": 4})
    acks.add(event_type=TRANSACTION_REPLAYED, batch_lsn_start=5, batch_lsn_end=5, detail=replayed)
    acks.acknowledge(source.entries[2])
    found = compare_roots(CHAIN, "node-b", stored(source), stored(acks))
    assert (found.problem, found.compared, found.passed_over, found.replayed) == (None, 2, 3, 4)


@pytest.mark.parametrize(
    "named",
    [
        [],
        [{"verdict": "skipped", "changes": 2}],
        [{"verdict": "parked", "changes": 3}],
        [{"changes": 3}],
        ["skipped"],
        [{"verdict": "skipped", "changes": "3"}],
    ],
)
def test_changes_that_are_passed_over_without_a_transaction_are_found(named: list[object]) -> None:
    source = History()
    source.open()
    source.batch(5)
    acks = History(ACKS, B)
    acks.open()
    acks.acknowledge(source.entries[1], **_passing_over(3, *named))
    problem = compare_roots(CHAIN, "node-b", stored(source), stored(acks)).problem
    assert problem is not None
    assert "passes over" in problem.what


def test_target_that_joined_later_begins_with_its_first_batch() -> None:
    source = built(["batch", "batch", "batch"])
    acks = History(ACKS, B)
    acks.open()
    acks.acknowledge(source.entries[3])
    found = compare_roots(CHAIN, "node-b", stored(source), stored(acks))
    assert (found.problem, found.compared) == (None, 1)


@pytest.mark.parametrize(("told", "words"), [(0, None), (1, "covers"), (-1, "covers")])
def test_what_a_first_copy_covers_is_counted_as_the_source_signed_it(told: int, words: str | None) -> None:
    source = built(["batch", "fragment", "open", "batch", "batch", "batch"])
    batches = [made for made in source.entries if made.entry.batch]
    complete = [batches[0], *batches[2:]]
    rows = sum(made.entry.row_count for made in complete[:3]) + told
    acks = History(ACKS, B)
    acks.open()
    acks.acknowledge(
        complete[2],
        event_type=BATCH_COVERED,
        row_count=rows,
        verdicts=(("covered", rows),),
        merkle_root=EMPTY_ROOT,
    )
    acks.acknowledge(complete[3])
    found = compare_roots(CHAIN, "node-b", stored(source), stored(acks))
    if words is None:
        assert (found.problem, found.compared) == (None, 2)
    else:
        assert found.problem is not None
        assert words in found.problem.what


@pytest.mark.parametrize(("rows", "holds"), [(9, True), (6, True), (5, True), (2, False), (0, False)])
def test_of_what_is_left_above_a_base_no_covered_change_is_missing(rows: int, holds: bool) -> None:
    """Batches of 2, 2, 2 and 3 changes, the first two of them pruned: 2 and 3 of those covered are left."""
    source = History()
    source.open()
    for changes in (2, 2, 2, 3):
        source.batch(changes)
    acks = History(ACKS, B)
    acks.open()
    acks.acknowledge(
        source.entries[4],
        event_type=BATCH_COVERED,
        row_count=rows,
        verdicts=(("covered", rows),) if rows else (),
        merkle_root=EMPTY_ROOT,
    )
    problem = compare_roots(CHAIN, "node-b", stored(source)[3:], stored(acks), 3).problem
    assert (problem is None) is holds
    assert problem is None or "at least 5 up to manifest 5" in problem.what


def report_of(history: History, entries: int | None = None) -> Report:
    report = ChainReport(history.chain)
    for made in history.entries[:entries]:
        report.count(made.entry, made.entry_hash)
    return Report((report,), ())


def kafka_problems(report: Report, documents: list[bytes]) -> list[tuple[int | None, str]]:
    history = KafkaHistory(CLUSTER, "node-a", trust(), report)
    for offset, encoded in enumerate(documents):
        history.feed(encoded, f"shop.audit/0/{offset}")
    return [(one.sequence, one.what) for one in history.problems()]


def test_kafka_and_trail_of_one_history_agree() -> None:
    source = ordinary()
    assert kafka_problems(report_of(source), source.documents + acknowledged(source).documents) == []


def test_trail_that_was_cut_is_found_by_kafka() -> None:
    source = ordinary()
    [(sequence, what)] = kafka_problems(report_of(source, 5), source.documents)
    assert (sequence, "cut at its end" in what) == (6, True)
    [(sequence, what)] = kafka_problems(Report((), ()), source.documents)
    assert (sequence, "the trail does not" in what) == (1, True)


def test_kafka_that_lost_entries_is_found_by_the_trail() -> None:
    source = ordinary()
    [(sequence, what)] = kafka_problems(report_of(source), source.documents[:5])
    assert (sequence, "Kafka lost entries" in what) == (6, True)


def test_what_a_service_adds_while_kafka_is_read_is_no_finding() -> None:
    source = ordinary()
    size = len(source.entries)
    for report, read in ((report_of(source, 4), 6), (report_of(source, 4), 4), (Report((), ()), 6)):
        history = KafkaHistory(CLUSTER, "node-a", trust(), report)
        for offset, encoded in enumerate(source.documents[:read]):
            history.feed(encoded, f"shop.audit/0/{offset}")
        assert not history.lacks
        assert history.problems({CHAIN: (size, source.entries[-1].entry_hash)}) == []
    history = KafkaHistory(CLUSTER, "node-a", trust(), report_of(source, 4))
    history.feed(source.documents[0], "shop.audit/0/0")
    assert history.lacks
    [lost] = history.problems({CHAIN: (size, source.entries[-1].entry_hash)})
    assert (lost.sequence, "Kafka lost entries" in lost.what) == (2, True)


def test_trail_of_another_history_is_found_by_kafka() -> None:
    source, other = built(["batch", "batch"]), built(["batch", "note"])
    [(sequence, what)] = kafka_problems(report_of(other), source.documents)
    assert (sequence, "another entry" in what) == (3, True)


def test_altered_record_in_kafka_is_one_finding() -> None:
    source = ordinary()
    documents = source.documents
    documents[4] = documents[4][:-1] + bytes([documents[4][-1] ^ 1])
    [(_, what)] = kafka_problems(report_of(source), documents)
    assert "shop.audit/0/4" in what
    [(_, what)] = kafka_problems(report_of(source), [*source.documents, b"garbage"])
    assert what.startswith("shop.audit/0/11: not a signed document")


def _acknowledging(count: int) -> list[Prepared]:
    """A chain of acknowledgements: its opening and some entries."""
    writer = ChainWriter(B, CLUSTER, ACKS, EMPTY_HEAD, incarnation(1))
    made = [writer.open_epoch(lsn=1, system_identifier="1", timeline=1, source_node_id="node-a")]
    writer.commit(made[0].entry_hash)
    for number in range(1, count + 1):
        at = {"batch_lsn_start": number, "batch_lsn_end": number}
        made.append(writer.next(event_type=OPERATOR_ACTION, source_node_id="node-a", **at))
        writer.commit(made[-1].entry_hash)
    return made


def test_acknowledgements_published_twice_after_an_unknown_delivery_are_no_fork() -> None:
    """The broker had taken the first copy, which its writer could not see when it sent the second."""
    made = _acknowledging(4)
    reader = ChainReader(CLUSTER, ACKS, "node-b", trust())
    for one in (*made, *made[1:], *made[2:]):
        assert reader.accept(one.encoded, "audit/0/1") is not None
    assert reader.head.entry_hash == made[-1].entry_hash


def test_another_acknowledgement_in_a_place_that_is_taken_is_a_fork() -> None:
    made = _acknowledging(3)
    reader = ChainReader(CLUSTER, ACKS, "node-b", trust())
    for one in made:
        reader.accept(one.encoded, "audit/0/1")
    other = replace(made[2].entry, batch_lsn_start=77, batch_lsn_end=77)
    with pytest.raises(ChainError, match="fork"):
        reader.accept(sign_document(B, AUDIT_ENTRY, other.encode()), "audit/0/9")
