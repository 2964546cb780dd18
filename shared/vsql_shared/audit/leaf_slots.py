"""Which slots of kept leaves are emptied, and when the next one is begun. Pure: times are passed in.

Not here: the tables (leaf_store.py). Rules:

* Slots are used in turn, and each ends after a sixteenth of the time, or of the bytes, that may be kept: so
  what is emptied at once is small, and at most that much is gone too early or stays too long.
* Emptied are slots that ended longer ago than leaves are kept, the oldest while all of them together hold too
  much, and the one that comes next. At most a few at a time.
* Where nothing is to be kept, everything is emptied, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

SLOTS = 32
_SHARES = 16
"""Of what may be kept, a slot takes the 16th part: half of the slots are spare."""
MOST_EMPTIED = 4
"""Slots emptied at a look."""


class Slot(NamedTuple):
    """A slot that holds rows; the one without an end is written to."""

    number: int
    begun_at: datetime
    ended_at: datetime | None
    nbytes: int


class Steps(NamedTuple):
    """What is to be done: slots to be emptied, and the slot to be written to (None: none)."""

    empty: tuple[int, ...]
    current: int | None


def plan(slots: Sequence[Slot], now: datetime, keep: timedelta, most: int) -> Steps:
    """What follows from the slots that hold rows, for leaves kept so long and at most so many bytes."""
    if not keep:
        return Steps(tuple(one.number for one in slots), None)
    ended = sorted((one for one in slots if one.ended_at is not None), key=lambda one: one.begun_at)
    current = next((one for one in slots if one.ended_at is None), None)
    left = sum(one.nbytes for one in slots)
    empty: list[int] = []
    for one in ended:
        old = one.ended_at is not None and one.ended_at < now - keep
        if len(empty) < MOST_EMPTIED and (old or left > most):
            empty.append(one.number)
            left -= one.nbytes
    if current is None:
        after = max(slots, key=lambda one: one.begun_at).number if slots else -1
        return _begin(after, slots, empty)
    full = now - current.begun_at >= keep / _SHARES or current.nbytes >= most // _SHARES
    return _begin(current.number, slots, empty) if full else Steps(tuple(empty), current.number)


def _begin(after: int, slots: Sequence[Slot], empty: list[int]) -> Steps:
    """The next slot is written to; what it holds is the oldest there is."""
    number = (after + 1) % SLOTS
    if number not in empty and any(one.number == number for one in slots):
        empty.append(number)
    return Steps(tuple(empty), number)
