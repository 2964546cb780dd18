"""From pgoutput's tuples to rows of binary COPY. Pure: bytes in, bytes out.

Not here: which row a change belongs to (fold.py) and where rows are written (target.py and on). A *field*
is one column as binary COPY frames it, an int32 length and that many bytes, so that a row is the join of its
fields; None stands for a TOASTed value that did not change and was not sent. Formats: PostgreSQL manual,
"Logical Replication Message Formats" (TupleData) and "COPY", binary format.

A *layout* has one marker per column: b'b' where values came binary, b't' where they came as text. One session
of the source never mixes them in a column, so a row is read against the layout known so far; a row that
does not fit raises LayoutChange with the one that does. A NULL fits both.

Rules: every malformed tuple raises DecodeError; no tuple is accepted with bytes left over; no value is
in any error.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TypeAlias

from vsql_shared.changes import Op
from vsql_shared.errors import DecodeError

Fields: TypeAlias = list[bytes | None]
Layout: TypeAlias = bytes

NULL = b"\xff\xff\xff\xff"
COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
COPY_TRAILER = b"\xff\xff"
BINARY, TEXT = b"b", b"t"

_B, _T, _N, _U = b"btnu"
_NEW, _KEY, _OLD = b"NKO"
_COUNT = struct.Struct(">H")
_NO_VALUE = 0xFFFFFFFF
_LENGTH = struct.Struct(">I")
_length_at = _LENGTH.unpack_from
# A tuple's markers may be learnt once for the old and once for the new tuple of a change.
LEARN_AT_MOST = 2


class LayoutChange(Exception):
    """A row's markers are not those of the layout it was read with; `layout` is the one that fits the row."""

    def __init__(self, layout: Layout) -> None:
        super().__init__("the columns' markers changed")
        self.layout = layout


def read_tuple(data: bytes, pos: int, layout: Layout) -> tuple[Fields, int]:
    """The fields of the TupleData at `pos`, and where it ends. Raises DecodeError and LayoutChange."""
    start = pos
    fields: Fields = []
    append = fields.append
    try:
        if _COUNT.unpack_from(data, pos)[0] != len(layout):
            raise DecodeError(f"a tuple of another number of columns than its descriptor's {len(layout)}")
        pos += 2
        for marker in layout:
            kind = data[pos]
            if kind == marker:
                end = pos + 5 + _length_at(data, pos + 1)[0]
                append(data[pos + 1 : end])
                pos = end
            elif kind == _N:
                append(NULL)
                pos += 1
            elif kind == _U:
                append(None)
                pos += 1
            else:
                raise LayoutChange(_learn(data, start, layout))
    except (IndexError, struct.error):
        raise _cut_off(data) from None
    if pos > len(data):
        raise _cut_off(data)
    return fields, pos


def read_change(op: int, data: bytes, layout: Layout) -> tuple[Fields | None, Fields | None]:
    """Old and new tuple of an INSERT, UPDATE or DELETE, where it has them.

    Raises DecodeError and LayoutChange.
    """
    old: Fields | None = None
    new: Fields | None = None
    pos = 0
    kind = data[0] if data else 0
    if op != Op.INSERT and kind in (_KEY, _OLD):
        old, pos = read_tuple(data, 1, layout)
        kind = data[pos] if pos < len(data) else 0
    if op != Op.DELETE:
        if kind != _NEW:
            raise DecodeError(f"a change of kind {chr(op)} without its new tuple at byte {pos}")
        new, pos = read_tuple(data, pos + 1, layout)
    elif old is None:
        raise DecodeError("a DELETE without its old tuple")
    if pos != len(data):
        raise DecodeError(f"a change of kind {chr(op)} with {len(data) - pos} bytes after its tuples")
    complete = new if op == Op.INSERT else old
    if complete is not None and None in complete:
        at = complete.index(None) + 1
        if op == Op.INSERT:
            # PostgreSQL's own subscriber writes NULL here.
            raise DecodeError(
                f"an INSERT leaves out the value of column {at}: an UPDATE brought the row into the row"
                " filter, and the WAL has no large value that did not change"
            )
        raise DecodeError(
            f"a change of kind {chr(op)} leaves out the value of column {at}, which it must carry"
        )
    return old, new


def read_copied(data: bytes, columns: int) -> Fields:
    """The fields of a row of binary COPY. Raises DecodeError."""
    fields: Fields = []
    pos = 2
    try:
        if _COUNT.unpack_from(data)[0] != columns:
            raise DecodeError(f"a copied row of another number of columns than its descriptor's {columns}")
        for _ in range(columns):
            size = _length_at(data, pos)[0]
            end = pos + 4 + (size if size != _NO_VALUE else 0)
            fields.append(data[pos:end])
            pos = end
    except struct.error:
        raise _cut_off(data) from None
    if pos != len(data):
        raise DecodeError(f"a copied row of {len(data)} bytes, its columns say {pos}")
    return fields


