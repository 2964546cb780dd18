"""The files a configuration names: that they are there, are files, and that keys are for their owner only.

A step of its own after loading, because a configuration may be checked on another machine than the one
that has its keys. Rules: a missing file is an error; a private key others can read is an error in prod
and a warning in dev. What "others can read" is, private_files.py says.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vsql_shared.config.encryption import KmsSettings
from vsql_shared.config.schema_registry import SchemaRegistrySettings
from vsql_shared.config.settings import Settings
from vsql_shared.errors import ConfigError
from vsql_shared.private_files import open_to_others


@dataclass(frozen=True)
class NamedFile:
    """A path of the configuration; `private` when what it holds is a secret."""

    key: str
    path: Path
    private: bool


def named_files(settings: Settings) -> Iterator[NamedFile]:
    """Every file the configuration names, that must exist before a service starts."""
    candidates: list[tuple[str, Path | None, bool]] = [
        ("connection.sslrootcert", settings.connection.sslrootcert, False),
        ("connection.sslcert", settings.connection.sslcert, False),
        ("connection.sslkey", settings.connection.sslkey, True),
        ("connection.password_file", settings.connection.password_file, True),
        ("server.tls.cert_path", settings.server.tls.cert_path, False),
        ("server.tls.key_path", settings.server.tls.key_path, True),
        ("kafka.security.ca_path", settings.kafka.security.ca_path, False),
        ("kafka.security.cert_path", settings.kafka.security.cert_path, False),
        ("kafka.security.key_path", settings.kafka.security.key_path, True),
        ("kafka.security.password_file", settings.kafka.security.password_file, True),
        *_registry_files(settings.kafka.schema_registry),
        ("audit.signing_key_path", settings.audit.signing_key_path, True),
    ]
    candidates += _kms_files(settings.encryption.kms)
    return (NamedFile(key, path, private) for key, path, private in candidates if path is not None)


def _registry_files(registry: SchemaRegistrySettings) -> list[tuple[str, Path | None, bool]]:
    """Those of the schema registry; none where there is none."""
    if registry.url is None:
        return []
    section = "kafka.schema_registry"
    return [
        (f"{section}.ca_path", registry.ca_path, False),
        (f"{section}.cert_path", registry.cert_path, False),
        (f"{section}.key_path", registry.key_path, True),
        (f"{section}.password_file", registry.password_file, True),
        (f"{section}.token_file", registry.token_file, True),
    ]


def _kms_files(kms: KmsSettings) -> list[tuple[str, Path | None, bool]]:
    """Those of the chosen provider; what other sections name is not used."""
    match kms.provider:
        case "file":
            return [("encryption.kms.file.path", kms.file.path, True)]
        case "pkcs11":
            return [
                ("encryption.kms.pkcs11.module", kms.pkcs11.module, False),
                ("encryption.kms.pkcs11.pin_file", kms.pkcs11.pin_file, True),
            ]
        case "vault":
            return [
                ("encryption.kms.vault.ca_path", kms.vault.ca_path, False),
                ("encryption.kms.vault.token_file", kms.vault.token_file, True),
                ("encryption.kms.vault.secret_id_file", kms.vault.secret_id_file, True),
            ]
        case "aws-kms" | "azure-kv" | "gcp-kms":
            return []


def check_files(settings: Settings) -> list[str]:
    """Look at every named file; returns warnings, raises one ConfigError that lists all errors."""
    errors: list[str] = []
    warnings: list[str] = []
    if settings.encryption.kms.provider == "file" and settings.encryption.kms.file.path is None:
        errors.append('encryption.kms.file.path: missing; provider "file" needs the path of its key')
    for file in named_files(settings):
        try:
            found = file.path.stat()
        except OSError as error:
            errors.append(f"{file.key} = {file.path}: {error.strerror}; make the file, or mend the path")
            continue
        if not stat.S_ISREG(found.st_mode):
            errors.append(f"{file.key} = {file.path}: is no file; give the path of a file")
        elif not os.access(file.path, os.R_OK):
            errors.append(f"{file.key} = {file.path}: this user may not read it; change its owner or mode")
        elif file.private and open_to_others(found):
            (errors if settings.is_prod else warnings).append(_exposed(file.key, file.path))
    warnings += _own_file(settings)
    if errors:
        raise ConfigError(_listed(settings, errors))
    return warnings


def _exposed(key: str, path: Path) -> str:
    return f"{key} = {path}: others can read it; run `chmod 600 {path}`"


def _own_file(settings: Settings) -> list[str]:
    """Warn of a configuration that holds a secret and is open to others."""
    if settings.source is None or not holds_secret(settings):
        return []
    try:
        found = settings.source.stat()
    except OSError:
        return []
    return (
        [_exposed("a password stands in the configuration", settings.source)] if open_to_others(found) else []
    )


def holds_secret(settings: Settings) -> bool:
    """Whether a password, PIN or token stands there by value; a peer's connection string may hold one."""
    direct = (
        settings.connection.password,
        settings.kafka.security.password,
        settings.kafka.schema_registry.password,
        settings.kafka.schema_registry.token,
        settings.encryption.kms.pkcs11.pin,
        settings.encryption.kms.vault.token,
        settings.encryption.kms.vault.secret_id,
    )
    peers = (str(peer.connection) != peer.connection.get_secret_value() for peer in settings.peers)
    return any(secret is not None for secret in direct) or any(peers)


def _listed(settings: Settings, errors: list[str]) -> str:
    name = settings.source or "environment"
    if len(errors) == 1:
        return f"{name}: {errors[0]}"
    return "\n  ".join([f"{name}: {len(errors)} errors", *errors])
