"""The worker of one outgoing stream: opens epochs, turns the pipeline, answers the operator, retries.

Not here: the stages (pipeline.py). What becomes of an error (docs/design/0002):

* TransientError: back off, open a new epoch. State `waiting`.
* EnvironmentFault: the same with the longest back-off: an operator may mend it at any time.
* DivergedError: state `diverged`; nothing is sent until an operator's `retry`.
* Anything else ends the process; the supervisor starts another one.

An operator's command is put into the chain as a signed entry, and answered when the node's own table has it.
A worker that ends before that obeys again, and says so again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol

import psycopg
from confluent_kafka import Consumer, KafkaException

from vsql_producers import key_orders, prune_orders
from vsql_producers import stream as streams
from vsql_producers.context import Context, open_consumer
from vsql_producers.control import Control
from vsql_producers.epoch import Writing
from vsql_producers.framed import frame_of_packs
from vsql_producers.identity import own_signer, own_trust
from vsql_producers.outlet import Outlet
from vsql_producers.pipeline import LivePipeline
from vsql_producers.relations import BinaryRefused
from vsql_producers.report import Report, Told
from vsql_producers.slot import require_primary
from vsql_producers.snapshot.pipeline import CopyPipeline
from vsql_producers.synchronous import Listener, Waits
from vsql_producers.targets import Targets
from vsql_shared import failpoints, names
from vsql_shared.audit.entries import SIGNING_KEY_ENDED
from vsql_shared.audit.leaf_store import LeafKeeper
from vsql_shared.audit.store import ensure_partitions
from vsql_shared.config import Settings
from vsql_shared.crypto.signing import Signer
from vsql_shared.errors import (
    DivergedError,
    EnvironmentFault,
    RefusedError,
    TransientError,
    VsqlSyncError,
)
from vsql_shared.kafka.clients import from_exception
from vsql_shared.kms import open_provider
from vsql_shared.pg import acts, key_ends, synchronous
from vsql_shared.pg.commands import Command
from vsql_shared.pg.connect import Connection, connect, errors, translate
from vsql_shared.service.refused_connections import RefusedConnections
from vsql_shared.service.stopping import set_on_signals

_log = logging.getLogger(__name__)

# Seconds between looks at a stream that only an operator can set going again.
_DIVERGED_POLL = 1.0
# Of server.stop_timeout, after which the supervisor kills.
_STOP_SHARE = 0.8
# Between two tries: well below what `syncctl status` takes for silence.
_WAITING_SAYS_SECONDS = 5.0
# Between looks whether an operator ended the signing key.
_KEY_SECONDS = 1.0
# What becomes of commits that wait, once the order stands in the chain.
_WAITS = {
    "degrade": "commits wait for no target any more",
    "restore": "commits wait for their targets again",
}
# Commands whose answer is always the same.
_ANSWERS = {
    "rotate-dek": "the next batch is sealed under a new data key",
    "retry": "the stream is running; nothing to retry",
    "note-break": "the break stands in the chain",
    "note-refusal": "the refused connection stands in the chain",
}


class Stopped(Exception):
    """The worker was told to stop, or its copy is done. No error."""


class Pipeline(Told, Protocol):
    """One epoch of a stream, live or first copy: `open`, then `turn` until told to stop, then `finish`."""

    done: bool
    """The stream has come to its end."""
    epoch: int

    def open(self) -> None:
        """Take the slot, open an epoch, make the stages."""

    def turn(self, *, reading: bool = True) -> None:
        """Serve everything once; without `reading` only what is under way."""

    def finish(self, seconds: float, tick: Callable[[], None]) -> None:
        """Bring what is under way to its end, for so long at most."""

    @property
    def outlet(self) -> Outlet:
        """Where batches leave."""


def run_worker(settings: Settings, chain: str) -> int:
    """Run the worker until SIGTERM; returns the process's exit code."""
    failpoints.arm(dev_mode=not settings.is_prod)
    worker = Worker(settings, chain)
    set_on_signals(worker.stop)
    return worker.run()


