"""Which process is meant: a process id with the time the process started, because ids are used again.

Rules: nobody is signalled whose start time differs from the recorded one, and where the kernel has
process descriptors the check and the signal reach the same process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessId:
    """A process of this boot of this machine."""

    pid: int
    started: str

    @staticmethod
    def of(pid: int) -> ProcessId | None:
        """The process that has this id now; None when there is none."""
        started = _start_time(pid)
        return ProcessId(pid, started) if started else None

    def is_running(self) -> bool:
        """Whether this very process still runs."""
        return _start_time(self.pid) == self.started

    def send(self, number: signal.Signals) -> bool:
        """Signal this very process; False when it is gone."""
        if hasattr(os, "pidfd_open"):
            return self._send_by_descriptor(number)
        if not self.is_running():
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)
            return True
        return False

    def _send_by_descriptor(self, number: signal.Signals) -> bool:
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            # The descriptor is held first: what it names cannot change between the look and the signal.
            if not self.is_running():
                return False
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            return False
        else:
            return True
        finally:
            os.close(descriptor)


def _start_time(pid: int) -> str:
    """When a process started, in a form no two processes of one id share; "" when there is none."""
    if Path("/proc/self/stat").exists():
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        except OSError:
            return ""
        # The name may hold spaces and parentheses; fields are counted after the last one.
        fields = stat.rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else f"{boot}/{fields[19]}"
    shown = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return shown.stdout.strip()
