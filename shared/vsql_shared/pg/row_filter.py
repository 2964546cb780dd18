"""Row filters of publications: checked as text, then by PostgreSQL, and kept as PostgreSQL prints them.

Not here: which columns UPDATE and DELETE need (publication_rules.py). Rules:

* PostgreSQL judges the predicate itself, in a publication that is rolled back: no functions of users, no
  subqueries, no system columns. What it refuses is refused here before anything is changed.
* A predicate is one expression. What could end it and go on as SQL of its own is refused as text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import psycopg
from psycopg import sql

from vsql_shared.errors import RefusedError
from vsql_shared.pg.catalog import TableInfo
from vsql_shared.pg.connect import Connection

_MAX_LENGTH = 10_000
# Strings, with escapes where they begin with E, and quoted names; then single marks. To PostgreSQL every
# character beyond ASCII is part of a name, as letters are: an E behind one begins no string.
_LEXEME = re.compile(
    r"""[eE]'(?:[^'\\]|\\.|'')*'|[eE]'|'(?:[^']|'')*'|"(?:[^"]|"")*"|(?:\w|[^\x00-\x7f])+|--|/\*|\$|[();'"\0]|.""",
    re.DOTALL,
)
_FORBIDDEN = {
    ";": "a semicolon", "--": "a comment", "/*": "a comment", "$": "a $", "'": "a string without end",
    "e'": "a string without end", "E'": "a string without end",
    '"': "a name without end", "\0": "a zero byte",
}  # fmt: skip
# The columns a predicate names, by the dependencies PostgreSQL writes down for it.
_PROBED = """
SELECT pg_catalog.pg_get_expr(r.prqual, r.prrelid),
       ARRAY(SELECT a.attname::text FROM pg_catalog.pg_depend d
             JOIN pg_catalog.pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
             WHERE d.classid = 'pg_catalog.pg_publication_rel'::pg_catalog.regclass AND d.objid = r.oid
               AND d.refobjid = r.prrelid AND d.refobjsubid > 0 ORDER BY a.attnum)
FROM pg_catalog.pg_publication_rel r JOIN pg_catalog.pg_publication p ON p.oid = r.prpubid
WHERE p.pubname = %s
"""


@dataclass(frozen=True, slots=True)
class RowFilter:
    """A predicate as PostgreSQL prints it, and the columns it reads."""

    text: str
    columns: tuple[str, ...]


def text_problem(text: str) -> str | None:
    """Why this cannot be one expression, or None. Pure."""
    if len(text) > _MAX_LENGTH:
        return f"the row filter is longer than {_MAX_LENGTH} characters"
    depth = 0
    for match in _LEXEME.finditer(text):
        lexeme = match[0]
        if lexeme in _FORBIDDEN:
            return f"the row filter holds {_FORBIDDEN[lexeme]}"
        depth += (lexeme == "(") - (lexeme == ")")
        if depth < 0:
            break
    return "the row filter's parentheses do not match" if depth else None


def read(conn: Connection, table: TableInfo, text: str) -> RowFilter:
    """Let PostgreSQL parse and print a predicate; nothing stays. Raises RefusedError."""
    problem = text_problem(text)
    if problem is not None:
        raise RefusedError(f"{table.name}: {problem}")
    name = f"vsql_probe_{conn.info.backend_pid}"
    try:
        with conn.transaction(force_rollback=True):
            conn.execute(
                sql.SQL(
                    "CREATE PUBLICATION {} FOR TABLE ONLY {} WHERE ({})"
                    " WITH (publish = insert, publish_via_partition_root = true)"
                ).format(
                    sql.Identifier(name), sql.Identifier(table.name.schema, table.name.table), sql.SQL(text)
                )
            )
            rows = conn.execute(_PROBED, (name,)).fetchall()
    except psycopg.Error as error:
        if error.sqlstate is None or error.sqlstate[:2] not in ("42", "22", "0A"):
            raise
        diag = error.diag
        words = ": ".join(part for part in (diag.message_primary, diag.message_detail) if part)
        raise RefusedError(f"{table.name}: PostgreSQL refuses the row filter: {words}") from None
    if len(rows) != 1 or rows[0][0] is None:
        raise RefusedError(f"{table.name}: the row filter is not one expression")
    return RowFilter(rows[0][0], tuple(rows[0][1]))
