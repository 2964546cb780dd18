"""[encryption.kms.aws] and [encryption.kms.vault]: how a key service is reached.

Not here: which key it is (`encryption.kms.kek_id`), and Azure and Google, which need nothing but
the key's name. Rules: no credential of a cloud stands here, the clouds' own chains find it (environment,
instance, workload identity); a secret for Vault comes by file, command or environment.
"""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, Field, SecretStr, model_validator

from vsql_shared.config.secrets import one_source, read_secret
from vsql_shared.config.section import Section
from vsql_shared.config.values import ConfigPath, refusal

_Name = Annotated[str, Field(min_length=1)]


def is_loopback(host: str | None) -> bool:
    """Whether a host is this machine, so that nothing crosses a network."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def split_url(value: str, form: str) -> SplitResult:
    """The parts of an address that can be asked; `form` is what a refusal says.

    Raises what pydantic shows. Further on, such an address would be an error of the library's own.
    """
    try:
        parts = urlsplit(value)
        port_is_fine = parts.port is None or parts.port > 0
        (parts.hostname or "").encode("idna")  # labels of 1 to 63 characters
    except ValueError:
        raise refusal(form) from None
    if not value.isascii() or any(not 32 < ord(one) < 127 or one in '<>"\\' for one in value):
        raise refusal(f"{form}, in ASCII, without blanks")
    if not port_is_fine:
        raise refusal(form)
    return parts


def _service_url(value: str) -> str:
    """Only https, but for a server on this machine; no user, no query: a token goes to this address."""
    parts = split_url(value, 'write an address as "https://host:port"')
    safe = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname))
    if not safe:
        raise refusal('write an address as "https://host:port"; plain http only to this machine')
    if parts.username is not None or parts.query or parts.fragment or not parts.hostname:
        raise refusal("give host and port alone: no user, no query")
    return value.rstrip("/")


ServiceUrl = Annotated[str, AfterValidator(_service_url)]


class AwsKmsSettings(Section):
    """[encryption.kms.aws]: AWS KMS. Credentials come from AWS's own chain."""

    region: _Name | None = None
    """Region of the key; else AWS_REGION or the profile's."""
    profile: _Name | None = None
    """Profile of the AWS configuration files; else AWS_PROFILE or the default one."""
    endpoint: ServiceUrl | None = None
    """Address of a private endpoint; else AWS's own for the region."""


class VaultSettings(Section):
    """[encryption.kms.vault]: the transit engine of HashiCorp Vault or OpenBao."""

    address: ServiceUrl | None = None
    """Address of the server, such as "https://vault.example:8200"."""
    namespace: Annotated[str, Field(pattern=r"^[A-Za-z0-9_./-]{1,200}$")] | None = None
    """Namespace, where the server has them."""
    ca_path: ConfigPath | None = None
    """CA certificates that sign the server's; else the system's."""
    auth: Literal["token", "approle"] = "token"
    """How to log in: a token (Vault Agent keeps one in a file), or AppRole."""
    token: SecretStr | None = None
    """Token. Prefer token_file, token_command or the environment."""
    token_file: ConfigPath | None = None
    """File whose only line is the token; read again when the server refuses the one in use."""
    token_command: str | None = None
    """Command that prints the token; run without a shell."""
    role_id: _Name | None = None
    """Role of AppRole."""
    secret_id: SecretStr | None = None
    """Secret of AppRole. Prefer secret_id_file, secret_id_command or the environment."""
    secret_id_file: ConfigPath | None = None
    """File whose only line is the secret of AppRole."""
    secret_id_command: str | None = None
    """Command that prints the secret of AppRole; run without a shell."""
    auth_mount: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*$")] = "approle"
    """Where the AppRole method is mounted."""

    @model_validator(mode="after")
    def _one_secret(self) -> VaultSettings:
        one_source("token", self.token, self.token_file, self.token_command)
        one_source("secret_id", self.secret_id, self.secret_id_file, self.secret_id_command)
        if self.auth == "approle" and self.role_id is None:
            raise refusal('auth "approle" needs role_id')
        return self

    def read_token(self) -> SecretStr | None:
        """The token from its source."""
        return read_secret("encryption.kms.vault.token", self.token, self.token_file, self.token_command)

    def read_secret_id(self) -> SecretStr | None:
        """AppRole's secret from its source."""
        key = "encryption.kms.vault.secret_id"
        return read_secret(key, self.secret_id, self.secret_id_file, self.secret_id_command)
