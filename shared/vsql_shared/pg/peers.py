"""Adds a peer: checks both databases, pins each node's key in the other, and writes the rows of the streams.

Runs on the origin: the peer becomes a subscriber of the origin's publications. In order:

1. `look` reads both databases and refuses whatever would fail later. It changes nothing.
2. The operator compares the key fingerprints (the command asks; this module never decides to trust).
3. `add` writes both databases. Both transactions are complete before either commits; the peer's commits
   first, and every row may be written again, so a failure in between is mended by the same command.

Streams begin as `stopped`: `syncctl start` on each node lets them run. A first copy is always made unless
the operator declines it, also of empty tables: rows that come between now and the first start are in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from vsql_shared import names
from vsql_shared.changes import TableName
from vsql_shared.crypto.signing import PinnedKey, fingerprint
from vsql_shared.errors import NotBuiltError, RefusedError
from vsql_shared.pg import (
    catalog,
    deltas,
    generations,
    many_writers,
    migrate,
    nodes,
    oplog,
    publication_leaves,
    publications,
    roles,
    schema_compare,
    sequences,
    signers,
)
from vsql_shared.pg.connect import Connection, errors
from vsql_shared.pg.nodes import NodeInfo
from vsql_shared.pg.peer_tables import security_notes, target_problems, unlike
from vsql_shared.pg.publications import PublicationInfo
from vsql_shared.pg.table_spec import TableSpec
from vsql_shared.strategies import Strategies

# The audit topic has one partition. Stored with each stream, so that it may have more one day.
AUDIT_PARTITION = 0

BIDIRECTIONAL = "bidirectional"
SCHEMA_SYNC = ("strict", "manual")
"""What may be done about tables that differ; "auto" would change the peer's."""


@dataclass(frozen=True, slots=True)
class PeerRequest:
    """What an operator asks for."""

    number: int
    name: str | None
    """None: whatever the peer's database says."""
    mode: str = "uni-directional"
    publications: tuple[str, ...] = ()
    """None named: all of the origin's."""
    copy: bool = True
    schema_sync: str = "manual"
    """Tables that are not defined alike: "strict" refuses them, "manual" notes them."""
    allow_unsigned: bool = False
    """Whether a node without a signing key is accepted (dev mode)."""
    strategies: Strategies = field(default_factory=Strategies)
    """Of tables that both nodes are to write."""


@dataclass(frozen=True, slots=True)
class Stream:
    """Rows to be: one chain, its outgoing side here and its incoming side on the target."""

    chain: str
    kind: str
    publication: str
    origin: str
    target: str
    slot_name: str
    origin_name: str
    audit_partition: int
    ack_partition: int
    copy_wanted: bool
    apply_mode: str = publications.TRANSACTIONAL


@dataclass(frozen=True, slots=True)
class PeerPlan:
    """What `add` will write."""

    origin: NodeInfo
    peer: NodeInfo
    publications: tuple[PublicationInfo, ...]
    streams: tuple[Stream, ...]
    back: tuple[Stream, ...]
    """Streams of the peer, where both write."""
    former: tuple[PinnedKey, ...]
    """Keys of both that have ended and the other does not know: chains begin with what they signed."""
    notes: tuple[str, ...]
    """What is worth knowing and does not stop anything."""
    strategies: Strategies = field(default_factory=Strategies)
    """Of tables that both nodes write."""


def look(origin: Connection, peer: Connection, request: PeerRequest) -> PeerPlan:
    """Check everything and say what would be written. Raises RefusedError; changes nothing."""
    _require_built(request)
    here, there = _both(origin, peer, request)
    chosen = _choose(origin, request.publications)
    streams = tuple(
        stream
        for publication in chosen
        for stream in plan_streams(
            here, there.name, publication.name, copy=request.copy, apply_mode=publication.apply_mode
        )
    )
    with errors("comparing the tables of both nodes"):
        problems = [line for publication in chosen for line in target_problems(origin, peer, publication)]
        problems += [line for one in chosen for line in sequences.target_problems(origin, peer, one.name)]
        problems += _overlaps(origin, chosen, there.name)
        problems += _writers_problems(origin, peer, (here, there), chosen, request)
        differing = unlike(origin, peer, chosen)
        if request.schema_sync == "strict":
            problems += [f'{line} (schema sync is "strict")' for line in differing]
        # Only tables that are there can be looked into.
        problems += _filled(origin, peer, chosen, streams) if request.copy and not problems else []
        notes = [*differing, *security_notes(origin, peer, _names(origin, chosen))] if not problems else []
        if request.mode == BIDIRECTIONAL and not problems:
            notes += [line for one in chosen for line in deltas.notes(origin, one, request.strategies)]
    if problems:
        lines = "\n  ".join(problems)
        raise RefusedError(f"peer {there.name} is refused, nothing was changed:\n  {lines}")
    if not chosen:
        notes.append(f"node {here.name} has no publication: only the keys are exchanged")
    former = (*_former(origin, peer, here), *_former(peer, origin, there))
    back = tuple(
        stream
        for publication in chosen
        if request.mode == BIDIRECTIONAL
        for stream in plan_streams(there, here.name, publication.name, copy=False)
    )
    return PeerPlan(here, there, tuple(chosen), streams, back, former, tuple(notes), request.strategies)


