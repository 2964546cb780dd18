"""Reads the audit topic in slices for the background verification. What it is held against: watch_topic.py.

Rules: a consumer of its own, there while a pass is under way; where Kafka is away the pass waits, and the
trail is verified all the same. What a slice gave is held against the trail before anything else is read;
where the database fails meanwhile, the pass ends with this object, and says nothing. Where a chain was pruned
since a pass began, what the pass found may be gone on purpose: it is read anew, and says nothing before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from confluent_kafka import KafkaError, KafkaException, TopicPartition

from vsql_shared import names
from vsql_shared.audit import watch_state
from vsql_shared.audit.bases import signed_base
from vsql_shared.audit.checkpoint import Log
from vsql_shared.audit.history import SILENCE_SECONDS
from vsql_shared.audit.verify import Problem, own_heads
from vsql_shared.audit.watch import NOBODYS, is_name
from vsql_shared.audit.watch_topic import Named, TopicPass
from vsql_shared.errors import BrokerError, TransientError, VsqlSyncError
from vsql_shared.kafka.clients import from_exception, kafka_error, make_consumer, watermarks
from vsql_shared.kafka.rights import VERIFY_GROUP
from vsql_shared.pg.connect import Connection, errors

if TYPE_CHECKING:
    from collections.abc import Iterable

    from confluent_kafka import Consumer, Message

    from vsql_shared.audit.base import Base
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
        self._pass: TopicPass | None = None
        self._next = float("-inf")
        self._said = ""
        self._heard: float | None = None
        """When the partition under way gave something last."""
        self.cosigned: Cosigned = {}
        """What targets co-signed, as the last whole pass has it."""

    @property
    def busy(self) -> bool:
        """Whether a pass is under way."""
        return self._pass is not None

    def close(self) -> None:
        """Leave Kafka."""
        if self._consumer is not None:
            self._consumer.close()
            self._consumer, self._assigned = None, None

    def turn(self, trust: TrustStore, now: float) -> list[Problem]:
        """Read the next slice; the breaks that are new. `now`: a clock that does not go back."""
        if now < self._next:
            return []
        with errors("reading the trail's heads"):
            # Before the topic's ends are: what the trail has by now is below them, or comes soon.
            trail = {chain: head[0] for chain, head in own_heads(self._conn).items()}
        if self._pass is None and not trail and not watch_state.progress(self._conn):
            # A node without streams: there may be no topic.
            self._next = now + min(_AWAY_SECONDS, self._every)
            return []
        # Before the topic's ends, too: the entries that say where a chain begins are below them.
        bases = self._bases(trail, trust) if self._pass is None else {}
        try:
            state = self._pass = self._pass or self._begin(self._open(), trail, bases)
            messages, fault = self._fetch(state)
        except (TransientError, BrokerError, KafkaException) as error:
            return self._away(error, now)
        return self._read(state, messages, fault, trust, now)

    def _read(
        self,
        state: TopicPass,
        messages: Iterable[Message],
        fault: VsqlSyncError | None,
        trust: TrustStore,
        now: float,
    ) -> list[Problem]:
        """Take a slice that was read; the breaks that are new.

        Errors are the database's now, and end this reader: nothing of the slice is forgotten.
        """
        found = self._taken(state, messages, trust, now)
        found += self._late(state, now)
        if found and self._pruned(state, trust):
            return []
        if fault is not None:
            return self._noted(found) + self._away(fault, now)
        self._said = ""
        if state.partition is not None or state.waits:
            return self._noted(found)
        lost, waiting = state.lost(now)
        if waiting:
            return self._noted(found) + self._further(state, now)
        if lost and self._pruned(state, trust):
            return []
        new = self._noted(found + lost)
        self._end(state, now)
        return new

    def _noted(self, found: Iterable[Problem]) -> list[Problem]:
        return [one for one in found if watch_state.note(self._conn, "topic", one)]

    def _end(self, state: TopicPass, now: float) -> None:
        """The pass has read everything: what is whole, and which breaks are gone."""
        lasting = {one.chain for one in watch_state.open_breaks(self._conn) if one.source == "topic"}
        for chain in sorted(lasting - state.broken):
            watch_state.end(self._conn, "topic", chain)
        if state.broken <= {NOBODYS}:  # records that do not verify keep no entry from being compared
            watch_state.whole(self._conn, "topic", watch_state.WHOLE_TOPIC, sum(state.ends.values()))
        self.cosigned = state.cosigned
        self._pass = None
        self.close()
        self._next = now + self._every

    def _away(self, error: Exception, now: float) -> list[Problem]:
        """Kafka did not answer, or not as it should: try again later."""
        if isinstance(error, KafkaException):
            error = from_exception(error, f"read {self._topic}")
        self.close()
        self._next = now + min(_AWAY_SECONDS, self._every)
        if isinstance(error, BrokerError):
            # Positions of a topic that is not there any more, or begins later, lead nowhere.
            self._pass = None
        if self._said != str(error):
            self._said = str(error)
            _log.warning("the audit topic is not verified now: %s", error)
        return []

    def _open(self) -> Consumer:
        if self._consumer is None:
            self._consumer = make_consumer(
                self._settings, "vsql-sync-audit", VERIFY_GROUP, partition_eof=True
            )
            self._assigned = None
        return self._consumer

    def _pruned(self, state: TopicPass, trust: TrustStore) -> bool:
        """Whether an own chain was pruned since the pass began; then it is given up, and begins again.

        Bases only rise: who puts older ones there, or takes them away, must not keep a pass from its end.
        """
        if not state.pruned_further(self._bases(state.trail, trust)):
            return False
        self._pass = None
        self.close()
        return True

    def _bases(self, chains: Iterable[str], trust: TrustStore) -> dict[str, Base]:
        """Where own chains begin that were pruned, as entries of theirs say it; watch.py verifies those."""
        cluster = self._settings.cluster.name
        found = {one: signed_base(self._conn, trust, Log(cluster, one)) for one in chains if is_name(one)}
        return {chain: base for chain, base in found.items() if base is not None}

    def _begin(self, consumer: Consumer, trail: dict[str, int], bases: dict[str, Base]) -> TopicPass:
        cluster = self._settings.cluster
        found = consumer.list_topics(self._topic, timeout=_ASK_SECONDS).topics[self._topic]
        if found.error is not None:
            raise kafka_error(found.error, f"read {self._topic}")
        state = TopicPass(cluster.name, cluster.node_name, {}, trail, bases=bases)
        for partition in found.partitions:
            state.next[partition], state.ends[partition] = self._watermarks(consumer, partition)
        return state

    def _watermarks(self, consumer: Consumer, partition: int) -> tuple[int, int]:
        return watermarks(consumer, TopicPartition(self._topic, partition), _ASK_SECONDS)

    def _further(self, state: TopicPass, now: float) -> list[Problem]:
        """Something is missing that may be under way: read on to where the topic ends by now."""
        try:
            consumer = self._open()
            for partition, end in state.ends.items():
                state.ends[partition] = max(end, self._watermarks(consumer, partition)[1])
        except (TransientError, BrokerError, KafkaException) as error:
            return self._away(error, now)
        self._assigned = None  # what lies behind the old end was fetched and passed over
        return []

    def _fetch(self, state: TopicPass) -> tuple[list[Message], VsqlSyncError | None]:
        """The next records, and what is wrong with Kafka behind them."""
        partition = state.partition
        if partition is None:
            return [], None
        consumer = self._open()
        if self._assigned != partition:
            consumer.assign([TopicPartition(self._topic, partition, state.next[partition])])
            self._assigned, self._heard = partition, None
        messages, fault = [], None
        # No more than there are: it would wait for the rest.
        most = min(self._settings.audit.verify_slice, state.ends[partition] - state.next[partition])
        for message in consumer.consume(most, timeout=_READ_SECONDS):
            error = message.error()
            if error is not None and error.code() != KafkaError._PARTITION_EOF:  # noqa: SLF001 - a public name of librdkafka
                fault = kafka_error(error, f"read {self._topic}/{partition}")
                break
            messages.append(message)
        return messages, fault or self._silence(state, partition, bool(messages))

    def _silence(self, state: TopicPass, partition: int, heard: bool) -> VsqlSyncError | None:
        """A partition that has more and gives nothing for a while."""
        now = time.monotonic()
        if heard or self._heard is None:
            self._heard = now
        if now - self._heard <= SILENCE_SECONDS:
            return None
        self._heard = None
        where = f"{self._topic}/{partition}"
        return TransientError(f"Kafka: {where} gives nothing below offset {state.ends[partition]}")

    def _taken(
        self, state: TopicPass, messages: Iterable[Message], trust: TrustStore, now: float
    ) -> list[Problem]:
        """Feed the records below the pass' end, and hold what they name against the trail."""
        found: list[Problem] = []
        named: list[Named] = []
        for message in messages:
            partition, offset, value = message.partition() or 0, message.offset() or 0, message.value()
            end = state.ends[partition]
            if message.error() is not None or offset >= end:  # its end, or beyond: nothing lies between
                state.next[partition] = max(end, state.next[partition])
                continue
            state.next[partition] = offset + 1
            outcome = None
            if value is not None:
                outcome = state.feed(trust, value, f"{self._topic}/{partition}/{offset}")
            if isinstance(outcome, Problem):
                found.append(outcome)
            elif outcome is not None:
                named.append(outcome)
        return found + self._compare(state, named, now)

    def _compare(self, state: TopicPass, named: Iterable[Named], now: float) -> list[Problem]:
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
        stored = _hashes(rows)
        return state.compare(wanted, stored, last, now)

    def _late(self, state: TopicPass, now: float) -> list[Problem]:
        """Entries that were in Kafka and not in the trail a while ago: by now they must be."""
        late = state.overdue(now)
        return self._compare(state, late, now) + state.still_ahead(late)


def _hashes(rows: Iterable[tuple[str, int, bytes | None]]) -> Mapping[tuple[str, int], bytes]:
    # A document that was made NULL has no hash: it is another one than Kafka has.
    return {(chain, sequence): bytes(digest or b"") for chain, sequence, digest in rows}
