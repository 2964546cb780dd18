"""A change as a JSON object for people: column by column, as text where that is plain, else base64.

Not here: applying (frames.py frames values for COPY). Pure. Rules: binary values of the types below become
what PostgreSQL would print; every other binary value stays bytes, as {"base64": …}; a value that was not sent
(unchanged TOAST) is left out.
"""

from __future__ import annotations

import base64
import struct
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from vsql_shared import lsn
from vsql_shared.changes import SIGNALS, Op, OpenedBatch, Relation
from vsql_shared.errors import DecodeError
from vsql_shared.wire.signals import decode_message, decode_sequence

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NAMES = {
    Op.INSERT: "insert",
    Op.UPDATE: "update",
    Op.DELETE: "delete",
    Op.TRUNCATE: "truncate",
    Op.COPY: "copy",
    Op.MESSAGE: "message",
    Op.SEQUENCE: "sequence",
}
# Type OIDs of pg_type.dat whose binary form is a plain number or text.
_BINARY: dict[int, Callable[[bytes], Any]] = {
    16: lambda v: v != b"\0",  # bool
    20: lambda v: struct.unpack(">q", v)[0],  # int8
    21: lambda v: struct.unpack(">h", v)[0],  # int2
    23: lambda v: struct.unpack(">i", v)[0],  # int4
    700: lambda v: struct.unpack(">f", v)[0],  # float4
    701: lambda v: struct.unpack(">d", v)[0],  # float8
    2950: lambda v: str(uuid.UUID(bytes=v)),
    **dict.fromkeys((19, 25, 114, 1042, 1043), lambda v: v.decode()),  # name, text, json, bpchar, varchar
}


def changes(batch: OpenedBatch) -> Iterator[dict[str, Any]]:
    """One object per change of a batch, in source order. Raises DecodeError."""
    for place, op, name, text in zip(
        batch.tx_of, batch.ops, batch.relation_of, batch.plaintexts, strict=True
    ):
        transaction, relation = batch.transactions[place], batch.relations[name]
        yield {
            **({} if op in SIGNALS else {"table": str(relation.name)}),
            "op": _NAMES.get(op, chr(op)),
            "xid": transaction.xid,
            "lsn": lsn.text(transaction.commit_lsn),
            "commit_time": (_EPOCH + timedelta(microseconds=transaction.commit_time)).isoformat(),
            "sequence": batch.sequence,
            **_images(op, text, relation),
        }


def _images(op: int, text: bytes, relation: Relation) -> dict[str, Any]:
    if op in SIGNALS:
        return _signal(op, text)
    try:
        if op == Op.TRUNCATE:
            return {}
        if op == Op.COPY:
            return {"new": _copied(text, relation)}
        return _tuples(text, relation)
    except (struct.error, IndexError, ValueError) as error:
        raise DecodeError(f"a tuple of {relation.name} is malformed: {type(error).__name__}") from None


def _signal(op: int, text: bytes) -> dict[str, Any]:
    """A logical message, or how far a sequence has got."""
    if op == Op.MESSAGE:
        message = decode_message(text)
        return {
            "prefix": message.prefix,
            "transactional": message.transactional,
            "content": _content(message.content),
        }
    value = decode_sequence(text)
    return {
        "sequence": str(value.name),
        "last_value": value.last_value,
        "is_called": value.is_called,
        "state": value.state.value,
    }


def _content(content: bytes) -> Any:
    """Text where it is text that can be shown, else its bytes."""
    try:
        shown = content.decode()
    except UnicodeDecodeError:
        shown = "\0"
    return {"base64": base64.b64encode(content).decode()} if "\0" in shown else shown


def _tuples(text: bytes, relation: Relation) -> dict[str, Any]:
    """('K'|'O' TupleData)? ('N' TupleData)? of pgoutput."""
    out: dict[str, Any] = {}
    pos = 0
    while pos < len(text):
        label = {ord("N"): "new", ord("O"): "old", ord("K"): "key"}[text[pos]] if text[pos] in b"NOK" else ""
        if not label:
            raise ValueError("no tuple")
        count = struct.unpack_from(">H", text, pos + 1)[0]
        pos += 3
        values: dict[str, Any] = {}
        for column in relation.columns[:count]:
            kind = text[pos]
            pos += 1
            if kind in b"tb":
                size = struct.unpack_from(">I", text, pos)[0]
                raw = text[pos + 4 : pos + 4 + size]
                pos += 4 + size
                values[column.name] = raw.decode() if kind == ord("t") else _binary(column.type_oid, raw)
            elif kind == ord("n") and (label != "key" or column.key):
                values[column.name] = None
        out[label] = values
    return out


def _copied(text: bytes, relation: Relation) -> dict[str, Any]:
    values: dict[str, Any] = {}
    pos = 2
    for column in relation.columns:
        size = struct.unpack_from(">i", text, pos)[0]
        pos += 4
        values[column.name] = None if size < 0 else _binary(column.type_oid, text[pos : pos + size])
        pos += max(size, 0)
    return values


def _binary(type_oid: int, raw: bytes) -> Any:
    reader = _BINARY.get(type_oid)
    return reader(raw) if reader else {"base64": base64.b64encode(raw).decode()}
