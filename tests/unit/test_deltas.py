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
    """A sum, and a register with a version."""

    total: int
    note: int
    version: Version


class Sent(NamedTuple):
    """A change as it travels; of an UPDATE `amount` is new - old, of an INSERT the value it begins with."""

    op: int
    key: int
    version: Version
    amount: int
    note: int


@dataclass
class Node:
    """What it has of each key (None: deleted), and what has not reached it yet, by sender."""

    writer: Writer
    strategy: Strategy
    skew: int
    clock: int = 0
    known: dict[int, Row | None] = field(default_factory=dict)
    waiting: dict[int, deque[Sent]] = field(default_factory=dict)
    adds_always: bool = True
    """False: as where a change whose rest falls is dropped whole."""
    waits: bool = True
    """False: as where a change of a row that is not here becomes the row."""

    def write(self, op: int, key: int, amount: int, note: int) -> Sent | None:
        """What a client does, if the database lets it."""
        row = self.known.get(key)
        if (op == Op.INSERT) != (key not in self.known) or (op != Op.INSERT and row is None):
            return None  # a key is never used again
        self.clock += 1
        above = 0 if row is None else row.version.generation
        version = Version(self.clock + self.skew, self.writer, above + 1)
        if op == Op.DELETE:
            self.known[key] = None
        else:
            self.known[key] = Row((0 if row is None else row.total) + amount, note, version)
        return Sent(op, key, version, amount, note)

    def take(self, sender: int) -> bool:
        """Apply the next change of a stream; false where it has to wait."""
        sent = self.waiting[sender][0]
        row = self.known.get(sent.key)
        local = None
        if sent.key in self.known:
            local = Local(row is not None, Version(0, self.writer) if row is None else row.version)
        decision = judge(sent.op, sent.version, local, self.strategy)
        if decision is None and self.waits:
            return False
        self.waiting[sender].popleft()
        assert sent.version.time is not None
        self.clock = max(self.clock, sent.version.time - self.skew + 1)
        stands = decision is None or decision.act is Act.WRITE
        if sent.op == Op.DELETE:
            self.known[sent.key] = None
        elif row is None:
            if stands:
                self.known[sent.key] = Row(sent.amount, sent.note, sent.version)
        elif sent.op == Op.UPDATE:
            total = row.total + (sent.amount if stands or self.adds_always else 0)
            self.known[sent.key] = Row(
                total, sent.note if stands else row.note, sent.version if stands else row.version
            )
        return True


def nodes_of(strategy: Strategy, number: int, skews: list[int]) -> list[Node]:
    made = [Node(Writer(50, at), strategy, skews[at - 1]) for at in range(1, number + 1)]
    for at, node in enumerate(made):
        node.waiting = {other: deque() for other in range(number) if other != at}
    return made


def write(nodes: list[Node], at: int, op: int, key: int, amount: int = 0, note: int = 0) -> Sent | None:
    sent = nodes[at].write(op, key, amount, note)
    for other in nodes:
        if sent is not None and other is not nodes[at]:
            other.waiting[at].append(sent)
    return sent


def drain(nodes: list[Node], rest: random.Random) -> None:
    """All that is under way arrives. Streams that wait for each other would not end."""
    while left := [(node, sender) for node in nodes for sender, queue in node.waiting.items() if queue]:
        rest.shuffle(left)
        taken = [node.take(sender) for node, sender in left]
        assert any(taken), "streams wait for each other"


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("strategy", sorted(SYMMETRIC))
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from("IUUUDTTTT"),
            st.integers(0, 2),
            st.integers(0, 5),
            st.integers(-9, 9),
            st.sampled_from(NOTES),
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
    steps: list[tuple[str, int, int, int, int, int]],
    skews: list[int],
    rest: random.Random,
) -> None:
    nodes = nodes_of(strategy, number, skews)
    totals: dict[int, int] = {}
    for what, where, key, amount, note, step in steps:
        at = where % number
        if what == "T":
            sender = (at + step) % number
            if nodes[at].waiting.get(sender):
                nodes[at].take(sender)
            continue
        if what == "I" and key % number != at:
            continue  # two inserts of one key are a person's to decide
        sent = write(nodes, at, ord(what), key, amount, note)
        if sent is not None and sent.op != Op.DELETE:
            totals[key] = totals.get(key, 0) + amount
    drain(nodes, rest)
    first, *others = nodes
    for other in others:
        assert other.known == first.known
    for key, row in first.known.items():
        assert row is None or row.total == totals[key]


def _two_that_met(*, adds_always: bool) -> list[Node]:
    nodes = nodes_of("last_write_wins", 2, [0, 0])
    for node in nodes:
        node.adds_always = adds_always
    write(nodes, 0, Op.INSERT, 0, 100)
    nodes[1].take(0)
    write(nodes, 0, Op.UPDATE, 0, -30, 1)
    write(nodes, 1, Op.UPDATE, 0, -50, 2)
    drain(nodes, random.Random(1))
    return nodes


def test_a_change_whose_rest_falls_adds_all_the_same() -> None:
    a, b = _two_that_met(adds_always=True)
    assert a.known == b.known
    row = a.known[0]
    assert row is not None
    assert (row.total, row.note) == (20, 2)
    # The model can see what the rule is for.
    a, b = _two_that_met(adds_always=False)
    assert a.known != b.known


def _three_with_a_slow_stream(*, waits: bool) -> Node:
    """A inserts, B adds; C hears B first."""
    nodes = nodes_of("last_write_wins", 3, [0, 0, 0])
    nodes[2].waits = waits
    write(nodes, 0, Op.INSERT, 0, 100)
    nodes[1].take(0)
    write(nodes, 1, Op.UPDATE, 0, 5)
    assert nodes[2].take(1) is not waits
    drain(nodes, random.Random(1))
    return nodes[2]


def test_what_adds_to_a_row_that_has_not_come_waits_for_it() -> None:
    row = _three_with_a_slow_stream(waits=True).known[0]
    assert row is not None
    assert row.total == 105
    row = _three_with_a_slow_stream(waits=False).known[0]
    assert row is not None
    assert row.total != 105


def test_two_inserts_of_a_key_wait_for_a_person_and_a_delete_ends_both() -> None:
    nodes = nodes_of("last_write_wins", 3, [0, 0, 0])
    write(nodes, 0, Op.INSERT, 0, 100)
    write(nodes, 1, Op.INSERT, 0, 7)
    write(nodes, 0, Op.DELETE, 0)
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
