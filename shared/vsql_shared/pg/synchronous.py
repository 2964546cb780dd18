"""Publications whose commits wait for their targets: which they are, and how one becomes such and ends to be.

Not here: who waits for whom at run time (vsql_producers/synchronous.py), the triggers (SQL 023), the server's
settings (standby_names.py). Rules (docs/design/0027):

* Only PCI tables: what a publication carries beside them would wait, too. It is applied transactionally, and
  written by this node alone.
* Not before a target of the region can follow: a commit that waits keeps its transaction open for whoever
  makes a logical slot, so that no first copy would ever begin.
* Settings of the server before triggers, at the end, too: in between writes are refused, and none is let
  through that was to wait. A crash in between is mended by the same command again.
* What is written here waits for no standby itself: the sessions are set to `local` first.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

import psycopg

from vsql_shared import names
from vsql_shared.errors import RefusedError, UserError
from vsql_shared.pg import commands, nodes, oplog, publications, standby_names, write_primary
from vsql_shared.pg.connect import Connection, errors
from vsql_shared.pg.control import Changed, require_reason

if TYPE_CHECKING:
    from vsql_shared.config import Settings

_log = logging.getLogger(__name__)

# Targets in this node's own region that have their first copy, of a live stream that has its slot.
_READY = """
SELECT count(*) FILTER (WHERE ready),
       coalesce(array_agg(target || ': ' || held) FILTER (WHERE held IS NOT NULL), '{}')
  FROM (SELECT t.target, t.held, s.slot_created AND NOT EXISTS (
                   SELECT FROM vsql_sync.streams c
                    WHERE c.direction = 'out' AND c.kind = 'copy' AND c.state <> 'FINISHED'
                      AND (c.publication, c.target) = (s.publication, t.target)) AS ready
          FROM vsql_sync.streams s JOIN vsql_sync.stream_targets t ON t.chain = s.chain AND t.target <> '*'
          LEFT JOIN vsql_sync.nodes n ON n.node_id = t.target
          LEFT JOIN vsql_sync.nodes here ON here.is_local
         WHERE s.direction = 'out' AND s.kind = 'live' AND s.publication = %s AND s.state <> 'FINISHED'
           AND n.region IS NOT DISTINCT FROM here.region) near
"""
_COPIES = """
SELECT target FROM vsql_sync.streams
 WHERE direction = 'out' AND kind = 'copy' AND state NOT IN ('FINISHED', 'FAILED') ORDER BY 1
"""


@dataclass(frozen=True, slots=True)
class Synchronous:
    """A publication whose commits wait."""

    publication: str
    standby_name: str
    quorum: int | None
    """How many targets must have a commit; None: all synchronous ones."""
    degraded_at: datetime | None
    degraded_reason: str | None


class Unwaited(NamedTuple):
    """A table whose writes would be committed here alone."""

    publication: str
    table: str
    why: str


class Near(NamedTuple):
    """A publication's targets in this node's own region."""

    ready: int
    """They have their first copy, and the stream has its slot."""
    held: list[str]
    """Those that left something out, and what: they count no further."""


class Waiting(NamedTuple):
    """Commits that wait for a standby now."""

    commits: int
    since: datetime | None


def load(conn: Connection, publication: str) -> Synchronous | None:
    """One publication's, or None."""
    return next((one for one in everything(conn) if one.publication == publication), None)


def everything(conn: Connection) -> list[Synchronous]:
    """All of this node."""
    with errors("reading which publications are synchronous"):
        rows = conn.execute(
            "SELECT publication, standby_name, quorum, degraded_at, degraded_reason"
            " FROM vsql_sync.synchronous_publications ORDER BY 1"
        ).fetchall()
    return [Synchronous(*row) for row in rows]


def unwaited(conn: Connection) -> list[Unwaited]:
    """Tables that writes pass by, and why."""
    with errors("looking at the tables whose commits wait"):
        rows = conn.execute(
            "SELECT publication, relation::pg_catalog.regclass::text, why FROM vsql_sync.unwaited()"
            " ORDER BY 1, 2, 3"
        ).fetchall()
    return [Unwaited(*row) for row in rows]


def server_problem(conn: Connection, standby_name: str) -> str | None:
    """Why writes are refused now because of the server's settings."""
    with errors("looking at the settings for synchronous commits"):
        row = conn.execute("SELECT vsql_sync.synchronous_problem(%s)", (standby_name,)).fetchone()
    return row[0] if row else None


def waiting(conn: Connection) -> Waiting:
    """How many commits wait."""
    with errors("counting the commits that wait"):
        row = conn.execute("SELECT waiting, since FROM vsql_sync.waiting_commits()").fetchone()
    return Waiting(*row) if row else Waiting(0, None)


def near(conn: Connection, publication: str) -> Near:
    """The targets that commits of a publication wait for."""
    with errors("looking at the targets"):
        row = conn.execute(_READY, (publication,)).fetchone()
    return Near(*row) if row else Near(0, [])


