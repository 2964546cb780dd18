"""Brings [[publications]], [[peers]] and [[pci.columns]] of the configuration into the database.

`plan` says what would change, `apply` does it. What is in the database and not in the file stays: a line
deleted from a file must not stop a stream. Rules:

* `plan` tries everything in a transaction that is rolled back, so what it shows is what would happen, with
  the same refusals.
* A peer's key fingerprint is part of what is shown; `apply` refuses a peer that shows another one by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vsql_shared.changes import TableName
from vsql_shared.config import PeerSettings, PublicationSettings, Settings
from vsql_shared.config.strategies import strategies_of
from vsql_shared.errors import NotBuiltError, RefusedError
from vsql_shared.pg import nodes, pci, peers, publication_changes, publication_use, publications
from vsql_shared.pg.connect import Connection, connect, errors
from vsql_shared.pg.publications import PublicationInfo, PublicationRequest
from vsql_shared.pg.table_spec import TableSpec, parse_spec, parse_table


@dataclass(frozen=True, slots=True)
class Change:
    """One difference between file and database."""

    kind: str
    """pci-column, publication or peer."""
    name: str
    action: str
    """mark, create, change or add."""
    detail: str
    fingerprint: str = ""
    """A peer's key as it was shown."""
    notes: tuple[str, ...] = ()
    """What is worth knowing and does not stop anything."""


def plan(conn: Connection, settings: Settings) -> list[Change]:
    """The differences; nothing is changed. Raises what `apply` would raise."""
    nodes.local(conn)
    with errors("comparing the configuration with the database"), conn.transaction(force_rollback=True):
        changes = [*_plan_pci(conn, settings), *_plan_publications(conn, settings)]
        return [*changes, *_plan_peers(conn, settings)]


def apply(conn: Connection, settings: Settings, changes: Sequence[Change]) -> None:
    """Make the differences go away, in order: marks and publications in one transaction, then each peer."""
    wanted = {(change.kind, change.name): change for change in changes}
    with errors("applying the configuration"), conn.transaction():
        for name, column in _marks(settings):
            pci.mark(conn, [(name, column)])
        for publication in settings.publications:
            if ("publication", publication.name) in wanted:
                _bring(conn, request_of(publication))
    for peer in settings.peers:
        change = wanted.get(("peer", peer.node_name))
        if change is not None:
            _add_peer(conn, settings, peer, change)


def request_of(publication: PublicationSettings) -> PublicationRequest:
    """What a section [[publications]] asks for."""
    if publication.mode != "uni-directional":
        raise NotBuiltError(
            f'mode "{publication.mode}" in a file is not built yet',
            hint="leave it out: `syncctl node add-peer --mode bidirectional` makes it so",
        )
    specs = []
    for table in publication.tables:
        spec = parse_spec(table.name, exclude_pci=table.exclude_pci)
        columns = spec.columns if table.columns is None else tuple(table.columns)
        if table.where is not None and spec.name is None:
            raise RefusedError('"*" has no row filter', hint="name the table: filters are of one table each")
        specs.append(TableSpec(spec.name, columns, table.exclude_pci, table.where))
    return PublicationRequest(
        publication.name,
        tuple(specs),
        via_leaf=publication.via_leaf,
        apply_mode=publication.apply_mode,
        message_prefixes=tuple(publication.message_prefixes),
        sequences=publication.sequences,
        more_sequences=tuple(map(parse_table, publication.more_sequences)),
    )


def _bring(conn: Connection, request: PublicationRequest) -> PublicationInfo:
    """Create or change a publication; of one that streams use, let columns in or take them out."""
    before = publications.find(conn, request.name)
    if before is None or publication_use.stream_of(conn, request.name) is None:
        return publications.create(conn, request)
    after = publications.asked(conn, request)
    if before != after:
        publication_changes.follow(conn, before, after)
    return after


def _marks(settings: Settings) -> Iterator[tuple[TableName, str]]:
    for entry in settings.pci.columns:
        for column in entry.columns:
            yield parse_table(entry.table), column


def _plan_pci(conn: Connection, settings: Settings) -> Iterator[Change]:
    for name, column in _marks(settings):
        if pci.mark(conn, [(name, column)]):
            yield Change("pci-column", f"{name}.{column}", "mark", "holds PCI data")


def _plan_publications(conn: Connection, settings: Settings) -> Iterator[Change]:
    for publication in settings.publications:
        before = publications.find(conn, publication.name)
        after = _bring(conn, request_of(publication))
        if before != after:
            tables = ", ".join(
                f"{table.name}"
                + ("" if table.columns is None else f"({', '.join(table.columns)})")
                + (f" WHERE {table.where}" if table.where else "")
                for table in after.tables
            )
            yield Change("publication", publication.name, "create" if before is None else "change", tables)


def _plan_peers(conn: Connection, settings: Settings) -> Iterator[Change]:
    for peer in settings.peers:
        with _open(peer) as other:
            planned = peers.look(conn, other, _peer_request(settings, peer))
        query = "SELECT chain FROM vsql_sync.stream_targets WHERE target = %s"
        known = {row[0] for row in conn.execute(query, (peer.node_name,))}
        new = [stream.chain for stream in planned.streams if stream.chain not in known]
        pinned = conn.execute(
            "SELECT FROM vsql_sync.nodes WHERE node_id = %s AND key_fingerprint IS NOT DISTINCT FROM %s",
            (peer.node_name, planned.peer.key_fingerprint),
        ).fetchone()
        if new or pinned is None:
            shown = _keys(planned)
            detail = f"key {shown}" + (f", streams {', '.join(new)}" if new else "")
            yield Change("peer", peer.node_name, "add", detail, shown, planned.notes)


def _keys(planned: peers.PeerPlan) -> str:
    """The keys that would be pinned: the peer's, and those of both that have ended."""
    shown = [planned.peer.key_fingerprint or "unsigned"]
    shown += [
        f"{key.fingerprint} of {key.node} ({'revoked' if key.revoked else 'retired'})"
        for key in planned.former
    ]
    return ", ".join(shown)


def _add_peer(conn: Connection, settings: Settings, peer: PeerSettings, change: Change) -> None:
    with _open(peer) as other:
        planned = peers.look(conn, other, _peer_request(settings, peer))
        shown = _keys(planned)
        if shown != change.fingerprint:
            raise RefusedError(
                f"peer {peer.node_name} shows key {shown}, a moment ago it was {change.fingerprint}",
                hint="ask its operator; nothing was changed for this peer",
            )
        peers.add(conn, other, planned)


def _peer_request(settings: Settings, peer: PeerSettings) -> peers.PeerRequest:
    return peers.PeerRequest(
        number=peer.node_id,
        name=peer.node_name,
        mode=peer.mode,
        schema_sync=settings.replication.initialization.schema_sync.mode,
        allow_unsigned=not settings.is_prod,
        strategies=strategies_of(settings),
    )


def _open(peer: PeerSettings) -> Connection:
    return connect(peer.connection.get_secret_value(), application_name="vsql_sync_ctl")
