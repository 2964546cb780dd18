"""Which partition a row's changes go to: by HMAC-SHA-256 of its identity, so that the order per row is kept.

Pure. Not here: which tables may be spread (vsql_shared/pg/row_order.py). Rules (docs/design/0015):

* The index key is random, one per epoch, and never leaves this process: nobody else needs it, because a
  record says its partition. Each table has a key of its own, so equal keys of two tables look unlike.
* The identity's bytes are taken as they are sent. So only types are spread whose equal values have equal
  bytes, and a session never changes between text and binary.
* A change without a place (another operation, a key that changed or is not there) has none: its batch is
  applied alone, in the order of the source, and its partition says nothing.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence

from vsql_producers.pgoutput import KIND_AT, PLAINTEXT_AT
from vsql_shared.changes import Op, TableName

INDEX_KEY_SIZE = 32
NO_PLACE = -1
_COUNT, _LENGTH = struct.Struct(">H"), struct.Struct(">I")
_NEW, _KEY = ord("N"), ord("K")
_NULL, _UNCHANGED, _TEXT, _BINARY = ord("n"), ord("u"), ord("t"), ord("b")
_FIRST, _FIRST_AT = (0,), PLAINTEXT_AT + 3
_WRITES, _VALUES = (Op.INSERT, Op.UPDATE), (_TEXT, _BINARY)
_LABEL = b"vsql-sync row order\0"


class Spread:
    """The partitions of one epoch."""

    def __init__(self, index_key: bytes, partitions: int) -> None:
        """`index_key`: INDEX_KEY_SIZE random bytes, of this epoch alone."""
        if len(index_key) != INDEX_KEY_SIZE:
            raise ValueError(f"an index key has {INDEX_KEY_SIZE} bytes")
        self._index_key, self.partitions = index_key, partitions
        self._tables: dict[TableName, bytes] = {}

    def place(self, table: TableName, key: Sequence[int], frame: bytes) -> int:
        """The partition of a change whose identity are columns `key`; NO_PLACE where it has none."""
        identity = identity_of(frame, key)
        if identity is None:
            return NO_PLACE
        table_key = self._tables.get(table) or self._table_key(table)
        digest = hmac.digest(table_key, identity, "sha256")
        return int.from_bytes(digest[:8]) % self.partitions

    def _table_key(self, table: TableName) -> bytes:
        # Neither name holds a NUL.
        named = _LABEL + table.schema.encode() + b"\0" + table.table.encode()
        found = self._tables[table] = hmac.digest(self._index_key, named, "sha256")
        return found


def identity_of(frame: bytes, key: Sequence[int]) -> bytes | None:
    """The bytes of a row's identity columns; None where the frame is no change of one row."""
    try:
        return _identity(frame, key)
    except (IndexError, struct.error):
        return None  # whatever it is, it is sealed as it is, and refused where it is parsed


def _identity(frame: bytes, key: Sequence[int]) -> bytes | None:
    op, kind = frame[KIND_AT], frame[PLAINTEXT_AT]
    if key == _FIRST and kind == _NEW and op in _WRITES and frame[_FIRST_AT] in _VALUES:
        # Most tables' key is one column, the first: cut out without reading the rest.
        end = _FIRST_AT + 5 + int.from_bytes(frame[_FIRST_AT + 1 : _FIRST_AT + 5])
        return frame[_FIRST_AT + 1 : end] if end <= len(frame) else None
    if op == Op.INSERT and kind == _NEW:
        return _joined(_columns(frame, PLAINTEXT_AT + 1, key)[0])
    if op == Op.DELETE and kind == _KEY:
        return _joined(_columns(frame, PLAINTEXT_AT + 1, key)[0])
    if op != Op.UPDATE:
        return None
    if kind == _NEW:
        return _joined(_columns(frame, PLAINTEXT_AT + 1, key)[0])
    if kind != _KEY:
        return None
    old, end = _columns(frame, PLAINTEXT_AT + 1, key, whole=True)
    if frame[end] != _NEW:
        return None
    new, _ = _columns(frame, end + 1, key)
    # A key value that lies outside of its row is sent beside the new row, which says that it did not change.
    same = all(two in (one, b"u") for one, two in zip(old, new, strict=True))
    return _joined(old) if same else None


def _columns(frame: bytes, at: int, key: Sequence[int], *, whole: bool = False) -> tuple[list[bytes], int]:
    """Columns `key` (ascending) of the TupleData at `at`, length and bytes each; and where it was read to."""
    (count,) = _COUNT.unpack_from(frame, at)
    at += 2
    found: list[bytes] = []
    for column in range(count if whole else key[-1] + 1):
        kind = frame[at]
        end = at + 1
        if kind in (_BINARY, _TEXT):
            end += 4 + _LENGTH.unpack_from(frame, end)[0]
        if len(found) < len(key) and key[len(found)] == column:
            found.append(frame[at + 1 : end] if end > at + 1 else frame[at:end])
        at = end
    if len(found) != len(key) or at > len(frame):
        raise IndexError(count)
    return found, at


def _joined(columns: list[bytes]) -> bytes | None:
    """None where a value is missing: a length and bytes are four bytes at least, a mark is one."""
    return None if min(map(len, columns)) < 4 else b"".join(columns)