def copies(conn: Connection) -> list[str]:
    """Targets whose first copy is not finished: its slot waits for every transaction that is open."""
    with errors("looking at first copies"):
        return [row[0] for row in conn.execute(_COPIES)]


def enable(
    conn: Connection,
    publication: str,
    quorum: int | None,
    *,
    accept_others: bool,
    keep_default: bool = False,
) -> Synchronous:
    """Have the commits of a publication's tables wait for its targets. The same again mends and changes."""
    node = nodes.local(conn)
    standby = names.slot_name(node.cluster, publication, node.name)
    with errors(f"making publication {publication} synchronous"):
        _require_fit(conn, publication)
        standby_names.require_fit(conn)
        if quorum is not None or load(conn, publication) is None:  # what is enabled is mended in any case
            _require_targets(conn, publication, quorum)
        ours = {one.standby_name for one in everything(conn)}
        wanted = standby_names.plan(conn, standby, ours, accept_others=accept_others)
        if not keep_default:
            standby_names.set_default(conn)
        standby_names.wait_for_nobody(conn)
        standby_names.add(conn, standby, wanted)
        with conn.transaction():
            _register(conn, publication, standby, quorum)
            conn.execute("SELECT vsql_sync.make_synchronous_triggers()")
            if found := [one for one in unwaited(conn) if one.publication == publication]:
                raise RefusedError(
                    f"commits of {found[0].table} would not wait: {found[0].why}",
                    hint="nothing was changed but the server's settings; mend it and try again",
                )
            new = {"standby": standby, "quorum": quorum}
            oplog.record(conn, "sync.enable", "publication", publication, new=new)
    made = load(conn, publication)
    assert made is not None  # noqa: S101 - written above
    return made


def disable(conn: Connection, publication: str, reason: str) -> Synchronous:
    """End the waiting for good; what waits now returns, wherever its targets are."""
    reason = require_reason(reason)
    nodes.local(conn)
    known = _require(conn, publication)
    with errors(f"ending the waiting of publication {publication}"):
        standby_names.require_allowed(conn)
        standby_names.wait_for_nobody(conn)
        oplog.record(conn, "sync.disable", "publication", publication, new={"reason": reason})
        # The name first: a commit that waits holds a lock on its table. New writes are refused meanwhile.
        standby_names.drop(conn, known.standby_name)
        try:
            _forget(conn, known)
        except psycopg.errors.LockNotAvailable:
            others = [one.publication for one in everything(conn) if one.publication != publication]
            raise RefusedError(
                f"transactions hold tables of publication {publication}"
                + (f"; commits of it may wait for targets of {', '.join(others)}, too" if others else ""),
                hint="nothing waits for its own targets any more, and writes to its tables are refused;"
                " end those transactions, or degrade the other publication, and run this again",
            ) from None
    return known


def _forget(conn: Connection, known: Synchronous) -> None:
    with conn.transaction():
        conn.execute("SET LOCAL lock_timeout = '5s'")
        conn.execute(
            "DELETE FROM vsql_sync.synchronous_publications WHERE publication = %s", (known.publication,)
        )
        conn.execute("SELECT vsql_sync.drop_synchronous_triggers(%s)", (known.standby_name,))


def order(conn: Connection, publication: str, verb: str, reason: str) -> Changed:
    """Order the producer to `degrade` a publication (commits wait for no target) or to `restore` it."""
    reason = require_reason(reason)
    node = nodes.local(conn)
    known = _require(conn, publication)
    if (known.degraded_at is not None) == (verb == "degrade"):
        raise RefusedError(
            f"publication {publication} is {'degraded already' if verb == 'degrade' else 'not degraded'}",
            hint="see `syncctl sync status`",
        )
    chain = names.live_chain(publication, node.name)
    standby_names.wait_for_nobody(conn)
    with errors(f"ordering to {verb}"), conn.transaction():
        line = oplog.record(conn, f"sync.{verb}", "stream", chain, new={"reason": reason})
        command = commands.request(conn, "producer", verb, {"audit_log": line}, reason, chain)
    return Changed([(chain, "out")], [command])


def set_degraded(conn: Connection, publication: str, reason: str | None) -> None:
    """Write down that an order was obeyed; None: it is restored. Then what targets left out is past."""
    with errors("noting how a stream waits"), conn.transaction():
        conn.execute(
            "UPDATE vsql_sync.synchronous_publications SET degraded_reason = %(reason)s,"
            " degraded_at = CASE WHEN %(reason)s::text IS NOT NULL THEN coalesce(degraded_at, now()) END"
            " WHERE publication = %(publication)s",
            {"reason": reason, "publication": publication},
        )


def set_region(conn: Connection, node: str, region: str | None) -> None:
    """Say where a node is: only targets in this node's own region are waited for."""
    nodes.local(conn)
    standby_names.wait_for_nobody(conn)
    with errors("writing a node's region"), conn.transaction():
        row = conn.execute(
            "SELECT region FROM vsql_sync.nodes WHERE node_id = %s FOR UPDATE", (node,)
        ).fetchone()
        if row is None:
            raise RefusedError(f"this node knows no node {node}", hint="see `syncctl node list`")
        if row[0] != region:
            conn.execute("UPDATE vsql_sync.nodes SET region = %s WHERE node_id = %s", (region, node))
            oplog.record(conn, "node.region", "node", node, old={"region": row[0]}, new={"region": region})


