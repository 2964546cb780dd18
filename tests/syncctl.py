"""`syncctl` for tests, without importing it each time: a process that has, and forks for every command.

    done = syncctl("--config", path, "status")      # as subprocess.run(…, capture_output=True, text=True)

Each command is a process of its own, runs the program's own `main` and ends with its exit code; what it saves
is half a second of imports, of which a run of all tests would need hours. Where a test is about the process
itself (its start, its terminal, its signals) it starts `python -m vsql_ctl`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

_WHEN_RUN = ("confluent_kafka", "psycopg", "vsql_shared.config", "vsql_shared.pg.peers")
"""What commands import when they run."""
_ANSWER_SECONDS = 60.0
"""Beyond a command's own time: the forker is at work or gone."""


def syncctl(
    *args: str, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 180
) -> subprocess.CompletedProcess[str]:
    """Run one command line. Raises subprocess.TimeoutExpired."""
    if os.environ.get("COVERAGE_RUN") or "coverage" in sys.modules:
        return _started(args, env, cwd, timeout)
    with tempfile.TemporaryDirectory() as folder:
        given = dict(os.environ if env is None else env)
        where = str(cwd or Path.cwd())
        code = _forker(os.getpid()).run(args, timeout, env=given, cwd=where, folder=folder)
        texts = [Path(folder, name).read_text(errors="replace") for name in ("out", "err")]
    return subprocess.CompletedProcess(["syncctl", *args], code, *texts)


def _started(
    args: tuple[str, ...], env: Mapping[str, str] | None, cwd: Path | None, timeout: float
) -> subprocess.CompletedProcess[str]:
    """The plain way: coverage follows processes that are started, not those that are forked here."""
    return subprocess.run(
        [sys.executable, "-m", "vsql_ctl", *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        env=None if env is None else dict(env),
        cwd=cwd,
        check=False,
    )


@cache
def _forker(_owner: int) -> _Forker:
    return _Forker()


class _Forker:
    """The process, and the answers of its children by their numbers."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.syncctl"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd=Path(__file__).parents[1],
        )
        self._lock = threading.Condition()
        self._codes: dict[int, int] = {}
        self._number = 0
        threading.Thread(target=self._listen, daemon=True, name="forker").start()

    def run(self, args: tuple[str, ...], timeout: float, **how: Any) -> int:
        """The exit code of one command; `how`: the child's env, cwd, and the folder of its output."""
        asked: dict[str, Any] = {"args": args, "timeout": timeout, **how}
        with self._lock:
            self._number += 1
            mine = asked["number"] = self._number
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            self._lock.wait_for(lambda: mine in self._codes, timeout + _ANSWER_SECONDS)
            code = self._codes.pop(mine, -signal.SIGALRM)
        if code == -signal.SIGALRM:
            raise subprocess.TimeoutExpired(["syncctl", *args], timeout)
        return code

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            number, code = map(int, line.split())
            with self._lock:
                self._codes[number] = code
                self._lock.notify_all()


def _serve() -> None:
    """Read commands from standard input, one JSON object a line; answer `number code` as each child ends."""
    from vsql_ctl.cli import COMMANDS, command_named

    for name in COMMANDS:
        command_named(name)
    for module in _WHEN_RUN:
        importlib.import_module(module)
    gc.freeze()
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
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                asked = json.loads(line)
                running[_fork(asked, {reader, writer})] = asked["number"]
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                print(running.pop(found[0]), os.waitstatus_to_exitcode(found[1]), flush=True)


def _fork(asked: dict[str, Any], ours: set[int]) -> int:
    """Start one command in a child, which never returns."""
    child = os.fork()
    if child:
        return child
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.alarm(max(1, int(asked["timeout"])))
    for fd in ours:
        os.close(fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(asked["folder"], name), os.O_WRONLY | os.O_CREAT, 0o600), fd)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.argv = ["syncctl", *asked["args"]]
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


if __name__ == "__main__":
    _serve()
