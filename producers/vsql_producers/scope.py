"""What a publication may carry: as operators decided it, as an epoch signs it, as rows are held against it.

Not here: relation messages (relations.py), and what PostgreSQL's publication says now (drift.py). Rules:

* The scope is read once an epoch; its SHA-256 stands in the epoch's signed opening, its text in our table.
  While the epoch lasts every relation message is held against it, and another scope needs another epoch.
* A column outside of it never passes: the stream stops before anything is sealed. A column an operator took
  out is taken out of the rows the WAL still has of it.
* Sensitive authentication data stops the stream whatever is listed: by mark, and by name where nobody
  cleared it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from vsql_shared.changes import Column, TableName, quote_ident
from vsql_shared.errors import DatabaseError, TransientError
from vsql_shared.pg import pci, publication_leaves, row_order
from vsql_shared.pg.connect import Connection, errors
from vsql_shared.pg.pci_names import Kind, suggest

FORMAT = 1


class ScopeChanged(TransientError):
    """An operator changed what the publication may carry, or marked PCI columns."""


# A mark holds for its table, for that one's partitions, and for the tables it is a partition of.
_MARKS = """
WITH marked AS (SELECT DISTINCT table_schema AS s, table_name AS t, pg_catalog.to_regclass(
        pg_catalog.format('%%I.%%I', table_schema, table_name)) AS id FROM vsql_sync.pci_marks),
family AS (SELECT m.s, m.t, m.s AS other_s, m.t AS other_t FROM marked m
    UNION SELECT m.s, m.t, n.nspname::text, k.relname::text
    FROM marked m CROSS JOIN LATERAL (
        SELECT x.relid::oid AS oid FROM pg_catalog.pg_partition_ancestors(m.id) x
        UNION SELECT y.relid::oid FROM pg_catalog.pg_partition_tree(m.id) y) r
    JOIN pg_catalog.pg_class k ON k.oid = r.oid JOIN pg_catalog.pg_namespace n ON n.oid = k.relnamespace)
SELECT f.other_s, f.other_t, c.column_name, p.exclude_pci AND c.marked_at > p.created_at,
    (f.s, f.t) = (f.other_s, f.other_t), c.kind
FROM vsql_sync.pci_marks c JOIN family f ON (f.s, f.t) = (c.table_schema, c.table_name)
CROSS JOIN vsql_sync.publications p WHERE p.name = %s
"""


class Scope(NamedTuple):
    """What the publication may carry, as the operator decided it on this node."""

    columns: Mapping[TableName, frozenset[str] | None]
    """Published tables and their columns; None is all of a table's."""
    pci: Mapping[TableName, frozenset[str]]
    """Columns marked as PCI data."""
    forbidden: Mapping[TableName, frozenset[str]]
    """Those that were marked after a publication without PCI data was made, and must not pass."""
    added: Mapping[TableName, frozenset[str]] = {}
    """Listed columns that the WAL from before an operator's decision lacks."""
    leaves: Mapping[TableName, TableName | None] = {}
    """Of tables published by leaf: leaf → its table; None: an operator said to pass over what comes of it."""
    via_leaf: bool = False
    renamed: Mapping[TableName, Mapping[str, str]] = {}
    """Listed columns that have another name than when they were listed: old → present one."""
    family: frozenset[TableName] = frozenset()
    """Tables that are marked, or a relative of which is."""
    marks: frozenset[tuple[str, str, str]] = frozenset()
    """All marks: schema, table, column."""
    excludes_pci: bool = False
    insert_only: bool = False
    removed: Mapping[TableName, frozenset[str]] = {}
    """Columns an operator took out: the WAL from before has them, and they are taken out of its rows."""
    authentication: Mapping[TableName, frozenset[str]] = {}
    """Columns marked as sensitive authentication data."""
    cleared: Mapping[TableName, frozenset[str]] = {}
    """Columns that are not what their names suggest, as an operator said."""
    not_secret: Mapping[TableName, frozenset[str]] = {}
    """Those of them that were cleared of being sensitive authentication data, not of something less."""
    by_row: frozenset[TableName] | None = None
    """Tables, and leaves of such, whose rows are spread over partitions; None: the publication's are not."""


