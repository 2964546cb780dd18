"""Gathers what a scope report says: decisions, catalog, chains, and what was written down of the streams.

Not here: the report (audit/scope_report.py). Rules:

* The streams are this node's live one and all first copies of it that its trail still has, ended ones too.
* Each chain is verified before anything of it is believed, and read up to the entry that was verified last.
* A table that was seen on a stream is in the report, published or not.
* What a signed manifest named as PCI data counts as such, whatever became of mark, column or table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from vsql_shared import names
from vsql_shared.audit.entries import EPOCH_OPENED
from vsql_shared.audit.rows import parse
from vsql_shared.audit.scope_history import SCOPE, StreamHistory
from vsql_shared.audit.scope_report import ClearedColumn, Facts, PciColumn, Stream, TableFacts
from vsql_shared.audit.store import iterate
from vsql_shared.audit.verify import verify_table
from vsql_shared.changes import TableName, quote_ident
from vsql_shared.crypto.signing import TrustStore
from vsql_shared.errors import ChainError, RefusedError
from vsql_shared.pg import catalog, many_writers, nodes, pci, publications
from vsql_shared.pg.catalog import TableInfo
from vsql_shared.pg.connect import Connection, errors
from vsql_shared.pg.pci_names import Kind, suggest
from vsql_shared.pg.table_spec import parse_table

_IDENTITIES = {"d": "default", "i": "index", "f": "full", "n": "nothing"}
_CHAINS = """
SELECT chain FROM vsql_sync.chain_heads WHERE own AND (chain = %(live)s::text
    OR (pg_catalog.starts_with(chain, %(live)s::text || '.copy.') AND chain !~ '\\.ack\\.')) ORDER BY chain
"""


def gather(conn: Connection, publication: str, trust: TrustStore) -> Facts:
    """Everything about one publication of this node. Raises ChainError where its trail does not verify."""
    node = nodes.local(conn)
    info = publications.find(conn, publication)
    if info is None:
        raise RefusedError(
            f"there is no publication {publication} on this node", hint="see `syncctl publication list`"
        )
    streams = _streams(conn, names.live_chain(publication, node.name), node.cluster, trust)
    with errors("reading the publication's tables"):
        published = {one.name: one for one in publications.carried(conn, info)}
        seen = {table for stream in streams for table, _ in stream.history.observed}
        seen |= {table for stream in streams for table in stream.history.unobserved}
        gone = sorted(seen - {str(name) for name in published})
        tables = [_table(conn, publication, one, streams) for _, one in sorted(published.items())]
        tables += [_unpublished(conn, parse_table(text), streams) for text in gone]
        roles = conn.execute(
            "SELECT rolname FROM pg_catalog.pg_roles r WHERE EXISTS (SELECT FROM pg_catalog.pg_roles p"
            " WHERE (p.rolreplication OR p.rolsuper) AND pg_catalog.pg_has_role(r.oid, p.oid, 'MEMBER'))"
            " ORDER BY 1"
        ).fetchall()
        slots = conn.execute("SELECT slot_name FROM pg_catalog.pg_replication_slots ORDER BY 1").fetchall()
        shared = [one for one in many_writers.shared_tables(conn) if one.publication == publication]
    return Facts(
        cluster=node.cluster,
        node=node.name,
        publication=publication,
        exclude_pci=info.exclude_pci,
        message_prefixes=tuple(info.message_prefixes),
        tables=tuple(tables),
        streams=tuple(streams),
        reader_roles=tuple(str(row[0]) for row in roles),
        reader_slots=tuple(str(row[0]) for row in slots),
        other_writers=tuple(sorted({w for one in shared for w in one.writers} - {node.name})),
    )


def out_since(conn: Connection, publication: str, table: TableName, column: str) -> int | None:
    """The live stream's epoch, where it was opened under a scope that takes the column out; else None."""
    chain = names.live_chain(publication, nodes.local(conn).name)
    with errors("looking at the stream's epoch"):
        row = conn.execute(
            "SELECT document FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND event_type = %s"
            " ORDER BY sequence DESC LIMIT 1",
            (chain, EPOCH_OPENED),
        ).fetchone()
        if row is None:
            return None
        entry = parse(bytes(row[0])).entry
        text = conn.execute(
            "SELECT scope FROM vsql_sync.scopes WHERE (chain, sha256) = (%s, %s)",
            (chain, json.loads(entry.detail).get(SCOPE, "")),
        ).fetchone()
    tables = json.loads(text[0])["tables"] if text is not None else []
    out = any(one["table"] == str(table) and column in one["removed"] for one in tables)
    return entry.epoch if out else None


def is_running(conn: Connection, publication: str) -> bool:
    """Whether the live stream's producer is at work."""
    chain = names.live_chain(publication, nodes.local(conn).name)
    row = conn.execute(
        "SELECT state = 'running' AND updated_at > now() - interval '15 seconds' FROM vsql_sync.stream_status"
        " WHERE chain = %s AND direction = 'out'",
        (chain,),
    ).fetchone()
    return row is not None and bool(row[0])


