"""Who applies what of a stream that is applied by several, and when a batch is complete. Pure.

Not here: the database (shares.py), a member's work (member.py), the coordinator's (coordination.py). Rules
(docs/design/0015):

* What does not say that the order of each row is enough is applied alone, by the coordinator, when all before
  it is complete; nobody passes it before that.
* Shares are given so that members have equally many, give or take one, and as few as possible move.
* A batch is complete when every topic-partition of its manifest was reported once; then roots and counts must
  be those of the manifest.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from vsql_consumers.verify import batch_name
from vsql_shared.audit.entries import (
    BY_ROW,
    EPOCH_OPENED,
    KEY_DESTROYED,
    ORDER,
    REPLICATION_BATCH,
    SHREDDED,
    AuditEntry,
)
from vsql_shared.audit.merkle import batch_root
from vsql_shared.changes import Transaction
from vsql_shared.errors import RecordError

if TYPE_CHECKING:
    from vsql_consumers.collected import Ready


def is_by_row(entry: AuditEntry) -> bool:
    """Whether a batch may be applied by members side by side."""
    if entry.event_type != REPLICATION_BATCH or entry.continues:
        return False
    return bool(json.loads(entry.detail).get(ORDER) == BY_ROW)


def is_alone(ready: Ready) -> bool:
    """Whether an entry is applied by the coordinator, when everything before it is complete."""
    entry = ready.entry
    if entry is None or ready.skipped:
        return True
    # Where keys end, everything they sealed is behind all members.
    return entry.event_type in (EPOCH_OPENED, KEY_DESTROYED) or (
        entry.event_type == REPLICATION_BATCH and not is_by_row(entry)
    )


def assign(shares: Mapping[int, int | None], members: Sequence[int]) -> dict[int, int | None]:
    """Share → member, for members that are there; `shares` says who has each now."""
    there = set(members)
    kept: dict[int, int | None] = {
        share: member if member in there else None for share, member in sorted(shares.items())
    }
    if not there:
        return kept
    counts = Counter(member for member in kept.values() if member is not None)
    least, more = divmod(len(kept), len(there))
    # Those that have most keep one more: fewer move.
    ordered = sorted(there, key=lambda member: (-counts[member], member))
    quota = {member: least + (place < more) for place, member in enumerate(ordered)}
    for share, member in kept.items():
        if member is not None and counts[member] > quota[member]:
            counts[member] -= 1
            kept[share] = None
    room = [member for member in ordered for _ in range(quota[member] - counts[member])]
    for share, member in kept.items():
        if member is None:
            kept[share] = room.pop(0)
    return kept


@dataclass(frozen=True, slots=True)
class PartReceipt:
    """What was found in some partitions of a batch by who applied them.

    `share`: the first of theirs. `parts`: "topic/partition" → root, in hex.
    """

    sequence: int
    share: int
    parts: Mapping[str, str]
    verdicts: Mapping[str, int]
    commit_time: int | None
    detail: Mapping[str, Any] = field(default_factory=dict)


def part_name(topic: str, partition: int) -> str:
    """A topic-partition as part receipts name it."""
    return f"{topic}/{partition}"


def part_receipt(
    entry: AuditEntry,
    roots: Mapping[tuple[str, int], bytes],
    verdicts: Mapping[str, int],
    transactions: Iterable[Transaction],
    detail: Mapping[str, Any] | None = None,
) -> PartReceipt:
    """What was found in some parts of a batch; `roots`: of each, as it was computed here."""
    return PartReceipt(
        entry.sequence,
        min(number for _, number in roots),
        {part_name(*place): root.hex() for place, root in sorted(roots.items())},
        verdicts,
        max((one.commit_time for one in transactions), default=None),
        detail or {},
    )


def left_at(entry: AuditEntry, stops: Mapping[int, int | None]) -> list[int]:
    """Shares of a batch that their members have left, at it or before it; `stops`: share → where it was left.

    Before it: a record that is no batch's stops a share when nobody knows yet which batch is its next one.
    """
    shares = sorted({root.partition for root in entry.partitions})
    return [share for share in shares if (at := stops.get(share)) is not None and at <= entry.sequence]


class Patience:
    """How long to wait before the same question is asked again: longer while the answer stays no."""

    SHORTEST, LONGEST = 0.01, 0.16

    def __init__(self) -> None:
        self._pause, self._next = self.SHORTEST, 0.0

    def due(self, now: float) -> bool:
        """Whether to ask now; if so, the answer is counted a no until `heard`."""
        if now < self._next:
            return False
        self._next = now + self._pause
        self._pause = min(2 * self._pause, self.LONGEST)
        return True

    def heard(self) -> None:
        """The answer was yes: the next question is asked soon."""
        self._pause, self._next = self.SHORTEST, 0.0


class Whole(NamedTuple):
    """What was found in all of a batch."""

    root: bytes
    verdicts: dict[str, int]
    detail: dict[str, Any]
    """Of parts whose key was destroyed."""
    passed_over: list[dict[str, Any]]
    """Transactions that were passed over by decision, each once."""


def merge(entry: AuditEntry, found: Sequence[PartReceipt]) -> Whole | None:
    """What was found in all of a batch, None while some of its partitions are missing. Raises RecordError.

    The root is computed here, over what was computed over the records.
    """
    roots = {name: bytes.fromhex(root) for one in found for name, root in one.parts.items()}
    named = [part_name(root.topic, root.partition) for root in entry.partitions]
    if len(roots) != sum(len(one.parts) for one in found) or not roots.keys() <= set(named):
        raise RecordError("a partition was applied twice, or is none of the batch", record=batch_name(entry))
    if len(roots) < len(named):
        return None
    root = batch_root([roots[name] for name in named])
    verdicts: Counter[str] = Counter()
    for one in found:
        verdicts.update(one.verdicts)
    if root != entry.merkle_root or verdicts.total() != entry.row_count:
        raise RecordError(
            f"members found root {root.hex()} and {verdicts.total()} changes, the manifest says"
            f" {entry.merkle_root.hex()} and {entry.row_count}",
            record=batch_name(entry),
        )
    return Whole(root, dict(verdicts), _shredded(found), _passed_over(found))


def _shredded(found: Sequence[PartReceipt]) -> dict[str, Any]:
    """By what parts were shredded; one order destroys the key of a batch."""
    said = [{SHREDDED: one.detail[SHREDDED]} for one in found if SHREDDED in one.detail]
    return said[0] if said else {}


def _passed_over(found: Sequence[PartReceipt]) -> list[dict[str, Any]]:
    """Transactions that were passed over, each once, with its changes in all parts."""
    over: dict[tuple[Any, ...], dict[str, Any]] = {}
    for said in (said for one in found for said in one.detail.get("passed_over", [])):
        rest = {name: value for name, value in said.items() if name != "changes"}
        whole = over.setdefault(tuple(sorted(rest.items())), {**rest, "changes": 0})
        whole["changes"] += said["changes"]
    return list(over.values())


def skipped(entry: AuditEntry, found: Sequence[PartReceipt]) -> tuple[dict[str, int], dict[str, Any]]:
    """Verdicts and detail of a batch that is skipped after some of its parts were applied, or none."""
    verdicts: Counter[str] = Counter()
    for one in found:
        verdicts.update(one.verdicts)
    verdicts["skipped"] += max(0, entry.row_count - verdicts.total())
    opened = [one for one in found if SHREDDED not in one.detail]
    applied = sorted({int(name.rpartition("/")[2]) for one in opened for name in one.parts})
    detail: dict[str, Any] = {**_shredded(found), **({"partitions_applied": applied} if applied else {})}
    return dict(verdicts), detail | _committed(found)


def shredded_rest(
    entry: AuditEntry, by: dict[str, Any], found: Sequence[PartReceipt]
) -> tuple[dict[str, int], dict[str, Any]]:
    """Verdicts and detail of a batch whose key was destroyed, perhaps after some of it was committed."""
    verdicts: Counter[str] = Counter()
    for one in found:
        verdicts.update(one.verdicts)
    verdicts[SHREDDED] += max(0, entry.row_count - verdicts.total())
    return dict(verdicts), by | _committed(found)


def _committed(found: Sequence[PartReceipt]) -> dict[str, Any]:
    """How many of a batch's transactions are committed, where each is a commit of its own."""
    name = "transactions_applied"
    return next(({name: one.detail[name]} for one in found if name in one.detail), {})
