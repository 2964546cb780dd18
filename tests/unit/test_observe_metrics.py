"""Metrics: what a worker reports stands in /metrics, alone and through its supervisor."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from vsql_shared.errors import ChainError
from vsql_shared.observe.metrics import Stage, StreamMetrics, StreamState, Verdict, exposition


def _samples(text: str) -> dict[tuple[str, str, str], float]:
    """(name, stream, last label) → value."""
    return {
        (sample.name, sample.labels.get("stream", ""), list(sample.labels.values())[-1]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels
    }


def test_each_stage_counts_rows_bytes_batches_and_seconds() -> None:
    metrics = StreamMetrics("s-stages", "node-a")
    for stage in Stage:
        metrics.passed(stage, rows=10, size=1000, seconds=0.25)
    families = {family.name: family for family in text_string_to_metric_families(exposition().decode())}
    for name, value in (("rows", 10), ("bytes", 1000), ("batches", 1)):
        found = {
            sample.labels["stage"]: sample.value
            for sample in families[f"vsql_sync_stage_{name}"].samples
            if sample.labels["stream"] == "s-stages" and sample.name.endswith("_total")
        }
        assert found == {stage.value: value for stage in Stage}
    sums = [s for s in families["vsql_sync_stage_seconds"].samples if s.name.endswith("_sum")]
    assert all(s.value == 0.25 for s in sums if s.labels["stream"] == "s-stages")


def test_errors_are_counted_by_class_and_foreign_ones_as_one() -> None:
    metrics = StreamMetrics("s-errors", "node-a")
    metrics.failed(ChainError("fork"))
    metrics.failed(KeyError("x"))
    metrics.failed(OSError())
    metrics.verified(Verdict.REFUSED)
    metrics.anomaly("update_missing", 3)
    text = exposition().decode()
    assert 'vsql_sync_errors_total{class="ChainError",node="node-a",stream="s-errors"} 1.0' in text
    assert 'vsql_sync_errors_total{class="unexpected",node="node-a",stream="s-errors"} 2.0' in text
    assert 'vsql_sync_verifications_total{node="node-a",stream="s-errors",verdict="refused"} 1.0' in text
    assert 'vsql_sync_anomalies_total{kind="update_missing",node="node-a",stream="s-errors"} 3.0' in text


def test_a_stream_is_in_exactly_one_state() -> None:
    metrics = StreamMetrics("s-state", "node-a")
    for state in (StreamState.STARTING, StreamState.STREAMING, StreamState.PAUSED):
        metrics.state(state)
    lines = [line for line in exposition().decode().splitlines() if 'stream="s-state"' in line]
    assert [line for line in lines if line.endswith(" 1.0")] == [
        'vsql_sync_stream_state{node="node-a",state="paused",stream="s-state"} 1.0'
    ]
    assert len(lines) == len(StreamState)


def test_lag_is_never_negative() -> None:
    metrics = StreamMetrics("s-lag", "node-a")
    metrics.lag(size=-5, seconds=-0.2, batches=3)
    text = exposition().decode()
    assert 'vsql_sync_lag_bytes{node="node-a",stream="s-lag"} 0.0' in text
    assert 'vsql_sync_lag_batches{node="node-a",stream="s-lag"} 3.0' in text


WORKER = """
    import os, sys
    from vsql_shared.observe.metrics import Stage, StreamMetrics
    metrics = StreamMetrics(sys.argv[1], "node-a")
    metrics.passed(Stage.SEAL, rows=int(sys.argv[2]), size=1, seconds=0.1)
    metrics.lag(size=int(sys.argv[2]))
    os._exit(0)  # as after a kill: no exit handler runs
"""

SUPERVISOR = """
    import os, subprocess, sys
    from vsql_shared.observe import shared_metrics
    directory = shared_metrics.begin()
    from vsql_shared.observe import metrics
    worker = sys.argv[1]
    def run(slot, rows):
        env = {**os.environ, **shared_metrics.worker_environment(slot)}
        subprocess.run([sys.executable, "-c", worker, slot, str(rows)], env=env, check=True)
    run("orders", 5); run("stock", 7); run("orders", 5)
    files = len(os.listdir(directory))
    metrics.StreamMetrics("orders", "node-a").state(metrics.StreamState.STOPPED)
    shared_metrics.worker_ended("stock")
    print(oct(directory.stat().st_mode & 0o777), files, directory)
    print(metrics.exposition().decode())
"""


# The same, with workers as a service has them: forked from a process that has imported the metrics.
NURSERY = """
    import sys, time
    from vsql_shared.service.nursery import begin
    begun = begin("a_package", ("vsql_shared.observe.metrics",), sys.argv)
    if isinstance(begun, list):
        sys.argv[1:] = begun[1:]
        exec(begun[0])
    def run(slot, rows):
        worker = begun.start(slot, [sys.argv[1], slot, str(rows)], shared_metrics.worker_environment(slot))
        assert worker.wait(20) and worker.returncode == 0
"""
RUN = """    def run(slot, rows):
        env = {**os.environ, **shared_metrics.worker_environment(slot)}
        subprocess.run([sys.executable, "-c", worker, slot, str(rows)], env=env, check=True)
"""


@pytest.fixture(params=["executed", "forked"])
def supervised(request: pytest.FixtureRequest) -> tuple[list[str], str]:
    """What a supervisor says whose workers were started in one way or the other."""
    program = textwrap.dedent(SUPERVISOR)
    if request.param == "forked":
        assert RUN in SUPERVISOR
        program = textwrap.dedent(NURSERY) + textwrap.dedent(SUPERVISOR.replace(RUN, ""))
    done = subprocess.run(
        [sys.executable, "-c", program, textwrap.dedent(WORKER)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    head, _, text = done.stdout.partition("\n")
    return head.split(), text


def test_a_supervisor_shows_its_workers_and_restarts_keep_counting(supervised: tuple[list[str], str]) -> None:
    (mode, _files, directory), text = supervised
    found = _samples(text)
    assert found["vsql_sync_stage_rows_total", "orders", "orders"] == 10.0
    assert found["vsql_sync_stage_rows_total", "stock", "stock"] == 7.0
    assert mode == "0o700"
    assert not Path(directory).exists(), "the directory goes with its maker"


def test_a_worker_that_is_gone_has_no_lag_but_keeps_its_counters(supervised: tuple[list[str], str]) -> None:
    (_mode, files, _directory), text = supervised
    found = _samples(text)
    assert ("vsql_sync_lag_bytes", "stock", "stock") not in found
    assert found["vsql_sync_lag_bytes", "orders", "orders"] == 5.0
    # counter, histogram and the live gauges, per slot: a restart adds none
    assert int(files) <= 6


def test_beginning_after_the_metrics_were_made_is_a_defect_that_is_said() -> None:
    code = "from vsql_shared.observe import metrics, shared_metrics; shared_metrics.begin()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 1
    assert "was imported before" in done.stderr
