"""syncctl node, publication, start, pause, resume, status and stream, as an operator runs them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import NewDatabase
from tests.stack import Stack
from tests.syncctl import syncctl
from vsql_shared.crypto.signing import fingerprint, generate_signing_key, load_public_key
from vsql_shared.pg.connect import connect, parse_conninfo

TABLES = "CREATE TABLE public.payments (id bigint PRIMARY KEY, amount numeric, pan text)"


class Operator:
    """A node's configuration file and the syncctl that reads it."""

    def __init__(self, folder: Path, number: int, conninfo: str, extra: str = "") -> None:
        self.conninfo, self.name = conninfo, f"node-{number}"
        self.keys = folder / self.name
        self.keys.mkdir()
        self.public = generate_signing_key(self.keys)[1]
        self.fingerprint = fingerprint(load_public_key(self.public))
        parts = parse_conninfo(conninfo)
        self.config = folder / f"{self.name}.toml"
        self.config.write_text(
            f"""[cluster]
name = "c"
node_id = {number}
node_name = "{self.name}"
[connection]
host = "{parts["host"]}"
port = {parts["port"]}
database = "{parts["dbname"]}"
user = "postgres"
[server]
mode = "dev"
[audit]
signing_key_path = "{self.keys / "vsql-sync-signing.key"}"
{extra}
"""
        )

    def run(self, *args: str, code: int = 0) -> str:
        """Standard output (and standard error) of a command that must end with `code`."""
        done = _syncctl("--config", str(self.config), *args)
        assert done.returncode == code, f"{args}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout if code == 0 else done.stderr


