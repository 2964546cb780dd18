"""Operators' orders to streams: start, pause, resume, and decisions on what a consumer refused.

Each order is one transaction: what is wanted (`streams.desired`), the command that wakes the workers, and
the line of the operators' log. A worker that is down finds `desired` when it comes up.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from vsql_shared.errors import RefusedError, UserError
from vsql_shared.pg import commands, nodes, oplog, status
from vsql_shared.pg.connect import Connection, errors

Desired = Literal["running", "paused"]
_RECORD = re.compile(r"([A-Za-z0-9._-]{1,249})/(\d{1,9})/(\d{1,18})")


@dataclass(frozen=True, slots=True)
class Changed:
    """Streams whose wanted state changed, and the commands that tell their workers."""

    streams: list[tuple[str, str]]
    command_ids: list[int]


def start(conn: Connection, chains: Sequence[str] = ()) -> Changed:
    """Let streams run, new and paused ones."""
    return _want(conn, "running", "start", chains, reason="", was=("stopped", "paused"))


def pause(conn: Connection, reason: str, chains: Sequence[str] = ()) -> Changed:
    """Pause running streams; the reason is kept with them."""
    if not reason.strip():
        raise UserError("a pause needs a reason", hint='--reason "Incident response IR-2026-042"')
    return _want(conn, "paused", "pause", chains, reason=reason.strip(), was=("running",))


def resume(conn: Connection, chains: Sequence[str] = ()) -> Changed:
    """Let paused streams run again."""
    return _want(conn, "running", "resume", chains, reason="", was=("paused",))


def ignore_record(conn: Connection, chain: str, record: str, reason: str) -> int:
    """Decide that a refused record of an incoming stream is passed over; returns the decision's id."""
    match = _RECORD.fullmatch(record)
    if match is None:
        raise UserError(
            f"{record!r} is no record", hint="write TOPIC/PARTITION/OFFSET, as the error names it"
        )
    place = {"topic": match[1], "partition": int(match[2]), "kafka_offset": int(match[3])}
    return decide(conn, chain, "ignore-record", place, reason).id


def skip_batch(conn: Connection, chain: str, sequence: int, reason: str) -> int:
    """Decide that a batch of an incoming stream is not applied; returns the decision's id."""
    if sequence < 1:
        raise UserError(
            f"{sequence} is no sequence number", hint="`syncctl status` shows that of the refused batch"
        )
    return decide(conn, chain, "skip-batch", {"sequence": sequence}, reason).id


def _want(
    conn: Connection, desired: Desired, verb: str, chains: Sequence[str], *, reason: str, was: Sequence[str]
) -> Changed:
    nodes.local(conn)
    with errors(f"{verb} of streams"), conn.transaction():
        _check_chains(conn, chains)
        rows = conn.execute(
            "UPDATE vsql_sync.streams SET desired = %s, desired_reason = %s"
            " WHERE desired = ANY(%s) AND state <> 'FINISHED' AND (%s OR chain = ANY(%s))"
            " RETURNING chain, direction",
            (desired, reason or None, list(was), not chains, list(chains)),
        ).fetchall()
        ids = []
        for chain, direction in sorted(rows):
            role: commands.Role = "producer" if direction == "out" else "consumer"
            new = {"desired": desired, "direction": direction, "reason": reason}
            line = oplog.record(conn, f"stream.{verb}", "stream", chain, new=new)
            # A worker that does not run yet is started by its supervisor: nobody is there to answer a start.
            if verb != "start":
                ids.append(commands.request(conn, role, verb, {"audit_log": line}, reason, chain))
        if verb == "start" and rows:
            conn.execute("SELECT pg_catalog.pg_notify(%s, '')", (commands.CHANNEL,))
    return Changed(sorted(rows), ids)


