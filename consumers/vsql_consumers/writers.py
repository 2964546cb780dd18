"""Who writes the tables of a stream beside this node, waiting for their clocks, and opening closed tables.

Not here: who stands (contest.py). Rules:

* A replication origin stands for the node whose stream is applied under it; origin 0 is this node.
* A table that is not any more what many writers need stops the stream at its start.
* A change is written only once the clock of this node's database has passed its time: a local write that saw
  it is younger then, and stands. Beyond the limit the stream waits and says whose clock it is; times are
  never altered. The consumer's own clock says nothing: local versions are not made by it.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from vsql_consumers import purging
from vsql_consumers.contest import Writer
from vsql_consumers.contested import Contest, Tombstones
from vsql_consumers.skew import FutureCommits
from vsql_shared.changes import TableName, quote_ident
from vsql_shared.errors import DatabaseError, DivergedError, TransientError
from vsql_shared.pg.many_writers import TRIGGERS
from vsql_shared.strategies import Strategies

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vsql_consumers.state import Stream
    from vsql_shared.pg.connect import Connection

_log = logging.getLogger(__name__)

_AT_ONCE_SECONDS = 0.05
_ASK_SECONDS = 1.0
_LOOK_SECONDS = 30.0
_HORIZON_SECONDS = 3600.0
_PURGE_SECONDS = 60.0
# A clock is slewed by 500 ppm at most, by chrony's default for large offsets by 8 %; and µs are rounded.
_SLEWED, _READ_US = 0.1, 1_000

_UNPREPARED = """
SELECT format('%%I.%%I', m.table_schema, m.table_name) FROM vsql_sync.multi_writer_tables m
 WHERE m.publication = %s AND NOT EXISTS (
    SELECT FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
      JOIN pg_namespace n ON n.oid = c.relnamespace
      JOIN pg_proc p ON p.oid = t.tgfoid
     WHERE (n.nspname, c.relname) = (m.table_schema, m.table_name) AND t.tgenabled = 'O'
       AND p.pronamespace = 'vsql_sync'::regnamespace AND t.tgname = ANY (%s) HAVING count(*) = %s)
"""
# Our own slot sends what is written from now on, and no copied row is still to come.
_OPEN = """
UPDATE vsql_sync.multi_writer_tables m SET writable = true
 WHERE m.publication = %(publication)s AND NOT m.writable
   AND EXISTS (SELECT FROM vsql_sync.streams s JOIN pg_replication_slots r ON r.slot_name = s.slot_name
                WHERE s.publication = m.publication AND s.direction = 'out' AND s.kind = 'live'
                  AND r.confirmed_flush_lsn IS NOT NULL)
   AND NOT EXISTS (SELECT FROM vsql_sync.streams s
                    WHERE s.publication = m.publication AND s.direction = 'in' AND s.kind = 'copy'
                      AND s.state <> 'FINISHED')
"""


# What the peer's first copy did not bring is below its floor: ours is the same from now on.
_RAISE = """
UPDATE vsql_sync.multi_writer_tables m SET generation_floor = m.next_floor, next_floor = NULL
 WHERE m.publication = %(publication)s AND m.next_floor IS NOT NULL
   AND NOT EXISTS (SELECT FROM vsql_sync.streams s
                    WHERE s.publication = m.publication AND s.direction = 'out' AND s.kind = 'copy'
                      AND s.state <> 'FINISHED')
