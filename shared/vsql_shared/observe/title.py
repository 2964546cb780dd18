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
    library = ctypes.CDLL(None, use_errno=True)
    library.sbrk.restype = ctypes.c_void_p
    places = (ctypes.c_uint64 * 13)(*code, library.sbrk(0), *rest, _SAME_EXECUTABLE)
    size = ctypes.c_ulong(ctypes.sizeof(places))
    told = library.prctl(_PR_SET_MM, ctypes.c_ulong(_PR_SET_MM_MAP), ctypes.byref(places), size, 0)
    if told == 0:
        _shown[:] = [buffer]
    return bool(told == 0)
