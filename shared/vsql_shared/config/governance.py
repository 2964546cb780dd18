"""[audit], [conflict], [consistency], [ddl], [apply], [cryptaply], [air_gap]: what is decided about data."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from vsql_shared.config.archive import ArchiveSettings
from vsql_shared.config.section import Section
from vsql_shared.config.values import (
    ConfigPath,
    Duration,
    Identifier,
    NodeName,
    Size,
    TableName,
    Whole,
    refusal,
)
from vsql_shared.deltas import TYPES, type_of
from vsql_shared.strategies import Strategy

_WHY_AUDIT = (
    "must be true: the signed, chained manifest is what makes a batch exist, nothing is applied without"
)


def _part_of_commit(value: bool) -> bool:
    if not value:
        raise refusal(_WHY_AUDIT)
    return value


def _signature(value: str) -> str:
    if value != "ed25519":
        raise refusal('must be "ed25519": entries of the chain have no other signature')
    return value


def _signing_provider(value: object) -> object:
    if value in _NO_SIGNING_KEYS:
        raise refusal(
            f'signing keys in "{value}" are not built; "pkcs11" and "vault" are, or signing_key_path'
        )
    return value


def _delta_function(value: str) -> str:
    if type_of(value) is None:
        raise refusal(
            f'"{value}" is no function that adds up; write "delta_apply", or with the column\'s type, as in'
            f' "delta_apply_numeric" or "spock_delta_apply_float8": {", ".join(TYPES)}'
        )
    return value


SigningProvider = Literal["pkcs11", "vault"]
# KEKs can be there, signing keys cannot: docs/design/0018 says why.
_NO_SIGNING_KEYS = ("aws-kms", "azure-kv", "gcp-kms", "file")

CommitRecord = Annotated[bool, AfterValidator(_part_of_commit)]


class AuditSettings(Section):
    """[audit]: the signed trail of every batch."""

    enabled: CommitRecord = True
    """Always true."""
    hash_chain: CommitRecord = True
    """Always true."""
    merkle_roots: CommitRecord = True
    """Always true."""
    signature_algorithm: Annotated[str, AfterValidator(_signature)] = "ed25519"
    """Always ed25519."""
    signing_key_path: ConfigPath | None = None
    """Ed25519 private key of this node, readable by this user only; prod needs it, or signing_key_label."""
    signing_key_label: Annotated[str, Field(min_length=1)] | None = None
    """Instead: label of the Ed25519 key in the token of [encryption.kms.pkcs11], which signs inside it; or
    "mount/key" of the one in Vault, with signing_key_provider "vault"."""
    signing_key_provider: Annotated[SigningProvider, BeforeValidator(_signing_provider)] = "pkcs11"
    """Where the key of signing_key_label is: in that token, or in the Vault of [encryption.kms.vault],
    whatever the KEK's provider is."""
    audit_table: Identifier = "vsql_sync_audit"
    """Table of the entries, in schema vsql_sync."""
    leaf_retention: Annotated[Duration, Field(ge=timedelta(0), le=timedelta(days=366))] = timedelta(days=7)
    """How long each side keeps the leaf hashes (32 bytes a tuple) by which a divergent tuple is found;
    "0s" keeps none."""
    leaf_max_size: Annotated[Size, Field(ge=2**20)] = 10 * 10**9
    """Bytes all leaf hashes may take in this node's database; beyond it the oldest go before their time."""
    checkpoint_every: Annotated[Duration, Field(ge=timedelta(seconds=1), le=timedelta(days=366))] = timedelta(
        hours=1
    )
    """How often a target cosigns the head of its source's chain, in its own chain of acknowledgements."""
    retention_months: Annotated[Whole, Field(ge=1, le=1200)] = 12
    """Months an archived segment of the trail is locked for."""
    online_months: Annotated[Whole, Field(ge=0, le=1200)] = 3
    """Months an entry stays in the database before it may be archived and pruned."""
    archive: ArchiveSettings = ArchiveSettings()
    """The bucket archived segments go to."""

    verify_every: Annotated[Duration, Field(ge=timedelta(seconds=1), le=timedelta(days=366))] = timedelta(
        hours=1
    )
    """How long after the last one a pass over the whole trail, and over the audit topic, begins."""
    verify_slice: Annotated[Whole, Field(ge=1, le=100_000)] = 200
    """Entries such a pass verifies at a time; new ones are verified as they come, as many at a time."""
    verify_pause: Annotated[Duration, Field(ge=timedelta(milliseconds=1), le=timedelta(hours=1))] = timedelta(
        seconds=1
    )
    """How long it rests after each slice."""

    @model_validator(mode="after")
    def _one_key(self) -> AuditSettings:
        if self.signing_key_path is not None and self.signing_key_label is not None:
            raise refusal("signing_key_path and signing_key_label: a node has one signing key")
        return self

    @model_validator(mode="after")
    def _online_first(self) -> AuditSettings:
        if self.online_months > self.retention_months:
            raise refusal("online_months: at most retention_months")
        return self

    @property
    def signs(self) -> bool:
        """Whether a signing key is configured."""
        return self.signing_key_path is not None or self.signing_key_label is not None


