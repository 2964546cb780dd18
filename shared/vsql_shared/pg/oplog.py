"""The operators' log: one line in `vsql_sync.audit_log` for every act that changes something.

Called inside the transaction of the act, so that neither exists without the other. The database fills in
who (session_user) and from where; nothing here can claim to be somebody else. A worker that runs the act puts
the SHA-256 of the line's canonical JSON (`line`) into its signed chain, so that a changed line is found.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

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


_LINE = (
    "SELECT id, occurred_at, action, actor, target_type, target_id, old_value, new_value,"
    " host(client_ip) AS client_ip, success, error_message FROM vsql_sync.audit_log WHERE id = %s"
)
_COMMAND = (
    "SELECT id, role, chain, verb, args, reason, requested_by, requested_at"
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
    if row is None:
        return None
    times = {name: _time(value) for name, value in row.items() if isinstance(value, datetime)}
    return canonical_json(row | times)


def _time(moment: datetime) -> str:
    """UTC with microseconds, whatever the session's time zone."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
