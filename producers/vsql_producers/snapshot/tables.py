"""Which tables a copy reads, with which columns, and by which SQL.

Not here: reading (reader.py). Rules: exactly what PostgreSQL's publication sends later on is copied: its
tables, column lists and row filters, partitioned tables as a whole where their root is published. A column
that has no binary form, or one that means nothing on another server, is read as text, and described as text.
"""

from __future__ import annotations

from dataclasses import dataclass

from psycopg import sql

from vsql_producers.binary_types import ways
from vsql_producers.relations import Scope, describe
from vsql_producers.transactions import Descriptor
from vsql_shared.changes import Column, TableName
from vsql_shared.errors import DatabaseError
from vsql_shared.pg import catalog, generated
from vsql_shared.pg.connect import Connection, errors

_TEXT_OID = 25

_TABLES = """
SELECT p.schemaname, p.tablename, p.attnames::text[], p.rowfilter, c.oid, c.relkind = 'p',
    greatest(c.reltuples, 0)::bigint
FROM pg_catalog.pg_publication_tables p
JOIN pg_catalog.pg_namespace n ON n.nspname = p.schemaname
JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
WHERE p.pubname = %s AND p.schemaname <> 'vsql_sync' ORDER BY 1, 2
"""
_COLUMNS = """
SELECT a.attname, a.atttypid::bigint, a.atttypmod, pg_catalog.format_type(a.atttypid, a.atttypmod)
FROM pg_catalog.pg_attribute a
WHERE a.attrelid = %s AND a.attname = ANY(%s) AND NOT a.attisdropped ORDER BY a.attnum
"""


@dataclass(frozen=True, slots=True)
class CopyTable:
    """A table to copy: its descriptor, its key in frames, and the COPY that reads it."""

    name: TableName
    key: bytes
    columns: int
    descriptor: Descriptor
    command: bytes
    estimated_rows: int


def tables_to_copy(conn: Connection, publication: str, scope: Scope, salts: list[bytes]) -> list[CopyTable]:
    """The publication's tables as this transaction's snapshot has them; each takes one of `salts`."""
    with errors("listing the published tables"):
        rows = conn.execute(_TABLES, (publication,)).fetchall()
    found = []
    for schema, table, columns, row_filter, oid, partitioned, estimate in rows:
        name = TableName(schema, table)
        described, select = _columns(conn, name, oid, columns)
        info = catalog.describe(conn, name)
        if info is None:
            raise DatabaseError(f"table {name} went away while it was prepared for the copy")
        keys = frozenset(info.identity or ())
        described = [Column(c.name, c.name in keys, c.type_oid, c.typmod, c.type_name) for c in described]
        made_by = generated.definitions(conn, name)
        descriptor = describe(name, info.replica_identity, tuple(described), scope, salts.pop(), made_by)
        command = _command(name, select, row_filter, partitioned=partitioned).as_string(conn).encode()
        found.append(
            CopyTable(name, int(oid).to_bytes(4, "big"), len(described), descriptor, command, estimate)
        )
    return found


def count_tables(conn: Connection, publication: str) -> int:
    """How many tables there are, and so how many salts they need."""
    with errors("listing the published tables"):
        return len(conn.execute(_TABLES, (publication,)).fetchall())


def _columns(
    conn: Connection, name: TableName, oid: int, published: list[str]
) -> tuple[list[Column], list[sql.Composable]]:
    """Columns as they are described, and as they are selected."""
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
    return columns, select


def _command(
    name: TableName, select: list[sql.Composable], row_filter: str | None, *, partitioned: bool
) -> sql.Composed:
    # Rows of a partitioned table lie in its partitions; rows of inheritance children are another table's.
    only = sql.SQL("") if partitioned else sql.SQL("ONLY ")
    where = sql.SQL(" WHERE ") + sql.SQL(row_filter) if row_filter else sql.SQL("")
    return sql.SQL("COPY (SELECT {} FROM {}{}{}) TO STDOUT (FORMAT binary)").format(
        sql.SQL(", ").join(select), only, sql.Identifier(name.schema, name.table), where
    )
