"""What an operator may decide of a publication that streams use: columns let in or taken out, partitions.

Rules:

* PostgreSQL's publication and our rows change in one transaction; the producer goes on with a new epoch.
* One decision after the other: each locks the publication before it reads it, or the later one would write
  back what the earlier took out.
* What an operator took out no file puts back: `add-column` does, for that one column.
* A column that is let in travels with the changes that are written from then on. Rows written before are not
  sent again: at the target they keep what the column had there.
* A column that is taken out leaves no more, whenever a row was written: PostgreSQL decodes older WAL under
  the list of that time, and the producer takes the column out of those rows (projection.py). What was
  sealed before stays in Kafka and at the targets.
"""

from __future__ import annotations

from dataclasses import replace

from psycopg import sql

from vsql_shared.changes import TableName, quote_ident
from vsql_shared.errors import RefusedError
from vsql_shared.pg import catalog, many_writers, nodes, oplog, pci, publication_use, publications
from vsql_shared.pg.catalog import TableInfo
from vsql_shared.pg.connect import Connection, errors
from vsql_shared.pg.publication_rules import identity_problem, leaf_problem
from vsql_shared.pg.publications import PublicationInfo, PublishedTable

# Columns that were renamed keep the names they were decided under: the WAL may still have those.
_CHANGED = """
UPDATE vsql_sync.publication_tables t SET
    columns = CASE WHEN %(present)s::text[] IS NOT NULL THEN ARRAY(
        SELECT coalesce(known.decided, u.name)
        FROM unnest(%(present)s::text[]) WITH ORDINALITY u (name, place)
        LEFT JOIN ROWS FROM (unnest(v.decided), unnest(v.columns)) known (decided, name) USING (name)
        ORDER BY u.place) END,
    attnums = CASE WHEN %(present)s::text[] IS NOT NULL THEN ARRAY(
        SELECT a.attnum FROM unnest(%(present)s::text[]) WITH ORDINALITY u (name, place)
        JOIN pg_catalog.pg_attribute a ON a.attrelid = r.oid AND a.attname = u.name AND NOT a.attisdropped
        ORDER BY u.place) END,
    added_columns = pg_catalog.array_remove(t.added_columns, %(column)s::text) || %(added)s::text[],
    removed_columns = pg_catalog.array_remove(t.removed_columns, %(column)s::text) || %(removed)s::text[],
    row_filter = %(where)s, table_oid = r.oid,
    filter_tree = (SELECT f.tree FROM vsql_sync.publication_filters f
        WHERE f.publication = t.publication AND f.table_oid = r.oid)
FROM vsql_sync.published_tables v, pg_catalog.pg_class r
WHERE (t.publication, t.table_schema, t.table_name) = (%(publication)s, %(schema)s, %(table)s)
  AND (v.publication, v.table_schema, v.table_name) = (t.publication, t.table_schema, t.table_name)
  AND r.oid = pg_catalog.to_regclass(pg_catalog.format('%%I.%%I', t.table_schema, t.table_name))
"""


def add_column(conn: Connection, name: str, table: TableName, column: str) -> None:
    """Let a column travel from now on; also one that was taken out of PostgreSQL's publication without us."""
    nodes.local(conn)
    with errors(f"changing publication {name}"), conn.transaction():
        before, published = _require(conn, name, table)
        info = catalog.describe(conn, table)
        sendable = _sendable(info, published)
        if info is None or column not in sendable:
            raise RefusedError(
                f"table {table} has no column {quote_ident(column)} that could be sent",
                hint="check the spelling; generated columns are computed at the target",
            )
        listed = published.columns
        # One that was taken out of PostgreSQL's publication and put back there is missing from some rows.
        settled = listed is None or (column in listed and column in _added(conn, name, table))
        if settled and column in _sent(conn, name, table):
            raise RefusedError(f"column {table}.{quote_ident(column)} is published already")
        _require_allowed(conn, before, info, column)
        if listed is not None:
            listed = tuple(one for one in sendable if one in {*listed, column})
        _write(conn, before, replace(published, columns=listed), column)


