"""Frames become runs of transactions: what is dropped, and what is kept in order."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsql_producers.pgoutput import POSTGRES_EPOCH_US, RelationMessage, TypeMessage
from vsql_producers.transactions import Descriptor, Run, Transactions
from vsql_shared.changes import TableName, Transaction
from vsql_shared.errors import DecodeError, DivergedError


def frame(message: bytes, lsn: int = 0) -> bytes:
    return b"w" + struct.pack(">QQq", lsn, lsn, 0) + message


def begin(at: int, xid: int = 1) -> bytes:
    return frame(b"B" + struct.pack(">QqI", at, 0, xid))


def commit(at: int) -> bytes:
    return frame(b"C" + struct.pack(">BQQq", 0, at, at + 8, 0))


def row(relation: int, tag: bytes = b"") -> bytes:
    return frame(b"I" + struct.pack(">I", relation) + b"N\0\0" + tag)


def relation(number: int, schema: str = "public", table: str = "t") -> bytes:
    names = schema.encode() + b"\0" + table.encode() + b"\0"
    return frame(b"R" + struct.pack(">I", number) + names + b"d" + struct.pack(">H", 0))


def truncate(*relations: int, options: int = 0) -> bytes:
    body = struct.pack(f">IB{len(relations)}I", len(relations), options, *relations)
    return frame(b"T" + body, lsn=9)


ORIGIN = frame(b"O" + struct.pack(">Q", 9) + b"other\0")
LOGICAL_MESSAGE = frame(b"M" + struct.pack(">BQ", 1, 9) + b"app\0" + struct.pack(">i", 1) + b"x")


def describe(message: RelationMessage, _: Mapping[int, TypeMessage]) -> Descriptor:
    name = TableName(message.schema, message.table)
    return Descriptor(name, str(name).encode(), str(message.relation_id).encode())


def feed(*frames: bytes, resume: int = 0) -> list[Run]:
    return Transactions(describe, resume).feed(list(frames))


def test_a_transaction_keeps_its_rows_in_order_with_its_commit_position() -> None:
    (run,) = feed(begin(100, 7), relation(1), row(1, b"a"), row(1, b"b"), commit(100))
    assert [f[-1:] for f in run.frames] == [b"a", b"b"]
    assert run.transaction[:2] == (7, 100)
    assert run.end_lsn == 108
    assert [(c.position, c.key) for c in run.relations] == [(0, b"\0\0\0\1")]


DROPPED = {
    "without a change": (begin(100), commit(100)),
    "with a logical message only": (begin(100), LOGICAL_MESSAGE, commit(100)),
    "of another origin": (begin(100), ORIGIN, relation(1), row(1), commit(100)),
    "of our own schema only": (begin(100), relation(1, "vsql_sync"), row(1), truncate(1), commit(100)),
}


@pytest.mark.parametrize("name", DROPPED)
def test_a_transaction_makes_no_run(name: str) -> None:
    transactions = Transactions(describe, 0)
    assert transactions.feed(list(DROPPED[name])) == []
    assert transactions.received_lsn == 108
    assert not transactions.is_open


@pytest.mark.parametrize(("commit_at", "kept"), [(99, 0), (100, 1), (101, 1)])
def test_what_commits_before_the_resume_position_is_already_in_a_manifest(commit_at: int, kept: int) -> None:
    assert len(feed(begin(commit_at), relation(1), row(1), commit(commit_at), resume=100)) == kept


def test_a_relation_described_in_a_dropped_transaction_is_known_to_the_next() -> None:
    (run,) = feed(begin(50), relation(1), row(1), commit(50), begin(200), row(1), commit(200), resume=100)
    assert [c.descriptor.name.table for c in run.relations] == ["t"]


def test_rows_of_our_own_schema_are_taken_out_of_a_mixed_transaction() -> None:
    (run,) = feed(
        begin(1), relation(1), relation(2, "vsql_sync", "streams"), row(2), row(1, b"a"), row(2), commit(1)
    )
    assert [f[-1:] for f in run.frames] == [b"a"]


def test_truncate_of_several_tables_is_one_record_each_in_order() -> None:
    (run,) = feed(begin(1), relation(1), relation(2), truncate(1, 2, options=3), commit(1))
    assert [f[25:26] for f in run.frames] == [b"T", b"T"]
    assert [f[30:] for f in run.frames] == [b"\3\0\0\0\2", b"\3\0\1\0\2"]


def test_a_relation_change_within_a_transaction_counts_from_its_place_on() -> None:
    (run,) = feed(begin(1), relation(1), row(1), relation(1, table="u"), row(1), row(1), commit(1))
    assert [(c.position, c.descriptor.name.table) for c in run.relations] == [(0, "t"), (1, "u")]


BROKEN = {
    "a row outside": (row(1),),
    "a TRUNCATE outside": (truncate(1),),
    "a commit outside": (commit(1),),
    "a transaction inside of another": (begin(1), begin(2)),
    "a commit of another transaction": (begin(1), commit(2)),
    "a TRUNCATE of a table nobody described": (begin(1), truncate(1)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_stream_out_of_order_is_refused(name: str) -> None:
    with pytest.raises(DecodeError):
        feed(*BROKEN[name])


@given(
    st.lists(st.integers(0, 4), max_size=12),
    st.lists(st.integers(0, 40), max_size=6),
)
def test_however_the_frames_arrive_the_transactions_are_the_same(sizes: list[int], cuts: list[int]) -> None:
    frames = [begin(0, 0), relation(1), commit(0)]
    for number, size in enumerate(sizes, 1):
        rows = [row(1, bytes((number, n))) for n in range(size)]
        frames += [begin(number * 10, number), *rows, commit(number * 10)]
    transactions = Transactions(describe, 0)
    bounds = sorted({0, len(frames), *(cut for cut in cuts if cut < len(frames))})
    got: dict[Transaction, list[bytes]] = {}
    ended: list[int] = []
    for start, stop in pairwise(bounds):
        for run in transactions.feed(frames[start:stop]):
            got.setdefault(run.transaction, []).extend(run.frames)
            if run.end_lsn:
                ended.append(run.transaction.xid)
    wanted = [n for n, size in enumerate(sizes, 1) if size]
    assert ended == wanted
    assert [[f[-2:] for f in rows] for rows in got.values()] == [
        [bytes((n, i)) for i in range(sizes[n - 1])] for n in wanted
    ]


def test_a_source_that_has_another_transaction_where_the_chain_ends_is_diverged() -> None:
    """Restored from a snapshot, a workload that runs anew may put one of the same size at the same place."""
    again = [begin(100, 7), relation(1), row(1, b"a"), commit(100)]
    for last in (None, (7, POSTGRES_EPOCH_US)):
        met = Transactions(describe, 108, 50, last=last)
        assert met.feed(again) == []
        met.require_met(200)
    for other in ((8, POSTGRES_EPOCH_US), (7, POSTGRES_EPOCH_US + 1)):
        with pytest.raises(DivergedError, match="holds another one there"):
            Transactions(describe, 108, 50, last=other).feed(again)
