"""What passes the scope of an epoch, what is taken out of rows, and what stops the stream. No database."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace

import pytest

from vsql_producers.projection import Projection
from vsql_producers.relations import describe
from vsql_producers.scope import Scope, document, removed_from
from vsql_producers.scope_record import seen
from vsql_producers.spread import Spread
from vsql_producers.transactions import Descriptor, Transactions
from vsql_shared.changes import MESSAGES, Column, TableName
from vsql_shared.errors import DatabaseError, DecodeError
from vsql_shared.pg.catalog import ColumnInfo, TableInfo, UniqueKey
from vsql_shared.pg.publication_rules import identity_problem
from vsql_shared.wire.pack import decode_relation

CARDS, LEAF = TableName("public", "cards"), TableName("public", "cards_1")
SCOPE = Scope({CARDS: frozenset(("id", "holder"))}, {}, {})
OPEN = Scope({CARDS: None}, {}, {})


def _columns(*names: str, keys: tuple[str, ...] = ("id",), last: str = "text") -> tuple[Column, ...]:
    """Columns of type text; `last` is the last one's."""
    types = [*["text"] * (len(names) - 1), last]
    return tuple(Column(name, name in keys, 25, -1, kind) for name, kind in zip(names, types, strict=True))


def _describe(scope: Scope, columns: tuple[Column, ...], table: TableName = CARDS) -> Descriptor:
    return describe(table, "d", columns, scope, bytes(16), ())


@pytest.mark.parametrize("table", [CARDS, LEAF])
@pytest.mark.parametrize(
    ("name", "type_name"),
    [("cvv", "text"), ("track_2", "bytea"), ("v", "public.pin_block"), ("code", "text")],
)
def test_authentication_data_never_passes_by_mark_or_by_name(
    table: TableName, name: str, type_name: str
) -> None:
    scope = OPEN._replace(leaves={LEAF: CARDS}, authentication={CARDS: frozenset(("code",))})
    with pytest.raises(DatabaseError, match=f"column {name} would leave") as refused:
        _describe(scope, _columns("id", name, last=type_name), table)
    assert "remove-column" in refused.value.hint


@pytest.mark.parametrize("table", [CARDS, LEAF])
def test_what_was_cleared_passes_and_a_mark_clears_nothing(table: TableName) -> None:
    scope = OPEN._replace(leaves={LEAF: CARDS}, not_secret={CARDS: frozenset(("pin_code",))})
    assert _describe(scope, _columns("id", "pin_code"), table).name == table
    marked = scope._replace(not_secret={}, pci={CARDS: frozenset(("pin_code",))})
    with pytest.raises(DatabaseError, match="pin_code would leave"):
        _describe(marked, _columns("id", "pin_code"), table)


def test_a_column_outside_of_the_scope_never_passes() -> None:
    with pytest.raises(DatabaseError, match="sends column note, which the publication leaves out") as refused:
        _describe(SCOPE, _columns("id", "holder", "note"))
    assert "remove-column" in refused.value.hint
    assert _describe(SCOPE, _columns("id", "holder")).pci_columns == ()


def test_what_was_taken_out_is_taken_out_of_rows_unless_it_identifies_them() -> None:
    scope = SCOPE._replace(removed={CARDS: frozenset(("note", "holder"))}, leaves={LEAF: CARDS})
    columns = _columns("id", "holder", "note")
    # `holder` was let in again since.
    assert removed_from(scope, CARDS, "d", columns) == {"note"}
    assert removed_from(scope, LEAF, "d", columns) == {"note"}
    with pytest.raises(DatabaseError, match="rows written before are identified by it"):
        removed_from(scope, CARDS, "d", _columns("id", "holder", "note", keys=("note",)))
    # REPLICA IDENTITY FULL names every column, and so does a key of all that are published.
    every = _columns("id", "note", keys=("id", "note"))
    assert removed_from(scope, CARDS, "f", every) == {"note"}
    with pytest.raises(DatabaseError, match="rows written before are identified by it"):
        removed_from(scope, CARDS, "d", every)


def test_a_column_that_was_left_out_does_not_pass_under_the_name_a_listed_one_has_now() -> None:
    """`pan` was taken out, and dropped; `holder` was renamed to `pan`. The backlog has both."""
    scope = Scope({CARDS: frozenset(("id", "pan"))}, {}, {}, renamed={CARDS: {"holder": "pan"}})
    old, new = _columns("id", "holder", "pan"), _columns("id", "pan")
    with pytest.raises(DatabaseError, match="sends column pan, which the publication leaves out"):
        _describe(scope, old)
    taken_out = scope._replace(removed={CARDS: frozenset(("pan",))})
    assert removed_from(taken_out, CARDS, "d", old) == {"pan"}
    assert _describe(taken_out, tuple(c for c in old if c.name != "pan")).name == CARDS
    assert removed_from(taken_out, CARDS, "d", new) == frozenset()
    assert _describe(taken_out, new).name == CARDS


