"""Publications whose commits wait for their targets: which they are, and how one becomes such and ends to be.

Not here: who waits for whom at run time (vsql_producers/synchronous.py), the triggers (SQL 023). Rules
(docs/design/0027):

* Only PCI tables: what a publication carries beside them would wait, too. It is applied transactionally, and
  written by this node alone.
* `synchronous_standby_names` becomes `FIRST n (all n)`: whoever else stands in it must confirm as well, so an
  operator has to accept that. `*` is refused: any standby would let commits return.
* Default commits stay local: they would wait for a manifest otherwise.
* Settings of the server before triggers, at the end, too: in between writes are refused, and none is let
  through that was to wait. A crash in between is mended by the same command again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from psycopg import sql

from vsql_shared import names
from vsql_shared.errors import RefusedError, UserError
from vsql_shared.pg import commands, nodes, oplog, publications
from vsql_shared.pg.connect import Connection, errors
from vsql_shared.pg.control import Changed, require_reason

if TYPE_CHECKING:
    from vsql_shared.config import Settings

NAMES, DEFAULT = "synchronous_standby_names", "synchronous_commit"
_PLAIN = re.compile("[a-z_][a-z0-9_]*")
# Words of the setting's own grammar.
_WORDS = frozenset({"any", "first"})


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


def enable(conn: Connection, publication: str, quorum: int | None, *, accept_others: bool) -> Synchronous:
    """Have the commits of a publication's tables wait for its targets. The same again mends and changes."""
    node = nodes.local(conn)
    standby = names.slot_name(node.cluster, publication, node.name)
    with errors(f"making publication {publication} synchronous"):
        _require_fit(conn, publication)
        _require_no_prepared(conn)
        _set_default(conn, accept_others=accept_others)
        _set_names(conn, standby, accept_others=accept_others)
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
        _require_allowed(conn, NAMES)
        oplog.record(conn, "sync.disable", "publication", publication, new={"reason": reason})
        # The name first: a commit that waits holds a lock on its table. New writes are refused meanwhile.
        _drop_name(conn, known.standby_name)
        with conn.transaction():
            conn.execute(
                "DELETE FROM vsql_sync.synchronous_publications WHERE publication = %s", (publication,)
            )
            conn.execute("SELECT vsql_sync.drop_synchronous_triggers(%s)", (known.standby_name,))
    return known


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
    """Raise RefusedError where [consistency] promises a waiting that was not enabled."""
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
    if info.apply_mode != publications.TRANSACTIONAL:
        problems.append("it is applied partitioned")
    row = conn.execute("SELECT mode FROM vsql_sync.publications WHERE name = %s", (publication,)).fetchone()
    if row is not None and row[0] != "uni-directional":
        problems.append("every node writes it, and two that wait for each other would wait for ever")
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


def _require_no_prepared(conn: Connection) -> None:
    if int(_setting(conn, "max_prepared_transactions")) > 0:
        raise RefusedError(
            "max_prepared_transactions is not 0: COMMIT PREPARED would not wait for the targets",
            hint="ALTER SYSTEM SET max_prepared_transactions = 0, and restart the server",
        )


def _register(conn: Connection, publication: str, standby: str, quorum: int | None) -> None:
    conn.execute(
        "INSERT INTO vsql_sync.synchronous_publications (publication, standby_name, quorum)"
        " VALUES (%s, %s, %s) ON CONFLICT (publication) DO UPDATE SET quorum = excluded.quorum",
        (publication, standby, quorum),
    )
    conn.execute(
        "INSERT INTO vsql_sync.synchronous_tables (publication, table_oid)"
        " SELECT r.publication, c.oid FROM vsql_sync.published_tables r"
        " JOIN pg_catalog.pg_namespace n ON n.nspname = r.table_schema"
        " JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = r.table_name"
        " WHERE r.publication = %s ON CONFLICT DO NOTHING",
        (publication,),
    )


# The server's settings


def _setting(conn: Connection, name: str) -> str:
    row = conn.execute("SELECT pg_catalog.current_setting(%s)", (name,)).fetchone()
    return str(row[0]) if row else ""


def _members(conn: Connection) -> list[str]:
    row = conn.execute("SELECT vsql_sync.standby_members(%s)", (_setting(conn, NAMES),)).fetchone()
    return list(row[0]) if row else []


def standby_list(members: list[str]) -> str:
    """The setting's value by which all of these must confirm."""
    if not members:
        return ""
    quoted = [
        one if _PLAIN.fullmatch(one) and one not in _WORDS else '"' + one.replace('"', '""') + '"'
        for one in members
    ]
    return f"FIRST {len(members)} ({', '.join(quoted)})"


def _set_names(conn: Connection, standby: str, *, accept_others: bool) -> None:
    members = _members(conn)
    if "*" in members:
        raise RefusedError(
            f"{NAMES} is '{_setting(conn, NAMES)}': any standby would let commits return",
            hint="name the standbys one by one, or empty it",
        )
    ours = {one.standby_name for one in everything(conn)} | {standby}
    others = [one for one in members if one not in ours]
    if others and not accept_others:
        raise RefusedError(
            f"{NAMES} names {', '.join(others)}, too",
            hint="--accept-others: every commit that waits then waits for all of them, each time",
        )
    wanted = standby_list(list(dict.fromkeys([*members, standby])))
    problem = conn.execute(
        "SELECT vsql_sync.standby_problem(%s, %s)", (_setting(conn, NAMES), standby)
    ).fetchone()
    if problem is not None and problem[0] is not None:
        _alter(conn, NAMES, wanted)


def _drop_name(conn: Connection, standby: str) -> None:
    members = _members(conn)
    if standby in members:
        _alter(conn, NAMES, standby_list([one for one in members if one != standby]))


def _set_default(conn: Connection, *, accept_others: bool) -> None:
    """Commits that nobody asked to wait do not, where we are the only standby."""
    row = conn.execute("SELECT reset_val FROM pg_catalog.pg_settings WHERE name = %s", (DEFAULT,)).fetchone()
    if row is not None and row[0] not in ("local", "off") and not accept_others:
        _alter(conn, DEFAULT, "local")


def _require_allowed(conn: Connection, setting: str) -> None:
    row = conn.execute(
        "SELECT pg_catalog.has_parameter_privilege(%s, 'ALTER SYSTEM')"
        " AND pg_catalog.has_function_privilege('pg_catalog.pg_reload_conf()', 'EXECUTE')",
        (setting,),
    ).fetchone()
    if row is None or not row[0]:
        raise RefusedError(
            f"user {conn.info.user} may not set {setting} on this server",
            hint="run this as a superuser: --connection",
        )


def _alter(conn: Connection, setting: str, value: str) -> None:
    """ALTER SYSTEM, and wait until the server has read it."""
    _require_allowed(conn, setting)
    conn.execute(sql.SQL("ALTER SYSTEM SET {} = {}").format(sql.Identifier(setting), sql.Literal(value)))
    conn.execute("SELECT pg_catalog.pg_reload_conf()")
    for _ in range(100):
        row = conn.execute(
            "SELECT reset_val = %s FROM pg_catalog.pg_settings WHERE name = %s", (value, setting)
        ).fetchone()
        if row is not None and row[0]:
            return
        conn.execute("SELECT pg_catalog.pg_sleep(0.05)")
    raise RefusedError(
        f"{setting} was set to '{value}', and something else overrides it",
        hint="look where it comes from: SELECT source, sourcefile FROM pg_settings; the command line wins",
    )
