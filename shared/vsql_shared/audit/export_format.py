"""The format of an export, by its names and values; a segment in the archive has it, too.

Not here: reading the trail (export.py). Pure. Documented in docs/operations/audit.md.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from vsql_shared.audit.entries import AuditEntry

FORMAT = "vsql-sync-audit-export"
VERSION = 1


def entry_names() -> list[str]:
    """The names of an entry's fields, in their order."""
    return [field.name for field in fields(AuditEntry)]


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
