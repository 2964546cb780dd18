"""`syncctl publication`: which tables and columns leave this node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from vsql_shared.pg.publications import PublicationInfo


@click.group("publication", epilog=example("syncctl publication list"))
def publication() -> None:
    """Choose the tables and columns that leave this node."""


@publication.command(
    "create",
    epilog=example(
        'syncctl publication create analytics --table "payments(id, amount)" --table "merchants(*)"',
        'syncctl publication create full --table "*" --pci-column payments.pan --exclude-pci',
    ),
)
@click.argument("name")
@click.option(
    "--table", "tables", multiple=True, required=True, metavar="TABLE", help="table(columns), table, or *."
)
@click.option(
    "--pci-column", "pci_columns", multiple=True, metavar="TABLE.COLUMN", help="Mark a column as PCI data."
)
@click.option("--exclude-pci", is_flag=True, help="Leave marked columns out.")
@click.option(
    "--insert-only", is_flag=True, help="Publish INSERT and TRUNCATE only; no replica identity needed."
)
@output_option
@pass_operator
def create(
    operator: Operator,
    output: OutputFormat,
    name: str,
    tables: tuple[str, ...],
    pci_columns: tuple[str, ...],
    exclude_pci: bool,
    insert_only: bool,
) -> None:
    """Create publication NAME, or change it while no stream uses it.

    "*" is every table there is now; a table made later is not published until this is run again.
    """
    from vsql_shared.pg import publications
    from vsql_shared.pg.table_spec import parse_column, parse_spec

    request = publications.PublicationRequest(
        name,
        tuple(parse_spec(text) for text in tables),
        tuple(parse_column(text) for text in pci_columns),
        exclude_pci=exclude_pci,
        insert_only=insert_only,
    )
    with open_node(operator) as conn:
        made = publications.create(conn, request)
    emit(output, _as_dict(made), lambda: _table([made]))


@publication.command("list", epilog=example("syncctl publication list --output json"))
@output_option
@pass_operator
def list_(operator: Operator, output: OutputFormat) -> None:
    """List the publications with their tables, columns and PCI scope."""
    from vsql_shared.pg import nodes, publications

    with open_node(operator) as conn:
        nodes.local(conn)
        found = publications.everything(conn)
    emit(output, [_as_dict(one) for one in found], lambda: _table(found) if found else "no publications")


@publication.command("drop", epilog=example("syncctl publication drop analytics"))
@click.argument("name")
@yes_option
@pass_operator
def drop(operator: Operator, name: str, yes: bool) -> None:
    """Drop publication NAME, which no stream may use."""
    from vsql_shared.pg import publications

    confirm(f"Drop publication {name}?", yes=yes)
    with open_node(operator) as conn:
        publications.drop(conn, name)
    click.echo(f"dropped publication {name}", err=True)


def _as_dict(one: PublicationInfo) -> dict[str, object]:
    return {
        "name": one.name,
        "exclude_pci": one.exclude_pci,
        "insert_only": one.insert_only,
        "tables": [
            {
                "schema": table.name.schema,
                "table": table.name.table,
                "columns": "all" if table.columns is None else list(table.columns),
                "pci_columns": one.pci.get(table.name, []),
            }
            for table in one.tables
        ],
    }


def _table(found: Sequence[PublicationInfo]) -> str:
    rows = [
        (
            one.name,
            str(table.name),
            "all" if table.columns is None else ", ".join(table.columns),
            ", ".join(one.pci.get(table.name, [])),
            "insert only" if one.insert_only else "all",
        )
        for one in found
        for table in one.tables
    ]
    return render_table(("PUBLICATION", "TABLE", "COLUMNS", "PCI COLUMNS", "CHANGES"), rows)
