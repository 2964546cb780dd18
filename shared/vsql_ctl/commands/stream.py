"""`syncctl stream`: an operator's decisions on what a consumer refused, each with its reason."""

from __future__ import annotations

import click

from vsql_ctl.context import Operator, confirm, example, pass_operator, yes_option
from vsql_ctl.session import open_node

_REASON = "Why; kept with the decision and in the audit log."


@click.group("stream", epilog=example("syncctl stream ignore-record --help"))
def stream() -> None:
    """Decide on what a consumer refused."""


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
        ended = retiring.retire(conn, chain, reason)
    for name, direction in ended.streams:
        click.echo(f"{name} ({direction}): ended")
    if ended.slot:
        click.echo(ended.slot)
