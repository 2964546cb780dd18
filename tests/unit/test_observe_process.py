"""A hardened process leaves no core dump and cannot be looked into; keys can be locked and wiped."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys

import pytest

from vsql_shared.observe.process import lock_memory, resident_bytes, wipe

HARDENED = """
import ctypes, resource
from vsql_shared.observe.process import harden
done = harden()
print(done.complete, resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's; elsewhere only the core limit is set")
def test_a_hardened_process_is_not_dumpable() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HARDENED],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.split(maxsplit=1)[0] == "True"
    assert "(0, 0) 0" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize(("parent", "code"), [("os.getppid()", 0), ("os.getppid() + 1", -signal.SIGTERM)])
def test_a_process_whose_parent_ended_before_it_asked_ends_at_once(parent: str, code: int) -> None:
    program = (
        "import os, signal\n"
        "from vsql_shared.observe.process import die_with_parent\n"
        f"die_with_parent(signal.SIGTERM, {parent})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == code


def test_wiping_overwrites_in_place() -> None:
    key = bytearray(b"k" * 32)
    place = (ctypes.c_char * 32).from_buffer(key)
    wipe(key)
    assert bytes(place) == bytes(32)
    assert len(key) == 32


def test_a_locked_key_stays_usable_and_an_empty_one_is_not_locked() -> None:
    key = bytearray(b"k" * 32)
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    assert lock_memory(key) or limit != resource.RLIM_INFINITY
    assert key == b"k" * 32
    assert not lock_memory(bytearray())


def test_resident_memory_is_that_of_a_python_process() -> None:
    assert 2**20 < resident_bytes() < 2**34