def _streams(conn: Connection, live: str, cluster: str, trust: TrustStore) -> list[Stream]:
    with errors("reading the chains"):
        chains = [row[0] for row in conn.execute(_CHAINS, {"live": live})]
    return [_stream(conn, chain, cluster, trust) for chain in chains]


def _stream(conn: Connection, chain: str, cluster: str, trust: TrustStore) -> Stream:
    report = verify_table(conn, trust, cluster, chain)
    if report.problems:
        first = report.problems[0]
        raise ChainError(
            f"the trail does not verify: {first.what}",
            record=f"{first.chain}/{first.sequence}",
            hint="a report on it would prove nothing; see `syncctl audit verify`",
        )
    (verified,) = report.chains
    with errors("reading what was written down of the stream"):
        scopes: dict[str, str] = dict(
            conn.execute("SELECT sha256, scope FROM vsql_sync.scopes WHERE chain = %s", (chain,)).fetchall()
        )
        rows = conn.execute(
            "SELECT epoch, batch, seen FROM vsql_sync.scope_seen WHERE chain = %s", (chain,)
        ).fetchall()
    history = StreamHistory(chain, {(epoch, batch): text for epoch, batch, text in rows}, scopes)
    for stored in iterate(conn, chain):
        if stored.entry.sequence > verified.sequence:
            break
        history.take(stored.entry)
    history.finish()
    return Stream(history, verified.entry_hash.hex())


def _table(
    conn: Connection, publication: str, published: publications.PublishedTable, streams: Sequence[Stream]
) -> TableFacts:
    name = published.name
    table = catalog.describe(conn, name)
    if table is None:
        return _unpublished(conn, name, streams)
    sent = _whole(conn, publication, table) if published.columns is None else published.columns
    found, cleared = _pci(conn, name, table, streams)
    return TableFacts(
        str(name),
        table.column_names,
        tuple(sent),
        found,
        cleared,
        _IDENTITIES.get(table.replica_identity, table.replica_identity),
        published.where,
    )


def _whole(conn: Connection, publication: str, table: TableInfo) -> tuple[str, ...]:
    """What travels of a table without a list: stored generated columns, too, where they are published."""
    row = conn.execute(
        "SELECT attnames::text[] FROM pg_catalog.pg_publication_tables"
        " WHERE (pubname, schemaname, tablename) = (%s, %s, %s)",
        (publication, *table.name),
    ).fetchone()
    theirs = row[0] if row is not None else ()
    computed = {column.name for column in table.columns if column.generated and column.may_be_sent}
    return tuple(
        one for one in table.column_names if one in table.sent_columns or (one in computed and one in theirs)
    )


def _unpublished(conn: Connection, name: TableName, streams: Sequence[Stream]) -> TableFacts:
    """A table that streams carried and that is not published now; it may be gone, or have another name."""
    table = catalog.describe(conn, name)
    found, cleared = _pci(conn, name, table, streams)
    if table is None:
        return TableFacts(str(name), (), None, found, cleared, "unknown")
    return TableFacts(str(name), table.column_names, None, found, cleared)


def _seen(table: str, streams: Sequence[Stream]) -> list[str]:
    """Columns of a table on any stream, in the order they came."""
    found = (one for stream in streams for one in stream.history.observed.values() if one.table == table)
    return list(dict.fromkeys(column for one in found for column in one.columns))


def _pci(
    conn: Connection, name: TableName, table: TableInfo | None, streams: Sequence[Stream]
) -> tuple[tuple[PciColumn, ...], tuple[ClearedColumn, ...]]:
    """What counts as PCI data of a table's columns and of those it had once; what was cleared of them."""
    if table is None:
        kin, marked = {name}, pci.marked(conn, name)
        secret = pci.marked(conn, name, Kind.AUTHENTICATION)
    else:
        kin, marked = pci.relatives(conn, table), pci.marked_anywhere(conn, table)
        secret = set(pci.authentication(conn, table))
    rows = conn.execute(
        "SELECT table_schema, table_name, column_name, looks_like, reason, cleared_by, cleared_at"
        " FROM vsql_sync.pci_cleared ORDER BY 3, 1, 2"
    ).fetchall()
    cleared = [ClearedColumn(*row[2:]) for row in rows if TableName(*row[:2]) in kin]
    types = {} if table is None else {column.name: column.type for column in table.columns}
    former = [column for column in _seen(str(name), streams) if column not in types]
    settled = pci.cleared_of(conn, kin)
    names = {**types, **dict.fromkeys(former, "text")}
    found = {
        one.column: one
        for one in _suggested(names)
        if not pci.is_cleared(one.column, Kind(one.kind), settled)
    }
    told = {one for stream in streams for one in stream.history.pci_columns}
    for column in names:
        kind = "authentication" if column in secret else "cardholder"
        if column in marked:
            found[column] = PciColumn(column, kind, "marked")
        elif f"{name}.{quote_ident(column)}" in told:
            found.setdefault(column, PciColumn(column, kind, "named in a manifest"))
    return tuple(found[column] for column in names if column in found), tuple(cleared)


def _suggested(types: Mapping[str, str]) -> list[PciColumn]:
    found = ((name, suggest(name, type_name)) for name, type_name in types.items())
    return [PciColumn(name, one.kind.value, f"looks like {one.looks_like}") for name, one in found if one]
