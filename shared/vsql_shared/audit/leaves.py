"""Leaf hashes a side keeps of its batches: how they lie in bytes, and which root they give.

Not here: where they are kept (leaf_store.py) and how two sides are compared (divergence.py).
Pure. Rules:

* One value for each topic-partition of a batch: 32 bytes a record, in the order of the partition, so that its
  RFC 9162 root is what was signed. Beside it the index of each record in the batch, 4 bytes; where they
  follow each other, as they do in a batch of one table, the first alone.
* The root covers hashes and their order. The indexes beside them only say which change is meant; the hash of
  a record holds its index, too, but nobody can read it there.
* What was kept may have been altered since: bytes that do not fit each other are refused (RecordError).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from vsql_shared.audit.merkle import HASH_SIZE, root
from vsql_shared.changes import PartLeaves
from vsql_shared.errors import RecordError

INDEX_SIZE = 4
_MAX_INDEX = (1 << 32) - 1


class Place(NamedTuple):
    """Where a tuple stands: its manifest's sequence, its partition's place there, its index in the batch."""

    sequence: int
    part: int
    number: int


class Leaf(NamedTuple):
    """A tuple's leaf hash and its place."""

    digest: bytes
    place: Place


def part_leaves(part: int, leaves: Sequence[bytes], indexes: Sequence[int]) -> PartLeaves:
    """What is kept of one topic-partition: its place in the manifest, hashes and indexes in its order."""
    first, count = indexes[0], len(indexes)
    # A comparison of lists costs a tenth of what packing costs, and is true for most batches.
    if indexes == list(range(first, first + count)):
        return PartLeaves(part, b"".join(leaves), first.to_bytes(INDEX_SIZE, "big"))
    return PartLeaves(part, b"".join(leaves), struct.pack(f">{count}I", *indexes))


def hashes(kept: PartLeaves) -> list[bytes]:
    """The leaf hashes in the order of the partition. Raises RecordError."""
    size = len(kept.leaves)
    if not size or size % HASH_SIZE:
        raise RecordError(f"leaves of {size} bytes, a hash has {HASH_SIZE}")
    return [kept.leaves[at : at + HASH_SIZE] for at in range(0, size, HASH_SIZE)]


def sub_root(kept: PartLeaves) -> bytes:
    """The root of one topic-partition. Raises RecordError."""
    return root(hashes(kept))


def as_leaves(sequence: int, kept: PartLeaves) -> list[Leaf]:
    """Leaves with their places. Raises RecordError."""
    found = hashes(kept)
    return [
        Leaf(digest, Place(sequence, kept.part, index))
        for digest, index in zip(found, _indexes(kept.indexes, len(found)), strict=True)
    ]


def _indexes(encoded: bytes, count: int) -> Sequence[int]:
    if len(encoded) == INDEX_SIZE:
        first = int.from_bytes(encoded, "big")
        if first + count - 1 > _MAX_INDEX:
            raise RecordError(f"indexes beyond {_MAX_INDEX}")
        return range(first, first + count)
    if len(encoded) != count * INDEX_SIZE:
        raise RecordError(f"{len(encoded)} bytes of indexes beside {count} leaves")
    return struct.unpack(f">{count}I", encoded)
