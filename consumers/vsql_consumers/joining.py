"""A live stream that begins after its first copy: what the copy covers is passed over without its records.

Not here: applying the copy (copying.py) and leaving out rows the copy has seen (apply.py). Procedure, once,
before anything of the stream was applied (docs/design/0006, "A target that joins later"):

1. The chain is read from its first entry: every signature and link is verified as ever, no record is asked
   for. Where the chain was pruned it says so itself (`trail_pruned`), and is read from the base it names
   last. What lies below that base is covered as a batch is: it ends at or below every copy's position, with
   no transaction under way, and names only tables that were copied. Else nothing is passed over.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from vsql_consumers import state
from vsql_consumers.quarantine import parse_table
from vsql_consumers.source import read_chain
from vsql_consumers.state import Position, Receipt
from vsql_consumers.verify import record_name
from vsql_shared import failpoints, lsn, names
from vsql_shared.audit.base import Base, base_in
from vsql_shared.audit.chain import EMPTY_HEAD, Accepted, ChainReader, hole_before
from vsql_shared.audit.checkpoint import Log
from vsql_shared.audit.dsse import AUDIT_ENTRY, SignedDocument, verify_document
from vsql_shared.audit.entries import (
    COVERED,
    EPOCH_OPENED,
    REPLICATION_BATCH,
    TRAIL_PRUNED,
    AuditEntry,
    signed_place,
)
from vsql_shared.audit.merkle import EMPTY_ROOT
from vsql_shared.changes import SIGNALS, TableName
from vsql_shared.errors import ChainError, DecodeError, RecordError, SignatureError, VerificationError

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

    def __init__(
        self, reader: ChainReader, copied: Mapping[TableName, int], base: Base | None = None
    ) -> None:
        """`copied`: table → position of its copy; not empty. `base`: where the reader begins."""
        self._reader = reader
        self._is_pruned = base is not None
        self._copied = frozenset(copied)
        self._upto = min(copied.values())
        self.is_covered = base is None or self._covers(base)
        self._whole, self._open = _Sum(), _Sum()
        self._last: tuple[AuditEntry, bytes] | None = None
        self.point: JoinPoint | None = None

    def feed(self, offset: int, encoded: bytes, where: str) -> bool:
        """Take the next record of the audit partition; False when what follows is not covered.

        Raises VerificationError, with the sequence of the entry that was due.
        """
        due = self._reader.head.sequence + 1
        if not self.is_covered:
            return False
        try:
            return self._feed(offset, encoded, where)
        except DecodeError as error:
            refused = RecordError(f"no entry of a chain: {error.message}", record=where, hint=error.hint)
            refused.sequence = due
            raise refused from error
        except VerificationError as error:
            error.record, error.sequence = error.record or where, due
            raise

    def _covers(self, base: Base) -> bool:
        """Whether the copy has every row of the batches that were pruned."""
        try:
            tables = {parse_table(text) for text in base.tables}
        except DecodeError:
            return False  # what no table's name is, no copy has
        return (
            tables - _NO_TABLES <= self._copied
            and base.head.lsn_end <= self._upto
            and not base.head.unfinished_from
        )

    def _feed(self, offset: int, encoded: bytes, where: str) -> bool:
        before = self._reader.head
        found = self._reader.accept(encoded, where)
        if not isinstance(found, Accepted):
            return True
        entry = found.entry
        if hole_before(before, entry) and entry.batch_lsn_start > self._upto:
            return False  # the stream says it, where it comes to it
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
        for offset, encoded in read_chain(settings, client, group, (topic, partition), stream.chain, 0):
            if means.stop.is_set():
                return
            if (topic, partition, offset) not in decisions.ignored:
                yield offset, encoded

    log = Log(cluster, stream.chain)
    base = pruned_at(lambda: (encoded for _, encoded in entries()), log, means.trust)
    head = EMPTY_HEAD if base is None else base.head
    reader = ChainReader(cluster, stream.chain, stream.origin, means.trust, head, pruned=head.sequence)
    scan = JoinScan(reader, copied, base)
    if base is not None and not scan.is_covered:
        _log.error(
            "the first copy does not have all that was pruned from the chain: copy again, every table",
            extra={
                "size": base.head.sequence,
                "needs_lsn": lsn.text(base.head.lsn_end),
                "copy_lsn": lsn.text(min(copied.values())),
                "tables": list(base.tables),
            },
        )
    for offset, encoded in entries():
        try:
            if not scan.feed(offset, encoded, record_name(topic, partition, offset)):
                break
        except VerificationError as error:
            if error.sequence not in decisions.skipped:
                raise
            break  # what an operator skips, the collector passes over
    return None if means.stop.is_set() else scan.point


def pruned_at(read: Callable[[], Iterable[bytes]], log: Log, trust: TrustStore) -> Base | None:
    """The base a chain must be read from; None where it can be read from its first entry, or from nowhere.

    `read` begins anew each time.

    1. Entries that say a base, signed by the chain's writer; the checkpoint holds the head and the writer
       signed it. Whether a target cosigned it is for whoever knows that target's key: this node may not.
    2. The lowest start counts that leads on: the first entry, else a base, once the chain that is read and
       verified from there as ever has that very entry. Only entries that are missing lead to a higher one.
       So what a key signed after its end is held against genuine entries, never against a head it named
       itself (an entry dated back, one in the place of an entry this node is told it had seen).
    """
    said = sorted(_said(read(), log, trust), key=lambda one: one.head.sequence)
    for base in (None, *said) if said else ():
        leads = _leads_on(read(), log, trust, base)
        if leads:
            return base
        if leads is None:
            break
    return None


def _said(documents: Iterable[bytes], log: Log, trust: TrustStore) -> set[Base]:
    """Step 1. What does not verify is named by whoever reads the chain."""
    found = set()
    for encoded in documents:
        try:
            document = SignedDocument.decode(encoded)
            # A signature takes long, and such entries are rare.
            if document.payload_type != AUDIT_ENTRY or TRAIL_PRUNED.encode() not in document.payload:
                continue
            payload = verify_document(trust, log.writer, document, AUDIT_ENTRY, signed_place)
            entry = AuditEntry.decode(payload)
            base = base_in(entry) if (entry.cluster, entry.chain) == log else None
            if base is not None:
                base.verify(log, trust.keys_of(log.writer), cosigned=False)
                found.add(base)
        except (DecodeError, VerificationError):
            continue
    return found


def _leads_on(documents: Iterable[bytes], log: Log, trust: TrustStore, base: Base | None) -> bool | None:
    """Step 2 for one start: whether the chain goes on from there and says so; None where it is a fork.

    Records that are no entries of the chain are passed over: whoever reads the chain names them.
    """
    head = EMPTY_HEAD if base is None else base.head
    reader = ChainReader(log.cluster, log.chain, log.writer, trust, head, pruned=head.sequence)
    for encoded in documents:
        try:
            found = reader.accept(encoded, "")
            if base is not None and isinstance(found, Accepted) and base_in(found.entry) == base:
                return True
        except ChainError:
            entry = AuditEntry.decode(SignedDocument.decode(encoded).payload)
            if (entry.cluster, entry.chain) == log:
                return False if entry.sequence > reader.head.sequence + 1 else None
        except (DecodeError, SignatureError):
            continue
    return base is None


def _commit(chain: str, applier: Applier, point: JoinPoint) -> None:
    """Progress and receipt, in one transaction of the stream's origin."""

    def write(conn: Connection) -> None:
        state.save_receipts(conn, chain, point.receipts)
        state.save_position(conn, chain, point.position)

    failpoints.hit("consumer.before-join-commit")
    applier.finish(point.position.head.lsn_end, time.time_ns() // 1000, write)
    failpoints.hit("consumer.after-join-commit")
