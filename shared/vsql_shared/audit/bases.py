"""Where this node's own chains begin in its database: at their first entry, or at a base.

Not here: what a base is (base.py). Rules:

* The first row decides: a chain whose rows begin behind a base was pruned there. Before the rows are gone,
  it begins where it did.
* What is read from the database is verified, checkpoint and signatures, before anything is built on it.
"""

from __future__ import annotations

from vsql_shared.audit.base import Base
from vsql_shared.audit.chain import EMPTY_HEAD, ChainHead
from vsql_shared.audit.checkpoint import Log
from vsql_shared.audit.links import Linked
from vsql_shared.errors import RefusedError
from vsql_shared.pg import signers
from vsql_shared.pg.connect import Connection, errors


def base_of(conn: Connection, log: Log) -> Base | None:
    """The base the rows of a chain begin behind; None where they begin with the first entry, or nowhere.

    Raises DecodeError, SignatureError or ChainError where it does not verify.
    """
    with errors("looking where a chain begins"):
        row = conn.execute(
            "SELECT b.base FROM vsql_sync.audit_bases b WHERE b.chain = %(chain)s AND b.size + 1 ="
            " (SELECT min(sequence) FROM vsql_sync.vsql_sync_audit WHERE chain = %(chain)s)",
            {"chain": log.chain},
        ).fetchone()
    return None if row is None else _verified(conn, log, str(row[0]))


def last_base(conn: Connection, log: Log) -> Base | None:
    """The last base the chain was pruned at, whether its rows are gone yet or not."""
    with errors("looking where a chain was pruned"):
        row = conn.execute(
            "SELECT base FROM vsql_sync.audit_bases WHERE chain = %s ORDER BY size DESC LIMIT 1", (log.chain,)
        ).fetchone()
    return None if row is None else _verified(conn, log, str(row[0]))


def _verified(conn: Connection, log: Log, text: str) -> Base:
    base = Base.decode(text)
    base.verify(log, pinned(conn))
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
