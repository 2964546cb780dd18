"""Metrics of several processes shown by one: a service's supervisor serves those of its workers.

prometheus_client keeps each process's values in files of one directory; here is which directory, and
under which name a process writes. Rules:

* The directory is private (mode 0700), made by the supervisor before `metrics` is imported, and removed
  when it ends. A process that was forked may have it imported, if for another directory: a new slot opens
  new files, in the directory of then.
* A worker writes under a slot, its stream's name, not under its process id: a restarted worker goes on
  with the same counters, and restarts do not pile up files.
* Two processes never share a slot at a time; the supervisor sees to it.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

# prometheus_client's own name for it.
DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
SLOT_VARIABLE = "VSQL_SYNC_METRICS_SLOT"
SUPERVISOR_SLOT = "supervisor"
_METRICS_MODULE = "vsql_shared.observe.metrics"


def begin() -> Path:
    """Make the directory and announce it to this process and its children; the supervisor's first act."""
    if _METRICS_MODULE in sys.modules and not is_shared():
        raise RuntimeError(f"{_METRICS_MODULE} was imported before the metrics directory was made")
    directory = Path(tempfile.mkdtemp(prefix="vsql-sync-metrics-"))
    os.environ[DIRECTORY_VARIABLE] = str(directory)
    os.environ[SLOT_VARIABLE] = SUPERVISOR_SLOT
    owner = os.getpid()
    atexit.register(_remove, directory, owner)
    return directory


def _remove(directory: Path, owner: int) -> None:
    """Remove the directory when its maker ends; a forked child that runs exit handlers leaves it."""
    if os.getpid() == owner:
        shutil.rmtree(directory, ignore_errors=True)


def is_shared() -> bool:
    """Whether this process is one of several whose metrics are shown together."""
    return DIRECTORY_VARIABLE in os.environ


def worker_environment(slot: str) -> dict[str, str]:
    """The variables a worker process needs, on top of its supervisor's environment."""
    directory = os.environ.get(DIRECTORY_VARIABLE)
    return {DIRECTORY_VARIABLE: directory, SLOT_VARIABLE: slot} if directory else {}


def join(slot: str) -> None:
    """Write under this slot from now on: for workers that share their supervisor's environment."""
    os.environ[SLOT_VARIABLE] = slot


def current_slot() -> str:
    """The name of this process's files: prometheus_client splits theirs at underscores, so hashed."""
    return file_name_of(os.environ.get(SLOT_VARIABLE) or f"pid-{os.getpid()}")


def file_name_of(slot: str) -> str:
    """A slot's name as it stands in file names."""
    return hashlib.sha256(slot.encode("utf-8", "replace")).hexdigest()[:16]


def worker_ended(slot: str) -> None:
    """Drop the present values (lag, memory) of a worker that is gone; its counters stay."""
    directory = os.environ.get(DIRECTORY_VARIABLE)
    if directory:
        for path in Path(directory).glob(f"gauge_live*_{file_name_of(slot)}.db"):
            path.unlink(missing_ok=True)
