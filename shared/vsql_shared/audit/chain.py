"""Reading and writing a chain of audit entries: the rules of docs/design/0001-wire-and-chain.md as code.

Not here: Kafka, tables, and what a batch holds. Pure: bytes in, values out.

Rules (numbers as on the design page):
1. Entries of other chains are passed over; of this one, the signature is verified before all else.
2. `epoch_opened` that extends the head by one epoch and one sequence is accepted; a race's loser is void.
3. Any other entry of the head's epoch and incarnation extends the head exactly, or repeats it byte by byte.
   In a chain of acknowledgements it may repeat any entry that was accepted: their writer publishes what its
   table has again where it cannot know that Kafka has it. A reader remembers the last entries only; beyond
   them, a place that is taken is taken.
4. Entries of an older epoch, or of another incarnation, are void. A later, never opened epoch is an error.
5. Where a chain, or its writer's living key, says that another key of the writer ended (key_ends.py), entries
   by that key behind its end, and those that do not lead to it, are void.

Every reader comes to the same head at the same entry: it depends only on the entries before it.
"""

from __future__ import annotations

import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from vsql_shared import lsn
from vsql_shared.audit import chain_names
from vsql_shared.audit.dsse import (
    AUDIT_ENTRY,
    SignedDocument,
    document_hash,
    sign_document,
    verify_document,
)
from vsql_shared.audit.entries import (
    BATCH_EVENTS,
    EPOCH_OPENED,
    REPLICATION_BATCH,
    ZERO_HASH,
    AuditEntry,
    peek_chain,
    signed_place,
)
from vsql_shared.audit.key_ends import EndsSoFar
from vsql_shared.audit.tree import Tree, grow
from vsql_shared.errors import ChainError, DecodeError, KeyEndedError, SignatureError

if TYPE_CHECKING:
    from vsql_shared.crypto.signing import Signer, TrustStore

writer_of, acknowledges = chain_names.writer_of, chain_names.acknowledges


@dataclass(frozen=True, slots=True)
class ChainHead:
    """What a reader must remember of a chain to go on reading or writing it.

    `lsn_end` is the batch_lsn_end of the last batch that finished its transaction, or where an epoch of the
    source began behind that; `unfinished_from` the sequence of the first fragment of a transaction that is
    still under way, 0 when there is none. `tree` is that of all entries up to here (tree.py); empty where the
    head was stored without one.
    """

    epoch: int = 0
    incarnation: bytes = bytes(16)
    sequence: int = 0
    entry_hash: bytes = ZERO_HASH
    batch: int = 0
    lsn_end: int = 0
    unfinished_from: int = 0
    event_timestamp: int = 0
    system_identifier: str = ""
    timeline: int = 0
    tree: Tree = ()


EMPTY_HEAD = ChainHead()
"""Head of a chain without entries."""
REMEMBERED_ENTRIES = 4_096
"""Hashes of accepted entries a reader keeps, to tell a repetition from a fork."""


class Accepted(NamedTuple):
    """An entry that extends the chain; `new_head` is already the reader's."""

    entry: AuditEntry
    entry_hash: bytes
    new_head: ChainHead


class Void(NamedTuple):
    """A genuine entry that does not count: it lost a race, is of a fenced-off writer, or repeats the head."""

    reason: str


class Prepared(NamedTuple):
    """A signed entry, ready to send."""

    entry: AuditEntry
    encoded: bytes
    entry_hash: bytes


def void_reason(head: ChainHead, entry: AuditEntry, entry_hash: bytes) -> str:
    """Why a genuine entry does not count after `head`, or '' when it must extend it (rules 2 to 4)."""
    if entry.event_type == EPOCH_OPENED:
        extends = (
            entry.epoch == head.epoch + 1
            and entry.sequence == head.sequence + 1
            and entry.prev_event_hash == head.entry_hash
        )
        if not extends and entry.epoch <= head.epoch + 1:
            return f"opens epoch {entry.epoch} at sequence {entry.sequence}, but lost the race for it"
        return ""
    if entry.epoch < head.epoch:
        return f"of epoch {entry.epoch}, which ended"
    if entry.epoch == head.epoch and entry.incarnation != head.incarnation:
        return f"of an incarnation that did not win epoch {entry.epoch}"
    if entry.epoch == head.epoch and entry_hash == head.entry_hash:
        return "a repetition of the entry before"
    return ""


