"""Where a target that joins later begins: only what every table's first copy covers is passed over."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.unit.sealed_chain import AUDIT, CHAIN, CLUSTER, ORIGIN, SealedChain, read, rows
from vsql_consumers.joining import JoinPoint, JoinScan
from vsql_consumers.quarantine import Refusal
from vsql_shared import names
from vsql_shared.audit.chain import ChainReader
from vsql_shared.changes import TableName
from vsql_shared.errors import VerificationError

T, U = TableName("public", "t"), TableName("public", "u")


def scan(chain: SealedChain, copied: Mapping[TableName, int]) -> JoinPoint | None:
    """Feed the audit partition until the scan has enough."""
    one = JoinScan(ChainReader(CLUSTER, CHAIN, ORIGIN, chain.trust), copied)
    for offset, (_, value) in enumerate(chain.log[AUDIT]):
        assert value is not None
        if not one.feed(offset, value, f"{AUDIT[0]}/{AUDIT[1]}/{offset}"):
            break
    return one.point


def at_work() -> SealedChain:
    """Two epochs of batches, and a third one that has just begun; sequences 1 2 3 | 4 5 | 6."""
    chain = SealedChain()
    chain.batch(rows("t", 1, 2), rows("u", 3))
    chain.batch(rows("t", 4))
    chain.restart()
    chain.batch(rows("u", 5, 6))
    chain.restart()
    return chain


def test_a_stream_begins_behind_the_last_epoch_the_copy_covers_and_counts_what_it_leaves() -> None:
    chain = at_work()
    point = scan(chain, {T: chain.lsn, U: chain.lsn + 7})
    assert point is not None
    assert (point.batches, point.rows) == (3, 6)
    assert (point.position.head, point.position.audit_offset) == (chain.head, 6)
    assert (point.receipts[0].sequence, point.receipts[0].batch, point.receipts[0].verdicts) == (
        5,
        3,
        {"covered": 6},
    )


def test_from_there_a_collector_goes_on_without_any_record_of_before() -> None:
    chain = at_work()
    point = scan(chain, {T: chain.lsn, U: chain.lsn})
    for name in ("t", "u"):
        place = (names.data_topic(CLUSTER, CHAIN, "public", name), 0)
        chain.log[place] = [(None, None)] * len(chain.log[place])
    chain.batch(rows("t", 7), rows("u", 8))
    assert point is not None
    start = point.position
    reading = read(chain.log, chain.trust, head=start.head, audit_offset=start.audit_offset)
    assert reading.error is None
    assert reading.texts == [b"t:7", b"u:8"]


def test_a_batch_that_straddles_the_copys_position_and_all_after_it_are_read() -> None:
    chain = at_work()
    whole = chain.lsn
    chain.batch(rows("t", 7), rows("t", 8))  # commits on both sides of the position
    chain.restart()
    chain.batch(rows("t", 9))
    for position in (whole, whole + 200, chain.lsn - 151):
        point = scan(chain, {T: position, U: position})
        assert point is not None
        assert (point.receipts[0].sequence, point.position.head.sequence, point.rows) == (5, 6, 6)


def test_the_table_that_was_copied_first_decides() -> None:
    chain = at_work()
    first = scan(chain, {T: chain.lsn, U: 1})
    assert first is None
    chain.restart()
    middle = scan(chain, {T: 1_450, U: chain.lsn})
    assert middle is not None
    assert (middle.receipts[0].sequence, middle.rows, middle.position.head.sequence) == (3, 4, 4)


def test_a_table_the_copy_does_not_have_is_never_passed_over() -> None:
    chain = at_work()
    assert scan(chain, {T: chain.lsn}) is None  # the first batch names u
    later = SealedChain()
    later.batch(rows("t", 1))
    later.restart()
    later.batch(rows("v", 2))
    later.restart()
    point = scan(later, {T: later.lsn + 1_000})
    assert point is not None
    assert (point.position.head.sequence, point.rows) == (3, 1)


def test_messages_and_sequences_are_passed_over_with_the_rows() -> None:
    chain = SealedChain()
    chain.batch(rows("t", 1), rows("pg_sequences", 2))
    chain.batch(rows("pg_logical_emit_message", 3))
    chain.restart()
    point = scan(chain, {T: chain.lsn})
    assert point is not None
    assert point.rows == 3


def test_fragments_count_with_the_end_of_their_transaction_only() -> None:
    chain = SealedChain()
    chain.batch(rows("t", 1))
    chain.batch(rows("t", 2, 3), continues=True)
    chain.restart()  # they are void: sent again, and longer
    before = chain.lsn
    chain.batch(rows("t", 2, 3), continues=True)
    chain.batch(rows("t", 4))
    chain.restart()
    short = scan(chain, {T: before})
    assert short is not None
    assert (short.batches, short.rows, short.receipts[0].batch, short.position.head.sequence) == (1, 1, 1, 4)
    whole = scan(chain, {T: chain.lsn})
    assert whole is not None
    assert (whole.batches, whole.rows, whole.receipts[0].batch, whole.position.head.sequence) == (3, 4, 4, 7)


def test_without_an_epoch_behind_what_is_covered_nothing_is_passed_over() -> None:
    chain = SealedChain()
    chain.batch(rows("t", 1))
    chain.batch(rows("t", 2))
    assert scan(chain, {T: chain.lsn}) is None


@pytest.mark.parametrize("attack", ["dropped", "altered", "garbage"])
def test_the_chain_is_verified_although_no_record_is_read(attack: str) -> None:
    chain = at_work()
    log = chain.log[AUDIT]
    if attack == "dropped":
        del log[1]
    elif attack == "altered":
        value = log[1][1]
        assert value is not None
        log[1] = (None, value[:-1] + bytes([value[-1] ^ 1]))
    else:
        log.insert(1, (None, b"garbage"))
    with pytest.raises(VerificationError) as caught:
        scan(chain, {T: chain.lsn, U: chain.lsn})
    assert caught.value.record == f"{AUDIT[0]}/{AUDIT[1]}/1"
    assert Refusal.of(caught.value, 1).sequence == 2  # the one to decide on, although nothing was applied
