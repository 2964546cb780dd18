"""Versions of rows whose xmin says another one: vsql_sync.row_versions, as SQL.

Not here: who stands (contest.py). Rules (rule 15; docs/design/0028-columns-that-add-up.md):

* An entry counts only while the row's xmin is the one it names: the next transaction that writes the row ends
  it. Within the one that wrote it a write that stands over it has to (`forget`): the xmin stays.
* A row is named by its key as it is spelled in the row, so both sides of the comparison are made of one row;
  and in sessions of appliers only: their client_encoding, which record_send follows, is always UTF8.
* Only tables with columns that add up have entries, and types with a binary form in their keys.
* Whoever writes one holds the row, and reads its xmin after the write: within a savepoint that is another id
  than the transaction's.
"""

# ruff: noqa: S608 - quoted names, and literals made here
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from vsql_shared.changes import quote_ident

if TYPE_CHECKING:
    from datetime import datetime

    from vsql_shared.changes import TableName

_TABLE = "vsql_sync.row_versions"


class Kept(NamedTuple):
    """A version as it is written down; no time: nobody knows it."""

    at: datetime | None
    node: str
    generation: int


def literal(text: str) -> str:
    """A string constant as SQL, whatever the server's settings are."""
    escaped = text.replace("\\", "\\\\").replace("'", "''")
    return f" E'{escaped}'"


def row_key(alias: str, key: Sequence[str]) -> str:
    """The key of `alias` as an entry has it, as SQL."""
    columns = ", ".join(f"{alias}.{quote_ident(column)}" for column in key)
    return f"pg_catalog.sha256(pg_catalog.record_send(ROW({columns})))"


def of_row(table: TableName, key: Sequence[str]) -> str:
    """Condition: v is t's version, and counts."""
    return (
        f"v.table_schema = {literal(table.schema)} AND v.table_name = {literal(table.table)}"
        f" AND v.row_key = {row_key('t', key)} AND v.row_xmin = t.xmin"
    )


def joined(table: TableName, key: Sequence[str]) -> str:
    """To be put behind t in FROM: v is its entry, or nothing."""
    return f" LEFT JOIN {_TABLE} v ON {of_row(table, key)}"


def keep(table: TableName, key: Sequence[str], source: str, version: Kept) -> str:
    """Write down the version of the row t of `source` (FROM and WHERE)."""
    at, node, generation = version
    when = "NULL" if at is None else literal(at.isoformat())
    return (
        f"INSERT INTO {_TABLE} (table_schema, table_name, row_key, row_xmin, at, node, generation)"
        f" SELECT {literal(table.schema)}, {literal(table.table)}, {row_key('t', key)}, t.xmin,"
        f" CAST({when} AS timestamptz), {literal(node)}, {generation:d}"
        f" {source} ON CONFLICT (table_schema, table_name, row_key) DO UPDATE SET"
        " (row_xmin, at, node, generation)"
        " = (excluded.row_xmin, excluded.at, excluded.node, excluded.generation)"
    )


def forget(table: TableName, key: Sequence[str], source: str) -> str:
    """Delete the entry of the row t of `source`, before that is written by what stands over it."""
    return f"DELETE FROM {_TABLE} v USING {source} AND {of_row(table, key)}"
