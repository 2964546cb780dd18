"""What a publication carries beside rows, as the operator asked for it: message prefixes and sequences.

Not here: which sequences that means at a moment (sequences.py). Inside the caller's transaction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from vsql_shared.changes import TableName
from vsql_shared.errors import RefusedError, UserError
from vsql_shared.pg import sequences
from vsql_shared.pg.connect import Connection

if TYPE_CHECKING:
    from vsql_shared.pg.publications import PublicationInfo, PublicationRequest

MAX_PREFIX_BYTES = 255
"""A prefix is a name; PostgreSQL itself has no bound."""


class Asked(TypedDict):
    """As the fields of a publication are called."""

    message_prefixes: tuple[str, ...]
    sequences: bool
    more_sequences: tuple[TableName, ...]


def asked(conn: Connection, request: PublicationRequest) -> Asked:
    """What a request means, in order and without repetition. Raises UserError and RefusedError."""
    for prefix in request.message_prefixes:
        if not prefix or len(prefix.encode()) > MAX_PREFIX_BYTES or "\0" in prefix:
            raise UserError(
                f"a message prefix has 1 to {MAX_PREFIX_BYTES} bytes, not {len(prefix.encode())}",
                hint="give the prefix exactly as it is given to pg_logical_emit_message",
            )
    for name in request.more_sequences:
        if name.schema == "vsql_sync" or not sequences.exists(conn, name):
            raise RefusedError(
                f"there is no sequence {name} to publish",
                hint="check the spelling; the default schema is public",
            )
    return {
        "message_prefixes": tuple(sorted(set(request.message_prefixes))),
        "sequences": request.sequences,
        "more_sequences": tuple(sorted(set(request.more_sequences))),
    }


def read(conn: Connection, publication: str) -> Asked:
    """What a publication carries."""
    row = conn.execute(
        "SELECT message_prefixes, sequences FROM vsql_sync.publications WHERE name = %s", (publication,)
    ).fetchone()
    named = conn.execute(
        "SELECT sequence_schema, sequence_name FROM vsql_sync.publication_sequences"
        " WHERE publication = %s ORDER BY 1, 2",
        (publication,),
    )
    return {
        "message_prefixes": tuple(row[0]) if row else (),
        "sequences": bool(row and row[1]),
        "more_sequences": tuple(TableName(*name) for name in named),
    }


def write(conn: Connection, publication: PublicationInfo) -> None:
    """Write it beside the publication's row."""
    conn.execute(
        "UPDATE vsql_sync.publications SET message_prefixes = %s, sequences = %s WHERE name = %s",
        (list(publication.message_prefixes), publication.sequences, publication.name),
    )
    conn.execute("DELETE FROM vsql_sync.publication_sequences WHERE publication = %s", (publication.name,))
    for name in publication.more_sequences:
        conn.execute(
            "INSERT INTO vsql_sync.publication_sequences VALUES (%s, %s, %s)", (publication.name, *name)
        )


def as_json(publication: PublicationInfo) -> dict[str, object]:
    """For the operators' log and for --output json."""
    return {
        "message_prefixes": list(publication.message_prefixes),
        "sequences": publication.sequences,
        "more_sequences": [str(name) for name in publication.more_sequences],
    }
