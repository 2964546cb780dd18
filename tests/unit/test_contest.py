"""Convergence before any database: random histories on three nodes, in any order each stream allows.

The model here knows rows, unique columns and clocks, and asks the product only who stands.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vsql_consumers.contest import (
    Act,
    Kind,
    Local,
    Version,
    Writer,
    decide,
    rank,
)
from vsql_consumers.writers import require_steady
from vsql_shared.changes import Op
from vsql_shared.errors import DivergedError
from vsql_shared.strategies import GENERATIONS, STRATEGIES, SYMMETRIC, Strategy

KEYS, VALUES = range(2), range(3)


class Row(NamedTuple):
    """Two columns, each unique."""

    u: int
    v: int


class Sent(NamedTuple):
    """A change as it travels: with its key, its version and, unless it deletes, the whole row."""

    op: int
    key: int
    version: Version
    row: Row | None


@dataclass
class Node:
    """One node: what it knows of each key, and what has not reached it yet, by sender."""

    writer: Writer
    strategy: Strategy
    skew: int
    clock: int = 0
    floor: int = 0
    """What a key of which nothing is known begins above."""
    known: dict[int, tuple[Version, Row | None]] = field(default_factory=dict)
    flushing: dict[int, tuple[Version, Row | None]] = field(default_factory=dict)
    """By key: commits that have their time, and that nobody sees yet."""
    holds_keys: bool = True
    """Whether a change waits for who has its key, as the applier does."""
    waiting: dict[int, deque[Sent]] = field(default_factory=dict)

    def visible(self) -> dict[int, Row]:
        """Live rows by descending version, each kept if it collides with none that was kept (rule 21)."""
        kept: dict[int, Row] = {}
        live = [(version, key, row) for key, (version, row) in self.known.items() if row is not None]
        for _, key, row in sorted(live, key=lambda one: (rank(one[0], self.strategy), one[1]), reverse=True):
            if not any(row.u == other.u or row.v == other.v for other in kept.values()):
                kept[key] = row
        return kept

    def write(self, op: int, key: int, row: Row | None, *, flush: bool = True) -> Sent | None:
        """Write locally, if the database would let us; without `flush` nobody sees it before `show`."""
        if key in self.flushing:
            self.show(key)  # the row's lock, or the unique index
        visible = self.visible()
        if (op == Op.INSERT) == (key in visible):
            return None
        if row is not None and any(
            other != key and (row.u == theirs.u or row.v == theirs.v) for other, theirs in visible.items()
        ):
            return None
        if op == Op.INSERT and key in self.known and self.known[key][1] is not None:
            return None  # a displaced row has the key: the database refuses a second one
        self.clock += 1
        before = self.known.get(key)
        above = 0 if before is None else before[0].generation
        if op == Op.INSERT:
            above = max(above, self.floor)
        version = Version(self.clock + self.skew, self.writer, above + 1)
        (self.known if flush else self.flushing)[key] = (version, row)
        return Sent(op, key, version, row)

    def show(self, key: int) -> None:
        """A commit's flush is over."""
        self.known[key] = self.flushing.pop(key)

    def take(self, sender: int) -> None:
        """Apply the next change of a stream, once our own clock has passed it (rule 18)."""
        sent = self.waiting[sender].popleft()
        assert sent.version.time is not None
        self.clock = max(self.clock, sent.version.time - self.skew + 1)
        if self.holds_keys and sent.key in self.flushing:
            self.show(sent.key)
        have = self.known.get(sent.key)
        local = None if have is None else Local(have[1] is not None, have[0])
        if decide(sent.op, sent.version, local, self.strategy).act is Act.WRITE:
            self.known[sent.key] = (sent.version, sent.row)


def nodes_of(strategy: Strategy, skews: list[int], priorities: list[int]) -> list[Node]:
    made = [
        Node(Writer(priority, number), strategy, skew)
        for number, (priority, skew) in enumerate(zip(priorities, skews, strict=True), 1)
    ]
    for at, node in enumerate(made):
        node.waiting = {other: deque() for other in range(len(made)) if other != at}
    return made


STEPS = st.lists(
    st.tuples(
        st.sampled_from("IUUDTTTiudS"),
        st.integers(0, 2),
        st.sampled_from(KEYS),
        st.builds(Row, st.sampled_from(VALUES), st.sampled_from(VALUES)),
        st.integers(1, 2),
    ),
    min_size=25,
    max_size=60,
)


