"""Waiting for what a running service brings about."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


def until(check: Callable[[], _T], timeout: float = 60, tell: Callable[[], str] = str) -> _T:
    """The first true answer of `check`; after `timeout` seconds AssertionError, with what `tell` says."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if found := check():
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {timeout} s\n{tell()}")
