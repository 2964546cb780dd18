"""Kafka or the database goes away and comes back: the stream goes on by itself, with every row once."""

from __future__ import annotations

from tests.services.conftest import NewSource
from tests.services.producer_node import SourceNode
from tests.stack import Stack

TABLE = "CREATE TABLE t (id bigint PRIMARY KEY, note text)"
IMPATIENT = """
[limits]
batch_max_rows = 200
batch_linger_ms = 1
status_interval_ms = 100
retry_backoff_max_ms = 1000
"""


def insert(node: SourceNode, first: int, last: int) -> None:
    node.execute(f"INSERT INTO t SELECT g, repeat('x', 60) FROM generate_series({first}, {last}) g")


def keys(node: SourceNode) -> list[int]:
    """Keys as they were read back, in order."""
    return [int.from_bytes(values[0] or b"", "big") for _, values in node.read().rows("t")]


def test_kafka_goes_away_under_load_and_comes_back(new_source: NewSource, stack: Stack) -> None:
    broker = stack.own_kafka()
    try:
        node = new_source(TABLE, ["t"], config=IMPATIENT, kafka=broker.bootstrap_servers)
        options = '[kafka]\nclient_options = {"message.timeout.ms" = 3000}'
        node.config.write_text(node.config.read_text().replace("[kafka]", options))
        worker = node.start()
        node.wait(lambda: node.state()[0] == "running")
        insert(node, 1, 1000)
        node.wait_confirmed()
        broker.kill()
        for start in range(1001, 3001, 100):
            insert(node, start, start + 99)
        node.wait(lambda: node.state()[0] == "waiting", what="an outage is not said")
        assert "Kafka" in node.state()[1]["last_error"]
        broker.start()
        node.wait_confirmed(90)
        assert node.state()[0] == "running"
        node.stop(worker)
        assert keys(node) == list(range(1, 3001))
    finally:
        broker.remove()


def test_the_database_restarts_under_load(new_source: NewSource, stack: Stack) -> None:
    server = stack.own_postgres(18)
    try:
        node = new_source(TABLE, ["t"], config=IMPATIENT, conninfo=server.conninfo())
        worker = node.start()
        node.wait(lambda: node.state()[0] == "running")
        insert(node, 1, 1000)
        server.kill()
        server.start()
        if not node.query("SELECT 1 FROM t LIMIT 1"):
            insert(node, 1, 1000)
        insert(node, 1001, 2000)
        node.wait_confirmed(90)
        node.stop(worker)
        assert keys(node) == list(range(1, 2001))
    finally:
        server.remove()
