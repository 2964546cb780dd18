"""`syncctl compliance`: evidence for an assessor, gathered and verified. It concludes nothing."""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vsql_ctl.context import Operator, OutputFormat, example, output_option, pass_operator
from vsql_ctl.output import emit, printable, render_pairs, render_table
from vsql_shared.errors import RecordError, RefusedError, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vsql_shared.audit.evidence import Verified
    from vsql_shared.audit.evidence_documents import Cosigned
    from vsql_shared.crypto.signing import Signer
    from vsql_shared.pg.connect import Connection

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group("compliance", epilog=example("syncctl compliance evidence --out ./evidence-2026-02"))
def compliance() -> None:
    """Gather evidence for an assessor, and verify it off-line.

    What it proves of which requirement: docs/pci-dss.md. Whether a requirement is met, the entity and its
    assessor say.
    """


@compliance.command(
    "evidence",
    epilog=example(
        "syncctl compliance evidence --out ./evidence-2026-02",
        "syncctl compliance verify ./evidence-2026-02 --key node-a.pub",
    ),
)
@click.option(
    "--out",
    "target",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="A directory that is not there yet, or is empty; it appears when it is complete.",
)
@click.option("--no-trail", is_flag=True, help="Do not verify every entry (2,000 a second).")
@pass_operator
def evidence(operator: Operator, target: Path, no_trail: bool) -> None:
    """Gather signed evidence into DIR: scope reports, checkpoints, keys, TLS, retention, access, settings.

    Takes this node's signing key. What could not be gathered is listed in it, with the reason.
    """
    from vsql_ctl.evidence.bundle import new_bundle, require_free
    from vsql_ctl.evidence.gather import gather
    from vsql_ctl.trail import node_database, trusted_keys
    from vsql_shared.pg import nodes, oplog
    from vsql_shared.pg.connect import errors

    settings = operator.settings
    require_free(target)
    with node_database(settings) as conn:
        node = nodes.local(conn)
        signer = _signer(operator, conn)
        with new_bundle(target) as bundle:
            begun = datetime.now(UTC)
            with errors("noting the bundle in the operators' log"):
                oplog.record(conn, "compliance.evidence", "directory", str(target))
            gather(conn, settings, signer, trusted_keys(conn, settings), bundle, verify=not no_trail)
            bundle.seal(node.cluster, node.name, (begun, datetime.now(UTC)), _software(), signer)
    for what in bundle.found:
        click.echo(f"found: {printable(what)}", err=True)
    for what, reason in bundle.not_gathered:
        click.echo(f"not gathered: {printable(what)}: {printable(reason)}", err=True)
    lacking = f"{len(bundle.not_gathered)} thing{'' if len(bundle.not_gathered) == 1 else 's'}"
    click.echo(f"wrote {len(bundle.files) + 1} files to {target}, {lacking} not gathered", err=True)


def _signer(operator: Operator, conn: Connection) -> Signer | None:
    """This node's key; None only in dev mode."""
    from vsql_ctl.commands.audit_proofs import signing_key

    settings = operator.settings
    if settings.audit.signs:
        return signing_key(conn, settings)
    if settings.is_prod:
        raise RefusedError(
            "evidence is signed, and audit.signing_key_path is not set, nor signing_key_label", hint="set one"
        )
    click.echo("warning: no signing key is configured; the bundle proves nothing", err=True)
    return None


def _software() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"vsql-sync {version('vsql-sync')}"
    except PackageNotFoundError:
        return "vsql-sync (from a source tree)"


