"""A PostgreSQL server as a process: one data directory, one port, one version.

It is not the session's shared server (`Stack.postgres` is); use it where a test stops, kills or
configures a server of its own.

Rules: PostgreSQL never runs as root, so under root it runs as an unprivileged user; it listens on
127.0.0.1 only, without Unix sockets; the defaults are what vsql-sync asks of a database.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import psycopg

from tests.stack import fetch, ports
from tests.stack.processes import forget, kill_tree, spawn, tail

SUPERUSER = "postgres"
START_SECONDS = 60.0
"""How long a start may take, crash recovery under load included."""
STOP_SECONDS = 60.0

SETTINGS: dict[str, str | int] = {
    "wal_level": "logical",
    "track_commit_timestamp": "on",
    # High, because slots and origins of many tests live in one server; before 18 it limits origins too.
    "max_replication_slots": 400,
    "max_wal_senders": 60,
    "max_connections": 200,
    "max_worker_processes": 16,
    "max_prepared_transactions": 10,
    "max_slot_wal_keep_size": "8GB",
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %a ",
    "shared_buffers": "128MB",
    "max_wal_size": "512MB",
}
FAST_SETTINGS: dict[str, str | int] = {"fsync": "off", "full_page_writes": "off"}
"""For tests: data survives a killed process, not a killed machine."""

StopMode = Literal["smart", "fast", "immediate"]
_STOP_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}


class PostgresStartError(Exception):
    """The server could not be set up or did not come up; the text ends with its log."""


class PostgresServer:
    """One PostgreSQL server.

        with PostgresServer(18, tmp_path / "pg") as server:
            psycopg.connect(server.conninfo())

    Without `port` a free one is chosen and kept over restarts. `settings` are added to `SETTINGS`; `fast`
    turns fsync off; `auth` is what loopback connections need: "trust" or "scram" (see `password`); `env` is
    added to its environment.
    """

    def __init__(
        self,
        version: int,
        data_dir: Path,
        port: int | None = None,
        settings: Mapping[str, str | int] | None = None,
        *,
        fast: bool = True,
        auth: Literal["trust", "scram"] = "trust",
        detached: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.version = version
        self.data_dir = data_dir
        self.log = data_dir.with_name(data_dir.name + ".log")
        self.auth = auth
        self.password = secrets.token_urlsafe(18)
        self.settings = SETTINGS | (FAST_SETTINGS if fast else {}) | dict(settings or {})
        if version >= 18:
            self.settings.setdefault("max_active_replication_origins", 400)
        self._fixed_port = port
        self._port = port
        self._detached = detached
        self._env = dict(env or {})
        self._home = fetch.postgres_home(version)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        """The port it listens on, or did last."""
        if self._port is None:
            raise PostgresStartError("the server has no port before its first start; call start()")
        return self._port

    @property
    def sharedir(self) -> Path:
        """The `share` folder of its binaries; extension files go to `sharedir / "extension"`."""
        return sharedir(self.version)

    @property
    def pid(self) -> int | None:
        """The postmaster's process id, None while it is down."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def conninfo(self, dbname: str = SUPERUSER, user: str = SUPERUSER) -> str:
        """Return a connection string; as the superuser by default."""
        words = [f"host=127.0.0.1 port={self.port} user={user} dbname={dbname}"]
        if self.auth == "scram" and user == SUPERUSER:
            words.append(f"password={self.password}")
        return " ".join(words)

    def start(self) -> None:
        """Start the server, with initdb the first time, and wait until it answers."""
        first = not (self.data_dir / "PG_VERSION").exists()
        if first:
            self._initdb()
        for attempt in range(3):
            if self._port is None:
                self._port = ports.reserve_port()
            try:
                self._launch()
                return
            except PostgresStartError:
                # Only a fresh server may move to another port: clients know a restarted one by its old one.
                if not first or self._fixed_port is not None or attempt == 2:
                    raise
                ports.release_port(self._port)
                self._port = None

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server in order, as `pg_ctl stop -m MODE` would; nothing happens when it is down."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(_STOP_SIGNALS[mode])
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                kill_tree(process)
        forget(process)

    def kill(self) -> None:
        """SIGKILL the postmaster and every backend at once: a crash without a last word."""
        process, self._process = self._process, None
        if process is not None:
            kill_tree(process)

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop and start again, same port and data."""
        self.stop(mode)
        self.start()

    def configure(self, settings: Mapping[str, str | int]) -> None:
        """Change settings; they are read at the next start or `pg_reload_conf()`."""
        self.settings.update(settings)
        self._write_settings()

    def remove(self) -> None:
        """Stop at once and delete the data."""
        self.stop("immediate")
        shutil.rmtree(self.data_dir, ignore_errors=True)
        if self._port is not None:
            ports.release_port(self._port)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop("immediate")

    def _initdb(self) -> None:
        user = postgres_user()
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self.data_dir.chmod(0o700)
        password_file = self.data_dir.with_name(self.data_dir.name + ".password")
        password_file.write_text(self.password)
        password_file.chmod(0o600)
        if user:
            shutil.chown(self.data_dir, user)
            shutil.chown(password_file, user)
        locale = "C.UTF-8" if sys.platform == "linux" else "C"
        command = [
            str(self._home / "bin" / "initdb"),
            "--pgdata",
            str(self.data_dir),
            "--username",
            SUPERUSER,
        ]
        command += ["--encoding=UTF8", f"--locale={locale}", "--no-sync", f"--pwfile={password_file}"]
        command += ["--auth=trust" if self.auth == "trust" else "--auth=scram-sha-256"]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env=self._environment(),
            user=user,
            extra_groups=[] if user else None,
            cwd=self.data_dir.parent if user is None else "/",
        )
        password_file.unlink()
        if done.returncode:
            hint = ""
            if user and not _reachable_by_others(self._home):
                hint = f" User {user} cannot read {self._home}: set VSQL_SYNC_CACHE to a folder it can read."
            raise PostgresStartError(f"initdb of PostgreSQL {self.version}: {done.stderr.strip()}{hint}")
        with (self.data_dir / "postgresql.conf").open("a") as conf:
            conf.write("include 'stack.conf'\n")
        self._write_settings()

    def _write_settings(self) -> None:
        path = self.data_dir / "stack.conf"
        path.write_text("".join(f"{name} = '{value}'\n" for name, value in self.settings.items()))
        if user := postgres_user():
            shutil.chown(path, user)

    def _launch(self) -> None:
        self._process = spawn(
            [self._home / "bin" / "postgres", "-D", self.data_dir, "-p", str(self.port)],
            log=self.log,
            env=self._environment(),
            user=postgres_user(),
            cwd=self.data_dir.parent,
            last_signal=signal.SIGQUIT,
            detached=self._detached,
        )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            # Its own pid file says ready: another server on that port cannot be mistaken for it.
            if self._says_ready() and self._answers():
                return
            time.sleep(0.05)
        kill_tree(self._process)
        self._process = None
        raise PostgresStartError(f"PostgreSQL {self.version} did not start; its log ends:\n{tail(self.log)}")

    def _says_ready(self) -> bool:
        assert self._process is not None
        try:
            lines = (self.data_dir / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(self._process.pid) and lines[7].strip() == "ready"

    def _answers(self) -> bool:
        with contextlib.suppress(psycopg.OperationalError):
            with psycopg.connect(self.conninfo(), connect_timeout=5) as connection:
                connection.execute("SELECT 1")
            return True
        return False

    def _environment(self) -> dict[str, str]:
        return {"LD_LIBRARY_PATH": str(self._home / "lib"), "LC_ALL": "C.UTF-8", "PGTZ": "UTC", **self._env}


def sharedir(version: int) -> Path:
    """Return the `share` folder of a version's binaries (`SHAREDIR` of pg_config)."""
    return fetch.postgres_home(version) / "share" / "postgresql"


def postgres_user() -> str | None:
    """Return the user PostgreSQL must run as, or None for the one who runs the tests."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    for name in (os.environ.get("VSQL_SYNC_PG_USER"), "vsqlsync", "postgres"):
        if name and name in known:
            return name
    try:
        subprocess.run(
            ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", "vsqlsync"],
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "nobody"
    return "vsqlsync"


def _reachable_by_others(path: Path) -> bool:
    return all(parent.stat().st_mode & 0o001 for parent in (path, *path.parents))
