"""Parts of `syncctl publication` about what must not leave: PCI columns, columns taken out, the report."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from vsql_ctl.output import emit, printable, render_pairs, render_table
from vsql_ctl.session import open_node
from vsql_shared.errors import RefusedError, UserError

if TYPE_CHECKING:
    from vsql_shared.config import Settings

_COLUMN = "TABLE.COLUMN"
_POLL_SECONDS = 0.2


@click.command(
    "remove-column",
    epilog=example("syncctl publication remove-column analytics payments.note"),
)
@click.argument("name")
@click.argument("column", metavar=_COLUMN)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Seconds to wait for a running stream.",
)
@yes_option
@pass_operator
def remove_column(operator: Operator, name: str, column: str, yes: bool, timeout: float) -> None:
    """Take a column out of publication NAME, streams included, also of what waits in the WAL.

    What was sent before stays in Kafka for its retention, and at the targets. A running stream goes on
    without the column within seconds, in a new epoch.
    """
    from vsql_shared.pg import publication_changes, scope_facts
    from vsql_shared.pg.table_spec import parse_column

    table, unwanted = parse_column(column)
    confirm(f"Take column {column} out of publication {name}?", yes=yes)
    with open_node(operator) as conn:
        if not publication_changes.remove_column(conn, name, table, unwanted):
            click.echo(f"note: table {table} has no such column now; rows in the WAL may have it", err=True)
        epoch = None
        deadline = time.monotonic() + (timeout if scope_facts.is_running(conn, name) else 0)
        while epoch is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            epoch = scope_facts.out_since(conn, name, table, unwanted)
    since = f"from its epoch {epoch} on" if epoch is not None else "from the next epoch of its stream on"
    click.echo(
        f"publication {name} carries {column} no more, {since}; what was sent stays where it is", err=True
    )


@click.group("pci", epilog=example("syncctl publication pci list"))
def pci() -> None:
    """The catalogue of columns with PCI data: marked, suggested by name and type, or cleared."""


@pci.command("list", epilog=example("syncctl publication pci list --suggested"))
@click.option("--suggested", is_flag=True, help="Only columns that wait for a decision.")
@output_option
@pass_operator
def pci_list(operator: Operator, output: OutputFormat, suggested: bool) -> None:
    """List marked and cleared columns, and those whose names or types suggest PCI data."""
    from vsql_shared.pg import nodes
    from vsql_shared.pg import pci as catalogue

    with open_node(operator) as conn:
        nodes.local(conn)
        found = [one for one in catalogue.everything(conn) if not suggested or one.state == "suggested"]
    rows = [
        {
            "table": str(one.table),
            "column": one.column,
            "kind": one.kind,
            "state": one.state,
            "note": one.note,
        }
        for one in found
    ]
    head = ("TABLE", "COLUMN", "KIND", "STATE", "NOTE")
    emit(
        output,
        rows,
        lambda: render_table(head, [tuple(row.values()) for row in rows]) if rows else "no columns",
    )


@pci.command(
    "mark",
    epilog=example(
        "syncctl publication pci mark payments.pan payments.cardholder_name",
        "syncctl publication pci mark payments.code --authentication",
    ),
)
@click.argument("columns", metavar=_COLUMN, nargs=-1, required=True)
@click.option("--authentication", is_flag=True, help="CVV, track or PIN: never published.")
@yes_option
@pass_operator
def pci_mark(operator: Operator, columns: tuple[str, ...], authentication: bool, yes: bool) -> None:
    """Mark columns as PCI data. A mark stays.

    A stream that publishes one and excludes PCI data, or any where it is authentication data, stops until the
    column is taken out.
    """
    from vsql_shared.pg import nodes
    from vsql_shared.pg import pci as catalogue
    from vsql_shared.pg.connect import errors
    from vsql_shared.pg.pci_names import Kind
    from vsql_shared.pg.publication_notes import of_marks
    from vsql_shared.pg.table_spec import parse_column

    wanted = [parse_column(text) for text in columns]
    confirm(f"Mark {', '.join(columns)} as PCI data?", yes=yes)
    with open_node(operator) as conn:
        nodes.local(conn)
        with errors("marking columns"), conn.transaction():
            added = catalogue.mark(conn, wanted, Kind.AUTHENTICATION if authentication else None)
        notes = of_marks(conn, added)
    for note in notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"{len(added)} of {len(wanted)} columns are newly marked", err=True)


@pci.command(
    "clear",
    epilog=example('syncctl publication pci clear shops.pin_code --reason "postal code of India"'),
)
@click.argument("column", metavar=_COLUMN)
@click.option(
    "--reason", required=True, metavar="TEXT", help="Why; it stands in the log and in every report."
)
@yes_option
@pass_operator
def pci_clear(operator: Operator, column: str, reason: str, yes: bool) -> None:
    """Say of a column that it is not what its name suggests. What was marked cannot be cleared."""
    from vsql_shared.pg import nodes
    from vsql_shared.pg import pci as catalogue
    from vsql_shared.pg.table_spec import parse_column

    table, name = parse_column(column)
    confirm(f"Say that {column} holds no PCI data?", yes=yes)
    with open_node(operator) as conn:
        nodes.local(conn)
        looked_like = catalogue.clear(conn, table, name, reason)
    click.echo(f"{column} is not taken for {looked_like} any more", err=True)


@click.command(
    "scope-report",
    epilog=example(
        "syncctl publication scope-report analytics --out scope.json",
        "syncctl publication scope-report --verify scope.json --key node-a.pub",
    ),
)
@click.argument("name", required=False)
@click.option(
    "--out",
    "target",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the report here; else to standard output.",
)
@click.option(
    "--verify",
    "source",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Verify a report; needs --key and neither a database nor a configuration.",
)
@click.option(
    "--key",
    "key_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Public key of the node that made the report.",
)
@pass_operator
def scope_report(
    operator: Operator, name: str | None, target: Path | None, source: Path | None, key_file: Path | None
) -> None:
    """Report, signed, what publication NAME leaves out, and what was seen on its streams.

    It is evidence about columns; what is in scope of an assessment, the entity says.
    """
    if source is not None:
        if name is not None or target is not None or key_file is None:
            raise UserError("--verify takes a FILE and --key FILE, and nothing else")
        click.echo(_verified(source, key_file))
        return
    if name is None or key_file is not None:
        raise UserError("name a publication, or give --verify FILE with --key FILE")
    text = _report(operator, operator.settings, name)
    if target is None:
        click.echo(text, nl=False)
        return
    from vsql_ctl.files import complete_file

    with complete_file(target) as file:
        file.write(text)
    click.echo(f"wrote {target}", err=True)


def _report(operator: Operator, settings: Settings, name: str) -> str:
    from vsql_shared.audit import scope_report as reports
    from vsql_shared.crypto.signing import TrustStore
    from vsql_shared.kms import open_signer
    from vsql_shared.pg import migrate, scope_facts, signers

    signer = open_signer(settings)
    if signer is None and settings.is_prod:
        raise RefusedError(
            "a report is signed, and audit.signing_key_path is not set, nor signing_key_label",
            hint="set one",
        )
    with open_node(operator) as conn:
        migrate.require_current(conn)
        trust = TrustStore(signers.load(conn), allow_unsigned=not settings.is_prod)
        facts = scope_facts.gather(conn, name, trust)
    if signer is None:
        click.echo("warning: no signing key is configured; the report proves nothing", err=True)
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    return reports.to_text(reports.sign(reports.build(facts, now), signer))


def _verified(source: Path, key_file: Path) -> str:
    from vsql_shared.audit import scope_report as reports
    from vsql_shared.crypto.signing import load_public_key

    try:
        text = source.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}") from error
    report = reports.verify(text, load_public_key(key_file))
    pairs = {
        "signature": "verifies",
        "signed by": f"{report['signer']['node']}, key {report['signer']['fingerprint']}",
        "publication": f"{report['publication']} of node {report['node']}, cluster {report['cluster']}",
        "generated": report["generated_at"],
        "readers": f"roles {_names(report['readers']['roles'])}; slots {_names(report['readers']['slots'])}",
    }
    parts = [
        render_pairs(pairs),
        _tables(report),
        *_cleared(report),
        f"\n{printable(report['conclusion'])}",
        "\nIt does not claim:",
    ]
    return "\n".join([*parts, *(f"  - {printable(line)}" for line in report["not_claimed"])])


def _names(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _cleared(report: dict[str, Any]) -> list[str]:
    """Columns that do not count because somebody said so: whoever reads the conclusion judges the reasons."""
    lines = [
        f"  - {table['table']}.{one['column']} looks like {one['looks_like']}; {one['cleared_by']} at"
        f" {one['cleared_at']}: {one['reason']}"
        for table in report["tables"]
        for one in table["cleared_columns"]
    ]
    return (
        ["\nNot counted as PCI data, because an operator said so:", *map(printable, lines)] if lines else []
    )


def _tables(report: dict[str, Any]) -> str:
    head = ("TABLE", "COLUMNS", "PUBLISHED", "PCI LEFT OUT", "PCI PUBLISHED", "PCI SEEN")
    rows = [
        (
            table["table"],
            table["total_columns"],
            table["replicated_columns"],
            ", ".join(table["excluded_pci_columns"]),
            ", ".join(table["published_pci_columns"]),
            ", ".join(table["observed_pci_columns"]),
        )
        for table in report["tables"]
    ]
    return "\n" + render_table(head, rows) if rows else ""
