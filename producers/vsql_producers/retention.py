"""Deletes what every target has, from the data topics of a live stream, once it is old enough.

Data topics have no retention of Kafka's own: only the source knows what its targets acknowledged. Rules:

* Deleted is what lies below the end of a manifest that every registered target acknowledged with the right
  root, and that is older than [kafka] retention, as are all before it. Never beyond: the offsets come from
  the manifests themselves.
* A target that acknowledged nothing, or a wrong root, holds everything back; without targets nothing goes.
* A turn takes a bounded number of manifests and never waits for Kafka. A failure is said, and tried again
  later: the stream does not depend on it.
* How far it is stands in vsql_sync.streams (pruned_sequence), written after Kafka has answered.

Not here: the audit topic (prune_orders.py), the keys topic, which keeps all, and a copy's topics, which go as
a whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, NamedTuple

from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from vsql_shared.audit.rows import parse
from vsql_shared.kafka.clients import from_exception, is_unknown_topic
from vsql_shared.pg.connect import Connection, errors

_log = logging.getLogger(__name__)

# Seconds between looks when there is nothing (more) to do, and after a failure.
LOOK_SECONDS = 30.0
_FAILED_SECONDS = 300.0
# Manifests at a look: one request names each of their partitions once.
PAGE = 500
_TIMEOUT_SECONDS = 30.0


class _Step(NamedTuple):
    """A request under way: up to which manifest, and Kafka's answers."""

    upto: int
    more: bool
    answers: dict[TopicPartition, Future[Any]]
    client: AdminClient | None
    """Answers come only as long as somebody holds it."""


class Retention:
    """Deletes acknowledged records of one live stream."""

    def __init__(
        self,
        conn: Connection,
        admin: Callable[[], AdminClient],
        chain: str,
        keep: timedelta,
        *,
        page: int = PAGE,
    ) -> None:
        self._conn, self._admin, self._chain, self._keep = conn, admin, chain, keep
        self._page = page
        self._step: _Step | None = None
        self._next = 0.0

    @property
    def busy(self) -> bool:
        """Whether Kafka was asked and has not answered yet."""
        return self._step is not None

    def turn(self, now: float) -> None:
        """Do the next small thing, if one is due; `now` is monotonic."""
        if self._step is not None:
            if all(answer.done() for answer in self._step.answers.values()):
                step, self._step = self._step, None
                self._finish(step, now)
        elif now >= self._next:
            self._next = now + LOOK_SECONDS
            self._step = self._look()

    def _look(self) -> _Step | None:
        """Ask Kafka to delete what the next acknowledged manifests cover."""
        pruned, acknowledged = self._bounds()
        if acknowledged <= pruned:
            return None
        with errors("looking for acknowledged manifests"):
            rows = self._conn.execute(
                "SELECT sequence, document, event_timestamp < now() - %s FROM vsql_sync.vsql_sync_audit"
                " WHERE chain = %s AND sequence > %s AND sequence <= %s ORDER BY sequence LIMIT %s",
                (self._keep, self._chain, pruned, acknowledged, self._page),
            ).fetchall()
        upto = pruned
        ends: dict[tuple[str, int], int] = {}
        for sequence, document, old in rows:
            if not old:
                break
            upto = sequence
            for part in parse(bytes(document)).entry.partitions:
                place = (part.topic, part.partition)
                ends[place] = max(ends.get(place, 0), part.last_offset + 1)
        if upto == pruned:
            return None
        wanted = [TopicPartition(*place, end) for place, end in ends.items()]
        more = upto == rows[-1][0] and len(rows) == self._page
        if not wanted:
            return _Step(upto, more, {}, None)
        client = self._admin()
        answers = self._delete(client, wanted)
        return None if answers is None else _Step(upto, more, answers, client)

    def _bounds(self) -> tuple[int, int]:
        """Up to which sequence records were deleted, and up to which all targets have acknowledged."""
        with errors("looking for what targets acknowledged"):
            row = self._conn.execute(
                "SELECT s.pruned_sequence, coalesce((SELECT min(t.acked_sequence)"
                " FROM vsql_sync.counted_targets t WHERE t.chain = s.chain), 0)"
                " FROM vsql_sync.streams s WHERE s.chain = %s AND s.direction = 'out'",
                (self._chain,),
            ).fetchone()
        return (int(row[0]), int(row[1])) if row else (0, 0)

    def _delete(
        self, client: AdminClient, wanted: list[TopicPartition]
    ) -> dict[TopicPartition, Future[Any]] | None:
        try:
            return client.delete_records(
                wanted, request_timeout=_TIMEOUT_SECONDS, operation_timeout=_TIMEOUT_SECONDS
            )
        except KafkaException as error:
            _log.warning("%s", from_exception(error, "delete acknowledged records"))
            return None

    def _finish(self, step: _Step, now: float) -> None:
        """Note it; where a partition refused, all of it is asked for again."""
        for place, answer in step.answers.items():
            failure = answer.exception()
            if failure is None or _is_gone(failure):
                continue
            self._next = now + _FAILED_SECONDS
            if isinstance(failure, KafkaException):
                _log.warning("%s", from_exception(failure, f"delete acknowledged records of {place.topic}"))
                return
            raise failure
        with errors("noting which records were deleted"):
            self._conn.execute(
                "UPDATE vsql_sync.streams SET pruned_sequence = %s WHERE chain = %s AND direction = 'out'",
                (step.upto, self._chain),
            )
        _log.info(
            "acknowledged records were deleted",
            extra={"sequence": step.upto, "partitions": len(step.answers)},
        )
        if step.more:
            self._next = now


def _is_gone(failure: BaseException) -> bool:
    """Nothing is left to delete: the topic is not there, or was made anew and is shorter."""
    return isinstance(failure, KafkaException) and (
        is_unknown_topic(failure) or failure.args[0].code() == KafkaError.OFFSET_OUT_OF_RANGE
    )