def _writers_problems(
    origin: Connection,
    peer: Connection,
    both: tuple[NodeInfo, NodeInfo],
    chosen: Sequence[PublicationInfo],
    request: PeerRequest,
) -> Iterator[str]:
    """What stands against tables that both nodes write, or against one writer of tables that others write."""
    here, there = both
    mode = request.mode
    sides = ((origin, here.name, there.name), (peer, there.name, here.name))
    for publication in chosen:
        tables = [table.name for table in publications.carried(origin, publication)]
        for conn, where, other in sides:
            partner = other if mode == BIDIRECTIONAL else None
            yield from many_writers.outsiders(conn, where, tables, publication.name, partner)
        if mode != BIDIRECTIONAL:
            continue
        for conn, where, _ in sides:
            yield from many_writers.problems(conn, where, publication, request.strategies)
        ours, theirs = schema_compare.read(origin, tables), schema_compare.read(peer, tables)
        for name in sorted(ours.keys() & theirs.keys()):
            yield from many_writers.uneven(name, ours[name], theirs[name])
        yield from many_writers.running(peer, there.name, publication.name)
    if mode == BIDIRECTIONAL:
        yield from many_writers.disagreements(origin, peer)


def _former(owner: Connection, other: Connection, node: NodeInfo) -> list[PinnedKey]:
    """A node's keys that have ended and `other` does not know. Raises RefusedError if its present one has."""
    ended = signers.former(owner, node.name)
    if node.key_fingerprint in {key.fingerprint for key in ended}:
        raise RefusedError(
            f"key {node.key_fingerprint} of node {node.name} was retired or revoked there",
            hint="make a new key, and repeat `syncctl node init` there",
        )
    known = {key.fingerprint for key in signers.load(other, node.name)}
    return [key for key in ended if key.fingerprint not in known]


def _require_built(request: PeerRequest) -> None:
    if request.schema_sync not in SCHEMA_SYNC:
        raise NotBuiltError(
            f'schema sync "{request.schema_sync}" is not built yet',
            hint='use "--schema-sync strict" or "--schema-sync manual"',
        )


def add(origin: Connection, peer: Connection, plan: PeerPlan) -> None:
    """Write what the plan says into both databases; the same plan may be written again."""
    targets = _names(origin, plan.publications)
    # The inner context ends first: the peer commits before the origin.
    with errors(f"adding peer {plan.peer.name}"), origin.transaction(), peer.transaction():
        nodes.register_peer(peer, replace(plan.origin, mode=_mode(plan)))
        signers.adopt(peer, [key for key in plan.former if key.node == plan.origin.name])
        if plan.back:
            _add_back(origin, peer, plan)
        write_incoming(peer, plan.streams)
        roles.grant_target(peer, targets)
        names_there = sequences.target_names(origin, peer, [one.name for one in plan.publications])
        roles.grant_sequences(peer, roles.CONSUMER, names_there)
        oplog.record(
            peer, "peer.add", "node", plan.origin.name, new=_as_json(plan.origin, plan.streams, "in")
        )
        nodes.register_peer(origin, plan.peer)
        signers.adopt(origin, [key for key in plan.former if key.node == plan.peer.name])
        write_outgoing(origin, plan.streams)
        for publication in plan.publications:
            # Partitions may have been made since; the first copy reads them.
            publications.grant_reading(origin, publication)
        many_writers.share_priorities(origin, peer)
        oplog.record(origin, "peer.add", "node", plan.peer.name, new=_as_json(plan.peer, plan.streams, "out"))


def _mode(plan: PeerPlan) -> str:
    return BIDIRECTIONAL if plan.back else "uni-directional"


