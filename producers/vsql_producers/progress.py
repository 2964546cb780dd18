"""What is durable, and what PostgreSQL may therefore forget.

Not here: Kafka. Rules:

* A manifest that Kafka acknowledged goes into this node's own audit table, and only then does the position
  it covers count as done. Manifests are grouped: one commit, however many arrived.
* Where nothing that was received is outstanding, the last position the walsender named is done, too: an idle
  stream never holds WAL back, and needs no heartbeat.
* Positions only move forward.
"""

from __future__ import annotations

from vsql_producers.publish import Acknowledged
from vsql_shared import failpoints
from vsql_shared.audit.chain import ChainWriter
from vsql_shared.audit.store import insert_entries
from vsql_shared.pg.connect import Connection


class Progress:
    """The stream's confirmed position."""

    def __init__(self, conn: Connection, writer: ChainWriter, confirmed: int) -> None:
        self._conn = conn
        self._writer = writer
        self.confirmed = confirmed
        self.published = writer.head.lsn_end

    def record(self, acknowledged: list[Acknowledged]) -> None:
        """Commit manifests to the audit table; then what they cover is done."""
        insert_entries(self._conn, [(one.prepared.encoded, one.offset) for one in acknowledged])
        failpoints.hit("producer.audit-committed")
        for one in acknowledged:
            self.published = self._writer.commit(one.prepared.entry_hash).lsn_end
        self.confirmed = max(self.confirmed, self.published)

    def nothing_outstanding(self, received: int) -> None:
        """Everything up to `received` was received, and all of it is either published or not replicated."""
        self.confirmed = max(self.confirmed, received)
