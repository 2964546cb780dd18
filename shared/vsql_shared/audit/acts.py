"""What operators ordered, held against what the chains say was obeyed.

Not here: verifying the chains (verify.py); do that first, because this module believes the entries it is
given. Rules:

* A signed act names the row that ordered it and that row's hash (pg/acts.py): the row must still be there and
  give that hash. Otherwise it was changed or deleted.
* An order that is answered as obeyed stands in the chain of the worker that obeyed it, which signs before it
  answers. A line of the operators' log that orders something leads to a command. Otherwise it was inserted.
* Orders that wait for their worker, or that it refused, are in no chain.
* Entries and rows are read in one snapshot, so that a node at work verifies like one at rest.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from vsql_shared.audit.entries import OPERATOR_ACTION, AuditEntry
from vsql_shared.audit.rows import parse
from vsql_shared.audit.verify import PAGE, Problem
from vsql_shared.errors import DecodeError
from vsql_shared.names import ack_chain
from vsql_shared.pg import oplog
from vsql_shared.pg.connect import Connection, errors

ORDERS = (
    "stream.pause",
    "stream.resume",
    "stream.retry",
    "stream.ignore-record",
    "stream.skip-batch",
    "stream.skip-transaction",
    "stream.park-transaction",
    "stream.replay-transaction",
    "key.rotate-dek",
    "key.rotate-kek",
    "audit.prune",
    "sync.degrade",
    "sync.restore",
)
"""Actions of the operators' log that a worker obeys; the others are done when their line is written."""

_RECORD = re.compile(r"(audit_log|commands)/(\d{1,18})")
_SIGNED = (
    "SELECT document FROM vsql_sync.audit_documents WHERE event_type = %s AND chain IS NOT NULL"
    " ORDER BY chain, sequence"
)
_OBEYED = (
    "SELECT r.command_id, r.chain, r.direction, c.verb FROM vsql_sync.command_results r"
    " JOIN vsql_sync.commands c ON c.id = r.command_id WHERE r.ok ORDER BY 1, 2"
)
# A line is true when a chain names it, or when a command that nobody has obeyed yet does.
_UNORDERED = (
    "SELECT l.id, l.action, coalesce(l.target_id, '') FROM vsql_sync.audit_log l WHERE l.action = ANY(%s)"
    " AND l.id <> ALL(%s) AND NOT EXISTS (SELECT FROM vsql_sync.commands c"
    "   WHERE c.args -> 'audit_log' = to_jsonb(l.id) AND NOT EXISTS ("
    "     SELECT FROM vsql_sync.command_results r WHERE r.command_id = c.id AND r.ok))"
    " ORDER BY l.id"
)


def compare_acts(
    conn: Connection, node: str, chain: str | None = None, skip: Collection[str] = ()
) -> list[Problem]:
    """The first act of each chain that was changed or deleted, and the first that was inserted.

    `skip` names chains that do not verify by themselves: what they say proves nothing.
    `conn` must be in autocommit mode and outside of a transaction.
    """
    with errors("comparing the operators' log with the chains"), conn.transaction():
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        return _Comparison(conn, node, chain, frozenset(skip)).problems()


@dataclass(frozen=True, slots=True)
class _Act:
    """A signed act, and the row it names."""

    entry: AuditEntry
    act: str
    command: int
    kind: str
    number: int
    sha256: str


class _Comparison:
    """One comparison: `_signed` first, because the others ask what was signed."""

    def __init__(self, conn: Connection, node: str, chain: str | None, skip: frozenset[str]) -> None:
        self._conn, self._node, self._chain, self._skip = conn, node, chain, skip
        self._lines: set[int] = set()
        self._obeyed: set[tuple[str, int]] = set()

    def problems(self) -> list[Problem]:
        first: dict[tuple[str, bool], Problem] = {}
        for found in (*self._signed(), *self._unsigned(), *self._unordered()):
            first.setdefault((found.chain, found.sequence is None), found)
        return list(first.values())

    def _signed(self) -> Iterator[Problem]:
        """What the chains say, against the rows."""
        with self._conn.cursor(name="vsql_sync_acts") as cursor:
            cursor.itersize = PAGE
            cursor.execute(_SIGNED, (OPERATOR_ACTION,))
            for (encoded,) in cursor:
                act = _parse(bytes(encoded))
                if act is None:
                    continue
                entry = act.entry
                self._obeyed.add((entry.chain, act.command))
                if act.kind == "audit_log":
                    self._lines.add(act.number)
                what = self._changed(act) if self._asked(entry.chain) else None
                if what is not None:
                    yield Problem(entry.chain, entry.sequence, str(uuid.UUID(bytes=entry.event_id)), what)

    def _changed(self, act: _Act) -> str | None:
        row = f"vsql_sync.{act.kind}/{act.number}, the order of this act ({act.act}),"
        read = oplog.line if act.kind == "audit_log" else oplog.command
        try:
            text = read(self._conn, act.number)
        except (ValueError, RecursionError):
            # A superuser may write JSON that Python does not read: numbers without end, depths without end.
            return f"{row} was changed: it holds what cannot be read"
        if text is None:
            return f"{row} was deleted: it is not there"
        if hashlib.sha256(text.encode()).hexdigest() != act.sha256:
            return f"{row} was changed: it is not what was signed"
        return None

    def _unsigned(self) -> Iterator[Problem]:
        """Commands that are answered as obeyed, and that the worker's chain does not know."""
        for number, stream, direction, verb in self._conn.execute(_OBEYED).fetchall():
            chain = stream if direction == "out" else ack_chain(stream, self._node)
            if self._asked(chain) and (chain, number) not in self._obeyed:
                what = f"vsql_sync.commands/{number} ({verb}) is answered as obeyed and was never signed"
                yield Problem(chain, None, None, f"{what}: it was inserted, or its answer was")

    def _unordered(self) -> Iterator[Problem]:
        """Lines of the operators' log that no worker was told of."""
        rows = self._conn.execute(_UNORDERED, (list(ORDERS), list(self._lines))).fetchall()
        for number, action, target in rows:
            chains = (target, ack_chain(target, self._node))
            # Where a chain was cut, what it no longer says is no other finding.
            if any(map(self._asked, chains)) and not self._skip.intersection(chains):
                what = f"vsql_sync.audit_log/{number} ({action}) orders what no command and no chain knows"
                yield Problem(target, None, None, f"{what}: it was inserted")

    def _asked(self, chain: str) -> bool:
        return self._chain in (None, chain) and chain not in self._skip


def _parse(encoded: bytes) -> _Act | None:
    """An entry that names an order; None for another one. What does not parse, verify.py has named."""
    try:
        entry = parse(encoded).entry
        detail: Any = json.loads(entry.detail)
    except (DecodeError, ValueError):
        return None
    if not isinstance(detail, dict):
        return None
    record = _RECORD.fullmatch(str(detail.get("record")))
    command = detail.get("command")
    if record is None or not isinstance(command, int):
        return None
    return _Act(entry, str(detail.get("act")), command, record[1], int(record[2]), str(detail.get("sha256")))
