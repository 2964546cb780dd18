"""Generations of rows, for tables whose strategy orders by them: triggers that keep them, and their floors.

Not here: the triggers' functions (SQL 020) and the order itself (vsql_consumers/contest.py). Rules
(docs/design/0022-many-writers.md):

* A row's generation is above all its node knew of the key: the row before it, or its tombstone. So tombstones
  of these tables are never purged, or the key would begin anew at one node.
* A first copy brings no tombstones. What the peer begins of keys it knows nothing of is therefore above a
  floor that no tombstone of this node reaches before the copy is done. This node has the same floor from then
  on, or two inserts of a new key would not be compared by who was first.
* The floor leaves room for more writes of one row than there can be until then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from psycopg import sql

from vsql_shared.changes import TableName, quote_ident
from vsql_shared.errors import RefusedError
from vsql_shared.pg import catalog
from vsql_shared.strategies import GENERATION, GENERATIONS, Strategies

if TYPE_CHECKING:
    from vsql_shared.pg.catalog import TableInfo
    from vsql_shared.pg.connect import Connection
    from vsql_shared.pg.publications import PublicationInfo

_ROOM = 2**40
"""Writes of one row while a first copy is under way; a node can be added eight million times."""
_HIGHEST = 2**62
_GENERATION = (
    "CREATE TRIGGER vsql_sync_generation BEFORE INSERT OR UPDATE ON {here}"
    " FOR EACH ROW EXECUTE FUNCTION vsql_sync.next_generation({name}, {given})"
)
_DELETED = (
    "CREATE TRIGGER vsql_sync_deleted AFTER DELETE ON {here} REFERENCING OLD TABLE AS gone"
    " FOR EACH STATEMENT EXECUTE FUNCTION vsql_sync.keep_generations({name}, {columns}, {row}, {buried})"
)
_MOVED = (
    "CREATE TRIGGER vsql_sync_moved AFTER UPDATE ON {here} FOR EACH ROW WHEN ({changed})"
    " EXECUTE FUNCTION vsql_sync.keep_generations({name}, {columns}, {row}, {buried})"
)
_SETTLED = (
    "CREATE TRIGGER vsql_sync_settled AFTER INSERT ON {here} REFERENCING NEW TABLE AS come"
    " FOR EACH STATEMENT EXECUTE FUNCTION vsql_sync.settle_generations({name}, {columns}, {row}, {buried})"
)
_TAKEN = (
    "CREATE TRIGGER vsql_sync_taken AFTER UPDATE ON {here} FOR EACH ROW WHEN ({changed})"
    " EXECUTE FUNCTION vsql_sync.settle_generations({name}, {columns}, {row}, {buried})"
)


def problems(conn: Connection, publication: str, table: TableInfo, strategies: Strategies) -> Iterator[str]:
    """Why a table cannot have the strategy that was chosen for it."""
    wanted = strategies.of(publication, table.name)
    row = conn.execute(
        "SELECT strategy FROM vsql_sync.multi_writer_tables WHERE (table_schema, table_name) = (%s, %s)",
        table.name,
    ).fetchone()
    if row is not None and row[0] != wanted:
        yield (
            f"is written by every node with strategy {row[0]}, and {wanted} is asked for; it stays what it"
            " was when the first peer was added, or one conflict would be settled by two rules"
        )
    if wanted in GENERATIONS:
        found = conn.execute("SELECT vsql_sync.unfit_for_generations(%s)", (table.oid,))
        yield from (str(why) for (why,) in found)


def prepare(conn: Connection, table: TableInfo, buried: str, key: Sequence[str]) -> None:
    """The tombstones' column, and the triggers that are not there; `buried`: name of the table of tombstones.

    Its triggers on what is deleted have the names of those of other tables, and stand instead of them. Inside
    the caller's transaction.
    """
    # Where columns add up a tombstone stands whatever its generation, and may be written with its key only.
    conn.execute(
        sql.SQL("ALTER TABLE {} ADD COLUMN IF NOT EXISTS {} bigint NOT NULL DEFAULT 0").format(
            sql.Identifier("vsql_sync", buried), sql.Identifier(GENERATION)
        )
    )
    there = {row[0] for row in conn.execute("SELECT tgname FROM pg_trigger WHERE tgrelid = %s", (table.oid,))}
    parts = {
        "here": sql.Identifier(table.name.schema, table.name.table),
        "name": sql.Literal(buried),
        "columns": sql.Literal(", ".join(map(quote_ident, key))),
        "given": sql.Literal(catalog.key_equality(conn, table, "b", "($1)")),
        "row": sql.Literal(catalog.key_equality(conn, table, "t", "c")),
        "buried": sql.Literal(catalog.key_equality(conn, table, "b", "c")),
        "changed": catalog.key_changed(conn, table),
    }
    for text in (_GENERATION, _DELETED, _MOVED, _SETTLED, _TAKEN):
        if text.split()[2] not in there:
            conn.execute(sql.SQL(text).format(**parts))


def floors(
    origin: Connection, peer: Connection, publication: PublicationInfo, strategies: Strategies
) -> dict[TableName, int]:
    """A floor for each such table, above what either node has of it. Raises RefusedError.

    Reads all rows. Before triggers are made: that locks the tables, and this takes its time.
    """
    found = {}
    for published in publication.tables:
        name = published.name
        if strategies.of(publication.name, name) in GENERATIONS:
            highest = max(_highest(conn, name) for conn in (origin, peer))
            if highest > _HIGHEST:
                raise RefusedError(
                    f"{name}: column {GENERATION} has values that are no generations, up to {highest}",
                    hint="set it to 0 in all rows, on both nodes",
                )
            found[name] = highest + _ROOM
    return found


def _highest(conn: Connection, name: TableName) -> int:
    """Of a table's rows, their tombstones and its floors on one node."""
    table = catalog.describe(conn, name)
    row = conn.execute(
        "SELECT tombstones, greatest(generation_floor, next_floor) FROM vsql_sync.multi_writer_tables"
        " WHERE (table_schema, table_name) = (%s, %s)",
        name,
    ).fetchone()
    places = [] if table is None else [sql.Identifier(name.schema, name.table)]
    highest = 0
    if row is not None:
        highest = int(row[1])
        places.append(sql.Identifier("vsql_sync", row[0]))
    for place in places:
        text = sql.SQL("SELECT coalesce(max({}), 0) FROM {}").format(sql.Identifier(GENERATION), place)
        found = conn.execute(text).fetchone()
        highest = max(highest, 0 if found is None else int(found[0]))
    return highest


def set_floors(conn: Connection, found: Mapping[TableName, int], *, later: bool) -> None:
    """`later`: the peer's first copy is still to come, and clients write here."""
    for name, floor in found.items():
        conn.execute(
            "UPDATE vsql_sync.multi_writer_tables SET"
            " next_floor = CASE WHEN %(later)s THEN %(floor)s::bigint END,"
            " generation_floor = CASE WHEN %(later)s THEN generation_floor ELSE %(floor)s::bigint END"
            " WHERE (table_schema, table_name) = (%(schema)s, %(table)s)",
            {"later": later, "floor": floor, "schema": name.schema, "table": name.table},
        )
