"""A Kafka broker as a process: KRaft, one node, broker and controller in one JVM.

It is not the session's shared broker (`Stack.kafka` is); use it where a test stops, kills or configures
a broker of its own, or searches its files (`log_dir`).

Rules: it listens on 127.0.0.1 only and keeps its ports and data over restarts; topics are never created by
accident; everything else stays as Kafka ships it, so that tests meet the real defaults.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from tests.stack import fetch, ports
from tests.stack.java import find_java
from tests.stack.processes import forget, kill_tree, spawn, tail

START_SECONDS = 120.0
"""How long a start may take: some seconds on an idle machine, a minute on a busy one."""
STOP_SECONDS = 60.0

MESSAGE_MAX_BYTES = 8 * 1024 * 1024

# Short runs: no need of the optimizing compiler, and one thread collects what little garbage there is.
_JVM_FLAGS = ("-Xms128m", "-Xmx512m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xshare:auto")

_LOG4J = """\
status = error
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d %p %c{1} %m%n
rootLogger.level = warn
rootLogger.appenderRef.out.ref = out
logger.server.name = org.apache.kafka.server
logger.server.level = info
"""


class KafkaStartError(Exception):
    """The broker could not be set up or did not come up; the text ends with its log."""


class KafkaBroker:
    """One Kafka broker.

        with KafkaBroker(tmp_path / "kafka") as broker:
            AdminClient({"bootstrap.servers": broker.bootstrap_servers})

    `properties` are added to the broker's configuration, `format_args` to the storage tool's call (for
    example --add-scram); a broker whose listener is not PLAINTEXT needs `client_config`, with which the
    ready check connects. `listeners` are names of further ones, each at a port of its own (`address`).
    `doors` are further listeners by name: the port it listens on, and the port it tells
    the clients that come this way, for a proxy of theirs.
    """

    def __init__(
        self,
        data_dir: Path,
        properties: Mapping[str, str | int] | None = None,
        *,
        port: int | None = None,
        controller_port: int | None = None,
        cluster_id: str | None = None,
        format_args: Sequence[str] = (),
        client_config: Mapping[str, str] | None = None,
        listeners: Sequence[str] = (),
        doors: Mapping[str, tuple[int, int]] | None = None,
        detached: bool = False,
    ) -> None:
        self.data_dir = data_dir
        self.log_dir = data_dir / "data"
        self.log = data_dir / "broker.log"
        self._properties = dict(properties or {})
        self._fixed_port = port
        self._port = port
        self._listeners: dict[str, int | None] = dict.fromkeys(listeners)
        self._fixed_controller_port = self._controller_port = controller_port
        # An id that begins with "-" would be read as an option.
        self._cluster_id = cluster_id or uuid.uuid4().hex[:22]
        self._format_args = format_args
        self._client_config = dict(client_config or {})
        self._doors = dict(doors or {})
        self._detached = detached
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        """The port it listens on, or did last."""
        if self._port is None:
            raise KafkaStartError("the broker has no port before its first start; call start()")
        return self._port

    @property
    def bootstrap_servers(self) -> str:
        """Its address, for clients."""
        return f"127.0.0.1:{self.port}"

    def address(self, listener: str) -> str:
        """The address of a further listener."""
        return f"127.0.0.1:{self._listeners[listener]}"

    @property
    def pid(self) -> int | None:
        """The JVM's process id, None while it is down."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self) -> None:
        """Start the broker, formatting its storage the first time, and wait until it answers."""
        first = not (self.log_dir / "meta.properties").exists()
        for attempt in range(3):
            self._choose_ports()
            self._write_configuration()
            if first and attempt == 0:
                self._format()
            try:
                self._launch()
                return
            except KafkaStartError:
                # Only a fresh broker may move to other ports: clients know a restarted one by its old one.
                if not first or self._fixed_port is not None or attempt == 2:
                    raise
                self._release_ports()

    def stop(self) -> None:
        """Stop the broker in order; nothing happens when it is down."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                kill_tree(process)
        forget(process)

    def kill(self) -> None:
        """SIGKILL the broker: a crash without a last word."""
        process, self._process = self._process, None
        if process is not None:
            kill_tree(process)

    def restart(self) -> None:
        """Stop in order and start again, same ports and data."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze the broker: its connections stay open and nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def unpause(self) -> None:
        """Let a paused broker go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def remove(self) -> None:
        """Kill the broker and delete its data."""
        self.kill()
        shutil.rmtree(self.data_dir, ignore_errors=True)
        self._release_ports()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def _choose_ports(self) -> None:
        if self._port is None:
            self._port = ports.reserve_port()
        if self._controller_port is None:
            self._controller_port = ports.reserve_port()
        for name, port in self._listeners.items():
            self._listeners[name] = port or ports.reserve_port()

    def _release_ports(self) -> None:
        for port in (self._port, self._controller_port, *self._listeners.values()):
            if port is not None:
                ports.release_port(port)
        self._listeners = dict.fromkeys(self._listeners)
        self._port, self._controller_port = self._fixed_port, self._fixed_controller_port

    def _write_configuration(self) -> None:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        (self.data_dir / "log4j2.properties").write_text(_LOG4J)
        properties = self._defaults() | self._properties
        text = "".join(f"{name}={value}\n" for name, value in properties.items())
        (self.data_dir / "server.properties").write_text(text)

    def _defaults(self) -> dict[str, str | int]:
        controller = f"127.0.0.1:{self._controller_port}"
        own = {name: port or 0 for name, port in self._listeners.items()}
        listens = {"CLIENTS": (self.port, self.port), **{n: (p, p) for n, p in own.items()}, **self._doors}
        return {
            "process.roles": "broker,controller",
            "node.id": 1,
            "controller.quorum.voters": f"1@{controller}",
            "controller.listener.names": "CONTROLLER",
            "listeners": _places({name: here for name, (here, _) in listens.items()})
            + f",CONTROLLER://{controller}",
            "advertised.listeners": _places({name: told for name, (_, told) in listens.items()}),
            "inter.broker.listener.name": "CLIENTS",
            "listener.security.protocol.map": ",".join(
                f"{name}:PLAINTEXT" for name in [*listens, "CONTROLLER"]
            ),
            "log.dirs": str(self.log_dir),
            "auto.create.topics.enable": "false",
            "message.max.bytes": MESSAGE_MAX_BYTES,
            "replica.fetch.max.bytes": MESSAGE_MAX_BYTES,
            "group.initial.rebalance.delay.ms": 0,
            # A killed broker is let back in when its session has ended: 9 s as shipped.
            "broker.session.timeout.ms": 4000,
            "broker.heartbeat.interval.ms": 1000,
            # One node can hold one copy; fewer partitions of Kafka's own topics make it ready sooner.
            "default.replication.factor": 1,
            "min.insync.replicas": 1,
            "offsets.topic.replication.factor": 1,
            "offsets.topic.num.partitions": 4,
            "transaction.state.log.replication.factor": 1,
            "transaction.state.log.min.isr": 1,
            "transaction.state.log.num.partitions": 4,
            "share.coordinator.state.topic.replication.factor": 1,
            "share.coordinator.state.topic.min.isr": 1,
            "share.coordinator.state.topic.num.partitions": 1,
        }

    def _java(self, *arguments: str) -> list[str]:
        classpath = f"{fetch.kafka_libs()}/*"
        logging = f"-Dlog4j2.configurationFile={self.data_dir / 'log4j2.properties'}"
        return [str(find_java()), *_JVM_FLAGS, logging, "-cp", classpath, *arguments]

    def _format(self) -> None:
        arguments = ["kafka.tools.StorageTool", "format", f"--cluster-id={self._cluster_id}"]
        arguments += ["--config", str(self.data_dir / "server.properties"), *self._format_args]
        done = subprocess.run(self._java(*arguments), capture_output=True, text=True, check=False)
        if done.returncode:
            raise KafkaStartError(f"formatting Kafka's storage failed:\n{done.stdout}{done.stderr}")

    def _launch(self) -> None:
        self._process = spawn(
            self._java("kafka.Kafka", str(self.data_dir / "server.properties")),
            log=self.log,
            last_signal=signal.SIGKILL,
            detached=self._detached,
        )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            if self._listens() and self._answers():
                return
            time.sleep(0.1)
        kill_tree(self._process)
        self._process = None
        raise KafkaStartError(f"Kafka did not start; its log ends:\n{tail(self.log)}")

    def _listens(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2):
                return True
        except OSError:
            return False

    def _answers(self) -> bool:
        config: dict[str, str | int | float | bool] = {
            "bootstrap.servers": self.bootstrap_servers,
            "log_level": 0,
        }
        config.update(self._client_config)
        try:
            return bool(AdminClient(config).list_topics(timeout=5).brokers)
        except KafkaException:
            return False


def _places(listeners: Mapping[str, int]) -> str:
    return ",".join(f"{name}://127.0.0.1:{port}" for name, port in listeners.items())
