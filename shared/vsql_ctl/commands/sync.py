"""`syncctl sync`: commits that wait for other nodes, and who may write tables with cardholder data."""

from __future__ import annotations

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
from vsql_ctl.output import emit, human_seconds, printable, render_pairs, render_table
from vsql_ctl.session import open_node
from vsql_shared.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vsql_shared.pg.connect import Connection
    from vsql_shared.pg.synchronous import Synchronous

_HEADERS = ("PUBLICATION", "STATE", "STANDBY", "TARGETS", "WAITING", "SINCE")
# States of a stream that keep no other one's commits waiting.
_MOVING = ("synchronous", "degraded")

_connection_option = click.option(
    "--connection", help="Superuser's connection to this node's database; else [connection]."
)
_reason_option = click.option("--reason", required=True, help="Why; kept in the audit log.")
_timeout_option = click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    help="Seconds to wait for the worker's answer.",
)


@click.group("sync", epilog=example("syncctl sync status", "syncctl sync enable --help"))
def sync() -> None:
    """Have commits to tables with cardholder data wait until other nodes have them."""


@sync.command(
    "enable",
    epilog=example("syncctl sync enable cards", "syncctl sync enable cards --quorum 1 --output json"),
)
@click.argument("publication")
@click.option(
    "--quorum",
    type=click.IntRange(min=1),
    help="So many targets must have a commit; else all of this region.",
)
@click.option(
    "--accept-others",
    is_flag=True,
    help="Other standbys or streams stay in synchronous_standby_names; each commit that waits needs all.",
)
@click.option(
    "--keep-default",
    is_flag=True,
    help="Leave synchronous_commit as it is: where it is on, each commit of the server waits for all.",
)
@_connection_option
@output_option
@pass_operator
def enable(
    operator: Operator,
    output: OutputFormat,
    publication: str,
    quorum: int | None,
    accept_others: bool,
    keep_default: bool,
    connection: str | None,
) -> None:
    """Have commits that change a publication's tables wait for its targets (remote_apply).

    Sets synchronous_standby_names and, for all other commits, synchronous_commit = local; needs a superuser.
    The publication may carry only tables with PCI columns, and a target must have its first copy.
    """
    from vsql_shared.pg import synchronous

    with open_node(operator, connection) as conn:
        made = synchronous.enable(
            conn, publication, quorum, accept_others=accept_others, keep_default=keep_default
        )
        held = synchronous.near(conn, publication).held
    for one in held:
        text = "counts no further before `syncctl sync degrade` and `restore`"
        click.echo(f"target {printable(one)}; it {text}", err=True)
    wanted = "all its synchronous targets" if made.quorum is None else f"{made.quorum} synchronous targets"
    emit(
        output,
        made,
        lambda: f"commits to the tables of {publication} wait for {wanted}; standby {made.standby_name}",
    )


@sync.command("disable", epilog=example('syncctl sync disable cards --reason "CHG-77" --yes'))
@click.argument("publication")
@_reason_option
@_connection_option
@yes_option
@output_option
@pass_operator
def disable(
    operator: Operator,
    output: OutputFormat,
    publication: str,
    reason: str,
    connection: str | None,
    yes: bool,
) -> None:
    """End the waiting of a publication for good, also where no service runs.

    Commits that wait at this moment return to their clients, whether a target has them or not.
    """
    from vsql_shared.pg import synchronous

    confirm(f"Let commits to the tables of {publication} wait for nobody?", yes=yes)
    with open_node(operator, connection) as conn:
        ended = synchronous.disable(conn, publication, reason)
    emit(
        output,
        ended,
        lambda: (
            f"commits to the tables of {publication} wait for nobody any more;"
            " synchronous_commit of the server stays as it is"
        ),
    )


@sync.command("degrade", epilog=example('syncctl sync degrade cards --reason "node-b lost, INC-7" --yes'))
@click.argument("publication")
@_reason_option
@_timeout_option
@yes_option
@output_option
@pass_operator
def degrade(
    operator: Operator, output: OutputFormat, publication: str, reason: str, timeout: float, yes: bool
) -> None:
    """Let commits return without their targets until `restore`: the target is gone, and writes must go on.

    Nothing does this by itself. The order stands signed in the chain before any commit returns by it; what
    was written meanwhile reaches the target when it is back.
    """
    confirm(f"Let commits to the tables of {publication} return without any target?", yes=yes)
    _order(operator, output, publication, "degrade", reason, timeout)


