"""A table of the target as its catalog describes it, and what a source's types are called here.

Not here: how a change is written (statements.py). Rules:

* Only ordinary and partitioned tables outside of the system's and our own schema are written, whatever a
  descriptor says.
* A description carries the version of every catalog row it was read from: after the table was locked, an
  equal version means that nothing changed.
* Type names from descriptors are looked up by the server; into SQL go only names the server made.
"""

# ruff: noqa: S608 - put together from constants of this module only
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vsql_shared.changes import TableName
from vsql_shared.errors import DatabaseError, DecodeError
from vsql_shared.pg import generated as generation

if TYPE_CHECKING:
    from vsql_shared.pg.connect import Connection

FORBIDDEN_SCHEMAS = frozenset({"vsql_sync", "pg_catalog", "information_schema", "pg_toast"})


@dataclass(frozen=True, slots=True)
class TypeName:
    """A type of the target: domains stand as their base type, which has the same bytes.

    `finite`: it holds intervals, and this server is older than 17, which gave two of them another meaning.
    """

    oid: int
    sql: str
    finite: bool = False


@dataclass(frozen=True, slots=True)
class TargetColumn:
    """A column of the target. `comparable`: IS NOT DISTINCT FROM works with pg_catalog's operators alone.

    `domain`: its own type is a domain over `type`. `modifier`: its own or its domain's length or precision,
    -1 when it has none; `exact`: `type` with it, as SQL.
    """

    name: str
    type: TypeName
    generated: bool
    identity_always: bool
    comparable: bool
    collation: str
    domain: bool
    modifier: int = -1
    exact: str = ""


@dataclass(frozen=True, slots=True)
class UniqueIndex:
    """A unique index over plain columns: for each its name, its equality operator and its collation, as SQL.

    `immediate`: not deferrable, so it is checked in replica sessions too. `never_null`: all columns NOT NULL.
    """

    columns: tuple[str, ...]
    operators: tuple[str, ...]
    collations: tuple[str, ...]
    immediate: bool
    never_null: bool


@dataclass(frozen=True, slots=True)
class TargetTable:
    """`ordered`: triggers fire for replicas too, or exclusion constraints: its changes keep their order.

    For TRUNCATE: `members` are the table and its partitions, `referrers` other tables with a foreign key to
    one of them, `sequences` those its columns own, as SQL. `generated`: digests of what columns are generated
    by.
    """

    name: TableName
    partitioned: bool
    ordered: bool
    columns: dict[str, TargetColumn]
    uniques: tuple[UniqueIndex, ...]
    version: str
    members: frozenset[int] = frozenset()
    referrers: frozenset[int] = frozenset()
    sequences: tuple[str, ...] = ()
    generated: tuple[tuple[str, bytes], ...] = ()


# Everything a description depends on. A change of any of these rows makes a new xmin.
_VERSION = """concat_ws(' ', c.oid, c.xmin,
    (SELECT string_agg(a.xmin::text, ',' ORDER BY a.attnum) FROM pg_attribute a
      WHERE a.attrelid = c.oid AND a.attnum > 0),
    (SELECT string_agg(i.indexrelid || ':' || i.xmin::text, ',' ORDER BY i.indexrelid) FROM pg_index i
      WHERE i.indrelid = c.oid),
    (SELECT string_agg(g.oid || ':' || g.xmin::text, ',' ORDER BY g.oid) FROM pg_trigger g
      WHERE g.tgrelid = c.oid))"""

# By the indexes of the catalog: with each batch. Names are compared whole, type name holds 63 bytes.
_VERSIONS = f"""
SELECT n.nspname, c.relname, {_VERSION} FROM unnest(%s::text[], %s::text[]) AS u (s, t)
  JOIN pg_namespace n ON n.nspname = u.s::name AND n.nspname::text = u.s
  JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = u.t::name AND c.relname::text = u.t"""

# What else decides whether a row fits: partitions, and the labels and checks of types and the types in them.
_RULES = f"""
WITH RECURSIVE types (oid) AS (
    SELECT a.atttypid FROM pg_attribute a WHERE a.attrelid = to_regclass(%(table)s) AND a.attnum > 0
    UNION SELECT inner_oid FROM types JOIN pg_type t USING (oid)
    CROSS JOIN LATERAL (VALUES (t.typelem), (t.typbasetype)) AS inside (inner_oid) WHERE inner_oid <> 0)
SELECT {_VERSION}, ARRAY (SELECT (p.inhrelid, p.xmin)::text FROM pg_inherits p
                        WHERE p.inhparent = c.oid ORDER BY p.inhrelid)::text,
       ARRAY (SELECT (r.oid, r.xmin)::text FROM types JOIN (
                  SELECT enumtypid, oid, xmin FROM pg_enum
                  UNION ALL SELECT contypid, oid, xmin FROM pg_constraint
                  UNION ALL SELECT oid, oid, xmin FROM pg_type) AS r (type, oid, xmin)
              ON r.type = types.oid ORDER BY r.oid)::text
  FROM pg_class c WHERE c.oid = to_regclass(%(table)s)"""

