"""Columns an operator marked as holding PCI data: the marks, and what they mean for a table's relatives.

A mark follows its column when that is renamed; the name it was made under stays marked, because the WAL may
still hold it (view vsql_sync.pci_marks).
"""

from __future__ import annotations

from collections.abc import Iterable

from vsql_shared.changes import TableName, quote_ident
from vsql_shared.errors import RefusedError
from vsql_shared.pg import catalog, oplog, publication_leaves
from vsql_shared.pg.catalog import TableInfo
from vsql_shared.pg.connect import Connection


def mark(conn: Connection, columns: Iterable[tuple[TableName, str]]) -> int:
    """Mark columns as PCI data; returns how many are newly marked. Inside the caller's transaction."""
    added = 0
    for name, column in columns:
        table = catalog.describe(conn, name)
        if table is None or column not in table.column_names:
            raise RefusedError(f"there is no column {name}.{quote_ident(column)}", hint="check the spelling")
        new = conn.execute(
            "INSERT INTO vsql_sync.pci_columns (table_schema, table_name, column_name) VALUES (%s, %s, %s)"
            " ON CONFLICT DO NOTHING",
            (*name, column),
        ).rowcount
        if new:
            oplog.record(conn, "pci.mark", "column", f"{name}.{quote_ident(column)}")
        added += new
    conn.execute("SELECT vsql_sync.anchor_marks()")
    return added


def marked(conn: Connection, name: TableName) -> set[str]:
    """Columns of a table that are marked as PCI data, by the mark's name and by the present one."""
    rows = conn.execute(
        "SELECT column_name FROM vsql_sync.pci_marks WHERE table_schema = %s AND table_name = %s", name
    )
    return {row[0] for row in rows}


def marked_anywhere(conn: Connection, table: TableInfo) -> set[str]:
    """Marks of the table, of the partitioned tables it is a part of, and of its own partitions."""
    names = {table.name, *(publication_leaves.ancestors(conn, table.name) if table.is_partition else ())}
    names |= publication_leaves.family(conn, table.name) if table.kind == "p" else set()
    return set().union(*(marked(conn, name) for name in names))
