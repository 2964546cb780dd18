"""Files that commands write for somebody else: there when they are whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from vsql_shared.errors import UserError


@contextmanager
def complete_file(target: Path) -> Iterator[TextIO]:
    """A file that takes its name only when it is whole and on disk; readable by its owner only."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise UserError(
            f"cannot write to {target.parent}: {error.strerror}",
            hint="name a directory this user may write to",
        ) from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(target)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk is no defect of ours
            raise UserError(
                f"cannot write {target}: {error.strerror}", hint="nothing of it is kept; make room"
            ) from error
        raise
