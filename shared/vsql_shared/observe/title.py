"""How a process that was forked, not executed, is shown by `ps`: its own command line. Linux only.

Not needed for anything to work; where the kernel refuses, `ps` shows the command line of its parent.
The kernel is told where the words are (PR_SET_MM_MAP in prctl(2), which needs no privilege); nothing that
the process itself reads is written over, as older ways of doing this do.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path

_PR_SET_MM = 35
_PR_SET_MM_MAP = 14
# Fields of /proc/self/stat as proc(5) counts them.
_START_CODE, _END_CODE, _START_STACK, _START_DATA, _END_DATA, _START_BRK = 26, 27, 28, 45, 46, 47
_ENV_START, _ENV_END = 50, 51
# Where struct prctl_mm_map has the heap's end.
_BRK = 5
# The executable stays: -1 as an unsigned half of the last word, beside no auxiliary vector.
_SAME_EXECUTABLE = 0xFFFFFFFF << 32

_shown: list[ctypes.Array[ctypes.c_char]] = []
"""Kept: the kernel reads it whenever somebody looks."""


def show_as(words: Sequence[str]) -> bool:
    """Show this process under these words; whether the kernel does."""
    if sys.platform != "linux":
        return False
    text = b"".join(word.encode("utf-8", "surrogateescape") + b"\0" for word in words)
    buffer = ctypes.create_string_buffer(text, len(text))
    start = ctypes.addressof(buffer)
    try:
        fields = Path("/proc/self/stat").read_bytes().rpartition(b") ")[2].split()
        here = {number: int(field) for number, field in enumerate(fields[1:], 4)}
        code = (here[_START_CODE], here[_END_CODE], here[_START_DATA], here[_END_DATA], here[_START_BRK])
        rest = (here[_START_STACK], start, start + len(text), here[_ENV_START], here[_ENV_END], 0)
    except (OSError, ValueError, KeyError):
        return False
    places = (ctypes.c_uint64 * 13)(*code, 0, *rest, _SAME_EXECUTABLE)
    told = _tell_kernel(places)
    if told:
        _shown[:] = [buffer]
    return told


def _tell_kernel(places: ctypes.Array[ctypes.c_uint64]) -> bool:
    """Fill in where the heap ends, at the last moment: memory taken in between would make it untrue."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        sbrk, prctl = library.sbrk, library.prctl
    except (OSError, AttributeError):
        return False
    sbrk.argtypes, sbrk.restype = [ctypes.c_ssize_t], ctypes.c_size_t
    prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]
    arguments = (_PR_SET_MM, _PR_SET_MM_MAP, ctypes.addressof(places), ctypes.sizeof(places), 0)
    places[_BRK] = sbrk(0)
    return bool(prctl(*arguments) == 0)
