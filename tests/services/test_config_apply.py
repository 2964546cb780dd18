"""`syncctl config apply` on a real database: shows the difference, asks, applies, and then finds nothing."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.conftest import NewDatabase
from tests.syncctl import syncctl

WISHES = """
[[publications]]
name = "analytics"
[[publications.tables]]
name = "public.payments"
columns = ["id", "amount"]
exclude_pci = true
[[pci.columns]]
table = "public.payments"
columns = ["pan"]
"""


class Shop:
    """A node with one table, and the file that wishes for a publication of it."""

    def __init__(self, folder: Path, conninfo: str) -> None:
        self.folder, self.conninfo = folder, conninfo
        parts = conninfo_to_dict(conninfo)
        fields = {"host": parts["host"], "user": parts["user"], "database": parts["dbname"]}
        fields |= {"password": parts["password"]} if parts.get("password") else {}
        connection = "\n".join(f"{key} = {json.dumps(value)}" for key, value in fields.items())
        (folder / "vsql-sync.toml").touch(0o600)
        (folder / "vsql-sync.toml").write_text(
            '[cluster]\nname = "c"\nnode_id = 1\nnode_name = "a"\n[server]\nmode = "dev"\n'
            f"[connection]\nport = {parts['port']}\n{connection}\n{WISHES}"
        )
        with psycopg.connect(conninfo) as conn:
            conn.execute("CREATE TABLE payments (id bigint PRIMARY KEY, amount int, pan text)")

    def syncctl(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("VSQL_SYNC")}
        return syncctl(*words, env={**kept, **env}, cwd=self.folder, timeout=60)

    def publications(self) -> list[str]:
        with psycopg.connect(self.conninfo) as conn:
            return [row[0] for row in conn.execute("SELECT pubname FROM pg_publication").fetchall()]


@pytest.fixture
def shop(tmp_path: Path, new_database: NewDatabase) -> Shop:
    """A node that is initialised."""
    made = Shop(tmp_path, new_database("apply"))
    done = made.syncctl("node", "init")
    assert done.returncode == 0, done.stderr
    return made


def test_the_difference_is_shown_asked_about_applied_and_then_gone(shop: Shop) -> None:
    dry = shop.syncctl("config", "apply", "--dry-run", "--output", "json")
    assert dry.returncode == 0, dry.stderr
    kinds = {(change["kind"], change["name"]) for change in json.loads(dry.stdout)}
    assert ("publication", "analytics") in kinds
    assert {kind for kind, _ in kinds} == {"publication", "pci-column"}
    before = shop.publications()

    unasked = shop.syncctl("config", "apply")
    assert unasked.returncode == 2
    assert "hint: give --yes to agree" in unasked.stderr
    assert shop.publications() == before

    done = shop.syncctl("config", "apply", "--yes")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split() == ["kind", "name", "action", "detail"]
    assert len(shop.publications()) == len(before) + 1

    again = shop.syncctl("config", "apply", "--yes")
    assert (again.returncode, again.stdout) == (0, "The database has all that the file asks for.\n")


def test_columns_of_a_publication_that_streams_use_follow_the_file(shop: Shop) -> None:
    assert shop.syncctl("config", "apply", "--yes").returncode == 0
    with psycopg.connect(shop.conninfo) as conn:
        conn.execute("ALTER TABLE payments ADD note text")
        conn.execute(
            "INSERT INTO vsql_sync.streams (chain, direction, publication, origin)"
            " VALUES ('analytics.a', 'out', 'analytics', 'a')"
        )
    file = shop.folder / "vsql-sync.toml"
    file.write_text(file.read_text().replace('["id", "amount"]', '["id", "note"]'))
    done = shop.syncctl("config", "apply", "--yes")
    assert done.returncode == 0, done.stderr
    with psycopg.connect(shop.conninfo) as conn:
        assert conn.execute(
            "SELECT t.columns, t.added_columns, t.removed_columns, p.attnames::text[]"
            " FROM vsql_sync.published_tables t JOIN pg_publication_tables p ON p.tablename = t.table_name"
        ).fetchall() == [(["id", "note"], ["note"], ["amount"], ["id", "note"])]
    file.write_text(
        file.read_text().replace('columns = ["id", "note"]', 'columns = ["id"]\nwhere = "id > 5"')
    )
    done = shop.syncctl("config", "apply", "--yes")
    assert done.returncode == 4
    assert "cannot be changed, but for columns of its tables" in done.stderr


def test_a_column_an_operator_took_out_is_not_put_back_by_the_file(shop: Shop) -> None:
    file = shop.folder / "vsql-sync.toml"
    file.write_text(file.read_text().replace('columns = ["id", "amount"]\n', ""))
    assert shop.syncctl("config", "apply", "--yes").returncode == 0
    with psycopg.connect(shop.conninfo) as conn:
        conn.execute(
            "INSERT INTO vsql_sync.streams (chain, direction, publication, origin)"
            " VALUES ('analytics.a', 'out', 'analytics', 'a')"
        )
    done = shop.syncctl("publication", "remove-column", "analytics", "payments.amuont", "--yes")
    assert "note: table public.payments has no such column now" in done.stderr
    done = shop.syncctl("publication", "remove-column", "analytics", "payments.amount", "--yes")
    assert (done.returncode, "note:" in done.stderr) == (0, False)
    done = shop.syncctl("config", "apply", "--yes")
    assert done.returncode == 4
    assert "public.payments.amount was taken out of publication analytics" in done.stderr
    with psycopg.connect(shop.conninfo) as conn:
        assert conn.execute("SELECT attnames::text[] FROM pg_publication_tables").fetchall() == [(["id"],)]


def test_what_is_not_built_is_refused_before_the_database_is_asked(shop: Shop) -> None:
    done = shop.syncctl("config", "apply", "--yes", VSQL_SYNC__CRYPTAPLY__ENABLED="true")
    assert done.returncode == 3
    assert "cryptaply.enabled = true: not built yet" in done.stderr


def test_a_database_that_is_not_there_is_said_with_a_code_that_means_wait(shop: Shop) -> None:
    done = shop.syncctl("config", "apply", "--output", "json", VSQL_SYNC__CONNECTION__PORT="1")
    error = json.loads(done.stderr)["error"]
    assert done.returncode == error["exit_code"] == 7
    assert "cannot connect to database" in error["message"]
    assert error["hint"]
