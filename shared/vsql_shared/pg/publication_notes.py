"""What a publication cannot do, said when it is made. Reads only; refuses nothing."""

from __future__ import annotations

from collections.abc import Collection

from vsql_shared.changes import TableName, quote_ident
from vsql_shared.pg import catalog, pci, publications
from vsql_shared.pg.catalog import TableInfo
from vsql_shared.pg.connect import Connection, errors
from vsql_shared.pg.publications import PublicationInfo, PublishedTable

# attstorage x and e: large values lie outside of the row, and the WAL of an UPDATE leaves unchanged ones out.
_OUTSIDE = """
SELECT attname FROM pg_catalog.pg_attribute WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped
AND attstorage IN ('x', 'e') AND attname <> ALL(%s) ORDER BY attnum
"""


def limitations(conn: Connection, publication: PublicationInfo) -> list[str]:
    """One line each."""
    found: list[str] = []
    with errors("looking at the published tables"):
        for published in publication.tables:
            table = catalog.describe(conn, published.name)
            if table is not None:
                found += _of_filter(conn, publication, published, table)
                found += _of_shape(publication, table)
                found += _of_suggestions(conn, publication, published, table)
    return found


def _of_filter(
    conn: Connection, publication: PublicationInfo, published: PublishedTable, table: TableInfo
) -> list[str]:
    if published.where is None:
        return []
    found = [
        f"{published.name}: TRUNCATE is not filtered: it empties the table at the targets too",
    ]
    if not publication.insert_only:
        found.append(
            f"{published.name}: a row that an UPDATE takes out of the filter is deleted at the targets, and"
            " one that comes in is inserted there"
        )
        kept = list(table.identity or ())
        outside = [row[0] for row in conn.execute(_OUTSIDE, (table.oid, kept))]
        if outside and table.replica_identity != "f":
            names = ", ".join(map(quote_ident, outside))
            found.append(
                f"{published.name}: an UPDATE that brings a row into the filter must write large values of"
                f" {names}"
                " anew, or the stream stops there; with REPLICA IDENTITY FULL it need not"
            )
    return found


def of_marks(conn: Connection, marked: Collection[tuple[TableName, str]]) -> list[str]:
    """What columns that were marked just now mean for the publications that have them."""
    found: list[str] = []
    with errors("looking at the publications"):
        for publication in publications.everything(conn):
            for name, columns in publication.pci.items():
                table = catalog.describe(conn, name)
                if table is None:
                    continue
                kin, secret = pci.relatives(conn, table), pci.authentication(conn, table)
                for column in columns:
                    if not any(of in kin and column == one for of, one in marked):
                        continue
                    what = f"publication {publication.name} has {name}.{quote_ident(column)}"
                    stops = publication.exclude_pci or column in secret
                    found.append(
                        f"{what}, its streams stop at the next row: `syncctl publication remove-column"
                        f" {publication.name} {name}.{quote_ident(column)}`"
                        if stops
                        else f"{what}: it goes on, its batches are said to contain PCI data"
                    )
    return found


def _of_suggestions(
    conn: Connection, publication: PublicationInfo, published: PublishedTable, table: TableInfo
) -> list[str]:
    """Columns that look like PCI data and wait for somebody's decision."""
    sent = table.sent_columns if published.columns is None else published.columns
    found = []
    for name, one in pci.suggested(conn, table).items():
        column = f"{published.name}.{quote_ident(name)}"
        if name in sent:
            found.append(
                f"{column} looks like {one.looks_like} and is published: `syncctl publication pci mark` or"
                " `clear` it, or give --exclude-pci"
            )
        elif publication.exclude_pci:
            found.append(f"{column} looks like {one.looks_like} and is left out")
    return found


def _of_shape(publication: PublicationInfo, table: TableInfo) -> list[str]:
    found = []
    if table.kind == "p" and not publication.via_leaf:
        found.append(
            f"{table.name}: PostgreSQL does not send TRUNCATE of a single partition; truncate the whole"
            " table, or"
            " publish by leaf (--via-leaf)"
        )
    if table.kind == "p" or table.is_partition:
        found.append(f"{table.name}: rows a table holds when it is attached as a partition do not travel")
    if table.row_security:
        found.append(
            f"{table.name}: has row-level security; the producer's user must bypass it (ALTER ROLE …"
            " BYPASSRLS),"
            " or the first copy stops there"
        )
    return found
