"""`syncctl key`: make signing keys and KEKs, show the public half, list every key, rotate data keys.

Not here: how keys are made and used (vsql_shared.crypto, vsql_shared.kms). Rules: no command prints a secret;
none overwrites a key; `rotate-dek` only asks, the producer of each stream makes its own new key.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
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
from vsql_ctl.output import emit, human_bytes, render_pairs, render_table
from vsql_shared.errors import ConfigError, KeyUnavailableError, RefusedError, TransientError, UserError

if TYPE_CHECKING:
    from vsql_shared.config.encryption import KmsSettings
    from vsql_shared.kms.base import KekVersion
    from vsql_shared.pg.connect import Connection

_DEK_COLUMNS = (
    "dek_id", "chain", "epoch", "kms_provider", "kek_id", "algorithm", "state", "tuples", "bytes",
    "created_at", "retired_at",
)  # fmt: skip
_SIGNER_COLUMNS = ("fingerprint", "node_name", "pinned_at", "pinned_by", "retired_at", "revoked_at")
# Bits of security (NIST SP 800-57 part 1): what `inventory` says of keys that no provider describes.
_DEK_BITS, _SIGNING_BITS = 256, 128


@click.group("key", epilog=example("syncctl key generate --output /etc/vsql-sync/", "syncctl key inventory"))
def key() -> None:
    """Make, show and rotate keys."""


@key.command(
    "generate",
    epilog=example(
        "syncctl key generate --output /etc/vsql-sync/",
        "syncctl key generate --kek ./dev.kek",
        "syncctl key generate --kek-pkcs11",
    ),
)
@click.option(
    "--output",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write a new Ed25519 signing key pair here; made if it is not there.",
)
@click.option(
    "--kek",
    "kek_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help='Make a KEK file for provider "file" (development only).',
)
@click.option(
    "--kek-id", metavar="NAME", help="Name of the KEK in the file; else the configured encryption.kms.kek_id."
)
@click.option("--rotate", is_flag=True, help="Add a new version to an existing --kek FILE.")
@click.option("--kek-pkcs11", is_flag=True, help="Make a KEK, or its next version, in the configured token.")
@pass_operator
def generate(
    operator: Operator,
    directory: Path | None,
    kek_file: Path | None,
    kek_id: str | None,
    rotate: bool,
    kek_pkcs11: bool,
) -> None:
    """Make keys. Nothing that exists is overwritten.

    A signing key belongs to one node. A KEK is shared: copy the file, or the key in the token, to every node
    that opens what this one seals.
    """
    if (rotate or kek_id) and kek_file is None:
        raise UserError("--rotate and --kek-id belong to --kek FILE", hint="name the file too")
    if directory is None and kek_file is None and not kek_pkcs11:
        raise UserError("nothing to make", hint="give --output DIR, --kek FILE or --kek-pkcs11")
    made: dict[str, object] = {}
    if directory is not None:
        made |= _make_signing_key(directory)
    if kek_file is not None:
        made |= _make_kek_file(operator, kek_file, kek_id, rotate=rotate)
    if kek_pkcs11:
        made |= _make_kek_in_token(operator.settings.encryption.kms)
    click.echo(render_pairs(made))


def _make_signing_key(directory: Path) -> dict[str, object]:
    from vsql_shared.crypto.signing import fingerprint, generate_signing_key, load_public_key

    with contextlib.suppress(OSError):  # if it cannot be made, writing into it says why
        directory.mkdir(mode=0o700, exist_ok=True)
    private, public = generate_signing_key(directory)
    return {
        "signing key": private,
        "public key": public,
        "fingerprint": fingerprint(load_public_key(public)),
    }


def _make_kek_file(operator: Operator, path: Path, kek_id: str | None, *, rotate: bool) -> dict[str, object]:
    from vsql_shared.kms.file import generate_kek_file, rotate_kek_file

    if rotate and kek_id:
        raise UserError("--rotate keeps the name that stands in the file", hint="leave --kek-id out")
    made = (
        rotate_kek_file(path) if rotate else generate_kek_file(path, kek_id or _configured_kek_id(operator))
    )
    return {"KEK": made, "KEK file": path}


def _configured_kek_id(operator: Operator) -> str:
    """The name the configuration expects; keys are often made before there is a configuration."""
    from vsql_shared.kms.file import DEFAULT_KEK_ID

    try:
        return operator.settings.encryption.kms.kek_id
    except ConfigError:
        if operator.config_path is not None:
            raise
        return DEFAULT_KEK_ID


def _make_kek_in_token(kms: KmsSettings) -> dict[str, object]:
    from vsql_shared.kms import generate_token_kek

    return {"KEK": generate_token_kek(kms), "token": kms.pkcs11.token_label}


@key.command(
    "show-public", epilog=example("syncctl key show-public", "syncctl key show-public --key node-b.pub")
)
@click.option(
    "--key",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="A key file, private or public; else audit.signing_key_path.",
)
@output_option
@pass_operator
def show_public(operator: Operator, path: Path | None, output: OutputFormat) -> None:
    """Show the public signing key and its fingerprint, to compare by another channel."""
    if path is None:
        path = operator.settings.audit.signing_key_path
    if path is None:
        raise ConfigError("audit.signing_key_path is not set", hint="set it, or give --key FILE")
    raw, pem = _public_half(path)
    from vsql_shared.crypto.signing import fingerprint

    found = {"file": path, "algorithm": "Ed25519", "fingerprint": fingerprint(raw), "public_key": pem}
    emit(
        output,
        found,
        lambda: (
            render_pairs({"file": path, "algorithm": "Ed25519", "fingerprint": found["fingerprint"]})
            + f"\n{pem.rstrip()}"
        ),
    )


def _public_half(path: Path) -> tuple[bytes, str]:
    """Raw key and PEM of a private or public key file; the private half goes nowhere."""
    from vsql_shared.crypto.signing import load_public_key, load_signer, public_pem

    try:
        raw = load_public_key(path)
    except KeyUnavailableError:
        raw = load_signer(path, "", strict=False).public_key
    return raw, public_pem(raw)


@key.command(
    "inventory", epilog=example("syncctl key inventory", "syncctl key inventory --output json --limit 0")
)
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    default=50,
    show_default=True,
    help="Newest data keys shown; 0 for all.",
)
@output_option
@pass_operator
def inventory(operator: Operator, output: OutputFormat, limit: int) -> None:
    """List data keys, KEK versions and signing keys, with their strength, age and use."""
    from vsql_shared.kms.base import weakness
    from vsql_shared.pg.connect import connect
    from vsql_shared.pg.migrate import require_current

    settings = operator.settings
    with connect(settings.connection.conninfo(), application_name="vsql_sync_ctl") as conn:
        require_current(conn)
        deks, total = _deks(conn, limit), _count_deks(conn)
        signers = _rows(conn, _SIGNER_COLUMNS, "signers ORDER BY node_name, pinned_at")
        used = {(str(p), str(k)) for p, k in _used_keks(conn)}
    versions, problem = _kek_versions(settings.encryption.kms, strict=settings.server.mode == "prod")
    found = {
        "deks": [dek | {"strength_bits": _DEK_BITS} for dek in deks],
        "deks_total": total,
        "keks": _merge_keks(settings.encryption.kms.provider, versions, used),
        "kek_problem": problem,
        "kek_warnings": [text for text in map(weakness, versions) if text],
        "signing_keys": [row | {"algorithm": "Ed25519", "strength_bits": _SIGNING_BITS} for row in signers],
    }
    emit(output, found, lambda: _inventory_text(found))


def _rows(conn: Connection, columns: Sequence[str], rest: str, *values: object) -> list[dict[str, Any]]:
    """Rows of a table of ours as dicts; `columns` and `rest` are constants of this module."""
    from psycopg import sql

    from vsql_shared.pg.connect import errors

    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    query = sql.SQL("SELECT {} FROM vsql_sync.").format(names).as_string(conn) + rest
    with errors("reading the keys"):
        return [dict(zip(columns, row, strict=True)) for row in conn.execute(query.encode(), values or None)]


def _deks(conn: Connection, limit: int) -> list[dict[str, Any]]:
    rest = "deks ORDER BY state = 'retired', created_at DESC, dek_id"
    return _rows(conn, _DEK_COLUMNS, f"{rest} LIMIT %s", limit) if limit else _rows(conn, _DEK_COLUMNS, rest)


def _count_deks(conn: Connection) -> int:
    row = conn.execute("SELECT count(*) FROM vsql_sync.deks").fetchone()
    return int(row[0]) if row else 0


def _used_keks(conn: Connection) -> list[tuple[Any, ...]]:
    return conn.execute("SELECT DISTINCT kms_provider, kek_id FROM vsql_sync.deks").fetchall()


def _kek_versions(kms: KmsSettings, *, strict: bool) -> tuple[list[KekVersion], str]:
    """What the KMS holds, or why it does not say: an inventory without it is still worth something."""
    from vsql_shared.errors import VsqlSyncError
    from vsql_shared.kms import open_provider

    try:
        provider = open_provider(kms, strict=strict)
        try:
            return provider.versions(), ""
        finally:
            provider.close()
    except VsqlSyncError as error:
        return [], str(error)


def _merge_keks(
    provider: str, versions: list[KekVersion], used: set[tuple[str, str]]
) -> list[dict[str, object]]:
    """The KMS's versions, and those that wrapped a listed key and are not there (destroyed, or elsewhere)."""
    rows: list[dict[str, object]] = [
        {
            "kms_provider": provider,
            "kek_id": version.kek_id,
            "strength_bits": version.strength_bits,
            "state": "wraps" if version.active else "unwraps",
        }
        for version in versions
    ]
    present = {(provider, version.kek_id) for version in versions}
    missing: list[dict[str, object]] = [
        {"kms_provider": name, "kek_id": kek_id, "strength_bits": None, "state": "not found"}
        for name, kek_id in sorted(used - present)
    ]
    return rows + missing


