"""The target's own signed entries: acknowledgements of what it applied, refusals, skips.

Not here: when a batch is applied (pipeline.py) and what stands in a receipt (state.py). Rules:

* An acknowledgement is made only of a receipt whose applying commit is flushed, and says what this node
  computed itself: its root, its verdicts, its commit's LSN.
* Entries go into this node's audit table first, then to Kafka, in the order of the chain. Each run that has
  something to say opens an epoch of its own; at start Kafka is brought level with the table, so a crash in
  between loses nothing and doubles nothing.
* It starts under the stream's replication origin: a receipt that another process commits after ours were
  read would be passed over, and its batch never acknowledged.
* What is acknowledged stays so: after this database was set back, a batch that is applied once more is not
  acknowledged once more.
* Memory does not depend on how much there is to say: receipts and entries go page by page, and Kafka's queue
  is waited for.
* A delivery that failed, or whose result is unknown, ends this object: the worker starts again.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from itertools import islice
from typing import Any, NamedTuple

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from vsql_consumers import state
from vsql_consumers.cosign import Cosigner, load_last
from vsql_consumers.quarantine import is_skipped
from vsql_consumers.session import server_position
from vsql_consumers.state import Receipt
from vsql_shared import failpoints, names
from vsql_shared.audit.append import append_entry
from vsql_shared.audit.chain import Accepted, ChainReader, ChainWriter, Prepared, new_incarnation
from vsql_shared.audit.checkpoint import Log
from vsql_shared.audit.dsse import document_hash
from vsql_shared.audit.entries import (
    BATCH_APPLIED,
    BATCH_COVERED,
    BATCH_REFUSED,
    BATCH_SKIPPED,
    COVERED,
    OPERATOR_ACTION,
    AuditEntry,
    canonical_json,
)
from vsql_shared.audit.rows import parse
from vsql_shared.audit.store import insert_entries, iterate, load_head
from vsql_shared.crypto.signing import Signer, TrustStore
from vsql_shared.errors import (
    DecodeError,
    DivergedError,
    KeyEndedError,
    SignatureError,
    TransientError,
    VsqlSyncError,
)
from vsql_shared.kafka.clients import from_exception, kafka_error
from vsql_shared.pg.connect import Connection, errors

_log = logging.getLogger(__name__)

FLUSH_SECONDS = 60.0
"""How long Kafka may take to acknowledge before the worker starts again."""
PAGE = 500
"""Receipts, or entries that Kafka lacks, taken at a time."""
_STEP_BACK = 10_000
"""Offsets before the likely place of our last entry that are read before the whole partition is."""

_LEFT_MOST = 64
"""Entries that may go into the table by themselves before receipts Kafka has heard of are forgotten."""

ReadOwn = Callable[[int], Iterable[tuple[int, bytes]]]
"""Gives (offset, document) of this chain's records in Kafka from an offset on, oldest first, to the end."""


class Place(NamedTuple):
    """Whose acknowledgements these are, and where they go."""

    cluster: str
    chain: str
    ack_chain: str
    origin: str
    node: str
    topic: str
    partition: int


