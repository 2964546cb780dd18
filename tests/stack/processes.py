"""Processes that never outlive the test run which started them.

`spawn` starts a program in a session of its own (Ctrl-C reaches only the test run, which then stops its
servers in order) and tells the watchdog (`guard`) of it. Tests start producers and consumers with it too.
A parent-death signal would need code between fork and exec, which is unsafe beside the threads of the
Kafka client, and would fire when the starting thread ends; so a pipe tells of the run's death.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pwd
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil


def spawn(
    command: Sequence[str | Path],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    user: str | None = None,
    cwd: Path | None = None,
    last_signal: signal.Signals = signal.SIGTERM,
    detached: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a program, with its output appended to `log`, that ends when this process does.

    `env` is added to this process's environment; `last_signal` is what the watchdog sends when this process
    is gone; `detached` processes are not watched and stay.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            start_new_session=True,
            user=user,
            group=_group_of(user),
            extra_groups=[] if user else None,
        )
    if not detached:
        watch(process, last_signal)
    return process


def watch(process: subprocess.Popen[bytes], last_signal: signal.Signals = signal.SIGTERM) -> None:
    """Have the watchdog end a process when this one is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        start = psutil.Process(process.pid).create_time()
        _watchdog.order({"pid": process.pid, "start": start, "signal": int(last_signal)})


def forget(process: subprocess.Popen[bytes]) -> None:
    """Tell the watchdog that a process has ended."""
    _watchdog.order({"pid": process.pid})


def remove_at_death(folder: Path) -> None:
    """Have the watchdog remove a folder when this process dies before it did so itself."""
    _watchdog.order({"folder": str(folder), "keep": False})


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a process and all it started, at once, and wait until they are gone."""
    members: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        members = [root, *root.children(recursive=True)]
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(_lives(member) for member in members[1:]):
        time.sleep(0.02)
    forget(process)


def _lives(process: psutil.Process) -> bool:
    """Say whether a process still holds files and memory; one that only waits to be reaped does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def tail(log: Path, lines: int = 15) -> str:
    """Return a log's last lines, for an error message."""
    if not log.is_file():
        return "(no log)"
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _group_of(user: str | None) -> int | None:
    if user is None:
        return None
    return pwd.getpwnam(user).pw_gid


class _Watchdog:
    """The one watchdog of this process, started at the first order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def order(self, order: dict[str, object]) -> None:
        """Tell it of a process or folder."""
        with self._lock:
            # A forked child inherits the parent's handle but must have a watchdog of its own.
            if self._process is None or self._owner != os.getpid():
                self._process = subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name("guard.py"))],
                    stdin=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
                self._owner = os.getpid()
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(order) + "\n")
                self._process.stdin.flush()

    def close(self) -> None:
        """Let it finish its work before this process reports that it is done."""
        if self._process is None or self._owner != os.getpid() or self._process.stdin is None:
            return
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=30)


_watchdog = _Watchdog()
# Registered on import, so that it runs after what a `Stack` registers later to stop its servers in order.
atexit.register(_watchdog.close)
