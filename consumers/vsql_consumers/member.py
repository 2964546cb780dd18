"""A member of a stream that is applied by several: reads, verifies and applies its shares. One process.

Not here: who has which share (coordination.py), acknowledgements, what an operator decides. Rules
(docs/design/0015):

* The applying session holds this member's number and its replication origin; when it ends, both are free.
* The chain is read from where everything is done, and verified here as everywhere.
* What is applied alone is waited for; what cannot be applied is left to the coordinator, with its reason.
* Any change of what this member has begins it anew: where it stands is in the database.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

import psycopg
from confluent_kafka import KafkaException

from vsql_consumers import key_ends, shares, state
from vsql_consumers.apply import Applier
from vsql_consumers.collected import Ready
from vsql_consumers.figures import Figures
from vsql_consumers.intake import POLL_SECONDS, Intake
from vsql_consumers.means import Means, Totals
from vsql_consumers.members import PartReceipt, Patience, is_alone, is_by_row, part_receipt
from vsql_consumers.session import open_applying
from vsql_consumers.shredded import Keys, Shredded
from vsql_consumers.source import Source
from vsql_consumers.unseal import Descriptor, open_batch
from vsql_consumers.verify import verify_batch
from vsql_consumers.write import ApplyLimits
from vsql_shared import failpoints, names
from vsql_shared.audit.entries import EPOCH_OPENED, KEY_DESTROYED, AuditEntry
from vsql_shared.audit.leaf_store import Kept, LeafKeeper
from vsql_shared.audit.shredding import Destroyed
from vsql_shared.changes import OpenedBatch, PartitionRoot
from vsql_shared.errors import (
    DatabaseError,
    DecodeError,
    KeyUnavailableError,
    TransientError,
    UnsealError,
    VerificationError,
    VsqlSyncError,
)
from vsql_shared.kafka.clients import from_exception
from vsql_shared.kms import open_provider
from vsql_shared.observe.metrics import Stage, StreamMetrics, Verdict
from vsql_shared.pg import signers
from vsql_shared.pg.connect import Connection, connect, errors, translate
from vsql_shared.service.stopping import set_on_signals

if TYPE_CHECKING:
    from vsql_consumers.acknowledge import Acknowledger
    from vsql_consumers.state import Stream
    from vsql_shared.config import Settings
    from vsql_shared.crypto.dek import OpeningKey

_log = logging.getLogger(__name__)

# Seconds: between looks at what this member has, and while it waits for the coordinator.
_LOOK_SECONDS = 0.2
_WAIT_SECONDS = 0.01
_REST_AFTER_SECONDS = 2.0
# A member that is stopped in a transaction keeps its shares no longer than this.
_IDLE_IN_TRANSACTION = "60s"


def run_member(settings: Settings, chain: str) -> int:
    """Run a member until SIGTERM; returns the process's exit code."""
    failpoints.arm(dev_mode=not settings.is_prod)
    stop = threading.Event()
    set_on_signals(stop)
    Member(settings, chain, stop).run()
    return 0


