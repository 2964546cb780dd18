"""What every command shares: the settings, the --output option, examples in --help, and questions.

A command looks like this:

    @click.command("status", epilog=example("syncctl status", "syncctl status --output json"))
    @output_option
    @pass_operator
    def status(operator: Operator, output: OutputFormat) -> None:
        settings = operator.settings
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from vsql_shared.errors import UserError

if TYPE_CHECKING:
    from vsql_shared.config import Settings

OutputFormat = Literal["table", "json"]
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass
class Operator:
    """The person at the terminal: which configuration is meant, and how much is shown."""

    config_path: Path | None = None
    debug: bool = False

    @cached_property
    def settings(self) -> Settings:
        """The settings, loaded on first use; a command that needs none works without a file."""
        from vsql_shared.config import load_settings

        return load_settings(self.config_path)


pass_operator = click.make_pass_decorator(Operator, ensure=True)


def output_option(function: _F) -> _F:
    """Add `--output table|json` (parameter `output`): tables for people, JSON for programs."""
    return click.option(
        "--output",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="A table for people, or JSON for programs.",
    )(function)


def yes_option(function: _F) -> _F:
    """Add `--yes` (parameter `yes`): do not ask."""
    return click.option("--yes", is_flag=True, help="Do not ask.")(function)


def example(*lines: str) -> str:
    """The epilog of a command: examples, one per line, shown as they are written."""
    head = "Example:" if len(lines) == 1 else "Examples:"
    return "\b\n" + "\n".join([head, *(f"  {line}" for line in lines)])


def confirm(question: str, *, yes: bool) -> None:
    """Go on only when the operator agrees; where nobody can be asked, --yes is needed."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError(f"{question} needs an answer and nobody can be asked", hint="give --yes to agree")
    if not click.confirm(question, err=True):
        raise UserError("not confirmed; nothing was changed")
