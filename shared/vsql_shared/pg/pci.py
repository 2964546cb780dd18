"""The catalogue of columns with PCI data: marked by an operator, suggested by name and type, or cleared.

A mark follows its column when that is renamed; the name it was made under stays marked, because the WAL may
still hold it (view vsql_sync.pci_marks). Rules:

* A mark stays. What a name suggests can be cleared, with a reason that is kept; what an operator marked can
  not.
* Where PCI columns are excluded, what is suggested and not cleared counts like what is marked.
* A clearing is of what was suggested then: sensitive authentication data that a column's type suggests since
  is not cleared by one of account data.
* Sensitive authentication data (Kind.AUTHENTICATION), marked or suggested, is never published unless what its
  name suggests was cleared.
* Marks and clearings of a partitioned table hold for its partitions, and the other way round.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import NamedTuple

from vsql_shared.changes import TableName, quote_ident
from vsql_shared.errors import RefusedError
from vsql_shared.pg import catalog, oplog, publication_leaves
from vsql_shared.pg.catalog import ColumnInfo, TableInfo
from vsql_shared.pg.connect import Connection, errors
from vsql_shared.pg.pci_names import Kind, Suggestion, kind_of, suggest


class Catalogued(NamedTuple):
    """A column of the catalogue, or one that should be in it."""

    table: TableName
    column: str
    kind: Kind
    state: str
    """marked, suggested or cleared."""
    note: str
    """What it looks like, and why it was cleared."""


def mark(
    conn: Connection, columns: Iterable[tuple[TableName, str]], kind: Kind | None = None
) -> list[tuple[TableName, str]]:
    """Mark columns as PCI data; returns those newly marked. Inside the caller's transaction.

    Without `kind` the name decides which it is. Authentication data that was marked as less becomes it.
    """
    added = []
    for name, column in columns:
        table = catalog.describe(conn, name)
        known = None if table is None else next((c for c in table.columns if c.name == column), None)
        if table is None or known is None:
            raise RefusedError(f"there is no column {name}.{quote_ident(column)}", hint="check the spelling")
        chosen = kind or _kind_of(conn, table, known)
        present = conn.execute(
            "SELECT kind FROM vsql_sync.pci_columns"
            " WHERE (table_schema, table_name, column_name) = (%s, %s, %s)",
            (*name, column),
        ).fetchone()
        if present is not None and present[0] in (chosen.value, Kind.AUTHENTICATION.value):
            continue
        conn.execute(
            "INSERT INTO vsql_sync.pci_columns (table_schema, table_name, column_name, kind)"
            " VALUES (%s, %s, %s, %s)"
            " ON CONFLICT (table_schema, table_name, column_name) DO UPDATE SET kind = excluded.kind",
            (*name, column, chosen.value),
        )
        what = f"{name}.{quote_ident(column)}"
        oplog.record(conn, "pci.mark", "column", what, new={"kind": chosen.value})
        added.append((name, column))
    conn.execute("SELECT vsql_sync.anchor_marks()")
    return added


def _kind_of(conn: Connection, table: TableInfo, column: ColumnInfo) -> Kind:
    """What a column that is marked without a word is: what its name suggests, unless that was cleared."""
    found = suggest(column.name, column.type)
    if found is None or is_cleared(column.name, found.kind, cleared_anywhere(conn, table)):
        return Kind.CARDHOLDER
    return found.kind


def clear(conn: Connection, name: TableName, column: str, reason: str) -> str:
    """Say of a column that it is not what its name suggests; returns what that was.

    Also of one that only the WAL has by that name: it was renamed or dropped before its rows were read.
    """
    with errors("clearing a column"), conn.transaction():
        table = catalog.describe(conn, name)
        known = None if table is None else next((c for c in table.columns if c.name == column), None)
        what = f"{name}.{quote_ident(column)}"
        found = suggest(column, known.type if known else "text")
        if table is None or (known is None and found is None):
            raise RefusedError(f"there is no column {what}", hint="check the spelling")
        if column in marked_anywhere(conn, table):
            raise RefusedError(
                f"column {what} was marked as PCI data by an operator, and a mark stays",
                hint="only what a name suggests can be cleared; make a view or another column for other data",
            )
        if found is None:
            raise RefusedError(f"nothing is suggested of column {what}: there is nothing to clear")
        if not reason.strip():
            raise RefusedError("a reason is needed", hint="it is kept with the column, for whoever asks")
        conn.execute(
            "INSERT INTO vsql_sync.pci_cleared (table_schema, table_name, column_name, looks_like, reason)"
            " VALUES (%s, %s, %s, %s, %s) ON CONFLICT (table_schema, table_name, column_name)"
            " DO UPDATE SET looks_like = excluded.looks_like, reason = excluded.reason,"
            " cleared_at = now(), cleared_by = session_user",
            (*name, column, found.looks_like, reason),
        )
        new = {"looks_like": found.looks_like, "kind": found.kind.value, "reason": reason}
        oplog.record(conn, "pci.clear", "column", what, new=new)
    return found.looks_like


def marked(conn: Connection, name: TableName, kind: Kind | None = None) -> set[str]:
    """Columns of a table that are marked as PCI data, by the mark's name and by the present one."""
    rows = conn.execute(
        "SELECT column_name FROM vsql_sync.pci_marks WHERE table_schema = %s AND table_name = %s"
        " AND kind = coalesce(%s, kind)",
        (*name, None if kind is None else kind.value),
    )
    return {row[0] for row in rows}


