"""Which tables may be applied partitioned: those whose rows depend on nothing but their own order.

Reads only. A row goes to a partition by the bytes of its identity (docs/design/0015), and two partitions are
applied in any order. So a table is fit when

* its identity is a key whose equal values have equal bytes: of a type of the list below, under a
  deterministic collation. (1.0 and 1.00 are one numeric and two spellings; a citext likewise.)
* no other unique or exclusion constraint binds rows of different identity to each other: the order of two
  rows would decide which of them may stay. One that holds the whole identity binds none.
* at a target, nothing runs when rows are applied: triggers ENABLE ALWAYS or REPLICA would see states that
  never were at the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vsql_shared.changes import TableName, quote_ident
from vsql_shared.pg import catalog
from vsql_shared.pg.catalog import TableInfo
from vsql_shared.pg.connect import Connection

# bool, bytea, "char", name, int8, int2, int4, text, oid, varchar, date, timestamp, timestamptz, uuid
PLAIN_TYPES = frozenset({16, 17, 18, 19, 20, 21, 23, 25, 26, 1043, 1082, 1114, 1184, 2950})
"""Types of which equal values have equal bytes."""

_COLUMNS = """
SELECT a.attname, pg_catalog.format_type(a.atttypid, NULL), a.atttypid::bigint,
    coalesce(c.collisdeterministic, true)
FROM pg_catalog.pg_attribute a LEFT JOIN pg_catalog.pg_collation c ON c.oid = a.attcollation
WHERE a.attrelid = %s AND a.attname = ANY (%s)
"""
# Unique and exclusion constraints and indexes, with their plain columns; one that is compared by another
# collation, which takes different values for equal, does not count.
_BINDING = """
SELECT x.relname, i.indisexclusion,
    ARRAY(SELECT a.attname::text FROM pg_catalog.unnest(i.indkey::int2[]) WITH ORDINALITY k (attnum, place)
          JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
          LEFT JOIN pg_catalog.pg_collation c ON c.oid = (i.indcollation::oid[])[k.place - 1]
          WHERE k.place <= i.indnkeyatts AND coalesce(c.collisdeterministic, true))
FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class x ON x.oid = i.indexrelid
WHERE i.indrelid = %s AND (i.indisunique OR i.indisexclusion) ORDER BY x.relname
"""
_FIRING = """
SELECT tgname FROM pg_catalog.pg_trigger WHERE tgrelid = %s AND tgenabled IN ('A', 'R') ORDER BY tgname
"""


def source_problems(conn: Connection, table: TableInfo) -> Iterator[str]:
    """Why rows of a table cannot be spread over partitions: one line each, with what to do."""
    identity = None if table.replica_identity == "f" else table.identity
    if not identity:
        yield (
            f"{table.name}: has no key as its replica identity, by which its rows could be spread; give it a"
            " primary key, or publish it without --apply partitioned"
        )
        return
    yield from _type_problems(conn, table, identity)
    yield from _constraint_problems(conn, table, identity)


def target_problems(conn: Connection, source: Iterable[str], table: TableInfo) -> Iterator[str]:
    """Why members could not apply rows with this identity (its columns) to the target's table."""
    identity = tuple(source)
    yield from _type_problems(conn, table, identity)
    yield from _constraint_problems(conn, table, identity)
    for part in (table, *_leaves(conn, table)):
        for (name,) in conn.execute(_FIRING, (part.oid,)):
            yield (
                f"{part.name}: trigger {quote_ident(name)} fires for rows that are applied; members apply in"
                " no common order, so it must not (ALTER TABLE … ENABLE TRIGGER), or use another publication"
            )


def fit(conn: Connection, names: Iterable[TableName]) -> frozenset[TableName]:
    """Those of the tables whose rows may be spread now."""
    found = set()
    for name in names:
        table = catalog.describe(conn, name)
        if table is not None and next(source_problems(conn, table), None) is None:
            found.add(name)
    return frozenset(found)


def _leaves(conn: Connection, table: TableInfo) -> list[TableInfo]:
    return catalog.partitions(conn, table) if table.kind == "p" else []


def _type_problems(conn: Connection, table: TableInfo, identity: tuple[str, ...]) -> Iterator[str]:
    for name, type_name, oid, deterministic in conn.execute(_COLUMNS, (table.oid, list(identity))):
        if oid not in PLAIN_TYPES or not deterministic:
            what = type_name if deterministic else f"{type_name} with a nondeterministic collation"
            yield (
                f"{table.name}: key column {quote_ident(name)} is {what}, of which equal values may differ in"
                " their bytes, so its rows cannot be spread by it"
            )


def _constraint_problems(conn: Connection, table: TableInfo, identity: tuple[str, ...]) -> Iterator[str]:
    for part in (table, *_leaves(conn, table)):
        for name, excludes, columns in conn.execute(_BINDING, (part.oid,)):
            if excludes or not set(identity) <= set(columns):
                yield (
                    f"{part.name}: {quote_ident(name)} binds rows of different keys to each other, and their"
                    " common order is not kept; drop it, or publish the table without --apply partitioned"
                )
