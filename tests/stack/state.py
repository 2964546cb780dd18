"""The note a running stack leaves, so that tests and `down` find it.

One file per checkout, below the cache folder: who runs where. Not a lock: two `up` of one checkout find the
first one's servers and use them.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from tests.stack.fetch import cache_root

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class ServerNote:
    """One running server: what it is, where it answers, which process it is."""

    name: str
    """`kafka` or `postgres-<version>`."""
    address: str
    """Bootstrap servers, or the superuser's connection string."""
    pid: int
    started: float
    data_dir: str

    def runs(self) -> bool:
        """Say whether exactly this process is still there."""
        try:
            return psutil.Process(self.pid).create_time() == self.started
        except psutil.NoSuchProcess:
            return False


def run_dir() -> Path:
    """Return the folder with the running stack's data and note."""
    checkout = hashlib.sha256(str(REPOSITORY).encode()).hexdigest()[:12]
    folder = cache_root() / "run" / checkout
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_notes() -> dict[str, ServerNote]:
    """Return the servers of this checkout's stack that are running."""
    try:
        entries = json.loads((run_dir() / "state.json").read_text())
    except FileNotFoundError:
        return {}
    notes = [ServerNote(**entry) for entry in entries]
    return {note.name: note for note in notes if note.runs()}


def write_notes(notes: dict[str, ServerNote]) -> None:
    """Replace the note."""
    path = run_dir() / "state.json"
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps([asdict(note) for note in notes.values()], indent=2) + "\n")
    scratch.rename(path)


def note(name: str, address: str, pid: int, data_dir: Path) -> ServerNote:
    """Return the note of a server that just started."""
    return ServerNote(name, address, pid, psutil.Process(pid).create_time(), str(data_dir))
