"""A live stream that begins after its first copy: what the copy covers is passed over without its records.

Not here: applying the copy (copying.py) and leaving out rows the copy has seen (apply.py). Procedure, once,
before anything of the stream was applied (docs/design/0006, "A target that joins later"):

1. The chain is read from its first entry: every signature and link is verified as ever, no record is asked
   for. Where the chain was pruned it says so itself (`trail_pruned`), and is read from the base it names
   last.
2. It is read as long as each batch ends at or below the position of *every* table's copy and names only
   tables that were copied (a batch that straddles the position, a table the copy does not have, a copy that
   was declined: none of their rows may be left out).
3. The stream begins behind the last `epoch_opened` found so: an epoch leaves no transaction unfinished and
   sends every descriptor again. What its own batches hold from before the copy is left out row by row.
4. Progress and a receipt with the number of covered changes are one transaction; the receipt becomes a signed
   `batch_covered`. So nothing is passed over in silence, and the counts of both sides still agree.

A record that does not verify stops it, by name, until an operator decides: as for every reader.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from vsql_consumers import state
from vsql_consumers.quarantine import parse_table
from vsql_consumers.source import read_chain
from vsql_consumers.state import Position, Receipt
from vsql_consumers.verify import record_name
from vsql_shared import failpoints, lsn, names
from vsql_shared.audit.base import base_in
from vsql_shared.audit.chain import EMPTY_HEAD, Accepted, ChainHead, ChainReader
from vsql_shared.audit.checkpoint import Log
from vsql_shared.audit.dsse import AUDIT_ENTRY, SignedDocument, verify_document
from vsql_shared.audit.entries import COVERED, EPOCH_OPENED, REPLICATION_BATCH, AuditEntry, signed_place
from vsql_shared.audit.merkle import EMPTY_ROOT
from vsql_shared.changes import SIGNALS, TableName
from vsql_shared.errors import DecodeError, RecordError, SignatureError, VerificationError

if TYPE_CHECKING:
    from vsql_consumers.apply import Applier
    from vsql_consumers.collected import Decisions
    from vsql_consumers.means import Means
    from vsql_shared.crypto.signing import TrustStore
    from vsql_shared.pg.connect import Connection

_log = logging.getLogger(__name__)

# Messages begin at the copy's position, and a copy brings its sequences (docs/design/0007).
_NO_TABLES = frozenset(SIGNALS.values())


class JoinPoint(NamedTuple):
    """Where a stream begins; what lies below: batches that count, their changes, one receipt for all.

    No receipt: every batch the copy covers was pruned.
    """

    position: Position
    batches: int
    rows: int
    receipts: tuple[Receipt, ...]


@dataclass(slots=True)
class _Sum:
    """Batches and their changes."""

    batches: int = 0
    rows: int = 0

    def add(self, batches: int, rows: int) -> None:
        self.batches, self.rows = self.batches + batches, self.rows + rows


class JoinScan:
    """Steps 1 to 3, entry by entry; `point` is the answer so far."""

    def __init__(self, reader: ChainReader, copied: Mapping[TableName, int]) -> None:
        """`copied`: table → position of its copy; not empty."""
        self._reader = reader
        self._is_pruned = reader.head.sequence > 0
        self._copied = frozenset(copied)
        self._upto = min(copied.values())
        self._whole, self._open = _Sum(), _Sum()
        self._last: tuple[AuditEntry, bytes] | None = None
        self.point: JoinPoint | None = None

    def feed(self, offset: int, encoded: bytes, where: str) -> bool:
        """Take the next record of the audit partition; False when what follows is not covered.

        Raises VerificationError, with the sequence of the entry that was due.
        """
        due = self._reader.head.sequence + 1
        try:
            return self._feed(offset, encoded, where)
        except DecodeError as error:
            refused = RecordError(f"no entry of a chain: {error.message}", record=where, hint=error.hint)
            refused.sequence = due
            raise refused from error
        except VerificationError as error:
            error.record, error.sequence = error.record or where, due
            raise

    def _feed(self, offset: int, encoded: bytes, where: str) -> bool:
        found = self._reader.accept(encoded, where)
        if not isinstance(found, Accepted):
            return True
        entry = found.entry
        if entry.event_type == EPOCH_OPENED:
            self._open = _Sum()  # fragments without an end are void
            self._note(Position(found.new_head, offset + 1))
        elif entry.event_type == REPLICATION_BATCH:
            return self._take(entry, encoded, where)
        return True

    def _take(self, entry: AuditEntry, encoded: bytes, where: str) -> bool:
        try:
            tables = {parse_table(text) for text in entry.tables_affected}
        except DecodeError as error:
            raise RecordError(error.message, record=where) from error
        # A fragment's own end says nothing; the last one of its transaction has the position of the commit.
        if (
            not tables
            or not tables - _NO_TABLES <= self._copied
            or (not entry.continues and entry.batch_lsn_end > self._upto)
        ):
            return False
        self._open.add(1, entry.row_count)
        if not entry.continues:
            self._whole.add(self._open.batches, self._open.rows)
            self._open, self._last = _Sum(), (entry, encoded)
        return True

    def _note(self, position: Position) -> None:
        if self._last is None:
            if self._is_pruned:
                self.point = JoinPoint(position, 0, 0, ())
            return
        entry, encoded = self._last
        verdicts = {COVERED: self._whole.rows}
        receipt = Receipt(entry.sequence, entry.epoch, entry.batch, encoded, EMPTY_ROOT, verdicts)
        self.point = JoinPoint(position, self._whole.batches, self._whole.rows, (receipt,))


def first_position(
    means: Means,
    applier: Applier,
    position: Position,
    copied: Mapping[TableName, int],
    decisions: Decisions,
) -> Position:
    """Where a live stream goes on: its stored position, or behind what its first copy covers.

    Called under the stream's replication origin, before acknowledgements are brought level.
    """
    if means.stream.kind != "live" or position.head.batch or not copied:
        return position
    point = _scan(means, copied, decisions)
    if point is None or point.position.head.sequence <= position.head.sequence:
        return position
    _commit(means.stream.chain, applier, point)
    _log.info(
        "what the first copy covers was passed over",
        extra={
            "sequence": point.position.head.sequence,
            "batches": point.batches,
            "rows": point.rows,
            "copy_lsn": lsn.text(min(copied.values())),
        },
    )
    return point.position


def _scan(means: Means, copied: Mapping[TableName, int], decisions: Decisions) -> JoinPoint | None:
    """Read the chain as far as it is covered. Records an operator ignores are passed over here, too."""
    settings, stream = means.settings, means.stream
    cluster = settings.cluster.name
    topic, partition = names.audit_topic(cluster), stream.audit_partition
    group = names.group_id(cluster, stream.chain, settings.cluster.node_name)
    client = f"vsql-sync-consumer-{stream.chain}"

    def entries() -> Iterator[tuple[int, bytes]]:
        return read_chain(settings, client, group, (topic, partition), stream.chain, 0)

    head = pruned_at((encoded for _, encoded in entries()), Log(cluster, stream.chain), means.trust)
    reader = ChainReader(cluster, stream.chain, stream.origin, means.trust, head, pruned=head.sequence)
    scan = JoinScan(reader, copied)
    for offset, encoded in entries():
        if means.stop.is_set():
            return None
        if (topic, partition, offset) in decisions.ignored:
            continue
        try:
            if not scan.feed(offset, encoded, record_name(topic, partition, offset)):
                break
        except VerificationError as error:
            if error.sequence not in decisions.skipped:
                raise
            break  # what an operator skips, the collector passes over
    return scan.point


def pruned_at(documents: Iterable[bytes], log: Log, trust: TrustStore) -> ChainHead:
    """The base a chain says last that it was pruned at; EMPTY_HEAD where it says none.

    Its writer has signed it, and that it follows is what reading on from it shows. Whether another target
    cosigned the checkpoint is for whoever knows that target's key: this node may not.
    """
    found = EMPTY_HEAD
    for encoded in documents:
        try:
            document = SignedDocument.decode(encoded)
            if document.payload_type != AUDIT_ENTRY:
                continue
            payload = verify_document(trust, log.writer, document, AUDIT_ENTRY, signed_place)
            entry = AuditEntry.decode(payload)
            base = base_in(entry) if (entry.cluster, entry.chain) == log else None
        except (DecodeError, SignatureError):
            continue  # whoever reads the chain names it
        if base is not None and base.head.sequence > found.sequence:
            base.require_tree(log)
            found = base.head
    return found


def _commit(chain: str, applier: Applier, point: JoinPoint) -> None:
    """Progress and receipt, in one transaction of the stream's origin."""

    def write(conn: Connection) -> None:
        state.save_receipts(conn, chain, point.receipts)
        state.save_position(conn, chain, point.position)

    failpoints.hit("consumer.before-join-commit")
    applier.finish(point.position.head.lsn_end, time.time_ns() // 1000, write)
    failpoints.hit("consumer.after-join-commit")
