"""Which tables a copy reads, with which columns, and by which SQL.

Not here: reading (reader.py). Rules: exactly what PostgreSQL's publication sends later on is copied: its
tables, column lists and row filters, partitioned tables as a whole where their root is published. A column
that has no binary form, or one that means nothing on another server, is read as text, and described as text.
A row filter is used only if it is the one that was decided. A table's turn may come hours after the snapshot:
COPY then reads the table by its present name and columns, and one that was rewritten since looks empty to the
snapshot. So a table's shape is noted as the snapshot has it, and compared when its COPY holds the lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from psycopg import sql

from vsql_producers.binary_types import ways
from vsql_producers.relations import describe
from vsql_producers.scope import Scope, require_no_authentication_data
from vsql_producers.transactions import Descriptor
from vsql_shared.changes import Column, TableName
from vsql_shared.errors import DatabaseError, TransientError
from vsql_shared.pg import catalog, generated
from vsql_shared.pg.connect import Connection, errors

_TEXT_OID = 25

_TABLES = """
SELECT p.schemaname, p.tablename, p.attnames::text[], p.rowfilter, c.oid, c.relkind = 'p',
    greatest(c.reltuples, 0)::bigint, p.rowfilter IS NOT DISTINCT FROM o.row_filter
FROM pg_catalog.pg_publication_tables p
LEFT JOIN vsql_sync.published_tables o ON o.publication = p.pubname::text
    AND o.table_schema = p.schemaname::text AND o.table_name = p.tablename::text
JOIN pg_catalog.pg_namespace n ON n.nspname = p.schemaname
JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
WHERE p.pubname = %s AND p.schemaname <> 'vsql_sync' ORDER BY 1, 2
"""
_COLUMNS = """
SELECT a.attname, a.atttypid::bigint, a.atttypmod, pg_catalog.format_type(a.atttypid, a.atttypmod)
FROM pg_catalog.pg_attribute a
WHERE a.attrelid = %s AND a.attname = ANY(%s) AND NOT a.attisdropped ORDER BY a.attnum
"""
# Where a table and its partitions lie, and which columns are meant. By plain tables of the catalog, which
# show what the session's snapshot sees; functions show the present.
_SHAPE = """
WITH RECURSIVE tree (oid) AS (
    SELECT %s::oid
    UNION ALL SELECT i.inhrelid FROM tree JOIN pg_catalog.pg_class c ON c.oid = tree.oid AND c.relkind = 'p'
              JOIN pg_catalog.pg_inherits i ON i.inhparent = c.oid)
SELECT c.oid::bigint, n.nspname, c.relname, c.relfilenode::bigint,
    ARRAY(SELECT pg_catalog.concat_ws(' ', a.attnum, a.atttypid, a.attname) FROM pg_catalog.pg_attribute a
          WHERE a.attrelid = c.oid AND a.attname = ANY(%s) AND NOT a.attisdropped ORDER BY a.attnum)
FROM tree JOIN pg_catalog.pg_class c ON c.oid = tree.oid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace ORDER BY c.oid
"""
Shape = tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, slots=True)
class CopyTable:
    """A table to copy: its descriptor, its key in frames, the COPY that reads it, and its shape."""

    name: TableName
    key: bytes
    columns: int
    descriptor: Descriptor
    command: bytes
    estimated_rows: int
    selected: tuple[str, ...]
    shape: Shape


def tables_to_copy(conn: Connection, publication: str, scope: Scope, salts: list[bytes]) -> list[CopyTable]:
    """The publication's tables as this transaction's snapshot has them; each takes one of `salts`."""
    with errors("listing the published tables"):
        rows = conn.execute(_TABLES, (publication,)).fetchall()
    found = []
    for schema, table, columns, row_filter, oid, partitioned, estimate, decided in rows:
        name = TableName(schema, table)
        if not decided:
            raise DatabaseError(
                f"table {name}: the row filter of PostgreSQL's publication is not what was decided",
                hint="set it back with ALTER PUBLICATION … SET TABLE",
            )
        described, select, types = _columns(conn, name, oid, columns)
        require_no_authentication_data(
            scope, name, [replace(c, type_name=t) for c, t in zip(described, types, strict=True)]
        )
        selected = tuple(column.name for column in described)
        info = catalog.describe(conn, name)
        if info is None:
            raise DatabaseError(f"table {name} went away while it was prepared for the copy")
        keys = frozenset(info.identity or ())
        described = [Column(c.name, c.name in keys, c.type_oid, c.typmod, c.type_name) for c in described]
        made_by = generated.definitions(conn, name)
        descriptor = describe(name, info.replica_identity, tuple(described), scope, salts.pop(), made_by)
        command = _command(name, select, row_filter, partitioned=partitioned).as_string(conn).encode()
        found.append(
            CopyTable(
                name,
                int(oid).to_bytes(4, "big"),
                len(described),
                descriptor,
                command,
                estimate,
                selected,
                _shape(conn, name, oid, selected),
            )
        )
    return found


def require_same(conn: Connection, table: CopyTable) -> None:
    """Raise TransientError when a table is not what the snapshot had. `conn` sees the present.

    Call it when the table's COPY began: from then on its lock keeps the table as it is.
    """
    oid = int.from_bytes(table.key, "big")
    if _shape(conn, table.name, oid, table.selected) != table.shape:
        raise TransientError(
            f"table {table.name} was altered, rewritten or truncated since the copy's snapshot",
            hint="the copy goes on by itself, with a new snapshot for the tables that are left",
        )


def _shape(conn: Connection, name: TableName, oid: int, selected: Sequence[str]) -> Shape:
    with errors(f"looking at where {name} lies"):
        return tuple((*row[:4], *row[4]) for row in conn.execute(_SHAPE, (oid, list(selected))).fetchall())


def count_tables(conn: Connection, publication: str) -> int:
    """How many tables there are, and so how many salts they need."""
    with errors("listing the published tables"):
        return len(conn.execute(_TABLES, (publication,)).fetchall())


def _columns(
    conn: Connection, name: TableName, oid: int, published: list[str]
) -> tuple[list[Column], list[sql.Composable], list[str]]:
    """Columns as they are described, and as they are selected; their true types."""
    with errors(f"reading the columns of {name}"):
        rows = conn.execute(_COLUMNS, (oid, published)).fetchall()
    as_text = ways(conn, [int(row[1]) for row in rows]).copied_as_text
    columns: list[Column] = []
    select: list[sql.Composable] = []
    for column, type_oid, typmod, type_name in rows:
        if type_oid in as_text:
            columns.append(Column(column, False, _TEXT_OID, -1, "text"))
            select.append(sql.SQL("{}::pg_catalog.text").format(sql.Identifier(column)))
        else:
            columns.append(Column(column, False, type_oid, typmod, type_name))
            select.append(sql.Identifier(column))
    return columns, select, [str(row[3]) for row in rows]


def _command(
    name: TableName, select: list[sql.Composable], row_filter: str | None, *, partitioned: bool
) -> sql.Composed:
    # Rows of a partitioned table lie in its partitions; rows of inheritance children are another table's.
    only = sql.SQL("") if partitioned else sql.SQL("ONLY ")
    where = sql.SQL(" WHERE ") + sql.SQL(row_filter) if row_filter else sql.SQL("")
    return sql.SQL("COPY (SELECT {} FROM {}{}{}) TO STDOUT (FORMAT binary)").format(
        sql.SQL(", ").join(select), only, sql.Identifier(name.schema, name.table), where
    )
