"""Whether PostgreSQL's publication still is what was decided through vsql-sync.

Not here: columns of what the WAL holds; each relation message is checked against the scope (relations.py).
That says nothing of row filters, nor of a table's list being narrowed before any row comes. Rules:

* Read in one statement, so that a decision (which changes both halves in one transaction) is never half seen.
* A schema in the publication, or all tables, make the row filters of its tables void without changing them.
* Columns that were renamed are the same columns: their present names are compared.
* A replica identity that holds a column that is left out (FULL holds all, later ones too) must not be: the
  WAL has it before a change. PostgreSQL refuses UPDATE and DELETE of such a table, so nothing was sent; it is
  said why.
* A table that PostgreSQL's publication has no more is no error: nothing of it leaves. It is logged.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

from vsql_shared.changes import TableName, quote_ident
from vsql_shared.errors import DatabaseError
from vsql_shared.pg import catalog, publication_leaves
from vsql_shared.pg.connect import Connection, errors
from vsql_shared.pg.publication_rules import identity_problem, root_identity_problem

_log = logging.getLogger(__name__)

_BOTH = """
WITH pub AS (SELECT oid, pubviaroot FROM pg_catalog.pg_publication WHERE pubname = %(name)s),
ours AS (SELECT table_schema AS s, table_name AS t, columns, row_filter FROM vsql_sync.published_tables
         WHERE publication = %(name)s),
theirs AS (SELECT n.nspname::text AS s, c.relname::text AS t,
    pg_catalog.pg_get_expr(r.prqual, r.prrelid) AS row_filter,
    CASE WHEN r.prattrs IS NOT NULL THEN ARRAY(
        SELECT a.attname::text FROM pg_catalog.pg_attribute a
        WHERE a.attrelid = r.prrelid AND a.attnum = ANY(r.prattrs::int2[])) END AS columns
    FROM pg_catalog.pg_publication_rel r JOIN pub ON pub.oid = r.prpubid
    JOIN pg_catalog.pg_class c ON c.oid = r.prrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace)
SELECT s, t, ours.columns, theirs.columns, ours.row_filter, theirs.row_filter,
    ours.t IS NULL, theirs.t IS NULL,
    (SELECT pub.pubviaroot = p.via_leaf FROM pub, vsql_sync.publications p WHERE p.name = %(name)s)
FROM ours FULL JOIN theirs USING (s, t) ORDER BY 1, 2
"""
_KIND = """
SELECT b.puballtables OR EXISTS (SELECT FROM pg_catalog.pg_publication_namespace s WHERE s.pnpubid = b.oid),
    b.pubinsert AND b.pubtruncate AND b.pubupdate <> p.insert_only AND b.pubdelete <> p.insert_only
FROM pg_catalog.pg_publication b JOIN vsql_sync.publications p ON p.name = b.pubname::text
WHERE p.name = %s
"""
# A new partition has the identity DEFAULT, whatever its table has; an index may be another than the table's.
# What the table's INCLUDEs is looked at, too: publication_rules.py decides.
_IDENTITIES = """
SELECT t.table_schema, t.table_name, n.nspname, c.relname
FROM vsql_sync.publication_tables t JOIN vsql_sync.publications p ON p.name = t.publication
JOIN pg_catalog.pg_publication b ON b.pubname = p.name AND b.pubupdate
JOIN pg_catalog.pg_class r
    ON r.oid = pg_catalog.to_regclass(pg_catalog.format('%%I.%%I', t.table_schema, t.table_name))
CROSS JOIN LATERAL pg_catalog.pg_partition_tree(r.oid) l
JOIN pg_catalog.pg_class c ON c.oid = l.relid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE p.name = %s AND NOT p.via_leaf AND l.isleaf AND l.level > 0
AND (c.relreplident NOT IN ('f', r.relreplident) OR (c.relreplident = 'i' AND EXISTS (
    SELECT FROM pg_catalog.pg_index i CROSS JOIN LATERAL pg_catalog.unnest(i.indkey::int2[]) k (attnum)
    JOIN pg_catalog.pg_attribute a ON a.attrelid = r.oid AND a.attnum = k.attnum
    WHERE i.indrelid = r.oid AND i.indisreplident AND a.attname <> ALL(ARRAY(SELECT h.attname
        FROM pg_catalog.pg_index o
        CROSS JOIN LATERAL pg_catalog.unnest(o.indkey::int2[]) WITH ORDINALITY m (attnum, place)
        JOIN pg_catalog.pg_attribute h ON h.attrelid = c.oid AND h.attnum = m.attnum
        WHERE o.indrelid = c.oid AND o.indisreplident AND m.place <= o.indnkeyatts)))))
ORDER BY 1, 2, 3, 4
"""

# Tables of which columns are left out, and their leaves, with FULL or an index that has such a column.
_UNCOVERED = """
SELECT t.columns, n.nspname, c.relname
FROM vsql_sync.published_tables t JOIN vsql_sync.publications p ON p.name = t.publication
CROSS JOIN LATERAL (SELECT pg_catalog.to_regclass(
    pg_catalog.format('%%I.%%I', t.table_schema, t.table_name))::oid AS oid) r
CROSS JOIN LATERAL (SELECT r.oid UNION SELECT relid::oid FROM pg_catalog.pg_partition_tree(r.oid)
    WHERE isleaf) l
