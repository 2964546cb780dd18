"""A stream whose commits wait: which position the walsender is told to be applied, and why not further.

Not here: the replication connection (replication.py), reading and verifying acknowledgements (targets.py).
Rules (docs/design/0027):

* A commit counts as applied when the quorum of synchronous targets acknowledged its batch, signed, with our
  root, and every change of it was applied. A target that left something out, by its operator's decision, is
  *held*: it counts no further until this node's operator has degraded and restored the stream.
* The position ends before the first commit that is not acknowledged, and never goes back. What the walsender
  says without a commit (a keepalive) raises it only while nothing that was received is outstanding.
* It begins at the last acknowledgement that was verified and written down; batches behind it are outstanding.
* Synchronous are the registered targets in this node's own region, once they have acknowledged something: one
  whose first copy is under way is not waited for, and does not count. A target that does not hold is
  still one that is needed. Without any, everything waits.
* Only an operator lets commits return without their targets: by `degrade`, an order that is signed into the
  chain first, or by saying whom they wait for (quorum, a node's region), which the operators' log has.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from confluent_kafka import Consumer, KafkaException, Message, TopicPartition

from vsql_shared import lsn
from vsql_shared.audit.entries import BATCH_SKIPPED, COVERED, REPLICATION_BATCH, AuditEntry
from vsql_shared.pg import synchronous
from vsql_shared.pg.connect import Connection, errors

if TYPE_CHECKING:
    from vsql_producers.targets import Targets
    from vsql_shared.audit.chain import Prepared

_log = logging.getLogger(__name__)

_APPLIED = frozenset({"applied", COVERED})
# Commits that are told apart; behind so many, several count as one.
_MOST = 10_000
_LISTEN_SECONDS = 0.2
_PORTION = 500
# Records that wait to be verified; what comes behind them waits in librdkafka's queue, which has a bound.
_MOST_UNREAD = 5_000


class Manifest(NamedTuple):
    """What an acknowledgement of a batch must name: epoch, hash and root."""

    epoch: int
    entry_hash: bytes
    merkle_root: bytes


class Answer(NamedTuple):
    """How far one synchronous target is."""

    synced_sequence: int
    joined: bool
    """It has acknowledged something."""
    holds: bool
    """Its acknowledgements hold."""


def quorum_sequence(answers: Iterable[Answer], quorum: int | None) -> int:
    """Up to which manifest enough targets have everything; -1: too few count."""
    joined = [one for one in answers if one.joined]
    needed = quorum or max(1, len(joined))
    good = sorted((one.synced_sequence for one in joined if one.holds), reverse=True)
    return good[needed - 1] if len(good) >= needed else -1


def left_out(entry: AuditEntry) -> str:
    """What an acknowledgement says was not applied; '' when everything was."""
    if entry.event_type == BATCH_SKIPPED:
        return f"it skipped batch {entry.batch}"
    others = [f"{count} {verdict}" for verdict, count in entry.verdicts if count and verdict not in _APPLIED]
    return f"of batch {entry.batch} it says: {', '.join(others)}" if others else ""


class Ledger:
    """Commits that were published and are not acknowledged, in order. Pure."""

    def __init__(self, applied: int, unacknowledged: Iterable[tuple[int, int]] = ()) -> None:
        """`unacknowledged`: sequence and end of batches behind `applied`."""
        self.applied = applied
        self._waiting: deque[tuple[int, int]] = deque(unacknowledged)

    def __len__(self) -> int:
        return len(self._waiting)

    def published(self, sequence: int, end_lsn: int) -> None:
        """Take a batch that ends at a commit."""
        if len(self._waiting) >= _MOST:
            self._waiting.pop()
        self._waiting.append((sequence, end_lsn))

    def acknowledged(self, sequence: int) -> None:
        """Everything up to this manifest stands at its targets."""
        while self._waiting and self._waiting[0][0] <= sequence:
            self.applied = max(self.applied, self._waiting.popleft()[1])

    def nothing_outstanding(self, position: int) -> None:
        """All that was received up to a position was published, or was nothing to publish."""
        if not self._waiting:
            self.applied = max(self.applied, position)


class Listener:
    """A Kafka consumer that is read by a thread of its own, so that its records wake who waits elsewhere.

    As much of `Consumer` as targets.py asks for.
    """

    def __init__(self, consumer: Consumer, closing: ExitStack) -> None:
        self._consumer = consumer
        self._lock = threading.Condition()
        self._came: deque[Message] = deque()
        self._failure: KafkaException | None = None
        self._generation = 0
        self._places: list[TopicPartition] = []
        self._ended = False
        self.wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._listen, name="acknowledgements", daemon=True)
        closing.callback(self._close)
        self._thread.start()

    def assign(self, places: list[TopicPartition]) -> None:
        """Read from other places on: what came from the former ones is forgotten."""
        with self._lock:
            self._generation += 1
            self._places = places
            self._came.clear()
            self._consumer.assign(places)
            self._lock.notify()

    def consume(self, most: int, timeout: float = 0) -> list[Message]:  # noqa: ARG002 - as Consumer has it
        """What came; waits for nothing."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            found = [self._came.popleft() for _ in range(min(most, len(self._came)))]
            self._lock.notify()
            return found

    def rest(self) -> None:
        """Before all that came is taken: what comes from now on wakes again."""
        try:
            os.eventfd_read(self.wake)
        except BlockingIOError:
            return

    def _listen(self) -> None:
        while not self._ended:
            with self._lock:
                if not self._generation or len(self._came) >= _MOST_UNREAD:
                    self._lock.wait(_LISTEN_SECONDS)
                    continue
                generation = self._generation
            try:
                first = self._consumer.poll(_LISTEN_SECONDS)
                found = [] if first is None else [first, *self._consumer.consume(_PORTION, timeout=0)]
            except KafkaException as error:
                self._failure = error
                found = []
            except RuntimeError:  # closed
                return
            if not found and self._failure is None:
                continue
            with self._lock:
                if generation == self._generation:
                    self._came.extend(found)
                else:
                    self._again()
            os.eventfd_write(self.wake, 1)

    def _again(self) -> None:
        """A call that an assignment came into may have taken records of both: read anew from its places."""
        try:
            self._consumer.assign(self._places)
        except KafkaException as error:
            self._failure = error

    def _close(self) -> None:
        self._ended = True
        self._thread.join(5 * _LISTEN_SECONDS)
        if not self._thread.is_alive():  # otherwise it may yet write to what would be another's descriptor
            os.close(self.wake)


