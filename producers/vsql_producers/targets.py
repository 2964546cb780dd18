"""What the targets of a stream acknowledged: their signed chains, read and compared with our own manifests.

Not here: what follows from it (worker.py, snapshot/). Procedure for each acknowledgement:

1. It is an entry of the target's chain for this stream, signed by the target's pinned key (a forged one).
2. It names one of our manifests by sequence, epoch and hash (an acknowledgement of something we never sent).
3. Its root, computed by the target over what it received, is the manifest's (a record that was altered).
   `batch_covered` has none: there the target's own finished copy must hold what the batch changed.

A target whose own, signed acknowledgements do not hold is marked with the first reason, loudly, and stays
marked; the stream itself goes on, because other targets are not to blame.

A target's key that has ended (docs/design/0025): its acknowledgements count once this reader has come, link
by link, to where the target's next key says that it ended (`ends_read`). Until then the table shows them,
nothing is forgotten for them (SQL 021), and commits wait. An end that comes behind entries which do not
follow, or is known from elsewhere, has all of them read anew, from the first. The target is needed meanwhile.

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
from vsql_shared.audit.bases import start_of
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
from vsql_shared.audit.key_ends import KeyEnd
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
_TARGETS = (
    "SELECT t.target, t.acked_sequence, coalesce(t.mismatch, ''), t.synced_sequence, coalesce(t.held, ''),"
    " t.forgiven_sequence, t.joined, t.ends_read, n.region IS NOT DISTINCT FROM here.region"
    " FROM vsql_sync.stream_targets t LEFT JOIN vsql_sync.nodes n ON n.node_id = t.target"
    " LEFT JOIN vsql_sync.nodes here ON here.is_local WHERE t.chain = %s AND t.target <> '*'"
)
# A key that was retired and then revoked has two.
_ENDS = "SELECT count(retired_at) + count(revoked_at) FROM vsql_sync.signers"
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
    forgiven_sequence: int = 0
    """What was left out up to here was let pass by this node's operator."""
    joined: bool = False
    """It had acknowledged something before its acknowledgements were read anew."""
    ends_read: frozenset[str] = frozenset()
    """Its ended keys whose end this reader has come to."""
    ends_noted: frozenset[str] = frozenset()
    """Those of them the table has."""
    anew: bool = False
    """Its chain is read from the beginning; no key that has ended counts beyond its end."""
    listens: bool = False
    """What lies in the partition is read once more, for its word where a key ended."""
    compared: int = 0
    """Its own entries up to this sequence were held against our manifests."""

    @property
    def ended(self) -> frozenset[str]:
        """Its keys that have ended."""
        return frozenset(key.fingerprint for key in self.keys if key.ended)

    @property
    def proven(self) -> bool:
        """Whether what ended keys signed is known to be the target's."""
        return self.ended <= self.ends_read

    @property
    def needed(self) -> bool:
        """Whether commits wait for it: it has acknowledged something, whatever of that counts now."""
        return self.joined or self.acked_sequence > 0 or self.synced_sequence > 0

    @property
    def unsaid(self) -> bool:
        """Whether a key of the target ended, and the target has not said where."""
        return key_ends.unsaid(self.keys, self.name, self.reader.chain)

    @property
    def holds(self) -> bool:
        """Whether what it acknowledged counts: nothing is wrong with it, or open about its keys."""
        return not self.mismatch and self.proven

    def look_back(self) -> None:
        """Read from the beginning, with the ends known, it is proven when it has come to the last one."""
        ends = [key.ends.get(self.reader.chain) for key in self.keys if key.ended]
        if self.anew and all(end and end.sequence <= self.reader.head.sequence for end in ends):
            self.ends_read = self.ended

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
        self._ends = 0
        """How many ends of keys there were when keys were loaded."""

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
        self._look_at_ends()
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
        if any(target.waiting for target in self._targets.values()):
            self._look_at_ends()
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
            Answer(one.synced_sequence, one.needed, one.holds) for one in self._targets.values() if one.near
        ]

    def behind(self) -> dict[str, str]:
        """Synchronous targets, and how far each is or why it does not count."""
        return {
            one.name: one.mismatch
            or (f"held: {one.held}" if one.held else f"at {one.synced_sequence}")
            + ("" if one.proven else "; a signing key of it ended, and where is not read yet")
            for one in self._targets.values()
            if one.near
        }

    def forgive(self) -> None:
        """An operator let commits return without what targets left out: from here on they count again."""
        for target in self._targets.values():
            target.held, target.synced_sequence = "", max(target.synced_sequence, target.acked_sequence)
            target.forgiven_sequence = target.synced_sequence
        with errors("noting acknowledgements"):
            self._conn.execute(
                "UPDATE vsql_sync.stream_targets SET held = NULL,"
                " synced_sequence = greatest(synced_sequence, acked_sequence),"
                " forgiven_sequence = greatest(synced_sequence, acked_sequence) WHERE chain = %s",
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
        self._ends = self._count_ends()
        with errors("reading the targets"):
            rows = self._conn.execute(_TARGETS, (self._chain,)).fetchall()
        pinned: dict[str, list[PinnedKey]] = {}
        for key in signers.load(self._conn):
            pinned.setdefault(key.node, []).append(key)
        for gone in self._targets.keys() - {row[0] for row in rows}:
            del self._targets[gone]
        for target in self._targets.values():
            if target.keys != pinned.get(target.name, []):
                self._renew(target, pinned.get(target.name, []))
        new = [row for row in rows if row[0] not in self._targets]
        for row in new:
            self._targets[row[0]] = self._remembered(row, pinned.get(row[0], []))
        for row in rows:
            self._targets[row[0]].near = row[-1]
        for target in list(self._targets.values()):
            self._prove(target)
        if new or self._go_back:
            self._assign()

    def _remembered(self, row: tuple[Any, ...], keys: list[PinnedKey]) -> Target:
        """A target as its row (_TARGETS) and the remembered head of its chain have it."""
        name, acked, mismatch, synced, held, forgiven, joined, ends_read, near = row
        known = recall_head(self._conn, names.ack_chain(self._chain, name))
        head, offset = known or (EMPTY_HEAD, None)
        return Target(
            name,
            self._reader(name, keys, head),
            keys,
            offset,
            acked,
            mismatch,
            near=near,
            synced_sequence=synced,
            held=held,
            forgiven_sequence=forgiven,
            joined=joined,
            ends_read=frozenset(ends_read),
            ends_noted=frozenset(ends_read),
            anew=known is None and acked == 0,
        )

    def _count_ends(self) -> int:
        with errors("looking whether keys have ended"):
            row = self._conn.execute(_ENDS).fetchone()
        return int(row[0]) if row else 0

    def _look_at_ends(self) -> None:
        """Before anything is counted: a key that an operator has ended signs no acknowledgement any more."""
        if self._count_ends() != self._ends:
            self.refresh()

    def _prove(self, target: Target) -> None:
        """Where a key of a target ended: hear where, or read anew with what is known of it."""
        if target.proven:
            return
        if not target.unsaid:
            if not target.anew:
                self._forget(target)
        elif not target.listens:
            # Its word may have passed by while its key still counted here.
            target.listens = True
            self._read_again(target)

    def _forget(self, target: Target) -> None:
        """Read its acknowledgements anew, from the first: what of them counts was not known before."""
        _log.warning(
            "it is known where a key of target %s ended: its acknowledgements are read anew", target.name
        )
        with errors("forgetting acknowledgements"):
            place = (self._chain, target.name)
            self._conn.execute("SELECT vsql_sync.forget_acknowledgements(%s, %s)", place)
        keys = signers.load(self._conn, target.name)
        self._targets[target.name] = Target(
            target.name,
            self._reader(target.name, keys, EMPTY_HEAD),
            keys,
            None,
            0,
            "",
            near=target.near,
            synced_sequence=target.forgiven_sequence,
            forgiven_sequence=target.forgiven_sequence,
            joined=target.needed,
            anew=True,
        )
        self._go_back = True

    def _renew(self, target: Target, keys: list[PinnedKey]) -> None:
        """Its keys were pinned, retired or revoked since: what was passed over may count now."""
        target.reader, target.keys = self._reader(target.name, keys, target.reader.head), keys
        target.anew = target.listens = False
        if target.doubt:
            target.doubt, target.went_back = "", False
            self._go_back = True

    def _assign(self) -> None:
        """Read from the last entry of each target that is read; what others have had is left out."""
        self._go_back = False
        read = (one for one in self._targets.values() if not one.mismatch or one.unsaid)
        offsets = [target.offset for target in read]
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
        chain = target.reader.chain
        if not target.unsaid or not self._notes_end(target, target.keys, value, chain):
            return False
        if key_ends.unsaid(signers.load(self._conn, target.name), target.name, chain):
            return False  # another key's end is still to be said
        self._forget(target)
        return True

    def _notes_end(
        self, target: Target, keys: list[PinnedKey], encoded: bytes, chain: str = ""
    ) -> KeyEnd | None:
        """What an entry says of where a key of the target ended (with `chain`: there), once it is noted."""
        return key_ends.note(self._conn, keys, self._cluster, target.name, encoded, chain)

    def _comes_to_end(self, target: Target, encoded: bytes) -> None:
        """Its word in its turn: what leads there is the target's."""
        said = self._notes_end(target, signers.load(self._conn, target.name), encoded)
        if said is not None and target.reader.chain in said.ends:
            target.ends_read |= {said.key}
        self._next_refresh = 0.0

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
            self._comes_to_end(target, encoded)
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
        target.look_back()
        if not target.moved and not target.waiting and target.ends_read == target.ends_noted:
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
        missing = any(one.ref_sequence not in ours for one in target.waiting if one.ref_sequence <= last)
        # Below its base a pruned chain has no manifests. They were compared before they went.
        base = start_of(self._conn, Log(self._cluster, self._chain)).sequence if missing else 0
        done: AuditEntry | None = None
        # Beyond our table's end: Kafka had our manifest, and so its reader, before the table did.
        while target.waiting and target.waiting[0].ref_sequence <= last:
            entry = target.waiting[0]
            pruned = entry.ref_sequence <= base
            problem: str | None = "" if pruned else _compare(entry, ours.get(entry.ref_sequence))
            if not problem and not pruned and entry.event_type == BATCH_COVERED:
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
            if not target.waiting:
                self._remember_head(target)

    def _remember_head(self, target: Target) -> None:
        """How far it is read, and so which ends of its keys."""
        if target.moved:
            remember_head(self._conn, target.reader.chain, target.reader.head, target.offset)
            target.moved = False
        if target.ends_read != target.ends_noted:
            self._conn.execute(
                "UPDATE vsql_sync.stream_targets SET ends_read = %s WHERE chain = %s AND target = %s",
                (sorted(target.ends_read), self._chain, target.name),
            )
            target.ends_noted = target.ends_read

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