def _inventory_text(found: dict[str, Any]) -> str:
    deks, total = found["deks"], found["deks_total"]
    shown = [
        (d["dek_id"], d["chain"], d["epoch"], d["state"], d["tuples"], human_bytes(d["bytes"]), d["kek_id"],
         d["created_at"], d["retired_at"])
        for d in deks
    ]  # fmt: skip
    keks = [(k["kms_provider"], k["kek_id"], k["strength_bits"], k["state"]) for k in found["keks"]]
    signers = [
        (
            s["node_name"],
            s["fingerprint"],
            s["strength_bits"],
            s["pinned_at"],
            s["pinned_by"],
            s["retired_at"],
            s["revoked_at"],
        )
        for s in found["signing_keys"]
    ]
    parts = [
        f"Data keys ({len(deks)} of {total}), AES-256-GCM, {_DEK_BITS} bits",
        render_table(
            ("dek", "stream", "epoch", "state", "tuples", "size", "kek", "created", "retired"), shown
        ),
        "\nKey-encryption keys",
        render_table(("provider", "kek", "bits", "state"), keks),
        "\nSigning keys, Ed25519",
        render_table(("node", "fingerprint", "bits", "pinned", "by", "retired", "revoked"), signers),
    ]
    parts[4:4] = [f"warning: {text}" for text in found["kek_warnings"]]
    if found["kek_problem"]:
        parts.insert(4, f"the KMS does not answer: {found['kek_problem']}")
    return "\n".join(parts)


