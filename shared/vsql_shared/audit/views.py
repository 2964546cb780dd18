"""Two targets of one source compare what each was shown: a source that shows two histories is found.

Not here: source against target (compare.py), checkpoints (checkpoint.py), verifying either trail (verify.py;
do that first, because this module believes the entries it is given). Rules:

* An acknowledgement names its manifest's hash, and each entry has the hash of the one before: two targets
  that acknowledge one manifest have seen one history up to it.
* In one history a batch stands at one sequence, and later batches at later ones. Where two acknowledgements
  say otherwise, or name different manifests for one sequence, they prove the split, each signed.
* Heads a target has cosigned (`checkpoint_cosigned`) are held against the source's own entries, in one pass.
  Of a pruned chain the head the target remembers is held, too: it binds the base to what this target was
  shown, whoever cosigned that base.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from vsql_shared.audit.bases import linked_start
from vsql_shared.audit.checkpoint import Checkpoint, Log, cosigned_in, split_view
from vsql_shared.audit.compare import ack_target, chain_names
from vsql_shared.audit.entries import CHECKPOINT_COSIGNED, ZERO_HASH, AuditEntry
from vsql_shared.audit.heads import entry_hashes, remembered_checkpoint
from vsql_shared.audit.rows import parse
from vsql_shared.audit.store import iterate
from vsql_shared.audit.tree import grow, root_of
from vsql_shared.audit.verify import Problem
from vsql_shared.errors import RefusedError
from vsql_shared.pg import nodes
from vsql_shared.pg.connect import errors

if TYPE_CHECKING:
    from vsql_shared.audit.rows import StoredDocument
    from vsql_shared.audit.tree import Tree
    from vsql_shared.pg.connect import Connection


def split_views(
    conn: Connection, peer: Connection, chain: str | None = None, skip: Collection[str] = ()
) -> list[Problem]:
    """The first split in each stream that this node and the peer both acknowledge.

    `skip` names chains that do not verify by themselves; `chain` a stream's, or one of acknowledgements.
    """
    here, there = _acknowledged(conn, skip), _acknowledged(peer, skip)
    found = []
    for stream in sorted(here.keys() & there.keys()):
        own, other = here[stream], there[stream]
        if own == other or chain not in (None, stream, own, other):
            continue
        problem = compare_views(stream, own, iterate(conn, own), other, iterate(peer, other))
        if problem is not None:
            found.append(problem)
    return found


def _acknowledged(conn: Connection, skip: Collection[str]) -> dict[str, str]:
    """Stream's chain → this node's chain of acknowledgements of it."""
    pairs = ((name, ack_target(name)) for name in chain_names(conn) if name not in skip)
    return {target[0]: name for name, target in pairs if target is not None}


def compare_views(
    stream: str, own: str, ours: Iterable[StoredDocument], other: str, theirs: Iterable[StoredDocument]
) -> Problem | None:
    """Walk two chains of acknowledgements side by side, in memory of one entry of each."""
    left, right = _named(ours), _named(theirs)
    one, two = next(left, None), next(right, None)
    while one is not None and two is not None:
        behind = _order(one.sequence, two.sequence)
        # Without the batches, entries put between the manifests of one history would keep both from meeting.
        if behind != _order(one.batch, two.batch) or (not behind and one.named != two.named):
            what = (
                f"split view: the source showed two histories: {own} acknowledges {one}, {other} {two}; "
                "keep both acknowledgements, they prove it"
            )
            return Problem(stream, one.sequence, None, what)
        # The one that is behind goes on; both where they agree.
        one = next(left, None) if behind <= 0 else one
        two = next(right, None) if behind >= 0 else two
    return None


class _Named(NamedTuple):
    """A manifest as an acknowledgement names it."""

    sequence: int
    batch: int
    named: bytes

    def __str__(self) -> str:
        return f"batch {self.batch} as entry {self.sequence} with hash {self.named.hex()}"


def _order(one: int, other: int) -> int:
    return (one > other) - (one < other)


def _named(acks: Iterable[StoredDocument]) -> Iterator[_Named]:
    """The manifests acknowledgements name, each once and in order; batches skipped unread name none."""
    last = 0
    for stored in acks:
        entry = stored.entry
        if entry.ref_sequence > last and entry.ref_hash != ZERO_HASH:
            last = entry.ref_sequence
            yield _Named(last, entry.batch, entry.ref_hash)


def compare_cosigned(
    source: Connection, target: Connection, chain: str | None = None, skip: Collection[str] = ()
) -> list[Problem]:
    """The first head, in each chain of acknowledgements of `target`, that `source`'s entries do not have."""
    streams = set(chain_names(source)) - set(skip)
    found = []
    for stream, acks in _acknowledged(target, skip).items():
        if stream in streams and chain in (None, stream, acks):
            cosigned = list(_cosigned(target, acks))
            problem = _first_wrong(source, target, stream, acks, cosigned)
            if problem is not None:
                found.append(problem)
    return found


