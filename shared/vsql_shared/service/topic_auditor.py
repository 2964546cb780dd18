"""Reads the audit topic in slices for the background verification. What it is held against: watch_topic.py.

Rules: a consumer of its own, there while a pass is under way; where Kafka is away the pass waits, and the
trail is verified all the same; the position is kept with every slice.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from confluent_kafka import KafkaError, KafkaException, TopicPartition

from vsql_shared import names
from vsql_shared.audit import watch_state
from vsql_shared.audit.history import SILENCE_SECONDS
from vsql_shared.audit.verify import Problem, own_heads
from vsql_shared.audit.watch_topic import Named, TopicPass
from vsql_shared.errors import BrokerError, TransientError
from vsql_shared.kafka.clients import from_exception, kafka_error, make_consumer
from vsql_shared.kafka.rights import VERIFY_GROUP
from vsql_shared.pg.connect import Connection, errors

if TYPE_CHECKING:
    from collections.abc import Iterable

    from confluent_kafka import Consumer

    from vsql_shared.audit.watch import Cosigned
    from vsql_shared.config import Settings
    from vsql_shared.crypto.signing import TrustStore

_log = logging.getLogger(__name__)

_ASK_SECONDS = 5.0
_READ_SECONDS = 0.5
_AWAY_SECONDS = 30.0


class TopicAuditor:
    """One pass over the topic after the other; `turn` reads one slice."""

    def __init__(self, conn: Connection, settings: Settings) -> None:
        self._conn, self._settings = conn, settings
        self._topic = names.audit_topic(settings.cluster.name)
        self._every = settings.audit.verify_every.total_seconds()
        self._consumer: Consumer | None = None
        self._assigned: int | None = None
        text = watch_state.load_topic(conn)
        cluster, node = settings.cluster.name, settings.cluster.node_name
        self._pass = TopicPass.from_json(cluster, node, text) if text else None
        self._next = 0.0
        self._said = ""
        self._heard: float | None = None
        """When the partition under way gave something last."""
        self.cosigned: Cosigned = {}
        """What targets co-signed, as the last whole pass has it."""

    def close(self) -> None:
        """Leave Kafka."""
        if self._consumer is not None:
            self._consumer.close()
            self._consumer, self._assigned = None, None

    def turn(self, trust: TrustStore, now: float) -> list[Problem]:
        """Read the next slice; the breaks that are new."""
        if now < self._next:
            return []
        if self._pass is None and not own_heads(self._conn) and not watch_state.load(self._conn):
            self._next = now + min(
                _AWAY_SECONDS, self._every
            )  # a node without streams: there may be no topic
            return []
        try:
            found, ended = self._slice(trust)
        except (TransientError, BrokerError) as error:
            self.close()
            self._next = now + min(_AWAY_SECONDS, self._every)
            if isinstance(error, BrokerError) and self._pass is not None:
                # Positions of a topic that is not there any more, or begins later, lead nowhere.
                self._pass = None
                watch_state.save_topic(self._conn, None)
            if self._said != error.message:
                self._said = error.message
                _log.warning("the audit topic is not verified now: %s", error)
            return []
        self._said = ""
        new = [one for one in found if watch_state.note(self._conn, "topic", one)]
        if ended and self._pass is not None:
            self.cosigned = self._pass.cosigned
            if not self._pass.broken:
                watch_state.whole(self._conn, watch_state.TOPIC, sum(self._pass.ends.values()))
            self._pass = None
            self.close()
            self._next = now + self._every
        watch_state.save_topic(self._conn, self._pass.to_json() if self._pass is not None else None)
        return new

    def _slice(self, trust: TrustStore) -> tuple[list[Problem], bool]:
        """(breaks, whether the pass has ended)."""
        try:
            consumer = self._open()
            if self._pass is None:
                self._pass = self._begin(consumer)
            state, partition = self._pass, self._pass.partition
            found: list[Problem] = []
            if partition is not None:
                self._assign(consumer, partition, state.next[partition])
                named = self._read(consumer, state, partition, trust, found)
                found += self._compare(state, named)
            found += self._late(state)
            if state.partition is not None or state.ahead:
                return found, False
            found += state.missing()
        except KafkaException as error:
            raise from_exception(error, f"read {self._topic}") from error
        state.broken = state.broken or bool(found)
        return found, True

    def _open(self) -> Consumer:
        if self._consumer is None:
            self._consumer = make_consumer(
                self._settings, "vsql-sync-audit", VERIFY_GROUP, partition_eof=True
            )
            self._assigned = None
        return self._consumer

    def _begin(self, consumer: Consumer) -> TopicPass:
        cluster = self._settings.cluster
        with errors("reading the trail's heads"):
            # Before the topic's ends are: what the trail has by now lies below them.
            trail = {chain: head[0] for chain, head in own_heads(self._conn).items()}
        found = consumer.list_topics(self._topic, timeout=_ASK_SECONDS).topics[self._topic]
        if found.error is not None:
            raise kafka_error(found.error, f"read {self._topic}")
        state = TopicPass(cluster.name, cluster.node_name, {}, trail)
        for partition in found.partitions:
            place = TopicPartition(self._topic, partition)
            low, high = consumer.get_watermark_offsets(place, timeout=_ASK_SECONDS)
            state.next[partition], state.ends[partition] = low, high
        return state

    def _assign(self, consumer: Consumer, partition: int, offset: int) -> None:
        if self._assigned != partition:
            consumer.assign([TopicPartition(self._topic, partition, offset)])
            self._assigned, self._heard = partition, None

    def _read(
        self, consumer: Consumer, state: TopicPass, partition: int, trust: TrustStore, found: list[Problem]
    ) -> list[Named]:
        named = []
        before = state.next[partition]
        for message in consumer.consume(self._settings.audit.verify_slice, timeout=_READ_SECONDS):
            if (error := message.error()) is not None:
                if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - a public name of librdkafka
                    state.next[partition] = state.ends[partition]
                    continue
                raise kafka_error(error, f"read {self._topic}/{partition}")
            offset, value = message.offset() or 0, message.value()
            state.next[partition] = offset + 1
            if value is None or offset >= state.ends[partition]:
                continue
            outcome = state.feed(trust, value, f"{self._topic}/{partition}/{offset}")
            if isinstance(outcome, Problem):
                found.append(outcome)
            elif outcome is not None:
                named.append(outcome)
        state.broken = state.broken or bool(found)
        self._require_answer(state, partition, before)
        return named

    def _require_answer(self, state: TopicPass, partition: int, before: int) -> None:
        """Raise TransientError where a partition has more and gives nothing for a while."""
        now = time.monotonic()
        if state.next[partition] > before or self._heard is None:
            self._heard = now
        elif now - self._heard > SILENCE_SECONDS:
            self._heard = None
            where = f"{self._topic}/{partition}"
            raise TransientError(f"Kafka: {where} gives nothing below offset {state.ends[partition]}")

    def _compare(self, state: TopicPass, named: Iterable[Named]) -> list[Problem]:
        """Hold what was read against the trail, in one query."""
        wanted = list(named)
        if not wanted:
            return []
        with errors("comparing the topic with the trail"):
            # The heads first: what is stored in between is then beyond them, or there.
            last = {chain: head[0] for chain, head in own_heads(self._conn).items()}
            rows = self._conn.execute(
                "SELECT a.chain, a.sequence, sha256(a.document) FROM vsql_sync.vsql_sync_audit a"
                " JOIN unnest(%s::text[], %s::bigint[]) w (chain, sequence) USING (chain, sequence)",
                ([one.chain for one in wanted], [one.sequence for one in wanted]),
            ).fetchall()
        stored = {(chain, sequence): bytes(digest) for chain, sequence, digest in rows}
        found = state.compare(wanted, stored, last, time.time())
        state.broken = state.broken or bool(found)
        return found

    def _late(self, state: TopicPass) -> list[Problem]:
        """Entries that were in Kafka and not in the trail a while ago: by now they must be."""
        late = state.overdue(time.time())
        found = self._compare(state, late)
        for one in late:
            if state.ahead.pop(one.chain, None) is not None:
                what = (
                    f"Kafka has entry {one.sequence}, the trail ends before it: it was cut at its end, or its"
                    " writer stopped before it could store it (it adds it when it starts)"
                )
                found.append(Problem(one.chain, one.sequence, None, what))
        state.broken = state.broken or bool(found)
        return found
