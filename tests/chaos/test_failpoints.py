"""Wherever progress becomes durable a process may die, just before or after: the next one goes on exactly.

One pair of nodes stands through all of it; after each crash the stream comes in step with nobody's help.
"""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nodes import PUBLICATION, Node, TwoNodes, differences, start_service
from tests.stack import Stack, forget, kill_tree
from tests.waiting import until
from vsql_shared import names
from vsql_shared.pg import commands
from vsql_shared.pg.connect import connect

ROOT = Path(__file__).resolve().parents[2]
LIVE = (
    "producer.slot-found",
    "producer.slot-held",
    "producer.opening",
    "producer.epoch-opened",
    "producer.packs-acked",
    "producer.manifest-sent",
    "producer.manifest-acked",
    "producer.audit-committed",
    "producer.confirmed",
    "consumer.before-apply-commit",
    "consumer.after-apply-commit",
    "consumer.before-ack-table",
    "consumer.after-ack-table",
    "consumer.before-ack-publish",
    "consumer.after-ack-publish",
    "consumer.before-offset-commit",
)
ACTS = ("consumer.act-signed", "consumer.act-obeyed")
COPY = ("copy.started", "copy.recorded")
JOIN = ("consumer.before-join-commit", "consumer.after-join-commit")
ELSEWHERE = (
    "consumer.before-replay-commit",
    "consumer.after-replay-commit",
    "producer.position-noted",
    "producer.wrapping-noted",
    "producer.key-end",
)
"""Reached in tests/services (test_apply_decisions.py, test_producer_slots.py, test_shred_orders.py) and in
tests/topology/test_key_ends.py."""
TABLE = "CREATE TABLE t (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text)"
CONFIG = "[limits]\nbatch_linger_ms = 1\nretry_backoff_max_ms = 1000\ncommand_poll_ms = 100\n"


def test_every_failpoint_of_the_code_is_crashed_at() -> None:
    found = {
        name
        for folder in ("producers", "consumers", "shared")
        for file in (ROOT / folder).rglob("*.py")
        for name in re.findall(r"failpoints\.hit\(([^)]*)\)", file.read_text())
    }
    assert found == {f'"{point}"' for point in (*LIVE, *ACTS, *COPY, *JOIN, *ELSEWHERE)}


@pytest.fixture(scope="module")
def pair(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    """Two nodes, whose workers this file starts itself: what dies is the process that is armed."""
    made = TwoNodes(stack, tmp_path_factory.mktemp("failpoints"), TABLE, config=CONFIG)
    made.create(["t(*)"], copy=False)
    try:
        _start(made.a, "producer", made.chain)
        _start(made.b, "consumer", made.chain)
        made.wait_in_step()
        yield made
        made.stop()
        made.a.ctl("audit", "verify", "--kafka", "--peer-connection", made.b.conninfo)
        made.b.ctl("audit", "verify", "--kafka")
    finally:
        made.end()


def _start(node: Node, role: str, chain: str, crash_at: str = "") -> subprocess.Popen[bytes]:
    """Start one worker as the node's service of a role, to die where it is told to."""
    armed = {"VSQL_SYNC_ALLOW_FAILPOINTS": "1", "VSQL_SYNC_FAILPOINTS": f"{crash_at}=kill"}
    words = ["--config", str(node.config), "--chain", chain]
    worker = start_service(role, words, log=node.log_file(role), env=armed if crash_at else {})
    node.services[role] = worker
    return worker


def _work(pair: TwoNodes) -> None:
    pair.a.execute("INSERT INTO t (v) VALUES ('a'), ('b'); UPDATE t SET v = v || 'x' WHERE id % 7 = 0")
    pair.a.execute("DELETE FROM t WHERE id % 5 = 0")


def _crash(pair: TwoNodes, node: Node, role: str, chain: str, point: str) -> None:
    """Have a worker die at a point, while the source works."""
    worker = _start(node, role, chain, point)

    def dead() -> bool:
        _work(pair)
        return worker.poll() is not None

    until(dead, 40, lambda: f"{point} was not reached\n{node.tail(role)}")
    assert worker.returncode == -signal.SIGKILL, node.tail(role)
    forget(worker)


@pytest.mark.parametrize("point", LIVE)
def test_a_stream_whose_worker_died_at_any_point_goes_on_exactly(pair: TwoNodes, point: str) -> None:
    role = point.partition(".")[0]
    node = pair.a if role == "producer" else pair.b
    kill_tree(node.services.pop(role))
    _crash(pair, node, role, pair.chain, point)
    _start(node, role, pair.chain)
    _goes_on(pair)


@pytest.mark.parametrize("point", ACTS)
def test_a_command_whose_worker_died_is_answered_once_by_the_next_one(pair: TwoNodes, point: str) -> None:
    kill_tree(pair.b.services.pop("consumer"))
    with connect(pair.b.conninfo, application_name="test") as conn:
        asked = commands.request(conn, "consumer", "retry", {}, "a test", pair.chain)
        _crash(pair, pair.b, "consumer", pair.chain, point)
        assert commands.answers(conn, asked) == []
        _start(pair.b, "consumer", pair.chain)
        assert [answer.ok for answer in commands.wait(conn, asked, 1, 30)] == [True]
    _goes_on(pair)


def _goes_on(pair: TwoNodes) -> None:
    """The stream works, and its target has each change once."""
    _work(pair)
    pair.wait_in_step()
    assert pair.differences() == []
    until(lambda: pair.acknowledged_rows() == pair.audited_rows(), 20, lambda: "not acknowledged exactly")


@pytest.fixture
def third(pair: TwoNodes, stack: Stack) -> Iterator[Node]:
    """Node C, which joins with a first copy."""
    conninfo = stack.new_database(18, "c")
    node = Node(pair.folder, pair.cluster, 3, "node-c", conninfo, pair.a.kafka, CONFIG)
    node.execute(TABLE)
    node.write_config(pair.folder / "kek.key")
    node.ctl("key", "generate", "--output", str(node.keys))
    init = ("node", "init", "--node-id", "3", "--node-name", "node-c", "--cluster", pair.cluster)
    node.ctl(*init, "--connection", conninfo)
    peer = ("--peer-node-id", "3", "--peer-name", "node-c", "--peer-connection", conninfo)
    pair.a.ctl("node", "add-peer", *peer, "--mode", "uni-directional", "--yes")
    for one in (pair.a, node):
        one.ctl("start")
    yield node
    for process in node.services.values():
        kill_tree(process)


def test_a_first_copy_and_a_target_that_joins_go_on_exactly(pair: TwoNodes, third: Node) -> None:
    copy = names.copy_chain(PUBLICATION, "node-a", "node-c")
    copying = Node(pair.folder, pair.cluster, 1, "node-a", pair.a.conninfo, pair.a.kafka)
    for point in COPY:
        _crash(pair, copying, "producer", copy, point)
    _start(copying, "producer", copy)
    _start(third, "consumer", copy)
    for process in (copying.services["producer"], third.services["consumer"]):
        assert process.wait(60) == 0, f"{copying.tail('producer')}\n{third.tail('consumer')}"
    for point in JOIN:
        _crash(pair, third, "consumer", pair.chain, point)
    _start(third, "consumer", pair.chain)
    _work(pair)
    pair.wait_in_step()
    until(
        lambda: differences(pair.a.conninfo, third.conninfo, pair.tables()) == [],
        60,
        lambda: third.tail("consumer"),
    )
    third.stop("consumer")
    third.ctl("audit", "verify", "--kafka")
