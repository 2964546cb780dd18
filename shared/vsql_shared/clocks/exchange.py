"""One node asks another one for the time: questions, answers, and what follows from the four times. Pure.

    T1  asker's database, before the question is signed and sent
    T2  answerer's database, after the question was read      }  signed by the answerer,
    T3  answerer's database, before the answer is signed      }  with the question's nonce
    T4  asker's database, after the answer was read

Not here: who sends them and reads the clocks (keeper.py). Rules:

* What lies between T1 and T2, or T3 and T4, Kafka and whoever holds it included, can only be slow. However
  the time is spread over the two ways, the truth is at most the uncertainty from the offset: a slow way makes
  the answer worth less, never wrong.
* A question is answered once, an answer taken once: the nonce is random, and forgotten with the first answer
  or with the next question. So nothing that was recorded can be played again.
* T1 and T4 are never on the wire: an answer cannot change when it was asked.
* A measure with more uncertainty than `MOST_UNCERTAIN_US` is none; one in which a clock jumped neither.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, Self

import fastavro

from vsql_shared.errors import DecodeError
from vsql_shared.wire.pack import schema

FORMAT = 1
QUESTION = "application/vnd.vsql-sync.clock-question.v1+avro"
ANSWER = "application/vnd.vsql-sync.clock-answer.v1+avro"
NONCE_SIZE = 16
MAX_SIZE = 4096
"""Bytes of a whole signed document; they have some hundreds."""
MOST_UNCERTAIN_US = 1_000_000
MOST_BACKED_OFF = 16
"""How many intervals lie between questions to a node that does not answer, at most."""
LEAST_REST_SECONDS = 1.0
"""Between two answers to one node, whatever it asks."""

State = Literal["ok", "warning", "error"]

_MAX_LONG = (1 << 63) - 1
# A clock that is counted on by the other within an exchange: 500 ppm, or what chrony slews at most.
_SLEWED, _READ_US = 0.1, 2_000


@dataclass(frozen=True, slots=True)
class _Message:
    """What both have."""

    cluster: str
    asker: str
    answerer: str
    nonce: bytes

    def encode(self) -> bytes:
        """Canonical Avro."""
        out = io.BytesIO()
        fastavro.schemaless_writer(out, schema(self.schema_name()), {"format": FORMAT, **asdict(self)})
        return out.getvalue()

    @staticmethod
    def schema_name() -> str:
        raise NotImplementedError

    @classmethod
    def decode(cls, encoded: bytes) -> Self:
        """Raises DecodeError: garbage, trailing bytes, not canonical, of another format."""
        try:
            raw: Any = fastavro.schemaless_reader(io.BytesIO(encoded), schema(cls.schema_name()), None)
        except Exception as error:  # fastavro raises many types on garbage; all mean the same here
            raise DecodeError(f"not a {cls.schema_name()}: {type(error).__name__}") from error
        found = raw.pop("format")
        if found != FORMAT:
            raise DecodeError(f"{cls.schema_name()} of format {found}, expected {FORMAT}")
        message = cls(**raw)
        if message.encode() != encoded:
            raise DecodeError(f"{cls.schema_name()} is not in its canonical encoding")
        return message


@dataclass(frozen=True, slots=True)
class Question(_Message):
    """`asker` wants to know the time of `answerer`."""

    @staticmethod
    def schema_name() -> str:
        """Of schemas/avro."""
        return "clock_question"


@dataclass(frozen=True, slots=True)
class Answer(_Message):
    """The answerer's two times, µs since 1970."""

    received_at: int
    sent_at: int

    @staticmethod
    def schema_name() -> str:
        """Of schemas/avro."""
        return "clock_answer"


class Reading(NamedTuple):
    """What a database's clock said, µs since 1970, and between which seconds of a clock nobody sets."""

    time_us: int
    before: float
    after: float


class Measure(NamedTuple):
    """The answerer's clock minus the asker's, µs; the truth is at most `uncertainty_us` from it."""

    offset_us: int
    uncertainty_us: int

    @property
    def surely_us(self) -> int:
        """How far the clocks are apart at least, in either direction."""
        return max(0, abs(self.offset_us) - self.uncertainty_us)


