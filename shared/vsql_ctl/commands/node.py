"""`syncctl node`: prepare this node's database, add other nodes, show who is known."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from vsql_ctl.commands.node_peer import add_peer, node_dict
from vsql_ctl.context import Operator, OutputFormat, example, output_option, pass_operator
from vsql_ctl.output import emit, render_pairs, render_table
from vsql_ctl.session import open_node, settings_or_none
from vsql_shared.errors import ConfigError, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic import SecretStr

    from vsql_shared.config import Settings
    from vsql_shared.pg.nodes import NodeInfo

_LOGIN_VARIABLES = {
    "vsql_sync_producer": "VSQL_SYNC_PRODUCER_PASSWORD",
    "vsql_sync_consumer": "VSQL_SYNC_CONSUMER_PASSWORD",
}


@click.group("node", epilog=example("syncctl node list"))
def node() -> None:
    """Prepare this node's database; add other nodes."""


@node.command(
    "init",
    epilog=example(
        "syncctl node init",
        'syncctl node init --node-id 1 --cluster my-cluster --connection "host=localhost dbname=vibesql"',
    ),
)
@click.option("--node-id", type=click.IntRange(1, 1023), help="Number of this node; else cluster.node_id.")
@click.option("--node-name", help="Name of this node; else cluster.node_name, else node-NUMBER.")
@click.option("--cluster", help="Name of the cluster; else cluster.name.")
@click.option("--connection", help="Connection string of an administrator; else [connection].")
@click.option("--region", help="Region the node is in.")
@click.option(
    "--priority",
    type=click.IntRange(0, 1000),
    help="Which of two nodes stands where their changes are equal otherwise (50); before peers are added.",
)
@click.option(
    "--create-roles/--no-roles", default=True, help="Make the roles of the services.", show_default=True
)
@click.option(
    "--create-logins",
    is_flag=True,
    help="Let the two service roles log in, with passwords from VSQL_SYNC_PRODUCER_PASSWORD and "
    "VSQL_SYNC_CONSUMER_PASSWORD.",
)
@output_option
@pass_operator
def init(
    operator: Operator,
    /,
    *,
    output: OutputFormat,
    node_id: int | None,
    node_name: str | None,
    cluster: str | None,
    connection: str | None,
    region: str | None,
    priority: int | None,
    create_roles: bool,
    create_logins: bool,
) -> None:
    """Install or upgrade schema vsql_sync, make the roles, and check the server's settings.

    May be repeated: what is there stays. Run it again after an upgrade of the program.
    """
    from vsql_shared.pg import checks, migrate, nodes, roles

    settings = settings_or_none(operator)
    name, number, in_cluster = _identity(settings, node_id, node_name, cluster)
    key = _public_key(settings)
    logins = _logins() if create_logins else None
    with open_node(operator, connection) as conn:
        warnings = checks.require(conn)
        if create_roles:
            roles.require_possible(conn)
        applied = migrate.install(conn)
        is_new = nodes.register_local(conn, number, name, in_cluster, key, region)
        if priority is not None:
            nodes.set_priority(conn, priority)
        if create_roles:
            roles.create(conn, logins)
        this = nodes.local(conn)
        version = max(migrate.applied(conn))
    found = {
        **node_dict(this),
        "new": is_new,
        "schema_version": version,
        "applied_now": applied,
        "warnings": [str(warning) for warning in warnings],
    }
    lines = [f"warning: {warning}" for warning in warnings]
    if key is None:
        lines.append("warning: no signing key (audit.signing_key_path): entries of this node are unsigned")
    emit(output, found, lambda: "\n".join([_initialised(this, is_new, version, applied), *lines]))


