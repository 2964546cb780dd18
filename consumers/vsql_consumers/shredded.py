"""Data keys that were destroyed on purpose: known from the origin's signed entries, and from nothing else.

Not here: destroying (`syncctl key destroy`) and what is written of a batch that is passed over (groups.py).
Rules:

* A key service that refuses says nothing: the stream waits. Only a `key_destroyed` entry of the verified
  chain makes a batch "shredded".
* The entry lies behind the batches it concerns. So where a key does not open, the chain is read ahead, signed
  and linked entry by entry from this stream's own position, and nothing else is taken from there.
* Before that, the keys topic is looked through: a key that another KEK version wraps by now is not destroyed.
* A key that is named leaves this process's memory when its entry's turn comes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from vsql_consumers.members import PartReceipt, part_receipt
from vsql_consumers.resume import first_offset
from vsql_consumers.source import read_chain
from vsql_consumers.verify import VerifiedBatch, record_name
from vsql_shared import names
from vsql_shared.audit.chain import Accepted, ChainReader
from vsql_shared.audit.entries import KEY_DESTROYED, SHREDDED
from vsql_shared.audit.shredding import Destroyed, destroyed
from vsql_shared.errors import (
    ChainError,
    DecodeError,
    KeyUnavailableError,
    RecordError,
    UnsealError,
    VerificationError,
)

if TYPE_CHECKING:
    from vsql_consumers.figures import Figures
    from vsql_consumers.intake import Intake
    from vsql_consumers.means import Means
    from vsql_consumers.state import Position
    from vsql_shared.audit.entries import AuditEntry
    from vsql_shared.crypto.dek import OpeningKey

_log = logging.getLogger(__name__)


class Shredded(NamedTuple):
    """A batch, or some partitions of one, whose data key was destroyed: verified, and never to be opened."""

    verified: VerifiedBatch
    by: Destroyed

    def part_receipt(self, roots: Mapping[tuple[str, int], bytes]) -> PartReceipt:
        """What is said of some partitions, where several apply the stream."""
        found = self.verified
        counts = {SHREDDED: found.changes}
        return part_receipt(found.entry, roots, counts, found.transactions, self.by.as_detail())


class Keys:
    """The keys of one stream's batches: opened, or known to be destroyed."""

    def __init__(self, means: Means, intake: Intake, figures: Figures) -> None:
        self._means, self._intake, self._figures = means, intake, figures
        self._destroyed: dict[str, Destroyed] = {}

    def of(self, entry: AuditEntry, position: Position) -> OpeningKey | Destroyed:
        """The key of a manifest, or what destroyed it. Raises UnsealError, KeyUnavailableError."""
        dek_id, intake = entry.dek_id, self._intake
        if dek_id in self._destroyed:
            return self._destroyed[dek_id]
        if not intake.announcements.knows(dek_id):
            intake.read_keys(dek_id)
        try:
            return self._open(entry)
        except (KeyUnavailableError, UnsealError):
            if intake.look_again(dek_id):
                try:
                    return self._open(entry)
                except (KeyUnavailableError, UnsealError):
                    _log.info("the newest announcement does not open either", extra={"dek_id": dek_id})
            self._look_ahead(position)
            if dek_id in self._destroyed:
                return self._destroyed[dek_id]
            raise

    def take(self, entry: AuditEntry) -> None:
        """A `key_destroyed` entry whose turn has come. Raises RecordError."""
        try:
            found = destroyed(entry)
        except DecodeError as error:
            raise RecordError(error.message, record=f"{entry.chain} sequence {entry.sequence}") from error
        self._note(found)
        self._intake.announcements.destroy(found.deks)
        _log.warning(
            "data keys were destroyed", extra={"kek_id": found.kek_id, "deks": len(found.deks)}
        )  # fmt: skip

    def _open(self, entry: AuditEntry) -> OpeningKey:
        return self._figures.open_key(self._intake.announcements, entry, self._means.provider)

    def _look_ahead(self, position: Position) -> None:
        """Read the chain from here to its present end, or the stream's, for keys that were destroyed."""
        means, chain = self._means, self._means.stream.chain
        settings = means.settings
        cluster, node = settings.cluster.name, settings.cluster.node_name
        reader = ChainReader(cluster, chain, means.stream.origin, means.trust, position.head)
        group, client = names.group_id(cluster, chain, node), f"vsql-sync-ahead-{chain}"
        audit = self._intake.audit
        begin = first_offset(means, audit, position.head, position.audit_offset)
        for offset, document in read_chain(settings, client, group, audit, chain, begin):
            if means.stop.is_set():
                return
            try:
                found = reader.accept(document, record_name(*audit, offset))
                if isinstance(found, Accepted) and found.entry.event_type == KEY_DESTROYED:
                    self._note(destroyed(found.entry))
            except ChainError:
                return  # what is wrong there is said when its turn comes
            except (VerificationError, DecodeError):
                continue  # not the origin's, and shows nothing

    def _note(self, found: Destroyed) -> None:
        self._destroyed.update(dict.fromkeys(found.deks, found))
