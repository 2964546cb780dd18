"""Asks this host who keeps its clock: chrony, systemd-timesyncd, and the kernel. What they say: host.py.

Rules: nothing is changed and nothing waited for long; who is not there says nothing. The kernel's word counts
in containers, which have the host's clock and none of its programs.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable

from vsql_shared.clocks.host import (
    HostClock,
    best,
    of_kernel,
    parse_chrony,
    parse_timedatectl,
    parse_timesync,
)
from vsql_shared.errors import DatabaseError, DecodeError, RefusedError

_SECONDS = 3.0
# struct timex of 64-bit Linux: modes, offset, freq, maxerror, esterror, status; the whole has 208 bytes.
_TIMEX, _TIMEX_SIZE = struct.Struct("@Iqqqqi"), 512

_COMMANDS: tuple[tuple[Callable[[str], HostClock], tuple[str, ...]], ...] = (
    (parse_chrony, ("chronyc", "-n", "tracking")),
    (parse_timesync, ("timedatectl", "show-timesync", "--all")),
    (parse_timedatectl, ("timedatectl", "show")),
)


def read_host_clock() -> HostClock | None:
    """Who says this host's clock is synchronised, or that it is not; None where nobody says anything."""
    found = []
    for parse, words in _COMMANDS:
        text = _output(words)
        if text is not None:
            try:
                found.append(parse(text))
            except DecodeError:
                continue
    if (kernel := _kernel()) is not None:
        found.append(kernel)
    return best(found)


def require_synchronised(max_drift_ms: int, found: HostClock | None) -> None:
    """Raise RefusedError unless somebody keeps this host's clock, and not too loosely."""
    key = "replication.clock_sync.require_ntp = true"
    if found is None:
        raise RefusedError(
            f"{key}, and nothing on this host says whether its clock is synchronised",
            hint="run chrony or systemd-timesyncd here, or set it to false",
        )
    if not found.synchronised:
        raise RefusedError(
            f"{key}, and this host's clock is not synchronised ({found.source}: {found.why})",
            hint="look at `chronyc tracking` or `timedatectl`; or set it to false",
        )
    if found.error_us is not None and found.error_us > max_drift_ms * 1000:
        raise RefusedError(
            f"{key}, and by {found.source} this host's clock may be wrong by {found.error_us / 1e6:.1f} s",
            hint=f"look at its sources; replication.clock_sync.max_drift_ms = {max_drift_ms} is the limit",
        )


def require_database_near(max_drift_ms: int, host_us: int, database_us: int, took_us: int) -> None:
    """Raise DatabaseError where the database's server has another clock than this host for sure.

    `host_us`: this host's clock before it was asked; `took_us`: until its answer.
    """
    low, high = database_us - host_us - took_us, database_us - host_us
    least = max(0, low, -high)
    if least > max_drift_ms * 1000:
        raise DatabaseError(
            f"the clock of this node's database is {least / 1e6:.1f} s from this host's",
            hint="this host's is synchronised: run NTP on the database's server, too",
        )


def _output(words: tuple[str, ...]) -> str | None:
    program = shutil.which(words[0])
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *words[1:]],
            capture_output=True,
            check=False,
            timeout=_SECONDS,
            stdin=subprocess.DEVNULL,
            env={"PATH": os.defpath, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def _kernel() -> HostClock | None:
    if not sys.platform.startswith("linux") or struct.calcsize("P") != 8:
        return None
    buffer = ctypes.create_string_buffer(_TIMEX_SIZE)
    try:
        returned = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)  # modes = 0: nothing is set
    except (OSError, AttributeError):
        return None
    _, _, _, max_error, _, status = _TIMEX.unpack_from(buffer.raw)
    return None if returned < 0 else of_kernel(returned, status, max_error)
