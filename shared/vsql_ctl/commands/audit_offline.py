"""`syncctl audit verify-proof`, `verifier-key`: what an auditor does with public keys and files alone.

Not here: what takes a database or signs (audit_proofs.py). Formats: docs/formats.md.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vsql_ctl.context import OutputFormat, example, output_option
from vsql_ctl.output import emit, render_pairs
from vsql_ctl.trail import about, log_named, read_text
from vsql_shared.errors import SignatureError, UserError

if TYPE_CHECKING:
    from vsql_shared.audit.checkpoint import Checkpoint, Opened
    from vsql_shared.crypto.signing import TrustStore

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(
    "verify-proof",
    epilog=example(
        "syncctl audit verify-proof entry.tlog-proof --key node-a.pub",
        "syncctl audit verify-proof year.proof --old january.checkpoint --key node-a.pub",
        "syncctl audit verify-proof both.checkpoint --key node-a.pub --cosigner node-b=node-b.pub",
    ),
)
@click.argument("path", type=_FILE, metavar="FILE")
@click.option(
    "--key",
    "keys",
    type=_FILE,
    multiple=True,
    required=True,
    metavar="FILE",
    help="Public key of the chain's writer.",
)
@click.option(
    "--cosigner",
    "cosigners",
    multiple=True,
    metavar="NODE=FILE",
    help="A node that must have cosigned, and its key.",
)
@click.option("--old", type=_FILE, metavar="FILE", help="The earlier checkpoint.")
@output_option
def verify_proof(
    path: Path, keys: tuple[Path, ...], cosigners: tuple[str, ...], old: Path | None, output: OutputFormat
) -> None:
    """Verify a checkpoint or a proof off-line: no configuration, no database, only public keys.

    FILE is a checkpoint, a proof of an entry (`prove`), or of a prefix (`prove-prefix`, with --old). Where
    there is no proof between both, --old must be the same head. Ends with 9 when it does not verify.
    """
    from vsql_shared.audit.proofs import MAX_PROOF_SIZE

    known, before = _Keys(keys, dict(map(cosigner, cosigners))), None
    if old is not None:
        with about(old):
            before = known.open(read_text(old, MAX_PROOF_SIZE)).checkpoint
    with about(path):
        found = _verify_file(read_text(path, MAX_PROOF_SIZE), known, before)
    emit(output, found, lambda: render_pairs(_shown(found)))


def _shown(found: dict[str, Any]) -> dict[str, object]:
    """What was verified, for people: without the entry, which is long."""
    cosigned = (f"{one['node']} at {datetime.fromtimestamp(one['at'], UTC)}" for one in found["cosigned"])
    shown = {name: one for name, one in found.items() if name != "entry"}
    return {**shown, "keys": ", ".join(found["keys"]), "cosigned": ", ".join(cosigned)}


def cosigner(value: str) -> tuple[str, Path]:
    """A value of --cosigner."""
    node, mark, path = value.partition("=")
    if not mark or not node:
        raise UserError(f"--cosigner {value!r}", hint="write NODE=FILE, for example node-b=node-b.pub")
    return node, Path(path)


class _Keys:
    """The keys an auditor was given: of the chain's writer, whichever node that is, and of cosigners."""

    def __init__(self, keys: tuple[Path, ...], cosigners: dict[str, Path]) -> None:
        from vsql_shared.crypto.signing import load_public_key

        self._writers = [load_public_key(path) for path in keys]
        self.cosigners = {node: load_public_key(path) for node, path in cosigners.items()}

    def known(self, encoded: str) -> list[tuple[str, bytes]]:
        """(node, key) for a checkpoint; that the writer is who it says is what its signature proves."""
        return [*((_writer(encoded), key) for key in self._writers), *self.cosigners.items()]

    def open(self, encoded: str) -> Opened:
        """Verify a checkpoint."""
        from vsql_shared.audit.checkpoint import open_checkpoint

        return open_checkpoint(encoded, self.known(encoded))

    def trust(self, encoded: str) -> TrustStore:
        """The writer's keys, for its entries."""
        from vsql_shared.crypto.signing import PinnedKey, TrustStore, fingerprint

        node = _writer(encoded)
        return TrustStore(PinnedKey(node, key, fingerprint(key), revoked=False) for key in self._writers)


