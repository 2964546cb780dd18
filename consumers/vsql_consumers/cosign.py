"""The target cosigns its source's tree heads: now and then, as far as it has verified and applied.

Not here: the tree (it grows with the chain's head, audit/chain.py), the note's form (audit/checkpoint.py),
the chain of acknowledgements in which it is said (acknowledge.py). Rules:

* Only a head whose batches are committed here is cosigned, and only one beyond the last: also where this
  database was set back and applies again what it had.
* What was last cosigned, and when, stands in the chain itself: a service that restarts often does it too.
* Without a signing key (dev mode), or where the tree is not known, nothing is said.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING

from vsql_shared.audit.checkpoint import Checkpoint, Log, cosigned_in
from vsql_shared.audit.entries import CHECKPOINT_COSIGNED
from vsql_shared.audit.rows import parse
from vsql_shared.audit.tree import is_known, root_of
from vsql_shared.pg.connect import errors

if TYPE_CHECKING:
    from vsql_consumers.acknowledge import Acknowledger
    from vsql_shared.audit.chain import ChainHead
    from vsql_shared.crypto.signing import Signer
    from vsql_shared.pg.connect import Connection


class Cosigner:
    """Says `checkpoint_cosigned` in the chain of acknowledgements, at most once in `every`."""

    def __init__(self, acknowledger: Acknowledger, signer: Signer | None, log: Log, every: timedelta) -> None:
        self._acknowledger, self._signer, self._log = acknowledger, signer, log
        self._every = every / timedelta(microseconds=1)
        self._due: float | None = None
        self._size = 0

    def look(self, conn: Connection, ack_chain: str, head: ChainHead, now: int | None = None) -> bool:
        """Cosign the head when it is time; whether it was. `now`: microseconds since 1970."""
        now = time.time_ns() // 1000 if now is None else now
        if self._signer is None or head.sequence <= self._size or not is_known(head.tree, head.sequence):
            return False
        if self._due is None:
            last, self._size = _last(conn, ack_chain, now)
            self._due = last + self._every
        if now < self._due or head.sequence <= self._size:
            return False
        checkpoint = Checkpoint(self._log, head.sequence, root_of(head.tree))
        note = checkpoint.sign(self._signer, now // 1_000_000).encode()
        self._acknowledger.say(CHECKPOINT_COSIGNED, {"note": note})
        self._due, self._size = now + self._every, head.sequence
        return True


def _last(conn: Connection, ack_chain: str, now: int) -> tuple[int, int]:
    """When a head was last cosigned, and its size; when the chain began, and 0, where none was."""
    with errors("reading what was last cosigned"):
        row = conn.execute(
            "SELECT document FROM vsql_sync.vsql_sync_audit WHERE chain = %(chain)s AND event_type = %(type)s"
            " ORDER BY sequence DESC LIMIT 1",
            {"chain": ack_chain, "type": CHECKPOINT_COSIGNED},
        ).fetchone()
        row = (
            row
            or conn.execute(
                "SELECT document FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND sequence = 1 LIMIT 1",
                (ack_chain,),
            ).fetchone()
        )
    if row is None:
        return now, 0
    entry = parse(bytes(row[0])).entry
    found = cosigned_in(entry)
    return entry.event_timestamp, 0 if found is None else found.size
