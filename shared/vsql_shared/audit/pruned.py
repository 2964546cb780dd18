"""What is left of a chain below its base: entries that are kept, and the rows of archived segments.

Not here: the base itself (base.py, bases.py), the rows behind it (verify.py, watch.py). Rules:

* An entry that is kept is signed by the chain's writer, and of below the base.
* None is missing, none is added: the base, which the chain has signed, counts and hashes them.
* Rows go only below what archived segments cover (docs/design/0020). The rows of segments are not signed:
  they show what was cut off without the archive; `audit archive --verify` holds the archive itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vsql_shared.audit.base import NOTHING_KEPT, Base, Kept
from vsql_shared.audit.dsse import AUDIT_ENTRY, document_hash, open_document
from vsql_shared.audit.entries import AuditEntry, signed_place
from vsql_shared.errors import DecodeError, SignatureError
from vsql_shared.pg.connect import Connection, errors

if TYPE_CHECKING:
    from vsql_shared.audit.checkpoint import Log
    from vsql_shared.crypto.signing import TrustStore


class Wrong(NamedTuple):
    """What is not as it must be, and with which entry."""

    sequence: int
    what: str


class KeptSoFar(NamedTuple):
    """How far what is kept of a pruned chain was verified."""

    next: int = -(1 << 63)
    """Whatever is put there is read: no entry has this place."""
    kept: Kept = NOTHING_KEPT
    ended: bool = False


def kept_from(
    conn: Connection, trust: TrustStore, log: Log, base: Base | None, before: KeptSoFar, limit: int
) -> KeptSoFar | Wrong:
    """Verify the next entries kept from below the base; whoever calls it holds the snapshot.

    Their links are in the archive. That none of them is missing, the base says, which the chain has signed.
    """
    with errors("reading what is kept beside the trail"):
        rows = conn.execute(
            "SELECT sequence, event_type, source_node_id, document FROM vsql_sync.audit_kept"
            " WHERE chain = %s AND sequence >= %s ORDER BY sequence LIMIT %s",
            (log.chain, before.next, limit),
        ).fetchall()
    pruned = 0 if base is None else base.head.sequence
    kept, following = before.kept, before.next
    for sequence, event_type, source, document in rows:
        encoded = bytes(document or b"")
        try:
            payload = open_document(trust, log.writer, encoded, AUDIT_ENTRY, signed_place)
            entry = AuditEntry.decode(payload)
        except (DecodeError, SignatureError) as error:
            return Wrong(sequence, f"kept beside the trail: {error.message}")
        found = (entry.cluster, entry.chain, entry.sequence, entry.event_type, entry.source_node_id)
        if found != (*log, sequence, event_type, source) or sequence > pruned:
            return Wrong(sequence, "kept beside the trail: it is not what its row says")
        kept, following = kept.take(document_hash(encoded)), sequence + 1
    if len(rows) == limit:
        return KeptSoFar(following, kept)
    if base is not None and kept != base.kept:
        what = f"{kept.count} entries are kept beside the trail, not the {base.kept.count} the chain says"
        return Wrong(pruned, what)
    return KeptSoFar(following, kept, ended=True)


def unsaid(size: int) -> str:
    """Of a chain that begins behind an entry, and does not say itself that it was pruned there."""
    return f"cut at its beginning: no entry of it says that it was pruned up to {size}"


def unarchived(conn: Connection, chain: str, size: int) -> Wrong | None:
    """Entries of a pruned chain that lie in no segment this node has noted: they were not to go."""
    with errors("looking what is archived"):
        row = conn.execute("SELECT coalesce(vsql_sync.archived_entries(%s, %s), 0)", (chain, size)).fetchone()
    covered = 0 if row is None else int(row[0])
    if covered == size:
        return None
    what = (
        f"it begins behind entry {size}, and the archived segments that are noted cover {covered}: rows were"
        " cut off, or rows of vsql_sync.audit_segments (`syncctl audit archive --verify` says more)"
    )
    return Wrong(size, what)
