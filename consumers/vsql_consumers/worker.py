"""The worker of one incoming stream: connections, locks, retries, pausing, refusals.

Not here: the stages (pipeline.py). What becomes of an error (docs/design/0002):

* TransientError: back off, then everything is opened anew, from the progress in the database. `waiting`.
* VerificationError: `refused`; a signed entry says so once; nothing is applied until an operator decides.
* RowError: `blocked`; nothing is applied until an operator decides, or the table's definition changes.
* DivergedError: `diverged`, until an operator's `retry`.
* EnvironmentFault: as TransientError, with the longest back-off: an operator may mend it at any time.
* Anything else ends the process; the supervisor starts another one.

An operator's command (`pause`, `resume`, the `retry` that comes with a decision) ends a back-off. A `replay`
has what was refused tried again, too: it is done first, and may be what that waits for. A command is put into
this node's chain as a signed entry before it is answered: at once where the stream runs, is refused or held,
else when it runs again. A worker that ends in between finds it unanswered, obeys and says it again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import psycopg
from confluent_kafka import KafkaException

from vsql_consumers import key_ends, state
from vsql_consumers.acknowledge import Acknowledger, Place
from vsql_consumers.control import Control, Wish
from vsql_consumers.means import LAST_BATCH, Means
from vsql_consumers.origin import OriginSession
from vsql_consumers.pipeline import Pipeline
from vsql_consumers.quarantine import Refusal, watch
from vsql_consumers.report import Report
from vsql_consumers.session import open_applying, open_control, own_trust
from vsql_consumers.skew import SkewError, SkewGuard
from vsql_consumers.source import Source, read_chain
from vsql_consumers.state import Stream
from vsql_shared import failpoints, names
from vsql_shared.audit.entries import SIGNING_KEY_ENDED
from vsql_shared.audit.leaf_store import LeafKeeper
from vsql_shared.audit.store import ensure_partitions
from vsql_shared.crypto.signing import PinnedKey, Signer
from vsql_shared.errors import (
    DivergedError,
    EnvironmentFault,
    RowError,
    TransientError,
    VerificationError,
    VsqlSyncError,
)
from vsql_shared.kafka.clients import from_exception, make_admin, make_producer
from vsql_shared.kafka.topics import ensure_topic
from vsql_shared.kms import open_provider, open_signer
from vsql_shared.pg import acts, signers
from vsql_shared.pg.connect import Connection, translate
from vsql_shared.pg.key_ends import owed
from vsql_shared.service.refused_connections import RefusedConnections
from vsql_shared.service.stopping import set_on_signals

if TYPE_CHECKING:
    from vsql_shared.config import Settings

_log = logging.getLogger(__name__)

_HOLD_SECONDS = 0.2
_CONNECT_AGAIN_SECONDS = 2.0
_VERBS = frozenset({"pause", "resume", "retry", "note-break", "note-refusal"})


def _nothing() -> None:
    """What was ordered is done already."""


def _replays(wishes: Sequence[Wish]) -> list[Wish]:
    return [wish for wish in wishes if wish.verb == "replay"]


def run_worker(settings: Settings, chain: str) -> int:
    """Run the worker until SIGTERM, or until its copy is finished; returns the process's exit code."""
    failpoints.arm(dev_mode=not settings.is_prod)
    worker = Worker(settings, chain)
    set_on_signals(worker.stop)
    return worker.run()


