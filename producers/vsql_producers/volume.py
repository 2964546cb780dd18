"""How much the audit trail grows a day, from what was appended lately. Pure: times are passed in.

Not here: the trail itself. Rules: the figure is what a day would bring at the pace of the last ten minutes,
or of the time since the start where that is shorter (a minute at least, so that a start is no forecast);
memory is a few dozen numbers.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

WINDOW_SECONDS = 600.0
SHORTEST_SECONDS = 60.0
_STEP_SECONDS = 15.0
_DAY = 86_400


class _Step(NamedTuple):
    """What had been appended when this step began."""

    at: float
    entries: int
    nbytes: int


class AuditVolume:
    """Entries and bytes appended to one chain by this process."""

    def __init__(self, now: float) -> None:
        self.entries = self.nbytes = 0
        self._steps = deque([_Step(now, 0, 0)])

    def add(self, entries: int, nbytes: int) -> None:
        """Count entries that were appended."""
        self.entries += entries
        self.nbytes += nbytes

    def per_day(self, now: float) -> tuple[int, int]:
        """Entries and bytes a day at the present pace."""
        steps = self._steps
        if now - steps[-1].at >= _STEP_SECONDS:
            steps.append(_Step(now, self.entries, self.nbytes))
        while len(steps) > 1 and now - steps[1].at >= WINDOW_SECONDS:
            steps.popleft()
        seconds = max(now - steps[0].at, SHORTEST_SECONDS)
        scale = _DAY / seconds
        return round((self.entries - steps[0].entries) * scale), round(
            (self.nbytes - steps[0].nbytes) * scale
        )
