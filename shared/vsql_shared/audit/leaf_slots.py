"""Which slots of kept leaves are emptied, and when the next one is begun. Pure: times are passed in.

Not here: the tables (leaf_store.py). Rules:

* Slots are used in turn, and each ends after a sixteenth of the time, or of the bytes, that may be kept: so
  what is emptied at once is small, and at most that much is gone too early or stays too long.
* Beginning a slot waits for no emptying: the next free one is taken, and half of them are spare. Where none
  is free, the present one goes on.
* Emptied are slots that ended longer ago than leaves are kept, and the oldest while all of them together hold
  too much. At most a few at a time.
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
    left = sum(one.nbytes for one in slots)
    empty: list[int] = []
    for one in ended:
        old = one.ended_at is not None and one.ended_at < now - keep
        if len(empty) < MOST_EMPTIED and (old or left > most):
            empty.append(one.number)
            left -= one.nbytes
    return Steps(tuple(empty), _current(slots, now, keep, most))


def _current(slots: Sequence[Slot], now: datetime, keep: timedelta, most: int) -> int | None:
    current = next((one for one in slots if one.ended_at is None), None)
    if current and now - current.begun_at < keep / _SHARES and current.nbytes < most // _SHARES:
        return current.number
    last = current or max(slots, key=lambda one: one.begun_at, default=None)
    used = {one.number for one in slots}
    after = (last.number if last else -1) + 1
    free = (number % SLOTS for number in range(after, after + SLOTS) if number % SLOTS not in used)
    return next(free, current.number if current else None)
