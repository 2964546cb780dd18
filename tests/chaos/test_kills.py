"""kill -9 of each part at random moments under load: nothing lost, nothing doubled, no human hand.

SEED= repeats a run, RUNS= is the number of kills of each part (`make test-faults`); otherwise it is short.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import psutil
import pytest

from tests.nodes import Node
from tests.pairs import Pairs
from tests.stack import KafkaBroker, Stack
from tests.topology import workload

pytestmark = pytest.mark.chaos

SEED = int(os.environ.get("SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
RUNS = int(os.environ.get("RUNS", "2"))


class _Load(threading.Thread):
    """Keeps writing until told to stop; `made` is the exact number of committed changes."""

    def __init__(self, conninfo: str) -> None:
        super().__init__(daemon=True)
        self.conninfo, self.made = conninfo, 0
        self.error: BaseException | None = None
        self._stop_event = threading.Event()

    def run(self) -> None:
        """Chunk after chunk, each with keys of its own."""
        try:
            chunk = 0
            while not self._stop_event.is_set():
                chunk += 1
                self.made += workload.run(
                    self.conninfo, 1500, 400, first=chunk * 1_000_000, seed=(chunk % 90) / 100
                )
                time.sleep(0.2)
        except BaseException as error:  # noqa: BLE001 - raised again by finish()
            self.error = error

    def finish(self) -> int:
        """Stop, and say how many changes were made."""
        self._stop_event.set()
        self.join()
        if self.error is not None:
            raise self.error
        return self.made


def _kill_one(node: Node, role: str, rng: random.Random) -> None:
    """SIGKILL the service or its worker; the daemon above it must bring it back."""
    deadline = time.monotonic() + 30
    while not (alive := node.processes(role)):
        assert time.monotonic() < deadline, f"no {role} process came back\n{node.tail('daemon')}"
        time.sleep(0.2)
    victim = rng.choice(alive)
    try:
        victim.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return


def _names(command: list[str] | None, folder: str) -> bool:
    return any(folder in word for word in command or ())


def _survive(stack: Stack, pairs: Pairs, kills: int, parts: tuple[str, ...]) -> None:
    print(f"SEED={SEED} RUNS={kills}")
    rng = random.Random(SEED)
    broker: KafkaBroker | None = stack.own_kafka() if "kafka" in parts else None
    kafka = broker.bootstrap_servers if broker else None
    pair = pairs(workload.TABLES_SQL, kafka=kafka)
    workload.prepare(pair.a.conninfo)
    pair.create(workload.TABLES, copy=False)
    for node in (pair.a, pair.b):
        node.start_daemon()
    pair.wait_in_step()
    load = _Load(pair.a.conninfo)
    load.start()
    for part in parts:
        for _ in range(kills):
            time.sleep(rng.uniform(0.5, 3.0))
            if part == "kafka":
                assert broker is not None
                broker.kill()
                time.sleep(rng.uniform(0, 1.5))
                broker.start()
            else:
                _kill_one(pair.a if part == "producer" else pair.b, part, rng)
    made = load.finish()
    pair.wait_in_step(timeout=300)
    assert pair.differences() == [], f"SEED={SEED}"
    deadline = time.monotonic() + 30
    while pair.acknowledged_rows() < made and time.monotonic() < deadline:
        time.sleep(0.2)
    assert pair.acknowledged_rows() == made, f"SEED={SEED}: {made} changes were made"
    for node in (pair.a, pair.b):
        verified = node.ctl("audit", "verify", check=False)
        assert verified.returncode == 0, f"SEED={SEED}\n{verified.stdout}{verified.stderr}"
    pair.stop()
    folder = str(pair.a.config.parent)
    left = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if _names(p.info["cmdline"], folder)]
    assert left == [], f"SEED={SEED}: processes outlived their daemon"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", ["producer", "consumer", "kafka"])
def test_killed_at_random_moments_nothing_is_lost_or_doubled(stack: Stack, pairs: Pairs, part: str) -> None:
    _survive(stack, pairs, RUNS, (part,))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_ten_kills_of_each_part_under_load(stack: Stack, pairs: Pairs) -> None:
    _survive(stack, pairs, 10, ("producer", "consumer", "kafka"))
