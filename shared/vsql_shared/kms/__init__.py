"""Key-encryption-key providers, one file each; they wrap and unwrap data keys.

The registry is the dict PROVIDERS below: one entry per provider this version has. A provider's client
library is imported when the provider is opened, so that `syncctl --help` loads none; a missing one is an
error that names the extra to install.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vsql_shared.errors import ConfigError, KeyUnavailableError, NotBuiltError
from vsql_shared.kms.base import KekProvider

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic import SecretStr

    from vsql_shared.config.encryption import KmsSettings


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


def generate_token_kek(settings: KmsSettings) -> str:
    """Make a KEK, or its next version, in the token of [encryption.kms.pkcs11]; returns its kek_id."""
    with _needs("pkcs11", extra="pkcs11"):
        from vsql_shared.kms.pkcs11 import generate_kek

    return f"{settings.kek_id}/{generate_kek(*_token(settings))}"


@contextmanager
def _needs(library: str, *, extra: str) -> Iterator[None]:
    """A missing client library as an error that names the extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise KeyUnavailableError(
            f"this KMS provider needs the library {library!r}, which is not installed",
            hint=f"pip install 'vsql-sync[{extra}]'",
        ) from error


def _token(settings: KmsSettings) -> tuple[Path, str, str, SecretStr | None]:
    """Where the KEK is: module, token, key label and PIN."""
    token = settings.pkcs11
    if token.module is None or token.token_label is None or token.key_label is None:
        raise ConfigError(
            "[encryption.kms.pkcs11] does not say where the KEK is",
            hint="set module, token_label, key_label and a PIN source",
        )
    return token.module, token.token_label, token.key_label, token.read_pin()


PROVIDERS: dict[str, Callable[[KmsSettings, bool], KekProvider]] = {
    "file": _file,
    "pkcs11": _pkcs11,
}
PLANNED = frozenset({"azure-kv", "aws-kms", "gcp-kms", "vault"})  # names the configuration knows already


def open_provider(settings: KmsSettings, *, strict: bool = True) -> KekProvider:
    """The provider of [encryption.kms]; the caller closes it.

    `strict` refuses key files others may read. Raises KeyUnavailableError, ConfigError, NotBuiltError.
    """
    name: str = settings.provider
    if name in PLANNED:
        raise NotBuiltError(
            f"encryption.kms.provider = {name!r} is not built in this version",
            hint=f"use one of {', '.join(sorted(PROVIDERS))}",
        )
    return PROVIDERS[name](settings, strict)
