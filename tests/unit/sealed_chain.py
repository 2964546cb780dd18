"""A source without PostgreSQL and Kafka: real keys, packs, manifests, announcements, in logs that are lists.

Offsets are positions in a list, as in Kafka. A test alters the lists and reads them with the consumer's own
collector; nothing of the product is replaced.
"""

from __future__ import annotations

import atexit
import random
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from vsql_consumers.collect import Collector
from vsql_consumers.collected import Decisions
from vsql_consumers.unseal import Announcements, Descriptor, name_altered, open_batch
from vsql_consumers.verify import verify_batch
from vsql_shared import names
from vsql_shared.audit import merkle
from vsql_shared.audit.chain import EMPTY_HEAD, ChainHead, ChainReader, ChainWriter, Prepared
from vsql_shared.audit.dsse import sign_document
from vsql_shared.audit.entries import REPLICATION_BATCH
from vsql_shared.changes import Column, Op, OpenedBatch, PartitionRoot, Relation, TableName, Transaction
from vsql_shared.crypto.announce import MEDIA_TYPE, KeyAnnouncement, KeyRing, announce, encode_announcement
from vsql_shared.crypto.dek import KeyLimits, SealingKey
from vsql_shared.crypto.seal import seal_tuples
from vsql_shared.crypto.signing import PinnedKey, Signer, TrustStore
from vsql_shared.errors import RecordError, VerificationError
from vsql_shared.kms.file import FileKek, generate_kek_file
from vsql_shared.wire.pack import (
    CLEAR,
    PackHeader,
    decode_header,
    decode_tuples,
    encode_header,
    encode_pack,
    encode_relation,
    header_digest,
    relation_hash,
)

CLUSTER, ORIGIN = "c", "node-a"
CHAIN = names.live_chain("pub", ORIGIN)
AUDIT = (names.audit_topic(CLUSTER), 0)
KEYS = (names.keys_topic(CLUSTER), 0)
Log = dict[tuple[str, int], list[tuple[bytes | None, bytes | None]]]
Row = tuple[str, int, bytes]
"""(table, op, plaintext)"""


