"""What a stream was allowed to carry and what it carried, from the entries of its chain. Pure.

Not here: verifying the entries (verify.py), reading either table, what is concluded (scope_report.py). Rules:

* An entry has a hash, our tables have its text. A text that is missing, or is not the one that was signed,
  raises ChainError: a report without it would be a guess.
* A batch with rows of a table that its epoch never described was not observed. It is counted, never passed
  over: versions before this one wrote nothing down.
* What was written down and has no manifest left for Kafka all the same, perhaps: it counts, without a
  position.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from vsql_shared.audit.entries import EPOCH_OPENED, REPLICATION_BATCH, AuditEntry
from vsql_shared.changes import SIGNALS
from vsql_shared.errors import ChainError

SCOPE = "scope"
"""Key in the detail of `epoch_opened`: SHA-256 of the scope, in hex."""
DESCRIBED = "described"
"""Key in the detail of a manifest: SHA-256 of what its batch describes, in hex."""

_NO_TABLES = frozenset(str(name) for name in SIGNALS.values())


@dataclass(slots=True)
class Observed:
    """Columns a table had on a stream; positions are 0 where no manifest says them."""

    table: str
    columns: tuple[str, ...]
    lsn_from: int = 0
    lsn_to: int = 0


@dataclass(slots=True)
class StreamHistory:
    """One chain's, entry by entry (`take`), to its end (`finish`).

    `texts`: (epoch, batch) → what was described; `scopes`: SHA-256 → scope.
    """

    chain: str
    texts: Mapping[tuple[int, int], str]
    scopes: Mapping[str, str]
    epochs: int = 0
    first: int = 0
    sequence: int = 0
    batches: int = 0
    rows: int = 0
    lsn_from: int = 0
    lsn_to: int = 0
    scope_changes: list[tuple[int, int, str]] = field(default_factory=list)
    """(epoch, sequence, SHA-256) of each epoch that began under another scope than the one before."""
    unobserved: dict[str, int] = field(default_factory=dict)
    """Table → batches with rows of it that nobody observed."""
    observed: dict[tuple[str, tuple[str, ...]], Observed] = field(default_factory=dict)
    pci_columns: set[str] = field(default_factory=set)
    """What manifests named as PCI data: marks may be gone with their table or column."""
    _described: dict[str, Observed] = field(default_factory=dict)
    _taken: set[tuple[int, int]] = field(default_factory=set)

    def take(self, entry: AuditEntry) -> None:
        """The next verified entry. Raises ChainError for a text that is not what was signed."""
        self.first, self.sequence = self.first or entry.sequence, entry.sequence
        if entry.event_type == EPOCH_OPENED:
            self._on_epoch(entry)
        elif entry.event_type == REPLICATION_BATCH:
            self._on_batch(entry)

    def finish(self) -> None:
        """After the last entry: what was written down for batches that have no manifest."""
        for place in sorted(self.texts.keys() - self._taken):
            for table, columns in _parse(self.texts[place]):
                self.observed.setdefault((table, columns), Observed(table, columns))

    def _on_epoch(self, entry: AuditEntry) -> None:
        self.epochs += 1
        self._described.clear()
        digest = str(json.loads(entry.detail).get(SCOPE, ""))
        if digest and sha256_hex(self.scopes.get(digest)) != digest:
            raise self._lost(entry, f"the scope of epoch {entry.epoch}", "vsql_sync.scopes")
        if not self.scope_changes or self.scope_changes[-1][2] != digest:
            self.scope_changes.append((entry.epoch, entry.sequence, digest))

    def _on_batch(self, entry: AuditEntry) -> None:
        # A continuing fragment ends where its transaction's end is not known yet.
        end = max(entry.batch_lsn_start, entry.batch_lsn_end)
        start = entry.batch_lsn_start
        self.lsn_from = min(self.lsn_from, start) if self.batches else start
        self.lsn_to = max(self.lsn_to, end)
        self.batches, self.rows = self.batches + 1, self.rows + entry.row_count
        self.pci_columns.update(entry.pci_columns)
        # Its first rows may be under a description that it replaces.
        for table in entry.tables_affected:
            if (known := self._described.get(table)) is not None:
                self._extend(known, start, end)
        for one in self._new(entry):
            self._extend(one, start, end)
            self._described[one.table] = one
        for table in set(entry.tables_affected) - _NO_TABLES - self._described.keys():
            self.unobserved[table] = self.unobserved.get(table, 0) + 1

    def _new(self, entry: AuditEntry) -> Iterator[Observed]:
        """What a batch describes for the first time in its epoch."""
        digest = json.loads(entry.detail).get(DESCRIBED)
        if digest is None:
            return
        place = (entry.epoch, entry.batch)
        text = self.texts.get(place)
        if text is None or sha256_hex(text) != digest:
            raise self._lost(entry, f"what batch {entry.batch} describes", "vsql_sync.scope_seen")
        self._taken.add(place)
        for table, columns in _parse(text):
            yield self.observed.setdefault((table, columns), Observed(table, columns))

    @staticmethod
    def _extend(one: Observed, start: int, end: int) -> None:
        one.lsn_from = start if not one.lsn_from else min(one.lsn_from, start)
        one.lsn_to = max(one.lsn_to, end)

    def _lost(self, entry: AuditEntry, what: str, where: str) -> ChainError:
        return ChainError(
            f"{what} was signed, and {where} does not have that text: it was changed or deleted",
            record=f"{self.chain}/{entry.sequence}",
            hint="restore the table from a backup; the chain has the hash of what belongs there",
        )


def sha256_hex(text: str | None) -> str:
    """What entries have of a text; '' of none."""
    return "" if text is None else hashlib.sha256(text.encode()).hexdigest()


def _parse(text: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Tables and their columns; the text is our own, and was held against its hash."""
    for table in json.loads(text)["tables"]:
        yield str(table["table"]), tuple(map(str, table["columns"]))
