"""Tables as the connected database's catalog describes them. Reads only; decides nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from psycopg import sql

from vsql_shared.changes import TableName
from vsql_shared.pg.connect import Connection

# Schemas that are never a user's.
_NOT_USERS = "n.nspname <> 'vsql_sync' AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'"

_TABLES = """
SELECT n.nspname, c.relname, c.oid, c.relkind::text, c.relpersistence::text, c.relreplident::text,
       c.relispartition, c.relrowsecurity
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
"""
_COLUMNS = """
SELECT a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attgenerated <> '',
       a.atthasdef OR a.attidentity <> '', a.attgenerated = 'v',
       a.attgenerated = '' OR (a.attgenerated = 's'
           AND pg_catalog.current_setting('server_version_num')::int >= 180000)
FROM pg_catalog.pg_attribute a
WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""
# Whole unique indexes that hold at once: no predicate, no expression, not deferrable.
_KEYS = """
SELECT i.indisprimary, i.indisreplident, ci.relname,
       ARRAY(SELECT a.attname::text FROM pg_catalog.unnest(i.indkey::int2[]) WITH ORDINALITY k (attnum, place)
             JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
             WHERE k.place <= i.indnkeyatts ORDER BY k.place)
FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class ci ON ci.oid = i.indexrelid
WHERE i.indrelid = %s AND i.indisunique AND i.indisvalid AND i.indimmediate
  AND i.indpred IS NULL AND i.indexprs IS NULL
ORDER BY i.indisprimary DESC, ci.relname
"""


@dataclass(frozen=True, slots=True)
class ColumnInfo:
    """One column."""

    name: str
    type: str
    not_null: bool
    generated: bool
    has_default: bool
    virtual: bool
    """Generated when it is read (PostgreSQL 18)."""
    may_be_sent: bool
    """Not generated, or stored and on a server that can publish it (PostgreSQL 18)."""


@dataclass(frozen=True, slots=True)
class UniqueKey:
    """A unique index over plain columns."""

    name: str
    primary: bool
    replica_identity: bool
    columns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TableInfo:
    """One table."""

    name: TableName
    oid: int
    kind: str
    """pg_class.relkind: r table, p partitioned table, and what cannot be replicated."""
    persistence: str
    replica_identity: str
    """pg_class.relreplident: d default, i index, f full, n nothing."""
    is_partition: bool
    row_security: bool
    columns: tuple[ColumnInfo, ...]
    keys: tuple[UniqueKey, ...]

    @property
    def column_names(self) -> tuple[str, ...]:
        """All columns."""
        return tuple(column.name for column in self.columns)

    @property
    def sent_columns(self) -> tuple[str, ...]:
        """Columns that replication sends: generated ones are computed where they are."""
        return tuple(column.name for column in self.columns if not column.generated)

    @property
    def full_with_generated(self) -> bool:
        """Whether UPDATE needs stored generated columns published (PostgreSQL 18): FULL holds them, too."""
        return self.replica_identity == "f" and any(c.generated and c.may_be_sent for c in self.columns)

    @property
    def identity(self) -> tuple[str, ...] | None:
        """Columns that identify a row in UPDATE and DELETE; None when nothing does."""
        if self.replica_identity == "f":
            return self.sent_columns
        for key in self.keys:
            if (self.replica_identity == "d" and key.primary) or (
                self.replica_identity == "i" and key.replica_identity
            ):
                return key.columns
        return None


def describe(conn: Connection, name: TableName) -> TableInfo | None:
    """The table, or None if there is none of that name (a view or sequence of that name is described)."""
    row = conn.execute(
        _TABLES + " WHERE n.nspname = %s AND c.relname = %s", (name.schema, name.table)
    ).fetchone()
    return None if row is None else _info(conn, row)


def key_equality(conn: Connection, table: TableInfo, left: str, right: str) -> str:
    """SQL: rows `left` and `right` are of one primary key, by the operators of its index, fully named."""
    row = conn.execute("SELECT vsql_sync.key_equality(%s, %s, %s)", (table.oid, left, right)).fetchone()
    return "" if row is None or row[0] is None else str(row[0])


def key_changed(conn: Connection, table: TableInfo) -> sql.Composable:
    """SQL of a trigger's WHEN: an update moves a row to another key.

    IS DISTINCT FROM would look its operator up by the search path.
    """
    return sql.SQL("NOT ({})").format(sql.SQL(key_equality(conn, table, "OLD", "NEW")))


def user_tables(conn: Connection) -> list[TableName]:
    """Every permanent table of a user, partitions left out (their partitioned table stands for them)."""
    rows = conn.execute(
        _TABLES + f" WHERE {_NOT_USERS} AND c.relkind IN ('r', 'p') AND c.relpersistence = 'p'"
        " AND NOT c.relispartition AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.objid = c.oid"
        " AND d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.deptype = 'e')"
        " ORDER BY 1, 2"
    )
    return [TableName(row[0], row[1]) for row in rows]


def partitions(conn: Connection, table: TableInfo) -> list[TableInfo]:
    """The leaves of a partitioned table; empty for a plain one."""
    rows = conn.execute(
        _TABLES
        + " JOIN pg_catalog.pg_partition_tree(%s::oid) t ON t.relid = c.oid WHERE t.isleaf AND t.level > 0",
        (table.oid,),
    ).fetchall()
    return [_info(conn, row) for row in rows]


def full_with_generated(conn: Connection, name: TableName) -> bool:
    """Whether the table, or a partition of it, needs stored generated columns published."""
    table = describe(conn, name)
    parts = [] if table is None else [table, *partitions(conn, table)]
    return any(part.full_with_generated for part in parts)


def has_rows(conn: Connection, names: Iterable[TableName]) -> list[TableName]:
    """Those of the tables that are not empty: with their partitions, without the children of a parent."""
    found = []
    for name in names:
        row = conn.execute(_TABLES + " WHERE n.nspname = %s AND c.relname = %s", name).fetchone()
        only = sql.SQL("ONLY " if row is not None and row[3] != "p" else "")
        query = sql.SQL("SELECT EXISTS (SELECT FROM {}{})").format(
            only, sql.Identifier(name.schema, name.table)
        )
        row = conn.execute(query).fetchone()
        if row is not None and row[0]:
            found.append(name)
    return found


def _info(conn: Connection, row: tuple[object, ...]) -> TableInfo:
    schema, table, oid, kind, persistence, identity, is_partition, row_security = row
    return TableInfo(
        TableName(str(schema), str(table)),
        int(str(oid)),
        str(kind),
        str(persistence),
        str(identity),
        bool(is_partition),
        bool(row_security),
        tuple(ColumnInfo(*column) for column in conn.execute(_COLUMNS, (oid,))),
        tuple(
            UniqueKey(name, primary, chosen, tuple(columns))
            for primary, chosen, name, columns in conn.execute(_KEYS, (oid,))
        ),
    )
