"""What becomes of an error, how a change is named, and what a transaction leaves that is passed over."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.unit.sealed_chain import CHAIN, SealedChain
from vsql_consumers.collected import Decided
from vsql_consumers.groups import Group
from vsql_consumers.means import LAST_BATCH, Totals
from vsql_consumers.parking import Lies, Opens, parked_parts, prefix
from vsql_consumers.quarantine import Refusal
from vsql_consumers.replaying import _parts, only
from vsql_consumers.state import Position
from vsql_consumers.window import in_words, runs, transactions
from vsql_shared.audit.entries import MAX_DETAIL_SIZE, canonical_json
from vsql_shared.changes import SEQUENCES, Column, Op, OpenedBatch, Relation, TableName, Transaction
from vsql_shared.errors import RowError
from vsql_shared.pg.reactions import TABLE, Reaction, reaction

PAGE = Path(__file__).parents[2] / "docs" / "operations" / "apply-errors.md"
T, U = TableName("public", "t"), TableName("public", "u")
FIRST, SECOND, THIRD = Transaction(741, 0x100, 1), Transaction(742, 0x200, 2), Transaction(743, 0x300, 3)


def test_the_page_for_operators_has_the_table_of_the_code() -> None:
    listed = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert listed == [(rule.state, rule.reaction.value, rule.words) for rule in TABLE]


def test_the_table_names_each_state_once_and_in_order() -> None:
    states = [rule.state for rule in TABLE]
    assert states == sorted(set(states))
    assert {len(state) for state in states} == {2, 5}


REACTIONS = {
    "23505": Reaction.STOP,
    "22P02": Reaction.STOP,
    "P0001": Reaction.STOP,
    "54000": Reaction.STOP,
    "40P01": Reaction.RETRY,
    "53100": Reaction.RETRY,
    "57P01": Reaction.RETRY,
    "57P04": Reaction.MEND,
    "08006": Reaction.RETRY,
    "55P03": Reaction.RETRY,
    "55000": Reaction.MEND,
    "42P01": Reaction.MEND,
    "42501": Reaction.MEND,
    "25006": Reaction.MEND,
    "XX001": Reaction.MEND,
    "0A000": Reaction.MEND,
    "HV000": Reaction.MEND,
}


@pytest.mark.parametrize("state", REACTIONS)
def test_an_error_leads_to_what_the_table_says_of_it_or_of_its_class(state: str) -> None:
    assert reaction(state) is REACTIONS[state]
    assert reaction(state, writing=True) is REACTIONS[state]


def test_a_code_nobody_listed_is_a_triggers_own_while_rows_are_written() -> None:
    for state in ("UE001", "ZZ999", "20000"):
        assert reaction(state) is Reaction.MEND
        assert reaction(state, writing=True) is Reaction.STOP


def test_a_value_of_the_wrong_size_stops_where_rows_are_written_and_is_a_lost_connection_elsewhere() -> None:
    assert reaction("08P01", writing=True) is Reaction.STOP
    assert reaction("08P01") is Reaction.RETRY


def batch(*changes: tuple[int, int, TableName]) -> OpenedBatch:
    """Changes as (number of the transaction, op, table)."""
    relations = {
        str(t).encode(): Relation(t, "d", (Column("id", True, 23, -1, "integer"),)) for _, _, t in changes
    }
    return OpenedBatch(
        CHAIN, 1, 17, 20, b"h" * 32, 0, 0, len(changes), b"r" * 32, False, False,
        [FIRST, SECOND, THIRD], relations, [number for number, _, _ in changes],
        [op for _, op, _ in changes], [str(table).encode() for _, _, table in changes],
        [b"" for _ in changes],
    )  # fmt: skip


CHANGES = (
    (0, Op.INSERT, T), (1, Op.INSERT, T), (1, Op.UPDATE, U), (1, Op.UPDATE, U), (2, Op.INSERT, T),
    (2, Op.SEQUENCE, SEQUENCES),
)  # fmt: skip


def test_a_change_is_named_by_table_batch_number_and_transaction() -> None:
    assert in_words(batch(*CHANGES).place(3)) == "public.u (batch 17, change 3) of transaction 742 at 0/200"


def test_a_transaction_is_named_where_the_change_is_not_known() -> None:
    place = batch(*CHANGES).place(3)._replace(table=None, change=None)
    assert in_words(place) == "changes (batch 17) of transaction 742 at 0/200"
    assert in_words(place._replace(transaction=None)) == "changes (batch 17)"


def test_transactions_of_a_batch_are_taken_apart_in_order() -> None:
    found = batch(*CHANGES)
    assert list(transactions(found)) == [(0, 1), (1, 4), (4, 6)]
    assert [list(runs(found, *part)) for part in transactions(found)] == [
        [(0, 1)],
        [(1, 2), (2, 4)],
        [(4, 5), (5, 6)],
    ]
    assert list(runs(found)) == [(0, 2), (2, 4), (4, 5), (5, 6)]


def test_what_is_passed_over_is_counted_by_transaction_and_a_sequence_is_not_passed_over() -> None:
    found = batch(*CHANGES)
    assert found.passed_over() == {}
    found.passed = {1: "skipped", 2: "parked"}
    assert found.passed_over() == {1: 3, 2: 1}
    assert found.tables_of(1) == [T, U]
    assert found.tables_of(2) == [T]


def _group(verdict: str = "skipped") -> tuple[Group, OpenedBatch]:
    group, found = Group.after(Position(), CHAIN), batch(*CHANGES)
    group.batches, group.manifests = [found], [b"manifest"]
    group.pass_over(found, {SECOND: Decided(5, verdict)})
    return group, found


def test_a_receipt_says_what_was_passed_over_and_by_which_decision() -> None:
    group, found = _group()
    assert found.passed == {1: "skipped"}
    group.applied([{"applied": 3, "skipped": 3}])
    (receipt,) = group.receipts
    said = {"xid": 742, "lsn": "0/200", "decision": 5, "verdict": "skipped", "changes": 3}
    assert receipt.detail == {"passed_over": [said]}
    assert sum(receipt.verdicts.values()) == found.row_count
    assert group.honoured == {5}
    assert len(group.also) == 1, "its tables are marked with the commit"


def test_however_many_are_passed_over_the_acknowledgement_can_be_signed_and_sums_up() -> None:
    many = [Transaction(4_000_000_000 + n, (1 << 62) + n, n) for n in range(1_000)]
    group, found = Group.after(Position(), CHAIN), batch(*((n, Op.INSERT, T) for n in range(1_000)))
    found.transactions = many
    group.batches, group.manifests = [found], [b"manifest"]
    group.pass_over(found, {one: Decided(9, ("skipped", "parked")[one.xid % 2]) for one in many})
    group.applied([{"skipped": 500, "parked": 500}])
    (receipt,) = group.receipts
    assert len(canonical_json(receipt.detail)) < MAX_DETAIL_SIZE
    assert len(group.honoured) == 1
    said = Counter[str]()
    for one in receipt.detail["passed_over"]:
        said[one["verdict"]] += one["changes"]
    assert said == {"skipped": 500, "parked": 500}
    assert sum(one.get("transactions", 1) for one in receipt.detail["passed_over"]) == 1_000


def test_a_decision_on_another_transaction_with_the_same_xid_passes_nothing_over() -> None:
    group, found = Group.after(Position(), CHAIN), batch(*CHANGES)
    group.pass_over(found, {Transaction(742, 0x200, 999): Decided(5, "skipped")})
    assert found.passed == {}
    assert group.honoured == set()


def test_what_is_parked_says_which_batch_holds_how_much_of_which_transaction() -> None:
    _, found = _group("parked")
    lies, opens = Lies("c.parked", [4, 9]), Opens("k", [b"d"])
    (part,) = parked_parts(found, {SECOND: Decided(5, "parked")}, lies, opens)
    assert part == (SECOND, 5, 20, b"h" * 32, lies, 3, ["public.t", "public.u"], opens)
    _, skipped = _group("skipped")
    assert list(parked_parts(skipped, {SECOND: Decided(5, "skipped")}, lies, opens)) == []


def test_a_replay_holds_one_transaction_no_sequence_and_no_table_of_others() -> None:
    found = only(batch(*CHANGES), THIRD)
    assert (found.ops, found.tx_of, found.relation_of) == ([Op.INSERT], [2], [str(T).encode()])
    assert len(found.plaintexts) == 1
    assert found.place(0).transaction == THIRD
    assert only(batch(*CHANGES), SECOND).ops == [Op.INSERT, Op.UPDATE, Op.UPDATE]


def test_keys_of_the_dead_letter_topic_that_others_wrote_are_no_packs() -> None:
    chain = SealedChain()
    entry = chain.batch([("t", Op.INSERT, b"N")]).entry
    (root,) = entry.partitions
    here = f"{prefix(entry.chain, entry.epoch, entry.batch)}/{root.topic}/{root.partition}/"
    _, message = chain.log[root.topic, root.partition][root.first_offset]
    assert message is not None
    ends = ("\u00b2", "9" * 5_000, "-1", "007", "", "1/2")
    found = {f"{here}{end}": b"x" for end in ends} | {f"{here}{root.first_offset}": message}
    (part,) = _parts(found, entry)
    assert [pack.message for pack in part.packs] == [message]


def test_a_row_that_does_not_fit_blocks_and_is_named_without_its_value() -> None:
    error = RowError("CheckViolation (SQLSTATE 23514)", place=batch(*CHANGES).place(2), sqlstate="23514")
    refusal = Refusal.of_row(error, CHAIN, 9)
    assert refusal.state == "blocked"
    assert refusal.as_detail() == {
        "record": "public.u (batch 17, change 2) of transaction 742 at 0/200",
        "error": "CheckViolation (SQLSTATE 23514)",
        "sequence": 20,
        "sqlstate": "23514",
        "table": "public.u",
        "batch": 17,
        "change": 2,
        "transaction": {"xid": 742, "lsn": "0/200", "time": 2},
    }


def test_a_row_that_is_not_found_blocks_and_names_no_transaction() -> None:
    refusal = Refusal.of_row(RowError("RaiseException", sqlstate="P0001"), CHAIN, 9)
    assert (refusal.state, refusal.sequence, refusal.record) == ("blocked", 9, f"{CHAIN} from sequence 9 on")
    assert refusal.as_detail()["transaction"] is None


def test_care_is_taken_up_to_the_last_batch_that_may_be_at_fault() -> None:
    totals = Totals()
    totals.take_care(12)
    totals.take_care(12, singly=True)
    totals.passed(11)
    assert (totals.one_by_one, totals.singly) == (True, True)
    totals.passed(12)
    assert (totals.one_by_one, totals.singly) == (False, False)
    totals.take_care(20)
    totals.passed(LAST_BATCH)
    assert not totals.one_by_one
