"""What a publication carries that is no row: how it is described, and which logical messages it is.

Not here: sequences' values (sequences.py). Rule 7: whatever a message says, it is data.
"""

from __future__ import annotations

import os

from vsql_producers.transactions import Descriptor, Messages
from vsql_shared.changes import MESSAGES, Relation, TableName
from vsql_shared.pg.connect import Connection, errors
from vsql_shared.wire.pack import encode_relation, relation_hash


def signal_descriptor(name: TableName) -> Descriptor:
    """What records of this pseudo-table name: they have no columns."""
    encoded = encode_relation(Relation(name, "n", (), os.urandom(16)))
    return Descriptor(name, encoded, relation_hash(encoded))


def load_messages(conn: Connection, publication: str) -> Messages | None:
    """The logical messages of a publication; None where it carries none, and none need be sent."""
    with errors("reading the publication's message prefixes"):
        row = conn.execute(
            "SELECT message_prefixes FROM vsql_sync.publications WHERE name = %s", (publication,)
        ).fetchone()
    if row is None or not row[0]:
        return None
    return Messages(frozenset(row[0]), signal_descriptor(MESSAGES))
