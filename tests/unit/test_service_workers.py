"""Worker processes that will not end, cannot start or never come up harm no other stream."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vsql_shared.service.workers import Workers, pause_after

# A worker that hears SIGTERM and goes on.
STUBBORN = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(__file__).with_name(sys.argv[-1]).touch()
time.sleep(60)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that workers run."""
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "stubborn"


def _until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("again", [False, True], ids=["not wanted any more", "wanted again"])
def test_a_worker_that_does_not_end_is_killed(package: str, tmp_path: Path, again: bool) -> None:
    workers = Workers(package, None, 0.1, 1.0, stop_timeout=0.5)
    try:
        workers.sync(["one"])
        _until((tmp_path / "one").exists)
        workers.sync([])
        _until(lambda: workers.sync(["one"] if again else []) == ["one"], 10)
    finally:
        workers.stop()


def test_a_worker_that_cannot_be_started_leaves_the_others_alone(package: str) -> None:
    too_long = "x" * 200_000  # of an argument: the system refuses it
    workers = Workers(package, None, 0.1, 1.0, stop_timeout=0.1)
    try:
        for _ in range(2):
            workers.sync([too_long, "one"])
        assert workers.running() == {too_long: False, "one": True}
    finally:
        workers.stop()


def test_the_pause_between_starts_doubles_up_to_its_bound_for_ever() -> None:
    assert [pause_after(failures, 0.1, 1.0) for failures in (1, 2, 3, 4, 5)] == [0.1, 0.2, 0.4, 0.8, 1.0]
    assert pause_after(1_000_000, 0.1, 60.0) == 60.0
