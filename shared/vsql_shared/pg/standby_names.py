"""The server's settings that commits of synchronous publications wait by: who must confirm, who waits else.

Not here: publications and triggers (synchronous.py). Rules (docs/design/0027):

* `synchronous_standby_names` becomes `FIRST n (all n)`: whoever else stands in it must confirm as well, so an
  operator has to accept that. `*` is refused: any standby would let commits return.
* Whether a commit waits is what the checkpointer has read of the list, not what sessions show. It reads it
  before it begins a checkpoint; so the second one from then on has begun with the list as it is.
* Default commits become local: they would wait for a manifest otherwise. Where a role or a database has
  another default, or the server's is to stay, an operator says so.
"""

from __future__ import annotations

import re

from psycopg import sql

from vsql_shared.errors import RefusedError
from vsql_shared.pg.connect import Connection, errors

NAMES, DEFAULT = "synchronous_standby_names", "synchronous_commit"
_PLAIN = re.compile("[a-z_][a-z0-9_]*")
# Words of the setting's own grammar.
_WORDS = frozenset({"any", "first"})
_LOUD = """
SELECT pg_catalog.concat_ws(' in ', 'role ' || r.rolname, 'database ' || d.datname),
       pg_catalog.substr(one, 20)
  FROM pg_catalog.pg_db_role_setting s
  LEFT JOIN pg_catalog.pg_roles r ON r.oid = s.setrole
  LEFT JOIN pg_catalog.pg_database d ON d.oid = s.setdatabase
 CROSS JOIN LATERAL pg_catalog.unnest(s.setconfig) one
 WHERE pg_catalog.starts_with(one, 'synchronous_commit=')
   AND pg_catalog.lower(pg_catalog.substr(one, 20)) NOT IN ('local', 'off', 'false', 'no', '0')
 ORDER BY 1
"""


def loud(conn: Connection) -> list[str]:
    """Roles and databases whose every commit waits for all that stands in the list."""
    with errors("looking at the defaults of roles and databases"):
        return [f"{where or 'all roles'} has {DEFAULT} = {value}" for where, value in conn.execute(_LOUD)]


def standby_list(members: list[str]) -> str:
    """The setting's value by which all of these must confirm."""
    if not members:
        return ""
    quoted = [
        one if _PLAIN.fullmatch(one) and one not in _WORDS else '"' + one.replace('"', '""') + '"'
        for one in members
    ]
    return f"FIRST {len(members)} ({', '.join(quoted)})"


def wait_for_nobody(conn: Connection) -> None:
    """What this session commits from now on returns when it is on this server's disk."""
    with errors("setting up the session"):
        conn.execute("SET synchronous_commit = local")


def require_fit(conn: Connection) -> None:
    """Raise RefusedError where commits of this server would not wait, whatever the list is."""
    row = conn.execute("SELECT vsql_sync.server_problem()").fetchone()
    if row is not None and row[0] is not None:
        raise RefusedError(str(row[0]), hint="mend that, and restart the server")


def plan(conn: Connection, standby: str, ours: set[str], *, accept_others: bool) -> str:
    """The list's value with a name of ours in it."""
    members = _members(conn)
    if "*" in members:
        raise RefusedError(
            f"{NAMES} is '{_setting(conn, NAMES)}': any standby would let commits return",
            hint="name the standbys one by one, or empty it",
        )
    # Another publication's name was accepted when the later one of the two was added.
    known = ours | {standby} if standby in members else {standby}
    others = [one for one in members if one not in known]
    if others and not accept_others:
        raise RefusedError(
            f"{NAMES} names {', '.join(others)}, too",
            hint="--accept-others: every commit that waits then waits for all of them, each time",
        )
    return standby_list(list(dict.fromkeys([*members, standby])))


def add(conn: Connection, standby: str, wanted: str) -> None:
    """Give the list the value that was planned, and come back when commits wait by it."""
    problem = conn.execute(
        "SELECT vsql_sync.standby_problem(%s, %s)", (_setting(conn, NAMES), standby)
    ).fetchone()
    if problem is not None and problem[0] is not None:
        _alter(conn, NAMES, wanted)
    # Also where the list is right: who put it back a moment ago did not wait.
    conn.execute("CHECKPOINT")
    conn.execute("CHECKPOINT")


def drop(conn: Connection, standby: str) -> None:
    """Take a name of ours out of the list."""
    members = _members(conn)
    if standby in members:
        _alter(conn, NAMES, standby_list([one for one in members if one != standby]))


def set_default(conn: Connection) -> None:
    """Commits that nobody asked to wait do not."""
    if others := loud(conn):
        raise RefusedError(
            f"{others[0]}: every commit of it would wait for this stream, seconds where it is idle",
            hint=f"reset {DEFAULT} there, or --keep-default",
        )
    conn.execute(f"RESET {DEFAULT}")
    row = conn.execute(
        "SELECT reset_val IN ('local', 'off'), source IN ('default', 'configuration file', 'command line')"
        " FROM pg_catalog.pg_settings WHERE name = %s",
        (DEFAULT,),
    ).fetchone()
    quiet, servers_own = row or (False, False)
    if not quiet or not servers_own:
        _alter(conn, DEFAULT, "local", seen=servers_own)


def require_allowed(conn: Connection, setting: str = NAMES) -> None:
    """Raise RefusedError where this user may not change a setting."""
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


def _setting(conn: Connection, name: str) -> str:
    row = conn.execute("SELECT pg_catalog.current_setting(%s)", (name,)).fetchone()
    return str(row[0]) if row else ""


def _members(conn: Connection) -> list[str]:
    row = conn.execute("SELECT vsql_sync.standby_members(%s)", (_setting(conn, NAMES),)).fetchone()
    return list(row[0]) if row else []


def _alter(conn: Connection, setting: str, value: str, *, seen: bool = True) -> None:
    """ALTER SYSTEM, and wait until this session has read it; not `seen`: its role or database has its own."""
    require_allowed(conn, setting)
    conn.execute(sql.SQL("ALTER SYSTEM SET {} = {}").format(sql.Identifier(setting), sql.Literal(value)))
    conn.execute("SELECT pg_catalog.pg_reload_conf()")
    if not seen:
        return
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