@key.command(
    "rotate-dek", epilog=example("syncctl key rotate-dek", "syncctl key rotate-dek --stream orders.node-a")
)
@click.option("--stream", "chain", metavar="STREAM", help="One stream; else every stream this node writes.")
@click.option("--reason", default="", metavar="TEXT", help="Why; it stands in the command's row.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Seconds to wait for answers.",
)
@output_option
@pass_operator
def rotate_dek(
    operator: Operator, output: OutputFormat, chain: str | None, reason: str, timeout: float
) -> None:
    """Have this node's producer seal with a new data key from the next batch on."""
    from vsql_shared.pg import commands, oplog
    from vsql_shared.pg.connect import connect, errors
    from vsql_shared.pg.migrate import require_current

    with connect(operator.settings.connection.conninfo(), application_name="vsql_sync_ctl") as conn:
        require_current(conn)
        streams = _outgoing(conn, chain)
        with errors("asking for a new data key"), conn.transaction():
            line = oplog.record(conn, "key.rotate-dek", "stream", chain or "*", new={"reason": reason})
            args = {"audit_log": line}
            asked = commands.request(conn, "producer", "rotate-dek", args, reason, chain)
        answers = commands.wait(conn, asked, len(streams), timeout)
    rows = [{"stream": a.chain, "done": a.ok, "message": a.message} for a in answers]
    if rows:
        emit(
            output,
            rows,
            lambda: render_table(("stream", "done", "message"), [tuple(r.values()) for r in rows]),
        )
    silent = sorted(streams - {a.chain for a in answers})
    if silent:
        raise TransientError(
            f"no answer within {timeout:g} s from {', '.join(silent)}",
            hint="see `syncctl status`; the producer does it when it runs again",
        )
    if not all(a.ok for a in answers):
        raise RefusedError("not every stream rotated its key", hint="the table says why")


