"""The entry of `syncctl`: which commands there are, the global options, and what every error looks like.

Not a command itself. Rules:

* A command is loaded when it is used: `syncctl --help` imports neither psycopg nor confluent_kafka.
* A command lives in `commands/<module>.py` and is the click command of its name there; the table below
  is the one place that knows all of them. A module that is not there is a command that does not exist.
* Whatever goes wrong, standard error gets `error: …` and `hint: …` (or one JSON object when
  `--output json` was asked for), and the exit code says who must act. A traceback only with --debug.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import click
from typing_extensions import override

from vsql_ctl.context import Operator, example
from vsql_shared.errors import VerificationError, VsqlSyncError

EXIT_DEFECT = 70  # EX_SOFTWARE of sysexits.h: a fault of ours
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


@dataclass(frozen=True)
class Entry:
    """Where a command is, and its line in the list of commands."""

    module: str
    help: str


COMMANDS: dict[str, Entry] = {
    "node": Entry("node", "Prepare this node's database; add other nodes."),
    "publication": Entry("publication", "Choose the tables and columns that leave this node."),
    "schema": Entry("schema", "Compare the definitions of tables between nodes."),
    "start": Entry("start", "Begin or resume this node's streams."),
    "pause": Entry("pause", "Pause this node's streams, with a reason."),
    "resume": Entry("resume", "Resume paused streams."),
    "status": Entry("status", "Show each stream's state, positions and lag."),
    "stream": Entry("stream", "Decide on what a consumer refused."),
    "sync": Entry("sync", "Have commits to PCI tables wait for other nodes."),
    "run": Entry("run", "Run one service in the foreground, as containers do."),
    "daemon": Entry("daemon", "Start, stop and watch both services of this node."),
    "conflicts": Entry("conflicts", "Show what became of changes that met another node's."),
    "key": Entry("key", "Make, show and rotate keys."),
    "kafka": Entry("kafka", "Print or apply what Kafka must allow this node, and the schema of its records."),
    "audit": Entry("audit", "List, verify, prove and export the signed trail."),
    "compliance": Entry("compliance", "Gather evidence for an assessor; verify it off-line."),
    "tail": Entry("tail", "Open a stream and print its changes."),
    "config": Entry("config", "Check, show and apply the configuration."),
    "completion": Entry("completion", "Print the completion script of a shell."),
}


def command_named(name: str) -> click.Command | None:
    """Load a command's module and find the command in it; None for a name or a module that is not there."""
    entry = COMMANDS.get(name)
    if entry is None or not _exists(entry):
        return None
    module = importlib.import_module(f"{__package__}.commands.{entry.module}")
    found = (thing for thing in vars(module).values() if isinstance(thing, click.Command))
    return next((command for command in found if command.name == name), None)


def _exists(entry: Entry) -> bool:
    return importlib.util.find_spec(f"{__package__}.commands.{entry.module}") is not None


class _ReaderGoneError(Exception):
    """Whoever read our output has gone, as `head` does."""


class LazyGroup(click.Group):
    """A group that knows its commands by the table and imports the one that is called."""

    @override
    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table, which is the order of work."""
        return [name for name, entry in COMMANDS.items() if _exists(entry)]

    @override
    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        return command_named(cmd_name)

    @override
    def invoke(self, ctx: click.Context) -> object:
        """Run the command. A broken pipe is renamed: click would end the process with 1, as for a failure."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise _ReaderGoneError from None

    @override
    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands from the table, so that --help imports none of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name].help) for name in self.list_commands(ctx)])


def _print_version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("vsql-sync")
        except PackageNotFoundError:
            number = "not installed (running from a source tree)"
        click.echo(f"syncctl {number}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=example("syncctl config check", "syncctl --config /etc/vsql-sync/vsql-sync.toml status"),
)
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Configuration file; else VSQL_SYNC_CONFIG, ./vsql-sync.toml, /etc/vsql-sync/vsql-sync.toml.",
)
@click.option("--debug", is_flag=True, help="Show a traceback with an error.")
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version.",
)
@click.pass_context
def cli(ctx: click.Context, config_path: Path | None, debug: bool) -> None:
    """Replicate PostgreSQL through Kafka; the wire holds only ciphertext.

    Acts through this node's own database. --config and --debug may stand anywhere on the line.
    """
    ctx.obj = Operator(config_path=config_path, debug=debug)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command line and exit with its code."""
    arguments = _globals_first(list(sys.argv[1:] if argv is None else argv))
    code = _run(arguments)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _reader_gone()
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    """One command line; every error becomes a message and a code."""

    def work() -> int:
        result = cli.main(args=arguments, prog_name="syncctl", standalone_mode=False)
        return result if isinstance(result, int) else 0

    return guarded(work, as_json=wants_json(arguments), debug="--debug" in arguments)


def exit_with(work: Callable[[], int]) -> NoReturn:
    """Run a program of ours other than syncctl, with the same errors and exit codes."""
    sys.exit(guarded(work, as_json=False, debug=False))


def guarded(work: Callable[[], int], *, as_json: bool, debug: bool) -> int:
    """The exit code of some work; whatever it raises is reported and becomes a code."""
    try:
        return work()
    except click.ClickException as error:
        _report_click(error, as_json)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except (_ReaderGoneError, BrokenPipeError):
        return _reader_gone()
    except VsqlSyncError as error:
        if debug:
            traceback.print_exc()
        record = error.record if isinstance(error, VerificationError) else ""
        report(type(error).__name__, error.message, error.hint, error.exit_code, as_json, record)
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - the last line of defence: a traceback may hold row values
        if debug:
            traceback.print_exc()
        name = type(error).__qualname__
        hint = "this is a defect; rerun with --debug and report it"
        report(name, f"unexpected {name}", hint, EXIT_DEFECT, as_json)
        return EXIT_DEFECT


def _report_click(error: click.ClickException, as_json: bool) -> None:
    """A command line that click refused; what is near a misspelt word is in its message."""
    hint = ""
    if isinstance(error, click.UsageError):
        hint = f"see `{error.ctx.command_path if error.ctx else 'syncctl'} --help`"
    report(type(error).__name__, error.format_message(), hint, error.exit_code, as_json)


def _globals_first(arguments: list[str]) -> list[str]:
    """Move --config FILE and --debug to the front, where click looks for a group's options."""
    front: list[str] = []
    rest: list[str] = []
    index = 0
    while index < len(arguments):
        word = arguments[index]
        if word == "--":
            rest += arguments[index:]
            break
        if word == "--config" and index + 1 < len(arguments):
            front += [word, arguments[index + 1]]
            index += 1
        elif word == "--debug" or word.startswith("--config="):
            front.append(word)
        else:
            rest.append(word)
        index += 1
    return front + rest


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether --output json stands on the line; read here because a usage error comes before any parsing."""
    return "--output=json" in arguments or ("--output", "json") in pairwise(arguments)


def report(kind: str, message: str, hint: str, code: int, as_json: bool, record: str = "") -> None:
    """Say on standard error what went wrong and what to do."""
    if as_json:
        error = {"type": kind, "message": message, "hint": hint, "record": record, "exit_code": code}
        text = json.dumps({"error": {name: value for name, value in error.items() if value != ""}})
    else:
        where = f" [{record}]" if record else ""
        text = f"error: {message}{where}" + (f"\nhint: {hint}" if hint else "")
    with contextlib.suppress(OSError):  # nobody listens: the exit code still tells
        click.echo(text, err=True)


def _reader_gone() -> int:
    """`syncctl … | head`: no complaint, and none from the interpreter when it flushes at exit."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)
    return EXIT_BROKEN_PIPE
