"""One attempt to run an incoming stream: poll, collect, verify, open, apply, acknowledge. Assembled here.

Not here: what happens after an error, pausing and waiting (worker.py). Rules:

* One thread, one turn after the other: memory is bounded by the collector's buffer and one group.
* A group is what is ready, up to `merge_max_rows`; nothing waits for more to come.
* What was refused ends the attempt, after everything before it was applied.
* Acknowledgements follow the flushed commit; Kafka's group offsets follow them and mean nothing to us.
* The origin first: progress, receipts and decisions are read, and the acknowledger is opened, in the session
  that holds it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vsql_consumers import joining, state
from vsql_consumers.acknowledge import Acknowledger
from vsql_consumers.apply import Applier
from vsql_consumers.clock import ClockOffset
from vsql_consumers.collect import Collector
from vsql_consumers.collected import Awaited, Ready
from vsql_consumers.copying import CopyKeeper
from vsql_consumers.figures import Figures
from vsql_consumers.groups import Group
from vsql_consumers.source import Source
from vsql_consumers.state import Position, Stream
from vsql_consumers.unseal import Announcements, Descriptor, name_altered, open_batch
from vsql_consumers.verify import batch_name, verify_batch
from vsql_consumers.write import ApplyLimits
from vsql_shared import failpoints, names
from vsql_shared.audit.chain import ChainReader
from vsql_shared.audit.entries import EPOCH_OPENED, REPLICATION_BATCH, AuditEntry
from vsql_shared.changes import OpenedBatch
from vsql_shared.crypto.announce import KeyRing
from vsql_shared.errors import (
    DecodeError,
    DivergedError,
    RecordError,
    TransientError,
    VerificationError,
    VsqlSyncError,
)
from vsql_shared.observe.metrics import Stage, StreamMetrics, Verdict
from vsql_shared.pg.connect import Connection, errors

if TYPE_CHECKING:
    from vsql_shared.config import Settings
    from vsql_shared.crypto.signing import TrustStore
    from vsql_shared.kms.base import KekProvider

_log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
LOST_AFTER_SECONDS = 5.0
"""How long a batch may lack records before Kafka is asked whether it still has them."""
REST_AFTER_SECONDS = 2.0
READ_KEYS_SECONDS = 30.0
"""How long the keys topic may bring nothing while it is read to its end."""
_COMMIT_OFFSETS_SECONDS = 0.5


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


class Pipeline:
    """Runs until told to stop, or until an error; see the module."""

    def __init__(self, means: Means) -> None:
        settings, stream, conn = means.settings, means.stream, means.applying
        self._means, self._chain = means, stream.chain
        cluster = settings.cluster.name
        self._live_chain = names.live_chain(stream.publication, stream.origin)
        with errors("reading the stream's progress"):
            skip = {} if stream.kind == "copy" else state.copy_lsns(means.control, self._live_chain)
        self._applier = Applier(
            conn, stream.chain, limits=ApplyLimits(), on_anomaly=settings.apply.on_anomaly, skip=skip
        )
        # The fence: whoever holds the origin is the only one, so what it reads now stays true.
        self._applier.setup(stream.origin_name)
        with errors("reading the stream's progress"):
            position = state.load_position(conn, stream.chain)
            self._descriptors: dict[bytes, Descriptor] = state.load_descriptors(conn, stream.chain)
            decisions = state.load_decisions(
                means.control, stream.chain, names.ack_chain(stream.chain, stream.target)
            )
            self._open_decisions = state.load_open_decisions(means.control, stream.chain)
        self.position: Position = joining.first_position(means, self._applier, position, skip, decisions)
        self.acknowledger = means.open_acknowledger()
        head = self.position.head
        dek = settings.encryption.dek
        self._audit = (names.audit_topic(cluster), stream.audit_partition)
        self._keys = (names.keys_topic(cluster), 0)
        self.collector = Collector(
            ChainReader(cluster, stream.chain, stream.origin, means.trust, head),
            means.trust,
            self._audit,
            self.position.audit_offset,
            self.position.offsets,
            settings.limits.collect_buffer_bytes,
            decisions,
        )
        self._ignored = decisions.ignored
        self._announcements = Announcements(
            cluster,
            stream.chain,
            stream.origin,
            means.trust,
            KeyRing(dek.cached_keys, dek.cached_for.total_seconds()),
            head.epoch,
            dek.announcements_held,
        )
        self._keys_paused = False
        self._keys_next = 0
        self.copy = CopyKeeper(conn, stream, self._live_chain)
        self._group = Group.after(self.position, self._live_chain)
        self._awaited: list[Awaited] = []
        self._awaited_since = 0.0
        self._busy_until, self._rested = 0.0, True
        self._offsets_due = 0.0
        self._orphans_told = self._voids_told = 0
        self._figures = Figures(means.metrics)
        self._spoilt = False
        """An apply or a commit failed: what the group has left must not be committed without it."""
        self.finished = False

    def run(self, tick: Callable[[], bool]) -> None:
        """Turn until `tick` says False or the stop event is set; then what is complete is committed."""
        self._begin()
        try:
            while not self._means.stop.is_set() and not self.finished and tick():
                self.turn()
        finally:
            self._applier.abort()  # fragments of a transaction that is not complete; nothing else is open
        self.acknowledger.flush()
        self.acknowledger.settle()
        self._commit_offsets(wait=True)

    def _begin(self) -> None:
        means, begin = self._means, self.position.audit_offset
        end = means.source.ends(*self._audit)[1]
        if end < begin:
            raise DivergedError(
                f"Kafka lost the end of topic {self._audit[0]}/{self._audit[1]}: it ends at offset {end},"
                f" this node has applied what lay before {begin}",
                hint="restore the topic, or initialise this node anew",
            )
        means.source.assign([(*self._keys, -1), (*self._audit, begin)])
        means.source.assign(self.collector.wanted())
        self._read_keys()

    def turn(self) -> None:
        """One round: take what has arrived, apply what is ready."""
        came = self._pump(POLL_SECONDS)
        refused = self._take_ready()
        self.acknowledger.poll()
        if refused is not None:
            raise refused
        self._look_for_lost()
        self._tell_strays()
        self._rest(came)

    # Taking records

    def _pump(self, seconds: float) -> int:
        """Take what Kafka has; returns how many records came."""
        means, collector = self._means, self.collector
        polled = means.source.poll(seconds)
        for topic, partition, offset, key, value in polled.records:
            if (topic, partition) == self._keys:
                self._keys_next = offset + 1
                if (topic, partition, offset) not in self._ignored:
                    self._announcements.feed(topic, partition, offset, key, value)
            else:
                if (topic, partition) == self._audit:
                    means.totals.clock.arrived(offset, time.time_ns() // 1000)
                collector.feed(topic, partition, offset, value)
        for topic, partition, offset, _, _ in polled.ends:
            if (topic, partition) == self._keys:
                self._keys_next = offset
            elif (topic, partition) == self._audit:
                means.totals.clock.ended(offset)
            collector.delivered(topic, partition, offset)
        for topic, partition, _, _, _ in polled.lost:
            self._lost(topic, partition)
        means.source.assign(collector.wanted())
        flow = collector.flow()
        means.source.pause(flow.pause)
        means.source.resume(flow.resume)
        self._hold_keys()
        return len(polled.records)

    def _lost(self, topic: str, partition: int) -> None:
        """Kafka lacks the offset to go on from: what a manifest names is missed when its turn comes."""
        if (topic, partition) in (self._audit, self._keys):
            raise TransientError(f"Kafka does not have the offset we need of {topic}/{partition}")
        low, high = self._means.source.ends(topic, partition)
        self.collector.deleted_below(topic, partition, low)
        self._means.source.go_on(topic, partition, self.collector.next_offset(topic, partition, high))
        _log.warning("Kafka deleted records", extra={"topic": topic, "partition": partition, "begins": low})

    def _read_keys(self, wanted: str = "") -> None:
        """Read the keys topic to its present end, or up to the key that is wanted.

        Announcements that nobody asked for yet are bounded: beyond that the topic waits. While one is wanted,
        older ones make room: keys are used in the order they are announced.
        """
        high = self._means.source.ends(*self._keys)[1]
        deadline = time.monotonic() + READ_KEYS_SECONDS
        self._announcements.wanted = wanted
        while self._keys_next < high and not self._announcements.satisfied and not self._means.stop.is_set():
            before = self._keys_next
            self._hold_keys()
            self._pump(POLL_SECONDS)
            if self._keys_next != before:
                deadline = time.monotonic() + READ_KEYS_SECONDS
            elif time.monotonic() > deadline:
                raise TransientError(f"topic {self._keys[0]} cannot be read to its end")
        self._announcements.wanted = ""

    def _hold_keys(self) -> None:
        """Pause the keys topic while more announcements wait than are held."""
        pause = self._announcements.full
        if pause != self._keys_paused:
            self._keys_paused = pause
            (self._means.source.pause if pause else self._means.source.resume)([self._keys])

    # Applying

    def _take_ready(self) -> VerificationError | None:
        """Apply everything that is ready; returns what stopped it, if it was refused."""
        refused: VerificationError | None = None
        limits = self._means.settings.limits
        try:
            while not self.finished:
                ready = self.collector.next_ready()
                if ready is None:
                    break
                self._take(ready)
                full = self._group.rows >= limits.merge_max_rows or self._means.totals.one_by_one
                if full or self._group.size >= limits.collect_buffer_bytes:
                    self._flush()
        except VerificationError as error:
            self._means.metrics.verified(Verdict.REFUSED)
            if self._spoilt:
                raise
            refused = error
        self._flush()
        return refused

    def _take(self, ready: Ready) -> None:
        """One entry of the chain."""
        entry = ready.entry
        if entry is None or (ready.skipped and entry.batch):
            self._skip(ready, entry)
        elif entry.event_type == REPLICATION_BATCH:
            self._take_batch(ready, entry)
        else:
            if entry.event_type == EPOCH_OPENED:
                self._new_epoch(entry)
            self._group.add_entry(ready)
            self.copy.entry(entry, self._group)
            if self.copy.finished:
                self._flush()
                self.finished = True

    def _take_batch(self, ready: Ready, entry: AuditEntry) -> None:
        opened, new = self._open(ready, entry)
        if opened.continues and not self._group.fragments:
            self._flush()  # what is complete must not depend on how this transaction ends
        self._group.add_batch(ready, opened, new)
        self._descriptors.update(new)
        self.copy.batch(opened, self._group)
        if self._group.fragments:
            self._apply()
            with errors("writing receipts"):
                self._group.store_receipts(self._means.applying, self._chain)
            if not opened.continues:
                self._group.fragments = False
                self._flush()

    def _open(self, ready: Ready, entry: AuditEntry) -> tuple[OpenedBatch, dict[bytes, Descriptor]]:
        """Verify, then decrypt; a batch that fails names its record."""
        metrics, totals = self._means.metrics, self._means.totals
        size = sum(len(pack.message) for part in ready.parts for pack in part.packs)
        totals.clock.written(ready.audit_offset - 1, entry.event_timestamp)
        self._figures.collected(entry, size)
        try:
            with metrics.timed(Stage.VERIFY, rows=entry.row_count, size=size):
                verified = verify_batch(entry, ready.parts, self._means.stream.origin)
            for part in ready.parts:
                part.packs.clear()  # with a row of 255 MB twice in memory, a third time is too much
            if not self._announcements.knows(entry.dek_id):
                self._read_keys(entry.dek_id)
            key = self._figures.open_key(self._announcements, entry, self._means.provider)
            with metrics.timed(Stage.OPEN, rows=entry.row_count, size=size):
                opened, new = open_batch(verified, key, self._descriptors, ready.entry_hash)
        except VerificationError as error:
            if isinstance(error, RecordError) and self._announcements.knows(entry.dek_id):
                name_altered(error, ready.parts, self._announcements.open(entry, self._means.provider))
            error.record = error.record or batch_name(entry)
            raise
        metrics.verified(Verdict.ACCEPTED)
        totals.bytes += size
        return opened, new

    def _new_epoch(self, entry: AuditEntry) -> None:
        if self._group.fragments:
            _log.info("the source abandoned a transaction", extra={"epoch": entry.epoch})
            self._applier.abort()
            self._group = Group.after(self.position, self._live_chain)
        self._descriptors = {}
        self._announcements.forget_before(entry.epoch)

    def _skip(self, ready: Ready, entry: AuditEntry | None) -> None:
        """A batch an operator passes over; entries that carry none are never skipped."""
        _log.warning("skipped by an operator's decision", extra={"sequence": ready.sequence})
        if entry is not None and entry.continues and not self._group.fragments:
            self._flush()
        self._group.add_skipped(ready, f"sequence {ready.sequence} was skipped by an operator")

    def _apply(self) -> None:
        """Give the group's batches to the applier, in the open transaction."""
        group, means = self._group, self._means
        rows = sum(batch.row_count for batch in group.batches)
        with means.metrics.timed(Stage.APPLY, rows=rows, size=group.size, batches=len(group.batches)):
            means.totals.rows += rows
            means.totals.batches += len(group.batches)
            self._spoilt = True
            try:
                group.applied(self._applier.apply(group.batches))
            except DecodeError as error:
                raise self._unreadable(error, group) from error
            self._spoilt = False

    def _unreadable(self, error: DecodeError, group: Group) -> VsqlSyncError:
        """A signed tuple that is none: found again batch by batch, so that the refusal names one."""
        totals, count = self._means.totals, len(group.batches)
        if count > 1:
            totals.one_by_one = True
            return TransientError(f"{error.message}; the last {count} batches are applied one by one")
        opened = group.batches[0]
        return RecordError(
            f"a tuple of batch {opened.batch} cannot be read: {error.message}",
            record=f"{opened.chain} sequence {opened.sequence} (epoch {opened.epoch}, batch {opened.batch})",
        )

    def _flush(self) -> None:
        """Commit the group, if it may end here, and acknowledge it."""
        group, means = self._group, self._means
        if not group.entries or group.fragments:
            return
        self._apply()
        position = group.position
        moment = position.commit_time if position.commit_time is not None else time.time_ns() // 1000
        failpoints.hit("consumer.before-apply-commit")
        honoured = self._honoured(position)
        self._spoilt = True
        try:
            target_lsn = self._applier.finish(
                position.head.lsn_end, moment, lambda conn: self._write(conn, group, honoured)
            )
        except DecodeError as error:
            first, last = self.position.head.sequence + 1, position.head.sequence
            raise RecordError(
                f"what was signed cannot be written: {error.message}",
                record=f"{self._chain} sequence {first} to {last}",
            ) from error
        failpoints.hit("consumer.after-apply-commit")
        self._spoilt = False
        batches = position.head.batch - self.position.head.batch
        self.position = position
        self._open_decisions = [one for one in self._open_decisions if one.id not in honoured]
        self.copy.committed(group)
        self._group = Group.after(position, self._live_chain)
        means.metrics.progressed()
        self._figures.anomalies(self._applier.anomalies)
        with self._figures.acknowledging(self.acknowledger, group.rows, batches):
            if group.stored:
                self.acknowledger.acknowledge_stored(target_lsn)
            else:
                self.acknowledger.acknowledge(group.receipts, target_lsn)
        self._commit_offsets()

    def _write(self, conn: Connection, group: Group, honoured: list[int]) -> None:
        self.copy.write(conn, group)
        group.write(conn, self._chain)
        if honoured:
            state.honour_decisions(conn, honoured)

    def _honoured(self, position: Position) -> list[int]:
        """Decisions whose place the stream has passed once it stands at `position`."""
        passed = {**position.offsets, self._audit: position.audit_offset, self._keys: self._keys_next}
        return [
            one.id
            for one in self._open_decisions
            if (one.sequence is not None and one.sequence <= position.head.sequence)
            or (one.place is not None and one.place[2] < passed.get(one.place[:2], 0))
        ]

    def _commit_offsets(self, *, wait: bool = False) -> None:
        now = time.monotonic()
        if wait or now >= self._offsets_due:
            failpoints.hit("consumer.before-offset-commit")
            self._offsets_due = now + _COMMIT_OFFSETS_SECONDS
            offsets = {**self.position.offsets, self._audit: self.position.audit_offset}
            self._means.source.commit(offsets, wait=wait)

    # Watching

    def _rest(self, came: int) -> None:
        """After a while without records: tidy up, once."""
        now = time.monotonic()
        if came or self._group.fragments:
            self._busy_until, self._rested = now + REST_AFTER_SECONDS, False
        elif not self._rested and now >= self._busy_until:
            self._rested = True
            self._applier.rest()
            self.acknowledger.settle()
            self._commit_offsets(wait=False)

    def _look_for_lost(self) -> None:
        """A batch that stays incomplete: ask Kafka whether its records still exist."""
        awaited, now = self.collector.awaited(), time.monotonic()
        if awaited != self._awaited:
            self._awaited, self._awaited_since = awaited, now
        elif awaited and now - self._awaited_since >= LOST_AFTER_SECONDS:
            self._awaited_since = now
            for place in awaited:
                ends = self._means.source.ends(place.topic, place.partition)
                self.collector.check_log(place.topic, place.partition, *ends)

    def _tell_strays(self) -> None:
        collector, metrics = self.collector, self._means.metrics
        if collector.orphans > self._orphans_told:
            metrics.verified(Verdict.ORPHAN, collector.orphans - self._orphans_told)
            self._means.totals.orphans += collector.orphans - self._orphans_told
            self._orphans_told = collector.orphans
        if collector.voids > self._voids_told:
            metrics.verified(Verdict.VOID, collector.voids - self._voids_told)
            self._voids_told = collector.voids
