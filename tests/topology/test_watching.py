"""What an operator's monitoring sees of running streams: metrics of each stage, health, and logs as JSON.

One pair of nodes at debug level, its services as supervisors with their workers; the figures are compared
with what was done to the tables.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.nodes import Node, TwoNodes
from tests.stack import Stack

pytestmark = pytest.mark.topology

COPIED, CHANGED = 300, 2000 + 800 + 100 + 1
LIVE, COPY = "pub.node-a", "pub.node-a.copy.node-b"
# Nothing that is written to a row, in whatever form, belongs into a log, a metric or a probe's answer.
MARKER = "marker-in-a-row"
CONFIG = '[log]\nlevel = "debug"\n[limits]\nstatus_interval_ms = 300\nretry_backoff_max_ms = 1000\n'
Figures = dict[tuple[str, ...], float]


@dataclass
class Watched:
    """A service whose health address was read from its log."""

    node: Node
    role: str

    @property
    def address(self) -> str:
        """Where it answers, as its log says."""
        events = map(json.loads, self.node.log_file(self.role).read_text().splitlines())
        return str([event["health"] for event in events if event["msg"] == "service started"][-1])

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a path."""
        try:
            with urllib.request.urlopen(self.address + path, timeout=10) as answer:  # noqa: S310 - our own address
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def figures(self) -> Figures:
        """(name, stream, further labels' values…) → value."""
        found: Figures = {}
        for family in text_string_to_metric_families(self.get("/metrics")[1]):
            for sample in family.samples:
                labels = {k: v for k, v in sample.labels.items() if k not in ("stream", "node")}
                assert sample.labels["node"] == self.node.name
                stream = sample.labels.get("stream", "")  # of clocks there is one figure a peer
                found[(sample.name.removeprefix("vsql_sync_"), stream, *labels.values())] = sample.value
        return found


@dataclass
class Scene:
    """The pair, its two services, and where the services' logs end."""

    pair: TwoNodes
    producer: Watched
    consumer: Watched
    first_ready: int


