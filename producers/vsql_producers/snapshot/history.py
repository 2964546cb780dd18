"""What a copy's own chain says is done already. Pure: entries in, values out.

A copy that is interrupted goes on in a new epoch with a new snapshot. Tables whose last batch has a manifest
keep the snapshot they were read from; a table that was cut off in the middle is void and read again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vsql_shared import lsn
from vsql_shared.audit.entries import COPY_FINISHED, EPOCH_OPENED, REPLICATION_BATCH, AuditEntry


@dataclass(slots=True)
class CopyHistory:
    """Complete tables (quoted names) with their rows and snapshot position; and the end, if it came."""

    rows: dict[str, int] = field(default_factory=dict)
    snapshot: dict[str, int] = field(default_factory=dict)
    topics: set[str] = field(default_factory=set)
    last_manifest: int = 0
    finished: bool = False

    def finished_detail(self) -> dict[str, Any]:
        """Detail of the `copy_finished` entry."""
        return {
            "tables": {
                table: {"rows": rows, "lsn": lsn.text(self.snapshot[table])}
                for table, rows in self.rows.items()
            }
        }


def read_history(entries: Iterable[AuditEntry]) -> CopyHistory:
    """Go through a copy chain's entries, oldest first."""
    history = CopyHistory()
    partial = 0
    for entry in entries:
        if entry.event_type == EPOCH_OPENED:
            partial = 0
        elif entry.event_type == COPY_FINISHED:
            history.finished = True
        elif entry.event_type == REPLICATION_BATCH:
            history.topics.update(part.topic for part in entry.partitions)
            history.last_manifest = entry.sequence
            partial += entry.row_count
            if not entry.continues:
                # A batch of a copy holds one table only.
                table = entry.tables_affected[0]
                history.rows[table], history.snapshot[table] = partial, entry.batch_lsn_end
                partial = 0
    return history
