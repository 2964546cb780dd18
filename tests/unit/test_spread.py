"""Rows over partitions: one identity, one partition, in one epoch; what has no place says so."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsql_producers.batches import Batch
from vsql_producers.pgoutput import make_frame, relation_key
from vsql_producers.relations import describe
from vsql_producers.scope import Scope
from vsql_producers.seal import PackLimits, Part, Place, Relations, arrange, seal
from vsql_producers.spread import NO_PLACE, Spread, identity_of
from vsql_producers.transactions import Descriptor, RelationChange
from vsql_shared.changes import Column, Op, TableName, Transaction
from vsql_shared.crypto.dek import KeyLimits, SealingKey
from vsql_shared.wire.pack import decode_header, relation_hash

T, U = TableName("public", "t"), TableName("public", "u")
SECRET = bytes(range(32))
Value = bytes | None | str
"""Bytes of a binary value, None for NULL, "u" for an unchanged one that lies outside of its row."""


def row(*values: Value) -> bytes:
    """TupleData."""
    parts = [struct.pack(">H", len(values))]
    for value in values:
        if isinstance(value, bytes):
            parts.append(b"b" + struct.pack(">I", len(value)) + value)
        else:
            parts.append(b"n" if value is None else b"u")
    return b"".join(parts)


def frame(op: int, plaintext: bytes, relation: int = 1) -> bytes:
    return make_frame(op, relation_key(relation), 7, plaintext)


def insert(*values: Value, relation: int = 1) -> bytes:
    return frame(Op.INSERT, b"N" + row(*values), relation)


def delete(*values: Value) -> bytes:
    return frame(Op.DELETE, b"K" + row(*values))


def update(*values: Value, old: tuple[Value, ...] | None = None) -> bytes:
    return frame(Op.UPDATE, (b"" if old is None else b"K" + row(*old)) + b"N" + row(*values))


@given(st.lists(st.one_of(st.none(), st.binary(max_size=9)), min_size=3, max_size=6), st.binary(max_size=9))
def test_all_changes_of_a_row_have_one_place(values: list[bytes | None], key: bytes) -> None:
    spread = Spread(SECRET, 16)
    values[1] = key
    before: list[Value] = [None] * len(values)
    before[1] = key
    places = {
        spread.place(T, (1,), one)
        for one in (insert(*values), update(*values), delete(*before), update(*values, old=tuple(before)))
    }
    assert len(places) == 1
    assert places <= set(range(16))


@pytest.mark.parametrize(
    ("what", "change"),
    {
        "a key that changes": update(b"new", b"x", old=(b"old", None)),
        "a key that is missing": insert(None, b"x"),
        "an unchanged key without the old one": update("u", b"x"),
        "TRUNCATE": frame(Op.TRUNCATE, b"\0\0\0\0\1"),
        "a whole old row": frame(Op.DELETE, b"O" + row(b"k", b"x")),
        "a row cut off": frame(Op.INSERT, (b"N" + row(b"k", b"x"))[:6]),
        "fewer columns than the key": frame(Op.INSERT, b"N" + row()),
        "nothing behind the old row": frame(Op.UPDATE, b"K" + row(b"k", None)),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_change_of_one_identity_has_no_place(what: str, change: bytes) -> None:
    assert Spread(SECRET, 16).place(T, (0,), change) == NO_PLACE, what


def test_a_key_that_lies_outside_of_its_row_and_did_not_change_keeps_its_place() -> None:
    assert identity_of(update("u", b"x", old=(b"large", None)), (0,)) == identity_of(
        insert(b"large", b""), (0,)
    )


def test_the_parts_of_a_key_are_told_apart() -> None:
    assert identity_of(insert(b"ab", b"c"), (0, 1)) != identity_of(insert(b"a", b"bc"), (0, 1))


def test_another_epochs_index_key_or_another_table_says_nothing_of_a_row() -> None:
    rows = [insert(n.to_bytes(4)) for n in range(64)]
    mine = [Spread(SECRET, 4).place(T, (0,), one) for one in rows]
    assert set(mine) == set(range(4))
    assert mine != [Spread(SECRET, 4).place(U, (0,), one) for one in rows]
    assert mine != [Spread(bytes(32), 4).place(T, (0,), one) for one in rows]


# A batch


def descriptor(version: int = 0, key: tuple[int, ...] = (0,), table: TableName = T) -> Descriptor:
    encoded = f"{table} {version}".encode()
    return Descriptor(table, encoded, relation_hash(encoded), (), key)


def arranged(
    relations: Relations, *frames: bytes, described: Descriptor | None = None, fragment: bool = False
) -> tuple[Batch, list[Part]]:
    batch = Batch(fragment=fragment)
    batch.append(Transaction(1, 100, 1), list(frames), [])
    if described is not None:
        batch.relations = [RelationChange(0, relation_key(1), described)]
    batch.end_lsn = 108
    return batch, arrange(batch, relations, 1_000)


def test_a_row_lies_in_its_partition_and_each_partition_has_the_descriptor_first() -> None:
    relations = Relations(Spread(SECRET, 4))
    rows = [insert(n.to_bytes(4)) for n in range(40)]
    batch, parts = arranged(relations, *rows, described=descriptor())
    assert batch.by_row
    assert {part.partition for part in parts} == set(range(4))
    spread = Spread(SECRET, 4)
    for part in parts:
        assert part.frames[0][25] == Op.RELATION
        assert all(spread.place(T, (0,), one) == part.partition for one in part.frames[1:])
        assert part.indexes == sorted(part.indexes)
    assert sorted(index for part in parts for index in part.indexes) == list(range(44))
    _, again = arranged(relations, *rows)
    assert not any(one[25] == Op.RELATION for part in again for one in part.frames)


def test_what_is_sealed_says_its_partition_and_has_a_root_of_its_own() -> None:
    relations = Relations(Spread(SECRET, 4))
    batch, parts = arranged(relations, *(insert(n.to_bytes(4)) for n in range(40)), described=descriptor())
    key = SealingKey.generate("c", "pub.a", 1, KeyLimits())
    sealed = seal(batch, parts, 1, key, Place("c", "pub.a", "a", 3), PackLimits(8, 2_000, 1_000))
    assert sealed.by_row
    assert [topic.partition for topic in sealed.topics] == list(range(4))
    assert len({topic.sub_root for topic in sealed.topics}) == 4
    for topic in sealed.topics:
        assert {decode_header(message)[0].partition for message in topic.messages} == {topic.partition}
    assert sum(topic.records for topic in sealed.topics) == sealed.record_count == 44


@pytest.mark.parametrize(
    ("what", "frames", "key", "fragment"),
    [
        ("a key changes", (insert(b"a"), update(b"c", old=(b"b",))), (0,), False),
        ("TRUNCATE", (frame(Op.TRUNCATE, b"\0\0\0\0\1"),), (0,), False),
        ("a table without a place for its rows", (insert(b"a"),), (), False),
        ("a part of a large transaction", (insert(b"a"),), (0,), True),
    ],
)
def test_a_batch_that_needs_the_order_of_the_source_says_so(
    what: str, frames: tuple[bytes, ...], key: tuple[int, ...], fragment: bool
) -> None:
    relations = Relations(Spread(SECRET, 4))
    batch, parts = arranged(relations, *frames, described=descriptor(key=key), fragment=fragment)
    assert not batch.by_row, what
    assert sum(len(part.frames) for part in parts) >= len(frames)


def test_a_new_definition_is_applied_alone_and_what_follows_it_is_not() -> None:
    relations = Relations(Spread(SECRET, 2))
    rows = [insert(n.to_bytes(4)) for n in range(20)]
    assert arranged(relations, *rows, described=descriptor())[0].by_row
    batch, parts = arranged(relations, rows[0], described=descriptor(1))
    assert not batch.by_row
    # The other partition has its first row under it now, and it is no news any more.
    batch, parts = arranged(relations, *rows)
    assert batch.by_row
    assert sum(one[25] == Op.RELATION for part in parts for one in part.frames) == 1


def test_a_table_is_seen_once_in_an_epoch_however_many_partitions_it_is_described_in() -> None:
    relations = Relations(Spread(SECRET, 4))
    rows = [insert(n.to_bytes(4)) for n in range(40)]
    arranged(relations, rows[0], described=descriptor())
    assert relations.fresh == [descriptor()]
    _, parts = arranged(relations, *rows)
    assert sum(one[25] == Op.RELATION for part in parts for one in part.frames) == 3
    assert relations.fresh == []
    arranged(relations, rows[0], described=descriptor(1))
    assert relations.fresh == [descriptor(1)]


def test_a_new_data_key_describes_its_tables_in_each_partition_and_says_nothing_new() -> None:
    relations = Relations(Spread(SECRET, 4))
    rows = [insert(n.to_bytes(4)) for n in range(40)]
    arranged(relations, *rows, described=descriptor())
    again = relations.copy()
    again.sent.clear()
    batch, parts = arranged(again, *rows)
    assert sum(one[25] == Op.RELATION for part in parts for one in part.frames) == 4
    assert batch.by_row
    assert again.fresh == []
    assert [part.partition for part in parts] == [part.partition for part in arranged(relations, *rows)[1]]


def test_a_new_definition_under_a_new_data_key_is_applied_alone_all_the_same() -> None:
    relations = Relations(Spread(SECRET, 2))
    arranged(relations, insert(b"abcd"), described=descriptor())
    before = relations.copy()
    arranged(relations, insert(b"abcd"), described=descriptor(1))
    before.sent.clear()
    batch, _ = arranged(before, insert(b"abcd"), described=descriptor(1))
    assert not batch.by_row
    assert before.fresh == [descriptor(1)]


@pytest.mark.parametrize(
    ("type_oid", "key"),
    [(23, (0,)), (25, (0,)), (1700, ()), (701, ())],
    ids=["int", "text", "numeric", "float"],
)
def test_a_key_whose_type_changed_to_one_of_several_spellings_spreads_no_rows(
    type_oid: int, key: tuple[int, ...]
) -> None:
    scope = Scope({T: None}, {}, {}, by_row=frozenset({T}))
    columns = (Column("id", True, type_oid, -1, "x"), Column("v", False, 1700, -1, "numeric"))
    assert describe(T, "d", columns, scope, bytes(16), ()).key == key


def test_without_partitions_nothing_changes() -> None:
    batch, parts = arranged(Relations(), insert(b"a"), insert(b"b"), described=descriptor())
    assert not batch.by_row
    assert [part.partition for part in parts] == [0]
