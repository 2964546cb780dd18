"""`syncctl config`: check what a file says, show what is in effect, bring its wishes into the database."""

from __future__ import annotations

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


@click.group("config", epilog=example("syncctl config check"))
def config() -> None:
    """Check, show and apply the configuration."""


@config.command(
    "check", epilog=example("syncctl config check", "syncctl --config new.toml config check --no-files")
)
@click.option(
    "--no-files", is_flag=True, help="Do not look at the files it names (keys are on another machine)."
)
@output_option
@pass_operator
def check(operator: Operator, output: OutputFormat, no_files: bool) -> None:
    """Validate the configuration, and say what is unwise or not built yet.

    Ends with 0 when the file is valid; with an error that lists everything that is wrong otherwise.
    """
    from vsql_shared.config import advice, check_files, not_built

    settings = operator.settings
    warnings = [*advice(settings), *([] if no_files else check_files(settings))]
    notes = not_built(settings)
    found = {
        "source": str(settings.source) if settings.source else "environment",
        "valid": True,
        "mode": settings.server.mode,
        "warnings": warnings,
        "not_built": notes,
    }
    lines = [f"{found['source']}: valid ({settings.server.mode} mode)"]
    lines += [f"warning: {warning}" for warning in warnings]
    lines += [f"note: {note}" for note in notes]
    if notes:
        lines.append("Services do not start while a note is left: what is configured would not be enforced.")
    emit(output, found, lambda: "\n".join(lines))


@config.command("show", epilog=example("syncctl config show", "syncctl config show --output json"))
@click.option(
    "--output", type=click.Choice(["toml", "json"]), default="toml", show_default=True, help="Form."
)
@pass_operator
def show(operator: Operator, output: str) -> None:
    """Show the settings in effect, defaults and environment included; secrets are hidden."""
    from vsql_shared.config import masked, to_toml

    values = masked(operator.settings)
    emit(output, values, lambda: to_toml(values).rstrip("\n"))


@config.command(
    "apply", epilog=example("syncctl config apply", "syncctl config apply --dry-run --output json")
)
@click.option("--dry-run", is_flag=True, help="Only show the difference.")
@yes_option
@output_option
@pass_operator
def apply(operator: Operator, output: OutputFormat, dry_run: bool, yes: bool) -> None:
    """Bring [[publications]], [[peers]] and [[pci.columns]] into the database.

    Shows the difference first. What is in the database and not in the file stays.
    """
    from vsql_shared.config import require_built
    from vsql_shared.pg import config_apply

    settings = operator.settings
    require_built(settings)
    with open_node(operator) as conn:
        changes = config_apply.plan(conn, settings)
        names = ("kind", "name", "action", "detail")
        rows = [(change.kind, change.name, change.action, change.detail) for change in changes]
        shown = [dict(zip(names, row, strict=True)) for row in rows]
        nothing = "The database has all that the file asks for."
        emit(output, shown, lambda: render_table(names, rows) if rows else nothing)
        for note in (note for change in changes for note in change.notes):
            click.echo(f"note: {note}", err=True)
        if not rows or dry_run:
            return
        confirm("Apply these changes?", yes=yes)
        config_apply.apply(conn, settings, changes)
    click.echo(f"applied {len(rows)} changes", err=True)