def advance(head: ChainHead, entry: AuditEntry, entry_hash: bytes, where: str = "") -> ChainHead:
    """Give the head after an entry that must extend `head`. Raises ChainError, naming expected and actual."""

    def refuse(what: str) -> ChainError:
        return ChainError(f"chain {entry.chain}: {what}", record=where)

    opens = entry.event_type == EPOCH_OPENED
    if entry.epoch != head.epoch + opens:
        raise refuse(f"entry {entry.sequence} is of epoch {entry.epoch}, which was never opened")
    if not opens and entry.incarnation != head.incarnation:
        raise refuse(f"entry {entry.sequence} is not of the incarnation that opened epoch {head.epoch}")
    if entry.sequence != head.sequence + 1:
        kind = "gap" if entry.sequence > head.sequence else "fork"
        raise refuse(f"{kind}: expected sequence {head.sequence + 1}, got {entry.sequence}")
    if entry.prev_event_hash != head.entry_hash:
        raise refuse(
            f"fork: entry {entry.sequence} follows {entry.prev_event_hash.hex()}, "
            f"expected {head.entry_hash.hex()}"
        )
    if opens and entry.ref_sequence != head.unfinished_from:
        raise refuse(
            f"epoch {entry.epoch} abandons fragments from sequence {entry.ref_sequence}, "
            f"expected {head.unfinished_from}"
        )
    return _moved(head, entry, entry_hash, refuse)


def _moved(
    head: ChainHead, entry: AuditEntry, entry_hash: bytes, refuse: Callable[[str], ChainError]
) -> ChainHead:
    """The new head; manifests must count their batches one by one, acknowledgements only upwards."""
    batch, lsn_end, unfinished = head.batch, head.lsn_end, head.unfinished_from
    if entry.event_type == EPOCH_OPENED:
        unfinished = 0
        if not acknowledges(entry.chain):
            lsn_end = max(lsn_end, entry.batch_lsn_start)
    elif entry.event_type in BATCH_EVENTS and entry.batch:
        manifest = entry.event_type == REPLICATION_BATCH
        if entry.batch <= batch or (manifest and entry.batch != batch + 1):
            raise refuse(f"entry {entry.sequence} has batch number {entry.batch} after {batch}")
        batch = entry.batch
        if not entry.continues:
            lsn_end, unfinished = entry.batch_lsn_end, 0
        elif manifest:
            # Only what is applied can be abandoned: acknowledgements of fragments stand once written.
            unfinished = unfinished or entry.sequence
    return ChainHead(
        epoch=entry.epoch,
        incarnation=entry.incarnation,
        sequence=entry.sequence,
        entry_hash=entry_hash,
        batch=batch,
        lsn_end=lsn_end,
        unfinished_from=unfinished,
        event_timestamp=entry.event_timestamp,
        system_identifier=entry.system_identifier,
        timeline=entry.timeline,
        tree=grow(head.tree, head.sequence, entry_hash),
    )


def hole_before(head: ChainHead, entry: AuditEntry) -> str:
    """What an `epoch_opened` after `head` says its source never sent, in words; '' if nothing."""
    if entry.event_type != EPOCH_OPENED or not 0 < head.lsn_end < entry.batch_lsn_start:
        return ""
    if acknowledges(entry.chain):
        return ""  # its positions are of two servers
    return (
        f"chain {entry.chain} ended at {lsn.text(head.lsn_end)}, and epoch {entry.epoch} begins at"
        f" {lsn.text(entry.batch_lsn_start)}, where its source's replication slot was made, or taken over"
    )


