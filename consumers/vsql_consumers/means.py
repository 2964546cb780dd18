"""What an attempt to run an incoming stream works with, and what is counted across attempts. Values only."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vsql_consumers.clock import ClockOffset

if TYPE_CHECKING:
    from vsql_consumers.acknowledge import Acknowledger
    from vsql_consumers.parking import Lies
    from vsql_consumers.source import Source
    from vsql_consumers.state import Stream
    from vsql_shared.audit.leaf_store import LeafKeeper
    from vsql_shared.config import Settings
    from vsql_shared.crypto.signing import TrustStore
    from vsql_shared.kms.base import KekProvider
    from vsql_shared.observe.metrics import StreamMetrics
    from vsql_shared.pg.connect import Connection

    Copied = dict[bytes, Lies]


LAST_BATCH = (1 << 63) - 1
"""No batch has a higher number."""


@dataclass(slots=True)
class Totals:
    """What passed since the worker started; kept across attempts."""

    rows: int = 0
    bytes: int = 0
    batches: int = 0
    orphans: int = 0
    clock: ClockOffset = field(default_factory=ClockOffset)
    one_by_one: bool = False
    """Batches are not merged: one of them holds a tuple that cannot be read, or a row that does not fit."""
    singly: bool = False
    """Nor are transactions: some check at their end refuses one of them."""
    careful_up_to: int = 0
    """The last batch that was at fault, perhaps; those behind it are merged again."""
    copied: Copied = field(default_factory=dict)
    """Manifests whose batches Kafka keeps already, for a target transaction that was not committed yet."""

    def take_care(self, batch: int, *, singly: bool = False) -> None:
        """Apply what comes up to a batch one by one, to find which one is at fault."""
        self.one_by_one, self.singly = True, self.singly or singly
        self.careful_up_to = max(self.careful_up_to, batch)

    def passed(self, batch: int) -> None:
        """A batch was committed; LAST_BATCH: what was at fault is known."""
        if batch >= self.careful_up_to:
            self.one_by_one, self.singly, self.careful_up_to = False, False, 0


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
    leaves: LeafKeeper | None
    """None: of a first copy, whose topics go when it is applied, none are kept."""

    def keep_leaves(self) -> None:
        """Look after the leaves this node keeps, when it is time; between transactions."""
        if self.leaves:
            self.leaves.keep(time.monotonic())