def _do(nodes: list[Node], what: str, at: int, key: int, row: Row, step: int) -> None:
    """One step of a history. A small letter: the flush takes longer than the way to the others."""
    node = nodes[at]
    if what == "T":
        sender = (at + step) % 3
        if node.waiting[sender]:
            node.take(sender)
    elif what == "S":
        if key in node.flushing:
            node.show(key)
    else:
        sent = node.write(ord(what.upper()), key, None if what in "Dd" else row, flush=what.isupper())
        for other in nodes:
            if sent is not None and other is not node:
                other.waiting[at].append(sent)


@pytest.mark.parametrize("strategy", sorted(SYMMETRIC))
@given(
    steps=STEPS,
    skews=st.lists(st.integers(0, 2), min_size=3, max_size=3),
    priorities=st.lists(st.sampled_from([10, 50]), min_size=3, max_size=3),
    rest=st.randoms(use_true_random=False),
)
@settings(max_examples=200, deadline=None)
def test_three_nodes_end_equal_whatever_the_order(
    strategy: Strategy,
    steps: list[tuple[str, int, int, Row, int]],
    skews: list[int],
    priorities: list[int],
    rest: random.Random,
) -> None:
    nodes = nodes_of(strategy, skews, priorities)
    for step in steps:
        _do(nodes, *step)
    while left := [(node, sender) for node in nodes for sender, queue in node.waiting.items() if queue]:
        node, sender = rest.choice(left)
        node.take(sender)
    for node in nodes:
        for key in list(node.flushing):
            node.show(key)
    first, *others = nodes
    for other in others:
        assert other.known == first.known
        assert other.visible() == first.visible()


class Mark(NamedTuple):
    """As purging.py has it: what was buried, and how far the peer must have come to make it superfluous."""

    buried: dict[int, Version]
    sent: int
    """Own changes the peer must have applied."""


@dataclass
class Purger:
    """One of two nodes, purging its tombstones."""

    node: Node
    peer: Node
    sent: list[Sent] = field(default_factory=list)
    taken: int = 0
    """Changes of the peer that were applied here."""
    sent_when_taken: list[int] = field(default_factory=list)
    """How much had been sent from here when each of them was."""
    mark: Mark | None = None

    def do(self, what: str, key: int, row: Row, other: Purger) -> None:
        """One step of a history, as `_do` has them; P: purge."""
        if what == "T":
            self.take()
        elif what == "P":
            self.purge(other)
        elif what == "S":
            if key in self.node.flushing:
                self.node.show(key)
        else:
            self.write(ord(what.upper()), key, None if what in "Dd" else row, flush=what.isupper())

    def write(self, op: int, key: int, row: Row | None, *, flush: bool) -> None:
        found = self.node.write(op, key, row, flush=flush)
        if found is not None:
            self.sent.append(found)
            self.peer.waiting[0].append(found)

    def take(self) -> None:
        if self.node.waiting[0]:
            self.node.take(0)
            self.taken += 1
            self.sent_when_taken.append(len(self.sent))

    def purge(self, other: Purger) -> None:
        """Mark; or, once both ways are past the mark, forget what was buried before it."""
        known = self.node.known
        if self.mark is None:
            gone = {key: version for key, (version, row) in known.items() if row is None}
            self.mark = Mark(gone, len(self.sent))
        elif other.taken >= self.mark.sent:
            needed = other.sent_when_taken[self.mark.sent - 1] if self.mark.sent else 0
            if self.taken >= needed:
                for key, version in self.mark.buried.items():
                    if known.get(key) == (version, None):
                        del known[key]
                self.mark = None


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from("IUUDTTTiudSPPP"),
            st.integers(0, 1),
            st.sampled_from(KEYS),
            st.builds(Row, st.sampled_from(VALUES), st.sampled_from(VALUES)),
        ),
        min_size=25,
        max_size=80,
    ),
    skews=st.lists(st.integers(0, 4), min_size=2, max_size=2),
)
@settings(max_examples=400, deadline=None)
def test_two_nodes_that_forget_deleted_rows_end_equal(
    steps: list[tuple[str, int, int, Row]], skews: list[int]
) -> None:
    a, b = nodes_of("last_write_wins", skews, [50, 50])
    for node in (a, b):
        node.waiting = {0: deque()}
        node.known = {key: (Version(0, a.writer), Row(key, key)) for key in KEYS}
    both = Purger(a, b), Purger(b, a)
    for what, at, key, row in steps:
        both[at].do(what, key, row, both[1 - at])
    for one in both:
        while one.node.waiting[0]:
            one.take()
    for node in (a, b):
        for key in list(node.flushing):
            node.show(key)
    alive = [{key: row for key, (_, row) in node.known.items() if row is not None} for node in (a, b)]
    assert alive[0] == alive[1]
    assert a.visible() == b.visible()


