"""Whether a stream stands still while its server's WAL moves on. Pure: times and positions are passed in.

Not here: who is told (report.py). Rules:

* Progress is what is durable: a position confirmed, a batch recorded. A stream that tries the same rows again
  and again in new epochs makes none.
* The time counts from the moment the WAL was first seen to have moved since the last progress, so that an
  idle database never raises an alarm, however long it was idle before.
"""

from __future__ import annotations

from typing import NamedTuple


class Marks(NamedTuple):
    """How far a stream is; each moves forward only when there is progress."""

    confirmed: int = 0
    published: tuple[int, int] = (0, 0)
    """Position of the chain, and entries recorded behind it: fragments of a transaction without an end."""


class Stall:
    """Watches one stream."""

    def __init__(self) -> None:
        self._best = Marks()
        self._wal_lsn: int | None = None
        self._since: float | None = None

    def look(self, now: float, wal_lsn: int, marks: Marks | None = None) -> float:
        """Seconds for which the WAL has moved on without the stream; 0.0 while all is well.

        Without `marks` the stream is not open, and makes no progress.
        """
        moved = False
        if marks is not None:
            best = Marks(*map(max, self._best, marks))  # type: ignore[arg-type]  # field by field, each with its like
            moved, self._best = best != self._best, best
        if moved or self._wal_lsn is None or wal_lsn < self._wal_lsn:
            self.rest(wal_lsn)
        elif wal_lsn > self._wal_lsn and self._since is None:
            self._since = now
        return 0.0 if self._since is None else now - self._since

    def rest(self, wal_lsn: int | None = None) -> None:
        """Begin anew: it moved, or it is not meant to."""
        self._wal_lsn, self._since = wal_lsn, None
