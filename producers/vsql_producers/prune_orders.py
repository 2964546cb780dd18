"""An operator's order to prune this stream's chain, as its worker obeys it: in the chain, then on the topic.

Not here: archiving and deleting rows (`syncctl audit archive`, `prune`), what may be pruned
(audit/pruning.py). Two orders, because the second must follow the first one's entry (docs/design/0020):

* `prune-chain` puts `trail_pruned` with the base into the chain. What the order says is held against this
  node's tables and the cosigned checkpoint before. The entry goes into the table with the base's own row.
* `prune-topic` writes tombstones for the entries up to the base the chain says already; again, if asked so.
  Entries above it are not touched, whatever the order says.

An order counts for an hour, and only where a member of vsql_sync_admin gave it: operators may write orders
of other kinds. One that cannot be obeyed is answered so, and the stream goes on. It waits while tombstones go
out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vsql_shared import names
from vsql_shared.audit.base import Base
from vsql_shared.audit.bases import said_base
from vsql_shared.audit.checkpoint import Log
from vsql_shared.audit.entries import TRAIL_PRUNED
from vsql_shared.audit.pruning import require_prunable
from vsql_shared.errors import RefusedError, VsqlSyncError
from vsql_shared.pg import roles
from vsql_shared.pg.connect import Connection, errors

if TYPE_CHECKING:
    from vsql_producers.epoch import Writing
    from vsql_producers.outlet import Outlet
    from vsql_shared.pg.commands import Command

VERBS = frozenset({"prune-chain", "prune-topic"})
ORDER_SECONDS = 3600
"""How long an order to prune counts."""
_PAGE = 10_000
"""Rows fetched at a time."""


def obey(
    conn: Connection, command: Command, outlet: Outlet, writing: Writing, online_months: int
) -> tuple[bool, str]:
    """Do it; (whether it was done, what to answer)."""
    log = Log(writing.cluster, writing.chain)
    try:
        _require_given(conn, command)
        if command.verb == "prune-chain":
            return True, _say(conn, command, outlet, writing, log, online_months)
        return True, _bury(conn, outlet, writing, log)
    except VsqlSyncError as error:
        return False, str(error)


def _require_given(conn: Connection, command: Command) -> None:
    """An administrator gave the order, and not long ago: who gave up waiting may have changed the archive."""
    with errors("looking who ordered to prune"):
        row = conn.execute(
            "SELECT c.requested_at > now() - make_interval(secs => %(life)s), EXISTS ("
            "   SELECT FROM pg_catalog.pg_roles r LEFT JOIN pg_catalog.pg_roles a ON a.rolname = %(admin)s"
            "   WHERE r.rolname = c.requested_by AND (r.rolsuper"
            "     OR a.oid IS NOT NULL AND pg_catalog.pg_has_role(r.oid, a.oid, 'MEMBER')"
            "     OR r.oid = (SELECT relowner FROM pg_catalog.pg_class WHERE oid ="
            "       'vsql_sync.vsql_sync_audit'::pg_catalog.regclass)))"
            " FROM vsql_sync.commands c WHERE c.id = %(id)s",
            {"life": ORDER_SECONDS, "admin": roles.ADMIN, "id": command.id},
        ).fetchone()
    if row is None or not row[1]:
        raise RefusedError(f"only a member of {roles.ADMIN} orders to prune a chain")
    if not row[0]:
        raise RefusedError(
            f"the order is older than {ORDER_SECONDS} s", hint="give `syncctl audit prune` again"
        )


def _say(
    conn: Connection, command: Command, outlet: Outlet, writing: Writing, log: Log, online_months: int
) -> str:
    base = Base.decode(str(command.args.get("base")))
    size = base.head.sequence
    text = f"chain {log.chain} begins behind entry {size}"
    said = said_base(conn, writing.trust, log)
    if said is not None and said.head.sequence >= size:
        if said.head == base.head:
            return text
        raise RefusedError(f"chain {log.chain} was pruned up to {said.head.sequence} already")
    require_prunable(conn, log, base, online_months)
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
