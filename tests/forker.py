"""Programs of ours for tests, without importing them each time: a process that has forks at every start.

    process = fork("vsql_producers", ["--config", path], env=os.environ, out=log, err=log)

What is started is a process of its own: its pid, session, environment, folder, output and exit code are as
if `python -m PROGRAM` had been executed, and `ps` shows that. What it saves is half a second of imports, of
which a run of all tests would need hours. One forker per program, so that none has modules it would not
have; each is started at the first need, and ends with its test run. Not for a test about the process itself
(its start, its terminal), nor with an environment that libraries read when they are loaded.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from typing_extensions import override

from vsql_shared.observe import shared_metrics
from vsql_shared.observe.title import show_as

# What programs import when they run.
_MODULES = {
    "vsql_ctl": ("confluent_kafka", "psycopg", "vsql_shared.config", "vsql_shared.pg.peers"),
    "vsql_producers": ("vsql_producers.__main__", "vsql_producers.worker", "vsql_shared.observe.http"),
    "vsql_consumers": (
        "vsql_consumers.__main__",
        "vsql_consumers.worker",
        "vsql_consumers.member",
        "vsql_shared.observe.http",
    ),
}
_SERVICES = ("vsql_producers", "vsql_consumers")
_ANSWER_SECONDS = 60.0
"""Until a forker must have forked, and beyond a command's own time."""


def is_plain() -> bool:
    """Whether programs are executed: coverage does not follow forks; a demo is as at a user's."""
    return "pytest" not in sys.modules or bool(os.environ.get("COVERAGE_RUN")) or "coverage" in sys.modules


def fork(
    program: str,
    args: Sequence[str],
    *,
    env: Mapping[str, str],
    out: Path,
    err: Path,
    cwd: Path | None = None,
    seconds: float | None = None,
) -> Forked:
    """Start a program; after `seconds` it gets SIGALRM. Its output is appended to `out` and `err`."""
    asked = {"args": list(args), "env": dict(env), "out": str(out), "err": str(err), "seconds": seconds}
    return _forker(os.getpid(), program).start({**asked, "cwd": str(cwd or Path.cwd())})


@cache
def _forker(_owner: int, program: str) -> _Forker:
    return _Forker(program)


class Forked(subprocess.Popen[bytes]):
    """Looks like a child of this process; is one of the forker's."""

    def __init__(self, forker: _Forker, number: int, args: list[str]) -> None:
        self._forker, self._number, self.args = forker, number, args
        self.stdin = self.stdout = self.stderr = None
        self.returncode: int | None = None
        self.pid = 0

    @override
    def poll(self) -> int | None:
        return self._look(0)

    @override
    def wait(self, timeout: float | None = None) -> int:
        code = self._look(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    @override
    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sig)

    def _look(self, seconds: float | None) -> int | None:
        if self.returncode is None:
            self.returncode = self._forker.code(self._number, seconds)
        return self.returncode

    @override
    def __del__(self, *_: object) -> None:
        """Nothing to reap."""


class _Forker:
    """The process, and what it told of its children by their numbers."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forker", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd=Path(__file__).parents[1],
        )
        self._lock = threading.Condition()
        self._pids: dict[int, int] = {}
        self._codes: dict[int, int] = {}
        self._count = 0
        self._gone = False
        threading.Thread(target=self._listen, daemon=True, name="forker").start()

    def start(self, asked: dict[str, Any]) -> Forked:
        """Start one, and wait until it is there."""
        with self._lock:
            self._count += 1
            mine = self._count
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({**asked, "number": mine}) + "\n")
            self._process.stdin.flush()
            self._lock.wait_for(lambda: mine in self._pids or self._gone, _ANSWER_SECONDS)
            forked = Forked(self, mine, [sys.executable, "-m", self._program, *asked["args"]])
            forked.pid = self._pids.pop(mine)
        return forked

    def code(self, number: int, seconds: float | None) -> int | None:
        """The exit code, within so many seconds or whenever it comes."""
        with self._lock:
            if not self._lock.wait_for(lambda: number in self._codes or self._gone, seconds):
                return None
            # A forker that is gone was ended with the test run, and tells no codes.
            return self._codes.pop(number, -signal.SIGKILL)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            what, number, value = line.split()
            with self._lock:
                (self._pids if what == "pid" else self._codes)[int(number)] = int(value)
                self._lock.notify_all()
        with self._lock:
            self._gone = True
            self._lock.notify_all()


def _serve(program: str) -> dict[str, Any] | None:
    """Read orders from standard input, one JSON object a line; returns its order in each child, else None.

    Each child says `pid number PID` when it looks like the program; then follows `code number CODE`.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    chooser, running, rest = selectors.DefaultSelector(), dict[int, int](), b""
    chooser.register(0, selectors.EVENT_READ)
    chooser.register(reader, selectors.EVENT_READ)
    while True:
        for key, _ in chooser.select():
            if key.fd == reader:
                os.read(reader, 4096)
                continue
            data = os.read(0, 1 << 16)
            if not data:
                return None
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                asked = json.loads(line)
                child = os.fork()
                if not child:
                    chooser.close()
                    _become(program, asked, (reader, writer))
                    return dict(asked)
                running[child] = asked["number"]
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                print("code", running.pop(found[0]), os.waitstatus_to_exitcode(found[1]), flush=True)


def _become(program: str, asked: dict[str, Any], ours: tuple[int, int]) -> None:
    """Be in the child as if it had been executed."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if asked["seconds"] is not None:
        signal.alarm(max(1, int(asked["seconds"])))
    if program in _SERVICES:
        os.setsid()
    for fd in ours:
        os.close(fd)
    told = os.dup(1)
    places = [os.open(os.devnull, os.O_RDONLY)]
    places += [os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) for name in ("out", "err")]
    for number, place in enumerate(places):
        os.dup2(place, number)
        os.close(place)
    os.chdir(asked["cwd"])
    kept = {name: os.environ[name] for name in (shared_metrics.DIRECTORY_VARIABLE,) if name in os.environ}
    os.environ.clear()
    os.environ.update(kept | asked["env"])
    sys.argv = ["syncctl" if program == "vsql_ctl" else program, *asked["args"]]
    show_as([sys.executable, "-m", program, *asked["args"]])
    os.write(told, f"pid {asked['number']} {os.getpid()}\n".encode())
    os.close(told)


def _import(program: str) -> None:
    for module in _MODULES[program]:
        importlib.import_module(module)
    if program == "vsql_ctl":
        from vsql_ctl.cli import COMMANDS, command_named

        for name in COMMANDS:
            command_named(name)
    gc.collect()
    gc.freeze()


def _run_syncctl() -> None:
    """Run the command, and end without taking all of the modules down again."""
    code = 70
    try:
        from vsql_ctl.cli import main

        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _main(program: str) -> None:
    scratch = ""
    if program in _SERVICES:
        # Metrics decide at import to live in files; a service says later in which, a lone worker's are here.
        scratch = os.environ[shared_metrics.DIRECTORY_VARIABLE] = tempfile.mkdtemp(prefix="forker-")
    _import(program)
    if (asked := _serve(program)) is None:
        shutil.rmtree(scratch, ignore_errors=True)
    elif program == "vsql_ctl":
        _run_syncctl()
    else:
        sys.exit(importlib.import_module(f"{program}.__main__").main(asked["args"]))


if __name__ == "__main__":
    _main(sys.argv[1])
