"""Columns that were taken out leave no byte in the row; what is no row is refused in words."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsql_producers.pgoutput import PLAINTEXT_AT
from vsql_producers.projection import Projection
from vsql_shared.errors import DecodeError

Value = bytes | str | None
HEAD = b"w" + bytes(24) + b"U" + b"\x00\x00\x40\x01"


def _tuple(kind: bytes, values: Sequence[Value]) -> bytes:
    """None is NULL, a str an unchanged value, bytes a value in binary."""
    out = kind + len(values).to_bytes(2, "big")
    for value in values:
        if value is None:
            out += b"n"
        elif isinstance(value, str):
            out += b"u"
        else:
            out += b"b" + len(value).to_bytes(4, "big") + value
    return out


def _row(*tuples: bytes) -> bytes:
    return HEAD + b"".join(tuples)


VALUES = st.one_of(st.none(), st.just("unchanged"), st.binary(max_size=40))


@given(st.lists(VALUES, min_size=1, max_size=8), st.sets(st.integers(0, 7)), st.booleans())
def test_what_is_kept_is_the_row_as_it_would_be_without_the_others(
    values: list[Value], kept: set[int], both: bool
) -> None:
    def whole(chosen: Sequence[Value]) -> bytes:
        return _row(*([_tuple(b"K", chosen)] if both else []), _tuple(b"N", chosen))

    left = [value for place, value in enumerate(values) if place in kept]
    assert Projection(len(values), kept)(whole(values)) == whole(left)


def test_no_byte_of_the_column_is_left() -> None:
    frame = _row(_tuple(b"O", [b"1", b"4111111111111111"]), _tuple(b"N", [b"2", b"5500005555555559"]))
    assert Projection(2, {0})(frame) == _row(_tuple(b"O", [b"1"]), _tuple(b"N", [b"2"]))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (b"", "without a tuple"),
        (b"X\x00\x02nn", "kind 88"),
        (b"N", "0 columns"),
        (b"N\x00\x01n", "1 columns"),
        (b"N\x00\x03nnn", "3 columns"),
        (b"N\x00\x02n", "kind 0"),
        (b"N\x00\x02nx", "kind 120"),
        (b"N\x00\x02nb\x00\x00\x00", "inside of a column"),
        (b"N\x00\x02nb\x00\x00\x00\x05abc", "inside of a column"),
        (b"N\x00\x02nnn", "kind 110"),
        (b"N\x00\x02nb\xff\xff\xff\xffabc", "inside of a column"),
    ],
)
def test_what_is_no_row_of_the_table_is_refused(row: bytes, said: str) -> None:
    with pytest.raises(DecodeError, match=said):
        Projection(2, {0})(HEAD + row)


@given(st.binary(max_size=60))
def test_garbage_is_refused_or_read_to_its_end(row: bytes) -> None:
    frame = HEAD + row
    try:
        made = Projection(2, {0, 1})(frame)
    except DecodeError:
        return
    assert made == frame
    assert len(made) > PLAINTEXT_AT
