"""A row filter is one expression: what could end it and go on as SQL of its own is refused as text."""

from __future__ import annotations

import pytest

from vsql_shared.changes import TableName
from vsql_shared.errors import UserError
from vsql_shared.pg.row_filter import text_problem
from vsql_shared.pg.table_spec import TableSpec, parse_spec, parse_table


@pytest.mark.parametrize(
    "text",
    [
        "a = 1",
        "(a = 1) AND (b < 2 OR c IS NULL)",
        "v <> ');--'",
        "v = 'it''s' AND \"odd ) name\" = 1",
        r"v = E'\'; (' ",
        "v ~ '^a' AND x - -1 > 0",
        "v = '$1' AND n % 2 = 0",
    ],
)
def test_an_expression_passes(text: str) -> None:
    assert text_problem(text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("true), TABLE secrets WHERE (true", "parentheses"),
        ("(a = 1", "parentheses"),
        ("a = 1)", "parentheses"),
        (")(", "parentheses"),
        ("true; DROP TABLE t", "a semicolon"),
        ("true -- and so on", "a comment"),
        ("true /* x", "a comment"),
        ("v = $$x$$", "a $"),
        ("v = 'open", "a string without end"),
        ("v = €E'\\'; DROP TABLE t --'", "a semicolon"),
        (r"v = E'open\'", "a string without end"),
        ('"open = 1', "a name without end"),
        ("a = 1\0", "a zero byte"),
        ("a = " + "1" * 10_000, "longer than"),
    ],
)
def test_what_is_more_than_an_expression_is_refused(text: str, expected: str) -> None:
    problem = text_problem(text)
    assert problem is not None
    assert expected in problem


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("t WHERE (a = 1)", "(a = 1)"),
        ("t(*) where a = 1 and b", "a = 1 and b"),
        ("s.t(a, b) Where v = 'WHERE it (is'", "v = 'WHERE it (is'"),
        ('"where"', None),
    ],
)
def test_a_filter_is_written_after_the_table_as_in_sql(text: str, where: str | None) -> None:
    assert parse_spec(text).where == where


def test_a_filter_names_its_table_and_comes_last() -> None:
    assert parse_spec("s.t(a) WHERE (b)") == TableSpec(TableName("s", "t"), ("a",), False, "(b)")
    for text in ("* WHERE (a)", "t WHERE", "WHERE (a)", "t( WHERE a)", "where(a)"):
        with pytest.raises(UserError):
            parse_spec(text)
    with pytest.raises(UserError):
        parse_table("t WHERE (a)")
