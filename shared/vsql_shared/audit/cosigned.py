"""Checkpoints of this node's chains that other nodes have cosigned: vsql_sync.audit_cosigned.

A segment of the archive ends at one. Rules: a note is remembered once its signatures verify by pinned keys;
what it says is held against this node's own entries when it is used.
"""

from __future__ import annotations

from vsql_shared.audit.bases import pinned
from vsql_shared.audit.checkpoint import Checkpoint, Log, Opened, open_checkpoint, split_view
from vsql_shared.audit.notes import COSIGNATURE
from vsql_shared.errors import RefusedError
from vsql_shared.pg.connect import Connection, errors


def cosigners(opened: Opened) -> set[str]:
    """The nodes that cosigned a checkpoint."""
    return {one.key.name.rpartition("/")[2] for one in opened.signatures if one.key.kind == COSIGNATURE}


def remember(conn: Connection, log: Log, encoded: str) -> Checkpoint:
    """Remember a checkpoint of an own chain that another node has cosigned.

    Raises DecodeError, SignatureError; RefusedError where it is of another chain or cosigned by nobody.
    """
    opened = open_checkpoint(encoded, pinned(conn))
    head, nodes = opened.checkpoint, cosigners(opened)
    if head.log != log or not nodes or not head.size:
        raise RefusedError(
            f"no cosigned checkpoint of {log.origin}: it is of {head.log.origin}, cosigned by {len(nodes)}"
        )
    with errors("remembering a cosigned checkpoint"):
        for name in sorted(nodes):
            conn.execute(
                "INSERT INTO vsql_sync.audit_cosigned (chain, size, node, note) VALUES (%s, %s, %s, %s)"
                " ON CONFLICT DO NOTHING",
                (log.chain, head.size, name, encoded),
            )
    return head


def sizes(conn: Connection, chain: str, above: int, upto: int) -> list[int]:
    """Sizes that were cosigned, in order."""
    with errors("looking for cosigned checkpoints"):
        rows = conn.execute(
            "SELECT DISTINCT size FROM vsql_sync.audit_cosigned WHERE chain = %s AND size > %s AND size <= %s"
            " ORDER BY size",
            (chain, above, upto),
        ).fetchall()
    return [size for (size,) in rows]


def note_of(conn: Connection, log: Log, size: int) -> str:
    """A checkpoint of this size with every cosignature there is. Raises SignatureError, ChainError."""
    with errors("reading a cosigned checkpoint"):
        rows = conn.execute(
            "SELECT note FROM vsql_sync.audit_cosigned WHERE chain = %s AND size = %s ORDER BY node",
            (log.chain, size),
        ).fetchall()
    notes = [open_checkpoint(text, pinned(conn)) for (text,) in rows]
    if not notes:
        raise RefusedError(f"no checkpoint of {size} entries of chain {log.chain} is cosigned")
    merged = notes[0].note
    for other in notes[1:]:
        if other.checkpoint != notes[0].checkpoint:
            raise split_view(other.checkpoint, f"another node cosigned root {notes[0].checkpoint.root.hex()}")
        for one in other.note.signatures:
            merged = merged.add(one)
    return merged.encode()