def test_a_deleted_row_is_forgotten_once_all_came_that_the_peer_sent_before_it_knew() -> None:
    a, b = nodes_of("last_write_wins", [0, 0], [50, 50])
    for node in (a, b):
        node.waiting, node.known[0] = {0: deque()}, (Version(0, a.writer), Row(0, 0))
    first, second = Purger(a, b), Purger(b, a)
    b.clock = 10
    first.write(Op.UPDATE, 0, Row(1, 1), flush=True)
    second.write(Op.DELETE, 0, None, flush=True)
    second.purge(first)
    first.take()
    second.purge(first)
    assert b.known[0][1] is None  # A's older update is still on its way
    second.take()
    second.purge(first)
    assert b.known == {}
    assert a.visible() == {}


def test_a_deleted_row_that_is_forgotten_too_early_comes_back_at_one_node() -> None:
    a, b = nodes_of("last_write_wins", [0, 0], [50, 50])
    for node in (a, b):
        node.waiting, node.known[0] = {0: deque()}, (Version(0, a.writer), Row(0, 0))
    both = Purger(a, b), Purger(b, a)
    b.clock = 10
    both[0].write(Op.UPDATE, 0, Row(1, 1), flush=True)
    both[1].write(Op.DELETE, 0, None, flush=True)
    both[1].purge(both[0])
    both[1].purge(both[0])
    assert b.known[0][1] is None  # the rule waits
    del b.known[0]
    for one in both:
        one.take()
    assert a.visible() == {}
    assert b.visible() == {0: Row(1, 1)}


def test_without_generations_the_first_write_would_stand_for_ever() -> None:
    a, b = Writer(50, 1), Writer(50, 2)
    older, newer = Version(1, a, 1), Version(9, b, 2)
    assert decide(Op.UPDATE, newer, Local(True, older), "first_write_wins").act is Act.WRITE
    assert (
        decide(Op.UPDATE, newer._replace(generation=1), Local(True, older), "first_write_wins").act
        is Act.KEEP
    )


def test_at_equal_times_the_higher_priority_stands_then_the_lower_number() -> None:
    for low, high in [(Writer(10, 1), Writer(50, 2)), (Writer(50, 2), Writer(50, 1))]:
        for strategy in SYMMETRIC:
            versions = Version(7, low), Version(7, high)
            assert rank(versions[0], strategy) < rank(versions[1], strategy)


def test_a_row_whose_time_nobody_knows_any_more_is_the_oldest() -> None:
    unknown = Local(True, Version(None, Writer(50, 1)))
    for time in (-(10**15), 0, 10**15):
        came = Version(time, Writer(1, 2))
        assert decide(Op.UPDATE, came, unknown, "last_write_wins").act is Act.WRITE, time
        # The other node, which knows both times, says so too: it was first.
        assert decide(Op.UPDATE, came, unknown, "first_write_wins").act is Act.KEEP, time
        made_of_it = came._replace(generation=2)
        assert decide(Op.UPDATE, made_of_it, unknown, "first_write_wins").act is Act.WRITE, time


UNORDERED: list[tuple[Strategy, Act]] = [
    ("keep_local", Act.KEEP),
    ("apply_remote", Act.WRITE),
    ("manual", Act.ASK),
]


@pytest.mark.parametrize(("strategy", "act"), UNORDERED)
def test_strategies_without_an_order_ask_for_no_time(strategy: Strategy, act: Act) -> None:
    mine, theirs = Version(5, Writer(50, 1)), Writer(50, 2)
    for op, live, time in itertools.product((Op.INSERT, Op.UPDATE, Op.DELETE), (True, False), (1, 9)):
        found = decide(op, Version(time, theirs), Local(live, mine), strategy)
        if (op, live, time) == (Op.INSERT, False, 9):
            assert found == (Act.WRITE, None)  # made anew after it was deleted: no conflict
        elif (op, live, strategy) == (Op.DELETE, False, "manual"):
            assert found == (Act.WRITE, Kind.DELETE_MISSING)  # gone on both: nobody is asked
        else:
            assert found.act is act
            assert found.kind is not None
    assert decide(Op.UPDATE, Version(9, theirs), None, strategy) == (act, Kind.UPDATE_MISSING)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_without_an_order_it_counts_that_a_change_was_made_of_the_row_that_is_here(
    strategy: Strategy,
) -> None:
    mine, theirs = Version(9, Writer(50, 1), 3), Version(5, Writer(50, 2), 2)
    for op in (Op.UPDATE, Op.DELETE):
        found = decide(op, theirs, Local(True, mine), strategy, seen=True)
        if strategy in SYMMETRIC:
            assert found == decide(op, theirs, Local(True, mine), strategy)
            assert found.act is Act.KEEP
        else:
            assert found == (Act.WRITE, None)