def _check_chains(conn: Connection, chains: Sequence[str]) -> None:
    known = {row[0] for row in conn.execute("SELECT chain FROM vsql_sync.streams")}
    unknown = [chain for chain in chains if chain not in known]
    if unknown:
        raise RefusedError(
            f"there is no stream {', '.join(unknown)} on this node", hint="see `syncctl status`"
        )
    if not known:
        raise RefusedError("this node has no streams", hint="add a peer first: `syncctl node add-peer`")


def require_reason(reason: str) -> str:
    """The reason, trimmed. Raises UserError when there is none."""
    if not reason.strip():
        raise UserError(
            "a decision needs a reason", hint='--reason "…" says why; it is kept in the audit log'
        )
    return reason.strip()


def require_incoming(conn: Connection, chain: str) -> None:
    """Raise RefusedError unless this node applies such a stream."""
    row = conn.execute(
        "SELECT FROM vsql_sync.streams WHERE chain = %s AND direction = 'in'", (chain,)
    ).fetchone()
    if row is None:
        raise RefusedError(f"there is no incoming stream {chain} on this node", hint="see `syncctl status`")


class Decision(NamedTuple):
    """A decision that was written, and the command that tells the worker of it."""

    id: int
    command: int


_PLACE = {
    "topic": "text",
    "partition": "integer",
    "kafka_offset": "bigint",
    "sequence": "bigint",
    "xid": "bigint",
    "commit_lsn": "pg_lsn",
    "commit_time": "timestamptz",
}
"""Columns that say what a decision is about."""


def decide(conn: Connection, chain: str, kind: str, place: Mapping[str, str | int], reason: str) -> Decision:
    """Write a decision, its line of the log, and the command that has the worker look at it.

    What was decided on before, in this way or another, is refused.
    """
    reason = require_reason(reason)
    nodes.local(conn)
    names, slots = ", ".join(_PLACE), ", ".join(f"%s::{kind}" for kind in _PLACE.values())
    values = [place.get(name) for name in _PLACE]
    with errors("writing the decision"), conn.transaction():
        require_incoming(conn, chain)
        same = conn.execute(
            "SELECT id FROM vsql_sync.decisions WHERE chain = %s"  # noqa: S608 - our own names
            " AND split_part(kind, '-', 2) = split_part(%s, '-', 2)"
            f" AND ({names}) IS NOT DISTINCT FROM ({slots})".encode(),
            (chain, kind, *values),
        ).fetchone()
        if same is not None:
            raise RefusedError(f"this was decided before (decision {same[0]})", hint="see `syncctl status`")
        made = conn.execute(
            f"INSERT INTO vsql_sync.decisions (chain, kind, reason, {names})"  # noqa: S608 - our own names
            f" VALUES (%s, %s, %s, {slots}) RETURNING id".encode(),
            (chain, kind, reason, *values),
        ).fetchone()
        assert made is not None  # noqa: S101 - INSERT … RETURNING has a row
        new = {"kind": kind, "decision": made[0], "reason": reason, **place}
        line = oplog.record(conn, f"stream.{kind}", "stream", chain, new=new)
        args = {"decision": made[0], "audit_log": line}
        command = commands.request(conn, "consumer", "retry", args, reason, chain)
    return Decision(int(made[0]), command)


def outcome(conn: Connection, changed: Changed, timeout: float) -> list[dict[str, str]]:
    """What the workers say to an order, waiting at most `timeout` seconds for those that are running."""
    running = {(one.chain, one.direction) for one in status.read(conn) if one.state != "not running"}
    told = []
    deadline = time.monotonic() + timeout
    for (chain, direction), command_id in zip(changed.streams, changed.command_ids, strict=True):
        left = max(0.0, deadline - time.monotonic()) if (chain, direction) in running else 0.0
        found = commands.wait(conn, command_id, 1, left)
        if found:
            said = "done" if found[0].ok else "failed"
            answer = f"{said}: {found[0].message}" if found[0].message else said
        elif (chain, direction) in running:
            answer = f"asked for; its worker has not answered within {timeout:g} s"
        else:
            answer = "noted; its worker does not run now and will obey when it does"
        told.append({"chain": chain, "direction": direction, "answer": answer})
    return told
