"""Folding changes by key comes to what the changes come to one by one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.apply_tuples import UNSENT, Value, delete, framed, insert, update
from vsql_consumers.fold import Folded, Moved, Step, fold, only_inserts
from vsql_consumers.frames import Fields
from vsql_shared.errors import DecodeError

_BB, _BBB = b"bb", b"bbb"
Change = tuple[int, bytes]
Table = dict[bytes | None, Fields]


def _fold(changes: Sequence[Change], width: int = 3, key: tuple[int, ...] = (0,)) -> list[Step]:
    return list(fold([op for op, _ in changes], [data for _, data in changes], b"b" * width, key))


def _one(changes: Sequence[Change]) -> Folded:
    steps = _fold(changes)
    assert len(steps) == 1
    assert isinstance(steps[0], Folded)
    return steps[0]


def _row(*values: Value) -> Fields:
    return [framed(value) for value in values]


def _write(table: Table, step: Step) -> None:
    """A step as the database writes it: each set as a whole, and counted."""
    if isinstance(step, Moved):
        pairs = [pair for moves in step.moves.values() for pair in moves]
        rows = [(table.pop(old[0]), new) for old, new in pairs]
        for before, new in rows:
            assert new[0] not in table
            table[new[0]] = [a if b is None else b for a, b in zip(before, new, strict=True)]
        return
    for fields in step.deletes:
        del table[fields[0]]
    for fields in step.vanished:
        assert fields[0] not in table
    for unsent, rows_ in step.updates.items():
        for fields in rows_:
            assert unsent == tuple(n for n, value in enumerate(fields) if value is None)
            before = table[fields[0]]
            table[fields[0]] = [a if b is None else b for a, b in zip(before, fields, strict=True)]
    for fields in step.inserts:
        assert fields[0] not in table
        assert None not in fields
        table[fields[0]] = fields


class _History:
    """A random history that a source could have had, and the table it leaves."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.before: dict[bytes, list[bytes | None]] = {
            k: [k, b"old", b"toast"] for k in draw(st.sets(_KEYS, max_size=4))
        }
        self.after = {k: list(v) for k, v in self.before.items()}
        self.changes: list[Change] = []
        for _ in range(draw(st.integers(0, 25))):
            self._step(draw(_KEYS))

    def _step(self, key: bytes) -> None:
        row = self.after.get(key)
        if row is None:
            new = [key, self.draw(_VALUES), self.draw(_VALUES)]
            self.after[key] = new
            self.changes.append(insert(new))
            return
        act = self.draw(st.sampled_from(["update", "unsent", "delete", "move"]))
        if act == "delete":
            del self.after[key]
            self.changes.append(delete([key, None, None]))
            return
        target = self.draw(_KEYS) if act == "move" else key
        if target != key and target in self.after:
            return
        changed = [target, self.draw(_VALUES), row[2] if act != "update" else self.draw(_VALUES)]
        del self.after[key]
        self.after[target] = changed
        sent = [changed[0], changed[1], UNSENT if act != "update" else changed[2]]
        full = self.draw(st.booleans())
        old = row if full else [key, None, None]
        kind = b"O" if full else b"K"
        self.changes.append(update(sent, old, kind) if full or target != key else update(sent))


_KEYS = st.sampled_from([b"a", b"b", b"c", b"d", b"e"])
_VALUES = st.one_of(st.none(), st.sampled_from([b"x", b"y", b""]))
_HISTORIES = st.composite(_History)()


@given(_HISTORIES)
def test_any_history_folded_leaves_the_table_it_leaves_one_by_one(history: _History) -> None:
    table: Table = {framed(k): _row(*row) for k, row in history.before.items()}
    steps = _fold(history.changes)
    for step in steps:
        _write(table, step)
    assert table == {framed(k): _row(*row) for k, row in history.after.items()}
    ends = [0, *(step.stop for step in steps)]
    assert [step.start for step in steps] == ends[:-1]
    assert ends[-1] == len(history.changes)


@given(st.lists(st.tuples(st.sampled_from("IUDM"), _KEYS, _KEYS), max_size=20))
def test_changes_no_source_can_have_made_are_never_folded_away(acts: list[tuple[str, bytes, bytes]]) -> None:
    """Whatever the order, each key's last change stands in the last step that has the key."""
    changes = []
    for act, key, other in acts:
        changes.append(
            {
                "I": insert([key, b"1", b"2"]),
                "U": update([key, b"3", UNSENT]),
                "D": delete([key, None, None]),
                "M": update([other, b"4", UNSENT], [key, None, None]),
            }[act]
        )
    last: dict[bytes | None, str] = {}
    for step in _fold(changes):
        if isinstance(step, Moved):
            for old, new in itertools.chain(*step.moves.values()):
                last[old[0]], last[new[0]] = "left", "here"
            continue
        last |= {fields[0]: "left" for fields in step.deletes + step.vanished}
        here = [*step.inserts, *itertools.chain(*step.updates.values())]
        last |= {fields[0]: "here" for fields in here}
    expected: dict[bytes | None, str] = {}
    for act, key, other in acts:
        expected[framed(key)] = "left" if act in "DM" else "here"
        if act == "M":
            expected[framed(other)] = "here"
    assert last == expected


def test_insert_and_delete_leave_the_delete() -> None:
    step = _one([insert([b"1", b"a", None]), delete([b"1", None, None])])
    assert (step.vanished, step.deletes, step.inserts, step.updates) == ([_row(b"1", None, None)], [], [], {})