def measure(first: Reading, t2: int, t3: int, last: Reading) -> Measure:
    """What follows from an exchange. Raises DecodeError: a clock jumped meanwhile, or too little follows."""
    t1, t4 = first.time_us, last.time_us
    there, here = t3 - t2, t4 - t1
    if there < 0 or not 0 <= t2 <= t3 <= _MAX_LONG // 2:
        raise DecodeError("the times of an answer go back, or are none")
    least, most = (last.before - first.after) * 1e6, (last.after - first.before) * 1e6
    if not least * (1 - _SLEWED) - _READ_US <= here <= most * (1 + _SLEWED) + _READ_US:
        raise DecodeError("the clock of this node's database was set while it waited for an answer")
    if there > here:
        raise DecodeError("an answer took longer there than here: a clock was set meanwhile")
    # Halves are rounded up: by a µs, which the offset may be rounded away from.
    uncertainty = (here - there) // 2 + 1
    if uncertainty > MOST_UNCERTAIN_US:
        raise DecodeError(f"an answer was under way for {(here - there) / 1e6:.1f} s: that tells nothing")
    return Measure(((t2 - t1) + (t3 - t4)) // 2, uncertainty)


def state_of(measured: Measure, warn_ms: int, error_ms: int) -> State:
    """'ok', 'warning' or 'error': by how far the clocks are apart for sure."""
    sure = measured.surely_us
    if sure > error_ms * 1000:
        return "error"
    return "warning" if sure > warn_ms * 1000 else "ok"


@dataclass(slots=True)
class _Peer:
    """What an asker knows of a node it asks."""

    due: float = float("-inf")
    unanswered: int = 0
    nonce: bytes | None = None
    asked: Reading = field(default_factory=lambda: Reading(0, 0.0, 0.0))


@dataclass(slots=True)
class Asker:
    """Whom to ask when, and which answers are ours. `now`: a clock nobody sets, in seconds."""

    cluster: str
    node: str
    every: float
    peers: dict[str, _Peer] = field(default_factory=dict)

    def know(self, peers: Iterable[str]) -> None:
        """These are all there are."""
        self.peers = {name: self.peers.get(name, _Peer()) for name in peers}

    def due(self, now: float) -> list[str]:
        """Whom to ask now."""
        return [name for name, one in self.peers.items() if now >= one.due]

    def ask(self, peer: str, nonce: bytes, t1: Reading) -> Question:
        """The question; an answer to an earlier one does not count any more."""
        one = self.peers[peer]
        one.nonce, one.asked = nonce, t1
        one.due = t1.before + self.every * min(2 ** min(one.unanswered, 16), MOST_BACKED_OFF)
        one.unanswered += 1
        return Question(self.cluster, self.node, peer, nonce)

    def heard(self, peer: str, now: float) -> None:
        """A node that asks us is there: it need not wait for its turn where it did not answer before."""
        one = self.peers[peer]
        if one.unanswered > 1:
            one.due, one.unanswered = min(one.due, now), 0

    def take(self, answer: Answer, t4: Reading) -> Measure:
        """What a verified answer says. Raises DecodeError: not asked for, taken before, or worth nothing."""
        one = self.peers.get(answer.answerer)
        if one is None or one.nonce is None or one.nonce != answer.nonce:
            raise DecodeError(f"an answer of node {answer.answerer} that nobody waits for")
        one.nonce = None
        found = measure(one.asked, answer.received_at, answer.sent_at, t4)
        one.unanswered = 0
        return found

    def unanswered(self, peer: str) -> int:
        """Questions since its last answer that was worth something."""
        return self.peers[peer].unanswered


@dataclass(slots=True)
class Answerer:
    """Which questions are answered: each once, and of one node one a second."""

    cluster: str
    node: str
    seen: deque[bytes] = field(default_factory=lambda: deque(maxlen=1024))
    last: dict[str, float] = field(default_factory=dict)

    def take(self, question: Question, now: float) -> None:
        """Raises DecodeError unless a verified question is to be answered now."""
        if question.nonce in self.seen:
            raise DecodeError(f"a question of node {question.asker} that was answered before")
        if now - self.last.get(question.asker, float("-inf")) < LEAST_REST_SECONDS:
            raise DecodeError(f"node {question.asker} asks too often")
        self.seen.append(question.nonce)
        self.last[question.asker] = now


def require_ours(message: _Message, cluster: str, node: str, peers: Iterable[str]) -> str:
    """The node that must have signed it. Raises DecodeError: of another cluster, or not meant for us."""
    asked = isinstance(message, Question)
    to, by = (message.answerer, message.asker) if asked else (message.asker, message.answerer)
    if message.cluster != cluster or to != node or by not in peers:
        raise DecodeError("a message about time that is not meant for this node")
    return by