class Member:
    """One member, through all of its attempts."""

    def __init__(self, settings: Settings, chain: str, stop: threading.Event) -> None:
        self._settings, self._chain, self._stop = settings, chain, stop
        self._metrics = StreamMetrics(chain, settings.cluster.node_name)
        self._totals = Totals()
        self._failures = 0

    def run(self) -> None:
        """Attempt after attempt."""
        while not self._stop.is_set():
            try:
                with ExitStack() as closing:
                    self._attempt(closing)
            except VsqlSyncError as error:
                # Whatever it is, the coordinator meets the same, or is told of it, and says what follows.
                self._fail(error)
            except psycopg.Error as error:
                self._fail(translate(error, "applying shares of the stream"))
            except KafkaException as error:
                self._fail(from_exception(error, "read the stream"))

    def _fail(self, error: VsqlSyncError) -> None:
        """Wait before the next try; the coordinator says what the stream is in."""
        _log.warning("%s", error, extra={"error": type(error).__name__})
        self._metrics.failed(error)
        limits = self._settings.limits
        pause = min(limits.retry_backoff_ms * 2**self._failures, limits.retry_backoff_max_ms) / 1000
        self._failures = min(self._failures + 1, 16)
        self._stop.wait(pause)

    def _attempt(self, closing: ExitStack) -> None:
        settings = self._settings
        applying = open_applying(settings, self._chain, of_member=True)
        closing.callback(applying.close)
        control = connect(
            settings.connection.conninfo("consumer"), application_name=f"vsql-sync member {self._chain}"
        )
        closing.callback(control.close)
        with errors("taking a member's number"):
            number = shares.take_number(applying, self._chain)
        _log.info("member", extra={"stream": self._chain, "member": number})
        while not self._stop.is_set():
            mine = self._mine(control, number)
            if not mine:
                self._stop.wait(_LOOK_SECONDS)
                continue
            with ExitStack() as turn:
                self._run_shares(control, applying, number, mine, turn)

    def _mine(self, control: Connection, number: int) -> dict[int, int]:
        """What this member is to apply now; nothing while the stream must not run."""
        with errors("reading the shares"):
            stream = state.load_stream(control, self._settings.cluster.name, self._chain)
            if state.hold_reason(control, stream, stream.desired) is not None:
                return {}
            if not shares.done_up_to(control, self._chain):
                return {}
            return shares.of_member(control, self._chain, number)

    def _run_shares(
        self, control: Connection, applying: Connection, number: int, mine: dict[int, int], closing: ExitStack
    ) -> None:
        settings, chain = self._settings, self._chain
        cluster = settings.cluster.name
        stream = state.load_stream(control, cluster, chain)
        provider = open_provider(settings.encryption.kms, strict=settings.is_prod)
        closing.callback(provider.close)
        trusted = signers.load(control)
        trust = key_ends.trust_of(settings, control, stream, trusted)
        group = names.group_id(cluster, chain, settings.cluster.node_name)
        source = Source(settings, f"vsql-sync-member-{chain}-{number}", group)
        closing.callback(source.close)
        means = Means(
            settings, stream, control, applying, trust, provider, _no_acknowledger, source,
            self._metrics, self._totals, self._stop,
            LeafKeeper(control, settings.audit.leaf_retention, settings.audit.leaf_max_size),
        )  # fmt: skip
        work = SharesWork(means, number, mine)
        decided = shares.decisions_mark(control, chain)
        _log.info("applying shares", extra={"member": number, "shares": sorted(mine)})
        next_look = 0.0

        def tick() -> bool:
            nonlocal next_look
            now = time.monotonic()
            if now < next_look:
                return True
            next_look = now + _LOOK_SECONDS
            return (
                self._mine(control, number) == work.mine
                and shares.decisions_mark(control, chain) == decided
                and signers.load(control) == trusted
            )

        try:
            work.begin()
            while not self._stop.is_set() and tick():
                work.turn()
                self._failures = 0
        finally:
            work.end()


def _no_acknowledger() -> Acknowledger:
    raise TransientError("a member acknowledges nothing")


@dataclass(slots=True)
class _Waiting:
    """Batches that are to be applied in one transaction."""

    entries: list[AuditEntry] = field(default_factory=list)
    batches: list[OpenedBatch] = field(default_factory=list)
    roots: list[dict[tuple[str, int], bytes]] = field(default_factory=list)
    descriptors: dict[bytes, Descriptor] = field(default_factory=dict)
    leaves: list[Kept] = field(default_factory=list)
    rows: int = 0
    size: int = 0