class _Cosigned(NamedTuple):
    """A head in an entry of a chain of acknowledgements; `checkpoint` None where there is none to be read."""

    entry: AuditEntry
    checkpoint: Checkpoint | None


def _cosigned(conn: Connection, acks: str) -> Iterator[_Cosigned]:
    with errors("reading cosigned heads"):
        rows = conn.execute(
            "SELECT document FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND event_type = %s"
            " ORDER BY sequence",
            (acks, CHECKPOINT_COSIGNED),
        ).fetchall()
    for (document,) in rows:
        entry = parse(bytes(document)).entry
        yield _Cosigned(entry, cosigned_in(entry))


def _first_wrong(
    source: Connection, target: Connection, stream: str, acks: str, heads: list[_Cosigned]
) -> Problem | None:
    """One pass over the source's entries, stopping at each size that was cosigned.

    Heads below the source's base are passed over: what they were of is in the archive.
    """
    cluster = heads[0].entry.cluster if heads else nodes.local(source).cluster
    with source.transaction(), closing(entry_hashes(source, stream)) as hashes:
        base = linked_start(source, Log(cluster, stream))
        if not heads and not base.size:
            return None
        tree, size = base.tree, base.size
        for entry, claimed in heads:
            event = str(uuid.UUID(bytes=entry.event_id))
            if claimed is None or (claimed.log.cluster, claimed.log.chain) != (entry.cluster, stream):
                return Problem(acks, entry.sequence, event, f"cosigns no head of chain {stream}")
            if claimed.size < base.size:
                continue
            if claimed.size < size:
                what = f"cosigns {claimed.size} entries of chain {stream} after {size}"
                return Problem(acks, entry.sequence, event, what)
            for one in islice(hashes, claimed.size - size):
                tree, size = grow(tree, size, one), size + 1
            if size < claimed.size:
                what = f"cosigns {claimed.size} entries of chain {stream}, the source has {size}"
                return Problem(
                    acks,
                    entry.sequence,
                    event,
                    f"{what}: it was cut, it showed another history, or its producer was killed before it"
                    " stored what Kafka has (then start it, and verify again)",
                )
            if root_of(tree) != claimed.root:
                return Problem(acks, entry.sequence, event, split_view(claimed, _says(root_of(tree))).message)
        return _unbound(target, Log(cluster, stream), hashes, tree, size) if base.size else None


def _unbound(target: Connection, log: Log, hashes: Iterator[bytes], tree: Tree, size: int) -> Problem | None:
    """The rest of the pass, for a pruned chain: up to the head that the target remembers."""
    claimed = _remembered(target, log)
    if claimed is None or claimed.size < size:
        return None  # shorter: compare.py names it, or a head above the base has bound it
    for one in islice(hashes, claimed.size - size):
        tree, size = grow(tree, size, one), size + 1
    if size == claimed.size and root_of(tree) != claimed.root:
        return Problem(log.chain, size, None, split_view(claimed, _says(root_of(tree))).message)
    return None


def _remembered(target: Connection, log: Log) -> Checkpoint | None:
    """The head up to which a target has verified a chain, where it has one with its tree."""
    try:
        return remembered_checkpoint(target, log)
    except RefusedError:
        return None


def _says(root: bytes) -> str:
    return f"the source's entries have root {root.hex()}"
