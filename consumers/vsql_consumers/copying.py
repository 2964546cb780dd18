"""A first copy at the target: which tables have come, since which position their changes count, and its end.

Not here: the rows themselves, which go the way of all batches. Rules:

* The position S of a table's snapshot is written in the transaction that applies the table's rows. The live
  stream leaves out what committed before S.
* The copy's chain says when it is over (`copy_finished`); only then is the stream FINISHED and may the live
  one begin. A table of which a batch was skipped stays DIVERGED.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vsql_consumers import quarantine, state
from vsql_shared import lsn
from vsql_shared.audit.entries import COPY_FINISHED, COPY_STARTED, AuditEntry
from vsql_shared.changes import SIGNALS, OpenedBatch, TableName
from vsql_shared.errors import DecodeError, RecordError
from vsql_shared.pg.connect import Connection, errors

if TYPE_CHECKING:
    from vsql_consumers.groups import Group
    from vsql_consumers.state import Stream


class CopyKeeper:
    """Keeps the states of a stream and its tables; for a live stream there is little to keep."""

    def __init__(self, conn: Connection, stream: Stream, live_chain: str) -> None:
        self._stream, self._live_chain = stream, live_chain
        self.finished = False
        self.source_clock = 0
        """What the source's database had for the time when all was sent, µs since 1970; 0: nobody said."""
        self.tables: dict[TableName, int] = {}
        """Table → rows expected."""
        self._rows: dict[TableName, int] = {}
        self._current: TableName | None = None
        if self.is_copy:
            self._recall(conn)

    @property
    def is_copy(self) -> bool:
        """Whether this stream is a first copy."""
        return self._stream.kind == "copy"

    def detail(self) -> dict[str, Any]:
        """For the `copy` key of the status."""
        return {
            "table": str(self._current) if self._current else "",
            "tables_done": len(self._rows),
            "tables_total": len(self.tables),
            "rows": sum(self._rows.values()),
            "rows_expected": sum(self.tables.values()),
        }

    def entry(self, entry: AuditEntry, group: Group) -> None:
        """An entry without a batch came; its consequences are written with the group."""
        if not self.is_copy:
            return
        if entry.event_type == COPY_STARTED:
            begun = {table: int(said.get("rows", 0)) for table, said in _tables(entry).items()}
            self.tables |= begun
            group.also.append(lambda conn: self._begin(conn, list(begun)))
        elif entry.event_type == COPY_FINISHED:
            self.finished = True
            final = _tables(entry)
            clock = json.loads(entry.detail).get("clock")
            self.source_clock = clock if isinstance(clock, int) and clock < 1 << 63 else 0
            group.also.append(lambda conn: self._end(conn, final))

    def batch(self, opened: OpenedBatch, group: Group) -> None:
        """Rows of a copy came: their transaction carries the position of their snapshot."""
        if not self.is_copy:
            return
        at = opened.transactions[-1].commit_lsn
        for name, rows in Counter(opened.relation_of).items():
            table = opened.relations[name].name
            if table in SIGNALS.values():
                continue  # no table: it has no position of its own
            self._current = table
            group.copied[table] = (at, group.copied.get(table, (0, 0))[1] + rows)

    def write(self, conn: Connection, group: Group) -> None:
        """Write what the group copied, in its transaction: a table is one transaction of the copy."""
        for table, (at, rows) in group.copied.items():
            state.mark_table(conn, self._live_chain, table, "COPYING", copy_lsn=at, copied_rows=rows)

    def committed(self, group: Group) -> None:
        """The group is committed: its tables are complete."""
        for table, (_, rows) in group.copied.items():
            self._rows[table] = rows

    def _begin(self, conn: Connection, tables: list[TableName]) -> None:
        for table in tables:
            state.mark_table(conn, self._live_chain, table, "COPYING")
        state.set_stream_state(conn, self._stream.chain, "COPYING")

    def _end(self, conn: Connection, tables: Mapping[TableName, Mapping[str, Any]]) -> None:
        lacking = state.diverged_tables(conn, self._live_chain)
        for table, said in tables.items():
            at = lsn.parse(said["lsn"]) if isinstance(said.get("lsn"), str) else None
            reason = lacking.get(table)
            found = "SYNCHRONIZED" if reason is None else "DIVERGED"
            state.mark_table(conn, self._live_chain, table, found, copy_lsn=at, reason=reason)
        conn.execute(
            "UPDATE vsql_sync.table_sync SET state = 'SYNCHRONIZED' WHERE chain = %s AND state = 'COPYING'",
            (self._live_chain,),
        )
        state.set_stream_state(conn, self._stream.chain, "FINISHED")
        state.set_stream_state(conn, self._live_chain, "CATCHING_UP")

    def _recall(self, conn: Connection) -> None:
        """What a copy that is resumed had applied already."""
        with errors("reading what was copied"):
            rows = conn.execute(
                "SELECT table_schema, table_name, copied_rows FROM vsql_sync.table_sync WHERE chain = %s",
                (self._live_chain,),
            ).fetchall()
        for schema, table, count in rows:
            name = TableName(schema, table)
            self.tables.setdefault(name, 0)
            if count is not None:
                self._rows[name] = count


def _tables(entry: AuditEntry) -> dict[TableName, dict[str, Any]]:
    """`tables` of the entry's detail: {"schema.table": {"rows": …, "lsn": …}}. Raises RecordError."""
    try:
        said = json.loads(entry.detail).get("tables", {})
        found = {quarantine.parse_table(name): dict(about) for name, about in said.items()}
        return {name: about for name, about in found.items() if name not in SIGNALS.values()}
    except (ValueError, TypeError, AttributeError, DecodeError):
        raise RecordError(
            f"{entry.event_type} does not describe its tables",
            record=f"{entry.chain} sequence {entry.sequence}",
        ) from None
