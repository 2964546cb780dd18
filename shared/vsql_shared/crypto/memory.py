"""Keep keys and plaintext in this process's memory: no core dump, no debugger of the same user, no swap.

Not a defence against root, nor against a frozen copy of the whole machine. Called once by the services at
start, before a key is loaded. Rules:

* It never fails a start: what the system does not grant is returned in words, for a warning in the log.
* Memory is locked only where the limit allows all of it. With a smaller limit MCL_FUTURE would let later
  allocations fail, and a service that dies for want of memory is the worse outcome.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

_PR_SET_DUMPABLE = 4  # linux/prctl.h
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4  # bits/mman-linux.h; ONFAULT since Linux 4.4
_CAP_IPC_LOCK = 1 << 14  # linux/capability.h


def protect_process() -> list[str]:
    """Forbid core dumps and tracing, and lock memory; returns what could not be done."""
    missing = []
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not sys.platform.startswith("linux"):
        return ["memory is not locked and tracing is not forbidden: only Linux offers both to a process"]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        missing.append(f"tracing by the same user is not forbidden: {os.strerror(ctypes.get_errno())}")
    if not _may_lock_all():
        missing.append("memory is not locked, it may be swapped: allow it with `ulimit -l unlimited`")
    elif libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) != 0:
        missing.append(f"memory is not locked, it may be swapped: {os.strerror(ctypes.get_errno())}")
    return missing


def _may_lock_all() -> bool:
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY:
        return True
    try:
        status = Path("/proc/self/status").read_bytes()
    except OSError:
        return False
    effective = next((line for line in status.splitlines() if line.startswith(b"CapEff:")), b"CapEff: 0")
    return bool(int(effective.split()[1], 16) & _CAP_IPC_LOCK)
