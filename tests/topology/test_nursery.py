"""The process that workers are forked from is killed: nothing is lost, and who starts the service starts it.

The schedules of docs/design/0024; without a database they are in tests/unit/test_service_workers.py.
"""

from __future__ import annotations

import psutil
import pytest

from tests.nodes import Node, TwoNodes
from tests.pairs import Pairs

pytestmark = pytest.mark.topology

TABLE = "CREATE TABLE t (id int PRIMARY KEY, v text)"


@pytest.fixture
def pair(pairs: Pairs) -> TwoNodes:
    made = pairs(TABLE)
    made.create(["t(*)"], copy=False)
    return made


def _processes(node: Node, role: str) -> tuple[psutil.Process, list[psutil.Process]]:
    """(the nursery, the workers), as `ps` shows them."""
    every = node.processes(role)
    (nursery,) = [one for one in every if one.cmdline()[-1] == "(nursery)"]
    return nursery, [one for one in every if "--chain" in one.cmdline()]


@pytest.mark.timeout(120)
def test_a_service_whose_nursery_is_killed_says_so_and_ends_with_its_workers(pair: TwoNodes) -> None:
    pair.start()
    pair.a.execute("INSERT INTO t VALUES (1, 'before')")
    pair.wait_in_step()
    for node, role in ((pair.a, "producer"), (pair.b, "consumer")):
        nursery, workers = _processes(node, role)
        assert [one.cmdline()[-4:-2] for one in workers] == [["--chain", pair.chain]]
        assert [one.ppid() for one in workers] == [nursery.pid]
        nursery.kill()
        assert node.services.pop(role).wait(30) == 1
        assert "the process that starts workers has ended" in node.tail(role)
        assert psutil.wait_procs(workers, timeout=30)[1] == []
    pair.a.execute("INSERT INTO t VALUES (2, 'while nobody was there')")
    pair.start()
    pair.wait_in_step()
    assert pair.differences() == []


@pytest.mark.timeout(120)
def test_under_the_daemon_a_stream_goes_on_after_its_nursery_was_killed(pair: TwoNodes) -> None:
    pair.a.start_daemon()
    pair.b.start("consumer")
    pair.a.execute("INSERT INTO t VALUES (1, 'before')")
    pair.wait_in_step()
    _processes(pair.a, "producer")[0].kill()
    pair.a.execute("INSERT INTO t VALUES (2, 'after')")
    pair.wait_in_step()
    assert pair.differences() == []
    for one, other in ((pair.a, pair.b), (pair.b, pair.a)):
        one.ctl("audit", "verify", "--kafka", "--peer-connection", other.conninfo)
