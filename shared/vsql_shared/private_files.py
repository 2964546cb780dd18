"""Files that hold a secret: who may use them, and reading one that was looked at, not its successor.

Not here: what the secrets are, and the look at all files before a start (config/files.py). Rules:

* Who may use a file is PostgreSQL's rule for its own key: nobody but its owner (0600), or its group too
  (0640) when root owns it and we are another user, as orchestrators mount secrets.
* The mode is that of the open file: a name may lead to another one a moment later.
* What is no regular file, or larger than a key can be, is refused before it is read.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from vsql_shared.errors import KeyUnavailableError

_MAX_FILE = 1 << 20


def open_to_others(found: os.stat_result) -> bool:
    """Whether somebody else than its owner can read or change the file."""
    if found.st_uid == 0 and os.geteuid() != 0:
        return bool(found.st_mode & (stat.S_IWGRP | stat.S_IXGRP | stat.S_IRWXO))
    return bool(found.st_mode & (stat.S_IRWXG | stat.S_IRWXO))


def read_private(path: Path, *, strict: bool, what: str = "key file", hint: str = "") -> bytes:
    """The file's content. Raises KeyUnavailableError: unreadable, no file, open to others (`strict`)."""
    try:
        # Without waiting: a pipe in the file's place would keep us for ever.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise KeyUnavailableError(f"{what} {path} is no file", hint=hint)
            if strict and open_to_others(found):
                mode = f"{stat.S_IMODE(found.st_mode):04o}"
                raise KeyUnavailableError(
                    f"{what} {path} has mode {mode}: others than its owner may use it",
                    hint=f"chmod 600 {path}",
                )
            content = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise KeyUnavailableError(f"cannot read {what} {path}: {error.strerror}", hint=hint) from error
    if len(content) > _MAX_FILE:
        raise KeyUnavailableError(f"{what} {path} is larger than {_MAX_FILE} bytes", hint=hint)
    return content
