"""What a producer's worker says of its stream: status rows, metrics, log lines, the alarm when it stalls.

Not here: what follows from an error (worker.py). Rules:

* A cause that stays is logged once a minute; status and metrics have it at once.
* What waits, inside a stage or between two tries, says so again and again: a row that nobody renews looks
  like a worker that is gone.
* A live stream that made no progress for `limits.stall_alert_ms` while WAL advanced is said once in the log,
  and in status and metrics for as long as it lasts (docs/operations/slots.md). Paused ones are left alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import psycopg

from vsql_producers import stream as streams
from vsql_producers.replication import wal_position
from vsql_producers.stall import Marks, Stall
from vsql_producers.volume import AuditVolume
from vsql_shared import lsn, names
from vsql_shared.errors import VsqlSyncError
from vsql_shared.observe.metrics import StreamMetrics, StreamState
from vsql_shared.observe.process import resident_bytes
from vsql_shared.pg.status import write_status

if TYPE_CHECKING:
    from vsql_producers.control import Control
    from vsql_producers.targets import Targets
    from vsql_shared.config import Settings
    from vsql_shared.pg.connect import Connection

_log = logging.getLogger(__name__)

_SAY_AGAIN_SECONDS = 60.0
_STATES = {
    "running": StreamState.STREAMING,
    "paused": StreamState.PAUSED,
    "waiting": StreamState.WAITING,
    "copying": StreamState.COPYING,
    "diverged": StreamState.DIVERGED,
    "stopped": StreamState.STOPPED,
}
_AT_REST = frozenset({"paused", "stopped"})


class Told(Protocol):
    """What a pipeline tells."""

    sequence: int

    def status(self, wal_lsn: int) -> dict[str, Any]:
        """What `syncctl status` shows of the stream."""

    def marks(self) -> Marks | None:
        """How far it is; None where standing still says nothing."""

    @property
    def totals(self) -> tuple[int, int, int]:
        """Rows, bytes and batches sent in this epoch."""


class Report:
    """One stream's, through all of its epochs."""

    def __init__(self, settings: Settings, chain: str) -> None:
        self._chain = chain
        self.metrics = StreamMetrics(chain, settings.cluster.node_name)
        self.volume = AuditVolume(time.monotonic())
        self._interval = settings.limits.status_interval_ms / 1000
        # A first copy waits for its target, and may read a table for hours.
        self._stall = Stall() if chain == names.live_chain_of(chain) else None
        self._stall_seconds = settings.limits.stall_alert_ms / 1000
        self._stalled = False
        self._last_error = ""
        self._last_error_at = 0.0
        self._logged_at = float("-inf")
        self._totals = (0, 0, 0)
        self._rates: tuple[float, int, int] = (time.monotonic(), 0, 0)
        self._said: tuple[str, dict[str, Any]] = ("waiting", {})
        self._next = 0.0

    @property
    def last_error(self) -> str:
        """In words."""
        return self._last_error

    def failed(self, error: VsqlSyncError) -> None:
        """An attempt ended."""
        self.metrics.failed(error)
        now = time.monotonic()
        again = str(error) == self._last_error and now - self._logged_at < _SAY_AGAIN_SECONDS
        self._last_error, self._last_error_at = str(error), time.time()
        if not again:
            self._logged_at = now
        level = logging.DEBUG if again else logging.ERROR
        _log.log(level, "%s", error, extra={"error": type(error).__name__})

    def ended(self, told: Told) -> None:
        """An epoch is over: keep what it counted."""
        rows, size, batches = (a + b for a, b in zip(self._totals, told.totals, strict=True))
        self._totals = (rows, size, batches)

    def say(self, conn: Connection, control: Control, state: str, told: Told, targets: Targets) -> None:
        """The status of an open stream."""
        wal_lsn = wal_position(conn)
        detail = told.status(wal_lsn)
        detail["targets"] = targets.detail(told.sequence)
        rows, size, batches = (a + b for a, b in zip(self._totals, told.totals, strict=True))
        now = time.monotonic()
        before, rows_before, size_before = self._rates
        seconds = max(now - before, 0.001)
        self._rates = (now, rows, size)
        detail |= {
            **self._audit_volume(now),
            "rows": rows,
            "bytes": size,
            "batches": batches,
            "rows_per_s": round((rows - rows_before) / seconds, 1),
            "bytes_per_s": round((size - size_before) / seconds, 1),
            **self._errors(),
            **self._watch(state, now, wal_lsn, told.marks()),
        }
        control.say(state, detail, now)
        self._said, self._next = (state, detail), now + self._interval
        self.metrics.state(_STATES[state])
        self.metrics.memory(resident=resident_bytes())

    def say_again(self, conn: Connection) -> None:
        """Called by whatever waits inside a stage: at most once an interval, as it was said last."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._interval
        state, detail = self._said
        detail |= self._watch(state, now, wal_position(conn), None)
        write_status(conn, self._chain, "out", state, detail)

    def opening(self, doing: str = "") -> None:
        """An attempt begins: until it is open, the stream waits; for what, where no error has said it."""
        detail = self._alone()
        self._said = ("waiting", detail | {"last_error": detail["last_error"] or doing})

    def say_alone(
        self, connect: Callable[[], Connection], state: str, stream_state: str | None = None
    ) -> None:
        """The status where no epoch is open; where the database is away there is nobody to tell."""
        self.metrics.state(_STATES[state])
        try:
            with connect() as conn:
                if stream_state is not None:
                    streams.set_state(conn, self._chain, stream_state, self._last_error)
                write_status(conn, self._chain, "out", state, self.alone(conn, state))
        except (VsqlSyncError, psycopg.Error):
            _log.debug("the status could not be written")

    def alone(self, conn: Connection, state: str) -> dict[str, Any]:
        """Detail of a stream that is not open."""
        return self._alone() | self._watch(state, time.monotonic(), wal_position(conn), None)

    def _alone(self) -> dict[str, Any]:
        rows, size, batches = self._totals
        return {"rows": rows, "bytes": size, "batches": batches, **self._errors()}

    def _errors(self) -> dict[str, Any]:
        return {"last_error": self._last_error, "last_error_at": self._last_error_at or None}

    def _audit_volume(self, now: float) -> dict[str, Any]:
        """Entries since the start, and what a day brings at the present pace."""
        entries, nbytes = self.volume.per_day(now)
        return {
            "audit_entries": self.volume.entries,
            "audit_entries_per_day": entries,
            "audit_bytes_per_day": nbytes,
        }

    def _watch(self, state: str, now: float, wal_lsn: int, marks: Marks | None) -> dict[str, Any]:
        """The key `stalled_seconds`; raises the alarm, or ends it."""
        if self._stall is None:
            return {}
        if state in _AT_REST:
            self._stall.rest()
            seconds = 0.0
        else:
            seconds = self._stall.look(now, wal_lsn, marks)
        stalled = seconds >= self._stall_seconds
        self.metrics.stalled(stalled)
        if stalled and not self._stalled:
            _log.error(
                "the stream is stalled: the WAL went on to %s, and nothing was confirmed for %.0f s",
                lsn.text(wal_lsn), seconds, extra={"state": state, "last_error": self._last_error},
            )  # fmt: skip
        elif self._stalled and not stalled:
            _log.warning("the stream is not stalled any more", extra={"state": state})
        self._stalled = stalled
        return {"stalled_seconds": round(seconds) if stalled else None}
