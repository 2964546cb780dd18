"""The daemon's loop: start each service, start it again when it ends, stop them together.

One thread, driven by the services' output, their ends and our signals. Rules:

1. A service that ends is started again after a pause that doubles up to a bound; one that ran well for a
   while begins with the shortest pause again.
2. A service that ends because its command or configuration is wrong (exit codes 2 and 3) is not started
   again: nothing changes by waiting. When all services failed so, the daemon ends with that code. One that is
   refused (4) is started again: after a crash the server may hold the old one's session for a while yet.
3. SIGTERM and SIGINT stop: each service gets SIGTERM and the time of server.stop_timeout to finish its
   batch; then its whole process group is killed, and the state says so.
4. A service dies with its daemon (Linux): a killed daemon leaves no service without a supervisor.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from vsql_ctl.daemon import state as disk
from vsql_ctl.daemon.identity import ProcessId
from vsql_ctl.daemon.logfile import RotatingFile
from vsql_ctl.daemon.state import DaemonState, ServiceState
from vsql_shared.errors import ConfigError, EnvironmentFault, UserError
from vsql_shared.observe.process import die_with_parent

_FATAL = frozenset({UserError.exit_code, ConfigError.exit_code})
_WELL_SECONDS = 60.0
_READ_BYTES = 64 * 1024
_TICK_SECONDS = 0.5


@dataclass(frozen=True)
class Plan:
    """What the daemon runs and within which bounds."""

    folder: Path
    source: str
    commands: dict[str, list[str]]
    stop_seconds: float
    backoff_seconds: float = 1.0
    backoff_max_seconds: float = 60.0
    log_max_bytes: int = 10 * 2**20
    log_keep: int = 5
    to_files: bool = True
    """False in the foreground: the services write to our own standard error."""


class _Service:
    """One service: its process, its output, and when it is started next."""

    def __init__(self, name: str, command: Sequence[str], state: ServiceState) -> None:
        self.name = name
        self.command = command
        self.state = state
        self.process: subprocess.Popen[bytes] | None = None
        self.output: IO[bytes] | None = None
        self.log: RotatingFile | None = None
        self.next_start = 0.0
        self.pause = 0.0


class Supervisor:
    """Runs a plan until it is told to stop. `run()` returns the exit code."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        me = ProcessId.of(os.getpid())
        if me is None:
            raise EnvironmentFault("the start time of this process cannot be read", hint="is /proc mounted?")
        self._state = DaemonState(me.pid, me.started, time.time(), plan.source)
        self._services = [self._new(name, command) for name, command in plan.commands.items()]
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._stop_asked = False
        self._log = self._open_log("daemon")

    def _new(self, name: str, command: Sequence[str]) -> _Service:
        state = self._state.services.setdefault(name, ServiceState())
        return _Service(name, command, state)

    def _open_log(self, name: str) -> RotatingFile | None:
        if not self._plan.to_files:
            return None
        path = self._plan.folder / f"{name}.log"
        return RotatingFile(path, max_bytes=self._plan.log_max_bytes, keep=self._plan.log_keep)

    def run(self) -> int:
        """Start the services and watch them; returns when all have stopped."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # only to wake the loop
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._say(f"daemon started, process {self._state.pid}, configuration {self._plan.source}")
        try:
            while not self._stop_asked and not self._all_failed():
                self._start_due()
                self._wait(_TICK_SECONDS)
                self._reap()
            return 0 if self._stop_asked else self._failed_code()
        finally:
            self._stop()

    def _on_stop(self, *_: object) -> None:
        self._stop_asked = True

    def _all_failed(self) -> bool:
        return all(service.state.state == "failed" for service in self._services)

    def _failed_code(self) -> int:
        return next((service.state.last_exit or 1 for service in self._services), 1)

    def _start_due(self) -> None:
        """Start every service whose time has come."""
        now = time.monotonic()
        for service in self._services:
            if service.process is None and service.state.state != "failed" and now >= service.next_start:
                self._start(service)
                self._write()

    def _start(self, service: _Service) -> None:
        """Start one service in a session of its own: a terminal's Ctrl-C is ours to pass on."""
        to_files = self._plan.to_files
        try:
            process = subprocess.Popen(
                service.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if to_files else None,
                stderr=subprocess.STDOUT if to_files else None,
                start_new_session=True,
                preexec_fn=partial(_in_child, os.getpid()),  # noqa: PLW1509 - this process has one thread
            )
        except OSError as error:  # no memory or no process left: as if it had ended at once
            self._say(f"{service.name} cannot be started: {error.strerror}")
            self._ended(service, EnvironmentFault.exit_code)
            return
        service.process = process
        if process.stdout is not None:
            service.output = process.stdout
            os.set_blocking(process.stdout.fileno(), False)
            service.log = service.log or self._open_log(service.name)
            self._selector.register(process.stdout, selectors.EVENT_READ, service)
        identity = ProcessId.of(process.pid)
        service.state.state = "running"
        service.state.pid = process.pid
        service.state.process_started = identity.started if identity else ""
        service.state.since = time.time()
        self._say(f"{service.name} started, process {process.pid}")

    def _wait(self, seconds: float) -> None:
        """Wait for output, a signal or the time; copy output to the logs."""
        for key, _ in self._selector.select(seconds):
            if isinstance(key.data, _Service):
                self._copy(key.data)
            else:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, _READ_BYTES)

    def _copy(self, service: _Service) -> None:
        """Move what the service wrote into its log; at the end of its output, stop listening."""
        if service.output is None or service.log is None:
            return
        try:
            data = os.read(service.output.fileno(), _READ_BYTES)
        except BlockingIOError:
            return
        if data:
            service.log.write(data)
        else:
            self._close_output(service)

    def _close_output(self, service: _Service) -> None:
        if service.output is not None:
            self._selector.unregister(service.output)
            service.output.close()
            service.output = None

    def _reap(self) -> None:
        """Take note of services that ended, and decide when they start again."""
        for service in self._services:
            if service.process is not None and service.process.poll() is not None:
                code = service.process.returncode
                self._drain(service)
                self._ended(service, code)
                self._write()

    def _drain(self, service: _Service) -> None:
        """The last words first: they say why it ended. Bounded, since a grandchild may hold the pipe."""
        for _ in range(64):
            if service.output is None or not self._readable(service.output):
                break
            self._copy(service)
        self._close_output(service)

    def _readable(self, output: IO[bytes]) -> bool:
        with selectors.SelectSelector() as look:
            look.register(output, selectors.EVENT_READ)
            return bool(look.select(0))

    def _ended(self, service: _Service, code: int) -> None:
        service.process = None
        service.state.pid = None
        service.state.last_exit = code
        service.state.state = "stopped"
        if self._stop_asked:
            self._say(f"{service.name} stopped with exit code {code}")
            return
        if code in _FATAL:
            service.state.state = "failed"
            self._say(f"{service.name} ended with exit code {code}: not started again until this is mended")
            return
        well = time.time() - service.state.since >= _WELL_SECONDS
        longer = min(max(service.pause * 2, self._plan.backoff_seconds), self._plan.backoff_max_seconds)
        service.pause = self._plan.backoff_seconds if well else longer
        service.next_start = time.monotonic() + service.pause
        service.state.state = "waiting"
        service.state.restarts += 1
        self._say(f"{service.name} ended with exit code {code}; starts again in {service.pause:.1f} s")

    def _stop(self) -> None:
        """Rule 3."""
        self._stop_asked = True
        for service in self._services:
            if service.process is not None:
                service.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self._plan.stop_seconds
        while any(service.process for service in self._services) and time.monotonic() < deadline:
            self._wait(min(_TICK_SECONDS, max(0.0, deadline - time.monotonic())))
            self._reap()
        for service in self._services:
            if service.process is not None:
                self._say(f"{service.name} did not stop within {self._plan.stop_seconds:.0f} s and is killed")
                self._state.killed.append(service.name)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(service.process.pid, signal.SIGKILL)
                service.process.wait()
        self._reap()
        self._write()
        self._say("daemon stopped")

    def _write(self) -> None:
        """Show the state to others; a full disk must not end the services."""
        try:
            disk.write(self._plan.folder, self._state)
        except OSError as error:
            self._say(f"the state file cannot be written: {error.strerror}")

    def _say(self, text: str) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} {text}\n"
        if self._log is not None:
            self._log.write(line.encode())
        else:
            with contextlib.suppress(OSError):
                sys.stderr.write(line)
                sys.stderr.flush()


def _in_child(daemon: int) -> None:
    """In a service, before it begins: rule 4."""
    die_with_parent(signal.SIGTERM, daemon)
