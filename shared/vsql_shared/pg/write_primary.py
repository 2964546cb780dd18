"""Which node alone writes tables with cardholder data, and what becomes of a write on another one.

Not here: the trigger (SQL 023). Rules (docs/design/0027):

* `reject`: on every other node the tables refuse clients' writes; what is applied there passes.
* `accept_lww`: every node writes, nothing waits. Commits of both sides that waited for each other would wait
  for ever, so no publication may be synchronous then.
* A service does not start with a configuration that says otherwise than the database, or while a marked
  table would take a write. A partition that was made since gets its trigger from SQL 023's event trigger;
  where there is none it is said, and the service goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from vsql_shared.changes import TableName
from vsql_shared.config import Settings
from vsql_shared.errors import RefusedError
from vsql_shared.pg import nodes, oplog
from vsql_shared.pg.connect import Connection, errors

_log = logging.getLogger(__name__)


class WritePrimary(NamedTuple):
    """What was decided on this node."""

    primary: str
    policy: str


# Tables with a marked column that are there, as OIDs; a mark follows its column when that is renamed.
_MARKED = """
SELECT DISTINCT c.oid FROM vsql_sync.pci_marks m
JOIN pg_catalog.pg_namespace n ON n.nspname = m.table_schema
JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = m.table_name
WHERE c.relkind IN ('r', 'p')
"""
_WITH_TRIGGER = """
SELECT DISTINCT tgrelid FROM pg_catalog.pg_trigger
WHERE tgfoid = 'vsql_sync.refuse_away_from_primary()'::pg_catalog.regprocedure AND NOT tgisinternal
"""
_OPEN = f"""
WITH m AS ({_MARKED})
SELECT l.relid::pg_catalog.regclass::text,
    EXISTS (SELECT FROM pg_catalog.pg_partition_ancestors(l.relid) a
        JOIN pg_catalog.pg_trigger t ON t.tgrelid = a.relid AND a.relid <> l.relid
            AND t.tgfoid = 'vsql_sync.refuse_away_from_primary()'::pg_catalog.regprocedure)
FROM m
CROSS JOIN LATERAL (SELECT m.oid AS relid UNION SELECT relid FROM pg_catalog.pg_partition_tree(m.oid)) l
WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_trigger t WHERE t.tgrelid = l.relid AND t.tgenabled = 'A'
    AND t.tgtype = 62 AND t.tgqual IS NULL AND t.tgattr = ''
    AND t.tgfoid = 'vsql_sync.refuse_away_from_primary()'::pg_catalog.regprocedure)
ORDER BY 2, 1
"""  # noqa: S608 - our own text
_REFUSING = f"SELECT t.tgrelid::pg_catalog.regclass::text FROM ({_WITH_TRIGGER}) t ORDER BY 1"  # noqa: S608 - as above
_TAKE_OFF = f"SELECT vsql_sync.set_write_primary(t.tgrelid, NULL) FROM ({_WITH_TRIGGER}) t"  # noqa: S608 - as above


def load(conn: Connection) -> WritePrimary | None:
    """What was decided; None: any node may write."""
    with errors("reading who writes tables with cardholder data"):
        row = conn.execute("SELECT write_primary, policy FROM vsql_sync.pci_write_policy").fetchone()
    return None if row is None else WritePrimary(*row)


def decide(conn: Connection, primary: str, policy: str, tables: Sequence[TableName]) -> list[str]:
    """Name the primary; returns the tables that refuse clients' writes here from now on."""
    node = nodes.local(conn)
    with errors("deciding who writes tables with cardholder data"), conn.transaction():
        known = conn.execute("SELECT FROM vsql_sync.nodes WHERE node_id = %s", (primary,)).fetchone()
        if known is None:
            raise RefusedError(f"this node knows no node {primary}", hint="see `syncctl node list`")
        waits = conn.execute("SELECT FROM vsql_sync.synchronous_publications").fetchone()
        if policy == "accept_lww" and waits is not None:
            raise RefusedError(
                "commits of this node wait for others, and accept_lww lets those write, too",
                hint="`syncctl sync disable` first, or reject",
            )
        _take_off(conn)
        conn.execute(
            "INSERT INTO vsql_sync.pci_write_policy AS p (write_primary, policy) VALUES (%s, %s)"
            " ON CONFLICT (one) DO UPDATE SET (write_primary, policy, decided_at, decided_by)"
            " = (excluded.write_primary, excluded.policy, now(), session_user)",
            (primary, policy),
        )
        refused: list[str] = []
        if policy == "reject" and primary != node.name:
            refused = _put_on(conn, primary, tables)
        new = {"primary": primary, "policy": policy, "refused_here": refused}
        oplog.record(conn, "sync.primary", "node", primary, new=new)
    return refused


def clear(conn: Connection) -> None:
    """Let any node write again."""
    nodes.local(conn)
    with errors("deciding who writes tables with cardholder data"), conn.transaction():
        before = load(conn)
        _take_off(conn)
        conn.execute("DELETE FROM vsql_sync.pci_write_policy")
        if before is not None:
            oplog.record(conn, "sync.primary", "node", before.primary, old=before._asdict())


def require_as_configured(conn: Connection, settings: Settings) -> None:
    """Raise RefusedError where [conflict] says otherwise than was decided here, or a table is open."""
    wanted, found = settings.conflict.pci_write_primary, load(conn)
    if wanted is None:
        return
    policy = settings.conflict.pci_write_policy
    if found != WritePrimary(wanted, policy):
        raise RefusedError(
            f"conflict.pci_write_primary is {wanted} ({policy}), this node has"
            f" {'none' if found is None else f'{found.primary} ({found.policy})'}",
            hint=f"run `syncctl sync primary {wanted} --policy {policy}` on this node",
        )
    if policy == "reject" and wanted != settings.cluster.node_name:
        with errors("looking at tables with cardholder data"):
            rows = conn.execute(_OPEN.encode()).fetchall()
        for name, is_new_partition in rows:
            problem = f"table {name} holds cardholder data and takes clients' writes here"
            hint = f"run `syncctl sync primary {wanted}` again: it was marked, or made, since"
            if not is_new_partition:
                raise RefusedError(problem, hint=hint)
            # Its root refuses them: who stopped here would stop the stream, and the primary's commits.
            _log.error("%s; %s", problem, hint)


def _put_on(conn: Connection, primary: str, tables: Sequence[TableName]) -> list[str]:
    oids = {row[0] for row in conn.execute(_MARKED.encode())}
    for name in tables:
        row = conn.execute(
            "SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
            " WHERE (n.nspname, c.relname) = (%s, %s) AND c.relkind IN ('r', 'p')",
            tuple(name),
        ).fetchone()
        if row is None:
            raise RefusedError(f"there is no table {name}", hint="check the spelling")
        oids.add(row[0])
    if not oids:
        raise RefusedError(
            "no table of this node has a column marked as PCI data",
            hint="name the tables: --table public.cards",
        )
    for oid in sorted(oids):
        conn.execute("SELECT vsql_sync.set_write_primary(%s::oid, %s)", (oid, primary))
    rows = conn.execute(_REFUSING.encode())
    return [row[0] for row in rows]


def _take_off(conn: Connection) -> None:
    conn.execute(_TAKE_OFF.encode())
