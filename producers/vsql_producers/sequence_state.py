"""What is to be said of a sequence when it was looked at, so that no target is behind what rows used. Pure.

Not here: looking (sequences.py). A look is ahead of the stream: a row's number was given out before its
commit was sent, so a value read afterwards covers it. What breaks that is a sequence that was set back
between a row and the look. Rules (docs/design/0007):

* Set back: the highest value said so far stands, as `unsure`, until everything from before that look has been
  sent. Then the present value is said as `set_back`, and targets follow.
* The first values of an epoch are `unsure`, too, up to the one whose rows reach beyond that look: nobody
  looked while no producer ran.
* A value that is `unsure` is said with every batch, so that the target looks at its rows each time.
* One that could not be looked at is `unsure`, too: rows may have used more before it was locked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vsql_shared.changes import TableName
from vsql_shared.wire.signals import SequenceState, SequenceValue


class Look(NamedTuple):
    """A sequence as it was; every change of it before is in the WAL below `lsn`."""

    increment: int
    last_value: int
    is_called: bool
    lsn: int

    @property
    def reached(self) -> int:
        """The last number it gave out, on the way of its increment."""
        return self.last_value if self.is_called else self.last_value - self.increment


@dataclass(slots=True)
class Sequence:
    """A published sequence, as far as an epoch has looked at it."""

    name: TableName
    owner: tuple[str, ...]
    said: Look | None = None
    """The value that stands at the targets."""
    seen: Look | None = None
    went_back: bool = False
    settled_at: int = 0
    """What is below has been sent: then all that was used before the last surprise is known."""
    sent: int = -1
    """Where the stream stood with the last look."""

    def look(self, now: Look, sent_lsn: int) -> SequenceValue | None:
        """Take a look; `sent_lsn` is where the stream stands with what is said now. None: nothing to say."""
        if self.seen is None:
            self.settled_at = now.lsn
        elif _behind(now, self.seen):
            self.went_back, self.settled_at = True, now.lsn
        self.seen = now
        # A value goes with rows: what follows the position before it may lie below the surprise.
        before, self.sent = self.sent, sent_lsn
        unsure = (sent_lsn if self.went_back else before) < self.settled_at
        state = SequenceState.UNSURE if unsure else SequenceState.AHEAD
        if self.went_back and self.said is not None:
            if unsure:
                # It may have come back to where it was, and gone on.
                now = now if _behind(self.said, now) else self.said
            else:
                state, self.went_back = SequenceState.SET_BACK, False
        if self.said is not None and _same(now, self.said) and state is SequenceState.AHEAD:
            return None
        self.said = now
        return SequenceValue(self.name, self.owner, now.increment, now.last_value, now.is_called, state)

    def unseen(self, increment: int, start: int) -> SequenceValue:
        """What goes with rows where it could not be looked at: what stands, else that it began."""
        last = self.said or Look(increment, start, is_called=False, lsn=0)
        return SequenceValue(
            self.name, self.owner, last.increment, last.last_value, last.is_called, SequenceState.UNSURE
        )


def _behind(one: Look, other: Look) -> bool:
    """Whether a look shows less than another, in the direction the sequence has now."""
    step = 1 if one.increment > 0 else -1
    return (one.reached - other.reached) * step < 0


def _same(one: Look, other: Look) -> bool:
    return one[:3] == other[:3]
