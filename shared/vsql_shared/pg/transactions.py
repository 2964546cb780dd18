"""Operators' orders about what a stream cannot apply: try again; skip, park and replay a transaction.

Not here: obeying (the consumer). Rules (docs/design/0011):

* Only the transaction that blocks the stream now can be skipped or parked: nobody decides on what he has not
  seen fail, and a mistyped number hits nothing.
* A transaction is known by its xid, the position of its commit and its time, together: positions come again
  after a failover, and xids come again anyway.
* A transaction that was parked can be replayed while it was not replayed.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from vsql_shared import lsn
from vsql_shared.audit.rows import timestamp
from vsql_shared.errors import DecodeError, RefusedError, UserError
from vsql_shared.pg import commands, nodes, oplog
from vsql_shared.pg.connect import Connection, errors
from vsql_shared.pg.control import Changed, Decision, decide, require_incoming, require_reason

SKIP: Literal["skip-transaction"] = "skip-transaction"
PARK: Literal["park-transaction"] = "park-transaction"


@dataclass(frozen=True, slots=True)
class Ordered:
    """An order on one transaction, and the command that tells the worker."""

    chain: str
    decision: int
    command: int
    transaction: dict[str, Any]
    """xid, and lsn of its commit."""

    @property
    def told(self) -> Changed:
        """The worker whose answer is waited for."""
        return Changed([(self.chain, "in")], [self.command])


@dataclass(frozen=True, slots=True)
class Parked:
    """A transaction that waits in the dead-letter topic, or waited there."""

    decision: int
    chain: str
    xid: int
    lsn: str
    commit_time: datetime
    changes: int
    tables: list[str]
    reason: str
    parked_at: datetime
    replayed_at: datetime | None
    verdicts: dict[str, int]
    """Of the replay."""


def retry(conn: Connection, chain: str, reason: str) -> Changed:
    """Have a stream that stands or waits try again now."""
    reason = require_reason(reason)
    nodes.local(conn)
    with errors("ordering a retry"), conn.transaction():
        rows = conn.execute(
            "SELECT direction FROM vsql_sync.streams WHERE chain = %s AND state <> 'FINISHED' ORDER BY 1",
            (chain,),
        ).fetchall()
        if not rows:
            raise RefusedError(f"there is no stream {chain} on this node", hint="see `syncctl status`")
        ids = []
        for (direction,) in rows:
            role: commands.Role = "producer" if direction == "out" else "consumer"
            new = {"direction": direction, "reason": reason}
            line = oplog.record(conn, "stream.retry", "stream", chain, new=new)
            ids.append(commands.request(conn, role, "retry", {"audit_log": line}, reason, chain))
    return Changed([(chain, direction) for (direction,) in rows], ids)


def skip(conn: Connection, chain: str, transaction: str, reason: str) -> Ordered:
    """Decide that the transaction that blocks a stream is not applied here, ever."""
    return _decided(conn, chain, SKIP, transaction, reason)


def park(conn: Connection, chain: str, transaction: str, reason: str) -> Ordered:
    """Decide that the transaction that blocks a stream is kept in the dead-letter topic, still sealed."""
    with errors("looking how the stream is applied"):
        row = conn.execute(
            "SELECT 1 FROM vsql_sync.streams WHERE chain = %s AND apply_mode = 'partitioned'", (chain,)
        ).fetchone()
    if row is not None:
        raise RefusedError(
            f"stream {chain} is applied partitioned: parts of the transaction may be in already,"
            " by other members",
            hint="mend what it does not fit and `syncctl stream retry`, or `syncctl stream skip` the rest",
        )
    return _decided(conn, chain, PARK, transaction, reason)


def replay(conn: Connection, chain: str, transaction: str, reason: str) -> Ordered:
    """Have a parked transaction applied after all."""
    reason = require_reason(reason)
    xid, position = _parse(transaction)
    nodes.local(conn)
    with errors("ordering a replay"), conn.transaction():
        require_incoming(conn, chain)
        found = [
            one
            for one in parked(conn, chain)
            if xid == one.xid or (position and lsn.parse(one.lsn) == position)
        ]
        waiting = [one for one in found if one.replayed_at is None]
        if not waiting:
            done = found[0].replayed_at if found else None
            why = f"it was replayed at {done.isoformat()}" if done else "it is not parked"
            raise RefusedError(
                f"transaction {transaction} of stream {chain} cannot be replayed: {why}",
                hint="see `syncctl stream parked`",
            )
        if len(waiting) > 1:
            raise RefusedError(
                f"{len(waiting)} parked transactions of stream {chain} are called {transaction}",
                hint="name it by its LSN, as `syncctl stream parked` shows it",
            )
        one = waiting[0]
        named = {"xid": one.xid, "lsn": one.lsn}
        new = {"parked": one.decision, "reason": reason, **named}
        line = oplog.record(conn, "stream.replay-transaction", "stream", chain, new=new)
        args = {"parked": one.decision, "audit_log": line}
        number = commands.request(conn, "consumer", "replay", args, reason, chain)
    return Ordered(chain, one.decision, number, named)


def parked(conn: Connection, chain: str | None = None) -> list[Parked]:
    """What was parked on this node, oldest first."""
    with errors("reading what is parked"):
        rows = conn.execute(
            "SELECT p.decision, p.chain, p.xid, p.commit_lsn::text, p.commit_time,"
            " coalesce(sum(b.changes), 0)::bigint,"
            " ARRAY(SELECT DISTINCT t FROM vsql_sync.parked_batches o, unnest(o.tables) t"
            "   WHERE o.decision = p.decision ORDER BY 1),"
            " coalesce(min(d.reason), ''), p.parked_at, p.replayed_at, p.verdicts"
            " FROM vsql_sync.parked p LEFT JOIN vsql_sync.parked_batches b USING (decision)"
            " LEFT JOIN vsql_sync.decisions d ON d.id = p.decision"
            " WHERE %(chain)s::text IS NULL OR p.chain = %(chain)s GROUP BY p.decision ORDER BY p.decision",
            {"chain": chain},
        ).fetchall()
    return [Parked(*row) for row in rows]


def _decided(
    conn: Connection,
    chain: str,
    kind: Literal["skip-transaction", "park-transaction"],
    given: str,
    reason: str,
) -> Ordered:
    wanted = _parse(given)
    require_reason(reason)
    nodes.local(conn)
    with errors("reading what blocks the stream"), conn.transaction():
        require_incoming(conn, chain)
        found = _blocking(conn, chain)
        named = {"xid": found["xid"], "lsn": found["lsn"]}
        if wanted not in ((found["xid"], None), (None, lsn.parse(found["lsn"]))):
            raise RefusedError(
                f"stream {chain} is blocked by transaction {found['xid']} at {found['lsn']}, not by {given}",
                hint="only the transaction that blocks a stream can be passed over",
            )
        place = {
            "xid": found["xid"],
            "commit_lsn": found["lsn"],
            "commit_time": timestamp(found["time"]).isoformat(),
        }
        made: Decision = decide(conn, chain, kind, place, reason)
    return Ordered(chain, made.id, made.command, named)


def _blocking(conn: Connection, chain: str) -> dict[str, Any]:
    """The transaction that blocks a stream: xid, lsn, time. Raises RefusedError when there is none."""
    row = conn.execute(
        "SELECT s.kind, w.state, w.detail -> 'blocked' FROM vsql_sync.streams s"
        " LEFT JOIN vsql_sync.stream_status w USING (chain, direction)"
        " WHERE s.chain = %s AND s.direction = 'in'",
        (chain,),
    ).fetchone()
    kind, state, blocked = row if row is not None else (None, None, None)
    if kind == "copy":
        raise RefusedError(
            f"{chain} is a first copy: it has no transactions to pass over",
            hint="mend the target's table; the copy then goes on",
        )
    if state != "blocked" or not blocked:
        raise RefusedError(
            f"stream {chain} is not blocked, it is {state or 'not running'}: there is nothing to pass over",
            hint="see `syncctl status`; what cannot be verified is for `syncctl stream skip-batch`",
        )
    found = blocked.get("transaction")
    if not found:
        raise RefusedError(
            f"stream {chain} is blocked, and it is not known by which transaction",
            hint=f"mend the target and `syncctl stream retry`, or `stream skip-batch --sequence "
            f"{blocked.get('sequence')}`",
        )
    return dict(found)


def _parse(text: str) -> tuple[int | None, int | None]:
    """(xid, None) or (None, LSN) of what the operator wrote. Raises UserError."""
    if text.isascii() and text.isdigit() and len(text) <= 10:
        return int(text), None
    try:
        return None, lsn.parse(text)
    except DecodeError:
        raise UserError(
            f"{text[:40]!r} is no transaction",
            hint="give its xid (741) or the LSN of its commit (0/16B3748), as `syncctl status` shows them",
        ) from None
