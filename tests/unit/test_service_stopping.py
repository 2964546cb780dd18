"""A signal sets the event although the main thread waits for that event at this very moment."""

from __future__ import annotations

import os
import subprocess
import sys

# A timer sends the signal every 0.3 ms while the main thread enters and leaves `wait`.
STORM = """
import signal, threading, time
from vsql_shared.service.stopping import set_on_signals
stop = threading.Event()
set_on_signals(stop)
signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGTERM))
signal.setitimer(signal.ITIMER_REAL, 3e-4, 3e-4)
seen, until = 0, time.monotonic() + 2
while time.monotonic() < until:
    seen += stop.wait(1e-6)
    stop.clear()
signal.setitimer(signal.ITIMER_REAL, 0)
print(seen)
"""


def test_a_signal_that_meets_the_wait_for_it_does_not_stop_the_process_for_ever() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STORM],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
