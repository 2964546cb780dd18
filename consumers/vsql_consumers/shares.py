"""Shares of a stream in this node's database: who has them, how far they are, what was found.

Not here: who is to have them (members.py). No function commits. Rules (docs/design/0015):

* A share's row is locked by the transaction that applies rows of it, and says how far it is. So rows are
  applied once, whoever believes to have the share.
* Giving a share away waits for nobody: one that is being applied is given next time.
* A member is a session: its number is free again when that has ended.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vsql_consumers.members import PartReceipt
from vsql_shared import names
from vsql_shared.audit.rows import microseconds, timestamp
from vsql_shared.errors import RefusedError, TransientError
from vsql_shared.pg.connect import Connection

MOST_MEMBERS = 64
"""Numbers a member may have. Each has a replication origin of its own, which stays."""


@dataclass(frozen=True, slots=True)
class Share:
    """A row of vsql_sync.shares."""

    member: int | None
    sequence: int
    stopped_at: int | None
    record: str | None
    error: str | None


def _member_key(chain: str, number: int) -> int:
    return names.advisory_key(chain, f"member {number}")


def take_number(conn: Connection, chain: str) -> int:
    """The lowest number that is free, for as long as this session lives. Raises RefusedError."""
    for number in range(MOST_MEMBERS):
        row = conn.execute(
            "SELECT pg_catalog.pg_try_advisory_lock(%s)", (_member_key(chain, number),)
        ).fetchone()
        if row is not None and row[0]:
            return number
    raise RefusedError(
        f"stream {chain} has {MOST_MEMBERS} members already", hint="lower apply.members of some services"
    )


def present(conn: Connection, chain: str) -> list[int]:
    """The members whose sessions live."""
    keys = {_member_key(chain, number) & 0xFFFFFFFFFFFFFFFF: number for number in range(MOST_MEMBERS)}
    rows = conn.execute(
        "SELECT l.classid::bigint, l.objid::bigint FROM pg_catalog.pg_locks l"
        " WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 AND l.database ="
        " (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database())"
    ).fetchall()
    held = {high << 32 | low for high, low in rows}
    return sorted(number for key, number in keys.items() if key in held)


def load(conn: Connection, chain: str) -> dict[int, Share]:
    """All shares of a stream."""
    rows = conn.execute(
        "SELECT share, member, sequence, stopped_at, stopped_record, stopped_error FROM vsql_sync.shares"
        " WHERE chain = %s",
        (chain,),
    ).fetchall()
    return {row[0]: Share(*row[1:]) for row in rows}


def of_member(conn: Connection, chain: str, member: int) -> dict[int, int]:
    """Shares a member is to apply now, with the sequence each stands at."""
    found = load(conn, chain)
    return {
        share: one.sequence for share, one in found.items() if one.member == member and one.stopped_at is None
    }


def ensure(conn: Connection, chain: str, wanted: Iterable[int]) -> None:
    """Make the rows of shares that came up."""
    for share in wanted:
        conn.execute(
            "INSERT INTO vsql_sync.shares (chain, share) VALUES (%s, %s) ON CONFLICT DO NOTHING",
            (chain, share),
        )


def give(conn: Connection, chain: str, changes: Mapping[int, int | None]) -> int:
    """Give shares to members; those whose rows are being applied stay where they are. How many were given."""
    given = 0
    for share, member in changes.items():
        given += conn.execute(
            "UPDATE vsql_sync.shares SET member = %s, updated_at = now() WHERE (chain, share) IN"
            " (SELECT chain, share FROM vsql_sync.shares WHERE chain = %s AND share = %s"
            " FOR UPDATE SKIP LOCKED)",
            (member, chain, share),
        ).rowcount
    return given


def hold(conn: Connection, chain: str, member: int, expected: Mapping[int, int]) -> None:
    """Lock shares for the open transaction. Raises TransientError when they are not ours as we believe."""
    rows = conn.execute(
        "SELECT share, sequence FROM vsql_sync.shares WHERE chain = %s AND share = ANY(%s) AND member = %s"
        " AND stopped_at IS NULL ORDER BY share FOR UPDATE",
        (chain, list(expected), member),
    ).fetchall()
    if dict(rows) != dict(expected):
        raise TransientError(f"shares of {chain} were given to another member")


def hold_stopped(conn: Connection, chain: str, wanted: Collection[int], sequence: int) -> None:
    """Lock shares whose members stopped at an entry. Raises TransientError when they did not."""
    rows = conn.execute(
        "SELECT share FROM vsql_sync.shares WHERE chain = %s AND share = ANY(%s) AND stopped_at = %s"
        " ORDER BY share FOR UPDATE",
        (chain, list(wanted), sequence),
    ).fetchall()
    if {row[0] for row in rows} != set(wanted):
        raise TransientError(f"shares of {chain} are not stopped at entry {sequence} any more")


def advance(conn: Connection, chain: str, wanted: Collection[int], sequence: int) -> None:
    """Shares have come to an entry; what stopped them there is over."""
    conn.execute(
        "UPDATE vsql_sync.shares SET sequence = greatest(sequence, %s), updated_at = now(),"
        " stopped_at = CASE WHEN stopped_at > %s THEN stopped_at END,"
        " stopped_record = CASE WHEN stopped_at > %s THEN stopped_record END,"
        " stopped_error = CASE WHEN stopped_at > %s THEN stopped_error END"
        " WHERE chain = %s AND share = ANY(%s)",
        (sequence, sequence, sequence, sequence, chain, list(wanted)),
    )


def stop(
    conn: Connection, chain: str, member: int, wanted: Collection[int], sequence: int, record: str, error: str
) -> None:
    """A member cannot apply an entry of its shares; `record`: what did not verify there, or nothing."""
    conn.execute(
        "UPDATE vsql_sync.shares SET stopped_at = %s, stopped_record = nullif(%s, ''), stopped_error = %s"
        " WHERE chain = %s AND share = ANY(%s) AND member = %s AND sequence < %s AND stopped_at IS NULL",
        (sequence, record, error[:1000], chain, list(wanted), member, sequence),
    )


def try_again(conn: Connection, chain: str) -> None:
    """Have members try again what did not verify."""
    conn.execute(
        "UPDATE vsql_sync.shares SET stopped_at = NULL, stopped_record = NULL, stopped_error = NULL"
        " WHERE chain = %s AND stopped_record IS NOT NULL",
        (chain,),
    )


def save_part(conn: Connection, chain: str, one: PartReceipt) -> None:
    """Write what was found, in the transaction that applies it."""
    conn.execute(
        "INSERT INTO vsql_sync.part_receipts (chain, sequence, share, parts, verdicts, commit_time, detail)"
        " VALUES (%s, %s, %s, %s, %s, %s, %s)",
        (
            chain,
            one.sequence,
            one.share,
            json.dumps(dict(one.parts)),
            json.dumps(dict(one.verdicts)),
            None if one.commit_time is None else timestamp(one.commit_time),
            json.dumps(dict(one.detail)),
        ),
    )


def load_parts(conn: Connection, chain: str, first: int, last: int) -> dict[int, list[PartReceipt]]:
    """What was found in the batches of entries first … last."""
    rows = conn.execute(
        "SELECT sequence, share, parts, verdicts, commit_time, detail FROM vsql_sync.part_receipts"
        " WHERE chain = %s AND sequence BETWEEN %s AND %s ORDER BY sequence, share",
        (chain, first, last),
    ).fetchall()
    found: dict[int, list[PartReceipt]] = {}
    for sequence, share, parts, verdicts, time, detail in rows:
        moment = None if time is None else microseconds(time)
        found.setdefault(sequence, []).append(PartReceipt(sequence, share, parts, verdicts, moment, detail))
    return found


def forget_parts(conn: Connection, chain: str, up_to: int) -> None:
    """Forget part receipts that were merged; in the transaction that writes the receipts."""
    conn.execute("DELETE FROM vsql_sync.part_receipts WHERE chain = %s AND sequence <= %s", (chain, up_to))


def decisions_mark(conn: Connection, chain: str) -> Any:
    """Something that changes when an operator decides."""
    return conn.execute(
        "SELECT count(*), max(id) FROM vsql_sync.decisions WHERE chain = %s", (chain,)
    ).fetchone()


def done_up_to(conn: Connection, chain: str) -> int:
    """The entry up to which everything is done."""
    row = conn.execute("SELECT sequence FROM vsql_sync.apply_progress WHERE chain = %s", (chain,)).fetchone()
    return int(row[0]) if row else 0
