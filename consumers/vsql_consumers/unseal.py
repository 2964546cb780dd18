"""Open a verified batch: announced data keys, decryption, pieces joined, descriptors taken out.

Not here: whether the records are those that were signed (verify.py). Pure but for the KEK provider it is
given. Rules:

* A key counts when its announcement is signed by the chain's origin and says this cluster, chain and
  dek_id. Announced again under another KEK version it differs in its wrapping only, and the later one counts.
* Every record opens, or nothing of the batch is given on; the error names the Kafka record.
* A descriptor's plaintext must hash to what its pack names and describe the pack's table; a tuple's
  descriptor must have come before it, in this batch or an earlier one.
* Pieces join in source order, table by table, and end within the batch.
* No plaintext, key or column value is in any error.
* Keys are used in the order they are made. So announcements of keys older than the one in use are dropped,
  those of later ones are held up to a limit, and the keys topic waits; while a key is wanted that is not
  among them, the oldest make room. What is missing then is looked for in all of the topic (intake.py).
* A key that was destroyed on purpose (shredded.py) leaves memory at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vsql_consumers.verify import Part, VerifiedBatch, batch_name, record_name
from vsql_shared.audit.dsse import SignedDocument, verify_document
from vsql_shared.changes import Op, OpenedBatch, Relation, TableName
from vsql_shared.crypto.announce import (
    MEDIA_TYPE,
    KeyAnnouncement,
    KeyRing,
    decode_announcement,
    same_key,
    signed_at,
)
from vsql_shared.crypto.seal import open_tuples
from vsql_shared.errors import DecodeError, KeyEndedError, RecordError, SignatureError, UnsealError
from vsql_shared.wire.pack import (
    PackHeader,
    decode_relation,
    decode_tuples,
    header_digest,
    relation_hash,
)

if TYPE_CHECKING:
    from vsql_shared.audit.entries import AuditEntry
    from vsql_shared.crypto.dek import OpeningKey
    from vsql_shared.crypto.signing import TrustStore
    from vsql_shared.kms.base import KekProvider


class Announcements:
    """Verified announcements of one chain's data keys, as read from the keys topic, and their keys."""

    def __init__(
        self,
        cluster: str,
        chain: str,
        origin: str,
        trust: TrustStore,
        ring: KeyRing,
        first_epoch: int = 0,
        held: int = 1_000,
    ) -> None:
        """`held`: announcements kept at most."""
        self._cluster, self._chain, self._origin, self._trust = cluster, chain, origin, trust
        self._ring, self._first_epoch, self._held = ring, first_epoch, held
        self._known: dict[str, KeyAnnouncement] = {}
        self.wanted = ""
        """The key a batch waits for; '' for none."""
        self.next_offset = 0
        """Next offset of the keys topic; all before it was taken."""

    def __len__(self) -> int:
        return len(self._known)

    @property
    def full(self) -> bool:
        """Whether the keys topic is to wait: as many as are held came and were not asked for."""
        return len(self._known) >= self._held and (not self.wanted or self.wanted in self._known)

    @property
    def satisfied(self) -> bool:
        """Whether there is no reason to read on now."""
        return self.wanted in self._known or self.full

    def feed(self, topic: str, partition: int, offset: int, key: bytes | None, value: bytes | None) -> None:
        """Take one record of the keys topic. Raises with the record named when it is of our chain and bad.

        1. A tombstone removes nothing here: a key that is in use stays.
        2. Only documents of our chain concern us; what cannot be read might, and is refused.
        3. Those of an epoch that is over concern nobody any more, and their signers may be revoked since.
        4. Signed by the origin; cluster, chain and origin as expected; filed under its own dek_id.
        5. Never a second key under one dek_id; another wrapping of the same one takes the former's place.
        """
        self.next_offset = max(self.next_offset, offset + 1)
        if value is None:
            return
        where = record_name(topic, partition, offset)
        try:
            document = SignedDocument.decode(value)
            said = decode_announcement(document.payload)
            if said.chain != self._chain or said.epoch < self._first_epoch:
                return
            found = self._verified(document, said)
        except DecodeError as error:
            raise RecordError(f"not a key announcement: {error.message}", record=where) from error
        except SignatureError as error:
            error.record = where
            raise
        if found is None:
            return
        self._check(found, key, where)
        self._known[found.dek_id] = found
        while len(self._known) > self._held and self.wanted:
            del self._known[next(iter(self._known))]

    def feed_again(
        self, wanted: str, topic: str, partition: int, offset: int, key: bytes | None, value: bytes | None
    ) -> None:
        """Take one record of those that were read before, or are to come: as `feed`, of fewer keys.

        Of the key that is wanted, and of those held: where one was announced again, those after it were, and
        to look through the whole topic for each of them takes for ever.
        """
        name = "" if key is None else key.decode(errors="replace")
        if name == wanted or self.knows(name):
            self.feed(topic, partition, offset, key, value)

    def _verified(self, document: SignedDocument, said: KeyAnnouncement) -> KeyAnnouncement | None:
        """Step 4; None where its signer has ended, and nothing depends on it. Raises SignatureError.

        Entries a revoked key is trusted for need their data keys, too. Their tuples are fixed by the signed
        roots: a thief's announcement can keep them from opening, as any garbage here can, and nothing more.
        It takes no other announcement's place.
        """
        try:
            payload = verify_document(self._trust, self._origin, document, MEDIA_TYPE, signed_at)
            return decode_announcement(payload)
        except KeyEndedError:  # its signature holds; whether what the key sealed counts, the manifest says
            counts = self._trust.known_up_to(self._origin, document.signer, self._chain) > 0
            return said if counts and said.dek_id not in self._known else None

    def _check(self, found: KeyAnnouncement, key: bytes | None, where: str) -> None:
        if (found.cluster, found.origin) != (self._cluster, self._origin):
            raise RecordError(
                f"key announcement of cluster {found.cluster!r}, origin {found.origin!r}; expected"
                f" {self._cluster!r}, {self._origin!r}",
                record=where,
            )
        if key != found.dek_id.encode():
            raise RecordError(f"announcement of {found.dek_id} is filed under another key", record=where)
        if not same_key(self._known.get(found.dek_id, found), found):
            raise RecordError(f"a second, different announcement of {found.dek_id}", record=where)

    def has_opened(self, dek_id: str) -> bool:
        """Whether the key is unwrapped and still kept."""
        return self._ring.get(dek_id) is not None

    def knows(self, dek_id: str) -> bool:
        """Whether the key was announced; if not, the keys topic has to be read on."""
        return dek_id in self._known

    def announced(self, dek_id: str) -> KeyAnnouncement | None:
        """The announcement that counts now."""
        return self._known.get(dek_id)

    def destroy(self, dek_ids: Iterable[str]) -> None:
        """Forget keys that were destroyed on purpose, opened or not."""
        for dek_id in dek_ids:
            self._known.pop(dek_id, None)
            self._ring.drop(dek_id)

    def open(self, entry: AuditEntry, provider: KekProvider) -> OpeningKey:
        """The key of a manifest. Raises UnsealError (not announced), KeyUnavailableError (KMS, KEK).

        The manifest's kek_id is the version that wrapped the key when it sealed: a later one may by now.
        """
        found = self._known.get(entry.dek_id)
        if found is None:
            raise UnsealError(
                f"data key {entry.dek_id} was never announced on the keys topic",
                record=batch_name(entry),
                hint="the announcement was deleted or altered, or is of another chain",
            )
        made = (found.epoch, found.created_at)
        for name in [name for name, one in self._known.items() if (one.epoch, one.created_at) < made]:
            del self._known[name]
        return self._ring.open(found, provider)

    def forget_before(self, epoch: int) -> None:
        """Drop announcements of epochs that are over: their batches are applied or void."""
        self._first_epoch = epoch
        self._known = {name: found for name, found in self._known.items() if found.epoch >= epoch}


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A relation as the source described it, and the bytes its hash is over."""

    relation: Relation
    encoded: bytes


def open_batch(
    batch: VerifiedBatch, key: OpeningKey, known: Mapping[bytes, Descriptor], entry_hash: bytes
) -> tuple[OpenedBatch, dict[bytes, Descriptor]]:
    """The opened batch, and the descriptors that came with it. `known` are those of earlier batches."""
    entry = batch.entry
    try:
        plaintexts = open_tuples(key, batch.tuples)
    except UnsealError as error:
        raise _named(error, batch, key) from error
    opened = OpenedBatch(
        chain=entry.chain,
        epoch=entry.epoch,
        batch=entry.batch,
        sequence=entry.sequence,
        entry_hash=entry_hash,
        lsn_start=entry.batch_lsn_start,
        lsn_end=entry.batch_lsn_end,
        row_count=batch.changes,
        merkle_root=batch.merkle_root,
        continues=entry.continues,
        contains_pci=entry.contains_pci,
        transactions=batch.transactions,
        leaves=batch.leaves,
    )
    new: dict[bytes, Descriptor] = {}
    if batch.changes == len(plaintexts):
        _plain(batch, plaintexts, opened)
    else:
        _Sorter(batch, opened, new).run(plaintexts)
    _resolve_relations(batch, opened, known, new)
    return opened, new


def _named(error: UnsealError, batch: VerifiedBatch, key: OpeningKey) -> UnsealError:
    """The same error with the Kafka record that does not open."""
    at = first_unopenable(batch, key)
    return UnsealError(error.message, record=batch.name(at) if at is not None else "", hint=error.hint)


def first_unopenable(batch: VerifiedBatch, key: OpeningKey) -> int | None:
    """Index of the first record that does not open: where a batch was altered. Slow, for a refusal's text."""
    for at, sealed in enumerate(batch.tuples):
        try:
            open_tuples(key, [sealed])
        except UnsealError:
            return at
    return None


