"""Takes columns out of rows as pgoutput wrote them, which the WAL holds and an operator took out. Pure.

PostgreSQL decodes each WAL record under the publication of that record's time, so a backlog has columns that
were taken out since. Not here: which ones (relations.py). Rules:

* Only rows of tables that have such a column come here: all others are sealed without being parsed.
* A row that does not have exactly the columns its table was described with raises DecodeError.
"""

from __future__ import annotations

from collections.abc import Collection

from vsql_producers.pgoutput import PLAINTEXT_AT
from vsql_shared.errors import DecodeError

_NULL, _UNCHANGED, _TEXT, _BINARY = b"nutb"
_TUPLES = frozenset(b"KON")


class Projection:
    """Keeps some columns of one table's rows; `kept` are their places, of `columns` there are."""

    def __init__(self, columns: int, kept: Collection[int]) -> None:
        self._columns = columns
        self._kept = [place in kept for place in range(columns)]
        self._count = sum(self._kept).to_bytes(2, "big")

    def __call__(self, frame: bytes) -> bytes:
        """A frame of INSERT, UPDATE or DELETE without the other columns. Raises DecodeError."""
        parts, at = [frame[:PLAINTEXT_AT]], PLAINTEXT_AT
        while at < len(frame):
            if frame[at] not in _TUPLES:
                raise DecodeError(f"a row with a part of kind {frame[at]}, expected K, O or N")
            at = self._tuple(frame, at, parts)
        if len(parts) == 1:
            raise DecodeError("a row without a tuple")
        return b"".join(parts)

    def _tuple(self, frame: bytes, at: int, parts: list[bytes]) -> int:
        """Append one tuple's kept columns; where the next one begins."""
        count = int.from_bytes(frame[at + 1 : at + 3], "big")
        if count != self._columns or len(frame) < at + 3:
            raise DecodeError(f"a row of {count} columns, its table was described with {self._columns}")
        parts += (frame[at : at + 1], self._count)
        at += 3
        for keep in self._kept:
            end = _column_end(frame, at)
            if keep:
                parts.append(frame[at:end])
            at = end
        return at


def _column_end(frame: bytes, at: int) -> int:
    """Where the column that begins at `at` ends."""
    kind = frame[at] if at < len(frame) else 0
    if kind in (_NULL, _UNCHANGED):
        return at + 1
    if kind not in (_TEXT, _BINARY):
        raise DecodeError(f"a row has a column of kind {kind}, expected n, u, t or b")
    end = at + 5 + int.from_bytes(frame[at + 1 : at + 5], "big")
    if end > len(frame) or at + 5 > len(frame):
        raise DecodeError("a row ends inside of a column")
    return end
