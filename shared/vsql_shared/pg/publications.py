"""Publications: which tables and columns leave this node, and which of those columns hold PCI data.

A publication is PostgreSQL's publication of the same name plus our rows about it; both change in one
transaction. Rules:

* Tables are listed one by one. `*` means every table there is now: a new table never begins to travel, and
  never widens the PCI scope, without an operator's act. Schema vsql_sync is never published.
* What PostgreSQL would refuse at the first UPDATE (no replica identity, a key column left out, FULL with
  columns left out) is refused here, before anything is changed, for all tables in one message.
* A publication with streams does not change: their targets were checked against what it has. What may be
  decided of one all the same is in publication_changes.py.
* Where PCI columns are excluded, every table has a column list: a column that is added later stays out until
  an operator lets it in. What is suggested and not cleared counts like what is marked (pci.py).
* Sensitive authentication data is never published, excluded or not.
* A row filter is kept as PostgreSQL prints it, and a partitioned table travels under its own name, or leaf by
  leaf (docs/operations/publications.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from psycopg import sql

from vsql_shared.changes import TableName
from vsql_shared.errors import RefusedError, UserError
from vsql_shared.pg import (
    catalog,
    nodes,
    oplog,
    pci,
    publication_leaves,
    publication_use,
    replica_identity,
    roles,
    row_filter,
    row_order,
    sequences,
    signals,
)
from vsql_shared.pg.catalog import TableInfo
from vsql_shared.pg.connect import Connection, errors
from vsql_shared.pg.publication_rules import (
    NAME,
    authentication_problems,
    choose_columns,
    filter_problem,
    identity_problem,
    leaf_problem,
    root_identity_problem,
    table_problem,
)
from vsql_shared.pg.row_filter import RowFilter
from vsql_shared.pg.table_spec import TableSpec

TRANSACTIONAL, PARTITIONED = "transactional", "partitioned"
"""Ways to apply a publication (docs/design/0015)."""

_SENDS_GENERATED = 180000
"""Servers from this version on can publish stored generated columns."""


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
    via_leaf: bool = False
    """Partitioned tables travel leaf by leaf (publish_via_partition_root = false)."""
    message_prefixes: tuple[str, ...] = ()
    """Logical messages with one of these prefixes are carried, too."""
    sequences: bool = False
    """Carry how far the sequences of published columns have got."""
    more_sequences: tuple[TableName, ...] = ()
    """Sequences that are carried beside those."""
    set_identity: bool = False
    """Give tables that need it the best REPLICA IDENTITY their indexes allow."""
    apply_mode: str = TRANSACTIONAL
    """How targets apply it: whole transactions in order, or PARTITIONED, each row's changes in order."""


@dataclass(frozen=True, slots=True)
class PublishedTable:
    """A table of a publication; `columns` None is all of them, `where` its row filter."""

    name: TableName
    columns: tuple[str, ...] | None
    where: str | None = None


@dataclass(frozen=True, slots=True)
class PublicationInfo:
    """A publication as it is."""

    name: str
    tables: tuple[PublishedTable, ...]
    exclude_pci: bool
    insert_only: bool
    pci: dict[TableName, list[str]]
    """Marked columns that travel."""
    via_leaf: bool = False
    message_prefixes: tuple[str, ...] = ()
    sequences: bool = False
    more_sequences: tuple[TableName, ...] = ()
    apply_mode: str = TRANSACTIONAL


def create(conn: Connection, request: PublicationRequest) -> PublicationInfo:
    """Create the publication, or change it to what is asked for; nothing happens when it is so already."""
    if NAME.fullmatch(request.name) is None:
        raise UserError(
            f"{request.name!r} is no name for a publication",
            hint="a-z 0-9 _ -, beginning with a letter, at most 63",
        )
    if not request.tables:
        raise UserError(f"publication {request.name} has no tables", hint='give --table "payments(*)"')
    if request.apply_mode == PARTITIONED and (request.sequences or request.more_sequences):
        raise RefusedError(
            f"publication {request.name} cannot carry sequences and be applied partitioned: its value"
            " comes after all rows that use it",
            hint="publish the sequences with other tables, in a publication that is applied transactionally",
        )
    nodes.local(conn)
    with errors(f"creating publication {request.name}"), conn.transaction():
        pci.mark(conn, request.pci_columns)
        after = asked(conn, request)
        before = find(conn, request.name)
        if before == after:
            return after
        if before is not None:
            publication_use.refuse(conn, request.name, "changed")
        _write(conn, after, exists=before is not None)
        signals.write(conn, after)
        publication_leaves.remember(conn, request.name)
        grant_reading(conn, after)
        oplog.record(
            conn,
            "publication.create" if before is None else "publication.change",
            "publication",
            request.name,
            old=None if before is None else _as_json(before),
            new=_as_json(after),
        )
    return after


