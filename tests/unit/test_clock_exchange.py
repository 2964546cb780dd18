"""Questions and answers about time: what follows is never more than what is true; nothing counts twice."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.audit_history import A, B, signer, trust
from vsql_shared.audit.dsse import SignedDocument, open_document, sign_document
from vsql_shared.clocks import exchange
from vsql_shared.clocks.exchange import Answer, Answerer, Asker, Measure, Question, Reading
from vsql_shared.errors import DecodeError, SignatureError

NOW = 1_760_000_000_000_000
NONCE, OTHER = b"n" * 16, b"o" * 16
ASKED = Question("shop", "node-a", "node-b", NONCE)
SAID = Answer("shop", "node-a", "node-b", NONCE, NOW, NOW + 5)


def at(time_us: int, seconds: float, took: float = 0.0) -> Reading:
    """A reading of a database's clock that came back `took` seconds after it was asked for."""
    return Reading(time_us, seconds, seconds + took)


def asker(*, every: float = 30.0) -> Asker:
    found = Asker("shop", "node-a", every)
    found.know(["node-b", "node-c"])
    return found


@given(
    offset=st.integers(-(10**12), 10**12),
    there=st.integers(0, 900_000),
    stayed=st.integers(0, 5_000_000),
    back=st.integers(0, 900_000),
)
def test_the_truth_is_never_farther_from_the_offset_than_the_uncertainty(
    offset: int, there: int, stayed: int, back: int
) -> None:
    """However whoever holds Kafka spreads the time over the two ways."""
    t2 = NOW + there + offset
    end = there + stayed + back
    found = exchange.measure(at(NOW, 0.0), t2, t2 + stayed, at(NOW + end, end / 1e6))
    assert abs(found.offset_us - offset) <= found.uncertainty_us
    assert found.uncertainty_us <= (there + back) // 2 + 1
    assert found.surely_us <= abs(offset)


JUMPED = {
    "our clock was set forward meanwhile": (at(NOW, 0.0), NOW, NOW, at(NOW + 5_000_000, 0.1)),
    "our clock was set back meanwhile": (at(NOW, 0.0), NOW, NOW, at(NOW - 1_000_000, 0.1)),
    "our clock was set back a little while the answer took long": (at(NOW, 0), NOW, NOW, at(NOW, 0.3)),
    "the answerer's clock went back": (at(NOW, 0.0), NOW, NOW - 1, at(NOW + 100_000, 0.1)),
    "the answerer's clock was set forward": (at(NOW, 0.0), NOW, NOW + 900_000, at(NOW + 100_000, 0.1)),
    "a way of more than two seconds": (at(NOW, 0.0), NOW, NOW, at(NOW + 2_100_000, 2.1)),
    "no time": (at(NOW, 0.0), -1, -1, at(NOW + 100_000, 0.1)),
    "a time that no column holds": (at(NOW, 0.0), 2**63 - 1, 2**63 - 1, at(NOW + 100_000, 0.1)),
}


@pytest.mark.parametrize("name", JUMPED)
def test_an_exchange_in_which_a_clock_jumped_or_that_took_long_says_nothing(name: str) -> None:
    with pytest.raises(DecodeError):
        exchange.measure(*JUMPED[name])


def test_a_database_that_is_far_away_is_measured_all_the_same() -> None:
    """Its clock is read somewhere within the round trip: that is no jump."""
    found = exchange.measure(at(NOW, 0.0, 0.08), NOW + 60_000, NOW + 60_000, at(NOW + 120_000, 0.05, 0.08))
    assert found == Measure(0, 60_001)


@pytest.mark.parametrize(
    ("offset_ms", "uncertainty_ms", "state"),
    [
        (0, 1, "ok"), (100, 0, "ok"), (101, 0, "warning"), (-101, 0, "warning"), (150, 60, "ok"),
        (1000, 0, "warning"), (1001, 0, "error"), (-1500, 400, "error"), (1500, 600, "warning"),
        (900, 900, "ok"),
    ],
)  # fmt: skip
def test_a_state_is_what_is_sure(offset_ms: int, uncertainty_ms: int, state: str) -> None:
    assert exchange.state_of(Measure(offset_ms * 1000, uncertainty_ms * 1000), 100, 1000) == state


def test_an_answer_is_taken_once_and_only_of_who_was_asked() -> None:
    one = asker()
    one.ask("node-b", NONCE, at(NOW, 0.0))
    later = at(NOW + 1000, 0.001)
    for wrong in (
        dataclasses.replace(SAID, nonce=OTHER),
        dataclasses.replace(SAID, answerer="node-c"),
        dataclasses.replace(SAID, answerer="node-x"),
    ):
        with pytest.raises(DecodeError, match="nobody waits for"):
            one.take(wrong, later)
    assert one.take(SAID, later).uncertainty_us < 1000
    with pytest.raises(DecodeError, match="nobody waits for"):  # recorded, and played again
        one.take(SAID, later)


def test_an_answer_to_an_earlier_question_does_not_count() -> None:
    one = asker()
    one.ask("node-b", NONCE, at(NOW, 0.0))
    one.ask("node-b", OTHER, at(NOW + 30_000_000, 30.0))
    with pytest.raises(DecodeError, match="nobody waits for"):
        one.take(SAID, at(NOW + 30_001_000, 30.001))


def test_an_answer_that_is_worth_nothing_cannot_be_tried_again() -> None:
    one = asker()
    one.ask("node-b", NONCE, at(NOW, 0.0))
    with pytest.raises(DecodeError, match="under way"):
        one.take(SAID, at(NOW + 5_000_000, 5.0))
    with pytest.raises(DecodeError, match="nobody waits for"):
        one.take(SAID, at(NOW + 1000, 0.001))
    assert one.unanswered("node-b") == 1