def _add_back(origin: Connection, peer: Connection, plan: PeerPlan) -> None:
    """The peer's publications of the same names, and their streams to the origin.

    The peer's tables are closed first, and looked at once more: what came since `look` would never be sent.
    """
    copied = any(stream.kind == "copy" for stream in plan.streams)
    for publication in plan.publications:
        tables = tuple(TableSpec(table.name, table.columns) for table in publication.tables)
        marked = tuple((table, column) for table, columns in publication.pci.items() for column in columns)
        twin = publications.create(peer, publications.PublicationRequest(publication.name, tables, marked))
        floors = _floors(origin, peer, publication, plan)
        # What the origin's clients write now is in the copy.
        many_writers.prepare(origin, publication, plan.strategies, writable=copied)
        many_writers.prepare(peer, twin, plan.strategies, writable=False)
        generations.set_floors(origin, floors, later=copied)
        generations.set_floors(peer, floors, later=False)
        begins = copied and not _is_known(peer, publication, plan)
        deltas.share_used_keys(origin, peer, publication, copied=begins)
    filled = _filled(origin, peer, plan.publications, plan.streams)
    if filled:
        raise RefusedError("\n  ".join([f"peer {plan.peer.name} is refused, nothing was changed:", *filled]))
    write_outgoing(peer, plan.back)
    write_incoming(origin, plan.back)
    roles.grant_target(origin, _names(origin, plan.publications))


def _floors(
    origin: Connection, peer: Connection, publication: PublicationInfo, plan: PeerPlan
) -> dict[TableName, int]:
    """Floors of generations, where the peer begins: one that was added before has them."""
    if _is_known(peer, publication, plan):
        return {}
    return generations.floors(origin, peer, publication, plan.strategies)


def _is_known(peer: Connection, publication: PublicationInfo, plan: PeerPlan) -> bool:
    """Whether the peer was added before, and has its streams."""
    chains = [stream.chain for stream in plan.streams if stream.publication == publication.name]
    row = peer.execute(
        "SELECT EXISTS (SELECT FROM vsql_sync.streams WHERE direction = 'in' AND chain = ANY (%s))", (chains,)
    ).fetchone()
    return row is not None and bool(row[0])


def _names(origin: Connection, chosen: Sequence[PublicationInfo]) -> list[TableName]:
    """The tables as they travel."""
    return [table.name for one in chosen for table in publications.carried(origin, one)]


def plan_streams(
    here: NodeInfo, target: str, name: str, *, copy: bool, apply_mode: str = publications.TRANSACTIONAL
) -> list[Stream]:
    """The live stream of publication `name`, and its first copy for one target if wanted."""
    chains = [(names.live_chain(name, here.name), "live")]
    if copy:
        chains.append((names.copy_chain(name, here.name, target), "copy"))
    return [
        Stream(
            chain=chain,
            kind=kind,
            publication=name,
            origin=here.name,
            target=target,
            slot_name=names.slot_name(here.cluster, name, here.name, "*" if kind == "live" else target),
            # One origin for both: copied rows count as written by the stream that changes them later.
            origin_name=names.origin_name(here.cluster, name, here.name, target),
            audit_partition=AUDIT_PARTITION,
            ack_partition=AUDIT_PARTITION,
            copy_wanted=copy,
            # A copy is one transaction a table, and applied by one.
            apply_mode=apply_mode if kind == "live" else publications.TRANSACTIONAL,
        )
        for chain, kind in chains
    ]


def write_outgoing(conn: Connection, streams: Sequence[Stream]) -> None:
    """Rows of the origin; inside the caller's transaction. A running live stream stays as it is."""
    for stream in streams:
        conn.execute(
            "INSERT INTO vsql_sync.streams (chain, direction, kind, publication, origin, target, slot_name,"
            " audit_partition, ack_partition) VALUES (%s, 'out', %s, %s, %s, %s, %s, %s, %s)"
            " ON CONFLICT (chain, direction) DO NOTHING",
            (
                stream.chain, stream.kind, stream.publication, stream.origin,
                "*" if stream.kind == "live" else stream.target, stream.slot_name,
                stream.audit_partition, stream.ack_partition,
            ),
        )  # fmt: skip
        conn.execute(
            "INSERT INTO vsql_sync.stream_targets (chain, target) VALUES (%s, %s) ON CONFLICT DO NOTHING",
            (stream.chain, stream.target),
        )


