"""What an operator wants of a stream, and what the stream says of itself.

Not here: acting on a command (worker.py). Rules: each command is answered once; a status row is written about
once an interval, at once when the state changes, and holds no row value.
"""

from __future__ import annotations

from typing import Any

import psycopg

from vsql_shared.audit.store import PARTITIONS_SECONDS, PartitionKeeper
from vsql_shared.config import LimitsSettings
from vsql_shared.pg import commands
from vsql_shared.pg.commands import Command
from vsql_shared.pg.connect import Connection, errors, translate
from vsql_shared.pg.status import write_status


class Control:
    """The stream's wanted state, its commands, and its status row."""

    def __init__(
        self,
        conn: Connection,
        chain: str,
        limits: LimitsSettings,
        *,
        partitions_every: float = PARTITIONS_SECONDS,
    ) -> None:
        self._conn, self._chain = conn, chain
        self._poll_seconds = limits.command_poll_ms / 1000
        self._status_seconds = limits.status_interval_ms / 1000
        self._next_poll = self._next_status = 0.0
        self._said = ""
        self._partitions = PartitionKeeper(conn, partitions_every)
        self._called = False
        self.desired = "running"
        conn.add_notify_handler(self._on_notify)
        with errors("listening for commands"):
            conn.execute(f"LISTEN {commands.CHANNEL}")  # a constant of ours

    def _on_notify(self, _: object) -> None:
        self._called = True

    def poll(self, now: float) -> list[Command]:
        """Commands that were not answered yet; asks when somebody called, else once an interval."""
        if now < self._next_poll and not self._was_called():
            return []
        self._next_poll, self._called = now + self._poll_seconds, False
        with errors("reading the stream's wanted state"):
            row = self._conn.execute(
                "SELECT desired FROM vsql_sync.streams WHERE chain = %s AND direction = 'out'", (self._chain,)
            ).fetchone()
        self.desired = str(row[0]) if row else "stopped"
        return commands.pending(self._conn, self._chain, "producer")

    def _was_called(self) -> bool:
        """Notifications reach the handler during statements; between them they are in the socket."""
        try:
            self._conn.pgconn.consume_input()
        except psycopg.Error as error:
            raise translate(error, "listening for commands") from error
        while self._conn.pgconn.notifies() is not None:
            self._called = True
        return self._called

    def answer(self, command: Command, *, ok: bool, message: str) -> None:
        """Say what became of a command."""
        commands.finish(self._conn, command.id, self._chain, "out", ok, message)

    def status_due(self, state: str, now: float) -> bool:
        """Whether a status row is to be written now."""
        return now >= self._next_status or state != self._said

    def say(self, state: str, detail: dict[str, Any], now: float) -> None:
        """Write the status row; look after the audit trail's partitions, at most once an hour."""
        self._next_status, self._said = now + self._status_seconds, state
        write_status(self._conn, self._chain, "out", state, detail)
        self._partitions.keep(now)
