"""Rows of `vsql_sync.nodes` and `.signers`: who this database is, whom it knows, whose keys it trusts.

Not here: making streams (peers.py). Rules:

* A database is one node for good: another number, name or cluster is refused.
* A key is pinned by an operator's act only. A node has one valid key; another one for the same node is
  refused, because a changed key is what a forger would show.
"""

from __future__ import annotations

from dataclasses import dataclass

from vsql_shared.crypto.signing import fingerprint
from vsql_shared.errors import RefusedError
from vsql_shared.pg import key_ends, migrate, oplog
from vsql_shared.pg.connect import Connection, errors


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A node as this database knows it."""

    number: int
    name: str
    cluster: str
    is_local: bool
    host: str
    port: int
    mode: str
    region: str | None
    public_key: bytes | None
    key_fingerprint: str | None
    system_identifier: str | None
    init_state: str
    status: str


_SELECT = (
    "SELECT number, node_id, cluster, is_local, host, port, mode, region, public_key, key_fingerprint,"
    " system_identifier, init_state, status FROM vsql_sync.nodes"
)


def local(conn: Connection) -> NodeInfo:
    """The node this database is. Raises RefusedError when `node init` has not been run."""
    with errors("reading this node"):
        present = migrate.applied(conn)
        row = conn.execute(_SELECT + " WHERE is_local").fetchone() if present else None
    if row is None:
        raise RefusedError(
            f"database {conn.info.dbname} at {conn.info.host}:{conn.info.port} is not a node",
            hint="run `syncctl node init` on it first",
        )
    return _node(row)


def everyone(conn: Connection) -> list[NodeInfo]:
    """All nodes this database knows, its own first."""
    with errors("reading the nodes"):
        return [_node(row) for row in conn.execute(_SELECT + " ORDER BY is_local DESC, number")]


def register_local(
    conn: Connection,
    number: int,
    name: str,
    cluster: str,
    public_key: bytes | None,
    region: str | None = None,
) -> bool:
    """Make this database node `name`, or confirm that it is; returns whether it is new.

    A new signing key replaces the old one only while no stream exists that peers verify with the old one.
    """
    with errors("registering this node"), conn.transaction():
        row = conn.execute(_SELECT + " WHERE is_local FOR UPDATE").fetchone()
        if row is None:
            _check_free(conn, number, name)
            conn.execute(
                "INSERT INTO vsql_sync.nodes (node_id, node_name, number, is_local, cluster, host, port,"
                " region, system_identifier, init_state) VALUES (%s, %s, %s, true, %s, %s, %s, %s,"
                " (SELECT system_identifier::text FROM pg_catalog.pg_control_system()), 'SYNCHRONIZED')",
                (name, name, number, cluster, conn.info.host or "localhost", conn.info.port, region),
            )
            oplog.record(conn, "node.init", "node", name, new={"number": number, "cluster": cluster})
        else:
            _check_same(_node(row), number, name, cluster)
        if public_key is not None:
            _set_own_key(conn, name, public_key, None if row is None else _node(row).public_key)
        conn.execute(
            "SELECT vsql_sync.ensure_audit_partition(pg_catalog.now()),"
            " vsql_sync.ensure_audit_partition(pg_catalog.now() + INTERVAL '1 month')"
        )
    return row is None


def set_priority(conn: Connection, priority: int) -> None:
    """Say which of two nodes stands where they are equal otherwise. Raises RefusedError: peers have it."""
    with errors("setting the node's priority"), conn.transaction():
        changed = conn.execute(
            "UPDATE vsql_sync.nodes SET priority = %s WHERE is_local AND priority <> %s RETURNING node_id",
            (priority, priority),
        ).fetchone()
        known = conn.execute("SELECT count(*) FROM vsql_sync.nodes WHERE NOT is_local").fetchone()
        if changed is None:
            return
        if known is not None and known[0]:
            raise RefusedError(
                "this node has peers, which settle conflicts by the priority it had when they were added",
                hint="a node's priority is set before its first peer is added",
            )
        oplog.record(conn, "node.priority", "node", str(changed[0]), new={"priority": priority})


def register_peer(conn: Connection, peer: NodeInfo) -> None:
    """Make a peer known and pin its key; inside the caller's transaction."""
    conn.execute(
        "INSERT INTO vsql_sync.nodes AS n (node_id, node_name, number, cluster, host, port, mode, region,"
        " public_key, key_fingerprint, system_identifier)"
        " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
        " ON CONFLICT (node_id) DO UPDATE SET host = excluded.host, port = excluded.port,"
        " public_key = excluded.public_key, key_fingerprint = excluded.key_fingerprint,"
        " system_identifier = coalesce(excluded.system_identifier, n.system_identifier)",
        (
            peer.name, peer.name, peer.number, peer.cluster, peer.host, peer.port, peer.mode, peer.region,
            peer.public_key, peer.key_fingerprint, peer.system_identifier,
        ),
    )  # fmt: skip
    if peer.public_key is not None:
        pin(conn, peer.name, peer.public_key)


