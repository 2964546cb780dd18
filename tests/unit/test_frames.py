"""Tuples become rows of binary COPY, and nothing malformed gets through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.apply_tuples import UNSENT, Value, delete, framed, insert, tuple_data, update
from vsql_consumers.frames import (
    COPY_HEADER,
    COPY_TRAILER,
    NULL,
    LayoutChange,
    copied_chunks,
    field_chunks,
    insert_chunks,
    read_change,
    read_copied,
    read_truncate,
    read_tuple,
)
from vsql_shared.changes import Op
from vsql_shared.errors import DecodeError

_BINARY = st.one_of(st.none(), st.binary(max_size=300))
_ROWS = st.integers(1, 6).flatmap(
    lambda width: st.lists(st.lists(_BINARY, min_size=width, max_size=width), min_size=1, max_size=20)
)


def _copy_rows(chunks: list[bytes], width: int) -> list[list[bytes | None]]:
    """Read a binary COPY back."""
    data = b"".join(chunks)
    assert data.startswith(COPY_HEADER)
    pos, rows = len(COPY_HEADER), []
    while data[pos : pos + 2] != COPY_TRAILER:
        assert int.from_bytes(data[pos : pos + 2], "big") == width
        pos += 2
        row: list[bytes | None] = []
        for _ in range(width):
            size = int.from_bytes(data[pos : pos + 4], "big", signed=True)
            pos += 4
            row.append(None if size < 0 else data[pos : pos + size])
            pos += max(size, 0)
        rows.append(row)
    assert data[pos:] == COPY_TRAILER
    return rows


@given(_ROWS, st.integers(1, 2_000))
def test_inserts_become_a_binary_copy_of_the_same_values(rows: list[list[Value]], limit: int) -> None:
    width = len(rows[0])
    chunks = insert_chunks([insert(row)[1] for row in rows], b"b" * width, limit)
    assert _copy_rows(chunks, width) == rows


@given(_ROWS)
def test_a_tuple_read_field_by_field_gives_the_same_copy(rows: list[list[Value]]) -> None:
    width = len(rows[0])
    fields = []
    for row in rows:
        data = tuple_data(row)
        one, end = read_tuple(data, 0, b"b" * width)
        assert end == len(data)
        fields.append(one)
    assert _copy_rows(field_chunks(fields, width, 100), width) == rows


@given(_ROWS)
def test_rows_of_a_first_copy_are_passed_on_and_can_be_read(rows: list[list[Value]]) -> None:
    width = len(rows[0])
    plain = [width.to_bytes(2, "big") + b"".join(framed(v) or b"" for v in row) for row in rows]
    assert _copy_rows(copied_chunks(plain, width, 64), width) == rows
    assert [read_copied(data, width) for data in plain] == [[framed(v) for v in row] for row in rows]


def test_a_chunk_ends_with_the_row_that_fills_it() -> None:
    rows = [insert([bytes(1_000)])[1]] * 10
    chunks = insert_chunks(rows, b"b", 2_500)
    assert [len(chunk) > 2_400 for chunk in chunks] == [True, True, True, False]
    assert all(len(chunk) <= 2_500 + 1_100 for chunk in chunks)


def test_an_unsent_value_has_no_field_and_is_null_in_a_copy() -> None:
    old, new = read_change(*update([b"1", UNSENT, None]), b"bbb")
    assert (old, new) == (None, [framed(b"1"), None, NULL])
    assert _copy_rows(field_chunks([new or []], 3, 1), 3) == [[b"1", None, None]]


def test_text_in_a_row_asks_for_a_layout_that_fits_it() -> None:
    with pytest.raises(LayoutChange) as caught:
        insert_chunks([insert([b"1", b"x", None])[1], insert([b"2", "y", None])[1]], b"bbb", 100)
    assert caught.value.layout == b"btb"
    chunks = insert_chunks([insert([b"2", "y", None])[1]], b"btb", 100)
    assert _copy_rows(chunks, 3) == [[b"2", b"y", None]]


def test_a_layout_is_learnt_from_all_values_of_a_row() -> None:
    with pytest.raises(LayoutChange) as caught:
        read_tuple(tuple_data(["a", None, b"c", "d", UNSENT]), 0, b"btttt")
    assert caught.value.layout == b"ttbtt"


def _cases() -> dict[str, tuple[int, bytes]]:
    good = tuple_data([b"1", b"22"])
    return {
        "empty": (Op.INSERT, b""),
        "only the kind": (Op.INSERT, b"N"),
        "half a count": (Op.INSERT, b"N\0"),
        "too few columns": (Op.INSERT, b"N" + tuple_data([b"1"])),
        "too many columns": (Op.INSERT, b"N" + tuple_data([b"1", b"2", b"3"])),
        "a column is missing": (Op.INSERT, b"N\0\2n"),
        "half a length": (Op.INSERT, b"N\0\2nb\0\0"),
        "a length past the end": (Op.INSERT, b"N\0\2nb\0\0\0\5abc"),
        "a first length past the end": (Op.INSERT, b"N\0\2b\0\0\1\0abc"),
        "a negative length": (Op.INSERT, b"N\0\2nb\xff\xff\xff\xff"),
        "a length past the end of another layout": (Op.INSERT, b"N\0\2nt\0\0\0\5abc"),
        "half a length of another layout": (Op.INSERT, b"N\0\2nt\0\0"),
        "an unknown marker": (Op.INSERT, b"N\0\2nx"),
        "an unknown marker after another layout": (Op.INSERT, b"N\0\2t\0\0\0\1ax"),
        "bytes after the tuple": (Op.INSERT, b"N" + good + b"!"),
        "an unsent value in an INSERT": (Op.INSERT, b"N" + tuple_data([b"1", UNSENT])),
        "an old tuple in an INSERT": (Op.INSERT, b"K" + good + b"N" + good),
        "an UPDATE of another kind": (Op.UPDATE, b"X" + good),
        "an UPDATE without its new tuple": (Op.UPDATE, b"K" + good),
        "an UPDATE with something else after its old tuple": (Op.UPDATE, b"K" + good + b"K" + good),
        "an unsent value in an old tuple": (Op.UPDATE, b"O" + tuple_data([b"1", UNSENT]) + b"N" + good),
        "a DELETE with a new tuple": (Op.DELETE, b"N" + good),
        "a DELETE with nothing": (Op.DELETE, b""),
        "bytes after a DELETE": (Op.DELETE, delete([b"1", None])[1] + b"n"),
    }


@pytest.mark.parametrize("name", _cases())
def test_a_malformed_change_is_refused(name: str) -> None:
    op, data = _cases()[name]
    with pytest.raises(DecodeError):
        read_change(op, data, b"bb")
    if op == Op.INSERT:
        with pytest.raises(DecodeError):
            insert_chunks([data], b"bb", 100)


@given(st.sampled_from([Op.INSERT, Op.UPDATE, Op.DELETE]), st.binary(max_size=60))
def test_no_bytes_raise_anything_else(op: int, data: bytes) -> None:
    for layout in (b"bb", b"tb"):
        try:
            old, new = read_change(op, data, layout)
        except (DecodeError, LayoutChange):
            continue
        assert len(old or new or []) == 2


@given(st.lists(_BINARY, min_size=3, max_size=3), st.data())
def test_every_truncation_of_a_change_is_refused(row: list[Value], data: st.DataObject) -> None:
    _, whole = update(row, row, b"O")
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(DecodeError):
        read_change(Op.UPDATE, whole[:cut], b"bbb")


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"\0\1", b"\0\2\0\0\0\1a\0\0\0\1b", b"\0\1\0\0\0\2a", b"\0\1\0\0\0\1ab", b"\0\1\0\0\0"],
    ids=["empty", "half a count", "no column", "too many", "cut off", "bytes left", "half a length"],
)
def test_a_malformed_copied_row_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        read_copied(data, 1)


def test_a_copied_row_of_another_width_is_not_passed_on() -> None:
    with pytest.raises(DecodeError):
        copied_chunks([b"\0\2\0\0\0\1a\0\0\0\1b"], 1, 100)


@pytest.mark.parametrize(
    "data", [b"", b"\0\0\0\0", b"\4\0\0\0\1", b"\0\0\1\0\1", b"\0\0\0\0\0", b"\0\0\0\0\1!"]
)
def test_a_malformed_truncate_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        read_truncate(data)


def test_a_truncate_says_its_options_and_its_place() -> None:
    assert read_truncate(b"\3\0\1\0\2") == (3, 1, 2)