@sync.command("restore", epilog=example('syncctl sync restore cards --reason "node-b is back"'))
@click.argument("publication")
@_reason_option
@_timeout_option
@output_option
@pass_operator
def restore(operator: Operator, output: OutputFormat, publication: str, reason: str, timeout: float) -> None:
    """Have commits wait for their targets again; the first ones wait until those have caught up."""
    _order(operator, output, publication, "restore", reason, timeout)


def _order(
    operator: Operator, output: OutputFormat, publication: str, verb: str, reason: str, timeout: float
) -> None:
    from vsql_shared.pg import control, synchronous

    with open_node(operator) as conn:
        (outcome,) = control.outcome(conn, synchronous.order(conn, publication, verb, reason), timeout)
    if outcome["answer"].startswith("failed"):
        raise RefusedError(f"{publication}: {outcome['answer']}")
    emit(output, {"publication": publication, verb: outcome}, lambda: f"{publication}: {outcome['answer']}")


@sync.command("status", epilog=example("syncctl sync status", "syncctl sync status --output json"))
@_connection_option
@output_option
@pass_operator
def status(operator: Operator, output: OutputFormat, connection: str | None) -> None:
    """Show which commits wait, for whom, how many and since when, and writes that would pass by."""
    with open_node(operator, connection) as conn:
        seen = _look(conn)
    emit(output, seen, lambda: "\n".join(_lines(seen)))


def _look(conn: Connection) -> dict[str, Any]:
    from vsql_shared.pg import nodes, standby_names, synchronous, write_primary
    from vsql_shared.pg import status as stream_status

    node = nodes.local(conn)
    said = {
        one.publication: one
        for one in stream_status.read(conn)
        if one.direction == "out" and one.kind == "live"
    }
    waiting = synchronous.waiting(conn)

    def one(policy: Synchronous) -> dict[str, Any]:
        stream = said.get(policy.publication)
        detail = stream.detail.get("synchronous") if stream else None
        return {
            "publication": policy.publication,
            "standby": policy.standby_name,
            "quorum": policy.quorum,
            "degraded_at": policy.degraded_at,
            "degraded_reason": policy.degraded_reason,
            "worker": stream.state if stream else "not running",
            "server": synchronous.server_problem(conn, policy.standby_name),
            "stream": detail or {},
        }

    return {
        "node": node.name,
        "region": node.region,
        "publications": [one(policy) for policy in synchronous.everything(conn)],
        "unwaited": [found._asdict() for found in synchronous.unwaited(conn)],
        "waiting_commits": waiting.commits,
        "waiting_since": waiting.since,
        "copies": synchronous.copies(conn),
        "loud": standby_names.loud(conn),
        "write_primary": write_primary.load(conn),
    }


def _lines(seen: dict[str, Any]) -> Iterator[str]:
    if not seen["publications"]:
        yield "no commit waits for another node; `syncctl sync enable PUBLICATION`"
    else:
        rows = [
            (
                one["publication"],
                _state(one),
                one["standby"],
                one["quorum"] or "all",
                seen["waiting_commits"],
                seen["waiting_since"],
            )
            for one in seen["publications"]
        ]
        yield render_table(_HEADERS, rows)
    for one in seen["publications"]:
        if one["degraded_at"]:
            why = printable(one["degraded_reason"])
            yield f"{one['publication']} is DEGRADED since {one['degraded_at']}: {why}"
        if one["server"]:
            yield f"writes to the tables of {one['publication']} are refused: {printable(one['server'])}"
        yield from waiting_lines(one["publication"], one["stream"])
    yield from together_lines(seen)
    for found in seen["unwaited"]:
        table, why = printable(found["table"]), printable(found["why"])
        yield f"COMMITS PASS BY: {table} of {found['publication']}: {why}"
    if seen["write_primary"]:
        primary = seen["write_primary"]
        yield f"tables with cardholder data are written by {primary.primary} alone: {primary.policy}"


