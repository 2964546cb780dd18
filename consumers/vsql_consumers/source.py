"""Kafka as an incoming stream sees it: the audit partition, the keys topic and the data partitions.

Not here: what records mean (collect.py, unseal.py). Rules:

* Partitions are assigned by hand, at offsets that come from the database; Kafka's group offsets are written
  for lag tools and never read.
* Nothing is skipped: an offset that Kafka no longer has is told, never reset.
* A topic that is not there is told: whether anything is missing, the chain says.
* A call waits for the first record only; what else has arrived is taken with it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_END,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)

from vsql_shared.audit.dsse import SignedDocument
from vsql_shared.audit.entries import peek_chain
from vsql_shared.errors import DecodeError, TransientError
from vsql_shared.kafka.clients import from_exception, is_unknown_topic, kafka_error, make_consumer, watermarks

if TYPE_CHECKING:
    from vsql_shared.config import Settings

Place = tuple[str, int]
_T = TypeVar("_T")


class Record(NamedTuple):
    """A Kafka record, or the place of an end or of a lost offset."""

    topic: str
    partition: int
    offset: int
    key: bytes | None = None
    value: bytes | None = None


class Polled(NamedTuple):
    """What a call brought: records; ends reached (offset: the next one); places whose offset Kafka lacks."""

    records: list[Record]
    ends: list[Record]
    lost: list[Record]


TIMEOUT_SECONDS = 20.0
"""For calls that ask a broker something."""
COMMIT_SECONDS = 5.0
"""How long a stop waits for the group's offsets."""
_TAKE_BYTES = 8 << 20
_TAKE_MOST = 500

# Public names of librdkafka that begin with an underscore.
_PARTITION_EOF = KafkaError._PARTITION_EOF  # noqa: SLF001 - as said above
_OFFSET_RESET = KafkaError._AUTO_OFFSET_RESET  # noqa: SLF001 - as said above
_NO_OFFSET = KafkaError._NO_OFFSET  # noqa: SLF001 - as said above
_UNKNOWN = (
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_TOPIC,  # noqa: SLF001 - as said above
    KafkaError._UNKNOWN_PARTITION,  # noqa: SLF001 - as said above
)


