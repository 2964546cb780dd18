"""Key-encryption-key providers, one file each; they wrap and unwrap data keys. And where signing keys are.

The registries are the dicts PROVIDERS and SIGNERS below: one entry per provider this version has. A
provider's client library is imported when the provider is opened, so that `syncctl --help` loads none; a
missing one is an error that names the extra to install.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vsql_shared.errors import ConfigError, KeyUnavailableError
from vsql_shared.kms.base import KekProvider, Retries

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic import SecretStr

    from vsql_shared.config import Settings
    from vsql_shared.config.encryption import KmsSettings
    from vsql_shared.config.governance import SigningProvider
    from vsql_shared.crypto.signing import Signer
    from vsql_shared.kms.transit import Transit


def _file(settings: KmsSettings, strict: bool) -> KekProvider:
    from vsql_shared.kms.file import FileKek

    if settings.file.path is None:
        raise ConfigError(
            'encryption.kms.file.path is not set and provider is "file"',
            hint="name the KEK file; make one with `syncctl key generate --kek FILE`",
        )
    return FileKek(settings.file.path, settings.kek_id, strict=strict)


def _pkcs11(settings: KmsSettings, _strict: bool) -> KekProvider:
    with _needs("pkcs11", extra="pkcs11"):
        from vsql_shared.kms.pkcs11 import Pkcs11Kek

    module, token, key, pin = _token(settings)
    return Pkcs11Kek(module, token, key, pin, kek_id=settings.kek_id)


def _aws(settings: KmsSettings, _strict: bool) -> KekProvider:
    with _needs("boto3", "botocore", extra="aws"):
        from vsql_shared.kms.aws_kms import AwsKek

    aws = settings.aws
    return AwsKek(
        settings.kek_id,
        region=aws.region,
        profile=aws.profile,
        endpoint=aws.endpoint,
        retries=_retries(settings),
    )


def _azure(settings: KmsSettings, _strict: bool) -> KekProvider:
    with _needs("azure.core", "azure.identity", extra="azure"):
        from vsql_shared.kms.azure_kv import AzureKek

    return AzureKek(settings.kek_id, retries=_retries(settings))


def _gcp(settings: KmsSettings, _strict: bool) -> KekProvider:
    with _needs("google.auth", "requests", extra="gcp"):
        from vsql_shared.kms.gcp_kms import GcpKek

    return GcpKek(settings.kek_id, retries=_retries(settings))


def _vault(settings: KmsSettings, _strict: bool) -> KekProvider:
    from vsql_shared.kms.vault import VaultKek

    return VaultKek(settings.kek_id, _transit(settings, 'provider is "vault"'))


def _transit(settings: KmsSettings, why: str) -> Transit:
    from vsql_shared.kms.https import Https
    from vsql_shared.kms.transit import Login, Transit

    vault = settings.vault
    if vault.address is None:
        raise ConfigError(
            f"encryption.kms.vault.address is not set and {why}",
            hint='give the server\'s address, such as "https://vault.example:8200"',
        )
    role_id = vault.role_id if vault.auth == "approle" else None
    return Transit(
        vault.address,
        Login(vault.read_token, role_id, vault.read_secret_id, vault.auth_mount),
        Https("Vault", vault.address, _retries(settings), vault.ca_path),
        vault.namespace,
    )


def _retries(settings: KmsSettings) -> Retries:
    return Retries(settings.attempts, settings.retry_pause.total_seconds(), settings.timeout.total_seconds())


def generate_token_kek(settings: KmsSettings) -> str:
    """Make a KEK, or its next version, in the token of [encryption.kms.pkcs11]; returns its kek_id."""
    with _needs("pkcs11", extra="pkcs11"):
        from vsql_shared.kms.pkcs11 import generate_kek

    return f"{settings.kek_id}/{generate_kek(*_token(settings))}"


def open_signer(settings: Settings) -> Signer | None:
    """This node's signing key, in a file, a token or Vault; None where none is configured.

    Raises KeyUnavailableError, ConfigError, TransientError (a service that does not answer now).
    """
    audit, node = settings.audit, settings.cluster.node_name
    if audit.signing_key_label is not None:
        return SIGNERS[audit.signing_key_provider](settings.encryption.kms, audit.signing_key_label, node)
    if audit.signing_key_path is None:
        return None
    from vsql_shared.crypto.signing import load_signer

    return load_signer(audit.signing_key_path, node, strict=settings.is_prod)


def _token_signer(settings: KmsSettings, label: str, node: str) -> Signer:
    with _needs("pkcs11", extra="pkcs11"):
        from vsql_shared.kms.pkcs11_signing import TokenSigner

    return TokenSigner(*_token(settings, label), node)


def _vault_signer(settings: KmsSettings, label: str, node: str) -> Signer:
    from vsql_shared.kms.vault_signing import VaultSigner

    return VaultSigner(label, _transit(settings, 'audit.signing_key_provider is "vault"'), node)


def generate_token_signer(settings: KmsSettings, label: str) -> bytes:
    """Make a signing key in the token of [encryption.kms.pkcs11]; returns the raw public key."""
    with _needs("pkcs11", extra="pkcs11"):
        from vsql_shared.kms.pkcs11_signing import generate_signing_key

    return generate_signing_key(*_token(settings, label))


def destroy_version(settings: KmsSettings, kek_id: str) -> None:
    """Destroy one version of the KEK, at once and for good, where we can: in a token, or in a file.

    A service's versions are destroyed by who administers it: they have the right to, and nodes have not.
    Raises KeyUnavailableError.
    """
    if settings.provider == "file" and settings.file.path is not None:
        from vsql_shared.kms.file import destroy_version as in_file

        return in_file(settings.file.path, kek_id)
    if settings.provider != "pkcs11":
        raise KeyUnavailableError(
            f'versions of a KEK in "{settings.provider}" are destroyed with its own tools',
            hint="do it there, then repeat this with --elsewhere",
        )
    with _needs("pkcs11", extra="pkcs11"):
        from vsql_shared.kms.pkcs11 import destroy_version as in_token

    name, _, version = kek_id.rpartition("/")
    if name != settings.kek_id:
        raise KeyUnavailableError(f"{kek_id} is no version of {settings.kek_id}")
    return in_token(*_token(settings), version)


@contextmanager
def _needs(*libraries: str, extra: str) -> Iterator[None]:
    """A missing client library as an error that names the extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not any(f"{library}.".startswith(f"{missing}.") for library in libraries):
            raise
        raise KeyUnavailableError(
            f"this KMS provider needs the library {missing!r}, which is not installed",
            hint=f"pip install 'vsql-sync[{extra}]'",
        ) from error


