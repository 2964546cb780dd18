"""Where workers come from: a process that has imported their modules, and forks (docs/design/0024).

    begun = begin("vsql_producers", ("vsql_producers.worker",), argv)
    if isinstance(begun, list): …this process is a worker, with these arguments…
    begun.start("pub.node-a", ["--chain", "pub.node-a"], {}).poll()

Not here: which workers there are, when they start again (workers.py), what they do. Rules:

1. The service forks the nursery at its very start: it has no thread, no settings, no key and no connection.
   The nursery gets none later either. It imports at the first order, and forks from its only thread.
2. A worker inherits standard input, output and error, and nothing else of the nursery: its ends are closed.
3. The nursery ends when the service does (the socket is closed, or the kernel kills it where it hangs), and
   then the kernel tells its workers (`die_with_parent`). A service whose nursery is gone ends, too.
4. SIGTERM and SIGINT are blocked in it: they are for the service and its workers, which get them unlost.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from vsql_shared.errors import EnvironmentFault, VsqlSyncError
from vsql_shared.observe.process import die_with_parent
from vsql_shared.observe.title import show_as

_log = logging.getLogger(__name__)

# One message is one JSON object; the kernel keeps their bounds.
_MESSAGE_MAX = 1 << 16
_ENDS_WITHIN_SECONDS = 5.0
_FOR_WORKERS = (signal.SIGTERM, signal.SIGINT)


class NurseryGoneError(VsqlSyncError):
    """The process that workers are forked from has ended."""


class Child:
    """A worker, with those parts of subprocess.Popen that its supervisor needs."""

    def __init__(self, nursery: Nursery, number: int, name: str) -> None:
        self._nursery, self._number, self.name = nursery, number, name
        self.pid: int | None = None
        """None until the nursery has told."""
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        self._nursery.listen()
        return self.returncode

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within that time."""
        until = time.monotonic() + seconds
        while self.poll() is None and (left := until - time.monotonic()) > 0:
            self._nursery.listen(left)
        return self.returncode is not None

    def send_signal(self, number: signal.Signals) -> None:
        """By the nursery: it knows whether the process id is still this worker's."""
        if self.returncode is None:
            self._nursery.order({"signal": int(number), "number": self._number})


class Nursery:
    """The service's side."""

    def __init__(self, end: socket.socket, pid: int) -> None:
        self._end, self.pid = end, pid
        self._end.setblocking(False)
        self._children: dict[int, Child] = {}
        self._count = 0

    def start(self, name: str, argv: Sequence[str], env: Mapping[str, str]) -> Child:
        """Order a worker; `env` is added to the service's environment. Raises OSError as `order` does."""
        self._count += 1
        self.order({"argv": list(argv), "env": dict(env), "number": self._count})
        return self._children.setdefault(self._count, Child(self, self._count, name))

    def order(self, order: dict[str, object]) -> None:
        """Send one message. Raises OSError where it is too long, or the nursery does not read."""
        message = json.dumps(order).encode()
        if len(message) > _MESSAGE_MAX:
            raise OSError(0, "its arguments are too long")
        try:
            self._end.send(message)
        except (BrokenPipeError, ConnectionError) as error:
            raise _gone() from error

    def listen(self, seconds: float = 0.0) -> None:
        """Take in what the nursery has told, waiting so long for the first of it."""
        while select.select([self._end], [], [], seconds)[0]:
            seconds = 0.0
            told = _receive(self._end)
            if told is None:
                raise _gone()
            child = self._children[told["number"]]
            if "pid" in told:
                child.pid = told["pid"]
                _log.info("worker started", extra={"stream": child.name, "pid": child.pid})
                continue
            if "why" in told:  # no memory or no process left: the other streams go on
                _log.error("worker cannot be started: %s", told["why"], extra={"stream": child.name})
            child.returncode = told["code"]
            del self._children[told["number"]]

    def close(self) -> None:
        """End it, and see its end, so that nothing outlives the service; say it where it is a strange one."""
        self._end.close()
        until = time.monotonic() + _ENDS_WITHIN_SECONDS
        with contextlib.suppress(ChildProcessError):
            while not (found := os.waitpid(self.pid, os.WNOHANG))[0] and time.monotonic() < until:
                time.sleep(0.01)
            if found[0] and (code := os.waitstatus_to_exitcode(found[1])):
                _log.error("the process that starts workers ended", extra={"pid": self.pid, "code": code})


def _gone() -> NurseryGoneError:
    return NurseryGoneError(
        "the process that starts workers has ended; they end too", hint="start the service again"
    )


def begin(package: str, modules: Sequence[str], argv: Sequence[str]) -> Nursery | list[str]:
    """Fork the nursery. Returns it in the service, and its arguments in each worker; never in the nursery."""
    service = os.getpid()
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_WORKERS)
        pid = os.fork()
    except OSError as error:
        raise EnvironmentFault(
            f"no process that starts workers can be had: {error.strerror}",
            hint="look at the limits of processes and memory of this container or user",
        ) from error
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_WORKERS)
        theirs.close()
        return Nursery(ours, pid)
    die_with_parent(signal.SIGKILL, service)
    ours.close()
    command = [sys.executable, "-m", package]
    show_as([*command, *argv, "(nursery)"])
    mine = _serve(theirs, modules)
    show_as([*command, *mine])
    return mine


def _serve(end: socket.socket, modules: Sequence[str]) -> list[str]:
    """Take orders until the service has ended; returns in each worker."""
    me, running = os.getpid(), dict[int, int]()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    while True:
        readable = select.select([end.fileno(), reader], [], [])[0]
        if reader in readable:
            os.read(reader, _MESSAGE_MAX)
            _tell_ends(end, running)
        if end.fileno() not in readable:
            continue
        order = _receive(end)
        if order is None:
            sys.exit(0)
        if "signal" in order:
            for pid in [pid for pid, number in running.items() if number == order["number"]]:
                os.kill(pid, order["signal"])
            continue
        os.environ.update(order["env"])
        _import(modules)  # not before: metrics decide by the environment where they live
        try:
            pid = os.fork()
        except OSError as error:
            _tell(end, {"number": order["number"], "code": os.EX_OSERR, "why": error.strerror})
            continue
        if not pid:
            break
        running[pid] = order["number"]
        _tell(end, {"number": order["number"], "pid": pid})
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for fd in (reader, writer):
        os.close(fd)
    end.close()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_WORKERS)
    return [*order["argv"], "--service-pid", str(me)]


def _import(modules: Sequence[str]) -> None:
    if all(name in sys.modules for name in modules) and gc.get_freeze_count():
        return
    for name in modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection would write to every object, and so copy what is shared


def _receive(end: socket.socket) -> dict[str, Any] | None:
    """The next message; None when the other side has ended, whether or not it had read all of ours."""
    with contextlib.suppress(ConnectionError):
        if message := end.recv(_MESSAGE_MAX):
            return dict(json.loads(message))
    return None


def _tell(end: socket.socket, told: dict[str, object]) -> None:
    # The service is gone: the next read says so. Any other error ends us: a worker whose end the service is
    # not told would stay away, and nobody would miss it.
    with contextlib.suppress(ConnectionError):
        end.send(json.dumps(told).encode())


def _tell_ends(end: socket.socket, running: dict[int, int]) -> None:
    """Reap what has ended."""
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        _tell(end, {"number": running.pop(pid), "code": os.waitstatus_to_exitcode(status)})