def check_peer(conn: Connection, peer: NodeInfo) -> None:
    """Refuse a peer whose number, name or key contradicts what this database knows."""
    for node in everyone(conn):
        if (node.number == peer.number) != (node.name == peer.name):
            raise RefusedError(
                f"node {node.name} has number {node.number} here; {peer.name} claims number {peer.number}",
                hint="each node of a cluster has its own name and number",
            )
    if peer.public_key is not None:
        _check_pin(conn, peer.name, fingerprint(peer.public_key))


def pin(conn: Connection, node: str, public_key: bytes) -> None:
    """Trust a public key for a node; inside the caller's transaction. Pinning it again changes nothing."""
    print_ = fingerprint(public_key)
    _check_pin(conn, node, print_)
    added = conn.execute(
        "INSERT INTO vsql_sync.signers (fingerprint, node_name, public_key) VALUES (%s, %s, %s)"
        " ON CONFLICT (fingerprint) DO NOTHING",
        (print_, node, public_key),
    ).rowcount
    if added:
        oplog.record(conn, "signer.pin", "node", node, new={"fingerprint": print_})


def _check_pin(conn: Connection, node: str, print_: str) -> None:
    rows = conn.execute(
        "SELECT fingerprint, node_name, coalesce(revoked_at, retired_at) IS NOT NULL FROM vsql_sync.signers"
        " WHERE fingerprint = %s OR node_name = %s",
        (print_, node),
    ).fetchall()
    for known, owner, ended in rows:
        if known == print_ and ended:
            raise RefusedError(
                f"key {print_} of node {owner} was retired or revoked", hint="the node needs a new key"
            )
        if known == print_ and owner != node:
            raise RefusedError(
                f"key {print_} is pinned for node {owner}, not for {node}",
                hint="each node has a key of its own",
            )
        if known != print_ and not ended:
            raise RefusedError(
                f"node {node} shows key {print_}, pinned is {known}",
                hint=f"if its operator confirms the new key, `syncctl key retire --fingerprint {known}`;"
                " `syncctl key revoke` if the old one may be stolen",
            )


def _set_own_key(conn: Connection, name: str, public_key: bytes, before: bytes | None) -> None:
    print_ = fingerprint(public_key)
    if before is not None and before != public_key:
        kept = conn.execute(
            "SELECT EXISTS (SELECT FROM vsql_sync.streams), EXISTS (SELECT FROM vsql_sync.signers"
            " WHERE fingerprint = %s AND coalesce(revoked_at, retired_at) IS NOT NULL)",
            (fingerprint(before),),
        ).fetchone()
        used, ended = kept or (True, False)
        if used and not ended:
            raise RefusedError(
                f"node {name} has streams signed with {fingerprint(before)}; the configured key is {print_}",
                hint="point audit.signing_key_path at the key the node was initialised with; to change it,"
                f" `syncctl key retire --fingerprint {fingerprint(before)}` first",
            )
        key_ends.require_announced(conn, fingerprint(before), print_)
        if not used:
            conn.execute("DELETE FROM vsql_sync.signers WHERE node_name = %s", (name,))
    conn.execute(
        "UPDATE vsql_sync.nodes SET public_key = %s, key_fingerprint = %s WHERE is_local",
        (public_key, print_),
    )
    pin(conn, name, public_key)


def _check_free(conn: Connection, number: int, name: str) -> None:
    row = conn.execute(
        "SELECT node_id, number FROM vsql_sync.nodes WHERE node_id = %s OR number = %s", (name, number)
    ).fetchone()
    if row is not None:
        raise RefusedError(
            f"node {row[0]} with number {row[1]} is known here", hint="choose another number and name"
        )


def _check_same(have: NodeInfo, number: int, name: str, cluster: str) -> None:
    if (have.number, have.name, have.cluster) != (number, name, cluster):
        raise RefusedError(
            f"this database is node {have.name} (number {have.number}) of cluster {have.cluster},"
            f" not {name} (number {number}) of {cluster}",
            hint="check --connection, or the names in [cluster]",
        )


def _node(row: tuple[object, ...]) -> NodeInfo:
    number, name, cluster, is_local, host, port, mode, region, key, print_, system, init_state, status = row
    return NodeInfo(
        int(str(number)), str(name), str(cluster), bool(is_local), str(host), int(str(port)), str(mode),
        None if region is None else str(region),
        bytes(key) if isinstance(key, bytes) else None,
        None if print_ is None else str(print_),
        None if system is None else str(system),
        str(init_state), str(status),
    )  # fmt: skip
