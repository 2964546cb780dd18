"""`syncctl` for tests, without importing it each time: forked from a process that has (forker.py).

    done = syncctl("--config", path, "status")      # as subprocess.run(…, capture_output=True, text=True)

Each command is a process of its own, runs the program's own `main` and ends with its exit code; what it saves
is half a second of imports, of which a run of all tests would need hours. Where a test is about the process
itself (its start, its terminal, its signals) it starts `python -m vsql_ctl`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.forker import fork, is_plain


def syncctl(
    *args: str, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 180
) -> subprocess.CompletedProcess[str]:
    """Run one command line. Raises subprocess.TimeoutExpired."""
    if is_plain():
        return _started(args, env, cwd, timeout)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        given = dict(os.environ if env is None else env)
        command = fork("vsql_ctl", args, env=given, cwd=cwd, out=out, err=err, seconds=timeout)
        code = command.wait()
        texts = [path.read_text(errors="replace") for path in (out, err)]
    if code == -signal.SIGALRM:
        raise subprocess.TimeoutExpired(["syncctl", *args], timeout)
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
