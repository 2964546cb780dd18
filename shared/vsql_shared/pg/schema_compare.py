"""Compares the definitions of tables on two nodes, column by column. Only reads.

Not here: whether the target can take the rows all the same (peer_tables.py). Rules:

* A fingerprint is that of vsql_sync.compute_fingerprint, over the columns that are compared; two tables match
  when their fingerprints do.
* Of a table that is published with a column list, those columns are compared, and what the peer has beyond
  all of this node's: a column that never leaves may be missing there, or be another one.
* A difference names the column and what differs. Types are shown; defaults are not, they may hold a value.
* Keys, checks, triggers and partitions are no part of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from vsql_shared.changes import TableName, quote_ident
from vsql_shared.pg import catalog
from vsql_shared.pg.connect import Connection, errors

Status = Literal["MATCH", "MISMATCH", "LOCAL_ONLY", "REMOTE_ONLY"]

# The fields of vsql_sync.compute_fingerprint, in its order.
_COLUMNS = """
SELECT n.nspname, c.relname, a.attname::text, pg_catalog.format_type(a.atttypid, a.atttypmod),
    coalesce(l.collname::text, ''), a.attnotnull::text, a.attidentity::text, a.attgenerated::text,
    coalesce(pg_catalog.pg_get_expr(d.adbin, d.adrelid), '')
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
LEFT JOIN pg_catalog.pg_collation l ON l.oid = a.attcollation
WHERE c.relkind IN ('r', 'p')
  AND (n.nspname::text, c.relname::text) IN (SELECT * FROM unnest(%s::text[], %s::text[]))
ORDER BY 1, 2, a.attnum
"""


class ColumnDefinition(NamedTuple):
    """What a fingerprint holds of a column, as text."""

    name: str
    type: str
    collation: str
    not_null: str
    identity: str
    generated: str
    default: str


Columns = tuple[ColumnDefinition, ...]


@dataclass(frozen=True, slots=True)
class ColumnDifference:
    """A column, and what differs; `column` None is the table as a whole."""

    column: str | None
    difference: str

    def __str__(self) -> str:
        return self.difference if self.column is None else f"{quote_ident(self.column)} {self.difference}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A table on both nodes; a fingerprint is None where there is no such table."""

    table: TableName
    status: Status
    local_fingerprint: str | None
    remote_fingerprint: str | None
    differences: tuple[ColumnDifference, ...] = ()

    @property
    def difference(self) -> str:
        """All differences in a line."""
        return "; ".join(map(str, self.differences))


def compare(
    local: Connection, remote: Connection, wanted: Mapping[TableName, Sequence[str] | None] | None = None
) -> list[Comparison]:
    """Compare tables by name; `wanted` has their published columns, or None for all of them.

    With no `wanted` every table of users on either node. A table that neither node has is left out.
    """
    with errors("comparing the tables of both nodes"):
        if wanted is None:
            wanted = dict.fromkeys((*catalog.user_tables(local), *catalog.user_tables(remote)))
        here, there = read(local, wanted), read(remote, wanted)
    return [
        compare_table(name, here.get(name), there.get(name), columns)
        for name, columns in sorted(wanted.items())
        if name in here or name in there
    ]


def read(conn: Connection, names: Iterable[TableName]) -> dict[TableName, Columns]:
    """The columns of those of the tables that are there."""
    listed = list(names)
    rows = conn.execute(_COLUMNS, ([n.schema for n in listed], [n.table for n in listed]))
    found: dict[TableName, Columns] = {}
    for schema, table, *column in rows:
        name = TableName(schema, table)
        # A table without columns is one row of NULLs.
        more = () if column[0] is None else (ColumnDefinition(*column),)
        found[name] = found.get(name, ()) + more
    return found


def fingerprint(columns: Columns) -> str:
    """As vsql_sync.compute_fingerprint: SHA-256 of the fields, each with its length, in hex. Pure."""
    fields = [value.encode() for column in columns for value in column]
    return hashlib.sha256(b",".join(b"%d:%b" % (len(value), value) for value in fields)).hexdigest()


def compare_table(
    name: TableName, here: Columns | None, there: Columns | None, listed: Sequence[str] | None = None
) -> Comparison:
    """One table; `listed` has its published columns, None is all of them. Pure."""
    if listed is not None:
        hidden = {column.name for column in here or ()}.difference(listed)
        here = None if here is None else _without(here, hidden)
        there = None if there is None else _without(there, hidden)
    ours = None if here is None else fingerprint(here)
    theirs = None if there is None else fingerprint(there)
    if here is None:
        return Comparison(name, "REMOTE_ONLY", ours, theirs)
    if there is None:
        return Comparison(name, "LOCAL_ONLY", ours, theirs)
    if ours == theirs:
        return Comparison(name, "MATCH", ours, theirs)
    return Comparison(name, "MISMATCH", ours, theirs, tuple(_differences(here, there)))


def _without(columns: Columns, hidden: set[str]) -> Columns:
    return tuple(column for column in columns if column.name not in hidden)


def _differences(here: Columns, there: Columns) -> Iterator[ColumnDifference]:
    ours, theirs = ({column.name: column for column in columns} for columns in (here, there))
    for column in here:
        other = theirs.get(column.name)
        if other is None:
            yield ColumnDifference(column.name, "only on this node")
            continue
        found = list(_attributes(column, other))
        if found:
            yield ColumnDifference(column.name, ", ".join(found))
    for column in there:
        if column.name not in ours:
            yield ColumnDifference(column.name, "only on the peer")
    if [c.name for c in here if c.name in theirs] != [c.name for c in there if c.name in ours]:
        yield ColumnDifference(None, "columns in another order")


def _attributes(here: ColumnDefinition, there: ColumnDefinition) -> Iterator[str]:
    """What differs between two columns of one name."""
    if here.type != there.type:
        yield f"{here.type} here, {there.type} on the peer"
    if here.collation != there.collation:
        yield f"collation {here.collation or 'none'} here, {there.collation or 'none'} on the peer"
    if here.not_null != there.not_null:
        yield f"NOT NULL {'here' if here.not_null == 'true' else 'on the peer'} only"
    if here.identity != there.identity:
        yield "another kind of identity"
    if here.generated != there.generated:
        yield "generated in another way"
    if here.default != there.default:
        yield "another default" if not (here.generated or there.generated) else "another expression"
