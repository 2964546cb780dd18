"""Partitioned tables that are published by leaf: which tables travel for them, and which once did.

Rules:

* A leaf that was seen is kept: when it is detached or dropped, the WAL may still hold its rows.
* An operator settles what nobody saw: it was a leaf of a published table, or its rows are passed over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vsql_shared.changes import TableName
from vsql_shared.pg.connect import Connection, errors

_LEAVES = """
SELECT n.nspname, c.relname FROM pg_catalog.pg_partition_tree(
    pg_catalog.to_regclass(pg_catalog.format('%%I.%%I', %s::text, %s::text))) l
JOIN pg_catalog.pg_class c ON c.oid = l.relid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE l.isleaf AND l.level > 0 ORDER BY 1, 2
"""
_TREE = """
SELECT n.nspname, c.relname FROM pg_catalog.pg_partition_tree(
    pg_catalog.to_regclass(pg_catalog.format('%%I.%%I', %s::text, %s::text))) l
JOIN pg_catalog.pg_class c ON c.oid = l.relid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
"""
_ANCESTORS = """
SELECT n.nspname, c.relname FROM pg_catalog.pg_partition_ancestors(
    pg_catalog.to_regclass(pg_catalog.format('%%I.%%I', %s::text, %s::text))) WITH ORDINALITY a (relid, place)
JOIN pg_catalog.pg_class c ON c.oid = a.relid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE a.place > 1 ORDER BY a.place
"""
_REMEMBER = """
INSERT INTO vsql_sync.publication_leaves AS k (publication, table_schema, table_name, root_schema, root_name)
SELECT p.name, n.nspname, c.relname, t.table_schema, t.table_name
FROM vsql_sync.publications p JOIN vsql_sync.publication_tables t ON t.publication = p.name
CROSS JOIN LATERAL pg_catalog.pg_partition_tree(
    pg_catalog.to_regclass(pg_catalog.format('%%I.%%I', t.table_schema, t.table_name))) l
JOIN pg_catalog.pg_class c ON c.oid = l.relid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE p.name = %s AND p.via_leaf AND l.isleaf AND l.level > 0 AND NOT EXISTS (
    SELECT FROM vsql_sync.publication_leaves k WHERE (k.publication, k.table_schema, k.table_name,
        k.root_schema, k.root_name) = (p.name, n.nspname::text, c.relname::text, t.table_schema,
        t.table_name))
ON CONFLICT (publication, table_schema, table_name)
    DO UPDATE SET root_schema = excluded.root_schema, root_name = excluded.root_name
"""


def leaves(conn: Connection, table: TableName) -> list[TableName]:
    """The leaves of a partitioned table; none of any other."""
    return [TableName(*row) for row in conn.execute(_LEAVES, table)]


def family(conn: Connection, table: TableName) -> set[TableName]:
    """A table and all that rows may reach through it: its partitions of every level."""
    return {table} | {TableName(*row) for row in conn.execute(_TREE, table)}


def ancestors(conn: Connection, table: TableName) -> list[TableName]:
    """The partitioned tables a partition belongs to, the nearest first."""
    return [TableName(*row) for row in conn.execute(_ANCESTORS, table)]


def nested(conn: Connection, tables: Sequence[TableName]) -> list[str]:
    """One line for each table that is named beside a partitioned table it belongs to."""
    named = set(tables)
    found = []
    for table in tables:
        above = [name for name in ancestors(conn, table) if name in named]
        if above:
            found.append(f"{table}: is a partition of {above[0]}, which is named too; name one of them")
    return found


def remember(conn: Connection, publication: str) -> None:
    """Write down the leaves there are now. Nothing is written for publications by root."""
    with errors("noting the partitions"):
        conn.execute(_REMEMBER, (publication,))


def remembered(conn: Connection, publication: str) -> Mapping[TableName, TableName | None]:
    """Leaf → the published table it belongs or belonged to; None: its rows are passed over."""
    with errors("reading the partitions"):
        rows = conn.execute(
            "SELECT table_schema, table_name, root_schema, root_name FROM vsql_sync.publication_leaves"
            " WHERE publication = %s",
            (publication,),
        ).fetchall()
    return {TableName(s, t): None if root is None else TableName(root, name) for s, t, root, name in rows}