class Acknowledger:
    """Writes the acknowledgement chain of one incoming stream."""

    def __init__(
        self, conn: Connection, producer: Producer, place: Place, signer: Signer | None, trust: TrustStore
    ) -> None:
        """`conn` holds the stream's advisory lock, so that nobody else writes this chain."""
        self._conn, self._producer, self._place = conn, producer, place
        self._signer, self._trust = signer, trust
        self._writer: ChainWriter | None = None
        self._under_way: deque[bytes] = deque()
        self._failure: VsqlSyncError | None = None
        self._published_up_to = self._left = 0
        self.entries = self.bytes = 0

    def cosigner(self, every: timedelta) -> Cosigner:
        """Who cosigns the heads of the stream's chain in this one; once it was started."""
        place = self._place
        last = load_last(self._conn, place.ack_chain)
        return Cosigner(self, self._signer, Log(place.cluster, place.chain), every, last)

    def start(self, read_own: ReadOwn, from_offset: int) -> None:
        """Bring Kafka level with the table; acknowledge receipts a crash left behind.

        `from_offset` is where our last entry is likely to be; if none is, more is read, up to all of it.
        """
        self._level(read_own, from_offset)
        self._writer = ChainWriter(
            self._signer,
            self._place.cluster,
            self._place.ack_chain,
            load_head(self._conn, self._place.ack_chain),
            new_incarnation(),
            node=self._place.node,
        )
        self.acknowledge_stored(server_position(self._conn).lsn)
        self.flush()

    def acknowledge_stored(self, target_lsn: int) -> None:
        """Acknowledge what the table of receipts holds, page by page."""
        after = 0
        while True:
            with errors("reading receipts"):
                page = state.load_receipts(self._conn, self._place.chain, after, PAGE)
            if not page:
                return
            self.acknowledge(page, target_lsn)
            after = page[-1].sequence

    def acknowledge(self, receipts: Sequence[Receipt], target_lsn: int) -> None:
        """Sign and send what follows from receipts whose transaction is committed and flushed."""
        if not receipts:
            return
        self.flush()
        head = self._open_writer().tip
        missing = [one for one in receipts if one.batch > head.batch]
        if missing:
            self._open_epoch()
            self._record([self._entry_for(receipt, target_lsn) for receipt in missing])
        self._published_up_to = receipts[-1].sequence

    def refused(self, record: str, error: str, sequence: int) -> None:
        """Say once, signed, that this node refused a record."""
        said = {"record": record, "error": error[:1000], "sequence": sequence}
        last = self._conn.execute(
            "SELECT document FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND event_type = %s"
            " ORDER BY sequence DESC LIMIT 1",
            (self._place.ack_chain, BATCH_REFUSED),
        ).fetchone()
        if last is not None and parse(bytes(last[0])).entry.detail == canonical_json(said):
            return
        self.say(BATCH_REFUSED, said)
        self.flush()

    def act(self, detail: Mapping[str, Any]) -> None:
        """Say that an operator's command was obeyed; `detail` names it and its line in the operators' log."""
        self.say(OPERATOR_ACTION, detail)

    def say(
        self, event_type: str, detail: Mapping[str, Any], also: Callable[[Connection], None] | None = None
    ) -> None:
        """An entry without a batch; `also` is written in the transaction that puts it into the table."""
        self.flush()
        self._open_epoch()
        at = server_position(self._conn).lsn
        entry = self._open_writer().next(
            event_type=event_type,
            source_node_id=self._place.origin,
            target_node_id=self._place.node,
            batch_lsn_start=at,
            batch_lsn_end=at,
            detail=canonical_json(detail),
        )
        self._record([entry], also)

    def poll(self) -> None:
        """Serve Kafka's answers; raises when one says that an entry was not written."""
        self._producer.poll(0)
        self._raise_failure()

    def flush(self) -> None:
        """Wait until Kafka has every entry."""
        deadline = time.monotonic() + FLUSH_SECONDS
        while self._under_way:
            self._producer.poll(0.05)
            self._raise_failure()
            if time.monotonic() > deadline:
                raise _no_answer()

    def settle(self) -> None:
        """Forget receipts whose acknowledgements Kafka has; called when there is nothing better to do."""
        if self._published_up_to and not self._under_way:
            with errors("forgetting receipts"):
                state.drop_receipts(self._conn, self._place.chain, self._published_up_to)
            self._published_up_to = 0

    def close(self) -> None:
        """Drop what is queued: the table has it, and the next start sends it."""
        self._producer.purge(in_queue=True, in_flight=True, blocking=False)
        self._producer.poll(0)

    # What Kafka and the table have

    def _level(self, read_own: ReadOwn, from_offset: int) -> None:
        """Kafka must be a prefix of the table, or extend it; afterwards both are equal."""
        chain = self._place.ack_chain
        table_head = load_head(self._conn, chain)
        reader = ChainReader(self._place.cluster, chain, self._place.node, self._trust, table_head)
        newer: list[tuple[bytes, int | None]] = []
        in_kafka = 0
        # Reading all of a partition takes long: tried only when our last entry lies nowhere near.
        for start in dict.fromkeys((from_offset, max(0, from_offset - _STEP_BACK), 0)):
            in_kafka = self._last_published(reader, read_own(start), newer)
            if in_kafka:
                break
        insert_entries(self._conn, newer)
        missing = iterate(self._conn, chain, in_kafka + 1)
        while page := [Prepared(o.entry, o.encoded, o.entry_hash) for o in islice(missing, PAGE)]:
            _log.info("publishing entries a crash left behind", extra={"entries": len(page)})
            self._publish(page)
            self.flush()

    def _last_published(
        self,
        reader: ChainReader,
        published: Iterable[tuple[int, bytes]],
        newer: list[tuple[bytes, int | None]],
    ) -> int:
        """Highest sequence Kafka and the table share; what Kafka has beyond the table goes to `newer`."""
        in_kafka = 0
        for offset, encoded in published:
            where = f"{self._place.topic}/{self._place.partition}/{offset}"
            try:
                sequence = parse(encoded).entry.sequence
                new = sequence > reader.head.sequence
                found = reader.accept(encoded, where) if new else None
            except KeyEndedError:
                raise
            except (DecodeError, SignatureError) as error:
                # Not ours: otherwise anybody who can write to the topic could keep us from starting.
                _log.error("a record that is no entry of ours lies among them: %s", error)
                continue
            if isinstance(found, Accepted):
                newer.append((encoded, offset))
                in_kafka = sequence
            elif not new and not newer and self._table_has(sequence, encoded):
                in_kafka = max(in_kafka, sequence)
        return in_kafka

    def _table_has(self, sequence: int, encoded: bytes) -> bool:
        """Whether the table's entry is this one; one of a process that lost its epoch does not count."""
        row = self._conn.execute(
            "SELECT document FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND sequence = %s",
            (self._place.ack_chain, sequence),
        ).fetchone()
        if row is None:
            raise DivergedError(
                f"entry {sequence} of chain {self._place.ack_chain} is in Kafka, not in the audit table",
                hint="the audit table was altered; run `syncctl audit verify`",
            )
        return document_hash(bytes(row[0])) == document_hash(encoded)

    # Writing

    def _open_epoch(self) -> None:
        """Open an epoch before the first entry of this run: who has nothing to say leaves no trace."""
        writer = self._open_writer()
        if writer.is_open:
            return
        where = server_position(self._conn)
        opened = writer.open_epoch(
            lsn=where.lsn,
            system_identifier=where.system_identifier,
            timeline=where.timeline,
            source_node_id=self._place.origin,
            target_node_id=self._place.node,
        )
        self._record([opened])

    def _entry_for(self, receipt: Receipt, target_lsn: int) -> Prepared:
        """The acknowledgement of one batch: the manifest's words, this node's findings."""
        if not receipt.manifest:
            return self._skipped_unread(receipt)
        manifest = parse(receipt.manifest).entry
        if COVERED in receipt.verdicts:
            return self._covered(receipt, manifest)
        return self._open_writer().prepare(
            event_type=BATCH_SKIPPED if is_skipped(receipt) else BATCH_APPLIED,
            merkle_root=receipt.merkle_root,
            target_lsn=target_lsn,
            target_node_id=self._place.node,
            verdicts=tuple(sorted((name, count) for name, count in receipt.verdicts.items() if count)),
            ref_epoch=manifest.epoch,
            ref_sequence=manifest.sequence,
            ref_hash=document_hash(receipt.manifest),
            detail=canonical_json(receipt.detail),
            **_copied(manifest),
        )

    def _covered(self, receipt: Receipt, manifest: AuditEntry) -> Prepared:
        """Says that everything up to this batch came with the first copy: no record of it was read.

        What this chain counted before, on a node that was initialised anew, is not counted twice.
        """
        row = self._conn.execute(
            "SELECT coalesce(sum(row_count), 0)::bigint FROM vsql_sync.vsql_sync_audit WHERE chain = %s",
            (self._place.ack_chain,),
        ).fetchone()
        rows = max(0, receipt.verdicts[COVERED] - (int(row[0]) if row else 0))
        return self._open_writer().prepare(
            event_type=BATCH_COVERED,
            source_node_id=self._place.origin,
            target_node_id=self._place.node,
            batch=receipt.batch,
            batch_lsn_start=0,
            batch_lsn_end=manifest.batch_lsn_end,
            row_count=rows,
            verdicts=((COVERED, rows),),
            ref_epoch=manifest.epoch,
            ref_sequence=manifest.sequence,
            ref_hash=document_hash(receipt.manifest),
        )

    def _skipped_unread(self, receipt: Receipt) -> Prepared:
        """Says that a batch was skipped whose manifest nobody could read."""
        writer = self._open_writer()
        return writer.prepare(
            event_type=BATCH_SKIPPED,
            source_node_id=self._place.origin,
            target_node_id=self._place.node,
            batch=receipt.batch,
            batch_lsn_start=writer.tip.lsn_end,
            batch_lsn_end=writer.tip.lsn_end,
            ref_epoch=receipt.epoch,
            ref_sequence=receipt.sequence,
            detail=canonical_json({"sequence": receipt.sequence, "unread": True}),
        )

    def _record(self, prepared: Sequence[Prepared], also: Callable[[Connection], None] | None = None) -> None:
        """Table, then Kafka. What Kafka had acknowledged before is forgotten in the same transaction."""
        failpoints.hit("consumer.before-ack-table")
        writer = self._open_writer()
        if len(prepared) == 1 and also is None and self._left < _LEFT_MOST:
            # A commit may be waiting for it. What Kafka has is forgotten a little later.
            self._left += 1
            append_entry(self._conn, prepared[0].encoded, writer.head)
        else:
            with errors("writing acknowledgements"), self._conn.transaction():
                if self._published_up_to:
                    state.drop_receipts(self._conn, self._place.chain, self._published_up_to)
                insert_entries(self._conn, [(one.encoded, None) for one in prepared])
                if also is not None:
                    also(self._conn)
            self._published_up_to = self._left = 0
        failpoints.hit("consumer.after-ack-table")
        for one in prepared:
            writer.commit(one.entry_hash)
        failpoints.hit("consumer.before-ack-publish")
        self._publish(prepared)

    def _publish(self, prepared: Sequence[Prepared]) -> None:
        for one in prepared:
            entry = one.entry
            key = names.audit_key(entry.chain, entry.epoch, entry.incarnation, entry.sequence)
            self._under_way.append(one.entry_hash)
            try:
                self._produce(key, one.encoded)
            except KafkaException as error:
                raise from_exception(error, f"write to topic {self._place.topic}") from error
            self.entries += 1
            self.bytes += len(one.encoded)

    def _produce(self, key: bytes, value: bytes) -> None:
        """Queue a record; where the queue is full, wait until Kafka has taken some."""
        deadline = time.monotonic() + FLUSH_SECONDS
        while True:
            try:
                self._producer.produce(
                    self._place.topic,
                    value,
                    key=key,
                    partition=self._place.partition,
                    on_delivery=self._delivered,
                )
            except BufferError:
                self._producer.poll(0.05)
                self._raise_failure()
                if time.monotonic() > deadline:
                    raise _no_answer() from None
            else:
                return

    def _delivered(self, error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            self._failure = self._failure or kafka_error(error, f"write to topic {self._place.topic}")
            return
        self._under_way.popleft()
        if not self._under_way:
            failpoints.hit("consumer.after-ack-publish")

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _open_writer(self) -> ChainWriter:
        if self._writer is None:
            raise TransientError("the acknowledgement chain is not open yet")
        return self._writer


def _no_answer() -> TransientError:
    return TransientError("Kafka does not acknowledge our entries", hint="it is tried again")


def _copied(manifest: AuditEntry) -> dict[str, Any]:
    """What an acknowledgement repeats of its manifest."""
    same = (
        "source_node_id",
        "batch",
        "batch_lsn_start",
        "batch_lsn_end",
        "tables_affected",
        "row_count",
        "record_count",
        "contains_pci",
        "pci_columns",
        "dek_id",
        "kek_id",
        "algorithm",
        "continues",
    )
    return {name: getattr(manifest, name) for name in same}
