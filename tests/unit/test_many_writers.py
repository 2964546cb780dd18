"""What two nodes that write the same table must have alike, before either database is changed."""

from __future__ import annotations

import pytest

from vsql_shared.changes import TableName
from vsql_shared.pg.many_writers import uneven
from vsql_shared.pg.schema_compare import ColumnDefinition

T = TableName("public", "t")


def column(name: str, **differing: str) -> ColumnDefinition:
    """An integer column, but for what is given."""
    fields = {
        "type": "integer",
        "collation": "",
        "not_null": "true",
        "identity": "",
        "generated": "",
        "default": "",
    }
    return ColumnDefinition(name, **{**fields, **differing})


def test_tables_that_are_alike_have_nothing_against_them() -> None:
    columns = (column("id"), column("note", type="text", collation="default"))
    assert list(uneven(T, columns, columns)) == []
    assert list(uneven(T, columns, columns[::-1])) == []


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ({"default": "nextval('t_id_seq'::regclass)"}, {"default": "nextval('of_b'::regclass)"}),
        ({"identity": "a"}, {"identity": "d"}),
    ],
    ids=["sequences of their own", "an identity of another kind"],
)
def test_where_new_ids_come_from_is_each_nodes_own_matter(
    here: dict[str, str], there: dict[str, str]
) -> None:
    assert list(uneven(T, (column("id", **here),), (column("id", **there),))) == []


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ({"type": "numeric(10,2)"}, {"type": "numeric(10,4)"}),
        ({"type": "text", "collation": "C"}, {"type": "text", "collation": "en_US"}),
        ({"not_null": "false"}, {}),
        ({"generated": "s", "default": "(a + 1)"}, {"generated": "s", "default": "(a + 2)"}),
        ({"generated": "s", "default": "(a + 1)"}, {}),
    ],
    ids=["type", "collation", "not null", "expression", "generated here only"],
)
def test_what_would_make_rows_differ_is_refused_by_its_column(
    here: dict[str, str], there: dict[str, str]
) -> None:
    (said,) = uneven(T, (column("id", **here),), (column("id", **there),))
    assert said.startswith("public.t: column id is not defined alike on both nodes")


def test_a_column_that_only_one_node_has_is_refused_and_its_place_named() -> None:
    both = (column("id"),)
    assert "column note on the peer only" in next(uneven(T, both, (*both, column("note"))))
    assert "column note on this node only" in next(uneven(T, (*both, column("note")), both))
