"""The trail verified again and again, slice by slice, beside the services' work.

Not here: the thread that calls this (service/auditor.py), the topic (watch_topic.py), and `audit verify`
(verify.py, whose checks these are). Rules:

* New entries are verified as they come; a pass over all of each chain begins every `verify_every`.
* One turn reads at most one slice of new entries a chain, and one slice of the pass, in one short snapshot.
* A head that was verified once is remembered: a chain that is cut or rewritten *with* the head beside it is a
  break, as long as the rows of audit_watch were not altered with it. The topic is for that.
* After its first break a chain proves nothing more, until a pass finds it whole.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from vsql_shared.audit import watch_state
from vsql_shared.audit.chain import EMPTY_HEAD, ChainHead, ChainReader, writer_of
from vsql_shared.audit.tree import is_known, root_of
from vsql_shared.audit.verify import (
    ChainReport,
    Problem,
    check_row,
    cut,
    nameless,
    own_heads,
    rows_from,
    unnumbered,
    unprotected,
)
from vsql_shared.audit.watch_state import Watched
from vsql_shared.errors import ChainError
from vsql_shared.pg.connect import Connection, errors

if TYPE_CHECKING:
    from vsql_shared.crypto.signing import TrustStore

_log = logging.getLogger(__name__)

# The distinct chains by jumps in the index, not by reading all of it.
_CHAINS = """
WITH RECURSIVE found AS (
    SELECT min(chain) AS chain FROM vsql_sync.vsql_sync_audit
    UNION ALL SELECT (SELECT min(a.chain) FROM vsql_sync.vsql_sync_audit a WHERE a.chain > f.chain)
    FROM found f WHERE f.chain IS NOT NULL
) SELECT chain FROM found WHERE chain IS NOT NULL
"""

Cosigned = Mapping[str, Mapping[str, tuple[int, str]]]
"""Chain → target → (size, root in hex) of the newest head it co-signed, as the topic has it."""


@dataclass(slots=True)
class Found:
    """What one turn found."""

    breaks: list[Problem] = field(default_factory=list)
    moved: dict[str, Watched] = field(default_factory=dict)
    whole: dict[str, int] = field(default_factory=dict)


class TrailWatch:
    """Verifies this node's own chains; `conn` is its own connection, in autocommit mode."""

    def __init__(self, conn: Connection, cluster: str, slice_size: int, every: float) -> None:
        self._conn, self._cluster = conn, cluster
        self._slice, self._every = slice_size, every
        self._watched = watch_state.load(conn)
        self._broken = {one.chain for one in watch_state.open_breaks(conn) if one.source == "trail"}
        self._waiting = [name for name, one in self._watched.items() if one.passing is not None]
        """Chains the pass under way has still to read."""
        self._next_pass: float | None = None
        self._began = watch_state.pass_age(conn)
        self.cosigned: Cosigned = {}
        """Set by whoever reads the topic."""

    def turn(self, trust: TrustStore, now: float) -> list[Problem]:
        """Verify the next slices; the breaks that are new. `now`: a clock that does not go back."""
        found = Found()
        with errors("verifying the audit trail"), self._conn.transaction():
            self._conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            heads = own_heads(self._conn)
            self._begin(heads, now, found)
            for chain in heads.keys() - self._broken:
                self._follow(chain, heads, trust, found)
            if self._waiting:
                self._pass(self._waiting[0], heads, trust, found)
        if not self._waiting and self._next_pass is None:
            self._next_pass = now + self._every
        return self._settle(found)

    @property
    def busy(self) -> bool:
        """Whether a pass is under way."""
        return bool(self._waiting)

    def _begin(self, heads: Mapping[str, tuple[int, bytes]], now: float, found: Found) -> None:
        """Begin a pass when it is time: every chain there is, is said to be, or was once."""
        if self._next_pass is None and not self._waiting:  # the first turn
            self._next_pass = now + max(0.0, self._every - self._began)
        if self._next_pass is None or now < self._next_pass:
            return
        self._next_pass = None
        there = {str(name) for (name,) in self._conn.execute(_CHAINS)}
        self._waiting = sorted(there | heads.keys() | self._watched.keys())
        for chain in self._waiting:
            found.moved[chain] = replace(self._watched.get(chain, Watched(chain)), passing=EMPTY_HEAD)
        found.breaks += nameless(self._conn)
        for text in unprotected(self._conn):
            _log.warning("%s", text)

    def _follow(
        self, chain: str, heads: Mapping[str, tuple[int, bytes]], trust: TrustStore, found: Found
    ) -> None:
        """Verify what is new in a chain, as long as its pass does not have to find its beginning first."""
        one = found.moved.get(chain, self._watched.get(chain, Watched(chain)))
        if heads[chain] == (one.newest.sequence, one.newest.entry_hash):
            return
        head, problem, _ = self._read(chain, one.newest, heads.get(chain), trust)
        if problem is not None:
            found.breaks.append(problem)
            return
        found.moved[chain] = replace(one, newest=head)

    def _pass(
        self, chain: str, heads: Mapping[str, tuple[int, bytes]], trust: TrustStore, found: Found
    ) -> None:
        """The next slice of the pass; at a chain's end, or at its first break, the next chain's turn."""
        one = found.moved.get(chain, self._watched.get(chain, Watched(chain)))
        head, problem, ended = self._read(
            chain, one.passing or EMPTY_HEAD, heads.get(chain), trust, one.newest
        )
        if problem is None and ended:
            problem = self._remembered(chain, head, one.newest)
        if problem is not None:
            found.breaks.append(problem)
        elif ended:
            found.whole[chain] = head.sequence
            if head.sequence >= one.newest.sequence:
                one = replace(one, newest=head)
        done = ended or problem is not None
        found.moved[chain] = replace(one, passing=None if done else head)
        if done:
            self._waiting.pop(0)

    def _read(
        self,
        chain: str,
        head: ChainHead,
        remembered: tuple[int, bytes] | None,
        trust: TrustStore,
        known: ChainHead = EMPTY_HEAD,
    ) -> tuple[ChainHead, Problem | None, bool]:
        """Verify the next rows behind a head: the head then, what is wrong, whether the chain ended.

        `known`: a head that was verified before, which the chain must still have.
        """
        try:
            reader = ChainReader(self._cluster, chain, writer_of(chain), trust, head)
        except ChainError as error:
            return head, Problem(chain, None, None, error.message), True
        # The head's own row comes with those behind it, where the chain does not begin at this head.
        inside = head.sequence > EMPTY_HEAD.sequence
        limit = self._slice + inside
        rows = rows_from(self._conn, chain, head.sequence, limit)
        report = ChainReport(chain, sequence=head.sequence, entry_hash=head.entry_hash)
        for row in _behind(chain, rows, head) if inside else rows:
            problem = row if isinstance(row, Problem) else check_row(reader, row, report)
            problem = problem or self._contradicted(chain, reader.head, known)
            if problem is not None:
                return reader.head, problem, True
        ended = len(rows) < limit
        problem = None
        if ended:
            problem = unnumbered(self._conn, chain)
            if problem is None and remembered is not None:
                problem = cut(report, *remembered, "this node's own")
        return reader.head, problem, ended

    def _contradicted(self, chain: str, head: ChainHead, known: ChainHead) -> Problem | None:
        """What others, or this node before, have seen at this very place."""
        if head.sequence == known.sequence and head.entry_hash != known.entry_hash:
            what = f"another entry {head.sequence} than was verified before: the chain was rewritten"
            return Problem(chain, head.sequence, None, what)
        for target, (size, root) in self.cosigned.get(chain, {}).items():
            if size == head.sequence and is_known(head.tree, size) and root_of(head.tree).hex() != root:
                what = (
                    f"split view: target {target} co-signed {size} entries with root {root}, "
                    f"these have {root_of(head.tree).hex()}"
                )
                return Problem(chain, size, None, what)
        return None

    def _remembered(self, chain: str, head: ChainHead, newest: ChainHead) -> Problem | None:
        """At a chain's end: it is no shorter than it was, here or when a target co-signed it."""
        seen = [(newest.sequence, "this node verified")]
        seen += [
            (size, f"target {target} co-signed") for target, (size, _) in self.cosigned.get(chain, {}).items()
        ]
        size, who = max(seen)
        if size <= head.sequence:
            return None
        what = f"cut at its end: the last entry is {head.sequence}, {who} entries up to {size} before"
        return Problem(chain, head.sequence + 1, None, what)

    def _settle(self, found: Found) -> list[Problem]:
        """Keep what was found; the breaks nobody knew."""
        new: list[Problem] = []
        if not (found.moved or found.whole or found.breaks):
            return new
        with errors("noting what was verified"), self._conn.transaction():
            watch_state.save(self._conn, found.moved.values())
            for chain, sequence in found.whole.items():
                watch_state.whole(self._conn, chain, sequence)
            new += [one for one in found.breaks if watch_state.note(self._conn, "trail", one)]
        self._watched |= found.moved
        self._broken -= found.whole.keys()
        self._broken |= {problem.chain for problem in found.breaks}
        return new


def _behind(chain: str, rows: list[dict[str, Any]], head: ChainHead) -> list[dict[str, Any] | Problem]:
    """The rows behind a head, whose own row comes first and must still be what it was."""
    first = rows[0] if rows else None
    if first is None or first["sequence"] != head.sequence:
        what = f"missing: sequence {head.sequence} was verified before and is not there"
        return [Problem(chain, head.sequence, None, what)]
    if hashlib.sha256(bytes(first["document"] or b"")).digest() != head.entry_hash:
        event = None if first["event_id"] is None else str(first["event_id"])
        return [Problem(chain, head.sequence, event, "its document is not the one that was verified before")]
    return list(rows[1:])
