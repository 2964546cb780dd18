"""`syncctl run`: become one of the services, in the foreground, as containers and unit files want it."""

from __future__ import annotations

import os
import sys

import click

from vsql_ctl.context import Operator, example, pass_operator
from vsql_ctl.services import SERVICES, service_command


@click.command("run", epilog=example("syncctl run producer", "syncctl --config node-b.toml run consumer"))
@click.argument("service", type=click.Choice(list(SERVICES)))
@pass_operator
def run(operator: Operator, service: str) -> None:
    """Run the producer or the consumer of this node in the foreground.

    SIGTERM and Ctrl-C end it after the batch under way.
    """
    command = service_command(service, operator.settings.source)
    sys.stdout.flush()
    # The service takes this process's place, so that signals and exit codes are its own.
    os.execv(command[0], command)  # noqa: S606 - no shell is wanted
