"""What an operator wants of a stream, and what the stream says of itself: commands, desired state, status.

Not here: acting on a command (worker.py, pipeline.py). Rules: each command is answered once by each worker
it is for; a status row is written about once an interval, at once when the state changes, and holds no row value.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from psycopg.types.json import Jsonb

from vsql_shared.pg.connect import Connection, errors


class Command(NamedTuple):
    """A command for this stream that was not answered yet."""

    id: int
    verb: str
    args: dict[str, Any]
    reason: str


class Control:
    """The stream's row in vsql_sync.streams, its commands, and its status row."""

    def __init__(self, conn: Connection, chain: str, poll_seconds: float, status_seconds: float) -> None:
        self._conn, self._chain = conn, chain
        self._poll_seconds, self._status_seconds = poll_seconds, status_seconds
        self._next_poll = self._next_status = 0.0
        self._said = ""
        self.desired = "running"
        with errors("listening for commands"):
            conn.execute("LISTEN vsql_sync_commands")

    def poll(self, now: float | None = None) -> list[Command]:
        """Commands that came since the last call; asks the database once an interval."""
        now = time.monotonic() if now is None else now
        if now < self._next_poll:
            return []
        self._next_poll = now + self._poll_seconds
        with errors("looking for commands"):
            row = self._conn.execute(
                "SELECT desired FROM vsql_sync.streams WHERE chain = %s AND direction = 'out'", (self._chain,)
            ).fetchone()
            self.desired = row[0] if row else "stopped"
            rows = self._conn.execute(
                "SELECT c.id, c.verb, c.args, c.reason FROM vsql_sync.commands c JOIN vsql_sync.streams s"
                " ON s.chain = %s AND s.direction = 'out'"
                " WHERE c.role = 'producer' AND (c.chain IS NULL OR c.chain = s.chain)"
                " AND c.requested_at >= s.created_at AND NOT EXISTS (SELECT FROM vsql_sync.command_results r"
                " WHERE r.command_id = c.id AND r.chain = s.chain AND r.direction = 'out') ORDER BY c.id",
                (self._chain,),
            ).fetchall()
        return [Command(*row) for row in rows]

    def answer(self, command: Command, *, ok: bool, message: str) -> None:
        """Say what became of a command."""
        with errors("answering a command"):
            self._conn.execute(
                "INSERT INTO vsql_sync.command_results (command_id, chain, direction, ok, message)"
                " VALUES (%s, %s, 'out', %s, %s) ON CONFLICT DO NOTHING",
                (command.id, self._chain, ok, message),
            )

    def status_due(self, state: str, now: float) -> bool:
        """Whether a status row is to be written now."""
        return now >= self._next_status or state != self._said

    def say(self, state: str, detail: dict[str, Any], now: float | None = None) -> None:
        """Write the status row."""
        now = time.monotonic() if now is None else now
        self._next_status, self._said = now + self._status_seconds, state
        with errors("writing the stream's status"):
            self._conn.execute(
                "INSERT INTO vsql_sync.stream_status (chain, direction, state, detail) VALUES (%s, 'out', %s, %s)"
                " ON CONFLICT (chain, direction) DO UPDATE SET state = excluded.state,"
                " detail = excluded.detail, updated_at = now()",
                (self._chain, state, Jsonb(detail)),
            )
