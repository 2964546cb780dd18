"""Tables as the target is told of them: type names, PCI marks, scope.

Not here: decoding of relation messages (pgoutput.py), what may travel in binary (binary_types.py), and when a
descriptor is sent (seal.py). Rules:

* A column the publication's own scope excludes never passes: a changed PostgreSQL publication stops the
  stream before anything is sealed. So does a listed column that does not come, unless it was let in later.
* A leaf of a table that is published by leaf stands under that table's scope, also when it was detached or
  dropped since. What was a leaf and is known to nobody stops the stream: its rows would be lost.
* A type whose binary form is bound to this server makes the whole session text; pgoutput knows no finer
  choice.
* A descriptor keeps its salt while the table stays the same: repeated relation messages change nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from vsql_producers import binary_types
from vsql_producers.pgoutput import RelationMessage, TypeMessage
from vsql_producers.transactions import Descriptor
from vsql_shared.changes import Column, Relation, TableName, quote_ident
from vsql_shared.errors import DatabaseError, TransientError
from vsql_shared.pg import publication_leaves
from vsql_shared.pg.connect import Connection, errors
from vsql_shared.wire.pack import encode_relation, relation_hash

_log = logging.getLogger(__name__)


class BinaryRefused(TransientError):
    """A table with a column whose type is bound to its server turned up in a binary session.

    The next session must be text: the catalog may know nothing of a column the WAL still holds.
    """


class ScopeChanged(TransientError):
    """An operator changed what the publication may carry, or marked PCI columns."""


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


def load_scope(conn: Connection, publication: str) -> Scope:
    """Read the scope from vsql_sync.publications, publication_tables and pci_columns."""
    with errors("reading the publication's scope"):
        there = conn.execute(
            "SELECT via_leaf FROM vsql_sync.publications WHERE name = %s", (publication,)
        ).fetchone()
        tables = conn.execute(
            "SELECT table_schema, table_name, columns, added_columns FROM vsql_sync.publication_tables"
            " WHERE publication = %s",
            (publication,),
        ).fetchall()
        marked = conn.execute(
            "SELECT c.table_schema, c.table_name, c.column_name, p.exclude_pci AND c.marked_at > p.created_at"
            " FROM vsql_sync.pci_columns c CROSS JOIN vsql_sync.publications p WHERE p.name = %s",
            (publication,),
        ).fetchall()
    if there is None:
        raise DatabaseError(
            f"publication {publication} is not known to vsql-sync",
            hint="make it with `syncctl publication create`",
        )
    columns = {TableName(s, t): None if c is None else frozenset(c) for s, t, c, _ in tables}
    leaves = publication_leaves.remembered(conn, publication) if there[0] else {}
    ours = [row for row in marked if (name := TableName(row[0], row[1])) in columns or name in leaves]
    return Scope(
        columns,
        _by_table((s, t, c) for s, t, c, _ in ours),
        _by_table((s, t, c) for s, t, c, later in ours if later),
        _by_table((s, t, column) for s, t, _, added in tables for column in added),
        leaves,
        there[0],
    )


def _by_table(rows: Iterable[tuple[str, str, str]]) -> dict[TableName, frozenset[str]]:
    found: dict[TableName, set[str]] = {}
    for schema, table, column in rows:
        found.setdefault(TableName(schema, table), set()).add(column)
    return {name: frozenset(columns) for name, columns in found.items()}


def pci_in(scope: Scope, table: TableName, columns: Sequence[str]) -> tuple[str, ...]:
    """The columns that hold PCI data, as manifests name them. Raises DatabaseError for one out of scope."""
    # A leaf's marks are those of its table, and its own.
    owner = scope.leaves.get(table) or table
    if owner not in scope.columns:
        raise DatabaseError(
            f"PostgreSQL's publication sends table {table}, which was not published through vsql-sync",
            hint="take it out with ALTER PUBLICATION … DROP TABLE; what was written meanwhile is passed over",
        )
    listed = scope.columns[owner]
    extra = set() if listed is None else set(columns) - listed
    for name in {table, owner}:
        extra |= scope.forbidden.get(name, frozenset()).intersection(columns)
    if extra:
        column = quote_ident(min(extra))
        raise DatabaseError(
            f"table {table}: PostgreSQL's publication sends column {column},"
            " which the publication leaves out",
            hint="mend it with ALTER PUBLICATION … SET TABLE, naming the columns; rows that were written"
            " meanwhile hold the column: publish it too (`syncctl publication add-column`"
            f" with {table}.{column}), or initialise the targets anew",
        )
    missing = set() if listed is None else listed - set(columns) - scope.added.get(owner, frozenset())
    if missing:
        column = quote_ident(min(missing))
        raise DatabaseError(
            f"table {table}: PostgreSQL's publication did not send column {column}, which is published",
            hint=f"`syncctl publication add-column` with {table}.{column} puts it back and lets the rows"
            " pass that were written without it; mend those at the targets",
        )
    marked = scope.pci.get(table, frozenset()) | scope.pci.get(owner, frozenset())
    return tuple(f"{table}.{quote_ident(column)}" for column in sorted(marked.intersection(columns)))


class Describer:
    """Makes descriptors of relation messages; asks the catalog, and remembers."""

    def __init__(
        self,
        conn: Connection,
        publication: str,
        scope: Scope,
        *,
        binary: bool,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._conn = conn
        self._publication = publication
        self._scope = scope
        self._binary = binary
        self._random = random
        self._known: dict[int, tuple[RelationMessage, tuple[Column, ...], Descriptor]] = {}

    def __call__(self, message: RelationMessage, types: Mapping[int, TypeMessage]) -> Descriptor | None:
        """The descriptor of a table, the same one while the table stays the same.

        None for a table that is not ours to send: never published through vsql-sync, or no longer, and out of
        PostgreSQL's publication by now. The WAL still holds what was written while it was in.
        """
        message = self._under_known_name(message)
        name = TableName(message.schema, message.table)
        if not self._is_sent(name):
            _log.warning("changes of a table that is not published any more are passed over: %s", name)
            return None
        if self._binary and binary_types.ways(self._conn, [c.type_oid for c in message.columns]).bound:
            raise BinaryRefused(
                f"table {message.schema}.{message.table} has a column that cannot travel in binary"
            )
        type_names = self._type_names(message, types)
        columns = tuple(
            Column(c.name, c.key, c.type_oid, c.typmod, type_name)
            for c, type_name in zip(message.columns, type_names, strict=True)
        )
        known = self._known.get(message.relation_id)
        if known is not None and known[:2] == (message, columns):
            return known[2]
        descriptor = describe(
            name,
            message.replica_identity,
            columns,
            self._scope,
            self._random(16),
        )
        self._known[message.relation_id] = (message, columns, descriptor)
        return descriptor

    def _under_known_name(self, message: RelationMessage) -> RelationMessage:
        """The WAL calls a table what it was called then: another name, perhaps, for a part of a transaction.

        Where that one is not known the table's present one counts, so that its rows are not passed over.
        """
        name = TableName(message.schema, message.table)
        if name in self._scope.columns or name in self._scope.leaves:
            return message
        with errors("looking for a table's present name"):
            row = self._conn.execute(
                "SELECT n.nspname, c.relname FROM pg_catalog.pg_class c"
                " JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = %s::oid",
                (message.relation_id,),
            ).fetchone()
        present = TableName(*row) if row else name
        known = present in self._scope.columns or present in self._scope.leaves
        return message._replace(schema=present.schema, table=present.table) if known else message

    def _is_sent(self, name: TableName) -> bool:
        """Whether to describe a table. Raises DatabaseError where rows of a leaf would be lost unseen."""
        scope = self._scope
        if name in scope.columns:
            return True
        if scope.via_leaf and scope.leaves.get(name) is None:
            # It may have been attached a moment ago.
            publication_leaves.remember(self._conn, self._publication)
            leaves = publication_leaves.remembered(self._conn, self._publication)
            scope = self._scope = scope._replace(leaves=leaves)
        if name in scope.leaves:
            return scope.leaves[name] is not None
        if self._published_now(name):
            return True
        if scope.via_leaf:
            raise DatabaseError(
                f"the WAL holds changes of {name}, which is in no published table now: it may have been a"
                " partition that was detached or dropped before they were read",
                hint=f"`syncctl publication partition {self._publication} {name}` with --of and its table"
                " lets them pass, with --pass-over they are left out",
            )
        return False

    def _published_now(self, name: TableName) -> bool:
        with errors("looking at the publication"):
            row = self._conn.execute(
                "SELECT EXISTS (SELECT FROM pg_catalog.pg_publication_tables"
                " WHERE pubname = %s AND schemaname = %s AND tablename = %s)",
                (self._publication, *name),
            ).fetchone()
        return bool(row and row[0])

    def _type_names(self, message: RelationMessage, types: Mapping[int, TypeMessage]) -> list[str]:
        """SQL names, schema-qualified where not built in: the session's search_path holds pg_catalog only."""
        oids = [c.type_oid for c in message.columns]
        typmods = [c.typmod for c in message.columns]
        with errors("naming column types"):
            rows = self._conn.execute(
                "SELECT format_type(o, m), EXISTS (SELECT FROM pg_catalog.pg_type p WHERE p.oid = o)"
                " FROM unnest(%s::oid[], %s::int4[]) WITH ORDINALITY u (o, m, place) ORDER BY place",
                (oids, typmods),
            ).fetchall()
        names = []
        for (name, there), oid in zip(rows, oids, strict=True):
            sent = types.get(oid)
            # A type dropped since: the WAL still names it.
            dropped = f"{quote_ident(sent.schema)}.{quote_ident(sent.name)}" if sent else "unknown"
            names.append(str(name) if there else dropped)
        return names


def describe(
    name: TableName, replica_identity: str, columns: tuple[Column, ...], scope: Scope, salt: bytes
) -> Descriptor:
    """The descriptor of a table, checked against the scope."""
    pci = pci_in(scope, name, [column.name for column in columns])
    encoded = encode_relation(Relation(name, replica_identity, columns, salt))
    return Descriptor(name, encoded, relation_hash(encoded), pci)
