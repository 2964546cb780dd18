"""What the audit topic says of a node's chains, held against the node's own trail.

Not here: verifying the trail by itself (verify.py). `KafkaHistory` is fed documents and needs no Kafka;
`read_topic` feeds it. Rules:

* Chains of other nodes are passed over: their entries are in their writers' trails, not in this one.
* Linked hashes make two histories equal up to a sequence when they are equal at it; so one entry of each
  chain is compared, the last one both sides have.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from vsql_shared.audit.chain import EMPTY_HEAD, Accepted, ChainHead, ChainReader, writer_of
from vsql_shared.audit.dsse import SignedDocument
from vsql_shared.audit.entries import peek_chain
from vsql_shared.audit.verify import Problem, Report
from vsql_shared.errors import ChainError, DecodeError, SignatureError, TransientError

if TYPE_CHECKING:
    from confluent_kafka import Consumer

    from vsql_shared.crypto.signing import TrustStore

SILENCE_SECONDS = 30.0
"""How long a partition may give nothing before its end."""


class KafkaHistory:
    """Reads this node's chains from the topic, and compares them with a report of the trail."""

    def __init__(
        self,
        cluster: str,
        node: str,
        trust: TrustStore,
        report: Report,
        bases: Mapping[str, ChainHead] | None = None,
    ) -> None:
        """`bases`: of each chain that was pruned, the head before the first entry Kafka must have."""
        self._bases = bases or {}
        self._cluster, self._node, self._trust = cluster, node, trust
        self._wanted = {one.chain: (one.sequence, one.entry_hash) for one in report.chains}
        self._readers: dict[str, ChainReader] = {}
        self._problems: dict[str, Problem] = {}

    def feed(self, encoded: bytes, where: str) -> None:
        """Take the next document of a partition."""
        name = ""
        try:
            name = peek_chain(SignedDocument.decode(encoded).payload)[1]
            reader = self._reader(name)
            outcome = reader.accept(encoded, where) if reader else None
        except (DecodeError, SignatureError, ChainError) as error:
            # Readers of the stream refuse it too, with this same record; here it is one more finding.
            self._found(name, None, f"{where}: {error.message}")
            return
        if isinstance(outcome, Accepted):
            sequence, entry_hash = self._wanted.get(outcome.entry.chain, (0, b""))
            if outcome.entry.sequence == sequence and outcome.entry_hash != entry_hash:
                self._found(outcome.entry.chain, sequence, f"{where}: Kafka has another entry {sequence}")

    @property
    def chains(self) -> set[str]:
        """The chains of this node that the report or the topic has."""
        return self._wanted.keys() | self._readers.keys()

    def lagging(self, heads: Mapping[str, tuple[int, bytes]]) -> bool:
        """True while Kafka has entries of this node that the trail does not have yet."""
        return any(
            reader.head.sequence > heads.get(chain, (0, b""))[0] for chain, reader in self._readers.items()
        )

    @property
    def lacks(self) -> bool:
        """Whether Kafka did not have what the trail had before it was read."""
        return any(
            sequence > (self._readers[chain].head.sequence if chain in self._readers else 0)
            for chain, (sequence, _) in self._wanted.items()
        )

    def pruned_further(self, bases: Mapping[str, ChainHead]) -> bool:
        """Whether a chain begins behind more entries, by `bases`, than when reading began.

        Then what Kafka lacks may have been taken off it on purpose meanwhile. Bases only rise.
        """
        return any(
            base.sequence > self._bases.get(chain, EMPTY_HEAD).sequence for chain, base in bases.items()
        )

    def problems(self, heads: Mapping[str, tuple[int, bytes]] | None = None) -> list[Problem]:
        """What differs; `heads` are the trail's heads now, read again after the topic was read.

        Kafka must have what the trail had before the topic was read, and nothing the trail lacks after it:
        a service at work adds to both meanwhile.
        """
        for chain in self.chains | (heads or {}).keys():
            before = self._wanted.get(chain, (0, b""))[0]
            now = (self._wanted if heads is None else heads).get(chain, (0, b""))[0]
            known = self._readers.get(chain)
            at = known.head.sequence if known else 0
            if at > 0 == now:
                self._found(chain, 1, "Kafka has this chain of this node, the trail does not")
            elif at > now:
                self._found(
                    chain,
                    now + 1,
                    f"the trail ends at {now}, Kafka has entries up to {at}: it was cut at its end, or "
                    "its writer stopped before it could store them (it adds them when it starts)",
                )
            elif at < before:
                self._found(chain, at + 1, f"Kafka ends at {at}, the trail at {before}: Kafka lost entries")
        return list(self._problems.values())

    def _reader(self, name: str) -> ChainReader | None:
        if name not in self._readers and writer_of(name) == self._node:
            base = self._bases.get(name, EMPTY_HEAD)
            self._readers[name] = ChainReader(
                self._cluster, name, self._node, self._trust, base, pruned=base.sequence
            )
        # After its first problem a chain proves nothing more.
        return None if name in self._problems else self._readers.get(name)

    def _found(self, chain: str, sequence: int | None, what: str) -> None:
        self._problems.setdefault(chain, Problem(chain, sequence, None, what))


class Fed(Protocol):
    """What takes documents."""

    def feed(self, encoded: bytes, where: str) -> None:
        """Take the next document of a partition."""
        ...


def read_topic(consumer: Consumer, topic: str, history: Fed) -> None:
    """Feed every record the topic has now, partition by partition in order; tombstones are passed over."""
    from confluent_kafka import OFFSET_BEGINNING, KafkaException, TopicPartition

    from vsql_shared.kafka.clients import from_exception, kafka_error, watermarks

    try:
        found = consumer.list_topics(topic, timeout=10).topics[topic]
        # A topic that is not there has no partitions: without this it would read as an empty one.
        if found.error is not None:
            raise kafka_error(found.error, f"read {topic}")
        for number in found.partitions:
            place = TopicPartition(topic, number, OFFSET_BEGINNING)
            low, high = watermarks(consumer, place, timeout=10)
            consumer.assign([place])
            position, deadline = low, time.monotonic() + SILENCE_SECONDS
            while position < high:
                # No more than there are: it would wait for the rest.
                for message in consumer.consume(min(500, high - position), timeout=0.2):
                    if (error := message.error()) is not None:
                        raise kafka_error(error, f"read {topic}/{number}")
                    offset, value = message.offset() or 0, message.value()
                    position, deadline = offset + 1, time.monotonic() + SILENCE_SECONDS
                    if value is not None and offset < high:
                        history.feed(value, f"{topic}/{number}/{offset}")
                if time.monotonic() > deadline:
                    raise TransientError(f"Kafka: {topic}/{number} gives nothing below offset {high}")
    except KafkaException as error:
        raise from_exception(error, f"read {topic}") from error
