"""The servers of a test session: one Kafka and one PostgreSQL per version, started when first asked for.

Rules: addresses given by the environment win, then a stack that `make stack-up` left running, then a Docker
engine, then processes of our own; what this object started it stops, what it found or was lent it leaves
running; each test gets databases and cluster names of its own, so servers can be shared.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.stack import containers, state
from tests.stack.fetch import POSTGRES_VERSIONS
from tests.stack.kafka import KafkaBroker
from tests.stack.postgres import PostgresServer, sharedir
from tests.stack.processes import remove_at_death

# The folder where servers of our own keep their files; the system's temporary one otherwise.
FILES = "VSQL_TEST_FILES"


@dataclass(frozen=True)
class Kafka:
    """A Kafka the tests may use: its address and, where it is a process here, its files."""

    bootstrap_servers: str
    log_dir: Path | None
    """The folder with its segment files; None when it is not on this machine's file system."""
    source: str
    """`given`, `running`, `docker` or `process`."""


@dataclass(frozen=True)
class Postgres:
    """A PostgreSQL the tests may use, by its superuser's connection string."""

    version: int
    conninfo: str
    source: str
    """`given`, `running`, `docker` or `process`."""


class Lender(Protocol):
    """Who lends servers to the workers of a run (`shared`)."""

    def kafka(self) -> Kafka:
        """Return the run's Kafka."""
        ...

    def postgres(self, version: int) -> Postgres:
        """Return the run's PostgreSQL of a version."""
        ...


