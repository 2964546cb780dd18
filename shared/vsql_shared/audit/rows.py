"""What a row of vsql_sync.vsql_sync_audit holds for a document: one mapping, for writing and for verifying.

Not here: SQL (store.py, verify.py). Pure. Rules:

* The document decides; every other column follows from it by `columns_of`, so the two cannot drift apart.
* kafka_offset and written_at are the exceptions: they are no part of what is signed.
* An empty dek_id, kek_id or algorithm of an entry without a batch is NULL in the table.
"""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from vsql_shared import lsn
from vsql_shared.audit.dsse import SignedDocument, document_hash
from vsql_shared.audit.entries import AuditEntry

UNSIGNED_COLUMNS = ("kafka_offset", "written_at")
"""Columns that say something about the row, not about the event."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class StoredDocument(NamedTuple):
    """A document as it lies in the table, parsed but not verified."""

    entry: AuditEntry
    document: SignedDocument
    encoded: bytes
    kafka_offset: int | None

    @property
    def entry_hash(self) -> bytes:
        """What the next entry links to."""
        return document_hash(self.encoded)


def parse(encoded: bytes, kafka_offset: int | None = None) -> StoredDocument:
    """Parse a document without verifying it. Raises DecodeError."""
    document = SignedDocument.decode(encoded)
    return StoredDocument(AuditEntry.decode(document.payload), document, encoded, kafka_offset)


def timestamp(microseconds: int) -> datetime:
    """µs since 1970 → an aware datetime, exactly."""
    return _EPOCH + timedelta(microseconds=microseconds)


def microseconds(moment: datetime) -> int:
    """An aware datetime → µs since 1970, exactly."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def columns_of(stored: StoredDocument) -> dict[str, Any]:
    """Column → value, as psycopg takes and gives it; LSNs are text. All columns but the unsigned ones."""
    entry, document = stored.entry, stored.document
    return {
        "event_id": uuid.UUID(bytes=entry.event_id),
        "event_type": entry.event_type,
        "event_timestamp": timestamp(entry.event_timestamp),
        "source_node_id": entry.source_node_id,
        "target_node_id": entry.target_node_id,
        "batch_lsn_start": lsn.text(entry.batch_lsn_start),
        "batch_lsn_end": lsn.text(entry.batch_lsn_end),
        "tables_affected": list(entry.tables_affected),
        "row_count": entry.row_count,
        "contains_pci": entry.contains_pci,
        "pci_columns": list(entry.pci_columns),
        "dek_id": entry.dek_id or None,
        "kek_id": entry.kek_id or None,
        "algorithm": entry.algorithm or None,
        "merkle_root": entry.merkle_root,
        "prev_event_hash": entry.prev_event_hash,
        "signer_node_id": entry.signer_node_id,
        "signature": document.signature,
        "chain": entry.chain,
        "epoch": entry.epoch,
        "incarnation": uuid.UUID(bytes=entry.incarnation),
        "sequence": entry.sequence,
        "batch": entry.batch,
        "signer_key": document.signer,
        "document": stored.encoded,
    }


COLUMNS = (
    "event_id",
    "event_type",
    "event_timestamp",
    "source_node_id",
    "target_node_id",
    "batch_lsn_start",
    "batch_lsn_end",
    "tables_affected",
    "row_count",
    "contains_pci",
    "pci_columns",
    "dek_id",
    "kek_id",
    "algorithm",
    "merkle_root",
    "prev_event_hash",
    "signer_node_id",
    "signature",
    "chain",
    "epoch",
    "incarnation",
    "sequence",
    "batch",
    "signer_key",
    "document",
)
"""The keys of `columns_of`, in the order of the table."""
