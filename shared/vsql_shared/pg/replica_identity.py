"""Gives a table the REPLICA IDENTITY its publication needs, where an operator asked for it.

Not here: what a publication needs (publication_rules.py). Rules:

* The primary key before another unique index, never FULL.
* A table that has what it needs is left alone, and so is one no index of which would do.
* An identity is the table's, not the publication's: one that another publication could not use is not set,
  because PostgreSQL would refuse the table's UPDATE and DELETE from then on.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from psycopg import sql

from vsql_shared.errors import RefusedError
from vsql_shared.pg import catalog, oplog, publication_leaves
from vsql_shared.pg.catalog import TableInfo
from vsql_shared.pg.connect import Connection
from vsql_shared.pg.publication_rules import best_index, choose_columns, identity_problem

# With a row filter, the identity must hold its columns, too: which those are is not asked.
_OTHERS = """
SELECT p.pubname FROM pg_catalog.pg_publication_tables t JOIN pg_catalog.pg_publication p USING (pubname)
WHERE p.pubname <> %s AND (p.pubupdate OR p.pubdelete) AND t.schemaname = %s AND t.tablename = %s
    AND (t.rowfilter IS NOT NULL OR NOT t.attnames @> %s::name[]) ORDER BY 1 LIMIT 1
"""


def ensure(
    conn: Connection,
    publication: str,
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
        wanted = identity_problem(part, columns, secret)
        index = best_index(part, columns)
        if not problems and wanted is not None and index is not None:
            _require_harmless(conn, publication, part, index)
            _set(conn, part, index)
    return catalog.describe(conn, table.name) or table


def _require_harmless(conn: Connection, publication: str, table: TableInfo, index: str) -> None:
    """Raise RefusedError where another publication has the table, and the index would not serve it."""
    key = next(key for key in table.keys if (key.primary if index == "" else key.name == index))
    for name in (table.name, *publication_leaves.ancestors(conn, table.name)):
        row = conn.execute(_OTHERS, (publication, *name, list(key.columns))).fetchone()
        if row is not None:
            raise RefusedError(
                f"table {table.name}: publication {row[0]} has it, too, with columns or a row filter that the"
                f" replica identity by {key.name} would not serve: PostgreSQL would refuse UPDATE and DELETE",
                hint="leave --set-identity out, or publish there what both can use",
            )


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
