"""Files that commands read for an operator, or write for somebody else: there when whole, or not at all."""

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
    """A text file that takes its name only when it is whole and on disk; readable by its owner only."""
    with _named_when_whole(target) as handle, os.fdopen(handle, "w", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_file(target: Path, content: bytes) -> None:
    """The same for bytes that are there already. Raises UserError."""
    with _named_when_whole(target) as handle, os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _named_when_whole(target: Path) -> Iterator[int]:
    """A file beside the target, to be written and closed; then it is the target."""
    if target.exists() and not target.is_file():  # a device would be replaced by our file
        raise UserError(f"{target} is no regular file", hint="name a file, or one that is not there")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise UserError(
            f"cannot write to {target.parent}: {error.strerror}",
            hint="name a directory this user may write to",
        ) from error
    try:
        yield handle
        Path(name).replace(target)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk is no defect of ours
            raise UserError(
                f"cannot write {target}: {error.strerror}", hint="nothing of it is kept; make room"
            ) from error
        raise


def read_file(path: Path, limit: int) -> bytes:
    """A file of at most `limit` bytes. Raises UserError."""
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", hint="check the path") from error
    if len(content) > limit:
        raise UserError(f"{path} is longer than {limit} bytes", hint="it is another file than was asked for")
    return content
