"""Looks at a server's settings and says what vsql-sync needs changed, with the statement to run.

It changes nothing. `inspect` reads, `judge` decides on values alone. A finding of severity "error" keeps
`node init` from going on; a "warning" is shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from typing_extensions import override

from vsql_shared.errors import DatabaseError
from vsql_shared.pg.connect import Connection, errors
from vsql_shared.pg.encodings import UTF8, WHOLE

OLDEST, NEWEST = 15, 18
# What one more publication with one peer takes: its stream's slot and the first copy's, a sender for each.
_ROOM = 2

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One setting that is not as it should be."""

    name: str
    actual: str
    wanted: str
    severity: Severity
    fix: str

    @override
    def __str__(self) -> str:
        return f"{self.name} is {self.actual}, wanted {self.wanted}: {self.fix}"


@dataclass(frozen=True, slots=True)
class ServerState:
    """What `judge` looks at."""

    version: int
    settings: dict[str, str]
    encoding: str
    in_recovery: bool
    slots_used: int
    senders_used: int
    origins_used: int


def inspect(conn: Connection) -> list[Finding]:
    """Findings of the connected server and database."""
    return list(judge(read_state(conn)))


def require(conn: Connection) -> list[Finding]:
    """Raise DatabaseError naming every error; returns the warnings."""
    found = inspect(conn)
    wrong = [finding for finding in found if finding.severity == "error"]
    if wrong:
        raise DatabaseError("the server is not ready:\n  " + "\n  ".join(str(finding) for finding in wrong))
    return found


def read_state(conn: Connection) -> ServerState:
    """Read settings and usage; every role may."""
    with errors("reading the server's settings"):
        settings: dict[str, str] = dict(
            conn.execute("SELECT name, setting FROM pg_catalog.pg_settings").fetchall()
        )
        row = conn.execute(
            "SELECT pg_catalog.pg_encoding_to_char(encoding), pg_catalog.pg_is_in_recovery(),"
            " (SELECT count(*) FROM pg_catalog.pg_replication_slots),"
            " (SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE backend_type = 'walsender'),"
            " (SELECT count(*) FROM pg_catalog.pg_replication_origin)"
            " FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()"
        ).fetchone()
    assert row is not None  # noqa: S101 - we are connected to this database
    return ServerState(conn.info.server_version // 10_000, settings, row[0], row[1], row[2], row[3], row[4])


def judge(state: ServerState) -> Iterator[Finding]:
    """The findings of a server's state. Pure."""
    if not OLDEST <= state.version <= NEWEST:
        yield Finding(
            "server version", str(state.version), f"{OLDEST} to {NEWEST}", "error", "use another server"
        )
        return
    if state.encoding != UTF8 and state.encoding not in WHOLE:
        fix = "make the database anew: CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"
        wanted = f"{UTF8}, or one whose every text has a form in UTF8 and back ({', '.join(WHOLE)})"
        yield Finding("server_encoding", state.encoding, wanted, "error", fix)
    if state.in_recovery:
        yield Finding(
            "pg_is_in_recovery()", "true", "false", "error", "connect to the primary, this is a standby"
        )
    yield from _fixed_settings(state)
    yield from _room(state)


def _fixed_settings(state: ServerState) -> Iterator[Finding]:
    restart = "then restart the server"
    if state.settings["wal_level"] != "logical":
        fix = f"ALTER SYSTEM SET wal_level = 'logical'; {restart}"
        yield Finding("wal_level", state.settings["wal_level"], "logical", "error", fix)
    if state.settings["track_commit_timestamp"] != "on":
        fix = f"ALTER SYSTEM SET track_commit_timestamp = on; {restart}"
        yield Finding("track_commit_timestamp", "off", "on", "error", fix)
    if state.settings["max_slot_wal_keep_size"] == "-1":
        fix = "ALTER SYSTEM SET max_slot_wal_keep_size = '64GB'; SELECT pg_reload_conf()"
        wanted = "a size the disk has room for (a stream that stands still keeps WAL without end)"
        yield Finding("max_slot_wal_keep_size", "-1 (no bound)", wanted, "warning", fix)
    if state.settings["fsync"] != "on":
        fix = "ALTER SYSTEM SET fsync = on; SELECT pg_reload_conf()"
        yield Finding("fsync", "off", "on (an acknowledgement says the rows are on disk)", "warning", fix)


def _room(state: ServerState) -> Iterator[Finding]:
    """Room for slots, senders and origins. Before 18 the limit of slots is also the one of origins."""
    origins = "max_active_replication_origins" if state.version >= 18 else "max_replication_slots"
    for setting, used, what in (
        ("max_replication_slots", state.slots_used, "slots"),
        ("max_wal_senders", state.senders_used, "senders"),
        (origins, state.origins_used, "origins"),
    ):
        limit = int(state.settings[setting])
        if limit - used < _ROOM:
            fix = f"ALTER SYSTEM SET {setting} = {used + 10}; then restart the server"
            wanted = f"at least {used + _ROOM} ({used} {what} in use)"
            # None free: the first stream could not start. One free: the next copy could not.
            yield Finding(setting, str(limit), wanted, "error" if limit - used < 1 else "warning", fix)
