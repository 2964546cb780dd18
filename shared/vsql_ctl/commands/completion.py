"""`syncctl completion`: the script by which a shell completes our commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from vsql_ctl.context import example
from vsql_shared.errors import UserError


@click.command(
    "completion",
    epilog=example(
        "syncctl completion bash > /etc/bash_completion.d/syncctl",
        "syncctl completion zsh > ~/.zfunc/_syncctl",
        "syncctl completion fish > ~/.config/fish/completions/syncctl.fish",
    ),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell."""
    maker = get_completion_class(shell)
    if maker is None:
        raise UserError(f"this click cannot complete in {shell}", hint="use bash, zsh or fish")
    click.echo(maker(ctx.find_root().command, {}, "syncctl", "_SYNCCTL_COMPLETE").source())
