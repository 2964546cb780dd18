"""Tables that every node writes: what they must be like, and what is made for them on each node.

Not here: how changes are judged (vsql_consumers/contest.py). Rules (docs/design/0022-many-writers.md):

* A table is refused rather than replicated so that nodes could end different. What a table must be like is
  said once, in SQL (vsql_sync.unfit_for_many): a stream's start and event triggers ask the same.
* Its tombstones have the types and collations of its primary key, so that keys compare as they do in it.
* Until a node sends what it writes, and has its first copy, its tables refuse writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from psycopg import sql

from vsql_shared.changes import TableName, quote_ident
from vsql_shared.pg import catalog, deltas, generations, roles
from vsql_shared.pg.connect import errors
from vsql_shared.strategies import GENERATIONS

if TYPE_CHECKING:
    from vsql_shared.pg.catalog import TableInfo
    from vsql_shared.pg.connect import Connection
    from vsql_shared.pg.publications import PublicationInfo, PublishedTable
    from vsql_shared.pg.schema_compare import Columns
    from vsql_shared.strategies import Strategies, Strategy

_DELETED = (
    "CREATE TRIGGER vsql_sync_deleted AFTER DELETE ON {here} REFERENCING OLD TABLE AS gone"
    " FOR EACH STATEMENT EXECUTE FUNCTION vsql_sync.keep_tombstones({given})"
)
_MOVED = (
    "CREATE TRIGGER vsql_sync_moved AFTER UPDATE ON {here}"
    " FOR EACH ROW WHEN ({changed}) EXECUTE FUNCTION vsql_sync.keep_tombstones({given})"
)
_CLOSED = (
    "CREATE TRIGGER vsql_sync_writable BEFORE INSERT OR UPDATE OR DELETE ON {here}"
    " FOR EACH STATEMENT EXECUTE FUNCTION vsql_sync.require_writable()"
)
_TRUNCATED = (
    "CREATE TRIGGER vsql_sync_truncate BEFORE TRUNCATE ON {here}"
    " FOR EACH STATEMENT EXECUTE FUNCTION vsql_sync.refuse_truncate()"
)
_EXCHANGED = """
SELECT t.target FROM vsql_sync.streams s JOIN vsql_sync.stream_targets t USING (chain)
  JOIN vsql_sync.publication_tables p ON p.publication = s.publication
 WHERE s.direction = 'out' AND s.kind = 'live' AND s.state <> 'FINISHED'
   AND (p.table_schema, p.table_name) = (%(schema)s, %(table)s) AND t.target <> %(partner)s
UNION
SELECT s.origin FROM vsql_sync.streams s JOIN vsql_sync.table_sync y USING (chain)
 WHERE s.direction = 'in' AND s.state <> 'FINISHED'
   AND (y.table_schema, y.table_name) = (%(schema)s, %(table)s) AND s.origin <> %(partner)s
ORDER BY 1
"""
_SHARED = """
SELECT pg_catalog.format('%I.%I', m.table_schema, m.table_name), m.publication,
       ARRAY(SELECT n.node_id FROM vsql_sync.nodes n WHERE n.is_local UNION
             SELECT s.origin FROM vsql_sync.streams s WHERE s.publication = m.publication
                AND s.direction = 'in' AND s.state <> 'FINISHED' ORDER BY 1),
       m.strategy, m.writable,
       coalesce((SELECT greatest(c.reltuples, 0)::bigint FROM pg_catalog.pg_class c
                  WHERE c.relname = m.tombstones AND c.relnamespace = 'vsql_sync'::regnamespace), 0),
       m.delta_columns
  FROM vsql_sync.multi_writer_tables m ORDER BY 2, 1
