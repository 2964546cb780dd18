"""`syncctl tail`: a stream's changes in clear, for somebody who holds the keys."""

from __future__ import annotations

import os
import sys

import click

from vsql_ctl.context import Operator, example, pass_operator
from vsql_ctl.services import service_command


@click.command(
    "tail", epilog=example("syncctl tail pub.node-a", "syncctl tail pub.node-a --from-start --limit 10")
)
@click.argument("chain")
@click.option("--from-start", is_flag=True, help="Begin where the stream begins, not after what was applied.")
@click.option("--limit", type=click.IntRange(min=1), help="Stop after so many changes.")
@pass_operator
def tail(operator: Operator, chain: str, from_start: bool, limit: int | None) -> None:
    """Open a stream and print its changes, verified, one JSON object a line.

    Nothing is applied or acknowledged. Rows go to standard output in clear.
    """
    command = [*service_command("consumer", operator.settings.source), "--tail", chain]
    if from_start:
        command.append("--from-start")
    if limit is not None:
        command += ["--limit", str(limit)]
    sys.stdout.flush()
    # The reader takes this process's place: the operator's tool itself opens no stream.
    os.execv(command[0], command)  # noqa: S606 - no shell is wanted
