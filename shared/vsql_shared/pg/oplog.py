"""The operators' log: one line in `vsql_sync.audit_log` for every act that changes something.

Called inside the transaction of the act, so that neither exists without the other. The database fills in
who (session_user) and from where; nothing here can claim to be somebody else. A worker that runs the act puts
the SHA-256 of the line's canonical JSON (`line`) into its signed chain, so that a changed line is found.
"""

from __future__ import annotations

from collections.abc import Mapping

from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from vsql_shared.audit.entries import canonical_json
from vsql_shared.pg.connect import Connection, errors


def record(
    conn: Connection,
    action: str,
    target_type: str,
    target_id: str,
    *,
    old: Mapping[str, object] | None = None,
    new: Mapping[str, object] | None = None,
) -> int:
    """Write the line; returns its id. Values are names and decisions, never rows or secrets."""
    row = conn.execute(
        "SELECT vsql_sync.log_audit(%s, %s, %s, %s, %s)",
        (
            action,
            target_type,
            target_id,
            None if old is None else Jsonb(old),
            None if new is None else Jsonb(new),
        ),
    ).fetchone()
    assert row is not None  # noqa: S101 - a function call has a row
    return int(row[0])


# Times are text, UTC with microseconds, whatever the session's time zone. What lies beyond the calendar was
# never written by us: it only has to be another text.
_LINE = (
    "SELECT id, action, actor, target_type, target_id, old_value, new_value,"
    " host(client_ip) AS client_ip, success, error_message,"
    " CASE WHEN occurred_at BETWEEN '1000-01-01' AND '9999-12-30'"
    "   THEN to_char(occurred_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')"
    "   ELSE occurred_at::text END AS occurred_at"
    " FROM vsql_sync.audit_log WHERE id = %s"
)
_COMMAND = (
    "SELECT id, role, chain, verb, args, reason, requested_by,"
    " CASE WHEN requested_at BETWEEN '1000-01-01' AND '9999-12-30'"
    "   THEN to_char(requested_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')"
    "   ELSE requested_at::text END AS requested_at"
    " FROM vsql_sync.commands WHERE id = %s"
)


def line(conn: Connection, log_id: int) -> str | None:
    """Canonical JSON of a line of the log; None when there is no such line."""
    return _canonical(conn, _LINE, log_id)


def command(conn: Connection, command_id: int) -> str | None:
    """The same of a command, for those that were given without a line in the log."""
    return _canonical(conn, _COMMAND, command_id)


def _canonical(conn: Connection, query: str, number: int) -> str | None:
    with errors("reading an operator's act"), conn.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(query.encode(), (number,)).fetchone()
    return None if row is None else canonical_json(row)
