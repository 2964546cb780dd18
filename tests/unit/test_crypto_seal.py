"""Sealing and opening: round trips, and every way of altering what was sealed."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vsql_shared.changes import TableName, Transaction
from vsql_shared.crypto.dek import KeyLimits, OpeningKey, SealingKey
from vsql_shared.crypto.seal import open_tuples, seal_tuples
from vsql_shared.errors import DecodeError, UnsealError
from vsql_shared.wire.pack import (
    CLEAR,
    PackHeader,
    SealedTuple,
    decode_header,
    decode_tuples,
    encode_header,
    encode_pack,
    header_digest,
)

PLAINTEXTS = [b"", b"N\x00\x01t\x00\x00\x00\x02ok", bytes(300)]


def header(key: SealingKey, batch: int = 9) -> PackHeader:
    return PackHeader(
        "cluster",
        "pub.node-a",
        "node-a",
        TableName("public", "orders"),
        0,
        1,
        batch,
        key.dek_id,
        bytes(32),
        (Transaction(700, 1000, 5),),
    )


def new_key() -> SealingKey:
    return SealingKey.generate("cluster", "pub.node-a", 1, KeyLimits())


def opening(key: SealingKey) -> OpeningKey:
    return OpeningKey(key.secret, "cluster", "pub.node-a", key.dek_id, key.commitment)


def sealed_pack(key: SealingKey, plaintexts: list[bytes], batch: int = 9) -> tuple[bytes, list[bytes]]:
    head = encode_header(header(key, batch))
    clears = [CLEAR.pack(0, 900 + index, index, b"I") for index in range(len(plaintexts))]
    records, leaves = seal_tuples(key, header_digest(head), clears, plaintexts)
    return encode_pack(head, records), leaves


def read(message: bytes) -> list[SealedTuple]:
    _, offset = decode_header(message)
    return decode_tuples(message, offset, header_digest(message[:offset]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=5000), min_size=1, max_size=20))
def test_what_is_sealed_opens_to_itself_in_order_with_the_same_leaves(plaintexts: list[bytes]) -> None:
    key = new_key()
    message, leaves = sealed_pack(key, plaintexts)
    tuples = read(message)
    assert [record.leaf for record in tuples] == leaves
    assert [record.index for record in tuples] == list(range(len(plaintexts)))
    assert open_tuples(opening(key), tuples) == plaintexts
    assert key.tuples_used == len(plaintexts)
    assert key.bytes_used == sum(map(len, plaintexts))


def test_a_leaf_is_the_rfc_9162_hash_of_digest_and_encoded_tuple() -> None:
    key = new_key()
    digest = header_digest(encode_header(header(key)))
    records, leaves = seal_tuples(key, digest, [CLEAR.pack(0, 1, 0, b"I")], [b"x"])
    assert leaves == [hashlib.sha256(b"\x00" + digest + records[0]).digest()]


def test_equal_plaintexts_do_not_look_equal() -> None:
    key = new_key()
    message, leaves = sealed_pack(key, [b"4111111111111111"] * 50)
    tuples = read(message)
    assert len({record.ciphertext for record in tuples}) == 50
    assert len(set(leaves)) == 50
    assert b"4111" not in message


def test_every_flipped_bit_of_a_pack_is_refused() -> None:
    """Header, count, clear fields, nonce, length, ciphertext, tag and end: each is bound."""
    key = new_key()
    message, _ = sealed_pack(key, PLAINTEXTS[:2])
    ring = opening(key)
    for bit in range(len(message) * 8):
        altered = bytearray(message)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises((DecodeError, UnsealError)):
            open_tuples(ring, read(bytes(altered)))
    assert open_tuples(ring, read(message)) == PLAINTEXTS[:2]


def test_every_flipped_bit_of_the_authenticated_data_is_refused() -> None:
    key = new_key()
    record = read(sealed_pack(key, PLAINTEXTS)[0])[1]
    ring = opening(key)
    for bit in range(len(record.aad) * 8):
        aad = bytearray(record.aad)
        aad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(UnsealError):
            open_tuples(ring, [record._replace(aad=bytes(aad))])


def test_a_tuple_moved_into_another_batch_of_the_same_key_does_not_open() -> None:
    key = new_key()
    nine, ten = (sealed_pack(key, PLAINTEXTS, batch)[0] for batch in (9, 10))
    _, offset = decode_header(nine)
    _, other = decode_header(ten)
    grafted = nine[:offset] + ten[other:]
    with pytest.raises(UnsealError, match="tuple 0 of the batch"):
        open_tuples(opening(key), read(grafted))


def test_the_first_tuple_that_does_not_open_is_named_by_its_index_in_the_batch() -> None:
    key = new_key()
    tuples = read(sealed_pack(key, [b"a", b"b", b"c", b"d"])[0])
    tuples = [
        record._replace(index=record.index + 500) for record in tuples
    ]  # not authenticated here: aad is
    tuples[2] = tuples[2]._replace(ciphertext=tuples[1].ciphertext)
    with pytest.raises(UnsealError, match="tuple 502 of the batch does not open") as refused:
        open_tuples(opening(key), tuples)
    assert refused.value.record == "index 502"
    assert key.dek_id in refused.value.message


def test_another_key_opens_nothing() -> None:
    key = new_key()
    with pytest.raises(UnsealError, match="does not open"):
        open_tuples(opening(new_key()), read(sealed_pack(key, PLAINTEXTS)[0]))


@pytest.mark.parametrize("cut", [0, 1, 8, 15])
def test_a_ciphertext_shorter_than_its_tag_is_refused_as_unsealable(cut: int) -> None:
    key = new_key()
    record = read(sealed_pack(key, [b""])[0])[0]
    with pytest.raises(UnsealError):
        open_tuples(opening(key), [record._replace(ciphertext=record.ciphertext[:cut])])


@pytest.mark.parametrize(
    ("digest", "clears"),
    [
        (b"short", [bytes(15)]),
        (bytes(32), []),
        (bytes(32), [bytes(15), bytes(15)]),
        (bytes(32), [bytes(14)]),
        (bytes(32), [bytes(16)]),
    ],
)
def test_sealing_refuses_input_of_a_wrong_shape_without_using_a_nonce(
    digest: bytes, clears: list[bytes]
) -> None:
    key = new_key()
    with pytest.raises(ValueError, match="15 bytes of clear fields"):
        seal_tuples(key, digest, clears, [b"x"])
    assert key.tuples_used == 0


def test_sealing_nothing_gives_nothing() -> None:
    assert seal_tuples(new_key(), bytes(32), [], []) == ([], [])
    assert open_tuples(opening(new_key()), []) == []
