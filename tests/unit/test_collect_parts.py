"""Some partitions of a stream: a member collects and verifies its own; others' records are no strays."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.sealed_chain import CHAIN, CLUSTER, ORIGIN, SealedChain, read, rows
from vsql_consumers.collect import Collector
from vsql_consumers.collected import Ready
from vsql_consumers.members import is_alone
from vsql_consumers.unseal import Descriptor
from vsql_consumers.verify import Part, verify_batch
from vsql_shared import names
from vsql_shared.audit.chain import EMPTY_HEAD, ChainReader
from vsql_shared.audit.entries import (
    BY_ROW,
    EPOCH_OPENED,
    OPERATOR_ACTION,
    REPLICATION_BATCH,
    AuditEntry,
)
from vsql_shared.changes import PartitionRoot
from vsql_shared.errors import RecordError
from vsql_shared.wire.pack import decode_relation, relation_hash

TOPIC = names.data_topic(CLUSTER, CHAIN, "public", "t")
OTHER = names.data_topic(CLUSTER, CHAIN, "public", "u")


def _chain() -> SealedChain:
    chain = SealedChain()
    for n in range(12):
        chain.batch(rows("t", *range(n * 10, n * 10 + 5)), rows("u", n))
        if n == 6:
            chain.orphans(rows("t", 901))
            chain.restart()
    return chain


def _odd_of_t(entry: AuditEntry, root: PartitionRoot) -> bool:
    return root.topic == TOPIC and entry.batch % 2 == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 32))
def test_what_is_chosen_comes_whole_and_in_order_whatever_comes_first(seed: int) -> None:
    chain = _chain()
    # Descriptors came with batches that are somebody else's: they are known.
    known = read(chain.log, chain.trust).batches
    reading = read(chain.log, chain.trust, random.Random(seed), choose=_odd_of_t, known=_described(chain))
    assert reading.error is None
    assert [batch.batch for batch in reading.batches] == [1, 3, 5, 7, 9, 11]
    wanted = [t for one in known if one.batch % 2 for t in one.plaintexts if t.startswith(b"t:")]
    assert reading.texts == wanted
    assert reading.collector is not None
    assert reading.collector.buffered == 0


def _described(chain: SealedChain) -> dict[bytes, Descriptor]:
    return {relation_hash(text): Descriptor(decode_relation(text), text) for text in chain.relations.values()}


def test_a_record_that_is_replayed_among_others_batches_is_refused() -> None:
    chain = _chain()
    log = chain.log[TOPIC, 0]
    again = log[3]
    chain.batch(rows("t", 990))
    log.append(again)
    chain.batch(rows("t", 995))
    reading = read(chain.log, chain.trust, choose=lambda _, root: root.topic == TOPIC)
    assert reading.error is not None
    assert reading.error.record.startswith(f"{TOPIC}/0/")


def test_a_partition_nobody_asks_for_any_more_is_forgotten_and_read_again_where_it_is_needed() -> None:
    chain = _chain()
    choose = {1, 12}
    reading = read(
        chain.log, chain.trust, choose=lambda entry, _: entry.batch in choose, known=_described(chain)
    )
    collector = reading.collector
    assert isinstance(collector, Collector)
    assert set(collector.forget_idle()) == {(TOPIC, 0), (OTHER, 0)}
    assert collector.buffered == 0
    assert collector.forget_idle() == []


def test_a_part_is_held_against_its_own_root_alone() -> None:
    chain = SealedChain()
    prepared = chain.batch(rows("t", 1, 2, 3), rows("u", 4))
    collector = Collector(
        ChainReader(CLUSTER, CHAIN, ORIGIN, chain.trust, EMPTY_HEAD),
        chain.trust,
        (names.audit_topic(CLUSTER), 0),
        0,
        {},
        1 << 20,
        None,
        lambda _, root: root.topic == TOPIC,
    )
    for offset, (_, value) in enumerate(chain.log[names.audit_topic(CLUSTER), 0]):
        collector.feed(names.audit_topic(CLUSTER), 0, offset, value)
    assert collector.wanted() == [(TOPIC, 0, 0)]
    for offset, (_, value) in enumerate(chain.log[TOPIC, 0]):
        collector.feed(TOPIC, 0, offset, value)
    collector.next_ready()
    ready = collector.next_ready()
    assert ready is not None
    verified = verify_batch(prepared.entry, ready.parts, ORIGIN, whole=False)
    assert verified.changes == 3
    root = ready.parts[0].root
    assert verified.sub_roots == {(TOPIC, 0): root.sub_root}
    with pytest.raises(RecordError, match="the manifest says"):
        verify_batch(prepared.entry, ready.parts, ORIGIN)
    part = Part(root, [*ready.parts[0].packs, *ready.parts[0].packs])
    with pytest.raises(RecordError, match="dropped or inserted"):
        verify_batch(prepared.entry, [part], ORIGIN, whole=False)


# What is applied alone


@pytest.mark.parametrize(
    ("event", "detail", "continues", "skipped", "alone"),
    [
        (REPLICATION_BATCH, BY_ROW, False, False, False),
        (REPLICATION_BATCH, BY_ROW, True, False, True),
        (REPLICATION_BATCH, BY_ROW, False, True, True),
        (REPLICATION_BATCH, "{}", False, False, True),
        (REPLICATION_BATCH, '{"order":"source"}', False, False, True),
        (EPOCH_OPENED, "{}", False, False, True),
        (OPERATOR_ACTION, "{}", False, False, False),
    ],
)
def test_only_a_batch_that_says_so_is_not_applied_alone(
    event: str, detail: str, continues: bool, skipped: bool, alone: bool
) -> None:
    chain = SealedChain()
    base = chain.batch(rows("t", 1)).entry
    fields = {name: getattr(base, name) for name in base.__slots__}
    fields |= {"event_type": event, "detail": detail, "continues": continues}
    entry = AuditEntry(**fields)
    ready = Ready(2, chain.head, 2, {}, entry, b"", b"", [], skipped)
    assert is_alone(ready) is alone
    assert is_alone(ready._replace(entry=None))