def load_scope(conn: Connection, publication: str) -> Scope:
    """Read the scope from vsql_sync.publications, published_tables and pci_marks."""
    with errors("reading the publication's scope"):
        there = conn.execute(
            "SELECT via_leaf, exclude_pci, insert_only, apply_mode = 'partitioned'"
            " FROM vsql_sync.publications WHERE name = %s",
            (publication,),
        ).fetchone()
        tables = conn.execute(
            "SELECT table_schema, table_name, columns, added_columns, decided, present, removed_columns"
            " FROM vsql_sync.published_tables WHERE publication = %s",
            (publication,),
        ).fetchall()
        marked = conn.execute(_MARKS, (publication,)).fetchall()
    if there is None:
        raise DatabaseError(
            f"publication {publication} is not known to vsql-sync",
            hint="make it with `syncctl publication create`",
        )
    columns = {TableName(s, t): None if c is None else frozenset(c) for s, t, c, *_ in tables}
    leaves = publication_leaves.remembered(conn, publication) if there[0] else {}
    # Of a table's relatives the published ones count; a leaf's owner is among them.
    ours = [
        row for row in marked if (name := TableName(row[0], row[1])) in columns or (row[4] and name in leaves)
    ]
    secret = Kind.AUTHENTICATION.value
    return Scope(
        columns,
        _by_table((s, t, c) for s, t, c, *_ in ours),
        _by_table((s, t, c) for s, t, c, later, *_ in ours if later),
        _by_table((s, t, column) for s, t, _, added, *_ in tables for column in added),
        leaves,
        there[0],
        {
            TableName(s, t): _renamed(before, now, present)
            for s, t, now, _, before, present, _ in tables
            if now != before
        },
        frozenset(TableName(s, t) for s, t, *_ in marked),
        read_marks(conn),
        there[1],
        there[2],
        _by_table((row[0], row[1], column) for row in tables for column in row[6]),
        _by_table((s, t, c) for s, t, c, *_, kind in ours if kind == secret),
        *_cleared(conn, columns),
        row_order.fit(conn, [*columns, *leaves]) if there[3] else None,
    )


_ByTable = dict[TableName, frozenset[str]]


def _cleared(conn: Connection, names: Iterable[TableName]) -> tuple[_ByTable, _ByTable]:
    """What was cleared of each of the tables, or of a relative of it: all, and of authentication data."""
    found: _ByTable = {}
    not_secret: _ByTable = {}
    with errors("reading the columns that were cleared"):
        some = conn.execute("SELECT EXISTS (SELECT FROM vsql_sync.pci_cleared)").fetchone() == (True,)
        for name in names if some else ():
            kin = publication_leaves.family(conn, name) | {name, *publication_leaves.ancestors(conn, name)}
            cleared = pci.cleared_of(conn, kin)
            if cleared:
                found[name] = frozenset(cleared)
                not_secret[name] = frozenset(c for c, kind in cleared.items() if kind == Kind.AUTHENTICATION)
    return found, not_secret


def document(publication: str, scope: Scope) -> dict[str, Any]:
    """The scope as an epoch signs it, without its salt (docs/operations/scope-report.md)."""
    tables: list[dict[str, Any]] = [
        {
            "table": str(name),
            "columns": None if columns is None else sorted(columns),
            "pci": sorted(scope.pci.get(name, ())),
            "authentication": sorted(scope.authentication.get(name, ())),
            "cleared": sorted(scope.cleared.get(name, ())),
            "removed": sorted(scope.removed.get(name, ())),
        }
        for name, columns in sorted(scope.columns.items())
    ]
    return {
        "format": FORMAT,
        "publication": publication,
        "exclude_pci": scope.excludes_pci,
        "insert_only": scope.insert_only,
        "via_leaf": scope.via_leaf,
        "tables": tables,
    }


def removed_from(scope: Scope, table: TableName, identity: str, columns: Sequence[Column]) -> frozenset[str]:
    """Those of a relation message's columns that an operator took out. Raises DatabaseError for a key.

    `identity` is the message's replica identity: under FULL ('f') every column is a key.
    """
    owner = scope.leaves.get(table) or table
    listed = (scope.columns.get(owner) or frozenset()) - _namesakes(scope, owner, [c.name for c in columns])
    gone = scope.removed.get(owner, frozenset()) - listed
    keys = sorted(column.name for column in columns if column.key and column.name in gone)
    if keys and identity != "f":
        column = quote_ident(keys[0])
        raise DatabaseError(
            f"table {table}: column {column} was taken out of the publication, and rows written before are"
            " identified by it",
            hint=f"let them pass with it (`syncctl publication add-column` with {table}.{column}), or"
            " initialise the targets anew",
        )
    return gone.intersection(column.name for column in columns)


