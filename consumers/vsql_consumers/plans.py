"""Plans of the tables a session writes: made once, and made anew when the source or the target changed.

Not here: what a plan is (statements.py). Rules:

* Before the first write of a transaction the tables it names are locked against DDL (ACCESS SHARE) and their
  catalog versions compared, so that no plan outlives an ALTER TABLE: binary rows sent to a column of another
  type could be taken for something else.
* Descriptors that differ in their salt only are one plan. After an error every plan is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import psycopg

from vsql_consumers.stage import Stages, run
from vsql_consumers.statements import Plan, make_plan, table_sql
from vsql_consumers.target import check_allowed, read_table, read_types, read_versions
from vsql_shared.changes import SIGNALS, OpenedBatch, Relation, TableName
from vsql_shared.errors import DecodeError, TransientError

if TYPE_CHECKING:
    from vsql_shared.pg.connect import Connection

_HASHES_MAX = 1_000
_NO_TABLES = frozenset(SIGNALS.values())
_NO_TABLE = (
    psycopg.errors.UndefinedTable,
    psycopg.errors.InvalidSchemaName,
    psycopg.errors.WrongObjectType,
)


class Plans:
    """The plans of one session."""

    def __init__(self, conn: Connection, stages: Stages) -> None:
        self._conn, self._stages = conn, stages
        self._plans: dict[TableName, Plan] = {}
        self._by_hash: dict[bytes, Plan] = {}
        self._locked: set[TableName] = set()

    def of(self, batch: OpenedBatch, digest: bytes) -> Plan:
        """The plan for changes of this descriptor. Raises DatabaseError and DecodeError."""
        plan = self._by_hash.get(digest)
        if plan is None:
            plan = self._by_hash[digest] = self._make(_relation(batch, digest))
        return plan

    def prepare(self, batches: Sequence[OpenedBatch]) -> None:
        """Lock the tables these batches change, unless that was done, and forget outdated plans."""
        digests = [(batch, digest) for batch in batches for digest in set(batch.relation_of)]
        # What is no row has no table; a row that claims to be of theirs finds no plan.
        names = {_relation(batch, digest).name for batch, digest in digests} - self._locked - _NO_TABLES
        if not names:
            return
        if not self._locked:
            self._stages.drop_old()
        for name in names:
            check_allowed(name)
        self._lock(sorted(names))
        versions = read_versions(self._conn, sorted(names))
        for name in names:
            plan = self._plans.get(name)
            if plan is not None and plan.target.version != versions.get(name):
                self._forget(name)
        self._locked |= names

    def _lock(self, names: Sequence[TableName]) -> None:
        """ACCESS SHARE is what reading takes: it keeps out ALTER and DROP, and nobody else."""
        tables = ", ".join(f"ONLY {table_sql(name)}" for name in names)
        try:
            run(self._conn, [f"LOCK TABLE {tables} IN ACCESS SHARE MODE"])
        except _NO_TABLE:
            self._conn.rollback()
            for name in names:
                read_table(self._conn, name)  # says which one is missing, and what to do
            raise TransientError("a table was replaced meanwhile", hint="it is tried again") from None

    def _make(self, relation: Relation) -> Plan:
        name = relation.name
        plan = self._plans.get(name)
        if plan is not None and _same(plan.relation, relation):
            return plan
        self._forget(name)
        types = read_types(self._conn, [column.type_name for column in relation.columns])
        plan = self._plans[name] = make_plan(relation, read_table(self._conn, name), types)
        return plan

    def _forget(self, name: TableName) -> None:
        self._plans.pop(name, None)
        self._by_hash = {digest: plan for digest, plan in self._by_hash.items() if plan.name != name}
        self._stages.drop(name)

    def settle(self) -> None:
        """The transaction was committed, and its locks are gone."""
        self._locked.clear()
        if len(self._by_hash) > _HASHES_MAX:
            self._by_hash.clear()

    def forget(self) -> None:
        """The transaction was rolled back: whatever was known may be why."""
        self._locked.clear()
        self._by_hash.clear()
        self._plans.clear()


def _relation(batch: OpenedBatch, digest: bytes) -> Relation:
    relation = batch.relations.get(digest)
    if relation is None:
        raise DecodeError(f"batch {batch.batch} has changes of a descriptor it does not carry")
    return relation


def _same(one: Relation, other: Relation) -> bool:
    """Equal but for the salt."""
    return (one.name, one.replica_identity, one.columns) == (
        other.name,
        other.replica_identity,
        other.columns,
    )
