"""`syncctl daemon`: both services of this node under one supervisor, in the background or not."""

from __future__ import annotations

import time

import click

from vsql_ctl.context import Operator, OutputFormat, example, output_option, pass_operator
from vsql_ctl.output import Progress, emit, human_seconds, printable, render_table

_EXIT_NOT_RUNNING = 1


@click.group("daemon", epilog=example("syncctl daemon start", "syncctl daemon status", "syncctl daemon stop"))
def daemon() -> None:
    """Start, stop and watch both services of this node."""


@daemon.command("start", epilog=example("syncctl daemon start", "syncctl daemon start --foreground"))
@click.option("--foreground", is_flag=True, help="Stay; logs go to standard error (for service managers).")
@click.pass_context
def start(ctx: click.Context, foreground: bool) -> None:
    """Start the producer and the consumer of this node, and keep them running."""
    from vsql_ctl.daemon.launch import plan_of, run_here, start_in_background
    from vsql_ctl.daemon.logfile import last_lines
    from vsql_shared.config import advice, check_files, require_built

    settings = ctx.ensure_object(Operator).settings
    # What is wrong with the configuration is said here, not in a log file.
    require_built(settings)
    for warning in [*advice(settings), *check_files(settings)]:
        click.echo(f"warning: {warning}", err=True)
    if foreground:
        ctx.exit(run_here(plan_of(settings, to_files=False)))
    state = start_in_background(settings)
    click.echo(f"daemon started, process {state.pid}; logs in {settings.state_dir()}")
    for name, service in state.services.items():
        if service.state != "running":
            click.echo(f"warning: {name} ended with exit code {service.last_exit}, {service.state}", err=True)
            for line in last_lines(settings.state_dir() / f"{name}.log"):
                click.echo(f"  {printable(line)}", err=True)


@daemon.command("stop", epilog=example("syncctl daemon stop"))
@pass_operator
def stop(operator: Operator) -> None:
    """Stop both services after the batch under way, then the daemon.

    A service that takes longer than server.stop_timeout is killed; nothing is lost by that, the next
    start goes on where it was.
    """
    from vsql_ctl.daemon import launch

    settings = operator.settings
    limit = settings.server.stop_timeout.total_seconds()
    with Progress("stopping") as progress:
        done = launch.stop(
            settings.state_dir(),
            limit,
            lambda seconds: progress.update(0, f"for {seconds:.0f} of {limit:.0f} s"),
        )
    if done.killed:
        click.echo(f"stopped; killed, because they did not stop in time: {', '.join(done.killed)}")
    else:
        click.echo("stopped")


@daemon.command("status", epilog=example("syncctl daemon status", "syncctl daemon status --output json"))
@output_option
@click.pass_context
def status(ctx: click.Context, output: OutputFormat) -> None:
    """Show whether the daemon runs and what each service does; exit code 1 when it does not run."""
    from vsql_ctl.daemon.launch import look

    settings = ctx.ensure_object(Operator).settings
    found = look(settings.state_dir())
    if found is None:
        emit(output, {"running": False, "services": []}, lambda: "not running")
        ctx.exit(_EXIT_NOT_RUNNING)
    now = time.time()
    names = ("service", "state", "pid", "seconds", "restarts", "last_exit")
    rows = [
        (name, each.state, each.pid, round(now - each.since), each.restarts, each.last_exit)
        for name, each in found.services.items()
    ]
    data = {
        "running": True,
        "pid": found.pid,
        "source": found.source,
        "services": [dict(zip(names, row, strict=True)) for row in rows],
    }
    shown = [(*row[:3], human_seconds(row[3]), *row[4:]) for row in rows]
    head = f"daemon running, process {found.pid}, for {human_seconds(now - found.since)}"
    table = ("service", "state", "pid", "for", "restarts", "last exit")
    emit(output, data, lambda: f"{head}\n{render_table(table, shown)}")
