"""Questions about time and their answers, and what a host's programs say of its clock, for parsers.py."""

from __future__ import annotations

from vsql_shared.clocks.exchange import Answer, Question
from vsql_shared.clocks.host import parse_chrony, parse_timedatectl, parse_timesync
from vsql_shared.errors import DecodeError

_CHRONY = b"Reference ID    : A9FEA97B (x)\nStratum : 4\nRoot delay : 0.1 seconds\nLeap status : Normal\n"
_TIMESYNC = b"ServerName=x\nNTPMessage={ Leap=0, Stratum=2, Ignored=no, PacketCount=1 }\n"
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
    """By each of the three; the first that takes it says something of it."""
    text = data.decode(errors="replace")
    for parse in (parse_chrony, parse_timesync):
        try:
            found = parse(text)
        except DecodeError:
            continue
        assert bool(found.why) is not found.synchronised
    parse_timedatectl(text + "\nNTPSynchronized=yes")


def hosts() -> list[bytes]:
    """What they print."""
    return [_CHRONY, _TIMESYNC]
