"""With three brokers, any one that is killed at any time costs no more than a pause."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.chaos import checker, workload
from tests.chaos.scene import CONFIG
from tests.nodes import TwoNodes
from tests.pairs import Pairs
from tests.stack import Stack
from tests.stack.kafka_cluster import KafkaCluster
from tests.waiting import until

_SECONDS = 200
"""A deadline that three brokers on a busy machine keep; a pause is some seconds."""


@pytest.fixture
def cluster(stack: Stack) -> Iterator[KafkaCluster]:
    """Three brokers of this test's own."""
    made = KafkaCluster(stack.base_dir / "three-brokers")
    try:
        made.start()
        yield made
    finally:
        made.remove()


@pytest.mark.timeout(900)
def test_brokers_killed_in_turn_cost_no_more_than_a_pause(pairs: Pairs, cluster: KafkaCluster) -> None:
    pair = pairs(workload.TABLES_SQL, kafka=cluster.bootstrap_servers, config=CONFIG)
    for node in (pair.a, pair.b):
        node.replicas = 3
    pair.create(workload.TABLES, copy=False)
    for node in (pair.a, pair.b):
        node.start_daemon()
    pair.wait_in_step()
    with checker.under_load(pair, seed=3, pause=0.2) as watch:
        for broker in random.Random(3).sample(cluster.brokers, 3):
            until(cluster.is_whole, _SECONDS, lambda: "a broker that came back does not catch up")
            broker.kill()
            _goes_on(pair)
            broker.start()
    assert watch.snapshots > 10


def _goes_on(pair: TwoNodes) -> None:
    """What is committed from now on arrives, while a broker is away."""
    number = "SELECT n FROM counter"
    least = pair.a.query(number)[0][0] + 5
    until(
        lambda: pair.b.query(number)[0][0] > least,
        _SECONDS,
        lambda: f"{pair.a.tail('daemon')}\n{pair.b.tail('daemon')}",
    )
