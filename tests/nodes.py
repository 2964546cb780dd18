"""Nodes of vsql-sync as a user would have them: databases, configuration, keys, and services as processes.

Everything goes through the product's own interfaces: `syncctl` as a command, `python -m vsql_producers` and
`python -m vsql_consumers` as processes. The demo, the benchmark and the topology tests all stand on this.

    pair = TwoNodes(stack, folder, tables_sql, version=18)
    pair.create(["payments(*)", "orders(*)"])   # keys, node init, publication, add-peer, start
    pair.start()                                # producer of A, consumer of B
    pair.wait_in_step()                         # B has all that A had committed at this moment
    pair.differences()                          # [] or what differs, row by row
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psutil
import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from tests.forker import fork, is_plain
from tests.stack import Stack, drop_slots, kill_tree, spawn, watch
from tests.syncctl import syncctl

PUBLICATION = "pub"
_READ_WHEN_RUNNING = "VSQL_SYNC"
Echo = Callable[[str, Sequence[str]], None]


class NodeFailedError(AssertionError):
    """A command or a service of a node failed; the text holds what it printed."""


def start_service(
    role: str, words: Sequence[str], *, log: Path, env: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Start `python -m vsql_ROLEs WORDS`, in tests from a process that has it imported (forker.py)."""
    if is_plain() or any(not name.startswith(_READ_WHEN_RUNNING) for name in env):
        return spawn([sys.executable, "-m", f"vsql_{role}s", *words], log=log, env=env)
    process = fork(f"vsql_{role}s", words, env={**os.environ, **env}, out=log, err=log)
    watch(process)
    return process


