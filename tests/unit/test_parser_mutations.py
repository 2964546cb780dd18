"""Valid input of every parser, mutated: an error of ours or a value, never anything else, never without end.

The parsers and what they are given to begin with are those of tests/fuzz/parsers.py, where a fuzzer guided by
coverage takes them further.
"""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.parsers import PARSERS, REFUSALS, check
from tests.unit import sealed_chain
from vsql_shared.crypto.announce import decode_announcement, unwrap
from vsql_shared.errors import KeyUnavailableError

# Numbers that lengths, counts, positions and Avro's varints go wrong at.
EXTREMES = [
    b"\0",
    b"\x01",
    b"\x7f",
    b"\x80",
    b"\xff",
    b"\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\x80\0\0\0",
    b"\xff\xff\xff\xff",
    b"\xff\xff\xff\xfe",
    b"\x7f" + b"\xff" * 7,
    b"\x80" + bytes(7),
    b"\xff" * 8,
    b"\xff" * 9 + b"\x01",
    b"\xff" * 4 + b"\x0f",
    b"\x80" * 9 + b"\x01",
    b"\xff" * 20,
]
MEGABYTE = 1 << 20


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """One of the seeds after one to five mutations: flip, set, cut, insert, drop, repeat, splice, swap."""
    out = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 5))):
        at, other = (draw(st.integers(0, len(out))) for _ in range(2))
        low, high = min(at, other), max(at, other)
        match draw(st.sampled_from(["flip", "set", "cut", "insert", "extreme", "drop", "repeat", "splice"])):
            case "flip" if low < len(out):
                out[low] ^= 1 << draw(st.integers(0, 7))
            case "set" if low < len(out):
                out[low] = draw(st.integers(0, 255))
            case "cut":
                del out[low:]
            case "insert":
                out[low:low] = draw(st.binary(max_size=9))
            case "extreme":
                number = draw(st.sampled_from(EXTREMES))
                out[low : low + len(number)] = number
            case "drop":
                del out[low:high]
            case "repeat":
                out[high:high] = out[low:high] * draw(st.integers(1, 3))
            case "splice":
                donor = draw(st.sampled_from(seeds))
                out[low:high] = donor[draw(st.integers(0, len(donor))) :]
            case _:
                continue
    return bytes(out)


@pytest.mark.parametrize("name", PARSERS)
def test_every_parser_accepts_what_it_is_given_to_begin_with(name: str) -> None:
    for seed in PARSERS[name].seeds():
        PARSERS[name].run(seed)


# Those of the consumer read a whole chain each time: a hundredth of a second, not of a millisecond.
EXAMPLES = {"consumer": 150, "signed": 150, "walsender": 300}


@pytest.mark.parametrize("name", PARSERS)
def test_mutated_input_is_refused_by_our_error_or_means_what_it_says(name: str) -> None:
    parser = PARSERS[name]

    @settings(
        max_examples=EXAMPLES.get(name, 600), deadline=5_000, suppress_health_check=[HealthCheck.too_slow]
    )
    @given(mutated(list(parser.seeds())))
    def run(data: bytes) -> None:
        check(parser, data)

    run()


@pytest.mark.parametrize("name", PARSERS)
def test_every_truncation_of_valid_input_is_an_error_of_ours_or_valid_itself(name: str) -> None:
    parser = PARSERS[name]
    shortest = min(parser.seeds(), key=len)
    refused = sum(not check(parser, shortest[:size]) for size in range(len(shortest)))
    assert refused > len(shortest) // 2


def test_a_wrapping_of_a_version_with_thousands_of_digits_is_refused() -> None:
    announcement = decode_announcement(PARSERS["announcement"].seeds()[0])
    with pytest.raises(KeyUnavailableError, match="does not hold"):
        unwrap(replace(announcement, kek_id="test-kek/" + "9" * 5_000), sealed_chain.kek())


@pytest.mark.parametrize("filler", [b"\0", b"\x01", b"\x02", b"\x7f", b"\x80", b"\xff", b"[", b"\x02a"])
@pytest.mark.parametrize("name", PARSERS)
def test_a_megabyte_of_anything_costs_little_time_and_memory(name: str, filler: bytes) -> None:
    parser = PARSERS[name]
    # Two bytes make a frame there, and a frame is 25 bytes before its message.
    size = MEGABYTE // 16 if name == "walsender" else MEGABYTE
    seed = parser.seeds()[0]
    parser.run(seed)  # what is made once is not counted
    for begin in (b"", seed[: len(seed) // 2], seed):
        data = begin + filler * (size // len(filler))
        tracemalloc.start()
        started = time.process_time()
        try:
            parser.run(data)
        except REFUSALS:
            pass
        finally:
            took, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert took < 20, f"{took:.1f} s for a megabyte"
        assert peak < 300 * MEGABYTE, f"{peak / MEGABYTE:.0f} MB for a megabyte"
