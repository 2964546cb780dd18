"""Which types can travel in binary, to be read by another server of another version.

Not here: what is described and sent (relations.py, snapshot/tables.py). A type travels as text when its
binary form

* holds an object's id (reg*): each server has its own;
* has an element or attribute named by its id, and each server, or each major version, has an id of its own
  for that: arrays and rows of types whose ids are not fixed for ever;
* cannot be made or read: no send function inside of an array, row or range (array_send fails then), or a
  receive function that refuses some value;
* is that of a type the catalog has no more.

A column whose own type has no send function is sent as text by pgoutput in a binary session too; COPY fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vsql_shared.pg.connect import Connection, errors

# From here on initdb or the server assigns ids, so they differ between versions (access/transam.h).
_FIRST_ASSIGNED_OID = 10_000
_REG_TYPES = (24, 2202, 2203, 2204, 2205, 2206, 3734, 3769, 4089, 4096, 4191)
# pg_node_tree, pg_ndistinct, pg_dependencies, pg_mcv_list, pg_brin_*_summary: sent, but never received.
_SENT_ONLY = (194, 3361, 3402, 5017, 4600, 4601)
# int2vector, oidvector, tsquery: what their send functions make of an empty one cannot be received.
_NEVER_EMPTY = (22, 30, 3615)

_WAYS = f"""
WITH RECURSIVE t(root, oid, inner_, by_id) AS (
    SELECT r, r, false, false FROM unnest(%s::oid[]) r
    UNION
    SELECT t.root, n.oid, t.inner_ OR n.inner_, n.by_id
    FROM t JOIN pg_catalog.pg_type p ON p.oid = t.oid CROSS JOIN LATERAL (
        SELECT p.typbasetype AS oid, false AS inner_, false AS by_id WHERE p.typtype = 'd'
        UNION ALL SELECT p.typelem, true, true WHERE p.typcategory = 'A' AND p.typelem <> 0
        UNION ALL SELECT r.rngsubtype, true, false FROM pg_catalog.pg_range r
                  WHERE p.oid IN (r.rngtypid, r.rngmultitypid)
        UNION ALL SELECT a.atttypid, true, true FROM pg_catalog.pg_attribute a
                  WHERE p.typtype = 'c' AND a.attrelid = p.typrelid AND a.attnum > 0
                  AND NOT a.attisdropped) n)
SELECT t.root, bool_or(t.oid = ANY(ARRAY{[*_REG_TYPES, *_SENT_ONLY, *_NEVER_EMPTY]}::oid[])
                       OR (t.by_id AND t.oid >= {_FIRST_ASSIGNED_OID})
                       OR (t.inner_ AND (p.typsend = 0 OR p.typreceive = 0))),
       bool_or(NOT t.inner_ AND (p.typsend = 0 OR p.typreceive = 0))
FROM t JOIN pg_catalog.pg_type p USING (oid) GROUP BY t.root
"""  # noqa: S608 - numbers of our own

_PUBLISHED_TYPES = """
SELECT DISTINCT a.atttypid FROM pg_catalog.pg_publication_tables p
JOIN pg_catalog.pg_namespace n ON n.nspname = p.schemaname
JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attname = ANY(p.attnames)
WHERE p.pubname = %s AND p.schemaname <> 'vsql_sync'
"""


class Ways(NamedTuple):
    """Of some types: those that make a session text, and those a copy reads as text."""

    bound: frozenset[int]
    """The binary form means something else, or nothing, on another server."""
    copied_as_text: frozenset[int]
    """The bound ones, and those without a binary form."""


def ways(conn: Connection, oids: Sequence[int]) -> Ways:
    """How columns of these types travel."""
    with errors("looking at column types"):
        rows = conn.execute(_WAYS, (list(oids),)).fetchall()
    # Of a type that was dropped since the WAL was written nobody knows any more what its binary form holds.
    unknown = frozenset(oids) - {int(root) for root, _, _ in rows}
    bound = unknown | {int(root) for root, is_bound, _ in rows if is_bound}
    return Ways(bound, bound | frozenset(int(root) for root, _, formless in rows if formless))


def may_be_binary(conn: Connection, publication: str) -> bool:
    """Whether every published column can travel in a binary session."""
    with errors("looking at published columns"):
        oids = [int(row[0]) for row in conn.execute(_PUBLISHED_TYPES, (publication,)).fetchall()]
    return not ways(conn, oids).bound