def require_as_configured(conn: Connection, settings: Settings) -> None:
    """Raise RefusedError where [consistency] promises a waiting that was not enabled.

    One without a target that has its first copy cannot be enabled yet: for that the service must run.
    """
    if settings.consistency.pci_sync_mode != "remote_apply":
        return
    with errors("reading which publications are synchronous"):
        rows = conn.execute(
            "SELECT publication FROM vsql_sync.streams WHERE direction = 'out' AND kind = 'live'"
            " AND state <> 'FINISHED' AND publication NOT IN"
            " (SELECT publication FROM vsql_sync.synchronous_publications) ORDER BY 1"
        ).fetchall()
    for (name,) in rows:
        info = publications.find(conn, name)
        if info is not None and info.pci:
            if not near(conn, name).ready:
                _log.warning("commits of publication %s wait for nobody before it has a target", name)
                continue
            raise RefusedError(
                f'consistency.pci_sync_mode is "remote_apply", and publication {name} carries PCI columns'
                " without waiting",
                hint=f"run `syncctl sync enable {name}`",
            )


def _require(conn: Connection, publication: str) -> Synchronous:
    known = load(conn, publication)
    if known is None:
        raise RefusedError(
            f"commits of publication {publication} wait for nobody", hint="see `syncctl sync status`"
        )
    return known


def _require_fit(conn: Connection, publication: str) -> None:
    """Only tables of which PCI columns travel, whole transactions, one writer."""
    info = publications.find(conn, publication)
    if info is None:
        raise UserError(
            f"there is no publication {publication} on this node", hint="see `syncctl publication list`"
        )
    problems = [
        f"{table.name}: no PCI column of it travels" for table in info.tables if table.name not in info.pci
    ]
    if info.message_prefixes or info.sequences or info.more_sequences:
        problems.append("it carries messages or sequences")
    problems += [
        f"{table.name}: has a row filter, and commits of what it leaves out would return without any target"
        for table in info.tables
        if table.where is not None
    ]
    if info.insert_only:
        problems.append("it publishes inserts only")
    if info.apply_mode != publications.TRANSACTIONAL:
        problems.append("it is applied partitioned")
    row = conn.execute("SELECT mode FROM vsql_sync.publications WHERE name = %s", (publication,)).fetchone()
    if row is not None and row[0] != "uni-directional":
        problems.append("every node writes it, and two that wait for each other would wait for ever")
    decided = write_primary.load(conn)
    if decided is not None and decided.policy == "accept_lww":
        problems.append("other nodes write its tables, too (`syncctl sync primary`: accept_lww)")
    row = conn.execute(
        "SELECT pg_catalog.has_function_privilege(proowner,"
        " 'pg_catalog.pg_replication_origin_session_is_setup()', 'EXECUTE') FROM pg_catalog.pg_proc"
        " WHERE oid = 'vsql_sync.commit_on_targets()'::pg_catalog.regprocedure"
    ).fetchone()
    if row is not None and not row[0]:
        problems.append("the owner of schema vsql_sync may not call pg_replication_origin_session_is_setup()")
    if problems:
        lines = "\n  ".join(problems)
        raise RefusedError(
            f"publication {publication} cannot be synchronous:\n  {lines}",
            hint="publish PCI tables by themselves, and mark their columns (`--pci-column`)",
        )


def _require_targets(conn: Connection, publication: str, quorum: int | None) -> None:
    ready = near(conn, publication).ready
    if ready < (quorum or 1):
        raise RefusedError(
            f"publication {publication} has {ready} targets in this node's region with their first copy done,"
            f" and commits would wait for {quorum or 'one'}",
            hint="add the peer, start both services, and wait for the copy (`syncctl status`)",
        )


def _register(conn: Connection, publication: str, standby: str, quorum: int | None) -> None:
    conn.execute(
        "INSERT INTO vsql_sync.synchronous_publications (publication, standby_name, quorum)"
        " VALUES (%s, %s, %s) ON CONFLICT (publication) DO UPDATE SET quorum = excluded.quorum",
        (publication, standby, quorum),
    )
    conn.execute(
        "DELETE FROM vsql_sync.synchronous_tables WHERE publication = %s"
        " AND NOT EXISTS (SELECT FROM pg_catalog.pg_class WHERE oid = table_oid)",
        (publication,),
    )
    conn.execute(
        "INSERT INTO vsql_sync.synchronous_tables (publication, table_oid)"
        " SELECT r.publication, c.oid FROM vsql_sync.published_tables r"
        " JOIN pg_catalog.pg_namespace n ON n.nspname = r.table_schema"
        " JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = r.table_name"
        " WHERE r.publication = %s ON CONFLICT DO NOTHING",
        (publication,),
    )
