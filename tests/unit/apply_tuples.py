"""pgoutput's tuples made by hand, for tests of frames and folding."""

from __future__ import annotations

from collections.abc import Sequence

from vsql_shared.changes import Op

UNSENT = object()
"""A TOASTed value that did not change."""
Value = bytes | str | object | None


def tuple_data(values: Sequence[Value]) -> bytes:
    """TupleData: bytes come as binary, str as text."""
    out = len(values).to_bytes(2, "big")
    for value in values:
        if value is None:
            out += b"n"
        elif isinstance(value, bytes | str):
            data = value.encode() if isinstance(value, str) else value
            out += (b"t" if isinstance(value, str) else b"b") + len(data).to_bytes(4, "big") + data
        else:
            out += b"u"
    return out


def insert(values: Sequence[Value]) -> tuple[int, bytes]:
    """An INSERT's op and plaintext."""
    return Op.INSERT, b"N" + tuple_data(values)


def update(new: Sequence[Value], old: Sequence[Value] | None = None, kind: bytes = b"K") -> tuple[int, bytes]:
    """An UPDATE's op and plaintext, with an old tuple where one is given."""
    return Op.UPDATE, (kind + tuple_data(old) if old is not None else b"") + b"N" + tuple_data(new)


def delete(old: Sequence[Value], kind: bytes = b"K") -> tuple[int, bytes]:
    """A DELETE's op and plaintext."""
    return Op.DELETE, kind + tuple_data(old)


def framed(value: Value) -> bytes | None:
    """A value as a field of binary COPY."""
    if value is None:
        return b"\xff\xff\xff\xff"
    if not isinstance(value, bytes | str):
        return None
    data = value.encode() if isinstance(value, str) else value
    return len(data).to_bytes(4, "big") + data
