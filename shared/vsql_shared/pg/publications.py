"""Publications: which tables and columns leave this node, and which of those columns hold PCI data.

A publication is PostgreSQL's publication of the same name plus our rows about it; both change in one
transaction. Rules:

* Tables are listed one by one. `*` means every table there is now: a new table never begins to travel, and
  never widens the PCI scope, without an operator's act. Schema vsql_sync is never published.
* What PostgreSQL would refuse at the first UPDATE (no replica identity, a key column left out, FULL with
  columns left out) is refused here, before anything is changed, for all tables in one message.
* A publication with streams does not change: their targets were checked against what it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from psycopg import sql

from vsql_shared.changes import TableName, quote_ident
from vsql_shared.errors import RefusedError, UserError
from vsql_shared.pg import catalog, nodes, oplog, roles
from vsql_shared.pg.catalog import TableInfo
from vsql_shared.pg.connect import Connection, errors
from vsql_shared.pg.publication_rules import NAME, choose_columns, identity_problem, table_problem
from vsql_shared.pg.table_spec import TableSpec


@dataclass(frozen=True, slots=True)
class PublicationRequest:
    """What an operator asks for."""

    name: str
    tables: tuple[TableSpec, ...]
    pci_columns: tuple[tuple[TableName, str], ...] = ()
    """Columns to mark, before any are left out."""
    exclude_pci: bool = False
    """Leave marked columns out of every table (TableSpec has the same for one)."""
    insert_only: bool = False
    """Publish INSERT and TRUNCATE only; tables need no replica identity."""


@dataclass(frozen=True, slots=True)
class PublishedTable:
    """A table of a publication; `columns` None is all of them."""

    name: TableName
    columns: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class PublicationInfo:
    """A publication as it is."""

    name: str
    tables: tuple[PublishedTable, ...]
    exclude_pci: bool
    insert_only: bool
    pci: dict[TableName, list[str]]
    """Marked columns that travel."""


def create(conn: Connection, request: PublicationRequest) -> PublicationInfo:
    """Create the publication, or change it to what is asked for; nothing happens when it is so already."""
    if NAME.fullmatch(request.name) is None:
        raise UserError(
            f"{request.name!r} is no name for a publication",
            hint="a-z 0-9 _ -, beginning with a letter, at most 63",
        )
    if not request.tables:
        raise UserError(f"publication {request.name} has no tables", hint='give --table "payments(*)"')
    nodes.local(conn)
    with errors(f"creating publication {request.name}"), conn.transaction():
        mark_pci(conn, request.pci_columns)
        tables = resolve(conn, request)
        before = find(conn, request.name)
        excludes = request.exclude_pci or any(spec.exclude_pci for spec in request.tables)
        after = PublicationInfo(
            request.name, tuple(tables), excludes, request.insert_only, _pci_of(conn, tables)
        )
        if before == after:
            return after
        if before is not None:
            _refuse_used(conn, request.name, "changed")
        _write(conn, after, exists=before is not None)
        roles.grant_source(conn, {table.name: table.columns for table in tables})
        oplog.record(
            conn,
            "publication.create" if before is None else "publication.change",
            "publication",
            request.name,
            old=None if before is None else _as_json(before),
            new=_as_json(after),
        )
    return after


def drop(conn: Connection, name: str) -> None:
    """Drop a publication no stream uses."""
    nodes.local(conn)
    with errors(f"dropping publication {name}"), conn.transaction():
        before = find(conn, name)
        if before is None:
            raise RefusedError(
                f"there is no publication {name} on this node", hint="see `syncctl publication list`"
            )
        _refuse_used(conn, name, "dropped")
        conn.execute("DELETE FROM vsql_sync.publications WHERE name = %s", (name,))
        conn.execute(sql.SQL("DROP PUBLICATION IF EXISTS {}").format(sql.Identifier(name)))
        oplog.record(conn, "publication.drop", "publication", name, old=_as_json(before))


def everything(conn: Connection) -> list[PublicationInfo]:
    """All publications of this node."""
    with errors("reading the publications"):
        names = [row[0] for row in conn.execute("SELECT name FROM vsql_sync.publications ORDER BY name")]
        found = (find(conn, name) for name in names)
        return [publication for publication in found if publication is not None]


def find(conn: Connection, name: str) -> PublicationInfo | None:
    """One publication, or None."""
    row = conn.execute(
        "SELECT exclude_pci, NOT coalesce(p.pubupdate, true) FROM vsql_sync.publications v"
        " LEFT JOIN pg_catalog.pg_publication p ON p.pubname = v.name WHERE v.name = %s",
        (name,),
    ).fetchone()
    if row is None:
        return None
    tables = [
        PublishedTable(TableName(schema, table), None if columns is None else tuple(columns))
        for schema, table, columns in conn.execute(
            "SELECT table_schema, table_name, columns FROM vsql_sync.publication_tables"
            " WHERE publication = %s ORDER BY 1, 2",
            (name,),
        )
    ]
    return PublicationInfo(name, tuple(tables), row[0], row[1], _pci_of(conn, tables))


def pci_scope(conn: Connection, publication: str) -> dict[tuple[str, str], list[str]]:
    """(schema, table) → marked columns that travel with the publication; tables without any are left out."""
    with errors("reading the PCI scope"):
        found = find(conn, publication)
    if found is None:
        raise RefusedError(
            f"there is no publication {publication} on this node", hint="see `syncctl publication list`"
        )
    return {(name.schema, name.table): columns for name, columns in found.pci.items()}


def mark_pci(conn: Connection, columns: Iterable[tuple[TableName, str]]) -> int:
    """Mark columns as PCI data; returns how many are newly marked. Inside the caller's transaction."""
    added = 0
    for name, column in columns:
        table = catalog.describe(conn, name)
        if table is None or column not in table.column_names:
            raise RefusedError(f"there is no column {name}.{quote_ident(column)}", hint="check the spelling")
        new = conn.execute(
            "INSERT INTO vsql_sync.pci_columns (table_schema, table_name, column_name) VALUES (%s, %s, %s)"
            " ON CONFLICT DO NOTHING",
            (name.schema, name.table, column),
        ).rowcount
        if new:
            oplog.record(conn, "pci.mark", "column", f"{name}.{quote_ident(column)}")
        added += new
    return added