class Source:
    """One consumer, assigned by hand. Every method raises TransientError or BrokerError."""

    def __init__(self, settings: Settings, client_id: str, group: str) -> None:
        self._consumer: Consumer = make_consumer(settings, client_id, group, partition_eof=True)
        self._assigned: dict[Place, int] = {}
        self._size = 16_384.0  # moving average of a record's bytes
        self.bytes = 0

    def assign(self, places: Iterable[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
        """Read these partitions too, from these offsets on (below 0: from the first record).

        Returns those whose topic is not there: ask again.
        """
        wanted = {(topic, number): offset for topic, number, offset in places}
        wanted = {place: offset for place, offset in wanted.items() if place not in self._assigned}
        ends = self._bounds([place for place, offset in wanted.items() if offset >= 0], OFFSET_END)
        new: list[TopicPartition] = []
        absent: list[tuple[str, int, int]] = []
        for place, offset in wanted.items():
            # Not beyond the log's end where the log is shorter: Kafka would take that for an error.
            if offset < 0:
                start = OFFSET_BEGINNING
            else:
                end = ends[place] if place in ends else self._end(place)
                if end is None:
                    absent.append((*place, offset))
                    continue
                start = min(offset, end)
            self._assigned[place] = start
            new.append(TopicPartition(*place, start))
        if new:
            self._call("read new partitions", lambda: self._consumer.incremental_assign(new))
        return absent

    def assign_all(self, places: Iterable[tuple[str, int, int]], *, hint: str = "") -> None:
        """The same where none may be missing. Raises TransientError for a topic that is not there."""
        for topic, _, _ in self.assign(places):
            raise TransientError(f"topic {topic} is not there", hint=hint)

    def drop(self, places: Iterable[Place]) -> None:
        """Read these partitions no more."""
        gone = [place for place in places if self._assigned.pop(place, None) is not None]
        if gone:
            left = [TopicPartition(*place) for place in gone]
            # A pause would outlive the assignment, and hold when the partition is read again.
            self._call("resume partitions", lambda: self._consumer.resume(left))
            self._call("stop reading partitions", lambda: self._consumer.incremental_unassign(left))

    def go_on(self, topic: str, number: int, offset: int) -> None:
        """Read a partition on from another offset: Kafka no longer has the one that was due."""
        place = TopicPartition(topic, number, offset)

        def again() -> None:
            self._consumer.incremental_unassign([TopicPartition(topic, number)])
            self._consumer.incremental_assign([place])

        self._call(f"read topic {topic} on", again)

    def ends(self, topic: str, number: int) -> tuple[int, int]:
        """First offset and next offset of a partition, as its leader says now."""
        place = TopicPartition(topic, number)
        return self._call(
            f"ask for the offsets of {topic}", lambda: watermarks(self._consumer, place, TIMEOUT_SECONDS)
        )

    def _end(self, place: Place) -> int | None:
        """Next offset of a partition; None where it is not there."""
        topic, number = place
        found = self._call(
            f"look for topic {topic}", lambda: self._consumer.list_topics(topic, timeout=TIMEOUT_SECONDS)
        ).topics.get(topic)
        unknown = found is None or (found.error is not None and found.error.code() in _UNKNOWN)
        return None if unknown or number not in found.partitions else self.ends(*place)[1]

    def ends_of(self, places: Sequence[Place]) -> dict[Place, tuple[int, int]]:
        """The same of several partitions, with two questions to a broker instead of two for each of them."""
        low, high = self._bounds(places, OFFSET_BEGINNING), self._bounds(places, OFFSET_END)
        # One that was not answered is asked for by itself, which says why.
        return {
            place: (low[place], high[place]) if place in low and place in high else self.ends(*place)
            for place in places
        }

    def _bounds(self, places: Sequence[Place], which: int) -> dict[Place, int]:
        """One end of several partitions, with one question to a broker; those with an error are left out.

        A broker answers in order, and what it has to answer first may be a fetch that waits for records.
        """
        if not places:
            return {}
        asked = [TopicPartition(*place, which) for place in places]
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        try:
            answers = self._consumer.offsets_for_times(asked, timeout=TIMEOUT_SECONDS)
        except KafkaException as error:
            if is_unknown_topic(error):
                return {}
            raise from_exception(error, f"ask for the offsets of {places[0][0]}{more}") from error
        return {(a.topic, a.partition): int(a.offset) for a in answers if a.error is None and a.offset >= 0}

    def poll(self, seconds: float) -> Polled:
        """Wait for a record at most so long; take what else has arrived, within bounds."""
        polled = Polled([], [], [])
        first = self._call("read", lambda: self._consumer.poll(seconds))
        if first is None:
            return polled
        most = max(8, min(_TAKE_MOST, int(_TAKE_BYTES / self._size)))
        size = 0
        for message in (first, *self._call("read", lambda: self._consumer.consume(most, timeout=0))):
            size += self._sort(message, polled)
        if polled.records:
            self._size += (size / len(polled.records) - self._size) / 8
            self.bytes += size
        return polled

    @staticmethod
    def _sort(message: Message, polled: Polled) -> int:
        """Put a message where it belongs; returns its size."""
        topic, partition, offset = message.topic() or "", message.partition() or 0, message.offset() or 0
        error = message.error()
        if error is None:
            key, value = message.key(), message.value()
            polled.records.append(Record(topic, partition, offset, _bytes(key), _bytes(value)))
            return len(value or b"")
        if error.code() == _PARTITION_EOF:
            polled.ends.append(Record(topic, partition, offset))
        elif error.code() in (_OFFSET_RESET, _NO_OFFSET, KafkaError.OFFSET_OUT_OF_RANGE):
            polled.lost.append(Record(topic, partition, offset))
        elif error.code() in _UNKNOWN:
            raise TransientError(f"topic {topic} is not there yet", hint="the origin's producer makes it")
        else:
            raise kafka_error(error, f"read topic {topic}")
        return 0

    def pause(self, places: Iterable[Place]) -> None:
        """Fetch nothing more of these for now."""
        self._switch(self._consumer.pause, places)

    def resume(self, places: Iterable[Place]) -> None:
        """Fetch these again."""
        self._switch(self._consumer.resume, places)

    def _switch(self, act: Callable[[list[TopicPartition]], None], places: Iterable[Place]) -> None:
        assigned = [TopicPartition(*place) for place in places if place in self._assigned]
        if assigned:
            self._call("pause or resume partitions", lambda: act(assigned))

    def commit(self, offsets: Mapping[Place, int], *, wait: bool = False) -> None:
        """Tell the group's offsets, for lag tools; a failure is nobody's loss."""
        places = [TopicPartition(*place, offset) for place, offset in offsets.items()]
        if not places:
            return
        try:
            self._consumer.commit(offsets=places, asynchronous=True)
            if wait:
                self._await_commit(places)
        except KafkaException as error:
            if wait:
                raise from_exception(error, "commit group offsets") from error

    def _await_commit(self, places: list[TopicPartition]) -> None:
        """Ask until the group's offsets are there, for a while.

        The library's own waiting commit has no timeout: with Kafka gone a stop would never end.
        """
        deadline = time.monotonic() + COMMIT_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            there = self._consumer.committed(places, timeout=left)
            if [one.offset for one in there] == [one.offset for one in places]:
                return
            time.sleep(0.02)

    def close(self) -> None:
        """Let go of the brokers.

        The library's close waits, without a timeout, for commits that no broker answers: with Kafka gone it
        is left waiting in a thread that does not keep the process.
        """
        closing = threading.Thread(target=self._consumer.close, name="closing the consumer", daemon=True)
        closing.start()
        closing.join(COMMIT_SECONDS)

    @staticmethod
    def _call(doing: str, act: Callable[[], _T]) -> _T:
        try:
            return act()
        except KafkaException as error:
            raise from_exception(error, doing) from error


def read_chain(
    settings: Settings, client_id: str, group: str, place: Place, chain: str, from_offset: int
) -> Iterator[tuple[int, bytes]]:
    """(offset, document) of every record of one chain in an audit partition, up to its present end."""
    for offset, _, value in read_records(settings, client_id, group, place, from_offset):
        if value is not None and _is_of(chain, value):
            yield offset, value


def read_records(
    settings: Settings, client_id: str, group: str, place: Place, from_offset: int
) -> Generator[tuple[int, bytes | None, bytes | None], None, None]:
    """(offset, key, value) of every record of a partition from an offset on, up to its present end."""
    topic, number = place
    consumer = make_consumer(settings, client_id, group, partition_eof=True)
    try:
        at = TopicPartition(topic, number)
        low, high = watermarks(consumer, at, TIMEOUT_SECONDS)
        next_offset = max(low, min(from_offset, high))
        consumer.assign([TopicPartition(topic, number, next_offset)])
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while next_offset < high:
            message = consumer.poll(0.5)
            if message is None:
                if time.monotonic() > deadline:
                    raise TransientError(f"topic {topic} cannot be read to its end", hint="it is tried again")
                continue
            deadline = time.monotonic() + TIMEOUT_SECONDS
            error = message.error()
            if error is not None and error.code() == _PARTITION_EOF:
                next_offset = message.offset() or 0
                continue
            if error is not None:
                raise kafka_error(error, f"read topic {topic}")
            offset = message.offset() or 0
            next_offset = offset + 1
            yield offset, _bytes(message.key()), _bytes(message.value())
    except KafkaException as error:
        raise from_exception(error, f"read topic {topic}") from error
    finally:
        consumer.close()


def _is_of(chain: str, value: bytes) -> bool:
    try:
        return peek_chain(SignedDocument.decode(value).payload)[1] == chain
    except DecodeError:
        return False


def _bytes(value: bytes | str | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else value
