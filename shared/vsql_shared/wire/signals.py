"""What travels beside rows: logical messages and the values of sequences. Pure: bytes in, values out.

Not here: when they are sent and what is done with them (docs/design/0007). Rules:

* A message's plaintext is pgoutput's message as it came, after its kind byte; its content is bytes.
* Malformed bytes raise DecodeError; nothing is accepted with bytes left over.
"""

from __future__ import annotations

import io
import struct
from enum import Enum
from typing import Any, NamedTuple

import fastavro

from vsql_shared.changes import TableName, quote_ident
from vsql_shared.errors import DecodeError
from vsql_shared.wire.pack import FORMAT, schema

_HEAD = struct.Struct(">BQ")
_SIZE = struct.Struct(">i")
_TRANSACTIONAL = 1
_BIGINT = range(-(2**63), 2**63)


class LogicalMessage(NamedTuple):
    """What somebody gave to pg_logical_emit_message."""

    transactional: bool
    lsn: int
    prefix: str
    content: bytes


class SequenceState(Enum):
    """What a sampled value is worth at its place in the stream."""

    AHEAD = "ahead"
    """All rows up to here used it at most."""
    UNSURE = "unsure"
    """Rows that are still to come, from before it was set back, may have used more."""
    SET_BACK = "set_back"
    """It lies before what was said earlier, on purpose: every row that used more has been sent."""


class SequenceValue(NamedTuple):
    """How far a sequence has got."""

    name: TableName
    owner: tuple[str, ...]
    """Schema, table and column, or nothing."""
    increment: int
    last_value: int
    is_called: bool
    state: SequenceState = SequenceState.AHEAD


def encode_message(message: LogicalMessage) -> bytes:
    """As pgoutput sends it."""
    head = _HEAD.pack(_TRANSACTIONAL if message.transactional else 0, message.lsn)
    return head + message.prefix.encode() + b"\0" + _SIZE.pack(len(message.content)) + message.content


def decode_message(data: bytes) -> LogicalMessage:
    """Decode a message's plaintext. Raises DecodeError."""
    end = data.find(b"\0", _HEAD.size)
    content = end + 1 + _SIZE.size
    if end < 0 or content > len(data):
        raise DecodeError(f"a logical message of {len(data)} bytes is cut off")
    flags, lsn = _HEAD.unpack_from(data)
    (size,) = _SIZE.unpack_from(data, end + 1)
    if flags > _TRANSACTIONAL or size != len(data) - content:
        raise DecodeError(f"a logical message has flags {flags} and claims {size} of {len(data)} bytes")
    try:
        prefix = data[_HEAD.size : end].decode()
    except UnicodeDecodeError:
        raise DecodeError("the prefix of a logical message is not UTF-8") from None
    return LogicalMessage(flags == _TRANSACTIONAL, lsn, prefix, data[content:])


def encode_sequence(value: SequenceValue) -> bytes:
    """Plaintext of a record of op SEQUENCE."""
    out = io.BytesIO()
    fastavro.schemaless_writer(
        out,
        schema("sequence_value"),
        {
            "format": FORMAT,
            "schema_name": value.name.schema,
            "sequence_name": value.name.table,
            "owner": list(value.owner),
            "increment": value.increment,
            "last_value": value.last_value,
            "is_called": value.is_called,
            "state": value.state.value,
        },
    )
    return out.getvalue()


def decode_sequence(data: bytes) -> SequenceValue:
    """Decode a sequence's value. Raises DecodeError."""
    stream = io.BytesIO(data)
    try:
        raw: Any = fastavro.schemaless_reader(stream, schema("sequence_value"), None)
        state = SequenceState(raw["state"])
    except Exception as error:  # fastavro raises many types on garbage; all mean the same here
        raise DecodeError(f"not a sequence's value: {type(error).__name__}") from error
    if raw["format"] != FORMAT or stream.tell() != len(data):
        raise DecodeError("a sequence's value of another format or with trailing bytes")
    name = TableName(raw["schema_name"], raw["sequence_name"])
    value = SequenceValue(
        name, tuple(raw["owner"]), raw["increment"], raw["last_value"], raw["is_called"], state
    )
    if len(value.owner) not in (0, 3) or not value.increment:
        raise DecodeError("a sequence's value has half an owner, or no direction")
    if any("\0" in text for text in (*name, *value.owner)):
        raise DecodeError("a sequence's value with a NUL character in a name")
    if value.increment not in _BIGINT or value.last_value not in _BIGINT:
        raise DecodeError("a sequence's value is out of range")
    return value


def owner_text(owner: tuple[str, ...]) -> str:
    """`schema.table.column`, quoted where needed."""
    return ".".join(map(quote_ident, owner))
