"""Every Prometheus metric of vsql-sync, in one place; docs/operations/metrics.md explains them to operators.

A worker makes one `StreamMetrics` for its stream and tells it what happened, a batch at a time: no metric
is touched per row. Rules: labels are a stream's and node's names, stages, kinds and classes from fixed
lists, never data; a name once published keeps its meaning.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector

from vsql_shared.errors import VsqlSyncError
from vsql_shared.observe import shared_metrics

if shared_metrics.is_shared():
    # Before the first metric below is made: from here on values live in files, one set per slot.
    values.ValueClass = values.MultiProcessValue(  # type: ignore[no-untyped-call]  # the library types only part of itself
        shared_metrics.current_slot
    )

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REGISTRY = CollectorRegistry()


class Stage(Enum):
    """The stages of the data path, in its order."""

    DECODE = "decode"
    SEAL = "seal"
    PUBLISH = "publish"
    COLLECT = "collect"
    VERIFY = "verify"
    OPEN = "open"
    APPLY = "apply"
    ACKNOWLEDGE = "acknowledge"


class Verdict(Enum):
    """What verifying a batch found."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    ORPHAN = "orphan"
    VOID = "void"
    SHREDDED = "shredded"


class StreamState(Enum):
    """What a stream is doing."""

    STARTING = "starting"
    COPYING = "copying"
    STREAMING = "streaming"
    WAITING = "waiting"
    PAUSED = "paused"
    STOPPED = "stopped"
    REFUSED = "refused"
    BLOCKED = "blocked"
    DIVERGED = "diverged"


RotationReason = Literal["session", "batch", "hour", "day", "command", "limit", "epoch"]
LagUnit = Literal["bytes", "seconds", "batches"]

_STREAM = ("stream", "node")
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(f"vsql_sync_{name}", text, (*_STREAM, *labels), registry=REGISTRY)


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    """A present value: gone with its worker, the latest where two wrote one."""
    return Gauge(
        f"vsql_sync_{name}",
        text,
        (*_STREAM, *labels),
        registry=REGISTRY,
        multiprocess_mode="livemostrecent",
    )


STAGE_ROWS = _counter("stage_rows", "Rows that passed a stage.", "stage")
STAGE_BYTES = _counter("stage_bytes", "Bytes that passed a stage.", "stage")
STAGE_BATCHES = _counter("stage_batches", "Batches that passed a stage.", "stage")
STAGE_SECONDS = Histogram(
    "vsql_sync_stage_seconds",
    "Seconds a batch took in a stage.",
    (*_STREAM, "stage"),
    buckets=_SECONDS,
    registry=REGISTRY,
)
LAG_BYTES = _gauge("lag_bytes", "Bytes of WAL the stream is behind.")
LAG_SECONDS = _gauge("lag_seconds", "Seconds between a commit at the source and what was done last.")
LAG_BATCHES = _gauge("lag_batches", "Batches signed and not yet applied.")
TRANSACTIONS = _counter("transactions", "Source transactions that passed.")
ERRORS = _counter("errors", "Errors by class.", "class")
VERIFICATIONS = _counter("verifications", "Batches and records by the verdict of verification.", "verdict")
ANOMALIES = _counter("anomalies", "Changes that did not fit the target's rows.", "kind")
DEK_TUPLES = _gauge("dek_tuples", "Tuples sealed under the present data key.")
DEK_BYTES = _gauge("dek_bytes", "Bytes sealed under the present data key.")
DEK_ROTATIONS = _counter("dek_rotations", "Data keys made, by reason.", "reason")
KMS_CALLS = _counter("kms_calls", "Calls to the key management system, by act and outcome.", "act", "outcome")
AUDIT_ENTRIES = _counter("audit_entries", "Entries appended to the chain.")
AUDIT_BYTES = _counter("audit_bytes", "Bytes of those entries.")
AUDIT_BREAKS = _gauge("audit_chain_breaks", "Breaks of the chain that the background verification finds now.")
AUDIT_VERIFIED = _gauge("audit_verified_sequence", "The newest entry of the chain it has verified.")
AUDIT_VERIFIED_AT = _gauge(
    "audit_verified_timestamp_seconds", "When that was last seen to be the newest there is (Unix time)."
)
AUDIT_WHOLE_AT = _gauge(
    "audit_whole_timestamp_seconds", "When a pass over all of it ended that found nothing (Unix time)."
)
_CLOCK = ("peer", "node")
CLOCK_OFFSET, CLOCK_UNCERTAINTY, CLOCK_MEASURED_AT, CLOCK_STATE = (
    Gauge(f"vsql_sync_clock_{name}", text, _CLOCK, registry=REGISTRY, multiprocess_mode="livemostrecent")
    for name, text in (
        ("offset_seconds", "The clock of a peer's database minus that of this node's, as last measured."),
        ("uncertainty_seconds", "How far that may be from the truth."),
        ("measured_timestamp_seconds", "When it was measured (Unix time)."),
        ("state", "0: near; 1: beyond warn_drift_ms for sure; 2: beyond max_drift_ms for sure."),
    )
)
BUFFER_BYTES = _gauge("buffer_bytes", "Bytes held of batches that are not whole.")
RESIDENT_BYTES = _gauge("resident_bytes", "Resident memory of the stream's worker.")
LAST_PROGRESS = _gauge("last_progress_timestamp_seconds", "When the stream last moved forward (Unix time).")
STALLED = _gauge("stalled", "1 while the stream makes no progress and WAL advances, else 0.")
STATE = Gauge(
    "vsql_sync_stream_state",
    "1 for the state the stream is in.",
    (*_STREAM, "state"),
    registry=REGISTRY,
    # A stream whose worker died still has a state: its supervisor writes it.
    multiprocess_mode="mostrecent",
)