def test_each_peer_is_asked_once_an_interval_and_one_that_is_gone_ever_less() -> None:
    one = asker(every=10.0)
    assert one.due(0.0) == ["node-b", "node-c"]
    asked = {"node-b": 0, "node-c": 0}
    for second in range(3600):
        for peer in one.due(float(second)):
            nonce = second.to_bytes(8, "big") + peer.encode()
            one.ask(peer, nonce, at(NOW + second * 1_000_000, float(second)))
            asked[peer] += 1
            if peer == "node-b":
                said = dataclasses.replace(SAID, nonce=nonce)
                one.take(said, at(NOW + second * 1_000_000 + 500, second + 0.0005))
    assert asked["node-b"] == 360
    assert asked["node-c"] == 5 + 3600 // 160 - 1  # 0, 10, 30, 70, 150, then each 160 s
    assert one.due(3600.0) == ["node-b"]
    one.heard("node-c", 3600.0)
    assert one.due(3600.0) == ["node-b", "node-c"], "a node that asks is there again"


def test_a_node_that_is_heard_of_is_not_asked_more_often_than_it_is_due() -> None:
    one = asker(every=10.0)
    one.ask("node-b", NONCE, at(NOW, 0.0))
    for _ in range(100):
        one.heard("node-b", 1.0)
    assert one.due(1.0) == ["node-c"]


def test_whoever_is_no_peer_any_more_is_not_asked() -> None:
    one = asker()
    one.ask("node-b", NONCE, at(NOW, 0.0))
    one.know(["node-c"])
    assert one.due(100.0) == ["node-c"]
    with pytest.raises(DecodeError):
        one.take(SAID, at(NOW + 1000, 0.001))


def test_a_question_is_answered_once_and_a_flood_once_a_second() -> None:
    one = Answerer("shop", "node-b")
    one.take(ASKED, 0.0)
    with pytest.raises(DecodeError, match="before"):  # played again by whoever holds Kafka
        one.take(ASKED, 100.0)
    answered = 0
    for tick in range(1000):
        question = dataclasses.replace(ASKED, nonce=tick.to_bytes(16, "big"))
        try:
            one.take(question, 200 + tick / 100)
        except DecodeError:
            continue
        answered += 1
    assert answered == 10
    one.take(Question("shop", "node-c", "node-b", OTHER), 200.0)  # others are not kept out by it


NOT_OURS = {
    "another cluster": dataclasses.replace(ASKED, cluster="other"),
    "meant for another node": dataclasses.replace(ASKED, answerer="node-c"),
    "of a node nobody added": dataclasses.replace(ASKED, asker="node-x"),
    "of ourselves": dataclasses.replace(ASKED, asker="node-b"),
    "an answer to another node": Answer("shop", "node-c", "node-a", NONCE, NOW, NOW),
}


@pytest.mark.parametrize("name", NOT_OURS)
def test_what_is_between_others_is_passed_over(name: str) -> None:
    with pytest.raises(DecodeError, match="not meant"):
        exchange.require_ours(NOT_OURS[name], "shop", "node-b", ("node-a",))


def test_who_must_have_signed_is_who_asks_or_who_answers() -> None:
    assert exchange.require_ours(ASKED, "shop", "node-b", ("node-a",)) == "node-a"
    assert exchange.require_ours(SAID, "shop", "node-a", ("node-b",)) == "node-b"


def test_a_signature_of_another_node_or_for_another_kind_does_not_count() -> None:
    as_a = sign_document(A, exchange.QUESTION, ASKED.encode())
    assert open_document(trust(), "node-a", as_a, exchange.QUESTION) == ASKED.encode()
    with pytest.raises(SignatureError):
        open_document(trust(), "node-b", as_a, exchange.QUESTION)
    with pytest.raises(DecodeError):
        open_document(trust(), "node-a", as_a, exchange.ANSWER)
    relabelled = dataclasses.replace(SignedDocument.decode(as_a), payload_type=exchange.ANSWER)
    with pytest.raises(SignatureError):
        open_document(trust(), "node-a", relabelled.encode(), exchange.ANSWER)
    with pytest.raises(SignatureError):
        open_document(trust(A, B, revoked=[A]), "node-a", as_a, exchange.QUESTION)
    stranger = sign_document(signer("node-a", "stolen name"), exchange.QUESTION, ASKED.encode())
    with pytest.raises(SignatureError):
        open_document(trust(), "node-a", stranger, exchange.QUESTION)


@given(st.binary(max_size=200))
def test_garbage_is_no_message(data: bytes) -> None:
    for kind in (Question, Answer):
        try:
            kind.decode(data)
        except DecodeError:
            continue
        assert kind.decode(data).encode() == data


BROKEN = {
    "nothing": b"",
    "cut": ASKED.encode()[:-1],
    "more behind it": ASKED.encode() + b"\0",
    "another format": b"\x04" + ASKED.encode()[1:],
    "a padded length": ASKED.encode().replace(b"\x08shop", b"\x88\x00shop"),
    "an answer": SAID.encode(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_a_question_is_refused(name: str) -> None:
    with pytest.raises(DecodeError):
        Question.decode(BROKEN[name])


def test_bytes_that_are_kept() -> None:
    """Another version reads them."""
    assert ASKED.encode().hex() == "020873686f700c6e6f64652d610c6e6f64652d62" + "6e" * 16
    assert SAID.encode().hex() == (
        "020873686f700c6e6f64652d610c6e6f64652d62" + "6e" * 16 + "8080f0ecbdada0068a80f0ecbdada006"
    )
