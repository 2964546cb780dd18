"""The decoder of pgoutput takes apart what the manual describes, and refuses all else by its own error."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsql_producers import pgoutput
from vsql_producers.pgoutput import (
    POSTGRES_EPOCH_US,
    Begin,
    Commit,
    Keepalive,
    Message,
    Origin,
    RelationColumn,
    RelationMessage,
    Truncate,
    TypeMessage,
)
from vsql_shared.changes import Op
from vsql_shared.errors import DecodeError

HEADER = b"w" + bytes(24)


def relation(identity: bytes = b"d", count: int | None = None) -> bytes:
    columns = b"\x01id\0" + struct.pack(">Ii", 20, -1) + b"\x00note\0" + struct.pack(">Ii", 25, -1)
    size = 2 if count is None else count
    return b"R" + struct.pack(">I", 77) + b"public\0t\0" + identity + struct.pack(">H", size) + columns


MESSAGES = {
    "begin": (b"B" + struct.pack(">QqI", 500, 7, 42), Begin(500, 7 + POSTGRES_EPOCH_US, 42)),
    "commit": (b"C" + struct.pack(">BQQq", 0, 500, 530, 7), Commit(500, 530, 7 + POSTGRES_EPOCH_US)),
    "origin": (b"O" + struct.pack(">Q", 9) + b"far\0", Origin(9, "far")),
    "relation": (
        relation(),
        RelationMessage(
            77,
            "public",
            "t",
            "d",
            (RelationColumn(True, "id", 20, -1), RelationColumn(False, "note", 25, -1)),
        ),
    ),
    "relation of pg_catalog": (
        b"R" + struct.pack(">I", 1) + b"\0t\0f" + struct.pack(">H", 0),
        RelationMessage(1, "pg_catalog", "t", "f", ()),
    ),
    "type": (b"Y" + struct.pack(">I", 16400) + b"public\0mood\0", TypeMessage(16400, "public", "mood")),
    "truncate": (b"T" + struct.pack(">IBII", 2, 3, 77, 78), Truncate(3, (77, 78))),
    "message": (
        b"M" + struct.pack(">BQ", 1, 9) + b"app\0" + struct.pack(">i", 5) + b"hello",
        Message(True, 9, "app", 5),
    ),
}

MALFORMED = {
    "no message": b"",
    "unknown kind": b"Z123",
    "streamed transaction": b"S" + struct.pack(">IB", 1, 1),
    "begin too short": b"B" + bytes(19),
    "begin too long": b"B" + bytes(21),
    "commit too short": b"C" + bytes(24),
    "origin without an end": b"O" + struct.pack(">Q", 9) + b"far",
    "relation of an unknown identity": relation(b"x"),
    "relation with fewer columns than it claims": relation(count=3),
    "relation with more columns than it claims": relation(count=1),
    "name that is not UTF-8": b"Y" + struct.pack(">I", 16400) + b"pub\xff\0mood\0",
    "truncate of no table": b"T" + struct.pack(">IB", 0, 0),
    "truncate of more tables than there are bytes": b"T" + struct.pack(">IBI", 0xFFFFFFFF, 0, 1),
    "message larger than it is": b"M" + struct.pack(">BQ", 1, 9) + b"a\0" + struct.pack(">i", 6) + b"hello",
    "message of a negative size": b"M" + struct.pack(">BQ", 1, 9) + b"a\0" + struct.pack(">i", -1),
    "begin beyond what a long holds": b"B" + struct.pack(">QqI", 2**63, 7, 42),
    "begin in the year 10000": b"B" + struct.pack(">QqI", 500, 252_455_616_000_000_000, 42),
    "begin before the year 1": b"B" + struct.pack(">QqI", 500, -(2**63), 42),
    "commit beyond what a long holds": b"C" + struct.pack(">BQQq", 0, 500, 2**63, 7),
    "commit in the year 10000": b"C" + struct.pack(">BQQq", 0, 500, 530, 252_455_616_000_000_000),
    "truncate with unknown options": b"T" + struct.pack(">IBI", 1, 4, 77),
    "truncate of more tables than its records can count": b"T"
    + struct.pack(">IB", 65536, 0)
    + bytes(4 * 65536),
    "message at the very start": b"M" + struct.pack(">BQ", 0, 0) + b"a\0" + struct.pack(">i", 0),
    "message beyond what a long holds": b"M" + struct.pack(">BQ", 1, 2**63) + b"a\0" + struct.pack(">i", 0),
    "bytes after the end": MESSAGES["origin"][0] + b"!",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_each_message_is_decoded(name: str) -> None:
    data, expected = MESSAGES[name]
    assert pgoutput.decode(HEADER + data) == expected


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_messages_are_refused_by_our_error(name: str) -> None:
    with pytest.raises(DecodeError):
        pgoutput.decode(HEADER + MALFORMED[name])


@pytest.mark.parametrize("name", MESSAGES)
def test_every_truncation_is_refused(name: str) -> None:
    frame = HEADER + MESSAGES[name][0]
    for size in range(len(frame)):
        with pytest.raises(DecodeError):
            pgoutput.decode(frame[:size])


@given(st.binary(max_size=80), st.sampled_from(b"BCORYTM"))
def test_garbage_never_raises_anything_else(data: bytes, kind: int) -> None:
    try:
        pgoutput.decode(HEADER + bytes((kind,)) + data)
    except DecodeError:
        return


@given(st.binary(max_size=60))
def test_frames_that_are_no_wal_data_are_refused(data: bytes) -> None:
    if data[:1] != b"w" or len(data) <= pgoutput.KIND_AT:
        with pytest.raises(DecodeError):
            pgoutput.decode(data)


def test_keepalive_is_decoded_and_other_sizes_are_refused() -> None:
    data = struct.pack(">cQqB", b"k", 700, 1, 1)
    assert pgoutput.decode_keepalive(data) == Keepalive(700, True)
    for bad in (data[:-1], data + b"\0", b"x" + data[1:], b""):
        with pytest.raises(DecodeError):
            pgoutput.decode_keepalive(bad)


@pytest.mark.parametrize("time", [252_455_616_000_000_000, -(2**63), 2**63 - 1])
def test_a_frame_sent_in_a_year_that_has_no_date_is_refused(time: int) -> None:
    frame = b"w" + bytes(16) + struct.pack(">q", time) + b"M"
    with pytest.raises(DecodeError, match="look at the server's clock"):
        pgoutput.frame_time(frame)


def test_kinds_of_a_chunk_are_read_at_once_and_short_frames_refused() -> None:
    frames = [HEADER + b"B...", HEADER + b"I\0\0\0\1N", HEADER + b"C"]
    assert pgoutput.kinds(frames) == b"BIC"
    with pytest.raises(DecodeError):
        pgoutput.kinds([*frames, HEADER])


@given(
    st.sampled_from(sorted({Op.COPY, Op.TRUNCATE, Op.RELATION})),
    st.integers(0, 2**64 - 1),
    st.binary(max_size=40),
)
def test_a_made_frame_reads_like_a_row(op: int, lsn: int, plaintext: bytes) -> None:
    frame = pgoutput.make_frame(op, pgoutput.relation_key(77), lsn, plaintext)
    assert frame[pgoutput.KIND] == bytes((op,))
    assert frame[pgoutput.RELATION_ID] == b"\0\0\0\x4d"
    assert frame[pgoutput.PLAINTEXT_AT :] == plaintext
    assert pgoutput.frame_lsn(frame) == lsn