class Stack:
    """The session's servers.

    with Stack() as stack:
        kafka = stack.kafka().bootstrap_servers
        conninfo = stack.new_database(18, "payments")

    With a lender all but the newest PostgreSQL are the lender's. Most tests use that one, and creating a slot
    waits for the open transactions of all databases of a server, so workers keep out of each other's way.
    """

    def __init__(self, lender: Lender | None = None) -> None:
        self.base_dir = Path(tempfile.mkdtemp(prefix="vsql-sync-stack-", dir=os.environ.get(FILES) or None))
        # PostgreSQL's own user has to pass through, and nobody needs to list it.
        self.base_dir.chmod(0o711)
        remove_at_death(self.base_dir)
        self._kafka: Kafka | None = None
        self._postgres: dict[int, Postgres] = {}
        self._databases: list[tuple[str, str]] = []
        self._closers: list[Callable[[], object]] = []
        self._notes = state.read_notes()
        self._docker: bool | None = None
        self._lender = lender
        atexit.register(self.close)

    def kafka(self) -> Kafka:
        """Return the session's Kafka, started if need be."""
        if self._kafka is None:
            self._kafka = self._find_kafka()
        return self._kafka

    def postgres(self, version: int) -> Postgres:
        """Return the session's PostgreSQL of a version, started if need be."""
        if version not in self._postgres:
            self._postgres[version] = self._find_postgres(version)
        return self._postgres[version]

    def new_database(self, version: int, prefix: str = "test", like: str = "template0") -> str:
        """Create a database and return its connection string (superuser).

        It is empty, or a copy of a database `like` this, to which nobody may be connected.
        """
        server = self.postgres(version).conninfo
        name = f"{prefix.replace('-', '_')}_{secrets.token_hex(4)}"
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(like))
            )
        self._databases.append((server, name))
        return make_conninfo(server, dbname=name)

    def drop_database(self, conninfo: str) -> None:
        """Drop a database with its sessions and replication slots; one that is gone is no error."""
        name = str(conninfo_to_dict(conninfo)["dbname"])
        server = next((s for s, n in self._databases if n == name), None)
        if server is None:
            raise ValueError(f"database {name} was not made by this stack's new_database")
        self._databases.remove((server, name))
        drop_database(server, name)

    def drop_idle_slots(self) -> None:
        """Drop the slots of its databases that nobody reads: they would hold the WAL of all that follows."""
        for server in {server for server, _ in self._databases}:
            names = [name for at, name in self._databases if at == server]
            with psycopg.connect(server, autocommit=True) as connection:
                connection.execute(
                    "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots"
                    " WHERE database = ANY(%s) AND NOT active",
                    [names],
                )

    def new_cluster_name(self, prefix: str = "t") -> str:
        """Return a cluster name no other test uses: topics, groups and origins are named by it."""
        return f"{prefix}-{secrets.token_hex(4)}"

    def sharedir(self, version: int) -> Path:
        """Return the `share` folder of a version's binaries, for files of an SQL extension.

        It belongs to process servers (`own_postgres`, and `postgres` where its source is `process` or
        `running`) and lies in the cache: what is put there stays there.
        """
        return sharedir(version)

    def own_postgres(
        self, version: int, settings: Mapping[str, str | int] | None = None, **options: Any
    ) -> PostgresServer:
        """Return a started PostgreSQL process for one test to stop, kill or configure."""
        folder = self.base_dir / f"postgres-{version}-{secrets.token_hex(4)}"
        server = PostgresServer(version, folder, settings=settings, **options)
        self._closers.append(server.remove)
        server.start()
        return server

    def own_kafka(self, properties: Mapping[str, str | int] | None = None, **options: Any) -> KafkaBroker:
        """Return a started Kafka process for one test to stop, kill or search."""
        broker = KafkaBroker(self.base_dir / f"kafka-{secrets.token_hex(4)}", properties, **options)
        self._closers.append(broker.remove)
        broker.start()
        return broker

    def close(self) -> None:
        """Stop what was started here; drop what was made on servers that go on."""
        atexit.unregister(self.close)
        leftover = {p.conninfo for p in self._postgres.values() if p.source in ("given", "running")}
        for server, name in self._databases:
            if server in leftover:
                with contextlib.suppress(psycopg.Error):
                    drop_database(server, name)
        self._databases.clear()
        while self._closers:
            self._closers.pop()()
        shutil.rmtree(self.base_dir, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _find_kafka(self) -> Kafka:
        if self._lender is not None:
            return self._lender.kafka()
        if given := os.environ.get("VSQL_SYNC_TEST_KAFKA"):
            return Kafka(given, None, "given")
        if running := self._notes.get("kafka"):
            return Kafka(running.address, Path(running.data_dir) / "data", "running")
        if self._uses_docker():
            bootstrap, container = containers.start_kafka()
            self._closers.append(container.stop)
            return Kafka(bootstrap, None, "docker")
        broker = KafkaBroker(self.base_dir / "kafka")
        self._closers.append(broker.kill)
        broker.start()
        return Kafka(broker.bootstrap_servers, broker.log_dir, "process")

    def _find_postgres(self, version: int) -> Postgres:
        if self._lender is not None and version != POSTGRES_VERSIONS[-1]:
            return self._lender.postgres(version)
        if given := os.environ.get(f"VSQL_SYNC_TEST_PG{version}"):
            return Postgres(version, given, "given")
        if running := self._notes.get(f"postgres-{version}"):
            return Postgres(version, running.address, "running")
        if self._uses_docker():
            conninfo, container = containers.start_postgres(version)
            self._closers.append(container.stop)
            return Postgres(version, conninfo, "docker")
        server = PostgresServer(version, self.base_dir / f"postgres-{version}")
        self._closers.append(lambda: server.stop("immediate"))
        server.start()
        return Postgres(version, server.conninfo(), "process")

    def _uses_docker(self) -> bool:
        if self._docker is None:
            self._docker = containers.docker_answers()
        return self._docker


def drop_database(server: str, name: str) -> None:
    """Drop a database of a server with its sessions and replication slots; one that is gone is no error."""
    drop_slots(server, name)  # they keep a database from being dropped
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


def drop_slots(server: str, name: str) -> None:
    """Drop a database's replication slots; a slot in use is taken from who uses it."""
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots "
            "WHERE database = %s AND active_pid IS NOT NULL",
            [name],
        )
        connection.execute(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = %s", [name]
        )
