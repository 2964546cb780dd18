"""The coordinator's half of a stream that is applied by several: gives shares, waits, merges what was found.

Not here: what a member does (member.py), and what is applied alone (pipeline.py). Rules
(docs/design/0015):

* Entries are let through in the order of the chain; a batch when all of its parts were found.
* Who has a share is decided here, and holds when the share's row says so.
* What a member refused is refused; what it could not apply otherwise is applied here, at its place.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vsql_consumers import quarantine, shares
from vsql_consumers.collected import Ready
from vsql_consumers.groups import Group
from vsql_consumers.means import Totals
from vsql_consumers.members import PartReceipt, Patience, assign, is_by_row, left_at, merge
from vsql_consumers.state import Receipt
from vsql_consumers.unseal import Descriptor
from vsql_shared.audit.entries import AuditEntry
from vsql_shared.changes import PartitionRoot
from vsql_shared.errors import DatabaseError, RecordError, TransientError
from vsql_shared.pg import catalog, row_order
from vsql_shared.pg.connect import Connection, errors

_log = logging.getLogger(__name__)

MOST_WAITING = 1_000
"""Entries that wait for members; beyond them the chain is not read on."""
# Batches looked at in one question; seconds between two looks at the members.
_LOOK_AT, _ASSIGN_SECONDS = 200, 0.3


def require_fit(conn: Connection, chain: str, described: Iterable[Descriptor]) -> None:
    """Raise DatabaseError where a table here binds rows to each other that members apply in any order.

    Its shares are nobody's then: members wait, too.
    """
    problems: list[str] = []
    with errors("looking whether the tables may be applied by several"):
        for one in described:
            table = catalog.describe(conn, one.relation.name)
            key = [column.name for column in one.relation.columns if column.key]
            if table is not None and one.relation.replica_identity in "di":
                problems += row_order.target_problems(conn, key, table)
    if problems:
        with errors("taking the shares back"):
            shares.give(conn, chain, dict.fromkeys(shares.load(conn, chain)))
        lines = "; ".join(sorted(set(problems)))
        raise DatabaseError(f"the stream cannot be applied partitioned: {lines}")


class Merged(NamedTuple):
    """An entry that is complete; a batch with its receipt."""

    ready: Ready
    receipt: Receipt | None
    commit_time: int | None


class Coordination:
    """Coordinates the members of one stream, for one attempt."""

    def __init__(self, conn: Connection, chain: str) -> None:
        self._conn, self._chain = conn, chain
        self._waiting: deque[Ready] = deque()
        self._patience = Patience()
        self._assign_at = 0.0
        with errors("reading the shares"):
            shares.try_again(conn, chain)
            found = shares.load(conn, chain)
        self._known = set(found)
        self._helped: dict[int, set[int]] = {}
        for share, one in found.items():
            if one.stopped_at is not None and one.stopped_at > one.sequence:
                self._helped.setdefault(one.stopped_at, set()).add(share)
        self._said: list[int] | None = None

    def choose(self, entry: AuditEntry, root: PartitionRoot) -> bool:
        """Whether the coordinator collects a part: of what is applied alone, and of what members left."""
        return not is_by_row(entry) or root.partition in self._helped.get(entry.sequence, ())

    @property
    def idle(self) -> bool:
        """Whether nothing waits for members."""
        return not self._waiting

    @property
    def full(self) -> bool:
        """Whether enough waits."""
        return len(self._waiting) >= MOST_WAITING

    def add(self, ready: Ready) -> None:
        """An entry that members apply, or that stands between such."""
        if ready.entry is not None:
            new = {root.partition for root in ready.entry.partitions} - self._known
            if new:
                with errors("noting shares"):
                    shares.ensure(self._conn, self._chain, sorted(new))
                self._known |= new
                self._assign_at = 0.0
        self._waiting.append(ready)

    def assign(self) -> None:
        """Look who is there, and give the shares; at intervals."""
        now = time.monotonic()
        if now < self._assign_at:
            return
        self._assign_at = now + _ASSIGN_SECONDS
        with errors("giving shares to members"):
            there = shares.present(self._conn, self._chain)
            has = {share: one.member for share, one in shares.load(self._conn, self._chain).items()}
            wanted = assign(has, there)
            changes = {share: member for share, member in wanted.items() if has[share] != member}
            moved = shares.give(self._conn, self._chain, changes)
        if moved or there != self._said:
            level = logging.INFO if there else logging.WARNING
            text = (
                "members" if there else "no member is there: nothing is applied until one is (apply.members)"
            )
            _log.log(level, text, extra={"members": there, "moved": moved, "shares": len(has)})
        self._said = there

    def take(self, group: Group, totals: Totals) -> None:
        """Put what is complete by now into a group. Raises RecordError, TransientError."""
        for one in self._merged():
            group.add_merged(one.ready, one.receipt, one.commit_time)
            if one.receipt is not None:
                totals.rows += sum(one.receipt.verdicts.values())
                totals.batches += 1

    def forget(self, group: Group) -> None:
        """Have a group's transaction drop what it has merged."""
        upto = group.position.head.sequence
        group.also.append(lambda conn: shares.forget_parts(conn, self._chain, upto))

    def _merged(self) -> Iterator[Merged]:
        """Entries that are complete by now, in order."""
        if not self._waiting or not self._patience.due(time.monotonic()):
            return
        # The next one first: while that is missing, nobody asks for all behind it again and again.
        many = 1
        while self._waiting:
            last = self._waiting[min(len(self._waiting), many) - 1].sequence
            with errors("reading what members found"):
                found = shares.load_parts(self._conn, self._chain, self._waiting[0].sequence, last)
            while self._waiting and self._waiting[0].sequence <= last:
                ready = self._waiting[0]
                one = _merge(ready, found.get(ready.sequence, []))
                if one is None:
                    self._check_stopped(ready)
                    return
                self._waiting.popleft()
                self._patience.heard()
                yield one
            many = _LOOK_AT

    def _check_stopped(self, ready: Ready) -> None:
        """Whether a member left its share where the batch that is next needs it."""
        with errors("reading the shares"):
            found = shares.load(self._conn, self._chain)
        stops = {share: one.stopped_at for share, one in found.items()}
        sequence = ready.sequence
        for share in left_at(ready.entry, stops) if ready.entry is not None else ():
            one = found[share]
            if one.record is not None:
                error = RecordError(one.error or "a member refused it", record=one.record)
                error.sequence = sequence
                raise error
            if share not in self._helped.get(sequence, ()):
                raise TransientError(
                    f"entry {sequence} is applied by the coordinator in share {share}: {one.error}",
                    hint="its member could not",
                )

    def figures(self) -> dict[str, object]:
        """For the status: members, and shares with nobody."""
        with errors("reading the shares"):
            found = shares.load(self._conn, self._chain)
        return {
            "members": self._said or [],
            "shares": {
                str(share): {"member": one.member, "sequence": one.sequence}
                for share, one in sorted(found.items())
            },
        }


def _merge(ready: Ready, found: list[PartReceipt]) -> Merged | None:
    entry = ready.entry
    if entry is None or not is_by_row(entry):
        return Merged(ready, None, None)
    whole = merge(entry, found)
    if whole is None:
        return None
    detail = {**whole.detail, **quarantine.as_detail(whole.passed_over)}
    receipt = Receipt(
        entry.sequence, entry.epoch, entry.batch, ready.encoded, whole.root, whole.verdicts, detail
    )
    return Merged(ready, receipt, max((one.commit_time or 0 for one in found), default=None))
