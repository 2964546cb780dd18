"""`syncctl key rotate-dek` and `rotate-kek`: have this node's producers use new keys while they run.

Not here: making and wrapping keys (the producer's keys.py). Rules: both only ask; the producer of each stream
makes its own new data key, and wraps anew what some target still needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vsql_ctl.context import Operator, OutputFormat, example, output_option, pass_operator
from vsql_ctl.output import emit, render_table
from vsql_shared.errors import RefusedError, TransientError

if TYPE_CHECKING:
    from vsql_shared.pg.connect import Connection


@click.command(
    "rotate-dek", epilog=example("syncctl key rotate-dek", "syncctl key rotate-dek --stream orders.node-a")
)
@click.option("--stream", "chain", metavar="STREAM", help="One stream; else every stream this node writes.")
@click.option("--reason", default="", metavar="TEXT", help="Why; it stands in the command's row.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Seconds to wait for answers.",
)
@output_option
@pass_operator
def rotate_dek(
    operator: Operator, output: OutputFormat, chain: str | None, reason: str, timeout: float
) -> None:
    """Have this node's producer seal with a new data key from the next batch on."""
    _ask(operator, output, "rotate-dek", chain, reason, timeout)


@click.command(
    "rotate-kek", epilog=example("syncctl key rotate-kek", 'syncctl key rotate-kek --reason "yearly change"')
)
@click.option("--stream", "chain", metavar="STREAM", help="One stream; else every stream this node writes.")
@click.option("--reason", default="", metavar="TEXT", help="Why; it stands in the command's row.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    help="Seconds to wait for answers.",
)
@output_option
@pass_operator
def rotate_kek(
    operator: Operator, output: OutputFormat, chain: str | None, reason: str, timeout: float
) -> None:
    """Put the newest version of the KEK to use, without stopping.

    Make that version first: `syncctl key generate`, or your key service's own tools. Every stream seals with
    a new data key under it from the next batch on; data keys whose data is not applied everywhere yet are
    wrapped anew and announced again, so that the old version is not needed for them.
    """
    _ask(operator, output, "rotate-kek", chain, reason, timeout)


COMMANDS = (rotate_dek, rotate_kek)


def _ask(
    operator: Operator, output: OutputFormat, verb: str, chain: str | None, reason: str, timeout: float
) -> None:
    """Give the command to the producers and show their answers."""
    from vsql_shared.pg import commands, oplog
    from vsql_shared.pg.connect import connect, errors
    from vsql_shared.pg.migrate import require_current

    with connect(operator.settings.connection.conninfo(), application_name="vsql_sync_ctl") as conn:
        require_current(conn)
        streams = _outgoing(conn, chain)
        with errors("asking for a new key"), conn.transaction():
            line = oplog.record(conn, f"key.{verb}", "stream", chain or "*", new={"reason": reason})
            args = {"audit_log": line}
            asked = commands.request(conn, "producer", verb, args, reason, chain)
        answers = commands.wait(conn, asked, len(streams), timeout)
        silent = streams - {a.chain for a in answers}
        if silent:  # a first copy may have ended meanwhile
            silent &= _writing(conn).keys()
    rows = [{"stream": a.chain, "done": a.ok, "message": a.message} for a in answers]
    if rows:
        emit(
            output,
            rows,
            lambda: render_table(("stream", "done", "message"), [tuple(r.values()) for r in rows]),
        )
    if silent:
        raise TransientError(
            f"no answer within {timeout:g} s from {', '.join(sorted(silent))}",
            hint="see `syncctl status`; the producer does it when it runs again",
        )
    if not all(a.ok for a in answers):
        raise RefusedError("not every stream rotated its key", hint="the table says why")


def _writing(conn: Connection) -> dict[str, str]:
    """The streams this node writes, without copies that are done, and what each is wanted to do."""
    rows = conn.execute(
        "SELECT chain, desired FROM vsql_sync.streams"
        " WHERE direction = 'out' AND state <> 'FINISHED' ORDER BY chain"
    ).fetchall()
    return {str(name): str(wanted) for name, wanted in rows}


def _outgoing(conn: Connection, chain: str | None) -> set[str]:
    """The running streams this node writes, or the one that was named."""
    desired = _writing(conn)
    if chain is not None and chain not in desired:
        known = ", ".join(desired) or "none"
        raise RefusedError(f"this node writes no stream {chain!r}", hint=f"its streams: {known}")
    running = {name for name, wanted in desired.items() if wanted != "stopped" and chain in (None, name)}
    if not running:
        raise RefusedError(
            "none of this node's streams is started" if chain is None else f"stream {chain} is stopped",
            hint="a stream makes a new data key whenever it starts: `syncctl start`",
        )
    return running
