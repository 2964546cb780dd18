"""What source and target say of a range of batches, and in which sealed records they differ.

Not here: asking databases (leaf_diff.py). Pure. What is called proven, and why:

1. Manifests and acknowledgements are signed; their signatures were verified before they come here. Where both
   have one root, nothing differs: whatever lies in the tables of leaves. A batch without a manifest at its
   source, up to the last one either side has, is a finding.
2. Where leaves differ, or roots do, all leaves of the batch are fetched from both sides and held against the
   root that side has signed, here, on this machine. What does not fit is the finding, and names no tuple.
3. Named are hashes that one side alone has, in batches that fit on both sides, with their position in their
   partition, which the root proves. So a database can neither invent a difference nor hide one: nothing that
   is not signed is used but the number of a target's partition, which only decides what stands beside what.
4. Sizes are the manifest's, never what a side says.

What a side does not keep (any more) is said. Whether two hashes are one record altered, or one missing and
one extra, no root says: they are taken for one where they stand between the same neighbours.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest

from vsql_shared.audit.entries import (
    BATCH_APPLIED,
    BATCH_SKIPPED,
    BY_ROW,
    ORDER,
    REPLICATION_BATCH,
    AuditEntry,
)
from vsql_shared.audit.leaf_answers import Kept
from vsql_shared.audit.leaves import hashes, sub_root
from vsql_shared.audit.merkle import HASH_SIZE, batch_root
from vsql_shared.changes import PartLeaves
from vsql_shared.errors import ChainError, RecordError

ALTERED, MISSING, EXTRA = "altered", "missing", "extra"
MAX_NAMED = 10_000
"""Records that are named; beyond it "more" is said."""


@dataclass(frozen=True, slots=True)
class Divergent:
    """A sealed record: altered, missing at the target, or extra there.

    `position`: its place among the batch's records of that partition, from 0: at the source, of an extra one
    at the target. `offsets`: where in Kafka the packs of its batch and partition lie, the first and the last.
    """

    what: str
    batch: int
    sequence: int
    topic: str
    partition: int
    position: int
    offsets: tuple[int, int]
    source_leaf: str | None
    target_leaf: str | None


@dataclass(frozen=True, slots=True)
class Unfit:
    """Kept leaves that are not what their node has signed; or a node's signed words that contradict."""

    node: str
    batch: int
    sequence: int
    what: str


@dataclass(frozen=True, slots=True)
class Batches:
    """Batches that follow each other."""

    first: int
    last: int


@dataclass(slots=True)
class Divergence:
    """What was found in a range of batches of one stream, between its source and one target."""

    chain: str
    source: str
    target: str
    first: int
    last: int
    batches: int = 0
    """Manifests of the range."""
    rooted: int = 0
    """Batches of which the target has signed a root: only of these anything can be said."""
    compared: int = 0
    """Batches whose leaves both sides keep."""
    tuples: int = 0
    """Sealed records of those by their manifests, descriptors and pieces among them."""
    exchanges: int = 0
    """Questions the peer was asked."""
    differing_roots: list[Batches] = field(default_factory=list)
    divergent: list[Divergent] = field(default_factory=list)
    more: bool = False
    """More differs than is named."""
    unfit: list[Unfit] = field(default_factory=list)
    not_kept: dict[str, list[Batches]] = field(default_factory=dict)
    """Node → batches of which it keeps no leaves."""
    unanswered: list[Batches] = field(default_factory=list)
    """Batches the target has computed no root of: under way, abandoned, covered by its first copy."""
    skipped: list[Batches] = field(default_factory=list)
    """Batches an operator had the target skip."""
    no_manifest: list[Batches] = field(default_factory=list)
    """Batches the source's database has left out: later ones are there, or the target has signed them."""

    @property
    def ok(self) -> bool:
        """Nothing differs, as far as could be compared."""
        return not (self.differing_roots or self.divergent or self.unfit or self.more or self.no_manifest)

    @property
    def complete(self) -> bool:
        """Every batch of the range has a root of both sides."""
        return self.rooted == self.last - self.first + 1


@dataclass(frozen=True, slots=True)
class Pair:
    """A manifest and its acknowledgement, both verified by signature; None: there is none."""

    manifest: AuditEntry
    ack: AuditEntry | None

    @property
    def rooted(self) -> bool:
        """Whether the target has computed a root of its own."""
        return self.ack is not None and self.ack.event_type == BATCH_APPLIED

    @property
    def skipped(self) -> bool:
        """Whether an operator had the target skip it."""
        return self.ack is not None and self.ack.event_type == BATCH_SKIPPED

    @property
    def answered(self) -> bool:
        """Whether the target has signed what became of the batch."""
        return self.rooted or self.skipped

    @property
    def by_members(self) -> bool:
        """Whether several may have applied it, each some of its partitions."""
        return bool(json.loads(self.manifest.detail).get(ORDER) == BY_ROW)

    @property
    def differs(self) -> bool:
        """Whether it is another one."""
        return self.rooted and self.ack is not None and self.ack.merkle_root != self.manifest.merkle_root


