"""The trail verified again and again, slice by slice, beside the services' work.

Not here: the thread that calls this (service/auditor.py), the topic (watch_topic.py), and `audit verify`
(verify.py, whose checks these are). Rules:

* New entries are verified as they come; a pass over all of each chain begins when the service starts, and
  every `verify_every` after the last one ended.
* Only a pass that this very object has read from a chain's first entry to its last says that it is whole,
  and that breaks are gone. No position of a pass is kept: a row that can be altered stands for no reading.
* One turn reads at most one slice of new entries, of all chains together and each in its turn, and one slice
  of the pass, in one short snapshot.
* The head that was verified last is remembered: a chain that is cut or rewritten *with* the head beside it
  is a break, as long as the rows of audit_watch were not altered with it. The topic is for that.
* A chain whose rows begin behind a base (docs/design/0020) is read from there. A pass says that it is whole
  only if the chain says that base itself, everything kept from below is there, and the archive's segments
  cover the rest. Who cuts rows off has no such base, or one that nobody has signed into the chain.
* A chain that is pruned while a pass reads it is read anew, from its base.
* After a broken link a chain proves nothing more, until a pass finds it linked. A row that differs from
  its document breaks no link, nor does what another node says: it is noted, and reading goes on.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from vsql_shared.audit import watch_state
from vsql_shared.audit.bases import base_of
from vsql_shared.audit.chain import EMPTY_HEAD, ChainHead, ChainReader, writer_of
from vsql_shared.audit.checkpoint import Log
from vsql_shared.audit.pruned import KeptSoFar, Wrong, kept_from, unarchived, unsaid
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
from vsql_shared.errors import ChainError, DecodeError, SignatureError
from vsql_shared.pg.connect import Connection, errors

if TYPE_CHECKING:
    from vsql_shared.audit.base import Base
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
NOBODYS = ""
"""Breaks of rows, or records, that are of no chain of this node are noted under this name."""
MAX_NAME = 500
"""Characters of a chain's name; those of the longest possible names of publication and nodes are fewer."""
_MOST = 10
"""Breaks without a broken link that are noted of a chain in one pass: others when these are mended."""

Heads = Mapping[str, tuple[int, bytes]]
Cosigned = Mapping[str, Mapping[str, tuple[int, str]]]
"""Chain → target → (size, root in hex) of the newest head it co-signed, as the topic has it."""


def is_name(chain: str) -> bool:
    """Whether this can be a chain's name: nothing else is noted, asked for or shown as one."""
    try:
        writer_of(chain)
    except ChainError:
        return False
    return len(chain) <= MAX_NAME and chain.isprintable()


@dataclass(slots=True)
class Found:
    """What one turn found."""

    breaks: list[Problem] = field(default_factory=list)
    moved: dict[str, ChainHead] = field(default_factory=dict)
    whole: dict[str, int] = field(default_factory=dict)
    linked: set[str] = field(default_factory=set)
    """Chains whose end a pass has reached, whatever it noted of their rows."""
    broken: set[str] = field(default_factory=set)
    mended: set[str] = field(default_factory=set)
    """Whose breaks are gone."""


class _Read(NamedTuple):
    """What reading on from a head gave."""

    head: ChainHead
    breaks: list[Problem]
    broken: bool
    """The last of them is a broken link: nothing behind it was read."""
    ended: bool


@dataclass(slots=True)
class _Under:
    """The chain a pass is at: where its rows begin, how far they were read, and what they say."""

    base: Base | None
    at: ChainHead
    report: ChainReport
    kept: KeptSoFar = field(default_factory=KeptSoFar)

    @property
    def start(self) -> ChainHead:
        """The head before the first row."""
        return _start(self.base)


