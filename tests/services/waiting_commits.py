"""Whether a client's COMMIT waits for a synchronous standby, seen at the server, without a clock."""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import psycopg
from psycopg import pq

WAIT_SECONDS = 60.0


class Client:
    """A session whose statements are sent, and not waited for."""

    def __init__(self, conninfo: str, watcher: psycopg.Connection) -> None:
        self.conn = psycopg.connect(conninfo, autocommit=True)
        self._watcher = watcher
        self._busy = False

    def send(self, script: str) -> None:
        """Send statements in one message."""
        self.conn.pgconn.send_query(script.encode())
        self._busy = True

    def waits(self) -> bool:
        """Whether what was sent came to a wait for a standby (True) or to its end. Raises its error."""
        deadline = time.monotonic() + WAIT_SECONDS
        pid = self.conn.info.backend_pid
        while time.monotonic() < deadline:
            row = self._watcher.execute(
                "SELECT FROM pg_stat_activity WHERE pid = %s AND wait_event = 'SyncRep'", (pid,)
            ).fetchone()
            if row is not None:
                return True
            if self._answered(0.02):
                return False
        raise AssertionError("neither an answer nor a wait")

    def commits(self, script: str) -> bool:
        """Send statements; whether they came to their end without a wait. One that waits is cancelled."""
        self.send(script)
        if not self.waits():
            return True
        self.conn.cancel_safe()
        assert self._answered(WAIT_SECONDS)
        return False

    def answered(self) -> bool:
        """Wait for the end of what was sent."""
        return self._answered(WAIT_SECONDS)

    def _answered(self, seconds: float) -> bool:
        raw = self.conn.pgconn
        deadline = time.monotonic() + seconds
        while raw.is_busy():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            select.select([raw.socket], [], [], left)
            raw.consume_input()
        self._busy = False
        error: psycopg.Error | None = None
        while (result := raw.get_result()) is not None:
            if result.status == pq.ExecStatus.FATAL_ERROR and error is None:
                error = psycopg.errors.error_from_result(result)
        if error is not None:
            raise error
        return True

    def close(self) -> None:
        """End the session, whatever it waits for."""
        with contextlib.suppress(psycopg.Error):
            self._watcher.execute("SELECT pg_terminate_backend(%s, 5000)", (self.conn.info.backend_pid,))
        self.conn.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def watcher(conninfo: str) -> Iterator[psycopg.Connection]:
    """A superuser's session that looks."""
    with psycopg.connect(conninfo, autocommit=True) as conn:
        yield conn
