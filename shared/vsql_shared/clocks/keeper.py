"""The thread of a service that asks other nodes for the time, answers theirs, and notes what follows.

Not here: what an exchange says (exchange.py), and what waits because of it (consumers). Rules:

* One for a node, whatever streams it has: a session lock; the other service asks for it every few seconds.
  So two nodes exchange two questions an interval, not two for each stream.
* A topic of its own (0026): the audit trail holds what must never be lost, this is worth nothing in a minute.
  It is read from its end on: what was there before was meant for nobody who is here now.
* Times are those of the database's server, which gives commits theirs. Each is read on the safe side: before
  what is sent, after what was read.
* Kafka is believed nothing: who is asked, who answers and who signed must be one of this node's peers, by a
  key pinned here that counts now. What does not fit is passed over. However much comes, little is looked at.
* Nothing replicates through here and nothing waits for it: where Kafka or a right is missing, clocks are not
  measured, and that is said once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from typing import TYPE_CHECKING

import psycopg
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition

from vsql_shared import names
from vsql_shared.audit.dsse import SignedDocument, open_document, sign_document
from vsql_shared.clocks import exchange
from vsql_shared.clocks.exchange import Answer, Answerer, Asker, Measure, Question, State
from vsql_shared.clocks.host_read import read_host_clock
from vsql_shared.crypto.signing import TrustStore
from vsql_shared.errors import DecodeError, TransientError, VerificationError, VsqlSyncError
from vsql_shared.kafka.clients import (
    from_exception,
    kafka_error,
    make_admin,
    make_consumer,
    make_producer,
    watermarks,
)
from vsql_shared.kafka.rights import VERIFY_GROUP
from vsql_shared.kafka.topics import ensure_topic
from vsql_shared.pg import clocks, migrate, signers
from vsql_shared.pg.connect import Connection, connect, errors, translate

if TYPE_CHECKING:
    from collections.abc import Callable

    from vsql_shared.config import Settings
    from vsql_shared.config.connection import DatabaseRole
    from vsql_shared.crypto.signing import Signer

_log = logging.getLogger(__name__)

_AGAIN_SECONDS = 5.0
_AWAY_SECONDS = 30.0
_WAIT_SECONDS = 0.5
_LOOK_SECONDS = 10.0
_FRESH_LOOK_SECONDS = 60.0
_ASK_KAFKA_SECONDS = 5.0
_SLICE = 100
_REST_SECONDS = 0.2
"""After a slice that was full: a flood gets a part of a processor, whatever it is."""
_HOST_SECONDS = 60.0
_GRACE_SECONDS = 10.0
_FLUSH_SECONDS = 1.0
_MISSED = 3


class ClockKeeper:
    """Runs in a thread from `start` to `stop`."""

    def __init__(self, settings: Settings, role: DatabaseRole) -> None:
        self._settings, self._role = settings, role
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="clocks", daemon=True)
        self._said = ""
        self._signer: Signer | None = None
        self._signer_is_open = False

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """End after the turn under way; whoever hangs in a connection ends with the process."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _run(self) -> None:
        pause = 1.0
        while not self._stop.wait(pause):
            pause = _AGAIN_SECONDS
            try:
                self._keep()
            except psycopg.Error as error:
                pause = self._failed(translate(error, "measuring clocks"))
            except KafkaException as error:
                pause = self._failed(from_exception(error, "measure clocks"))
            except VsqlSyncError as error:
                pause = self._failed(error)
            except Exception:  # noqa: BLE001 - said, and tried again
                _log.exception("measuring clocks failed; it is tried again")
                pause = _AWAY_SECONDS

    def _failed(self, error: VsqlSyncError) -> float:
        """Said once while it lasts; how long to wait."""
        if self._said != error.message:
            self._said = error.message
            _log.warning("clocks are not measured now: %s", error)
        return _AGAIN_SECONDS if isinstance(error, TransientError) else _AWAY_SECONDS

    def _keep(self) -> None:
        settings = self._settings
        conninfo = settings.connection.conninfo(self._role)
        with connect(conninfo, application_name=f"vsql-sync {self._role} clocks") as conn:
            migrate.require_current(conn)
            with errors("setting up the session"):
                conn.execute("SET synchronous_commit = local")  # what is noted here waits for no standby
            while not _lock(conn, settings.cluster.node_name):
                if self._stop.wait(_AGAIN_SECONDS):
                    return
            while not (peers := clocks.peers(conn)):
                if self._stop.wait(_LOOK_SECONDS):
                    return
            signer = self._open_signer()
            with contextlib.ExitStack() as closing:
                turns = Turns(settings, conn, signer, closing)
                turns.look(peers)
                self._said = ""
                while not self._stop.is_set():
                    turns.turn()

    def _open_signer(self) -> Signer | None:
        """Once: a session at a token or a key service stays open as long as the process."""
        from vsql_shared.kms import open_signer

        if not self._signer_is_open:
            self._signer, self._signer_is_open = open_signer(self._settings), True
        return self._signer