"""
_PRIORITIES = "SELECT node_id, priority FROM vsql_sync.nodes"
TRIGGERS = ("vsql_sync_deleted", "vsql_sync_moved", "vsql_sync_truncate", "vsql_sync_writable")


def problems(
    conn: Connection, where: str, publication: PublicationInfo, strategies: Strategies
) -> Iterator[str]:
    """Why tables of a publication cannot be written by every node; `where` names this one."""
    if publication.apply_mode != "transactional":
        yield f"publication {publication.name}: is applied partitioned; many writers need whole transactions"
    waits = conn.execute(
        "SELECT FROM vsql_sync.synchronous_publications WHERE publication = %s", (publication.name,)
    ).fetchone()
    if waits is not None:
        yield (
            f"publication {publication.name}: its commits wait for other nodes on {where}; two nodes that"
            " wait for each other would wait for ever"
        )
    if publication.insert_only:
        yield f"publication {publication.name}: publishes inserts only"
    if publication.sequences or publication.more_sequences:
        yield (
            f"publication {publication.name}: carries sequences; where both nodes draw from them each needs"
            " values of its own"
        )
    if publication.message_prefixes:
        yield (
            f"publication {publication.name}: carries logical messages; publish them in one of their own:"
            " what comes back cannot be told apart on every version of PostgreSQL"
        )
    for published in publication.tables:
        table = catalog.describe(conn, published.name)
        if table is not None:
            yield from (f"{table.name} on {where}: {why}" for why in _unfit(conn, published, table))
            chosen = generations.problems(conn, publication.name, table, strategies)
            yield from (f"{table.name} on {where}: {why}" for why in chosen)
            added = deltas.problems(conn, table, strategies)
            yield from (f"{table.name} on {where}: {why}" for why in added)


def _unfit(conn: Connection, published: PublishedTable, table: TableInfo) -> Iterator[str]:
    if published.where is not None:
        yield "has a row filter; every node must have every row"
    left = set(table.sent_columns) - set(published.columns or table.sent_columns)
    if left:
        yield f"leaves out {', '.join(sorted(left))}; every node must have whole rows"
    elif published.columns is not None:
        yield "its columns are listed, so one that is added later would stay out; publish it without a list"
    yield from (row[0] for row in conn.execute("SELECT vsql_sync.unfit_for_many(%s)", (table.oid,)))


def disagreements(origin: Connection, peer: Connection) -> Iterator[str]:
    """Nodes whose priority two nodes do not have alike: each would take another one of equal times."""
    here, there = (
        {str(name): int(priority) for name, priority in conn.execute(_PRIORITIES)} for conn in (origin, peer)
    )
    for name in sorted(here.keys() & there.keys()):
        if here[name] != there[name]:
            yield f"node {name}: has priority {here[name]} here and {there[name]} on the peer"


def share_priorities(origin: Connection, peer: Connection) -> None:
    """Each node has of the other the priority it has there; inside the caller's transactions."""
    own = "SELECT priority, node_id FROM vsql_sync.nodes WHERE is_local"
    for there, here in ((origin, peer), (peer, origin)):
        row = there.execute(own).fetchone()
        here.execute("UPDATE vsql_sync.nodes SET priority = %s WHERE node_id = %s", row)


def uneven(name: TableName, here: Columns, there: Columns) -> Iterator[str]:
    """How the rows of a table could not be the same on both nodes. Pure; defaults may differ."""
    ours, theirs = ({one.name: one for one in columns} for columns in (here, there))
    for column in sorted(ours.keys() ^ theirs.keys()):
        where = "this node" if column in ours else "the peer"
        yield f"{name}: has column {quote_ident(column)} on {where} only; every node must have whole rows"
    for column in sorted(ours.keys() & theirs.keys()):
        one, other = ours[column], theirs[column]
        # What is not generated has its default there, which each node may choose.
        same = one.default == other.default or not (one.generated or other.generated)
        if (one._replace(default="", identity="") != other._replace(default="", identity="")) or not same:
            yield (
                f"{name}: column {quote_ident(column)} is not defined alike on both nodes (type, collation,"
                " NOT NULL or expression); rows would differ"
            )


def outsiders(
    conn: Connection, where: str, names: Iterable[TableName], publication: str, partner: str | None
) -> Iterator[str]:
    """Why a table's writers would be more than two nodes, or some node would not get what one of them writes.

    `partner`: the other writer; None where a stream of one direction is to be added.
    """
    for name in names:
        row = conn.execute(
            "SELECT publication FROM vsql_sync.multi_writer_tables"
            " WHERE (table_schema, table_name) = (%s, %s)",
            name,
        ).fetchone()
        if row is not None and (partner is None or row[0] != publication):
            yield (
                f"{name}: is written by two nodes in publication {row[0]} on {where}; a third node, or a"
                " stream of one direction beside, would not have all changes: not built yet"
            )
        elif partner is not None:
            found = conn.execute(_EXCHANGED, {"schema": name.schema, "table": name.table, "partner": partner})
            others = ", ".join(one[0] for one in found)
            if others:
                yield (
                    f"{name}: {where} exchanges it with {others}, too; tables that every node writes"
                    " are built for two nodes only"
                )


@dataclass(frozen=True, slots=True)
class SharedTable:
    """A table that every node writes, as this node has it."""

    table: str
    publication: str
    writers: list[str]
    """This node, and those whose changes it applies."""
    strategy: str
    writable: bool
    """Whether clients may write it here: not before the first copy is done and our own slot is there."""
    deleted: int
    """Deleted rows that are remembered, as PostgreSQL estimates (vsql_consumers/purging.py forgets them)."""
    adding: list[str]
    """Columns that add up."""


def shared_tables(conn: Connection) -> list[SharedTable]:
    """All of them."""
    with errors("reading which tables every node writes"):
        return [SharedTable(*row) for row in conn.execute(_SHARED)]


def is_shared(conn: Connection, publication: str) -> bool:
    """Whether every node writes the tables of a publication."""
    row = conn.execute(
        "SELECT EXISTS (SELECT FROM vsql_sync.multi_writer_tables WHERE publication = %s)", (publication,)
    ).fetchone()
    return row is not None and bool(row[0])


def running(peer: Connection, where: str, publication: str) -> Iterator[str]:
    """Streams that a peer applies for one writer: they would go on so beside what its clients write."""
    for (chain,) in peer.execute(
        "SELECT s.chain FROM vsql_sync.streams s WHERE s.publication = %(name)s AND s.direction = 'in'"
        " AND s.desired = 'running' AND s.state <> 'FINISHED' AND NOT EXISTS ("
        "SELECT FROM vsql_sync.multi_writer_tables m WHERE m.publication = %(name)s)",
        {"name": publication},
    ):
        yield f"stream {chain} runs on {where} for one writer; stop it there (`syncctl stop`) first"


