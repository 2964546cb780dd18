"""psycopg's errors while rows are written, in our words. Pure but for psycopg's classes.

What an error leads to stands in one table (vsql_shared/pg/reactions.py). Rule: no row's value is in any
message. PostgreSQL quotes values in the texts of data and constraint errors, and a trigger may raise whatever
it likes, under any code, or fail with SQL it put together from a row; of those only SQLSTATE, table, column
and constraint are said.
"""

from __future__ import annotations

import psycopg

from vsql_shared.changes import RowPlace, TableName
from vsql_shared.errors import DatabaseError, RowError, TransientError, VsqlSyncError
from vsql_shared.pg.connect import translate
from vsql_shared.pg.reactions import BAD_VALUE, Reaction, reaction

# Classes whose texts name objects and settings only.
_QUIET_CLASSES = ("25", "42", "55", "57", "58", "0A", "53")
_BAD_FORMAT = ("22P03", "22P04", BAD_VALUE)
UNIQUE_VIOLATION = "23505"

_HINTS = {
    "42501": "grant the consumer's role the privilege; row-level security needs BYPASSRLS",
    "42P01": "the table changed while it was written: it is looked at again with the next try",
    "42703": "the table changed while it was written: it is looked at again with the next try",
    "23505": "another row of the target has this value of a unique key; find out who wrote it, then"
    " `syncctl stream retry`",
    "23502": "a column of the target is NOT NULL and the source's is not, or the source does not have it",
    "23514": "a CHECK constraint of the target is stricter than the source's",
    "23503": "a foreign key is checked although this is a replica session",
    "23P01": "another row of the target excludes this one; find out who wrote it, then"
    " `syncctl stream retry`",
    "22001": "a column of the target is shorter than the source's",
    "22003": "a column of the target holds a smaller range, or fewer digits, than the source's; widen it."
    " One that adds up: UPDATE the row here so that there is room, then `syncctl stream retry`",
    "22P05": "the target database's encoding lacks a character of this row: make the target anew with "
    "ENCODING 'UTF8', or skip or park its transaction with `syncctl stream`",
}


def is_row_error(error: psycopg.Error) -> bool:
    """Whether one of the rows is at fault, so that writing them one by one finds it."""
    state = error.sqlstate
    return state is not None and reaction(state, writing=True) is Reaction.STOP


def table_of(error: psycopg.Error) -> TableName | None:
    """The table a constraint's error names."""
    schema, table = error.diag.schema_name, error.diag.table_name
    return TableName(schema, table) if schema and table else None


def fault(error: psycopg.Error, doing: str, place: RowPlace | None = None) -> VsqlSyncError:
    """Our error for psycopg's: Transient where the same may succeed later, Row- where a row is at fault.

    `place`: the change that was written, where it was written alone.
    """
    state = error.sqlstate
    known = translate(error, doing)
    if state is None:
        return known
    passes = isinstance(known, TransientError) and state != BAD_VALUE
    hint = _HINTS.get(state, "")
    if passes or state[:2] in _QUIET_CLASSES:
        # With a context it came from a function, or from within a row: nobody knows whose words these are.
        if error.diag.context is None:
            return known if passes else DatabaseError(known.message, hint=hint or known.hint)
        hint = hint or "the target server's own log has its words"
    if state in _BAD_FORMAT:
        hint = "a type of this name differs between source and target, or the row was built wrongly"
    where = ", ".join(
        f"{kind} {name}"
        for kind, name in (("column", error.diag.column_name), ("constraint", error.diag.constraint_name))
        if name
    )
    what = f"{type(error).__name__} (SQLSTATE {state})" + (f" on {where}" if where else "")
    if passes:
        return TransientError(f"{what} while {doing}", hint=hint)
    if is_row_error(error):
        return RowError(f"{what} while {doing}", hint=hint, place=place, sqlstate=state)
    return DatabaseError(f"{what} while {doing}", hint=hint)
