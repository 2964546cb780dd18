"""Faults for which this machine must let us mount, or must have a C compiler: full disks and wrong clocks.

A scene says in words what it cannot do here, and whoever runs it passes that on loudly. Rules: a disk is a
tmpfs of our own, so that no other disk is ever filled; only services of a node see another time, and only the
time of day: a monotonic clock does not jump.
"""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
from pathlib import Path

from typing_extensions import override

from tests.chaos.faults import Fault
from tests.stack import KafkaBroker, PostgresServer

_JUMP_SECONDS = 600
DISK_MB = 768


class SmallDisk:
    """A tmpfs that holds what lies in `folder`."""

    def __init__(self, folder: Path, size_mb: int = DISK_MB) -> None:
        self.folder = folder
        folder.mkdir()
        _run("mount", "-t", "tmpfs", "-o", f"size={size_mb}m,mode=755", "vsql-sync-test", str(folder))

    def fill(self) -> None:
        """Leave no room."""
        with contextlib.suppress(OSError), (self.folder / "filler").open("wb") as file:
            while True:
                free = os.statvfs(self.folder)
                os.posix_fallocate(file.fileno(), file.tell(), free.f_bavail * free.f_frsize or 1)
                file.seek(0, os.SEEK_END)

    def free(self) -> None:
        """Give the room back."""
        (self.folder / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount, whoever still has something open there."""
        _run("umount", "--lazy", str(self.folder))
        self.folder.rmdir()


class FullDisk(Fault):
    """A server's disk is full; a server that ended of it is started again when there is room."""

    def __init__(self, part: str, disk: SmallDisk, server: PostgresServer | KafkaBroker) -> None:
        super().__init__("disk-full", part)
        self._disk, self._server = disk, server

    @override
    def start(self) -> bool:
        self._disk.fill()
        return True

    @override
    def end(self) -> None:
        self._disk.free()
        if self._server.pid is None:
            self._server.start()


class Clock(Fault):
    """The time of day of a node's services jumps, and jumps back at the end."""

    def __init__(self, kind: str, part: str, file: Path, seconds: int) -> None:
        super().__init__(kind, part)
        self._file, self._seconds = file, seconds

    @override
    def start(self) -> bool:
        _set_clock(self._file, self._seconds)
        return True

    @override
    def end(self) -> None:
        _set_clock(self._file, 0)


def build_clock(folder: Path) -> Path | None:
    """Compile `clock.c`; None where there is no compiler, or it is not for this system."""
    library = folder / "clock.so"
    command = ("cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(Path(__file__).with_name("clock.c")))
    try:
        _run(*command)
    except (OSError, subprocess.CalledProcessError):
        return None
    return library


def clock_env(library: Path, file: Path) -> dict[str, str]:
    """What makes a process take its clock's offset from a file."""
    file.write_bytes(bytes(8))
    _set_clock(file, 0)
    return {"LD_PRELOAD": str(library), "VSQL_TEST_CLOCK": str(file)}


def of_clock(part: str, file: Path) -> list[Fault]:
    """Jumps both ways."""
    return [Clock("ahead", part, file, _JUMP_SECONDS), Clock("back", part, file, -_JUMP_SECONDS)]


def _set_clock(file: Path, seconds: int) -> None:
    """Change the file in place: processes have it mapped."""
    with file.open("r+b") as opened:
        opened.write(struct.pack("q", seconds))


def may_mount(folder: Path) -> bool:
    """Whether a tmpfs can be mounted here."""
    if os.geteuid() != 0:
        return False
    try:
        SmallDisk(folder / "try", 1).close()
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