def insert_chunks(plaintexts: Sequence[bytes], layout: Layout, limit: int) -> list[bytes]:
    """INSERTs as one binary COPY, in chunks of about `limit` bytes. Raises DecodeError and LayoutChange.

    This is the hottest loop of the target: it repeats read_tuple instead of calling it, and makes no lists
    per row.
    """
    head = b"N" + _COUNT.pack(len(layout))
    count = head[1:]
    parts, chunks, size = [COPY_HEADER], [], 0
    append = parts.append
    for data in plaintexts:
        if data[:3] != head:
            raise _no_insert(data, layout)
        append(count)
        pos = 3
        try:
            for marker in layout:
                kind = data[pos]
                if kind == marker:
                    end = pos + 5 + _length_at(data, pos + 1)[0]
                    append(data[pos + 1 : end])
                    pos = end
                elif kind == _N:
                    append(NULL)
                    pos += 1
                else:
                    raise _not_of_layout(data, layout)
        except (IndexError, struct.error):
            raise _cut_off(data) from None
        if pos != len(data):
            raise _no_insert(data, layout)
        size += pos
        if size >= limit:
            chunks.append(b"".join(parts))
            parts.clear()
            size = 0
    append(COPY_TRAILER)
    chunks.append(b"".join(parts))
    return chunks


def copied_chunks(plaintexts: Sequence[bytes], columns: int, limit: int) -> list[bytes]:
    """Rows of a first copy as one binary COPY, in chunks of about `limit` bytes. Raises DecodeError.

    Only the number of columns is looked at: the lengths inside are read by the server's COPY.
    """
    count = _COUNT.pack(columns)
    parts, chunks, size = [COPY_HEADER], [], 0
    for data in plaintexts:
        if data[:2] != count:
            raise DecodeError(f"a copied row of another number of columns than its descriptor's {columns}")
        parts.append(data)
        size += len(data)
        if size >= limit:
            chunks.append(b"".join(parts))
            parts.clear()
            size = 0
    parts.append(COPY_TRAILER)
    chunks.append(b"".join(parts))
    return chunks


def field_chunks(rows: Sequence[Sequence[bytes | None]], columns: int, limit: int) -> list[bytes]:
    """Rows of fields as one binary COPY, in chunks of about `limit` bytes; what was not sent is NULL."""
    count = _COUNT.pack(columns)
    chunks = []
    parts, size = [COPY_HEADER], 0
    for fields in rows:
        row = b"".join([NULL if field is None else field for field in fields])
        parts += (count, row)
        size += len(row) + 2
        if size >= limit:
            chunks.append(b"".join(parts))
            parts.clear()
            size = 0
    parts.append(COPY_TRAILER)
    chunks.append(b"".join(parts))
    return chunks


def read_truncate(data: bytes) -> tuple[int, int, int]:
    """Options (1 CASCADE, 2 RESTART IDENTITY), position in the group, group's size. Raises DecodeError."""
    if len(data) != 5:
        raise DecodeError(f"a TRUNCATE of {len(data)} bytes, expected 5")
    options, position, size = struct.unpack(">BHH", data)
    if options > 3 or position >= size:
        raise DecodeError(f"a TRUNCATE with options {options}, table {position} of {size}")
    return options, position, size


def _learn(data: bytes, pos: int, layout: Layout) -> Layout:
    """The layout with the markers of the tuple at `pos`. Raises DecodeError, and what indexing raises."""
    learnt = bytearray(layout)
    pos += 2
    for column in range(len(layout)):
        kind = data[pos]
        if kind in (_B, _T):
            learnt[column] = kind
            pos += 5 + _LENGTH.unpack_from(data, pos + 1)[0]
        elif kind in (_N, _U):
            pos += 1
        else:
            raise DecodeError(f"a tuple with the unknown marker {kind} for column {column + 1} at byte {pos}")
    if pos > len(data):
        raise _cut_off(data)
    return bytes(learnt)


def _not_of_layout(data: bytes, layout: Layout) -> Exception:
    learnt = _learn(data, 1, layout)
    return _no_insert(data, layout) if learnt == layout else LayoutChange(learnt)


def _no_insert(data: bytes, layout: Layout) -> DecodeError:
    """The error read_change has for a row that insert_chunks cannot take."""
    try:
        read_change(Op.INSERT, data, layout)
    except DecodeError as error:
        return error
    return DecodeError("an INSERT that cannot be read")


def _cut_off(data: bytes) -> DecodeError:
    return DecodeError(f"a tuple is cut off: its columns go past the end of its {len(data)} bytes")
