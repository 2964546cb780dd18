"""Columns that add up, before any database: random histories of two and three nodes, in any order.

The model knows rows, sums and clocks, and asks the product only what becomes of a change.
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

from vsql_consumers.adding import summed
from vsql_consumers.contest import Act, Decision, Kind, Local, Version, Writer
from vsql_consumers.deltas import judge
from vsql_shared.changes import Op
from vsql_shared.deltas import TYPES, type_of
from vsql_shared.strategies import STRATEGIES, SYMMETRIC, Strategy

NOTES = range(3)


class Row(NamedTuple):
    """A sum, a register, its generation, and the transaction here that wrote it last."""

    total: int
    note: int
    generation: int
    stamp: int


class Sent(NamedTuple):
    """A change as it travels; of an UPDATE `amount` is new - old, of an INSERT the value it begins with."""

    op: int
    key: int
    generation: int
    amount: int
    note: int


class Done(NamedTuple):
    """A transaction as it travels: one time for all it did."""

    time: int
    changes: tuple[Sent, ...]


@dataclass
class Node:
    """What it has of each key (None: deleted), and what has not reached it yet, by sender."""

    writer: Writer
    strategy: Strategy
    skew: int
    clock: int = 0
    known: dict[int, Row | None] = field(default_factory=dict)
    stamps: list[tuple[int, Writer]] = field(default_factory=list)
    """Of each transaction here: when it was done, and by whom."""
    kept: dict[int, tuple[int, Version]] = field(default_factory=dict)
    """By key: the transaction that stamped the row, and the version the row has all the same."""
    waiting: dict[int, deque[Done]] = field(default_factory=dict)
    parked: list[tuple[int, Done]] = field(default_factory=list)
    adds_always: bool = True
    """False: as where a change whose rest falls is dropped whole."""
    waits: bool = True
    """False: as where a change of a row that is not here becomes the row."""
    forgets: bool = True
    """False: as where a version that was kept is ended by another transaction only."""

    def version(self, key: int) -> Version | None:
        """Of a row that is here."""
        row = self.known.get(key)
        if row is None:
            return None
        if key in self.kept and self.kept[key][0] == row.stamp:
            return self.kept[key][1]._replace(generation=row.generation)
        return Version(*self.stamps[row.stamp], row.generation)

    def rows(self) -> dict[int, tuple[object, ...] | None]:
        """What all nodes end with alike."""
        return {
            key: None if row is None else (row.total, row.note, self.version(key))
            for key, row in self.known.items()
        }

    def write(self, *wanted: tuple[int, int, int, int]) -> Done | None:
        """What a client does in one transaction, as far as the database lets it: op, key, amount, note."""
        time, changes = self.clock + 1 + self.skew, []
        for op, key, amount, note in wanted:
            row = self.known.get(key)
            if (op == Op.INSERT) != (key not in self.known) or (op != Op.INSERT and row is None):
                continue  # a key is never used again
            total, above = (0, 0) if row is None else (row.total, row.generation)
            made = Row(total + amount, note, above + 1, len(self.stamps))
            self.known[key] = None if op == Op.DELETE else made
            changes.append(Sent(op, key, above + 1, amount, note))
        if not changes:
            return None
        self.clock += 1
        self.stamps.append((time, self.writer))
        return Done(time, tuple(changes))

    def take(self, nodes: list[Node], sender: int) -> bool:
        """Apply the next transaction of a stream; false where it has to wait."""
        if not self._apply(self.waiting[sender][0], nodes[sender].writer):
            return False
        self.waiting[sender].popleft()
        return True

    def park(self, sender: int) -> None:
        """The next transaction of a stream is not applied now, but what follows it is."""
        self.parked.append((sender, self.waiting[sender].popleft()))

    def replay(self, nodes: list[Node], at: int) -> bool:
        """Apply a parked transaction after all; false where it has to wait."""
        sender, done = self.parked[at]
        if not self._apply(done, nodes[sender].writer, late=True):
            return False
        del self.parked[at]
        return True

    def _apply(self, done: Done, writer: Writer, *, late: bool = False) -> bool:
        before = dict(self.known), dict(self.kept)
        self.stamps.append((done.time, writer))
        for sent in done.changes:
            if not self._change(sent, Version(done.time, writer, sent.generation), late=late):
                self.known, self.kept = before
                return False
        self.clock = max(self.clock, done.time - self.skew + 1)
        return True

    def _change(self, sent: Sent, version: Version, *, late: bool) -> bool:
        row, here, key, stamp = (
            self.known.get(sent.key),
            self.version(sent.key),
            sent.key,
            len(self.stamps) - 1,
        )
        local = Local(row is not None, here or Version(0, self.writer)) if key in self.known else None
        decision = judge(sent.op, version, local, self.strategy, late=late)
        if decision is None and self.waits:
            return False
        stands = decision is None or decision.act is Act.WRITE
        if sent.op == Op.DELETE:
            self.known[key] = None
        elif row is None or here is None:
            if stands:
                self.known[key] = Row(sent.amount, sent.note, sent.generation, stamp)
        elif sent.op == Op.UPDATE and stands:
            self.known[key] = Row(row.total + sent.amount, sent.note, sent.generation, stamp)
            if self.forgets:
                self.kept.pop(key, None)
        elif sent.op == Op.UPDATE and self.adds_always:
            self.known[key] = row._replace(total=row.total + sent.amount, stamp=stamp)
            self.kept[key] = stamp, here
        return True


def nodes_of(strategy: Strategy, number: int, skews: list[int]) -> list[Node]:
    made = [Node(Writer(50, at), strategy, skews[at - 1]) for at in range(1, number + 1)]
    for at, node in enumerate(made):
        node.waiting = {other: deque() for other in range(number) if other != at}
    return made


def write(nodes: list[Node], at: int, *wanted: tuple[int, int, int, int]) -> Done | None:
    done = nodes[at].write(*wanted)
    for other in nodes:
        if done is not None and other is not nodes[at]:
            other.waiting[at].append(done)
    return done


def drain(nodes: list[Node], rest: random.Random) -> None:
    """All that is under way arrives, parked or not. Streams that wait for each other would not end."""
    while any(node.parked or any(node.waiting.values()) for node in nodes):
        left = [(node, sender) for node in nodes for sender, queue in node.waiting.items() if queue]
        rest.shuffle(left)
        taken = [node.take(nodes, sender) for node, sender in left]
        for node in nodes:
            taken += [node.replay(nodes, at) for at in reversed(range(len(node.parked)))]
        assert any(taken), "streams wait for each other"


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("strategy", sorted(SYMMETRIC))
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from("IUUUDTTTTP"),
            st.integers(0, 2),
            st.lists(
                st.tuples(st.integers(0, 5), st.integers(-9, 9), st.sampled_from(NOTES)),
                min_size=1,
                max_size=3,
            ),
            st.integers(1, 2),
        ),
        min_size=20,
        max_size=60,
    ),
    skews=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    rest=st.randoms(use_true_random=False),
)
@settings(max_examples=150, deadline=None)
def test_all_nodes_end_with_the_same_rows_and_every_sum_is_that_of_all_that_was_added(
    number: int,
    strategy: Strategy,
    steps: list[tuple[str, int, list[tuple[int, int, int]], int]],
    skews: list[int],
    rest: random.Random,
) -> None:
    nodes = nodes_of(strategy, number, skews)
    totals: dict[int, int] = {}
    for what, where, wanted, step in steps:
        at = where % number
        if what in "TP":
            sender = (at + step) % number
            if nodes[at].waiting.get(sender):
                nodes[at].take(nodes, sender) if what == "T" else nodes[at].park(sender)
            continue
        # Two inserts of one key are a person's to decide.
        allowed = [one for one in wanted if what != "I" or one[0] % number == at]
        done = write(nodes, at, *((ord(what), *one) for one in allowed))
        for sent in () if done is None else done.changes:
            if sent.op != Op.DELETE:
                totals[sent.key] = totals.get(sent.key, 0) + sent.amount
    drain(nodes, rest)
    first, *others = nodes
    for other in others:
        assert other.rows() == first.rows()
    for key, row in first.known.items():
        assert row is None or row.total == totals[key]


def _two_that_met(*, adds_always: bool) -> list[Node]:
    nodes = nodes_of("last_write_wins", 2, [0, 0])
    for node in nodes:
        node.adds_always = adds_always
    write(nodes, 0, (Op.INSERT, 0, 100, 0))
    nodes[1].take(nodes, 0)
    write(nodes, 0, (Op.UPDATE, 0, -30, 1))
    write(nodes, 1, (Op.UPDATE, 0, -50, 2))
    drain(nodes, random.Random(1))
    return nodes


def test_a_change_whose_rest_falls_adds_all_the_same() -> None:
    a, b = _two_that_met(adds_always=True)
    assert a.rows() == b.rows()
    row = a.known[0]
    assert row is not None
    assert (row.total, row.note) == (20, 2)
    # The model can see what the rule is for.
    a, b = _two_that_met(adds_always=False)
    assert a.rows() != b.rows()


def _three_of_which_one_stands_over_what_it_kept(*, forgets: bool) -> list[Node]:
    """B changes a row twice in one transaction: at A the first change falls, and the second stands."""
    nodes = nodes_of("first_write_wins", 3, [0, 0, 0])
    write(nodes, 0, (Op.INSERT, 0, 100, 0))
    for at, clock in enumerate((100, 200, 150)):
        nodes[at].forgets = forgets
        if at:
            nodes[at].take(nodes, 0)
        nodes[at].clock = clock
    write(nodes, 0, (Op.UPDATE, 0, 1, 1))
    write(nodes, 1, (Op.UPDATE, 0, 2, 2), (Op.UPDATE, 0, 3, 2))
    write(nodes, 2, (Op.UPDATE, 0, 4, 3), (Op.UPDATE, 0, 5, 3))
    nodes[0].take(nodes, 1)
    nodes[0].take(nodes, 2)
    drain(nodes, random.Random(1))
    return nodes


def test_a_version_that_was_kept_ends_with_what_stands_over_it_in_the_same_transaction() -> None:
    a, b, c = _three_of_which_one_stands_over_what_it_kept(forgets=True)
    assert a.rows() == b.rows() == c.rows() == {0: (115, 3, Version(151, c.writer, 3))}
    a, b, _ = _three_of_which_one_stands_over_what_it_kept(forgets=False)
    assert a.rows() != b.rows()


def _three_with_a_slow_stream(*, waits: bool) -> Node:
    """A inserts, B adds; C hears B first."""
    nodes = nodes_of("last_write_wins", 3, [0, 0, 0])
    nodes[2].waits = waits
    write(nodes, 0, (Op.INSERT, 0, 100, 0))
    nodes[1].take(nodes, 0)
    write(nodes, 1, (Op.UPDATE, 0, 5, 0))
    assert nodes[2].take(nodes, 1) is not waits
    drain(nodes, random.Random(1))
    return nodes[2]


def test_what_adds_to_a_row_that_has_not_come_waits_for_it() -> None:
    row = _three_with_a_slow_stream(waits=True).known[0]
    assert row is not None
    assert row.total == 105
    row = _three_with_a_slow_stream(waits=False).known[0]
    assert row is not None
    assert row.total != 105


def test_a_replay_of_the_insert_lets_all_go_on_that_waits_for_it() -> None:
    nodes = nodes_of("last_write_wins", 2, [0, 0])
    write(nodes, 0, (Op.INSERT, 0, 100, 0))
    nodes[1].park(0)
    for _ in range(3):
        write(nodes, 0, (Op.UPDATE, 0, 5, 0))
    assert not nodes[1].take(nodes, 0)
    assert nodes[1].known == {}
    assert nodes[1].replay(nodes, 0)
    drain(nodes, random.Random(1))
    assert nodes[0].rows() == nodes[1].rows()


def test_two_inserts_of_a_key_wait_for_a_person_and_a_delete_ends_both() -> None:
    nodes = nodes_of("last_write_wins", 3, [0, 0, 0])
    write(nodes, 0, (Op.INSERT, 0, 100, 0))
    write(nodes, 1, (Op.INSERT, 0, 7, 0))
    write(nodes, 0, (Op.DELETE, 0, 0, 0))
    drain(nodes, random.Random(1))
    assert [node.known for node in nodes] == [{0: None}] * 3


MINE, THEIRS = Version(5, Writer(50, 1)), Version(9, Writer(50, 2))
EARLIER = Version(1, Writer(50, 2))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_deletes_stand_and_inserts_of_what_is_here_do_not_whatever_the_strategy(strategy: Strategy) -> None:
    for version, live in itertools.product((THEIRS, EARLIER), (True, False)):
        local = Local(live, MINE)
        gone = judge(Op.DELETE, version, local, strategy)
        assert gone == (Act.WRITE, Kind.DELETE_ORIGIN_DIFFERS if live else Kind.DELETE_MISSING)
        come = judge(Op.INSERT, version, local, strategy)
        assert come == (
            Decision(Act.ASK, Kind.INSERT_EXISTS) if live else Decision(Act.KEEP, Kind.INSERT_DELETED)
        )
        if not live:
            assert judge(Op.UPDATE, version, local, strategy) == (Act.KEEP, Kind.UPDATE_DELETED)
    assert judge(Op.DELETE, THEIRS, Local(True, EARLIER), strategy) == (Act.WRITE, None)
    assert judge(Op.INSERT, THEIRS, None, strategy) == (Act.WRITE, None)
    assert judge(Op.DELETE, THEIRS, None, strategy) == (Act.WRITE, Kind.DELETE_MISSING)
    assert judge(Op.UPDATE, THEIRS, None, strategy) is None


def test_a_name_says_the_type_it_is_for_or_none() -> None:
    assert type_of("spock_delta_apply_float8") == "double precision"
    assert [type_of(f"delta_apply_{name}") for name in TYPES] == list(TYPES.values())
    assert type_of("delta_apply") == type_of("spock.delta_apply") == ""
    for name in ("", "delta", "delta_apply_", "delta_apply_text", "spock_delta_apply_float8 ", "max"):
        assert type_of(name) is None


def test_only_types_that_add_up_do() -> None:
    with pytest.raises(KeyError):
        summed("t.a", "s.c0", "s.o0", 25)