_TABLE = f"""
SELECT c.oid::bigint, c.relkind::text, pg_is_other_temp_schema(n.oid) OR n.oid = pg_my_temp_schema(),
       EXISTS (SELECT FROM pg_trigger g WHERE g.tgrelid = ANY (m.oids) AND NOT g.tgisinternal
                  AND g.tgenabled IN ('A', 'R'))
       OR EXISTS (SELECT FROM pg_index x WHERE x.indrelid = ANY (m.oids) AND x.indisexclusion),
       {_VERSION}, m.oids::bigint[],
       ARRAY (SELECT DISTINCT f.conrelid::bigint FROM pg_constraint f
               WHERE f.contype = 'f' AND f.confrelid = ANY (m.oids) AND f.conrelid <> ALL (m.oids)),
       ARRAY (SELECT format('%%I.%%I', sn.nspname, sq.relname) FROM pg_depend d
                JOIN pg_class sq ON sq.oid = d.objid AND sq.relkind = 'S'
                JOIN pg_namespace sn ON sn.oid = sq.relnamespace
               WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass
                 AND d.refobjid = ANY (m.oids) AND d.deptype IN ('a', 'i') ORDER BY 1)
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 CROSS JOIN LATERAL (SELECT CASE c.relkind WHEN 'p'
       THEN ARRAY (SELECT relid::oid FROM pg_partition_tree(c.oid)) ELSE ARRAY[c.oid] END) AS m (oids)
 WHERE n.nspname = %s AND c.relname = %s"""

# Follows domains down to the type whose bytes they have.
_BASE = """
CROSS JOIN LATERAL (
    WITH RECURSIVE chain (oid, typtype, typbasetype, typmod) AS (
        SELECT t.oid, t.typtype, t.typbasetype, t.typtypmod FROM pg_type t WHERE t.oid = {start}
        UNION ALL
        SELECT t.oid, t.typtype, t.typbasetype, greatest(chain.typmod, t.typtypmod)
          FROM chain JOIN pg_type t ON t.oid = chain.typbasetype WHERE chain.typtype = 'd')
    SELECT oid, typmod FROM chain WHERE typtype <> 'd') AS b"""

# Comparable: an enum, or a built-in type (or an array of one) with a default btree or hash operator class.
_COLUMNS = f"""
SELECT a.attname, b.oid::bigint, format_type(b.oid, -1), a.attgenerated <> '', a.attidentity = 'a',
       e.typtype = 'e' OR (e.typnamespace = 'pg_catalog'::regnamespace AND EXISTS (
           SELECT FROM pg_opclass o WHERE o.opcdefault AND (o.opcintype = e.oid OR EXISTS (
               SELECT FROM pg_cast k WHERE k.castsource = e.oid AND k.casttarget = o.opcintype
                  AND k.castmethod = 'b' AND k.castcontext = 'i'))
              AND o.opcmethod IN (SELECT oid FROM pg_am WHERE amname IN ('btree', 'hash')))),
       coalesce((SELECT quote_ident(n.nspname) || '.' || quote_ident(l.collname) FROM pg_collation l
                   JOIN pg_namespace n ON n.oid = l.collnamespace WHERE l.oid = a.attcollation), ''),
       b.oid <> a.atttypid, greatest(a.atttypmod, b.typmod),
       format_type(b.oid, greatest(a.atttypmod, b.typmod))
  FROM pg_attribute a {_BASE.format(start="a.atttypid")}
  JOIN pg_type t ON t.oid = b.oid
  JOIN pg_type e ON e.oid = CASE WHEN t.typlen = -1 AND t.typelem <> 0 THEN t.typelem ELSE t.oid END
 WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum"""

# Strategy 3 of a btree operator class is its equality.
_UNIQUES = """
SELECT array_agg(a.attname::text ORDER BY k.n),
       array_agg('OPERATOR(' || quote_ident(on_.nspname) || '.' || o.oprname || ')' ORDER BY k.n),
       array_agg(coalesce((SELECT quote_ident(cn.nspname) || '.' || quote_ident(l.collname) FROM pg_collation
       l
           JOIN pg_namespace cn ON cn.oid = l.collnamespace WHERE l.oid = i.indcollation[k.n - 1]), '')
           ORDER BY k.n),
       i.indimmediate, bool_and(a.attnotnull)
  FROM pg_index i CROSS JOIN LATERAL generate_series(1, i.indnkeyatts) AS k (n)
  JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[k.n - 1]
  JOIN pg_opclass c ON c.oid = i.indclass[k.n - 1]
  JOIN pg_amop m ON m.amopfamily = c.opcfamily AND m.amoplefttype = c.opcintype
   AND m.amoprighttype = c.opcintype AND m.amopstrategy = 3 AND m.amopmethod = c.opcmethod
  JOIN pg_am am ON am.oid = c.opcmethod AND am.amname = 'btree'
  JOIN pg_operator o ON o.oid = m.amopopr JOIN pg_namespace on_ ON on_.oid = o.oprnamespace
 WHERE i.indrelid = %s AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
   AND NOT i.indisexclusion
 GROUP BY i.indexrelid, i.indisprimary, i.indimmediate, i.indnkeyatts
 ORDER BY i.indimmediate DESC, i.indisprimary DESC, i.indnkeyatts, i.indexrelid"""

