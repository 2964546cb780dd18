"""The log of conflicts, read: which there were, what became of each, and how many of what kind.

Not here: writing it, in the transaction that decides (vsql_consumers/contested.py). Only reads. Rules:

* The log is of the node where the conflict was found: another node's has its own.
* Rows of users' tables are read where one conflict is asked for, by a role that may; lists and counts never
  touch them. No digit of a number is lost: those with a fraction, and long ones, are text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from psycopg import sql

from vsql_shared.errors import RefusedError
from vsql_shared.pg.connect import errors

if TYPE_CHECKING:
    from vsql_shared.changes import TableName
    from vsql_shared.pg.connect import Connection

KINDS = (
    "insert_exists",
    "insert_deleted",
    "update_origin_differs",
    "update_exists",
    "update_missing",
    "update_deleted",
    "delete_origin_differs",
    "delete_missing",
    "multiple_unique_conflicts",
)
"""As PostgreSQL 18 names them, 19 update_deleted; insert_deleted is ours (docs/operations/conflicts.md)."""
OUTCOMES = ("PENDING", "APPLIED_REMOTE", "KEPT_LOCAL", "MERGED", "REVERTED")

_EXACT_DIGITS = 15
"""Of whole numbers that every reader of JSON keeps."""
_COLUMNS = (
    "id, detected_at, subscription, pg_catalog.format('%%I.%%I', table_schema, table_name), conflict_type,"
    " local_origin, remote_origin, local_xact_ts, remote_xact_ts, origin_xid, resolution, resolved_at,"
    " resolved_by"
)
_READABLE = (
    "SELECT pg_catalog.has_column_privilege('vsql_sync.conflict_log', 'local_tuple', 'SELECT')"
    " AND pg_catalog.has_column_privilege('vsql_sync.conflict_log', 'remote_tuple', 'SELECT')"
)


@dataclass(frozen=True, slots=True)
class Conflict:
    """A row of the log, without rows of users' tables."""

    id: int
    detected_at: datetime
    stream: str
    table: str
    kind: str
    local_origin: str | None
    """Node whose version was here; None: nothing was known of the row."""
    remote_origin: str | None
    """Node whose change came."""
    local_time: datetime | None
    remote_time: datetime | None
    remote_xid: int | None
    outcome: str | None
    resolved_at: datetime | None
    resolved_by: str | None
    """The strategy, or who decided."""

    @property
    def stands(self) -> str | None:
        """The node whose version stands; None where nobody's does, or nobody has decided."""
        return {"APPLIED_REMOTE": self.remote_origin, "KEPT_LOCAL": self.local_origin}.get(self.outcome or "")


@dataclass(frozen=True, slots=True)
class Rows:
    """What was here and what came, column by column; None: no row, or none was kept."""

    local: dict[str, Any] | None
    remote: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Count:
    """How often one kind of conflict of a table ended one way."""

    table: str
    kind: str
    outcome: str | None
    conflicts: int
    last_day: int
    first: datetime
    last: datetime


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which conflicts; what is None does not matter."""

    since: datetime | None = None
    until: datetime | None = None
    table: TableName | None = None
    kind: str | None = None
    outcome: str | None = None
    before: int | None = None
    """Only conflicts of lower numbers: those of one transaction have one time."""

    def condition(self) -> tuple[sql.Composed, dict[str, object]]:
        """As SQL, with its parameters."""
        name = self.table
        parts = (
            ("since", self.since, sql.SQL("detected_at >= %(since)s")),
            ("until", self.until, sql.SQL("detected_at < %(until)s")),
            ("schema", None if name is None else name.schema, sql.SQL("table_schema = %(schema)s")),
            ("table", None if name is None else name.table, sql.SQL("table_name = %(table)s")),
            ("kind", self.kind, sql.SQL("conflict_type = %(kind)s")),
            ("outcome", self.outcome, sql.SQL("resolution = %(outcome)s")),
            ("before", self.before, sql.SQL("id < %(before)s")),
        )
        used = [part for part in parts if part[1] is not None]
        condition = sql.SQL(" AND ").join([sql.SQL("true"), *(text for _, _, text in used)])
        return condition, {key: value for key, value, _ in used}


def select(conn: Connection, wanted: Wanted, limit: int) -> list[Conflict]:
    """The newest conflicts, oldest first."""
    condition, values = wanted.condition()
    query = sql.SQL(
        "SELECT * FROM (SELECT {} FROM vsql_sync.conflict_log WHERE {} ORDER BY id DESC LIMIT {}) c"
        " ORDER BY id"
    ).format(sql.SQL(_COLUMNS), condition, sql.Literal(limit))
    with errors("reading the log of conflicts"):
        return [Conflict(*row) for row in conn.execute(query, values)]


def find(conn: Connection, number: int) -> Conflict:
    """One conflict. Raises RefusedError where there is none of that number."""
    with errors("reading the log of conflicts"):
        row = conn.execute(
            sql.SQL("SELECT {} FROM vsql_sync.conflict_log WHERE id = %s").format(sql.SQL(_COLUMNS)),
            (number,),
        ).fetchone()
    if row is None:
        raise RefusedError(
            f"this node has no conflict {number}",
            hint="`syncctl conflicts list` shows them; each node has those it found itself",
        )
    return Conflict(*row)


def rows_of(conn: Connection, number: int) -> Rows | None:
    """Both rows of a conflict; None where this role may not read them."""
    with errors("reading the rows of a conflict"):
        readable = conn.execute(_READABLE).fetchone()
        if readable is None or not readable[0]:
            return None
        row = conn.execute(
            "SELECT local_tuple::text, remote_tuple::text FROM vsql_sync.conflict_log WHERE id = %s",
            (number,),
        ).fetchone()
    return Rows(None, None) if row is None else Rows(*map(_values, row))


def _values(text: str | None) -> dict[str, Any] | None:
    """Column → value."""
    if text is None:
        return None
    found: dict[str, Any] = json.loads(text, parse_float=str, parse_int=_whole)
    return found


def _whole(digits: str) -> int | str:
    return int(digits) if len(digits) <= _EXACT_DIGITS else digits


def stats(conn: Connection, wanted: Wanted) -> list[Count]:
    """Conflicts by table, kind and outcome."""
    condition, values = wanted.condition()
    query = sql.SQL(
        "SELECT pg_catalog.format('%%I.%%I', table_schema, table_name), conflict_type, resolution, count(*),"
        " count(*) FILTER (WHERE detected_at > now() - interval '1 day'), min(detected_at), max(detected_at)"
        " FROM vsql_sync.conflict_log WHERE {} GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
    ).format(condition)
    with errors("counting the conflicts"):
        return [Count(*row) for row in conn.execute(query, values)]
