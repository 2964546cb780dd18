"""The target cosigns its source's tree heads: now and then, as far as it has verified and applied.

Not here: the tree (it grows with the chain's head, audit/chain.py), the note's form (audit/checkpoint.py),
the chain of acknowledgements in which it is said (acknowledge.py). Rules:

* Only a head whose batches are committed here is cosigned, and only one beyond the last: also where this
  database was set back and applies again what it had.
* A chain that passes the size that was cosigned last has the root that was: a database that was set back, and
  is shown another history now, stops its stream there. Else it would sign that history, too.
* What was last cosigned, and when, stands in the chain itself: a service that restarts often does it too.
* Without a signing key (dev mode), or where the tree is not known, nothing is cosigned.
"""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from vsql_shared.audit.checkpoint import Checkpoint, Log, cosigned_in, split_view
from vsql_shared.audit.entries import CHECKPOINT_COSIGNED
from vsql_shared.audit.rows import parse
from vsql_shared.audit.tree import is_known, root_of
from vsql_shared.pg.connect import errors

if TYPE_CHECKING:
    from vsql_consumers.acknowledge import Acknowledger
    from vsql_shared.audit.chain import ChainHead
    from vsql_shared.crypto.signing import Signer
    from vsql_shared.pg.connect import Connection

_log = logging.getLogger(__name__)


class Last(NamedTuple):
    """What was cosigned last, and when (microseconds since 1970); where nothing was, when the chain began."""

    at: int
    checkpoint: Checkpoint | None

    def is_due(self, now: int, every: int) -> bool:
        """Whether it is time again; at once where the clock was ahead then."""
        return not 0 <= now - self.at < every

    def hold(self, log: Log, head: ChainHead) -> None:
        """Raise ChainError where a head of this size was cosigned, and it was another one."""
        if self.checkpoint is None or (self.checkpoint.log, self.checkpoint.size) != (log, head.sequence):
            return
        if is_known(head.tree, head.sequence) and root_of(head.tree) != self.checkpoint.root:
            error = split_view(
                self.checkpoint,
                f"which this node has cosigned; what it reads now has {root_of(head.tree).hex()}",
            )
            error.sequence = head.sequence
            error.hint += "; a publication of another name begins a chain anew"
            raise error


class Cosigner:
    """Says `checkpoint_cosigned` in the chain of acknowledgements, at most once in `every`."""

    def __init__(
        self, acknowledger: Acknowledger, signer: Signer | None, log: Log, every: timedelta, last: Last
    ) -> None:
        self._acknowledger, self._signer, self._log = acknowledger, signer, log
        self._every = every // timedelta(microseconds=1)
        self._last = last
        self._told = False

    def hold(self, head: ChainHead) -> None:
        """Called before the entry that leads to this head is applied. Raises ChainError ("split view")."""
        self._last.hold(self._log, head)

    def look(self, head: ChainHead, now: int | None = None) -> bool:
        """Cosign the head when it is time; whether it was. `now`: microseconds since 1970."""
        now = time.time_ns() // 1000 if now is None else now
        done = self._last.checkpoint.size if self._last.checkpoint else 0
        if self._signer is None or head.sequence <= done or not self._last.is_due(now, self._every):
            return False
        if not is_known(head.tree, head.sequence):
            self._tell()
            return False
        checkpoint = Checkpoint(self._log, head.sequence, root_of(head.tree))
        note = checkpoint.sign(self._signer, now // 1_000_000).encode()
        self._acknowledger.say(CHECKPOINT_COSIGNED, {"note": note})
        self._last = Last(now, checkpoint)
        return True

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            _log.warning(
                "chain %s is not cosigned: an earlier version stored its head without its tree",
                self._log.chain,
            )


def load_last(conn: Connection, ack_chain: str, now: int | None = None) -> Last:
    """What this node cosigned last, by its chain of acknowledgements. `now`: as in `Cosigner.look`."""
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
        return Last(time.time_ns() // 1000 if now is None else now, None)
    entry = parse(bytes(row[0])).entry
    return Last(entry.event_timestamp, cosigned_in(entry))
