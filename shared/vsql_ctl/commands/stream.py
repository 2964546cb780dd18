"""`syncctl stream`: an operator's decisions on what a consumer refuses or cannot apply."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
from vsql_ctl.output import emit, render_table
from vsql_ctl.session import open_node
from vsql_shared.errors import RefusedError

if TYPE_CHECKING:
    from vsql_shared.pg.connect import Connection
    from vsql_shared.pg.transactions import Ordered

_REASON = "Why; kept with the decision and in the audit log."
_PARKED = ("chain", "xid", "lsn", "committed", "changes", "tables", "reason", "replayed")

# How long a service may take to see what its streams are to do.
_SERVICE_SECONDS = 10.0

_chain_option = click.option("--chain", required=True, help="The stream, as `syncctl status` names it.")
_reason_option = click.option("--reason", required=True, help=_REASON)
_transaction_option = click.option(
    "--transaction", required=True, metavar="LSN|XID", help="The source's transaction, as `status` names it."
)
_timeout_option = click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    help="Seconds to wait for the worker's answer.",
)


@click.group("stream", epilog=example("syncctl stream ignore-record --help"))
def stream() -> None:
    """Decide on what a consumer refused, or cannot apply."""


@stream.command(
    "ignore-record",
    epilog=example('syncctl stream ignore-record --chain pub.node-a --record t/0/42 --reason "forged, IR-7"'),
)
@click.option("--chain", required=True, help="The incoming stream.")
@click.option(
    "--record", required=True, metavar="TOPIC/PARTITION/OFFSET", help="The record, as the error names it."
)
@click.option("--reason", required=True, help=_REASON)
@yes_option
@pass_operator
def ignore_record(operator: Operator, chain: str, record: str, reason: str, yes: bool) -> None:
    """Pass over one refused record: it is as if it had never been in Kafka."""
    from vsql_shared.pg import control

    confirm(f"Ignore record {record} of stream {chain}?", yes=yes)
    with open_node(operator) as conn:
        number = control.ignore_record(conn, chain, record, reason)
    click.echo(f"decision {number}: record {record} is passed over")


@stream.command(
    "skip-batch",
    epilog=example('syncctl stream skip-batch --chain pub.node-a --sequence 17 --reason "key lost"'),
)
@click.option("--chain", required=True, help="The incoming stream.")
@click.option(
    "--sequence", required=True, type=click.IntRange(min=1), help="Sequence number of the batch's manifest."
)
@click.option("--reason", required=True, help=_REASON)
@yes_option
@pass_operator
def skip_batch(operator: Operator, chain: str, sequence: int, reason: str, yes: bool) -> None:
    """Do not apply one batch: its rows will be missing here, and its tables count as diverged."""
    from vsql_shared.pg import control

    confirm(f"Skip batch {sequence} of stream {chain}? Its rows will be missing here.", yes=yes)
    with open_node(operator) as conn:
        number = control.skip_batch(conn, chain, sequence, reason)
    click.echo(f"decision {number}: batch {sequence} is skipped")


@stream.command(
    "retry", epilog=example('syncctl stream retry --chain pub.node-a --reason "constraint dropped"')
)
@_chain_option
@_reason_option
@_timeout_option
@output_option
@pass_operator
def retry(operator: Operator, output: OutputFormat, chain: str, reason: str, timeout: float) -> None:
    """Try again now what a stream waits for or stands at.

    Nothing is passed over. Use it when you have mended what `syncctl status` names: a refused or blocked
    stream tries only when it is told to, a waiting one at the end of its back-off.
    """
    from vsql_shared.pg import control, transactions

    with open_node(operator) as conn:
        changed = transactions.retry(conn, chain, reason)
        outcome = control.outcome(conn, changed, timeout)
    lines = [f"{one['chain']} ({one['direction']}): {one['answer']}" for one in outcome]
    emit(output, {"retried": outcome}, lambda: "\n".join(lines))


@stream.command(
    "skip", epilog=example('syncctl stream skip --chain pub.node-a --transaction 741 --reason "bad import"')
)
@_chain_option
@_transaction_option
@_reason_option
@_timeout_option
@yes_option
@output_option
@pass_operator
def skip(
    operator: Operator,
    output: OutputFormat,
    chain: str,
    transaction: str,
    reason: str,
    timeout: float,
    yes: bool,
) -> None:
    """Do not apply the transaction that blocks a stream; the rest of its batch is applied.

    Its changes will be missing here, for good; its tables count as diverged. The decision, and what was
    skipped, stand signed in this node's chain. Later transactions that touch its rows find them missing.
    """
    from vsql_shared.pg import transactions

    confirm(f"Skip transaction {transaction} of stream {chain}? Its changes will be missing here.", yes=yes)
    with open_node(operator) as conn:
        _tell(conn, output, "skipped", transactions.skip(conn, chain, transaction, reason), timeout)


@stream.command(
    "park",
    epilog=example('syncctl stream park --chain pub.node-a --transaction 741 --reason "ask the owner"'),
)
@_chain_option
@_transaction_option
@_reason_option
@_timeout_option
@yes_option
@output_option
@pass_operator
def park(
    operator: Operator,
    output: OutputFormat,
    chain: str,
    transaction: str,
    reason: str,
    timeout: float,
    yes: bool,
) -> None:
    """Set the transaction that blocks a stream aside, to be replayed later; the rest is applied.

    Its batch goes to the dead-letter topic as it is: sealed and signed. Until it is replayed its changes are
    missing here, and its tables count as diverged.
    """
    from vsql_shared.pg import transactions

    confirm(f"Park transaction {transaction} of stream {chain}? Its changes wait until replayed.", yes=yes)
    with open_node(operator) as conn:
        _tell(conn, output, "parked", transactions.park(conn, chain, transaction, reason), timeout)


@stream.command(
    "replay",
    epilog=example(
        'syncctl stream replay --chain pub.node-a --transaction 741 --reason "constraint dropped"'
    ),
)
@_chain_option
@_transaction_option
@_reason_option
@_timeout_option
@yes_option
@output_option
@pass_operator
def replay(
    operator: Operator,
    output: OutputFormat,
    chain: str,
    transaction: str,
    reason: str,
    timeout: float,
    yes: bool,
) -> None:
    """Apply a parked transaction now, once, in one transaction; the stream must be running.

    It is verified again and written over whatever came since: what later transactions did to the same rows
    may be undone by it. Compare the tables on both sides afterwards.
    """
    from vsql_shared.pg import transactions

    confirm(f"Replay transaction {transaction} of stream {chain}? It is written as of now.", yes=yes)
    with open_node(operator) as conn:
        _tell(conn, output, "replayed", transactions.replay(conn, chain, transaction, reason), timeout)


@stream.command("parked", epilog=example("syncctl stream parked", "syncctl stream parked --output json"))
@click.option("--chain", help="Only of this incoming stream; else of all.")
@output_option
@pass_operator
def parked(operator: Operator, output: OutputFormat, chain: str | None) -> None:
    """List the transactions that were parked on this node, and which of them were replayed."""
    from vsql_shared.pg import transactions

    with open_node(operator) as conn:
        found = transactions.parked(conn, chain)
    rows = [
        (
            one.chain,
            one.xid,
            one.lsn,
            one.commit_time,
            one.changes,
            ", ".join(one.tables),
            one.reason,
            one.replayed_at,
        )
        for one in found
    ]
    emit(output, {"parked": found}, lambda: render_table(_PARKED, rows) if rows else "nothing is parked")


def _tell(conn: Connection, output: OutputFormat, done: str, ordered: Ordered, timeout: float) -> None:
    """Say what was decided, and what the worker answers; a refused replay is an error."""
    from vsql_shared.pg import control

    (outcome,) = control.outcome(conn, ordered.told, timeout)
    answer = outcome["answer"]
    named = f"transaction {ordered.transaction['xid']} at {ordered.transaction['lsn']}"
    if answer.startswith("failed"):
        raise RefusedError(f"{named} of stream {ordered.chain} is not {done}; {answer}")
    so = done if answer.startswith("done") else f"to be {done}"
    data = {"chain": ordered.chain, "decision": ordered.decision, "transaction": ordered.transaction}
    emit(
        output,
        {**data, "answer": answer},
        lambda: f"decision {ordered.decision}: {named} is {so}; {answer}",
    )


@stream.command(
    "retire", epilog=example('syncctl stream retire --chain pub.node-a --reason "slot lost, INC-7"')
)
@click.option("--chain", required=True, help="The live stream, on its origin or on a target.")
@click.option("--reason", required=True, help="Why; kept with the stream and in the audit log.")
@yes_option
@pass_operator
def retire(operator: Operator, chain: str, reason: str, yes: bool) -> None:
    """End a stream for good on this node: another one takes over.

    The way back from a gap (docs/operations/slots.md). On the origin the stream must be DIVERGED; its slot is
    dropped. On a target, what was not applied is not applied any more. The audit trail stays.
    """
    from vsql_shared.pg import retire as retiring

    confirm(f"End stream {chain} on this node for good?", yes=yes)
    with open_node(operator) as conn:
        # A worker that does not end by itself is killed after server.stop_timeout.
        wait = operator.settings.server.stop_timeout.total_seconds() + _SERVICE_SECONDS
        ended = retiring.retire(conn, chain, reason, wait)
    for name, direction in ended.streams:
        click.echo(f"{name} ({direction}): ended")
    if ended.slot:
        click.echo(ended.slot)
