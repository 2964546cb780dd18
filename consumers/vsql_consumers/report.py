"""What a worker says of its stream: the status row, the metrics of its state, the last error.

Not here: when it is said (worker.py) and how the row is written (control.py).
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import psycopg

from vsql_consumers.control import Control
from vsql_consumers.means import Totals
from vsql_consumers.quarantine import Refusal
from vsql_consumers.session import open_control
from vsql_shared import lsn
from vsql_shared.errors import VsqlSyncError
from vsql_shared.observe.metrics import StreamMetrics, StreamState
from vsql_shared.observe.process import resident_bytes

if TYPE_CHECKING:
    from vsql_consumers.pipeline import Pipeline
    from vsql_shared.config import Settings

_log = logging.getLogger(__name__)

_STATES = {
    "running": StreamState.STREAMING,
    "copying": StreamState.COPYING,
    "paused": StreamState.PAUSED,
    "waiting": StreamState.WAITING,
    "refused": StreamState.REFUSED,
    "blocked": StreamState.BLOCKED,
    "diverged": StreamState.DIVERGED,
    "stopped": StreamState.STOPPED,
}


class Report:
    """The voice of one worker, across its attempts."""

    def __init__(self, settings: Settings, chain: str) -> None:
        self._settings, self._chain = settings, chain
        self.metrics = StreamMetrics(chain, settings.cluster.node_name)
        self.totals = Totals()
        self.refusal: Refusal | None = None
        self._last_error: tuple[str, float] | None = None
        self._rates = (time.monotonic(), 0, 0)

    def of_pipeline(self, pipeline: Pipeline) -> dict[str, Any]:
        """Where a running stream stands; the lag and memory metrics too."""
        head, known = pipeline.position.head, pipeline.intake.collector.read_head
        behind = known.batch > head.batch
        commit = pipeline.position.commit_time
        lag_seconds = time.time() - commit / 1e6 if behind and commit is not None else 0.0
        size = max(0, known.lsn_end - head.lsn_end)
        self.metrics.lag(size=size, seconds=lag_seconds, batches=known.batch - head.batch)
        self.metrics.memory(resident=resident_bytes(), buffered=pipeline.intake.collector.buffered)
        detail: dict[str, Any] = {
            "epoch": head.epoch,
            "sequence": head.sequence,
            "batch": head.batch,
            "applied_lsn": lsn.text(head.lsn_end),
            "known_lsn": lsn.text(known.lsn_end),
            "lag_bytes": size,
            "lag_batches": known.batch - head.batch,
            "lag_seconds": round(lag_seconds, 3),
            "buffered_bytes": pipeline.intake.collector.buffered,
        }
        detail |= pipeline.leaf_figures()
        detail |= pipeline.members_detail()
        if pipeline.copy.is_copy:
            detail["copy"] = pipeline.copy.detail()
        return detail

    def say(self, control: Control, what: str, detail: dict[str, Any]) -> None:
        """Write the status row, if it is due."""
        if not control.status_due(what):
            return
        totals, now = self.totals, time.monotonic()
        before, rows, size = self._rates
        seconds = max(now - before, 0.001)
        self._rates = (now, totals.rows, totals.bytes)
        error, offset_us = self._last_error, totals.clock.offset_us
        detail = {
            "rows": totals.rows,
            "bytes": totals.bytes,
            "batches": totals.batches,
            "rows_per_s": round((totals.rows - rows) / seconds, 1),
            "bytes_per_s": round((totals.bytes - size) / seconds, 1),
            "orphans": totals.orphans,
            "anomalies": control.anomalies(),
            "clock_offset_ms": None if offset_us is None else offset_us / 1000,
            "last_error": error[0] if error else "",
            "last_error_at": error[1] if error else None,
            **detail,
        }
        if self.refusal is not None and what == self.refusal.state:
            detail[what] = self.refusal.as_detail()
        control.say(what, detail)
        self.metrics.state(_STATES[what])

    def say_alone(self, what: str) -> None:
        """Say the state without a session of our own; where the database is away there is nobody to tell."""
        self.metrics.state(_STATES[what])
        try:
            with open_control(self._settings, self._chain, None) as conn:
                self.say(Control(conn, self._chain, self._settings.limits), what, {})
        except (VsqlSyncError, psycopg.Error):
            _log.debug("the status could not be written")

    def failed(self, error: VsqlSyncError) -> None:
        """Log an error and keep it as the last one."""
        self.metrics.failed(error)
        self._last_error = (str(error), time.time())
        _log.error("%s", error, extra={"error": type(error).__name__})
