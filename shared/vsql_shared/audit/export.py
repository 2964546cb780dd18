"""Export of the audit trail: everything somebody else needs to verify it without a database of ours.

The format is documented, with a program that verifies it, in docs/operations/audit.md. Not here: files
(the caller writes the lines). Rules:

* The signed documents go out byte by byte; `entry` beside each is for reading only.
* Public keys and the Avro schemas are part of it; whom to trust is not: a verifier compares fingerprints
  with what he was told on another way.
* A document that cannot be parsed is exported too, with the reason: an export hides nothing.
* From a time on: from the first entry of that time on in each chain, so that no chain has a hole.
* With a signature: each chain's end has the tree of the entries before the first one, and the checkpoint in
  which that tree and the exported entries end. So one signature proves all of them, cut ends included. They
  are held by their links as they are read (links.py): what was verified before may have changed since.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime
from importlib import resources
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from vsql_shared.audit.bases import linked_start
from vsql_shared.audit.checkpoint import Log
from vsql_shared.audit.dsse import document_hash
from vsql_shared.audit.export_format import FORMAT, VERSION, readable
from vsql_shared.audit.heads import read_documents
from vsql_shared.audit.links import Linked, broken, follow, link
from vsql_shared.audit.rows import parse
from vsql_shared.errors import DecodeError
from vsql_shared.pg.connect import Connection, errors

if TYPE_CHECKING:
    from vsql_shared.audit.chain import ChainHead

PAGE = 1000
"""Rows fetched at a time."""


class Part(NamedTuple):
    """Entries of one chain only: behind `start`, up to a sequence."""

    chain: str
    start: ChainHead
    last: int


def export(
    conn: Connection,
    cluster: str,
    node: str,
    now: datetime,
    since: datetime | None = None,
    sign: Callable[[Log, Linked], str] | None = None,
    part: Part | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ('header', …), then ('entry', …) by chain and sequence, then ('end', …), from one snapshot.

    `part`: only these entries; what lies before them is believed, because the caller verified it.
    `sign` holds a chain's last signature and makes its checkpoint; with it, raises ChainError where an entry
    does not follow the one before. `conn` must be in autocommit mode and outside of a transaction.
    """
    with errors("reading the audit trail"), conn.transaction():
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        yield (
            "header",
            {
                "format": FORMAT,
                "version": VERSION,
                "cluster": cluster,
                "node": node,
                "exported_at": now.isoformat(),
                "since": since.isoformat() if since else None,
                "keys": _keys(conn),
                "schemas": {name: _schema(name) for name in ("signed_document", "audit_entry")},
            },
        )
        chains: dict[str, dict[str, Any]] = {}
        linked: dict[str, Linked] = {}
        if part is not None:
            start = part.start
            linked[part.chain] = Linked(start.tree, start.sequence, b"", start.entry_hash)
        count = 0
        for item, document in _entries(conn, since, part):
            count += 1
            end = chains.setdefault(item["chain"], {"entries": 0, "first_sequence": item["sequence"]})
            if part is not None:
                end.setdefault("before", [one.hex() for one in part.start.tree])
            end["entries"] += 1
            end |= {"last_sequence": item["sequence"], "last_hash": item["hash"]}
            if sign is not None:
                _link(conn, Log(cluster, item["chain"]), linked, end, item["sequence"], document)
            yield "entry", item
        if sign is not None:
            for chain, end in chains.items():
                end["checkpoint"] = sign(Log(cluster, chain), linked[chain])
        yield "end", {"entries": count, "chains": chains}


def _link(
    conn: Connection,
    log: Log,
    linked: dict[str, Linked],
    end: dict[str, Any],
    sequence: int,
    document: bytes,
) -> None:
    """Take a chain's next document; before the first one, those that are not exported."""
    if log.chain not in linked:
        start = linked_start(conn, log)
        with closing(read_documents(conn, log.chain)) as documents:
            before = islice(documents, max(0, end["first_sequence"] - 1 - start.size))
            linked[log.chain] = follow(before, log, start)
        end["before"] = [one.hex() for one in linked[log.chain].tree]
    linked[log.chain] = link(linked[log.chain], document, log)
    if sequence != linked[log.chain].size:  # two rows of one place, in the order of their entries
        raise broken(log.chain, linked[log.chain].size, f"the table has it as entry {sequence}")


def _keys(conn: Connection) -> list[dict[str, Any]]:
    rows = conn.execute(
        "SELECT node_name, fingerprint, public_key, revoked_at FROM vsql_sync.signers ORDER BY 1, 2"
    ).fetchall()
    return [
        {
            "node": node,
            "fingerprint": fingerprint,
            "public_key": base64.b64encode(bytes(key)).decode(),
            "revoked_at": revoked.isoformat() if revoked else None,
        }
        for node, fingerprint, key, revoked in rows
    ]


def _schema(name: str) -> Any:
    return json.loads(resources.files("vsql_schemas").joinpath(f"avro/{name}.avsc").read_text("utf-8"))


def _entries(
    conn: Connection, since: datetime | None, part: Part | None
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Each entry for the file, and its signed document."""
    with conn.cursor(name="vsql_sync_export") as cursor:
        cursor.itersize = PAGE
        cursor.execute(
            "SELECT chain, sequence, kafka_offset, document FROM vsql_sync.vsql_sync_audit"
            " LEFT JOIN (SELECT chain, min(sequence) AS first FROM vsql_sync.vsql_sync_audit"
            "   WHERE event_timestamp >= %(since)s GROUP BY chain) f USING (chain)"
            " WHERE (%(since)s::timestamptz IS NULL OR sequence >= first) AND (%(chain)s::text IS NULL"
            "   OR chain = %(chain)s AND sequence > %(after)s AND sequence <= %(last)s)"
            " ORDER BY chain, sequence, event_id",
            {
                "since": since,
                "chain": part.chain if part else None,
                "after": part.start.sequence if part else 0,
                "last": part.last if part else 0,
            },
        )
        for chain, sequence, offset, document in cursor:
            encoded = bytes(document)
            item = {
                "chain": chain,
                "sequence": sequence,
                "hash": document_hash(encoded).hex(),
                "kafka_offset": offset,
                "document": base64.b64encode(encoded).decode(),
            }
            try:
                item["entry"] = readable(parse(encoded).entry)
            except DecodeError as error:
                item |= {"entry": None, "error": error.message}
            yield item, encoded