def together_lines(seen: dict[str, Any]) -> Iterator[str]:
    """Whom commits wait for beside their own targets, and who waits for them."""
    if not seen["publications"]:
        return
    names = [one["publication"] for one in seen["publications"]]
    stuck = [one["publication"] for one in seen["publications"] if _state(one) not in _MOVING]
    for name in names:
        if others := [one for one in stuck if one != name]:
            yield (
                f"{name}: its commits wait for targets of {', '.join(others)}, too: PostgreSQL waits for all"
                " that stands in synchronous_standby_names; degrade or disable those"
            )
    if seen["waiting_commits"] and seen["copies"]:
        copies = ", ".join(map(printable, seen["copies"]))
        yield f"the first copy for {copies} cannot begin while a commit waits: degrade until it is done"
    for one in seen["loud"]:
        yield f"{printable(one)}: each commit of it waits, whatever it changes"


def _state(one: dict[str, Any]) -> str:
    if one["degraded_at"]:
        return "degraded"
    return (
        str(one["stream"].get("state", "not running")) if one["worker"] == "running" else str(one["worker"])
    )


def waiting_lines(name: str, detail: dict[str, Any]) -> Iterator[str]:
    """For whom a stream's commits wait, of its status row."""
    import time

    if detail.get("state") != "waiting":
        return
    since = detail.get("waiting_since")
    ago = f" since {human_seconds(max(0.0, time.time() - since))}" if isinstance(since, int | float) else ""
    whom = ", ".join(
        f"{printable(target)} ({printable(how)})" for target, how in (detail.get("waiting_for") or {}).items()
    )
    yield (
        f"{name}: commits of {detail.get('waiting_batches')} batches wait{ago} for"
        f" {whom or 'a target: there is none in this region'}"
    )


@sync.command(
    "region", epilog=example("syncctl sync region node-b us-east", "syncctl sync region node-c --none")
)
@click.argument("node")
@click.argument("region", required=False)
@click.option("--none", is_flag=True, help="Take the node's region away.")
@_connection_option
@pass_operator
def region(operator: Operator, node: str, region: str | None, none: bool, connection: str | None) -> None:
    """Say in which region a node is: commits wait only for targets in this node's own region."""
    from vsql_shared.pg import synchronous

    if none == (region is not None):
        raise click.UsageError("give a region, or --none")
    with open_node(operator, connection) as conn:
        synchronous.set_region(conn, node, region)
    click.echo(f"node {node} is in {'no region' if region is None else f'region {region}'}")


@sync.command(
    "primary",
    epilog=example(
        "syncctl sync primary node-a", "syncctl sync primary node-a --table public.cards --policy reject"
    ),
)
@click.argument("node", required=False)
@click.option("--policy", type=click.Choice(["reject", "accept_lww"]), default="reject", show_default=True)
@click.option("--table", "tables", multiple=True, help="Also this table, beside those with marked columns.")
@click.option("--none", is_flag=True, help="Any node may write again.")
@_connection_option
@output_option
@pass_operator
def primary(
    operator: Operator,
    output: OutputFormat,
    node: str | None,
    policy: str,
    tables: tuple[str, ...],
    none: bool,
    connection: str | None,
) -> None:
    """Say which node alone writes tables with cardholder data; run it on each node.

    With `reject` a client's write to such a table on another node fails with SQLSTATE 25006; what is
    replicated passes. With `accept_lww` every node writes, asynchronously, and the last write wins.
    """
    from vsql_shared.pg import write_primary
    from vsql_shared.pg.table_spec import parse_table

    if none == (node is not None):
        raise click.UsageError("give a node, or --none")
    with open_node(operator, connection) as conn:
        if node is None:
            write_primary.clear(conn)
            emit(output, {"write_primary": None}, lambda: "any node may write")
            return
        refused = write_primary.decide(conn, node, policy, [parse_table(name) for name in tables])
    data = {"write_primary": node, "policy": policy, "refused_here": [str(name) for name in refused]}
    emit(output, data, lambda: render_pairs(data))