def marked(conn: Connection, name: TableName) -> set[str]:
    """Columns of a table that are marked as PCI data."""
    rows = conn.execute(
        "SELECT column_name FROM vsql_sync.pci_columns WHERE table_schema = %s AND table_name = %s", name
    )
    return {row[0] for row in rows}


def resolve(conn: Connection, request: PublicationRequest) -> list[PublishedTable]:
    """The tables and columns a request means. Raises RefusedError with everything that is wrong."""
    tables: list[PublishedTable] = []
    problems: list[str] = []
    for spec in _spread(conn, request.tables):
        assert spec.name is not None  # noqa: S101 - _spread has replaced `*`
        table = catalog.describe(conn, spec.name)
        problem = table_problem(spec.name, table)
        if problem or table is None:
            problems.append(problem or f"{spec.name}: there is no such table")
            continue
        secret = marked(conn, table.name) if request.exclude_pci or spec.exclude_pci else set()
        columns, wrong = choose_columns(table, spec.columns, secret)
        problems += wrong
        if not wrong and not request.insert_only:
            problems += _identity_problems(conn, table, columns, secret)
        tables.append(PublishedTable(table.name, columns))
    if problems:
        lines = "\n  ".join(problems)
        raise RefusedError(f"publication {request.name} is refused, nothing was changed:\n  {lines}")
    if not tables:
        raise RefusedError("the database has no tables to publish", hint="create them first")
    return sorted(tables, key=lambda table: table.name)


def _identity_problems(
    conn: Connection, table: TableInfo, columns: tuple[str, ...] | None, secret: set[str]
) -> Iterator[str]:
    """Of the table, or of its partitions: those are where rows change."""
    for part in catalog.partitions(conn, table) if table.kind == "p" else [table]:
        problem = identity_problem(part, columns, secret)
        if problem is not None:
            yield problem