class Worker:
    """One incoming stream, through all of its attempts."""

    def __init__(self, settings: Settings, chain: str) -> None:
        self._settings, self._chain = settings, chain
        self.stop = threading.Event()
        self._report = Report(settings, chain)
        self._signer: Signer | None = None
        self._signer_is_open = False
        self._failures = 0
        self._skewed = False
        self._trusted: Sequence[PinnedKey] = ()
        """Keys the pipeline was opened with last."""
        self._obeyed: set[int] = set()
        """Commands that were acted upon and wait for their entry and answer."""
        self._refused = RefusedConnections("consumer", chain, lambda: open_control(settings, chain, None))

    def run(self) -> int:
        """Attempt after attempt."""
        while not self.stop.is_set():
            try:
                if self._attempt():
                    break
            except TransientError as error:
                self._report.failed(error)
                self._back_off(longest=False)
            except EnvironmentFault as error:
                self._report.failed(error)
                self._refused.take(error)
                self._back_off(longest=True)
        self._report.say_alone("stopped")
        return 0

    def _attempt(self) -> bool:
        """Connect and run until something ends it; True when the worker's work is done."""
        try:
            if not self._signer_is_open:  # a key service may be away: that is waited for like the rest
                self._signer, self._signer_is_open = open_signer(self._settings), True
            with ExitStack() as closing:
                return self._with_database(closing)
        except psycopg.Error as error:
            raise translate(error, "running the stream") from error
        except KafkaException as error:
            raise from_exception(error, "run the stream") from error

    def _with_database(self, closing: ExitStack) -> bool:
        settings = self._settings
        conn = open_control(settings, self._chain, self.stop)
        closing.callback(conn.close)
        ensure_partitions(conn)
        control = Control(conn, self._chain, settings.limits)
        while not self.stop.is_set():
            stream = state.load_stream(conn, settings.cluster.name, self._chain)
            if stream.state == "FINISHED":
                return True
            held = state.hold_reason(conn, stream, control.desired) or self._too_skewed(conn, stream)
            if held is not None:
                self._hold(control, stream, *held)
                continue
            refused = self._run_pipeline(conn, stream, control)
            if refused is not None:
                self._refuse(conn, stream, control, refused)
        return True

    def _too_skewed(self, conn: Connection, stream: Stream) -> tuple[str, str] | None:
        """Why it waits on, once PCI data was met while clocks were too far apart; as state.hold_reason."""
        if self._skewed:
            limit = self._settings.conflict.max_clock_skew_ms
            if (why := SkewGuard(conn, stream.origin, limit).too_far()) is not None:
                return "waiting", why
            self._skewed = False
        return None

    def _hold(self, control: Control, stream: Stream, what: str, why: str) -> None:
        """Wait a moment, answering the operator."""
        wishes = control.poll()
        if wishes and control.desired == "running" and what == "paused":
            self._obeyed.update(wish.id for wish in wishes)  # answered by the stream that now runs
        elif wishes and what != "waiting":
            self._obey_held(control, stream, what, wishes)
        self._report.say(control, what, {"waiting_for": why} if what == "waiting" else {})
        self.stop.wait(_HOLD_SECONDS)

    def _obey_held(self, control: Control, stream: Stream, what: str, wishes: Sequence[Wish]) -> None:
        """Sign what was ordered, then do it, then answer: one that was not signed stays unanswered."""
        retry = next((wish for wish in wishes if wish.verb == "retry" and what == "diverged"), None)
        with ExitStack() as closing:
            try:
                acknowledger = self._open_fenced(control.conn, stream, closing)
            except DivergedError as error:
                # It is our own chain that does not hold: the order waits until somebody has mended that.
                self._report.failed(error)
                return

            def obey() -> None:
                if retry is not None:
                    state.set_stream_state(control.conn, self._chain, "CATCHING_UP", retry.reason)

            message = "the stream is tried again" if retry is not None else f"the stream is {what}"
            self._answer(acknowledger, control, wishes, message, obey)

    def _run_pipeline(self, conn: Connection, stream: Stream, control: Control) -> Refusal | None:
        """Run until paused or stopped; what was refused, if that is what ended it.

        The error itself is not given on: it would keep everything the pipeline held in memory.
        """
        trusted = self._trusted = key_ends.look_at_start(self._settings, conn, stream)
        try:
            with ExitStack() as closing:
                self._turn(self._open_pipeline(conn, stream, trusted, closing), stream, control, trusted)
        except SkewError as error:
            self._report.failed(error)
            self._skewed = True
        except VerificationError as error:
            if key_ends.look_ahead(self._settings, conn, stream, trusted) != trusted:
                _log.info("trusted keys have changed; reading again", extra={"record": error.record})
                return None
            self._report.failed(error)
            self._report.totals.passed(LAST_BATCH)
            return Refusal.of(error, state.load_position(conn, self._chain).head.sequence + 1)
        except RowError as error:
            self._report.failed(error)
            self._report.totals.passed(LAST_BATCH)
            first = state.load_position(conn, self._chain).head.sequence + 1
            return Refusal.of_row(error, self._chain, first)
        except DivergedError as error:
            self._report.failed(error)
            state.set_stream_state(conn, self._chain, "DIVERGED", str(error))
        return None

    def _turn(
        self, pipeline: Pipeline, stream: Stream, control: Control, trusted: Sequence[PinnedKey]
    ) -> None:
        conn = control.conn
        self._failures = 0
        self._refused.let_in()
        self._report.refusal = None
        say_running = "copying" if stream.kind == "copy" else "running"
        begins = True

        def tick() -> bool:
            nonlocal begins
            if begins:  # before anything is met that waits for it
                begins = False
                self._replay(pipeline, control, _replays(control.poll(now=True)))
                return control.desired == "running"
            if not control.due():
                if control.status_due():
                    self._report.say(control, say_running, self._report.of_pipeline(pipeline))
                return True
            wishes = control.poll()
            self._replay(pipeline, control, _replays(wishes))
            wishes = [wish for wish in wishes if wish.verb != "replay"]
            # Decisions are read when a pipeline is opened.
            decided = any("decision" in wish.args and wish.id not in self._obeyed for wish in wishes)
            self._answer(pipeline.acknowledger, control, wishes, "the stream is running")
            self._note_sync(conn, stream, pipeline)
            return control.desired == "running" and not decided and signers.load(conn) == trusted

        _log.info("running", extra={"sequence": pipeline.position.head.sequence})
        self._report.say(control, say_running, self._report.of_pipeline(pipeline))
        pipeline.run(tick)
        self._report.say(control, say_running, self._report.of_pipeline(pipeline))

    def _replay(self, pipeline: Pipeline, control: Control, wishes: Sequence[Wish]) -> None:
        """Replay what was ordered, each once; what cannot be replayed is answered so, and stays parked."""
        for wish in wishes:
            if not pipeline.between:
                return  # asked again when the transaction under way is complete
            pipeline.acknowledger.act(acts.describe(control.conn, wish))
            failpoints.hit("consumer.act-signed")
            decision = wish.args.get("parked")
            try:
                message, ok = pipeline.replay(decision if isinstance(decision, int) else 0), True
            except TransientError as error:
                # Connections are opened anew, but it is not tried again by itself: what lasts, and only
                # concerns the replay, would hold up the stream.
                control.answer(wish, ok=False, message=f"{error.message}; order it again")
                raise
            except VsqlSyncError as error:
                message, ok = str(error), False
            pipeline.sign_replays()
            control.answer(wish, ok=ok, message=message)

    def _answer(
        self,
        acknowledger: Acknowledger,
        control: Control,
        wishes: Sequence[Wish],
        message: str,
        obey: Callable[[], None] = _nothing,
    ) -> None:
        """Put commands into this node's chain, do what is left to do, then answer them."""
        known = [wish for wish in wishes if wish.verb in _VERBS]
        for wish in known:
            acknowledger.act(acts.describe(control.conn, wish))
            failpoints.hit("consumer.act-signed")
        if known:
            obey()
            failpoints.hit("consumer.act-obeyed")
        for wish in wishes:
            unknown = f"a consumer does not know the command {wish.verb}"
            if wish.verb == "replay":
                unknown = f"nothing is replayed now: {message}"
            control.answer(wish, ok=wish in known, message=message if wish in known else unknown)
            self._obeyed.discard(wish.id)

    def _open_pipeline(
        self, conn: Connection, stream: Stream, trusted: Sequence[PinnedKey], closing: ExitStack
    ) -> Pipeline:
        settings = self._settings
        cluster, node = settings.cluster.name, settings.cluster.node_name
        applying = open_applying(settings, self._chain)
        closing.callback(applying.close)
        admin = make_admin(settings)
        ensure_topic(admin, names.audit_topic(cluster), "audit", settings)
        ensure_topic(admin, names.keys_topic(cluster), "keys", settings)
        provider = open_provider(settings.encryption.kms, strict=settings.is_prod)
        closing.callback(provider.close)
        trust = key_ends.trust_of(settings, conn, stream, trusted)
        client = f"vsql-sync-consumer-{self._chain}"
        source = Source(settings, client, names.group_id(cluster, self._chain, node))
        closing.callback(source.close)
        return Pipeline(
            Means(
                settings,
                stream,
                conn,
                applying,
                trust,
                provider,
                lambda: self._open_acknowledger(conn, stream, closing),
                source,
                self._report.metrics,
                self._report.totals,
                self.stop,
                self._leaves(conn, stream),
            )
        )

    def _leaves(self, conn: Connection, stream: Stream) -> LeafKeeper | None:
        audit = self._settings.audit
        return None if stream.kind == "copy" else LeafKeeper(conn, audit.leaf_retention, audit.leaf_max_size)

    def _refuse(self, conn: Connection, stream: Stream, control: Control, refusal: Refusal) -> None:
        """Say what was refused, signed and in the status; stay until an operator decides."""
        self._report.refusal = refusal
        altered = watch(conn, refusal.place)
        other_keys = key_ends.watch(self._settings, conn, stream, self._trusted)
        stands = {"sequence": state.load_position(conn, self._chain).head.sequence}
        _log.error(refusal.state, extra={"record": refusal.record, "sequence": refusal.sequence})
        with ExitStack() as closing:
            acknowledger = self._open_fenced(conn, stream, closing)
            if refusal.state == "refused":
                acknowledger.refused(refusal.record, refusal.error, refusal.sequence)
            # Those that had us try again: this is what came of it.
            tried = [wish for wish in control.poll(now=True) if wish.id in self._obeyed]
            self._answer(acknowledger, control, tried, f"tried again, and {refusal.state}: {refusal.error}")
        while not self.stop.is_set() and not altered() and not other_keys():
            wishes = control.poll()
            if any(wish.verb in {"retry", "replay"} for wish in wishes):
                self._obeyed.update(wish.id for wish in wishes)
                return
            if wishes:
                with ExitStack() as closing:
                    acknowledger = self._open_fenced(conn, stream, closing)
                    self._answer(
                        acknowledger, control, wishes, f"the stream is {refusal.state}: {refusal.error}"
                    )
            self._report.say(control, refusal.state, stands)
            self.stop.wait(_HOLD_SECONDS)

    def _open_fenced(self, conn: Connection, stream: Stream, closing: ExitStack) -> Acknowledger:
        """The writer of our own chain where no pipeline runs: under the stream's origin, as always."""
        applying = open_applying(self._settings, self._chain)
        closing.callback(applying.close)
        OriginSession(applying).setup(stream.origin_name)
        return self._open_acknowledger(conn, stream, closing)

    def _open_acknowledger(self, conn: Connection, stream: Stream, closing: ExitStack) -> Acknowledger:
        """The writer of our own chain, in an epoch of its own."""
        settings, node = self._settings, self._settings.cluster.node_name
        cluster, client = settings.cluster.name, f"vsql-sync-acks-{self._chain}"
        audit, ack_chain = names.audit_topic(cluster), names.ack_chain(self._chain, node)
        place = Place(cluster, self._chain, ack_chain, stream.origin, node, audit, stream.ack_partition)
        acknowledger = Acknowledger(
            conn,
            make_producer(settings, client, at_once=True),
            place,
            self._signer,
            own_trust(conn, node, ack_chain, self._signer),
        )
        closing.callback(acknowledger.close)
        # Our answer to an entry lies after it, where both are in one partition.
        begin = state.load_position(conn, self._chain).audit_offset
        begin = begin if stream.ack_partition == stream.audit_partition else 0
        group, where = names.group_id(cluster, ack_chain, node), (audit, stream.ack_partition)
        acknowledger.start(lambda at: read_chain(settings, client, group, where, ack_chain, at), begin)
        for said in owed(conn, cluster, node, ack_chain, self._signer):
            acknowledger.say(SIGNING_KEY_ENDED, said)
        return acknowledger

    def _note_sync(self, conn: Connection, stream: Stream, pipeline: Pipeline) -> None:
        """A live stream that has applied all it knows of is SYNCHRONIZED."""
        if stream.kind == "live":
            level = pipeline.position.head.sequence == pipeline.intake.collector.read_head.sequence
            if level and pipeline.position.head.sequence:
                state.set_stream_state(conn, self._chain, "SYNCHRONIZED")

    def _back_off(self, *, longest: bool) -> None:
        limits = self._settings.limits
        most = limits.retry_backoff_max_ms / 1000
        pause = most if longest else min(limits.retry_backoff_ms / 1000 * 2**self._failures, most)
        self._failures = min(self._failures + 1, 16)
        self._report.say_alone("waiting")
        deadline = time.monotonic() + pause
        while not self.stop.is_set() and (left := deadline - time.monotonic()) > 0:
            if self._listen(deadline):
                self._failures = 0
                return
            self.stop.wait(min(left, _CONNECT_AGAIN_SECONDS))

    def _listen(self, deadline: float) -> bool:
        """Wait for an operator's command, as long as the database is there; true when there was one."""
        try:
            with open_control(self._settings, self._chain, None) as conn:
                control = Control(conn, self._chain, self._settings.limits)
                while time.monotonic() < deadline and not self.stop.wait(_HOLD_SECONDS):
                    new = {wish.id for wish in control.poll()} - self._obeyed
                    if new:
                        self._obeyed |= new
                        return True
                    self._report.say(control, "waiting", {})
        except (VsqlSyncError, psycopg.Error):
            _log.debug("the database is away while the stream waits")
        return False
