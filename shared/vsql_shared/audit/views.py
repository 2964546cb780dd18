"""Two targets of one source compare what each was shown: a source that shows two histories is found.

Not here: source against target (compare.py), checkpoints (checkpoint.py), verifying either trail (verify.py;
do that first, because this module believes the entries it is given). Rules:

* An acknowledgement names its manifest's hash, and each entry has the hash of the one before: two targets
  that acknowledge one manifest have seen one history up to it.
* Where they name different ones for one sequence, the two acknowledgements prove the split, each signed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from vsql_shared.audit.compare import ack_target, chain_names
from vsql_shared.audit.entries import ZERO_HASH
from vsql_shared.audit.store import iterate
from vsql_shared.audit.verify import Problem

if TYPE_CHECKING:
    from vsql_shared.audit.rows import StoredDocument
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
        if one[0] == two[0] and one[1] != two[1]:
            what = (
                f"split view: the source showed two histories: {own} acknowledges entry {one[0]} with hash "
                f"{one[1].hex()}, {other} with {two[1].hex()}; keep both acknowledgements, they prove it"
            )
            return Problem(stream, one[0], None, what)
        # The one that is behind goes on; both where they agree.
        behind = one[0] - two[0]
        one = next(left, None) if behind <= 0 else one
        two = next(right, None) if behind >= 0 else two
    return None


def _named(acks: Iterable[StoredDocument]) -> Iterator[tuple[int, bytes]]:
    """The manifests acknowledgements name, each once and in order; batches skipped unread name none."""
    last = 0
    for stored in acks:
        sequence, named = stored.entry.ref_sequence, stored.entry.ref_hash
        if sequence > last and named != ZERO_HASH:
            last = sequence
            yield sequence, named
