"""Logical messages and sequences: their bytes, and what is said of a sequence, under any history."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.unit.test_pgoutput_transactions import begin, commit, describe, frame, relation, row
from vsql_consumers.render import changes
from vsql_consumers.signals import must_set
from vsql_producers.sequence_state import Look, Sequence
from vsql_producers.transactions import MESSAGE_KEY, Descriptor, Messages, Run, Transactions
from vsql_shared.changes import MESSAGES, SEQUENCES, Op, OpenedBatch, Relation, TableName, Transaction
from vsql_shared.errors import DecodeError, DivergedError
from vsql_shared.wire.signals import (
    LogicalMessage,
    SequenceState,
    SequenceValue,
    decode_message,
    decode_sequence,
    encode_message,
    encode_sequence,
)

NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
BIGINT = st.integers(-(2**63), 2**63 - 1)
NAME = TableName("public", "s")
CARRIED = Messages(frozenset({"app", "x"}), Descriptor(MESSAGES, b"m", b"hash"))


def said(prefix: str, content: bytes, at: int, *, transactional: bool) -> bytes:
    return frame(b"M" + encode_message(LogicalMessage(transactional, at, prefix, content)), lsn=at)


def feed(*frames: bytes, resume: int = 0, confirmed: int | None = None) -> list[Run]:
    return Transactions(describe, resume, confirmed, CARRIED).feed(list(frames))


def contents(run: Run) -> list[str]:
    return [decode_message(f[30:]).content.decode() if f[25:26] == b"M" else "row" for f in run.frames]


# Bytes


@given(st.booleans(), st.integers(0, 2**64 - 1), st.text(st.characters(exclude_characters="\0")), st.binary())
def test_a_message_comes_back_as_it_was(transactional: bool, at: int, prefix: str, content: bytes) -> None:
    message = LogicalMessage(transactional, at, prefix.encode(errors="ignore").decode(), content)
    assert decode_message(encode_message(message)) == message


@given(st.lists(NAMES, min_size=3, max_size=3) | st.just([]), BIGINT, BIGINT, st.booleans())
def test_a_sequence_comes_back_as_it_was(owner: list[str], value: int, step: int, called: bool) -> None:
    owner = [part.encode(errors="ignore").decode() for part in owner]
    one = SequenceValue(NAME, tuple(owner), step or 1, value, called, SequenceState.UNSURE)
    assert decode_sequence(encode_sequence(one)) == one


@given(st.binary(max_size=80))
def test_garbage_is_our_error(data: bytes) -> None:
    for decode in (decode_message, decode_sequence):
        try:
            decode(data)
        except DecodeError:
            continue


@pytest.mark.parametrize("cut", range(1, 20))
def test_what_is_cut_off_or_has_bytes_left_over_is_refused(cut: int) -> None:
    message = encode_message(LogicalMessage(True, 7, "app", b"content"))
    value = encode_sequence(SequenceValue(NAME, (), 1, 300, True))
    for whole, decode in ((message, decode_message), (value, decode_sequence)):
        for data in (whole[:-cut], whole + b"\0" * cut):
            with pytest.raises(DecodeError):
                decode(data)


@pytest.mark.parametrize(
    "change",
    [{"increment": 0}, {"owner": ("only", "two")}, {"owner": ("public", "t\0", "id")}],
)
def test_a_sequence_s_value_that_makes_no_sense_is_refused(change: dict[str, object]) -> None:
    value = SequenceValue(NAME, (), 1, 5, True)._replace(**change)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(DecodeError):
        decode_sequence(encode_sequence(value))


# Messages in the stream


def test_a_message_keeps_its_place_among_the_rows() -> None:
    (run,) = feed(
        begin(100), relation(1), row(1), said("app", b"one", 60, transactional=True), row(1),
        said("other", b"no", 80, transactional=True), said("x", b"two", 90, transactional=True), commit(100),
    )  # fmt: skip
    assert contents(run) == ["row", "one", "row", "two"]
    assert [(change.position, change.key) for change in run.relations][1] == (1, MESSAGE_KEY)
    assert run.frames[1][25] == Op.MESSAGE


def test_nothing_is_carried_where_no_prefix_was_named() -> None:
    frames = [begin(100), said("app", b"m", 60, transactional=True), commit(100)]
    assert Transactions(describe, 0).feed([*frames, said("app", b"m", 200, transactional=False)]) == []


def test_a_message_alone_is_a_transaction_that_ends_where_its_record_ends() -> None:
    one, two = feed(
        said("app", b"alone", 1000, transactional=False), begin(1000), relation(1), row(1), commit(1000)
    )
    assert (one.transaction.commit_lsn, one.end_lsn, contents(one)) == (999, 1000, ["alone"])
    assert one.transaction.commit_lsn < two.transaction.commit_lsn


def test_a_commit_that_begins_where_a_message_ends_is_not_taken_for_sent() -> None:
    """The chain ends with the message; the slot was not told. Both come again, and only the row is new."""
    again = [said("app", b"alone", 1000, transactional=False), begin(1000), relation(1), row(1), commit(1000)]
    (run,) = feed(*again, resume=1000, confirmed=500)
    assert contents(run) == ["row"]


def test_a_chain_that_ends_with_a_message_the_wal_lacks_is_diverged() -> None:
    with pytest.raises(DivergedError):
        feed(said("app", b"later", 2000, transactional=False), resume=1000, confirmed=500)


def test_a_chain_s_end_that_the_wal_went_past_without_is_diverged_before_anything_is_confirmed() -> None:
    transactions = Transactions(describe, 1000, 500, CARRIED)
    transactions.feed([begin(700), relation(1), row(1), commit(700)])
    transactions.require_met(999)
    with pytest.raises(DivergedError):
        transactions.require_met(1000)
    transactions.feed([begin(992), row(1), commit(992)])
    transactions.require_met(2000)


@pytest.mark.parametrize("inside", [True, False])
def test_a_message_on_the_wrong_side_of_a_transaction_is_refused(inside: bool) -> None:
    message = said("app", b"m", 60, transactional=not inside)
    with pytest.raises(DecodeError):
        feed(*([begin(100), message] if inside else [message]))


def test_tail_shows_messages_and_sequences() -> None:
    batch = OpenedBatch("c", 1, 1, 1, b"", 0, 9, 3, b"", continues=False)
    batch.transactions = [Transaction(0, 8, 0)]
    batch.relations = {b"m": Relation(MESSAGES, "n", ()), b"s": Relation(SEQUENCES, "n", ())}
    batch.tx_of, batch.ops = [0] * 3, [Op.MESSAGE, Op.MESSAGE, Op.SEQUENCE]
    batch.relation_of = [b"m", b"m", b"s"]
    batch.plaintexts = [
        encode_message(LogicalMessage(False, 9, "app", b"text")),
        encode_message(LogicalMessage(True, 9, "app", b"\xff")),
        encode_sequence(SequenceValue(NAME, (), -1, 5, True)),
    ]
    text, octets, sequence = changes(batch)
    assert (text["content"], text["transactional"], "table" in text) == ("text", False, False)
    assert octets["content"] == {"base64": "/w=="}
    assert (sequence["sequence"], sequence["last_value"]) == ("public.s", 5)


# What is said of a sequence


@pytest.mark.parametrize(
    ("step", "value", "called", "reached", "wanted"),
    [
        (1, 5, True, 4, True),
        (1, 5, True, 5, False),
        (1, 5, True, 6, False),
        (-1, -5, True, -4, True),
        (-1, -5, True, -6, False),
        (1, 5, True, None, True),
        (1, 5, False, None, True),
        (1, 5, False, 1, False),
    ],
)
def test_a_sequence_is_set_forward_only(
    step: int, value: int, called: bool, reached: int | None, wanted: bool
) -> None:
    assert must_set(SequenceValue(NAME, (), step, value, called), reached) is wanted


def test_a_sequence_that_was_set_back_stands_until_what_used_it_is_sent() -> None:
    one = Sequence(NAME, ())
    looks = [
        # (value, position of the look, where the stream stands) → said
        (Look(1, 10, True, 100), 50, (10, SequenceState.UNSURE)),
        (Look(1, 10, True, 110), 105, (10, SequenceState.UNSURE)),
        (Look(1, 10, True, 115), 110, None),
        (Look(1, 20, True, 120), 115, (20, SequenceState.AHEAD)),
        (Look(1, 1, False, 130), 120, (20, SequenceState.UNSURE)),
        (Look(1, 3, True, 140), 125, (20, SequenceState.UNSURE)),
        (Look(1, 4, True, 150), 130, (4, SequenceState.SET_BACK)),
        (Look(1, 4, True, 160), 150, None),
        (Look(1, 5, True, 170), 160, (5, SequenceState.AHEAD)),
    ]
    for look, sent, wanted in looks:
        value = one.look(look, sent)
        assert (None if value is None else (value.last_value, value.state)) == wanted


def test_a_sequence_that_is_locked_is_unsure_and_what_stands_is_not_changed_by_that() -> None:
    one = Sequence(NAME, ())
    began = one.unseen(2, 7)
    assert (began.increment, began.last_value, began.is_called, began.state) == (
        2, 7, False, SequenceState.UNSURE,
    )  # fmt: skip
    one.look(Look(1, 10, True, 100), 100)
    stands = one.unseen(1, 1)
    assert (stands.last_value, stands.is_called, stands.state) == (10, True, SequenceState.UNSURE)
    assert one.look(Look(1, 10, True, 120), 110) is None


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[tuple[str, int]]]:
    """A direction, and what happened: rows that took a number, set backs, looks by a producer that lags."""
    step = draw(st.sampled_from([1, 3, -1]))
    kinds = st.sampled_from(["row", "row", "row", "skip", "back", "look", "restart"])
    return step, draw(st.lists(st.tuples(kinds, st.integers(0, 12)), max_size=60))


@given(histories())
@example((1, [("row", 0), ("back", 1), ("look", 0)]))
@example((1, [("row", 0), ("back", 2), ("look", 2), ("row", 0), ("look", 0)]))
def test_no_row_is_beyond_what_the_target_was_told_but_where_it_looks_itself(
    history: tuple[int, list[tuple[str, int]]],
) -> None:
    """The target applies the stream as far as each look was sent with; then its sequence covers its rows.

    Where a value is unsure the target takes the end of its own rows, as the consumer does.
    """
    step, events = history
    value, wal = 0, 0
    rows: list[tuple[int, int]] = []  # position of the commit, number it used
    one, target = Sequence(NAME, ()), 0
    for kind, amount in events:
        wal += 10
        if kind == "row":
            value += step
            rows.append((wal, value))
        elif kind == "skip":
            value += step * amount
        elif kind == "back":
            # Rows beyond it stay, as after a setval; a TRUNCATE only takes some away.
            value -= step * amount
        elif kind == "restart":
            one = Sequence(NAME, ())
        else:
            sent = max(0, wal - amount * 10)
            applied = [number for position, number in rows if position < sent]
            told = one.look(Look(step, value, True, wal), sent)
            if told is None:
                continue
            if told.state is SequenceState.SET_BACK:
                target = told.last_value
                rows = [(position, number) for position, number in rows if position >= sent]
                continue
            ends = [told.last_value]
            if told.state is SequenceState.UNSURE:
                ends += applied
            target = max([target, *ends], key=lambda number: number * step)
            assert all((target - number) * step >= 0 for number in applied)
