"""How far this node's clock seems to be from the source's, by the age of fresh manifests. Pure.

Not here: reading them. Rules:

* Only a manifest counts that came right after the end of the partition had been seen: what lay in a
  backlog is old, not offset.
* The age of a fresh one is the offset plus the way it took; the least of the last minutes is nearest to the
  offset. It is forgotten after that, because clocks move.
"""

from __future__ import annotations

from dataclasses import dataclass

WINDOW_US = 120_000_000
"""How long a reading counts at least; at most twice as long."""


@dataclass(slots=True)
class ClockOffset:
    """Times are µs since 1970; what came first after the end is told by its offset."""

    _end: int | None = None
    _fresh: tuple[int, int] | None = None
    _window: int = 0
    _least: tuple[int | None, int | None] = (None, None)

    def ended(self, next_offset: int) -> None:
        """Note that the partition was read to its end."""
        self._end = next_offset

    def arrived(self, offset: int, now: int) -> None:
        """Note a record of the partition, whatever it is."""
        self._fresh = (offset, now) if offset == self._end else self._fresh

    def written(self, offset: int, timestamp: int) -> None:
        """Say when a verified entry was written; it counts if it was fresh when it arrived."""
        if self._fresh is None or self._fresh[0] != offset:
            return
        now = self._fresh[1]
        age, (before, latest) = now - timestamp, self._least
        if now - self._window >= WINDOW_US:
            self._window, before, latest = now, latest, None
        self._least = (before, age if latest is None else min(latest, age))

    @property
    def offset_us(self) -> int | None:
        """The offset in µs; None until it is known."""
        known = [one for one in self._least if one is not None]
        return min(known) if known else None
