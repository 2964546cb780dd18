"""Questions about time and their answers, and what chrony says of a host's clock, for parsers.py."""

from __future__ import annotations

from vsql_shared.clocks.exchange import Answer, Question
from vsql_shared.clocks.host import parse_chrony

_CHRONY = b"Reference ID    : A9FEA97B (x)\nStratum : 4\nRoot delay : 0.1 seconds\nLeap status : Normal\n"
_NONCE = bytes(range(16))


def question(data: bytes) -> None:
    """As it lies in a signed document."""
    assert Question.decode(data).encode() == data


def questions() -> list[bytes]:
    """The shortest and an ordinary one."""
    return [Question("", "", "", _NONCE).encode(), Question("c", "node-a", "node-b", _NONCE).encode()]


def answer(data: bytes) -> None:
    """As it lies in a signed document."""
    assert Answer.decode(data).encode() == data


def answers() -> list[bytes]:
    """An ordinary one, and one whose times are at the ends."""
    return [
        Answer("c", "node-a", "node-b", _NONCE, 1_760_000_000_000_000, 1_760_000_000_000_005).encode(),
        Answer("c", "node-a", "node-b", _NONCE, 2**63 - 1, -(2**63)).encode(),
    ]


def host(data: bytes) -> None:
    """What chrony prints; the others' output has no end that could be missing."""
    found = parse_chrony(data.decode(errors="replace"))
    assert bool(found.why) is not found.synchronised


def hosts() -> list[bytes]:
    """What it prints, shortened."""
    return [_CHRONY]
