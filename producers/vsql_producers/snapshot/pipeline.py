"""The first copy for one target, from a snapshot to Kafka: the copy's counterpart of the live pipeline.

    TableReader → Batches → Outlet (arrange, key, seal, publish) → Progress

Rules:

* It begins when the live stream's slot exists: what commits after the snapshot is in the live stream. And
  when the live stream's epoch names its target (joining.py): what follows the snapshot is there to be read.
* Each table is one sequence of fragments under the snapshot's position S (xid 0, commit position S); its last
  batch does not continue. An empty table sends nothing and is named in `copy_started` and `copy_finished`.
* Interrupted, it goes on in a new epoch with a new snapshot; complete tables keep theirs (history.py).
* The scope is looked at before each table, and while one is read: what an operator takes out is read no more,
  hours after the snapshot as well. Another scope is another epoch, with another snapshot.
* When every target batch is acknowledged, the copy's topics are deleted.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from vsql_producers import drift, joining, replication
from vsql_producers.batches import Batch, Batches
from vsql_producers.context import Context
from vsql_producers.epoch import open_epoch
from vsql_producers.level import read_or_level
from vsql_producers.outlet import Outlet, batch_limits
from vsql_producers.progress import Progress
from vsql_producers.publish import Acknowledged
from vsql_producers.scope import ScopeChanged, document, load_scope
from vsql_producers.scope_record import write_scope
from vsql_producers.sequences import Sequences
from vsql_producers.snapshot.history import CopyHistory, read_history
from vsql_producers.snapshot.reader import (
    Snapshot,
    TableReader,
    export_snapshot,
    import_snapshot,
    read_clock,
)
from vsql_producers.snapshot.tables import CopyTable, count_tables, require_same, tables_to_copy
from vsql_producers.transactions import RelationChange, Run
from vsql_shared import failpoints, lsn, names
from vsql_shared.audit.chain import ChainWriter, Prepared
from vsql_shared.audit.entries import COPY_FINISHED, COPY_STARTED, MAX_DETAIL_SIZE, canonical_json
from vsql_shared.audit.scope_history import SCOPE
from vsql_shared.audit.store import insert_entries, iterate
from vsql_shared.changes import SEQUENCES, Transaction
from vsql_shared.errors import DatabaseError, TransientError
from vsql_shared.kafka.topics import delete_topics
from vsql_shared.observe.metrics import Stage
from vsql_shared.pg.connect import Connection, connect, errors

_READ_BYTES = 1 << 20
_SHORT = 0.005
_LONG = 0.1
# What an operator decides about columns holds after so many seconds at most, as in the live stream.
_SCOPE_SECONDS = 5.0
# What stands beside a table's name in an entry's detail, at most: numbers of 19 digits, escaped quotes.
_TABLE_DETAIL_BYTES = 80


class CopyPipeline:
    """One epoch of a first copy; the same calls as the live pipeline's."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._outlet: Outlet | None = None
        self._writer: ChainWriter | None = None
        self._tables: deque[CopyTable] = deque()
        self._total_tables = 0
        self._reader: TableReader | None = None
        self._table: CopyTable | None = None
        self._transaction = Transaction(0, 0, 0)
        self._ready: deque[Batch] = deque()
        self._acknowledged: list[Acknowledged] = []
        self._history = CopyHistory()
        self._sequences: Sequences | None = None
        self._copied = 0
        self._expected = 0
        self._next_scope = 0.0
        self.epoch = self.sequence = 0
        self.done = False

    def open(self) -> None:
        """Wait for the live slot, open the epoch, take the snapshot, say what will be copied."""
        c = self._context
        self._require_live_slot()
        live_chain = names.live_chain(c.stream.publication, c.stream.origin)
        joining.require_named(c.conn, live_chain, c.stream.target)
        publisher = c.make_publisher()
        reader, tail = read_or_level(c.conn, c.writing, c.make_consumer(), publisher, c.on_tick)
        replica = replication.open_replication(
            c.settings.connection.conninfo("producer"), f"vsql-sync copy {c.stream.chain}"
        )
        c.closing.callback(replica.close)
        identity = replication.identify(replica)
        c.check_source(reader.head, identity, replication.switch_points(replica, identity.timeline))
        self._scope = load_scope(c.conn, c.stream.publication)
        digest = write_scope(c.conn, c.stream.chain, c.stream.publication, self._scope)
        detail = canonical_json({SCOPE: digest})
        at = identity.wal_lsn
        opened = open_epoch(
            c.conn, c.writing, reader, tail, publisher, identity, lambda head: head.lsn_end or at, detail
        )
        self._watch = opened.watch
        head = opened.writer.head
        self.epoch, self.sequence, self._writer = head.epoch, head.sequence, opened.writer
        place = c.place(head.epoch)
        self._outlet = Outlet(
            place,
            opened.writer,
            publisher,
            c.make_keys(place, publisher),
            c.settings.limits,
            c.ensure_data_topic,
            c.metrics,
            position=head.lsn_end or identity.wal_lsn,
            write_seen=c.write_seen(head.epoch),
            target=c.stream.target,
        )
        self._progress = Progress(c.conn, opened.writer, 0, None)
        self._batches = Batches(batch_limits(c.settings.limits, c.settings.encryption.dek.max_tuples))
        self._history = read_history(stored.entry for stored in iterate(c.conn, c.stream.chain))
        if not self._history.finished:
            self._take_snapshot(replica)

    def _require_live_slot(self) -> None:
        stream, conn = self._context.stream, self._context.conn
        live = (stream.publication, stream.origin)
        with errors("looking for the live stream"):
            row = conn.execute(
                "SELECT r.slot_name IS NOT NULL FROM vsql_sync.streams s"
                " LEFT JOIN pg_catalog.pg_replication_slots r"
                " ON r.slot_name = s.slot_name AND r.confirmed_flush_lsn IS NOT NULL"
                " WHERE s.publication = %s AND s.origin = %s AND s.direction = 'out' AND s.kind = 'live'"
                " AND s.slot_created",
                live,
            ).fetchone()
        if row is None or not row[0]:
            raise TransientError(
                f"the first copy waits for the slot of stream {names.live_chain(*live)}",
                hint="start the live stream; the copy follows",
            )

    def _take_snapshot(self, replica: Connection) -> None:
        c = self._context
        conn = connect(
            c.settings.connection.conninfo("producer"), application_name=f"vsql-sync copy {c.stream.chain}"
        )
        c.closing.callback(conn.close)
        before = read_clock(c.conn)
        snapshot = export_snapshot(replica, c.stream.slot_name, c.on_tick)
        import_snapshot(conn, snapshot)
        # Imported, it needs the slot no more: a long copy holds back no WAL.
        replica.close()
        drift.require_none(c.conn, c.stream.publication)
        scope = load_scope(c.conn, c.stream.publication)
        if scope._replace(leaves={}) != self._scope._replace(leaves={}):
            raise ScopeChanged("what the copy may carry was changed", hint="it goes on with it by itself")
        salts = [os.urandom(16) for _ in range(count_tables(conn, c.stream.publication))]
        tables = tables_to_copy(conn, c.stream.publication, scope, salts)
        self._reading = conn
        self._total_tables = len(tables)
        self._expected = sum(table.estimated_rows for table in tables)
        self._copied = sum(self._history.rows.values())
        self._tables.extend(table for table in tables if str(table.name) not in self._history.rows)
        # Every table of the copy is one "transaction" of the source at the snapshot's position. Its time is
        # the version of its rows where others write them, too: no change that follows may be older. Who took
        # its commit's time before this was read is waited for by the slot, and is in the snapshot.
        self._transaction = Transaction(0, snapshot.lsn, before)
        for table in self._tables:
            self._history.snapshot[str(table.name)] = snapshot.lsn
        if str(SEQUENCES) not in self._history.rows:
            publication, closing = c.stream.publication, c.closing.callback
            self._sequences = Sequences.open(c.conn, c.settings, publication, closing)
        self._say(COPY_STARTED, snapshot, self._started_detail(snapshot))
        failpoints.hit("copy.started")

    def _started_detail(self, snapshot: Snapshot) -> dict[str, Any]:
        at = lsn.text(snapshot.lsn)
        tables = {str(table.name): {"rows": table.estimated_rows, "lsn": at} for table in self._tables}
        # `copy_finished` names all of them once more, with numbers that may be longer.
        longest = sum(len(name.encode()) + _TABLE_DETAIL_BYTES for name in {*tables, *self._history.rows})
        if longest > MAX_DETAIL_SIZE:
            raise DatabaseError(
                f"publication {self._context.stream.publication} has {len(tables)} tables, and their names do"
                " not fit into one audit entry",
                hint="split the tables over several publications",
            )
        return {"lsn": at, "tables": tables}

    def _say(self, event: str, snapshot: Snapshot | None, detail: dict[str, Any]) -> None:
        """Append an entry of the copy itself; nothing is under way then."""
        writer, outlet = self._require_open()
        # An epoch alone has a position, too: where the WAL was before the snapshot.
        at = writer.head.lsn_end if writer.head.batch else snapshot.lsn if snapshot else 0
        prepared: Prepared = writer.next(
            event_type=event,
            target_node_id=self._context.stream.target,
            batch_lsn_start=at,
            batch_lsn_end=at,
            detail=canonical_json(detail),
        )
        offset = outlet.publisher.publish_entry(prepared)
        insert_entries(self._context.conn, [(prepared.encoded, offset)])
        self.sequence = writer.commit(prepared.entry_hash).sequence
        self._context.appended(prepared)

    def _require_open(self) -> tuple[ChainWriter, Outlet]:
        if self._writer is None or self._outlet is None:
            raise TransientError("the copy is not open yet")
        return self._writer, self._outlet

    @property
    def outlet(self) -> Outlet:
        """The way out; there is one once the pipeline is open."""
        return self._require_open()[1]

    def turn(self, *, reading: bool = True) -> None:
        """Read and send a little; when all is sent, wait for the acknowledgements."""
        _, outlet = self._require_open()
        if not self._history.finished and time.monotonic() >= self._next_scope:
            self._require_same_scope()
        if reading and not self._ready:
            self._read()
            self._look_at_sequences()
        most = self._context.settings.limits.inflight_batches
        while self._ready and outlet.publisher.inflight < most:
            outlet.send(self._ready.popleft())
        resting = not self._ready and self._reader is None and not self._tables
        full = outlet.publisher.inflight >= most
        pause = (_LONG if not outlet.publisher.inflight else _SHORT) if resting or not reading else 0.0
        self._acknowledged += outlet.publisher.poll(_SHORT if full else pause)
        self._record()
        if resting and not outlet.publisher.inflight and not self._acknowledged:
            self._end()

    def _require_same_scope(self) -> None:
        """What the epoch signed, and no more: partitions may come while a copy runs."""
        self._next_scope = time.monotonic() + _SCOPE_SECONDS
        conn, publication = self._context.conn, self._context.stream.publication
        if document(publication, load_scope(conn, publication)) != document(publication, self._scope):
            raise ScopeChanged("what the copy may carry was changed", hint="it goes on with it by itself")

    def _read(self) -> None:
        """The next chunk of the present table, or of the next one."""
        if self._reader is None:
            if not self._tables:
                return
            self._require_same_scope()
            self._table = table = self._tables.popleft()
            self._reader = TableReader(
                self._reading,
                table,
                self._transaction.commit_lsn,
                lambda: require_same(self._context.conn, table),
            )
            self._relations = [RelationChange(0, table.key, table.descriptor)]
            self._history.rows[str(table.name)] = 0
        reader, began = self._reader, time.perf_counter()
        frames = reader.read(_READ_BYTES)
        if frames and self._table is not None:
            self._history.rows[str(self._table.name)] += len(frames)
            self._copied += len(frames)
            size, seconds = sum(map(len, frames)), time.perf_counter() - began
            self._context.metrics.passed(Stage.DECODE, rows=len(frames), size=size, seconds=seconds)
        end = self._transaction.commit_lsn if reader.done else 0
        run = Run(self._transaction, frames, self._relations if frames else [], end)
        if frames:
            self._relations = []
        if frames or (reader.done and not self._batches.is_empty):
            self._ready += self._batches.add(run, time.monotonic())
        if reader.done:
            # The next table begins a batch of its own.
            self._ready += self._batches.rest()
            self._reader = None

    def _look_at_sequences(self) -> None:
        """After the last table: what its rows used was given out by now."""
        if self._sequences is None or self._ready or self._reader is not None or self._tables:
            return
        batch, self._sequences = self._sequences.copied(self._transaction), None
        if batch is not None:
            self._history.snapshot[str(SEQUENCES)] = self._transaction.commit_lsn
            self._history.rows[str(SEQUENCES)] = len(batch.frames)
            self._ready.append(batch)

    def _record(self) -> None:
        if not self._acknowledged:
            return
        known = self._watch.read()
        acknowledged = [one for one in self._acknowledged if one.offset < known]
        if not acknowledged:
            return
        self._acknowledged = self._acknowledged[len(acknowledged) :]
        self._progress.record(acknowledged)
        failpoints.hit("copy.recorded")
        metrics, now = self._context.metrics, time.monotonic()
        for one in acknowledged:
            self.sequence = one.prepared.entry.sequence
            if (batch := one.batch) is not None:
                self._history.last_manifest = self.sequence
                seconds = now - one.sent_at
                metrics.passed(Stage.PUBLISH, rows=batch.row_count, size=batch.nbytes, seconds=seconds)
            self._history.topics.update(part.topic for part in one.prepared.entry.partitions)
            self._context.appended(one.prepared)
        metrics.progressed()

    def _end(self) -> None:
        """Everything is sent: say so once; then wait until it is applied, and delete the topics."""
        c = self._context
        if not self._history.finished:
            self._history.finished = True
            # Nothing that the copy brought, or that it saw deleted, was committed later than this.
            clock = read_clock(c.conn)
            self._say(COPY_FINISHED, None, {**self._history.finished_detail(), "clock": clock})
            self.outlet.keys.close()
        if not self._history.last_manifest or c.targets.acknowledged(self._history.last_manifest):
            delete_topics(c.admin, sorted(self._history.topics))
            self.done = True

    def finish(self, seconds: float, tick: Callable[[], None]) -> None:
        """A graceful stop: batches under way are recorded; a table cut off in the middle is read again."""
        _, outlet = self._require_open()
        deadline = time.monotonic() + seconds
        while outlet.publisher.inflight or self._acknowledged:
            if time.monotonic() > deadline:
                raise TransientError("Kafka did not acknowledge the last batches before the stop")
            self._acknowledged += outlet.publisher.poll(_SHORT)
            self._record()
            tick()
        outlet.keys.close()

    def status(self, wal_lsn: int) -> dict[str, Any]:
        """Detail of the status row."""
        del wal_lsn  # a snapshot does not fall behind the WAL
        if self._outlet is None:
            return {}
        key = self._outlet.keys.current
        self._outlet.keys.save_usage()
        left = len(self._tables) + (self._reader is not None)
        return {
            "epoch": self.epoch,
            "sequence": self.sequence,
            "batch": self._outlet.number,
            "published_lsn": lsn.text(self._progress.published),
            "lag_bytes": 0,
            "unpublished_batches": self._outlet.publisher.inflight + len(self._ready),
            "dek_id": key.dek_id if key else "",
            "dek_tuples": key.tuples_used if key else 0,
            "copy": {
                "table": str(self._table.name) if self._table else "",
                "tables_done": self._total_tables - left,
                "tables_total": self._total_tables,
                "rows": self._copied,
                "rows_expected": max(self._expected, self._copied),
            },
        }

    def marks(self) -> None:
        """A copy waits for its target, and a large table takes hours: standing still says nothing."""

    @property
    def totals(self) -> tuple[int, int, int]:
        """Rows, bytes and batches of this epoch so far."""
        return (self._outlet.rows, self._outlet.nbytes, self._outlet.batches) if self._outlet else (0, 0, 0)
