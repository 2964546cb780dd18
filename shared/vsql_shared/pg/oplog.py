"""The operators' log: one line in `vsql_sync.audit_log` for every act that changes something.

Called inside the transaction of the act, so that neither exists without the other. The database fills in
who (session_user) and from where; nothing here can claim to be somebody else.
"""

from __future__ import annotations

from collections.abc import Mapping

from psycopg.types.json import Jsonb

from vsql_shared.pg.connect import Connection


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
