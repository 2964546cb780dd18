"""Watchdog: stops the servers of a test run that died.

Run as a script by `processes`, with a pipe as standard input. The run writes one JSON object a line for
each process and folder it makes; the kernel closes the pipe when the run ends in whatever way, kill -9
included, and then the watchdog stops what is still registered and removes the folders.

Rules: a process is known by id and start time, so that a reused id is never killed; PostgreSQL and Kafka
get their quick signal first and SIGKILL a few seconds later.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sys

import psutil

GRACE_SECONDS = 5.0


def main() -> None:
    """Follow the run's orders until it is gone, then clean up after it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    processes: dict[int, tuple[float, int]] = {}
    folders: set[str] = set()
    for line in sys.stdin:
        order = json.loads(line)
        if "start" in order:
            processes[order["pid"]] = (order["start"], order["signal"])
        elif "pid" in order:
            processes.pop(order["pid"], None)
        elif order["keep"]:
            folders.discard(order["folder"])
        else:
            folders.add(order["folder"])
    stop_processes(processes)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def stop_processes(processes: dict[int, tuple[float, int]]) -> None:
    """Stop processes given as id → (start time, first signal to send)."""
    alive = []
    for pid, (start, first_signal) in processes.items():
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.create_time() == start:
                process.send_signal(signal.SIGCONT)  # a stopped process takes no other signal
                process.send_signal(first_signal)
                alive.append(process)
    _, left = psutil.wait_procs(alive, timeout=GRACE_SECONDS)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=GRACE_SECONDS)


if __name__ == "__main__":
    main()
