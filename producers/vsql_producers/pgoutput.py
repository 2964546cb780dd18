"""Decoder of what a walsender sends with the plugin pgoutput. Pure: bytes in, values out.

Not here: tuples. INSERT, UPDATE and DELETE are only told apart by their kind and cut out of their frame;
their bytes are sealed as they are and parsed where they are applied, so that the cost of a row does not
grow with its columns. Formats: PostgreSQL manual, "Streaming Replication Protocol" and "Logical Replication
Message Formats" (without streaming, every protocol version sends the same bytes).

A *frame* is one CopyData of the walsender: 'w', start LSN, end LSN, time (25 bytes), then one message.
Whatever stands for a row later on (TRUNCATE of one table, a copied row, a descriptor) is given the same
shape by `make_frame`, so that the stages after this one know one kind of thing.

Rules: every malformed message raises DecodeError; no message is accepted with bytes left over.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from operator import itemgetter
from typing import NamedTuple

from vsql_shared.changes import MAX_POSITION, MAX_TIME, MIN_TIME
from vsql_shared.errors import DecodeError

# Offsets in a frame of a row.
LSN = slice(1, 9)
KIND_AT = 25
KIND = slice(25, 26)
RELATION_ID = slice(26, 30)
PLAINTEXT_AT = 30

_HEADER = struct.Struct(">cQQq")
_BEGIN = struct.Struct(">QqI")
_COMMIT = struct.Struct(">xQQq")
_KEEPALIVE = struct.Struct(">cQqB")
# PostgreSQL counts microseconds from 2000-01-01; everything of ours from 1970-01-01.
POSTGRES_EPOCH_US = 946_684_800_000_000
_MIN_TIME, _MAX_TIME = MIN_TIME - POSTGRES_EPOCH_US, MAX_TIME - POSTGRES_EPOCH_US
_CASCADE_AND_RESTART = 3
_MAX_TRUNCATED = 0xFFFF
"""Tables of one TRUNCATE: their records count them in 16 bits (changes.py)."""
_B, _C = b"BC"

_kind_of = itemgetter(KIND_AT)


class Begin(NamedTuple):
    """Start of a transaction; `final_lsn` is where its commit record starts."""

    final_lsn: int
    commit_time: int
    xid: int


class Commit(NamedTuple):
    """End of a transaction; `end_lsn` is the first byte after its commit record."""

    commit_lsn: int
    end_lsn: int
    commit_time: int


class Origin(NamedTuple):
    """The transaction came from another node through a replication origin of this name."""

    origin_lsn: int
    name: str


class RelationColumn(NamedTuple):
    """A published column: part of the replica identity or not, type by its id on the source."""

    key: bool
    name: str
    type_oid: int
    typmod: int


class RelationMessage(NamedTuple):
    """Which table a relation id stands for from here on, and with which columns."""

    relation_id: int
    schema: str
    table: str
    replica_identity: str
    columns: tuple[RelationColumn, ...]


class TypeMessage(NamedTuple):
    """Name of a type that is not built in."""

    oid: int
    schema: str
    name: str


class Truncate(NamedTuple):
    """TRUNCATE of one or several tables. options: 1 CASCADE, 2 RESTART IDENTITY."""

    options: int
    relation_ids: tuple[int, ...]


class Message(NamedTuple):
    """pg_logical_emit_message. Anyone who may call that function wrote it; `lsn` is where its record ends."""

    transactional: bool
    lsn: int
    prefix: str
    size: int


Control = Begin | Commit | Origin | RelationMessage | TypeMessage | Truncate | Message


class Keepalive(NamedTuple):
    """The walsender has read the WAL up to `wal_end` and had nothing (more) to send."""

    wal_end: int
    reply_wanted: bool


class _Reader:
    """A cursor that raises DecodeError instead of running past the end."""

    def __init__(self, data: bytes, pos: int, what: str) -> None:
        self.data, self.pos, self.what = data, pos, what

    def number(self, form: str) -> int:
        size = struct.calcsize(form)
        if self.pos + size > len(self.data):
            raise DecodeError(f"{self.what} is cut off at byte {self.pos} of {len(self.data)}")
        value: int = struct.unpack_from(form, self.data, self.pos)[0]
        self.pos += size
        return value

    def text(self) -> str:
        stop = self.data.find(b"\0", self.pos)
        if stop < 0:
            raise DecodeError(f"{self.what}: the name at byte {self.pos} has no end")
        raw, self.pos = self.data[self.pos : stop], stop + 1
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise DecodeError(f"{self.what}: the name at byte {stop - len(raw)} is not UTF-8") from error

    def skip(self, size: int) -> None:
        if size < 0 or self.pos + size > len(self.data):
            raise DecodeError(f"{self.what} claims {size} bytes at byte {self.pos} of {len(self.data)}")
        self.pos += size

    def end(self) -> None:
        if self.pos != len(self.data):
            raise DecodeError(f"{self.what} has {len(self.data) - self.pos} bytes after its end")


def kinds(frames: list[bytes]) -> bytes:
    """The kind of each frame's message, as one string: a chunk is searched at once instead of row by row."""
    if frames and min(map(len, frames)) <= KIND_AT:
        raise DecodeError("a WAL frame without a message")
    return bytes(map(_kind_of, frames))


