"""Worker processes of a supervisor: started, restarted with back-off, stopped. No database, no HTTP.

A worker that ends by itself is started again: after `backoff` seconds the first time, twice as long each
further time up to `backoff_max`; a worker that ran for a while starts from the beginning. Exit codes of a
user's mistake are restarted too: the mistake may be mended in the database at any time. One that is not
wanted any more has `stop_timeout` seconds to end, then it is killed: hung, it would keep its stream's lock.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass

from vsql_shared.observe import shared_metrics
from vsql_shared.service.nursery import Child, Nursery, NurseryGoneError

_log = logging.getLogger(__name__)

# A worker that lived this long (seconds) was healthy: its next end is a new trouble.
_HEALTHY_AFTER = 60.0
# Seconds in which the kernel has ended a killed worker.
_KILLED_WITHIN = 30.0
# Seconds before an order that was not taken is sent again.
_AGAIN_SECONDS = 0.05
# Doublings of a pause that are counted; any bound is reached before.
_DOUBLINGS = 32


_MEMBER = "#"


def member_name(chain: str, number: int) -> str:
    """The name of a stream's member among the workers; no chain's name has a `#`."""
    return f"{chain}{_MEMBER}{number}"


def _arguments(name: str) -> list[str]:
    chain, is_member, _ = name.partition(_MEMBER)
    return ["--chain", chain, *(["--member"] if is_member else [])]


@dataclass(slots=True)
class _Worker:
    process: Child | None
    started: float
    failures: int = 0
    next_start: float = 0.0
    end_by: float | None = None
    """It was told to end until then."""


def pause_after(failures: int, backoff: float, backoff_max: float) -> float:
    """Seconds before the next start, after so many ends in a row."""
    return min(backoff * float(2 ** min(failures - 1, _DOUBLINGS)), backoff_max)


class Workers:
    """The worker processes of one service; `sync` makes them match the wanted streams."""

    def __init__(
        self, nursery: Nursery, config: str | None, backoff: float, backoff_max: float, stop_timeout: float
    ) -> None:
        self._nursery = nursery
        self._base = ["--config", config] if config else []
        self._backoff, self._backoff_max = backoff, backoff_max
        self._stop_timeout = stop_timeout
        self._workers: dict[str, _Worker] = {}

    def look(self) -> None:
        """Raise NurseryGoneError where no worker could be started any more, whether or not one is wanted."""
        self._nursery.listen()

    def sync(self, wanted: Iterable[str]) -> list[str]:
        """Start what is missing, stop what is not wanted; returns those that ended since the last call."""
        now, wanted = time.monotonic(), set(wanted)
        ended: list[str] = []
        for chain in list(self._workers):
            worker = self._workers[chain]
            if worker.process is not None and (code := worker.process.poll()) is not None:
                ended.append(chain)
                shared_metrics.worker_ended(chain)  # before it starts again: it would lose its new files
                self._note_end(chain, worker, code, now, wanted=chain in wanted)
            if worker.process is not None and (chain not in wanted or worker.end_by is not None):
                self._end(chain, worker, worker.process, now)
            elif chain not in wanted:
                del self._workers[chain]
        for chain in wanted:
            worker = self._workers.setdefault(chain, _Worker(None, now))
            if worker.process is None and now >= worker.next_start:
                self._start(chain, worker, now)
        return ended

    def _start(self, chain: str, worker: _Worker, now: float) -> None:
        argv, env = [*self._base, *_arguments(chain)], shared_metrics.worker_environment(chain)
        try:
            worker.process = self._nursery.start(chain, argv, env)
        except OSError as error:  # the nursery takes no such order, or none now: the other streams go on
            worker.failures += 1
            worker.next_start = now + pause_after(worker.failures, self._backoff, self._backoff_max)
            _log.error("worker cannot be started: %s", error.strerror, extra={"stream": chain})
            return
        worker.started, worker.end_by = now, None

    def _end(self, chain: str, worker: _Worker, process: Child, now: float) -> None:
        if worker.end_by is None:
            worker.end_by = now + self._stop_timeout
        if now < worker.end_by:
            _send(process, signal.SIGTERM)
        else:
            _log.error("worker did not end in time and is killed", extra={"stream": chain})
            _send(process, signal.SIGKILL)

    def _note_end(self, chain: str, worker: _Worker, code: int, now: float, *, wanted: bool) -> None:
        if not wanted and code in (0, -signal.SIGTERM):
            # A finished copy ends by itself; our SIGTERM may meet it while the interpreter shuts down.
            worker.process = None
            _log.info("worker ended", extra={"stream": chain, "code": code})
            return
        worker.failures = 1 if now - worker.started > _HEALTHY_AFTER else worker.failures + 1
        pause = 0.0 if code == 0 else pause_after(worker.failures, self._backoff, self._backoff_max)
        worker.next_start = now + pause
        worker.process = None
        level = logging.INFO if code == 0 else logging.ERROR
        _log.log(
            level, "worker ended", extra={"stream": chain, "code": code, "restart_in_s": round(pause, 1)}
        )

    def running(self) -> dict[str, bool]:
        """Each wanted stream and whether its worker is alive."""
        return {
            chain: worker.process is not None and worker.process.poll() is None
            for chain, worker in self._workers.items()
        }

    def stop(self) -> bool:
        """SIGTERM all, wait `stop_timeout` seconds, SIGKILL the rest. True when all ended by themselves."""
        try:
            return self._stop()
        except NurseryGoneError as gone:  # its end ends them, and nobody is left who would tell
            _log.error("%s", gone.message)
            return False
        finally:
            self._nursery.close()

    def _stop(self) -> bool:
        alive = [
            w.process for w in self._workers.values() if w.process is not None and w.process.poll() is None
        ]
        deadline = time.monotonic() + self._stop_timeout
        unsent = alive
        while unsent := [process for process in unsent if not _send(process, signal.SIGTERM)]:
            if time.monotonic() > deadline:
                break
            self._nursery.listen(_AGAIN_SECONDS)
        graceful = True
        for process in alive:
            if not process.wait(max(0.1, deadline - time.monotonic())):
                graceful = False
                _log.error("worker did not stop in time and is killed", extra={"pid": process.pid})
                _send(process, signal.SIGKILL)
                process.wait(max(0.1, deadline + _KILLED_WITHIN - time.monotonic()))
        return graceful


def _send(process: Child, number: signal.Signals) -> bool:
    """Whether the nursery took the order; where not, it is to be sent again."""
    with contextlib.suppress(OSError):
        process.send_signal(number)
        return True
    return False
