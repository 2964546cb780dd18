"""A second service of a node stands by and takes over from a killed one: nothing lost, nothing twice."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.nodes import Node, TwoNodes
from tests.pairs import Pairs
from tests.stack import kill_tree, spawn
from tests.waiting import until

pytestmark = pytest.mark.topology

TABLE = "CREATE TABLE t (id int PRIMARY KEY, v text)"
Second = Callable[[Node, str], Path]


@pytest.fixture
def second(tmp_path: Path) -> Iterator[Second]:
    """Start a second service for a node, on another "host" (state folder); gives its log."""
    started: list[subprocess.Popen[bytes]] = []

    def start(node: Node, role: str) -> Path:
        config, log = tmp_path / "standby.toml", tmp_path / f"standby-{len(started)}.log"
        text = node.config.read_text().replace(f"{node.name}-state", f"{node.name}-state-2")
        config.write_text(text.replace("[server]\n", "[server]\nstandby = true\n"))
        command = [sys.executable, "-m", f"vsql_{role}s", "--config", str(config)]
        started.append(spawn(command, log=log, env={}))
        until(lambda: "standing by: another" in log.read_text(), tell=log.read_text)
        return log

    yield start
    for process in started:
        kill_tree(process)


def _kill(node: Node, role: str) -> None:
    """SIGKILL a service and its workers at once, as a host's end does."""
    for process in node.processes(role):
        with contextlib.suppress(psutil.NoSuchProcess):  # some end with the first
            process.kill()
    node.services.pop(role).wait()


@pytest.fixture
def pair(pairs: Pairs) -> TwoNodes:
    made = pairs(TABLE)
    made.create(["t(*)"])
    made.start()
    made.a.execute("INSERT INTO t VALUES (0, 'by the first')")
    made.wait_in_step()
    return made


@pytest.mark.timeout(120)
@pytest.mark.parametrize("role", ["consumer", "producer"])
def test_one_that_stands_by_takes_over_from_one_that_is_killed(
    pair: TwoNodes, second: Second, role: str
) -> None:
    node = pair.b if role == "consumer" else pair.a
    log = second(node, role)
    pair.a.execute("INSERT INTO t SELECT i, 'under load' FROM generate_series(1, 2000) i")
    _kill(node, role)
    killed = time.monotonic()
    pair.a.execute("INSERT INTO t VALUES (3000, 'by the second')")
    until(lambda: pair.b.query("SELECT count(*) FROM t") == [(2002,)], tell=log.read_text)
    print(f"{role}: taken over, and level, within {time.monotonic() - killed:.1f} s")
    pair.wait_in_step()
    assert pair.differences() == []
    for one, other in ((pair.a, pair.b), (pair.b, pair.a)):
        one.ctl("audit", "verify", "--kafka", "--peer-connection", other.conninfo)


@pytest.mark.timeout(120)
def test_without_leave_to_stand_by_a_second_service_is_refused(pair: TwoNodes) -> None:
    command = [sys.executable, "-m", "vsql_consumers", "--config", str(pair.b.config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 4
    assert "another consumer of node node-b is already running" in done.stderr
    assert "server.standby = true" in done.stderr
    pair.a.execute("INSERT INTO t VALUES (1, 'by the first, still')")
    pair.wait_in_step()