def test_an_unsent_value_takes_what_was_folded_before_it() -> None:
    step = _one([insert([b"1", b"a", b"big"]), update([b"1", b"b", UNSENT])])
    assert step.inserts == [_row(b"1", b"b", b"big")]
    step = _one([update([b"1", b"a", b"big"]), update([b"1", b"b", UNSENT])])
    assert step.updates == {(): [_row(b"1", b"b", b"big")]}
    step = _one([update([b"1", UNSENT, b"big"]), update([b"1", UNSENT, b"new"])])
    assert step.updates == {(1,): [_row(b"1", UNSENT, b"new")]}


def test_delete_and_insert_replace_the_row() -> None:
    step = _one([delete([b"1", None, None]), insert([b"1", b"a", None]), update([b"1", b"b", UNSENT])])
    assert [fields[0] for fields in step.deletes] == [framed(b"1")]
    assert step.inserts == [_row(b"1", b"b", None)]


def test_a_row_that_comes_and_goes_and_comes_is_expected_nowhere_before() -> None:
    step = _one([insert([b"1", b"a", b""]), delete([b"1", None, None]), insert([b"1", b"b", b""])])
    assert [fields[0] for fields in step.vanished] == [framed(b"1")]
    assert step.inserts == [_row(b"1", b"b", b"")]
    assert step.deletes == []


def test_a_key_change_ends_the_fold_and_consecutive_ones_stay_together() -> None:
    changes = [
        update([b"1", b"a", b"x"]),
        update([b"2", b"a", UNSENT], [b"1", None, None]),
        update([b"4", b"a", b"y"], [b"3", None, None]),
        update([b"2", b"b", b"x"]),
    ]
    first, moved, last = _fold(changes)
    assert isinstance(moved, Moved)
    assert {k: len(v) for k, v in moved.moves.items()} == {(2,): 1, (): 1}
    assert [(s.start, s.stop) for s in (first, moved, last)] == [(0, 1), (1, 3), (3, 4)]


@pytest.mark.parametrize(
    "second",
    [
        update([b"3", b"a", b"x"], [b"2", None, None]),
        update([b"2", b"a", b"x"], [b"5", None, None]),
        update([b"7", b"a", b"x"], [b"1", None, None]),
    ],
    ids=["leaves a key just taken", "takes a key just taken", "leaves a key twice"],
)
def test_a_key_that_was_taken_is_not_moved_again_in_the_same_step(second: Change) -> None:
    steps = _fold([update([b"2", b"a", b"x"], [b"1", None, None]), second])
    assert [type(step) for step in steps] == [Moved, Moved]


def test_a_key_that_was_left_may_be_taken_in_the_same_step() -> None:
    steps = _fold(
        [update([b"9", b"a", b""], [b"8", None, None]), update([b"8", b"a", b""], [b"7", None, None])]
    )
    assert [type(step) for step in steps] == [Moved]


def test_an_old_tuple_with_the_same_key_is_no_key_change() -> None:
    step = _one([update([b"1", b"b", UNSENT], [b"1", b"a", b"big"], b"O")])
    assert list(step.updates) == [(2,)]


def test_an_unsent_key_is_the_old_one() -> None:
    step = _one([update([UNSENT, b"b", b"c"], [b"1", None, None])])
    assert step.updates == {(): [_row(b"1", b"b", b"c")]}


def test_an_unsent_key_without_an_old_tuple_is_refused() -> None:
    with pytest.raises(DecodeError):
        _fold([update([UNSENT, b"b", b"c"])])


def test_columns_of_a_composite_key_count_together() -> None:
    changes = [update([b"1", b"a", b"x"]), update([b"1", b"b", b"y"]), update([b"1", b"a", b"z"])]
    (step,) = _fold(changes, key=(0, 1))
    assert isinstance(step, Folded)
    assert step.updates == {(): [_row(b"1", b"a", b"z"), _row(b"1", b"b", b"y")]}


def test_a_change_of_markers_ends_the_fold() -> None:
    steps = _fold([insert([b"1", b"a", None]), insert([b"2", "t", None]), insert([b"3", "u", b"x"])])
    assert [(s.start, s.stop, s.layout) for s in steps] == [(0, 1, b"bbb"), (1, 3, b"btb")]


def test_tuples_of_one_change_with_different_markers_are_refused() -> None:
    with pytest.raises(DecodeError):
        _fold([update(["1", b"a", b"b"], [b"1", b"a", b"b"], b"O")])


def test_plain_inserts_keep_their_order_and_their_duplicates() -> None:
    rows = [insert([b"1", b"a"])[1], insert([b"1", b"a"])[1], insert([b"2", "b"])[1]]
    steps = list(only_inserts(rows, _BB))
    assert [(s.start, s.stop, s.layout) for s in steps] == [(0, 2, b"bb"), (2, 3, b"bt")]
    assert steps[0].inserts == [_row(b"1", b"a"), _row(b"1", b"a")]


def test_copied_rows_are_inserts() -> None:
    plain = b"\0\2" + b"\0\0\0\1a" + b"\xff\xff\xff\xff"
    (step,) = only_inserts([plain], _BB, copied=True)
    assert step.inserts == [_row(b"a", None)]
    assert list(only_inserts([], _BBB)) == []
