"""Starting, stopping and looking at a daemon from another process: what `syncctl daemon` does."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGTERM

from vsql_ctl.daemon import state as disk
from vsql_ctl.daemon.logfile import RotatingFile, last_lines
from vsql_ctl.daemon.state import DaemonState
from vsql_ctl.daemon.supervisor import Plan, Supervisor
from vsql_ctl.services import SERVICES, service_command
from vsql_shared.config import Settings
from vsql_shared.errors import EnvironmentFault, RefusedError

# A service that ends at once has usually said why within this time.
_SETTLE_SECONDS = 2.0
_START_SECONDS = 20.0
_LOOK_SECONDS = 0.1
# Beyond server.stop_timeout: what the daemon itself needs to kill and to write its last state.
_STOP_GRACE_SECONDS = 10.0


def plan_of(settings: Settings, *, to_files: bool) -> Plan:
    """What the daemon of these settings runs."""
    return Plan(
        folder=settings.state_dir(),
        source=str(settings.source) if settings.source else "environment",
        commands={name: service_command(name, settings.source) for name in SERVICES},
        stop_seconds=settings.server.stop_timeout.total_seconds(),
        backoff_seconds=settings.limits.retry_backoff_ms / 1000,
        backoff_max_seconds=settings.limits.retry_backoff_max_ms / 1000,
        log_max_bytes=settings.log.file_max_bytes,
        log_keep=settings.log.file_keep,
        to_files=to_files,
    )


def run_here(plan: Plan) -> int:
    """Be the daemon until stopped; returns its exit code."""
    disk.prepare(plan.folder)
    with disk.exclusive(plan.folder):
        return Supervisor(plan).run()


def start_in_background(settings: Settings) -> DaemonState:
    """Start a daemon of its own session and wait until both services run or one says why not."""
    folder = settings.state_dir()
    disk.prepare(folder)
    if disk.is_held(folder):
        raise disk.already_running(folder)
    command = [sys.executable, "-P", "-m", "vsql_ctl.daemon"]
    if settings.source is not None:
        command.append(str(settings.source.absolute()))
    log = folder / "daemon.log"
    RotatingFile(log, max_bytes=settings.log.file_max_bytes, keep=settings.log.file_keep).close()
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    return _settled(process, folder)


def _settled(process: subprocess.Popen[bytes], folder: Path) -> DaemonState:
    """Wait for the daemon's word on both services."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        found = disk.read(folder)
        ours = found if found is not None and found.pid == process.pid else None
        if process.poll() is not None:
            raise _did_not_start(ours, folder, process.returncode)
        if ours is not None and any(service.state == "failed" for service in ours.services.values()):
            return ours
        if ours is not None and _is_settled(ours):
            return ours
        time.sleep(_LOOK_SECONDS)
    raise EnvironmentFault("the daemon did not report within 20 s", hint=f"see {folder / 'daemon.log'}")


def _is_settled(state: DaemonState) -> bool:
    now = time.time()
    return len(state.services) == len(SERVICES) and all(
        service.state == "waiting" or (service.state == "running" and now - service.since >= _SETTLE_SECONDS)
        for service in state.services.values()
    )


def _did_not_start(state: DaemonState | None, folder: Path, code: int) -> EnvironmentFault:
    """The words of whoever ended first."""
    failed = [name for name, service in (state.services if state else {}).items() if service.last_exit]
    name = failed[0] if failed else "daemon"
    said = last_lines(folder / f"{name}.log")
    error = EnvironmentFault(
        "\n  ".join([f"the {name} ended with exit code {code}:", *said]), hint=f"logs are in {folder}"
    )
    error.exit_code = code if code > 0 else EnvironmentFault.exit_code
    return error


@dataclass(frozen=True)
class Stopped:
    """How a daemon ended."""

    killed: list[str]
    """Services that had to be killed; the daemon itself is "daemon"."""


def stop(
    folder: Path,
    stop_seconds: float,
    waiting: Callable[[float], None],
    *,
    grace_seconds: float = _STOP_GRACE_SECONDS,
) -> Stopped:
    """Ask the daemon of a state folder to stop and wait; `waiting` is told the seconds so far.

    A daemon that has not ended `grace_seconds` after its services should have is killed, and they too.
    """
    found = disk.read(folder)
    if not disk.is_held(folder) or found is None:
        raise RefusedError("no daemon of this node runs", hint="start one with `syncctl daemon start`")
    if not found.process.send(SIGTERM):
        raise RefusedError(
            f"the daemon's lock in {folder} is held by another process than daemon.json names",
            hint="a daemon is just starting or ending: try again in a moment",
        )
    began = time.monotonic()
    limit = stop_seconds + grace_seconds
    while found.process.is_running():
        seconds = time.monotonic() - began
        if seconds > limit:
            return Stopped(_kill_all(folder, found))
        waiting(seconds)
        time.sleep(_LOOK_SECONDS)
    last = disk.read(folder)
    return Stopped(last.killed if last is not None and last.pid == found.pid else [])


def _kill_all(folder: Path, daemon: DaemonState) -> list[str]:
    """A daemon that does not answer: end it, then the services it leaves."""
    daemon.process.send(SIGKILL)
    killed = ["daemon"]
    for name, service in (disk.read(folder) or daemon).services.items():
        process = service.process()
        if process is not None and process.send(SIGKILL):
            killed.append(name)
    return killed


def look(folder: Path) -> DaemonState | None:
    """The state of the daemon that runs in a state folder; None when none does."""
    return disk.read(folder) if disk.is_held(folder) else None
