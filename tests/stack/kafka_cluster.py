"""Three Kafka brokers that hold a copy each: one may die at any time, and nothing acknowledged is lost.

Not here: what a broker is (kafka.py). Every broker is a controller, too, so that two of three go on alone.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from confluent_kafka.admin import AdminClient

from tests.stack.kafka import KafkaBroker
from tests.stack.ports import reserve_port

BROKERS = 3


class KafkaCluster:
    """Brokers with replication factor 3, min.insync.replicas 2 and no unclean election."""

    def __init__(self, data_dir: Path) -> None:
        ports = [(reserve_port(), reserve_port()) for _ in range(BROKERS)]
        voters = ",".join(f"{n}@127.0.0.1:{controller}" for n, (_, controller) in enumerate(ports, 1))
        properties: dict[str, str | int] = {
            "controller.quorum.voters": voters,
            "unclean.leader.election.enable": "false",
            "default.replication.factor": BROKERS,
            "min.insync.replicas": BROKERS - 1,
            "offsets.topic.replication.factor": BROKERS,
            "transaction.state.log.replication.factor": BROKERS,
            "transaction.state.log.min.isr": BROKERS - 1,
            # A broker that is behind for so long no longer counts: half a minute as shipped.
            "replica.lag.time.max.ms": 5000,
        }
        self.brokers = [
            KafkaBroker(
                data_dir / f"broker-{n}",
                {**properties, "node.id": n},
                port=port,
                controller_port=controller,
                cluster_id="three-brokers-of-tests",
            )
            for n, (port, controller) in enumerate(ports, 1)
        ]

    @property
    def bootstrap_servers(self) -> str:
        """All brokers' addresses, for clients."""
        return ",".join(broker.bootstrap_servers for broker in self.brokers)

    def start(self) -> None:
        """Start all at once: one alone has no quorum and would wait for ever."""
        with ThreadPoolExecutor(BROKERS) as pool:
            list(pool.map(KafkaBroker.start, self.brokers))

    def is_whole(self) -> bool:
        """Whether every partition has all its copies in sync."""
        topics = AdminClient({"bootstrap.servers": self.bootstrap_servers}).list_topics(timeout=10).topics
        partitions = [part for topic in topics.values() for part in topic.partitions.values()]
        return all(len(part.isrs) == len(part.replicas) for part in partitions)

    def remove(self) -> None:
        """Kill the brokers and delete their data."""
        for broker in self.brokers:
            broker.remove()
