"""Logical messages and sequences at the target: what arrives beside rows, written in their transaction.

Not here: rows. Rules (docs/design/0007):

* A message is emitted again, always as a transactional one: so it is there exactly if its rows are, and
  under the origin, so that no stream takes it for this node's own.
* A sequence is only ever set forward, before the commit: setval stays when the transaction does not, and
  being ahead harms nobody. It goes back only where the source's was set back, and only after the commit:
  a crash in between leaves it ahead.
* A value that is unsure is held against the rows: the column it belongs to, where an index gives its end.
* A sequence that is missing, locked away, too small, or runs the other way stops the stream, by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from psycopg import sql

from vsql_shared import names
from vsql_shared.changes import TableName
from vsql_shared.errors import DatabaseError
from vsql_shared.pg import sequences
from vsql_shared.pg.sequences import TargetSequence
from vsql_shared.wire.signals import (
    LogicalMessage,
    SequenceState,
    SequenceValue,
    decode_message,
    decode_sequence,
)

if TYPE_CHECKING:
    from vsql_shared.pg.connect import Connection

# Bytes and messages of one statement.
_EMIT_BYTES, _EMIT_MESSAGES = 1 << 20, 1_000

_EMIT = "SELECT pg_catalog.pg_logical_emit_message(true, p, c) FROM unnest(%s::text[], %s::bytea[]) u (p, c)"
_EMIT_ONE = "SELECT pg_catalog.pg_logical_emit_message(true, %s::text, %s::bytea)"
_BETWEEN = "UPDATE vsql_sync.apply_progress SET updated_at = updated_at WHERE chain = %s"
_LAST = (
    "SELECT o, pg_catalog.pg_sequence_last_value(o::pg_catalog.oid::pg_catalog.regclass)"
    " FROM unnest(%s::bigint[]) o"
)
_SET = (
    "SELECT pg_catalog.setval(o::pg_catalog.oid::pg_catalog.regclass, v, c)"
    " FROM unnest(%s::bigint[], %s::bigint[], %s::boolean[]) u (o, v, c)"
)
_REMEMBER = """
INSERT INTO vsql_sync.sequence_sync AS s
    (chain, sequence_schema, sequence_name, last_value, is_called, set_back)
SELECT %s, * FROM unnest(%s::text[], %s::text[], %s::bigint[], %s::boolean[], %s::bigint[])
ON CONFLICT (chain, sequence_schema, sequence_name) DO UPDATE SET last_value = excluded.last_value,
    is_called = excluded.is_called, set_back = s.set_back + excluded.set_back, applied_at = now()
"""
# Whether the end of an integer column is in an index.
_INDEXED = """
SELECT EXISTS (
    SELECT FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class x ON x.oid = i.indexrelid
    JOIN pg_catalog.pg_am m ON m.oid = x.relam AND m.amname = 'btree'
    JOIN pg_catalog.pg_class t ON t.oid = i.indrelid JOIN pg_catalog.pg_namespace n ON n.oid = t.relnamespace
    JOIN pg_catalog.pg_attribute a ON a.attrelid = t.oid AND a.attnum = i.indkey[0]
    WHERE n.nspname = %s AND t.relname = %s AND a.attname = %s AND a.atttypid IN (20, 21, 23)
      AND i.indisvalid AND i.indpred IS NULL)
