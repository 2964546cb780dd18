"""What may be published of a table: pure decisions on a table's description. No statement is run here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from vsql_shared.changes import TableName, quote_ident
from vsql_shared.pg.catalog import TableInfo

# A publication's name is part of chain names, where a dot separates.
NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")

_KINDS = {
    "v": "a view", "m": "a materialized view", "f": "a foreign table", "S": "a sequence", "i": "an index",
    "I": "an index", "c": "a type", "t": "a TOAST table",
}  # fmt: skip


def table_problem(name: TableName, table: TableInfo | None, *, via_leaf: bool = False) -> str | None:
    """Why this cannot be published at all, or None. Partitions are tables of their own only by leaf."""
    if name.schema == "vsql_sync":
        return f"{name}: schema vsql_sync is never published"
    if table is None:
        return f"{name}: there is no such table (unquoted names are lower case; the default schema is public)"
    if table.kind not in ("r", "p"):
        return f"{name}: is {_KINDS.get(table.kind, 'no table')}; publish the tables it stands on"
    if table.persistence != "p":
        return f"{name}: is not in the WAL (unlogged or temporary); ALTER TABLE {name} SET LOGGED"
    if table.is_partition and not via_leaf:
        return f"{name}: is a partition; publish the partitioned table, or by leaf (--via-leaf)"
    return None


def choose_columns(
    table: TableInfo, listed: Sequence[str] | None, left_out: set[str], *, closed: bool = False
) -> tuple[tuple[str, ...] | None, list[str]]:
    """(columns to publish, problems); None stands for all, so that columns added later travel too.

    `closed`: they must not, so that the columns are always listed.

    Columns keep the table's order: a list in another order says the same. A table without columns of its own
    (none, or generated ones only) is published all the same: it has rows.
    """
    unknown = [column for column in listed or () if column not in table.column_names]
    if unknown:
        return None, [f"{table.name}: there is no column {', '.join(map(quote_ident, unknown))}"]
    sendable = [column.name for column in table.columns if column.may_be_sent]
    generated = [column for column in listed or () if column not in sendable]
    if generated:
        names = ", ".join(map(quote_ident, generated))
        return None, [f"{table.name}: column {names} is generated, the target computes it; leave it out"]
    wanted = table.sent_columns if listed is None else tuple(c for c in sendable if c in set(listed))
    chosen = tuple(column for column in wanted if column not in left_out)
    if wanted and not chosen:
        return None, [f"{table.name}: no column is left to publish"]
    return (None if listed is None and chosen == wanted and not closed else chosen), []


def authentication_problems(
    name: TableName, sent: Sequence[str], authentication: Mapping[str, str]
) -> list[str]:
    """One line for each column that must not leave; `authentication`: such columns, and why."""
    return [
        f"{name}: column {quote_ident(column)} {authentication[column]} and is never published; list the"
        " other columns or give --exclude-pci (a false match: `syncctl publication pci clear"
        f" {name}.{quote_ident(column)} --reason …`)"
        for column in sent
        if column in authentication
    ]


def leaf_problem(table: TableInfo, columns: Sequence[str] | None, where: str | None) -> str | None:
    """PostgreSQL takes lists and filters of each leaf then, and none of the table they belong to."""
    if table.kind != "p" or (columns is None and where is None):
        return None
    what = "a row filter" if where is not None else "a column list"
    return (
        f"{table.name}: {what} of a partitioned table needs publishing by root; leave --via-leaf out, or name"
        " the partitions, each with its own"
    )


def root_identity_problem(root: TableInfo, leaf: TableInfo) -> str | None:
    """Changes of a leaf travel under the root's identity: what the leaf writes down must hold it."""
    if root.identity is None:
        return (
            f"{root.name}: has no replica identity of its own, under which its partitions' rows are found;"
            f" {_remedy(root, None)}"
        )
    held = leaf.column_names if leaf.replica_identity == "f" else leaf.identity or ()
    if set(root.identity) <= set(held):
        return None
    wanted = "FULL" if root.replica_identity == "f" else "DEFAULT, or USING INDEX with the same columns"
    return (
        f"{leaf.name}: its replica identity differs from that of {root.name}, under which its rows travel;"
        f" ALTER TABLE {leaf.name} REPLICA IDENTITY {wanted}"
    )


