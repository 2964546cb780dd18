"""`syncctl schema`: whether two nodes define their tables alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vsql_ctl.context import Operator, OutputFormat, example, output_option, pass_operator
from vsql_ctl.output import emit, render_table
from vsql_ctl.session import APPLICATION_NAME, open_node
from vsql_shared.errors import RefusedError, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vsql_shared.changes import TableName
    from vsql_shared.pg.connect import Connection
    from vsql_shared.pg.schema_compare import Comparison

_EXIT_DIFFERENT = 1  # as diff has it


@click.group("schema", epilog=example('syncctl schema compare --peer-connection "host=node-b dbname=shop"'))
def schema() -> None:
    """Compare the definitions of tables between nodes."""


@schema.command(
    "compare",
    epilog=example(
        'syncctl schema compare --peer-connection "host=node-b dbname=shop user=admin"',
        "syncctl schema compare --publication pub --output json",
    ),
)
@click.option(
    "--peer-connection",
    metavar="CONNINFO",
    envvar="VSQL_SYNC_PEER_CONNECTION",
    help="Connection string of the peer's database; else VSQL_SYNC_PEER_CONNECTION.",
)
@click.option(
    "--publication",
    "publications",
    multiple=True,
    metavar="NAME",
    help="Compare what this publication of this node carries; else every table, whole.",
)
@click.option("--table", "tables", multiple=True, metavar="TABLE", help="Compare this table only.")
@output_option
@pass_operator
@click.pass_context
def compare(
    ctx: click.Context,
    operator: Operator,
    output: OutputFormat,
    peer_connection: str | None,
    publications: tuple[str, ...],
    tables: tuple[str, ...],
) -> None:
    """Compare the columns of tables here and on a peer: MATCH, MISMATCH, LOCAL_ONLY or REMOTE_ONLY.

    Ends with 0 when all match, with 1 when a table does not. Changes nothing.
    """
    from vsql_shared.pg import schema_compare
    from vsql_shared.pg.connect import connect

    if not peer_connection:
        raise UserError(
            "the peer's database is not named",
            hint="give --peer-connection, or set VSQL_SYNC_PEER_CONNECTION",
        )
    with open_node(operator) as conn, connect(peer_connection, application_name=APPLICATION_NAME) as peer:
        names = _peers(conn, peer)
        found = schema_compare.compare(conn, peer, _wanted(conn, publications, tables))
    _require_found(found, tables)
    emit(output, _as_dict(names, found), lambda: _table(found))
    if any(one.status != "MATCH" for one in found):
        ctx.exit(_EXIT_DIFFERENT)


def _peers(conn: Connection, peer: Connection) -> tuple[str, str]:
    """Names of both nodes. Raises UserError where the connection leads to no other node of this cluster."""
    from vsql_shared.pg import nodes

    here, there = nodes.local(conn), nodes.local(peer)
    if there.cluster != here.cluster or there.name == here.name:
        raise UserError(
            f"--peer-connection leads to node {there.name} of cluster {there.cluster}",
            hint=f"give another node of cluster {here.cluster}",
        )
    return here.name, there.name


def _wanted(
    conn: Connection, chosen: Sequence[str], tables: Sequence[str]
) -> dict[TableName, tuple[str, ...] | None] | None:
    """Tables with their published columns; None is every table there is."""
    from vsql_shared.pg import publications
    from vsql_shared.pg.table_spec import parse_table

    if not chosen:
        return {parse_table(text): None for text in tables} or None
    known = {one.name: one for one in publications.everything(conn)}
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise RefusedError(
            f"there is no publication {', '.join(unknown)} on this node",
            hint="see `syncctl publication list`",
        )
    carried = {
        table.name: table.columns for name in chosen for table in publications.carried(conn, known[name])
    }
    named = [parse_table(text) for text in tables]
    outside = [name for name in named if name not in carried]
    if outside:
        raise RefusedError(
            f"table {', '.join(map(str, outside))} is not in publication {', '.join(chosen)}",
            hint="see `syncctl publication list`",
        )
    return {name: carried[name] for name in named} or carried


def _require_found(found: Sequence[Comparison], tables: Sequence[str]) -> None:
    from vsql_shared.pg.table_spec import parse_table

    there = {one.table for one in found}
    missing = [name for name in map(parse_table, tables) if name not in there]
    if missing:
        raise RefusedError(
            f"there is no table {', '.join(map(str, missing))} on either node", hint="check the spelling"
        )


def _as_dict(names: tuple[str, str], found: Sequence[Comparison]) -> dict[str, object]:
    return {
        "local": names[0],
        "remote": names[1],
        "match": all(one.status == "MATCH" for one in found),
        "tables": [
            {
                "schema": one.table.schema,
                "table": one.table.table,
                "status": one.status,
                "local_fingerprint": one.local_fingerprint,
                "remote_fingerprint": one.remote_fingerprint,
                "differences": [
                    {"column": each.column, "difference": each.difference} for each in one.differences
                ],
            }
            for one in found
        ],
    }


def _table(found: Sequence[Comparison]) -> str:
    if not found:
        return "no tables"
    rows = [(str(one.table), one.status, one.difference) for one in found]
    return render_table(("TABLE", "STATUS", "DIFFERENCE"), rows)