def pair(
    found: Divergence, manifests: Iterable[tuple[AuditEntry, bytes]], acks: Iterable[AuditEntry]
) -> list[Pair]:
    """Bring each manifest of the range (with its hash) together with its acknowledgement.

    Notes what can be said without leaves. Raises ChainError for entries that cannot be of one chain.
    """
    answers: dict[int, AuditEntry] = {}
    for answer in acks:
        if answer.ref_sequence and answers.setdefault(answer.batch, answer) is not answer:
            where = f"{answer.chain}/{answer.sequence}"
            raise ChainError(f"batch {answer.batch} is acknowledged twice", record=where)
    pairs: list[Pair] = []
    for manifest, entry_hash in manifests:
        where = f"{manifest.chain}/{manifest.sequence}"
        if manifest.event_type != REPLICATION_BATCH or manifest.chain != found.chain:
            raise ChainError("an entry that is no manifest of this chain", record=where)
        if pairs and manifest.batch <= pairs[-1].manifest.batch:
            raise ChainError(f"batch {manifest.batch} is not in its order", record=where)
        one = Pair(manifest, answers.get(manifest.batch))
        pairs.append(one)
        if one.ack is None or not one.answered:
            continue
        if (one.ack.ref_sequence, one.ack.ref_hash) != (manifest.sequence, entry_hash):
            what = "its acknowledgement names another manifest: run `syncctl audit verify`"
            found.unfit.append(Unfit(found.target, manifest.batch, manifest.sequence, what))
    there = {one.manifest.batch for one in pairs}
    signed = {batch for batch, one in answers.items() if one.event_type in (BATCH_APPLIED, BATCH_SKIPPED)}
    upto = max(there | signed, default=0)
    found.no_manifest = runs(number for number in range(found.first, upto + 1) if number not in there)
    found.batches, found.rooted = len(pairs), sum(one.rooted for one in pairs)
    found.differing_roots = runs(one.manifest.batch for one in pairs if one.differs)
    found.skipped = runs(one.manifest.batch for one in pairs if one.skipped)
    found.unanswered = runs(one.manifest.batch for one in pairs if not one.answered)
    return pairs


def comparable(
    found: Divergence, pairs: Sequence[Pair], source: Mapping[int, Kept], target: Mapping[int, Kept]
) -> list[Pair]:
    """Batches whose leaves can be compared; `source`, `target`: what each says it keeps (by sequence)."""
    rooted = [one for one in pairs if one.rooted]
    for node, kept in ((found.source, source), (found.target, target)):
        gone = runs(one.manifest.batch for one in rooted if one.manifest.sequence not in kept)
        if gone:
            found.not_kept[node] = gone
    both = [one for one in rooted if one.manifest.sequence in source and one.manifest.sequence in target]
    found.compared = len(both)
    found.tuples = sum(one.manifest.record_count for one in both)
    return [one for one in both if _has_its_size(found, one, source, target)]


def _has_its_size(
    found: Divergence, one: Pair, source: Mapping[int, Kept], target: Mapping[int, Kept]
) -> bool:
    """Whether both sides keep as much as was signed; of a target with another root nobody knows how much."""
    manifest, fits = one.manifest, True
    for node, kept in ((found.source, source), (found.target, target)):
        nbytes = kept[manifest.sequence].nbytes
        expected = manifest.record_count * HASH_SIZE
        may_be_other = node == found.target and (one.differs or (one.by_members and nbytes < expected))
        if nbytes != expected and not may_be_other:
            fits = False
            _unfit(found, one, node, f"{nbytes} bytes of leaves for {manifest.record_count} records")
    return fits


def affordable(
    found: Divergence, suspect: Iterable[Pair], target: Mapping[int, Kept], most: int
) -> list[Pair]:
    """Batches whose leaves may be fetched, `most` bytes of either side; those whose roots differ go first."""
    left, out = most, []
    for one in sorted(suspect, key=lambda one: not one.differs):
        said = target[one.manifest.sequence].nbytes
        size = max(said, one.manifest.record_count * HASH_SIZE)
        if said > most and one.differs:
            _unfit(found, one, found.target, f"{said} bytes of leaves, {most} are fetched at most")
        if size > left:
            found.more = True
        else:
            left -= size
            out.append(one)
    return sorted(out, key=lambda one: one.manifest.batch)


def judge(found: Divergence, one: Pair, source: Sequence[PartLeaves], target: Sequence[PartLeaves]) -> None:
    """Step 2 and 3 for one batch whose leaves were fetched from both sides."""
    believed = [_believed(found, one, found.source, source)]
    if _is_in_part(one, target):
        found.not_kept.setdefault(found.target, []).append(Batches(one.manifest.batch, one.manifest.batch))
        return
    believed.append(_believed(found, one, found.target, target))
    if all(believed):
        _name(found, one, source, target)