@cache
def kek_file() -> Path:
    """A KEK file of this test process."""
    folder = Path(tempfile.mkdtemp(prefix="vsql-sync-kek-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    generate_kek_file(folder / "kek", "test-kek")
    return folder / "kek"


@cache
def kek() -> FileKek:
    """The KEK in it."""
    return FileKek(kek_file(), "test-kek")


@dataclass
class SealedChain:
    """Writes one chain into `log`, as a producer would."""

    seed: int = 1
    log: Log = field(default_factory=lambda: defaultdict(list))
    tuples_per_pack: int = 4
    lsn: int = 1_000
    xid: int = 700
    relations: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.signer = Signer(Ed25519PrivateKey.from_private_bytes(bytes([self.seed] * 32)), ORIGIN)
        self.trust = TrustStore(
            [PinnedKey(ORIGIN, self.signer.public_key, self.signer.fingerprint, revoked=False)]
        )
        self.head: ChainHead = EMPTY_HEAD
        self._described: set[str] = set()
        self.restart()

    def restart(self) -> None:
        """Open a new epoch with a new data key, as every start of a producer does."""
        self.writer = ChainWriter(self.signer, CLUSTER, CHAIN, self.head, random.randbytes(16))
        self.publish(self.writer.open_epoch(lsn=self.lsn, system_identifier="1", timeline=1))
        self.new_key()
        self._described = set()
        self.number = self.head.batch

    def new_key(self) -> None:
        """Announce a data key and use it from now on."""
        self.key = SealingKey.generate(CLUSTER, CHAIN, 1, KeyLimits())
        self.announcement: KeyAnnouncement = announce(
            self.key, CLUSTER, CHAIN, ORIGIN, self.head.epoch, kek()
        )
        document = sign_document(self.signer, MEDIA_TYPE, encode_announcement(self.announcement))
        self.log[KEYS].append((self.key.dek_id.encode(), document))

    def publish(self, prepared: Prepared) -> None:
        """Append an entry to the audit partition."""
        entry = prepared.entry
        key = names.audit_key(entry.chain, entry.epoch, entry.incarnation, entry.sequence)
        self.log[AUDIT].append((key, prepared.encoded))
        self.head = self.writer.commit(prepared.entry_hash)

    def batch(self, *transactions: Sequence[Row], continues: bool = False) -> Prepared:
        """Seal and publish a batch of transactions."""
        prepared = self.packs_of(*transactions, continues=continues)
        self.publish(prepared)
        return prepared

    def orphans(self, *transactions: Sequence[Row]) -> None:
        """Send packs whose manifest is never written: the process dies in between."""
        roots, _, _ = self._send(transactions)
        assert roots
        self.number -= 1

    def packs_of(self, *transactions: Sequence[Row], continues: bool = False) -> Prepared:
        """Send a batch's packs and make its manifest, without sending that."""
        start = self.lsn
        roots, rows, tables = self._send(transactions)
        return self.writer.next(
            event_type=REPLICATION_BATCH,
            source_node_id=ORIGIN,
            batch=self.number,
            batch_lsn_start=start,
            batch_lsn_end=self.lsn,
            tables_affected=tuple(sorted(tables)),
            row_count=rows,
            record_count=sum(root.records for root in roots),
            partitions=tuple(roots),
            merkle_root=merkle.batch_root([root.sub_root for root in roots]),
            dek_id=self.key.dek_id,
            kek_id=self.announcement.kek_id,
            algorithm="AES-256-GCM",
            continues=continues,
        )

    def _send(self, transactions: Sequence[Sequence[Row]]) -> tuple[list[PartitionRoot], int, set[str]]:
        self.number += 1
        heads: list[Transaction] = []
        records: dict[str, list[tuple[int, int, int, bytes]]] = defaultdict(list)
        index = rows = 0
        for transaction in transactions:
            self.lsn += 100
            heads.append(Transaction(self.xid, self.lsn, self.lsn * 10))
            self.xid += 1
            for table, op, text in transaction:
                if table not in self._described:
                    self._described.add(table)
                    self.relations[table] = encode_relation(relation(table))
                    records[table].append((len(heads) - 1, index, Op.RELATION, self.relations[table]))
                    index += 1
                records[table].append((len(heads) - 1, index, op, text))
                index += 1
                rows += op != Op.PIECE
            self.lsn += 50
        roots = [self._send_table(table, heads, found) for table, found in records.items()]
        return (
            sorted(roots, key=lambda root: (root.topic, root.partition)),
            rows,
            {str(named(table)) for table in records},
        )

    def _send_table(
        self, table: str, heads: list[Transaction], records: list[tuple[int, int, int, bytes]]
    ) -> PartitionRoot:
        topic = names.data_topic(CLUSTER, CHAIN, *named(table))
        log = self.log[topic, 0]
        offsets: list[int] = []
        leaves: list[bytes] = []
        for at in range(0, len(records), self.tuples_per_pack):
            message = self.pack(table, heads, records[at : at + self.tuples_per_pack])
            header, body = decode_header(message)
            leaves += [t.leaf for t in decode_tuples(message, body, header_digest(encode_header(header)))]
            offsets.append(len(log))
            log.append((None, message))
        return PartitionRoot(
            topic, 0, offsets[0], offsets[-1], len(offsets), len(leaves), merkle.root(leaves)
        )

    def pack(self, table: str, heads: list[Transaction], records: list[tuple[int, int, int, bytes]]) -> bytes:
        """Seal one pack of the current batch."""
        header = PackHeader(
            CLUSTER,
            CHAIN,
            ORIGIN,
            named(table),
            0,
            self.head.epoch,
            self.number,
            self.key.dek_id,
            relation_hash(self.relations[table]),
            tuple(heads),
        )
        encoded = encode_header(header)
        clears = [
            CLEAR.pack(tx, heads[tx].commit_lsn - 1, index, bytes([op])) for tx, index, op, _ in records
        ]
        sealed, _ = seal_tuples(self.key, header_digest(encoded), clears, [text for *_, text in records])
        return encode_pack(encoded, sealed)


def named(table: str) -> TableName:
    """Tables are in public; what is no row is under names of pg_catalog (docs/design/0007)."""
    return TableName("pg_catalog" if table.startswith("pg_") else "public", table)


def relation(table: str) -> Relation:
    """A table of two columns."""
    columns = (Column("id", True, 23, -1, "integer"), Column("v", False, 25, -1, "text"))
    return Relation(named(table), "d", columns, random.randbytes(16))


def rows(table: str, *values: int) -> list[Row]:
    """Inserts with recognisable plaintexts."""
    return [(table, Op.INSERT, f"{table}:{value}".encode()) for value in values]


@dataclass
class Reading:
    """What a consumer made of a log."""

    batches: list[OpenedBatch] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    error: VerificationError | None = None
    most_buffered: int = 0
    collector: Collector | None = None
    skipped: list[int] = field(default_factory=list)

    @property
    def texts(self) -> list[bytes]:
        return [text for batch in self.batches for text in batch.plaintexts]


def _open_all(
    reading: Reading,
    collector: Collector,
    announcements: Announcements,
    descriptors: dict[bytes, Descriptor],
) -> None:
    """Verify and open what is complete, and learn the tables it describes."""
    while (ready := collector.next_ready()) is not None:
        reading.entries.append(ready.sequence)
        if ready.skipped:
            reading.skipped.append(ready.sequence)
        elif ready.entry is not None and ready.parts:
            try:
                verified = verify_batch(ready.entry, ready.parts, ORIGIN)
            except RecordError as error:
                if announcements.knows(ready.entry.dek_id):
                    name_altered(error, ready.parts, announcements.open(ready.entry, kek()))
                raise
            data_key = announcements.open(ready.entry, kek())
            opened, new = open_batch(verified, data_key, descriptors, ready.entry_hash)
            descriptors.update(new)
            reading.batches.append(opened)


def read(
    log: Mapping[tuple[str, int], Sequence[tuple[bytes | None, bytes | None]]],
    trust: TrustStore,
    order: random.Random | None = None,
    *,
    decisions: Decisions | None = None,
    buffer_bytes: int = 1 << 20,
    head: ChainHead = EMPTY_HEAD,
    audit_offset: int = 0,
    offsets: Mapping[tuple[str, int], int] | None = None,
    known: Mapping[bytes, Descriptor] | None = None,
) -> Reading:
    """Deliver the log in a random order (each partition in its own), as far as a consumer takes it."""
    order = order or random.Random(0)
    reading = Reading()
    collector = Collector(
        ChainReader(CLUSTER, CHAIN, ORIGIN, trust, head),
        trust,
        AUDIT,
        audit_offset,
        offsets or {},
        buffer_bytes,
        decisions,
    )
    reading.collector = collector
    announcements = Announcements(CLUSTER, CHAIN, ORIGIN, trust, KeyRing())
    descriptors = dict(known or {})
    next_at = {AUDIT: audit_offset}
    paused: set[tuple[str, int]] = set()
    try:
        for offset, (key, value) in enumerate(log[KEYS]):
            announcements.feed(*KEYS, offset, key, value)
        while True:
            for topic, partition, offset in collector.wanted():
                next_at[topic, partition] = offset
            ready_to_read = sorted(p for p in next_at if p not in paused and next_at[p] < len(log.get(p, ())))
            if ready_to_read:
                place = order.choice(ready_to_read)
                collector.feed(*place, next_at[place], log[place][next_at[place]][1])
                next_at[place] += 1
                reading.most_buffered = max(reading.most_buffered, collector.buffered)
            _open_all(reading, collector, announcements, descriptors)
            flow = collector.flow()
            paused = (paused | set(flow.pause)) - set(flow.resume)
            if not ready_to_read:
                for topic, partition, _, _ in collector.awaited():
                    collector.check_log(topic, partition, 0, len(log.get((topic, partition), ())))
                assert not collector.wanted()
                return reading
    except VerificationError as error:
        reading.error = error
        return reading
