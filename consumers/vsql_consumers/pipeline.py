"""One attempt to run an incoming stream: poll, collect, verify, open, apply, acknowledge. Assembled here.

Not here: what happens after an error, pausing and waiting (worker.py). Rules:

* One thread, one turn after the other: memory is bounded by the collector's buffer and one group.
* A group is what is ready, up to `merge_max_rows`; nothing waits for more to come. It ends before a batch
  that describes a table anew, and before an epoch: what came before is applied while the target may still
  lack what the new definition needs.
* What was refused ends the attempt, after everything before it was applied.
* Acknowledgements follow the flushed commit; Kafka's group offsets follow them and mean nothing to us.
* The origin first: progress, receipts and decisions are read, and the acknowledger is opened, in the session
  that holds it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial

from vsql_consumers import joining, key_ends, shares, state, writers
from vsql_consumers.apply import Applier, Verdicts
from vsql_consumers.collected import Ready
from vsql_consumers.coordination import Coordination, require_fit
from vsql_consumers.copying import CopyKeeper
from vsql_consumers.figures import Figures
from vsql_consumers.groups import Group
from vsql_consumers.intake import POLL_SECONDS, Intake
from vsql_consumers.means import Means
from vsql_consumers.members import PartReceipt, is_alone, is_by_row, part_receipt
from vsql_consumers.parking import PARKED, DeadLetters, Kept, Opens, parked_parts
from vsql_consumers.replaying import Replay, sign_replays
from vsql_consumers.shredded import Keys, Shredded
from vsql_consumers.skew import SkewGuard
from vsql_consumers.state import Position
from vsql_consumers.unseal import Descriptor, name_altered, open_batch
from vsql_consumers.verify import batch_name, verify_batch
from vsql_consumers.window import transactions
from vsql_consumers.write import ApplyLimits
from vsql_shared import failpoints, names
from vsql_shared.audit.chain import hole_before
from vsql_shared.audit.entries import (
    EPOCH_OPENED,
    KEY_DESTROYED,
    REPLICATION_BATCH,
    SIGNING_KEY_ENDED,
    AuditEntry,
)
from vsql_shared.audit.shredding import Destroyed
from vsql_shared.changes import OpenedBatch, Transaction
from vsql_shared.config.strategies import strategies_of
from vsql_shared.errors import (
    DecodeError,
    DivergedError,
    KeyUnavailableError,
    RecordError,
    RowError,
    TransientError,
    UnsealError,
    VerificationError,
    VsqlSyncError,
)
from vsql_shared.observe.metrics import Stage, Verdict
from vsql_shared.pg.connect import Connection, errors

_log = logging.getLogger(__name__)

REST_AFTER_SECONDS = 2.0
# How long Kafka is waited for while members are.
_MEMBERS_SECONDS = 0.01
_COMMIT_OFFSETS_SECONDS = 0.5


class Pipeline:
    """Runs until told to stop, or until an error; see the module."""

    def __init__(self, means: Means) -> None:
        settings, stream, conn = means.settings, means.stream, means.applying
        self._means, self._chain = means, stream.chain
        self._live_chain = names.live_chain(stream.publication, stream.origin)
        with errors("reading the stream's progress"):
            skip = {} if stream.kind == "copy" else state.copy_lsns(means.control, self._live_chain)
        self._copied = skip
        self._applier = Applier(
            conn,
            stream.chain,
            limits=ApplyLimits(),
            on_anomaly=settings.apply.on_anomaly,
            skip=skip,
        )
        # The fence: whoever holds the origin is the only one, so what it reads now stays true.
        self._applier.setup(stream.origin_name)
        with errors("reading the stream's progress"):
            # Now the origin is there by whose number this stream's rows are known.
            self._contest = writers.load(means.control, stream, strategies_of(settings))
            self._applier.contend(self._contest)
            position = state.load_position(conn, stream.chain)
            self._descriptors: dict[bytes, Descriptor] = state.load_descriptors(conn, stream.chain)
            decisions = state.load_decisions(
                means.control, stream.chain, names.ack_chain(stream.chain, stream.target)
            )
            self._open_decisions = state.load_open_decisions(means.control, stream.chain)
        means.keep_leaves()
        self.position: Position = joining.first_position(means, self._applier, position, skip, decisions)
        limit = settings.conflict.max_clock_skew_ms
        self._clock = writers.DatabaseClock(means.control, stream, limit) if self._contest else None
        self._skew = SkewGuard(means.control, stream.origin, limit)
        self.acknowledger = means.open_acknowledger()
        self._cosigner = self.acknowledger.cosigner(settings.audit.checkpoint_every)
        self._decided, self._ignored = decisions.transactions, decisions.ignored
        self._members: Coordination | None = None
        self._held: Ready | None = None
        self._others_described = False
        """Members have applied something since their descriptors were read."""
        if stream.apply_mode == "partitioned":
            require_fit(means.control, stream.chain, self._descriptors.values())
            self._members = Coordination(means.control, stream.chain)
        choose = None if self._members is None else self._members.choose
        begin = self.position if choose is None else replace(self.position, offsets={})
        self.intake = Intake(means, begin, decisions, choose)
        self._dead_letters = DeadLetters(means)
        self.copy = CopyKeeper(conn, stream, self._live_chain)
        self._group = Group.after(self.position, self._live_chain)
        self._busy_until, self._rested = 0.0, True
        self._offsets_due = 0.0
        self._figures = Figures(means.metrics)
        self._keys = Keys(means, self.intake, self._figures)
        self._spoilt = False
        """An apply or a commit failed: what the group has left must not be committed without it."""
        self._near = False
        """The clocks were near when PCI data of the transaction in fragments first came."""
        self.finished = False

    def run(self, tick: Callable[[], bool]) -> None:
        """Turn until `tick` says False or the stop event is set; then what is complete is committed."""
        self.sign_replays()
        self.intake.begin()
        try:
            while not self._means.stop.is_set() and not self.finished and tick():
                self.turn()
        finally:
            self._applier.abort()  # fragments of a transaction that is not complete; nothing else is open
            self._dead_letters.close()
        self.acknowledger.flush()
        self.acknowledger.settle()
        self._commit_offsets(wait=True)

    def turn(self) -> None:
        """One round: take what has arrived, apply what is ready."""
        came = self.intake.pump(_MEMBERS_SECONDS if self._waits_for_members else POLL_SECONDS)
        refused = self._take_ready()
        self.acknowledger.poll()
        if refused is not None:
            raise refused
        self._means.keep_leaves()
        self._cosign()
        self.intake.look_for_lost()
        self.intake.look_for_silence()
        self.intake.tell_strays()
        if self._clock is not None:
            with errors("looking after tables that two nodes write"):
                self._clock.look()
        self._rest(came)

    # Applying

    def _take_ready(self) -> VerificationError | None:
        """Apply everything that is ready; returns what stopped it, if it was refused."""
        refused: VerificationError | None = None
        limits = self._means.settings.limits
        try:
            if self._members is not None:
                self._members.assign()
                self._members.take(self._group, self._means.totals)
            while not self.finished:
                ready = self._next()
                if ready is None:
                    break
                self._take(ready)
                # A batch by itself, where its transactions are committed one by one.
                alone = self._means.totals.one_by_one or self._contest is not None
                full = self._group.rows >= limits.merge_max_rows or alone
                if full or self._group.size >= limits.collect_buffer_bytes:
                    self._flush()
        except VerificationError as error:
            self._means.metrics.verified(Verdict.REFUSED)
            if self._spoilt:
                raise
            refused = error
        self._flush()
        return refused

    @property
    def _waits_for_members(self) -> bool:
        return self._members is not None and not self._members.idle

    def _next(self) -> Ready | None:
        """The next entry that may be taken; one that is applied alone when all before it is complete."""
        members = self._members
        if members is not None and members.full:
            return None
        ready, self._held = self._held or self.intake.collector.next_ready(), None
        here = ready is not None and (is_alone(ready) or ready.parts)
        if here and members is not None and not members.idle:
            self._held = ready
            return None
        return ready

    def _take(self, ready: Ready) -> None:
        """One entry of the chain."""
        self._hold_pci(ready)
        self._cosigner.hold(ready.head)
        entry = ready.entry
        if self._members is not None:
            if not is_alone(ready):
                if ready.parts and entry is not None:
                    self._flush()
                    self._take_left(ready, entry)
                self._members.add(ready)
                self._others_described = True
                return
            self._recall_descriptors()
        if entry is None or (ready.skipped and entry.batch):
            self._skip(ready, entry)
        elif entry.event_type == REPLICATION_BATCH:
            self._take_batch(ready, entry)
        else:
            if entry.event_type == EPOCH_OPENED:
                self._flush()
                self._new_epoch(entry)
            elif entry.event_type == KEY_DESTROYED:
                self._keys.take(entry)
            elif entry.event_type == SIGNING_KEY_ENDED:
                key_ends.take(self._means, ready.encoded)
            self._group.add_entry(ready)
            self.copy.entry(entry, self._group)
            if self.copy.finished:
                # What clients write here from now on is younger than all the snapshots have seen.
                self._await(self.copy.source_clock)
                self._flush()
                self.finished = True

    def _hold_pci(self, ready: Ready) -> None:
        """Raise SkewError before a batch with PCI data while the clocks are too far apart.

        Of one transaction once: a long one would else begin anew at every measure that is beyond the limit.
        """
        self._near = self._near and self._group.fragments
        if ready.entry is None or not ready.entry.contains_pci or ready.skipped or self._near:
            return
        if self._skew.too_far() is not None and not self._group.fragments:
            self._flush()  # what came before does not wait
        self._skew.require_near()
        self._near = True

    def _take_batch(self, ready: Ready, entry: AuditEntry) -> None:
        found = self._open(ready, entry)
        if isinstance(found, Shredded):
            if entry.continues and not self._group.fragments:
                self._flush()
            self._group.add_shredded(ready, found, self._committed_of(ready))
            if self._group.fragments:
                self._store_fragment()
            return
        opened, new, kept = found
        if (opened.continues and not self._group.fragments) or self._redefines(new):
            self._flush()  # what is complete must not depend on how this transaction ends
        self._group.add_batch(ready, opened, new)
        self._descriptors.update(new)
        if self._decided:
            self._group.pass_over(opened, self._decided)
        if kept is not None:
            self._park(kept, opened)
        self.copy.batch(opened, self._group)
        if self._group.fragments:
            self._store_fragment()
            if not opened.continues:
                self._group.fragments = False
                self._flush()

    def _store_fragment(self) -> None:
        """Apply what came, and write down what is said of it: a transaction has any number of fragments."""
        self._apply()
        with errors("writing receipts"):
            self._group.store_receipts(self._means.applying, self._chain, self._means.leaves)

    def _recall_descriptors(self) -> None:
        """Those that members met, beside ours."""
        if self._others_described:
            self._others_described = False
            with errors("reading descriptors"):
                self._descriptors |= state.load_descriptors(self._means.control, self._chain)

    def _take_left(self, ready: Ready, entry: AuditEntry) -> None:
        """Apply parts of a batch that their members could not: here it is refused, skipped or parked."""
        self._recall_descriptors()
        found, group = self._open(ready, entry, whole=False), self._group
        which = {part.root.partition for part in ready.parts}
        roots = {(part.root.topic, part.root.partition): part.root.sub_root for part in ready.parts}

        def hold(conn: Connection) -> None:
            shares.hold_stopped(conn, self._chain, which, entry.sequence)

        if isinstance(found, Shredded):
            self._applier.begin_with(hold)
            part = found.part_receipt(roots)
            group.take_shredded_parts(found)
        else:
            opened, new, kept = found
            group.take_parts(ready, opened, new)
            self._descriptors.update(new)
            if self._decided:
                group.pass_over(opened, self._decided)
            if kept is not None:
                self._park(kept, opened)
            # All of it: what other parts say of the same transactions is added before it is bounded.
            detail = {"passed_over": over} if (over := group.passed_over.get(entry.sequence)) else {}
            self._applier.begin_with(hold)
            self._apply()
            verdicts = dict(group.receipts[-1].verdicts)
            part = part_receipt(entry, roots, verdicts, opened.transactions, detail)

        def write(conn: Connection) -> None:
            group.write_parts(conn, self._chain, self._means.leaves)
            shares.save_part(conn, self._chain, part)
            shares.advance(conn, self._chain, which, entry.sequence)
            state.honour_decisions(conn, sorted(group.honoured))

        self._applier.finish(entry.batch_lsn_end, part.commit_time or entry.event_timestamp, write)
        self._group = Group.after(self.position, self._live_chain)

    def _redefines(self, new: dict[bytes, Descriptor]) -> bool:
        """Whether a table that was described before has another definition.

        Each partition and each data key brings the descriptor again: one that is known is no other.
        """
        known = {one.relation.name for one in self._descriptors.values()} if new else set()
        return any(one.relation.name in known for name, one in new.items() if name not in self._descriptors)

    def _park(self, kept: Kept, opened: OpenedBatch) -> None:
        """Have Kafka keep a batch of which something is parked; the group writes where it lies."""
        copied = self._means.totals.copied
        if opened.entry_hash not in copied:  # by an attempt that failed later
            copied[opened.entry_hash] = self._dead_letters.put(kept)
        descriptors = [self._descriptors[digest].encoded for digest in sorted(opened.relations)]
        found = Opens(kept.entry.dek_id, descriptors)
        for part in parked_parts(opened, self._decided, copied[opened.entry_hash], found):
            self._group.also.append(partial(part.write, chain=self._chain))

    def members_detail(self) -> dict[str, object]:
        """For the status: who applies the stream, where several do."""
        return {} if self._members is None else self._members.figures()

    def leaf_figures(self) -> dict[str, object]:
        """For the status: the leaves this node keeps."""
        return self._means.leaves.figures if self._means.leaves else {}

    @property
    def between(self) -> bool:
        """Whether no target transaction is open."""
        return not self._group.entries

    def replay(self, decision: int) -> str:
        """Apply a parked transaction, between the others; what came of it, in words."""
        self._rested = False
        return Replay(self._means, decision, self._ignored).run(self._applier, self.position)

    def sign_replays(self) -> None:
        """Put into this node's chain what was replayed and is not there yet."""
        sign_replays(self._means.control, self._chain, self.acknowledger)

    def _open(
        self, ready: Ready, entry: AuditEntry, *, whole: bool = True
    ) -> tuple[OpenedBatch, dict[bytes, Descriptor], Kept | None] | Shredded:
        """Verify, then decrypt; a batch that fails names its record. What is to be parked is kept sealed."""
        metrics, totals = self._means.metrics, self._means.totals
        size = sum(len(pack.message) for part in ready.parts for pack in part.packs)
        totals.clock.written(ready.audit_offset - 1, entry.event_timestamp)
        self._figures.collected(entry, size)
        try:
            with metrics.timed(Stage.VERIFY, rows=entry.row_count, size=size):
                verified = verify_batch(entry, ready.parts, self._means.stream.origin, whole=whole)
            kept = self._kept(ready, entry, verified.transactions)
            for part in ready.parts:
                part.packs.clear()  # with a row of 255 MB twice in memory, a third time is too much
            key = self._keys.of(entry, self.position)
            if isinstance(key, Destroyed):
                _log.warning("shredded", extra={"sequence": entry.sequence, "rows": verified.changes})
                metrics.verified(Verdict.SHREDDED)
                return Shredded(verified, key)
            with metrics.timed(Stage.OPEN, rows=entry.row_count, size=size):
                opened, new = open_batch(verified, key, self._descriptors, ready.entry_hash)
        except VerificationError as error:
            if isinstance(error, RecordError) and self.intake.announcements.knows(entry.dek_id):
                with suppress(KeyUnavailableError, TransientError, UnsealError):  # it is refused all the same
                    key = self.intake.announcements.open(entry, self._means.provider)
                    name_altered(error, ready.parts, key)
            error.record = error.record or batch_name(entry)
            raise
        metrics.verified(Verdict.ACCEPTED)
        totals.bytes += size
        return opened, new, kept

    def _kept(self, ready: Ready, entry: AuditEntry, transactions: Sequence[Transaction]) -> Kept | None:
        parked = {one for one, decided in self._decided.items() if decided.verdict == PARKED}
        if parked.isdisjoint(transactions):
            return None
        packs = [((p.root.topic, p.root.partition), pack) for p in ready.parts for pack in p.packs]
        return Kept(entry, ready.encoded, packs)

    def _new_epoch(self, entry: AuditEntry) -> None:
        """Raises DivergedError where the source says that it lost what lay between."""
        if hole := hole_before(self.position.head, entry):
            covered = min(self._copied.values(), default=0)
            if covered < entry.batch_lsn_start:
                raise DivergedError(
                    f"{hole}; what was committed between them will never come",
                    hint=f"initialise this target anew: no first copy from {entry.source_node_id} covers it",
                )
        if self._group.fragments:
            _log.info("the source abandoned a transaction", extra={"epoch": entry.epoch})
            self._applier.abort()
            self._group = Group.after(self.position, self._live_chain)
        self._descriptors = {}
        self.intake.announcements.forget_before(entry.epoch)

    def _skip(self, ready: Ready, entry: AuditEntry | None) -> None:
        """A batch an operator passes over; entries that carry none are never skipped."""
        _log.warning("skipped by an operator's decision", extra={"sequence": ready.sequence})
        if entry is not None and entry.continues and not self._group.fragments:
            self._flush()
        reason = f"sequence {ready.sequence} was skipped by an operator"
        if self._members is None or entry is None or not is_by_row(entry):
            self._group.add_skipped(ready, reason, self._committed_of(ready))
            return
        self._flush()
        self._group.add_skipped(ready, reason, self._take_from_members(entry))
        self._flush()

    def _committed_of(self, ready: Ready) -> list[PartReceipt]:
        """What was committed of a batch that is not applied any further: its transactions are commits."""
        if self._contest is None or ready.entry is None:
            return []
        with errors("reading how far a batch was applied"):
            done = state.load_partial(self._means.applying, self._chain, ready.sequence, ready.entry_hash)
        if not done.transactions:
            return []
        said = {"transactions_applied": done.transactions}
        return [PartReceipt(ready.sequence, 0, {}, done.verdicts, None, said)]

    def _take_from_members(self, entry: AuditEntry) -> list[PartReceipt]:
        """What members have applied of a batch; they apply no more of it, if the open transaction commits."""
        found: list[PartReceipt] = []
        which = {root.partition for root in entry.partitions}

        def take(conn: Connection) -> None:
            shares.advance(conn, self._chain, which, entry.sequence)
            parts = shares.load_parts(conn, self._chain, entry.sequence, entry.sequence)
            found.extend(parts.get(entry.sequence, ()))

        self._applier.begin_with(take)
        return found

    def _apply(self) -> None:
        """Give the group's batches to the applier, in the open transaction."""
        group, means = self._group, self._means
        rows = sum(batch.row_count for batch in group.batches)
        with means.metrics.timed(Stage.APPLY, rows=rows, size=group.size, batches=len(group.batches)):
            means.totals.rows += rows
            means.totals.batches += len(group.batches)
            self._spoilt = True
            try:
                if self._clock is not None and group.fragments and group.batches:
                    # Of one transaction: before its first change is written, its time is past.
                    self._await(group.batches[0].transactions[-1].commit_time)
                if self._contest is None or group.fragments:
                    group.applied(self._applier.apply(group.batches, singly=means.totals.singly))
                else:
                    group.applied([self._apply_by_transaction(one) for one in group.batches])
            except DecodeError as error:
                raise self._unreadable(error, group) from error
            except RowError as error:
                raise self._unfit(error, group) from None
            self._spoilt = False

    def _apply_by_transaction(self, opened: OpenedBatch) -> Verdicts:
        """Write a batch, each transaction but the last committed at once: a commit is a version."""
        place = (self._chain, opened.sequence, opened.entry_hash)
        with errors("reading how far a batch was applied"):
            before = state.load_partial(self._means.applying, *place)
        counts = Counter(before.verdicts)
        parts = list(transactions(opened))
        for number, (start, stop) in enumerate(parts, 1):
            if number <= before.transactions:
                continue
            one = opened.transactions[opened.tx_of[start]]
            self._await(one.commit_time)
            counts.update(self._applier.apply_transaction(opened, start, stop))
            if number < len(parts):
                done = state.Partial(number, dict(counts))

                def note(conn: Connection, done: state.Partial = done) -> None:
                    state.save_partial(conn, *place, done)

                self._applier.finish(one.commit_lsn, one.commit_time, note)
        return dict(counts)

    def _await(self, commit_time: int) -> None:
        """Wait until this node's database is past a commit, where it writes the tables, too."""
        if self._clock is not None:
            with errors("reading the database's clock"):
                self._clock.wait_for(commit_time)

    def _unreadable(self, error: DecodeError, group: Group) -> VsqlSyncError:
        """A signed tuple that is none: found again batch by batch, so that the refusal names one."""
        totals, count = self._means.totals, len(group.batches)
        if count > 1:
            totals.take_care(group.position.head.batch)
            return TransientError(f"{error.message}; the last {count} batches are applied one by one")
        opened = group.batches[0]
        return RecordError(
            f"a tuple of batch {opened.batch} cannot be read: {error.message}",
            record=f"{opened.chain} sequence {opened.sequence} (epoch {opened.epoch}, batch {opened.batch})",
        )

    def _unfit(self, error: RowError, group: Group) -> VsqlSyncError:
        """A row that does not fit: what came before it is applied first, and the transaction found."""
        totals, last = self._means.totals, group.position.head.batch
        count = last - self.position.head.batch
        if count > 1 and not totals.one_by_one:
            totals.take_care(last)
            return TransientError(f"{error.message}; the last {count} batches are applied one by one")
        if error.place is None and not totals.singly:
            totals.take_care(last, singly=True)
            return TransientError(f"{error.message}; transactions are applied one by one to find which one")
        return error

    def _flush(self) -> None:
        """Commit the group, if it may end here, and acknowledge it."""
        group, means = self._group, self._means
        if not group.entries or group.fragments:
            return
        self._apply()
        position = group.position
        if self._members is not None:
            self._members.forget(group)
            self.intake.drop_idle()
        moment = position.commit_time if position.commit_time is not None else time.time_ns() // 1000
        failpoints.hit("consumer.before-apply-commit")
        honoured = self._honoured(position)
        self._spoilt = True
        try:
            target_lsn = self._applier.finish(
                position.head.lsn_end, moment, lambda conn: self._write(conn, group, honoured)
            )
        except RowError as error:
            raise self._unfit(error, group) from None
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
        means.totals.passed(position.head.batch)
        means.totals.copied.clear()
        means.metrics.progressed()
        self._figures.anomalies(self._applier.anomalies)
        with self._figures.acknowledging(self.acknowledger, group.rows, batches):
            if group.stored:
                self.acknowledger.acknowledge_stored(target_lsn)
            else:
                self.acknowledger.acknowledge(group.receipts, target_lsn)
        self._commit_offsets()

    def _write(self, conn: Connection, group: Group, honoured: list[int]) -> None:
        # Of one small transaction nothing has to be waited for: its statements travel together.
        with conn.pipeline() if group.is_small else nullcontext():
            self.copy.write(conn, group)
            group.write(conn, self._chain, self._means.leaves)
            if honoured:
                state.honour_decisions(conn, honoured)

    def _honoured(self, position: Position) -> list[int]:
        """Decisions whose place the stream has passed once it stands at `position`."""
        passed = self.intake.passed(position)
        return [
            one.id
            for one in self._open_decisions
            if one.id in self._group.honoured
            or (one.sequence is not None and one.sequence <= position.head.sequence)
            or (one.place is not None and one.place[2] < passed.get(one.place[:2], 0))
        ]

    def _commit_offsets(self, *, wait: bool = False) -> None:
        now = time.monotonic()
        if wait or now >= self._offsets_due:
            failpoints.hit("consumer.before-offset-commit")
            self._offsets_due = now + _COMMIT_OFFSETS_SECONDS
            offsets = {**self.position.offsets, self.intake.audit: self.position.audit_offset}
            self._means.source.commit(offsets, wait=wait)

    # Watching

    def _cosign(self) -> None:
        """Between transactions, when it is time: what is cosigned is committed."""
        if not self._group.fragments:
            self._cosigner.look(self.position.head)

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