@compliance.command(
    "verify",
    epilog=example(
        "syncctl compliance verify ./evidence-2026-02 --key node-a.pub",
        "syncctl compliance verify ./evidence-2026-02 --key node-a.pub --cosigner node-b=node-b.pub",
    ),
)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), metavar="DIR")
@click.option(
    "--key",
    "key_file",
    type=_FILE,
    required=True,
    metavar="FILE",
    help="Public key of the node that made the bundle.",
)
@click.option(
    "--cosigner",
    "cosigners",
    multiple=True,
    metavar="NODE=FILE",
    help="A node that must have co-signed a checkpoint, and its key; twice if it has changed it.",
)
@output_option
def verify(folder: Path, key_file: Path, cosigners: tuple[str, ...], output: OutputFormat) -> None:
    """Verify a bundle off-line: no configuration, no database, only public keys.

    Every file, every signature in it, and that nothing is missing or was added. Ends with 9 when it does not
    verify.
    """
    from vsql_ctl.commands.audit_offline import cosigner
    from vsql_shared.audit import evidence as bundles
    from vsql_shared.audit.evidence_documents import Keys
    from vsql_shared.crypto.signing import load_public_key

    brought = [(node, load_public_key(path)) for node, path in map(cosigner, cosigners)]
    keys = Keys(load_public_key(key_file), brought)
    present = _present(folder)
    if bundles.MANIFEST not in present:
        raise RecordError(
            f"{folder} holds no {bundles.MANIFEST}: it is no bundle, or it was taken out",
            record=bundles.MANIFEST,
        )
    envelope = _read(folder / bundles.MANIFEST, bundles.MAX_MANIFEST)
    found = bundles.verify(
        envelope, present - {bundles.MANIFEST}, lambda path: _read(folder / path, bundles.MAX_FILE), keys
    )
    emit(output, _as_dict(found), lambda: _text(found))


def _present(folder: Path) -> set[str]:
    """Paths of all files below a directory; links and devices are no part of a bundle."""
    found = set()
    try:
        for place, folders, files in os.walk(folder, onerror=_raise):
            for name in (*folders, *files):
                path = Path(place, name)
                kind = path.lstat().st_mode
                shown = path.relative_to(folder).as_posix()
                if not (stat.S_ISDIR(kind) or stat.S_ISREG(kind)):
                    raise RecordError(f"{shown} is no ordinary file", record=shown)
                if stat.S_ISREG(kind):
                    found.add(shown)
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}", hint="check the path") from error
    return found


def _raise(error: OSError) -> None:
    raise error


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", hint="check the path") from error
    if len(raw) > limit:
        raise RecordError(f"{path} is longer than the {limit} bytes that are read", record=path.name)
    return raw


def _as_dict(found: Verified) -> dict[str, Any]:
    manifest = found.manifest
    names = (
        *("cluster", "node", "begun_at", "generated_at", "software"),
        *("files", "not_gathered", "not_claimed"),
    )
    cosigned = [one._asdict() | {"at": _time(one.at)} for one in found.cosigned]
    return {"verifies": True, "signed_by": found.signed_by, "cosigned": cosigned} | {
        name: manifest[name] for name in names
    }


def _text(found: Verified) -> str:
    manifest = found.manifest
    pairs = {
        "signatures": "verify",
        "signed by": f"the key given, {found.signed_by}",
        "calls itself": f"node {manifest['node']} of cluster {manifest['cluster']}",
        "made": f"{manifest['begun_at']} to {manifest['generated_at']}",
        "co-signed": "; ".join(_cosigned(one) for one in found.cosigned) or "no key of a co-signer given",
    }
    files = [(one["path"], one["size"], one["about"]) for one in manifest["files"]]
    parts = [render_pairs(pairs), "", render_table(("FILE", "BYTES", "WHAT"), files)]
    parts += _listed("Not gathered:", [f"{one['what']}: {one['reason']}" for one in manifest["not_gathered"]])
    parts += _listed("It does not claim:", manifest["not_claimed"])
    return "\n".join(parts)


def _cosigned(one: Cosigned) -> str:
    entries = f"{one.size} {'entry' if one.size == 1 else 'entries'}"
    return f"{one.path}, {entries}, by {one.node} at {_time(one.at)}"


def _time(at: int) -> str:
    """Unix time for people; as it is, where no calendar has it."""
    try:
        return datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")
    except (OverflowError, ValueError, OSError):
        return str(at)


def _listed(head: str, lines: Sequence[str]) -> list[str]:
    return ["", head, *(f"  - {printable(line)}" for line in lines)] if lines else []
