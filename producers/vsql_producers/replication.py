"""The replication connection: slot, START_REPLICATION, frames in, positions out.

Not here: what frames mean (pgoutput.py), when a position may be confirmed (progress.py), whether the slot is
still the stream's (slot.py). Rules:

* Frames are drained in bulk, because waking for each row costs more than everything else done with it; a call
  returns at most `max_bytes`, so memory is bounded however fast the walsender is.
* Only positions that were given to `confirm` are reported as flushed; replies to keepalives repeat them.
* What is reported as applied lets commits return where they wait for us (docs/design/0027): of a synchronous
  stream nothing but what was given to `apply`.
* The walsender is asked how far it is: WAL of other databases keeps it busy for minutes without a word.
"""

from __future__ import annotations

import select
import struct
import time
from collections.abc import Callable
from typing import NamedTuple

import psycopg
from psycopg import pq, sql

from vsql_producers import pgoutput
from vsql_shared import lsn
from vsql_shared.errors import DatabaseError, DecodeError, TransientError
from vsql_shared.pg.connect import Connection, connect, errors, translate

_STATUS = struct.Struct(">cQQQqB")
_IN_USE = "55006"
_FAILOVER_SINCE = 170_000
_ORIGIN_SINCE = 160_000
# Seconds between status messages at least; wal_sender_timeout is a minute by default.
STATUS_SECONDS = 5.0
_PATIENCE_SECONDS = 0.1
_CANCEL_SECONDS = 5.0


class Identity(NamedTuple):
    """Whose WAL this is: positions compare only within one timeline of one system."""

    system_identifier: str
    timeline: int
    wal_lsn: int


class SlotInUse(TransientError):
    """Another session reads from the slot."""


class Drained(NamedTuple):
    """Frames that arrived, in order, and the last position the walsender reported after reading up to it."""

    frames: list[bytes]
    keepalive_lsn: int
    more: bool


def open_replication(conninfo: str, application_name: str) -> Connection:
    """A connection for replication commands and SQL. The walsender's text output follows its settings."""
    return connect(conninfo, application_name=application_name, replication="database")


def identify(conn: Connection) -> Identity:
    """IDENTIFY_SYSTEM."""
    with errors("identifying the server"):
        row = conn.execute("IDENTIFY_SYSTEM").fetchone()
    if row is None:
        raise DatabaseError("the server did not identify itself")
    return Identity(str(row[0]), int(row[1]), lsn.parse(row[2]))


def wal_position(conn: Connection) -> int:
    """Where the server writes now."""
    with errors("asking for the WAL position"):
        row = conn.execute("SELECT pg_catalog.pg_current_wal_insert_lsn()::text").fetchone()
    return lsn.parse(row[0]) if row else 0


def switch_points(conn: Connection, timeline: int) -> dict[int, int]:
    """Timeline → where it was left, of every ancestor of `timeline`."""
    if timeline == 1:
        return {}
    with errors("reading the timeline's history"):
        row = conn.execute(sql.SQL("TIMELINE_HISTORY {}").format(sql.Literal(timeline))).fetchone()
    content = row[1] if row else b""
    text = content.decode() if isinstance(content, bytes) else str(content)
    points: dict[int, int] = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0].isdigit():
            points[int(words[0])] = lsn.parse(words[1])
    return points


def run_patiently(conn: Connection, command: sql.Composed, doing: str, tick: Callable[[], None]) -> list[str]:
    """Run a command that waits for other transactions to end, with `tick` meanwhile; gives its row's texts.

    When `tick` raises, the server is told to give up: it would not notice that nobody waits any more.
    """
    raw = conn.pgconn
    try:
        raw.send_query(command.as_bytes(conn))
        while raw.is_busy():
            select.select([raw.socket], [], [], _PATIENCE_SECONDS)
            raw.consume_input()
            tick()
        result = raw.get_result()
        while raw.get_result() is not None:
            continue
    except psycopg.Error as error:
        raise translate(error, doing) from error
    except BaseException:
        conn.cancel_safe(timeout=_CANCEL_SECONDS)
        raise
    if result is None or result.status != pq.ExecStatus.TUPLES_OK:
        if result is None:
            raise TransientError(f"the server did not answer while {doing}")
        raise translate(psycopg.errors.error_from_result(result), doing)
    return [(result.get_value(0, column) or b"").decode() for column in range(result.nfields)]


def create_slot(conn: Connection, name: str, tick: Callable[[], None]) -> int:
    """Make the stream's permanent slot; returns its consistent point. Failover on 17 and later."""
    failover = ", FAILOVER" if conn.info.server_version >= _FAILOVER_SINCE else ""
    command = sql.SQL("CREATE_REPLICATION_SLOT {} LOGICAL pgoutput (SNAPSHOT 'nothing'" + failover + ")")
    row = run_patiently(conn, command.format(sql.Identifier(name)), f"creating replication slot {name}", tick)
    return lsn.parse(row[1])


