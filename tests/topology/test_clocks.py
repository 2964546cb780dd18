"""A database whose clock is set: both nodes see it, PCI data waits and no other; ids never go back."""

from __future__ import annotations

import contextlib
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from tests.chaos.privileged import build_clock, clock_env
from tests.nodes import Node, TwoNodes
from tests.stack import Stack
from tests.stack.postgres import PostgresServer
from tests.waiting import until
from vsql_shared.errors import DatabaseError, RefusedError

pytestmark = pytest.mark.topology

TABLES = """CREATE TABLE cards (id int PRIMARY KEY, pan text);
CREATE TABLE notes (id int PRIMARY KEY, text text);
CREATE TABLE made (id bigint PRIMARY KEY DEFAULT 0, n int);"""
CONFIG = """[limits]
retry_backoff_max_ms = 1000
status_interval_ms = 300
command_poll_ms = 300
[replication.clock_sync]
measure_every = "1s"
"""


class Wrong:
    """The clock of B's server: seconds it is ahead."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def set(self, seconds: int) -> None:
        with self._file.open("r+b") as opened:
            opened.write(struct.pack("q", seconds))


@pytest.fixture
def scene(stack: Stack, tmp_path: Path) -> Iterator[tuple[TwoNodes, Wrong]]:
    folder = stack.base_dir / f"clocks-{os.urandom(4).hex()}"
    folder.mkdir(mode=0o755)
    library = build_clock(folder)
    if library is None:
        pytest.skip("tests/chaos/clock.c needs cc, and glibc 2.30")
    file = folder / "clock"
    server = PostgresServer(18, folder / "b", env=clock_env(library, file))
    wrong = Wrong(file)
    file.chmod(0o644)
    pair = None
    try:
        server.start()
        with psycopg.connect(server.conninfo(), autocommit=True) as conn:
            conn.execute(sql.SQL("CREATE DATABASE b"))
        pair = TwoNodes(
            stack,
            tmp_path,
            TABLES,
            conninfos=(stack.new_database(18, "a"), server.conninfo("b")),
            config=CONFIG,
        )
        pair.create(["cards(*)", "notes(*)"], publication_args=["--pci-column", "cards.pan"])
        yield pair, wrong
    finally:
        if pair is not None:
            pair.end()
            stack.drop_database(pair.a.conninfo)
        server.remove()


def _clock(node: Node, of: str) -> tuple[str, int] | None:
    """(state, offset in whole seconds) of a node's clock, as `syncctl status` has it."""
    found = [one for one in node.ctl_json("status")["clocks"] if one["node"] == of]
    if not found or found[0]["offset_us"] is None:
        return None
    return found[0]["state"], round(found[0]["offset_us"] / 1e6)


def _count(node: Node, table: str) -> int:
    return int(node.query(f"SELECT count(*) FROM {table}")[0][0])


def test_a_database_whose_clock_is_set(scene: tuple[TwoNodes, Wrong]) -> None:
    pair, wrong = scene
    a, b = pair.a, pair.b
    pair.start()
    a.execute("INSERT INTO cards VALUES (1, 'on time')")
    pair.wait_in_step()
    until(
        lambda: (_clock(a, "node-b"), _clock(b, "node-a")) == (("ok", 0), ("ok", 0)), 60, lambda: _tell(pair)
    )

    wrong.set(5)
    until(
        lambda: (_clock(a, "node-b"), _clock(b, "node-a")) == (("error", 5), ("error", -5)),
        60,
        lambda: _tell(pair),
    )
    for whose in (r"node-a: -", r"this node's database, against this host: \+"):
        line = re.compile(rf"^CLOCK, far off: {whose}(4[89]|5[01])\d\d\.\d ms ±", re.MULTILINE)
        until(lambda: line.search(b.ctl("status").stdout), 60, lambda: _tell(pair))  # noqa: B023 - called at once
    a.execute("INSERT INTO notes VALUES (1, 'no card')")
    until(lambda: _count(b, "notes") == 1, 60, lambda: _tell(pair))
    a.execute("INSERT INTO cards VALUES (2, 'must wait')")
    waits = re.compile(r"^pub\.node-a \(in\): waits for the clock of node node-a's database", re.MULTILINE)
    until(lambda: waits.search(b.ctl("status").stdout), 60, lambda: _tell(pair))
    a.execute("INSERT INTO notes VALUES (2, 'behind it')")
    assert (_count(b, "cards"), _count(b, "notes")) == (1, 1)

    wrong.set(0)
    pair.wait_in_step()
    assert (_count(b, "cards"), _count(b, "notes")) == (2, 2)
    until(lambda: _clock(b, "node-a") == ("ok", 0), 60, lambda: _tell(pair))
    assert pair.differences() == []


def test_ids_of_a_database_whose_clock_is_set(scene: tuple[TwoNodes, Wrong]) -> None:
    pair, wrong = scene
    b = pair.b
    b.execute("ALTER TABLE made ALTER id SET DEFAULT vsql_sync.snowflake_id()")
    with contextlib.closing(psycopg.connect(b.conninfo, autocommit=True)) as client:
        take = "INSERT INTO made (n) SELECT generate_series(1, 500) RETURNING id"
        given = [row[0] for row in client.execute(take)]
        for seconds in (30, 0, -20, 7):  # from the farthest on, each is less than a minute back
            wrong.set(seconds)
            given += [row[0] for row in client.execute(take)]
        assert given == sorted(set(given))
        wrong.set(-60)
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="behind the last id"):
            client.execute(take)
        wrong.set(0)
        given += [row[0] for row in client.execute(take)]
        assert given == sorted(set(given))
        assert client.execute("SELECT count(*) FROM made").fetchone() == (len(given),)


def test_a_service_that_needs_a_kept_clock_does_not_start_with_this_one(
    scene: tuple[TwoNodes, Wrong],
) -> None:
    """Either nobody keeps this host's clock, or the database's is far from it."""
    pair, wrong = scene
    b = pair.b
    wrong.set(7)
    section = "[replication.clock_sync]"
    b.config.write_text(b.config.read_text().replace(section, f"{section}\nrequire_ntp = true"))
    code = b.start("consumer").wait(60)
    b.services.clear()
    said = b.tail("consumer")
    if "not synchronised" in said or "nothing on this host says" in said:
        assert code == RefusedError.exit_code
        assert "replication.clock_sync.require_ntp = true" in said
    else:
        assert code == DatabaseError.exit_code
        assert "from this host's" in said


def _tell(pair: TwoNodes) -> str:
    shown = [str(node.query("SELECT * FROM vsql_sync.clocks")) for node in (pair.a, pair.b)]
    return "\n".join([*shown, pair.a.tail("producer"), pair.b.tail("consumer")])