class TrailWatch:
    """Verifies this node's own chains; `conn` is its own connection, in autocommit mode."""

    def __init__(self, conn: Connection, cluster: str, slice_size: int, every: float) -> None:
        self._conn, self._cluster = conn, cluster
        self._slice, self._every = slice_size, every
        self._newest = watch_state.load(conn)
        self._broken: set[str] = set()
        self._waiting: list[str] = []
        """Chains the pass under way has still to read; `_under`: the first of them, once it is begun."""
        self._under: _Under | None = None
        self._flaws: dict[str, set[int | None]] = {}
        """Places of breaks without a broken link, noted of each chain since the pass began."""
        self._next_pass = float("-inf")
        self._last_followed = ""
        self.cosigned: Cosigned = {}
        """Set by whoever reads the topic."""

    def turn(self, trust: TrustStore, now: float) -> list[Problem]:
        """Verify the next slices; the breaks that are new. `now`: a clock that does not go back."""
        found = Found()
        with errors("verifying the audit trail"), self._conn.transaction():
            self._conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            heads = own_heads(self._conn)
            if not self._waiting and now >= self._next_pass:
                self._begin(heads, found)
            self._follow(heads, trust, found)
            if self._waiting:
                self._pass(self._waiting[0], heads, trust, found)
            if not self._waiting and now >= self._next_pass:
                self._next_pass = now + self._every
        return self._settle(heads, found)

    @property
    def busy(self) -> bool:
        """Whether a pass is under way."""
        return bool(self._waiting)

    def _begin(self, heads: Heads, found: Found) -> None:
        """Begin a pass: every chain there is, is said to be, or was once."""
        there = {str(name) for (name,) in self._conn.execute(_CHAINS)}
        every = sorted(there | heads.keys() | self._newest.keys())
        self._waiting, self._under = [name for name in every if is_name(name)], None
        self._flaws.clear()
        strange = [name for name in every if not is_name(name)][:1]
        nobodys = nameless(self._conn) + [
            Problem(NOBODYS, None, None, f"rows of {name[:80]!r}, which is not the name of a chain")
            for name in strange
        ]
        found.breaks += nobodys
        if not nobodys:
            found.mended.add(NOBODYS)
        for text in unprotected(self._conn):
            _log.warning("%s", text)

    def _follow(self, heads: Heads, trust: TrustStore, found: Found) -> None:
        """Verify what is new: one slice, beginning with the chain after the one that was served last."""
        behind = sorted(
            chain
            for chain, head in heads.items()
            if chain not in self._broken and is_name(chain) and head != _place(self._newest_of(chain))
        )
        turned = [one for one in behind if one > self._last_followed]
        left = self._slice
        for chain in turned + [one for one in behind if one <= self._last_followed]:
            if left <= 0:
                return
            self._last_followed = chain
            before = self._newest_of(chain)
            base = self._base(chain)
            start = EMPTY_HEAD if isinstance(base, Problem) else _start(base)
            wrong = base if isinstance(base, Problem) else _rewritten(chain, start, before)
            if wrong is not None:
                found.breaks.append(wrong)
                found.broken.add(chain)
                continue
            begin = before if before.sequence > start.sequence else start
            report = ChainReport(chain)
            read = self._read(report, begin, start, heads[chain], trust, EMPTY_HEAD, left)
            left -= max(1, read.head.sequence - begin.sequence)
            found.breaks += read.breaks
            if read.broken:
                found.broken.add(chain)
            elif read.head != before:
                found.moved[chain] = read.head

    def _newest_of(self, chain: str) -> ChainHead:
        return self._newest.get(chain, EMPTY_HEAD)

    def _base(self, chain: str) -> Base | Problem | None:
        """The base a chain's rows begin behind, or what is wrong with it."""
        try:
            return base_of(self._conn, Log(self._cluster, chain))
        except (ChainError, SignatureError, DecodeError) as error:
            return Problem(chain, None, None, f"where it was pruned does not verify: {error.message}")

    def _pass(self, chain: str, heads: Heads, trust: TrustStore, found: Found) -> None:
        """The next slice of the pass; at a chain's end, or at a broken link, the next chain's turn."""
        newest = found.moved.get(chain, self._newest_of(chain))
        base = self._base(chain)
        if isinstance(base, Problem):
            found.breaks.append(base)
            self._next_chain(chain, found, broken=True)
            return
        under = self._under
        # Bases only rise: who lets them go up and down must not keep a pass from its end.
        if under is None or (base is not None and base.head.sequence > under.start.sequence):
            under = self._under = _Under(base, _start(base), ChainReport(chain))
        if not under.kept.ended and self._kept(chain, trust, under, found):
            return
        if under.base is not None and under.at == under.start:
            if (wrong := _rewritten(chain, under.start, newest)) is not None:
                found.breaks.append(wrong)
                self._next_chain(chain, found, broken=True)
                return
            found.breaks += self._contradicted(chain, under.start)
        read = self._read(under.report, under.at, under.start, heads.get(chain), trust, newest, self._slice)
        found.breaks += read.breaks
        under.at = read.head
        broken = read.broken
        if read.ended and not broken:
            broken = self._end(chain, under, newest, found)
        if broken or read.ended:
            self._next_chain(chain, found, broken=broken)

    def _next_chain(self, chain: str, found: Found, *, broken: bool) -> None:
        if broken:
            found.broken.add(chain)
        self._waiting.pop(0)
        self._under = None

    def _kept(self, chain: str, trust: TrustStore, under: _Under, found: Found) -> bool:
        """The next slice of what is kept beside the rows, which breaks no link; False where nothing is."""
        log, before = Log(self._cluster, chain), under.kept
        read = kept_from(self._conn, trust, log, under.base, before, self._slice)
        if isinstance(read, Wrong):
            found.breaks += self._flaw(Problem(chain, read.sequence, None, read.what))
            read = KeptSoFar(ended=True)
        under.kept = read
        return read.kept.count > before.kept.count

    def _end(self, chain: str, under: _Under, newest: ChainHead, found: Found) -> bool:
        """The pass is at a chain's end: what that says of it. True where it is broken."""
        head, base = under.at, under.base
        if base is not None and not under.report.says(base):
            size = base.head.sequence
            found.breaks.append(Problem(chain, size + 1, None, unsaid(size)))
            return True
        if newest.sequence > head.sequence:
            what = (
                f"entry {newest.sequence} was verified before and is not there: the chain was cut at its end"
            )
            found.breaks.append(Problem(chain, newest.sequence, None, what))
            return True
        for target, (size, _) in sorted(self.cosigned.get(chain, {}).items()):
            if size > head.sequence:
                what = f"target {target} co-signed {size} entries, there are {head.sequence}: cut at its end"
                found.breaks += self._flaw(Problem(chain, None, None, what))
        if base is not None and (wrong := unarchived(self._conn, chain, base.head.sequence)) is not None:
            found.breaks += self._flaw(Problem(chain, wrong.sequence, None, wrong.what))
        found.moved[chain] = head
        found.linked.add(chain)
        if not self._flaws.get(chain):
            found.whole[chain] = head.sequence
            found.mended.add(chain)
        return False

    def _flaw(self, problem: Problem) -> list[Problem]:
        """Note a break that breaks no link, unless its place is known or there are many of them."""
        known = self._flaws.setdefault(problem.chain, set())
        if problem.sequence in known or len(known) >= _MOST:
            return []
        known.add(problem.sequence)
        return [problem]

    def _read(
        self,
        report: ChainReport,
        head: ChainHead,
        start: ChainHead,
        remembered: tuple[int, bytes] | None,
        trust: TrustStore,
        known: ChainHead,
        most: int,
    ) -> _Read:
        """Verify the next rows behind a head. `start`: the one before the first row of the chain.

        `known`: one verified before, which must still be there.
        """
        chain = report.chain
        reader = ChainReader(self._cluster, chain, writer_of(chain), trust, head)
        # The head's own row comes with those behind it, where the chain does not begin at this head.
        inside = head.sequence > start.sequence
        rows = rows_from(self._conn, chain, head.sequence, most + inside)
        report.sequence, report.entry_hash = _place(head)
        breaks: list[Problem] = []
        for row in _behind(chain, rows, head) if inside else rows:
            before = reader.head
            problem = row if isinstance(row, Problem) else check_row(reader, row, report)
            if problem is not None and reader.head is not before:
                breaks += self._flaw(problem)
                report.sequence, report.entry_hash = _place(reader.head)
                problem = None
            problem = problem or _rewritten(chain, reader.head, known)
            if problem is not None:
                return _Read(before, [*breaks, problem], broken=True, ended=False)
            breaks += self._contradicted(chain, reader.head)
        ended = len(rows) < most + inside
        end = unnumbered(self._conn, chain) if ended else None
        if ended and end is None and remembered is not None:
            end = cut(report, *remembered, "this node's own")
        if end is not None:
            return _Read(reader.head, [*breaks, end], broken=True, ended=True)
        return _Read(reader.head, breaks, broken=False, ended=ended)

    def _contradicted(self, chain: str, head: ChainHead) -> list[Problem]:
        """What targets co-signed at this very place."""
        found: list[Problem] = []
        for target, (size, root) in self.cosigned.get(chain, {}).items():
            if size == head.sequence and is_known(head.tree, size) and root_of(head.tree).hex() != root:
                what = (
                    f"split view: target {target} co-signed {size} entries with root {root}, "
                    f"these have {root_of(head.tree).hex()}"
                )
                found += self._flaw(Problem(chain, size, None, what))
        return found

    def _settle(self, heads: Heads, found: Found) -> list[Problem]:
        """Keep what was found; the breaks nobody knew."""
        new: list[Problem] = []
        moved = {
            chain: head
            for chain, head in found.moved.items()
            if head != self._newest_of(chain) or chain in found.linked
        }
        if not (moved or found.mended or found.breaks):
            return new
        with errors("noting what was verified"), self._conn.transaction():
            for chain, head in moved.items():
                watch_state.save(self._conn, chain, head, is_last=heads.get(chain) == _place(head))
            for chain, sequence in found.whole.items():
                watch_state.whole(self._conn, "trail", chain, sequence)
            for chain in found.mended:
                watch_state.end(self._conn, "trail", chain)
            new += [one for one in found.breaks if watch_state.note(self._conn, "trail", one)]
        self._newest |= moved
        self._broken = (self._broken - found.linked) | found.broken
        return new


def _start(base: Base | None) -> ChainHead:
    return EMPTY_HEAD if base is None else base.head


def _place(head: ChainHead) -> tuple[int, bytes]:
    return head.sequence, head.entry_hash


def _rewritten(chain: str, head: ChainHead, known: ChainHead) -> Problem | None:
    """Another entry at the place where one was verified before."""
    if head.sequence != known.sequence or head.entry_hash == known.entry_hash:
        return None
    what = f"another entry {head.sequence} than was verified before: the chain was rewritten"
    return Problem(chain, head.sequence, None, what)


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