class WalStream:
    """START_REPLICATION on a connection; from then on it carries frames only."""

    def __init__(
        self,
        conn: Connection,
        slot: str,
        publication: str,
        *,
        binary: bool,
        messages: bool = False,
        synchronous: bool = False,
    ) -> None:
        """`synchronous`: commits wait for what `apply` says; nothing is applied before it said something."""
        self._conn = conn
        self._pq: pq.abc.PGconn = conn.pgconn
        self._pending = False
        self._next_status = self._next_question = 0.0
        self._reply_wanted = False
        self.confirmed = 0
        self._applied: int | None = 0 if synchronous else None
        self._start(slot, publication, binary, messages)

    def _start(self, slot: str, publication: str, binary: bool, messages: bool) -> None:
        version = self._conn.info.server_version
        options = {
            "proto_version": "4" if version >= _ORIGIN_SINCE else "3",
            # A list of identifiers: quoted as such inside of the literal.
            "publication_names": '"' + publication.replace('"', '""') + '"',
            "messages": "true" if messages else "false",
            "binary": "true" if binary else "false",
        }
        if version >= _ORIGIN_SINCE:
            options["origin"] = "none"
        listed = sql.SQL(", ").join(
            sql.SQL("{} {}").format(sql.Identifier(name), sql.Literal(value))
            for name, value in options.items()
        )
        command = sql.SQL("START_REPLICATION SLOT {} LOGICAL 0/0 ({})").format(sql.Identifier(slot), listed)
        try:
            self._conn.execute(command)
        except psycopg.Error as error:
            if error.sqlstate == _IN_USE:
                raise SlotInUse(f"replication slot {slot} is used by another session") from None
            raise translate(error, f"starting replication from slot {slot}") from error

    @property
    def fileno(self) -> int:
        """The socket, to wait on."""
        return self._pq.socket

    def wait(self, seconds: float) -> bool:
        """Wait until something arrives; at once where a drain left something behind."""
        if self._pending:
            return True
        readable, _, _ = select.select([self._pq.socket], [], [], max(0.0, seconds))
        return bool(readable)

    def drain(self, max_bytes: int) -> Drained:
        """Everything that has arrived, up to about `max_bytes`."""
        frames: list[bytes] = []
        keepalive = size = length = 0
        append, read = frames.append, self._pq.get_copy_data
        try:
            fresh = False
            while size < max_bytes:
                length, data = read(1)
                if length == 0 and not fresh:
                    # libpq's buffer holds some dozens of rows, the socket's thousands: look again.
                    self._pq.consume_input()
                    fresh = True
                    continue
                if length <= 0:
                    break
                fresh = False
                size += length
                if data[0] == 0x77:  # 'w'
                    append(bytes(data))
                else:
                    keepalive = self._on_keepalive(bytes(data))
            else:
                length = 1
        except psycopg.Error as error:
            raise translate(error, "reading the WAL") from error
        if length < 0:
            raise self._ended()
        self._pending = length > 0
        return Drained(frames, keepalive, self._pending)

    def _on_keepalive(self, data: bytes) -> int:
        if data[:1] != b"k":
            raise DecodeError(f"the walsender sent a message of unknown kind {data[:1]!r}")
        keepalive = pgoutput.decode_keepalive(data)
        self._reply_wanted = self._reply_wanted or keepalive.reply_wanted
        return keepalive.wal_end

    def _ended(self) -> Exception:
        """Why the walsender left COPY mode."""
        result = self._pq.get_result()
        if result is not None and result.status == pq.ExecStatus.FATAL_ERROR:
            error = psycopg.errors.error_from_result(result)
            return translate(error, "reading the WAL")
        return TransientError("the walsender ended the stream", hint="it is started again")

    def confirm(self, position: int) -> None:
        """Manifests in the audit table cover everything below `position`: PostgreSQL may forget it."""
        if position > self.confirmed:
            self.confirmed = position
            self._next_status = 0.0

    def apply(self, position: int) -> None:
        """Commits that end at or below `position` may return to their clients; said at once."""
        if self._applied is not None and position > self._applied:
            self._applied = position
            self._next_status = 0.0

    def report(self, now: float | None = None) -> None:
        """Send a status message when one is due: progress, a wanted reply, or the interval."""
        now = time.monotonic() if now is None else now
        if now < self._next_status and not self._reply_wanted:
            return
        at = self.confirmed
        asks = now >= self._next_question
        try:
            applied = at if self._applied is None else self._applied
            self._pq.put_copy_data(_STATUS.pack(b"r", max(at, applied), at, applied, 0, asks))
            self._pq.flush()
        except psycopg.Error as error:
            raise translate(error, "reporting progress to the walsender") from error
        self._next_status, self._reply_wanted = now + STATUS_SECONDS, False
        if asks:
            self._next_question = now + STATUS_SECONDS

    def close(self) -> None:
        """End the walsender; the slot keeps its position."""
        self._conn.close()