class ChainReader:
    """Reads one chain entry by entry, in the order of its partition, from `head` on.

    `pruned`: entries up to this sequence may be there or not, because the chain was pruned: passed over.
    After an error the reader stays at its head: the stream stops there until an operator decides.
    """

    def __init__(
        self,
        cluster: str,
        chain: str,
        writer_node: str,
        trust: TrustStore,
        head: ChainHead = EMPTY_HEAD,
        pruned: int = 0,
    ) -> None:
        self.cluster = cluster
        self.chain = chain
        self.writer_node = writer_node
        self.head = head
        self._trust = trust
        self._pruned = pruned
        self._recent: OrderedDict[int, bytes] = OrderedDict()
        self._acknowledges = acknowledges(chain)
        self._ends = EndsSoFar(chain)

    def accept(self, encoded: bytes, where: str) -> Accepted | Void | None:
        """Take the next document of the partition; `where` names it in errors (topic/partition/offset).

        None: another chain's. Void: genuine, does not count.
        Raises ChainError, SignatureError or DecodeError.
        """
        try:
            document = SignedDocument.decode(encoded)
            entry = self._verified(document)
        except DecodeError as error:
            raise DecodeError(f"{error.message} [{where}]", hint=error.hint) from error
        except (SignatureError, ChainError) as error:
            error.record = where
            if isinstance(error, KeyEndedError) and error.said:
                return Void(error.message)
            raise
        if entry is None:
            return None
        if entry.sequence <= self._pruned:
            return Void("below the base the chain was pruned at")
        entry_hash = document_hash(encoded)
        reason = self._uncounted(entry, entry_hash, document.signer)
        reason = reason or void_reason(self.head, entry, entry_hash) or self._repeats(entry, entry_hash)
        if reason:
            return Void(reason)
        head = advance(self.head, entry, entry_hash, where)
        self._ends.take(entry, document.signer, entry_hash)
        self.head = head
        self._recent[entry.sequence] = entry_hash
        if len(self._recent) > REMEMBERED_ENTRIES:
            self._recent.popitem(last=False)
        return Accepted(entry, entry_hash, self.head)

    def _uncounted(self, entry: AuditEntry, entry_hash: bytes, signer: str) -> str:
        """Why an entry by a key that has ended does not count (rule 5), or ''."""
        if entry.sequence > self.head.sequence and self._ends.behind(signer):
            return f"signed by key {signer}, which ended before"
        return self._trust.strays(self.writer_node, signer, self.chain, entry.sequence, entry_hash)

    def _repeats(self, entry: AuditEntry, entry_hash: bytes) -> str:
        """Why an entry whose place is taken is void; '' when it is not, or when it is a fork."""
        head = self.head
        if not self._acknowledges or (entry.epoch, entry.incarnation) != (head.epoch, head.incarnation):
            return ""
        if entry.sequence >= head.sequence or entry.event_type == EPOCH_OPENED:
            return ""
        known = self._recent.get(entry.sequence, entry_hash)
        return "a repetition of an entry before" if known == entry_hash else ""

    def _verified(self, document: SignedDocument) -> AuditEntry | None:
        # 1. Recognise other chains by what they claim: a wrong claim here can only hide an entry, and a
        #    hidden entry is a gap at the next one.
        if document.payload_type == AUDIT_ENTRY and peek_chain(document.payload)[1] != self.chain:
            return None
        # 2. The signature, by a key pinned for this chain's writer (forged or altered entries).
        payload = verify_document(self._trust, self.writer_node, document, AUDIT_ENTRY, signed_place)
        entry = AuditEntry.decode(payload)
        if entry.sequence > self.head.sequence:
            last = self.head.event_timestamp
            self._trust.require_not_followed(self.writer_node, document.signer, self.chain, last)
        # 3. Not a genuine entry of another cluster with equal names, nor in another node's name (replay).
        if entry.cluster != self.cluster:
            raise ChainError(
                f"chain {self.chain}: entry {entry.sequence} is of cluster {entry.cluster!r}, "
                f"expected {self.cluster!r}"
            )
        if entry.signer_node_id != self.writer_node:
            raise ChainError(
                f"chain {self.chain}: entry {entry.sequence} names signer {entry.signer_node_id!r}, "
                f"expected {self.writer_node!r}"
            )
        return entry


