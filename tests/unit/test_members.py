"""Several members apply one stream: who gets what, and when a batch is complete."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsql_consumers.members import PartReceipt, Patience, assign, left_at, merge, shredded_rest, skipped
from vsql_consumers.quarantine import NAMED_MOST, as_detail, receipt_of_skipped
from vsql_shared.audit import merkle
from vsql_shared.audit.entries import (
    BY_ROW,
    MAX_DETAIL_SIZE,
    ORDER,
    REPLICATION_BATCH,
    AuditEntry,
    canonical_json,
)
from vsql_shared.audit.shredding import Destroyed
from vsql_shared.changes import PartitionRoot
from vsql_shared.errors import RecordError

Owners = dict[int, int | None]
OWNERS = st.dictionaries(st.integers(0, 40), st.one_of(st.none(), st.integers(0, 12)), max_size=24)


@given(OWNERS, st.sets(st.integers(0, 12), min_size=1, max_size=8))
def test_everybody_there_has_equally_many_give_or_take_one(owners: Owners, there: set[int]) -> None:
    given_ = assign(owners, sorted(there))
    assert given_.keys() == owners.keys()
    counts = Counter(member for member in given_.values())
    assert counts.keys() <= there
    spread = [counts[member] for member in there]
    assert max(spread) - min(spread) <= 1


@given(OWNERS, st.sets(st.integers(0, 12), min_size=1, max_size=8))
def test_no_more_shares_move_than_must(owners: Owners, there: set[int]) -> None:
    given_ = assign(owners, sorted(there))
    assert assign(given_, sorted(there)) == given_
    moved = sum(1 for share, member in owners.items() if member in there and given_[share] != member)
    least, more = divmod(len(owners), len(there))
    counts = sorted((Counter(owners.values())[member] for member in there), reverse=True)
    surplus = sum(max(0, has - least - (place < more)) for place, has in enumerate(counts))
    assert moved == surplus


@given(OWNERS)
def test_with_nobody_there_nobody_has_anything(owners: Owners) -> None:
    assert set(assign(owners, []).values()) <= {None}


# Completeness

ROOTS = [bytes([number]) * 32 for number in range(4)]


def manifest(rows: int = 10) -> AuditEntry:
    return AuditEntry(
        cluster="c",
        chain="pub.a",
        epoch=1,
        incarnation=bytes(16),
        sequence=7,
        event_id=bytes(16),
        event_type=REPLICATION_BATCH,
        event_timestamp=1,
        source_node_id="a",
        signer_node_id="a",
        batch_lsn_start=1,
        batch_lsn_end=2,
        prev_event_hash=bytes(32),
        batch=5,
        row_count=rows,
        record_count=40,
        merkle_root=merkle.batch_root(ROOTS),
        partitions=tuple(PartitionRoot("t", n, 0, 0, 1, 10, root) for n, root in enumerate(ROOTS)),
        detail=canonical_json({ORDER: BY_ROW}),
    )


def part(places: Sequence[int], rows: int, roots: Sequence[bytes] = ROOTS) -> PartReceipt:
    return PartReceipt(7, min(places), {f"t/{n}": roots[n].hex() for n in places}, {"applied": rows}, 1)


@pytest.mark.parametrize(
    "split",
    [[[0, 1, 2, 3]], [[0, 2], [1, 3]], [[0], [1], [2], [3]]],
    ids=["one", "two", "four"],
)
def test_a_batch_is_complete_when_all_of_its_parts_are_there(split: list[list[int]]) -> None:
    found = [part(places, 10 if place == 0 else 0) for place, places in enumerate(split)]
    for some in itertools.chain.from_iterable(
        itertools.combinations(found, size) for size in range(len(found))
    ):
        assert merge(manifest(), some) is None
    whole = merge(manifest(), found)
    assert whole is not None
    assert whole.root == manifest().merkle_root
    assert whole.verdicts["applied"] == 10


def test_a_part_that_is_there_twice_is_refused() -> None:
    with pytest.raises(RecordError, match="applied twice"):
        merge(manifest(), [part([0, 1], 5), part([1, 2, 3], 5)])


def test_a_part_of_another_batch_is_refused() -> None:
    other = PartReceipt(7, 9, {"t/9": ROOTS[0].hex()}, {"applied": 1}, 1)
    with pytest.raises(RecordError, match="none of the batch"):
        merge(manifest(), [other])


@pytest.mark.parametrize(
    "found",
    [
        [part([0, 1, 2, 3], 9)],
        [part([0, 1, 2, 3], 10, [*ROOTS[:3], bytes(32)])],
    ],
    ids=["a change is missing", "another root"],
)
def test_what_members_found_must_be_what_was_signed(found: list[PartReceipt]) -> None:
    with pytest.raises(RecordError, match="the manifest says"):
        merge(manifest(), found)


def over(places: Sequence[int], *said: tuple[int, int]) -> PartReceipt:
    """Parts of which transactions (xid, changes) were passed over."""
    detail = [
        {
            "xid": xid,
            "lsn": f"ABCDEF01/{xid:08X}",
            "decision": 123_456_789,
            "verdict": "skipped",
            "changes": changes,
        }
        for xid, changes in said
    ]
    parts = part(places, 0).parts
    return PartReceipt(
        7, min(places), parts, {"skipped": sum(changes for _, changes in said)}, 1, {"passed_over": detail}
    )


def test_what_was_passed_over_is_said_of_the_whole_batch_each_transaction_once() -> None:
    whole = merge(manifest(), [part([0], 4), over([1], (3, 1)), over([2, 3], (3, 2), (4, 3))])
    assert whole is not None
    assert whole.verdicts == {"applied": 4, "skipped": 6}
    assert [(said["xid"], said["changes"]) for said in whole.passed_over] == [(3, 3), (4, 3)]


def test_what_all_parts_passed_over_fits_into_one_entry() -> None:
    first = 4_000_000_000
    many = [over([place], *((first + xid * 4 + place, 1) for xid in range(NAMED_MOST))) for place in range(4)]
    whole = merge(manifest(rows=4 * NAMED_MOST), many)
    assert whole is not None
    detail = as_detail(whole.passed_over)
    assert len(canonical_json(detail)) < MAX_DETAIL_SIZE
    assert len(detail["passed_over"]) == NAMED_MOST + 1
    assert sum(said["changes"] for said in detail["passed_over"]) == 4 * NAMED_MOST
    assert sum(said.get("transactions", 1) for said in detail["passed_over"]) == 4 * NAMED_MOST


def test_parts_whose_key_was_destroyed_are_counted_beside_those_that_could_be_opened() -> None:
    said = Destroyed("kek:1", "pub.a", "ab" * 32, ("dek",), 9, 1).as_detail()
    one = PartReceipt(7, 0, part([0, 1], 4).parts, {"applied": 4}, 1)
    two = PartReceipt(7, 2, part([2, 3], 6).parts, {"shredded": 6}, 1, said)
    whole = merge(manifest(), [one, two])
    assert whole is not None
    assert whole.verdicts == {"applied": 4, "shredded": 6}
    assert whole.detail == {"shredded": {"kek_id": "kek:1", "sequence": 9, "order": "ab" * 32}}


# A batch that is skipped


def test_a_skipped_batch_does_not_deny_what_members_applied_of_it() -> None:
    receipt = receipt_of_skipped(manifest(), b"", [part([0, 2], 4), over([3], (3, 1))])
    assert receipt.verdicts == {"applied": 4, "skipped": 6}
    assert receipt.detail == {"partitions_applied": [0, 2, 3]}


def test_a_skipped_batch_says_what_was_shredded_of_it_and_does_not_call_it_applied() -> None:
    said = Destroyed("kek:1", "pub.a", "ab" * 32, ("dek",), 9, 1).as_detail()
    two = PartReceipt(7, 1, part([1, 2], 0).parts, {"shredded": 3}, 1, said)
    receipt = receipt_of_skipped(manifest(), b"", [part([0], 4), two])
    assert receipt.verdicts == {"applied": 4, "shredded": 3, "skipped": 3}
    assert receipt.detail == {**said, "partitions_applied": [0]}
    shredded = receipt_of_skipped(manifest(), b"", [two])
    assert shredded.verdicts == {"shredded": 3, "skipped": 7}
    assert shredded.detail == said


def test_a_skipped_batch_says_which_of_its_transactions_are_committed() -> None:
    done = PartReceipt(7, 0, {}, {"applied": 3, "lost": 1}, None, {"transactions_applied": 2})
    receipt = receipt_of_skipped(manifest(), b"", [done])
    assert receipt.verdicts == {"applied": 3, "lost": 1, "skipped": 6}
    assert receipt.detail == {"transactions_applied": 2}


def test_a_batch_whose_key_was_destroyed_half_way_says_which_of_its_transactions_are_committed() -> None:
    by = Destroyed("kek:1", "pub.a", "ab" * 32, ("dek",), 9, 1).as_detail()
    done = PartReceipt(7, 0, {}, {"applied": 3, "lost": 1}, None, {"transactions_applied": 2})
    verdicts, detail = shredded_rest(manifest(), by, [done])
    assert verdicts == {"applied": 3, "lost": 1, "shredded": 6}
    assert detail == {**by, "transactions_applied": 2}
    assert shredded_rest(manifest(), by, []) == ({"shredded": 10}, by)


def test_a_batch_nobody_applied_anything_of_is_skipped_as_a_whole() -> None:
    assert skipped(manifest(), []) == ({"skipped": 10}, {})


# Where a member stopped


@pytest.mark.parametrize(
    ("stops", "left"),
    [
        ({0: None, 1: None}, []),
        ({2: 7}, [2]),
        ({3: 6, 1: 5}, [1, 3]),
        ({2: 8}, []),
        ({9: 7}, []),
    ],
    ids=["nobody stopped", "at it", "before it, when it was not known", "behind it", "another share"],
)
def test_a_share_is_left_at_the_first_batch_that_needs_it(
    stops: dict[int, int | None], left: list[int]
) -> None:
    assert left_at(manifest(), stops) == left


def test_who_waits_long_asks_seldom_and_asks_soon_again_once_something_came() -> None:
    patience, now, asked = Patience(), 0.0, 0
    while now < 10:
        asked += patience.due(now)
        now += Patience.SHORTEST
    assert asked < 10 / Patience.LONGEST + 10
    patience.heard()
    assert patience.due(now)
    assert not patience.due(now)
    assert patience.due(now + Patience.SHORTEST)
