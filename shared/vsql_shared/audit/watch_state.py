"""How far the background verification is, and the breaks it found: tables audit_watch and audit_breaks.

Not here: verifying (watch.py, watch_topic.py). Rules: positions only save work, they prove nothing; a break
is noted once while it lasts, and its row stays when it is gone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, Literal

from psycopg.types.json import Jsonb

from vsql_shared.audit.chain import EMPTY_HEAD, ChainHead
from vsql_shared.audit.tree import decode_tree, encode_tree
from vsql_shared.audit.verify import Problem
from vsql_shared.pg.connect import Connection, errors

Source = Literal["trail", "topic"]
TOPIC = ""
"""The topic's row in audit_watch: no chain has this name."""


@dataclass(frozen=True, slots=True)
class Watched:
    """One chain: the newest entry that was verified, and the pass over all of it."""

    chain: str
    newest: ChainHead = EMPTY_HEAD
    passing: ChainHead | None = None
    """How far the pass under way is; None between two."""


@dataclass(frozen=True, slots=True)
class Break:
    """What did not verify, and since when that is known."""

    source: str
    chain: str
    sequence: int | None
    event_id: str | None
    what: str
    found_at: datetime


@dataclass(frozen=True, slots=True)
class Progress:
    """What `syncctl status` shows of a chain."""

    chain: str
    verified_to: int
    verified_at: datetime | None
    whole_to: int | None
    whole_at: datetime | None


def encode_head(head: ChainHead) -> dict[str, Any]:
    """A head as JSON can hold it."""
    fields = asdict(head) | {"tree": encode_tree(head.tree)}
    return {name: value.hex() if isinstance(value, bytes) else value for name, value in fields.items()}


def decode_head(value: dict[str, Any]) -> ChainHead:
    """The head again."""
    raw = {name: bytes.fromhex(value[name]) for name in ("incarnation", "entry_hash", "tree")}
    return replace(ChainHead(**(value | {"tree": ()})), **(raw | {"tree": decode_tree(raw["tree"])}))  # type: ignore[arg-type]  # three kinds of bytes


def load(conn: Connection) -> dict[str, Watched]:
    """Every chain that was looked at before."""
    with errors("reading how far the trail is verified"):
        rows = conn.execute(
            "SELECT chain, newest, pass FROM vsql_sync.audit_watch WHERE chain <> '' ORDER BY 1"
        ).fetchall()
    return {
        chain: Watched(chain, decode_head(newest) if newest else EMPTY_HEAD, decode_head(at) if at else None)
        for chain, newest, at in rows
    }


def pass_age(conn: Connection) -> float:
    """Seconds since a pass over the trail began last; without end where none did."""
    with errors("reading when the trail was last verified"):
        row = conn.execute(
            "SELECT extract(epoch FROM now() - max(pass_began_at)) FROM vsql_sync.audit_watch"
            " WHERE chain <> ''"
        ).fetchone()
    return float("inf") if row is None or row[0] is None else float(row[0])


def save(conn: Connection, watched: Iterable[Watched]) -> None:
    """Keep where the newest entry and the pass are."""
    with errors("noting how far the trail is verified"):
        for one in watched:
            conn.execute(
                "INSERT INTO vsql_sync.audit_watch AS w"
                " (chain, verified_to, verified_at, newest, pass, pass_began_at)"
                " VALUES (%(chain)s, %(to)s, now(), %(newest)s, %(pass)s,"
                " CASE WHEN %(pass)s::jsonb IS NOT NULL THEN now() END)"
                " ON CONFLICT (chain) DO UPDATE SET verified_to = excluded.verified_to, verified_at = now(),"
                " newest = excluded.newest, pass = excluded.pass,"
                " pass_began_at = CASE WHEN w.pass IS NULL AND excluded.pass IS NOT NULL"
                " THEN now() ELSE w.pass_began_at END",
                {
                    "chain": one.chain,
                    "to": one.newest.sequence,
                    "newest": Jsonb(encode_head(one.newest)),
                    "pass": Jsonb(encode_head(one.passing)) if one.passing else None,
                },
            )


def whole(conn: Connection, chain: str, sequence: int) -> None:
    """A pass over all of a chain found nothing: what was wrong with it is gone."""
    source = "topic" if chain == TOPIC else "trail"
    with errors("noting that a chain verifies"):
        conn.execute(
            "INSERT INTO vsql_sync.audit_watch AS w (chain, whole_to, whole_at) VALUES (%s, %s, now())"
            " ON CONFLICT (chain) DO UPDATE SET whole_to = excluded.whole_to, whole_at = now()",
            (chain, sequence),
        )
        conn.execute(
            "UPDATE vsql_sync.audit_breaks SET gone_at = now() WHERE gone_at IS NULL AND source = %(source)s"
            " AND (%(source)s = 'topic' OR chain = %(chain)s)",
            {"source": source, "chain": chain},
        )


def load_topic(conn: Connection) -> str | None:
    """Where the reading of the topic is, as watch_topic.py wrote it."""
    with errors("reading how far the audit topic is verified"):
        row = conn.execute("SELECT pass FROM vsql_sync.audit_watch WHERE chain = %s", (TOPIC,)).fetchone()
    return json.dumps(row[0]) if row and row[0] is not None else None


def save_topic(conn: Connection, state: dict[str, Any] | None) -> None:
    """Keep it; None between two passes."""
    with errors("noting how far the audit topic is verified"):
        conn.execute(
            "INSERT INTO vsql_sync.audit_watch (chain, pass, verified_at) VALUES (%s, %s, now())"
            " ON CONFLICT (chain) DO UPDATE SET pass = excluded.pass, verified_at = now()",
            (TOPIC, None if state is None else Jsonb(state)),
        )


def note(conn: Connection, source: Source, problem: Problem) -> bool:
    """Note a break; False when it was known."""
    with errors("noting a break of the trail"):
        row = conn.execute(
            "SELECT vsql_sync.note_audit_break(%s, %s, %s, %s, %s)",
            (source, problem.chain, problem.sequence, problem.event_id, problem.what),
        ).fetchone()
    return row is not None and row[0] is not None


def open_breaks(conn: Connection) -> list[Break]:
    """Breaks that last, the oldest first."""
    with errors("reading the breaks of the trail"):
        rows = conn.execute(
            "SELECT source, chain, sequence, event_id, what, found_at FROM vsql_sync.audit_breaks"
            " WHERE gone_at IS NULL ORDER BY id LIMIT 1000"
        ).fetchall()
    return [Break(*row) for row in rows]


def progress(conn: Connection) -> list[Progress]:
    """How far each chain, and the topic, is verified."""
    with errors("reading how far the trail is verified"):
        rows = conn.execute(
            "SELECT chain, verified_to, verified_at, whole_to, whole_at FROM vsql_sync.audit_watch ORDER BY 1"
        ).fetchall()
    return [Progress(*row) for row in rows]
