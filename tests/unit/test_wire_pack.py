"""Packs, descriptors: bytes any Avro reader understands, and decoders that refuse everything else."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from importlib import resources
from typing import Any

import fastavro
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vsql_shared.changes import MAX_TIME, MIN_TIME, Column, Relation, TableName, Transaction
from vsql_shared.errors import DecodeError
from vsql_shared.wire.pack import (
    CLEAR,
    CLEAR_SIZE,
    MAX_COLUMNS,
    NONCE_SIZE,
    TAG_SIZE,
    PackHeader,
    decode_header,
    decode_relation,
    decode_tuples,
    encode_header,
    encode_pack,
    encode_relation,
    header_digest,
    length_prefix,
    relation_hash,
)

LONG = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(max_size=30)
NAME = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
POSITION, TIME = st.integers(0, 2**63 - 1), st.integers(MIN_TIME, MAX_TIME)
HEADERS = st.builds(
    PackHeader,
    cluster=TEXT,
    chain=TEXT,
    origin=TEXT,
    table=st.builds(TableName, TEXT, TEXT),
    partition=st.integers(-(2**31), 2**31 - 1),
    epoch=LONG,
    batch=LONG,
    dek_id=TEXT,
    relation=st.binary(min_size=32, max_size=32),
    transactions=st.lists(st.builds(Transaction, LONG, POSITION, TIME), max_size=5).map(tuple),
)
RELATIONS = st.builds(
    Relation,
    name=st.builds(TableName, NAME, NAME),
    replica_identity=st.sampled_from("dnfi"),
    columns=st.lists(
        st.builds(Column, NAME, st.booleans(), st.integers(0, 2**32 - 1), st.integers(-1, 2**31 - 1), NAME),
        max_size=6,
    ).map(tuple),
    salt=st.binary(min_size=16, max_size=16),
    generated=st.lists(st.tuples(NAME, st.binary(min_size=32, max_size=32)), max_size=3).map(tuple),
)
CLEARS = st.tuples(
    st.integers(0, 65535),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.binary(min_size=1, max_size=1),
)
RECORDS = st.lists(
    st.tuples(CLEARS, st.binary(min_size=12, max_size=12), st.binary(min_size=16, max_size=200)),
    min_size=1,
    max_size=8,
)
Record = tuple[tuple[int, int, int, bytes], bytes, bytes]

HEADER = PackHeader(
    "cluster",
    "pub.node-a",
    "node-a",
    TableName("public", "orders"),
    0,
    1,
    2,
    "dek-1",
    bytes(32),
    (Transaction(7, 8, 9),),
)


def encoded_record(record: Record) -> bytes:
    clear, nonce, sealed = record
    return CLEAR.pack(*clear) + nonce + length_prefix(len(sealed)) + sealed


def pack_of(header: PackHeader, records: list[Record]) -> bytes:
    return encode_pack(encode_header(header), [encoded_record(record) for record in records])


def with_fastavro(message: bytes) -> dict[str, Any]:
    text = resources.files("vsql_schemas").joinpath("avro/pack.avsc").read_text()
    stream = io.BytesIO(message)
    record: Any = fastavro.schemaless_reader(stream, fastavro.parse_schema(json.loads(text)), None)
    assert stream.read() == b""
    return dict(record)


@settings(max_examples=80, deadline=None)
@given(HEADERS, RECORDS)
def test_plain_fastavro_reads_every_pack_as_we_wrote_it(header: PackHeader, records: list[Record]) -> None:
    found = with_fastavro(pack_of(header, records))
    assert (found["cluster"], found["chain"], found["dek_id"]) == (
        header.cluster,
        header.chain,
        header.dek_id,
    )
    assert [t["xid"] for t in found["transactions"]] == [t.xid for t in header.transactions]
    assert [(CLEAR.unpack(t["clear"]), t["nonce"], t["encrypted_tuple"]) for t in found["tuples"]] == records


@settings(max_examples=80, deadline=None)
@given(HEADERS, RECORDS)
def test_decoding_gives_back_header_and_tuples(header: PackHeader, records: list[Record]) -> None:
    message = pack_of(header, records)
    found, offset = decode_header(message)
    assert found == header
    digest = header_digest(message[:offset])
    tuples = decode_tuples(message, offset, digest)
    assert [((t.tx, t.lsn, t.index, bytes([t.op])), t.nonce, t.ciphertext) for t in tuples] == records
    assert all(t.aad == digest + CLEAR.pack(*clear) for t, (clear, _, _) in zip(tuples, records, strict=True))


@settings(max_examples=80, deadline=None)
@given(RELATIONS)
def test_a_descriptor_survives_its_encoding(relation: Relation) -> None:
    assert decode_relation(encode_relation(relation)) == relation


def test_two_salts_give_equal_descriptors_different_hashes() -> None:
    one, other = (
        encode_relation(Relation(TableName("s", "t"), "d", (), salt)) for salt in (bytes(16), b"1" * 16)
    )
    assert relation_hash(one) != relation_hash(other)


def decode_all(message: bytes) -> tuple[PackHeader, list[Record]]:
    header, offset = decode_header(message)
    tuples = decode_tuples(message, offset, header_digest(message[:offset]))
    return header, [((t.tx, t.lsn, t.index, bytes([t.op])), t.nonce, t.ciphertext) for t in tuples]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_give_a_decode_error_or_a_pack_that_is_equal_again(data: bytes) -> None:
    for decode in (decode_all, decode_relation):
        try:
            decode(data)
        except DecodeError:
            continue
        if decode is decode_all:
            header, records = decode_all(data)
            assert decode_all(pack_of(header, records)) == (header, records)
        else:
            assert decode_relation(encode_relation(decode_relation(data))) == decode_relation(data)


@settings(max_examples=300, deadline=None)
@given(HEADERS, RECORDS, st.data())
def test_a_mutated_pack_gives_a_decode_error_or_a_pack_that_is_equal_again(
    header: PackHeader, records: list[Record], data: st.DataObject
) -> None:
    message = mutate(pack_of(header, records), data)
    try:
        found = decode_all(message)
    except DecodeError:
        return
    assert decode_all(pack_of(*found)) == found


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_tuples_decoded_from_arbitrary_bytes_are_exactly_those_bytes(data: bytes) -> None:
    try:
        tuples = decode_tuples(data, 0, bytes(32))
    except DecodeError:
        return
    records = [encoded_record(((t.tx, t.lsn, t.index, bytes([t.op])), t.nonce, t.ciphertext)) for t in tuples]
    assert encode_pack(b"", records) == data


@settings(max_examples=150, deadline=None)
@given(RELATIONS, st.data())
def test_a_mutated_descriptor_gives_a_decode_error_or_one_that_is_equal_again(
    relation: Relation, data: st.DataObject
) -> None:
    try:
        found = decode_relation(mutate(encode_relation(relation), data))
    except DecodeError:
        return
    assert decode_relation(encode_relation(found)) == found


def mutate(message: bytes, data: st.DataObject) -> bytes:
    """Change, cut or insert a few bytes."""
    out = bytearray(message)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(0, len(out) - 1)))
        kind = data.draw(st.sampled_from(["change", "cut", "insert", "drop"]))
        if kind == "change" and out:
            out[place] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del out[place:]
        elif kind == "drop" and out:
            del out[place]
        else:
            out[place:place] = data.draw(st.binary(max_size=9))
    return bytes(out)


TUPLE: Record = ((0, 5, 0, b"I"), bytes(12), bytes(20))
GOOD = pack_of(HEADER, [TUPLE, TUPLE])


@pytest.mark.parametrize("cut", range(len(GOOD)))
def test_a_truncated_pack_is_refused_at_every_length(cut: int) -> None:
    with pytest.raises(DecodeError):
        decode_all(GOOD[:cut])


BODY = encoded_record(TUPLE)
HEAD = CLEAR_SIZE + NONCE_SIZE


@pytest.mark.parametrize(
    ("tuples", "says"),
    [
        pytest.param(b"", "truncated or oversized length at byte 0", id="nothing"),
        pytest.param(b"\x00", "at least one tuple", id="an empty array"),
        pytest.param(b"\x00\x00", "at least one tuple", id="an empty block"),
        pytest.param(b"\x01" + BODY + b"\x00", "negative length", id="a block with a byte count"),
        pytest.param(b"\x82\x00" + BODY + b"\x00", "shortest form", id="a padded count"),
        pytest.param(b"\xfe\xff\xff\xff\x0f" + BODY, "claims 2147483647 tuples", id="two thousand million"),
        pytest.param(b"\xff" * 12, "oversized length", id="a count without end"),
        pytest.param(b"\x04" + BODY + b"\x00", "claims 2 tuples|truncated tuple", id="one tuple of two"),
        pytest.param(b"\x02" + BODY, "expected one array end", id="no end"),
        pytest.param(b"\x02" + BODY + b"\x00\x00", "2 bytes after the last tuple", id="a byte after the end"),
        pytest.param(b"\x02" + BODY + b"\x02" + BODY + b"\x00", "after the last tuple", id="a second block"),
        pytest.param(b"\x02" + BODY[:HEAD] + b"\x1e" + bytes(100), "impossible length 15", id="below a tag"),
        pytest.param(b"\x02" + BODY[:HEAD] + b"\x29" + bytes(100), "negative length", id="a negative size"),
        pytest.param(
            b"\x02" + BODY[:HEAD] + b"\xa8\x00" + bytes(100), "not in its shortest form", id="a padded size"
        ),
        pytest.param(
            b"\x02" + BODY[:HEAD] + b"\xfe\xff\xff\xff\x0f" + bytes(20), "impossible length", id="a huge size"
        ),
        pytest.param(
            b"\x02" + BODY[:HEAD] + b"\xff" * 8 + bytes(20), "oversized length", id="an endless size"
        ),
        pytest.param(b"\x02" + BODY[:HEAD] + bytes(20), "impossible length 0", id="no ciphertext"),
    ],
)
def test_malformed_tuples_are_refused(tuples: bytes, says: str) -> None:
    with pytest.raises(DecodeError, match=says):
        decode_tuples(tuples, 0, bytes(32))


def test_the_smallest_tuple_is_a_tag_alone() -> None:
    smallest = pack_of(HEADER, [((0, 0, 0, b"I"), bytes(12), bytes(TAG_SIZE))])
    assert decode_all(smallest)[1][0][2] == bytes(TAG_SIZE)


@pytest.mark.parametrize("size", [63, 64, 4095, 4096, 8191, 8192, 70_000, 2_000_000])
def test_lengths_around_each_step_of_the_encoding_come_back(size: int) -> None:
    record: Record = ((1, 2, 3, b"U"), bytes(12), bytes(size))
    message = pack_of(HEADER, [record])
    assert decode_all(message) == (HEADER, [record])
    assert with_fastavro(message)["tuples"][0]["encrypted_tuple"] == bytes(size)


def test_a_pack_of_a_later_format_says_what_to_do() -> None:
    with pytest.raises(DecodeError, match="pack format 2, expected 1; upgrade this node"):
        decode_header(b"\x04" + encode_header(HEADER)[1:])


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x02", id="the format alone"),
        pytest.param(b'{"json": 1}', id="JSON"),
        pytest.param(b"\x02" + b"\xff" * 9 + b"\x01", id="a name of 2^62 bytes"),
        pytest.param(b"\x02\x01", id="a name of -1 bytes"),
        pytest.param(b"\x02\x04\xff\xfe" + bytes(100), id="a name that is no UTF-8"),
    ],
)
def test_bytes_that_are_no_pack_are_refused(data: bytes) -> None:
    with pytest.raises(DecodeError, match="not a pack"):
        decode_header(data)


@pytest.mark.parametrize(
    "transaction",
    [Transaction(1, -1, 0), Transaction(1, 2, MAX_TIME + 1), Transaction(1, 2, MIN_TIME - 1)],
    ids=["before the WAL's start", "in the year 10000", "before the year 1"],
)
def test_a_transaction_no_source_can_have_committed_is_refused(transaction: Transaction) -> None:
    with pytest.raises(DecodeError, match="position or time out of range"):
        decode_header(encode_header(HEADER._replace(transactions=(transaction,))))


ID = Column("id", True, 20, -1, "bigint")


@pytest.mark.parametrize(
    ("relation", "says"),
    [
        (Relation(TableName("s", "t"), "x", (ID,)), "unknown replica identity"),
        (Relation(TableName("s", "t"), "", (ID,)), "unknown replica identity"),
        (Relation(TableName("s", "t"), "d", (ID,) * (MAX_COLUMNS + 1)), "1601 columns"),
        (Relation(TableName("s", "t"), "d", (replace(ID, type_oid=-1),)), "type id out of range"),
        (Relation(TableName("s", "t"), "d", (replace(ID, type_oid=2**32),)), "type id out of range"),
        (Relation(TableName("s", "t\0"), "d", (ID,)), "NUL"),
        (Relation(TableName("s", "t"), "d", (replace(ID, name="i\0d"),)), "NUL"),
        (Relation(TableName("s", "t"), "d", (replace(ID, type_name="\0"),)), "NUL"),
        (Relation(TableName("s", "t"), "d", (ID,), generated=(("g\0", bytes(32)),)), "NUL"),
    ],
)
def test_a_descriptor_of_what_no_server_can_have_is_refused(relation: Relation, says: str) -> None:
    with pytest.raises(DecodeError, match=says):
        decode_relation(encode_relation(relation))


def test_a_descriptor_with_trailing_bytes_or_of_another_format_is_refused() -> None:
    encoded = encode_relation(Relation(TableName("s", "t"), "d", (Column("id", True, 20, -1, "bigint"),)))
    # Format 2 ends in an array of generated columns, which is never empty.
    empty = b"\x04" + encoded[1:] + b"\0"
    for bad in (encoded + b"\0", b"\x06" + encoded[1:], empty):
        with pytest.raises(DecodeError, match="another format or with trailing bytes"):
            decode_relation(bad)
    for cut in range(len(encoded)):
        with pytest.raises(DecodeError):
            decode_relation(encoded[:cut])
