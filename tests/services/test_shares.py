"""Shares of a stream given by the coordinator while members hold them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.conftest import NewDatabase
from vsql_consumers import shares
from vsql_consumers.coordination import Coordination
from vsql_shared.pg import migrate
from vsql_shared.pg.connect import Connection, connect

CHAIN = "shop.node-a"
BETWEEN_LOOKS = 0.35
"""Seconds; the coordinator looks at the members no more often."""


@pytest.fixture
def sessions(new_database: NewDatabase) -> Iterator[list[Connection]]:
    """The coordinator's, and those of two members."""
    conninfo = new_database("shares")
    with ExitStack() as closing:
        made = [closing.enter_context(connect(conninfo, application_name="test")) for _ in range(3)]
        migrate.install(made[0])
        shares.ensure(made[0], CHAIN, (0, 1))
        yield made


def test_a_share_that_is_being_applied_is_not_counted_as_given(sessions: list[Connection]) -> None:
    conn, member, _ = sessions
    assert shares.give(conn, CHAIN, {0: 0, 1: 0}) == 2
    with member.transaction():
        shares.hold(member, CHAIN, 0, {0: 0})
        assert shares.give(conn, CHAIN, {0: 1, 1: 1}) == 1
    assert [one.member for _, one in sorted(shares.load(conn, CHAIN).items())] == [0, 1]
    assert shares.give(conn, CHAIN, {0: 1}) == 1
    assert shares.give(conn, CHAIN, {}) == 0


def test_the_coordinator_says_what_moved_and_not_what_it_still_wants_to_move(
    sessions: list[Connection], caplog: pytest.LogCaptureFixture
) -> None:
    conn, first, second = sessions
    caplog.set_level(logging.INFO, "vsql_consumers.coordination")
    coordination = Coordination(conn, CHAIN)

    def looked() -> list[tuple[list[int], int]]:
        caplog.clear()
        time.sleep(BETWEEN_LOOKS)
        coordination.assign()
        return [(one.__dict__["members"], one.__dict__["moved"]) for one in caplog.records]

    assert shares.take_number(first, CHAIN) == 0
    assert looked() == [([0], 2)]
    assert shares.take_number(second, CHAIN) == 1
    with first.transaction():
        shares.hold(first, CHAIN, 0, {0: 0, 1: 0})
        assert looked() == [([0, 1], 0)]
        assert looked() == looked() == []
    assert looked() == [([0, 1], 1)]
    assert looked() == []