def _copied(
    strategy: Strategy, before: list[tuple[int, int, Row]], skews: list[int], floor: int
) -> list[Node]:
    """A, which wrote alone, and B, which has A's rows as they are then, and none of its tombstones."""
    a, b = nodes_of(strategy, skews, [50, 10])
    for node in (a, b):
        node.waiting = {0: deque()}
    for op, key, row in before:
        a.write(op, key, None if op == Op.DELETE else row)
    a.clock += 1
    moment = Version(a.clock + a.skew, a.writer)
    b.clock = a.clock + a.skew - b.skew + 1
    b.known = {
        key: (moment._replace(generation=version.generation), row)
        for key, (version, row) in a.known.items()
        if row is not None
    }
    b.floor = floor
    return [a, b]


def _exchange(nodes: list[Node], rest: random.Random) -> None:
    """All that is under way arrives, in any order the streams allow."""
    while left := [node for node in nodes if node.waiting[0]]:
        rest.choice(left).take(0)
    for node in nodes:
        for key in list(node.flushing):
            node.show(key)


FLOOR = 1_000
"""More than a history has writes."""


@pytest.mark.parametrize("strategy", sorted(GENERATIONS))
@given(
    before=st.lists(
        st.tuples(
            st.sampled_from([Op.INSERT, Op.UPDATE, Op.DELETE]),
            st.sampled_from(KEYS),
            st.builds(Row, st.sampled_from(VALUES), st.sampled_from(VALUES)),
        ),
        max_size=20,
    ),
    steps=st.lists(
        st.tuples(
            st.sampled_from("IUUDTTTiudSF"),
            st.integers(0, 1),
            st.sampled_from(KEYS),
            st.builds(Row, st.sampled_from(VALUES), st.sampled_from(VALUES)),
        ),
        min_size=15,
        max_size=60,
    ),
    skews=st.lists(st.integers(0, 4), min_size=2, max_size=2),
    rest=st.randoms(use_true_random=False),
)
@settings(max_examples=200, deadline=None)
def test_a_node_that_was_copied_without_tombstones_ends_equal_whenever_the_other_has_its_floor(
    strategy: Strategy,
    before: list[tuple[int, int, Row]],
    steps: list[tuple[str, int, int, Row]],
    skews: list[int],
    rest: random.Random,
) -> None:
    nodes = _copied(strategy, before, skews, FLOOR)
    for what, at, key, row in steps:
        node, other = nodes[at], nodes[1 - at]
        if what == "F":
            nodes[0].floor = FLOOR
        elif what == "T":
            if node.waiting[0]:
                node.take(0)
        elif what == "S":
            if key in node.flushing:
                node.show(key)
        else:
            gone = None if what in "Dd" else row
            sent = node.write(ord(what.upper()), key, gone, flush=what.isupper())
            if sent is not None:
                other.waiting[0].append(sent)
    _exchange(nodes, rest)
    a, b = nodes
    assert a.visible() == b.visible()
    alive = [{key: kept for key, kept in node.known.items() if kept[1] is not None} for node in nodes]
    assert {key: row for key, (_, row) in alive[0].items()} == {
        key: row for key, (_, row) in alive[1].items()
    }


@pytest.mark.parametrize("strategy", sorted(GENERATIONS))
@pytest.mark.parametrize(("floor", "equal"), [(FLOOR, True), (0, False)])
def test_what_the_floor_is_for(strategy: Strategy, floor: int, equal: bool) -> None:
    """A wrote and deleted a row before B was copied; B inserts it anew, and A has the tombstone."""
    row = Row(0, 0)
    history = [(Op.INSERT, 0, row), (Op.UPDATE, 0, row), (Op.DELETE, 0, row)]
    a, b = _copied(strategy, history, [0, 0], floor)
    sent = b.write(Op.INSERT, 0, Row(1, 1))
    assert sent is not None
    a.waiting[0].append(sent)
    a.take(0)
    assert b.visible() == {0: Row(1, 1)}
    assert (a.visible() == b.visible()) is equal