class Turns:
    """The exchange with Kafka; `turn` takes half a second at most where nothing comes."""

    def __init__(
        self, settings: Settings, conn: Connection, signer: Signer | None, closing: contextlib.ExitStack
    ) -> None:
        cluster, self._limits = settings.cluster, settings.replication.clock_sync
        self._settings, self._conn, self._signer = settings, conn, signer
        self._topic = names.clocks_topic(cluster.name)
        every = self._limits.measure_every.total_seconds()
        self._fresh = _MISSED * every + _GRACE_SECONDS
        self._asker = Asker(cluster.name, cluster.node_name, every)
        self._answerer = Answerer(cluster.name, cluster.node_name)
        self._trust = TrustStore((), allow_unsigned=False)
        self._looked = self._hosted = float("-inf")
        self._states: dict[str, str] = {}
        self._gauges = _gauges(cluster.node_name)
        ensure_topic(make_admin(settings), self._topic, "clocks", settings)
        self._consumer = self._open(closing)
        self._producer: Producer = make_producer(settings, "vsql-sync-clocks")
        closing.callback(self.flush)

    def _open(self, closing: contextlib.ExitStack) -> Consumer:
        consumer = make_consumer(self._settings, "vsql-sync-clocks", VERIFY_GROUP, wait_ms=500)
        closing.callback(consumer.close)
        place = TopicPartition(self._topic, 0)
        _, end = watermarks(consumer, place, _ASK_KAFKA_SECONDS)
        consumer.assign([TopicPartition(self._topic, 0, end)])
        return consumer

    def turn(self) -> None:
        """Answer and take what has come, then ask whom it is time for."""
        if messages := self._come():
            came = clocks.now(self._conn)
            for value in messages:
                try:
                    self._take(value, came)
                except (DecodeError, VerificationError) as error:
                    # Most are between others; and whoever may write there can send anything.
                    _log.debug("passed over: %s", error)
            if len(messages) == _SLICE:
                time.sleep(_REST_SECONDS)
        now = time.monotonic()
        if now - self._looked > _LOOK_SECONDS:
            self.look(clocks.peers(self._conn))
        for peer in self._asker.due(now):
            self._ask(peer)
        self._producer.poll(0)

    def _come(self) -> list[bytes]:
        """What has come, after waiting for the first: `consume` of many would wait for the last."""
        first = self._consumer.poll(_WAIT_SECONDS)
        if first is None:
            return []
        values = []
        for message in (first, *self._consumer.consume(_SLICE - 1, timeout=0)):
            if (error := message.error()) is not None:
                raise kafka_error(error, f"read {self._topic}")
            values.append(message.value() or b"")
        return values

    def flush(self) -> None:
        """Wait a moment until what was said is on its way."""
        self._producer.flush(_FLUSH_SECONDS)

    def look(self, peers: tuple[str, ...]) -> None:
        """Whom there is to ask, and by which keys they sign, may have changed."""
        self._looked = time.monotonic()
        self._trust = TrustStore(signers.load(self._conn), allow_unsigned=not self._settings.is_prod)
        self._asker.know(peers)
        self._note_host()

    def _take(self, value: bytes, came: exchange.Reading) -> None:
        """One record, whatever it is. Raises DecodeError or SignatureError where it is not for us."""
        cluster = self._settings.cluster
        document = SignedDocument.decode(value, exchange.MAX_SIZE)
        # Before it is verified: most of what is here is between others.
        claimed: Question | Answer
        if document.payload_type == exchange.QUESTION:
            claimed = Question.decode(document.payload)
        elif document.payload_type == exchange.ANSWER:
            claimed = Answer.decode(document.payload)
        else:
            raise DecodeError("neither a question about time nor an answer")
        by = exchange.require_ours(claimed, cluster.name, cluster.node_name, self._asker.peers)
        open_document(self._trust, by, value, document.payload_type)
        if isinstance(claimed, Question):
            self._answerer.take(claimed, time.monotonic())
            self._asker.heard(by, time.monotonic())
            self._answer(claimed, came)
        else:
            self._measured(by, self._asker.take(claimed, came))

    def _answer(self, question: Question, came: exchange.Reading) -> None:
        fields = (question.cluster, question.asker, question.answerer, question.nonce)
        sent_at = clocks.now(self._conn).time_us
        answer = Answer(*fields, came.time_us, sent_at)
        self._send(question, "answer", sign_document(self._signer, exchange.ANSWER, answer.encode()))

    def _ask(self, peer: str) -> None:
        question = self._asker.ask(peer, os.urandom(exchange.NONCE_SIZE), clocks.now(self._conn))
        self._send(question, "question", sign_document(self._signer, exchange.QUESTION, question.encode()))
        clocks.asked(self._conn, peer, self._asker.unanswered(peer))

    def _send(self, question: Question, what: str, value: bytes) -> None:
        key = names.clock_key(question.asker, question.answerer, what)
        # A full queue means that Kafka is away: what waits there is worth nothing when it is back.
        with contextlib.suppress(BufferError):
            self._producer.produce(self._topic, value, key, partition=0)
            self._producer.poll(0)

    def _measured(self, node: str, found: Measure) -> None:
        limits = self._limits
        state = exchange.state_of(found, limits.warn_drift_ms, limits.max_drift_ms)
        clocks.measured(self._conn, node, found, state, self._fresh)
        self._gauges(node, found, state)
        if state != self._states.get(node, "ok"):
            say = {"ok": _log.info, "warning": _log.warning, "error": _log.error}[state]
            about = {"peer": node, "state": state, "uncertainty_ms": round(found.uncertainty_us / 1000, 3)}
            say("the clock of node %s is %+.3f s from ours", node, found.offset_us / 1e6, extra=about)
        self._states[node] = state

    def _note_host(self) -> None:
        """This database's clock against this host's, and who keeps that one."""
        before = time.time_ns() // 1000
        read = clocks.now(self._conn).time_us
        took = time.time_ns() // 1000 - before
        if took >= 0:  # else this host's clock was set back meanwhile: next time
            found = Measure(read - before - took // 2, took // 2 + 1)
            state = exchange.state_of(found, self._limits.warn_drift_ms, self._limits.max_drift_ms)
            clocks.measured(self._conn, self._settings.cluster.node_name, found, state, _FRESH_LOOK_SECONDS)
        if self._looked - self._hosted > _HOST_SECONDS:
            self._hosted = self._looked
            clocks.host(self._conn, read_host_clock())


def _gauges(node: str) -> Callable[[str, Measure, State], None]:
    # Only now: prometheus_client decides at import whether values are shared between processes.
    from vsql_shared.observe import metrics

    def show(peer: str, found: Measure, state: State) -> None:
        metrics.clock_measured(peer, node, found.offset_us / 1e6, found.uncertainty_us / 1e6, state)

    return show


def _lock(conn: Connection, node: str) -> bool:
    with errors("taking the lock of who measures clocks"):
        row = conn.execute(
            "SELECT pg_try_advisory_lock(%s)", (names.advisory_key(f"clocks {node}", "clocks"),)
        ).fetchone()
    return row is not None and bool(row[0])