"""

Set = tuple[int, int, bool]
"""What setval is given: sequence, value, whether it was given out."""


class Signals:
    """What the open transaction holds beside rows."""

    def __init__(self, conn: Connection, chain: str) -> None:
        self._conn, self._chain = conn, chain
        self._live_chain = names.live_chain_of(chain)
        self._values: dict[TableName, SequenceValue] = {}
        self._back: list[Set] = []
        self._emitted = False

    def emit(self, plaintexts: Sequence[bytes]) -> None:
        """Emit messages, in order. Raises DecodeError."""
        for some in _portions(plaintexts):
            if len(some) == 1:
                self._conn.execute(_EMIT_ONE, (some[0].prefix, some[0].content))
            else:
                self._conn.execute(_EMIT, ([m.prefix for m in some], [m.content for m in some]))
        self._emitted = True

    def before_rows(self) -> None:
        """Put something between a message and the rows behind it.

        Decoding orders the records of a transaction and its savepoints by position, a message by where it
        ends: a row that is written there, under a savepoint, may come out before it (tried on 15 and 18).
        """
        if self._emitted:
            self._emitted = False
            self._conn.execute(_BETWEEN, (self._chain,))

    def take(self, plaintext: bytes) -> None:
        """Take the value of a sequence; the last one of a transaction counts. Raises DecodeError."""
        value = decode_sequence(plaintext)
        before = self._values.get(value.name)
        if (
            before is not None
            and before.state is SequenceState.SET_BACK
            and value.state is SequenceState.AHEAD
        ):
            value = value._replace(state=SequenceState.SET_BACK)
        self._values[value.name] = value

    def before_commit(self) -> None:
        """Set the sequences forward, behind all rows of the transaction. Raises DatabaseError."""
        if not self._values:
            return
        values = list(self._values.values())
        found = sequences.find(self._conn, [(value.name, value.owner) for value in values])
        here = [(value, _usable(value, found.get(value.name))) for value in values]
        oids = [target.oid for _, target in here]
        last: dict[int, int | None] = dict(self._conn.execute(_LAST, (oids,)).fetchall())
        forward: list[Set] = []
        for value, target in here:
            reached = last[target.oid]
            if value.state is SequenceState.SET_BACK:
                # Forward all the same: it may have gone on beyond what this one has reached.
                self._back.append((target.oid, value.last_value, value.is_called))
            unsure = value.state is SequenceState.UNSURE
            to_be = self._with_rows(value, target) if unsure else value
            if must_set(to_be, reached):
                forward.append((target.oid, to_be.last_value, to_be.is_called))
        self._set(forward)
        self._remember(values)
        self._values.clear()

    def after_commit(self) -> None:
        """Follow the source where its sequences were set back; what fails here leaves them ahead."""
        back, self._back, self._emitted = self._back, [], False
        self._set(back)

    def forget(self) -> None:
        """The transaction was rolled back."""
        self._values.clear()
        self._back.clear()
        self._emitted = False

    def _set(self, sets: list[Set]) -> None:
        if sets:
            self._conn.execute(_SET, tuple(map(list, zip(*sets, strict=True))))

    def _remember(self, values: list[SequenceValue]) -> None:
        self._conn.execute(
            _REMEMBER,
            (
                self._live_chain,
                [value.name.schema for value in values],
                [value.name.table for value in values],
                [value.last_value for value in values],
                [value.is_called for value in values],
                [int(value.state is SequenceState.SET_BACK) for value in values],
            ),
        )

    def _with_rows(self, value: SequenceValue, target: TargetSequence) -> SequenceValue:
        """The value, or the farthest the rows here have used, if that is farther."""
        if not value.owner:
            return value
        row = self._conn.execute(_INDEXED, value.owner).fetchone()
        if row is None or not row[0]:
            return value
        query = sql.SQL("SELECT {}({})::bigint FROM {} WHERE {} BETWEEN {} AND {}").format(
            sql.SQL("pg_catalog.max" if value.increment > 0 else "pg_catalog.min"),
            sql.Identifier(value.owner[2]),
            sql.Identifier(*value.owner[:2]),
            sql.Identifier(value.owner[2]),
            target.least,
            target.most,
        )
        row = self._conn.execute(query).fetchone()
        used = value._replace(last_value=row[0], is_called=True) if row and row[0] is not None else None
        return used if used is not None and must_set(used, _reached(value)) else value


def must_set(value: SequenceValue, reached: int | None) -> bool:
    """Whether a sequence that has reached so much (None: gave out nothing) is behind a value. Pure."""
    if reached is None:
        return True
    step = 1 if value.increment > 0 else -1
    return value.is_called and (value.last_value - reached) * step > 0


def _reached(value: SequenceValue) -> int | None:
    return value.last_value if value.is_called else None


def _portions(plaintexts: Sequence[bytes]) -> Iterator[list[LogicalMessage]]:
    """Messages of one statement each; a large one goes alone."""
    some: list[LogicalMessage] = []
    size = 0
    for text in plaintexts:
        if some and (size + len(text) > _EMIT_BYTES or len(some) >= _EMIT_MESSAGES):
            yield some
            some, size = [], 0
        some.append(decode_message(text))
        size += len(text)
    if some:
        yield some


def _usable(value: SequenceValue, target: TargetSequence | None) -> TargetSequence:
    """The target's sequence, if it can stand for the source's."""
    if target is None:
        raise DatabaseError(
            f"sequence {value.name} is not in the target database",
            hint="create it as on the source; the stream then goes on by itself",
        )
    if not target.allowed:
        raise DatabaseError(
            f"the consumer's role may not read and set sequence {target.name}",
            hint=f"GRANT SELECT, UPDATE ON SEQUENCE {target.name} TO vsql_sync_consumer",
        )
    if (target.increment > 0) != (value.increment > 0):
        raise DatabaseError(
            f"sequence {target.name} goes by {target.increment} here and by {value.increment} on the source",
            hint=f"ALTER SEQUENCE {target.name} INCREMENT BY a number with the source's sign",
        )
    if not target.least <= value.last_value <= target.most:
        raise DatabaseError(
            f"the source's value of sequence {target.name} lies beyond its bounds here,"
            f" {target.least} to {target.most}",
            hint=f"ALTER SEQUENCE {target.name} as on the source (AS bigint, MINVALUE, MAXVALUE)",
        )
    return target
