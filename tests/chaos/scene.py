"""Servers of its own for fault runs, a proxy on each way to them, and one run from the seed to the verdict.

    with Scene(stack) as scene:
        result = scene.run(seed=7, seconds=60)      # raises nothing: `result.problem` says what was wrong

The servers serve several runs; each run has databases, topics and services of its own. After a run that
failed take another scene.

Rules: services reach every server through a proxy only, checks never do; the run's log says what was done at
which second, and ends with the services' own last lines where something was wrong.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil
import psycopg
from confluent_kafka.admin import AdminClient

from tests.chaos import checker, workload
from tests.chaos.faults import Fault, of_kafka, of_network, of_postgres, of_service, plan, play
from tests.chaos.privileged import FullDisk, SmallDisk, build_clock, clock_env, may_mount, of_clock
from tests.chaos.proxy import Proxy
from tests.nodes import Node, TwoNodes
from tests.stack import KafkaBroker, PostgresServer, Stack
from tests.stack.ports import reserve_port
from tests.stack.stack import drop_database
from tests.streams import cluster_topics

CONFIG = """
[limits]
batch_max_rows = 300
retry_backoff_max_ms = 2000
status_interval_ms = 500
command_poll_ms = 500
"""
"""Small batches, so that a transaction often needs several; and waits that are short beside a run."""
_LATE_SECONDS = 15.0
_POSTGRES = {"wal_sender_timeout": "10s"}


@dataclass
class Result:
    """What became of a run."""

    seed: int
    seconds: float
    faults: Counter[str] = field(default_factory=Counter)
    commits: int = 0
    snapshots: int = 0
    problem: str = ""


class Scene:
    """Two PostgreSQLs and a Kafka, reached through proxies.

    `small_disks`: Kafka and the target have disks of their own that can be filled, and that a backlog of
    minutes fills by itself.
    """

    def __init__(self, stack: Stack, version: int = 18, *, small_disks: bool = True) -> None:
        self._stack, self._folder = stack, stack.base_dir / f"scene-{time.monotonic_ns()}"
        self._folder.mkdir(mode=0o711)
        self._closing = ExitStack()
        self._disks: dict[str, SmallDisk] = {}
        self.missing: list[str] = []
        """What cannot be done here."""
        self._small_disks = small_disks and may_mount(self._folder)
        if small_disks and not self._small_disks:
            self.missing.append("full disks: only root may mount a tmpfs")
        self._clock_library = build_clock(self._folder)
        if self._clock_library is None:
            self.missing.append("wrong clocks: tests/chaos/clock.c needs cc, and glibc 2.30")
        self.source = PostgresServer(version, self._folder / "source", settings=_POSTGRES)
        self.target = PostgresServer(version, self._disk("target") / "data", settings=_POSTGRES)
        doors = {name: (reserve_port(), reserve_port()) for name in ("PRODUCER", "CONSUMER")}
        self.kafka = KafkaBroker(self._disk("kafka") / "data", doors=doors)
        for server in (self.source, self.target, self.kafka):
            self._closing.callback(server.remove)
            server.start()
        ways = {
            "producer-postgres": (reserve_port(), self.source.port),
            "consumer-postgres": (reserve_port(), self.target.port),
            "producer-kafka": doors["PRODUCER"][::-1],
            "consumer-kafka": doors["CONSUMER"][::-1],
        }
        self.proxies = {way: Proxy(*ports) for way, ports in ways.items()}
        for proxy in self.proxies.values():
            self._closing.callback(proxy.close)

    def _disk(self, name: str) -> Path:
        """A small disk of a server's own, or a folder where there is none."""
        folder = self._folder / f"disk-of-{name}"
        if not self._small_disks:
            folder.mkdir(mode=0o711)
            return folder
        self._disks[name] = SmallDisk(folder)
        self._closing.callback(self._disks[name].close)
        return folder

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the servers and delete what they hold."""
        self._closing.close()

    @contextmanager
    def pair(self) -> Iterator[TwoNodes]:
        """A new pair of nodes at work, whose services are gone at the end."""
        folder = self._folder / f"run-{time.monotonic_ns()}"
        folder.mkdir()
        conninfos = tuple(_new_database(server, folder.name) for server in (self.source, self.target))
        pair = TwoNodes(
            self._stack,
            folder,
            workload.TABLES_SQL,
            conninfos=(conninfos[0], conninfos[1]),
            kafka=self.kafka.bootstrap_servers,
            config=CONFIG,
        )
        for node, name in ((pair.a, "producer"), (pair.b, "consumer")):
            node.kafka = f"127.0.0.1:{self.proxies[f'{name}-kafka'].port}"
            node.service_port = self.proxies[f"{name}-postgres"].port
            if self._clock_library is not None:
                node.env = clock_env(self._clock_library, _clock(node))
        try:
            pair.create(workload.TABLES, copy=False)
            for node in (pair.a, pair.b):
                node.start_daemon()
            pair.wait_in_step()
            yield pair
            self._forget(pair)
        finally:
            pair.end()
            for process in _left(folder):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def _forget(self, pair: TwoNodes) -> None:
        """Make room: what a run that went well leaves in the servers is of no use."""
        drop_database(self.source.conninfo(), pair.folder.name)
        drop_database(self.target.conninfo(), pair.folder.name)
        bootstrap = self.kafka.bootstrap_servers
        topics = list(cluster_topics(bootstrap, pair.cluster))
        client = AdminClient({"bootstrap.servers": bootstrap})  # answers come while somebody holds it
        for answer in client.delete_topics(topics).values():
            answer.result(30)

    def faults(self, pair: TwoNodes) -> dict[str, Fault]:
        """Every kind of fault of this scene and a pair, by name."""
        made = [
            *of_service(pair.a, "producer", pair.chain),
            *of_service(pair.b, "consumer", pair.chain),
            *of_postgres("source", self.source),
            *of_postgres("target", self.target),
            *of_kafka("kafka", self.kafka),
        ]
        for part, server in (("target", self.target), ("kafka", self.kafka)):
            if part in self._disks:
                made.append(FullDisk(part, self._disks[part], server))
        for part, node in (("producer-clock", pair.a), ("consumer-clock", pair.b)):
            if node.env:
                made += of_clock(part, _clock(node))
        for way, proxy in self.proxies.items():
            made += of_network(way, proxy)
        return {fault.name: fault for fault in made}

    def run(self, seed: int, seconds: float) -> Result:
        """One run: faults under load, then everything is mended, comes in step and is checked."""
        result, log = Result(seed, seconds), list[str]()
        try:
            with self.pair() as pair:
                try:
                    self._run(pair, result, log)
                except Exception:
                    log += [f"--- {node.name}\n{node.tail('daemon', 40)}" for node in (pair.a, pair.b)]
                    raise
        except Exception as error:  # noqa: BLE001 - a run that fails is a result, too
            result.problem = "\n".join([f"{type(error).__name__}: {error}", *log])
        return result

    def _run(self, pair: TwoNodes, result: Result, log: list[str]) -> None:
        faults = self.faults(pair)
        steps = plan(result.seed, result.seconds, faults)
        with checker.under_load(pair, result.seed) as watch:
            result.faults = play(steps, faults, result.seconds, log.append)
            if any(name.startswith("disk-full") for name in result.faults):
                self._start_whoever_ends_late(log)
        result.commits, result.snapshots = len(watch.commits), watch.snapshots
        pair.stop()
        if left := _left(pair.folder):
            raise checker.CheckError(f"outlived their daemon: {[one.info['cmdline'] for one in left]}")

    def _start_whoever_ends_late(self, log: list[str]) -> None:
        """A server whose disk was full may end of it when there is room again."""
        until = time.monotonic() + _LATE_SECONDS
        while time.monotonic() < until:
            for server in (self.source, self.target, self.kafka):
                if server.pid is None:
                    log.append(f"{type(server).__name__} ended late, and is started")
                    server.start()
            time.sleep(0.5)


def _new_database(server: PostgresServer, name: str) -> str:
    with psycopg.connect(server.conninfo(), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return server.conninfo(name)


def _clock(node: Node) -> Path:
    """The file a node's services take their clock's offset from."""
    return node.folder / f"{node.name}.clock"


def _left(folder: Path) -> list[psutil.Process]:
    """Processes with a configuration in a folder."""
    every = psutil.process_iter(["cmdline"])
    return [one for one in every if any(str(folder) in word for word in one.info["cmdline"] or ())]
