"""`syncctl publication`: which tables and columns leave this node."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from vsql_ctl.commands.publication_scope import pci, remove_column, scope_report
from vsql_ctl.context import (
    Operator,
    OutputFormat,
    confirm,
    example,
    output_option,
    pass_operator,
    yes_option,
)
from vsql_ctl.output import emit, printable, render_table
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
        """syncctl publication create west --table "orders WHERE (region = 'west')\"""",
    ),
)
@click.argument("name")
@click.option(
    "--table",
    "tables",
    multiple=True,
    required=True,
    metavar="TABLE",
    help="table, table(columns), or *; WHERE (predicate) after it is a row filter.",
)
@click.option(
    "--pci-column", "pci_columns", multiple=True, metavar="TABLE.COLUMN", help="Mark a column as PCI data."
)
@click.option("--exclude-pci", is_flag=True, help="Leave marked columns out.")
@click.option(
    "--insert-only", is_flag=True, help="Publish INSERT and TRUNCATE only; no replica identity needed."
)
@click.option(
    "--message-prefix",
    "prefixes",
    multiple=True,
    metavar="PREFIX",
    help="Carry logical messages with exactly this prefix.",
)
@click.option("--sequences", is_flag=True, help="Carry the sequences of published columns.")
@click.option(
    "--sequence", "more_sequences", multiple=True, metavar="SEQUENCE", help="Carry this sequence, too."
)
@click.option(
    "--set-identity", is_flag=True, help="Give tables that need it a REPLICA IDENTITY by a unique index."
)
@click.option("--via-leaf", is_flag=True, help="Partitioned tables travel leaf by leaf, not as one table.")
@click.option(
    "--apply",
    "apply_mode",
    type=click.Choice(["transactional", "partitioned"]),
    default="transactional",
    show_default=True,
    help="Targets apply whole transactions in order, or each row's changes in order, by several members.",
)
@output_option
@pass_operator
def create(
    operator: Operator,
    *,
    output: OutputFormat,
    name: str,
    tables: tuple[str, ...],
    pci_columns: tuple[str, ...],
    exclude_pci: bool,
    insert_only: bool,
    prefixes: tuple[str, ...],
    sequences: bool,
    more_sequences: tuple[str, ...],
    set_identity: bool,
    via_leaf: bool,
    apply_mode: str,
) -> None:
    """Create publication NAME, or change it while no stream uses it.

    "*" is every table there is now; a table made later is not published until this is run again.
    """
    from vsql_shared.pg import publications
    from vsql_shared.pg.publication_notes import limitations
    from vsql_shared.pg.table_spec import parse_column, parse_spec, parse_table

    request = publications.PublicationRequest(
        name,
        tuple(parse_spec(text) for text in tables),
        tuple(parse_column(text) for text in pci_columns),
        exclude_pci=exclude_pci,
        insert_only=insert_only,
        message_prefixes=prefixes,
        sequences=sequences,
        more_sequences=tuple(map(parse_table, more_sequences)),
        via_leaf=via_leaf,
        set_identity=set_identity,
        apply_mode=apply_mode,
    )
    with open_node(operator) as conn:
        made = publications.create(conn, request)
        notes = limitations(conn, made)
    for note in notes:
        click.echo(f"note: {note}", err=True)
    emit(output, _as_dict(made), lambda: _table([made]))


@publication.command(
    "add-column",
    epilog=example("syncctl publication add-column analytics payments.note"),
)
@click.argument("name")
@click.argument("column", metavar="TABLE.COLUMN")
@yes_option
@pass_operator
def add_column(operator: Operator, name: str, column: str, yes: bool) -> None:
    """Let a column travel with publication NAME from now on, streams included.

    Rows that were written before keep what the column has at the targets, which must have it.
    """
    from vsql_shared.pg import publication_changes
    from vsql_shared.pg.table_spec import parse_column

    table, wanted = parse_column(column)
    confirm(f"Let column {column} leave this node with publication {name}?", yes=yes)
    with open_node(operator) as conn:
        publication_changes.add_column(conn, name, table, wanted)
    click.echo(f"publication {name} carries {column} from now on", err=True)


@publication.command(
    "partition",
    epilog=example(
        "syncctl publication partition facts facts_2024 --of facts",
        "syncctl publication partition facts facts_2024 --pass-over",
    ),
)
@click.argument("name")
@click.argument("table")
@click.option("--of", "root", metavar="TABLE", help="The published table it was a partition of.")
@click.option("--pass-over", is_flag=True, help="Leave out what the WAL holds of it.")
@yes_option
@pass_operator
def partition(
    operator: Operator, name: str, table: str, root: str | None, pass_over: bool, yes: bool
) -> None:
    """Say what TABLE was, when it was detached or dropped before its changes were read.

    Only for publications by leaf (--via-leaf); the stream's error asks for it.
    """
    from vsql_shared.pg import publication_changes
    from vsql_shared.pg.table_spec import parse_table

    if (root is None) is not pass_over:
        raise click.UsageError("give --of TABLE or --pass-over")
    leaf, of = parse_table(table), None if root is None else parse_table(root)
    what = f"Let rows of {leaf} pass as a partition of {of}?" if of else f"Leave out the rows of {leaf}?"
    confirm(what, yes=yes)
    with open_node(operator) as conn:
        publication_changes.settle_partition(conn, name, leaf, of)
    click.echo(f"{leaf}: " + (f"a partition of {of}" if of else "passed over"), err=True)


@publication.command("list", epilog=example("syncctl publication list --output json"))
@output_option
@pass_operator
def list_(operator: Operator, output: OutputFormat) -> None:
    """List the publications with their tables, columns, row filters and PCI scope."""
    from vsql_shared.pg import nodes, publications

    with open_node(operator) as conn:
        nodes.local(conn)
        found = publications.everything(conn)
    emit(output, [_as_dict(one) for one in found], lambda: _table(found) if found else "no publications")


publication.add_command(remove_column)
publication.add_command(pci)
publication.add_command(scope_report)


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
    from vsql_shared.pg import signals

    return {
        "name": one.name,
        "exclude_pci": one.exclude_pci,
        "insert_only": one.insert_only,
        "apply_mode": one.apply_mode,
        **signals.as_json(one),
        "tables": [
            {
                "schema": table.name.schema,
                "table": table.name.table,
                "columns": "all" if table.columns is None else list(table.columns),
                "where": table.where,
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
            table.where or "",
            ", ".join(one.pci.get(table.name, [])) or ("left out" if one.exclude_pci else ""),
            ("insert only" if one.insert_only else "all")
            + (", by leaf" if one.via_leaf else "")
            + (", partitioned" if one.apply_mode == "partitioned" else ""),
        )
        for one in found
        for table in one.tables
    ]
    table = render_table(("PUBLICATION", "TABLE", "COLUMNS", "ROWS", "PCI COLUMNS", "CHANGES"), rows)
    return "\n".join([table, *(line for one in found for line in _beside_rows(one))])


def _beside_rows(one: PublicationInfo) -> Iterator[str]:
    """What it carries that is no row."""
    if one.message_prefixes:
        yield f"{one.name}: logical messages with prefix {', '.join(map(printable, one.message_prefixes))}"
    named = [str(name) for name in one.more_sequences]
    listed = [*(["those of published columns"] if one.sequences else []), *named]
    if listed:
        yield f"{one.name}: sequences: {', '.join(listed)}"