def asked(conn: Connection, request: PublicationRequest) -> PublicationInfo:
    """What a request asks for. Raises RefusedError where it cannot be."""
    tables = resolve(conn, request)
    return PublicationInfo(
        request.name,
        tuple(tables),
        request.exclude_pci or any(spec.exclude_pci for spec in request.tables),
        request.insert_only,
        _pci_of(conn, tables),
        request.via_leaf,
        **signals.asked(conn, request),
        apply_mode=request.apply_mode,
    )


def drop(conn: Connection, name: str) -> None:
    """Drop a publication no stream uses."""
    nodes.local(conn)
    with errors(f"dropping publication {name}"), conn.transaction():
        before = find(conn, name)
        if before is None:
            raise RefusedError(
                f"there is no publication {name} on this node", hint="see `syncctl publication list`"
            )
        publication_use.refuse(conn, name, "dropped")
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
        "SELECT exclude_pci, insert_only, via_leaf, apply_mode FROM vsql_sync.publications WHERE name = %s",
        (name,),
    ).fetchone()
    if row is None:
        return None
    tables = [
        PublishedTable(TableName(schema, table), None if columns is None else tuple(columns), where)
        for schema, table, columns, where in conn.execute(
            "SELECT table_schema, table_name, columns, row_filter FROM vsql_sync.published_tables"
            " WHERE publication = %s ORDER BY 1, 2",
            (name,),
        )
    ]
    also = signals.read(conn, name)
    return PublicationInfo(
        name, tuple(tables), row[0], row[1], _pci_of(conn, tables), row[2], **also, apply_mode=row[3]
    )


def carried(conn: Connection, publication: PublicationInfo) -> list[PublishedTable]:
    """The tables as they travel: by leaf, a partitioned table's leaves stand for it."""
    found = []
    for table in publication.tables:
        leaves = publication_leaves.leaves(conn, table.name) if publication.via_leaf else []
        found += [PublishedTable(leaf, None) for leaf in leaves] or [table]
    return found


def grant_reading(conn: Connection, publication: PublicationInfo) -> None:
    """Let the producer's role read what the first copy reads: published columns, and those of row filters."""
    readable: dict[TableName, tuple[str, ...] | None] = {}
    for table in carried(conn, publication):
        info = catalog.describe(conn, table.name) if table.columns is not None and table.where else None
        extra = row_filter.read(conn, info, table.where).columns if info and table.where else ()
        columns = table.columns
        readable[table.name] = None if columns is None else tuple(dict.fromkeys((*columns, *extra)))
    roles.grant_source(conn, readable)
    listed = [one.name for one in sequences.published(conn, publication.name)]
    roles.grant_sequences(conn, roles.PRODUCER, listed)


def resolve(conn: Connection, request: PublicationRequest) -> list[PublishedTable]:
    """The tables and columns a request means. Raises RefusedError with everything that is wrong."""
    tables: list[PublishedTable] = []
    problems: list[str] = []
    for spec in _spread(conn, request.tables):
        table, found = _resolve_one(conn, request, spec)
        problems += found
        if table is not None:
            tables.append(table)
    problems += publication_leaves.nested(conn, [table.name for table in tables])
    if problems:
        lines = "\n  ".join(problems)
        raise RefusedError(f"publication {request.name} is refused, nothing was changed:\n  {lines}")
    if not tables:
        raise RefusedError("the database has no tables to publish", hint="create them first")
    return sorted(tables, key=lambda table: table.name)


def _resolve_one(
    conn: Connection, request: PublicationRequest, spec: TableSpec
) -> tuple[PublishedTable | None, list[str]]:
    """One table, and what is wrong with it."""
    assert spec.name is not None  # noqa: S101 - _spread has replaced `*`
    table = catalog.describe(conn, spec.name)
    problem = table_problem(spec.name, table, via_leaf=request.via_leaf)
    if problem or table is None:
        return None, [problem or f"{spec.name}: there is no such table"]
    closed = request.exclude_pci or spec.exclude_pci
    secret = pci.left_out(conn, table) if closed else set()
    if request.set_identity and not request.insert_only:
        table = replica_identity.ensure(conn, request.name, table, spec.columns, secret, closed=closed)
    columns, problems = choose_columns(table, spec.columns, secret, closed=closed)
    if not problems:
        sent = table.sent_columns if columns is None else columns
        problems += authentication_problems(table.name, sent, pci.authentication(conn, table))
    by_leaf = request.via_leaf and leaf_problem(table, columns, spec.where)
    problems += [by_leaf] if by_leaf else []
    predicate = None
    if spec.where is not None and not by_leaf:
        try:
            predicate = row_filter.read(conn, table, spec.where)
        except RefusedError as error:
            problems.append(error.message)
    if not problems and not request.insert_only:
        problems += _identity_problems(conn, request, table, columns, secret, predicate)
    if request.apply_mode == PARTITIONED and not problems:
        by_leaf_only = request.via_leaf and table.kind == "p"
        for part in catalog.partitions(conn, table) if by_leaf_only else [table]:
            problems += row_order.source_problems(conn, part)
    return PublishedTable(table.name, columns, predicate.text if predicate else None), problems


