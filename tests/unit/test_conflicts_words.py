"""What `syncctl conflicts` says of a row of the log: pure, with rows as PostgreSQL gives them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from vsql_consumers.contest import Kind
from vsql_ctl.commands.conflicts import as_dict, number_of, side_by_side, words_of_rows
from vsql_shared.changes import TableName
from vsql_shared.errors import UserError
from vsql_shared.pg.conflicts import KINDS, OUTCOMES, Conflict, Rows, Wanted
from vsql_shared.strategies import STRATEGIES

AT = datetime(2026, 2, 17, tzinfo=UTC)
ONE = Conflict(
    7, AT, "pub.node-a", "public.t", "update_origin_differs", "node-b", "node-a", AT, AT, 740, "KEPT_LOCAL",
    AT, "last_write_wins",
)  # fmt: skip


def test_the_kinds_that_can_be_asked_for_are_those_that_are_found() -> None:
    assert set(KINDS) == {kind.value for kind in Kind}


def test_the_page_says_of_each_kind_what_becomes_of_it_under_each_strategy() -> None:
    page = (Path(__file__).parents[2] / "docs" / "operations" / "conflicts.md").read_text(encoding="utf-8")
    lines = page[page.index("| conflict | last_write_wins") :].split("\n\n")[0].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert head == ["conflict", *STRATEGIES]
    assert [cells[0].split("**")[1] for cells in rows] == [
        "insert_exists", "update_origin_differs", "update_deleted", "delete_origin_differs",
        "update_missing", "delete_missing", "multiple_unique_conflicts", "a foreign row is gone",
    ]  # fmt: skip
    assert all(len(cells) == len(head) and all(cells) for cells in rows)


@pytest.mark.parametrize("text", ["7", "007", "CONFLICT-7", "conflict-007"])
def test_a_conflict_is_named_by_its_number_with_or_without_the_word(text: str) -> None:
    assert number_of(text) == 7


@pytest.mark.parametrize("text", ["", "0", "-7", "7a", "CONFLICT-", "CONFLICT 7", "7 OR 1=1", "9" * 40, "٧"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="no number of a conflict"):
        number_of(text)


@pytest.mark.parametrize(
    ("outcome", "stands"),
    [("KEPT_LOCAL", "node-b"), ("APPLIED_REMOTE", "node-a"), ("PENDING", None), (None, None)],
)
def test_whose_version_stands_follows_from_the_outcome(outcome: str | None, stands: str | None) -> None:
    one = replace(ONE, outcome=outcome)
    assert one.stands == stands
    assert as_dict(one)["stands"] == stands


def test_a_change_that_fell_to_nothing_known_stands_for_nobody() -> None:
    assert replace(ONE, local_origin=None).stands is None


def test_both_rows_stand_side_by_side_and_what_differs_is_marked() -> None:
    here = {"id": 1, "note": "a\x1b[2J", "gone": None}
    came = {"id": 1, "note": "b", "new": [1, "ü"]}
    assert list(side_by_side(here, came)) == [
        ("id", "1", "1", ""),
        ("note", r'"a\u001b[2J"', '"b"', "*"),
        ("gone", "null", "–", "*"),
        ("new", "–", '[1, "ü"]', "*"),
    ]
    assert list(side_by_side(None, {"id": 1})) == [("id", "–", "1", "")]


def test_rows_that_are_not_shown_say_why() -> None:
    (may_not,) = words_of_rows(ONE, None)
    assert "may not read them" in may_not
    (not_kept,) = words_of_rows(ONE, Rows(None, None))
    assert "PCI data" in not_kept
    (none,) = words_of_rows(replace(ONE, kind="delete_missing"), Rows(None, None))
    assert "none on either side" in none


def test_only_what_is_asked_for_is_a_condition_and_values_are_no_part_of_the_text() -> None:
    text, values = Wanted(since=AT, table=TableName("public", "t'--"), outcome="PENDING").condition()
    assert text.as_string() == (
        "true AND detected_at >= %(since)s AND table_schema = %(schema)s AND table_name = %(table)s"
        " AND resolution = %(outcome)s"
    )
    assert values == {"since": AT, "schema": "public", "table": "t'--", "outcome": "PENDING"}
    assert Wanted().condition()[1] == {}


def test_the_outcomes_are_those_of_the_guide() -> None:
    assert OUTCOMES == ("PENDING", "APPLIED_REMOTE", "KEPT_LOCAL", "MERGED", "REVERTED")
