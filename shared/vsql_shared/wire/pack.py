"""Packs: the messages of the data topics. Avro, written and read by hand where it is hot.

Not here: encryption (crypto/seal.py) and Merkle trees (audit/merkle.py). Rules:

* A pack is `header ‖ Avro array of tuples`; the header is every field of schemas/avro/pack.avsc before
  `tuples`, encoded by fastavro once per pack. A test decodes whole packs with fastavro.
* header_digest = SHA-256(header). It stands for all clear fields of the envelope in every tuple's
  additional authenticated data: AAD = header_digest ‖ clear (15 bytes). So no field can be moved,
  swapped or replayed without failing to open.
* A tuple's leaf = SHA-256(0x00 ‖ header_digest ‖ its whole Avro encoding) (RFC 9162, section 2.1.1).
* Fixed-size big-endian fields, not Avro longs, in the tuple: one struct call instead of four varints.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import fastavro

from vsql_shared.changes import MAX_TIME, MIN_TIME, Column, Relation, TableName, Transaction
from vsql_shared.errors import DecodeError

FORMAT = 1
# A descriptor of a table with generated columns.
_GENERATED_FORMAT = 2
CLEAR = struct.Struct(">HQIc")  # index into transactions, lsn, index in batch, op
CLEAR_SIZE = CLEAR.size
_CLEAR_INTS = struct.Struct(">HQIB")  # the same, op as an int
NONCE_SIZE = 12
TAG_SIZE = 16
MAX_TRANSACTIONS = 65_535
MAX_COLUMNS = 1_600
"""PostgreSQL's own limit."""
_MAX_OID = 0xFFFFFFFF
_IDENTITIES = frozenset("dnfi")


class PackHeader(NamedTuple):
    """Clear fields of a pack (schemas/avro/pack.avsc)."""

    cluster: str
    chain: str
    origin: str
    table: TableName
    partition: int
    epoch: int
    batch: int
    dek_id: str
    relation: bytes
    transactions: tuple[Transaction, ...]


class SealedTuple(NamedTuple):
    """One record of a pack as it lies there; `leaf` is its Merkle leaf, `aad` what GCM authenticates."""

    tx: int
    lsn: int
    index: int  # type: ignore[assignment]  # shadows tuple.index(), which means nothing for a record
    op: int
    nonce: bytes
    ciphertext: bytes
    aad: bytes
    leaf: bytes


@cache
def schema(name: str) -> Any:
    """A parsed Avro schema of vsql_schemas/avro by file stem."""
    text = resources.files("vsql_schemas").joinpath(f"avro/{name}.avsc").read_text()
    return fastavro.parse_schema(json.loads(text))


@cache
def _header_schema() -> Any:
    text = resources.files("vsql_schemas").joinpath("avro/pack.avsc").read_text()
    raw = json.loads(text)
    raw["fields"] = [f for f in raw["fields"] if f["name"] != "tuples"]
    return fastavro.parse_schema(raw)


def _varint(value: int) -> bytes:
    """Avro long: zigzag, then 7 bits a byte (Avro specification, "Binary encoding")."""
    value <<= 1  # only lengths and counts: never negative
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


# Lengths of ordinary tuples, so that the hot loop indexes instead of computing.
_LENGTHS = [_varint(n) for n in range(4096)]


def length_prefix(size: int) -> bytes:
    """Avro length of a bytes field."""
    return _LENGTHS[size] if size < 4096 else _varint(size)


def encode_header(header: PackHeader) -> bytes:
    """The pack's bytes before its tuples; constant for all of them."""
    out = io.BytesIO()
    fastavro.schemaless_writer(
        out,
        _header_schema(),
        {
            "format": FORMAT,
            "cluster": header.cluster,
            "chain": header.chain,
            "origin": header.origin,
            "schema_name": header.table.schema,
            "table_name": header.table.table,
            "partition": header.partition,
            "epoch": header.epoch,
            "batch": header.batch,
            "dek_id": header.dek_id,
            "relation": header.relation,
            "transactions": [t._asdict() for t in header.transactions],
        },
    )
    return out.getvalue()


