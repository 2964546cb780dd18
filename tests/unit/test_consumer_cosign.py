"""When a target cosigns, and what it never does: put its name to a second history."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.audit_history import CHAIN, CLUSTER, History, ordinary
from vsql_consumers.cosign import Last
from vsql_shared.audit.chain import EMPTY_HEAD, advance
from vsql_shared.audit.checkpoint import Checkpoint, Log
from vsql_shared.audit.tree import root_of
from vsql_shared.errors import ChainError

HOUR = 3_600_000_000
LOG = Log(CLUSTER, CHAIN)


def cosigned(history: History) -> Last:
    return Last(0, Checkpoint(LOG, history.head.sequence, root_of(history.head.tree)))


def other(size: int) -> History:
    """Another history of the same length."""
    history = History()
    history.open()
    while history.head.sequence < size:
        history.batch(7)
    return history


@pytest.mark.parametrize(
    ("since", "due"),
    [
        (0, False),
        (1, False),
        (HOUR - 1, False),
        (HOUR, True),
        (90 * HOUR, True),
        (-1, True),
        (-90 * HOUR, True),
    ],
)
def test_it_is_time_again_after_an_hour_and_at_once_where_the_clock_was_ahead(since: int, due: bool) -> None:
    assert Last(1000 * HOUR, None).is_due(1000 * HOUR + since, HOUR) is due


def test_the_history_that_was_cosigned_is_read_again_without_a_word() -> None:
    history = ordinary()
    last = cosigned(history)
    head = EMPTY_HEAD
    for made in history.entries:
        head = advance(head, made.entry, made.entry_hash)
        last.hold(LOG, head)
    assert head == history.head
    Last(0, None).hold(LOG, other(11).head)


def test_another_history_of_the_size_that_was_cosigned_stops_the_stream() -> None:
    history = ordinary()
    shown = other(history.head.sequence)
    with pytest.raises(ChainError, match="split view") as found:
        cosigned(history).hold(LOG, shown.head)
    assert found.value.sequence == history.head.sequence
    assert root_of(history.head.tree).hex() in found.value.message
    assert root_of(shown.head.tree).hex() in found.value.message


def test_heads_of_other_sizes_and_chains_and_without_a_tree_say_nothing() -> None:
    history = ordinary()
    last = cosigned(history)
    last.hold(LOG, other(history.head.sequence - 1).head)
    last.hold(LOG, other(history.head.sequence + 1).head)
    last.hold(Log(CLUSTER, "bills.node-a"), other(history.head.sequence).head)
    last.hold(LOG, replace(history.head, tree=()))
