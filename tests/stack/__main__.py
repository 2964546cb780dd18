"""`python -m tests.stack`: run the servers beside the tests, for working by hand or for quick test runs.

    up [kafka] [15 16 17 18]   start them (all by default) and print the addresses
    status                     print what runs
    down                       stop all and delete their data
    fetch                      only download; with `clients`, the PostgreSQL client tools too

Tests started while the stack is up use it instead of starting their own.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time

from tests.stack import fetch, state
from tests.stack.guard import stop_processes
from tests.stack.java import find_java
from tests.stack.kafka import KafkaBroker
from tests.stack.postgres import PostgresServer

ALL = ("kafka", *(str(version) for version in fetch.POSTGRES_VERSIONS))


def main(arguments: list[str]) -> int:
    """Run one command and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.stack", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    up_parser = commands.add_parser("up", help="start the servers and print their addresses")
    up_parser.add_argument(
        "servers", nargs="*", metavar="SERVER", help=f"of {', '.join(ALL)}; all by default"
    )
    commands.add_parser("status", help="print what runs")
    commands.add_parser("down", help="stop all and delete their data")
    fetch_parser = commands.add_parser("fetch", help="only download")
    fetch_parser.add_argument("--clients", action="store_true", help="psql, pg_dump, pgbench too")
    options = parser.parse_args(arguments)
    if options.command == "up":
        unknown = set(options.servers) - set(ALL)
        if unknown:
            parser.error(f"unknown server {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
        up(tuple(options.servers) or ALL)
    elif options.command == "status":
        return status()
    elif options.command == "down":
        down()
    else:
        fetch.fetch_all()
        find_java()  # downloads one where there is none
        if options.clients:
            fetch.client_tools()
    return 0


def up(servers: tuple[str, ...]) -> None:
    """Start the servers that do not run yet."""
    state.run_dir().chmod(0o711)
    for server in servers:
        name = server if server == "kafka" else f"postgres-{server}"
        notes = state.read_notes()
        if name in notes:
            continue
        started = time.monotonic()
        notes[name] = _start(name)
        state.write_notes(notes)
        print(f"stack: {name} up in {time.monotonic() - started:.1f} s", file=sys.stderr)
    status()


def _start(name: str) -> state.ServerNote:
    folder = state.run_dir() / name
    shutil.rmtree(folder, ignore_errors=True)
    if name == "kafka":
        broker = KafkaBroker(folder, detached=True)
        broker.start()
        assert broker.pid is not None
        return state.note(name, broker.bootstrap_servers, broker.pid, folder)
    server = PostgresServer(int(name.removeprefix("postgres-")), folder, detached=True)
    server.start()
    assert server.pid is not None
    return state.note(name, server.conninfo(), server.pid, folder)


def status() -> int:
    """Print the running servers in a form a shell can read; return 1 when there are none."""
    notes = state.read_notes()
    for name, note in sorted(notes.items()):
        variable = "KAFKA" if name == "kafka" else f"PG{name.removeprefix('postgres-')}"
        print(f"VSQL_SYNC_TEST_{variable}='{note.address}'")
    if not notes:
        print("stack: nothing runs (make stack-up starts it)", file=sys.stderr)
    return 0 if notes else 1


def down() -> None:
    """Stop the running servers and delete their data."""
    notes = state.read_notes()
    signals = {name: signal.SIGTERM if name == "kafka" else signal.SIGINT for name in notes}
    stop_processes({note.pid: (note.started, signals[name]) for name, note in notes.items()})
    shutil.rmtree(state.run_dir(), ignore_errors=True)
    print(f"stack: stopped {', '.join(sorted(notes)) or 'nothing'}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
