"""What is done to a scene: kinds of faults, a plan of them made from a seed, and the player of a plan.

Rules: a fault that was begun is ended, whatever happens in between; two faults that last never hold one part
at a time; whether a plan is followed to its end depends on the clock, what comes next never does.
"""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import psutil
from typing_extensions import override

from tests.chaos.proxy import Proxy, Side
from tests.nodes import Node, start_service
from tests.stack import KafkaBroker, PostgresServer, kill_tree

Processes = Callable[[], Sequence[psutil.Process]]


class Fault(ABC):
    """One kind of trouble with one part. The name is its kind, in one word, and the part."""

    def __init__(self, kind: str, part: str) -> None:
        self.name, self.part = f"{kind} {part}", part

    @abstractmethod
    def start(self) -> bool:
        """Begin; False where nothing was there to be hit."""

    def end(self) -> None:  # noqa: B027 - a kill has no end: whoever watches the process starts another
        """Mend it."""


class Kill(Fault):
    """kill -9 of processes that somebody starts again."""

    def __init__(self, part: str, processes: Processes) -> None:
        super().__init__("kill", part)
        self._processes = processes

    @override
    def start(self) -> bool:
        found = self._processes()
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return bool(found)


class Freeze(Fault):
    """SIGSTOP, and SIGCONT at the end: connections stay, and nobody answers."""

    def __init__(self, part: str, processes: Processes) -> None:
        super().__init__("freeze", part)
        self._processes, self._frozen = processes, list[psutil.Process]()

    @override
    def start(self) -> bool:
        self._frozen = list(self._processes())
        self._send(signal.SIGSTOP)
        return bool(self._frozen)

    @override
    def end(self) -> None:
        self._send(signal.SIGCONT)

    def _send(self, what: signal.Signals) -> None:
        for process in self._frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(what)


class Down(Fault):
    """A server that is ended in some way, and started again."""

    def __init__(self, kind: str, part: str, stop: Callable[[], None], start: Callable[[], None]) -> None:
        super().__init__(kind, part)
        self._stop, self._start = stop, start

    @override
    def start(self) -> bool:
        self._stop()
        return True

    @override
    def end(self) -> None:
        self._start()


class Network(Fault):
    """A bad network between a service and a server."""

    def __init__(self, kind: str, part: str, proxy: Proxy, begin: Callable[[], None]) -> None:
        super().__init__(kind, part)
        self._proxy, self._begin = proxy, begin

    @override
    def start(self) -> bool:
        self._begin()
        return True

    @override
    def end(self) -> None:
        self._proxy.heal()


class Second(Fault):
    """Another worker of a stream that has one: it waits, or takes over when the first one dies."""

    def __init__(self, part: str, node: Node, chain: str) -> None:
        super().__init__("second", part)
        self._node, self._chain = node, chain
        self._process: subprocess.Popen[bytes] | None = None

    @override
    def start(self) -> bool:
        node, words = self._node, ["--config", str(self._node.config), "--chain", self._chain]
        self._process = start_service(self.part, words, log=node.log_file(f"second-{self.part}"), env={})
        return True

    @override
    def end(self) -> None:
        if self._process is not None:
            kill_tree(self._process)


def of_service(node: Node, role: str, chain: str) -> list[Fault]:
    """What befalls a service, its workers and the daemon above it."""

    def found(worker: bool) -> list[psutil.Process]:
        return [one for one in node.processes(role) if ("--chain" in _command(one)) is worker]

    def kill_daemon() -> None:
        node.services["daemon"].kill()

    def start_daemon() -> None:
        node.services.pop("daemon").wait()
        node.start_daemon()

    return [
        Kill(f"{role}-service", lambda: found(False)),
        Kill(f"{role}-worker", lambda: found(True)),
        Freeze(role, lambda: node.processes(role)),
        Down("kill", f"{role}-daemon", kill_daemon, start_daemon),
        Second(role, node, chain),
    ]


def of_postgres(part: str, server: PostgresServer) -> list[Fault]:
    """What befalls a database."""
    return [
        Down("crash", part, server.kill, server.start),
        Down("immediate-stop", part, lambda: server.stop("immediate"), server.start),
        Freeze(part, lambda: _tree(server.pid)),
    ]


def of_kafka(part: str, broker: KafkaBroker) -> list[Fault]:
    """What befalls a broker."""
    return [Down("crash", part, broker.kill, broker.start), Freeze(part, lambda: _tree(broker.pid))]


def of_network(part: str, proxy: Proxy) -> list[Fault]:
    """Everything a proxy can do."""

    def half(keep: Side) -> Callable[[], None]:
        return lambda: proxy.half_open(keep)

    return [
        Network("cut", part, proxy, proxy.cut),
        Network("stall", part, proxy, proxy.stall),
        Network("slow", part, proxy, lambda: proxy.delay(0.2)),
        # The side that is named believes the connection to be alive.
        Network("half-open-client", part, proxy, half("client")),
        Network("half-open-server", part, proxy, half("server")),
    ]


def _command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return process.cmdline()
    return []


def _tree(pid: int | None) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        if pid is not None:
            root = psutil.Process(pid)
            return [root, *root.children(recursive=True)]
    return []


class Step(NamedTuple):
    """Begin a fault at a second, and end it so many seconds later."""

    at: float
    fault: str
    lasts: float


_LASTS = (0.2, 1.0, 1.0, 3.0, 3.0, 6.0, 12.0)
"""Seconds: from a blink to longer than the servers' own timeouts in a scene."""


def plan(seed: int, seconds: float, names: Iterable[str]) -> list[Step]:
    """A mix of faults: every kind once, in random order, before one comes again."""
    rng, ordered = random.Random(seed), sorted(names)
    steps: list[Step] = []
    left: list[str] = []
    at = rng.uniform(0.5, 2)
    while at < seconds:
        left = left or rng.sample(ordered, len(ordered))
        steps.append(Step(round(at, 1), left.pop(), rng.choice(_LASTS)))
        at += rng.uniform(0.3, 4)
    return steps


def play(
    steps: Sequence[Step], faults: Mapping[str, Fault], seconds: float, say: Callable[[str], None]
) -> Counter[str]:
    """Do what is planned, for so many seconds; returns how often each fault was begun. Ends all of them."""
    began, done = time.monotonic(), Counter[str]()
    active: dict[str, tuple[float, Fault]] = {}

    def now() -> float:
        return time.monotonic() - began

    def end(part: str) -> None:
        _, fault = active.pop(part)
        say(f"{now():6.1f} end   {fault.name}")
        fault.end()

    def wait(moment: float) -> None:
        while active and (first := min(active, key=lambda part: active[part][0])) is not None:
            if active[first][0] > moment:
                break
            time.sleep(max(0.0, active[first][0] - now()))
            end(first)
        time.sleep(max(0.0, moment - now()))

    try:
        for step in steps:
            wait(step.at)
            if now() > seconds:
                break
            fault = faults[step.fault]
            if fault.part in active:
                end(fault.part)
            active[fault.part] = (now() + step.lasts, fault)
            say(f"{now():6.1f} begin {fault.name}, for {step.lasts} s")
            done[fault.name] += fault.start()
        wait(seconds)
    finally:
        for part in list(active):
            end(part)
    return done
