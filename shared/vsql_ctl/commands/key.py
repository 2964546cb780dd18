"""`syncctl key`: make signing keys and KEKs, and show the public half; the group of all commands about keys.

Not here: how keys are made and used (vsql_shared.crypto, vsql_shared.kms), and the group's other commands
(key_inventory.py, key_rotate.py, key_signers.py, key_shred.py, key_proof.py). Rules: no command prints a
secret; none overwrites a key.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vsql_ctl.commands import key_inventory, key_proof, key_rotate, key_shred, key_signers
from vsql_ctl.context import Operator, OutputFormat, example, output_option, pass_operator
from vsql_ctl.output import emit, render_pairs
from vsql_shared.errors import ConfigError, KeyUnavailableError, UserError

if TYPE_CHECKING:
    from vsql_shared.config import Settings
    from vsql_shared.config.encryption import KmsSettings


@click.group("key", epilog=example("syncctl key generate --output /etc/vsql-sync/", "syncctl key inventory"))
def key() -> None:
    """Make, show, rotate and destroy keys."""


for _command in (
    key_inventory.inventory,
    *key_rotate.COMMANDS,
    *key_signers.COMMANDS,
    *key_shred.COMMANDS,
    *key_proof.COMMANDS,
):
    key.add_command(_command)


@key.command(
    "generate",
    epilog=example(
        "syncctl key generate --output /etc/vsql-sync/",
        "syncctl key generate --kek ./dev.kek",
        "syncctl key generate --kek-pkcs11",
        "syncctl key generate --signing-pkcs11",
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
@click.option(
    "--signing-pkcs11", is_flag=True, help="Make the signing key audit.signing_key_label in the token."
)
@pass_operator
def generate(
    operator: Operator,
    directory: Path | None,
    kek_file: Path | None,
    kek_id: str | None,
    rotate: bool,
    kek_pkcs11: bool,
    signing_pkcs11: bool,
) -> None:
    """Make keys. Nothing that exists is overwritten.

    A signing key belongs to one node. A KEK is shared: copy the file, or the key in the token, to every node
    that opens what this one seals.
    """
    if (rotate or kek_id) and kek_file is None:
        raise UserError("--rotate and --kek-id belong to --kek FILE", hint="name the file too")
    if directory is None and kek_file is None and not kek_pkcs11 and not signing_pkcs11:
        hint = "give --output DIR, --kek FILE, --kek-pkcs11 or --signing-pkcs11"
        raise UserError("nothing to make", hint=hint)
    made: dict[str, object] = {}
    if directory is not None:
        made |= _make_signing_key(directory)
    if kek_file is not None:
        made |= _make_kek_file(operator, kek_file, kek_id, rotate=rotate)
    if kek_pkcs11:
        made |= _make_kek_in_token(operator.settings.encryption.kms)
    if signing_pkcs11:
        made |= _make_signing_key_in_token(operator.settings)
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


def _make_signing_key_in_token(settings: Settings) -> dict[str, object]:
    from vsql_shared.crypto.signing import fingerprint
    from vsql_shared.kms import generate_token_signer

    label = settings.audit.signing_key_label
    if label is None:
        raise ConfigError("audit.signing_key_label is not set", hint="it names the key in the token")
    if settings.audit.signing_key_provider != "pkcs11":
        raise ConfigError(
            'audit.signing_key_provider is "vault": a node has no right to make keys there',
            hint="who administers Vault makes it: vault write transit/keys/NAME type=ed25519",
        )
    public = generate_token_signer(settings.encryption.kms, label)
    return {"signing key": f"{label!r} in the token", "fingerprint": fingerprint(public)}


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
    from vsql_shared.crypto.signing import fingerprint, public_pem

    where: Path | str | None = path or operator.settings.audit.signing_key_path
    if path is None and operator.settings.audit.signing_key_label is not None:
        raw = _public_of_label(operator.settings)
        in_token = operator.settings.audit.signing_key_provider == "pkcs11"
        where = "in the token" if in_token else f"in Vault: {operator.settings.audit.signing_key_label}"
    elif where is None:
        raise ConfigError("audit.signing_key_path is not set", hint="set it, or give --key FILE")
    else:
        raw = _public_half(Path(where))
    pem = public_pem(raw)
    found = {"file": where, "algorithm": "Ed25519", "fingerprint": fingerprint(raw), "public_key": pem}
    emit(
        output,
        found,
        lambda: (
            render_pairs({"file": where, "algorithm": "Ed25519", "fingerprint": found["fingerprint"]})
            + f"\n{pem.rstrip()}"
        ),
    )


def _public_of_label(settings: Settings) -> bytes:
    from vsql_shared.kms import open_signer

    signer = open_signer(settings)
    return b"" if signer is None else signer.public_key


def _public_half(path: Path) -> bytes:
    """Raw key of a private or public key file; the private half goes nowhere."""
    from vsql_shared.crypto.signing import load_public_key, load_signer

    try:
        return load_public_key(path)
    except KeyUnavailableError:
        return load_signer(path, "", strict=False).public_key
