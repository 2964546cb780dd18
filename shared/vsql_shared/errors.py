"""Every error vsql-sync raises on purpose, grouped by who must act.

    VsqlSyncError
    ├── UserError                   the person at the terminal: fix the command or the configuration
    │   ├── ConfigError             a key, a value or a file of the configuration
    │   ├── NotBuiltError           a section of the configuration this version cannot honour yet
    │   └── RefusedError            the request is understood and is not allowed in this state
    ├── EnvironmentFault            the operator: a server, a privilege or a setting outside of us
    │   ├── DatabaseError           PostgreSQL refuses (privilege, setting, missing object)
    │   │   └── RowError            … a row: the stream stops until somebody decides, or alters the table
    │   ├── BrokerError             Kafka refuses (topic shape, authorization, size)
    │   ├── RegistryError           a schema registry refuses (credentials, subject, compatibility)
    │   ├── StoreError              an object store refuses (authorization, no such bucket)
    │   └── KeyUnavailableError     a key file, a KEK or a KMS refuses
    ├── TransientError              nobody: retried with back-off; the message says what is waited for
    ├── ProtocolError               a developer or an attacker: bytes that do not follow a format
    │   └── DecodeError             truncated, oversized or malformed input
    ├── DivergedError               an operator: data may be missing, decide how to go on
    └── VerificationError           an auditor: what arrived is not what was signed
        ├── ChainError              a manifest out of sequence, a wrong previous hash, a fork
        ├── SignatureError          a bad signature, an unknown signer
        │   └── KeyEndedError       a genuine signature by a key that was retired or revoked before
        ├── RecordError             a missing, extra, reordered or altered record
        └── UnsealError             a tuple that does not open under its announced key

Every error carries `hint`: what the reader can do about it. Exit codes of `syncctl` and of the
services follow the group (`exit_code`); they are documented in docs/operations/exit-codes.md.
No message carries a secret or a row's value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from vsql_shared.changes import RowPlace


class VsqlSyncError(Exception):
    """Root of every error raised on purpose. `hint` says what to do; it may be empty."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class UserError(VsqlSyncError):
    """The command or the configuration is wrong; nothing was changed."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration key, value or file is wrong; the message names the key, the value and the fix."""

    exit_code = 3


class NotBuiltError(UserError):
    """The configuration switches on something this version does not have yet."""

    exit_code = 3


class RefusedError(UserError):
    """The request is well formed and not allowed in the present state."""

    exit_code = 4


class EnvironmentFault(VsqlSyncError):
    """Something outside this process is not as it must be; retrying alone does not help.

    `refusal`: a server does not let us in: "authentication", "authorization" or "tls"; '' otherwise.
    """

    exit_code = 5
    refusal = ""

    def refusing(self, cause: str) -> Self:
        """Say that this is such a refusal."""
        self.refusal = cause
        return self


class DatabaseError(EnvironmentFault):
    """PostgreSQL lacks a setting, a privilege or an object."""


class RowError(DatabaseError):
    """PostgreSQL refuses a row; trying again changes nothing.

    `place` says which one, None where that is not known; `sqlstate` is "" where it was our own finding.
    """

    def __init__(
        self, message: str, *, hint: str = "", place: RowPlace | None = None, sqlstate: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.place, self.sqlstate = place, sqlstate


class BrokerError(EnvironmentFault):
    """Kafka refuses: a topic of the wrong shape, no authorization, a message too large."""


class RegistryError(EnvironmentFault):
    """A schema registry refuses: credentials, a subject without our schema, an incompatible one."""


class StoreError(EnvironmentFault):
    """An object store refuses: no authorization, no such bucket."""


class KeyUnavailableError(EnvironmentFault):
    """A key file, a KEK or a KMS cannot be used."""

    exit_code = 6


class TransientError(VsqlSyncError):
    """A connection or a server went away; the caller retries with back-off."""

    exit_code = 7


class ProtocolError(VsqlSyncError):
    """Bytes from outside do not follow the format they claim."""

    exit_code = 8


class DecodeError(ProtocolError):
    """Truncated, oversized or malformed input; the message says which field and which offset."""


class VerificationError(VsqlSyncError):
    """What arrived is not what was signed. The stream stops; nothing of the batch is applied.

    `record` names where: topic, partition, offset, or chain position. `sequence` is the entry of the
    chain that was due, where that is not the next one to be applied; else 0.
    """

    exit_code = 9

    def __init__(self, message: str, *, record: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.record = record
        self.sequence = 0

    def __str__(self) -> str:
        where = f" [{self.record}]" if self.record else ""
        return f"{self.message}{where}" + (f"; {self.hint}" if self.hint else "")


class ChainError(VerificationError):
    """A chain entry is out of sequence, has a wrong previous hash, or forks the chain."""


class SignatureError(VerificationError):
    """A signature does not verify, or its signer is unknown or revoked."""


class KeyEndedError(SignatureError):
    """The signature is genuine, but its key had been retired or revoked.

    `said`: the node itself has said, signed by its next key, where this one ended. Nothing is left to decide.
    """

    def __init__(self, message: str, *, record: str = "", hint: str = "", said: bool = False) -> None:
        super().__init__(message, record=record, hint=hint)
        self.said = said


class RecordError(VerificationError):
    """A record is missing, extra, reordered, duplicated with other content, or altered."""


class UnsealError(VerificationError):
    """A tuple does not open under the key announced for it."""


class DivergedError(VsqlSyncError):
    """Data may be missing between two positions; the stream needs an operator's decision."""

    exit_code = 10
