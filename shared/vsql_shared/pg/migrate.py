"""Installs and upgrades schema `vsql_sync`: numbered SQL files, in order, each in one transaction.

Not the place for roles and grants (roles.py) nor for rows of a node (nodes.py). Rules:

* A file that was applied never changes: its SHA-256 is recorded and compared at each run.
* A file numbered below the newest applied one is refused: it would run in an order nobody tested.
* Two installers at once are safe: each file is decided upon under one transaction-level advisory lock.
* Where the extension `vsql_sync` is installed the scripts are not run; the extension is updated instead.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import psycopg
from psycopg import sql

from vsql_shared.errors import RefusedError
from vsql_shared.pg.connect import Connection, errors
from vsql_shared.pg.encodings import fit_script

SCHEMA = "vsql_sync"
EXTENSION = "vsql_sync"
_FILE_NAME = re.compile(r"(\d{3})_([a-z0-9_]+)\.sql")
# Any constant does, as long as every version of vsql-sync takes the same one: "vsql" in ASCII.
_LOCK_KEY = 0x7673716C


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered file."""

    version: int
    name: str
    text: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the text, hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def migrations() -> list[Migration]:
    """The numbered files of this program, in order."""
    found: dict[int, Migration] = {}
    for entry in (resources.files("vsql_schemas") / "sql").iterdir():
        match = _FILE_NAME.fullmatch(entry.name)
        if match is None:
            continue
        version = int(match[1])
        if version in found:
            raise RefusedError(f"two SQL files carry number {match[1]}", hint="give each file its own number")
        found[version] = Migration(version, match[2], entry.read_text(encoding="utf-8"))
    return [found[version] for version in sorted(found)]


def install(conn: Connection, files: Sequence[Migration] | None = None) -> list[int]:
    """Bring the schema to this program's version; returns the numbers applied now (none: it was there).

    `conn` must not be inside a transaction: each file commits on its own, so that a failure in a later one
    leaves a schema that the next run completes.
    """
    steps = migrations() if files is None else list(files)
    with errors("installing schema vsql_sync"):
        if _extension_version(conn) is not None:
            return _update_extension(conn, steps)
        return [step.version for step in steps if _apply(conn, step, steps)]


def applied(conn: Connection) -> dict[int, str]:
    """Number → checksum of what the database has; empty when there is no schema."""
    present = conn.execute("SELECT pg_catalog.to_regclass('vsql_sync.schema_version') IS NOT NULL").fetchone()
    if present is None or not present[0]:
        return {}
    return dict(conn.execute("SELECT version, checksum FROM vsql_sync.schema_version").fetchall())


def require_current(conn: Connection) -> None:
    """Raise RefusedError unless the database has exactly this program's schema."""
    with errors("reading the version of schema vsql_sync"):
        have = applied(conn)
    want = {step.version: step.checksum for step in migrations()}
    if not have:
        raise RefusedError("this database is not a node", hint="run `syncctl node init` on it first")
    changed = sorted(version for version in have.keys() & want.keys() if have[version] != want[version])
    if changed:
        raise _changed(changed[0])
    if have != want:
        raise RefusedError(
            f"schema vsql_sync has version {max(have)}, this program needs version {max(want)}",
            hint="run `syncctl node init` with the newer program to upgrade"
            if max(have) <= max(want)
            else "use the newer program",
        )


def _changed(version: int) -> RefusedError:
    return RefusedError(
        f"schema file {version:03} of this program is not the one that was applied to this database",
        hint="the numbers agree, the builds do not: use the build of vsql-sync that made the schema",
    )


def _apply(conn: Connection, step: Migration, steps: Sequence[Migration]) -> bool:
    """Apply one file unless it is there; the whole decision is one transaction."""
    with conn.transaction():
        conn.execute("SELECT pg_catalog.pg_advisory_xact_lock(%s::bigint)", (_LOCK_KEY,))
        have = applied(conn)
        _check_history(conn, have, steps)
        if step.version in have:
            return False
        if have and step.version < max(have):
            raise RefusedError(
                f"schema file {step.version:03} was never applied and {max(have):03} was",
                hint="the database comes from another build of vsql-sync; use that one",
            )
        conn.execute("SET LOCAL search_path = pg_catalog, pg_temp")
        conn.execute(fit_script(conn, step.text).encode(), prepare=False)
        conn.execute(
            "INSERT INTO vsql_sync.schema_version (version, name, checksum) VALUES (%s, %s, %s)",
            (step.version, step.name, step.checksum),
        )
    return True


def _check_history(conn: Connection, have: dict[int, str], steps: Sequence[Migration]) -> None:
    """Refuse a schema that this program did not make, or made from other files."""
    if not have:
        taken = conn.execute("SELECT pg_catalog.to_regnamespace(%s) IS NOT NULL", (SCHEMA,)).fetchone()
        if taken is not None and taken[0]:
            raise RefusedError(
                "a schema named vsql_sync is there and was not made by vsql-sync",
                hint="rename it, or drop it if nobody needs it: DROP SCHEMA vsql_sync",
            )
    known = {step.version: step.checksum for step in steps}
    for version, checksum in sorted(have.items()):
        if version not in known:
            raise RefusedError(
                f"schema vsql_sync has version {version}, this program knows up to {max(known, default=0)}",
                hint="use the newer program",
            )
        if known[version] != checksum:
            raise _changed(version)


def _extension_version(conn: Connection) -> str | None:
    row = conn.execute(
        "SELECT extversion FROM pg_catalog.pg_extension WHERE extname = %s", (EXTENSION,)
    ).fetchone()
    return None if row is None else str(row[0])


def _update_extension(conn: Connection, steps: Sequence[Migration]) -> list[int]:
    """Update an installed extension to this program's version, from the files the server has."""
    with conn.transaction():
        conn.execute("SELECT pg_catalog.pg_advisory_xact_lock(%s::bigint)", (_LOCK_KEY,))
        have = applied(conn)
        _check_history(conn, have, steps)
        missing = [step.version for step in steps if step.version not in have]
        if not missing:
            return []
        target = str(steps[-1].version)
        update = sql.SQL("ALTER EXTENSION {} UPDATE TO {}").format(
            sql.Identifier(EXTENSION), sql.Literal(target)
        )
        try:
            with conn.transaction():
                conn.execute(update)
        except psycopg.errors.InvalidParameterValue:
            raise RefusedError(
                f"extension vsql_sync is at version {max(have)}; the server has no script to {target}",
                hint="copy the new extension files to the server: "
                'python -m vsql_shared.pg.extension "$(pg_config --sharedir)/extension"',
            ) from None
    return missing
