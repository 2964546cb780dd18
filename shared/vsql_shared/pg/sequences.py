"""Which sequences leave with a publication, and whether a target can take them. Reads only.

Not here: sampling (the producer's) and setting (the consumer's). A publication names sequences one by one;
with `sequences` it also means those its columns own, and those its columns take their default from.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from vsql_shared.changes import TableName, quote_ident
from vsql_shared.pg.connect import Connection

_PUBLISHED = """
WITH used AS (
    SELECT d.objid AS sequence, d.refobjid AS relation, d.refobjsubid AS attnum
    FROM pg_catalog.pg_depend d
    WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.refclassid = d.classid
      AND d.deptype IN ('a', 'i') AND d.refobjsubid > 0
    UNION ALL
    SELECT d.refobjid, f.adrelid, f.adnum FROM pg_catalog.pg_attrdef f
    JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_attrdef'::pg_catalog.regclass
      AND d.objid = f.oid AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass
), columns AS (
    SELECT u.sequence, n.nspname, c.relname, a.attname,
        p.sequences AND t.table_name IS NOT NULL
            AND (t.columns IS NULL OR a.attname = ANY (t.columns)) AS meant
    FROM used u JOIN pg_catalog.pg_class c ON c.oid = u.relation AND c.relkind IN ('r', 'p')
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum = u.attnum AND NOT a.attisdropped
    JOIN vsql_sync.publications p ON p.name = %(publication)s
    LEFT JOIN vsql_sync.published_tables t ON t.publication = p.name AND t.table_schema = n.nspname
      AND t.table_name = c.relname
)
SELECT DISTINCT ON (n.nspname, s.relname) s.oid::bigint, n.nspname, s.relname,
    CASE WHEN c.attname IS NULL THEN '{}' ELSE ARRAY[c.nspname, c.relname, c.attname]::text[] END,
    pg_catalog.has_sequence_privilege(s.oid, 'SELECT')
FROM pg_catalog.pg_class s JOIN pg_catalog.pg_namespace n ON n.oid = s.relnamespace
LEFT JOIN columns c ON c.sequence = s.oid
WHERE s.relkind = 'S' AND (c.meant OR EXISTS (
    SELECT FROM vsql_sync.publication_sequences q WHERE q.publication = %(publication)s
    AND q.sequence_schema = n.nspname AND q.sequence_name = s.relname))
ORDER BY n.nspname, s.relname, c.meant DESC NULLS LAST, c.nspname, c.relname, c.attname
"""

# By name, else the sequence that belongs to the column the source's belongs to.
_FOUND = """
SELECT w.place, s.seqrelid::bigint, n.nspname, c.relname, s.seqincrement, s.seqmin, s.seqmax,
    pg_catalog.has_sequence_privilege(c.oid, 'SELECT') AND pg_catalog.has_sequence_privilege(c.oid, 'UPDATE')
FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::text[])
    WITH ORDINALITY w (sequence_schema, sequence_name, table_schema, table_name, column_name, place)
CROSS JOIN LATERAL (
    SELECT coalesce(
        (SELECT q.oid FROM pg_catalog.pg_class q JOIN pg_catalog.pg_namespace m ON m.oid = q.relnamespace
         WHERE q.relkind = 'S' AND m.nspname = w.sequence_schema AND q.relname = w.sequence_name),
        (SELECT d.objid FROM pg_catalog.pg_depend d
         JOIN pg_catalog.pg_class t ON t.oid = d.refobjid
         JOIN pg_catalog.pg_namespace m ON m.oid = t.relnamespace
         JOIN pg_catalog.pg_attribute a ON a.attrelid = t.oid AND a.attnum = d.refobjsubid
         JOIN pg_catalog.pg_class q ON q.oid = d.objid AND q.relkind = 'S'
         WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.refclassid = d.classid
           AND d.deptype IN ('a', 'i') AND m.nspname = w.table_schema AND t.relname = w.table_name
           AND a.attname = w.column_name LIMIT 1)) AS oid) found
JOIN pg_catalog.pg_sequence s ON s.seqrelid = found.oid
JOIN pg_catalog.pg_class c ON c.oid = s.seqrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
ORDER BY w.place
"""


class PublishedSequence(NamedTuple):
    """A sequence that leaves this node."""

    oid: int
    name: TableName
    owner: tuple[str, ...]
    """Schema, table and column it belongs to; empty for one that stands alone."""
    readable: bool
    """Whether this session's user may read it."""

    @property
    def shown(self) -> str:
        """Its name, and its column where it has one."""
        owner = ".".join(map(quote_ident, self.owner))
        return f"{self.name} ({owner})" if owner else str(self.name)


class TargetSequence(NamedTuple):
    """A sequence of the target that stands for one of the source."""

    oid: int
    name: TableName
    increment: int
    least: int
    most: int
    allowed: bool
    """Whether this session's user may read and set it."""


def exists(conn: Connection, name: TableName) -> bool:
    """Whether there is such a sequence."""
    row = conn.execute(
        "SELECT EXISTS (SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n"
        " ON n.oid = c.relnamespace WHERE c.relkind = 'S' AND c.relpersistence <> 't'"
        " AND n.nspname = %s AND c.relname = %s)",
        name,
    ).fetchone()
    return row is not None and bool(row[0])


def published(conn: Connection, publication: str) -> list[PublishedSequence]:
    """The sequences of a publication as they are now, by name."""
    rows = conn.execute(_PUBLISHED, {"publication": publication})
    return [
        PublishedSequence(oid, TableName(schema, name), tuple(owner), readable)
        for oid, schema, name, owner, readable in rows
    ]


def find(
    conn: Connection, wanted: Iterable[tuple[TableName, tuple[str, ...]]]
) -> dict[TableName, TargetSequence]:
    """Source's name → this database's sequence, for each (name, owner) that has one here."""
    asked = list(wanted)
    lists: list[list[str | None]] = [[name.schema for name, _ in asked], [name.table for name, _ in asked]]
    lists += [[owner[place] if owner else None for _, owner in asked] for place in range(3)]
    return {
        asked[place - 1][0]: TargetSequence(oid, TableName(schema, name), *rest)
        for place, oid, schema, name, *rest in conn.execute(_FOUND, lists)
    }


def target_problems(origin: Connection, peer: Connection, publication: str) -> list[str]:
    """Why the target cannot take the publication's sequences: one line each, with what to do."""
    source = published(origin, publication)
    there = find(peer, [(one.name, one.owner) for one in source])
    problems = []
    for one in source:
        target = there.get(one.name)
        if target is None:
            problems.append(f"sequence {one.shown}: does not exist on the peer; create it there")
        elif (target.increment > 0) != (_increment(origin, one.oid) > 0):
            problems.append(f"sequence {one.name}: runs the other way on the peer; mend its INCREMENT")
    return problems


def target_names(origin: Connection, peer: Connection, publications: Iterable[str]) -> list[TableName]:
    """The target's sequences that stand for those of the publications."""
    wanted = [(one.name, one.owner) for name in publications for one in published(origin, name)]
    return sorted({target.name for target in find(peer, wanted).values()})


def _increment(conn: Connection, oid: int) -> int:
    query = "SELECT seqincrement FROM pg_catalog.pg_sequence WHERE seqrelid = %s"
    row = conn.execute(query, (oid,)).fetchone()
    return int(row[0]) if row else 1