_TYPES = f"""
SELECT u.n, b.oid::bigint, format_type(b.oid, -1)
  FROM unnest(%s::text[]) WITH ORDINALITY AS u (name, n) {_BASE.format(start="to_regtype(u.name)")}"""

# Those of some types that are, or hold, an interval.
_INTERVALS = """
WITH RECURSIVE t(root, oid) AS (
    SELECT r, r FROM unnest(%s::oid[]) r
    UNION
    SELECT t.root, n.oid FROM t JOIN pg_type p ON p.oid = t.oid CROSS JOIN LATERAL (
        SELECT p.typbasetype AS oid WHERE p.typtype = 'd'
        UNION ALL SELECT p.typelem WHERE p.typelem <> 0
        UNION ALL SELECT r.rngsubtype FROM pg_range r WHERE p.oid IN (r.rngtypid, r.rngmultitypid)
        UNION ALL SELECT a.atttypid FROM pg_attribute a
                  WHERE p.typtype = 'c' AND a.attrelid = p.typrelid AND a.attnum > 0) n)
SELECT DISTINCT root::bigint FROM t WHERE oid = 'interval'::regtype"""
_INFINITE_INTERVALS = 170000


def check_allowed(name: TableName) -> None:
    """No source may write our own tables or the system's. Raises DecodeError."""
    if name.schema in FORBIDDEN_SCHEMAS or name.schema.startswith("pg_temp"):
        raise DecodeError(
            f"the source describes table {name}, which no stream may write",
            hint="the producer never sends these schemas: find out who wrote this record",
        )


def read_versions(conn: Connection, names: Sequence[TableName]) -> dict[TableName, str]:
    """The version of each table's description; a table that is missing is left out."""
    schemas, tables = [n.schema for n in names], [n.table for n in names]
    rows = conn.execute(_VERSIONS.encode(), (schemas, tables))
    return {TableName(schema, table): version for schema, table, version in rows}


def read_rules(conn: Connection, name: TableName) -> tuple[str, ...]:
    """Version of everything that decides whether a row fits a table; empty where that is missing.

    Too much to be read with every batch.
    """
    row = conn.execute(_RULES.encode(), {"table": str(name)}).fetchone()
    return row or ()


def read_table(conn: Connection, name: TableName) -> TargetTable:
    """Describe a table. Raises DatabaseError when there is none that could be written."""
    check_allowed(name)
    found = conn.execute(_TABLE.encode(), (name.schema, name.table)).fetchone()
    if found is None:
        raise DatabaseError(
            f"table {name} is not in the target database",
            hint="create it as on the source (constraints included); the stream then goes on by itself",
        )
    oid, kind, temporary, ordered, version, members, referrers, sequences = found
    if kind not in ("r", "p") or temporary:
        raise DatabaseError(
            f"{name} is no ordinary or partitioned table in the target database",
            hint="replace it by a table, or take it out of the publication",
        )
    columns = {row[0]: _column(row) for row in conn.execute(_COLUMNS.encode(), (oid,))}
    uniques = tuple(
        UniqueIndex(tuple(names), tuple(operators), tuple(collations), immediate, never_null)
        for names, operators, collations, immediate, never_null in conn.execute(_UNIQUES.encode(), (oid,))
    )
    return TargetTable(
        name, kind == "p", ordered, columns, uniques, version,
        frozenset(members), frozenset(referrers), tuple(sequences),
        generation.definitions(conn, name),
    )  # fmt: skip


def _column(row: tuple[Any, ...]) -> TargetColumn:
    name, oid, sql, *rest = row
    return TargetColumn(name, TypeName(oid, sql), *rest)


def read_types(conn: Connection, names: Sequence[str]) -> tuple[TypeName | None, ...]:
    """What the types of these names are here; None for one that is not."""
    rows = conn.execute(_TYPES.encode(), (list(names),)).fetchall()
    finite: set[int] = set()
    if conn.info.server_version < _INFINITE_INTERVALS:
        oids = [oid for _, oid, _ in rows]
        finite = {root for (root,) in conn.execute(_INTERVALS.encode(), (oids,))}
    found = {n: TypeName(oid, sql, oid in finite) for n, oid, sql in rows}
    return tuple(found.get(n) for n in range(1, len(names) + 1))
