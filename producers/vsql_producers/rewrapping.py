"""Which data keys of a stream some target may still need: those a new KEK version has to wrap, too.

Not here: wrapping (crypto/announce.py) and announcing (keys.py). Rules:

* A key is live while a manifest that names it is not acknowledged by every target, and for some minutes after
  it sealed last: its last manifests may not be in the table yet.
* What a key's announcement says is taken from this node's own table, as it was signed; where it is of another
  key or chain than its row, somebody else wrote it: it is not signed again.
* A key that was destroyed on purpose is never wrapped again.
"""

from __future__ import annotations

from typing import NamedTuple

from vsql_shared.audit.dsse import SignedDocument
from vsql_shared.crypto.announce import KeyAnnouncement, decode_announcement
from vsql_shared.errors import RecordError
from vsql_shared.pg.connect import Connection, errors

# A batch that is sealed is in Kafka and in the table long before, or its epoch is over.
_UNDER_WAY = "10 minutes"


class Live(NamedTuple):
    """A data key, and how it was announced last."""

    dek_id: str
    announcement: KeyAnnouncement


def live_keys(conn: Connection, chain: str, epoch: int, kek_id: str) -> list[Live]:
    """Live data keys of a chain that the KEK version `kek_id` does not wrap, oldest first."""
    with errors("looking for data keys in use"):
        rows = conn.execute(
            "WITH acked AS (SELECT min(acked_sequence) AS sequence FROM vsql_sync.counted_targets"
            "   WHERE chain = %(chain)s AND target <> '*' HAVING count(*) > 0)"
            " SELECT d.dek_id, d.announcement FROM vsql_sync.deks d"
            " WHERE d.chain = %(chain)s AND d.kek_id <> %(kek)s AND d.state <> 'destroyed'"
            " AND d.announcement IS NOT NULL AND (d.state = 'active'"
            "   OR d.epoch = %(epoch)s AND d.retired_at > now() - %(under_way)s::interval"
            "   OR d.dek_id IN (SELECT a.dek_id FROM vsql_sync.vsql_sync_audit a, acked"
            "     WHERE a.chain = %(chain)s AND a.sequence > acked.sequence))"
            " ORDER BY d.epoch, d.created_at",
            {"chain": chain, "epoch": epoch, "kek": kek_id, "under_way": _UNDER_WAY},
        ).fetchall()
    return [Live(dek_id, _announced(chain, dek_id, bytes(document))) for dek_id, document in rows]


def _announced(chain: str, dek_id: str, document: bytes) -> KeyAnnouncement:
    said = decode_announcement(SignedDocument.decode(document).payload)
    if (said.chain, said.dek_id) != (chain, dek_id):
        raise RecordError(
            f"the row of data key {dek_id} holds the announcement of {said.dek_id} of {said.chain}",
            record=f"vsql_sync.deks {dek_id}",
            hint="somebody changed the table; nothing of it is signed again",
        )
    return said
