"""Whether streams use a publication: their targets were checked against what it has."""

from __future__ import annotations

from vsql_shared.errors import RefusedError
from vsql_shared.pg.connect import Connection


def stream_of(conn: Connection, name: str) -> str | None:
    """A stream that uses the publication."""
    row = conn.execute(
        "SELECT chain FROM vsql_sync.streams WHERE publication = %s LIMIT 1", (name,)
    ).fetchone()
    return None if row is None else str(row[0])


def refuse(conn: Connection, name: str, what: str) -> None:
    """Raise RefusedError where a stream uses the publication."""
    chain = stream_of(conn, name)
    if chain is not None:
        raise RefusedError(
            f"publication {name} has stream {chain} and cannot be {what}",
            hint="make another publication for other tables; streams cannot be removed in this version",
        )