@node.command("list", epilog=example("syncctl node list --output json"))
@output_option
@pass_operator
def list_(operator: Operator, output: OutputFormat) -> None:
    """List the nodes this one knows, with the fingerprints of their keys."""
    from vsql_shared.pg import nodes

    with open_node(operator) as conn:
        nodes.local(conn)
        found = nodes.everyone(conn)
    rows = [
        (n.number, n.name, "this" if n.is_local else "peer", f"{n.host}:{n.port}", n.key_fingerprint)
        for n in found
    ]
    headers = ("ID", "NAME", "ROLE", "ADDRESS", "KEY")
    emit(output, [node_dict(one) for one in found], lambda: render_table(headers, rows))


@node.command("status", epilog=example("syncctl node status"))
@output_option
@pass_operator
def status(operator: Operator, output: OutputFormat) -> None:
    """Show this node: identity, schema version, and what of the server's settings should change."""
    from vsql_shared.pg import checks, migrate, nodes, roles

    with open_node(operator) as conn:
        this = nodes.local(conn)
        version, findings = max(migrate.applied(conn)), checks.inspect(conn)
        has_roles = roles.exist(conn)
    found = {
        **node_dict(this),
        "schema_version": version,
        "roles": has_roles,
        "findings": [{"severity": one.severity, "text": str(one)} for one in findings],
    }
    pairs = {
        "node": f"{this.name} ({this.number})",
        "cluster": this.cluster,
        "key": this.key_fingerprint or "none (unsigned)",
        "schema": version,
        "roles": has_roles,
    }
    lines = [f"{one.severity}: {one}" for one in findings]
    emit(output, found, lambda: "\n".join([render_pairs(pairs), *lines]))


def _identity(
    settings: Settings | None, node_id: int | None, node_name: str | None, cluster: str | None
) -> tuple[str, int, str]:
    """Name, number and cluster from options and configuration, which must not contradict each other."""
    from vsql_shared.config.values import CLUSTER_NAME, NODE_NAME

    if settings is not None:
        said = settings.cluster
        for option, value, key, configured in (
            ("--node-id", node_id, "node_id", said.node_id),
            ("--node-name", node_name, "node_name", said.node_name),
            ("--cluster", cluster, "name", said.name),
        ):
            if value is not None and value != configured:
                source = settings.source or "the environment"
                raise ConfigError(
                    f"{option} is {value}, cluster.{key} in {source} is {configured}",
                    hint="the services read the configuration: make them the same",
                )
        return said.node_name, said.node_id, said.name
    if node_id is None or cluster is None:
        raise UserError(
            "--node-id and --cluster are needed without a configuration", hint="give them, or --config"
        )
    name = node_name or f"node-{node_id}"
    if NODE_NAME.fullmatch(name) is None:
        raise UserError(f"{name!r} is no node name", hint="1 to 31 of a-z 0-9 -, beginning with a letter")
    if CLUSTER_NAME.fullmatch(cluster) is None:
        raise UserError(
            f"{cluster!r} is no cluster name", hint="1 to 63 of a-z 0-9 . _ -, beginning with a-z 0-9"
        )
    return name, node_id, cluster


def _public_key(settings: Settings | None) -> bytes | None:
    """The public half of the configured signing key."""
    from vsql_shared.kms import open_signer

    signer = None if settings is None else open_signer(settings)
    return None if signer is None else signer.public_key


def _logins() -> dict[str, SecretStr]:
    from pydantic import SecretStr

    missing = [variable for variable in _LOGIN_VARIABLES.values() if not os.environ.get(variable)]
    if missing:
        raise ConfigError(
            f"--create-logins needs {', '.join(missing)}", hint="put the passwords into the environment"
        )
    return {role: SecretStr(os.environ[variable]) for role, variable in _LOGIN_VARIABLES.items()}


def _initialised(this: NodeInfo, is_new: bool, version: int, applied: Sequence[int]) -> str:
    did = "initialised" if is_new else "upgraded" if applied else "is as it should be"
    key = f"key {this.key_fingerprint}" if this.key_fingerprint else "no key"
    return f"node {this.name} ({this.number}) of cluster {this.cluster} {did}: schema {version}, {key}"


node.add_command(add_peer)