def name_altered(error: RecordError, parts: Sequence[Part], key: OpeningKey) -> None:
    """Have an error about a whole partition name the one record that does not open, where one does not.

    A root says that something was altered, not what; each record's own tag does. Slow, for a refusal's text.
    """
    for part in parts:
        for pack in part.packs:
            try:
                digest = header_digest(pack.message[: pack.body])
                open_tuples(key, decode_tuples(pack.message, pack.body, digest))
            except (UnsealError, DecodeError):
                error.record = record_name(part.root.topic, part.root.partition, pack.offset)
                return


def _plain(batch: VerifiedBatch, plaintexts: list[bytes], opened: OpenedBatch) -> None:
    """The common batch: changes only."""
    opened.tx_of = batch.tx_of
    opened.ops = [record[3] for record in batch.tuples]
    opened.relation_of = [header.relation for header in batch.headers]
    opened.plaintexts = plaintexts


class _Sorter:
    """Takes descriptors out and joins pieces, one record at a time."""

    def __init__(self, batch: VerifiedBatch, opened: OpenedBatch, new: dict[bytes, Descriptor]) -> None:
        self._batch, self._opened, self._new = batch, opened, new
        self._pieces: dict[TableName, list[tuple[int, bytes]]] = {}

    def run(self, plaintexts: list[bytes]) -> None:
        batch, opened = self._batch, self._opened
        add_tx, add_op = opened.tx_of.append, opened.ops.append
        add_relation, add_text = opened.relation_of.append, opened.plaintexts.append
        for at, (record, tx, header, text) in enumerate(
            zip(batch.tuples, batch.tx_of, batch.headers, plaintexts, strict=True)
        ):
            op = record[3]
            if op == Op.PIECE:
                self._pieces.setdefault(header.table, []).append((at, text))
                continue
            whole = self._joined(at, text) if self._pieces else text
            if op == Op.RELATION:
                self._describe(at, whole)
                continue
            add_tx(tx)
            add_op(op)
            add_relation(header.relation)
            add_text(whole)
        for pieces in self._pieces.values():
            raise RecordError("a record in pieces has no end in its batch", record=batch.name(pieces[0][0]))

    def _joined(self, at: int, text: bytes) -> bytes:
        """The plaintext with the pieces of its table before it; all are of one transaction and relation."""
        headers, tx_of = self._batch.headers, self._batch.tx_of
        pieces = self._pieces.pop(headers[at].table, [])
        for piece, _ in pieces:
            if tx_of[piece] != tx_of[at] or headers[piece].relation != headers[at].relation:
                raise RecordError(
                    "a piece is followed by a record of another transaction or descriptor",
                    record=self._batch.name(piece),
                )
        return b"".join((*(piece for _, piece in pieces), text))

    def _describe(self, at: int, encoded: bytes) -> None:
        header = self._batch.headers[at]
        try:
            relation = decode_relation(encoded)
        except DecodeError as error:
            raise RecordError(error.message, record=self._batch.name(at)) from error
        if relation_hash(encoded) != header.relation or relation.name != header.table:
            raise RecordError(
                f"descriptor of {relation.name} stands where {header.table} is described",
                record=self._batch.name(at),
            )
        self._new[header.relation] = Descriptor(relation, encoded)


def _resolve_relations(
    batch: VerifiedBatch,
    opened: OpenedBatch,
    known: Mapping[bytes, Descriptor],
    new: dict[bytes, Descriptor],
) -> None:
    """Give the batch every descriptor it names."""
    for header in batch.packs:
        found = new.get(header.relation) or known.get(header.relation)
        if found is None:
            raise _of_pack(batch, header, "a descriptor that never came")
        if found.relation.name != header.table:
            raise _of_pack(batch, header, f"the descriptor of {found.relation.name}")
        opened.relations[header.relation] = found.relation


def _of_pack(batch: VerifiedBatch, header: PackHeader, what: str) -> RecordError:
    at = next(i for i, found in enumerate(batch.headers) if found is header)
    return RecordError(f"records of {header.table} name {what}", record=batch.name(at))