"""


def load(conn: Connection, stream: Stream, said: Strategies | None = None) -> Contest | None:
    """What a stream's session must know, or None where only its source writes. Raises DatabaseError.

    `said`: what this node's file says about strategies.
    """
    tables = {
        TableName(schema, name): Tombstones(
            f"vsql_sync.{quote_ident(buried)}", tuple(key), strategy, tuple(adding)
        )
        for schema, name, buried, key, strategy, adding in conn.execute(
            "SELECT table_schema, table_name, tombstones, key_columns, strategy, delta_columns"
            " FROM vsql_sync.multi_writer_tables m WHERE publication = %s",
            (stream.publication,),
        )
    }
    if not tables:
        return None
    _require_fit(conn, stream)
    _require_agreed(stream.publication, tables, said or Strategies())
    nodes = {
        name: (name, Writer(priority, number))
        for name, priority, number in conn.execute("SELECT node_id, priority, number FROM vsql_sync.nodes")
    }
    if stream.origin not in nodes:
        raise DatabaseError(f"node {stream.origin} is not in vsql_sync.nodes", hint="add the peer again")
    writers = {
        origin: nodes[node]
        for node, origin in conn.execute(
            "SELECT node_id, 0 FROM vsql_sync.nodes WHERE is_local UNION ALL"
            " SELECT s.origin, o.roident::int FROM vsql_sync.streams s"
            " JOIN pg_catalog.pg_replication_origin o ON o.roname = s.origin_name WHERE s.direction = 'in'"
        )
        if node in nodes
    }
    row = conn.execute("SELECT pg_replication_origin_oid(%s)::int", (stream.origin_name,)).fetchone()
    if row is None or row[0] is None:
        raise DatabaseError(f"replication origin {stream.origin_name} is not there", hint="start again")
    writers[row[0]] = nodes[stream.origin]
    sources = conn.execute(
        "SELECT DISTINCT origin FROM vsql_sync.streams WHERE direction = 'in' AND publication = %s",
        (stream.publication,),
    )
    return Contest(
        stream.chain, stream.origin, row[0], nodes[stream.origin][1], writers, tables,
        nodes=dict(nodes.values()), sources=frozenset(name for (name,) in sources),
    )  # fmt: skip


def _require_agreed(publication: str, tables: Mapping[TableName, Tombstones], said: Strategies) -> None:
    """This node's file says nothing else than what both nodes do. Raises DatabaseError."""
    for name, rules in tables.items():
        chosen = said.chosen(publication, name)
        if chosen not in (None, rules.strategy):
            raise DatabaseError(
                f"table {name} is written by every node with strategy {rules.strategy}, and this node's file"
                f" says {chosen}",
                hint="the strategy is what it was when the first peer was added: write that in [conflict],"
                " [[conflict.tables]] or [[publications]] conflict_strategy",
            )
        adding = said.adding.get(name)
        if adding is not None and set(adding) != set(rules.adding):
            there = ", ".join(sorted(rules.adding)) or "nothing"
            raise DatabaseError(
                f"of table {name}, which every node writes, {there} adds up, and this node's file says"
                f" {', '.join(sorted(adding))}",
                hint="what adds up is what it was when the first peer was added: write that in"
                " [[conflict.crdt.columns]]",
            )


def _require_fit(conn: Connection, stream: Stream) -> None:
    """The tables are what they were prepared as, and so is the database. Raises our errors."""
    for name, why in conn.execute(
        "SELECT name, why FROM (SELECT * FROM vsql_sync.unfit_tables()"
        " UNION ALL SELECT * FROM vsql_sync.unsent_tables()"
        " UNION ALL SELECT * FROM vsql_sync.unfit_generations()"
        " UNION ALL SELECT * FROM vsql_sync.unfit_deltas()) u WHERE publication = %s",
        (stream.publication,),
    ):
        raise DatabaseError(f"table {name} is written by every node: {why}", hint="then start again")
    for (name,) in conn.execute(_UNPREPARED, (stream.publication, list(TRIGGERS), len(TRIGGERS))):
        raise DatabaseError(
            f"table {name} is written by every node, and lacks triggers that were made for it",
            hint="it was made anew, or they were dropped, replaced or switched off: what was deleted since"
            " has left no trace; ENABLE them, or initialise the node anew; one that is gone for good is taken"
            " out of vsql_sync.multi_writer_tables",
        )
    row = conn.execute(
        "SELECT count(*) FROM vsql_sync.horizons h, pg_control_system() c"
        " WHERE h.system_identifier <> c.system_identifier"
    ).fetchone()
    if row is not None and row[0]:
        raise DivergedError(
            "this database was made anew from a dump or an upgrade: its rows have other versions than before",
            hint="initialise the node anew",
        )


