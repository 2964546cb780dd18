"""Export of the audit trail: everything somebody else needs to verify it without a database of ours.

The format is documented, with a program that verifies it, in docs/operations/audit.md. Not here: files
(the caller writes the lines). Rules:

* The signed documents go out byte by byte; `entry` beside each is for reading only.
* Public keys and the Avro schemas are part of it; whom to trust is not: a verifier compares fingerprints
  with what he was told on another way.
* A document that cannot be parsed is exported too, with the reason: an export hides nothing.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import fields
from datetime import datetime
from importlib import resources
from typing import Any

from vsql_shared.audit.dsse import document_hash
from vsql_shared.audit.entries import AuditEntry
from vsql_shared.audit.rows import parse
from vsql_shared.errors import DecodeError
from vsql_shared.pg.connect import Connection, errors

FORMAT = "vsql-sync-audit-export"
VERSION = 1
PAGE = 1000
"""Rows fetched at a time."""


def export(
    conn: Connection, cluster: str, node: str, now: datetime, since: datetime | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ('header', …), then ('entry', …) by chain and sequence, then ('end', …), from one snapshot.

    `conn` must be in autocommit mode and outside of a transaction.
    """
    with errors("reading the audit trail"), conn.transaction():
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        yield (
            "header",
            {
                "format": FORMAT,
                "version": VERSION,
                "cluster": cluster,
                "node": node,
                "exported_at": now.isoformat(),
                "since": since.isoformat() if since else None,
                "keys": _keys(conn),
                "schemas": {name: _schema(name) for name in ("signed_document", "audit_entry")},
            },
        )
        chains: dict[str, dict[str, Any]] = {}
        count = 0
        for item in _entries(conn, since):
            count += 1
            end = chains.setdefault(item["chain"], {"entries": 0, "first_sequence": item["sequence"]})
            end["entries"] += 1
            end |= {"last_sequence": item["sequence"], "last_hash": item["hash"]}
            yield "entry", item
        yield "end", {"entries": count, "chains": chains}


def _keys(conn: Connection) -> list[dict[str, Any]]:
    rows = conn.execute(
        "SELECT node_name, fingerprint, public_key, revoked_at FROM vsql_sync.signers ORDER BY 1, 2"
    ).fetchall()
    return [
        {
            "node": node,
            "fingerprint": fingerprint,
            "public_key": base64.b64encode(bytes(key)).decode(),
            "revoked_at": revoked.isoformat() if revoked else None,
        }
        for node, fingerprint, key, revoked in rows
    ]


def _schema(name: str) -> Any:
    return json.loads(resources.files("vsql_schemas").joinpath(f"avro/{name}.avsc").read_text("utf-8"))


def _entries(conn: Connection, since: datetime | None) -> Iterator[dict[str, Any]]:
    with conn.cursor(name="vsql_sync_export") as cursor:
        cursor.itersize = PAGE
        cursor.execute(
            "SELECT chain, sequence, kafka_offset, document FROM vsql_sync.vsql_sync_audit"
            " WHERE %s::timestamptz IS NULL OR event_timestamp >= %s ORDER BY chain, sequence, event_id",
            (since, since),
        )
        for chain, sequence, offset, document in cursor:
            encoded = bytes(document)
            item = {
                "chain": chain,
                "sequence": sequence,
                "hash": document_hash(encoded).hex(),
                "kafka_offset": offset,
                "document": base64.b64encode(encoded).decode(),
            }
            try:
                item["entry"] = readable(parse(encoded).entry)
            except DecodeError as error:
                item |= {"entry": None, "error": error.message}
            yield item


def readable(entry: AuditEntry) -> dict[str, Any]:
    """An entry as JSON: the fields of the Avro schema, bytes in hex."""
    values = {field.name: getattr(entry, field.name) for field in fields(entry)}
    values["partitions"] = [
        {field.name: getattr(part, field.name) for field in fields(part)} for part in entry.partitions
    ]
    values["verdicts"] = [{"name": name, "count": count} for name, count in entry.verdicts]
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return value