class SharesWork:
    """The shares a member has, from where they stand on."""

    def __init__(self, means: Means, number: int, mine: dict[int, int]) -> None:
        stream, conn = means.stream, means.applying
        self._means, self._chain, self._number, self.mine = means, stream.chain, number, mine
        live = names.live_chain(stream.publication, stream.origin)
        with errors("reading where the shares stand"):
            position = state.load_position(means.control, stream.chain)
            self._decisions = state.load_decisions(
                means.control, stream.chain, names.ack_chain(stream.chain, stream.target)
            )
            skip = state.copy_lsns(means.control, live)
        self._applier = Applier(
            conn, stream.chain, limits=ApplyLimits(), on_anomaly=means.settings.apply.on_anomaly, skip=skip
        )
        self._applier.setup(member_origin(stream, number))
        conn.execute(f"SET idle_in_transaction_session_timeout = '{_IDLE_IN_TRANSACTION}'")
        self._starts = dict(mine)
        position.offsets.clear()  # each partition is read from the first batch that is ours
        self._position = position
        self._intake = Intake(means, position, self._decisions, self._is_mine)
        self._keys = Keys(means, self._intake, Figures(means.metrics))
        self._load_descriptors()
        self._waiting = _Waiting()
        self._barrier: Ready | None = None
        self._patience = Patience()
        self._busy_until, self._rested = 0.0, True

    def _is_mine(self, entry: AuditEntry, root: PartitionRoot) -> bool:
        begin = self._starts.get(root.partition)
        return (
            begin is not None
            and entry.sequence > begin
            and is_by_row(entry)
            and entry.sequence not in self._decisions.skipped
        )

    def _load_descriptors(self) -> None:
        with errors("reading descriptors"):
            self._descriptors = state.load_descriptors(self._means.control, self._chain)

    def begin(self) -> None:
        """Assign the partitions, read the keys topic."""
        self._means.keep_leaves()
        self._intake.begin()

    def end(self) -> None:
        """Whatever was not committed comes again."""
        self._applier.abort()

    def turn(self) -> None:
        """One round: take what has arrived, apply what is ready."""
        try:
            self._turn()
        except VerificationError as error:
            self._flush()
            self._refuse(error)

    def _turn(self) -> None:
        came = self._intake.pump(_WAIT_SECONDS if self._barrier is not None else POLL_SECONDS)
        limits = self._means.settings.limits
        while self._passed_barrier():
            ready = self._intake.collector.next_ready()
            if ready is None:
                break
            if is_alone(ready):
                self._barrier = ready
            elif ready.parts and ready.entry is not None:
                self._take(ready, ready.entry)
                waiting = self._waiting
                if waiting.rows >= limits.merge_max_rows or waiting.size >= limits.collect_buffer_bytes:
                    self._flush()
        self._flush()
        self._means.keep_leaves()
        self._intake.look_for_lost()
        self._intake.look_for_silence()
        self._rest(came)

    def _refuse(self, error: VerificationError) -> NoReturn:
        """What was refused is the coordinator's to say, at the entry it belongs to, or comes before."""
        self._means.metrics.verified(Verdict.REFUSED)
        topic = error.record.rsplit("/", 2)
        share = int(topic[1]) if len(topic) == 3 and topic[1].isdigit() else -1
        ours = (self._intake.audit[0], names.keys_topic(self._means.settings.cluster.name))
        if share in self.mine and topic[0] not in ours:
            self._stop({share}, self._intake.collector.next_batch_of(share), error.record, error)
        # Of the chain or the keys: the coordinator refuses the same, and nobody goes on.
        raise TransientError(f"a member waits for a decision: {error}") from None

    def _stop(self, which: set[int], sequence: int, record: str, error: VsqlSyncError) -> NoReturn:
        with errors("leaving shares to the coordinator"):
            shares.stop(
                self._means.control, self._chain, self._number, which, sequence, record, error.message
            )
        _log.error(
            "left to the coordinator",
            extra={"shares": sorted(which), "sequence": sequence, "why": str(error)},
        )
        raise TransientError(f"entry {sequence} is left to the coordinator: {error}") from None

    def _passed_barrier(self) -> bool:
        """Whether nothing keeps this member from the next entry."""
        ready = self._barrier
        if ready is None:
            return True
        self._flush()
        if not self._patience.due(time.monotonic()):
            return False
        with errors("looking how far everything is done"):
            if shares.done_up_to(self._means.control, self._chain) < ready.sequence:
                return False
        self._patience.heard()
        self._barrier = None
        entry = None if ready.skipped else ready.entry
        if entry is not None and entry.event_type == EPOCH_OPENED:
            self._intake.announcements.forget_before(entry.epoch)
        if entry is not None and entry.event_type == KEY_DESTROYED:
            self._keys.take(entry)
        self._load_descriptors()
        return True

    def _take(self, ready: Ready, entry: AuditEntry) -> None:
        """Verify and open our parts of a batch."""
        means, waiting = self._means, self._waiting
        which = {part.root.partition for part in ready.parts}
        size = sum(len(pack.message) for part in ready.parts for pack in part.packs)
        try:
            with means.metrics.timed(Stage.VERIFY, rows=entry.row_count, size=size):
                verified = verify_batch(entry, ready.parts, means.stream.origin, whole=False)
            if not self._decisions.transactions.keys().isdisjoint(verified.transactions):
                self._flush()
                self._stop(which, entry.sequence, "", TransientError("an operator decided about it"))
            key = self._key_of(entry, which)
            if isinstance(key, Destroyed):
                self._pass_over(Shredded(verified, key))
                return
            with means.metrics.timed(Stage.OPEN, rows=verified.changes, size=size):
                opened, new = open_batch(verified, key, self._descriptors, ready.entry_hash)
        except VerificationError as error:
            self._flush()
            means.metrics.verified(Verdict.REFUSED)
            self._stop(which, entry.sequence, error.record or f"{entry.chain} {entry.sequence}", error)
        means.metrics.verified(Verdict.ACCEPTED)
        self._descriptors.update(new)
        waiting.entries.append(entry)
        waiting.batches.append(opened)
        waiting.roots.append(verified.sub_roots)
        waiting.leaves += [(entry.sequence, one) for one in opened.leaves]
        waiting.descriptors.update(new)
        waiting.rows += len(opened.ops)
        waiting.size += sum(map(len, opened.plaintexts))
        self._totals_of(opened, size)

    def _key_of(self, entry: AuditEntry, which: set[int]) -> OpeningKey | Destroyed:
        """The key of a batch; what it means that one does not open is for the coordinator to say."""
        try:
            return self._keys.of(entry, self._position)
        except (KeyUnavailableError, UnsealError) as error:
            self._flush()
            self._stop(which, entry.sequence, "", error)

    def _pass_over(self, shredded: Shredded) -> None:
        """Nobody can open it any more: its changes are counted, and the shares go on behind it."""
        self._flush()
        found, entry = shredded.verified, shredded.verified.entry
        receipt = shredded.part_receipt(found.sub_roots)
        moment = receipt.commit_time or entry.event_timestamp
        self._applier.begin_with(lambda conn: shares.hold(conn, self._chain, self._number, self.mine))
        alone = _Waiting(leaves=[(entry.sequence, one) for one in found.leaves])
        self._applier.finish(
            entry.batch_lsn_end, moment, lambda conn: self._write(conn, alone, [receipt], entry.sequence)
        )
        self.mine = {share: max(at, entry.sequence) for share, at in self.mine.items()}
        self._means.metrics.verified(Verdict.SHREDDED)
        self._means.metrics.progressed()

    def _totals_of(self, opened: OpenedBatch, size: int) -> None:
        totals = self._means.totals
        totals.rows, totals.bytes = totals.rows + len(opened.ops), totals.bytes + size
        totals.batches += 1

    def _flush(self) -> None:
        """Apply what waits, in one transaction; what cannot be applied is found batch by batch."""
        waiting, self._waiting = self._waiting, _Waiting()
        if not waiting.entries:
            return
        try:
            self._apply(waiting)
        except (DatabaseError, DecodeError) as error:
            if len(waiting.entries) == 1:
                entry = waiting.entries[0]
                which = {number for _, number in waiting.roots[0]}
                self._stop(which, entry.sequence, "", error)
            for place, entry in enumerate(waiting.entries):
                one = _Waiting([entry], [waiting.batches[place]], [waiting.roots[place]], waiting.descriptors)
                one.rows = len(one.batches[0].ops)
                one.leaves = [(entry.sequence, part) for part in one.batches[0].leaves]
                self._waiting = one
                self._flush()

    def _apply(self, waiting: _Waiting) -> None:
        means, last = self._means, waiting.entries[-1]
        moment = max(t.commit_time for batch in waiting.batches for t in batch.transactions)
        with means.metrics.timed(
            Stage.APPLY, rows=waiting.rows, size=waiting.size, batches=len(waiting.batches)
        ):
            # The fence: nobody else has these shares, nor will have before this transaction has ended.
            self._applier.begin_with(lambda conn: shares.hold(conn, self._chain, self._number, self.mine))
            verdicts = self._applier.apply(waiting.batches)
            found = [
                part_receipt(entry, roots, counts, batch.transactions)
                for entry, roots, counts, batch in zip(
                    waiting.entries, waiting.roots, verdicts, waiting.batches, strict=True
                )
            ]
            failpoints.hit("consumer.before-apply-commit")
            self._applier.finish(
                last.batch_lsn_end, moment, lambda conn: self._write(conn, waiting, found, last.sequence)
            )
            failpoints.hit("consumer.after-apply-commit")
        self.mine = {share: max(at, last.sequence) for share, at in self.mine.items()}
        means.metrics.progressed()

    def _write(self, conn: Connection, waiting: _Waiting, found: list[PartReceipt], upto: int) -> None:
        state.save_descriptors(conn, self._chain, waiting.descriptors, forget_others=False)
        if self._means.leaves:
            self._means.leaves.write(conn, self._chain, waiting.leaves)
        for one in found:
            shares.save_part(conn, self._chain, one)
        shares.advance(conn, self._chain, list(self.mine), upto)

    def _rest(self, came: int) -> None:
        now = time.monotonic()
        if came:
            self._busy_until, self._rested = now + _REST_AFTER_SECONDS, False
        elif not self._rested and now >= self._busy_until:
            self._rested = True
            self._applier.rest()


def member_origin(stream: Stream, number: int) -> str:
    """The replication origin of a member: one session holds one."""
    return f"{stream.origin_name}_{number}"
