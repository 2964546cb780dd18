"""What Kafka brings of one stream: records to the collector, announcements of keys to their holder.

Not here: what is done with batches that are ready (pipeline.py). Bounded by the collector's buffer and by the
number of announcements held: what runs ahead is paused.
"""

from __future__ import annotations

import logging
import time
from itertools import takewhile
from typing import TYPE_CHECKING

from vsql_consumers.collect import Choose, Collector
from vsql_consumers.collected import Awaited, Decisions
from vsql_consumers.resume import first_offset
from vsql_consumers.source import read_records
from vsql_consumers.unseal import Announcements
from vsql_consumers.verify import record_name
from vsql_shared import names
from vsql_shared.audit.chain import ChainReader
from vsql_shared.crypto.announce import KeyRing
from vsql_shared.errors import RecordError, TransientError
from vsql_shared.observe.metrics import Verdict

if TYPE_CHECKING:
    from vsql_consumers.means import Means
    from vsql_consumers.state import Position

_log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
LOST_AFTER_SECONDS = 5.0
"""How long a batch may lack records before Kafka is asked whether it still has them."""
ASSIGN_AGAIN_SECONDS = 1.0
"""Between looks for a data topic that is not there (yet)."""
SILENT_SECONDS = 20.0
"""How long Kafka may bring nothing before it is asked whether there is more of the audit partition."""
READ_KEYS_SECONDS = 30.0
"""How long the keys topic may bring nothing while it is read to its end."""


