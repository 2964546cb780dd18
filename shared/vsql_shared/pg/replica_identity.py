"""Gives a table the REPLICA IDENTITY its publication needs, where an operator asked for it.

Not here: what a publication needs (publication_rules.py). Rules: the primary key before another unique index,
never FULL; a table that has what it needs is left alone, and so is one no index of which would do.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from psycopg import sql

from vsql_shared.pg import catalog, oplog
from vsql_shared.pg.catalog import TableInfo
from vsql_shared.pg.connect import Connection
from vsql_shared.pg.publication_rules import best_index, choose_columns, closed_problem, identity_problem


def ensure(
    conn: Connection,
    table: TableInfo,
    listed: Sequence[str] | None,
    left_out: Collection[str],
    *,
    closed: bool,
) -> TableInfo:
    """Set it for the table and its partitions, in the caller's transaction; the table as it is then."""
    secret = set(left_out)
    for part in [table, *catalog.partitions(conn, table)] if table.kind == "p" else [table]:
        columns, problems = choose_columns(part, listed, secret, closed=closed)
        wanted = identity_problem(part, columns, secret) or (closed_problem(part) if closed else None)
        index = best_index(part, columns)
        if not problems and wanted is not None and index is not None:
            _set(conn, part, index)
    return catalog.describe(conn, table.name) or table


def _set(conn: Connection, table: TableInfo, index: str) -> None:
    how = sql.SQL("USING INDEX {}").format(sql.Identifier(index)) if index else sql.SQL("DEFAULT")
    name = sql.Identifier(table.name.schema, table.name.table)
    conn.execute(sql.SQL("ALTER TABLE {} REPLICA IDENTITY {}").format(name, how))
    oplog.record(
        conn,
        "table.replica-identity",
        "table",
        str(table.name),
        old={"replica_identity": table.replica_identity},
        new={"replica_identity": "i" if index else "d", "index": index},
    )
