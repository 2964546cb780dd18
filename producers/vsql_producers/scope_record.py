"""Writes down what a stream may carry and what it carried: texts whose SHA-256 the chain signs.

Not here: the scope itself (scope.py), entries of the chain (outlet.py, epoch.py), and reports about both
(vsql_shared/pg/scope_report.py). Rules:

* A text is in the table before the entry with its hash, and before the records it is about, leave. One that
  no entry follows says more than was sent, never less.
* What is seen is read from the descriptor's own bytes, which are sealed and sent: not from the catalog, nor
  from the publication.
* Each text has a random salt: the chain is read by whoever reads the topic, and a bare hash of column names
  could be guessed.
* Both tables are append-only; a scope an older epoch had is not written again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

from vsql_producers.scope import Scope, document
from vsql_producers.transactions import Descriptor
from vsql_shared.audit.entries import canonical_json
from vsql_shared.audit.scope_history import sha256_hex
from vsql_shared.changes import SIGNALS
from vsql_shared.pg.connect import Connection, errors
from vsql_shared.wire.pack import decode_relation

_NO_TABLES = frozenset(SIGNALS.values())


def write_scope(conn: Connection, chain: str, publication: str, scope: Scope) -> str:
    """Write the scope down; its SHA-256 in hex."""
    wanted = document(publication, scope)
    with errors("writing the scope down"):
        rows = conn.execute(
            "SELECT sha256, scope FROM vsql_sync.scopes WHERE chain = %s", (chain,)
        ).fetchall()
        for digest, text in rows:
            if sha256_hex(text) == digest and _without_salt(text) == wanted:
                return str(digest)
        text = canonical_json({**wanted, "salt": _salt()})
        conn.execute(
            "INSERT INTO vsql_sync.scopes (chain, sha256, scope) VALUES (%s, %s, %s)",
            (chain, sha256_hex(text), text),
        )
    return sha256_hex(text)


def _without_salt(text: str) -> dict[str, Any]:
    """A scope as it was made; one that somebody put there in another form is none of ours."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return {name: one for name, one in found.items() if name != "salt"} if isinstance(found, dict) else {}


def _salt() -> str:
    return os.urandom(16).hex()


def seen(descriptors: Iterable[Descriptor]) -> str:
    """Canonical JSON of the tables that are described; '' when there is none."""
    found = []
    for descriptor in descriptors:
        if descriptor.name in _NO_TABLES:
            continue
        relation = decode_relation(descriptor.encoded)
        found.append(
            {
                "table": str(relation.name),
                "columns": [column.name for column in relation.columns],
                "identity": relation.replica_identity,
            }
        )
    return canonical_json({"tables": found, "salt": _salt()}) if found else ""


def write_seen(conn: Connection, chain: str, epoch: int, batch: int, text: str) -> str:
    """Write down what a batch describes; its SHA-256 in hex."""
    digest = sha256_hex(text)
    with errors("writing down what is sent"):
        conn.execute(
            "INSERT INTO vsql_sync.scope_seen (chain, epoch, batch, sha256, seen)"
            " VALUES (%s, %s, %s, %s, %s)",
            (chain, epoch, batch, digest, text),
        )
    return digest
