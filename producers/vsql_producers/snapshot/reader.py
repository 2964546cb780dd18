"""Reads a table by binary COPY inside of an exported snapshot: rows as frames, a chunk at a time.

Not here: which tables and columns (tables.py). Rules:

* The snapshot comes from a temporary logical slot: its consistent point S is exact. (A plain snapshot and the
  WAL position beside it are not: a commit that waits for a standby is in the WAL and not visible.)
* The slot is dropped once the snapshot is imported, so that a long copy holds no WAL of its own.
* One CopyData is one row (manual, "COPY Operations"); the header comes before the first one. A row is not
  parsed, only its column count is compared.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import NamedTuple

import psycopg
from psycopg import pq, sql

from vsql_producers.pgoutput import frame_prefix
from vsql_producers.replication import run_patiently
from vsql_producers.snapshot.tables import CopyTable
from vsql_shared import lsn
from vsql_shared.changes import Op
from vsql_shared.errors import DatabaseError, DecodeError, TransientError
from vsql_shared.pg.connect import Connection, errors, translate

_SIGNATURE = b"PGCOPY\n\xff\r\n\0"
_HEADER_SIZE = len(_SIGNATURE) + 8
_TRAILER = b"\xff\xff"
_WAIT_SECONDS = 0.1


class Snapshot(NamedTuple):
    """An exported snapshot and the WAL position it is exact for."""

    lsn: int
    name: str


def read_clock(conn: Connection) -> int:
    """The server's clock, µs since 1970: the one that commits are dated by."""
    with errors("reading the server's clock"):
        row = conn.execute("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint").fetchone()
    return 0 if row is None else int(row[0])


def export_snapshot(replication: Connection, slot: str, tick: Callable[[], None]) -> Snapshot:
    """Make a temporary slot; its snapshot lives until the next command of this connection."""
    command = sql.SQL("CREATE_REPLICATION_SLOT {} TEMPORARY LOGICAL pgoutput (SNAPSHOT 'export')")
    row = run_patiently(
        replication, command.format(sql.Identifier(slot)), "making the slot of the copy's snapshot", tick
    )
    if not row[2]:
        raise DatabaseError("the server exported no snapshot for the copy")
    return Snapshot(lsn.parse(row[1]), row[2])


def import_snapshot(conn: Connection, snapshot: Snapshot) -> None:
    """Begin a transaction on `conn` that sees exactly this snapshot."""
    with errors("importing the copy's snapshot"):
        conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        conn.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(snapshot.name)))


class TableReader:
    """The rows of one table, as frames of op COPY."""

    def __init__(
        self, conn: Connection, table: CopyTable, snapshot_lsn: int, begun: Callable[[], None]
    ) -> None:
        """`begun` is called once, when the COPY holds its locks and before any row is taken."""
        self._on_begun = begun
        self._pq: pq.abc.PGconn = conn.pgconn
        self._table = table
        self._prefix = frame_prefix(Op.COPY, table.key, snapshot_lsn)
        self._columns = table.columns.to_bytes(2, "big")
        self._first = True
        self._begun = self.done = False
        try:
            self._pq.send_query(table.command)
        except psycopg.Error as error:
            raise translate(error, f"copying table {table.name}") from error

    def _begin(self) -> bool:
        """Whether the server gives rows already: it may wait for a lock, as long as another holds it."""
        if self._pq.is_busy():
            self._readable(_WAIT_SECONDS)
            self._pq.consume_input()
            if self._pq.is_busy():
                return False
        result = self._pq.get_result()
        if result is None or result.status != pq.ExecStatus.COPY_OUT:
            if result is None:
                raise TransientError(f"table {self._table.name}: the server began no COPY")
            raise translate(psycopg.errors.error_from_result(result), f"copying table {self._table.name}")
        self._on_begun()
        self._begun = True
        return True

    def read(self, max_bytes: int) -> list[bytes]:
        """The next rows, about `max_bytes` of them, perhaps none yet; `done` after the last."""
        frames: list[bytes] = []
        size = 0
        try:
            if not self._begun and not self._begin():
                return frames
            while size < max_bytes and not self.done:
                length, data = self._pq.get_copy_data(1)
                if length > 0:
                    size += length
                    self._take(bytes(data), frames)
                elif length < 0:
                    self._end()
                else:
                    # What is here goes out before more is waited for; a stop is noticed while nothing comes.
                    if not self._readable(0 if frames else _WAIT_SECONDS):
                        break
                    self._pq.consume_input()
        except psycopg.Error as error:
            raise translate(error, f"copying table {self._table.name}") from error
        return frames

    def _readable(self, seconds: float) -> bool:
        return bool(select.select([self._pq.socket], [], [], seconds)[0])

    def _take(self, row: bytes, frames: list[bytes]) -> None:
        if self._first:
            self._first = False
            if row[: len(_SIGNATURE)] != _SIGNATURE or len(row) < _HEADER_SIZE:
                raise DecodeError(f"table {self._table.name}: COPY does not begin with its signature")
            extension = int.from_bytes(row[_HEADER_SIZE - 4 : _HEADER_SIZE], "big")
            row = row[_HEADER_SIZE + extension :]
            if not row:
                return
        if row == _TRAILER:
            return
        if row[:2] != self._columns:
            raise DecodeError(f"table {self._table.name}: COPY gave a row of another number of columns")
        frames.append(self._prefix + row)

    def _end(self) -> None:
        while (result := self._pq.get_result()) is not None:
            if result.status == pq.ExecStatus.FATAL_ERROR:
                error = psycopg.errors.error_from_result(result)
                raise translate(error, f"copying table {self._table.name}")
        self.done = True