def _identity_problems(
    conn: Connection,
    request: PublicationRequest,
    table: TableInfo,
    columns: tuple[str, ...] | None,
    secret: set[str],
    predicate: RowFilter | None,
) -> Iterator[str]:
    """Of the table, or of its partitions: those are where rows change."""
    filtered = predicate.columns if predicate else ()
    for part in catalog.partitions(conn, table) if table.kind == "p" else [table]:
        problem = identity_problem(part, columns, secret) or filter_problem(part, filtered)
        if problem is None and part is not table and not request.via_leaf:
            problem = root_identity_problem(table, part)
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
        table = catalog.describe(conn, published.name)
        if table is not None and (secret := pci.marked_anywhere(conn, table)):
            sent = published.columns if published.columns is not None else table.sent_columns
            scope[published.name] = [column for column in sent if column in secret]
    return {name: columns for name, columns in scope.items() if columns}


def _write(conn: Connection, publication: PublicationInfo, *, exists: bool) -> None:
    known = conn.execute(
        "SELECT FROM pg_catalog.pg_publication WHERE pubname = %s", (publication.name,)
    ).fetchone()
    if known is not None and not exists:
        raise RefusedError(
            f"PostgreSQL has a publication {publication.name} that was not made by vsql-sync",
            hint="choose another name, or drop it if nobody uses it",
        )
    name = sql.Identifier(publication.name)
    if known is not None:
        # Made anew, as no stream uses it: altering options and tables in turn would have to fit at each step.
        conn.execute(sql.SQL("DROP PUBLICATION {}").format(name))
    operations = "insert, truncate" if publication.insert_only else "insert, update, delete, truncate"
    via_root = "false" if publication.via_leaf else "true"
    conn.execute(
        sql.SQL(
            "CREATE PUBLICATION {} FOR TABLE {} WITH (publish = {}, publish_via_partition_root = {})"
        ).format(name, tables_sql(publication.tables), operations, sql.SQL(via_root))
    )
    if (
        conn.info.server_version >= _SENDS_GENERATED
        and not publication.insert_only
        and any(catalog.full_with_generated(conn, table.name) for table in publication.tables)
    ):
        # Without it PostgreSQL would refuse the source's own UPDATEs of those tables.
        conn.execute(sql.SQL("ALTER PUBLICATION {} SET (publish_generated_columns = stored)").format(name))
    conn.execute(
        "INSERT INTO vsql_sync.publications (name, exclude_pci, via_leaf, insert_only, apply_mode)"
        " VALUES (%s, %s, %s, %s, %s) ON CONFLICT (name) DO UPDATE SET exclude_pci = excluded.exclude_pci,"
        " via_leaf = excluded.via_leaf, insert_only = excluded.insert_only, apply_mode = excluded.apply_mode",
        (
            publication.name,
            publication.exclude_pci,
            publication.via_leaf,
            publication.insert_only,
            publication.apply_mode,
        ),
    )
    for table in ("publication_tables", "publication_leaves"):
        conn.execute(
            sql.SQL("DELETE FROM vsql_sync.{} WHERE publication = %s").format(sql.Identifier(table)),
            (publication.name,),
        )
    for published in publication.tables:
        columns = None if published.columns is None else list(published.columns)
        conn.execute(
            "INSERT INTO vsql_sync.publication_tables (publication, table_schema, table_name, columns,"
            " row_filter) VALUES (%s, %s, %s, %s, %s)",
            (publication.name, *published.name, columns, published.where),
        )
    conn.execute("SELECT vsql_sync.note_places(%s)", (publication.name,))


def tables_sql(tables: Iterable[PublishedTable]) -> sql.Composed:
    """Tables as CREATE and ALTER PUBLICATION take them."""
    return sql.SQL(", ").join(map(_table_sql, tables))


def _table_sql(table: PublishedTable) -> sql.Composed:
    """A table of CREATE PUBLICATION. ONLY: children of an inheritance parent are tables of their own."""
    parts = [sql.SQL("ONLY "), sql.Identifier(table.name.schema, table.name.table)]
    if table.columns is not None:
        parts.append(sql.SQL(" ({})").format(sql.SQL(", ").join(map(sql.Identifier, table.columns))))
    if table.where is not None:
        parts.append(sql.SQL(" WHERE ({})").format(sql.SQL(table.where)))
    return sql.Composed(parts)


def _as_json(publication: PublicationInfo) -> dict[str, object]:
    return {
        "tables": {
            str(table.name): "all" if table.columns is None else list(table.columns)
            for table in publication.tables
        },
        "filters": {str(table.name): table.where for table in publication.tables if table.where},
        "via_leaf": publication.via_leaf,
        "exclude_pci": publication.exclude_pci,
        "insert_only": publication.insert_only,
        "apply_mode": publication.apply_mode,
        "pci_columns": {str(name): columns for name, columns in publication.pci.items()},
        **signals.as_json(publication),
    }
