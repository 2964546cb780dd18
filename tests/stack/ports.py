"""Free TCP ports on the loopback address that stay ours while their server is down.

A port from the kernel's ephemeral range can be taken by any outgoing connection between a `kill -9` and
the restart, so ports come from below that range. A lock file per port, held by this process, keeps other
test runs away from it. A stranger that binds it anyway makes the server's start fail; starts are retried
with other ports until the first one succeeded.
"""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

_LOWEST, _HIGHEST = 15_000, 29_999
_held: dict[int, int] = {}
_random = random.SystemRandom()
"""Its own generator: tests seed the shared one, and two runs with one seed must not try the same ports."""


class NoFreePortError(Exception):
    """No free port was found on 127.0.0.1."""


def reserve_port() -> int:
    """Return a port nobody listens on and no other test run has reserved."""
    for _ in range(500):
        port = _random.randint(_LOWEST, _HIGHEST)
        if _lock(port):
            if _is_free(port):
                return port
            release_port(port)
    raise NoFreePortError(f"no free port between {_LOWEST} and {_HIGHEST} on 127.0.0.1 after 500 tries")


def release_port(port: int) -> None:
    """Give a reserved port back; a port that is not reserved is left alone."""
    handle = _held.pop(port, None)
    if handle is not None:
        os.close(handle)


def _lock(port: int) -> bool:
    folder = Path(tempfile.gettempdir()) / f"vsql-sync-ports-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    # A bare descriptor: it is held until the process ends, without a file object to be closed before.
    handle = os.open(folder / str(port), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return False
    _held[port] = handle
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