def _sendable(info: TableInfo | None, published: PublishedTable) -> tuple[str, ...]:
    """Columns that can be let in: stored generated ones (PostgreSQL 18) only where columns are listed."""
    if info is None:
        return ()
    if published.columns is None:
        return info.sent_columns
    return tuple(column.name for column in info.columns if column.may_be_sent)


def follow(conn: Connection, before: PublicationInfo, after: PublicationInfo) -> None:
    """Make a publication that streams use what it is to be, where only columns of its tables differ."""
    now = {table.name: table for table in before.tables}
    same = replace(before, tables=(), pci={}) == replace(after, tables=(), pci={})
    if not same or now.keys() != {table.name for table in after.tables}:
        publication_use.refuse(conn, before.name, "changed, but for columns of its tables")
    for table in after.tables:
        old, new = now[table.name].columns, table.columns
        if table.where != now[table.name].where or (new is None and old is not None):
            publication_use.refuse(conn, before.name, "changed, but for columns of its tables")
        if new is None:
            continue
        info = catalog.describe(conn, table.name)
        sent = old if old is not None else info.sent_columns if info is not None else ()
        if old is None and set(sent) == set(new):
            publication_use.refuse(conn, before.name, "closed to columns that are added later")
        out = _removed(conn, before.name, table.name)
        for column in [one for one in new if one not in sent]:
            if column in out:
                what = f"{table.name}.{quote_ident(column)}"
                raise RefusedError(
                    f"column {what} was taken out of publication {before.name}, the file would put it back",
                    hint="list the table's other columns there, or let it in: `syncctl publication add-column"
                    f" {before.name} {what}`",
                )
            add_column(conn, before.name, table.name, column)
        for column in [one for one in sent if one not in new]:
            remove_column(conn, before.name, table.name, column)


def _require_allowed(conn: Connection, publication: PublicationInfo, table: TableInfo, column: str) -> None:
    """Raise RefusedError for a column the publication, or every one, leaves out."""
    what = f"column {table.name}.{quote_ident(column)}"
    forbidden = pci.authentication(conn, table).get(column)
    clear = f"where it is not: `syncctl publication pci clear {table.name}.{quote_ident(column)} --reason …`"
    if forbidden is not None:
        raise RefusedError(f"{what} {forbidden} and is never published", hint=clear)
    if not publication.exclude_pci:
        return
    if column in pci.marked_anywhere(conn, table):
        raise RefusedError(
            f"{what} is marked as PCI data, which publication {publication.name} excludes",
            hint="make another publication for it",
        )
    found = pci.suggested(conn, table).get(column)
    if found is not None:
        raise RefusedError(
            f"{what} looks like {found.looks_like}, and publication {publication.name} excludes PCI data",
            hint=clear,
        )


def remove_column(conn: Connection, name: str, table: TableName, column: str) -> bool:
    """Take a column out, from now on and out of the backlog; also one that never was to be in it.

    False where the table has no column of that name now: only rows of the backlog can have it.
    """
    nodes.local(conn)
    with errors(f"changing publication {name}"), conn.transaction():
        before, published = _require(conn, name, table)
        if many_writers.is_shared(conn, name):
            raise RefusedError(
                f"publication {name} has tables that every node writes, and every node must have whole rows",
                hint="what must not leave this node cannot be in such a table: move it to another one",
            )
        info = catalog.describe(conn, table)
        if info is None:
            raise RefusedError(f"there is no table {table}", hint="check the spelling")
        sent = info.sent_columns if published.columns is None else published.columns
        what = f"{table}.{quote_ident(column)}"
        if column not in sent and column in _removed(conn, name, table):
            raise RefusedError(f"column {what} is out of publication {name} already")
        left = tuple(one for one in sent if one != column)
        problem = leaf_problem(info, left, None) if before.via_leaf else None
        for part in [info, *catalog.partitions(conn, info)] if info.kind == "p" else [info]:
            if not before.insert_only:
                problem = problem or identity_problem(part, left, set())
        if not left:
            problem = f"{table}: no column is left to publish"
        if problem is not None:
            raise RefusedError(f"column {what} cannot be taken out: {problem}")
        _write(conn, before, replace(published, columns=left), column, removed=True)
    return column in info.column_names