@pytest.mark.parametrize("strategy", sorted(GENERATIONS))
def test_a_tombstone_with_a_generation_that_is_forgotten_parts_the_nodes(strategy: Strategy) -> None:
    """What purging would do to these strategies, though both ways are past it; so it leaves them alone."""
    a, b = _copied(strategy, [(Op.INSERT, 0, Row(0, 0)), (Op.UPDATE, 0, Row(1, 0))], [0, 0], 0)
    gone = b.write(Op.DELETE, 0, None)
    assert gone is not None
    a.waiting[0].append(gone)
    a.take(0)
    del a.known[0]
    anew = a.write(Op.INSERT, 0, Row(1, 1))
    assert anew is not None
    b.waiting[0].append(anew)
    b.take(0)
    assert (a.visible(), b.visible()) == ({0: Row(1, 1)}, {})


def _delete_meets_an_insert_in_flight(*, holds_keys: bool) -> list[Node]:
    """A row is deleted at B at 5, inserted again at 8, unseen yet; A deletes it at 10, knowing of neither."""
    a, b = nodes_of("last_write_wins", [0, 0], [50, 50])
    for node in (a, b):
        node.known[0] = (Version(1, a.writer), Row(0, 0))
        node.holds_keys = holds_keys
    b.clock, a.clock = 4, 9
    gone = b.write(Op.DELETE, 0, None)
    b.clock = 7
    again = b.write(Op.INSERT, 0, Row(1, 1), flush=False)
    theirs = a.write(Op.DELETE, 0, None)
    assert gone is not None
    assert again is not None
    assert theirs is not None
    b.waiting[0].append(theirs)
    b.take(0)
    if b.flushing:
        b.show(0)
    a.waiting[1].extend([gone, again])
    a.take(1)
    a.take(1)
    return [a, b]


def test_a_delete_waits_for_whoever_is_about_to_insert_its_key() -> None:
    a, b = _delete_meets_an_insert_in_flight(holds_keys=True)
    assert a.known == b.known
    assert a.visible() == {}
    # The model can see what waiting is for.
    a, b = _delete_meets_an_insert_in_flight(holds_keys=False)
    assert a.visible() != b.visible()


def test_what_was_inserted_and_deleted_at_once_does_not_hide_a_younger_delete() -> None:
    a, b = Writer(50, 1), Writer(50, 2)
    buried = Local(False, Version(12, b))
    for op in (Op.INSERT, Op.DELETE):
        assert decide(op, Version(10, a), buried, "last_write_wins").act is Act.KEEP
    # So the tombstone still is the other's, and a later insert that is older than it falls, too.
    assert decide(Op.INSERT, Version(11, a), buried, "last_write_wins").act is Act.KEEP


def test_a_change_that_follows_its_own_writer_is_no_conflict() -> None:
    writer = Writer(50, 2)
    local = Local(True, Version(9, writer))
    for op, time in itertools.product((Op.UPDATE, Op.DELETE), (9, 10)):
        for strategy in STRATEGIES:
            assert decide(op, Version(time, writer), local, strategy) == (Act.WRITE, None)
    assert decide(Op.INSERT, Version(10, writer), local, "last_write_wins").kind is Kind.INSERT_EXISTS


@pytest.mark.parametrize("strategy", sorted(SYMMETRIC))
@pytest.mark.parametrize("live", [True, False])
def test_a_writer_whose_clock_went_back_on_a_row_stops_the_stream(strategy: Strategy, live: bool) -> None:
    writer = Writer(50, 1)
    local = Local(live, Version(10, writer))
    for op in (Op.INSERT, Op.UPDATE, Op.DELETE):
        assert decide(op, Version(9, writer), local, strategy).act is Act.STOP
    # Why: the writer's own row is of 5 now, and another's of 7, which fell here before 10, stands there.
    other = Version(7, Writer(50, 2))
    assert decide(Op.UPDATE, other, Local(True, Version(5, writer)), "last_write_wins").act is Act.WRITE
    assert decide(Op.UPDATE, Version(10, writer), Local(True, other), "last_write_wins").act is Act.WRITE


def test_what_was_parked_falls_where_its_writer_has_written_since() -> None:
    writer = Writer(50, 1)
    for live in (True, False):
        since = Local(live, Version(20, writer))
        for op in (Op.INSERT, Op.UPDATE, Op.DELETE):
            assert decide(op, Version(10, writer), since, "last_write_wins", late=True).act is Act.KEEP
    before = Local(True, Version(5, writer))
    assert decide(Op.UPDATE, Version(10, writer), before, "last_write_wins", late=True).act is Act.WRITE


def test_a_clock_that_is_set_back_is_noticed_and_one_that_is_slewed_is_not() -> None:
    second = 1_000_000
    for after in (second, int(second * 0.92), 60 * second):
        require_steady(50 * second, 50 * second + after, 1.0)
    for back in (0.2, 1, 3600):
        with pytest.raises(DivergedError, match="set back"):
            require_steady(50 * second, int((51 - back) * second), 1.0)
