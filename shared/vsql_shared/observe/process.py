"""What keeps keys and rows inside a process: no core dumps, no other process's look, locked key memory.

How far it goes, said plainly: Python may copy a value before we can lock or wipe it, so wiping and locking
narrow the time and the places, and prove nothing. No dumps and no attaching debugger hold as far as the
kernel does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4


@dataclass(frozen=True)
class Hardening:
    """What could be had; what could not is logged as a warning by the service."""

    no_core_dumps: bool
    not_dumpable: bool

    @property
    def complete(self) -> bool:
        """Whether all of it holds."""
        return self.no_core_dumps and self.not_dumpable


def harden() -> Hardening:
    """Forbid core dumps and debuggers for this process.

    The first thing in every service and worker: a program that is executed starts without the second.
    """
    core = False
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        core = True
    return Hardening(no_core_dumps=core, not_dumpable=_prctl(_PR_SET_DUMPABLE, 0))


def die_with_parent(signal_number: int, parent: int | None = None) -> bool:
    """Have the kernel send this process a signal when its parent ends, however that ends. Linux only.

    `parent` is the process that started this one: where it has ended before the kernel was asked, nobody
    would say so any more, and the signal is sent at once (PR_SET_PDEATHSIG in prctl(2)).
    """
    asked = _prctl(_PR_SET_PDEATHSIG, signal_number)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal_number)
    return asked


def _prctl(option: int, value: int) -> bool:
    if sys.platform != "linux":
        return False
    return bool(_libc().prctl(option, value, 0, 0, 0) == 0)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def lock_memory(buffer: bytearray) -> bool:
    """Keep the buffer's pages out of swap. False where the system or its limit (RLIMIT_MEMLOCK) refuses."""
    if not buffer or sys.platform == "win32":
        return False
    place = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    return bool(_libc().mlock(ctypes.byref(place), ctypes.c_size_t(len(buffer))) == 0)


def wipe(buffer: bytearray) -> None:
    """Overwrite the buffer with zeros, in place."""
    if buffer:
        ctypes.memset((ctypes.c_char * len(buffer)).from_buffer(buffer), 0, len(buffer))


def resident_bytes() -> int:
    """Resident memory of this process, now where Linux tells, else its highest."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return highest if sys.platform == "darwin" else highest * 1024
