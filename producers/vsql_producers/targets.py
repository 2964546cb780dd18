"""What the targets of a stream acknowledged: their signed chains, read and compared with our own manifests.

Not here: what follows from it (worker.py, snapshot/). Procedure for each acknowledgement:

1. It is an entry of the target's chain for this stream, signed by the target's pinned key (a forged one).
2. It names one of our manifests by sequence, epoch and hash (an acknowledgement of something we never sent).
3. Its root, computed by the target over what it received, is the manifest's (a record that was altered).
   `batch_covered` has none: there the target's own finished copy must hold what the batch changed.

A target whose own, signed acknowledgements do not hold is marked with the first reason, loudly, and stays
marked; the stream itself goes on, because other targets are not to blame.

A target's key that has ended (docs/design/0025): its acknowledgements count once the target's next key has
signed where it ended, and they lead there. Until then the table shows them, and nothing is forgotten for them
(SQL 021). An end that comes behind entries which do not follow has all of them read anew, from the first.

What is not signed by the target, or cannot be read, says nothing of it and is passed over: whoever can write
to the topic must not be able to mark a target. Its key may be pinned later, though, and a topic may have been
made anew; so when an entry does not follow, all there is is read once more before the target is marked. A
place that was noted is held against the entry that lay there.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_END,
    Consumer,
    KafkaError,
    KafkaException,
    TopicPartition,
)

from vsql_producers.joining import uncovered
from vsql_producers.synchronous import Answer, Listener, Manifest, left_out
from vsql_shared import lsn, names
from vsql_shared.audit import cosigned
from vsql_shared.audit.chain import EMPTY_HEAD, Accepted, ChainHead, ChainReader
from vsql_shared.audit.checkpoint import Log
from vsql_shared.audit.dsse import document_hash
from vsql_shared.audit.entries import (
    BATCH_APPLIED,
    BATCH_COVERED,
    BATCH_REFUSED,
    BATCH_SKIPPED,
    CHECKPOINT_COSIGNED,
    SIGNING_KEY_ENDED,
    AuditEntry,
)
from vsql_shared.audit.store import recall_head, remember_head
from vsql_shared.crypto.signing import PinnedKey, TrustStore
from vsql_shared.errors import DecodeError, RefusedError, SignatureError, VerificationError
from vsql_shared.kafka.clients import from_exception, kafka_error
from vsql_shared.pg import key_ends, signers
from vsql_shared.pg.connect import Connection, errors

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.25
_REFRESH_SECONDS = 5.0
# Records taken at a look, in portions: a target that was away for long is caught up with in minutes.
_PORTION, _PORTIONS = 500, 8
_DOUBT_CHARACTERS = 300
"""Of what is said of a record that is not the target's: its texts may be anybody's."""
# Kafka no longer has, or does not have yet, the offset to go on from.
_LOST = (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE)  # noqa: SLF001 - librdkafka's public name
_COUNTED = frozenset({BATCH_APPLIED, BATCH_SKIPPED, BATCH_COVERED})


@dataclass(slots=True)
class Target:
    """One target: its chain, how far it is, and what is wrong with it."""

    name: str
    reader: ChainReader
    keys: list[PinnedKey]
    offset: int | None
    acked_sequence: int
    mismatch: str
    waiting: list[AuditEntry] = field(default_factory=list)
    """Acknowledgements that came before our own table had their manifests."""
    moved: bool = False
    doubt: str = ""
    """The first record since the last entry that was passed over, as the chain's or unreadable."""
    went_back: bool = False
    done: AuditEntry | None = None
    """The last acknowledgement that is right, not yet noted: what it was signed with is not proven."""
    near: bool = True
    """In this node's own region."""
    synced_sequence: int = 0
    """Up to this manifest everything was applied there; what was left out holds it."""
    held: str = ""
    compared: int = 0
    """Its own entries up to this sequence were held against our manifests."""

    @property
    def proven(self) -> bool:
        """Whether what ended keys signed is known to be the target's."""
        ends = (key.ends.get(self.reader.chain) for key in self.keys if key.ended)
        return all(end is None or self.reader.head.sequence >= end.sequence for end in ends)

    @property
    def unsaid(self) -> bool:
        """Whether a key of the target ended, and the target has not said where."""
        return key_ends.unsaid(self.keys, self.name, self.reader.chain)

    @property
    def holds(self) -> bool:
        """Whether what it acknowledged counts: nothing is wrong with it, or open about its keys."""
        return not self.mismatch and self.proven and not self.unsaid

    def advance(self, entry: AuditEntry) -> None:
        """Take an acknowledgement that is right."""
        self.compared = max(self.compared, entry.sequence)
        if self.held or entry.ref_sequence <= self.synced_sequence:
            return
        self.held = left_out(entry)
        if not self.held:
            self.synced_sequence = entry.ref_sequence


