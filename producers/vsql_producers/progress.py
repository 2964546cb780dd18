"""What is durable, and what PostgreSQL may therefore forget.

Not here: Kafka. Rules:

* A manifest that Kafka acknowledged goes into this node's own audit table, and only then does the position
  it covers count as done. Manifests are grouped: one commit, however many arrived.
* Where nothing that was received is outstanding, the last position the walsender named is done, too: an idle
  stream never holds WAL back, and needs no heartbeat.
* Such a position is noted in `streams` before PostgreSQL is told: what the slot confirms beyond the chain and
  the note, this stream never confirmed (slot.py). A note is a commit, so notes keep their distance.
* What the records of those batches hash to is kept with their manifests, in the same transaction; of a first
  copy nothing is.
* Positions only move forward.
"""

from __future__ import annotations

import time

from vsql_producers.publish import Acknowledged
from vsql_producers.stall import Marks
from vsql_producers.stream import note_confirmed
from vsql_shared import failpoints
from vsql_shared.audit.chain import ChainWriter
from vsql_shared.audit.leaf_store import LeafKeeper
from vsql_shared.audit.store import insert_entries
from vsql_shared.pg.connect import Connection

# Seconds between notes: while little but our own notes and status rows moves the WAL …
_NOTE_SECONDS = 2.0
# … and after rows were sent, or more than so many bytes of others' WAL went by.
_NOTE_SOON_SECONDS = 0.2
_MUCH_BYTES = 64 * 1024


class Progress:
    """The stream's confirmed position."""

    def __init__(
        self, conn: Connection, writer: ChainWriter, confirmed: int, leaves: LeafKeeper | None
    ) -> None:
        self._conn = conn
        self._leaves = leaves
        self._writer = writer
        self.confirmed = confirmed
        self.published = writer.head.lsn_end
        self._entries = 0
        """Recorded since `published` moved: fragments of a transaction under way, mostly."""
        self._noted_at = float("-inf")
        self._sent = False
        """Whether manifests were recorded since the last note."""

    def record(self, acknowledged: list[Acknowledged]) -> None:
        """Commit manifests to the audit table; then what they cover is done."""
        kept = [
            (one.prepared.entry.sequence, part)
            for one in acknowledged
            if one.batch is not None
            for part in one.batch.leaves
        ]
        insert_entries(
            self._conn,
            [(one.prepared.encoded, one.offset) for one in acknowledged],
            lambda conn: self._leaves.write(conn, self._writer.chain, kept) if self._leaves else None,
        )
        failpoints.hit("producer.audit-committed")
        before = self.published
        for one in acknowledged:
            self.published = self._writer.commit(one.prepared.entry_hash).lsn_end
        self._entries = self._entries + len(acknowledged) if self.published == before else 0
        self.confirmed = max(self.confirmed, self.published)
        self._sent = True

    def nothing_outstanding(self, received: int, now: float | None = None) -> None:
        """Everything up to `received` was received, and all of it is either published or not replicated."""
        if received <= self.confirmed:
            return
        now = time.monotonic() if now is None else now
        soon = self._sent or received - self.confirmed > _MUCH_BYTES
        if now - self._noted_at < (_NOTE_SOON_SECONDS if soon else _NOTE_SECONDS):
            return
        note_confirmed(self._conn, self._writer.chain, received)
        failpoints.hit("producer.position-noted")
        self.confirmed = received
        self._noted_at, self._sent = now, False

    def marks(self) -> Marks:
        """What moves when the stream does."""
        return Marks(self.confirmed, (self.published, self._entries))
