"""What source and target say of a range of batches, and in which sealed records they differ.

Not here: asking databases (leaf_diff.py). Pure. What is called proven, and why:

1. Manifests and acknowledgements are signed; their signatures were verified before they come here. Where both
   have one root, nothing differs: whatever lies in the tables of leaves.
2. Where leaves differ, or roots do, all leaves of the batch are fetched from both sides and held against the
   root that side has signed, here, on this machine. What does not fit is the finding, and names no tuple.
3. Named are the leaves of which one side has a place or a hash the other has not, in batches that fit on both
   sides. So a database can neither invent a difference nor hide one.

What a side does not keep (any more) is said. A place in a partition is proven by the root; the index beside
it is what that side says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from vsql_shared.audit.entries import BATCH_APPLIED, BATCH_SKIPPED, REPLICATION_BATCH, AuditEntry
from vsql_shared.audit.leaf_answers import Kept
from vsql_shared.audit.leaves import Leaf, Place, as_leaves, sub_root
from vsql_shared.audit.merkle import HASH_SIZE, batch_root
from vsql_shared.changes import PartLeaves
from vsql_shared.errors import ChainError, RecordError

ALTERED, MISSING, EXTRA = "altered", "missing", "extra"


@dataclass(frozen=True, slots=True)
class Divergent:
    """A sealed record: altered, missing at the target, or extra there.

    `offsets`: where in Kafka the packs of its batch and partition lie, the first and the last.
    """

    what: str
    batch: int
    sequence: int
    topic: str
    partition: int
    index: int
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
    compared: int = 0
    """Batches whose leaves both sides keep."""
    tuples: int = 0
    """Sealed records of those, descriptors and pieces among them."""
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

    @property
    def ok(self) -> bool:
        """Nothing differs, as far as could be compared."""
        return not (self.differing_roots or self.divergent or self.unfit or self.more)


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
        if one.ack is None or not (one.rooted or one.skipped):
            continue
        if (one.ack.ref_sequence, one.ack.ref_hash) != (manifest.sequence, entry_hash):
            what = "its acknowledgement names another manifest: run `syncctl audit verify`"
            found.unfit.append(Unfit(found.target, manifest.batch, manifest.sequence, what))
    found.batches = len(pairs)
    found.differing_roots = runs(one.manifest.batch for one in pairs if one.differs)
    found.skipped = runs(one.manifest.batch for one in pairs if one.skipped)
    found.unanswered = runs(one.manifest.batch for one in pairs if not one.rooted and not one.skipped)
    return pairs


def comparable(
    found: Divergence, pairs: Sequence[Pair], source: Mapping[int, Kept], target: Mapping[int, Kept]
) -> list[Pair]:
    """Batches of which both sides keep leaves; `source`, `target`: what each says it keeps (by sequence)."""
    rooted = [one for one in pairs if one.rooted]
    for node, kept in ((found.source, source), (found.target, target)):
        gone = runs(one.manifest.batch for one in rooted if one.manifest.sequence not in kept)
        if gone:
            found.not_kept[node] = gone
    both = [one for one in rooted if one.manifest.sequence in source and one.manifest.sequence in target]
    found.compared = len(both)
    found.tuples = sum(source[one.manifest.sequence].nbytes // HASH_SIZE for one in both)
    return both


def judge(found: Divergence, one: Pair, source: Sequence[PartLeaves], target: Sequence[PartLeaves]) -> None:
    """Step 2 and 3 for one batch whose leaves were fetched from both sides."""
    ours = _believed(found, one, found.source, source)
    theirs = _believed(found, one, found.target, target)
    if ours is not None and theirs is not None:
        _name(found, one, ours, theirs)


def _believed(found: Divergence, one: Pair, node: str, parts: Sequence[PartLeaves]) -> frozenset[Leaf] | None:
    """A side's leaves; None, and a finding, where they are not what it has signed."""
    manifest = one.manifest
    check = _source_problem if node == found.source else _target_problem
    try:
        what = check(one, parts)
        if what is None:
            return frozenset(leaf for part in parts for leaf in as_leaves(manifest.sequence, part))
    except RecordError as error:
        what = error.message
    text = f"the leaves kept of it do not fit the root node {node} has signed: {what}"
    found.unfit.append(Unfit(node, manifest.batch, manifest.sequence, text))
    return None


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
    return None


def _name(found: Divergence, one: Pair, ours: frozenset[Leaf], theirs: frozenset[Leaf]) -> None:
    """Leaves that one side alone has."""
    left, right = _by_place(ours - theirs), _by_place(theirs - ours)
    for place in sorted(left.keys() | right.keys()):
        what = ALTERED if place in left and place in right else MISSING if place in left else EXTRA
        found.divergent.append(_divergent(one.manifest, what, place, left.get(place), right.get(place)))
    if one.differs and not left and not right:
        text = "the same records in another order"
        found.unfit.append(Unfit(found.target, one.manifest.batch, one.manifest.sequence, text))


def _by_place(leaves: Iterable[Leaf]) -> dict[Place, bytes]:
    return {leaf.place: leaf.digest for leaf in leaves}


def _divergent(
    manifest: AuditEntry, what: str, place: Place, source: bytes | None, target: bytes | None
) -> Divergent:
    known = manifest.partitions[place.part] if place.part < len(manifest.partitions) else None
    return Divergent(
        what,
        manifest.batch,
        manifest.sequence,
        known.topic if known else "",
        known.partition if known else -1,
        place.number,
        (known.first_offset, known.last_offset) if known else (-1, -1),
        source.hex() if source else None,
        target.hex() if target else None,
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
