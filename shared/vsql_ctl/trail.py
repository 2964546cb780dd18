"""What the commands on the audit trail share: the database, the keys it trusts, times, files that are whole.

Not a command.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from vsql_shared.errors import UserError

if TYPE_CHECKING:
    from vsql_shared.config import Settings
    from vsql_shared.crypto.signing import TrustStore
    from vsql_shared.pg.connect import Connection


def moment(value: str) -> datetime:
    """A date or a time in ISO 8601; UTC when no zone is given."""
    try:
        parsed = datetime.fromisoformat(value)
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is no time; write 2026-02-01 or 2026-02-01T13:00:00+01:00"
        ) from None
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


@contextmanager
def node_database(settings: Settings) -> Iterator[Connection]:
    """Connect to this node's database; it must have this program's schema."""
    from vsql_shared.pg import migrate
    from vsql_shared.pg.connect import connect

    with connect(settings.connection.conninfo(), application_name="vsql_sync_ctl") as conn:
        migrate.require_current(conn)
        yield conn


def trusted_keys(conn: Connection, settings: Settings) -> TrustStore:
    """The keys operators pinned in this node's database."""
    from vsql_shared.crypto.signing import TrustStore
    from vsql_shared.pg import signers

    return TrustStore(signers.load(conn), allow_unsigned=settings.server.mode == "dev")


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


def read_text(path: Path, limit: int) -> str:
    """A text file of at most `limit` bytes. Raises UserError."""
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", hint="check the path") from error
    if len(raw) > limit:
        raise UserError(f"{path} is longer than {limit} bytes", hint="it is no checkpoint and no proof")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise UserError(f"{path} is no UTF-8 text", hint="it is no checkpoint and no proof") from None
