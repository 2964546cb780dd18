"""A source and a target database, and what carries changes between them, for tests of the applier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import psycopg

from tests.conftest import NewDatabase
from tests.services.apply_source import Source, contents
from vsql_consumers.apply import Applier
from vsql_shared.changes import OpenedBatch
from vsql_shared.pg import migrate

Connection: TypeAlias = psycopg.Connection[tuple[Any, ...]]

ANOMALIES = """
CREATE SCHEMA vsql_sync;
CREATE TABLE vsql_sync.anomalies (
    chain TEXT NOT NULL, table_schema TEXT NOT NULL, table_name TEXT NOT NULL, kind TEXT NOT NULL,
    count BIGINT NOT NULL DEFAULT 0, last_batch BIGINT, last_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (chain, table_schema, table_name, kind));
CREATE TABLE vsql_sync.progress (batch BIGINT);
"""


def own_function(name: str) -> str:
    """The statement that makes one of our functions, as the schema has it."""
    begin = f"CREATE FUNCTION vsql_sync.{name}("
    text = next(step.text for step in migrate.migrations() if begin in step.text)
    text = text[text.index(begin) :]
    return text[: text.index("\n$$;") + len("\n$$;")]


class Pair:
    """A source and a target database, and what carries changes from one to the other."""

    def __init__(self, source: str, target: str, *, binary: bool = True) -> None:
        self.source = Source.make(source, binary=binary)
        self.conninfo = target
        # A test that left a transaction open shall fail, not hang.
        self.target: Connection = psycopg.connect(target, autocommit=True, options="-c statement_timeout=20s")
        self.target.execute((ANOMALIES + own_function("applier_level")).encode())
        self.appliers: list[Connection] = []
        self._applier: Applier | None = None
        self.origin = f"vsql_apply_{self.target.info.backend_pid}"

    def tables(self, ddl: str, target_ddl: str | None = None) -> None:
        self.source.conn.execute(ddl)
        self.target.execute(ddl if target_ddl is None else target_ddl)
        self.source.publish()

    def do(self, *statements: str) -> None:
        """Run statements on the source, as one transaction."""
        with self.source.conn.transaction():
            for statement in statements:
                self.source.conn.execute(statement)

    def applier(self, **options: Any) -> Applier:
        conn: Connection = psycopg.connect(self.conninfo, autocommit=True)
        self.appliers.append(conn)
        applier = Applier(conn, "shop.a", **options)
        applier.setup(self.origin)
        return applier

    def current(self) -> Applier:
        """The applier in use; the origin admits one."""
        if self._applier is None:
            self._applier = self.applier()
        return self._applier

    def carry(self, applier: Applier | None = None) -> list[dict[str, int]]:
        """Apply what happened on the source, merged into one target transaction; every batch's verdicts."""
        batches = self.source.batches()
        applier = applier or self.current()
        verdicts = applier.apply(batches)
        finish(applier, batches)
        return verdicts

    def equal(self, *tables: str) -> None:
        for table in tables:
            assert contents(self.target, table) == contents(self.source.conn, table), table

    def anomalies(self) -> dict[str, int]:
        return dict(self.target.execute("SELECT kind, sum(count)::int FROM vsql_sync.anomalies GROUP BY 1"))

    def close(self) -> None:
        for conn in (self.source.conn, *self.appliers):
            conn.close()
        if self.target.closed:
            self.target = psycopg.connect(self.conninfo, autocommit=True)
        self.target.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        self.target.execute(
            "SELECT pg_replication_origin_drop(roname) FROM pg_replication_origin WHERE roname = %s",
            (self.origin,),
        )
        self.target.close()


def finish(applier: Applier, batches: Sequence[OpenedBatch]) -> int:
    last = batches[-1]
    return applier.finish(
        last.lsn_end,
        last.transactions[-1].commit_time,
        lambda conn: note_progress(conn, last.batch),
    )


def note_progress(conn: Connection, batch: int) -> None:
    conn.execute("INSERT INTO vsql_sync.progress VALUES (%s)", (batch,))


MakePair: TypeAlias = Callable[..., Pair]


def pairs(new_database: NewDatabase) -> Iterator[MakePair]:
    """Body of the fixture `make_pair`: makes pairs, and ends their sessions after the test."""
    made: list[Pair] = []

    def make(version: int = 18, *, binary: bool = True) -> Pair:
        made.append(Pair(new_database("src", version), new_database("dst", version), binary=binary))
        return made[-1]

    yield make
    for pair in made:
        pair.close()
