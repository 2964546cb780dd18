"""A log file of bounded size: what a service writes goes through the daemon into it.

The daemon writes the file itself, so that rotating needs no help from the service and loses no line.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


class RotatingFile:
    """`name.log`, and when it is full `name.log.1` … `name.log.N`, the oldest removed."""

    def __init__(self, path: Path, *, max_bytes: int, keep: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._descriptor = self._open()
        self._size = os.fstat(self._descriptor).st_size

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, data: bytes) -> None:
        """Append; a full disk loses log lines, never the daemon."""
        if self._size and self._size + len(data) > self._max_bytes:
            self._rotate()
        with contextlib.suppress(OSError):
            self._size += os.write(self._descriptor, data)

    def _rotate(self) -> None:
        os.close(self._descriptor)
        with contextlib.suppress(OSError):
            for number in range(self._keep - 1, 0, -1):
                older = self._numbered(number)
                if older.exists():
                    older.replace(self._numbered(number + 1))
            self._path.replace(self._numbered(1))
        self._descriptor = self._open()
        self._size = os.fstat(self._descriptor).st_size

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def last_lines(path: Path, count: int = 5, max_bytes: int = 8_192) -> list[str]:
    """The end of a log file, for a message to the operator."""
    try:
        with path.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - max_bytes))
            return stream.read().decode("utf-8", "replace").splitlines()[-count:]
    except OSError:
        return []