def require_steady(before: int, after: int, elapsed: float) -> None:
    """Of two answers of a clock, µs: at least `elapsed` seconds lie between them. Raises DivergedError."""
    back = before + elapsed * 1e6 * (1 - _SLEWED) - after
    if back > _READ_US:
        raise DivergedError(
            f"the clock of this node's database was set back by {back / 1e6:.3f} s: what was written here"
            " since may be older than what it saw, and then stands here and falls elsewhere",
            hint="slew clocks, never step them; once the clock is past where it was, UPDATE again what was"
            " written meanwhile, then `syncctl stream retry`",
        )


class DatabaseClock:
    """The clock of this node's database, as far as it is needed; and what is done once in a while."""

    def __init__(self, conn: Connection, stream: Stream, limit_ms: int) -> None:
        """`conn`: in no transaction, so not the one that applies. `limit_ms`: how far clocks may differ."""
        self._conn, self._stream, self._limit_ms = conn, stream, limit_ms
        self._read, self._at = 0, float("-inf")
        """What it said, µs since 1970, and when that was known here, by a monotonic clock."""
        self._noted = self._looked = self._purged = float("-inf")
        self._open = False
        self._future = FutureCommits(conn, stream.origin)

    def wait_for(self, commit_time: int) -> None:
        """Return once it is past a commit's time, µs since 1970. Raises TransientError: too far ahead."""
        limit, noted = self._limit_ms, False
        while (ahead := commit_time - self._now()) >= 0:
            # What was added since the answer may be wrong; the answer itself is not.
            if (ahead := commit_time - self._now(0.0)) < 0:
                return
            if not noted:
                self._future.came(ahead)
                noted = True
            if ahead > limit * 1000:
                self._future.write(now=True)
                raise TransientError(
                    f"node {self._stream.origin} committed a change {ahead / 1e6:.3f} s from now by the"
                    " clock of this node's database",
                    hint=f"set both clocks; [conflict] max_clock_skew_ms = {limit} is their limit",
                )
            time.sleep(min((ahead + 1) / 1e6, _AT_ONCE_SECONDS))

    def _now(self, for_seconds: float = _ASK_SECONDS) -> int:
        """At least this late is it there. An answer is counted on from when it came: never early."""
        asked = time.monotonic()
        if asked - self._at > for_seconds:
            row = self._conn.execute(
                "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
            ).fetchone()
            read = 0 if row is None else int(row[0])
            before, self._read = self._read, read
            elapsed, self._at = asked - self._at, time.monotonic()
            if before:
                require_steady(before, read, elapsed)
        return self._read + int((time.monotonic() - self._at) * 1e6)

    def look(self) -> None:
        """Open tables that may be written now, note the horizon, forget deleted rows. Often is no harm."""
        now, conn = time.monotonic(), self._conn
        self._now()
        self._future.write()
        if now - self._noted > _HORIZON_SECONDS:
            conn.execute("SELECT vsql_sync.note_horizon()")
            self._noted = now
        if now - self._purged > _PURGE_SECONDS and self._stream.kind == "live":
            gone = purging.purge(conn, self._stream)
            if gone < purging.PURGED_AT_ONCE:  # else there is more, and the next turn goes on
                self._purged = now
            if gone:
                _log.info("deleted rows were forgotten", extra={"tombstones": gone})
        # One that is added later is closed, too.
        if now - self._looked > (_LOOK_SECONDS if self._open else _ASK_SECONDS):
            self._looked = now
            publication = self._stream.publication
            conn.execute(_OPEN, {"publication": publication})
            conn.execute(_RAISE, {"publication": publication})
            row = conn.execute(
                "SELECT count(*) FROM vsql_sync.multi_writer_tables WHERE publication = %s AND NOT writable",
                (publication,),
            ).fetchone()
            self._open = row is not None and row[0] == 0
