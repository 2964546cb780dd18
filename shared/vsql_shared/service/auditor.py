"""The thread of a service that verifies the node's audit trail and the audit topic, all the time, a little.

Not here: what is verified (audit/watch.py, watch_topic.py). Rules:

* Its own connection to the database and to Kafka, in the supervisor's process: no worker waits for it. Where
  the system lets it, its thread is the last to get the processor.
* One at a time for a node: a session lock; the other service asks for it every few seconds.
* What nobody expects of the topic's reader ends that reader: the trail's pass goes on, and another begins.
* Between two slices it rests for `audit.verify_pause`.
* A break is a row in audit_breaks, a line of the log, a line of the operators' log that the worker of the
  chain signs, and a gauge. Nothing is stopped: what streams apply is verified by whoever applies it.
* A service that does not verify shows no breaks: the other one does, or the age of what is whole says so.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Protocol

import psycopg

from vsql_shared import names
from vsql_shared.audit import watch_state
from vsql_shared.audit.watch import TrailWatch
from vsql_shared.crypto.signing import TrustStore
from vsql_shared.errors import VsqlSyncError
from vsql_shared.pg import migrate, signers
from vsql_shared.pg.connect import Connection, connect, errors, translate

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from vsql_shared.audit.verify import Problem
    from vsql_shared.audit.watch import Cosigned
    from vsql_shared.config import Settings
    from vsql_shared.config.connection import DatabaseRole

_log = logging.getLogger(__name__)

_AGAIN_SECONDS = 5.0
_SHOWN_SECONDS = 5.0
_NICE = 10


class Auditor:
    """Runs in a thread from `start` to `stop`."""

    def __init__(self, settings: Settings, role: DatabaseRole) -> None:
        self._settings, self._role = settings, role
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._said = ""

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """End after the slice under way; whoever hangs in a connection ends with the process."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        every = self._settings.audit.verify_every.total_seconds()
        # A service that starts has better things to do first.
        pause = min(_AGAIN_SECONDS, every)
        while not self._stop.wait(pause):
            pause = _AGAIN_SECONDS
            try:
                self._watch()
            except psycopg.Error as error:
                self._failed(translate(error, "verifying the audit trail"))
            except VsqlSyncError as error:
                self._failed(error)
            except Exception:  # noqa: BLE001 - said, and tried again
                # A thread that ends in silence would look like a trail that is verified.
                _log.exception("the background verification of the audit trail failed; it is tried again")

    def _failed(self, error: VsqlSyncError) -> None:
        """Said once while it lasts."""
        if self._said != error.message:
            self._said = error.message
            _log.warning("the audit trail is not verified now: %s", error)

    def _watch(self) -> None:
        from vsql_shared.service.topic_auditor import TopicAuditor

        settings, audit = self._settings, self._settings.audit
        conninfo = settings.connection.conninfo(self._role)
        with connect(conninfo, application_name=f"vsql-sync {self._role} audit") as conn:
            migrate.require_current(conn)
            with errors("setting up the session"):
                conn.execute("SET synchronous_commit = local")  # what is noted here waits for no standby
            while not _lock(conn, settings.cluster.node_name):
                if self._stop.wait(_AGAIN_SECONDS):
                    return
            trail = TrailWatch(
                conn, settings.cluster.name, audit.verify_slice, audit.verify_every.total_seconds()
            )
            with contextlib.closing(TopicTurns(lambda: TopicAuditor(conn, settings))) as topic:
                self._turns(conn, trail, topic)

    def _turns(self, conn: Connection, trail: TrailWatch, topic: TopicTurns) -> None:
        pause = self._settings.audit.verify_pause.total_seconds()
        shown = float("-inf")
        show = Gauges(self._settings.cluster.node_name)
        with contextlib.closing(show):
            while not self._stop.is_set():
                now = time.monotonic()
                trust = TrustStore(signers.load(conn), allow_unsigned=not self._settings.is_prod)
                # Each is told at once: what was noted is known, and would not be told by the next turn.
                new = _told(trail.turn(trust, now)) + _told(topic.turn(trust, now))
                trail.cosigned = topic.cosigned
                if new or now - shown > _SHOWN_SECONDS:
                    show(conn)
                    shown = now
                self._said = ""
                self._stop.wait(pause)


