"""Rule 6 and P12, by values: what a server's identity and a slot's state say of the chain's positions."""

from __future__ import annotations

import pytest

from vsql_producers import slot as slots
from vsql_producers.epoch import check_source
from vsql_producers.replication import Identity
from vsql_producers.slot import Slot
from vsql_shared.audit.chain import EMPTY_HEAD, ChainHead
from vsql_shared.errors import DatabaseError, DivergedError

HEAD = ChainHead(epoch=1, sequence=9, lsn_end=1000, system_identifier="7", timeline=1)


@pytest.mark.parametrize(
    ("head", "identity", "points"),
    [
        (EMPTY_HEAD, Identity("8", 3, 5), {}),
        (HEAD, Identity("7", 1, 1000), {}),
        (HEAD, Identity("7", 2, 5000), {1: 1000}),
        (HEAD, Identity("7", 3, 5000), {1: 1200, 2: 1300}),
    ],
    ids=["a chain without entries", "the same server", "promoted at the chain's end", "promoted twice"],
)
def test_rule_6_positions_go_on_where_nothing_that_was_sent_is_lost(
    head: ChainHead, identity: Identity, points: dict[int, int]
) -> None:
    check_source(head, identity, points)
    assert head.lsn_end <= points.get(1, identity.wal_lsn)


@pytest.mark.parametrize(
    ("identity", "points", "said"),
    [
        (Identity("8", 1, 5000), {}, "was written on system 7, this server is 8"),
        (Identity("7", 1, 999), {}, "WAL ends at 0/3E7, and changes up to 0/3E8 were sent"),
        (Identity("7", 2, 5000), {1: 999}, "timeline 2 left timeline 1 at 0/3E7"),
        (Identity("7", 2, 5000), {}, "timeline 2 left timeline 1 at unknown"),
    ],
    ids=["another cluster", "restored from an older state", "a fork", "not one of its ancestors"],
)
def test_rule_6_a_server_whose_positions_mean_something_else_is_refused(
    identity: Identity, points: dict[int, int], said: str
) -> None:
    with pytest.raises(DivergedError, match=said):
        check_source(HEAD, identity, points)


@pytest.mark.parametrize(
    ("slot", "said"),
    [
        (None, "was created and is gone"),
        (Slot(5, "", "a physical slot"), "is gone, and a physical slot has its name"),
        (Slot(5, "wal_removed", ""), r"invalidated \(wal_removed\).*max_slot_wal_keep_size"),
        (Slot(5, "rows_removed", ""), r"invalidated \(rows_removed\).*hot_standby_feedback"),
        (Slot(5, "some_new_reason", ""), r"invalidated \(some_new_reason\)"),
    ],
)
def test_a_slot_that_was_made_and_cannot_be_used_is_a_gap(slot: Slot | None, said: str) -> None:
    with pytest.raises(DivergedError) as caught:
        slots.require_usable(slot, "vsql_1")
    assert caught.match(said)
    assert "syncctl status" in caught.value.hint


def test_a_slot_ahead_of_what_was_confirmed_is_a_gap_and_one_behind_is_a_crash() -> None:
    for confirmed in (999, 1000):
        slots.require_not_ahead(Slot(confirmed, "", ""), "vsql_1", 1000)
    with pytest.raises(DivergedError, match="stands at 0/3E9, and this stream confirmed 0/3E8 at most"):
        slots.require_not_ahead(Slot(1001, "", ""), "vsql_1", 1000)


def test_the_slot_of_somebody_else_is_not_taken_for_a_new_stream() -> None:
    with pytest.raises(DatabaseError, match="vsql_1 is a slot of database shop"):
        slots.require_free(Slot(5, "", "a slot of database shop"), "vsql_1")


def test_a_slot_lost_in_a_promotion_is_said_with_the_promotion() -> None:
    lost = DivergedError("slot x is gone")
    assert slots.explain(lost, HEAD, Identity("7", 1, 2000), {}) is lost
    assert slots.explain(lost, EMPTY_HEAD, Identity("7", 2, 2000), {}) is lost
    said = slots.explain(lost, HEAD, Identity("7", 2, 2000), {1: 1500})
    assert "slot x is gone; since it was last used, timeline 1 became 2 at 0/5DC" in said.message
