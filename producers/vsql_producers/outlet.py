"""The way out of one epoch: a batch goes in, its packs and its manifest go to Kafka.

Joins arrange, key, seal and publish; live stream and first copy both send through it. Not here: where batches
come from and what happens after the acknowledgement (progress.py). Rules:

* Batch numbers follow the chain's head and grow by one; they are given out when a batch is sealed.
* A topic is created before the first pack for it.
* An operator's act stands in the chain, too, in the order it was obeyed in.
* What a batch describes for the first time is written down before it leaves, and its hash stands in the
  manifest (scope_record.py).
* A data key's batches hold every descriptor they name: what destroys a key takes no other key's rows with it.
* Manifests cover the positions of the source without a hole: each begins where the one before ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from vsql_producers import seal
from vsql_producers.batches import Batch, BatchLimits
from vsql_producers.keys import DataKeys
from vsql_producers.publish import Publisher
from vsql_producers.scope_record import seen
from vsql_producers.seal import PackLimits, Place, Relations, SealedBatch
from vsql_producers.spread import Spread
from vsql_shared.audit.chain import ChainWriter, Prepared
from vsql_shared.audit.entries import (
    BY_ROW,
    LAST,
    OPERATOR_ACTION,
    ORDER,
    REPLICATION_BATCH,
    canonical_json,
)
from vsql_shared.audit.merkle import batch_root
from vsql_shared.audit.scope_history import DESCRIBED
from vsql_shared.changes import PartitionRoot
from vsql_shared.config import LimitsSettings
from vsql_shared.crypto.dek import ALGORITHM
from vsql_shared.observe.metrics import Stage, StreamMetrics

# Room for a pack's envelope beside its tuples, as in the settings' own check.
_ENVELOPE_BYTES = 4 * 1024


def pack_limits(limits: LimitsSettings) -> PackLimits:
    """Bounds of packs from [limits]."""
    largest = limits.message_max_bytes - _ENVELOPE_BYTES - seal.TUPLE_OVERHEAD
    return PackLimits(limits.pack_max_tuples, limits.pack_max_bytes, largest)


def batch_limits(limits: LimitsSettings, dek_max_tuples: int) -> BatchLimits:
    """Bounds of batches: a batch must fit under one data key, descriptors included."""
    rows = min(limits.batch_max_rows, max(1, dek_max_tuples // 2))
    linger, longest = limits.batch_linger_ms / 1000, limits.batch_linger_max_ms / 1000
    return BatchLimits(rows, limits.batch_max_bytes, linger, longest)


class Outlet:
    """One epoch's batches on their way to Kafka."""

    def __init__(
        self,
        place: Place,
        writer: ChainWriter,
        publisher: Publisher,
        keys: DataKeys,
        limits: LimitsSettings,
        ensure_topic: Callable[[str], None],
        metrics: StreamMetrics,
        position: int,
        *,
        write_seen: Callable[[int, str], str],
        target: str = "*",
        spread: Spread | None = None,
        made: Callable[[Prepared], None] | None = None,
    ) -> None:
        """`write_seen` takes a batch's number and what it describes, and returns the hash of that.

        `made` is told of each manifest before it leaves.
        """
        self._place, self._writer = place, writer
        self.publisher, self.keys = publisher, keys
        self._limits = pack_limits(limits)
        self._ensure_topic = ensure_topic
        self._metrics = metrics
        self._position, self._target = position, target
        self._write_seen, self._made = write_seen, made
        self._relations = Relations(spread)
        self._topics: set[str] = set()
        self._number = writer.tip.batch
        self.rows = self.nbytes = self.batches = 0
        publisher.begin(self._manifest)

    @property
    def number(self) -> int:
        """Number of the batch sealed last."""
        return self._number

    def send(self, batch: Batch) -> None:
        """Seal a batch and queue its packs."""
        began = time.perf_counter()
        former, before = self.keys.current, self._relations.copy()
        parts = seal.arrange(batch, self._relations, self._limits.plaintext)
        key = self.keys.key_for(*seal.needs(parts))
        if key is not former and before.sent:
            before.sent.clear()
            self._relations = before
            parts = seal.arrange(batch, self._relations, self._limits.plaintext)
        sealed = seal.seal(batch, parts, self._number + 1, key, self._place, self._limits)
        self._number += 1
        text = seen(self._relations.fresh)
        described = self._write_seen(self._number, text) if text else ""
        sealed = sealed._replace(kek_id=self.keys.kek_id, described=described)
        for topic in sealed.topics:
            if topic.topic not in self._topics:
                self._ensure_topic(topic.topic)
                self._topics.add(topic.topic)
        rows, size = sealed.row_count, sealed.nbytes
        self._metrics.passed(Stage.SEAL, rows=rows, size=size, seconds=time.perf_counter() - began)
        self._metrics.transactions(sealed.transactions)
        self.publisher.send(sealed)
        self.rows, self.nbytes, self.batches = self.rows + rows, self.nbytes + size, self.batches + 1

    def act(self, detail: Mapping[str, object]) -> int:
        """Put an operator's act into the chain, behind the manifests made so far; its sequence there."""
        return self.say(OPERATOR_ACTION, detail)

    def say(self, event_type: str, detail: Mapping[str, object]) -> int:
        """The same with an entry of another kind, without a batch."""
        at = self._position
        prepared = self._writer.prepare(
            event_type=event_type,
            target_node_id=self._target,
            batch_lsn_start=at,
            batch_lsn_end=at,
            detail=canonical_json(detail),
        )
        self.publisher.send_entry(prepared)
        return prepared.entry.sequence

    def _manifest(self, batch: SealedBatch, roots: tuple[PartitionRoot, ...]) -> Prepared:
        start, end = self._position, batch.end_lsn or self._position
        prepared = self._writer.prepare(
            event_type=REPLICATION_BATCH,
            target_node_id=self._target,
            batch=batch.number,
            batch_lsn_start=start,
            batch_lsn_end=end,
            tables_affected=batch.tables,
            row_count=batch.row_count,
            contains_pci=bool(batch.pci_columns),
            pci_columns=batch.pci_columns,
            dek_id=batch.dek_id,
            kek_id=batch.kek_id,
            algorithm=ALGORITHM,
            merkle_root=batch_root([root.sub_root for root in roots]),
            record_count=batch.record_count,
            continues=batch.continues,
            partitions=roots,
            detail=_detail(batch),
        )
        self._position = end
        if self._made is not None:
            self._made(prepared)
        return prepared


def _detail(batch: SealedBatch) -> str:
    """What a manifest says beside its columns: which order its batch needs, what it describes, its end."""
    said: dict[str, object] = {ORDER: BY_ROW} if batch.by_row else {}
    if batch.described:
        said[DESCRIBED] = batch.described
    if batch.last is not None and batch.last.xid:
        said[LAST] = [batch.last.xid, batch.last.commit_time]
    return canonical_json(said)
