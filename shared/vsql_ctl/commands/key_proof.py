"""`syncctl key proof` and `verify-proof`: that a KEK version was destroyed, shown to who has no database.

Not here: what a proof is and how it is verified (audit/shred_proof.py), ordering and destroying
(key_shred.py). Rules:

* A proof is written only of what every chain has said.
* It is verified without a database and a configuration, by public keys the verifier has from elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vsql_ctl.context import Operator, OutputFormat, example, output_option, pass_operator
from vsql_ctl.files import read_file, write_file
from vsql_ctl.output import emit, render_pairs
from vsql_shared.errors import RefusedError, TransientError, UserError

if TYPE_CHECKING:
    from vsql_shared.crypto.signing import PinnedKey

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("proof", epilog=example("syncctl key proof 3 --out shred-3.json"))
@click.argument("number", type=int, metavar="ORDER")
@click.option("--out", type=_FILE, required=True, metavar="FILE", help="Where to write it.")
@pass_operator
def proof(operator: Operator, number: int, out: Path) -> None:
    """Write the proof that a KEK version was destroyed: order, approval, and the chains' signed entries."""
    from vsql_ctl.session import open_node
    from vsql_shared.audit.shred_proof import write_proof
    from vsql_shared.pg import shredding

    with open_node(operator) as conn:
        done = shredding.require_destroyed(conn, number)
        entries, named = shredding.entries(conn, done)
    if not done.deks:
        raise RefusedError(f"order {number} covers no data key: no chain says anything of it, to be proven")
    if named < len(done.deks):
        raise TransientError(
            f"{len(done.deks) - named} of {len(done.deks)} data keys stand in no chain yet",
            hint="start this node's producer; it says so in the chains",
        )
    write_file(out, write_proof(done.document, done.approver, done.approval, entries))
    click.echo(f"wrote {out}: {len(done.deks)} data keys, {len(entries)} entries")


@click.command(
    "verify-proof",
    epilog=example(
        "syncctl key verify-proof shred-3.json --operator alice=alice.pub --operator bob=bob.pub"
        " --node node-a=node-a.pub"
    ),
)
@click.argument("path", type=_FILE, metavar="FILE")
@click.option("--operator", "people", multiple=True, metavar="NAME=FILE", help="A public key you trust.")
@click.option("--node", "nodes", multiple=True, metavar="NAME=FILE", help="The node's public key.")
@output_option
def verify_proof(output: OutputFormat, path: Path, people: tuple[str, ...], nodes: tuple[str, ...]) -> None:
    """Verify a proof off-line: no database, no configuration, only public keys you have from elsewhere."""
    from vsql_shared.audit import shred_proof
    from vsql_shared.audit.rows import timestamp

    found = shred_proof.verify_proof(read_file(path, shred_proof.MAX_SIZE), _pins(people), _pins(nodes))
    order = found.order
    shown: dict[str, Any] = {
        "kek": order.kek_id,
        "node": order.node,
        "cluster": order.cluster,
        "ordered_by": order.operator,
        "approved_by": found.approver,
        "reason": order.reason,
        "destroyed_at": timestamp(found.destroyed_at),
        "deks": len(found.deks),
        "tuples": sum(one.tuples for one in order.covers.values()),
        "unapplied_batches": sum(one.unapplied_batches for one in order.covers.values()),
        "entries": [f"{chain} sequence {sequence}" for chain, sequence in found.entries],
    }
    emit(output, shown, lambda: render_pairs(shown | {"entries": ", ".join(shown["entries"])}))


def _pins(given: tuple[str, ...]) -> list[PinnedKey]:
    from vsql_shared.crypto.signing import PinnedKey, fingerprint, load_public_key

    pins = []
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not name:
            raise UserError(f"{text!r} is not NAME=FILE")
        key = load_public_key(Path(path))
        pins.append(PinnedKey(name, key, fingerprint(key), revoked=False))
    return pins


COMMANDS = (proof, verify_proof)
