"""The applying session: its settings, its replication origin, and what is committed with a transaction.

Not here: what is written. Rules:

* A replication origin is held by one session: who cannot have it is a second applier, and waits. A session
  that was closed lets go a moment later.
* The origin's position and time are given to one commit only: left in the session, the next commit would
  claim them too, whatever it writes. They are taken back after each commit and each rollback.
* A rollback moves the origin to a position that was set, too (tried on 18). So what can fail is done before,
  and position and COMMIT travel in one message; and what was applied is known by vsql_sync.apply_progress,
  which is committed with it, never by the origin's position.
* What is acknowledged is on this server's disk: the commit is flushed, whatever the role's, the database's or
  the server's default is, and whatever a trigger of the table has set. For this server's standbys it waits,
  too, unless producers of ours are all there are: decided anew for each commit, as the list changes.
"""

from __future__ import annotations

import contextlib
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import psycopg
from psycopg import sql

from vsql_consumers import faults
from vsql_consumers.stage import run
from vsql_shared import lsn
from vsql_shared.errors import DatabaseError, DecodeError

if TYPE_CHECKING:
    from vsql_shared.pg.connect import Connection

_LET_GO_SECONDS = 2.0
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# replica: ordinary triggers, rules and foreign keys are the source's business. The rest decides how text is
# read.
_SETTINGS = {
    "session_replication_role": "replica",
    "search_path": "pg_catalog",
    "client_encoding": "UTF8",
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "extra_float_digits": "3",
    "bytea_output": "hex",
    "lc_monetary": "C",
    "xmloption": "content",
    "array_nulls": "on",
    "transform_null_equals": "off",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "row_security": "off",
}


_COMMIT = sql.SQL(
    "SET CONSTRAINTS ALL IMMEDIATE;"
    " SELECT set_config('synchronous_commit', vsql_sync.applier_level(), true);"
    " SELECT pg_replication_origin_xact_setup({at}, {time}); COMMIT;"
    " SELECT local_lsn::text, pg_replication_origin_xact_reset()"
    " FROM pg_show_replication_origin_status() WHERE external_id = {name}"
)


class OriginSession:
    """A session that commits under a replication origin."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self._name = ""

    def setup(self, name: str) -> None:
        """Settings, and the origin of this name, made if it is not there. Raises our errors."""
        try:
            self._conn.autocommit = True  # transactions are begun and ended here, by name
            run(self._conn, [f"SET {setting} = '{value}'" for setting, value in _SETTINGS.items()])
            # Staging tables of who applied here before: they are numbered anew.
            self._conn.execute("DISCARD TEMP")
            self._take_origin(name)
        except psycopg.Error as error:
            raise self._setup_fault(error) from None
        self._name = name

    def _take_origin(self, name: str) -> None:
        conn = self._conn
        conn.execute(
            "SELECT pg_replication_origin_session_reset() WHERE pg_replication_origin_session_is_setup()"
        )
        if conn.execute("SELECT pg_replication_origin_oid(%s)", (name,)).fetchone() == (None,):
            # Another session may make it at the same time.
            with contextlib.suppress(psycopg.errors.UniqueViolation):
                conn.execute("SELECT pg_replication_origin_create(%s)", (name,))
        deadline = time.monotonic() + _LET_GO_SECONDS
        while True:
            try:
                conn.execute("SELECT pg_replication_origin_session_setup(%s)", (name,))
            except psycopg.errors.ObjectInUse:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_LET_GO_SECONDS / 20)
            else:
                return

    @staticmethod
    def _setup_fault(error: psycopg.Error) -> Exception:
        if error.sqlstate != "42501":
            return faults.fault(error, "preparing the session that applies")
        return DatabaseError(
            "the consumer's role lacks a privilege it needs to apply",
            hint="run `syncctl node init` as a superuser: it grants the replication origin functions and "
            "SET ON PARAMETER session_replication_role",
        )

    def begin(self) -> None:
        """Begin a transaction if none is open."""
        if self._conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE:
            self._conn.execute("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE", prepare=False)

    def commit(self, origin_lsn: int, origin_time_us: int) -> int:
        """Commit at a position and time of the origin; where the commit ends in this server's WAL."""
        try:
            at = _EPOCH + timedelta(microseconds=origin_time_us)
        except OverflowError:
            raise DecodeError(f"a commit time of {origin_time_us} µs is out of range") from None
        # One message: what is set is of this transaction, and nothing comes between it and the COMMIT.
        message = _COMMIT.format(
            at=sql.Literal(lsn.text(origin_lsn)),
            time=sql.Literal(at.isoformat()),
            name=sql.Literal(self._name),
        )
        cursor = self._conn.execute(message, prepare=False)
        while cursor.nextset():
            continue
        row = cursor.fetchone()
        return lsn.parse(row[0]) if row else 0

    def rollback(self) -> None:
        """Roll back what is open. A connection that is lost has rolled back already."""
        try:
            self._conn.rollback()
            if self._name:
                self._conn.execute("SELECT pg_replication_origin_xact_reset()")
        except psycopg.Error:
            self._conn.close()
