"""What an operator wants of an incoming stream, and what the stream says of itself.

Not here: acting on a command (worker.py). Rules: each command is answered once; the status row is written
about once an interval, at once when the state changes, and holds no row value.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vsql_shared.audit.store import PARTITIONS_SECONDS, PartitionKeeper
from vsql_shared.pg import commands
from vsql_shared.pg.commands import Command as Wish
from vsql_shared.pg.connect import Connection, errors
from vsql_shared.pg.status import write_status

if TYPE_CHECKING:
    from vsql_shared.config.limits import LimitsSettings

__all__ = ["Control", "Wish"]


class Control:
    """The stream's wanted state, its commands and its status row."""

    def __init__(
        self,
        conn: Connection,
        chain: str,
        limits: LimitsSettings,
        *,
        partitions_every: float = PARTITIONS_SECONDS,
    ) -> None:
        self.conn, self._chain = conn, chain
        self._poll_seconds = limits.command_poll_ms / 1000
        self._status_seconds = limits.status_interval_ms / 1000
        self._next_poll = self._next_status = 0.0
        self._said = ""
        self._partitions = PartitionKeeper(conn, partitions_every)
        with errors("listening for commands"):
            conn.execute(f"LISTEN {commands.CHANNEL}")  # a constant of ours
        self.desired = self._read_desired()

    def due(self) -> bool:
        """Whether to look for commands now: the interval is over, or somebody has called."""
        if time.monotonic() >= self._next_poll:
            return True
        raw = self.conn.pgconn
        raw.consume_input()
        called = False
        while raw.notifies() is not None:
            called = True
        return called

    def poll(self, *, now: bool = False) -> list[Wish]:
        """Commands that were not answered yet; reads the wanted state as well.

        Asks once an interval, or `now`.
        """
        if not (self.due() or now):
            return []
        self._next_poll = time.monotonic() + self._poll_seconds
        self.desired = self._read_desired()
        return commands.pending(self.conn, self._chain, "consumer")

    def _read_desired(self) -> str:
        with errors("reading the stream's wanted state"):
            row = self.conn.execute(
                "SELECT desired FROM vsql_sync.streams WHERE chain = %s AND direction = 'in'", (self._chain,)
            ).fetchone()
        return str(row[0]) if row else "stopped"

    def answer(self, wish: Wish, *, ok: bool, message: str) -> None:
        """Say what became of a command."""
        commands.finish(self.conn, wish.id, self._chain, "in", ok, message)

    def status_due(self, what: str | None = None) -> bool:
        """Whether a status row is to be written now."""
        return time.monotonic() >= self._next_status or (what is not None and what != self._said)

    def say(self, what: str, detail: Mapping[str, Any]) -> None:
        """Write the status row; look after the audit trail's partitions, at most once an hour."""
        self._next_status, self._said = time.monotonic() + self._status_seconds, what
        write_status(self.conn, self._chain, "in", what, detail)
        self._partitions.keep(time.monotonic())

    def anomalies(self) -> dict[str, int]:
        """{kind: count} of changes that did not fit this node's rows."""
        with errors("reading the anomalies"):
            rows = self.conn.execute(
                "SELECT kind, sum(count)::bigint FROM vsql_sync.anomalies WHERE chain = %s GROUP BY kind",
                (self._chain,),
            ).fetchall()
        return {kind: int(count) for kind, count in rows}