def _spread(conn: Connection, specs: Iterable[TableSpec]) -> list[TableSpec]:
    """Replace `*` by every table there is; a table that is also named keeps what was said of it."""
    named: dict[TableName, TableSpec] = {}
    everything_ = [spec for spec in specs if spec.name is None]
    for spec in specs:
        if spec.name is None:
            continue
        if spec.name in named:
            raise UserError(f"table {spec.name} is named twice", hint="name each table once")
        named[spec.name] = spec
    if everything_:
        for name in catalog.user_tables(conn):
            named.setdefault(name, TableSpec(name, None, everything_[0].exclude_pci))
    return list(named.values())


def _pci_of(conn: Connection, tables: Iterable[PublishedTable]) -> dict[TableName, list[str]]:
    scope = {}
    for published in tables:
        secret = marked(conn, published.name)
        table = catalog.describe(conn, published.name) if secret else None
        if table is not None:
            sent = published.columns if published.columns is not None else table.sent_columns
            scope[published.name] = [column for column in sent if column in secret]
    return {name: columns for name, columns in scope.items() if columns}


def _refuse_used(conn: Connection, name: str, what: str) -> None:
    row = conn.execute(
        "SELECT chain FROM vsql_sync.streams WHERE publication = %s LIMIT 1", (name,)
    ).fetchone()
    if row is not None:
        raise RefusedError(
            f"publication {name} has stream {row[0]} and cannot be {what}",
            hint="make another publication for other tables; streams cannot be removed in this version",
        )


def _write(conn: Connection, publication: PublicationInfo, *, exists: bool) -> None:
    name = sql.Identifier(publication.name)
    # ONLY: children of an inheritance parent are tables of their own and are named if they are meant.
    tables = sql.SQL(", ").join(
        sql.SQL("ONLY {}{}").format(
            sql.Identifier(table.name.schema, table.name.table),
            sql.SQL("")
            if table.columns is None
            else sql.SQL(" ({})").format(sql.SQL(", ").join(map(sql.Identifier, table.columns))),
        )
        for table in publication.tables
    )
    operations = "insert, truncate" if publication.insert_only else "insert, update, delete, truncate"
    options = sql.SQL("publish = {}, publish_via_partition_root = true").format(operations)
    known = conn.execute(
        "SELECT FROM pg_catalog.pg_publication WHERE pubname = %s", (publication.name,)
    ).fetchone()
    if known is not None and not exists:
        raise RefusedError(
            f"PostgreSQL has a publication {publication.name} that was not made by vsql-sync",
            hint="choose another name, or drop it if nobody uses it",
        )
    if known is not None:
        conn.execute(sql.SQL("ALTER PUBLICATION {} SET TABLE {}").format(name, tables))
        conn.execute(sql.SQL("ALTER PUBLICATION {} SET ({})").format(name, options))
    else:
        conn.execute(sql.SQL("CREATE PUBLICATION {} FOR TABLE {} WITH ({})").format(name, tables, options))
    conn.execute(
        "INSERT INTO vsql_sync.publications (name, exclude_pci) VALUES (%s, %s)"
        " ON CONFLICT (name) DO UPDATE SET exclude_pci = excluded.exclude_pci",
        (publication.name, publication.exclude_pci),
    )
    conn.execute("DELETE FROM vsql_sync.publication_tables WHERE publication = %s", (publication.name,))
    for table in publication.tables:
        conn.execute(
            "INSERT INTO vsql_sync.publication_tables (publication, table_schema, table_name, columns)"
            " VALUES (%s, %s, %s, %s)",
            (publication.name, *table.name, None if table.columns is None else list(table.columns)),
        )


def _as_json(publication: PublicationInfo) -> dict[str, object]:
    return {
        "tables": {
            str(table.name): "all" if table.columns is None else list(table.columns)
            for table in publication.tables
        },
        "exclude_pci": publication.exclude_pci,
        "insert_only": publication.insert_only,
        "pci_columns": {str(name): columns for name, columns in publication.pci.items()},
    }