class Worker:
    """One stream, through all of its epochs."""

    def __init__(self, settings: Settings, chain: str) -> None:
        self._settings, self._chain = settings, chain
        self.stop = threading.Event()
        self._report = Report(settings, chain)
        self._signer: Signer | None = None
        self._signer_is_open = False
        self._failures = 0
        self._text_only = False
        self._owed: list[Command] = []
        """Tries of a diverged stream: signed when there is an epoch to put them into."""
        self._acted: list[tuple[int, Command, str]] = []
        """Acts of this epoch on their way to the table: sequence, command, answer."""
        self._stop_by: float | None = None
        self._frame: bytes | None = None
        self._look_at_key = 0.0
        self._refused = RefusedConnections("producer", chain, self._connect)

    def run(self) -> int:
        """Epoch after epoch, until told to stop."""
        while not self.stop.is_set():
            try:
                self._attempt()
                self._failures = 0
            except Stopped:
                break
            except (TransientError, EnvironmentFault) as error:
                self._text_only = isinstance(error, BinaryRefused)
                self._report.failed(error)
                self._refused.take(error)
                # The status is that of the worker which is at work.
                silent = isinstance(error, streams.Taken)
                self._back_off(longest=isinstance(error, EnvironmentFault), silent=silent)
            except DivergedError as error:
                self._report.failed(error)
                self._wait_for_operator(error)
        self._report.say_alone(self._connect, "stopped")
        return 0

    def _attempt(self) -> None:
        """One epoch, until an error or a stop ends it."""
        with ExitStack() as closing:
            try:
                if not self._signer_is_open:  # a key service may be away: that is waited for like the rest
                    self._signer, self._signer_is_open = own_signer(self._settings), True
                self._epoch(closing)
            except psycopg.Error as error:
                raise translate(error, "running the stream") from error
            except KafkaException as error:
                raise from_exception(error, "run the stream") from error

    def _epoch(self, closing: ExitStack) -> None:
        settings = self._settings
        conn = self._connect()
        closing.callback(conn.close)
        require_primary(conn)
        streams.lock(conn, self._chain)
        stream = streams.load(conn, self._chain)
        if stream.state == "DIVERGED":
            # As it was said when it was found: a restart adds nothing to it.
            raise DivergedError(stream.reason or f"stream {self._chain} is marked as diverged")
        ensure_partitions(conn)
        control = Control(conn, self._chain, settings.limits)
        provider = open_provider(settings.encryption.kms, strict=settings.is_prod)
        closing.callback(provider.close)
        writing = self._writing(conn, stream)
        consumer = open_consumer(settings, self._chain, closing)
        policy = None if stream.kind == "copy" else synchronous.load(conn, stream.publication)
        answers: Consumer | Listener = consumer if policy is None else Listener(consumer, closing)
        targets = Targets(
            conn,
            answers,
            writing.cluster,
            self._chain,
            writing.topic,
            stream.ack_partition,
            allow_unsigned=not settings.is_prod,
        )
        leaves = LeafKeeper(conn, settings.audit.leaf_retention, settings.audit.leaf_max_size)
        context = Context(
            settings, stream, conn, provider, writing, targets, self._report.metrics, closing, leaves
        )
        if policy is not None and isinstance(answers, Listener):
            context.waits = Waits(conn, self._chain, policy, targets, answers)
        context.volume, context.text_only = self._report.volume, self._text_only
        context.frame = self._pack_frame(conn)
        self._report.opening()
        context.wait = lambda: self._report.say_again(conn)
        context.ensure_control_topics()
        pipeline: Pipeline = CopyPipeline(context) if stream.kind == "copy" else LivePipeline(context)
        context.interrupt = self._raise_when_stopped
        pipeline.open()
        context.interrupt = self._raise_when_overdue
        streams.set_state(conn, self._chain, "COPYING" if stream.kind == "copy" else "SYNCHRONIZED")
        self._failures = 0
        try:
            self._turn_until_stopped(pipeline, control, context)
        finally:
            self._report.ended(pipeline)

    def _pack_frame(self, conn: Connection) -> bytes:
        """What stands before each pack: asked for once, so a registry that is away later is not missed."""
        if self._frame is None:
            settings = self._settings.kafka.schema_registry
            self._report.opening(f"asking schema registry {settings.url}")

            def wait(seconds: float) -> None:
                if self.stop.wait(seconds):
                    raise Stopped
                self._report.say_again(conn)

            self._frame = frame_of_packs(settings, conn, wait)
        return self._frame

    def _raise_when_stopped(self) -> None:
        """What waits while a stream is opened ends at a stop; nothing has been sent yet."""
        if self.stop.is_set():
            raise Stopped

    def _raise_when_overdue(self) -> None:
        """What waits in an open stream for something that does not answer is given up at a stop's end."""
        if self.stop.is_set() and self._time_to_stop() <= 0:
            raise TransientError("the stop did not find an end in time; what was not sent comes again")

    def _time_to_stop(self) -> float:
        """Seconds that are left for a graceful stop, which begins when this is first asked."""
        if self._stop_by is None:
            self._stop_by = (
                time.monotonic() + self._settings.server.stop_timeout.total_seconds() * _STOP_SHARE
            )
        return self._stop_by - time.monotonic()

    def _turn_until_stopped(self, pipeline: Pipeline, control: Control, context: Context) -> None:
        conn, targets = context.conn, context.targets
        running = "copying" if context.stream.kind == "copy" else "running"
        self._acted.clear()
        self._refused.let_in()
        self._say_ends(pipeline, context)
        while self._owed:
            self._act(self._owed.pop(0), "the stream is tried again", pipeline, conn)
        while not self.stop.is_set() and not pipeline.done:
            now = time.monotonic()
            self._require_signing(conn, now)
            for command in control.poll(now):
                self._obey(command, control, pipeline, context)
            paused = control.desired == "paused"
            state = "paused" if paused else running
            if control.status_due(state, now):
                self._report.say(conn, control, state, pipeline, targets)
            targets.poll(now)
            pipeline.turn(reading=not paused)
            self._answer_acts(control, pipeline.sequence, context)
        pipeline.finish(self._time_to_stop(), context.on_tick)
        self._answer_acts(control, pipeline.sequence, context)
        if pipeline.done:
            streams.set_state(conn, self._chain, "FINISHED")
        self._report.say(conn, control, "stopped", pipeline, targets)
        raise Stopped

    def _say_ends(self, pipeline: Pipeline, context: Context) -> None:
        """Say where keys that this node's present one follows ended, before anything else (design 0025)."""
        writing = context.writing
        place = (writing.cluster, writing.node, self._chain)
        for detail in key_ends.owed(context.conn, *place, self._signer):
            failpoints.hit("producer.key-end")
            pipeline.outlet.say(SIGNING_KEY_ENDED, detail)

    def _require_signing(self, conn: Connection, now: float) -> None:
        """A key that an operator ends meanwhile signs nothing more."""
        if now >= self._look_at_key:
            self._look_at_key = now + _KEY_SECONDS
            key_ends.require_signing(conn, self._signer)

    def _obey(self, command: Command, control: Control, pipeline: Pipeline, context: Context) -> None:
        """Do what an operator orders, and put the act into the chain."""
        conn = context.conn
        if any(command.id == acted.id for _, acted, _ in self._acted):
            return  # obeyed; its entry is under way
        if command.verb in _ANSWERS:
            message = _ANSWERS[command.verb]
        elif command.verb in key_orders.VERBS:
            done, message = key_orders.obey(conn, command, pipeline.outlet, self._chain)
            if not done:
                control.answer(command, ok=False, message=message)
                return
        elif command.verb in prune_orders.VERBS:
            months = self._settings.audit.online_months
            done, message = prune_orders.obey(conn, command, pipeline.outlet, context.writing, months)
            if not done:
                control.answer(command, ok=False, message=message)
                return
        elif command.verb in _WAITS and context.waits is not None:
            message = _WAITS[command.verb]
        elif command.verb in ("pause", "resume"):
            message = f"the stream is {control.desired}"
        else:
            control.answer(command, ok=False, message=f"a producer does not know the command {command.verb}")
            return
        self._act(command, message, pipeline, conn)
        if command.verb == "rotate-dek":
            pipeline.outlet.keys.rotate("command")

    def _act(self, command: Command, message: str, pipeline: Pipeline, conn: Connection) -> None:
        sequence = pipeline.outlet.act(acts.describe(conn, command))
        self._acted.append((sequence, command, message))

    def _answer_acts(self, control: Control, recorded: int, context: Context) -> None:
        """Answer the commands whose entries this node's own table has."""
        while self._acted and self._acted[0][0] <= recorded:
            _, command, message = self._acted.pop(0)
            if context.waits is not None and command.verb in _WAITS:
                context.waits.degrade(command.reason if command.verb == "degrade" else None)
            control.answer(command, ok=True, message=message)

    def _writing(self, conn: Connection, stream: streams.Stream) -> Writing:
        settings = self._settings
        node = settings.cluster.node_name
        if stream.origin != node:
            raise RefusedError(f"stream {stream.chain} is of node {stream.origin}, this node is {node}")
        return Writing(
            settings.cluster.name,
            stream.chain,
            node,
            self._signer,
            own_trust(conn, node, stream.chain, self._signer),
            names.audit_topic(settings.cluster.name),
            stream.audit_partition,
        )

    def _connect(self) -> Connection:
        conn = connect(
            self._settings.connection.conninfo("producer"),
            application_name=f"vsql-sync producer {self._chain}",
            holds_lock=True,
        )
        with errors("setting up the session"):
            # The audit trail must be on this disk before the slot moves, and must not wait for standbys.
            conn.execute("SET synchronous_commit = local")
        return conn

    def _back_off(self, *, longest: bool, silent: bool) -> None:
        limits = self._settings.limits
        most = limits.retry_backoff_max_ms / 1000
        pause = most if longest else min(limits.retry_backoff_ms / 1000 * 2**self._failures, most)
        self._failures = min(self._failures + 1, 16)
        until = time.monotonic() + pause
        while not self.stop.is_set() and (left := until - time.monotonic()) > 0:
            if not silent:
                self._report.say_alone(self._connect, "waiting")
            self.stop.wait(min(left, _WAITING_SAYS_SECONDS))

    def _wait_for_operator(self, error: DivergedError) -> None:
        """Stay, visibly, until `retry`; the durable state keeps a restart from going on by itself."""
        self._report.say_alone(self._connect, "diverged", "DIVERGED")
        while not self.stop.wait(_DIVERGED_POLL):
            try:
                with self._connect() as conn:
                    control = Control(conn, self._chain, self._settings.limits)
                    for command in control.poll(time.monotonic()):
                        if command.verb == "retry" and command.id not in {one.id for one in self._owed}:
                            # Its entry is made, and it is answered, when there is an epoch to put it into.
                            self._owed.append(command)
                            streams.set_state(conn, self._chain, "PREPARING", command.reason)
                            return
                        if command.verb in ("note-break", "note-refusal"):
                            continue  # stays owed in the table until there is an epoch to put it into
                        control.answer(command, ok=False, message=f"the stream is diverged: {error}")
                    control.say("diverged", self._report.alone(conn, "diverged"), time.monotonic())
            except (VsqlSyncError, psycopg.Error):
                _log.debug("the database is away while the stream is diverged")