def write_incoming(conn: Connection, streams: Sequence[Stream]) -> None:
    """Rows of the target; inside the caller's transaction."""
    for stream in streams:
        conn.execute(
            "INSERT INTO vsql_sync.streams (chain, direction, kind, publication, origin, target, origin_name,"
            " audit_partition, ack_partition, copy_wanted, apply_mode)"
            " VALUES (%s, 'in', %s, %s, %s, %s, %s, %s, %s, %s, %s)"
            " ON CONFLICT (chain, direction) DO NOTHING",
            (
                stream.chain, stream.kind, stream.publication, stream.origin, stream.target,
                stream.origin_name, stream.audit_partition, stream.ack_partition, stream.copy_wanted,
                stream.apply_mode,
            ),
        )  # fmt: skip


def _both(origin: Connection, peer: Connection, request: PeerRequest) -> tuple[NodeInfo, NodeInfo]:
    """Both nodes, if they are two nodes of one cluster that may know each other."""
    here, there = nodes.local(origin), nodes.local(peer)
    migrate.require_current(origin)
    migrate.require_current(peer)
    if there.cluster != here.cluster:
        raise RefusedError(
            f"the peer is of cluster {there.cluster}, this node of {here.cluster}",
            hint="check --peer-connection",
        )
    if there.number == here.number or there.name == here.name:
        raise RefusedError(
            f"the peer is node {there.name} with number {there.number},"
            f" this node is {here.name} with {here.number}",
            hint="check --peer-connection; it must reach another node's database",
        )
    if there.number != request.number or request.name not in (None, there.name):
        raise RefusedError(
            f"the database behind --peer-connection is node {there.name} with number {there.number},"
            f" not {request.name or 'a node'} with number {request.number}",
            hint="check --peer-connection, --peer-node-id and --peer-name",
        )
    check_keys(here, there, request.allow_unsigned)
    with errors("reading the pinned keys"):
        nodes.check_peer(origin, there)
        nodes.check_peer(peer, here)
    info = peer.info
    return here, replace(there, is_local=False, host=info.host or there.host, port=info.port)


def check_keys(here: NodeInfo, there: NodeInfo, allow_unsigned: bool) -> None:
    """Each node has a key, unless unsigned nodes are allowed, and no two share one."""
    for node in (here, there):
        if node.public_key is None and not allow_unsigned:
            raise RefusedError(
                f"node {node.name} has no signing key",
                hint="`syncctl key generate` there, set audit.signing_key_path, repeat `syncctl node init`",
            )
        if node.public_key is not None and fingerprint(node.public_key) != node.key_fingerprint:
            raise RefusedError(
                f"the key of node {node.name} does not have the fingerprint beside it",
                hint="vsql_sync.nodes was altered there; run `syncctl node init` again",
            )
    if here.public_key is not None and here.public_key == there.public_key:
        raise RefusedError(
            f"nodes {here.name} and {there.name} have the same key", hint="each node has its own"
        )


def _choose(conn: Connection, wanted: Sequence[str]) -> list[PublicationInfo]:
    known = {publication.name: publication for publication in publications.everything(conn)}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise RefusedError(
            f"there is no publication {', '.join(unknown)} on this node",
            hint="see `syncctl publication list`",
        )
    return [known[name] for name in dict.fromkeys(wanted or known)]


def _overlaps(conn: Connection, chosen: Sequence[PublicationInfo], target: str) -> list[str]:
    """A table reaches a target through one stream only: two would have no common order."""
    others = {row[0] for row in conn.execute(
        "SELECT s.publication FROM vsql_sync.streams s JOIN vsql_sync.stream_targets t USING (chain)"
        " WHERE s.direction = 'out' AND s.kind = 'live' AND s.state <> 'FINISHED' AND t.target = %s",
        (target,),
    )} - {publication.name for publication in chosen}  # fmt: skip
    carried: dict[TableName, str] = {}
    found = []
    running = [info for info in publications.everything(conn) if info.name in others]
    for publication in [*running, *chosen]:
        for table in publication.tables:
            # A partition may travel by itself in one, and as a part of its table in another.
            family = publication_leaves.family(conn, table.name)
            first = next((carried[name] for name in sorted(family) if name in carried), publication.name)
            carried |= dict.fromkeys(family - carried.keys(), publication.name)
            if first != publication.name:
                found.append(
                    f"{table.name}: is in publications {first} and {publication.name}; one target takes a"
                    " table from one of them, choose with --publication"
                )
    return found


