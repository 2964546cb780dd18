"""`syncctl start`: let this node's streams run."""

from __future__ import annotations

import click

from vsql_ctl.context import Operator, OutputFormat, example, output_option, pass_operator
from vsql_ctl.output import emit
from vsql_ctl.session import open_node


@click.command("start", epilog=example("syncctl start", "syncctl start --stream pub.node-a"))
@click.option("--stream", "streams", multiple=True, metavar="CHAIN", help="Only these; else all.")
@output_option
@pass_operator
def start(operator: Operator, output: OutputFormat, streams: tuple[str, ...]) -> None:
    """Begin or resume this node's streams.

    The first time it makes the replication slots, which waits for transactions that are open: from then on
    every commit is captured. The services do the rest.
    """
    from vsql_shared.pg import control, nodes, slots

    with open_node(operator) as conn:
        nodes.local(conn)
        for wanted in slots.missing(conn, streams):
            if count := slots.open_transactions(conn):
                text = f"{wanted.chain}: its slot is made when {count} open transaction(s) have ended"
                click.echo(text, err=True)
            slots.make(conn, wanted)
        changed = control.start(conn, streams)
    data = {"started": [{"chain": chain, "direction": direction} for chain, direction in changed.streams]}
    lines = [
        f"{chain} ({direction}): runs as soon as its service does" for chain, direction in changed.streams
    ]
    emit(output, data, lambda: "\n".join(lines or ["all streams were started before"]))