def require_no_authentication_data(scope: Scope, table: TableName, columns: Sequence[Column]) -> None:
    """Raise DatabaseError for a column with sensitive authentication data, by mark or by name and type."""
    owner = scope.leaves.get(table) or table
    marked = scope.authentication.get(table, frozenset()) | scope.authentication.get(owner, frozenset())
    cleared = scope.not_secret.get(table, frozenset()) | scope.not_secret.get(owner, frozenset())
    for column in columns:
        found = suggest(column.name, column.type_name)
        looks = found is not None and found.kind == Kind.AUTHENTICATION and column.name not in cleared
        if column.name not in marked and not looks:
            continue
        what = f"{table}.{quote_ident(column.name)}"
        why = f"looks like {found.looks_like}" if looks and found else "is marked so"
        raise DatabaseError(
            f"table {table}: column {quote_ident(column.name)} would leave, and sensitive authentication data"
            f" never does ({why})",
            hint=f"take it out: `syncctl publication remove-column` with {what}; where it is something else,"
            f" `syncctl publication pci clear {what} --reason …`",
        )


def _renamed(before: Sequence[str], now: Sequence[str], present: Sequence[str]) -> dict[str, str]:
    """Old names; one that another column bears by now is that one's: it may be the one that is left out."""
    return {old: new for old, new in zip(before, now, strict=True) if old != new and old not in present}


def _namesakes(scope: Scope, owner: TableName, columns: Sequence[str]) -> frozenset[str]:
    """Columns of the WAL that bear the present name of a listed one, which comes under its former name.

    They are others: dropped or renamed since, and left out, perhaps, under the very name.
    """
    renamed = scope.renamed.get(owner, {})
    return frozenset(renamed[column] for column in columns if column in renamed).intersection(columns)


def read_marks(conn: Connection) -> frozenset[tuple[str, str, str]]:
    """All marks, as Scope has them."""
    with errors("reading the PCI marks"):
        rows = conn.execute("SELECT table_schema, table_name, column_name FROM vsql_sync.pci_marks")
        return frozenset(rows.fetchall())


def _by_table(rows: Iterable[tuple[str, str, str]]) -> dict[TableName, frozenset[str]]:
    found: dict[TableName, set[str]] = {}
    for schema, table, column in rows:
        found.setdefault(TableName(schema, table), set()).add(column)
    return {name: frozenset(columns) for name, columns in found.items()}


def marks_of(scope: Scope, table: TableName) -> frozenset[str]:
    """Names of the columns of a table that are marked; a leaf's marks are those of its table, and its own."""
    owner = scope.leaves.get(table) or table
    return scope.pci.get(table, frozenset()) | scope.pci.get(owner, frozenset())


def pci_in(
    scope: Scope, table: TableName, columns: Sequence[str], past: frozenset[str] = frozenset()
) -> tuple[str, ...]:
    """The columns that hold PCI data, as manifests name them. Raises DatabaseError for one out of scope."""
    owner = scope.leaves.get(table) or table
    if owner not in scope.columns:
        raise DatabaseError(
            f"PostgreSQL's publication sends table {table}, which was not published through vsql-sync",
            hint="take it out with ALTER PUBLICATION … DROP TABLE; what was written meanwhile is passed over",
        )
    listed = scope.columns[owner]
    # The WAL from before a rename has the old name.
    renamed = scope.renamed.get(owner, {})
    present = {renamed.get(column, column) for column in columns}
    extra = set() if listed is None else (present - listed) | _namesakes(scope, owner, columns)
    if extra:
        column = quote_ident(min(extra))
        raise DatabaseError(
            f"table {table}: PostgreSQL's publication sends column {column},"
            " which the publication leaves out",
            hint="mend it with ALTER PUBLICATION … SET TABLE, naming the columns; rows that were written"
            " meanwhile hold the column: have it taken out of them (`syncctl publication remove-column` with"
            f" {table}.{column}), or publish it too (add-column)",
        )
    marked_since = scope.forbidden.get(table, frozenset()) | scope.forbidden.get(owner, frozenset())
    if found := marked_since.intersection(columns):
        column = quote_ident(min(found))
        raise DatabaseError(
            f"table {table}: column {column} was marked as PCI data, which the publication excludes",
            hint="take it out, of rows that were written before, too: `syncctl publication remove-column`"
            f" with {table}.{column}",
        )
    added = {renamed.get(column, column) for column in scope.added.get(owner, ())}
    missing = set() if listed is None else listed - present - added
    if missing:
        column = quote_ident(min(missing))
        raise DatabaseError(
            f"table {table}: PostgreSQL's publication did not send column {column}, which is published",
            hint=f"`syncctl publication add-column` with {table}.{column} puts it back and lets the rows"
            " pass that were written without it; mend those at the targets",
        )
    marked = marks_of(scope, table) | past
    return tuple(f"{table}.{quote_ident(column)}" for column in sorted(marked.intersection(columns)))
