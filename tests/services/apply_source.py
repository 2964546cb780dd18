"""A real source for tests of the applier: what a slot's pgoutput sends, as OpenedBatch values.

Not the producer: batches are cut and nothing is sealed. It reads the slot with
pg_logical_slot_get_binary_changes, so the bytes of every tuple are PostgreSQL's own.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, field
from typing import Any

import psycopg

from vsql_producers import pgoutput
from vsql_shared import lsn
from vsql_shared.changes import Column, Op, OpenedBatch, Relation, TableName, Transaction
from vsql_shared.wire.pack import encode_relation, relation_hash

_ROWS = {Op.INSERT, Op.UPDATE, Op.DELETE}
_NAMES = itertools.count(1)


def empty_batch(number: int = 1, *, continues: bool = False) -> OpenedBatch:
    """A batch without a change."""
    return OpenedBatch("shop.a", 1, number, number, bytes(32), 0, 0, 0, bytes(32), continues)


def add_change(
    batch: OpenedBatch, relation: Relation, op: int, plaintext: bytes, transaction: Transaction | None = None
) -> None:
    """Put a change at a batch's end."""
    if transaction is None:
        transaction = batch.transactions[-1] if batch.transactions else Transaction(1, 1_000, 0)
    if not batch.transactions or batch.transactions[-1] != transaction:
        batch.transactions.append(transaction)
    digest = relation_hash(encode_relation(relation))
    batch.relations[digest] = relation
    batch.tx_of.append(len(batch.transactions) - 1)
    batch.ops.append(op)
    batch.relation_of.append(digest)
    batch.plaintexts.append(plaintext)
    batch.row_count += 1


@dataclass(slots=True)
class Source:
    """A database with a publication of all tables, and a slot that is read batch by batch."""

    conn: psycopg.Connection[tuple[Any, ...]]
    binary: bool = True
    slot: str = ""
    batch: int = 0
    relations: dict[int, Relation] = field(default_factory=dict)
    raw: list[bytes] = field(default_factory=list)

    @classmethod
    def make(cls, conninfo: str, *, binary: bool = True) -> Source:
        """Connect; call `publish` once the tables are there."""
        return cls(psycopg.connect(conninfo, autocommit=True), binary)

    def publish(self) -> None:
        """Begin to record changes."""
        self.conn.execute("CREATE PUBLICATION everything FOR ALL TABLES")
        self.slot = f"apply_{self.conn.info.backend_pid}_{next(_NAMES)}"
        self.conn.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (self.slot,))

    def batches(self, max_rows: int = 1_000_000) -> list[OpenedBatch]:
        """What happened since, as batches of whole transactions; a larger one comes in fragments."""
        options = [
            "proto_version",
            "1",
            "publication_names",
            "everything",
            "binary",
            str(self.binary).lower(),
        ]
        rows = self.conn.execute(
            "SELECT lsn, data FROM pg_logical_slot_get_binary_changes(%s, NULL, NULL, VARIADIC %s)",
            (self.slot, options),
        ).fetchall()
        out: list[OpenedBatch] = []
        batch = self._new()
        transaction = Transaction(0, 0, 0)
        for position, data in rows:
            if data[0] in _ROWS:
                changes = [(self._relation(data), data[0], data[5:])]
            else:
                message = pgoutput.decode(b"w" + lsn.parse(position).to_bytes(8, "big") + bytes(16) + data)
                changes = self._truncated(message)
                if isinstance(message, pgoutput.Begin):
                    transaction = Transaction(message.xid, message.final_lsn, message.commit_time)
                elif isinstance(message, pgoutput.Commit):
                    batch.lsn_end = message.end_lsn
                    if batch.row_count:
                        out.append(batch)
                        batch = self._new()
            for relation, op, plaintext in changes:
                if batch.row_count >= max_rows:
                    batch.continues = True
                    out.append(batch)
                    batch = self._new()
                add_change(batch, relation, op, plaintext, transaction)
        return out

    def _truncated(self, message: pgoutput.Control) -> list[tuple[Relation, int, bytes]]:
        """A TRUNCATE's tables as changes; a descriptor is remembered, and is no change."""
        if isinstance(message, pgoutput.RelationMessage):
            self.relations[message.relation_id] = self._describe(message)
        if not isinstance(message, pgoutput.Truncate):
            return []
        options, size = bytes((message.options,)), len(message.relation_ids).to_bytes(2, "big")
        return [
            (self.relations[relation_id], Op.TRUNCATE, options + at.to_bytes(2, "big") + size)
            for at, relation_id in enumerate(message.relation_ids)
        ]

    def _new(self) -> OpenedBatch:
        self.batch += 1
        return empty_batch(self.batch)

    def _relation(self, data: bytes) -> Relation:
        return self.relations[int.from_bytes(data[1:5], "big")]

    def _describe(self, message: pgoutput.RelationMessage) -> Relation:
        columns = []
        for column in message.columns:
            # Under this search path format_type writes the schema of every type that is not built in.
            found = self.conn.execute(
                "SELECT set_config('search_path', 'pg_catalog', true), format_type(%s, %s)",
                (column.type_oid, column.typmod),
            ).fetchone()
            assert found is not None
            columns.append(Column(column.name, column.key, column.type_oid, column.typmod, found[1]))
        name = TableName(message.schema, message.table)
        salt = hashlib.sha256(str(name).encode()).digest()[:16]
        return Relation(name, message.replica_identity, tuple(columns), salt)


def contents(conn: psycopg.Connection[tuple[Any, ...]], table: str) -> list[str]:
    """All rows of a table as text, sorted: rows are equal when every value's text is."""
    return [row[0] for row in conn.execute(f"SELECT t::text FROM {table} t ORDER BY 1")]
