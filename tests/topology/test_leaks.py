"""Marker values written at A are found nowhere but in the two databases' own files."""

from __future__ import annotations

import base64
import os
import secrets
import subprocess
import urllib.request
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from tests.nodes import TwoNodes
from tests.pairs import Pairs
from tests.stack import Stack

pytestmark = pytest.mark.topology

# Column types that can carry 12 random bytes, with an expression that makes the value of $1 = 24 hex digits.
CARRIERS = {
    "text": "%s::text",
    "varchar(40)": "%s::varchar",
    "char(24)": "%s::char(24)",
    '"char"[]': 'string_to_array(%s, NULL)::"char"[]',
    "name": "%s::name",
    "bytea": "decode(%s, 'hex')",
    "json": "json_build_object('k', %s::text)",
    "jsonb": "jsonb_build_object('k', %s::text)",
    "xml": "xmlelement(name a, %s::text)",
    "uuid": "(%s || '00000000')::uuid",
    "text[]": "ARRAY[%s::text, NULL]",
    "numeric": "('x' || %s)::bit(96)::bit(60)::bigint::numeric",
    "bit varying": "('x' || %s)::bit(96)",
    "tsvector": "to_tsvector('simple', %s)",
    "int8[]": "ARRAY[('x' || left(%s, 15))::bit(60)::bigint]",
    "inet": "NULL::inet",
}


def _forms(marker: str) -> list[bytes]:
    """The marker as text, upper case, binary, and base64 of both."""
    raw = bytes.fromhex(marker)
    return [
        marker.encode(),
        marker.upper().encode(),
        raw,
        base64.b64encode(raw),
        base64.b64encode(marker.encode())[:-4],
    ]


def _search(folder: Path, needles: list[bytes], found: list[str]) -> int:
    searched = 0
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            try:
                if path.is_symlink() or not path.is_file() or path.stat().st_size > 200_000_000:
                    continue
                data = path.read_bytes()
            except OSError:
                continue  # sockets, files that went away
            searched += len(data)
            found += [f"{needle!r} in {path}" for needle in needles if needle in data]
    return searched


def _scrape(port: int) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return bytes(answer.read())


@pytest.mark.timeout(240)
def test_markers_of_every_type_are_nowhere_outside_the_databases(
    stack: Stack, pairs: Pairs, tmp_path: Path
) -> None:
    columns = ", ".join(f'"c{i}" {name}' for i, name in enumerate(CARRIERS))
    config = '[log]\nlevel = "debug"\n'
    broker = stack.own_kafka()
    pair = pairs(
        f"CREATE TABLE carriers (id int PRIMARY KEY, {columns})", config=config,
        kafka=broker.bootstrap_servers,
    )  # fmt: skip
    markers = [secrets.token_hex(12) for _ in range(6)]

    def write(connection: psycopg.Connection, number: int, marker: str) -> None:
        values = ", ".join(expression.replace("%s", f"'{marker}'") for expression in CARRIERS.values())
        connection.execute(sql.SQL(f"INSERT INTO carriers VALUES ({number}, {values})"))

    with psycopg.connect(pair.a.conninfo) as connection:
        write(connection, 1, markers[0])  # travels with the first copy
    pair.create(["carriers(*)"])
    pair.start()
    pair.wait_in_step()
    with psycopg.connect(pair.a.conninfo) as connection:
        for number, marker in enumerate(markers[1:4], start=2):
            write(connection, number, marker)
    with psycopg.connect(pair.a.conninfo) as connection:
        connection.execute("UPDATE carriers SET c0 = %s WHERE id = 2", (markers[4],))
        connection.execute("DELETE FROM carriers WHERE id = 3")
    # A change that fails at B is where careless programs print the row.
    pair.b.execute("ALTER TABLE carriers ADD CONSTRAINT broken CHECK (id <> 9) NOT VALID")
    with psycopg.connect(pair.a.conninfo) as connection:
        write(connection, 9, markers[5])
    _wait_for_trouble(pair)
    pair.b.execute("ALTER TABLE carriers DROP CONSTRAINT broken")
    pair.wait_in_step()
    assert pair.differences() == []
    needles = [form for marker in markers for form in _forms(marker)]
    found: list[str] = []
    assert broker.log_dir is not None
    assert _search(broker.log_dir, needles, found) > 10_000
    assert _search(tmp_path, needles, found) > 1_000, "the services' logs"
    for node in (pair.a, pair.b):
        dump = "".join(
            str(row)
            for table in (
                "vsql_sync_audit",
                "audit_log",
                "stream_status",
                "anomalies",
                "receipts",
                "commands",
            )
            for row in node.query(f"SELECT t::text FROM vsql_sync.{table} t")
        ).encode()
        found += [f"{needle!r} in tables of {node.name}" for needle in needles if needle in dump]
    others = Path("/tmp")  # noqa: S108 - what is searched
    for entry in others.iterdir():
        # Folders of servers hold the databases themselves; the broker's is searched above.
        if entry.is_dir() and entry.name.startswith("vsql") and not entry.name.startswith("vsql-sync-stack-"):
            _search(entry, needles, found)
    pair.stop()
    assert found == []


def _wait_for_trouble(pair: TwoNodes) -> None:
    import time

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        rows = pair.b.query(
            "SELECT detail->>'last_error' FROM vsql_sync.stream_status WHERE chain = %s AND direction = 'in'",
            pair.chain,
        )
        if rows and rows[0][0]:
            return
        time.sleep(0.3)
    raise AssertionError("the failing row at B was not reported")


def test_the_search_itself_finds_a_marker(tmp_path: Path) -> None:
    marker = secrets.token_hex(12)
    (tmp_path / "leak.log").write_bytes(b"x" * 100 + bytes.fromhex(marker))
    found: list[str] = []
    _search(tmp_path, _forms(marker), found)
    assert len(found) == 1
    assert subprocess.run(["true"], check=False).returncode == 0