def _filled(
    origin: Connection, peer: Connection, chosen: Sequence[PublicationInfo], streams: Sequence[Stream]
) -> list[str]:
    """Target tables with rows, where a copy is to come that has not been prepared before."""
    prepared = {row[0] for row in peer.execute("SELECT chain FROM vsql_sync.streams WHERE direction = 'in'")}
    new = {stream.publication for stream in streams if stream.kind == "copy" and stream.chain not in prepared}
    tables = _names(origin, [publication for publication in chosen if publication.name in new])
    return [
        f"{name}: holds rows on the peer, and the first copy needs it empty; TRUNCATE it there,"
        " or give --no-copy if its rows are the same as here"
        for name in catalog.has_rows(peer, tables)
    ]


def add_target(origin: Connection, target: NodeInfo, request: PeerRequest) -> tuple[Stream, ...]:
    """The origin's half alone, where the target's database cannot be reached from here.

    The key came by another way (a file) and was confirmed by the operator. Tables of the target are not seen.
    """
    here = _alone(origin, target, request)
    chosen = _choose(origin, request.publications)
    streams = tuple(
        s for info in chosen for s in plan_streams(here, target.name, info.name, copy=request.copy)
    )
    with errors(f"adding peer {target.name}"), origin.transaction():
        problems = _overlaps(origin, chosen, target.name)
        for info in chosen:
            tables = [table.name for table in publications.carried(origin, info)]
            problems += many_writers.outsiders(origin, here.name, tables, info.name, None)
        if problems:
            raise RefusedError("; ".join(problems))
        nodes.register_peer(origin, target)
        write_outgoing(origin, streams)
        oplog.record(origin, "peer.add", "node", target.name, new=_as_json(target, streams, "out"))
    return streams


def add_origin(
    target: Connection,
    origin: NodeInfo,
    request: PeerRequest,
    tables: Sequence[TableName],
    former: Sequence[PinnedKey] = (),
) -> tuple[Stream, ...]:
    """The target's half alone: streams by the origin's publications' names; `tables` are what they carry.

    `former`: the origin's keys that have ended.
    """
    here = _alone(target, origin, request)
    copy = request.copy
    streams = tuple(
        s for name in request.publications for s in plan_streams(origin, here.name, name, copy=copy)
    )
    with errors(f"adding peer {origin.name}"), target.transaction():
        missing = [name for name in tables if catalog.describe(target, name) is None]
        if missing:
            raise RefusedError(f"there is no table {', '.join(map(str, missing))}", hint="create it first")
        shared = list(many_writers.outsiders(target, here.name, tables, "", None))
        if shared:
            raise RefusedError("; ".join(shared))
        filled = catalog.has_rows(target, tables) if copy else []
        if filled:
            raise RefusedError(
                f"table {', '.join(map(str, filled))} holds rows, and the first copy needs it empty",
                hint="TRUNCATE it, or give --no-copy on both nodes if its rows are the origin's",
            )
        nodes.register_peer(target, origin)
        signers.adopt(target, former)
        write_incoming(target, streams)
        roles.grant_target(target, tables)
        oplog.record(target, "peer.add", "node", origin.name, new=_as_json(origin, streams, "in"))
    return streams


def _alone(conn: Connection, peer: NodeInfo, request: PeerRequest) -> NodeInfo:
    """This node, if the peer known by number, name and key only may be added to it."""
    _require_built(request)
    if request.mode == BIDIRECTIONAL:
        raise RefusedError(
            "tables that both nodes write are prepared in both databases by one command",
            hint="give --peer-connection; --peer-key is for streams of one direction",
        )
    if request.schema_sync == "strict":
        raise RefusedError(
            'schema sync "strict" compares the tables of both nodes, and the peer\'s are out of reach',
            hint="give --peer-connection, or --schema-sync manual and compare them yourselves",
        )
    here = nodes.local(conn)
    migrate.require_current(conn)
    if peer.number == here.number or peer.name == here.name:
        raise RefusedError(f"{peer.name} with number {peer.number} is this node", hint="name the other node")
    check_keys(here, peer, request.allow_unsigned)
    with errors("reading the pinned keys"):
        nodes.check_peer(conn, peer)
    return here


def _as_json(peer: NodeInfo, streams: Sequence[Stream], direction: str) -> dict[str, object]:
    return {
        "number": peer.number,
        "fingerprint": peer.key_fingerprint,
        "streams": [stream.chain for stream in streams],
        "direction": direction,
    }
