"""[kafka.schema_registry]: where the schema of packs is told to other people's tools.

Not here: the calls (kafka/schema_registry.py) and what a frame is (wire/framing.py). Rules: without `url` no
registry is asked and nothing of this section counts; a credential never goes over plain HTTP, but to this
machine; secrets come by value, by file or by command, and are read when the registry is asked.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, model_validator

from vsql_shared.config.kms_services import is_loopback, split_url
from vsql_shared.config.secrets import PasswordSource, one_source, read_secret
from vsql_shared.config.values import ConfigPath, Duration, refusal

PACK_SUBJECT = "vsql_sync.v1.Pack"
"""The full name of the record, as registries' RecordNameStrategy has it: one for all topics."""


def _registry_url(value: str) -> str:
    form = 'write the address as "https://host:port", with the path of its API where it has one'
    parts = split_url(value, form)
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise refusal(form)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise refusal("give host, port and path alone: no user, no query; credentials have keys of their own")
    return value.rstrip("/")


class SchemaRegistrySettings(PasswordSource):
    """[kafka.schema_registry]: a registry with Confluent's REST API; none is needed."""

    url: Annotated[str, AfterValidator(_registry_url)] | None = None
    """Its address, such as "https://registry:8081"; packs then carry the schema's id. Absent: no registry."""
    subject: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,200}$")] = PACK_SUBJECT
    """Under which name the schema is registered."""
    auto_register: bool = True
    """Whether a producer registers the schema where it is missing; false: it must be there."""
    username: Annotated[str, Field(pattern="^[^:]+$")] | None = None
    """User of basic authentication; without a colon, which ends it there."""
    token: SecretStr | None = None
    """Bearer token, instead of a user. Prefer token_file, token_command or the environment."""
    token_file: ConfigPath | None = None
    """File whose only line is the token."""
    token_command: str | None = None
    """Command that prints the token; run without a shell."""
    ca_path: ConfigPath | None = None
    """CA certificates that sign the registry's, PEM; else the system's."""
    cert_path: ConfigPath | None = None
    """Client certificate, PEM."""
    key_path: ConfigPath | None = None
    """Key of the client certificate, PEM; readable by this user only."""
    timeout: Annotated[Duration, Field(ge=timedelta(seconds=1), le=timedelta(minutes=1))] = timedelta(
        seconds=5
    )
    """Of one call, to the last byte of its answer; at most a minute."""

    @model_validator(mode="after")
    def _complete(self) -> SchemaRegistrySettings:
        one_source("token", self.token, self.token_file, self.token_command)
        if self._has_password != (self.username is not None):
            raise refusal("username and a password (or _file, _command) are given together")
        if self._has_token and self._has_password:
            raise refusal("give a user and password, or a token, not both")
        if (self.cert_path is None) != (self.key_path is None):
            raise refusal("cert_path and key_path are given together")
        if self.cert_path is not None and urlsplit(self.url or "https:").scheme == "http":
            raise refusal("a client certificate is shown over https alone")
        if self.crosses_in_clear and (self._has_token or self._has_password):
            raise refusal("credentials would cross the network in clear; use https")
        return self

    @property
    def _has_password(self) -> bool:
        return any(one is not None for one in (self.password, self.password_file, self.password_command))

    @property
    def _has_token(self) -> bool:
        return any(one is not None for one in (self.token, self.token_file, self.token_command))

    @property
    def crosses_in_clear(self) -> bool:
        """Whether it is asked over plain HTTP across a network."""
        parts = urlsplit(self.url or "")
        return parts.scheme == "http" and not is_loopback(parts.hostname)

    def read_token(self) -> SecretStr | None:
        """The token from its source."""
        return read_secret("kafka.schema_registry.token", self.token, self.token_file, self.token_command)
