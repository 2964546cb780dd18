"""`syncctl node add-peer`: exchange keys, prepare streams and the first copy."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vsql_ctl.context import (
    Operator,
    OutputFormat,
    confirm,
    example,
    output_option,
    pass_operator,
    yes_option,
)
from vsql_ctl.output import Progress, emit
from vsql_ctl.session import APPLICATION_NAME, open_node, settings_or_none
from vsql_shared.errors import RefusedError, TransientError, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vsql_shared.config import Settings
    from vsql_shared.crypto.signing import PinnedKey
    from vsql_shared.pg.connect import Connection
    from vsql_shared.pg.nodes import NodeInfo
    from vsql_shared.pg.peers import PeerRequest, Stream

_WAIT_POLL_SECONDS = 0.5
_DAY = 86_400.0


@click.command(
    "add-peer",
    epilog=example(
        'syncctl node add-peer --peer-node-id 2 --peer-connection "host=node-b dbname=vibesql"',
        "syncctl node add-peer --peer-node-id 2 --peer-name node-b --peer-key node-b.pub",
        "syncctl node add-peer --peer-node-id 1 --peer-name a --peer-key a.pub --receive --publication pub",
    ),
)
@click.option("--peer-node-id", type=click.IntRange(1, 1023), required=True, help="The peer's number.")
@click.option("--peer-name", help="The peer's name; with --peer-connection it is checked.")
@click.option("--peer-connection", help="Connection string of the peer's database.")
@click.option(
    "--peer-key",
    type=click.Path(path_type=Path),
    help="The peer's public key, where its database is out of reach.",
)
@click.option(
    "--former-key",
    "former_keys",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="With --receive: a public key the peer signed with before.",
)
@click.option(
    "--mode",
    type=click.Choice(["uni-directional", "bidirectional"]),
    default="uni-directional",
    show_default=True,
    help="Whether the peer only receives.",
)
@click.option(
    "--publication",
    "publications",
    multiple=True,
    metavar="NAME",
    help="Publications; else all of this node's.",
)
@click.option(
    "--fingerprint",
    "fingerprints",
    multiple=True,
    metavar="SHA256:…",
    help="A key's fingerprint as the peer's operator told it; nothing is asked then."
    " Keys that this node, or with --receive the peer, signed with before are named, too.",
)
@click.option(
    "--schema-sync",
    type=click.Choice(["strict", "auto", "manual"]),
    help="Published tables that differ on the peer: refused, or only named; else as configured (manual).",
)
@click.option("--no-copy", is_flag=True, help="The peer's tables hold the same rows already.")
@click.option("--receive", is_flag=True, help="With --peer-key: this node is the one that receives.")
@click.option(
    "--table", "tables", multiple=True, metavar="TABLE", help="With --receive: tables the consumer may write."
)
@click.option("--wait", is_flag=True, help="Wait for the first copy, with its progress; services must run.")
@click.option("--wait-timeout", type=click.FloatRange(min=1), default=_DAY, help="Seconds to wait at most.")
@yes_option
@output_option
@pass_operator
def add_peer(operator: Operator, /, output: OutputFormat, **given: Any) -> None:
    """Make another node a subscriber of this one: pin keys, prepare streams and the first copy.

    Both databases must be initialised. Compare the key fingerprints with the peer's operator.
    """
    request = _peer_request(operator, given)
    if given["peer_key"] is not None:
        if given["peer_connection"] is not None:
            raise UserError("--peer-key and --peer-connection exclude each other", hint="give one of them")
        streams, peer = _add_by_key(operator, request, given)
    elif given["peer_connection"] is None:
        raise UserError(
            "the peer's database is not named", hint="give --peer-connection, or --peer-key and --peer-name"
        )
    else:
        streams, peer = _add_by_connection(operator, request, given)
    data = {"peer": node_dict(peer), "streams": [stream.chain for stream in streams]}
    emit(output, data, lambda: _added(peer, streams))
    if given["wait"] and given["peer_connection"] is not None:
        _wait(given["peer_connection"], streams, given["wait_timeout"])


def _peer_request(operator: Operator, given: dict[str, Any]) -> PeerRequest:
    from vsql_shared.config.strategies import strategies_of
    from vsql_shared.pg.peers import PeerRequest

    settings = settings_or_none(operator)
    return PeerRequest(
        number=given["peer_node_id"],
        name=given["peer_name"],
        mode=given["mode"],
        publications=given["publications"],
        copy=not given["no_copy"],
        schema_sync=given["schema_sync"] or _configured_sync(settings),
        allow_unsigned=settings is not None and not settings.is_prod,
        strategies=strategies_of(settings),
    )


def _configured_sync(settings: Settings | None) -> str:
    from vsql_shared.config import SchemaSyncSettings

    chosen = SchemaSyncSettings() if settings is None else settings.replication.initialization.schema_sync
    return chosen.mode


def _add_by_connection(
    operator: Operator, request: PeerRequest, given: dict[str, Any]
) -> tuple[Sequence[Stream], NodeInfo]:
    from vsql_shared.pg import peers
    from vsql_shared.pg.connect import connect

    if given["receive"]:
        raise UserError("--receive goes with --peer-key", hint="run add-peer on the node whose rows are sent")
    with (
        open_node(operator) as origin,
        connect(given["peer_connection"], application_name=APPLICATION_NAME) as peer,
    ):
        plan = peers.look(origin, peer, request)
        for note in plan.notes:
            click.echo(f"note: {note}", err=True)
        _agree(plan.origin, plan.peer, plan.former, given["fingerprints"], yes=given["yes"])
        peers.add(origin, peer, plan)
    return plan.streams, plan.peer


def _add_by_key(
    operator: Operator, request: PeerRequest, given: dict[str, Any]
) -> tuple[Sequence[Stream], NodeInfo]:
    from vsql_shared.crypto.signing import fingerprint, load_public_key
    from vsql_shared.pg import nodes, peers
    from vsql_shared.pg.table_spec import parse_table

    if request.name is None:
        raise UserError("--peer-key needs --peer-name", hint="name the peer as its operator does")
    if given["receive"] and not request.publications:
        raise UserError("--receive needs --publication", hint="name the origin's publications")
    if given["former_keys"] and not given["receive"]:
        raise UserError(
            "--former-key goes with --receive", hint="a node that receives begins with its present key"
        )
    key, former = load_public_key(given["peer_key"]), _former(request.name, given["former_keys"])
    with open_node(operator) as conn:
        here = nodes.local(conn)
        peer = nodes.NodeInfo(
            request.number, request.name, here.cluster, False, "unknown", 5432, request.mode, None,
            key, fingerprint(key), None, "UNINITIALIZED", "unknown",
        )  # fmt: skip
        _agree(here, peer, former, given["fingerprints"], yes=given["yes"])
        if given["receive"]:
            names = [parse_table(text) for text in given["tables"]]
            return peers.add_origin(conn, peer, request, names, former), peer
        return peers.add_target(conn, peer, request), peer


def _former(node: str, files: Sequence[Path]) -> tuple[PinnedKey, ...]:
    """Keys that ended before this node knew them: they count for what is dated before now."""
    from vsql_shared.crypto.signing import PinnedKey, fingerprint, load_public_key

    now = time.time_ns() // 1000
    keys = [load_public_key(path) for path in files]
    return tuple(PinnedKey(node, key, fingerprint(key), revoked=False, retired_at=now) for key in keys)


def _end(key: PinnedKey) -> str:
    """Up to where a former key is believed."""
    if key.revoked:
        known = ", ".join(f"{chain} up to {sequence}" for chain, sequence in sorted(key.trusted_to.items()))
        return f"REVOKED, believed for {known or 'nothing'}"
    at = datetime.fromtimestamp((key.retired_at or 0) / 1e6, UTC)
    return f"retired, believed until {at.isoformat(' ', 'seconds')}"


def _agree(
    here: NodeInfo, peer: NodeInfo, former: Sequence[PinnedKey], told: Sequence[str], *, yes: bool
) -> None:
    """Trust keys only when the operator says so: by their fingerprints, by an answer, or by --yes."""
    shown = [key.fingerprint for key in former]
    if told:
        wanted = {peer.key_fingerprint, *shown}
        if wanted != set(told):
            raise RefusedError(
                f"the keys are {', '.join(one or 'none' for one in wanted)};"
                f" --fingerprint says {', '.join(told)}",
                hint=f"{peer.key_fingerprint or 'none'} is the key of {peer.name}"
                + "".join(f", {one} of {key.node} before" for one, key in zip(shown, former, strict=True))
                + "; do not go on before their operators have confirmed each; nothing was changed",
            )
        return
    lines = [
        f"key of {here.name} (this node): {here.key_fingerprint or 'none (unsigned)'}",
        f"key of {peer.name} (peer):      {peer.key_fingerprint or 'none (unsigned)'}",
    ]
    lines += [f"former key of {key.node}, {_end(key)}: {key.fingerprint}" for key in former]
    click.echo("\n".join(lines), err=True)
    where = "`syncctl key show-public`" + (" and `syncctl key inventory`" if former else "")
    confirm(f"Are these the keys both operators see in {where}?", yes=yes)


def _wait(conninfo: str, streams: Sequence[Stream], timeout: float) -> None:
    """Follow the peer's streams until all are in step."""
    from vsql_shared.pg.connect import connect

    deadline = time.monotonic() + timeout
    chains = {stream.chain for stream in streams}
    with connect(conninfo, application_name=APPLICATION_NAME) as peer, Progress("first copy") as progress:
        while chains:
            done, note, settled = _copy_progress(peer, chains)
            progress.update(done, note)
            if settled:
                return
            if time.monotonic() > deadline:
                raise TransientError(
                    "the streams are not in step yet", hint="see `syncctl status` on both nodes"
                )
            time.sleep(_WAIT_POLL_SECONDS)


