"""Batches: whole transactions or one fragment, within their limits, in order, never empty."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vsql_producers.batches import Batch, Batches, BatchLimits
from vsql_producers.transactions import Descriptor, RelationChange, Run
from vsql_shared.changes import TableName, Transaction

HOUR = 3600.0


def rows(transaction: int, count: int, size: int = 10, first: int = 0) -> list[bytes]:
    return [f"{transaction}:{first + n}".encode().ljust(size) for n in range(count)]


def run(transaction: int, count: int, *, ends: bool = True, size: int = 10, first: int = 0) -> Run:
    frames = rows(transaction, count, size, first)
    return Run(
        Transaction(transaction, transaction * 100, 0), frames, [], transaction * 100 + 8 if ends else 0
    )


def batches(limit_rows: int = 10, nbytes: int = 10_000, linger: float = HOUR) -> Batches:
    return Batches(BatchLimits(limit_rows, nbytes, linger))


def test_transactions_gather_until_the_rows_are_enough() -> None:
    made = batches()
    assert made.add(run(1, 4), 0.0) == []
    assert made.add(run(2, 4), 0.0) == []
    (first,) = made.add(run(3, 4), 0.0)
    assert [t.xid for t in first.transactions] == [1, 2]
    assert (first.starts, first.end_lsn, first.continues) == ([0, 4], 208, False)
    assert [t.xid for t in made.rest()[0].transactions] == [3]


def test_bytes_cut_as_rows_do() -> None:
    made = batches(nbytes=100)
    made.add(run(1, 4, size=20), 0.0)
    (first,) = made.add(run(2, 4, size=20), 0.0)
    assert [t.xid for t in first.transactions] == [1]


def test_a_large_transaction_becomes_fragments_that_hold_nothing_else() -> None:
    made = batches()
    made.add(run(1, 3), 0.0)
    out = made.add(run(2, 25), 0.0)
    assert [(len(b.frames), b.continues, b.end_lsn) for b in out] == [
        (3, False, 108),
        (10, True, 0),
        (10, True, 0),
        (5, False, 208),
    ]
    assert all([t.xid for t in b.transactions] == [2] for b in out[1:])
    assert made.is_empty


def test_the_last_fragment_has_a_row_even_when_the_rows_fit_exactly() -> None:
    made = batches()
    out = made.add(run(1, 20, ends=False), 0.0)
    out += made.add(run(1, 0), 0.0)
    assert [(len(b.frames), b.continues) for b in out] == [(10, True), (10, False)]


def test_behind_a_batch_waits_longer_for_more_but_not_for_ever() -> None:
    made = Batches(BatchLimits(100, 10_000, 0.02, 0.25))
    made.add(run(1, 1), 5.0)
    assert made.due(5.1, more=True) == []
    (batch,) = made.due(5.1)
    assert len(batch.frames) == 1
    made.add(run(2, 1), 6.0)
    assert len(made.due(6.25, more=True)) == 1


def test_without_linger_a_commit_never_waits_even_behind() -> None:
    made = Batches(BatchLimits(100, 10_000, 0.0, 0.25))
    made.add(run(1, 1), 5.0)
    assert len(made.due(5.0, more=True)) == 1


def test_linger_counts_from_the_first_whole_transaction() -> None:
    made = batches(linger=0.02)
    made.add(run(1, 1), 5.0)
    made.add(run(2, 1), 5.01)
    assert made.due(5.019) == []
    (batch,) = made.due(5.02)
    assert len(batch.transactions) == 2
    assert made.due(HOUR) == []


def test_an_open_transaction_is_not_part_of_the_rest() -> None:
    made = batches()
    made.add(run(1, 2), 0.0)
    made.add(run(2, 2, ends=False), 0.0)
    assert [t.xid for t in made.rest()[0].transactions] == [1]
    assert not made.is_empty
    assert made.rest() == []


def test_a_row_larger_than_a_batch_is_a_batch() -> None:
    made = batches(nbytes=100)
    out = made.add(run(1, 3, size=500), 0.0)
    assert [(len(b.frames), b.continues) for b in out] == [(1, True), (1, True), (1, False)]


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), max_size=12),
    st.integers(1, 7),
    st.integers(10, 120),
)
def test_whatever_is_cut_nothing_is_lost_reordered_or_over_its_limit(
    transactions: list[list[int]], limit_rows: int, nbytes: int
) -> None:
    made = batches(limit_rows, nbytes)
    out: list[Batch] = []
    wanted: list[bytes] = []
    for number, parts in enumerate(transactions, 1):
        if not sum(parts):
            continue
        at = 0
        for place, count in enumerate(parts):
            last = place == len(parts) - 1
            one = run(number, count, ends=last, first=at)
            at += count
            wanted += one.frames
            if count or last:
                out += made.add(one, 0.0)
    out += made.rest()
    assert [frame for batch in out for frame in batch.frames] == wanted
    open_transaction = None
    for batch in out:
        assert batch.frames
        assert len(batch.frames) <= limit_rows
        assert batch.nbytes <= nbytes or len(batch.frames) == 1
        if open_transaction is not None or batch.continues:
            assert len(batch.transactions) == 1
            assert open_transaction in (None, batch.transactions[0])
        open_transaction = batch.transactions[0] if batch.continues else None
        assert bool(batch.end_lsn) != batch.continues
        for start, transaction in zip(batch.starts, batch.transactions, strict=True):
            assert batch.frames[start].startswith(f"{transaction.xid}:".encode())
    assert open_transaction is None


def described(transaction: int, *changes: tuple[str, bytes], ends: bool = True, first: int = 0) -> Run:
    """A run of two rows, before which tables are described."""
    made = run(transaction, 2, ends=ends, first=first)
    made.relations = [
        RelationChange(0, table.encode(), Descriptor(TableName("public", table), digest, digest))
        for table, digest in changes
    ]
    return made


def xids(made: list[Batch]) -> list[list[int]]:
    return [[transaction.xid for transaction in batch.transactions] for batch in made]


def test_a_table_described_anew_begins_a_batch() -> None:
    made = batches()
    assert made.add(described(1, ("t", b"old"), ("u", b"u")), 0.0) == []
    assert made.add(described(2, ("t", b"old")), 0.0) == [], "the walsender repeats itself"
    assert made.add(run(3, 1), 0.0) == []
    assert xids(made.add(described(4, ("u", b"u"), ("t", b"new")), 0.0)) == [[1, 2, 3]]
    assert made.add(described(5, ("v", b"first")), 0.0) == []
    assert xids(made.add(described(6, ("t", b"old")), 0.0)) == [[4, 5]]
    assert xids(made.rest()) == [[6]]


def test_a_definition_that_changes_within_a_transaction_parts_it_from_those_before() -> None:
    made = batches()
    made.add(described(1, ("t", b"old")), 0.0)
    assert made.add(run(2, 2, ends=False), 0.0) == []
    assert xids(made.add(described(2, ("t", b"new"), first=2), 0.0)) == [[1]]
    assert [(len(batch.frames), batch.end_lsn) for batch in made.rest()] == [(4, 208)]