def header_digest(header_bytes: bytes) -> bytes:
    """SHA-256 of the encoded header: what binds every tuple to its envelope."""
    return hashlib.sha256(header_bytes).digest()


def encode_pack(header_bytes: bytes, records: list[bytes], frame: bytes = b"") -> bytes:
    """Join the header and the encoded tuples (each clear ‖ nonce ‖ length ‖ ciphertext) to one message.

    `frame` stands before it, and is no part of the pack (framing.py).
    """
    return b"".join((frame, header_bytes, _varint(len(records)), *records, b"\0"))


def decode_header(message: bytes) -> tuple[PackHeader, int]:
    """Decode a pack's clear fields; returns them and the offset of the tuples.

    Raises DecodeError when the bytes are no pack of a format this version reads.
    """
    stream = io.BytesIO(message)
    try:
        raw: Any = fastavro.schemaless_reader(stream, _header_schema(), None)
    except Exception as error:  # fastavro raises many types on garbage; all mean the same here
        raise DecodeError(f"not a pack: {type(error).__name__}") from error
    if raw["format"] != FORMAT:
        raise DecodeError(f"pack format {raw['format']}, expected {FORMAT}", hint="upgrade this node")
    transactions = tuple(
        Transaction(t["xid"], t["commit_lsn"], t["commit_time"]) for t in raw["transactions"]
    )
    for _, position, time in transactions:
        if position < 0 or not MIN_TIME <= time <= MAX_TIME:
            raise DecodeError("a pack with a transaction's position or time out of range")
    header = PackHeader(
        raw["cluster"],
        raw["chain"],
        raw["origin"],
        TableName(raw["schema_name"], raw["table_name"]),
        raw["partition"],
        raw["epoch"],
        raw["batch"],
        raw["dek_id"],
        raw["relation"],
        transactions,
    )
    return header, stream.tell()