def settle_partition(conn: Connection, name: str, leaf: TableName, root: TableName | None) -> None:
    """Say what a table was whose rows the WAL holds and no catalog explains: a leaf of `root`, or nothing."""
    nodes.local(conn)
    with errors(f"changing publication {name}"), conn.transaction():
        publication = _find(conn, name)
        if not publication.via_leaf:
            raise RefusedError(
                f"publication {name} is by root", hint="its partitions have no rows of their own"
            )
        if root is not None and root not in {table.name for table in publication.tables}:
            raise RefusedError(
                f"publication {name} has no table {root}", hint="see `syncctl publication list`"
            )
        conn.execute(
            "INSERT INTO vsql_sync.publication_leaves (publication, table_schema, table_name, root_schema,"
            " root_name) VALUES (%s, %s, %s, %s, %s) ON CONFLICT (publication, table_schema, table_name)"
            " DO UPDATE SET root_schema = excluded.root_schema, root_name = excluded.root_name",
            (name, *leaf, *(root or (None, None))),
        )
        what = {"partition": str(leaf), "of": str(root) if root else None}
        oplog.record(conn, "publication.partition", "publication", name, new=what)


def _require(conn: Connection, name: str, table: TableName) -> tuple[PublicationInfo, PublishedTable]:
    publication = _find(conn, name)
    published = next((one for one in publication.tables if one.name == table), None)
    if published is None:
        raise RefusedError(f"publication {name} has no table {table}", hint="see `syncctl publication list`")
    return publication, published


def _find(conn: Connection, name: str) -> PublicationInfo:
    conn.execute("SELECT FROM vsql_sync.publications WHERE name = %s FOR UPDATE", (name,))
    publication = publications.find(conn, name)
    if publication is None:
        raise RefusedError(
            f"there is no publication {name} on this node", hint="see `syncctl publication list`"
        )
    return publication


def _sent(conn: Connection, name: str, table: TableName) -> list[str]:
    """The columns PostgreSQL's publication has of a table."""
    row = conn.execute(
        "SELECT attnames::text[] FROM pg_catalog.pg_publication_tables"
        " WHERE (pubname, schemaname, tablename) = (%s, %s, %s)",
        (name, *table),
    ).fetchone()
    return [] if row is None else list(row[0])


def _added(conn: Connection, name: str, table: TableName) -> list[str]:
    """Columns that rows in the WAL may lack, as an operator decided."""
    return _decided(conn, name, table)[0]


def _removed(conn: Connection, name: str, table: TableName) -> list[str]:
    """Columns that rows in the WAL may have and that do not leave."""
    return _decided(conn, name, table)[1]


def _decided(conn: Connection, name: str, table: TableName) -> tuple[list[str], list[str]]:
    row = conn.execute(
        "SELECT added_columns, removed_columns FROM vsql_sync.publication_tables"
        " WHERE (publication, table_schema, table_name) = (%s, %s, %s)",
        (name, *table),
    ).fetchone()
    return ([], []) if row is None else (list(row[0]), list(row[1]))


def _write(
    conn: Connection,
    before: PublicationInfo,
    changed: PublishedTable,
    column: str,
    *,
    removed: bool = False,
) -> None:
    """Both halves. A table taken out of PostgreSQL's publication, or changed there, is put back by this."""
    tables = tuple(changed if one.name == changed.name else one for one in before.tables)
    conn.execute(
        sql.SQL("ALTER PUBLICATION {} SET TABLE {}").format(
            sql.Identifier(before.name), publications.tables_sql(tables)
        )
    )
    present = None if changed.columns is None else list(changed.columns)
    names = {"publication": before.name, "schema": changed.name.schema, "table": changed.name.table}
    marks = {"column": column, "added": [] if removed else [column], "removed": [column] if removed else []}
    conn.execute(_CHANGED, {**names, **marks, "present": present, "where": changed.where})
    publications.grant_reading(conn, replace(before, tables=tables))
    what = f"{changed.name}.{quote_ident(column)}"
    act = "publication.remove-column" if removed else "publication.add-column"
    oplog.record(conn, act, "publication", before.name, new={"column": what})
