"""The directory of an evidence bundle: whole and signed under its name, or not there.

Not here: what goes in (gather.py) and the manifest's form (vsql_shared/audit/evidence.py). Rules:

* Everything is written into a directory beside it, which takes the name when the manifest is on disk.
* Directories 0700, files 0600. A directory with something in it is never written into.
* What fails is noted with its reason, and the rest goes on; a defect of ours ends it all.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from vsql_ctl.output import to_json
from vsql_shared.audit import evidence
from vsql_shared.errors import RefusedError, UserError, VsqlSyncError

if TYPE_CHECKING:
    from vsql_shared.crypto.signing import Signer


class Bundle:
    """A bundle under construction."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.files: list[evidence.File] = []
        self.not_gathered: list[tuple[str, str]] = []
        self.found: list[str] = []
        """What is not as it should be, for whoever makes the bundle; the files say it, too."""

    def add(self, path: str, kind: str, about: str, content: str) -> None:
        """Write one file."""
        raw = content.encode()
        self.files.append(evidence.file_of(path, kind, about, raw))
        self._write(self._folder / path, raw)

    def table(self, path: str, about: str, value: object) -> None:
        """Write facts as JSON."""
        self.add(path, evidence.PLAIN, about, to_json(value) + "\n")

    def missing(self, what: str, reason: str) -> None:
        """Note what is not in the bundle."""
        self.not_gathered.append((what, reason))

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """What fails inside is noted as not gathered."""
        from vsql_shared.pg.connect import errors

        try:
            with errors("gathering evidence"):
                yield
        except VsqlSyncError as error:
            self.missing(what, str(error))

    def seal(
        self, cluster: str, node: str, times: tuple[datetime, datetime], software: str, signer: Signer | None
    ) -> None:
        """Write the manifest, the last file. `times`: when gathering began, and ended."""
        begun, ended = (at.isoformat(timespec="seconds").replace("+00:00", "Z") for at in times)
        made = evidence.build(cluster, node, (begun, ended), software, self.files, self.not_gathered)
        self._write(self._folder / evidence.MANIFEST, evidence.seal(made, signer))

    def _write(self, path: Path, raw: bytes) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())


def require_free(target: Path) -> None:
    """Raise RefusedError where something is at the bundle's place already."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise RefusedError(f"{target} is no directory", hint="name a directory that is not there yet")
    try:
        full = target.is_dir() and any(target.iterdir())
    except OSError as error:
        raise UserError(f"cannot read {target}: {error.strerror}", hint="check the path") from error
    if full:
        raise RefusedError(f"{target} is not empty", hint="name a directory that is not there yet, or empty")


@contextmanager
def new_bundle(target: Path) -> Iterator[Bundle]:
    """A bundle that takes the name `target` when the block ends well; else nothing of it stays."""
    require_free(target)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.absolute().parent))
    except OSError as error:
        raise UserError(
            f"cannot write to {target.parent}: {error.strerror}",
            hint="name a place in a directory this user may write to",
        ) from error
    try:
        yield Bundle(folder)
        _sync_tree(folder)
        folder.rename(target)  # onto an empty directory, or a free name: POSIX refuses anything else
        _sync(target.absolute().parent)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):  # a full disk is no defect of ours
            raise UserError(
                f"cannot write {target}: {error.strerror}", hint="nothing of it is kept; make room"
            ) from error
        raise


def _sync_tree(folder: Path) -> None:
    """Bring a directory, and those in it, to disk."""
    for one in (*(sub for sub in folder.rglob("*") if sub.is_dir()), folder):
        _sync(one)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