class CrdtColumn(Section):
    """[[conflict.crdt.columns]]: a column whose concurrent changes add up."""

    table: TableName
    """Table, with its schema if not public."""
    column: Identifier
    """Column: smallint, integer, bigint, numeric, real, double precision or money, NOT NULL."""
    function: Annotated[str, AfterValidator(_delta_function)]
    """What adds up: "delta_apply", or with its column's type, such as "spock_delta_apply_float8"."""


class CrdtSettings(Section):
    """[conflict.crdt]: columns that merge without conflict."""

    columns: list[CrdtColumn] = Field(default_factory=list)
    """One entry per column; agreed on when a peer is added, the same in every node's file."""


class TableStrategy(Section):
    """[[conflict.tables]]: a table with a strategy of its own."""

    table: TableName
    """Table, with its schema if not public."""
    strategy: Strategy
    """Its strategy, whatever its publication's is."""


class ConflictSettings(Section):
    """[conflict]: what happens when two nodes change the same row."""

    default_strategy: Strategy = "last_write_wins"
    """Strategy of tables without their own; agreed on when a peer is added, the same in every node's file."""
    tables: list[TableStrategy] = Field(default_factory=list)
    """One entry per table with a strategy of its own."""
    pci_write_primary: NodeName | None = None
    """Node that alone writes PCI tables, as `syncctl sync primary` was told on each node."""
    pci_write_policy: Literal["reject", "forward", "accept_lww"] = "reject"
    """What happens to a write to a PCI table on another node."""
    max_clock_skew_ms: Annotated[Whole, Field(ge=1, le=60_000)] = 100
    """Milliseconds a change may be ahead of the database's clock before tables that both nodes write wait,
    and the clocks may be apart, as measured, before PCI data waits."""
    crdt: CrdtSettings = CrdtSettings()
    """Columns that merge without conflict."""


class ConsistencySettings(Section):
    """[consistency]: whether a commit waits for the other node."""

    pci_sync_mode: Literal["async", "remote_apply"] = "async"
    """For PCI tables; with remote_apply the producer starts only once `syncctl sync enable` was run."""
    non_pci_sync_mode: Literal["async"] = "async"
    """For all others."""


class DdlSettings(Section):
    """[ddl]: replication of schema changes."""

    enforce_governed_ddl: bool = False
    """Schema changes only through the governed path."""
    audit_ddl: bool = False
    """Schema changes become entries of the chain."""


class ApplySettings(Section):
    """[apply]: how the consumer treats what does not fit."""

    on_anomaly: Literal["continue", "stop"] = "continue"
    """A row to update or delete is not there: log, count and go on, or stop the stream."""
    members: Annotated[Whole, Field(ge=0, le=64)] = 1
    """Processes of this service that apply each stream of a publication which is applied partitioned."""


class CryptaplySettings(Section):
    """[cryptaply]: the bridge to a key governance authority."""

    enabled: bool = False
    """Whether the bridge runs."""
    endpoint: Annotated[str, Field(pattern=r"^https://\S+$")] | None = None
    """Address of the authority, https only."""
    report_interval: Annotated[Duration, Field(ge=timedelta(seconds=1))] = timedelta(minutes=5)
    """Time between reports."""
    accept_directives: bool = True
    """Whether signed directives are carried out."""
    stale_max: Annotated[Duration, Field(ge=timedelta(seconds=1))] = timedelta(hours=24)
    """How old the last directive may be."""


class AirGapSettings(Section):
    """[air_gap]: changesets carried by hand."""

    export_dir: ConfigPath | None = None
    """Folder for exported changesets."""
    changeset_format: Literal["vsql-changeset-v1"] = "vsql-changeset-v1"
    """Format of a changeset."""
    max_changeset_size: Annotated[Size, Field(ge=2**20)] = 10 * 10**9
    """Bytes of one changeset file; larger exports are split."""
