"""The same servers as containers, through testcontainers, where a Docker engine answers.

Only the session's shared servers come from here: tests that kill a server, read its files or install an
extension take a process of their own (`Stack.own_postgres`, `Stack.own_kafka`).
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import psycopg
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from tests.stack import ports
from tests.stack.kafka import MESSAGE_MAX_BYTES
from tests.stack.postgres import FAST_SETTINGS, SETTINGS

if TYPE_CHECKING:
    from testcontainers.core.container import DockerContainer

KAFKA_IMAGE = "apache/kafka:4.1.1"
START_SECONDS = 180.0
"""How long a container may take to answer, the image already being there."""

# What a container needs its own values for: it listens to its bridge, not to the loopback.
_NOT_IN_CONTAINERS = ("listen_addresses", "unix_socket_directories")


class ContainerStartError(Exception):
    """A container did not come up in time."""


def docker_answers() -> bool:
    """Say whether a Docker engine can be used; VSQL_SYNC_TEST_SOURCE=process says no."""
    if os.environ.get("VSQL_SYNC_TEST_SOURCE") == "process":
        return False
    host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    if host.startswith("unix://") and not _accepts(host.removeprefix("unix://")):
        return False
    import docker

    try:
        client = docker.from_env(timeout=3)
        client.ping()
        client.close()
    except docker.errors.DockerException:
        return False
    return True


def _accepts(path: str) -> bool:
    # Asked first and by hand: the SDK leaves sockets open when nobody answers.
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(3)
        try:
            probe.connect(path)
        except OSError:
            return False
    return True


def start_postgres(version: int) -> tuple[str, DockerContainer]:
    """Start a PostgreSQL container; return the superuser's connection string and the container."""
    from testcontainers.core.container import DockerContainer

    settings = {n: v for n, v in (SETTINGS | FAST_SETTINGS).items() if n not in _NOT_IN_CONTAINERS}
    if version >= 18:
        settings["max_active_replication_origins"] = 400
    port = ports.reserve_port()
    container = DockerContainer(f"postgres:{version}")
    container.with_env("POSTGRES_HOST_AUTH_METHOD", "trust")
    container.with_env("POSTGRES_INITDB_ARGS", "--encoding=UTF8 --locale=C.UTF-8")
    container.with_command(["postgres", *(f"--{name}={value}" for name, value in settings.items())])
    _publish(container, 5432, port)
    container.start()
    conninfo = f"host=127.0.0.1 port={port} user=postgres dbname=postgres"
    _wait(lambda: _postgres_answers(conninfo), f"PostgreSQL {version}")
    return conninfo, container


def start_kafka() -> tuple[str, DockerContainer]:
    """Start a Kafka container; return its bootstrap servers and the container."""
    from testcontainers.core.container import DockerContainer

    port = ports.reserve_port()
    container = DockerContainer(KAFKA_IMAGE)
    for name, value in _kafka_environment(port).items():
        container.with_env(name, value)
    _publish(container, 9092, port)
    container.start()
    bootstrap = f"127.0.0.1:{port}"
    _wait(lambda: _kafka_answers(bootstrap), "Kafka")
    return bootstrap, container


def _publish(container: DockerContainer, inside: int, outside: int) -> None:
    # with_bind_ports knows only ports, and would open a server without passwords to the network.
    cast("dict[str, object]", container.ports)[f"{inside}/tcp"] = ("127.0.0.1", outside)


def _kafka_environment(port: int) -> dict[str, str]:
    return {
        "KAFKA_NODE_ID": "1",
        "KAFKA_PROCESS_ROLES": "broker,controller",
        "KAFKA_LISTENERS": "CLIENTS://:9092,CONTROLLER://:9093",
        "KAFKA_ADVERTISED_LISTENERS": f"CLIENTS://127.0.0.1:{port}",
        "KAFKA_INTER_BROKER_LISTENER_NAME": "CLIENTS",
        "KAFKA_CONTROLLER_LISTENER_NAMES": "CONTROLLER",
        "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP": "CLIENTS:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "KAFKA_CONTROLLER_QUORUM_VOTERS": "1@localhost:9093",
        "KAFKA_AUTO_CREATE_TOPICS_ENABLE": "false",
        "KAFKA_MESSAGE_MAX_BYTES": str(MESSAGE_MAX_BYTES),
        "KAFKA_REPLICA_FETCH_MAX_BYTES": str(MESSAGE_MAX_BYTES),
        "KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
        "KAFKA_DEFAULT_REPLICATION_FACTOR": "1",
        "KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR": "1",
        "KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
        "KAFKA_TRANSACTION_STATE_LOG_MIN_ISR": "1",
        "KAFKA_SHARE_COORDINATOR_STATE_TOPIC_REPLICATION_FACTOR": "1",
        "KAFKA_SHARE_COORDINATOR_STATE_TOPIC_MIN_ISR": "1",
    }


def _wait(answers: Callable[[], bool], name: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not answers():
        if time.monotonic() > deadline:
            raise ContainerStartError(f"{name} did not answer within {START_SECONDS:.0f} s; see docker logs")
        time.sleep(0.3)


def _postgres_answers(conninfo: str) -> bool:
    with contextlib.suppress(psycopg.OperationalError):
        psycopg.connect(conninfo, connect_timeout=3).close()
        return True
    return False


def _kafka_answers(bootstrap: str) -> bool:
    try:
        return bool(
            AdminClient({"bootstrap.servers": bootstrap, "log_level": 0}).list_topics(timeout=3).brokers
        )
    except KafkaException:
        return False
