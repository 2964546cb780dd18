"""Worker processes of a supervisor: started, restarted with back-off, stopped. No database, no HTTP.

A worker that ends by itself is started again: after `backoff` seconds the first time, twice as long each
further time up to `backoff_max`; a worker that ran for a while starts from the beginning. Exit codes of a
user's mistake are restarted too: the mistake may be mended in the database at any time.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass

from vsql_shared.observe import shared_metrics

_log = logging.getLogger(__name__)

# A worker that lived this long (seconds) was healthy: its next end is a new trouble.
_HEALTHY_AFTER = 60.0


@dataclass(slots=True)
class _Worker:
    process: subprocess.Popen[bytes] | None
    started: float
    failures: int = 0
    next_start: float = 0.0


class Workers:
    """The worker processes of one service; `sync` makes them match the wanted streams."""

    def __init__(self, package: str, config: str | None, backoff: float, backoff_max: float) -> None:
        self._base = [sys.executable, "-m", package, *(["--config", config] if config else [])]
        self._base += ["--service-pid", str(os.getpid())]
        self._backoff, self._backoff_max = backoff, backoff_max
        self._workers: dict[str, _Worker] = {}

    def sync(self, wanted: Iterable[str]) -> list[str]:
        """Start what is missing, stop what is not wanted; returns those that ended since the last call."""
        now, wanted = time.monotonic(), set(wanted)
        ended: list[str] = []
        for chain in list(self._workers):
            worker = self._workers[chain]
            if worker.process is not None and worker.process.poll() is not None:
                ended.append(chain)
                self._note_end(chain, worker, worker.process.returncode, now, wanted=chain in wanted)
            if chain not in wanted:
                if worker.process is None:
                    del self._workers[chain]
                else:
                    worker.process.terminate()
        for chain in wanted:
            worker = self._workers.setdefault(chain, _Worker(None, now))
            if worker.process is None and now >= worker.next_start:
                env = {**os.environ, **shared_metrics.worker_environment(chain)}
                worker.process = subprocess.Popen([*self._base, "--chain", chain], env=env)
                worker.started = now
                _log.info("worker started", extra={"stream": chain, "pid": worker.process.pid})
        return ended

    def _note_end(self, chain: str, worker: _Worker, code: int, now: float, *, wanted: bool) -> None:
        if not wanted and code in (0, -signal.SIGTERM):
            # A finished copy ends by itself; our SIGTERM may meet it while the interpreter shuts down.
            worker.process = None
            _log.info("worker ended", extra={"stream": chain, "code": code})
            return
        worker.failures = 1 if now - worker.started > _HEALTHY_AFTER else worker.failures + 1
        pause = 0.0 if code == 0 else min(self._backoff * 2 ** (worker.failures - 1), self._backoff_max)
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

    def stop(self, timeout: float) -> bool:
        """SIGTERM all, wait `timeout` seconds, SIGKILL the rest. True when all ended by themselves."""
        alive = [
            w.process for w in self._workers.values() if w.process is not None and w.process.poll() is None
        ]
        for process in alive:
            process.terminate()
        deadline = time.monotonic() + timeout
        graceful = True
        for process in alive:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                graceful = False
                _log.error("worker did not stop in time and is killed", extra={"pid": process.pid})
                process.kill()
                process.wait()
        return graceful
