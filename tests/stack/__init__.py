"""Real PostgreSQL (15 to 18) and Kafka for tests, as processes, without a container engine.

From the command line (also `make stack-up`, `make stack-down`)::

    python -m tests.stack up            # Kafka and all four PostgreSQLs; prints their addresses
    python -m tests.stack up kafka 18   # only these
    python -m tests.stack status        # lines a shell can read: VSQL_SYNC_TEST_PG18='host=…'
    python -m tests.stack down

Tests use a stack that is up, and else start servers of their own and stop them, whatever ends the run.

As pytest fixtures (`tests/conftest.py`; mark the test `services` or `topology`)::

    def test_x(stack, kafka, pg18, new_database, cluster_name):
        kafka.bootstrap_servers              # "127.0.0.1:19092"; kafka.log_dir: its files, or None
        pg18.conninfo                        # superuser on the session's PostgreSQL 18, database postgres
        conninfo = new_database("orders")    # an empty database on 18; dropped after the test
        older = new_database("orders", version=15)
        cluster_name                         # unique to this test: topic names do not clash

    def test_y(pg): ...                      # runs on every version; pg.version, pg.conninfo
    @pytest.mark.parametrize("pg", [15, 18], indirect=True)
    def test_z(pg): ...                      # runs on these

Servers of one test, to stop, kill, freeze or configure (always processes)::

    server = stack.own_postgres(18, {"wal_level": "replica"}, fast=False, auth="scram")
    server.conninfo("postgres"); server.kill(); server.start(); server.restart("immediate")
    server.configure({"max_wal_senders": 0}); server.stop("fast"); server.remove()
    broker = stack.own_kafka({"message.max.bytes": 1000012})
    broker.bootstrap_servers; broker.kill(); broker.start(); broker.pause(); broker.log_dir; broker.remove()

Ports and data stay over restarts. Programs under test are best started with `spawn`, which never leaves
one behind::

    process = spawn([sys.executable, "-m", "vsql_producers", …], log=tmp_path / "producer.log")

As a library without pytest: `with Stack() as stack: …`. Where servers come from, first match: an address in
VSQL_SYNC_TEST_KAFKA, VSQL_SYNC_TEST_PG15 … PG18; a stack that is up; Docker, when an engine answers and
VSQL_SYNC_TEST_SOURCE is not `process`; processes. `fetch` says where downloads go.
"""

from tests.stack.fetch import POSTGRES_VERSIONS
from tests.stack.kafka import KafkaBroker
from tests.stack.postgres import PostgresServer
from tests.stack.processes import forget, kill_tree, spawn, watch
from tests.stack.stack import Kafka, Postgres, Stack, drop_slots

__all__ = [
    "POSTGRES_VERSIONS",
    "Kafka",
    "KafkaBroker",
    "Postgres",
    "PostgresServer",
    "Stack",
    "drop_slots",
    "forget",
    "kill_tree",
    "spawn",
    "watch",
]