@dataclass(frozen=True)
class StreamMetrics:
    """The metrics of one stream on one node."""

    stream: str
    node: str

    def passed(self, stage: Stage, *, rows: int, size: int, seconds: float, batches: int = 1) -> None:
        """A batch passed a stage, or several that were merged; none is no passing."""
        if not batches:
            return
        labels = (self.stream, self.node, stage.value)
        STAGE_ROWS.labels(*labels).inc(rows)
        STAGE_BYTES.labels(*labels).inc(size)
        STAGE_BATCHES.labels(*labels).inc(batches)
        STAGE_SECONDS.labels(*labels).observe(seconds)

    @contextmanager
    def timed(self, stage: Stage, *, rows: int, size: int, batches: int = 1) -> Iterator[None]:
        """As `passed`, around the work; a batch that fails has not passed."""
        began = time.perf_counter()
        yield
        self.passed(stage, rows=rows, size=size, seconds=time.perf_counter() - began, batches=batches)

    def lag(
        self, *, size: int | None = None, seconds: float | None = None, batches: int | None = None
    ) -> None:
        """How far the stream is behind, as far as it is known."""
        for gauge, value in ((LAG_BYTES, size), (LAG_SECONDS, seconds), (LAG_BATCHES, batches)):
            if value is not None:
                gauge.labels(self.stream, self.node).set(max(0, value))

    def transactions(self, count: int) -> None:
        """Whole source transactions passed."""
        TRANSACTIONS.labels(self.stream, self.node).inc(count)

    def progressed(self, at: float | None = None) -> None:
        """The stream moved forward, now or at a Unix time."""
        LAST_PROGRESS.labels(self.stream, self.node).set(time.time() if at is None else at)

    def stalled(self, yes: bool) -> None:
        """Whether the stream stands still while WAL advances."""
        STALLED.labels(self.stream, self.node).set(1 if yes else 0)

    def failed(self, error: BaseException) -> None:
        """An error, by its class; classes of libraries are one."""
        name = type(error).__name__ if isinstance(error, VsqlSyncError) else "unexpected"
        ERRORS.labels(self.stream, self.node, name).inc()

    def verified(self, verdict: Verdict, count: int = 1) -> None:
        """Verification came to a verdict."""
        VERIFICATIONS.labels(self.stream, self.node, verdict.value).inc(count)

    def anomaly(self, kind: str, count: int = 1) -> None:
        """Changes did not fit the target's rows."""
        ANOMALIES.labels(self.stream, self.node, kind).inc(count)

    def dek_used(self, *, tuples: int, size: int) -> None:
        """What the present data key has sealed so far."""
        DEK_TUPLES.labels(self.stream, self.node).set(tuples)
        DEK_BYTES.labels(self.stream, self.node).set(size)

    def dek_rotated(self, reason: RotationReason) -> None:
        """A new data key was made."""
        DEK_ROTATIONS.labels(self.stream, self.node, reason).inc()

    def kms_called(self, act: Literal["wrap", "unwrap"], *, ok: bool) -> None:
        """The key management system was asked."""
        KMS_CALLS.labels(self.stream, self.node, act, "ok" if ok else "error").inc()

    def audited(self, entries: int, size: int) -> None:
        """Entries went to the chain."""
        AUDIT_ENTRIES.labels(self.stream, self.node).inc(entries)
        AUDIT_BYTES.labels(self.stream, self.node).inc(size)

    def memory(self, *, resident: int, buffered: int | None = None) -> None:
        """Memory of the worker, and of it what waits for the rest of its batch."""
        RESIDENT_BYTES.labels(self.stream, self.node).set(resident)
        if buffered is not None:
            BUFFER_BYTES.labels(self.stream, self.node).set(buffered)

    def state(self, now: StreamState) -> None:
        """The stream is in this state, and in no other."""
        for state in StreamState:
            STATE.labels(self.stream, self.node, state.value).set(1 if state is now else 0)


def audit_broken(chain: str, node: str, breaks: int) -> None:
    """What the background verification finds of a chain now; '': of records of no chain."""
    AUDIT_BREAKS.labels(chain, node).set(breaks)


def audit_watched(chain: str, node: str, sequence: int, at: float | None, whole: float | None) -> None:
    """How far the background verification is with a chain of this node; the topic is the chain ''."""
    if chain:
        AUDIT_VERIFIED.labels(chain, node).set(sequence)
    if at is not None:
        AUDIT_VERIFIED_AT.labels(chain, node).set(at)
    if whole is not None:
        AUDIT_WHOLE_AT.labels(chain, node).set(whole)


def clock_measured(
    peer: str, node: str, offset: float, uncertainty: float, state: Literal["ok", "warning", "error"]
) -> None:
    """How far the clock of a peer's database is from this node's, now."""
    CLOCK_OFFSET.labels(peer, node).set(offset)
    CLOCK_UNCERTAINTY.labels(peer, node).set(uncertainty)
    CLOCK_MEASURED_AT.labels(peer, node).set(time.time())
    CLOCK_STATE.labels(peer, node).set(("ok", "warning", "error").index(state))


def exposition() -> bytes:
    """All metrics in Prometheus' text form: of this process, or of all that share the directory."""
    if not shared_metrics.is_shared():
        return generate_latest(REGISTRY)
    together = CollectorRegistry()
    MultiProcessCollector(together)  # type: ignore[no-untyped-call]  # as above
    return generate_latest(together)