def decode(frame: bytes) -> Control:
    """Decode a message that is not a row. Raises DecodeError."""
    if len(frame) <= KIND_AT or frame[:1] != b"w":
        raise DecodeError(f"a frame of {len(frame)} bytes is no WAL data with a message")
    kind = frame[KIND_AT]
    size = len(frame) - KIND_AT - 1
    # Every transaction has these two; their size is fixed, so they need no cursor.
    if kind == _B and size == _BEGIN.size:
        final_lsn, time, xid = _BEGIN.unpack_from(frame, KIND_AT + 1)
        if final_lsn > MAX_POSITION or not _MIN_TIME <= time <= _MAX_TIME:
            raise _beyond(kind, final_lsn, time)
        return Begin(final_lsn, time + POSTGRES_EPOCH_US, xid)
    if kind == _C and size == _COMMIT.size:
        commit_lsn, end_lsn, time = _COMMIT.unpack_from(frame, KIND_AT + 1)
        if commit_lsn > MAX_POSITION or end_lsn > MAX_POSITION or not _MIN_TIME <= time <= _MAX_TIME:
            raise _beyond(kind, max(commit_lsn, end_lsn), time)
        return Commit(commit_lsn, end_lsn, time + POSTGRES_EPOCH_US)
    decoder = _DECODERS.get(kind)
    if decoder is None:
        raise DecodeError(
            f"pgoutput message of unknown kind {frame[KIND]!r}",
            hint="streaming and two_phase must be off for this slot",
        )
    reader = _Reader(frame, KIND_AT + 1, f"pgoutput message {chr(kind)}")
    value = decoder(reader)
    reader.end()
    return value


def _beyond(kind: int, position: int, time: int) -> DecodeError:
    return DecodeError(
        f"pgoutput message {chr(kind)} with position {position} and time {time}, beyond what a pack can say",
        hint="commit times from the year 1 to the year 9999 are taken; look at the server's clock",
    )


def decode_keepalive(data: bytes) -> Keepalive:
    """Decode a primary keepalive message. Raises DecodeError."""
    if len(data) != _KEEPALIVE.size or data[:1] != b"k":
        raise DecodeError(f"a keepalive of {len(data)} bytes, expected {_KEEPALIVE.size}")
    _, wal_end, _, reply = _KEEPALIVE.unpack(data)
    return Keepalive(wal_end, reply != 0)


def make_frame(op: int, relation_id: bytes, lsn: int, plaintext: bytes) -> bytes:
    """A frame for a record the walsender did not send as a row of its own."""
    return frame_prefix(op, relation_id, lsn) + plaintext


def frame_prefix(op: int, relation_id: bytes, lsn: int) -> bytes:
    """What `make_frame` puts before the plaintext; constant for all rows of a copied table."""
    return _HEADER.pack(b"w", lsn, lsn, 0) + bytes((op,)) + relation_id


def frame_lsn(frame: bytes) -> int:
    """Where the WAL record of a frame starts."""
    return int.from_bytes(frame[LSN], "big")


def frame_time(frame: bytes) -> int:
    """When the walsender sent a frame, by the source's clock. Raises DecodeError."""
    time = int.from_bytes(frame[17:25], "big", signed=True)
    if not _MIN_TIME <= time <= _MAX_TIME:
        raise _beyond(frame[KIND_AT], frame_lsn(frame), time)
    return time + POSTGRES_EPOCH_US


def relation_key(relation_id: int) -> bytes:
    """A relation id as it lies in a frame."""
    return relation_id.to_bytes(4, "big")


def _of_fixed_size(r: _Reader) -> Control:
    """Only reached with a wrong size: `decode` reads BEGIN and COMMIT itself."""
    raise DecodeError(f"{r.what} has {len(r.data) - r.pos} bytes, not the size it always has")


def _origin(r: _Reader) -> Origin:
    return Origin(r.number(">Q"), r.text())


def _relation(r: _Reader) -> RelationMessage:
    relation_id, schema, table = r.number(">I"), r.text(), r.text()
    identity, count = r.number("B"), r.number(">H")
    if identity not in b"dnfi":
        raise DecodeError(f"relation {relation_id} has the unknown replica identity {identity}")
    columns = tuple(_column(r) for _ in range(count))
    # pgoutput sends an empty schema for pg_catalog
    return RelationMessage(relation_id, schema or "pg_catalog", table, chr(identity), columns)


def _column(r: _Reader) -> RelationColumn:
    flags = r.number("B")
    return RelationColumn(bool(flags & 1), r.text(), r.number(">I"), r.number(">i"))


def _type(r: _Reader) -> TypeMessage:
    return TypeMessage(r.number(">I"), r.text() or "pg_catalog", r.text())


def _truncate(r: _Reader) -> Truncate:
    count, options = r.number(">I"), r.number("B")
    if count == 0 or count > min(len(r.data) // 4, _MAX_TRUNCATED) or options > _CASCADE_AND_RESTART:
        raise DecodeError(f"TRUNCATE of {count} tables with options {options} in {len(r.data)} bytes")
    return Truncate(options, tuple(r.number(">I") for _ in range(count)))


def _message(r: _Reader) -> Message:
    flags, lsn, prefix, size = r.number("B"), r.number(">Q"), r.text(), r.number(">i")
    if not 0 < lsn <= MAX_POSITION:  # one without a transaction commits one byte before it
        raise DecodeError(f"{r.what} at position {lsn}")
    r.skip(size)
    return Message(bool(flags & 1), lsn, prefix, size)


_DECODERS: dict[int, Callable[[_Reader], Control]] = {
    _B: _of_fixed_size,
    _C: _of_fixed_size,
    ord("O"): _origin,
    ord("R"): _relation,
    ord("Y"): _type,
    ord("T"): _truncate,
    ord("M"): _message,
}
