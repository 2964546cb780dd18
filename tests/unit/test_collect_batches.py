"""Collect, verify and open: what comes out of an honest log, in whatever order it is delivered."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.sealed_chain import AUDIT, CHAIN, CLUSTER, SealedChain, read, rows
from vsql_shared import names
from vsql_shared.changes import Op
from vsql_shared.wire.pack import encode_relation


def _busy_chain() -> SealedChain:
    """Three tables, several transactions a batch, two epochs, orphans between them."""
    chain = SealedChain()
    chain.batch(rows("t", 1, 2, 3), rows("u", 4))
    chain.batch(rows("u", *range(5, 20)), [*rows("t", 20), *rows("u", 21), *rows("t", 22)])
    chain.orphans(rows("t", 901), rows("w", 902))
    chain.restart()
    chain.batch(rows("t", 23), rows("w", *range(24, 30)))
    chain.batch(rows("w", 30), rows("t", *range(31, 50)), rows("u", 50))
    return chain


_EXPECTED = [
    *(f"t:{n}" for n in (1, 2, 3)), "u:4", *(f"u:{n}" for n in range(5, 20)), "t:20", "u:21", "t:22",
    "t:23", *(f"w:{n}" for n in range(24, 30)), "w:30", *(f"t:{n}" for n in range(31, 50)), "u:50",
]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 32))
def test_every_order_of_delivery_gives_the_same_batches_in_source_order(seed: int) -> None:
    chain = _busy_chain()
    reading = read(chain.log, chain.trust, random.Random(seed))
    assert reading.error is None
    assert [text.decode() for text in reading.texts] == _EXPECTED
    assert [batch.batch for batch in reading.batches] == [1, 2, 3, 4]
    assert reading.entries == list(range(1, 7))
    # The orphan of t lies below a later manifest's range or before it: passed over, never applied.
    assert reading.collector is not None
    assert reading.collector.buffered == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 32))
def test_a_small_buffer_pauses_what_runs_ahead_and_changes_nothing(seed: int) -> None:
    chain = SealedChain()
    for n in range(40):
        chain.batch(rows("t", *range(n * 20, n * 20 + 20)), rows("u", n))
    limit = 8_000
    reading = read(chain.log, chain.trust, random.Random(seed), buffer_bytes=limit)
    assert reading.error is None
    assert len(reading.batches) == 40
    # One batch may always be held, and one record passes before a partition is paused.
    assert reading.most_buffered <= limit + 2 * 12_000


def test_changes_keep_their_transactions_operations_and_descriptors() -> None:
    chain = SealedChain()
    chain.batch(
        [("t", Op.INSERT, b"a"), ("u", Op.DELETE, b"b")], [("t", Op.UPDATE, b"c"), ("t", Op.TRUNCATE, b"d")]
    )
    batch = read(chain.log, chain.trust).batches[0]
    assert batch.ops == [Op.INSERT, Op.DELETE, Op.UPDATE, Op.TRUNCATE]
    assert batch.tx_of == [0, 0, 1, 1]
    assert [tx.xid for tx in batch.transactions] == [700, 701]
    assert [batch.relations[name].name.table for name in batch.relation_of] == ["t", "u", "t", "t"]
    assert batch.row_count == 4


def test_pieces_are_joined_to_one_change_also_across_packs_and_other_tables() -> None:
    chain = SealedChain(tuples_per_pack=2)
    chain.batch(
        [
            ("t", Op.PIECE, b"one "),
            ("u", Op.INSERT, b"between"),
            ("t", Op.PIECE, b"large "),
            ("t", Op.UPDATE, b"value"),
            ("t", Op.INSERT, b"small"),
        ]
    )
    batch = read(chain.log, chain.trust).batches[0]
    assert batch.plaintexts == [b"between", b"one large value", b"small"]
    assert batch.ops == [Op.INSERT, Op.UPDATE, Op.INSERT]


def test_fragments_come_one_by_one_and_a_new_epoch_says_they_are_void() -> None:
    chain = SealedChain()
    chain.batch(rows("t", 1))
    chain.batch(rows("t", 2), continues=True)
    first_fragment = chain.head.sequence
    chain.batch(rows("t", 3), continues=True)
    chain.restart()
    chain.batch(rows("t", 2), continues=True)
    chain.batch(rows("t", 3, 4))
    reading = read(chain.log, chain.trust)
    assert reading.error is None
    assert [batch.continues for batch in reading.batches] == [False, True, True, True, False]
    assert reading.texts[-3:] == [b"t:2", b"t:3", b"t:4"]
    assert first_fragment == 3


def test_entries_of_a_fenced_off_process_and_losers_of_a_race_are_void() -> None:
    chain = SealedChain()
    chain.batch(rows("t", 1))
    loser = SealedChain()  # another process, same key, that saw the same head and came later
    loser.log = chain.log
    old = chain.packs_of(rows("t", 99))
    head, writer, lost_epoch = chain.head, chain.writer, loser.writer
    chain.restart()
    chain.log[AUDIT].append((None, old.encoded))  # the old process's manifest, after the new epoch
    chain.batch(rows("t", 2))
    assert (head.epoch, writer is lost_epoch) == (1, False)
    reading = read(chain.log, chain.trust)
    assert reading.error is None
    assert reading.texts == [b"t:1", b"t:2"]
    assert reading.collector is not None
    assert reading.collector.voids >= 1


def test_late_packs_of_an_ended_epoch_are_orphans_wherever_they_land() -> None:
    chain = SealedChain()
    chain.batch(rows("t", 1))
    topic = (names.data_topic(CLUSTER, CHAIN, "public", "t"), 0)
    mark = len(chain.log[topic])
    chain.orphans(rows("t", 66))
    late = chain.log[topic][mark:]
    del chain.log[topic][mark:]
    chain.restart()
    prepared = chain.packs_of(rows("t", 2, 3, 4, 5, 6, 7))
    # The dead process's packs arrive in the middle of the new batch: offsets between its first and last.
    part = prepared.entry.partitions[0]
    assert part.packs == 2
    chain.publish(prepared)
    chain.log[topic] += late
    chain.batch(rows("t", 8))
    reading = read(chain.log, chain.trust)
    assert reading.error is None
    assert reading.texts == [f"t:{n}".encode() for n in (1, 2, 3, 4, 5, 6, 7, 8)]
    assert reading.collector is not None
    assert reading.collector.orphans == 1


@pytest.mark.parametrize("cut", range(1, 6))
def test_reading_goes_on_from_every_stored_position(cut: int) -> None:
    """Rule 9: progress, offsets and descriptors of any prefix are enough to go on, with the same result."""
    chain = _busy_chain()
    whole = read(chain.log, chain.trust)
    collector_log = {place: list(records) for place, records in chain.log.items()}
    from vsql_consumers.collect import Collector
    from vsql_consumers.unseal import Descriptor
    from vsql_shared.audit.chain import ChainReader
    from vsql_shared.wire.pack import decode_relation, relation_hash

    collector = Collector(
        ChainReader(CLUSTER, CHAIN, "node-a", chain.trust), chain.trust, AUDIT, 0, {}, 1 << 20
    )
    position: dict[tuple[str, int], int] = {}
    audit_offset, head, sequence = 0, chain.head, 0
    for offset, (_, value) in enumerate(collector_log[AUDIT]):
        collector.feed(*AUDIT, offset, value)
    while sequence < cut:
        for topic, partition, start in collector.wanted():
            for at in range(start, len(collector_log[topic, partition])):
                collector.feed(topic, partition, at, collector_log[topic, partition][at][1])
        ready = collector.next_ready()
        assert ready is not None
        position.update(ready.offsets)
        audit_offset, head, sequence = ready.audit_offset, ready.head, ready.sequence
    known = {
        relation_hash(text): Descriptor(decode_relation(text), text)
        for batch in whole.batches
        for text in map(encode_relation, batch.relations.values())
    }
    rest = read(chain.log, chain.trust, head=head, audit_offset=audit_offset, offsets=position, known=known)
    assert rest.error is None
    done = sum(1 for batch in whole.batches if batch.sequence <= cut)
    assert [b.plaintexts for b in rest.batches] == [b.plaintexts for b in whole.batches[done:]]
