"""[limits]: every bound on memory, size and time, in one place, each with its unit."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from vsql_shared.config.section import Section
from vsql_shared.config.values import Size, Whole, refusal

KIB, MIB = 2**10, 2**20
# Room for a pack's envelope, its transactions and Kafka's own headers around the sealed tuples.
MESSAGE_OVERHEAD_BYTES = 4 * KIB


class LimitsSettings(Section):
    """Bounds of one stream's worker. Sizes are bytes or text with a unit ("4MiB")."""

    batch_max_rows: Annotated[Whole, Field(ge=1, le=1_000_000)] = 5_000
    """Changes in a batch; a larger transaction is cut into fragments."""
    batch_max_bytes: Annotated[Size, Field(ge=16 * KIB, le=256 * MIB)] = 4 * MIB
    """Bytes of tuples in a batch."""
    batch_linger_ms: Annotated[Whole, Field(ge=0, le=60_000)] = 20
    """Milliseconds a batch waits for more transactions; 0 sends each commit at once."""
    batch_linger_max_ms: Annotated[Whole, Field(ge=0, le=60_000)] = 250
    """Milliseconds it waits while WAL arrives faster than it is sent: larger batches cost less a row."""
    pack_max_tuples: Annotated[Whole, Field(ge=1, le=4_096)] = 64
    """Tuples in one Kafka message."""
    pack_max_bytes: Annotated[Size, Field(ge=KIB, le=64 * MIB)] = 256 * KIB
    """Bytes of tuples in one Kafka message."""
    message_max_bytes: Annotated[Size, Field(ge=8 * KIB, le=128 * MIB)] = 1_000_000
    """Bytes of one Kafka message; at most the broker's message.max.bytes. A larger tuple is split."""
    inflight_batches: Annotated[Whole, Field(ge=1, le=64)] = 4
    """Batches published and not yet acknowledged by Kafka."""
    collect_buffer_bytes: Annotated[Size, Field(ge=MIB, le=4_096 * MIB)] = 32 * MIB
    """Bytes a consumer holds of batches that are not whole; partitions ahead are paused beyond it."""
    kafka_queue_bytes: Annotated[Size, Field(ge=MIB, le=1_024 * MIB)] = 16 * MIB
    """Bytes in the Kafka client's own queue, sending or fetching."""
    merge_max_rows: Annotated[Whole, Field(ge=1, le=10_000_000)] = 50_000
    """Rows that merged source transactions may have in one target transaction."""
    retry_backoff_ms: Annotated[Whole, Field(ge=10, le=60_000)] = 200
    """Milliseconds before the first retry; doubles with each."""
    retry_backoff_max_ms: Annotated[Whole, Field(ge=10, le=600_000)] = 30_000
    """Milliseconds between retries at most."""
    status_interval_ms: Annotated[Whole, Field(ge=100, le=60_000)] = 2_000
    """Milliseconds between a service's status rows."""
    command_poll_ms: Annotated[Whole, Field(ge=100, le=60_000)] = 1_000
    """Milliseconds between looks for commands when no notification comes."""
    sequence_interval_ms: Annotated[Whole, Field(ge=100, le=3_600_000)] = 5_000
    """Milliseconds between looks at published sequences while no rows come; each batch brings a look."""
    stall_alert_ms: Annotated[Whole, Field(ge=3_000, le=3_600_000)] = 30_000
    """Milliseconds without progress while WAL advances, after which a stream counts as stalled."""
    memory_warn_mb: Annotated[Whole, Field(ge=64, le=65_536)] = 300
    """MiB of resident memory above which a worker warns."""

    @model_validator(mode="after")
    def _fit_together(self) -> LimitsSettings:
        if self.pack_max_bytes + MESSAGE_OVERHEAD_BYTES > self.message_max_bytes:
            raise refusal(
                f"pack_max_bytes ({self.pack_max_bytes}) must be at least {MESSAGE_OVERHEAD_BYTES}"
                f" below message_max_bytes ({self.message_max_bytes})"
            )
        if self.retry_backoff_ms > self.retry_backoff_max_ms:
            raise refusal(
                f"retry_backoff_ms ({self.retry_backoff_ms}) must not exceed"
                f" retry_backoff_max_ms ({self.retry_backoff_max_ms})"
            )
        return self
