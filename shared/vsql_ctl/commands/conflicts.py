"""`syncctl conflicts`: which changes met another node's, what stands, and how often that happens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from vsql_ctl.context import Operator, OutputFormat, example, output_option, pass_operator
from vsql_ctl.output import emit, printable, render_pairs, render_table
from vsql_ctl.trail import moment, node_database
from vsql_shared.errors import UserError

if TYPE_CHECKING:
    from vsql_shared.pg.conflicts import Conflict, Count, Rows, Wanted

_MAX_LIMIT = 100_000
_NUMBER = re.compile(r"(?:CONFLICT-)?0*([1-9][0-9]{0,17})", re.IGNORECASE)
_LIST = ("NUMBER", "FOUND", "TABLE", "KIND", "HERE", "CAME FROM", "OUTCOME", "STANDS")
_STATS = ("TABLE", "KIND", "OUTCOME", "CONFLICTS", "LAST DAY", "FIRST", "LAST")
_ABSENT = "–"


@click.group(
    "conflicts",
    epilog=example('syncctl conflicts list --since "2026-02-17"', "syncctl conflicts show CONFLICT-001"),
)
def conflicts() -> None:
    """Show what became of changes that met another node's, as this node found them.

    Each node has the conflicts it found itself: ask both.
    """


def _filters(command: Callable[..., None]) -> Callable[..., None]:
    """The options that choose conflicts."""
    for option in (
        click.option("--outcome", help="Only with this outcome, e.g. KEPT_LOCAL or PENDING."),
        click.option("--kind", help="Only this kind, e.g. update_origin_differs."),
        click.option("--table", help="Only of this table."),
        click.option("--until", type=moment, metavar="TIME", help="Found before this time."),
        click.option(
            "--since", type=moment, metavar="TIME", help="Found from this time on (UTC unless it has a zone)."
        ),
    ):
        command = option(command)
    return command


def _wanted(given: dict[str, Any]) -> Wanted:
    from vsql_shared.pg import conflicts as log
    from vsql_shared.pg.table_spec import parse_table

    kind, outcome = given["kind"], given["outcome"]
    if kind is not None and kind not in log.KINDS:
        raise UserError(f"{kind!r} is no kind of conflict", hint=f"one of {', '.join(log.KINDS)}")
    if outcome is not None and outcome not in log.OUTCOMES:
        raise UserError(f"{outcome!r} is no outcome", hint=f"one of {', '.join(log.OUTCOMES)}")
    table = None if given["table"] is None else parse_table(given["table"])
    before = None if given.get("before") is None else number_of(given["before"])
    return log.Wanted(given["since"], given["until"], table, kind, outcome, before)


@conflicts.command(
    "list",
    epilog=example(
        'syncctl conflicts list --since "2026-02-17" --table accounts',
        "syncctl conflicts list --outcome PENDING --output json",
    ),
)
@_filters
@click.option(
    "--limit",
    type=click.IntRange(1, _MAX_LIMIT),
    default=100,
    show_default=True,
    help="At most so many, the newest ones.",
)
@click.option(
    "--before", metavar="NUMBER", help="Only lower numbers: with the first one listed, the page before."
)
@output_option
@pass_operator
def list_conflicts(operator: Operator, /, output: OutputFormat, limit: int, **given: Any) -> None:
    """List conflicts, oldest first, without their rows."""
    from vsql_shared.pg import conflicts as log

    wanted = _wanted(given)
    with node_database(operator.settings) as conn:
        found = log.select(conn, wanted, limit)
    emit(output, [as_dict(one) for one in found], lambda: _table(found))


@conflicts.command("show", epilog=example("syncctl conflicts show 7", "syncctl conflicts show CONFLICT-007"))
@click.argument("number", metavar="NUMBER")
@output_option
@pass_operator
def show(operator: Operator, output: OutputFormat, number: str) -> None:
    """Show one conflict, with both rows side by side where they were kept and this role may read them."""
    from vsql_shared.pg import conflicts as log

    wanted = number_of(number)
    with node_database(operator.settings) as conn:
        found, rows = log.find(conn, wanted), log.rows_of(conn, wanted)
    data = as_dict(found) | {
        "rows_readable": rows is not None,
        "local_row": rows and rows.local,
        "remote_row": rows and rows.remote,
    }
    emit(output, data, lambda: "\n".join([_one(found), "", *words_of_rows(found, rows)]))


@conflicts.command(
    "stats", epilog=example("syncctl conflicts stats", "syncctl conflicts stats --since 2026-02-17")
)
@_filters
@output_option
@pass_operator
def stats(operator: Operator, /, output: OutputFormat, **given: Any) -> None:
    """Count conflicts by table, kind and outcome."""
    from vsql_shared.pg import conflicts as log

    wanted = _wanted(given)
    with node_database(operator.settings) as conn:
        found = log.stats(conn, wanted)
    emit(output, found, lambda: _counts(found))


def number_of(text: str) -> int:
    """`7`, `007` or `CONFLICT-007`. Raises UserError."""
    found = _NUMBER.fullmatch(text)
    if found is None:
        raise UserError(f"{text!r} is no number of a conflict", hint="`syncctl conflicts list` shows them")
    return int(found[1])


def as_dict(one: Conflict) -> dict[str, object]:
    """For JSON: with the node whose version stands."""
    return {
        "number": one.id,
        "found_at": one.detected_at,
        "stream": one.stream,
        "table": one.table,
        "kind": one.kind,
        "local_origin": one.local_origin,
        "local_time": one.local_time,
        "remote_origin": one.remote_origin,
        "remote_time": one.remote_time,
        "remote_xid": one.remote_xid,
        "outcome": one.outcome,
        "stands": one.stands,
        "resolved_at": one.resolved_at,
        "resolved_by": one.resolved_by,
    }


def _table(found: list[Conflict]) -> str:
    if not found:
        return "no conflicts"
    return render_table(_LIST, [
        (one.id, one.detected_at, one.table, one.kind, one.local_origin, one.remote_origin, one.outcome,
         one.stands)
        for one in found
    ])  # fmt: skip


def _counts(found: list[Count]) -> str:
    if not found:
        return "no conflicts"
    return render_table(_STATS, [
        (one.table, one.kind, one.outcome, one.conflicts, one.last_day, one.first, one.last) for one in found
    ])  # fmt: skip


def _one(one: Conflict) -> str:
    decided = "nobody yet" if one.resolved_at is None else f"{one.resolved_by} at {one.resolved_at}"
    return render_pairs(
        {
            "conflict": f"{one.id}, {one.kind}",
            "found": f"{one.detected_at}, on stream {one.stream}",
            "table": one.table,
            "here": _version(one.local_origin, one.local_time) or "nothing was known of the row",
            "came": f"{_version(one.remote_origin, one.remote_time)}, transaction {one.remote_xid}",
            "outcome": f"{one.outcome}: "
            + (f"what {one.stands} wrote stands" if one.stands else "what was here stays as it was"),
            "decided": decided,
        }
    )


def _version(node: str | None, time: datetime | None) -> str:
    if node is None:
        return ""
    return f"node {node}, " + (f"committed at {time}" if time else "at a time this server has no more")


def words_of_rows(one: Conflict, rows: Rows | None) -> Iterator[str]:
    """Both rows side by side, or why they are not shown."""
    if rows is None:
        yield "the rows are not shown: this role may not read them (administrators may)"
    elif rows.local is None and rows.remote is None:
        yield (
            "no row: the table has PCI data and none was kept"
            if not one.kind.endswith(("_missing", "_deleted"))
            else "no row was kept: there was none on either side, or the table has PCI data"
        )
    else:
        yield render_table(("COLUMN", "HERE", "CAME", ""), list(side_by_side(rows.local, rows.remote)))


def side_by_side(
    local: dict[str, Any] | None, remote: dict[str, Any] | None
) -> Iterator[tuple[str, str, str, str]]:
    """Column, both values as JSON, and a mark where they differ."""
    for column in [*(local or {}), *(name for name in remote or {} if name not in (local or {}))]:
        here, came = (
            _ABSENT if row is None or column not in row else json.dumps(row[column], ensure_ascii=False)
            for row in (local, remote)
        )
        both = local is not None and remote is not None
        yield printable(column), printable(here), printable(came), "*" if both and here != came else ""