def test_full_and_a_list_of_columns_do_not_go_together() -> None:
    """PostgreSQL refuses UPDATE and DELETE of such a table, be it a list of all its columns."""
    columns = tuple(
        ColumnInfo(name, "text", True, False, False, virtual=False, may_be_sent=True) for name in ("id", "v")
    )
    keys = (UniqueKey("cards_pkey", True, False, ("id",)),)
    table = TableInfo(CARDS, 1, "r", "p", "f", False, False, columns, keys)
    found = identity_problem(table, ("id", "v"), set())
    assert found is not None
    assert "REPLICA IDENTITY FULL needs every column published, later ones too" in found
    assert "REPLICA IDENTITY DEFAULT" in found
    assert identity_problem(table, None, set()) is None
    assert identity_problem(replace(table, replica_identity="d"), ("id", "v"), set()) is None


def test_rows_are_spread_by_the_key_as_it_is_left_once_columns_are_taken_out() -> None:
    scope = SCOPE._replace(removed={CARDS: frozenset(("note",))}, by_row=frozenset((CARDS,)))
    older, newer = _columns("note", "id", "holder"), _columns("id", "holder")
    gone = removed_from(scope, CARDS, "d", older)
    described = _describe(scope, tuple(column for column in older if column.name not in gone))
    assert described.key == _describe(scope, newer).key == (0,)
    before = _row(b"N", b"4711", b"k", b"h")
    after = _row(b"N", b"k", b"h")
    spread = Spread(bytes(range(32)), 1 << 30)
    taken_out = Projection(3, {1, 2})(before)
    assert spread.place(CARDS, described.key, taken_out) == spread.place(CARDS, described.key, after)
    assert spread.place(CARDS, described.key, after) != spread.place(CARDS, described.key, before)


def _frame(message: bytes, lsn: int = 0) -> bytes:
    return b"w" + struct.pack(">QQq", lsn, lsn, 0) + message


def _row(kind: bytes, *values: bytes, relation: int = 1) -> bytes:
    body = b"".join(b"b" + struct.pack(">I", len(value)) + value for value in values)
    return _frame(b"I" + struct.pack(">I", relation) + kind + struct.pack(">H", len(values)) + body)


BEGIN = _frame(b"B" + struct.pack(">QqI", 100, 0, 7))
COMMIT = _frame(b"C" + struct.pack(">BQQq", 0, 100, 108, 0))
RELATION = _frame(b"R" + struct.pack(">I", 1) + b"public\0cards\0d" + struct.pack(">H", 0))


def _transactions(*described: tuple[int | None, Projection | None]) -> Transactions:
    """Each relation message is described by the next of these."""
    left = list(described)

    def describe_next(*_: object) -> Descriptor:
        columns, projection = left.pop(0)
        return Descriptor(CARDS, b"encoded", bytes((len(left),)), columns=columns, projection=projection)

    return Transactions(describe_next, 0)


@pytest.mark.parametrize("count", [1, 3])
def test_a_row_with_other_columns_than_its_table_was_described_with_stops_the_stream(count: int) -> None:
    transactions = _transactions((2, None))
    with pytest.raises(DecodeError, match=f"a row of {count} columns, its table was described with 2"):
        transactions.feed([BEGIN, RELATION, _row(b"N", b"1", b"a"), _row(b"N", *[b"x"] * count), COMMIT])


def test_rows_lose_columns_for_as_long_as_their_description_says_so() -> None:
    transactions = _transactions((3, Projection(3, {0, 1})), (2, None))
    (run,) = transactions.feed(
        [BEGIN, RELATION, _row(b"N", b"1", b"a", b"SECRET"), RELATION, _row(b"N", b"2", b"b"), COMMIT]
    )
    assert run.frames == [_row(b"N", b"1", b"a"), _row(b"N", b"2", b"b")]


def test_what_is_seen_is_what_was_described_and_its_hash_cannot_be_guessed() -> None:
    made = _describe(SCOPE, _columns("id", "holder"))
    other = Descriptor(MESSAGES, b"no relation", b"hash")
    first, second = seen([made, other]), seen([made])
    assert first != second
    for text in (first, second):
        assert json.loads(text)["tables"] == [
            {"table": "public.cards", "columns": ["id", "holder"], "identity": "d"}
        ]
    assert [c.name for c in decode_relation(made.encoded).columns] == ["id", "holder"]
    assert seen([other]) == ""


CHANGES: dict[str, Callable[[Scope], Scope]] = {
    "a column more": lambda s: s._replace(columns={CARDS: frozenset(("id", "holder", "pan"))}),
    "all columns": lambda s: s._replace(columns={CARDS: None}),
    "a mark": lambda s: s._replace(pci={CARDS: frozenset(("holder",))}),
    "a mark of authentication data": lambda s: s._replace(authentication={CARDS: frozenset(("x",))}),
    "a clearing": lambda s: s._replace(cleared={CARDS: frozenset(("pin",))}),
    "a column taken out": lambda s: s._replace(removed={CARDS: frozenset(("note",))}),
    "PCI data excluded": lambda s: s._replace(excludes_pci=True),
    "inserts only": lambda s: s._replace(insert_only=True),
    "by leaf": lambda s: s._replace(via_leaf=True),
    "a table more": lambda s: s._replace(columns={**s.columns, LEAF: None}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_may_pass_is_in_what_an_epoch_signs(change: str) -> None:
    assert document("pub", CHANGES[change](SCOPE)) != document("pub", SCOPE)