class Intake:
    """Takes records from `position` on."""

    def __init__(
        self, means: Means, position: Position, decisions: Decisions, choose: Choose | None = None
    ) -> None:
        """`choose`: which parts of a batch are read."""
        settings, stream = means.settings, means.stream
        cluster, head, dek = settings.cluster.name, position.head, settings.encryption.dek
        self._means, self._begins_at = means, position.audit_offset
        self.audit = (names.audit_topic(cluster), stream.audit_partition)
        self._keys = (names.keys_topic(cluster), 0)
        self.collector = Collector(
            ChainReader(cluster, stream.chain, stream.origin, means.trust, head),
            means.trust,
            self.audit,
            position.audit_offset,
            position.offsets,
            settings.limits.collect_buffer_bytes,
            decisions,
            choose,
        )
        self.announcements = Announcements(
            cluster,
            stream.chain,
            stream.origin,
            means.trust,
            KeyRing(dek.cached_keys, dek.cached_for.total_seconds()),
            head.epoch,
            dek.announcements_held,
        )
        self._ignored = decisions.ignored
        self._keys_paused = False
        self._keys_next = 0
        self._absent: list[tuple[str, int, int]] = []
        self._assign_at = 0.0
        self._awaited: list[Awaited] = []
        self._awaited_since = 0.0
        self._silent = 0.0
        self._orphans_told = self._voids_told = 0

    def passed(self, position: Position) -> dict[tuple[str, int], int]:
        """Up to where each partition has been dealt with when the stream stands at `position`."""
        return {**position.offsets, self.audit: position.audit_offset, self._keys: self._keys_next}

    def begin(self) -> None:
        """Assign the partitions, read the keys topic. Raises DivergedError: entries were lost unread."""
        begin = first_offset(self._means, self.audit, self.collector.read_head, self._begins_at)
        self.collector.read_chain_from(begin)
        self._means.source.assign_all([(*self._keys, -1), (*self.audit, begin)], hint="it is tried again")
        self._assign_wanted()
        self.read_keys()

    def _assign_wanted(self) -> None:
        """Read the data partitions the chain names; a topic that is not there is looked for again."""
        wanted, now = self.collector.wanted(), time.monotonic()
        if self._absent and now >= self._assign_at:
            wanted += self._absent
            self._absent = []
        if wanted:
            self._absent += self._means.source.assign(wanted)
            self._assign_at = now + ASSIGN_AGAIN_SECONDS

    def drop_idle(self) -> None:
        """Read no more what no entry asks for: where parts of batches are chosen."""
        idle = set(self.collector.forget_idle())
        self._absent = [one for one in self._absent if one[:2] not in idle]
        self._means.source.drop(idle)

    def pump(self, seconds: float = POLL_SECONDS) -> int:
        """Take what Kafka has, waiting for it so long at most; returns how many records came."""
        means, collector, began = self._means, self.collector, time.monotonic()
        polled = means.source.poll(seconds)
        self._silent = 0.0 if polled.records or polled.ends else self._silent + time.monotonic() - began
        for topic, partition, offset, key, value in polled.records:
            if (topic, partition) == self._keys:
                self._keys_next = offset + 1
                if (topic, partition, offset) not in self._ignored:
                    self.announcements.feed(topic, partition, offset, key, value)
            else:
                if (topic, partition) == self.audit:
                    means.totals.clock.arrived(offset, time.time_ns() // 1000)
                collector.feed(topic, partition, offset, value)
        for topic, partition, offset, _, _ in polled.ends:
            if (topic, partition) == self._keys:
                self._keys_next = offset
            elif (topic, partition) == self.audit:
                means.totals.clock.ended(offset)
            collector.delivered(topic, partition, offset)
        for topic, partition, _, _, _ in polled.lost:
            self._lost(topic, partition)
        self._assign_wanted()
        flow = collector.flow()
        means.source.pause(flow.pause)
        means.source.resume(flow.resume)
        self._hold_keys()
        return len(polled.records)

    def _lost(self, topic: str, partition: int) -> None:
        """Kafka lacks the offset to go on from: what a manifest names is missed when its turn comes."""
        if (topic, partition) in (self.audit, self._keys):
            raise TransientError(f"Kafka does not have the offset we need of {topic}/{partition}")
        low, high = self._means.source.ends(topic, partition)
        self.collector.deleted_below(topic, partition, low)
        self._means.source.go_on(topic, partition, self.collector.next_offset(topic, partition, high))
        _log.warning("Kafka deleted records", extra={"topic": topic, "partition": partition, "begins": low})

    def read_keys(self, wanted: str = "") -> None:
        """Read the keys topic to its present end, or up to the key that is wanted.

        Announcements that nobody asked for yet are bounded: beyond that the topic waits. While one is wanted,
        older ones make room: keys are used in the order they are announced.
        """
        high = self._means.source.ends(*self._keys)[1]
        deadline = time.monotonic() + READ_KEYS_SECONDS
        self.announcements.wanted = wanted
        while self._keys_next < high and not self.announcements.satisfied and not self._means.stop.is_set():
            before = self._keys_next
            self._hold_keys()
            self.pump()
            if self._keys_next != before:
                deadline = time.monotonic() + READ_KEYS_SECONDS
            elif time.monotonic() > deadline:
                raise TransientError(f"topic {self._keys[0]} cannot be read to its end")
        self.announcements.wanted = ""

    def look_again(self, wanted: str) -> bool:
        """Look for one key in all of the keys topic; whether an announcement was found that is new here.

        A key may have been announced again far behind, and one that was let go for want of room lies before
        what is read next. It ends early when the stream does.
        """
        before, chain = self.announcements.announced(wanted), self._means.stream.chain
        settings = self._means.settings
        group = names.group_id(settings.cluster.name, chain, settings.cluster.node_name)
        records = read_records(settings, f"vsql-sync-keys-{chain}", group, self._keys, 0)
        for offset, key, value in takewhile(lambda _: not self._means.stop.is_set(), records):
            if (*self._keys, offset) not in self._ignored:
                self.announcements.feed_again(wanted, *self._keys, offset, key, value)
        return self.announcements.announced(wanted) not in (None, before)

    def _hold_keys(self) -> None:
        """Pause the keys topic while more announcements wait than are held."""
        pause = self.announcements.full
        if pause != self._keys_paused:
            self._keys_paused = pause
            (self._means.source.pause if pause else self._means.source.resume)([self._keys])

    def look_for_lost(self) -> None:
        """A batch that stays incomplete: ask Kafka whether its records, or its topics, still exist."""
        awaited, now = self.collector.awaited(), time.monotonic()
        if awaited != self._awaited:
            self._awaited, self._awaited_since = awaited, now
        elif awaited and now - self._awaited_since >= LOST_AFTER_SECONDS:
            self._awaited_since = now
            absent = {(topic, partition) for topic, partition, _ in self._absent}
            for place in awaited:
                if (place.topic, place.partition) in absent:
                    raise RecordError(
                        f"Kafka has no partition {place.topic}/{place.partition} any more; the chain needs it"
                        f" from offset {place.next} on",
                        record=record_name(place.topic, place.partition, place.next),
                        hint="the topic was deleted before its records were applied",
                    )
            ends = self._means.source.ends_of([(place.topic, place.partition) for place in awaited])
            for (topic, partition), bounds in ends.items():
                self.collector.check_log(topic, partition, *bounds)

    def look_for_silence(self) -> None:
        """Raise TransientError where the audit partition brings nothing although there is something.

        A partition that went and came back may stay unread for good: its reader waits for the one it knew.
        """
        if self.collector.audit_paused or self._silent < SILENT_SECONDS:
            return
        self._silent = 0.0
        end, read = self._means.source.ends(*self.audit)[1], self.collector.audit_next
        if end != read:
            raise TransientError(
                f"{self.audit[0]}/{self.audit[1]} was read up to offset {read}, it ends at {end},"
                f" and nothing came for {SILENT_SECONDS:g} s",
                hint="its place is looked for anew",
            )

    def tell_strays(self) -> None:
        """Count orphans and void entries since the last call."""
        collector, metrics = self.collector, self._means.metrics
        if collector.orphans > self._orphans_told:
            metrics.verified(Verdict.ORPHAN, collector.orphans - self._orphans_told)
            self._means.totals.orphans += collector.orphans - self._orphans_told
            self._orphans_told = collector.orphans
        if collector.voids > self._voids_told:
            metrics.verified(Verdict.VOID, collector.voids - self._voids_told)
            self._voids_told = collector.voids
