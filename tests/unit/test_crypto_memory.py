"""Process protection: done to processes of their own, which then tell what the kernel says of them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# Everything is imported before privileges are dropped: the interpreter may lie where nobody else reads.
_PROTECTED = """
import ctypes, json, os, resource
from pathlib import Path
from vsql_shared.crypto.memory import protect_process
if {unprivileged}:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
    if os.getuid() == 0:
        os.setresuid(65534, 65534, 65534)
missing = protect_process()
status = Path("/proc/self/status").read_bytes().splitlines()
locked = next(int(line.split()[1]) for line in status if line.startswith(b"VmLck"))
libc = ctypes.CDLL(None)
print(json.dumps([missing, resource.getrlimit(resource.RLIMIT_CORE), libc.prctl(3, 0, 0, 0, 0), locked]))
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc: only on Linux")


def protected(*, unprivileged: bool) -> tuple[list[str], list[int], int, int]:
    program = _PROTECTED.format(unprivileged=unprivileged)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    missing, core, dumpable, locked = json.loads(done.stdout)
    return missing, core, dumpable, locked


def test_a_protected_process_writes_no_core_file_and_cannot_be_traced() -> None:
    _, core, dumpable, _ = protected(unprivileged=False)
    assert core == [0, 0]
    assert dumpable == 0


def test_memory_is_locked_or_its_lack_is_said() -> None:
    missing, _, _, locked = protected(unprivileged=False)
    assert (locked > 0) == (missing == [])


def test_a_process_that_may_not_lock_memory_says_so_and_goes_on() -> None:
    missing, core, dumpable, locked = protected(unprivileged=True)
    assert missing == ["memory is not locked, it may be swapped: allow it with `ulimit -l unlimited`"]
    assert (core, dumpable, locked) == ([0, 0], 0, 0)
