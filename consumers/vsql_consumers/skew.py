"""Pauses what carries cardholder data while the source's clock is too far from ours, and notes the future.

Not here: measuring (vsql_shared/clocks) and waiting for a single change's time (writers.py). Rules:

* Paused is only where the clocks are apart by more than `max_clock_skew_ms` for sure, by a measure that is
  still fresh: a slow way, or a peer that does not answer, pauses nothing.
* What came before is applied first; other streams, and batches without such data before this one, go on.
* Commits from the future are counted by node, and written once a second at most.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vsql_shared.errors import TransientError
from vsql_shared.pg import clocks

if TYPE_CHECKING:
    from vsql_shared.pg.connect import Connection

_ASK_SECONDS = 1.0


class SkewError(TransientError):
    """PCI data was met while the clocks are too far apart: the stream holds until they are not."""


class SkewGuard:
    """Of one stream: its source's clock against ours."""

    def __init__(self, conn: Connection, origin: str, limit_ms: int) -> None:
        """`conn`: in no transaction, so not the one that applies."""
        self._conn, self._origin, self._limit_ms = conn, origin, limit_ms
        self._asked = float("-inf")
        self._why: str | None = None

    def too_far(self) -> str | None:
        """Why data that must not be applied now waits; None where it may be."""
        now = time.monotonic()
        if now - self._asked > _ASK_SECONDS:
            found, self._asked = clocks.fresh(self._conn, self._origin), now
            self._why = None
            if found is not None and found.surely_us > self._limit_ms * 1000:
                offset, unsure = found.offset_us / 1e6, found.uncertainty_us / 1e6
                whose = f"the clock of node {self._origin}'s database"
                self._why = f"for {whose}, {offset:+.3f} s from ours (± {unsure:.3f} s)"
        return self._why

    def require_near(self) -> None:
        """Raise SkewError while data that must not be applied now waits."""
        if (why := self.too_far()) is not None:
            raise SkewError(
                f"PCI data waits {why}",
                hint=f"set both clocks; [conflict] max_clock_skew_ms = {self._limit_ms} is their limit",
            )


class FutureCommits:
    """How many changes of a node had to wait for our clock, and by how much at most."""

    def __init__(self, conn: Connection, origin: str) -> None:
        self._conn, self._origin = conn, origin
        self._waits = self._most_us = 0
        self._written = float("-inf")

    def came(self, ahead_us: int) -> None:
        """A change is so far ahead of our clock."""
        self._waits, self._most_us = self._waits + 1, max(self._most_us, ahead_us)

    def write(self, *, now: bool = False) -> None:
        """Write what came, once a second or `now`. Often is no harm."""
        at = time.monotonic()
        if not self._waits or (at - self._written <= _ASK_SECONDS and not now):
            return
        clocks.came_from_the_future(self._conn, self._origin, self._waits, self._most_us)
        self._written, self._waits, self._most_us = at, 0, 0
