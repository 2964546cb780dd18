"""Two nodes that write one table, for tests of what becomes of conflicts: each applies what the other did.

Not the services: no Kafka, no batches sealed. Changes are read from slots, with the commit times they have,
and applied by the product. What is exchanged was written by both without knowledge of each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.services.apply_source import Source
from vsql_consumers import state, writers
from vsql_consumers.apply import Applier
from vsql_shared.changes import OpenedBatch
from vsql_shared.pg import nodes, peers, publications
from vsql_shared.pg.connect import Connection, connect
from vsql_shared.pg.peers import PeerRequest
from vsql_shared.pg.publications import PublicationRequest
from vsql_shared.pg.table_spec import parse_spec
from vsql_shared.strategies import GENERATIONS, Strategies, Strategy

GENERATION = "vsql_generation bigint NOT NULL DEFAULT 0"


@dataclass
class Side:
    """One node: what its clients do leaves by its slot, what the other's did comes by its applier."""

    name: str
    conninfo: str
    conn: Connection
    source: Source = field(init=False)
    applying: Connection = field(init=False)
    applier: Applier = field(init=False)

    def begin(self, cluster: str, other: str) -> None:
        """Its slot and its applier."""
        self.source = Source.make(self.conninfo)
        # Not the tables of vsql_sync, which appliers write.
        self.source.conn.execute("CREATE PUBLICATION everything FOR TABLES IN SCHEMA public")
        self.source.slot = f"both_{self.source.conn.info.backend_pid}"
        make = "SELECT pg_create_logical_replication_slot(%s, 'pgoutput')"
        self.source.conn.execute(make, (self.source.slot,))
        self.applying = connect(self.conninfo, application_name=f"applying {self.name}")
        stream = state.load_stream(self.conn, cluster, f"pub.{other}")
        self.applier = Applier(self.applying, stream.chain)
        self.applier.setup(stream.origin_name)
        self.applier.contend(writers.load(self.conn, stream))

    def apply(self, batches: list[OpenedBatch]) -> None:
        """Each source transaction as one."""
        for batch in batches:
            self.applier.apply_transaction(batch, 0, len(batch.ops))
            self.applier.finish(batch.lsn_end, batch.transactions[0].commit_time, lambda _: None)

    def do(self, statement: str, *, unsent: bool = False) -> None:
        """What a client does; `unsent`: as where it leaves no trace, and nobody hears of it."""
        if not unsent:
            self.source.conn.execute(statement)
            return
        with self.source.conn.transaction():
            self.source.conn.execute("SET LOCAL session_replication_role = replica")
            self.source.conn.execute(statement)
        self.source.batches()

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """What it has."""
        return self.conn.execute(query.encode()).fetchall()

    def end(self) -> None:
        self.conn.execute("SELECT pg_terminate_backend(%s, 5000)", (self.applying.info.backend_pid,))
        self.conn.execute(
            "SELECT pg_replication_origin_drop(roname) FROM pg_replication_origin"
            " WHERE roname IN (SELECT origin_name FROM vsql_sync.streams)"
        )
        for conn in (self.source.conn, self.applying, self.conn):
            conn.close()


@dataclass
class Both:
    """Node a has the higher priority."""

    a: Side
    b: Side
    cluster: str

    def exchange(self) -> None:
        """All that either did comes to the other, which did not know of it when it did its own."""
        from_a, from_b = self.a.source.batches(), self.b.source.batches()
        self.b.apply(from_a)
        self.a.apply(from_b)
        for side in (self.a, self.b):
            side.source.batches()  # what it applied came to its slot, too

    def end(self) -> None:
        self.a.end()
        self.b.end()


def prepared(a: str, b: str, cluster: str, ddl: str, *tables: str) -> Both:
    """Databases of two nodes with tables that a publishes; nothing is exchanged yet."""
    sides = []
    for number, conninfo in enumerate((a, b), 1):
        name = f"node-{'ab'[number - 1]}"
        conn = connect(conninfo, application_name=name)
        nodes.register_local(conn, number, name, cluster, bytes(range(number, number + 32)))
        conn.execute(f"UPDATE vsql_sync.nodes SET priority = {100 - number}".encode())
        conn.execute(ddl.encode())
        sides.append(Side(name, conninfo, conn))
    publications.create(sides[0].conn, PublicationRequest("pub", tuple(map(parse_spec, tables))))
    return Both(sides[0], sides[1], cluster)


def joined(made: Both, strategies: Strategies, *, opened: bool = True) -> Both:
    """Both write; `opened`: as after the first copy."""
    request = PeerRequest(2, "node-b", mode="bidirectional", strategies=strategies)
    a, b = made.a, made.b
    peers.add(a.conn, b.conn, peers.look(a.conn, b.conn, request))
    for side, other in ((a, b), (b, a)):
        side.begin(made.cluster, other.name)
        side.conn.execute("UPDATE vsql_sync.multi_writer_tables SET writable = true")
    if opened:
        copied(made)
    return made


def copied(made: Both) -> None:
    """The first copy is done, and each node's consumer looks."""
    for side, other in ((made.a, made.b), (made.b, made.a)):
        side.conn.execute("UPDATE vsql_sync.streams SET state = 'FINISHED' WHERE kind = 'copy'")
        stream = state.load_stream(side.conn, made.cluster, f"pub.{other.name}")
        writers.DatabaseClock(side.conn, stream, 500).look()


def table(name: str, columns: str, strategy: Strategy) -> str:
    """DDL of a table that every node can write with a strategy."""
    more = f", {GENERATION}" if strategy in GENERATIONS else ""
    return f"CREATE TABLE public.{name} ({columns}{more}); ALTER TABLE public.{name} REPLICA IDENTITY FULL;"
