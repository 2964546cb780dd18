"""`syncctl pause`: stand still at a batch boundary, with a reason; nothing is lost meanwhile."""

from __future__ import annotations

import click

from vsql_ctl.context import Operator, OutputFormat, example, output_option, pass_operator
from vsql_ctl.output import emit
from vsql_ctl.session import open_node


@click.command("pause", epilog=example('syncctl pause --reason "Incident response IR-2026-042"'))
@click.option("--reason", required=True, help="Why; kept with the stream and in the audit log.")
@click.option("--stream", "streams", multiple=True, metavar="CHAIN", help="Only these; else all.")
@click.option("--timeout", type=click.FloatRange(min=0), default=10.0, help="Seconds to wait.")
@output_option
@pass_operator
def pause(
    operator: Operator, output: OutputFormat, reason: str, streams: tuple[str, ...], timeout: float
) -> None:
    """Pause this node's streams and wait until their workers stand still.

    WAL stays in PostgreSQL while an outgoing stream is paused: watch its size in `syncctl status`.
    """
    from vsql_shared.pg import control

    with open_node(operator) as conn:
        changed = control.pause(conn, reason, streams)
        outcome = control.outcome(conn, changed, timeout)
    data = {"paused": outcome}
    lines = [f"{one['chain']} ({one['direction']}): {one['answer']}" for one in outcome]
    emit(output, data, lambda: "\n".join(lines or ["no stream was running"]))