def _token(settings: KmsSettings, label: str | None = None) -> tuple[Path, str, str, SecretStr | None]:
    """Where a key is: module, token, key label (the KEK's, if none is given) and PIN."""
    token, label = settings.pkcs11, label or settings.pkcs11.key_label
    if token.module is None or token.token_label is None or label is None:
        raise ConfigError(
            "[encryption.kms.pkcs11] does not say where the key is",
            hint="set module, token_label, key_label and a PIN source; for a signing key that is in Vault"
            ' set audit.signing_key_provider = "vault"',
        )
    return token.module, token.token_label, label, token.read_pin()


PROVIDERS: dict[str, Callable[[KmsSettings, bool], KekProvider]] = {
    "file": _file,
    "pkcs11": _pkcs11,
    "aws-kms": _aws,
    "azure-kv": _azure,
    "gcp-kms": _gcp,
    "vault": _vault,
}


SIGNERS: dict[SigningProvider, Callable[[KmsSettings, str, str], Signer]] = {
    "pkcs11": _token_signer,
    "vault": _vault_signer,
}


def open_provider(settings: KmsSettings, *, strict: bool = True) -> KekProvider:
    """The provider of [encryption.kms]; the caller closes it.

    `strict` refuses key files others may read. Raises KeyUnavailableError, ConfigError, TransientError.
    """
    return PROVIDERS[settings.provider](settings, strict)