def _syncctl(
    *args: str, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return syncctl(*args, env={**os.environ, **(env or {})}, cwd=cwd, timeout=60)


@pytest.fixture
def a(tmp_path: Path, new_database: NewDatabase) -> Operator:
    return _operator(tmp_path, 1, new_database("a"))


@pytest.fixture
def b(tmp_path: Path, new_database: NewDatabase) -> Operator:
    return _operator(tmp_path, 2, new_database("b"))


def _operator(folder: Path, number: int, conninfo: str) -> Operator:
    with connect(conninfo, application_name="test") as conn:
        conn.execute(TABLES)
    return Operator(folder, number, conninfo)


def test_the_way_from_two_empty_databases_to_running_streams(a: Operator, b: Operator) -> None:
    assert "initialised" in a.run("node", "init")
    assert "is as it should be" in a.run("node", "init")
    b.run("node", "init", "--node-id", "2", "--cluster", "c", "--connection", b.conninfo)
    shown = a.run("publication", "create", "pub", "--table", "payments(*)", "--pci-column", "payments.pan")
    assert "pan" in shown
    told = a.run(
        "node",
        "add-peer",
        "--peer-node-id",
        "2",
        "--peer-connection",
        b.conninfo,
        "--fingerprint",
        b.fingerprint,
    )
    assert "pub.node-1.copy.node-2 (first copy)" in told
    listed = json.loads(b.run("node", "list", "--output", "json"))
    assert [(one["name"], one["key_fingerprint"]) for one in listed] == [
        ("node-2", b.fingerprint),
        ("node-1", a.fingerprint),
    ]
    assert "was never started" in a.run("status")
    started = json.loads(a.run("start", "--output", "json"))["started"]
    assert {one["chain"] for one in started} == {"pub.node-1", "pub.node-1.copy.node-2"}
    assert "has no worker" in a.run("status")
    assert "does not run now" in a.run("pause", "--reason", "IR-7")
    assert "paused: IR-7" in a.run("status")
    streams = json.loads(a.run("status", "--output", "json"))["streams"]
    assert {one["desired"] for one in streams} == {"paused"}
    assert "pub.node-1" in a.run("resume")
    assert "no stream was paused" in a.run("resume")
    b.run("stream", "skip-batch", "--chain", "pub.node-1", "--sequence", "3", "--reason", "lost", "--yes")
    b.run(
        "stream", "ignore-record", "--chain", "pub.node-1", "--record", "t/0/1", "--reason", "forged", "--yes"
    )
    assert "was decided before" in b.run(
        "stream", "skip-batch", "--chain", "pub.node-1", "--sequence", "3", "--reason", "x", "--yes", code=4
    )
    assert "has stream" in a.run("publication", "drop", "pub", "--yes", code=4)


def test_a_priority_is_set_before_there_are_peers_and_told_to_them(a: Operator, b: Operator) -> None:
    a.run("node", "init", "--priority", "80")
    b.run("node", "init", "--priority", "20")
    add = ("node", "add-peer", "--peer-node-id", "2", "--peer-connection", b.conninfo)
    a.run(*add, "--fingerprint", b.fingerprint)
    for node in (a, b):
        with connect(node.conninfo, application_name="test") as conn:
            found = conn.execute("SELECT node_id, priority FROM vsql_sync.nodes ORDER BY node_id").fetchall()
            assert found == [("node-1", 80), ("node-2", 20)]
    assert "is set before its first peer" in b.run("node", "init", "--priority", "90", code=4)
    b.run("node", "init", "--priority", "20")
    b.run("node", "init")
    with connect(b.conninfo, application_name="test") as conn:
        assert conn.execute("SELECT priority FROM vsql_sync.nodes WHERE is_local").fetchall() == [(20,)]


def test_a_wrong_fingerprint_or_no_answer_adds_nobody(a: Operator, b: Operator) -> None:
    a.run("node", "init")
    b.run("node", "init")
    add = ("node", "add-peer", "--peer-node-id", "2", "--peer-connection", b.conninfo)
    assert "--fingerprint says SHA256:x" in a.run(*add, "--fingerprint", "SHA256:x", code=4)
    asked = a.run(*add, code=2)
    assert a.fingerprint in asked
    assert b.fingerprint in asked
    assert len(json.loads(a.run("node", "list", "--output", "json"))) == 1


def test_two_nodes_that_cannot_see_each_other_are_joined_by_key_files(a: Operator, b: Operator) -> None:
    a.run("node", "init")
    b.run("node", "init")
    a.run("publication", "create", "pub", "--table", "payments")
    add = ("node", "add-peer", "--yes", "--peer-node-id")
    a.run(*add, "2", "--peer-name", "node-2", "--peer-key", str(b.public))
    received = ("--receive", "--publication", "pub", "--table", "payments")
    b.run(*add, "1", "--peer-name", "node-1", "--peer-key", str(a.public), *received)
    sides = [json.loads(one.run("status", "--output", "json"))["streams"] for one in (a, b)]
    assert [[one["chain"] for one in side] for side in sides] == [
        ["pub.node-1", "pub.node-1.copy.node-2"]
    ] * 2
    for args, expected in (
        (("2",), "is not named"),
        (("2", "--peer-key", str(b.public)), "needs --peer-name"),
        (("2", "--peer-key", str(b.public), "--peer-connection", "x=y"), "exclude each other"),
        (("2", "--peer-name", "n", "--peer-key", str(b.public), "--receive"), "needs --publication"),
    ):
        assert expected in a.run(*add, *args, code=2)


def test_node_init_needs_no_configuration_file(tmp_path: Path, new_database: NewDatabase) -> None:
    conninfo = new_database("plain")
    done = _syncctl(
        "node", "init", "--node-id", "9", "--cluster", "c", "--connection", conninfo, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "node node-9 (9) of cluster c initialised" in done.stdout
    assert "unsigned" in done.stdout
    done = _syncctl("node", "init", "--connection", conninfo, cwd=tmp_path)
    assert done.returncode == 2
    assert "--node-id and --cluster are needed" in done.stderr


def test_options_that_contradict_the_configuration_or_the_database_are_refused(
    a: Operator, tmp_path: Path
) -> None:
    assert "cluster.node_id" in a.run("node", "init", "--node-id", "7", code=3)
    a.run("node", "init")
    other = ("node", "init", "--node-id", "5", "--cluster", "c", "--connection", a.conninfo)
    done = _syncctl(*other, cwd=tmp_path)
    assert done.returncode == 4
    assert "this database is node node-1 (number 1)" in done.stderr


def test_another_key_is_taken_before_there_are_streams_and_refused_after(a: Operator, b: Operator) -> None:
    a.run("node", "init")
    for file in a.keys.iterdir():
        file.unlink()
    new = fingerprint(load_public_key(generate_signing_key(a.keys)[1]))
    assert new in a.run("node", "init")
    b.run("node", "init")
    a.run("publication", "create", "pub", "--table", "payments")
    a.run("node", "add-peer", "--peer-node-id", "2", "--peer-connection", b.conninfo, "--yes")
    for file in a.keys.iterdir():
        file.unlink()
    generate_signing_key(a.keys)
    assert "has streams signed with" in a.run("node", "init", code=4)


def test_a_server_that_is_not_ready_gets_no_schema(stack: Stack, tmp_path: Path) -> None:
    server = stack.own_postgres(18, {"wal_level": "replica"})
    try:
        operator = Operator(tmp_path, 1, server.conninfo())
        assert "wal_level is replica, wanted logical: ALTER SYSTEM SET" in operator.run(
            "node", "init", code=5
        )
        with connect(server.conninfo(), application_name="test") as conn:
            assert conn.execute("SELECT to_regnamespace('vsql_sync')").fetchall() == [(None,)]
    finally:
        server.remove()


@pytest.mark.parametrize(
    ("connection", "code", "expected"),
    [
        ("host=127.0.0.1 port=1 dbname=x", 7, "Connection refused"),
        ("garbage", 3, "connection string cannot be read"),
    ],
)
def test_a_database_that_cannot_be_reached_is_one_message(
    a: Operator, connection: str, code: int, expected: str
) -> None:
    said = a.run("node", "init", "--connection", connection, code=code)
    assert expected in said
    assert "Traceback" not in said


def test_a_database_that_is_no_node_says_how_to_make_it_one(a: Operator) -> None:
    for args in (
        ("status",),
        ("start",),
        ("node", "list"),
        ("publication", "list"),
        ("pause", "--reason", "x"),
    ):
        assert "syncctl node init" in a.run(*args, code=4)


def test_logins_need_their_passwords_in_the_environment(a: Operator) -> None:
    assert "VSQL_SYNC_PRODUCER_PASSWORD" in a.run("node", "init", "--create-logins", code=3)


def test_the_file_is_applied_with_its_difference_shown_and_then_there_is_none(
    tmp_path: Path, new_database: NewDatabase
) -> None:
    b = _operator(tmp_path, 2, new_database("b"))
    a_conninfo = new_database("a")
    with connect(a_conninfo, application_name="test") as conn:
        conn.execute(TABLES)
    wishes = f"""
[[publications]]
name = "pub"
[[publications.tables]]
name = "payments"
exclude_pci = true
[[pci.columns]]
table = "payments"
columns = ["pan"]
[[peers]]
node_id = 2
node_name = "node-2"
connection = "{b.conninfo}"
"""
    a = Operator(tmp_path, 1, a_conninfo, wishes)
    a.run("node", "init")
    b.run("node", "init")
    shown = json.loads(a.run("config", "apply", "--dry-run", "--output", "json"))
    assert [(one["kind"], one["action"]) for one in shown] == [
        ("pci-column", "mark"),
        ("publication", "create"),
        ("peer", "add"),
    ]
    assert b.fingerprint in shown[2]["detail"]
    assert json.loads(a.run("publication", "list", "--output", "json")) == []
    a.run("config", "apply", "--yes")
    tables = json.loads(a.run("publication", "list", "--output", "json"))[0]["tables"]
    assert tables[0]["columns"] == ["id", "amount"]
    assert len(json.loads(b.run("status", "--output", "json"))["streams"]) == 2
    assert json.loads(a.run("config", "apply", "--yes", "--output", "json")) == []
