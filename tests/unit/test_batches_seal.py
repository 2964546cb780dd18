"""A sealed batch opens to exactly what was in it: order, descriptors, pieces, transactions, roots."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsql_producers.batches import Batch
from vsql_producers.pgoutput import make_frame, relation_key
from vsql_producers.seal import PackLimits, Place, Relations, SealedBatch, arrange, needs, seal
from vsql_producers.transactions import Descriptor, RelationChange
from vsql_shared import names
from vsql_shared.audit import merkle
from vsql_shared.changes import Op, TableName, Transaction
from vsql_shared.crypto.dek import KeyLimits, OpeningKey, SealingKey
from vsql_shared.crypto.seal import open_tuples
from vsql_shared.errors import DecodeError
from vsql_shared.wire.pack import decode_header, decode_tuples, header_digest, relation_hash

PLACE = Place("c", "pub.a", "a", 3)
LIMITS = PackLimits(4, 2_000, 1_000)


class Record(NamedTuple):
    """A record as it was opened."""

    place: int
    op: int
    table: str
    transaction: Transaction
    lsn: int
    plaintext: bytes
    relation: bytes


def descriptor(table: str, version: int = 0) -> Descriptor:
    encoded = f"descriptor of {table} {version}".encode()
    return Descriptor(TableName("public", table), encoded, relation_hash(encoded), (f"public.{table}.pan",))


def row(relation: int, plaintext: bytes, lsn: int = 5, op: int = Op.INSERT) -> bytes:
    return make_frame(op, relation_key(relation), lsn, plaintext)


def batch(*transactions: list[bytes], relations: list[RelationChange]) -> Batch:
    made = Batch()
    for number, frames in enumerate(transactions, 1):
        made.append(Transaction(number, number * 100, number), frames, [])
    made.relations = relations
    made.end_lsn = len(transactions) * 100 + 8
    return made


def described(*tables: str) -> list[RelationChange]:
    return [RelationChange(0, relation_key(n), descriptor(table)) for n, table in enumerate(tables, 1)]


def sealed(
    what: Batch, relations: Relations | None = None, limits: PackLimits = LIMITS
) -> tuple[SealedBatch, SealingKey]:
    key = SealingKey.generate("c", "pub.a", 1, KeyLimits())
    parts = arrange(what, relations or Relations(), limits.plaintext)
    return seal(what, parts, 9, key, PLACE, limits), key


def opened(made: SealedBatch, key: SealingKey) -> list[Record]:
    opening = OpeningKey(key.secret, "c", "pub.a", key.dek_id, key.commitment)
    out: list[Record] = []
    for topic in made.topics:
        leaves: list[bytes] = []
        for message in topic.messages:
            header, at = decode_header(message)
            assert (header.cluster, header.chain, header.origin, header.epoch) == PLACE[:4]
            assert (header.batch, header.dek_id) == (9, key.dek_id)
            assert topic.topic == names.data_topic("c", "pub.a", *header.table)
            tuples = decode_tuples(message, at, header_digest(message[:at]))
            assert {one.tx for one in tuples} == set(range(len(header.transactions)))
            for one, plaintext in zip(tuples, open_tuples(opening, tuples), strict=True):
                leaves.append(one.leaf)
                tx = header.transactions[one.tx]
                out.append(
                    Record(one.index, one.op, header.table.table, tx, one.lsn, plaintext, header.relation)
                )
        assert topic.records == len(leaves)
        assert topic.sub_root == merkle.root(leaves)
    out.sort()
    assert [record.place for record in out] == list(range(made.record_count))
    return out


def test_rows_of_two_tables_keep_their_order_and_descriptors_come_first() -> None:
    what = batch(
        [row(1, b"a", 11), row(2, b"b", 12)], [row(1, b"c", 13, Op.DELETE)], relations=described("t", "u")
    )
    made, key = sealed(what)
    assert [(r.op, r.table, r.lsn, r.transaction.xid, r.plaintext) for r in opened(made, key)] == [
        (Op.RELATION, "t", 11, 1, descriptor("t").encoded),
        (Op.INSERT, "t", 11, 1, b"a"),
        (Op.RELATION, "u", 12, 1, descriptor("u").encoded),
        (Op.INSERT, "u", 12, 1, b"b"),
        (Op.DELETE, "t", 13, 2, b"c"),
    ]
    assert (made.row_count, made.record_count, made.tables) == (3, 5, ("public.t", "public.u"))
    assert made.pci_columns == ("public.t.pan", "public.u.pan")


def test_a_descriptor_is_sent_once_in_an_epoch_and_again_in_the_next() -> None:
    relations = Relations()
    first, key = sealed(batch([row(1, b"a")], relations=described("t")), relations)
    again, other = sealed(batch([row(1, b"b")], relations=[]), relations)
    next_epoch, third = sealed(batch([row(1, b"c")], relations=described("t")))
    assert [[r.op for r in opened(m, k)] for m, k in ((first, key), (again, other), (next_epoch, third))] == [
        [Op.RELATION, Op.INSERT], [Op.INSERT], [Op.RELATION, Op.INSERT]
    ]  # fmt: skip


def test_a_table_that_changes_within_a_transaction_names_each_rows_own_descriptor() -> None:
    change = RelationChange(1, relation_key(1), descriptor("t", 1))
    what = batch([row(1, b"old"), row(1, b"new")], relations=[*described("t"), change])
    made, key = sealed(what)
    records = opened(made, key)
    assert [(r.op, r.relation == change.descriptor.hash) for r in records] == [
        (Op.RELATION, False), (Op.INSERT, False), (Op.RELATION, True), (Op.INSERT, True)
    ]  # fmt: skip


def test_a_row_too_large_for_a_message_travels_in_pieces() -> None:
    large = bytes(range(256)) * 10
    what = batch([row(1, b"a"), row(1, large, op=Op.UPDATE), row(1, b"z")], relations=described("t"))
    made, key = sealed(what)
    records = [r for r in opened(made, key) if r.op != Op.RELATION]
    assert [r.op for r in records] == [Op.INSERT, Op.PIECE, Op.PIECE, Op.UPDATE, Op.INSERT]
    assert b"".join(r.plaintext for r in records[1:4]) == large
    assert made.row_count == 3
    assert all(len(message) < 3_000 for message in made.topics[0].messages)


def test_packs_hold_no_more_tuples_than_allowed() -> None:
    made, key = sealed(batch([row(1, b"x") for _ in range(10)], relations=described("t")))
    assert len(made.topics[0].messages) == 3
    assert len(opened(made, key)) == 11


def test_a_row_of_a_table_nobody_described_is_refused() -> None:
    with pytest.raises(DecodeError):
        arrange(batch([row(7, b"x")], relations=described("t")), Relations(), 1_000)


def test_what_a_key_must_have_room_for_counts_descriptors_and_pieces() -> None:
    what = batch([row(1, bytes(2_500))], relations=described("t"))
    tuples, nbytes = needs(arrange(what, Relations(), 1_000))
    assert tuples == 4
    assert nbytes >= 2_500


CHANGE = st.tuples(st.integers(1, 3), st.binary(max_size=1_500))


@given(st.lists(st.lists(CHANGE, min_size=1, max_size=8), min_size=1, max_size=6), st.integers(1, 5))
def test_any_batch_opens_to_its_own_rows_in_order(
    transactions: list[list[tuple[int, bytes]]], tuples: int
) -> None:
    what = batch(
        *[[row(n, data) for n, data in one] for one in transactions], relations=described("t", "u", "v")
    )
    made, key = sealed(what, limits=PackLimits(tuples, 1_200, 700))
    got: list[tuple[str, int, bytes]] = []
    pending = b""
    for record in opened(made, key):
        if record.op == Op.PIECE:
            pending += record.plaintext
        elif record.op == Op.INSERT:
            got.append((record.table, record.transaction.xid, pending + record.plaintext))
            pending = b""
    assert got == [
        ("tuv"[n - 1], number, data) for number, one in enumerate(transactions, 1) for n, data in one
    ]