def new_incarnation() -> bytes:
    """A random UUID: names the process that opens an epoch."""
    return uuid.uuid4().bytes


class ChainWriter:
    """Makes the next entries of a chain: fills in identity, order, link and signature.

    Two heads: `head` is what was committed (`commit`), `tip` is what the next entry links to.

    * `next` makes one entry at a time and refuses to make another before `commit`.
    * `prepare` may run ahead: several entries can be under way, linked to each other. `commit` then takes
      them in the same order.

    An entry whose fate is unknown ends the writer: read the chain again and open a new epoch with a new one.
    Nothing can be taken back, because what was signed may lie in Kafka. `node` is for writers without a
    signer (dev mode).
    """

    def __init__(
        self,
        signer: Signer | None,
        cluster: str,
        chain: str,
        head: ChainHead,
        incarnation: bytes,
        *,
        node: str = "",
    ) -> None:
        name = signer.node if signer is not None else node
        if not name or (node and node != name):
            raise ChainError(f"chain {chain}: the writer's node is {node!r}, the signer's {name!r}")
        self.cluster, self.chain, self.node = cluster, chain, name
        self.incarnation = incarnation
        self.head = self.tip = head
        self._signer = signer
        self._pending: deque[ChainHead] = deque()

    @property
    def is_open(self) -> bool:
        """True once this writer's own `epoch_opened` is the tip or below it."""
        return self.tip.epoch > 0 and self.tip.incarnation == self.incarnation

    def open_epoch(
        self, *, lsn: int, system_identifier: str, timeline: int, source_node_id: str = "", **fields: Any
    ) -> Prepared:
        """Make the entry that opens the next epoch and says from where fragments are abandoned.

        `source_node_id` is the node whose changes the chain is about; this node when left out.
        """
        if self._pending:
            raise ChainError(f"chain {self.chain}: {len(self._pending)} entries are not committed yet")
        return self._build(
            event_type=EPOCH_OPENED,
            epoch=self.tip.epoch + 1,
            source_node_id=source_node_id or self.node,
            batch_lsn_start=lsn,
            batch_lsn_end=lsn,
            ref_sequence=self.tip.unfinished_from,
            system_identifier=system_identifier,
            timeline=timeline,
            **fields,
        )

    def next(self, **fields: Any) -> Prepared:
        """Make the next entry from AuditEntry's fields; the writer fills in what is its own."""
        if self._pending:
            raise ChainError(f"chain {self.chain}: {len(self._pending)} entries are not committed yet")
        return self.prepare(**fields)

    def prepare(self, **fields: Any) -> Prepared:
        """Like `next`, linked to the entry prepared last, committed or not."""
        if not self.is_open:
            raise ChainError(f"chain {self.chain}: this writer has not opened its epoch")
        identity = {"system_identifier": self.tip.system_identifier, "timeline": self.tip.timeline}
        return self._build(epoch=self.tip.epoch, **{**identity, **fields})

    def commit(self, entry_hash: bytes) -> ChainHead:
        """Take the oldest prepared entry as durable; entries commit in the order they were made."""
        if not self._pending or self._pending[0].entry_hash != entry_hash:
            raise ChainError(f"chain {self.chain}: {entry_hash.hex()} is not the next entry to commit")
        self.head = self._pending.popleft()
        return self.head

    def _build(self, **fields: Any) -> Prepared:
        """Sign, then hold the result against the same rules every reader applies."""
        defaults = {
            "event_id": uuid.uuid4().bytes,
            "event_timestamp": time.time_ns() // 1000,
            "source_node_id": self.node,
        }
        entry = AuditEntry(
            cluster=self.cluster,
            chain=self.chain,
            incarnation=self.incarnation,
            sequence=self.tip.sequence + 1,
            prev_event_hash=self.tip.entry_hash,
            signer_node_id=self.node,
            **{**defaults, **fields},
        )
        encoded = sign_document(self._signer, AUDIT_ENTRY, entry.encode())
        entry_hash = document_hash(encoded)
        self.tip = advance(self.tip, entry, entry_hash)
        self._pending.append(self.tip)
        return Prepared(entry, encoded, entry_hash)
