"""The live stream of one epoch, from the WAL to Kafka: the one place that assembles its stages.

    WalStream → Transactions → Batches → Outlet (arrange, key, seal, publish) → Progress → WalStream.confirm

Not here: retries, locks and operators (worker.py). Start order (docs/design/0002): the slot first, which
fences off an older process; then the chain; then the epoch. Rules:

* Bounded memory: nothing is read from the WAL while a cut batch waits for room among those under way.
* One thread: Kafka's answers, the WAL and the database are served in turn; none is waited for longer than
  a few milliseconds while another may have something.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from vsql_producers import drift, joining, replication
from vsql_producers import slot as slots
from vsql_producers.batches import Batch, Batches, BatchLimits
from vsql_producers.binary_types import may_be_binary
from vsql_producers.context import Context
from vsql_producers.epoch import open_epoch
from vsql_producers.level import kafka_head, read_or_level
from vsql_producers.outlet import Outlet, batch_limits
from vsql_producers.progress import Progress
from vsql_producers.publish import Acknowledged
from vsql_producers.relations import Describer
from vsql_producers.retention import Retention
from vsql_producers.scope import ScopeChanged, load_scope
from vsql_producers.scope_record import write_scope
from vsql_producers.sequences import Sequences
from vsql_producers.signals import load_messages
from vsql_producers.spread import INDEX_KEY_SIZE, Spread
from vsql_producers.stall import Marks
from vsql_producers.stream import note_confirmed, slot_made
from vsql_producers.transactions import Transactions
from vsql_shared import failpoints, lsn
from vsql_shared.audit.chain import ChainHead
from vsql_shared.audit.store import last_transaction
from vsql_shared.errors import DivergedError, TransientError
from vsql_shared.observe.metrics import Stage
from vsql_shared.pg import synchronous

if TYPE_CHECKING:
    from vsql_shared.pg.connect import Connection

_log = logging.getLogger(__name__)
# One drain, and so one run of a transaction, takes about this much.
_DRAIN_BYTES = 1 << 20
# Seconds: how long Kafka or the WAL is waited for at a time while something is under way.
_SHORT = 0.001
# … and while nothing is: bounds how late a stop or a command is noticed.
_LONG = 0.1
# Manifests are committed to the audit table in groups, at most this far apart.
_RECORD_SECONDS = 0.02
# What an operator decides about columns and targets holds after so many seconds at most.
_SCOPE_SECONDS = 5.0


class LivePipeline:
    """One epoch of a live stream. `open`, then `turn` until told to stop, then `finish`; `close` always."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._wal: replication.WalStream | None = None
        self._outlet: Outlet | None = None
        self._ready: deque[Batch] = deque()
        self._acknowledged: list[Acknowledged] = []
        self._record_at = 0.0
        self._keepalive_lsn = 0
        self._slot_from = context.stream.slot_from or 0
        self._next_scope = 0.0
        self._sequences: Sequences | None = None
        self._was_reading, self._most = True, 0
        self.epoch = self.sequence = 0
        self.done = False
        """Never: a live stream goes on."""

    def open(self) -> None:
        """Everything up to the first row: slot, fence, chain, epoch."""
        c = self._context
        settings = c.settings
        drift.require_none(c.conn, c.stream.publication)
        binary = not c.text_only and may_be_binary(c.conn, c.stream.publication)
        self._scope = scope = load_scope(c.conn, c.stream.publication)
        messages = load_messages(c.conn, c.stream.publication)
        waits = c.waits
        connection = replication.open_replication(
            settings.connection.conninfo("producer"),
            waits.policy.standby_name if waits else f"vsql-sync producer {c.stream.chain}",
        )
        c.closing.callback(connection.close)
        identity = replication.identify(connection)
        points = replication.switch_points(connection, identity.timeline)
        self._slot(connection, identity, points)
        failpoints.hit("producer.slot-found")
        self._wal = wal = self._start(connection, binary=binary, messages=messages is not None)
        # Only now does it stand still: a session before ours may have confirmed more in between.
        slot = slots.require_usable(slots.find(c.conn, c.stream.slot_name), c.stream.slot_name)
        wal.confirmed = slot.confirmed_lsn
        failpoints.hit("producer.slot-held")
        c.tick = wal.report
        publisher = c.make_publisher()
        reader, tail = read_or_level(c.conn, c.writing, c.make_consumer(), publisher, c.on_tick)
        c.check_source(reader.head, identity, points)
        self._require_not_ahead(slot, reader.head.lsn_end)
        self._targets = joining.load_targets(c.conn, c.stream.chain)
        digest = write_scope(c.conn, c.stream.chain, c.stream.publication, scope)
        detail = joining.opening_detail(self._targets, digest)
        begin = partial(self._begin, slot=slot)
        opened = open_epoch(c.conn, c.writing, reader, tail, publisher, identity, begin, detail)
        failpoints.hit("producer.epoch-opened")
        self._watch = opened.watch
        head = opened.writer.head
        position = self._begin(head, slot)
        self.epoch, self.sequence = head.epoch, head.sequence
        place = c.place(head.epoch)
        keys = c.make_keys(place, publisher)
        partitions = settings.kafka.partitions if scope.by_row is not None else 1
        self._outlet = Outlet(
            place,
            opened.writer,
            publisher,
            keys,
            settings.limits,
            lambda topic: c.ensure_data_topic(topic, partitions),
            c.metrics,
            position,
            write_seen=c.write_seen(head.epoch),
            spread=Spread(os.urandom(INDEX_KEY_SIZE), partitions) if partitions > 1 else None,
            made=waits.made if waits else None,
        )
        c.leaves.keep(time.monotonic())
        self._progress = Progress(c.conn, opened.writer, slot.confirmed_lsn, c.leaves)
        describe = Describer(c.conn, c.stream.publication, scope, binary=binary)
        self._retention = Retention(c.conn, lambda: c.admin, c.stream.chain, settings.kafka.retention)
        last = last_transaction(c.conn, c.stream.chain, head.lsn_end)
        self._transactions = Transactions(describe, head.lsn_end, slot.confirmed_lsn, messages, last)
        self._begins_at = position
        self._sequences = Sequences.open(c.conn, settings, c.stream.publication, c.closing.callback)
        self._batches = Batches(self._limits())

    def _limits(self) -> BatchLimits:
        settings, waits = self._context.settings, self._context.waits
        limits = batch_limits(settings.limits, settings.encryption.dek.max_tuples)
        if waits is None:
            return limits
        # Nobody waits for others to come: who comes while a batch is under way goes with the next.
        self._most, self._transactions.strict = 1, True
        waits.open()
        return replace(limits, linger=0.0)

    def _slot(self, connection: Connection, identity: replication.Identity, points: dict[int, int]) -> None:
        """Step 2 of the start order. A crash between making the slot and noting it leaves one to adopt."""
        c = self._context
        name = c.stream.slot_name
        slot = slots.find(c.conn, name)
        if not c.stream.slot_created:
            if slot is None:
                replication.create_slot(connection, name, c.on_tick)
            made = slots.require_free(slot or slots.find(c.conn, name), name)
            slot_made(c.conn, c.stream.chain, made.confirmed_lsn)
            self._slot_from = made.confirmed_lsn
            return
        try:
            slots.require_usable(slot, name)
        except DivergedError as lost:
            # Whose WAL this is comes first: with another one, what became of the slot hardly matters.
            head = kafka_head(c.conn, c.writing, c.make_consumer(), c.on_tick)
            c.check_source(head, identity, points)
            raise slots.explain(lost, head, identity, points) from None

    def _begin(self, head: ChainHead, slot: slots.Slot) -> int:
        """From where on this epoch's manifests speak: behind the chain's end, or a hole is said to be one."""
        if not head.lsn_end:
            return self._slot_from or slot.confirmed_lsn
        if head.lsn_end >= self._slot_from:
            return head.lsn_end
        _log.error(
            "the chain ended before the slot began: what was committed between is lost to its targets",
            extra={"chain_end": lsn.text(head.lsn_end), "slot_begin": lsn.text(self._slot_from)},
        )
        return self._slot_from

    def _require_not_ahead(self, slot: slots.Slot, published: int) -> None:
        """Somebody else may have moved the slot since this stream confirmed something last."""
        stream = self._context.stream
        if stream.confirmed_lsn is not None:
            slots.require_not_ahead(slot, stream.slot_name, max(stream.confirmed_lsn, published))
        elif stream.slot_created:
            # Nobody noted it before: from now on it is known.
            note_confirmed(self._context.conn, stream.chain, slot.confirmed_lsn)

    def _start(self, connection: Connection, *, binary: bool, messages: bool) -> replication.WalStream:
        """Step 3: START_REPLICATION, the fence."""
        stream = self._context.stream
        try:
            return replication.WalStream(
                connection,
                stream.slot_name,
                stream.publication,
                binary=binary,
                messages=messages,
                synchronous=self._context.waits is not None,
            )
        except replication.SlotInUse:
            raise slots.held(self._context.conn, stream.slot_name) from None

    @property
    def outlet(self) -> Outlet:
        """The way out; there is one once the pipeline is open."""
        if self._outlet is None:
            raise TransientError("the stream is not open yet")
        return self._outlet

    def turn(self, *, reading: bool = True) -> None:
        """Serve everything once; waits briefly where nothing is to be done."""
        wal, outlet = self._opened()
        now = time.monotonic()
        dry = True
        if reading and not self._ready:
            dry = not self._receive(wal)
        # Looked at only when a batch is due: is the WAL ahead of us, or are we waiting for it?
        due = self._batches.deadline is not None and now >= self._batches.deadline
        # What was received a moment ago and has no linger is due now, not with the next turn.
        self._send_what_fits(outlet, time.monotonic(), more=due and reading and wal.wait(0.0))
        # The last look before a pause; during one nothing new is said.
        if reading or self._was_reading:
            looked = self._look_at_sequences(outlet, now, at_once=not reading)
            self._was_reading = reading or not looked
        busy = outlet.publisher.inflight or not self._batches.is_empty
        if dry and not busy and reading and self._wait(wal, _LONG if not self._acknowledged else _SHORT):
            dry = not self._receive(wal)
            self._send_what_fits(outlet, time.monotonic())
            busy = outlet.publisher.inflight or not self._batches.is_empty
        pause = _SHORT if busy and dry else 0.0
        self._acknowledged += outlet.publisher.poll(pause if reading else _LONG)
        self._settle(wal, outlet, now)
        self._retention.turn(now)
        self._context.leaves.keep(now)
        if now >= self._next_scope:
            self._next_scope = now + _SCOPE_SECONDS
            self._require_same_scope()
            joining.require_no_new(self._context.conn, self._context.stream.chain, self._targets)
            self._require_same_policy()

    def _wait(self, wal: replication.WalStream, seconds: float) -> bool:
        """Whether clients wait for what has come: then it is taken in this turn."""
        if self._context.waits is None:
            wal.wait(seconds)
            return False
        return wal.wait(0.0) or self._context.waits.wait(wal.fileno, seconds)

    def _require_same_policy(self) -> None:
        """Whether commits wait is a name the walsender has from its start."""
        waits, c = self._context.waits, self._context
        if (waits is None) != (synchronous.load(c.conn, c.stream.publication) is None):
            raise ScopeChanged(
                "whether commits wait for targets was changed", hint="the stream goes on with it"
            )
        if waits is not None:
            waits.look_again()

    def _require_same_scope(self) -> None:
        """Descriptors and PCI marks are those of the epoch's start: other ones need another epoch."""
        publication = self._context.stream.publication
        conn = self._context.conn
        drift.require_none(conn, publication)
        # Leaves come and go; a descriptor asks for them when it must.
        if load_scope(conn, publication)._replace(leaves={}) != self._scope._replace(leaves={}):
            raise ScopeChanged(
                f"what publication {publication} may carry was changed", hint="the stream goes on with it"
            )

    def _opened(self) -> tuple[replication.WalStream, Outlet]:
        if self._wal is None:
            raise TransientError("the stream is not open yet")
        return self._wal, self.outlet

    def _receive(self, wal: replication.WalStream) -> bool:
        """Take what has arrived through decode and batch; True when there may be more."""
        began = time.perf_counter()
        drained = wal.drain(_DRAIN_BYTES)
        if drained.frames:
            rows = size = 0
            now = time.monotonic()
            for run in self._transactions.feed(drained.frames):
                rows, size = rows + len(run.frames), size + sum(map(len, run.frames))
                self._ready += self._batches.add(run, now)
            if rows:
                seconds = time.perf_counter() - began
                self._context.metrics.passed(Stage.DECODE, rows=rows, size=size, seconds=seconds)
        self._keepalive_lsn = max(self._keepalive_lsn, drained.keepalive_lsn)
        return drained.more

    def _send_what_fits(self, outlet: Outlet, now: float, *, more: bool = False) -> None:
        most = self._most or self._context.settings.limits.inflight_batches
        while outlet.publisher.inflight < most:
            if not self._ready:
                self._ready += self._batches.due(now, more=more)
            if not self._ready:
                return
            batch = self._ready.popleft()
            if self._sequences is not None:
                self._sequences.attach(batch)
            outlet.send(batch)

    def _look_at_sequences(self, outlet: Outlet, now: float, *, at_once: bool = False) -> bool:
        """Where all that was received has been sent: say how far the sequences are, if it is time."""
        if self._sequences is None:
            return True
        if self._ready or not self._batches.is_empty or self._transactions.is_open:
            return False
        received = max(self._transactions.received_lsn, self._begins_at)
        batch = self._sequences.alone(now, received, max(received, self._keepalive_lsn), at_once=at_once)
        if batch is not None:
            outlet.send(batch)
        return True

    def _settle(self, wal: replication.WalStream, outlet: Outlet, now: float) -> None:
        """Make durable what Kafka has, and tell PostgreSQL."""
        idle = not outlet.publisher.inflight
        self._let_return(wal, idle=idle)
        if self._acknowledged and (idle or now >= self._record_at):
            self._record()
            self._record_at = now + _RECORD_SECONDS
        if (
            idle
            and not self._acknowledged
            and not self._ready
            and self._batches.is_empty
            and not self._transactions.is_open
        ):
            received = max(self._keepalive_lsn, self._transactions.received_lsn)
            # Beyond the chain's end the slot would not show that this WAL lacks its last transaction.
            self._transactions.require_met(received)
            self._progress.nothing_outstanding(received, now)
        before = wal.confirmed
        wal.confirm(self._progress.confirmed)
        wal.report(now)
        if wal.confirmed != before:
            failpoints.hit("producer.confirmed")

    def _let_return(self, wal: replication.WalStream, *, idle: bool) -> None:
        """Where commits wait: tell the walsender which of them may return."""
        if self._context.waits is None:
            return
        received = None
        if idle and not self._ready and self._batches.is_empty and not self._transactions.is_open:
            received = max(self._keepalive_lsn, self._transactions.received_lsn)
            self._transactions.require_met(received)
        applied = self._context.waits.applied(
            recorded=self.sequence, confirmed=self._progress.confirmed, idle_at=received
        )
        wal.apply(applied)
        wal.report()

    def _record(self) -> None:
        """Those that are known to stand: everything before them in the partition has been read back."""
        known = self._watch.read()
        acknowledged = [one for one in self._acknowledged if one.offset < known]
        if not acknowledged:
            return
        self._acknowledged = self._acknowledged[len(acknowledged) :]
        self._progress.record(acknowledged)
        metrics = self._context.metrics
        now = time.monotonic()
        for one in acknowledged:
            batch = one.batch
            if batch is not None:
                seconds = now - one.sent_at
                metrics.passed(Stage.PUBLISH, rows=batch.row_count, size=batch.nbytes, seconds=seconds)
            self._context.appended(one.prepared)
            self.sequence = one.prepared.entry.sequence
        metrics.progressed()

    def finish(self, seconds: float, tick: Callable[[], None]) -> None:
        """A graceful stop: what is whole goes out, is recorded and confirmed; the rest comes again."""
        wal, outlet = self._opened()
        self._ready += self._batches.rest()
        deadline = time.monotonic() + seconds
        looked = False
        while self._ready or outlet.publisher.inflight or self._acknowledged or not looked:
            if time.monotonic() > deadline:
                raise TransientError("Kafka did not acknowledge the last batches before the stop")
            self._send_what_fits(outlet, time.monotonic())
            if not looked and not self._ready:
                looked = True
                self._look_at_sequences(outlet, time.monotonic(), at_once=True)
            self._acknowledged += outlet.publisher.poll(_SHORT * 5)
            self._record()
            tick()
        wal.confirm(self._progress.confirmed)
        wal.report()
        outlet.keys.close()

    def status(self, wal_lsn: int) -> dict[str, Any]:
        """Detail of the status row (docs/operations/status.md)."""
        if self._outlet is None or self._wal is None:
            return {}
        key = self._outlet.keys.current
        oldest = self._batches.oldest_commit_time
        self._outlet.keys.save_usage()
        lag_bytes = max(0, wal_lsn - self._progress.confirmed)
        lag_seconds = max(0.0, time.time() - oldest / 1e6) if oldest else 0.0
        self._context.metrics.lag(size=lag_bytes, seconds=lag_seconds)
        return {
            "epoch": self.epoch,
            "sequence": self.sequence,
            "batch": self._outlet.number,
            "received_lsn": lsn.text(max(self._keepalive_lsn, self._transactions.received_lsn)),
            "published_lsn": lsn.text(self._progress.published),
            "confirmed_lsn": lsn.text(self._wal.confirmed),
            "lag_bytes": lag_bytes,
            "lag_seconds": round(lag_seconds, 3),
            "unpublished_batches": self._outlet.publisher.inflight + len(self._ready),
            "dek_id": key.dek_id if key else "",
            "dek_tuples": key.tuples_used if key else 0,
            **self._context.leaves.figures,
            **({"synchronous": self._context.waits.detail()} if self._context.waits else {}),
        }

    def marks(self) -> Marks | None:
        """How far the stream is."""
        return self._progress.marks() if self._wal is not None and self._outlet is not None else None

    @property
    def totals(self) -> tuple[int, int, int]:
        """Rows, bytes and batches of this epoch so far."""
        return (self._outlet.rows, self._outlet.nbytes, self._outlet.batches) if self._outlet else (0, 0, 0)
