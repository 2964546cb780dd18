"""The values that travel between stages. Pure data; no I/O, no knowledge of any stage.

A change keeps its tuple as the bytes pgoutput sent: they are sealed as they are and parsed only where
they are applied. Times are microseconds since 1970-01-01 UTC, positions are ints (lsn.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Op:
    """The one-byte `op` of a record, as an int. It says what the record's plaintext holds.

    INSERT, UPDATE, DELETE  pgoutput's message after the relation id: 'N' TupleData,
                            ('K'|'O' TupleData)?'N' TupleData, ('K'|'O') TupleData (manual, "Logical
                            Replication Message Formats")
    TRUNCATE                options byte (1 CASCADE, 2 RESTART IDENTITY), uint16 position, uint16 size of the
                            group of tables truncated by one statement; one record per table, same lsn
    COPY                    one row of binary COPY (int16 column count, then int32 length and bytes per
                            column)
    RELATION                Avro `Relation`: the descriptor; not a change, not counted in row_count
    MESSAGE                 pgoutput's message after its kind byte: flags (1 transactional), lsn, prefix,
                            length, content (wire/signals.py)
    SEQUENCE                Avro `SequenceValue`: how far a sequence of the source has got (wire/signals.py)
    PIECE                   bytes of a plaintext too large for one message; the next record of the same
                            table continues it, the last one carries the true op; not counted in row_count
    """

    INSERT = ord("I")
    UPDATE = ord("U")
    DELETE = ord("D")
    TRUNCATE = ord("T")
    COPY = ord("C")
    MESSAGE = ord("M")
    SEQUENCE = ord("S")
    RELATION = ord("R")
    PIECE = ord("P")


SIGNAL_OPS = frozenset({Op.MESSAGE, Op.SEQUENCE})
CHANGE_OPS = frozenset({Op.INSERT, Op.UPDATE, Op.DELETE, Op.TRUNCATE, Op.COPY}) | SIGNAL_OPS
ALL_OPS = CHANGE_OPS | {Op.RELATION, Op.PIECE}


class TableName(NamedTuple):
    """A table by its true names, unquoted."""

    schema: str
    table: str

    def __str__(self) -> str:
        return f"{quote_ident(self.schema)}.{quote_ident(self.table)}"


# What is no row travels as if it were of these: nobody can publish a table of pg_catalog.
MESSAGES = TableName("pg_catalog", "pg_logical_emit_message")
SEQUENCES = TableName("pg_catalog", "pg_sequences")
SIGNALS = {Op.MESSAGE: MESSAGES, Op.SEQUENCE: SEQUENCES}


def quote_ident(name: str) -> str:
    """Quote an identifier where SQL needs it (no keyword list: anything but [a-z_][a-z0-9_]* is quoted)."""
    plain = (
        name.isascii()
        and name.replace("_", "a").isalnum()
        and name == name.lower()
        and not name[:1].isdigit()
    )
    return name if plain and name else '"' + name.replace('"', '""') + '"'


class Transaction(NamedTuple):
    """A source transaction: xid, start LSN of its commit record, commit time."""

    xid: int
    commit_lsn: int
    commit_time: int


@dataclass(frozen=True, slots=True)
class Column:
    """A column as the source described it; `key` when it belongs to the replica identity."""

    name: str
    key: bool
    type_oid: int
    typmod: int
    type_name: str


@dataclass(frozen=True, slots=True)
class Relation:
    """A table as the source described it, with the salt that makes its hash unguessable."""

    name: TableName
    replica_identity: str
    columns: tuple[Column, ...]
    salt: bytes = b"\0" * 16


@dataclass(frozen=True, slots=True)
class PartitionRoot:
    """What a manifest says of one topic-partition. Offsets are inclusive."""

    topic: str
    partition: int
    first_offset: int
    last_offset: int
    packs: int
    records: int
    sub_root: bytes


@dataclass(slots=True)
class OpenedBatch:
    """A verified and opened batch, in source order.

    Parallel lists with one item per change: PIECEs are joined, RELATIONs taken out into `relations`
    (hash → descriptor).
    """

    chain: str
    epoch: int
    batch: int
    sequence: int
    entry_hash: bytes
    lsn_start: int
    lsn_end: int
    row_count: int
    merkle_root: bytes
    continues: bool
    transactions: list[Transaction] = field(default_factory=list)
    relations: dict[bytes, Relation] = field(default_factory=dict)
    # one item per change, ordered by index in batch
    tx_of: list[int] = field(default_factory=list)
    ops: list[int] = field(default_factory=list)
    relation_of: list[bytes] = field(default_factory=list)
    plaintexts: list[bytes] = field(default_factory=list)
