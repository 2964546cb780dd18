"""Small pure pieces of the consumer: table names read back, changes shown, refusals in words."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsql_consumers.quarantine import Refusal, parse_table
from vsql_consumers.render import changes
from vsql_shared.changes import Column, Op, OpenedBatch, Relation, TableName, Transaction
from vsql_shared.errors import DecodeError, RecordError

_NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)


@given(_NAMES, _NAMES)
def test_every_table_name_is_read_back_as_it_was_written(schema: str, table: str) -> None:
    assert parse_table(str(TableName(schema, table))) == TableName(schema, table)


@pytest.mark.parametrize("text", ["", "t", "a.b.c", ".t", "a.", '"a.b', '"a"b.c', 'a."b', '"a"'])
def test_what_is_no_table_name_is_a_decode_error(text: str) -> None:
    with pytest.raises(DecodeError):
        parse_table(text)


def _batch(op: int, text: bytes) -> OpenedBatch:
    columns = (
        Column("id", True, 23, -1, "integer"),
        Column("v", False, 25, -1, "text"),
        Column("at", False, 1114, -1, "timestamp without time zone"),
    )
    relation = Relation(TableName("public", "t"), "d", columns)
    return OpenedBatch(
        "pub.a", 1, 1, 2, b"", 0, 0, 1, b"", False, False, [Transaction(7, 0x16B374D848, 1_000_000)],
        {b"r": relation}, [0], [op], [b"r"], [text],
    )  # fmt: skip


def _value(kind: bytes, raw: bytes) -> bytes:
    return kind + struct.pack(">I", len(raw)) + raw


_ID = _value(b"b", struct.pack(">i", 5))


@pytest.mark.parametrize(
    ("op", "text", "shown"),
    [
        (
            Op.INSERT,
            b"N\0\3" + _ID + _value(b"t", b"caf\xc3\xa9") + _value(b"b", b"\1\2"),
            {"op": "insert", "new": {"id": 5, "v": "café", "at": {"base64": "AQI="}}},
        ),
        (
            Op.UPDATE,
            b"K\0\3" + _ID + b"nn" + b"N\0\3" + _ID + b"u" + b"n",
            {"op": "update", "key": {"id": 5}, "new": {"id": 5, "at": None}},
        ),
        (Op.DELETE, b"K\0\3" + _ID + b"nn", {"op": "delete", "key": {"id": 5}}),
        (Op.TRUNCATE, b"\0\0\0\0\1", {"op": "truncate"}),
        (
            Op.COPY,
            b"\0\3\0\0\0\4" + struct.pack(">i", -2) + b"\xff" * 4 + b"\0\0\0\1z",
            {"op": "copy", "new": {"id": -2, "v": None, "at": {"base64": "eg=="}}},
        ),
    ],
)
def test_a_change_is_shown_column_by_column(op: int, text: bytes, shown: dict[str, object]) -> None:
    (found,) = changes(_batch(op, text))
    assert found == {
        "table": "public.t",
        "xid": 7,
        "lsn": "16/B374D848",
        "commit_time": "1970-01-01T00:00:01+00:00",
        "sequence": 2,
        **shown,
    }


@given(st.sampled_from([Op.INSERT, Op.UPDATE, Op.DELETE, Op.COPY]), st.binary(max_size=60))
def test_arbitrary_bytes_are_shown_or_are_a_decode_error(op: int, text: bytes) -> None:
    try:
        found = list(changes(_batch(op, text)))
    except DecodeError:
        return
    assert [change["table"] for change in found] == ["public.t"]


def test_a_refusal_names_record_and_place_in_the_chain_and_what_to_do() -> None:
    refusal = Refusal.of(RecordError("a root differs", record="x.t/0/4", hint="look"), 17)
    assert refusal.as_detail() == {"record": "x.t/0/4", "error": "a root differs; look", "sequence": 17}
