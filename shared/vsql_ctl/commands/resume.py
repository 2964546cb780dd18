"""`syncctl resume`: end a pause."""

from __future__ import annotations

import click

from vsql_ctl.context import Operator, OutputFormat, example, output_option, pass_operator
from vsql_ctl.output import emit
from vsql_ctl.session import open_node


@click.command("resume", epilog=example("syncctl resume", "syncctl resume --stream pub.node-a"))
@click.option("--stream", "streams", multiple=True, metavar="CHAIN", help="Only these; else all.")
@click.option("--timeout", type=click.FloatRange(min=0), default=10.0, help="Seconds to wait.")
@output_option
@pass_operator
def resume(operator: Operator, output: OutputFormat, streams: tuple[str, ...], timeout: float) -> None:
    """Resume paused streams."""
    from vsql_shared.pg import control

    with open_node(operator) as conn:
        changed = control.resume(conn, streams)
        outcome = control.outcome(conn, changed, timeout)
    data = {"resumed": outcome}
    lines = [f"{one['chain']} ({one['direction']}): {one['answer']}" for one in outcome]
    emit(output, data, lambda: "\n".join(lines or ["no stream was paused"]))
