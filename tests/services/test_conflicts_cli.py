"""`syncctl conflicts` on a real log: what it lists, shows and counts, and what a role may not see."""

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

LOG = """
INSERT INTO vsql_sync.conflict_log (detected_at, subscription, table_schema, table_name, conflict_type,
    local_tuple, remote_tuple, local_origin, remote_origin, local_xact_ts, remote_xact_ts, origin_xid,
    resolution, resolved_at, resolved_by)
VALUES
    (now() - interval '3 days', 'pub.b', 'public', 't', 'update_origin_differs', '{"id": 1, "note": "mine"}',
     '{"id": 1, "note": "theirs"}', 'a', 'b', now(), now(), 740, 'KEPT_LOCAL', now(), 'last_write_wins'),
    (now(), 'pub.b', 'public', 't', 'insert_exists', NULL, NULL, 'a', 'b', now(), now(), 741,
     'APPLIED_REMOTE', now(), 'last_write_wins'),
    (now(), 'pub.b', 'sales', 'O''s', 'delete_missing', NULL, NULL, NULL, 'b', NULL, now(), 741,
     'APPLIED_REMOTE', now(), 'last_write_wins')
"""


class Log:
    """A node whose log has three conflicts."""

    def __init__(self, folder: Path, conninfo: str) -> None:
        self.folder, self.conninfo = folder, conninfo
        parts = conninfo_to_dict(conninfo)
        fields = {"host": parts["host"], "user": parts["user"], "database": parts["dbname"]}
        fields |= {"password": parts["password"]} if parts.get("password") else {}
        connection = "\n".join(f"{key} = {json.dumps(value)}" for key, value in fields.items())
        (folder / "vsql-sync.toml").touch(0o600)
        (folder / "vsql-sync.toml").write_text(
            '[cluster]\nname = "c"\nnode_id = 1\nnode_name = "a"\n[server]\nmode = "dev"\n'
            f"[connection]\nport = {parts['port']}\n{connection}\n"
        )

    def run(self, *words: str, code: int = 0) -> str:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("VSQL_SYNC")}
        done: subprocess.CompletedProcess[str] = syncctl(*words, env=kept, cwd=self.folder, timeout=60)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr


@pytest.fixture
def log(tmp_path: Path, new_database: NewDatabase) -> Log:
    """The node."""
    made = Log(tmp_path, new_database("log"))
    made.run("node", "init")
    with psycopg.connect(made.conninfo) as conn:
        conn.execute(LOG)
    return made


def test_conflicts_are_listed_by_what_is_asked_for(log: Log) -> None:
    def numbers(*words: str) -> list[int]:
        return [one["number"] for one in json.loads(log.run("conflicts", "list", *words, "--output", "json"))]

    assert numbers() == [1, 2, 3]
    assert numbers("--limit", "2") == [2, 3]
    assert numbers("--limit", "2", "--before", "CONFLICT-002") == [1]
    assert numbers("--table", "t") == [1, 2]
    assert numbers("--table", 'sales."O\'s"') == [3]
    assert numbers("--kind", "insert_exists") == [2]
    assert numbers("--outcome", "KEPT_LOCAL") == [1]
    assert numbers("--outcome", "PENDING") == []
    assert numbers("--until", "2026-01-01") == []
    assert "is no kind of conflict" in log.run("conflicts", "list", "--kind", "UPDATE_UPDATE", code=2)
    assert "update_origin_differs" in log.run("conflicts", "list")


def test_one_conflict_is_shown_with_both_rows_and_whose_stands(log: Log) -> None:
    one = json.loads(log.run("conflicts", "show", "CONFLICT-001", "--output", "json"))
    assert (one["local_row"]["note"], one["remote_row"]["note"], one["stands"]) == ("mine", "theirs", "a")
    text = log.run("conflicts", "show", "1")
    assert '"mine"' in text
    assert "what a wrote stands" in text
    assert "this node has no conflict 9" in log.run("conflicts", "show", "9", code=4)


def test_no_digit_of_a_row_is_lost(log: Log) -> None:
    with psycopg.connect(log.conninfo) as conn:
        conn.execute(
            "UPDATE vsql_sync.conflict_log SET id = 7,"
            " local_tuple = jsonb_build_object('small', 1, 'long', 12345678901234567, 'price', 0.10::numeric,"
            " 'huge', repeat('9', 5000)::numeric),"
            " remote_tuple = jsonb_build_object('small', 1, 'long', 12345678901234568,"
            " 'price', 0.1000000000000000000001::numeric, 'huge', 1) WHERE id = 1"
        )
    one = json.loads(log.run("conflicts", "show", "7", "--output", "json"))
    assert one["local_row"] == {
        "small": 1, "long": "12345678901234567", "price": "0.10", "huge": "9" * 5000
    }  # fmt: skip
    assert one["remote_row"]["price"] == "0.1000000000000000000001"
    shown = {
        line.split()[0]: line.rstrip().endswith("*")
        for line in log.run("conflicts", "show", "7").splitlines()[-4:]
    }
    assert shown == {"small": False, "long": True, "price": True, "huge": True}


def test_conflicts_are_counted_by_table_kind_and_outcome(log: Log) -> None:
    found = json.loads(log.run("conflicts", "stats", "--output", "json"))
    told = ("table", "kind", "outcome", "conflicts", "last_day")
    assert [tuple(one[name] for name in told) for one in found] == [
        ("public.t", "insert_exists", "APPLIED_REMOTE", 1, 1),
        ("public.t", "update_origin_differs", "KEPT_LOCAL", 1, 0),
        ('sales."O\'s"', "delete_missing", "APPLIED_REMOTE", 1, 1),
    ]  # fmt: skip


def test_a_role_that_only_looks_sees_conflicts_and_no_rows_of_users(log: Log) -> None:
    role = f"looks_{os.getpid()}"
    with psycopg.connect(log.conninfo, autocommit=True) as conn:
        conn.execute(f"CREATE ROLE {role} IN ROLE vsql_sync_viewer")
        try:
            conn.execute(f"SET ROLE {role}")
            from vsql_shared.pg import conflicts

            assert [one.id for one in conflicts.select(conn, conflicts.Wanted(), 10)] == [1, 2, 3]
            assert conflicts.rows_of(conn, 1) is None
        finally:
            conn.execute(f"RESET ROLE; DROP ROLE {role}")