@pytest.fixture(scope="module")
def scene(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A first copy, some thousand changes, a rotated key; then quiet."""
    sql = "CREATE TABLE t (id int PRIMARY KEY, v text)"
    pair = TwoNodes(stack, tmp_path_factory.mktemp("watch"), sql, config=CONFIG)
    try:
        pair.a.execute(f"INSERT INTO t SELECT g, '{MARKER}' FROM generate_series(1, {COPIED}) g")
        pair.create(["t(*)"])
        with psycopg.connect(pair.a.conninfo) as holding:
            # Until somebody has looked, no worker can say that it runs.
            holding.execute("LOCK TABLE vsql_sync.stream_status IN EXCLUSIVE MODE")
            pair.start()
            producer, consumer = Watched(pair.a, "producer"), Watched(pair.b, "consumer")
            until(lambda: "service started" in pair.a.log_file("producer").read_text())
            first = producer.get("/readyz")[0]
        pair.wait_in_step()
        pair.a.execute(f"INSERT INTO t SELECT g, '{MARKER}' FROM generate_series(1001, 3000) g")
        pair.a.execute("UPDATE t SET v = v || id WHERE id <= 1500")
        pair.a.execute("DELETE FROM t WHERE id <= 100")
        pair.wait_in_step()
        pair.a.ctl("key", "rotate-dek")
        until(lambda: pair.a.query("SELECT count(*) > 0 FROM vsql_sync.command_results") == [(True,)])
        pair.a.execute("INSERT INTO t VALUES (9999, 'under the next key')")
        pair.wait_in_step()
        until(lambda: producer.get("/readyz")[0] == 200 and consumer.get("/readyz")[0] == 200)
        until(lambda: consumer.figures().get(("stage_rows_total", LIVE, "acknowledge")) == CHANGED)
        yield Scene(pair, producer, consumer, first)
    finally:
        pair.stop()


def until(true: Callable[[], bool], timeout: float = 60) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


SOURCE, TARGET = ("decode", "seal", "publish"), ("collect", "verify", "open", "apply", "acknowledge")


@pytest.mark.timeout(180)
def test_each_stage_counts_every_row_once(scene: Scene) -> None:
    for watched, stages in ((scene.producer, SOURCE), (scene.consumer, TARGET)):
        figures = watched.figures()
        assert {stage: figures["stage_rows_total", LIVE, stage] for stage in stages} == dict.fromkeys(
            stages, CHANGED
        )
        for stage in stages:
            assert figures["stage_bytes_total", LIVE, stage] > CHANGED / 10
            assert 1 <= figures["stage_batches_total", LIVE, stage] < 100
            assert figures["stage_seconds_count", LIVE, stage] >= 1
            assert 0 <= figures["stage_seconds_sum", LIVE, stage] < 60
    for stage in TARGET:
        assert scene.consumer.figures()["stage_rows_total", COPY, stage] == COPIED
    assert scene.producer.figures()["stage_rows_total", COPY, "seal"] == COPIED


@pytest.mark.timeout(180)
def test_batches_sealed_published_verified_and_acknowledged_are_as_many(scene: Scene) -> None:
    source, target = scene.producer.figures(), scene.consumer.figures()
    manifests = scene.pair.a.query(
        "SELECT count(*) FROM vsql_sync.vsql_sync_audit"
        " WHERE chain = %s AND event_type = 'replication_batch'",
        LIVE,
    )[0][0]
    counted = [source["stage_batches_total", LIVE, stage] for stage in ("seal", "publish")]
    counted += [target["stage_batches_total", LIVE, stage] for stage in TARGET]
    assert counted == [manifests] * len(counted)
    assert target["verifications_total", LIVE, "accepted"] == manifests
    assert source["transactions_total", LIVE] == 4
    assert source["audit_entries_total", LIVE] >= manifests
    assert target["audit_entries_total", LIVE] >= manifests


@pytest.mark.timeout(180)
def test_lag_memory_progress_and_state_are_those_of_a_stream_in_step(scene: Scene) -> None:
    for watched in (scene.producer, scene.consumer):
        figures = watched.figures()
        assert figures["lag_seconds", LIVE] < 5
        assert 30e6 < figures["resident_bytes", LIVE] < 300e6
        assert abs(time.time() - figures["last_progress_timestamp_seconds", LIVE]) < 120
        states = {key[2]: value for key, value in figures.items() if key[:2] == ("stream_state", LIVE)}
        assert {name for name, value in states.items() if value} == {"streaming"}
        assert figures["stream_state", COPY, "stopped"] == 1
    assert scene.consumer.figures()["lag_batches", LIVE] == 0


@pytest.mark.timeout(180)
def test_the_use_of_keys_is_counted_on_both_sides(scene: Scene) -> None:
    source, target = scene.producer.figures(), scene.consumer.figures()
    assert source["dek_rotations_total", LIVE, "session"] == 1
    assert source["dek_rotations_total", LIVE, "command"] == 1
    # The last row alone, and its table's description, lie under the newest key; said with the next status.
    until(lambda: 1 <= scene.producer.figures()["dek_tuples", LIVE] <= 2)
    assert source["dek_bytes", LIVE] > 0
    assert source["kms_calls_total", LIVE, "wrap", "ok"] == 2
    assert target["kms_calls_total", LIVE, "unwrap", "ok"] == 2


@pytest.mark.timeout(180)
def test_probes_say_when_the_services_are_ready_and_that_they_live(scene: Scene) -> None:
    assert scene.first_ready == 503, "ready before any stream ran"
    for watched in (scene.producer, scene.consumer):
        assert watched.get("/healthz") == (200, '{"status": "ok"}\n')
        assert watched.get("/readyz") == (200, '{"status": "ok"}\n')
        assert watched.get("/nothing")[0] == 404


@pytest.mark.timeout(180)
def test_every_line_of_the_logs_is_json_with_time_level_and_service_and_without_rows(scene: Scene) -> None:
    for watched in (scene.producer, scene.consumer):
        text = watched.node.log_file(watched.role).read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        assert len(lines) > 5
        for line in lines:
            assert {"ts", "level", "logger", "msg", "service"} <= line.keys()
            assert line["service"] == watched.role
        assert MARKER not in text
        assert MARKER not in watched.get("/metrics")[1]


@pytest.mark.timeout(180)
def test_the_probes_address_is_the_only_door_and_it_is_on_this_machine(scene: Scene) -> None:
    """No worker listens, nor anything else of a service: who has only the network finds nobody to talk to."""
    for watched in (scene.producer, scene.consumer):
        doors = [
            connection.laddr
            for process in watched.node.processes(watched.role)
            for connection in process.net_connections(kind="all")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert [door.ip for door in doors] == ["127.0.0.1"]
        assert watched.address.endswith(f":{doors[0].port}")


@pytest.mark.timeout(180)
@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/readyz"])
def test_what_the_door_says_holds_no_row_no_key_and_no_password(scene: Scene, path: str) -> None:
    for watched in (scene.producer, scene.consumer):
        shown = watched.get(path)[1]
        secrets = [MARKER, "PRIVATE", "BEGIN", "password", "SHA256:", watched.node.conninfo]
        secrets += (scene.pair.folder / "kek.key").read_text().split()
        secrets += (watched.node.keys / "vsql-sync-signing.key").read_text().splitlines()[1:-1]
        assert [secret for secret in secrets if len(secret) > 3 and secret in shown] == []


@pytest.mark.timeout(180)
def test_the_door_takes_no_orders(scene: Scene) -> None:
    for watched in (scene.producer, scene.consumer):
        for method, path in (
            ("POST", "/metrics"),
            ("PUT", "/readyz"),
            ("DELETE", "/"),
            ("GET", "/../kek.key"),
        ):
            request = urllib.request.Request(watched.address + path, b"stop", method=method)  # noqa: S310 - our own address
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request, timeout=10)  # noqa: S310 - as above
            assert refused.value.code in (404, 501)
            refused.value.close()
        assert watched.get("/healthz")[0] == 200


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
@pytest.mark.timeout(180)
def test_no_process_of_a_service_dumps_core_and_keys_are_locked_in_memory(scene: Scene) -> None:
    for watched in (scene.producer, scene.consumer):
        processes = watched.node.processes(watched.role)
        assert len(processes) >= 3, "the service, its nursery and a worker"
        for process in processes:
            assert process.rlimit(psutil.RLIMIT_CORE) == (0, 0)
    allowed = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    workers = scene.producer.node.processes("producer")[2:]
    locked = [_status(process.pid, "VmLck") for process in workers]
    assert max(locked) > 0 or allowed == 0, "the data key of the live stream"


def _status(pid: int, name: str) -> int:
    """A figure of /proc/PID/status, in kB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


@pytest.mark.timeout(180)
def test_an_error_is_counted_by_class_and_makes_the_service_not_ready(stack: Stack, tmp_path: Path) -> None:
    sql = "CREATE TABLE t (id int PRIMARY KEY, v text)"
    pair = TwoNodes(stack, tmp_path, sql, config=CONFIG)
    try:
        pair.create(["t(*)"])
        pair.start()
        pair.wait_in_step()
        consumer = Watched(pair.b, "consumer")
        pair.b.execute("ALTER TABLE t RENAME TO away")
        pair.a.execute("INSERT INTO t VALUES (1, 'x')")
        until(lambda: consumer.figures().get(("errors_total", LIVE, "DatabaseError"), 0.0) >= 1)
        until(lambda: consumer.get("/readyz")[0] == 503)
        assert f"{LIVE}: waiting" in consumer.get("/readyz")[1]
        assert consumer.get("/healthz")[0] == 200
        pair.b.execute("ALTER TABLE away RENAME TO t")
        pair.b.execute("INSERT INTO t VALUES (2, 'here already')")
        pair.a.execute("INSERT INTO t VALUES (2, 'y')")
        pair.wait_in_step()
        until(lambda: consumer.get("/readyz")[0] == 200)
        until(lambda: consumer.figures().get(("anomalies_total", LIVE, "insert_exists")) == 1.0)
    finally:
        pair.stop()
