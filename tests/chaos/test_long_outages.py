"""Ten minutes without Kafka, or without the target: nothing is lost, and memory does not grow meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psutil
import pytest

from tests.chaos import checker
from tests.chaos.scene import Scene
from tests.nodes import TwoNodes
from tests.stack import Stack

_SECONDS = 600.0
_MEMORY_BYTES = 400 * 2**20
"""More than a service and its worker take with full buffers (docs/design/0009), far less than ten minutes of
what is committed meanwhile and their records."""

_IN_STEP_SECONDS = 1_800.0
"""What ten minutes of commits are given to arrive while others go on."""


@pytest.fixture
def scene(stack: Stack) -> Iterator[Scene]:
    with Scene(stack, small_disks=False) as made:
        yield made


def _most_memory(pair: TwoNodes) -> int:
    """Of the largest process of both services, bytes."""
    sizes = [0]
    for node, role in ((pair.a, "producer"), (pair.b, "consumer")):
        for process in node.processes(role):
            try:
                sizes.append(process.memory_info().rss)
            except psutil.NoSuchProcess:
                continue
    return max(sizes)


@pytest.mark.long
@pytest.mark.parametrize("away", ["kafka", "target"])
@pytest.mark.timeout(3600)
def test_ten_minutes_without_a_server_lose_nothing_and_take_no_memory(scene: Scene, away: str) -> None:
    with scene.pair() as pair, checker.under_load(pair, seed=5, in_step=_IN_STEP_SECONDS) as watch:
        time.sleep(5)
        server = getattr(scene, away)
        server.kill()
        most, until = 0, time.monotonic() + _SECONDS
        while time.monotonic() < until:
            most = max(most, _most_memory(pair))
            time.sleep(1)
        server.start()
        print(f"{away}: the largest process had {most / 2**20:.0f} MiB")
        assert 0 < most < _MEMORY_BYTES
    assert len(watch.commits) > 100
