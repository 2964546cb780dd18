"""Compares a publication's tables with those of a target, before anything moves. Only reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vsql_shared.changes import TableName, quote_ident
from vsql_shared.pg import catalog, row_order, schema_compare
from vsql_shared.pg.catalog import TableInfo
from vsql_shared.pg.connect import Connection
from vsql_shared.pg.publications import PARTITIONED, PublicationInfo, carried


def target_problems(origin: Connection, peer: Connection, publication: PublicationInfo) -> list[str]:
    """Why the target cannot take the publication's tables: one line each, with what to do."""
    found: list[str] = []
    for published in carried(origin, publication):
        source = catalog.describe(origin, published.name)
        target = catalog.describe(peer, published.name)
        if source is None:
            found.append(
                f"{published.name}: is published here and does not exist any more; publish again without it"
            )
        elif target is None:
            found.append(f"{published.name}: does not exist on the peer; create it there")
        else:
            columns = source.sent_columns if published.columns is None else published.columns
            found += table_problems(source, target, columns, insert_only=publication.insert_only)
            if publication.apply_mode == PARTITIONED:
                found += order_problems(origin, peer, source, target)
    return found


def order_problems(
    origin: Connection, peer: Connection, source: TableInfo, target: TableInfo
) -> Iterator[str]:
    """Why members on the peer could not apply the rows of a table side by side."""
    yield from row_order.source_problems(origin, source)
    identity = () if source.replica_identity == "f" else source.identity or ()
    yield from row_order.target_problems(peer, identity, target)
    types = {column.name: column.type for column in source.columns}
    for column in target.columns:
        if column.name in identity and types[column.name] != column.type:
            yield (
                f"{target.name}: key column {quote_ident(column.name)} is {column.type} on the peer and"
                f" {types[column.name]} here; where it is applied partitioned both are alike"
            )


def unlike(origin: Connection, peer: Connection, chosen: Sequence[PublicationInfo]) -> list[str]:
    """Tables of publications that both nodes have and do not define alike, as far as they travel."""
    wanted = {table.name: table.columns for one in chosen for table in carried(origin, one)}
    return [
        f"{one.table}: is not defined as on the peer: {one.difference}"
        for one in schema_compare.compare(origin, peer, wanted)
        if one.status == "MISMATCH"
    ]


def security_notes(origin: Connection, peer: Connection, tables: Sequence[TableName]) -> list[str]:
    """Tables with row security. Sessions of ours have row_security off: nothing is hidden in silence."""
    found = []
    for conn, who, where in ((origin, "producer", "this node"), (peer, "consumer", "the peer")):
        secured = [name for name in tables if (info := catalog.describe(conn, name)) and info.row_security]
        if secured:
            names = ", ".join(map(str, secured))
            found.append(
                f"{names}: has row-level security on {where}; the {who}'s user there must bypass it"
                " (ALTER ROLE … BYPASSRLS), or the stream stops at this table"
            )
    return found


def table_problems(
    source: TableInfo, target: TableInfo, columns: Sequence[str], *, insert_only: bool
) -> Iterator[str]:
    """Why rows of these columns could not be applied. Pure."""
    name = target.name
    if target.kind not in ("r", "p"):
        yield f"{name}: is no table on the peer; create one there"
        return
    there = {column.name: column for column in target.columns}
    # What both nodes generate is computed on each: the consumer says if it differs.
    ours = {column.name for column in source.columns if column.generated}
    missing = [column for column in columns if column not in there]
    if missing:
        yield f"{name}: the peer's table lacks column {', '.join(map(quote_ident, missing))}; add it there"
    generated = [c for c in columns if c in there and there[c].generated and c not in ours]
    if generated:
        yield (
            f"{name}: column {', '.join(map(quote_ident, generated))} is generated on the peer and comes with"
            " the stream; leave it out of the publication, or make it an ordinary column there"
        )
    unfilled = [
        column.name
        for column in target.columns
        if column.name not in columns and column.not_null and not column.has_default and not column.generated
    ]
    if unfilled:
        yield (
            f"{name}: column {', '.join(map(quote_ident, unfilled))} of the peer is NOT NULL, without"
            " default, and not published; publish it, or give it a default there"
        )
    if not insert_only and not missing:
        yield from _key_problem(source, target)


def _key_problem(source: TableInfo, target: TableInfo) -> Iterator[str]:
    """UPDATE and DELETE find their row by the source's identity; without an index each reads all rows."""
    identity = source.identity
    if identity is None:
        yield f"{source.name}: has lost its replica identity; publish it again"
        return
    if source.replica_identity == "f" and not any(set(key.columns) <= set(identity) for key in source.keys):
        return  # no key on either side: rows are compared whole
    if not any(set(key.columns) <= set(identity) for key in target.keys):
        names = ", ".join(map(quote_ident, identity))
        yield f"{target.name}: the peer's table has no unique index on {names}; create it there"
