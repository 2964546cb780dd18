"""`syncctl audit checkpoint`, `prove`, `prove-prefix`: a chain as a log.

Not here: the group itself (audit.py), what needs no database (audit_offline.py). Formats and the words of the
design: docs/formats.md, docs/design/0016.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vsql_ctl.commands.audit_offline import verifier_key, verify_proof
from vsql_ctl.context import Operator, example, pass_operator
from vsql_ctl.files import complete_file
from vsql_ctl.trail import about, log_named, node_database, read_text, trusted_keys
from vsql_shared.errors import ConfigError, RefusedError, UserError

if TYPE_CHECKING:
    from vsql_shared.audit.checkpoint import Checkpoint, Opened
    from vsql_shared.audit.notes import SignedNote
    from vsql_shared.config import Settings
    from vsql_shared.crypto.signing import Signer
    from vsql_shared.pg.connect import Connection

_FILE = click.Path(path_type=Path, dir_okay=False)
_target = click.option(
    "--output", "target", type=_FILE, metavar="FILE", help="File to write; standard output when left out."
)


def _give(text: str, target: Path | None) -> None:
    """Write a note or a proof, whole or not at all."""
    if target is None:
        click.echo(text, nl=False)
        return
    with complete_file(target) as file:
        file.write(text)
    click.echo(f"written to {target}", err=True)


@click.command(
    "checkpoint",
    epilog=example(
        "syncctl audit checkpoint --chain payments.node-a --output node-a.checkpoint",
        "syncctl audit checkpoint --add node-b.checkpoint --output both.checkpoint",
    ),
)
@click.option("--chain", help="The chain, e.g. payments.node-a; not with --add, whose file names it.")
@click.option("--size", type=click.IntRange(min=1), help="Of the first so many entries; all when left out.")
@click.option("--add", "added", type=_FILE, metavar="FILE", help="Add this node's signature to a checkpoint.")
@_target
@pass_operator
def checkpoint(
    operator: Operator, chain: str | None, size: int | None, added: Path | None, target: Path | None
) -> None:
    """Sign the tree head of a chain: this node's own, or as far as it has verified a peer's.

    A C2SP checkpoint with a signature (own chain) or a cosignature (a peer's). With --add, the checkpoint
    of FILE must be what this node has itself; otherwise the chain shows two histories, which is said.
    Takes the node's signing key; every entry of an own chain is checked first.
    """
    from vsql_shared.audit.notes import SignedNote

    if (chain is None) == (added is None):
        raise UserError("give either --chain or --add", hint="--add FILE says itself which chain it is of")
    with node_database(operator.settings) as conn:
        signer = signing_key(conn, operator.settings)
        if added is not None:
            opened = _open(conn, added)
            if size not in (None, opened.checkpoint.size):
                raise UserError(f"--size {size}, the checkpoint is of {opened.checkpoint.size} entries")
            head, note = _held(conn, operator.settings, opened, signer), opened.note
        else:
            head = _head(conn, operator.settings, chain or "", size, signer)
            note = SignedNote(head.text, ())
    _give(_signed(head, signer, note), target)


def _signed(head: Checkpoint, signer: Signer, note: SignedNote) -> str:
    return head.signed_by(signer, int(time.time()), note).encode()


def signing_key(conn: Connection, settings: Settings) -> Signer:
    """This node's key; it must be the one its database has for this node."""
    from vsql_shared.kms import open_signer
    from vsql_shared.pg import nodes, signers

    signer, node = open_signer(settings), nodes.local(conn).name
    if signer is None:
        raise ConfigError(
            "audit.signing_key_path is not set, nor signing_key_label: nothing can be signed here",
            hint="run it where this node's services run, with their configuration",
        )
    pinned = [key for key in signers.load(conn, node) if key.public_key == signer.public_key]
    if signer.node != node or not pinned or pinned[0].revoked or pinned[0].retired_at is not None:
        raise ConfigError(
            f"the configured key is {signer.fingerprint} of node {signer.node}, which is not the key of node"
            f" {node}",
            hint="`syncctl key show-public` here, `syncctl node init` there: compare the fingerprints",
        )
    return signer


def _head(conn: Connection, settings: Settings, chain: str, size: int | None, signer: Signer) -> Checkpoint:
    from vsql_shared.audit import heads

    log = log_named(settings.cluster.name, chain)
    if log.writer == signer.node:
        return heads.own_checkpoint(conn, trusted_keys(conn, settings), log, size)
    head = heads.remembered_checkpoint(conn, log)
    if size not in (None, head.size):
        raise RefusedError(
            f"this node remembers chain {chain} at {head.size} entries, not at {size}",
            hint="only its writer can sign earlier heads; leave --size out",
        )
    return head


def _held(conn: Connection, settings: Settings, opened: Opened, signer: Signer) -> Checkpoint:
    """A checkpoint held against what this node has itself. Raises ChainError ("split view")."""
    from vsql_shared.audit import heads
    from vsql_shared.audit.checkpoint import split_view

    claimed = opened.checkpoint
    if claimed.log.cluster != settings.cluster.name:
        raise RefusedError(f"the checkpoint is of cluster {claimed.log.cluster}", hint="check the file")
    if claimed.log.writer == signer.node:
        return heads.require_own(conn, trusted_keys(conn, settings), claimed)
    mine = heads.remembered_checkpoint(conn, claimed.log)
    if mine.size != claimed.size:
        raise RefusedError(
            f"this node has verified {mine.size} entries of chain {claimed.log.chain}, "
            f"the checkpoint is of {claimed.size}",
            hint=f"make one here (--chain {claimed.log.chain}); node {claimed.log.writer} adds to any size",
        )
    if mine.root != claimed.root:
        raise split_view(claimed, f"this node has verified one with root {mine.root.hex()}")
    return mine


def _open(conn: Connection, path: Path) -> Opened:
    """A checkpoint signed by nodes whose keys are pinned here, and are not revoked."""
    from vsql_shared.audit.checkpoint import open_checkpoint
    from vsql_shared.audit.proofs import MAX_PROOF_SIZE
    from vsql_shared.pg import signers

    # A retired key may have signed an earlier checkpoint; what the note says is held against this node's own.
    pinned = [one for one in signers.load(conn) if not one.revoked]
    with about(path):
        return open_checkpoint(
            read_text(path, MAX_PROOF_SIZE), [(one.node, one.public_key) for one in pinned]
        )


@click.command(
    "prove",
    epilog=example(
        "syncctl audit prove payments.node-a/1042 --output entry.tlog-proof",
        "syncctl audit prove 5b7e6d1e-… --checkpoint both.checkpoint --output entry.tlog-proof",
    ),
)
@click.argument("entry")
@click.option(
    "--checkpoint", "path", type=_FILE, metavar="FILE", help="Prove it in this one; else a new one."
)
@_target
@pass_operator
def prove(operator: Operator, entry: str, path: Path | None, target: Path | None) -> None:
    """Prove that ENTRY (CHAIN/SEQUENCE, or an event_id) is in this node's trail.

    The proof (C2SP tlog-proof) holds the signed entry, some thirty hashes, and a checkpoint; it verifies
    off-line, with the public key alone.
    """
    from vsql_shared.audit import heads

    with node_database(operator.settings) as conn:
        chain, sequence = heads.place_of(conn, entry)
        head, note = _later(conn, operator.settings, chain, path)
        _give(heads.prove_entry(conn, sequence, head, note).encode(), target)


def _later(conn: Connection, settings: Settings, chain: str, path: Path | None) -> tuple[Checkpoint, str]:
    """The checkpoint a proof leads to, and its signed form: of a file, or made now."""
    from vsql_shared.audit import heads
    from vsql_shared.audit.notes import SignedNote

    if path is None:
        signer = signing_key(conn, settings)
        head = _head(conn, settings, chain, None, signer)
        return head, _signed(head, signer, SignedNote(head.text, ()))
    opened = _open(conn, path)
    with about(path):
        opened.require_writer()
    if opened.checkpoint.log.chain != chain:
        raise RefusedError(f"{path} is of chain {opened.checkpoint.log.chain}, not of {chain}")
    heads.require_own(conn, trusted_keys(conn, settings), opened.checkpoint)
    return opened.checkpoint, opened.note.encode()


@click.command(
    "prove-prefix",
    epilog=example("syncctl audit prove-prefix january.checkpoint february.checkpoint --output year.proof"),
)
@click.argument("old", type=_FILE)
@click.argument("new", type=_FILE, required=False)
@_target
@pass_operator
def prove_prefix(operator: Operator, old: Path, new: Path | None, target: Path | None) -> None:
    """Prove that the history of checkpoint OLD is a prefix of that of NEW, or of all this node has now.

    The proof is what C2SP witnesses take (add-checkpoint). Nothing was rewritten in between.
    """
    from vsql_shared.audit import heads

    with node_database(operator.settings) as conn:
        before = _open(conn, old).checkpoint
        heads.require_own(conn, trusted_keys(conn, operator.settings), before)
        head, note = _later(conn, operator.settings, before.log.chain, new)
        _give(heads.prove_prefix(conn, before, head, note).encode(), target)


COMMANDS = (checkpoint, prove, prove_prefix, verify_proof, verifier_key)
