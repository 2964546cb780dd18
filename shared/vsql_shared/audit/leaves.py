"""Leaf hashes a side keeps of its batches: how they lie in bytes, and which root they give.

Not here: where they are kept (leaf_store.py) and how two sides are compared (divergence.py).
Pure. Rules:

* One value for each topic-partition of a batch: 32 bytes a record, in the order of the partition, so that its
  RFC 9162 root is what was signed. Nothing is kept beside them: it would be signed by nobody.
* What was kept may have been altered since: bytes that are no hashes are refused (RecordError).
"""

from __future__ import annotations

from collections.abc import Sequence

from vsql_shared.audit.merkle import HASH_SIZE, root
from vsql_shared.changes import PartLeaves
from vsql_shared.errors import RecordError


def part_leaves(part: int, leaves: Sequence[bytes]) -> PartLeaves:
    """What is kept of one topic-partition: its place in the manifest, hashes in its order."""
    return PartLeaves(part, b"".join(leaves))


def hashes(kept: PartLeaves) -> list[bytes]:
    """The leaf hashes in the order of the partition. Raises RecordError."""
    size = len(kept.leaves)
    if not size or size % HASH_SIZE:
        raise RecordError(f"leaves of {size} bytes, a hash has {HASH_SIZE}")
    return [kept.leaves[at : at + HASH_SIZE] for at in range(0, size, HASH_SIZE)]


def sub_root(kept: PartLeaves) -> bytes:
    """The root of one topic-partition. Raises RecordError."""
    return root(hashes(kept))