class Node:
    """One node: a database, its configuration file, and up to two services."""

    def __init__(
        self, folder: Path, cluster: str, number: int, name: str, conninfo: str, kafka: str, extra: str = ""
    ) -> None:
        self.folder, self.cluster, self.number, self.name = folder, cluster, number, name
        self.conninfo, self.kafka, self.extra = conninfo, kafka, extra
        self.config = folder / f"{name}.toml"
        self.keys = folder / f"{name}-keys"
        self.services: dict[str, subprocess.Popen[bytes]] = {}
        self.echo: Echo | None = None
        self.kms = ""
        """What stands in [encryption.kms] instead of the KEK file."""
        self.signing = ""
        """What stands in [audit] instead of the signing key's file."""
        self.service_port: int | None = None
        """Where services and syncctl find the database, if it is not the port of `conninfo`: a proxy's."""
        self.replicas = 1
        """Copies of each new topic; all but one must have a record."""
        self.env: dict[str, str] = {}
        """Added to the environment of its services."""

    def write_config(self, kek: Path) -> None:
        """Write the node's vsql-sync.toml (dev mode, signed, KEK in a file unless `kms` says where)."""
        parts = conninfo_to_dict(self.conninfo)
        password = f'password = "{parts["password"]}"\n' if parts.get("password") else ""
        in_file = f'provider = "file"\nkek_id = "test-kek"\n[encryption.kms.file]\npath = "{kek}"'
        signing = self.signing or f'signing_key_path = "{self.keys / "vsql-sync-signing.key"}"'
        self.config.write_text(
            f"""[cluster]
name = "{self.cluster}"
node_id = {self.number}
node_name = "{self.name}"

[connection]
host = "{parts.get("host", "127.0.0.1")}"
port = {self.service_port or parts.get("port", 5432)}
database = "{parts["dbname"]}"
user = "{parts.get("user", "postgres")}"
{password}
[server]
mode = "dev"
state_dir = "{self.folder / (self.name + "-state")}"

[kafka]
bootstrap_servers = "{self.kafka}"
replication_factor = {self.replicas}
min_insync_replicas = {max(1, self.replicas - 1)}

[encryption.kms]
{self.kms or in_file}

[audit]
{signing}

[metrics]
producer_addr = "127.0.0.1:0"
consumer_addr = "127.0.0.1:0"

{self.extra}
"""
        )

    def fingerprint(self) -> str:
        """Of its signing key, as the operator reads it."""
        shown = self.ctl("key", "show-public").stdout
        return next(word for word in shown.split() if word.startswith("SHA256:"))

    def new_key(self) -> None:
        """Make a key in another directory and repeat `node init`, as the operator does."""
        text, old = self.config.read_text(), self.keys
        self.keys = self.folder / f"{old.name}-next"
        self.ctl("key", "generate", "--output", str(self.keys))
        self.config.write_text(text.replace(f"{old}/", f"{self.keys}/"))
        self.ctl("node", "init")

    def ctl(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run syncctl with this node's configuration."""
        if self.echo is not None:
            self.echo(self.name, args)
        done = syncctl("--config", str(self.config), *args)
        if check and done.returncode != 0:
            raise NodeFailedError(
                f"syncctl {' '.join(args)} on {self.name}: exit {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done

    def ctl_json(self, *args: str) -> Any:
        """Run syncctl --output json and parse what it prints."""
        return json.loads(self.ctl(*args, "--output", "json").stdout)

    def log_file(self, role: str) -> Path:
        """Where a service's standard error goes."""
        return self.folder / f"{self.name}-{role}.log"

    def start(self, role: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start one service (`producer` or `consumer`) in its own process group."""
        words = ["--config", str(self.config)]
        process = start_service(role, words, log=self.log_file(role), env={**self.env, **(env or {})})
        self.services[role] = process
        return process

    def start_daemon(self) -> None:
        """Start `syncctl daemon start --foreground`: both services, restarted when they die."""
        self.services["daemon"] = spawn(
            [
                sys.executable,
                "-m",
                "vsql_ctl",
                "--config",
                str(self.config),
                "daemon",
                "start",
                "--foreground",
            ],
            log=self.log_file("daemon"),
            env=self.env,
        )

    def processes(self, role: str) -> list[psutil.Process]:
        """Processes of a service (`producer` or `consumer`): the service, its nursery, the workers."""
        found: list[psutil.Process] = []
        for process in self.services.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                top = psutil.Process(process.pid)
                for candidate in [top, *top.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                        if f"vsql_{role}s" in candidate.cmdline():
                            found.append(candidate)
        return found

    def stop(self, role: str, timeout: float = 60) -> int:
        """SIGTERM a service and wait for its graceful end."""
        process = self.services.pop(role)
        process.terminate()
        return process.wait(timeout)

    def query(self, statement: str, *params: object) -> list[tuple[Any, ...]]:
        """Rows of a statement on the node's database, as its superuser."""
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            cursor = connection.execute(statement, params or None)
            return cursor.fetchall() if cursor.description else []

    def execute(self, script: str) -> None:
        """Run a script of several statements in one transaction."""
        with psycopg.connect(self.conninfo) as connection:
            connection.execute(script)

    def tail(self, role: str, lines: int = 30) -> str:
        """Last lines of a service's log, for a failure's text."""
        path = self.log_file(role)
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""


class TwoNodes:
    """Node a (source) and node b (target) of one cluster."""

    def __init__(
        self,
        stack: Stack,
        folder: Path,
        schema_sql: str,
        *,
        version: int = 18,
        target_version: int | None = None,
        kafka: str | None = None,
        conninfos: tuple[str, str] | None = None,
        config: str = "",
        target_config: str | None = None,
        echo: Echo | None = None,
    ) -> None:
        cluster = stack.new_cluster_name("c")
        source, target = conninfos or (
            stack.new_database(version, "a"),
            stack.new_database(target_version or version, "b"),
        )
        self._stack, self._made = stack, [] if conninfos else [source, target]
        address = kafka or stack.kafka().bootstrap_servers
        self.folder, self.cluster = folder, cluster
        self.a = Node(folder, cluster, 1, "node-a", source, address, config)
        self.b = Node(
            folder, cluster, 2, "node-b", target, address, config if target_config is None else target_config
        )
        self.chain = f"{PUBLICATION}.node-a"
        for node in (self.a, self.b):
            node.echo = echo
            node.execute(schema_sql)

    def create(
        self,
        tables: Sequence[str],
        *,
        copy: bool = True,
        publication_args: Sequence[str] = (),
        mode: str = "uni-directional",
    ) -> None:
        """Keys, node init on both, publication, add-peer, start: what the README tells a user."""
        kek = self.folder / "kek.key"
        for node in (self.a, self.b):
            node.write_config(kek)
        self.a.ctl("key", "generate", "--output", str(self.folder / "kek-dir"), "--kek", str(kek))
        for node in (self.a, self.b):
            node.ctl("key", "generate", "--output", str(node.keys))
            node.ctl(
                "node", "init", "--node-id", str(node.number), "--node-name", node.name, "--cluster",
                self.cluster, "--connection", node.conninfo,
            )  # fmt: skip
        table_args = [arg for table in tables for arg in ("--table", table)]
        self.a.ctl("publication", "create", PUBLICATION, *table_args, *publication_args)
        self.a.ctl(
            "node", "add-peer", "--peer-node-id", "2", "--peer-name", "node-b", "--peer-connection",
            self.b.conninfo, "--mode", mode, "--yes", *([] if copy else ["--no-copy"]),
        )  # fmt: skip
        for node in (self.a, self.b):
            node.ctl("start")

    def start(self) -> None:
        """Start the producer of A and the consumer of B."""
        self.a.start("producer")
        self.b.start("consumer")

    def stop(self) -> None:
        """Stop what runs, gracefully."""
        for node in (self.a, self.b):
            for role in list(node.services):
                node.stop(role)

    def kill(self) -> None:
        """Kill what runs."""
        for node in (self.a, self.b):
            for process in node.services.values():
                kill_tree(process)
            node.services.clear()

    def end(self) -> None:
        """Kill whatever still runs, for a test that ended half-way; drop the databases that were made for it.

        Slots that nobody reads any more would hold the WAL of all tests that follow: of databases that were
        given they are dropped alone.
        """
        self.kill()
        if not self._made:
            for node in (self.a, self.b):
                with contextlib.suppress(psycopg.Error):  # its server may have been stopped
                    drop_slots(node.conninfo, str(conninfo_to_dict(node.conninfo)["dbname"]))
        while self._made:
            self._stack.drop_database(self._made.pop())

    def heads(self) -> tuple[int, int]:
        """(last sequence in A's chain, last sequence B applied)."""
        head = self.a.query(
            "SELECT coalesce(max(sequence), 0) FROM vsql_sync.vsql_sync_audit WHERE chain = %s", self.chain
        )[0][0]
        rows = self.b.query("SELECT sequence FROM vsql_sync.apply_progress WHERE chain = %s", self.chain)
        return head, rows[0][0] if rows else 0

    def wait_in_step(self, timeout: float = 120, poll: float = 0.1) -> None:
        """Wait until B has applied everything A had committed when this was called.

        A's slot must have confirmed that position and B's progress must have reached A's chain head.
        """
        lsn = self.a.query("SELECT pg_current_wal_insert_lsn()")[0][0]
        deadline = time.monotonic() + timeout
        confirmed: list[tuple[Any, ...]] = []
        head = applied = 0
        while time.monotonic() < deadline:
            confirmed = self.a.query(
                "SELECT 1 FROM vsql_sync.streams s JOIN pg_replication_slots r USING (slot_name)"
                " WHERE s.chain = %s AND s.direction = 'out' AND r.confirmed_flush_lsn >= %s::pg_lsn",
                self.chain,
                lsn,
            )
            head, applied = self.heads()
            if confirmed and applied >= head and self._copied():
                return
            self._check_services()
            time.sleep(poll)
        raise NodeFailedError(
            f"not in step after {timeout:.0f} s: wanted {lsn}, confirmed {bool(confirmed)}, head {head},"
            f" applied {applied}\n--- producer of a\n{self.a.tail('producer')}"
            f"\n--- consumer of b\n{self.b.tail('consumer')}"
        )

    def _copied(self) -> bool:
        """Whether no first copy of this pair is under way."""
        return not self.b.query(
            "SELECT 1 FROM vsql_sync.streams WHERE direction = 'in' AND kind = 'copy' AND state <> 'FINISHED'"
        )

    def _check_services(self) -> None:
        for node in (self.a, self.b):
            for role, process in node.services.items():
                code = process.poll()
                if code is not None:
                    raise NodeFailedError(f"{role} of {node.name} ended with {code}\n{node.tail(role)}")

    def tables(self) -> list[tuple[str, str]]:
        """Published tables."""
        return self.a.query(
            "SELECT schemaname, tablename FROM pg_publication_tables WHERE pubname = %s ORDER BY 1, 2",
            PUBLICATION,
        )

    def differences(self, limit: int = 10) -> list[str]:
        """Compare every published table row by row."""
        return differences(self.a.conninfo, self.b.conninfo, self.tables())[:limit]

    def acknowledged_rows(self) -> int:
        """Number of changes B acknowledged (sum of row_count of its acknowledgements)."""
        return int(
            self.b.query(
                "SELECT coalesce(sum(row_count), 0) FROM vsql_sync.vsql_sync_audit"
                " WHERE chain = %s AND event_type = 'batch_applied'",
                f"{self.chain}.ack.node-b",
            )[0][0]
        )

    def audited_rows(self) -> int:
        """Number of changes in A's chain (sum of row_count of its manifests)."""
        return int(
            self.a.query(
                "SELECT coalesce(sum(row_count), 0) FROM vsql_sync.vsql_sync_audit"
                " WHERE chain = %s AND event_type = 'replication_batch'",
                self.chain,
            )[0][0]
        )


def differences(a: str, b: str, tables: Iterable[tuple[str, str]]) -> list[str]:
    """The first difference of each table, if any: all rows as text, in one order on both sides."""
    found: list[str] = []
    for schema, table in tables:
        pairs = zip_longest(_rows(a, schema, table), _rows(b, schema, table))
        for number, (left, right) in enumerate(pairs):
            if left != right:
                found.append(f"{schema}.{table} row {number}: {left!r} on a, {right!r} on b")
                break  # one difference shifts all rows after it
    return found


def _rows(conninfo: str, schema: str, table: str) -> Iterator[bytes]:
    """All rows of a table as text, in an order that does not depend on the server, streamed."""
    statement = sql.SQL('COPY (SELECT t::text FROM {} t ORDER BY t::text COLLATE "C") TO STDOUT').format(
        sql.Identifier(schema, table)
    )
    with (
        psycopg.connect(conninfo) as connection,
        connection.cursor() as cursor,
        cursor.copy(statement) as copy,
    ):
        rest = b""
        for block in copy:
            lines = (rest + bytes(block)).split(b"\n")
            rest = lines.pop()
            yield from lines
