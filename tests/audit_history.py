"""Histories of chains for tests: real keys, real signatures, chosen shapes. Not a test itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from vsql_shared.audit.chain import EMPTY_HEAD, ChainHead, ChainWriter, Prepared
from vsql_shared.audit.entries import BATCH_APPLIED, OPERATOR_ACTION, REPLICATION_BATCH, AuditEntry
from vsql_shared.audit.merkle import batch_root, leaf_hash
from vsql_shared.changes import PartitionRoot
from vsql_shared.crypto.signing import PinnedKey, Signer, TrustStore
from vsql_shared.names import ack_chain

CLUSTER = "shop"
CHAIN = "orders.node-a"
ACKS = ack_chain(CHAIN, "node-b")
START = 1_760_000_000_000_000


def signer(node: str, seed: str = "") -> Signer:
    """A key that is the same in every run."""
    return Signer(
        Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"{node}{seed}".encode()).digest()), node
    )


A, B = signer("node-a"), signer("node-b")


def trust(*signers: Signer, revoked: Iterable[Signer] = ()) -> TrustStore:
    """A store that pins these keys; both nodes' when none are named."""
    gone = {one.fingerprint for one in revoked}
    return TrustStore(
        PinnedKey(one.node, one.public_key, one.fingerprint, one.fingerprint in gone)
        for one in signers or (A, B)
    )


def incarnation(number: int) -> bytes:
    """A UUID's bytes that show their number."""
    return number.to_bytes(16, "big")


def manifest_fields(batch: int, rows: int = 2, *, continues: bool = False) -> dict[str, object]:
    """Fields of a manifest whose roots and sums are right."""
    sub = leaf_hash(b"batch %d" % batch)
    part = PartitionRoot(
        f"{CLUSTER}.orders.node-a.public.orders", 0, batch * 10, batch * 10 + 3, 1, rows + 1, sub
    )
    return {
        "event_type": REPLICATION_BATCH,
        "batch": batch,
        "batch_lsn_start": batch * 100,
        "batch_lsn_end": batch * 100 + 50,
        "row_count": rows,
        "record_count": rows + 1,
        "continues": continues,
        "partitions": (part,),
        "merkle_root": batch_root([sub]),
        "tables_affected": ("public.orders",),
        "contains_pci": True,
        "pci_columns": ("public.orders.card",),
        "dek_id": "dek-1",
        "kek_id": "kek-1",
        "algorithm": "AES-256-GCM",
    }


def ack_fields(manifest: Prepared) -> dict[str, object]:
    """Fields of a right acknowledgement of a manifest."""
    entry = manifest.entry
    same = (
        "batch",
        "batch_lsn_start",
        "batch_lsn_end",
        "row_count",
        "record_count",
        "continues",
        "merkle_root",
    )
    return {name: getattr(entry, name) for name in same} | {
        "event_type": BATCH_APPLIED,
        "source_node_id": entry.source_node_id,
        "target_node_id": "node-b",
        "ref_epoch": entry.epoch,
        "ref_sequence": entry.sequence,
        "ref_hash": manifest.entry_hash,
        "target_lsn": 7_000 + entry.batch,
        "verdicts": (("applied", entry.row_count),) if entry.row_count else (),
    }


class History:
    """A chain under construction: every entry made so far, in order."""

    def __init__(
        self, chain: str = CHAIN, by: Signer = A, cluster: str = CLUSTER, head: ChainHead = EMPTY_HEAD
    ) -> None:
        self.chain, self.by, self.cluster = chain, by, cluster
        self.entries: list[Prepared] = []
        self.head = head
        self._clock = START + head.sequence
        self.writer = ChainWriter(by, cluster, chain, head, incarnation(1))

    def _fixed(self) -> dict[str, Any]:
        """Time and id that are the same in every run."""
        self._clock += 1_000_000
        return {
            "event_timestamp": self._clock,
            "event_id": hashlib.sha256(f"{self.chain}{self._clock}".encode()).digest()[:16],
        }

    def _take(self, made: Prepared) -> Prepared:
        self.head = self.writer.commit(made.entry_hash)
        self.entries.append(made)
        return made

    def open(self, number: int | None = None) -> Prepared:
        """Open the next epoch as incarnation `number`; the epoch's own number when left out."""
        number = self.head.epoch + 1 if number is None else number
        self.writer = ChainWriter(self.by, self.cluster, self.chain, self.head, incarnation(number))
        return self._take(
            self.writer.open_epoch(lsn=1, system_identifier="7000", timeline=1, **self._fixed())
        )

    def add(self, **fields: object) -> Prepared:
        """The next entry."""
        return self._take(self.writer.next(**{**self._fixed(), **fields}))

    def batch(self, rows: int = 2, *, continues: bool = False) -> Prepared:
        """The next manifest."""
        return self.add(**manifest_fields(self.head.batch + 1, rows, continues=continues))

    def note(self) -> Prepared:
        """An entry without a batch."""
        return self.add(
            event_type=OPERATOR_ACTION, batch_lsn_start=5, batch_lsn_end=5, detail='{"what":"note"}'
        )

    def acknowledge(self, manifest: Prepared, **other: object) -> Prepared:
        """Acknowledge a manifest, right but for `other`."""
        return self.add(**{**ack_fields(manifest), **other})

    @property
    def documents(self) -> list[bytes]:
        """The entries as they lie in Kafka."""
        return [one.encoded for one in self.entries]


def ordinary(batches: int = 6) -> History:
    """Two epochs, some batches, abandoned fragments and a note."""
    history = History()
    history.open()
    for _ in range(batches // 2):
        history.batch()
    history.batch(5, continues=True)
    history.batch(4, continues=True)
    history.open()
    history.note()
    for _ in range(batches - batches // 2):
        history.batch(3)
    return history


def acknowledged(source: History) -> History:
    """The target's chain for a source's history without abandoned fragments."""
    acks = History(ACKS, B)
    acks.open()
    void = set()
    for made in source.entries:
        if made.entry.event_type == "epoch_opened" and made.entry.ref_sequence:
            void |= set(range(made.entry.ref_sequence, made.entry.sequence))
    for made in source.entries:
        if made.entry.event_type == REPLICATION_BATCH and made.entry.sequence not in void:
            acks.acknowledge(made)
    return acks


def entry(**other: object) -> AuditEntry:
    """A valid entry without a batch, but for `other`."""
    fields: dict[str, object] = {
        "cluster": CLUSTER,
        "chain": CHAIN,
        "epoch": 1,
        "incarnation": incarnation(1),
        "sequence": 2,
        "event_id": bytes(16),
        "event_type": OPERATOR_ACTION,
        "event_timestamp": START,
        "source_node_id": "node-a",
        "batch_lsn_start": 5,
        "batch_lsn_end": 5,
        "prev_event_hash": bytes(32),
        "signer_node_id": "node-a",
    }
    return AuditEntry(**{**fields, **other})  # type: ignore[arg-type]  # tables of cases mix types on purpose
