"""Writes schema `vsql_sync` as a PostgreSQL extension: the control file and scripts made of the same SQL.

    python -m vsql_shared.pg.extension "$(pg_config --sharedir)/extension"

The extension's version is the number of its last SQL file, so `ALTER EXTENSION vsql_sync UPDATE` takes the
very files the installer would run. The script also records them in `vsql_sync.schema_version`, and marks
the tables' rows to be dumped: they are state, not part of the program. The monthly partitions a file makes
are taken out again: as members of the extension they would be missing after a restore in another month.
`node init` and the services make them when they are needed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from vsql_shared.pg.migrate import EXTENSION, Migration, migrations

_HEAD = (
    "-- Made from the numbered SQL files of vsql-sync; do not edit.\n"
    f'\\echo Use "CREATE EXTENSION {EXTENSION}" to load this file. \\quit\n'
)
# Rows of extension tables are not dumped unless asked for. Unlogged ones (status) are worth nothing later;
# schema_version is filled by the script that a restore runs; kept leaves are large, and gone within days.
_DUMP_ROWS = """
DO $$
DECLARE
    v_table regclass;
BEGIN
    FOR v_table IN
        SELECT inhrelid FROM pg_catalog.pg_inherits
        WHERE inhparent = pg_catalog.to_regclass('vsql_sync.vsql_sync_audit')
          AND inhrelid <> pg_catalog.to_regclass('vsql_sync.vsql_sync_audit_default')
          AND inhrelid IN (SELECT objid FROM pg_catalog.pg_depend
                           WHERE classid = 'pg_catalog.pg_class'::regclass AND deptype = 'e')
    LOOP
        EXECUTE pg_catalog.format('DROP TABLE %s', v_table);
    END LOOP;
    FOR v_table IN
        SELECT oid FROM pg_catalog.pg_class
        WHERE relnamespace = 'vsql_sync'::regnamespace AND relkind IN ('r', 'S') AND relpersistence = 'p'
          AND relname <> 'schema_version' AND relname !~ '^(batch_leaves_[0-9]+|leaf_slots)$'
        ORDER BY oid
    LOOP
        PERFORM pg_catalog.pg_extension_config_dump(v_table, '');
    END LOOP;
END
$$;
"""


def render(steps: Sequence[Migration] | None = None) -> dict[str, str]:
    """File name → text: control file, install script, and an update script from each older version."""
    files = migrations() if steps is None else list(steps)
    newest = files[-1].version
    control = (resources.files("vsql_schemas") / "extension" / f"{EXTENSION}.control").read_text("utf-8")
    rendered = {
        f"{EXTENSION}.control": control.replace(
            "default_version = '@VERSION@'", f"default_version = '{newest}'"
        ),
        f"{EXTENSION}--{newest}.sql": _script(files),
    }
    for older, step in itertools.pairwise(files):
        rendered[f"{EXTENSION}--{older.version}--{step.version}.sql"] = _script([step])
    return rendered


def write(folder: Path, steps: Sequence[Migration] | None = None) -> list[Path]:
    """Write the files into a server's `share/extension` folder; returns them."""
    written = []
    for name, text in render(steps).items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def _script(files: Sequence[Migration]) -> str:
    parts = [_HEAD]
    for step in files:
        parts.append(f"\n-- {step.version:03}_{step.name}.sql\n{step.text}\n")
        parts.append(
            "INSERT INTO vsql_sync.schema_version (version, name, checksum)"  # noqa: S608 - our own file names
            f" VALUES ({step.version}, '{step.name}', '{step.checksum}');\n"
        )
    return "".join(parts) + _DUMP_ROWS


def main() -> None:
    """Command line: one argument, the folder."""
    parser = argparse.ArgumentParser(description="Write the files of extension vsql_sync.")
    parser.add_argument(
        "folder", type=Path, help='the server\'s extension folder: "$(pg_config --sharedir)/extension"'
    )
    for path in write(parser.parse_args().folder):
        print(path)  # noqa: T201 - a command's result


if __name__ == "__main__":
    main()
