"""A streaming standby of a server of one's own, made with pg_basebackup, and its promotion.

Not here: the server as a process (postgres.py). Rules: the standby has a physical slot of its own on the
primary, feedback and, from 17 on, slot synchronization, as docs/operations/slots.md asks for.
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
from pathlib import Path

import psycopg

from tests.stack.fetch import client_tools
from tests.stack.postgres import SUPERUSER, PostgresServer, postgres_user

SLOT = "standby_1"
_SYNC_SINCE = 17


def make_standby(primary: PostgresServer, *, sync_slots: bool = True) -> PostgresServer:
    """Copy the running primary, and start the copy as its standby; the caller removes it."""
    folder = primary.data_dir.with_name(f"{primary.data_dir.name}-standby-{secrets.token_hex(2)}")
    folder.mkdir(mode=0o700)
    user = postgres_user()
    if user:
        shutil.chown(folder, user)
    command: list[str | Path] = [
        client_tools() / "pg_basebackup",
        "--pgdata",
        folder,
        "--dbname",
        primary.conninfo(),
    ]
    command += ["--checkpoint=fast", "--no-sync", "--create-slot", f"--slot={SLOT}"]
    subprocess.run(command, capture_output=True, check=True, user=user, cwd="/", timeout=120)
    standby = PostgresServer(primary.version, folder, settings=_settings(primary, sync_slots=sync_slots))
    standby.configure({})
    (folder / "standby.signal").touch()
    if user:
        shutil.chown(folder / "standby.signal", user)
    standby.start()
    return standby


def _settings(primary: PostgresServer, *, sync_slots: bool) -> dict[str, str | int]:
    settings: dict[str, str | int] = {
        "hot_standby_feedback": "on",
        "wal_receiver_status_interval": 1,
        "primary_slot_name": SLOT,
        "primary_conninfo": f"host=127.0.0.1 port={primary.port} user={SUPERUSER} dbname={SUPERUSER}",
    }
    if sync_slots and primary.version >= _SYNC_SINCE:
        settings["sync_replication_slots"] = "on"
    return settings


def promote(standby: PostgresServer) -> None:
    """Make it the primary, and wait until it is."""
    with psycopg.connect(standby.conninfo(), autocommit=True) as connection:
        assert connection.execute("SELECT pg_promote(true, 60)").fetchone() == (True,)