def _copy_progress(peer: Connection, chains: set[str]) -> tuple[int, str, bool]:
    """(rows copied, what is under way, whether all streams are in step)."""
    from vsql_shared.pg import status as stream_status

    mine = [one for one in stream_status.read(peer) if one.direction == "in" and one.chain in chains]
    for one in mine:
        if one.init_state in ("FAILED", "DIVERGED"):
            raise RefusedError(
                f"stream {one.chain} is {one.init_state}: {one.init_reason or 'no reason given'}"
            )
    copies = [one.detail.get("copy") or {} for one in mine if one.kind == "copy"]
    rows = sum(int(copy.get("rows") or 0) for copy in copies)
    tables = ", ".join(
        f"{copy['table']} ({copy.get('tables_done', 0)} of {copy.get('tables_total', '?')})"
        for copy in copies
        if copy.get("table")
    )
    idle = [one.chain for one in mine if one.desired != "running" or one.state == "not running"]
    settled = all(one.init_state in ("SYNCHRONIZED", "FINISHED") for one in mine)
    note = tables or (f"waiting for {', '.join(idle)} to run (`syncctl start` on both nodes)" if idle else "")
    return rows, note, settled


def node_dict(one: NodeInfo) -> dict[str, object]:
    """A node for JSON."""
    return {
        "number": one.number,
        "name": one.name,
        "cluster": one.cluster,
        "is_local": one.is_local,
        "host": one.host,
        "port": one.port,
        "mode": one.mode,
        "region": one.region,
        "key_fingerprint": one.key_fingerprint,
        "init_state": one.init_state,
        "status": one.status,
    }


def _added(peer: NodeInfo, streams: Sequence[Stream]) -> str:
    lines = [f"peer {peer.name} ({peer.number}) added"]
    lines += [f"  stream {one.chain}" + (" (first copy)" if one.kind == "copy" else "") for one in streams]
    if streams:
        lines.append("next: `syncctl start` and `syncctl daemon start` on both nodes")
    return "\n".join(lines)