def marked_anywhere(conn: Connection, table: TableInfo, kind: Kind | None = None) -> set[str]:
    """Marks of the table, of the partitioned tables it is a part of, and of its own partitions."""
    return set().union(*(marked(conn, name, kind) for name in relatives(conn, table)))


def cleared_anywhere(conn: Connection, table: TableInfo) -> dict[str, Kind]:
    """Columns of the table, or of a relative, that an operator cleared, and of what."""
    return cleared_of(conn, relatives(conn, table))


def cleared_of(conn: Connection, names: Container[TableName]) -> dict[str, Kind]:
    """Columns of any of the tables that an operator cleared; of authentication data where one was."""
    rows = conn.execute(
        "SELECT table_schema, table_name, column_name, looks_like FROM vsql_sync.pci_cleared"
    ).fetchall()
    found: dict[str, Kind] = {}
    for schema, name, column, looks_like in rows:
        if TableName(schema, name) in names and found.get(column) != Kind.AUTHENTICATION:
            found[column] = kind_of(looks_like)
    return found


def is_cleared(column: str, kind: Kind, cleared: Mapping[str, Kind]) -> bool:
    """Whether what a column looks like was cleared: one of account data clears no authentication data."""
    return column in cleared and (kind != Kind.AUTHENTICATION or cleared[column] == kind)


def suggested(conn: Connection, table: TableInfo) -> dict[str, Suggestion]:
    """Columns nobody marked or cleared, and what their names and types suggest."""
    marked_, cleared = marked_anywhere(conn, table), cleared_anywhere(conn, table)
    found = {column.name: suggest(column.name, column.type) for column in table.columns}
    return {
        name: one
        for name, one in found.items()
        if one is not None and name not in marked_ and not is_cleared(name, one.kind, cleared)
    }


def left_out(conn: Connection, table: TableInfo) -> set[str]:
    """Where PCI columns are excluded: what is marked, and what is suggested and was not cleared."""
    return marked_anywhere(conn, table) | set(suggested(conn, table))


def authentication(conn: Connection, table: TableInfo) -> dict[str, str]:
    """Columns that are never published, and why."""
    found = dict.fromkeys(
        marked_anywhere(conn, table, Kind.AUTHENTICATION), "is marked as sensitive authentication data"
    )
    cleared = cleared_anywhere(conn, table)
    for column in table.columns:
        one = suggest(column.name, column.type)
        # Also of one that is marked as less: a mark adds, and clears nothing.
        if (
            one is not None
            and one.kind == Kind.AUTHENTICATION
            and not is_cleared(column.name, one.kind, cleared)
        ):
            words = f"looks like {one.looks_like}, which is sensitive authentication data"
            found.setdefault(column.name, words)
    return found


def everything(conn: Connection) -> list[Catalogued]:
    """The whole catalogue: marks, clearings, and what is suggested of the tables there are."""
    with errors("reading the PCI columns"):
        rows = conn.execute(
            "SELECT table_schema, table_name, column_name, kind FROM vsql_sync.pci_columns"
        ).fetchall()
        found = [Catalogued(TableName(s, t), c, Kind(k), "marked", "") for s, t, c, k in rows]
        rows = conn.execute(
            "SELECT table_schema, table_name, column_name, looks_like, reason FROM vsql_sync.pci_cleared"
        ).fetchall()
        found += [
            Catalogued(TableName(s, t), c, kind_of(like), "cleared", f"looks like {like}: {reason}")
            for s, t, c, like, reason in rows
        ]
        for name in catalog.user_tables(conn):
            table = catalog.describe(conn, name)
            if table is not None:
                found += [
                    Catalogued(name, column, one.kind, "suggested", f"looks like {one.looks_like}")
                    for column, one in suggested(conn, table).items()
                ]
    return sorted(found, key=lambda one: (one.table, one.column))


def relatives(conn: Connection, table: TableInfo) -> set[TableName]:
    """The table, those it is a partition of, and its own partitions: what is said of one holds for all."""
    names = {table.name, *(publication_leaves.ancestors(conn, table.name) if table.is_partition else ())}
    return names | (publication_leaves.family(conn, table.name) if table.kind == "p" else set())
