"""An operator's order to prune this stream's chain, as its worker obeys it: in the chain, then on the topic.

Not here: archiving and deleting rows (`syncctl audit archive`, `prune`), what may be pruned
(audit/pruning.py). Two orders, because the second must follow the first one's entry (docs/design/0020):

* `prune-chain` puts `trail_pruned` with the base into the chain. What the order says is held against this
  node's tables and the cosigned checkpoint before.
* `prune-topic` writes tombstones for the entries up to the base the chain says already; again, if asked so.
  Entries above it are not touched, whatever the order says.

An order that cannot be obeyed is answered so, and the stream goes on. It waits while tombstones go out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vsql_shared import names
from vsql_shared.audit.base import Base
from vsql_shared.audit.bases import base_at, said_base
from vsql_shared.audit.checkpoint import Log
from vsql_shared.audit.entries import TRAIL_PRUNED
from vsql_shared.audit.pruning import require_prunable
from vsql_shared.errors import RefusedError, VsqlSyncError
from vsql_shared.pg.connect import Connection, errors

if TYPE_CHECKING:
    from vsql_producers.epoch import Writing
    from vsql_producers.outlet import Outlet
    from vsql_shared.pg.commands import Command

VERBS = frozenset({"prune-chain", "prune-topic"})
_PAGE = 10_000
"""Rows fetched at a time."""


def obey(conn: Connection, command: Command, outlet: Outlet, writing: Writing) -> tuple[bool, str]:
    """Do it; (whether it was done, what to answer)."""
    log = Log(writing.cluster, writing.chain)
    try:
        if command.verb == "prune-chain":
            return True, _say(conn, command, outlet, writing, log)
        return True, _bury(conn, outlet, writing, log)
    except VsqlSyncError as error:
        return False, str(error)


def _say(conn: Connection, command: Command, outlet: Outlet, writing: Writing, log: Log) -> str:
    base = Base.decode(str(command.args.get("base")))
    size = base.head.sequence
    text = f"chain {log.chain} begins behind entry {size}"
    said = said_base(conn, writing.trust, log)
    if said is not None and said.head.sequence >= size:
        if said.head == base.head:
            return text
        raise RefusedError(f"chain {log.chain} was pruned up to {said.head.sequence} already")
    # Noted by a worker that died before it could say so: that one is said, there is no other of its size.
    known = base_at(conn, log, size)
    base = known or base
    require_prunable(conn, log, base)
    if known is None:
        with errors("noting where a chain begins"):
            conn.execute(
                "INSERT INTO vsql_sync.audit_bases (chain, size, base) VALUES (%s, %s, %s)",
                (log.chain, size, base.encode()),
            )
    outlet.say(TRAIL_PRUNED, base.detail())
    return text


def _bury(conn: Connection, outlet: Outlet, writing: Writing, log: Log) -> str:
    base = said_base(conn, writing.trust, log)
    if base is None:
        raise RefusedError(f"chain {log.chain} does not say that it was pruned")
    count = outlet.publisher.bury(_keys(conn, log.chain, base.head.sequence))
    return f"{count} entries have tombstones"


def _keys(conn: Connection, chain: str, size: int) -> Iterator[bytes]:
    """Kafka's keys of the entries up to a sequence that this database still has."""
    after = 0
    while True:
        with errors("reading what is pruned"):
            rows = conn.execute(
                "SELECT epoch, incarnation, sequence FROM vsql_sync.vsql_sync_audit"
                " WHERE chain = %s AND sequence > %s AND sequence <= %s ORDER BY sequence LIMIT %s",
                (chain, after, size, _PAGE),
            ).fetchall()
        for epoch, incarnation, sequence in rows:
            yield names.audit_key(chain, epoch, incarnation.bytes, sequence)
            after = sequence
        if len(rows) < _PAGE:
            return