class TopicReader(Protocol):
    """What reads the topic in slices (topic_auditor.py)."""

    cosigned: Cosigned
    """What targets co-signed, as its last whole pass has it."""

    def turn(self, trust: TrustStore, now: float) -> list[Problem]:
        """Read the next slice; the breaks that are new."""
        ...

    def close(self) -> None:
        """Leave Kafka."""
        ...


class TopicTurns:
    """Turns of a reader of the topic. One that fails as nobody expects is given up, and another is made.

    Errors of the database, and all of ours, go on: they are the trail's reader's, too.
    """

    def __init__(self, make: Callable[[], TopicReader]) -> None:
        self._make = make
        self._reader: TopicReader | None = None
        self._next = float("-inf")
        self.cosigned: Cosigned = {}

    def turn(self, trust: TrustStore, now: float) -> list[Problem]:
        """Read the next slice; the breaks that are new. `now`: a clock that does not go back."""
        if now < self._next:
            return []
        try:
            if self._reader is None:
                self._reader = self._make()
                self._reader.cosigned = self.cosigned
            found = self._reader.turn(trust, now)
        except (VsqlSyncError, psycopg.Error):
            raise
        except Exception:  # noqa: BLE001 - said, and tried again
            # It reads from the first record on again: what was found and not noted is found again.
            _log.exception("reading the audit topic failed; it is begun anew, and the trail is read on")
            with contextlib.suppress(Exception):
                self.close()
            self._next = now + _AGAIN_SECONDS
            return []
        self.cosigned = self._reader.cosigned
        return found

    def close(self) -> None:
        """Leave Kafka."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()


def _told(problems: list[Problem]) -> int:
    """Say them in the log; how many they are."""
    for problem in problems:
        _log.error(
            "the audit trail does not verify: %s",
            watch_state.printable(problem.what),
            extra={
                "chain": watch_state.printable(problem.chain),
                "sequence": problem.sequence,
                "event_id": problem.event_id,
            },
        )
    return len(problems)


def _lock(conn: Connection, node: str) -> bool:
    with errors("taking the lock of the background verification"):
        row = conn.execute(
            "SELECT pg_try_advisory_lock(%s)", (names.advisory_key(f"audit watch {node}", "audit"),)
        ).fetchone()
    return row is not None and bool(row[0])


class Gauges:
    """Shows what is in the tables as metrics."""

    def __init__(self, node: str) -> None:
        # Only now: prometheus_client decides at import whether values are shared between processes.
        from vsql_shared.observe import metrics

        self._breaks: Callable[..., None] = metrics.audit_broken
        self._watched: Callable[..., None] = metrics.audit_watched
        self._node = node
        self._shown: set[str] = set()

    def __call__(self, conn: Connection) -> None:
        """Show what the tables say now."""
        watched = watch_state.progress(conn)
        counts = Counter(found.chain for found in watch_state.open_breaks(conn))
        for one in watched:
            self._watched(one.chain, self._node, one.verified_to, _unix(one.verified_at), _unix(one.whole_at))
        # Also those that were shown once and are in no table any more: a gauge keeps its last value.
        self._shown |= counts.keys() | {one.chain for one in watched}
        for chain in self._shown:
            self._breaks(chain, self._node, counts[chain])

    def close(self) -> None:
        """Whoever verifies next shows what is broken."""
        for chain in self._shown:
            self._breaks(chain, self._node, 0)


def _unix(at: datetime | None) -> float | None:
    return None if at is None else at.timestamp()
