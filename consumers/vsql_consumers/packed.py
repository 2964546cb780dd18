"""Values of wide rows on their way through a staging table: some dozens of them as one value of a row type.

A table has 1,600 columns at most and a row fits into a page, so the number of a set, old values and new ones
of a wide table do not fit side by side. A value of a row type is a long value like any other: PostgreSQL
compresses it and moves it out of the page. Pure. Format: PostgreSQL's record_recv (a count; for each field
its type's id, length and bytes).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from vsql_consumers.frames import NULL

# Old and new values of this many columns fit into a page whatever their types: a long one moves out of it,
# and leaves 24 bytes at most.
NARROW = 320
# To read one value the server unpacks all that are packed with it. Tried with a keyless table of 900 columns
# under FULL, on a busy machine: 0.6 s a change with one pack, 0.2 s with packs of 64.
_PACKED = 64
_COUNT, _OID = struct.Struct(">i"), struct.Struct(">I")


class RowType(NamedTuple):
    """A temporary table whose row type holds values of one side, by their numbers."""

    name: str
    side: str
    columns: tuple[int, ...]


def group(n: int) -> int:
    """With which others value n is packed."""
    return n // _PACKED


def pack(oids: Sequence[int], fields: Sequence[bytes | None]) -> bytes:
    """One field of binary COPY that holds these fields; what was not sent is NULL."""
    parts = [_COUNT.pack(len(fields))]
    for oid, value in zip(oids, fields, strict=True):
        parts += (_OID.pack(oid), NULL if value is None else value)
    packed = b"".join(parts)
    return _COUNT.pack(len(packed)) + packed
