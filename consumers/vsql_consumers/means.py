"""What an attempt to run an incoming stream works with, and what is counted across attempts. Values only."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vsql_consumers.clock import ClockOffset

if TYPE_CHECKING:
    from vsql_consumers.acknowledge import Acknowledger
    from vsql_consumers.source import Source
    from vsql_consumers.state import Stream
    from vsql_shared.config import Settings
    from vsql_shared.crypto.signing import TrustStore
    from vsql_shared.kms.base import KekProvider
    from vsql_shared.observe.metrics import StreamMetrics
    from vsql_shared.pg.connect import Connection


@dataclass(slots=True)
class Totals:
    """What passed since the worker started; kept across attempts."""

    rows: int = 0
    bytes: int = 0
    batches: int = 0
    orphans: int = 0
    clock: ClockOffset = field(default_factory=ClockOffset)
    one_by_one: bool = False
    """Batches are not merged: one of them holds a tuple that cannot be read."""


@dataclass(slots=True)
class Means:
    """What an attempt works with; whoever made it closes it."""

    settings: Settings
    stream: Stream
    control: Connection
    applying: Connection
    trust: TrustStore
    provider: KekProvider
    open_acknowledger: Callable[[], Acknowledger]
    source: Source
    metrics: StreamMetrics
    totals: Totals
    stop: threading.Event
