"""`syncctl audit export`: the trail as a file for others. What is in it: vsql_shared/audit/export.py."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from vsql_ctl.commands.audit_proofs import signing_key
from vsql_ctl.context import Operator, example, pass_operator
from vsql_ctl.files import complete_file
from vsql_ctl.trail import moment, node_database, trusted_keys
from vsql_shared.errors import ChainError, UserError

if TYPE_CHECKING:
    from vsql_shared.audit.checkpoint import Log
    from vsql_shared.audit.links import Linked
    from vsql_shared.config import Settings
    from vsql_shared.pg.connect import Connection

Pieces = Iterator[tuple[str, dict[str, Any]]]

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet would compute: such a text gets an apostrophe before it."""


@click.command(
    "export",
    epilog=example(
        "syncctl audit export --format json --output /tmp/audit-report.json",
        "syncctl audit export --proofs --since 2026-02-01 --output /tmp/audit-report.json",
    ),
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["json", "jsonl", "csv"]),
    default="json",
    show_default=True,
    help="One JSON document, one JSON object a line, or a table for spreadsheets.",
)
@click.option(
    "--output",
    "target",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    metavar="FILE",
    help="File to write; it appears when it is complete.",
)
@click.option(
    "--since", type=moment, metavar="TIME", help="In each chain, from its first entry of that time on."
)
@click.option("--proofs", is_flag=True, help="Add a signed checkpoint of each chain; takes the signing key.")
@pass_operator
def export_trail(operator: Operator, form: str, target: Path, since: datetime | None, proofs: bool) -> None:
    """Write signed entries and public keys to a file that can be verified without this database."""
    from vsql_shared.audit.export import export
    from vsql_shared.pg import nodes, oplog
    from vsql_shared.pg.connect import errors

    if proofs and form == "csv":
        raise UserError(
            "--proofs and --format csv", hint="a table has no place for proofs; take json or jsonl"
        )
    with node_database(operator.settings) as conn:
        node = nodes.local(conn)
        sign = _sign(conn, operator.settings) if proofs else None
        with errors("noting the export in the operators' log"):
            oplog.record(
                conn, "audit.export", "file", str(target), new={"since": since and since.isoformat()}
            )
        chains: dict[str, Any] = {}
        pieces = _ends(export(conn, node.cluster, node.name, datetime.now(UTC), since, sign), chains)
        with complete_file(target) as file:
            count = _write_csv(file, pieces) if form == "csv" else _write(file, form, pieces)
    click.echo(f"exported {count} entries to {target}", err=True)
    for chain, end in chains.items():
        if since is None and end["first_sequence"] > 1:
            click.echo(
                f"chain {chain} begins at entry {end['first_sequence']}: none before is in this database"
                " (pruned, then they are in the archive; or cut off: `syncctl audit verify` tells)",
                err=True,
            )


def _ends(pieces: Pieces, chains: dict[str, Any]) -> Pieces:
    """The pieces as they are; what the last one says of each chain goes into `chains`."""
    for kind, value in pieces:
        if kind == "end":
            chains |= value["chains"]
        yield kind, value


def _sign(conn: Connection, settings: Settings) -> Callable[[Log, Linked], str]:
    """Makes this node's checkpoints; nothing is signed where the trail does not verify.

    The export reads in a snapshot of its own, perhaps hours later: it holds the links once more, and the last
    signature is verified of what is signed.
    """
    from vsql_shared.audit.checkpoint import Checkpoint
    from vsql_shared.audit.links import require_signed
    from vsql_shared.audit.tree import root_of
    from vsql_shared.audit.verify import verify_table

    signer, trust = signing_key(conn, settings), trusted_keys(conn, settings)
    found = verify_table(conn, trust, settings.cluster.name).problems
    if found:
        raise ChainError(
            f"chain {found[0].chain} does not verify: {found[0].what}",
            record=f"{found[0].chain}/{found[0].sequence}",
            hint="nothing is signed; export without --proofs, `syncctl audit verify` says more",
        )

    def sign(log: Log, linked: Linked) -> str:
        require_signed(linked, log, trust)
        head = Checkpoint(log, linked.size, root_of(linked.tree))
        return head.sign(signer, int(time.time())).encode()

    return sign


def _write(file: TextIO, form: str, pieces: Pieces) -> int:
    """Write piece by piece, so that a trail of any length needs little memory."""
    count = 0
    for kind, value in pieces:
        text = json.dumps(value, ensure_ascii=False)
        if form == "jsonl":
            file.write(f'{{"{kind}": {text}}}\n')
        elif kind == "header":
            file.write(f'{{"header": {text},\n"entries": [')
        elif kind == "entry":
            file.write((",\n" if count else "\n") + text)
        else:
            file.write(f'\n],\n"end": {text}}}\n')
        count += kind == "entry"
    return count


def _write_csv(file: TextIO, pieces: Pieces) -> int:
    """The fields of each entry, then its hash and its signed document; RFC 4180."""
    from vsql_shared.audit.export_format import entry_names

    names = entry_names()
    table = csv.writer(file)
    table.writerow([*names, "hash", "kafka_offset", "document", "error"])
    count = 0
    for kind, item in pieces:
        if kind != "entry":
            continue
        known = item["entry"] or {"chain": item["chain"], "sequence": item["sequence"]}
        cells = [known.get(name) for name in names]
        more = [item["hash"], item["kafka_offset"], item["document"], item.get("error")]
        table.writerow([_cell(value) for value in (*cells, *more)])
        count += 1
    return count


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        value = json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
