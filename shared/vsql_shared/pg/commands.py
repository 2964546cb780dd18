"""Commands to the services: a row each, announced by NOTIFY, run once by every worker it names, answered.

Not here: what a command does. Rules:

* A worker runs a command at most once: its answer is a row under (command, chain, direction), and `pending`
  leaves out what it has answered, across restarts too.
* A command for all streams is for those that existed when it was given.
* The notification only shortens the wait; whoever misses it finds the row at the next poll.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from psycopg.types.json import Jsonb

from vsql_shared.pg.connect import Connection, errors

CHANNEL = "vsql_sync_commands"
_POLL_SECONDS = 0.1

Role = Literal["producer", "consumer"]
DIRECTION: dict[Role, str] = {"producer": "out", "consumer": "in"}


@dataclass(frozen=True, slots=True)
class Command:
    """One order."""

    id: int
    role: Role
    chain: str | None
    verb: str
    args: dict[str, Any]
    reason: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What one worker said."""

    chain: str
    direction: str
    ok: bool
    message: str


def request(
    conn: Connection, role: Role, verb: str, args: Mapping[str, object], reason: str, chain: str | None = None
) -> int:
    """Give a command to one stream's worker, or to all of a role; returns its id."""
    with errors(f"giving the command {verb}"), conn.transaction():
        row = conn.execute(
            "INSERT INTO vsql_sync.commands (role, chain, verb, args, reason) VALUES (%s, %s, %s, %s, %s)"
            " RETURNING id",
            (role, chain, verb, Jsonb(dict(args)), reason),
        ).fetchone()
        assert row is not None  # noqa: S101 - INSERT … RETURNING has a row
        conn.execute("SELECT pg_catalog.pg_notify(%s, %s)", (CHANNEL, str(row[0])))
    return int(row[0])


def pending(conn: Connection, chain: str, role: Role, after_id: int = 0) -> list[Command]:
    """Commands the worker of this stream has not answered, oldest first."""
    with errors("reading the commands"):
        rows = conn.execute(
            "SELECT c.id, c.role, c.chain, c.verb, c.args, c.reason FROM vsql_sync.commands c"
            " JOIN vsql_sync.streams s ON s.chain = %(chain)s AND s.direction = %(direction)s"
            " WHERE c.id > %(after)s AND c.role = %(role)s AND (c.chain = s.chain"
            "   OR c.chain IS NULL AND c.requested_at >= s.created_at)"
            " AND NOT EXISTS (SELECT FROM vsql_sync.command_results r"
            "   WHERE r.command_id = c.id AND r.chain = s.chain AND r.direction = s.direction)"
            " ORDER BY c.id",
            {"chain": chain, "direction": DIRECTION[role], "after": after_id, "role": role},
        ).fetchall()
    return [Command(*row) for row in rows]


def finish(
    conn: Connection, command_id: int, chain: str, direction: str, ok: bool, message: str = ""
) -> bool:
    """Answer a command; False when it was answered before."""
    with errors("answering a command"):
        done = conn.execute(
            "INSERT INTO vsql_sync.command_results (command_id, chain, direction, ok, message)"
            " VALUES (%s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
            (command_id, chain, direction, ok, message),
        )
    return done.rowcount == 1


def answers(conn: Connection, command_id: int) -> list[Answer]:
    """The answers so far."""
    with errors("reading the answers to a command"):
        rows = conn.execute(
            "SELECT chain, direction, ok, message FROM vsql_sync.command_results"
            " WHERE command_id = %s ORDER BY 1, 2",
            (command_id,),
        ).fetchall()
    return [Answer(*row) for row in rows]


def wait(conn: Connection, command_id: int, expected: int, timeout: float) -> list[Answer]:
    """Wait at most `timeout` seconds until `expected` workers have answered; returns what came."""
    deadline = time.monotonic() + timeout
    while True:
        found = answers(conn, command_id)
        if len(found) >= expected or time.monotonic() >= deadline:
            return found
        time.sleep(_POLL_SECONDS)
