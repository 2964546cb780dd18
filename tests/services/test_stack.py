"""The servers the tests run against do what other tests take for granted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import psycopg
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from psycopg.conninfo import conninfo_to_dict

from tests.stack import Kafka, Postgres, Stack
from tests.stack.state import REPOSITORY


def test_each_postgres_is_of_its_version_and_ready_for_replication(pg: Postgres) -> None:
    with psycopg.connect(pg.conninfo) as connection:
        number = connection.execute("SHOW server_version_num").fetchone()
        level = connection.execute("SHOW wal_level").fetchone()
        timestamps = connection.execute("SHOW track_commit_timestamp").fetchone()
    assert number is not None
    assert int(number[0]) // 10_000 == pg.version
    assert (level, timestamps) == (("logical",), ("on",))


def test_a_database_is_dropped_although_a_slot_and_a_session_hold_it(stack: Stack) -> None:
    conninfo = stack.new_database(18, "held")
    session = psycopg.connect(conninfo, autocommit=True)
    slot = f"held_{os.getpid()}"
    session.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [slot])
    stack.drop_database(conninfo)
    session.close()
    with psycopg.connect(stack.postgres(18).conninfo) as connection:
        left = connection.execute("SELECT 1 FROM pg_replication_slots WHERE slot_name = %s", [slot])
        assert left.fetchone() is None
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(conninfo)


def test_a_copy_of_a_database_has_what_it_had_and_is_another(stack: Stack) -> None:
    first = stack.new_database(18, "first")
    with psycopg.connect(first) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
    copy = stack.new_database(18, "copy", str(conninfo_to_dict(first)["dbname"]))
    with psycopg.connect(copy) as connection:
        assert connection.execute("SELECT answer FROM kept").fetchone() == (42,)
        connection.execute("DROP TABLE kept")
    with psycopg.connect(first) as connection:
        assert connection.execute("SELECT answer FROM kept").fetchone() == (42,)
    for conninfo in (first, copy):
        stack.drop_database(conninfo)


def test_a_killed_postgres_comes_back_with_what_was_committed(stack: Stack) -> None:
    server = stack.own_postgres(15)
    try:
        with psycopg.connect(server.conninfo()) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        port = server.port
        server.kill()
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(server.conninfo())
        server.start()
        with psycopg.connect(server.conninfo()) as connection:
            assert connection.execute("SELECT answer FROM kept").fetchone() == (42,)
        assert server.port == port
    finally:
        server.remove()


def test_scram_refuses_a_wrong_password(stack: Stack) -> None:
    server = stack.own_postgres(18, auth="scram")
    try:
        psycopg.connect(server.conninfo()).close()
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(server.conninfo().replace(server.password, "wrong"))
    finally:
        server.remove()


def test_kafka_takes_large_messages_and_creates_no_topic_by_itself(kafka: Kafka, cluster_name: str) -> None:
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    topic = f"{cluster_name}.large"
    admin.create_topics([NewTopic(topic, num_partitions=1, replication_factor=1)])[topic].result(30)
    errors: list[object] = []
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "message.max.bytes": 8_000_000})
    producer.produce(topic, os.urandom(7_000_000), on_delivery=lambda error, _: errors.append(error))
    assert producer.flush(30) == 0
    assert errors == [None]
    assert f"{cluster_name}.other" not in admin.list_topics(timeout=10).topics


def test_a_killed_kafka_comes_back_on_the_same_port_with_its_topics(stack: Stack) -> None:
    broker = stack.own_kafka()
    try:
        admin = AdminClient({"bootstrap.servers": broker.bootstrap_servers})
        admin.create_topics([NewTopic("kept", num_partitions=1, replication_factor=1)])["kept"].result(30)
        before = broker.bootstrap_servers
        broker.kill()
        broker.start()
        assert broker.bootstrap_servers == before
        again = AdminClient({"bootstrap.servers": broker.bootstrap_servers})
        assert "kept" in again.list_topics(timeout=30).topics
        assert any(path.name == "kept-0" for path in broker.log_dir.iterdir())
    finally:
        broker.remove()


_STARTS_A_SERVER_AND_HANGS = """
import sys, time
from pathlib import Path
from tests.stack import Stack
stack = Stack()
server = stack.own_postgres(18)
Path(sys.argv[1]).write_text(f"{server.pid} {stack.base_dir}")
time.sleep(600)
"""


def test_no_server_outlives_a_test_run_that_was_killed(tmp_path: Path) -> None:
    told = tmp_path / "told"
    run = subprocess.Popen([sys.executable, "-c", _STARTS_A_SERVER_AND_HANGS, str(told)], cwd=REPOSITORY)
    deadline = time.monotonic() + 60
    while not told.exists() or not told.read_text():
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    pid, folder = told.read_text().split()
    assert psutil.pid_exists(int(pid))
    run.send_signal(signal.SIGKILL)
    run.wait()
    deadline = time.monotonic() + 30
    while psutil.pid_exists(int(pid)) or Path(folder).exists():
        assert time.monotonic() < deadline, "the server or its data outlived the run"
        time.sleep(0.1)
