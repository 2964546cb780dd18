"""[encryption]: the cipher, the key-encryption key's home, and how long a data key lives."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr, model_validator

from vsql_shared.config.kms_services import AwsKmsSettings, VaultSettings
from vsql_shared.config.kms_uri import merge_kms_uri
from vsql_shared.config.secrets import one_source, read_secret
from vsql_shared.config.section import Section
from vsql_shared.config.values import ConfigPath, Duration, Size, Whole, refusal

KmsProvider = Literal["azure-kv", "aws-kms", "gcp-kms", "pkcs11", "vault", "file"]

# NIST SP 800-38D bounds what one AES-GCM key may encrypt; these are ours, far below it.
DEK_MAX_TUPLES = 2**24
DEK_MAX_BYTES = 64 * 2**30

_WHY_ENCRYPTED = "must be true: only sealed records leave the node, there is no mode without encryption"


def _enabled(value: bool) -> bool:
    if not value:
        raise refusal(_WHY_ENCRYPTED)
    return value


def _algorithm(value: str) -> str:
    if value != "AES-256-GCM":
        raise refusal('must be "AES-256-GCM": the records of the stream have no other form')
    return value


class FileKmsSettings(Section):
    """[encryption.kms.file]: a key-encryption key in a local file, for development only."""

    path: ConfigPath | None = None
    """File with the key; readable by this user only."""


class Pkcs11Settings(Section):
    """[encryption.kms.pkcs11]: a key-encryption key inside a hardware security module."""

    module: ConfigPath | None = None
    """The vendor's PKCS#11 library."""
    token_label: Annotated[str, Field(min_length=1)] | None = None
    """Label of the token."""
    key_label: Annotated[str, Field(min_length=1)] | None = None
    """Label of the AES key in the token."""
    pin: SecretStr | None = None
    """User PIN. Prefer pin_file, pin_command or the environment."""
    pin_file: ConfigPath | None = None
    """File whose only line is the PIN."""
    pin_command: str | None = None
    """Command that prints the PIN; run without a shell."""

    @model_validator(mode="after")
    def _one_pin(self) -> Pkcs11Settings:
        one_source("pin", self.pin, self.pin_file, self.pin_command)
        return self

    def read_pin(self) -> SecretStr | None:
        """The PIN from its source."""
        return read_secret("encryption.kms.pkcs11.pin", self.pin, self.pin_file, self.pin_command)


class KmsSettings(Section):
    """[encryption.kms]: who holds the key-encryption key."""

    provider: KmsProvider = "file"
    """Key management system. "file" is for development and refused in prod."""
    kek_id: Annotated[str, Field(min_length=1, max_length=512)] = "vsql-sync-kek"
    """Name of the key-encryption key, as the provider writes it."""
    uri: Annotated[str, Field(min_length=1, max_length=2048)] | None = None
    """Provider and key in one line instead, such as "aws-kms://alias/payments-kek"; see keys.md."""
    custodian: Annotated[str, Field(max_length=200)] = ""
    """Who answers for the key: a person or a role. `syncctl key inventory` shows it."""
    timeout: Annotated[Duration, Field(ge=timedelta(milliseconds=100), le=timedelta(minutes=2))] = timedelta(
        seconds=10
    )
    """How long one call to a key service may take."""
    attempts: Annotated[Whole, Field(ge=1, le=10)] = 4
    """Calls to a key service that throttles or does not answer, before the stream waits and says so."""
    retry_pause: Annotated[Duration, Field(ge=timedelta(0), le=timedelta(seconds=10))] = timedelta(
        milliseconds=200
    )
    """Pause before the second call; it doubles, and is never longer than 10 s."""
    file: FileKmsSettings = FileKmsSettings()
    """Settings of provider "file"."""
    pkcs11: Pkcs11Settings = Pkcs11Settings()
    """Settings of provider "pkcs11"."""
    aws: AwsKmsSettings = AwsKmsSettings()
    """Settings of provider "aws-kms"."""
    vault: VaultSettings = VaultSettings()
    """Settings of provider "vault"."""

    @model_validator(mode="before")
    @classmethod
    def _read_uri(cls, value: object) -> object:
        return merge_kms_uri(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _complete(self) -> KmsSettings:
        if self.provider == "vault" and self.vault.address is None:
            raise refusal('provider "vault" needs address in [encryption.kms.vault]')
        if self.provider == "pkcs11":
            for name in ("module", "token_label", "key_label"):
                if getattr(self.pkcs11, name) is None:
                    raise refusal(f'provider "pkcs11" needs {name} in [encryption.kms.pkcs11]')
        return self


class DekSettings(Section):
    """[encryption.dek]: the life of a data key."""

    rotation: Literal["per-session", "per-batch", "hourly", "daily"] = "per-session"
    """When a new data key is made."""
    max_tuples: Annotated[Whole, Field(ge=1, le=DEK_MAX_TUPLES)] = DEK_MAX_TUPLES
    """Tuples under one data key, after which it is rotated by force."""
    max_bytes: Annotated[Size, Field(ge=2**20, le=DEK_MAX_BYTES)] = DEK_MAX_BYTES
    """Bytes under one data key, after which it is rotated by force."""
    cached_keys: Annotated[Whole, Field(ge=1, le=10_000)] = 64
    """Opened data keys a stream's consumer keeps; another one costs a call to the KMS."""
    cached_for: Annotated[Duration, Field(ge=timedelta(0), le=timedelta(days=1))] = timedelta(hours=1)
    """How long an opened data key is kept: so long may a destroyed KEK still open what it wrapped."""
    announcements_held: Annotated[Whole, Field(ge=10, le=1_000_000)] = 1_000
    """Announcements of data keys a stream's consumer holds that no batch has asked for yet."""


class EncryptionSettings(Section):
    """[encryption]: how tuples are sealed."""

    enabled: Annotated[bool, AfterValidator(_enabled)] = True
    """Always true."""
    algorithm: Annotated[str, AfterValidator(_algorithm)] = "AES-256-GCM"
    """Always AES-256-GCM."""
    kms: KmsSettings = KmsSettings()
    """Key management system."""
    dek: DekSettings = DekSettings()
    """Data keys."""