def _read_varint(data: bytes, pos: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if pos >= len(data) or shift > 35:
            raise DecodeError(f"truncated or oversized length at byte {pos}")
        byte = data[pos]
        pos += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
    if value & 1:
        raise DecodeError(f"negative length at byte {pos}")
    return value >> 1, pos


def decode_tuples(message: bytes, offset: int, digest: bytes) -> list[SealedTuple]:
    """Split a pack's tuples and compute each one's leaf; nothing is decrypted.

    `digest` is header_digest(message[:offset]). Raises DecodeError on malformed bytes, trailing ones
    included: the encoding is canonical, so that equal content has equal leaves.
    """
    count, pos = _read_varint(message, offset)
    if not count or length_prefix(count) != message[offset:pos]:
        raise DecodeError(
            f"a pack has at least one tuple, and their number in its shortest form: byte {offset}"
        )
    if count > len(message) // (CLEAR_SIZE + NONCE_SIZE + TAG_SIZE):
        raise DecodeError(f"a pack of {len(message)} bytes claims {count} tuples")
    # tuple.__new__ makes a SealedTuple without the Python frame of its own constructor: 0.17 µs of 1.8.
    unpack, sha, new = _CLEAR_INTS.unpack_from, hashlib.sha256, tuple.__new__
    end, head = len(message), CLEAR_SIZE + NONCE_SIZE
    leaf_prefix = b"\0" + digest
    out: list[SealedTuple] = []
    append = out.append
    for _ in range(count):
        body = pos + head
        if body >= end:
            raise DecodeError(f"truncated tuple at byte {pos}")
        # Lengths up to 8191 take one or two bytes: the common case without a call.
        size, second = message[body], message[body + 1] if body + 1 < end else 0
        if size < 0x80 and not size & 1:
            size, start = size >> 1, body + 1
        elif 0 < second < 0x80 <= size and not size & 1:
            size, start = (size & 0x7F | second << 7) >> 1, body + 2
        else:
            size, start = _read_varint(message, body)
            if length_prefix(size) != message[body:start]:
                raise DecodeError(f"length at byte {body} is not in its shortest form")
        stop = start + size
        if stop > end or size < TAG_SIZE:
            raise DecodeError(f"tuple at byte {pos} has an impossible length {size}")
        record = message[pos:stop]
        tx, lsn, index, op = unpack(record)
        leaf = sha(leaf_prefix + record).digest()
        nonce, aad = record[CLEAR_SIZE:head], digest + record[:CLEAR_SIZE]
        append(new(SealedTuple, (tx, lsn, index, op, nonce, message[start:stop], aad, leaf)))
        pos = stop
    if message[pos:] != b"\0":
        raise DecodeError(f"{end - pos} bytes after the last tuple, expected one array end")
    return out


def encode_relation(relation: Relation) -> bytes:
    """Plaintext of a descriptor record: format 2 for a table with generated columns, else format 1."""
    out = io.BytesIO()
    record: dict[str, Any] = {
        "format": FORMAT,
        "salt": relation.salt,
        "schema_name": relation.name.schema,
        "table_name": relation.name.table,
        "replica_identity": relation.replica_identity,
        "columns": [
            {
                "name": c.name,
                "key": c.key,
                "type_oid": c.type_oid,
                "typmod": c.typmod,
                "type_name": c.type_name,
            }
            for c in relation.columns
        ],
    }
    if relation.generated:
        record["format"] = _GENERATED_FORMAT
        record["generated"] = [{"name": name, "definition": digest} for name, digest in relation.generated]
    fastavro.schemaless_writer(out, schema(_relation_schema(record["format"])), record)
    return out.getvalue()


def _relation_schema(format_: int) -> str:
    return "relation_2" if format_ == _GENERATED_FORMAT else "relation"


def relation_hash(encoded: bytes) -> bytes:
    """What packs name: SHA-256 of the salted descriptor's plaintext."""
    return hashlib.sha256(encoded).digest()


def decode_relation(data: bytes) -> Relation:
    """Decode a descriptor record. Raises DecodeError."""
    stream = io.BytesIO(data)
    # The format comes first, as a varint in zigzag.
    wanted = _GENERATED_FORMAT if data[:1] == bytes((2 * _GENERATED_FORMAT,)) else FORMAT
    try:
        raw: Any = fastavro.schemaless_reader(stream, schema(_relation_schema(wanted)), None)
    except Exception as error:  # as in decode_header
        raise DecodeError(f"not a relation descriptor: {type(error).__name__}") from error
    generated = tuple((g["name"], g["definition"]) for g in raw.get("generated", ()))
    fits = raw["format"] == wanted and bool(generated) == (wanted == _GENERATED_FORMAT)
    if not fits or stream.tell() != len(data):
        raise DecodeError("relation descriptor of another format or with trailing bytes")
    columns = tuple(
        Column(c["name"], c["key"], c["type_oid"], c["typmod"], c["type_name"]) for c in raw["columns"]
    )
    if raw["replica_identity"] not in _IDENTITIES or len(columns) > MAX_COLUMNS:
        raise DecodeError(f"relation descriptor with an unknown replica identity, or {len(columns)} columns")
    if not all(0 <= column.type_oid <= _MAX_OID for column in columns):
        raise DecodeError("relation descriptor with a type id out of range")
    texts = [raw["schema_name"], raw["table_name"], *(name for name, _ in generated)]
    if any("\0" in text for text in (*texts, *(c.name for c in columns), *(c.type_name for c in columns))):
        raise DecodeError("relation descriptor with a NUL character in a name")
    return Relation(
        TableName(raw["schema_name"], raw["table_name"]),
        raw["replica_identity"],
        columns,
        raw["salt"],
        generated,
    )