class Waits:
    """What one epoch of a synchronous stream tells its walsender of commits that wait."""

    def __init__(
        self,
        conn: Connection,
        chain: str,
        policy: synchronous.Synchronous,
        targets: Targets,
        listener: Listener,
    ) -> None:
        self._conn, self._chain = conn, chain
        self.policy = policy
        self._targets, self._listener = targets, listener
        self._ledger = Ledger(0)
        self._manifests: dict[int, Manifest] = {}
        self._since: float | None = None
        self._unwaited: list[synchronous.Unwaited] = []
        self._server: str | None = None

    def open(self) -> None:
        """Begin at the last acknowledgement that was verified."""
        self._targets.refresh()
        synced = quorum_sequence(self._targets.answers(), self.policy.quorum)
        with errors("reading what is not acknowledged"):
            row = self._conn.execute(
                "SELECT batch_lsn_end::text FROM vsql_sync.vsql_sync_audit WHERE chain = %s"
                " AND event_type = %s AND sequence <= %s ORDER BY sequence DESC LIMIT 1",
                (self._chain, REPLICATION_BATCH, synced),
            ).fetchone()
            rows = self._conn.execute(
                "SELECT sequence, batch_lsn_end::text FROM vsql_sync.vsql_sync_audit WHERE chain = %s"
                " AND event_type = %s AND sequence > %s ORDER BY sequence DESC LIMIT %s",
                (self._chain, REPLICATION_BATCH, synced, _MOST),
            ).fetchall()
        waiting = [(sequence, lsn.parse(end)) for sequence, end in reversed(rows)]
        self._ledger = Ledger(lsn.parse(row[0]) if row else 0, waiting)
        self.look_at_tables()

    def made(self, prepared: Prepared) -> None:
        """A manifest is about to leave."""
        entry = prepared.entry
        self._manifests[entry.sequence] = Manifest(entry.epoch, prepared.entry_hash, entry.merkle_root)
        if len(self._manifests) > _MOST:  # the table has them all the same
            del self._manifests[next(iter(self._manifests))]
        if not entry.continues:
            self._ledger.published(entry.sequence, entry.batch_lsn_end)
            self._since = self._since or time.time()

    def applied(self, *, recorded: int, confirmed: int, idle_at: int | None) -> int:
        """The position to report now.

        `recorded`: the last manifest in our own table, which ends at `confirmed`; `idle_at`: up to where
        nothing that was received is outstanding, None while something is.
        """
        before = self._ledger.applied
        self._listener.rest()
        self._targets.verify(self._manifests)
        synced = quorum_sequence(self._targets.answers(), self.policy.quorum)
        self._ledger.acknowledged(synced)
        if self.policy.degraded_at is not None:
            self._ledger.acknowledged(recorded)
            if idle_at is not None:
                self._ledger.nothing_outstanding(confirmed)
        if idle_at is not None:
            self._ledger.nothing_outstanding(idle_at)
        while self._manifests and (oldest := next(iter(self._manifests))) <= synced:
            del self._manifests[oldest]
        if self._ledger.applied > before:
            self._since = time.time() if len(self._ledger) else None
        return self._ledger.applied

    def wait(self, wal: int, seconds: float) -> bool:
        """Wait until the WAL or an acknowledgement brings something; whether the WAL does."""
        readable, _, _ = select.select([wal, self._listener.wake], [], [], seconds)
        return wal in readable

    def look_again(self) -> None:
        """Take over what an operator decided since."""
        found = synchronous.load(self._conn, self.policy.publication)
        if found is not None:
            self.policy = found
        self.look_at_tables()

    def look_at_tables(self) -> None:
        """Say, once for each, which writes pass by."""
        found = synchronous.unwaited(self._conn)
        for one in found:
            if one not in self._unwaited:
                _log.error("commits of %s do not wait for its targets: %s", one.table, one.why)
        self._unwaited = found
        self._server = synchronous.server_problem(self._conn, self.policy.standby_name)

    def degrade(self, reason: str | None) -> None:
        """An operator's order, which stands signed in the chain; None: commits wait again."""
        synchronous.set_degraded(self._conn, self.policy.publication, reason)
        if reason is None:
            self._targets.forgive()
        self.look_again()

    def detail(self) -> dict[str, Any]:
        """The `synchronous` key of the status row."""
        waiting = len(self._ledger)
        behind = self._targets.behind() if waiting else {}
        degraded = self.policy.degraded_at
        return {
            "standby": self.policy.standby_name,
            "quorum": self.policy.quorum,
            "state": "degraded" if degraded else "waiting" if waiting else "synchronous",
            "applied_lsn": lsn.text(self._ledger.applied),
            "waiting_batches": waiting,
            "waiting_since": self._since if waiting else None,
            "waiting_for": behind,
            "degraded_at": degraded.isoformat() if degraded else None,
            "degraded_reason": self.policy.degraded_reason,
            "unwaited": [f"{one.table}: {one.why}" for one in self._unwaited],
            "server": self._server,
        }