JOIN pg_catalog.pg_class c ON c.oid = l.oid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE p.name = %s AND t.columns IS NOT NULL AND NOT p.insert_only AND (c.relreplident = 'f' OR EXISTS (
    SELECT FROM pg_catalog.pg_index i
    CROSS JOIN LATERAL pg_catalog.unnest(i.indkey::int2[]) WITH ORDINALITY k (attnum, place)
    JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
    WHERE i.indrelid = c.oid AND k.place <= i.indnkeyatts AND a.attname::text <> ALL(t.columns)
    AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident END))
ORDER BY 2, 3
"""


class _Pair(NamedTuple):
    """A table as we and as PostgreSQL have it."""

    schema: str
    table: str
    our_columns: list[str] | None
    their_columns: list[str] | None
    our_filter: str | None
    their_filter: str | None
    unknown: bool
    gone: bool
    wrong_root: bool | None


def require_none(conn: Connection, publication: str) -> None:
    """Raise DatabaseError when the publication was changed behind our back; note the leaves there are now."""
    publication_leaves.remember(conn, publication)
    with errors("looking at the publication"):
        conn.execute("SELECT vsql_sync.anchor_marks()")
        kind = conn.execute(_KIND, (publication,)).fetchone()
        pairs = [_Pair(*row) for row in conn.execute(_BOTH, {"name": publication})]
        differing = conn.execute(_IDENTITIES, (publication,)).fetchall()
    # Without one the walsender says so.
    if kind is not None:
        _require_kind(publication, widened=kind[0], operations=kind[1])
    for pair in pairs:
        _compare(publication, pair)
    for names in differing:
        _require_identity(conn, TableName(*names[:2]), TableName(*names[2:]))
    require_identities(conn, publication)


def require_identities(conn: Connection, publication: str) -> None:
    """Raise DatabaseError for a table whose replica identity holds a column that is left out."""
    with errors("looking at replica identities"):
        for columns, *name in conn.execute(_UNCOVERED, (publication,)).fetchall():
            table = catalog.describe(conn, TableName(*name))
            if table is None:
                continue
            problem = identity_problem(table, columns, set())
            if problem is not None:
                raise DatabaseError(
                    problem,
                    hint="PostgreSQL refuses UPDATE and DELETE of it meanwhile, and nothing that is left out"
                    " was sent; set it back, and the stream goes on",
                )


def _require_kind(publication: str, *, widened: bool, operations: bool) -> None:
    if widened:
        raise DatabaseError(
            f"PostgreSQL's publication {publication} has a whole schema, or all tables: no row filter holds"
            " then",
            hint=f"take it out with ALTER PUBLICATION {publication} DROP TABLES IN SCHEMA …; what was written"
            " meanwhile was not filtered: look for it at the targets",
        )
    if not operations:
        raise DatabaseError(
            f"PostgreSQL's publication {publication} does not send the operations that were decided",
            hint=f"set them back with ALTER PUBLICATION {publication} SET (publish = …); changes that were"
            " left out meanwhile are lost: compare the tables at the targets",
        )


def _require_identity(conn: Connection, root_name: TableName, leaf_name: TableName) -> None:
    with errors("looking at a partition"):
        root, leaf = catalog.describe(conn, root_name), catalog.describe(conn, leaf_name)
    problem = root_identity_problem(root, leaf) if root and leaf else None
    if problem is not None:
        raise DatabaseError(problem, hint="rows of it that were deleted meanwhile may be left at the targets")


def _compare(publication: str, pair: _Pair) -> None:
    name = TableName(pair.schema, pair.table)
    if pair.gone:
        _log.warning(
            "PostgreSQL's publication %s has table %s no more: it does not travel", publication, name
        )
        return
    if pair.unknown:
        raise DatabaseError(
            f"PostgreSQL's publication has table {name}, which was not published through vsql-sync",
            hint=f"take it out: ALTER PUBLICATION {publication} DROP TABLE {name}",
        )
    if pair.wrong_root:
        raise DatabaseError(
            f"publish_via_partition_root of publication {publication} is not what was decided",
            hint="set it back with ALTER PUBLICATION … SET (publish_via_partition_root = …)",
        )
    ours, theirs = pair.our_columns, pair.their_columns
    if (ours is None) != (theirs is None) or set(ours or ()) != set(theirs or ()):
        _raise_columns(publication, name, ours, theirs)
    if pair.our_filter != pair.their_filter:
        raise DatabaseError(
            f"table {name}: the row filter of PostgreSQL's publication is not what was decided:"
            f" {pair.their_filter or 'none'}, expected {pair.our_filter or 'none'}",
            hint="set it back with ALTER PUBLICATION … SET TABLE; what was written meanwhile was filtered by"
            " the other one: compare the table at the targets",
        )


def _raise_columns(
    publication: str, name: TableName, ours: list[str] | None, theirs: list[str] | None
) -> None:
    if ours is None:
        what = f"has the columns {', '.join(map(quote_ident, theirs or ()))} only; all are published"
    elif theirs is None:
        what = f"has all columns; {', '.join(map(quote_ident, ours))} are published"
    else:
        first = min(set(ours) ^ set(theirs))
        what = f"{'lacks' if first in ours else 'has'} column {quote_ident(first)}, unlike what was decided"
    raise DatabaseError(
        f"table {name}: PostgreSQL's publication {publication} {what}",
        hint="set it back with ALTER PUBLICATION … SET TABLE, or let a column in: `syncctl publication"
        " add-column"
        f" {publication} {name}.COLUMN`",
    )