class Targets:
    """The targets of one outgoing stream."""

    def __init__(
        self,
        conn: Connection,
        consumer: Consumer | Listener,
        cluster: str,
        chain: str,
        topic: str,
        partition: int,
        *,
        allow_unsigned: bool,
    ) -> None:
        self._conn, self._consumer = conn, consumer
        self._cluster, self._chain = cluster, chain
        self._topic, self._partition = topic, partition
        self._allow_unsigned = allow_unsigned
        self._targets: dict[str, Target] = {}
        self._next_poll = self._next_refresh = 0.0
        self._go_back = False

    def poll(self, now: float | None = None) -> None:
        """Look at what came; returns at once. Costs nothing while there are no targets."""
        now = time.monotonic() if now is None else now
        if now < self._next_poll:
            return
        self._next_poll = now + _POLL_SECONDS
        if now >= self._next_refresh:
            self.refresh()
        if not self._targets:
            return
        self._read()
        for target in self._targets.values():
            self._settle(target)

    def _read(self) -> None:
        for _ in range(_PORTIONS):
            if not self._read_portion():
                break

    def verify(self, manifests: Mapping[int, Manifest]) -> None:
        """Take what came and compare it with our newest manifests; `poll` writes down what follows."""
        if not self._targets:
            return
        self._read()
        for target in self._targets.values():
            for entry in target.waiting:
                if entry.sequence <= target.compared:
                    continue
                ours = manifests.get(entry.ref_sequence)
                if ours is None or entry.event_type == BATCH_COVERED:
                    break  # the table knows
                if problem := _compare(entry, ours):
                    self._mark(target, problem)
                    target.waiting.clear()
                    break
                target.advance(entry)

    def answers(self) -> list[Answer]:
        """How far the targets are that commits may wait for."""
        return [
            Answer(one.synced_sequence, one.acked_sequence > 0 or one.synced_sequence > 0, one.holds)
            for one in self._targets.values()
            if one.near
        ]

    def behind(self) -> dict[str, str]:
        """Synchronous targets, and how far each is or why it does not count."""
        return {
            one.name: one.mismatch or (f"held: {one.held}" if one.held else f"at {one.synced_sequence}")
            for one in self._targets.values()
            if one.near
        }

    def forgive(self) -> None:
        """An operator let commits return without what targets left out: from here on they count again."""
        for target in self._targets.values():
            target.held, target.synced_sequence = "", max(target.synced_sequence, target.acked_sequence)
        with errors("noting acknowledgements"):
            self._conn.execute(
                "UPDATE vsql_sync.stream_targets SET held = NULL,"
                " synced_sequence = greatest(synced_sequence, acked_sequence) WHERE chain = %s",
                (self._chain,),
            )

    def _read_portion(self) -> bool:
        """Take some records; whether more may be there at once."""
        messages = self._consumer.consume(_PORTION, timeout=0)
        for message in messages:
            if (error := message.error()) is not None:
                if error.code() not in _LOST:
                    raise kafka_error(error, "read acknowledgements")
                self._read_anew()
                return False
            offset, value = message.offset(), message.value()
            if offset is not None and value is not None:
                self._take(offset, value)
            if self._go_back:
                self._assign()
                return False
        return len(messages) == _PORTION

    def _read_anew(self) -> None:
        """Read what the partition holds from its beginning: it was truncated, or made anew.

        What is there again says nothing new; what was lost is a gap at the target's next entry.
        """
        _log.warning(
            "Kafka no longer has the acknowledgements from where they were read",
            extra={"topic": self._topic, "partition": self._partition},
        )
        for target in self._targets.values():
            target.offset = None
        self._assign()

    def acknowledged(self, sequence: int) -> bool:
        """Whether every target acknowledged our manifests up to this sequence, without a mismatch."""
        return bool(self._targets) and all(
            target.acked_sequence >= sequence and target.holds for target in self._targets.values()
        )

    def detail(self, sequence: int) -> dict[str, Any]:
        """The `targets` key of the status row; `sequence` is our chain's last one."""
        return {
            target.name: {
                "acked_sequence": target.acked_sequence,
                "lag_batches": max(0, sequence - target.acked_sequence),
                "mismatch": target.mismatch or None,
                "passed_over": target.doubt or None,
            }
            for target in self._targets.values()
        }

    def refresh(self) -> None:
        """Targets come and go while the stream runs; a new one may have acknowledged before we knew it."""
        self._next_refresh = time.monotonic() + _REFRESH_SECONDS
        with errors("reading the targets"):
            rows = self._conn.execute(
                "SELECT t.target, t.acked_sequence, coalesce(t.mismatch, ''), t.synced_sequence,"
                " coalesce(t.held, ''), n.region IS NOT DISTINCT FROM here.region"
                " FROM vsql_sync.stream_targets t LEFT JOIN vsql_sync.nodes n ON n.node_id = t.target"
                " LEFT JOIN vsql_sync.nodes here ON here.is_local"
                " WHERE t.chain = %s AND t.target <> '*'",
                (self._chain,),
            ).fetchall()
        pinned: dict[str, list[PinnedKey]] = {}
        for key in signers.load(self._conn):
            pinned.setdefault(key.node, []).append(key)
        for gone in self._targets.keys() - {row[0] for row in rows}:
            del self._targets[gone]
        for target in self._targets.values():
            if target.keys != pinned.get(target.name, []):
                self._renew(target, pinned.get(target.name, []))
        new = [row for row in rows if row[0] not in self._targets]
        for name, acked, mismatch, synced, held, _ in new:
            chain = names.ack_chain(self._chain, name)
            known = recall_head(self._conn, chain)
            head, offset = known or (EMPTY_HEAD, None)
            keys = pinned.get(name, [])
            target = Target(name, self._reader(name, keys, head), keys, offset, acked, mismatch)
            target.synced_sequence, target.held = synced, held
            self._targets[name] = target
        for row in rows:
            self._targets[row[0]].near = row[5]
        if new or self._go_back:
            self._assign()

    def _renew(self, target: Target, keys: list[PinnedKey]) -> None:
        """Its keys were pinned, retired or revoked since: what was passed over may count now."""
        target.reader, target.keys = self._reader(target.name, keys, target.reader.head), keys
        if target.doubt:
            target.doubt, target.went_back = "", False
            self._go_back = True

    def _assign(self) -> None:
        """Read from the last entry of each target that is read; what others have had is left out."""
        self._go_back = False
        offsets = [target.offset for target in self._targets.values() if not target.mismatch]
        starts = [offset for offset in offsets if offset is not None]
        start = min(starts, default=OFFSET_END) if len(starts) == len(offsets) else OFFSET_BEGINNING
        try:
            self._consumer.assign([TopicPartition(self._topic, self._partition, start)])
        except KafkaException as error:
            raise from_exception(error, "read acknowledgements") from error

    def _reader(self, target: str, keys: list[PinnedKey], head: ChainHead) -> ChainReader:
        trust = TrustStore(keys, allow_unsigned=self._allow_unsigned)
        return ChainReader(self._cluster, names.ack_chain(self._chain, target), target, trust, head)

    def _take(self, offset: int, value: bytes) -> None:
        for target in self._targets.values():
            counts = False
            if not target.mismatch:
                if target.offset is not None and offset < target.offset:
                    continue
                counts = self._is_entry(target, offset, value)
            if not counts and self._hears(target, value):
                return  # all is read again, with what is known now

    def _is_entry(self, target: Target, offset: int, value: bytes) -> bool:
        """Whether a record is the next entry of a target's chain, or its last one again."""
        if offset == target.offset:
            if document_hash(value) != target.reader.head.entry_hash:
                self._read_again(target)
            return True
        try:
            found = target.reader.accept(value, f"{self._topic}/{self._partition}/{offset}")
        except (SignatureError, DecodeError) as error:
            self._doubt(target, str(error))
            return False
        except VerificationError as error:
            self._unfit(target, str(error))
            return False
        if isinstance(found, Accepted):
            target.offset, target.moved = offset, True
            target.doubt, target.went_back = "", False
            self._note(target, found.entry, value)
        return isinstance(found, Accepted)

    def _hears(self, target: Target, value: bytes) -> bool:
        """Whether this is the target's own word where a key of it ended, behind what does not follow.

        Where everything before it follows, it is heard when its turn comes: it is an entry as others are.
        """
        if not target.unsaid:
            return False
        with errors("noting where a target's key ended"), self._conn.transaction():
            if not key_ends.note(self._conn, target.keys, self._cluster, target.name, value):
                return False
            if key_ends.unsaid(signers.load(self._conn), target.name, target.reader.chain):
                return False  # it is of another chain, or another key's end is still to be said
            place = (self._chain, target.name)
            self._conn.execute("SELECT vsql_sync.forget_acknowledgements(%s, %s)", place)
        _log.warning(
            "target %s says where a key of it ended: its acknowledgements are read anew", target.name
        )
        del self._targets[target.name]
        self._next_refresh, self._go_back = 0.0, True
        return True

    def _doubt(self, target: Target, problem: str) -> None:
        if target.doubt:
            return  # one line until its next entry: anybody can send many
        target.doubt = problem[:_DOUBT_CHARACTERS]
        _log.warning(
            "passed over a record in the acknowledgements of target %s: %s", target.name, target.doubt,
            extra={"target": target.name},
        )  # fmt: skip

    def _unfit(self, target: Target, problem: str) -> None:
        """An entry of the target does not follow: what was passed over before may be what is missing."""
        if target.unsaid:
            self._doubt(target, problem)
        elif not target.went_back:
            target.went_back = True
            self._read_again(target)
        else:
            self._mark(target, f"{problem}; before it, {target.doubt}" if target.doubt else problem)

    def _read_again(self, target: Target) -> None:
        """From the beginning: the partition is not the one that was read before, or was not read well."""
        target.offset = None
        self._go_back = True

    def _note(self, target: Target, entry: AuditEntry, encoded: bytes) -> None:
        if entry.event_type in _COUNTED and entry.ref_sequence:
            target.waiting.append(entry)
        if entry.event_type == CHECKPOINT_COSIGNED:
            self._cosigned(target, entry)
        if entry.event_type == SIGNING_KEY_ENDED:
            key_ends.note(self._conn, target.keys, self._cluster, target.name, encoded)
            self._next_refresh = 0.0
        if entry.event_type in (BATCH_REFUSED, BATCH_SKIPPED):
            _log.warning(
                "a target says %s", entry.event_type,
                extra={"target": target.name, "sequence": entry.ref_sequence},
            )  # fmt: skip

    def _cosigned(self, target: Target, entry: AuditEntry) -> None:
        """Keep what the target cosigned: the archive's segments end there (docs/design/0020)."""
        try:
            note = str(json.loads(entry.detail).get("note"))
            cosigned.remember(self._conn, Log(self._cluster, self._chain), note)
        except (DecodeError, SignatureError, RefusedError) as error:
            _log.warning(
                "target %s says it cosigned what is no cosigned checkpoint of this chain: %s", target.name,
                error.message, extra={"target": target.name},
            )  # fmt: skip

    def _settle(self, target: Target) -> None:
        """Compare what waits with our manifests, and remember how far the target is."""
        if not target.moved and not target.waiting:
            return
        with errors("reading our manifests"):
            rows = self._conn.execute(
                "SELECT sequence, epoch, document, merkle_root FROM vsql_sync.vsql_sync_audit"
                " WHERE chain = %s AND sequence = ANY(%s)",
                (self._chain, [entry.ref_sequence for entry in target.waiting]),
            ).fetchall()
        head = recall_head(self._conn, self._chain)
        last = head[0].sequence if head else 0
        ours = {row[0]: (row[1], document_hash(bytes(row[2])), bytes(row[3])) for row in rows}
        done: AuditEntry | None = None
        # Beyond our table's end: Kafka had our manifest, and so its reader, before the table did.
        while target.waiting and target.waiting[0].ref_sequence <= last:
            entry = target.waiting[0]
            problem: str | None = _compare(entry, ours.get(entry.ref_sequence))
            if not problem and entry.event_type == BATCH_COVERED:
                problem = uncovered(
                    self._conn, self._chain, target.name, target.acked_sequence, entry.ref_sequence
                )
                if problem is None or not self._hold_as_copied(target, entry):
                    break  # looked at again with the next poll
            del target.waiting[0]
            if problem:
                self._mark(target, problem)
                target.waiting.clear()
                break
            done = entry
            target.advance(entry)
        self._remember(target, done, last)

    def _hold_as_copied(self, target: Target, entry: AuditEntry) -> bool:
        """What a first copy covers was applied as far as the copy was; false: that is not known yet."""
        publication, origin = names.live_chain_of(self._chain).split(".")
        with errors("looking at what the first copy left out"):
            row = self._conn.execute(
                "SELECT s.state = 'FINISHED', t.held FROM vsql_sync.streams s"
                " JOIN vsql_sync.stream_targets t USING (chain)"
                " WHERE s.chain = %s AND s.direction = 'out' AND t.target = %s",
                (names.copy_chain(publication, origin, target.name), target.name),
            ).fetchone()
        if row is None:
            return True
        if row[1] and not target.held and entry.ref_sequence > target.synced_sequence:
            target.held = f"of its first copy, {row[1]}"
        return bool(row[0])

    def _remember(self, target: Target, done: AuditEntry | None, last: int) -> None:
        """`last`: our own table's end. Beyond it nothing is noted: it may be lost with Kafka's."""
        if done is not None:
            target.acked_sequence = max(target.acked_sequence, done.ref_sequence)
            target.done = done
        if not target.proven:
            return
        done, target.done = target.done, None
        with errors("noting acknowledgements"), self._conn.transaction():
            if done is not None:
                self._conn.execute(
                    "UPDATE vsql_sync.stream_targets"
                    " SET acked_sequence = %s, acked_lsn = %s, acked_target_lsn = %s, acked_at = now(),"
                    " synced_sequence = %s, held = nullif(%s, '') WHERE chain = %s AND target = %s",
                    (
                        target.acked_sequence,
                        lsn.text(done.batch_lsn_end),
                        lsn.text(done.target_lsn),
                        min(target.synced_sequence, last),
                        target.held,
                        self._chain,
                        target.name,
                    ),
                )
            # What still waits would be passed over after a restart: the head is remembered with it.
            if not target.waiting and target.moved:
                remember_head(self._conn, target.reader.chain, target.reader.head, target.offset)
                target.moved = False

    def _mark(self, target: Target, problem: str) -> None:
        target.mismatch = problem
        _log.error(
            "acknowledgements of target %s do not hold: %s", target.name, problem,
            extra={"target": target.name},
        )  # fmt: skip
        with errors("marking a target"):
            self._conn.execute(
                "UPDATE vsql_sync.stream_targets SET mismatch = %s WHERE chain = %s AND target = %s"
                " AND mismatch IS NULL",
                (problem, self._chain, target.name),
            )


def _compare(entry: AuditEntry, manifest: tuple[int, bytes, bytes] | Manifest | None) -> str:
    """Steps 2 and 3; '' when the acknowledgement is right. `manifest` is ours: epoch, hash, root."""
    if entry.event_type == BATCH_SKIPPED:
        # An operator there decided; what was skipped may have been unreadable: nothing to compare.
        return ""
    if manifest is None or (entry.ref_epoch, entry.ref_hash) != manifest[:2]:
        return f"acknowledgement {entry.sequence} names a manifest {entry.ref_sequence} that is not ours"
    if entry.event_type == BATCH_COVERED:
        # What came with the first copy: no record was read, so there is no root.
        return ""
    if entry.merkle_root != manifest[2]:
        return (
            f"batch {entry.batch}: the target computed root {entry.merkle_root.hex()},"
            f" our manifest {entry.ref_sequence} has {manifest[2].hex()}"
        )
    return ""