def filter_problem(table: TableInfo, filtered: Sequence[str]) -> str | None:
    """UPDATE and DELETE are judged by the old row too, of which the WAL holds the identity only."""
    identity = table.identity
    missing = [column for column in filtered if column not in (identity or ())]
    if identity is None or not missing:
        return None
    names = ", ".join(map(quote_ident, missing))
    return (
        f"{table.name}: the row filter reads column {names}, which is not part of the replica identity; make"
        f" a unique index of NOT NULL columns with it and ALTER TABLE {table.name} REPLICA IDENTITY USING"
        " INDEX … (or REPLICA IDENTITY FULL, or --insert-only)"
    )


def identity_problem(table: TableInfo, columns: Sequence[str] | None, left_out: set[str]) -> str | None:
    """Why UPDATE and DELETE could not be published, with the statement that mends it; None if they can."""
    identity = table.identity
    if identity is None:
        return f"{table.name}: has no replica identity, UPDATE and DELETE need one; {_remedy(table, columns)}"
    if table.replica_identity == "f" and any(column.virtual for column in table.columns):
        return (
            f"{table.name}: REPLICA IDENTITY FULL sends every column before a change, and a virtual generated"
            f" one cannot be sent; {_remedy(table, table.column_names)}"
        )
    sent = table.sent_columns if columns is None else columns
    missing = [column for column in identity if column not in sent]
    if not missing and table.replica_identity == "f" and columns is not None:
        return (
            f"{table.name}: REPLICA IDENTITY FULL needs every column published, later ones too: PostgreSQL"
            f" refuses UPDATE and DELETE where columns are listed, be it all; {_remedy(table, columns)}"
        )
    if not missing:
        return None
    names = ", ".join(map(quote_ident, missing))
    if columns is None:
        return (
            f"{table.name}: key column {names} is generated and travels only where it is listed, which"
            f" PostgreSQL 18 and later can; list the columns, or {_remedy(table, sent)}"
        )
    if table.replica_identity == "f":
        return (
            f"{table.name}: REPLICA IDENTITY FULL sends every column before a change, {names} too, which"
            f" is left out; {_remedy(table, columns)}"
        )
    if left_out.intersection(missing):
        return (
            f"{table.name}: {names} is PCI data and is part of the key, so it cannot be left out;"
            f" {_remedy(table, columns)}"
        )
    other = f", or {_remedy(table, columns)}" if best_index(table, columns) is not None else ""
    return f"{table.name}: key column {names} must be in the column list, rows are found by it{other}"


def best_index(table: TableInfo, columns: Sequence[str] | None) -> str | None:
    """The unique index that can be the replica identity; '' is the primary key's, None: there is none."""
    fitting = [key for key in table.keys if _fits(table, key.columns, columns)]
    if any(key.primary for key in fitting):
        return ""
    return next((key.name for key in fitting), None)


def _remedy(table: TableInfo, columns: Sequence[str] | None) -> str:
    """The best statement at hand."""
    index = best_index(table, columns)
    if index == "":
        return f"ALTER TABLE {table.name} REPLICA IDENTITY DEFAULT (or --set-identity, or --insert-only)"
    if index is not None:
        return (
            f"ALTER TABLE {table.name} REPLICA IDENTITY USING INDEX {quote_ident(index)} (or --set-identity,"
            " or --insert-only)"
        )
    full = ", or ALTER TABLE … REPLICA IDENTITY FULL" if columns is None else ""
    return f"ALTER TABLE {table.name} ADD PRIMARY KEY (…){full} (or --insert-only)"


def _fits(table: TableInfo, key: Sequence[str], columns: Sequence[str] | None) -> bool:
    """Whether a unique index can be the replica identity: NOT NULL throughout, and published."""
    firm = {column.name for column in table.columns if column.not_null}
    return all(column in firm and (columns is None or column in columns) for column in key)