def _verify_file(encoded: str, keys: _Keys, before: Checkpoint | None) -> dict[str, Any]:
    from vsql_shared.audit.export_format import readable
    from vsql_shared.audit.proofs import CONSISTENCY_MARK, INCLUSION_MARK, ConsistencyProof, InclusionProof

    if encoded.startswith(INCLUSION_MARK):
        proof = InclusionProof.decode(encoded)
        text = proof.checkpoint
        entry, opened = proof.verify(keys.trust(text), keys.known(text))
        shown = {"sequence": entry.entry.sequence, "event_type": entry.entry.event_type}
        return _found(opened, keys, before) | shown | {"entry": readable(entry.entry)}
    if encoded.startswith(CONSISTENCY_MARK):
        if before is None:
            raise UserError("a proof of a prefix needs the earlier checkpoint", hint="give it with --old")
        later = ConsistencyProof.decode(encoded)
        return _found(later.verify(before, keys.known(later.checkpoint)), keys) | {"prefix": before.size}
    return _found(keys.open(encoded), keys, before)


def _same(before: Checkpoint, head: Checkpoint) -> dict[str, Any]:
    """Two checkpoints of one size, without a proof between them."""
    from vsql_shared.audit.proofs import require_prefix

    if (before.log, before.size) != (head.log, head.size):
        raise UserError(
            "the two checkpoints differ in size or chain",
            hint="have a proof made with `syncctl audit prove-prefix OLD NEW`",
        )
    require_prefix(before, head, ())
    return {"prefix": before.size}


def _writer(encoded: str) -> str:
    """The node a checkpoint says its chain is written by; believed once its signature has verified."""
    from vsql_shared.audit.checkpoint import Checkpoint
    from vsql_shared.audit.notes import SignedNote

    return Checkpoint.parse(SignedNote.decode(encoded).text).log.writer


def _found(opened: Opened, keys: _Keys, before: Checkpoint | None = None) -> dict[str, Any]:
    """What was verified. Raises SignatureError where one who must have signed has not.

    `before`: a checkpoint the one of the file must be the same as, if there is no proof between both.
    """
    from vsql_shared.audit.checkpoint import cosigner_key
    from vsql_shared.crypto.signing import fingerprint

    head = opened.checkpoint
    opened.require_writer()
    writers = [one.key for one in opened.signatures if one.at is None]
    signed = {one.key.name: one.at for one in opened.signatures if one.at is not None}
    cosigned = []
    for node, key in keys.cosigners.items():
        at = signed.get(cosigner_key(head.log.cluster, node, key).name)
        if at is None:
            raise SignatureError(
                f"the checkpoint is not cosigned by node {node} with that key",
                hint="`syncctl audit checkpoint --add FILE` on that node adds its signature",
            )
        cosigned.append({"node": node, "at": at})
    return {
        "cluster": head.log.cluster,
        "chain": head.log.chain,
        "size": head.size,
        "root": head.root.hex(),
        "signed_by": head.log.writer,
        "keys": [fingerprint(one.public_key) for one in writers],
        "cosigned": cosigned,
    } | ({} if before is None else _same(before, head))


@click.command(
    "verifier-key",
    epilog=example("syncctl audit verifier-key payments.node-a --key node-a.pub --cluster shop"),
)
@click.argument("chain")
@click.option("--key", "path", type=_FILE, required=True, metavar="FILE", help="A public key.")
@click.option("--cluster", required=True, help="The cluster's name.")
@click.option("--cosigner", metavar="NODE", help="The key is this node's, which cosigns.")
def verifier_key(chain: str, path: Path, cluster: str, cosigner: str | None) -> None:
    """Print a public key as other tools take it for checkpoints of CHAIN (a C2SP vkey)."""
    from vsql_shared.audit.checkpoint import cosigner_key
    from vsql_shared.audit.notes import is_key_name
    from vsql_shared.crypto.signing import load_public_key

    log, key = log_named(cluster, chain), load_public_key(path)
    made = log.key(key) if cosigner is None else cosigner_key(cluster, cosigner, key)
    if not is_key_name(made.name):
        raise UserError(
            f"{made.name!r} is no name of a key", hint="cluster, chain and node have no spaces and no plus"
        )
    click.echo(made.vkey)