def _outgoing(conn: Connection, chain: str | None) -> set[str]:
    """The running streams this node writes, or the one that was named."""
    rows = conn.execute(
        "SELECT chain, desired FROM vsql_sync.streams"
        " WHERE direction = 'out' AND state <> 'FINISHED' ORDER BY chain"
    ).fetchall()
    desired = {str(name): str(wanted) for name, wanted in rows}
    if chain is not None and chain not in desired:
        known = ", ".join(desired) or "none"
        raise RefusedError(f"this node writes no stream {chain!r}", hint=f"its streams: {known}")
    running = {name for name, wanted in desired.items() if wanted != "stopped" and chain in (None, name)}
    if not running:
        raise RefusedError(
            "none of this node's streams is started" if chain is None else f"stream {chain} is stopped",
            hint="a stream makes a new data key whenever it starts: `syncctl start`",
        )
    return running


_FINGERPRINT = click.option(
    "--fingerprint", required=True, metavar="SHA256:…", help="The key, as `syncctl key inventory` shows it."
)
_REASON = click.option("--reason", required=True, metavar="TEXT", help="Why; kept in the audit log.")


@key.command("retire", epilog=example('syncctl key retire --fingerprint SHA256:… --reason "yearly change"'))
@_FINGERPRINT
@_REASON
@yes_option
@pass_operator
def retire(operator: Operator, fingerprint: str, reason: str, yes: bool) -> None:
    """End a signing key that a node hands over: what it signed until now stays valid here.

    Stop that node's services before, so that nothing is signed with it any more; then pin the new key.
    """
    from vsql_ctl.session import open_node
    from vsql_shared.pg import signers

    confirm(f"Retire signing key {fingerprint} on this node?", yes=yes)
    with open_node(operator) as conn:
        node = signers.retire(conn, fingerprint, reason)
    click.echo(f"key {fingerprint} of node {node} is retired")


@key.command("revoke", epilog=example('syncctl key revoke --fingerprint SHA256:… --reason "laptop stolen"'))
@_FINGERPRINT
@_REASON
@yes_option
@pass_operator
def revoke(operator: Operator, fingerprint: str, reason: str, yes: bool) -> None:
    """End a signing key that may be stolen: only entries this node knows already stay valid here."""
    from vsql_ctl.session import open_node
    from vsql_shared.pg import signers

    confirm(f"Revoke signing key {fingerprint} on this node? Its streams stop here.", yes=yes)
    with open_node(operator) as conn:
        seen = signers.revoke(conn, fingerprint, reason)
    rows = [(chain, sequence) for chain, sequence in sorted(seen.items())]
    click.echo(f"key {fingerprint} is revoked; entries that stay valid:")
    click.echo(render_table(("chain", "up to sequence"), rows))
