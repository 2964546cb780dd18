"""What the daemon leaves in its state folder, and how others read it.

    daemon.lock    held while a daemon runs (flock): the one fence against a second
    daemon.json    the daemon's own process, and what each service is doing
    *.log          what the daemon and the services wrote

Rules: the folder is private; the JSON file is replaced as a whole, never written in place; what is read
back is checked, because an operator may have edited it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from vsql_ctl.daemon.identity import ProcessId
from vsql_shared.errors import EnvironmentFault, RefusedError

LOCK_NAME = "daemon.lock"
STATE_NAME = "daemon.json"
_LOCK_TRIES = 10
_LOCK_PAUSE_SECONDS = 0.05


@dataclass
class ServiceState:
    """One service under the daemon."""

    state: str = "starting"
    """starting, running, waiting (for its next start), failed (not started again), stopped."""
    pid: int | None = None
    process_started: str = ""
    since: float = 0.0
    restarts: int = 0
    last_exit: int | None = None

    def process(self) -> ProcessId | None:
        """The service's process, if one is recorded."""
        return ProcessId(self.pid, self.process_started) if self.pid else None


@dataclass
class DaemonState:
    """The daemon and its services."""

    pid: int
    process_started: str
    since: float
    source: str
    services: dict[str, ServiceState] = field(default_factory=dict)
    killed: list[str] = field(default_factory=list)
    """Services that did not stop in time, at the last stop."""

    @property
    def process(self) -> ProcessId:
        """The daemon's own process."""
        return ProcessId(self.pid, self.process_started)


def prepare(folder: Path) -> None:
    """Make the state folder, private to this user."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(
            f"the state folder {folder} cannot be made: {error.strerror}",
            hint="set server.state_dir to a folder this user may write",
        ) from None


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Be the one daemon of this folder, for as long as the process lives; refused when there is one."""
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise EnvironmentFault(
            f"{folder / LOCK_NAME} cannot be opened: {error.strerror}",
            hint="the daemon runs as the user who owns the folder; see server.state_dir",
        ) from None
    if not _locked(descriptor):
        os.close(descriptor)
        raise already_running(folder)
    try:
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Take the lock. Who only looks whether it is held has it for an instant, so try for a moment."""
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(_LOCK_PAUSE_SECONDS)
        else:
            return True
    return False


def already_running(folder: Path) -> RefusedError:
    """The refusal of a second daemon for one node."""
    found = read(folder)
    who = f" (process {found.pid})" if found else ""
    return RefusedError(
        f"a daemon of this node runs already{who}; state folder {folder}",
        hint="see `syncctl daemon status`; stop it with `syncctl daemon stop`",
    )


def is_held(folder: Path) -> bool:
    """Whether a daemon holds the folder."""
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise EnvironmentFault(
            f"{folder / LOCK_NAME} cannot be opened: {error.strerror}",
            hint="run this as the user who started the daemon",
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def write(folder: Path, state: DaemonState) -> None:
    """Replace the state file."""
    fresh = folder / f".{STATE_NAME}.new"
    fresh.write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
    fresh.chmod(0o600)
    fresh.replace(folder / STATE_NAME)


def read(folder: Path) -> DaemonState | None:
    """What the last daemon wrote; None when there is nothing that can be understood."""
    try:
        return TypeAdapter(DaemonState).validate_json((folder / STATE_NAME).read_bytes())
    except (OSError, ValueError):
        return None
