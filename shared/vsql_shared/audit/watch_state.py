"""How far the background verification is, and the breaks it found: tables audit_watch and audit_breaks.

Not here: verifying (watch.py, watch_topic.py). Rules:

* What is kept is what people are shown, and the head that was verified last, which the chain must still have.
  Nothing in it makes anything count as verified: who can write the tables could say so.
* A break is noted once while it lasts, whatever words are found for it, and its row stays when it is gone.
* What others wrote (names, reasons) is made printable and short before it is noted: no record can keep a
  break from being written down.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from typing import Any, Literal

from psycopg.types.json import Jsonb

from vsql_shared.audit.chain import EMPTY_HEAD, ChainHead
from vsql_shared.audit.tree import decode_tree, encode_tree, is_known
from vsql_shared.audit.verify import Problem
from vsql_shared.errors import DecodeError
from vsql_shared.pg.connect import Connection, errors

Source = Literal["trail", "topic"]
WHOLE_TOPIC = ""
"""The name of the topic's row: it is verified as one."""

_log = logging.getLogger(__name__)

_LONGEST = 900
"""Characters of a text that are noted."""
_MAX_SEQUENCE = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Break:
    """What did not verify, since when that is known, and since when it is not found any more."""

    source: str
    chain: str
    sequence: int | None
    event_id: str | None
    what: str
    found_at: datetime
    gone_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """What `syncctl status` shows of a chain, or of the topic."""

    source: str
    chain: str
    verified_to: int
    verified_at: datetime | None
    whole_to: int | None
    whole_at: datetime | None


def encode_head(head: ChainHead) -> dict[str, Any]:
    """A head as JSON can hold it."""
    shown = asdict(head) | {"tree": encode_tree(head.tree)}
    return {name: value.hex() if isinstance(value, bytes) else value for name, value in shown.items()}


def decode_head(value: object) -> ChainHead:
    """The head again. Raises DecodeError."""
    if not isinstance(value, dict) or value.keys() != {one.name for one in fields(ChainHead)}:
        raise DecodeError("a kept head of another form")
    try:
        raw = {name: bytes.fromhex(value[name]) for name in ("incarnation", "entry_hash", "tree")}
        head = replace(EMPTY_HEAD, **(value | raw | {"tree": decode_tree(raw["tree"])}))
    except (TypeError, ValueError) as error:
        raise DecodeError("a kept head of another form") from error
    if any(type(getattr(head, one.name)) is not type(one.default) for one in fields(ChainHead)):
        raise DecodeError("a kept head with a value of another type")
    if not 0 <= head.sequence <= _MAX_SEQUENCE or not (head.tree == () or is_known(head.tree, head.sequence)):
        raise DecodeError("a kept head that no chain has")
    return head


def load(conn: Connection) -> dict[str, ChainHead]:
    """The head that was verified last of every chain that was looked at before."""
    with errors("reading how far the trail is verified"):
        rows = conn.execute(
            "SELECT chain, newest FROM vsql_sync.audit_watch WHERE source = 'trail' ORDER BY 1"
        ).fetchall()
    found = {}
    for chain, newest in rows:
        try:
            found[chain] = decode_head(newest) if newest is not None else EMPTY_HEAD
        except DecodeError as error:
            found[chain] = EMPTY_HEAD
            _log.warning("what was kept of chain %s in vsql_sync.audit_watch is %s", chain, error.message)
    return found


def save(conn: Connection, chain: str, newest: ChainHead, *, is_last: bool) -> None:
    """Keep the newest entry that was verified; `is_last`: it is the newest there is."""
    with errors("noting how far the trail is verified"):
        conn.execute(
            "INSERT INTO vsql_sync.audit_watch AS w (source, chain, verified_to, verified_at, newest)"
            " VALUES ('trail', %(chain)s, %(to)s, CASE WHEN %(last)s THEN now() END, %(newest)s)"
            " ON CONFLICT (source, chain) DO UPDATE SET verified_to = excluded.verified_to,"
            " verified_at = coalesce(excluded.verified_at, w.verified_at), newest = excluded.newest",
            {
                "chain": chain,
                "to": newest.sequence,
                "last": is_last,
                "newest": Jsonb(encode_head(newest)),
            },
        )


def whole(conn: Connection, source: Source, chain: str, to: int) -> None:
    """A pass over all of it, from its first entry on, found nothing."""
    with errors("noting what verifies"):
        conn.execute(
            "INSERT INTO vsql_sync.audit_watch (source, chain, whole_to, whole_at) VALUES (%s, %s, %s, now())"
            " ON CONFLICT (source, chain) DO UPDATE SET whole_to = excluded.whole_to, whole_at = now()",
            (source, chain, to),
        )


def note(conn: Connection, source: Source, problem: Problem) -> bool:
    """Note a break; False when it was known."""
    event = None if problem.event_id is None else printable(problem.event_id)
    with errors("noting a break of the trail"):
        row = conn.execute(
            "SELECT vsql_sync.note_audit_break(%s, %s, %s, %s, %s)",
            (source, printable(problem.chain), problem.sequence, event, printable(problem.what)),
        ).fetchone()
    return row is not None and row[0] is not None


def end(conn: Connection, source: Source, chain: str) -> None:
    """A whole pass did not find this chain's breaks any more."""
    with errors("noting that breaks are gone"):
        conn.execute("SELECT vsql_sync.end_audit_breaks(%s, %s)", (source, printable(chain)))


def open_breaks(conn: Connection) -> list[Break]:
    """Breaks that last, the oldest first."""
    return breaks(conn, only_open=True)


def breaks(conn: Connection, *, only_open: bool = False) -> list[Break]:
    """Every break there ever was, or those that last: the oldest first."""
    with errors("reading the breaks of the trail"):
        rows = conn.execute(
            "SELECT source, chain, sequence, event_id, what, found_at, gone_at FROM vsql_sync.audit_breaks"
            " WHERE gone_at IS NULL OR NOT %s ORDER BY id",
            (only_open,),
        ).fetchall()
    return [Break(*row) for row in rows]


def progress(conn: Connection) -> list[Progress]:
    """How far each chain, and the topic, is verified."""
    with errors("reading how far the trail is verified"):
        rows = conn.execute(
            "SELECT source, chain, verified_to, verified_at, whole_to, whole_at FROM vsql_sync.audit_watch"
            " ORDER BY source DESC, chain"
        ).fetchall()
    return [Progress(*row) for row in rows]


def printable(text: str) -> str:
    """A text that every place can hold: short, and without NUL or other control characters."""
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text[:_LONGEST])
