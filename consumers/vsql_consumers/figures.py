"""What the pipeline tells monitoring where a stage's own time is not all of it.

Not the metrics themselves (vsql_shared.observe.metrics). Rule: only differences are counted, so that nothing
is told twice, whatever is counted elsewhere.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vsql_shared.errors import KeyUnavailableError, TransientError
from vsql_shared.observe.metrics import Stage, StreamMetrics

if TYPE_CHECKING:
    from vsql_consumers.acknowledge import Acknowledger
    from vsql_consumers.unseal import Announcements
    from vsql_shared.audit.entries import AuditEntry
    from vsql_shared.crypto.dek import OpeningKey
    from vsql_shared.kms.base import KekProvider


class Figures:
    """The figures of one attempt."""

    def __init__(self, metrics: StreamMetrics) -> None:
        self._metrics = metrics
        self._anomalies: Counter[str] = Counter()

    def collected(self, entry: AuditEntry, size: int) -> None:
        """A batch is whole: how long after the source signed it, the difference of the clocks included."""
        seconds = max(0.0, time.time() - entry.event_timestamp / 1_000_000)
        self._metrics.passed(Stage.COLLECT, rows=entry.row_count, size=size, seconds=seconds)

    def open_key(self, announced: Announcements, entry: AuditEntry, provider: KekProvider) -> OpeningKey:
        """The data key of a batch, from the ring, or unwrapped by the KMS: that is counted."""
        is_call = not announced.has_opened(entry.dek_id)
        try:
            key = announced.open(entry, provider)
        except (KeyUnavailableError, TransientError):
            self._metrics.kms_called("unwrap", ok=False)
            raise
        if is_call:
            self._metrics.kms_called("unwrap", ok=True)
        return key

    @contextmanager
    def acknowledging(self, acknowledger: Acknowledger, rows: int, batches: int) -> Iterator[None]:
        """Around the acknowledgement of a group: its entries (an epoch's may be among them), bytes, time."""
        entries, size, began = acknowledger.entries, acknowledger.bytes, time.perf_counter()
        yield
        entries, size = acknowledger.entries - entries, acknowledger.bytes - size
        seconds = time.perf_counter() - began
        self._metrics.passed(Stage.ACKNOWLEDGE, rows=rows, size=size, seconds=seconds, batches=batches)
        self._metrics.audited(entries, size)

    def anomalies(self, so_far: Counter[str]) -> None:
        """Anomalies by kind, as counted since the attempt began."""
        for kind, count in (so_far - self._anomalies).items():
            self._metrics.anomaly(kind, count)
        self._anomalies = Counter(so_far)