def _believed(found: Divergence, one: Pair, node: str, parts: Sequence[PartLeaves]) -> bool:
    """Whether a side's leaves are what it has signed; a finding where they are not."""
    check = _source_problem if node == found.source else _target_problem
    try:
        what = check(one, parts)
    except RecordError as error:
        what = error.message
    if what is not None:
        _unfit(found, one, node, what)
    return what is None


def _is_in_part(one: Pair, parts: Sequence[PartLeaves]) -> bool:
    """Whether a target with the same root keeps some of a batch: members keep apart, and it goes apart."""
    signed = one.manifest.partitions
    if one.differs or not one.by_members or not 0 < len({part.part for part in parts}) < len(signed):
        return False
    known = all(
        part.part < len(signed) and 0 < len(part.leaves) == signed[part.part].records * HASH_SIZE
        for part in parts
    )
    return known and all(sub_root(part) == signed[part.part].sub_root for part in parts)


def _unfit(found: Divergence, one: Pair, node: str, what: str) -> None:
    text = f"the leaves kept of it do not fit the root node {node} has signed: {what}"
    found.unfit.append(Unfit(node, one.manifest.batch, one.manifest.sequence, text))


def _source_problem(one: Pair, parts: Sequence[PartLeaves]) -> str | None:
    """A manifest has the root of each topic-partition."""
    signed = one.manifest.partitions
    if [part.part for part in parts] != list(range(len(signed))):
        return f"{len(parts)} topic-partitions, the manifest has {len(signed)}"
    for kept, root in zip(parts, signed, strict=True):
        if len(kept.leaves) != root.records * HASH_SIZE:
            records = len(kept.leaves) // HASH_SIZE
            return f"{records} records in {root.topic}/{root.partition}, the manifest has {root.records}"
        if sub_root(kept) != root.sub_root:
            return f"another root in {root.topic}/{root.partition}"
    return None


def _target_problem(one: Pair, parts: Sequence[PartLeaves]) -> str | None:
    """An acknowledgement has the root over all of them."""
    if any(left.part == right.part for left, right in pairwise(parts)):
        return "a topic-partition twice"
    if one.ack is None or batch_root([sub_root(part) for part in parts]) != one.ack.merkle_root:
        return "another root"
    if not one.differs and [part.part for part in parts] != list(range(len(parts))):
        return "other numbers of topic-partitions"
    return None


def _name(found: Divergence, one: Pair, source: Sequence[PartLeaves], target: Sequence[PartLeaves]) -> None:
    """Hashes that one side alone has. With equal roots there are none."""
    if not one.differs:
        return
    ours = {part.part: hashes(part) for part in source}
    theirs = {part.part: hashes(part) for part in target}
    both = {digest for kept in ours.values() for digest in kept}
    both.intersection_update(digest for kept in theirs.values() for digest in kept)
    alone = False
    for part in sorted(ours.keys() | theirs.keys()):
        left, right = _gaps(ours.get(part, ()), both), _gaps(theirs.get(part, ()), both)
        for gap in sorted(left.keys() | right.keys()):
            for mine, other in zip_longest(left.get(gap, ()), right.get(gap, ())):
                alone = True
                if len(found.divergent) >= MAX_NAMED:
                    found.more = True
                    return
                found.divergent.append(_divergent(one.manifest, part, mine, other))
    if not alone:
        text = "the same records in another order, or in another number"
        found.unfit.append(Unfit(found.target, one.manifest.batch, one.manifest.sequence, text))


_Placed = tuple[int, bytes]
"""A position in a partition, and the hash that stands there."""


def _gaps(kept: Sequence[bytes], both: Container[bytes]) -> dict[int, list[_Placed]]:
    """Hashes that are not on both sides, by how many before them are."""
    found: dict[int, list[_Placed]] = {}
    shared = 0
    for position, digest in enumerate(kept):
        if digest in both:
            shared += 1
        else:
            found.setdefault(shared, []).append((position, digest))
    return found


def _divergent(manifest: AuditEntry, part: int, source: _Placed | None, target: _Placed | None) -> Divergent:
    known = manifest.partitions[part] if part < len(manifest.partitions) else None
    position, _ = source or target or (-1, b"")
    return Divergent(
        ALTERED if source and target else MISSING if source else EXTRA,
        manifest.batch,
        manifest.sequence,
        known.topic if known else "",
        known.partition if known else -1,
        position,
        (known.first_offset, known.last_offset) if known else (-1, -1),
        source[1].hex() if source else None,
        target[1].hex() if target else None,
    )


def runs(batches: Iterable[int]) -> list[Batches]:
    """Numbers in ascending order as runs without a gap."""
    out: list[Batches] = []
    for batch in batches:
        if out and out[-1].last + 1 == batch:
            out[-1] = Batches(out[-1].first, batch)
        else:
            out.append(Batches(batch, batch))
    return out
