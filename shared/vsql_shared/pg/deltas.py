"""Columns that add up, of tables that every node writes: what they need on each node.

Not here: the arithmetic (vsql_consumers/adding.py) and the triggers' functions (SQL 024). Rules
(docs/design/0028-columns-that-add-up.md):

* Which columns these are is chosen when the table becomes one that every node writes, by one command in both
  databases, and stays: a node that added up where the other overwrote would part from it.
* A row's key is the row's for ever. It is never changed, also not to another spelling of the same, and after
  a delete it is not used again, on any node: what others still add to the old row would be added to the new.
* So who is added learns which keys were used, in the transaction that adds it; and what a first copy leaves
  out must not be deleted before the copy is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from psycopg import sql

from vsql_shared.changes import TableName, quote_ident
from vsql_shared.deltas import ROUNDED
from vsql_shared.errors import RefusedError
from vsql_shared.pg import catalog

if TYPE_CHECKING:
    from vsql_shared.pg.catalog import TableInfo
    from vsql_shared.pg.connect import Connection
    from vsql_shared.pg.publications import PublicationInfo
    from vsql_shared.strategies import Strategies

_FINITE = ("numeric", "real", "double precision")
_KEPT = (
    "CREATE TRIGGER vsql_sync_kept AFTER UPDATE ON {here} FOR EACH ROW WHEN (CAST(ROW({old}) AS record)"
    " OPERATOR(pg_catalog.*<>) CAST(ROW({new}) AS record)) EXECUTE FUNCTION vsql_sync.refuse_key_change()"
)
_USED = (
    "CREATE TRIGGER vsql_sync_used AFTER INSERT ON {here} REFERENCING NEW TABLE AS come"
    " FOR EACH STATEMENT EXECUTE FUNCTION vsql_sync.refuse_used_keys({name}, {columns}, {buried})"
)
_FINAL = (
    "CREATE TRIGGER vsql_sync_final AFTER DELETE ON {here} REFERENCING OLD TABLE AS gone"
    " FOR EACH STATEMENT EXECUTE FUNCTION vsql_sync.settle_deleted({row})"
)
_LASTING = (
    "CREATE TRIGGER vsql_sync_lasting BEFORE DELETE ON {here}"
    " FOR EACH STATEMENT EXECUTE FUNCTION vsql_sync.keep_while_copying()"
)
_IS_FINITE = (
    "CREATE TRIGGER vsql_sync_finite AFTER INSERT OR UPDATE ON {here} FOR EACH ROW WHEN ({infinite})"
    " EXECUTE FUNCTION vsql_sync.refuse_infinite()"
)


def problems(conn: Connection, table: TableInfo, strategies: Strategies) -> Iterator[str]:
    """Why the columns that were chosen cannot add up here."""
    chosen = strategies.adding.get(table.name, {})
    row = conn.execute(
        "SELECT delta_columns FROM vsql_sync.multi_writer_tables WHERE (table_schema, table_name) = (%s, %s)",
        table.name,
    ).fetchone()
    if row is not None and set(row[0]) != set(chosen):
        yield (
            f"is written by every node, and what adds up there is {_listed(row[0])}; {_listed(chosen)} is"
            " asked for; it stays what it was when the first peer was added, or the nodes would part"
        )
    if not chosen:
        return
    unfit = [str(why) for (why,) in conn.execute(
        "SELECT vsql_sync.unfit_for_deltas(%s, %s)", (table.oid, list(chosen))
    )]  # fmt: skip
    yield from unfit
    types = _types(conn, table, chosen)
    for column, wanted in sorted(chosen.items()):
        if wanted and types.get(column, wanted) != wanted:
            yield (
                f"column {quote_ident(column)} is {types[column]}, and its function in"
                f" [[conflict.crdt.columns]] is for {wanted}"
            )
    if not unfit:
        yield from _infinite(conn, table, [one for one in sorted(chosen) if types[one] in _FINITE])


def _infinite(conn: Connection, table: TableInfo, columns: Sequence[str]) -> Iterator[str]:
    """Reads all rows."""
    for column in columns:
        text = sql.SQL("SELECT EXISTS (SELECT FROM {} t WHERE {})").format(
            sql.Identifier(*table.name), _is_infinite("t", [column])
        )
        if conn.execute(text).fetchone() == (True,):
            yield f"column {quote_ident(column)} has NaN or infinity, which have no difference to anything"


def _is_infinite(alias: str, columns: Sequence[str]) -> sql.Composable:
    return sql.SQL(" OR ").join(
        sql.SQL("{0}.{1} IN ('NaN', 'Infinity', '-Infinity')").format(
            sql.SQL(alias),
            sql.Identifier(column),
        )
        for column in columns
    )


def notes(conn: Connection, publication: PublicationInfo, strategies: Strategies) -> Iterator[str]:
    """What is allowed and unwise."""
    for published in publication.tables:
        chosen = strategies.adding.get(published.name, {})
        table = catalog.describe(conn, published.name) if chosen else None
        if table is None:
            continue
        for column, type_ in sorted(_types(conn, table, chosen).items()):
            if type_ in ROUNDED:
                yield (
                    f"{table.name}: column {quote_ident(column)} is {type_}, whose sums depend on the order:"
                    " where both nodes add at once they may end different, in the last digits of the largest"
                    " value there was meanwhile; money is numeric"
                )
        for (name,) in conn.execute(
            "SELECT conname FROM pg_catalog.pg_constraint c JOIN pg_catalog.pg_attribute a"
            " ON a.attrelid = c.conrelid AND a.attnum = ANY (c.conkey)"
            " WHERE c.conrelid = %s AND c.contype = 'c' AND a.attname = ANY (%s)"
            " GROUP BY conname ORDER BY conname",
            (table.oid, list(chosen)),
        ):
            yield (
                f"{table.name}: constraint {quote_ident(name)} holds on each node by itself; where the sum of"
                " what both added breaks it, the stream stops until somebody has decided"
            )


def _types(conn: Connection, table: TableInfo, columns: Mapping[str, str]) -> dict[str, str]:
    """Of those that are there."""
    return dict(
        conn.execute(
            "SELECT attname::text, format_type(atttypid, NULL) FROM pg_catalog.pg_attribute"
            " WHERE attrelid = %s AND attname = ANY (%s) AND NOT attisdropped",
            (table.oid, list(columns)),
        ).fetchall()
    )


def prepare(
    conn: Connection, table: TableInfo, buried: str, key: Sequence[str], chosen: Sequence[str]
) -> None:
    """The triggers that are not there; `buried`: name of the table of tombstones. In a transaction."""
    there = {row[0] for row in conn.execute("SELECT tgname FROM pg_trigger WHERE tgrelid = %s", (table.oid,))}
    types = _types(conn, table, dict.fromkeys(chosen, ""))
    rounding = [column for column in chosen if types.get(column) in _FINITE]
    sides = {
        name: sql.SQL(", ").join(sql.SQL(name.upper() + ".{}").format(sql.Identifier(one)) for one in key)
        for name in ("old", "new")
    }
    parts: dict[str, sql.Composable] = {
        "here": sql.Identifier(*table.name),
        "name": sql.Literal(buried),
        "columns": sql.Literal(", ".join(map(quote_ident, key))),
        "buried": sql.Literal(catalog.key_equality(conn, table, "b", "c")),
        "row": sql.Literal(catalog.key_equality(conn, table, "t", "c")),
        "infinite": _is_infinite("NEW", rounding),
        **sides,
    }
    for text in (_KEPT, _USED, _FINAL, _LASTING, *([_IS_FINITE] if rounding else [])):
        if text.split()[2] not in there:
            conn.execute(sql.SQL(text).format(**parts))


def share_used_keys(
    origin: Connection, peer: Connection, publication: PublicationInfo, *, copied: bool
) -> None:
    """Each node knows from now on which keys the other has used; inside the caller's transactions.

    Writers of the origin wait: who deleted before is read here, who deletes later finds a copy to be made.
    `copied`: the peer begins with one, and nothing is under way. Raises RefusedError where rows of the copy
    would meet their own tombstones.
    """
    for published in publication.tables:
        found = [_buried(conn, published.name) for conn in (origin, peer)]
        if found[0] is None or found[1] is None:
            continue
        for conn in (origin, peer):
            conn.execute("SET LOCAL datestyle = 'ISO, YMD'; SET LOCAL intervalstyle = 'postgres'")
            lock = sql.SQL("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE")
            conn.execute(lock.format(sql.Identifier(*published.name)))
        _bring(origin, peer, found[0], found[1])
        _bring(peer, origin, found[1], found[0])
        if copied:
            _require_gone(origin, published.name, found[0][0])


def _require_gone(origin: Connection, name: TableName, buried: str) -> None:
    table = catalog.describe(origin, name)
    if table is None:
        return
    same = catalog.key_equality(origin, table, "b", "t")
    met = f"SELECT FROM vsql_sync.{quote_ident(buried)} b, ONLY {name} t WHERE {same}"
    row = origin.execute(f"SELECT EXISTS ({met})".encode()).fetchone()
    if row is not None and row[0]:
        raise RefusedError(
            f"{name}: rows that live on this node were deleted on the peer, and would fall there when copied",
            hint=f"the peer was emptied by DELETE: take {name} out of vsql_sync.multi_writer_tables there, so"
            " that it is made anew, and repeat the command",
        )


def _buried(conn: Connection, name: TableName) -> tuple[str, list[str]] | None:
    row = conn.execute(
        "SELECT tombstones, key_columns FROM vsql_sync.multi_writer_tables"
        " WHERE (table_schema, table_name) = (%s, %s) AND delta_columns <> '{}'",
        name,
    ).fetchone()
    return None if row is None else (str(row[0]), list(row[1]))


def _bring(
    source: Connection, target: Connection, given: tuple[str, list[str]], taken: tuple[str, list[str]]
) -> None:
    """Tombstones of one node to another, as text: types and collations are the same."""
    columns = sql.SQL(", ").join(map(sql.Identifier, given[1]))
    read = sql.SQL("COPY (SELECT {} FROM {}) TO STDOUT").format(
        columns, sql.Identifier("vsql_sync", given[0])
    )
    there = sql.Identifier("vsql_sync", taken[0])
    came = sql.Identifier("pg_temp", "vsql_used")
    target.execute(
        sql.SQL("CREATE TEMPORARY TABLE vsql_used ON COMMIT DROP AS SELECT {} FROM {} WITH NO DATA").format(
            columns, there
        )
    )
    with source.cursor() as reading, target.cursor() as writing:
        with (
            reading.copy(read) as out,
            writing.copy(sql.SQL("COPY {} FROM STDIN").format(came)) as into,
        ):
            for block in out:
                into.write(block)
        names = sql.SQL("INSERT INTO {} ({}) SELECT {} FROM {} ON CONFLICT DO NOTHING")
        writing.execute(names.format(there, columns, columns, came))
        writing.execute(sql.SQL("DROP TABLE {}").format(came))


def _listed(columns: Sequence[str] | Mapping[str, str]) -> str:
    return ", ".join(sorted(columns)) or "nothing"
