"""What the commands on the audit trail share: the database, the keys it trusts, names, times, files.

Not a command.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vsql_shared.errors import ChainError, DecodeError, UserError, VerificationError

if TYPE_CHECKING:
    from vsql_shared.audit.checkpoint import Log
    from vsql_shared.config import Settings
    from vsql_shared.crypto.signing import TrustStore
    from vsql_shared.pg.connect import Connection

_MAX_NUMBER = (1 << 63) - 1


def moment(value: str) -> datetime:
    """A date or a time in ISO 8601; UTC when no zone is given."""
    try:
        parsed = datetime.fromisoformat(value)
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is no time; write 2026-02-01 or 2026-02-01T13:00:00+01:00"
        ) from None
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


def number_range(value: str, one: str, many: str) -> tuple[int, int]:
    """`17` or `17..40`, first and last; `one` and `many` say what is counted."""
    found = re.fullmatch(r"([0-9]{1,19})(?:\.\.([0-9]{1,19}))?", value)
    if found is None:
        raise click.BadParameter(f"{value!r} is no {one}; write its number, 17, or a range, 17..40")
    first, last = int(found[1]), int(found[2] or found[1])
    if not 1 <= first <= last <= _MAX_NUMBER:
        raise click.BadParameter(f"{value!r}: {many} begin with 1, and a range with its first one")
    return first, last


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


def log_named(cluster: str, chain: str) -> Log:
    """The chain an operator names. Raises UserError where it cannot be one."""
    from vsql_shared.audit.checkpoint import Log

    log = Log(cluster, chain)
    try:
        log.writer  # noqa: B018  # raises for what is no chain
    except ChainError as error:
        raise UserError(
            error.message,
            hint="write PUBLICATION.NODE…, for example payments.node-a or payments.node-a.ack.node-b",
        ) from error
    return log


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Name the file in what is wrong with it."""
    try:
        yield
    except (DecodeError, VerificationError) as error:
        error.message = f"{path}: {error.message}"
        if isinstance(error, DecodeError):
            error.hint = error.hint or (
                "it is damaged, or no file that `syncctl audit checkpoint`, `prove` or `prove-prefix` wrote"
            )
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