def prepare(
    conn: Connection, publication: PublicationInfo, strategies: Strategies, *, writable: bool
) -> None:
    """Make what these tables need on this node; again is no harm. Inside the caller's transaction.

    `writable`: whether clients may write them at once; a table that is known keeps what it has.
    """
    conn.execute(
        "UPDATE vsql_sync.publications SET mode = 'bidirectional' WHERE name = %s", (publication.name,)
    )
    conn.execute("SELECT vsql_sync.note_horizon()")
    for published in publication.tables:
        table = catalog.describe(conn, published.name)
        if table is not None:
            strategy = strategies.of(publication.name, table.name)
            adding = sorted(strategies.adding.get(table.name, ()))
            _prepare(conn, publication.name, table, strategy, adding, writable=writable)


def _prepare(
    conn: Connection,
    publication: str,
    table: TableInfo,
    strategy: Strategy,
    adding: Sequence[str],
    *,
    writable: bool,
) -> None:
    key = next(one.columns for one in table.keys if one.primary)
    row = conn.execute(
        "SELECT tombstones FROM vsql_sync.multi_writer_tables WHERE (table_schema, table_name) = (%s, %s)",
        table.name,
    ).fetchone()
    if row is None:
        _drop_triggers(conn, table)
        row = conn.execute("SELECT 'tombstones_' || nextval('vsql_sync.tombstones_number')").fetchone()
    name = "" if row is None else str(row[0])
    if conn.execute("SELECT to_regclass(%s)", (f"vsql_sync.{name}",)).fetchone() == (None,):
        _make_tombstones(conn, name, table, key)
    if strategy in GENERATIONS:
        generations.prepare(conn, table, name, key)
    _make_triggers(conn, name, table, key)
    if adding:
        deltas.prepare(conn, table, name, key, adding)
    conn.execute(
        "INSERT INTO vsql_sync.multi_writer_tables (table_schema, table_name, publication, tombstones,"
        " key_columns, strategy, delta_columns, writable) VALUES (%s, %s, %s, %s, %s, %s, %s, %s)"
        " ON CONFLICT (table_schema, table_name) DO UPDATE SET (publication, strategy)"
        " = (excluded.publication, excluded.strategy)",
        (*table.name, publication, name, list(key), strategy, list(adding), writable),
    )
    if roles.exist(conn):
        conn.execute(
            sql.SQL("GRANT SELECT, INSERT, UPDATE, DELETE ON vsql_sync.{} TO {}").format(
                sql.Identifier(name), sql.Identifier(roles.CONSUMER)
            )
        )


def _drop_triggers(conn: Connection, table: TableInfo) -> None:
    """Those of a table that was one before: they write to the tombstones it had then."""
    for (name,) in conn.execute(
        "SELECT tgname FROM pg_trigger WHERE tgrelid = %s AND NOT tgisinternal"
        " AND starts_with(tgname::text, 'vsql_sync_')",
        (table.oid,),
    ).fetchall():
        text = sql.SQL("DROP TRIGGER {} ON {}")
        conn.execute(text.format(sql.Identifier(name), sql.Identifier(*table.name)))


def _make_tombstones(conn: Connection, name: str, table: TableInfo, key: Sequence[str]) -> None:
    """The table, owned by whom the function that writes it belongs to."""
    owner = conn.execute(
        "SELECT pg_get_userbyid(proowner) FROM pg_proc"
        " WHERE oid = 'vsql_sync.keep_tombstones()'::regprocedure"
    ).fetchone()
    parts = {
        "buried": sql.Identifier("vsql_sync", name),
        "here": sql.Identifier(table.name.schema, table.name.table),
        "key": sql.SQL(", ").join(map(sql.Identifier, key)),
        "owner": sql.Identifier("" if owner is None else str(owner[0])),
    }
    for text in (
        "CREATE TABLE {buried} AS SELECT {key} FROM {here} WITH NO DATA",
        "ALTER TABLE {buried} ADD PRIMARY KEY ({key})",
        "ALTER TABLE {buried} OWNER TO {owner}",
    ):
        conn.execute(sql.SQL(text).format(**parts))


def _make_triggers(conn: Connection, name: str, table: TableInfo, key: Sequence[str]) -> None:
    """Those of ours that are not there."""
    there = {row[0] for row in conn.execute("SELECT tgname FROM pg_trigger WHERE tgrelid = %s", (table.oid,))}
    parts = {
        "here": sql.Identifier(table.name.schema, table.name.table),
        "given": sql.SQL(", ").join(map(sql.Literal, (name, *key))),
        "changed": catalog.key_changed(conn, table),
    }
    for text in (_DELETED, _MOVED, _CLOSED, _TRUNCATED):
        if text.split()[2] not in there:
            conn.execute(sql.SQL(text).format(**parts))
