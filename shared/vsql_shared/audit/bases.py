"""Where this node's own chains begin in its database: at their first entry, or at a base.

Not here: what a base is (base.py). Rules:

* The first row decides: a chain whose rows begin behind a base was pruned there. Before the rows are gone,
  it begins where it did.
* What is read from the database is verified, checkpoint and signatures, before anything is built on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vsql_shared.audit.base import Base, base_in
from vsql_shared.audit.chain import EMPTY_HEAD, ChainHead, writer_of
from vsql_shared.audit.checkpoint import Log
from vsql_shared.audit.dsse import AUDIT_ENTRY, open_document
from vsql_shared.audit.entries import TRAIL_PRUNED, AuditEntry, signed_place
from vsql_shared.audit.links import Linked
from vsql_shared.errors import ChainError, DecodeError, RefusedError, SignatureError
from vsql_shared.pg import signers
from vsql_shared.pg.connect import Connection, errors

if TYPE_CHECKING:
    from vsql_shared.crypto.signing import TrustStore


def base_of(conn: Connection, log: Log) -> Base | None:
    """The base the rows of a chain begin behind; None where they begin with the first entry, or nowhere.

    Raises DecodeError, SignatureError or ChainError where it does not verify.
    """
    with errors("looking where a chain begins"):
        row = conn.execute(
            "SELECT b.size, b.base FROM vsql_sync.audit_bases b WHERE b.chain = %(chain)s AND b.size + 1 ="
            " (SELECT min(sequence) FROM vsql_sync.vsql_sync_audit WHERE chain = %(chain)s)",
            {"chain": log.chain},
        ).fetchone()
    return None if row is None else _verified(conn, log, int(row[0]), str(row[1]))


def noted_begins(conn: Connection) -> dict[str, int]:
    """The first entry that is here of each chain that was pruned, as noted: for showing it, nothing more."""
    with errors("looking where chains begin"):
        rows = conn.execute(
            "SELECT b.chain, b.size + 1 FROM vsql_sync.audit_bases b WHERE b.size + 1 ="
            " (SELECT min(a.sequence) FROM vsql_sync.vsql_sync_audit a WHERE a.chain = b.chain)"
        ).fetchall()
    return {chain: int(first) for chain, first in rows}


def said_base(conn: Connection, trust: TrustStore, log: Log) -> Base | None:
    """The last base that stands in the chain itself, signed, and is noted; None where it was never pruned."""
    for base in _said(conn, trust, log):
        if base_at(conn, log, base.head.sequence) == base:
            return base
    return None


def signed_base(conn: Connection, trust: TrustStore, log: Log) -> Base | None:
    """The last base that a signed entry says and that verifies, whatever is noted beside it."""
    keys = pinned(conn)
    for base in _said(conn, trust, log):
        try:
            base.verify(log, keys)
        except (DecodeError, SignatureError, ChainError):
            continue
        return base
    return None


def _said(conn: Connection, trust: TrustStore, log: Log) -> Iterator[Base]:
    """The bases that entries by the chain's writer say, the last one first; others count for nothing."""
    with errors("looking where a chain says it was pruned"):
        rows = conn.execute(
            "SELECT sequence, document FROM vsql_sync.audit_documents WHERE chain = %s AND event_type = %s"
            " ORDER BY sequence DESC",
            (log.chain, TRAIL_PRUNED),
        ).fetchall()
    for sequence, document in rows:
        try:
            encoded = bytes(document or b"")
            payload = open_document(trust, writer_of(log.chain), encoded, AUDIT_ENTRY, signed_place)
            entry = AuditEntry.decode(payload)
            # A copy of an older one, put behind the last, is not the last.
            base = (
                base_in(entry) if (entry.cluster, entry.chain, entry.sequence) == (*log, sequence) else None
            )
        except (DecodeError, SignatureError):
            continue
        if base is not None:
            yield base


def base_at(conn: Connection, log: Log, size: int) -> Base | None:
    """The base of this size; its row stands there since the entry that says it."""
    with errors("looking where a chain was pruned"):
        row = conn.execute(
            "SELECT base FROM vsql_sync.audit_bases WHERE (chain, size) = (%s, %s)", (log.chain, size)
        ).fetchone()
    return None if row is None else _verified(conn, log, size, str(row[0]))


def _verified(conn: Connection, log: Log, size: int, text: str) -> Base:
    base = Base.decode(text)
    base.verify(log, pinned(conn))
    if base.head.sequence != size:
        # Else rows between the two would be read by nobody.
        raise ChainError(f"the base of {log.chain} noted for {size} entries is of {base.head.sequence}")
    return base


def pinned(conn: Connection) -> list[tuple[str, bytes]]:
    """(node, key) of all nodes, ended ones too: what they signed is held against signed entries."""
    return [(one.node, one.public_key) for one in signers.load(conn)]


def start_of(conn: Connection, log: Log) -> ChainHead:
    """The head before the first row of a chain."""
    base = base_of(conn, log)
    return EMPTY_HEAD if base is None else base.head


def linked_start(conn: Connection, log: Log) -> Linked:
    """The same, as links.py takes it."""
    head = start_of(conn, log)
    return Linked(head.tree, head.sequence, b"", head.entry_hash)


def require_online(start: int, size: int, chain: str) -> None:
    """Raise RefusedError where a question is about entries that were pruned."""
    if size < start:
        raise RefusedError(
            f"chain {chain} is pruned: entry {size} is in the archive only",
            hint="its segment proves it: `syncctl audit archive --verify`, docs/operations/audit.md",
        )
