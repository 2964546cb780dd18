"""The whole configuration as one value: every section, and the rules that span sections.

Not the loader (`load.py`), not the look at files (`files.py`), not the list of what this version can
do (`built.py`). Rule: what validates here is consistent in itself, on any machine.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import Field, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from vsql_shared.config.connection import ConnectionSettings
from vsql_shared.config.encryption import EncryptionSettings
from vsql_shared.config.governance import (
    AirGapSettings,
    ApplySettings,
    AuditSettings,
    ConflictSettings,
    ConsistencySettings,
    CryptaplySettings,
    DdlSettings,
)
from vsql_shared.config.kafka import KafkaSettings
from vsql_shared.config.limits import LimitsSettings
from vsql_shared.config.service import ClusterSettings, LogSettings, MetricsSettings, ServerSettings
from vsql_shared.config.sources import LayeredSettings
from vsql_shared.config.topology import (
    PciSettings,
    PeerSettings,
    PublicationSettings,
    ReplicationSettings,
)
from vsql_shared.config.values import is_local

_T = TypeVar("_T")
Finding = tuple[tuple[str | int, ...], str]
"""A key, as the steps to it, and what is wrong with it."""

_PROD = "prod mode requires it"
_DEV_WAY = '(for a trial: server.mode = "dev")'


class Settings(LayeredSettings):
    """vsql-sync.toml, validated."""

    cluster: ClusterSettings
    """This node's place among the others."""
    connection: ConnectionSettings
    """This node's own database."""
    server: ServerSettings = ServerSettings()
    """How the services run."""
    peers: list[PeerSettings] = Field(default_factory=list)
    """Other nodes, for `config apply`."""
    replication: ReplicationSettings = ReplicationSettings()
    """How peers begin."""
    kafka: KafkaSettings = KafkaSettings()
    """The brokers."""
    encryption: EncryptionSettings = EncryptionSettings()
    """How tuples are sealed."""
    audit: AuditSettings = AuditSettings()
    """The signed trail."""
    publications: list[PublicationSettings] = Field(default_factory=list)
    """Sets of tables, for `config apply`."""
    pci: PciSettings = PciSettings()
    """Columns with cardholder data, for `config apply`."""
    conflict: ConflictSettings = ConflictSettings()
    """Two nodes change one row."""
    consistency: ConsistencySettings = ConsistencySettings()
    """Which commits wait."""
    apply: ApplySettings = ApplySettings()
    """What does not fit at the target."""
    ddl: DdlSettings = DdlSettings()
    """Schema changes."""
    cryptaply: CryptaplySettings = CryptaplySettings()
    """Key governance."""
    air_gap: AirGapSettings = AirGapSettings()
    """Changesets by hand."""
    limits: LimitsSettings = LimitsSettings()
    """Bounds on memory, size and time."""
    metrics: MetricsSettings = MetricsSettings()
    """Health and metrics over HTTP."""
    log: LogSettings = LogSettings()
    """Logs."""

    _source: Path | None = PrivateAttr(default=None)

    @property
    def source(self) -> Path | None:
        """The file these settings came from; None when they came from the environment alone."""
        return self._source

    def read_from(self, source: Path | None) -> Settings:
        """These settings, remembering the file they came from; for the loader."""
        self._source = source
        return self

    @property
    def is_prod(self) -> bool:
        """Whether every control is enforced."""
        return self.server.mode == "prod"

    def state_dir(self, env: Mapping[str, str] | None = None) -> Path:
        """Where the daemon keeps its pid file and logs."""
        if self.server.state_dir is not None:
            return self.server.state_dir
        values = os.environ if env is None else env
        node = f"{self.cluster.name}-{self.cluster.node_name}"
        given = values.get("XDG_STATE_HOME")
        if given:
            return Path(given) / "vsql-sync" / node
        if os.geteuid() == 0:
            return Path("/var/lib/vsql-sync") / node
        return Path.home() / ".local" / "state" / "vsql-sync" / node

    @model_validator(mode="after")
    def _across_sections(self) -> Settings:
        problems = [*_prod_problems(self), *_name_problems(self)]
        if problems:
            text = "; ".join(f"{'.'.join(map(str, key))}: {why}" for key, why in problems)
            raise PydanticCustomError("across", "{text}", {"text": text, "problems": problems})
        return self


def _prod_problems(settings: Settings) -> Iterator[Finding]:
    """What prod mode insists on that the sections alone cannot know."""
    if not settings.is_prod:
        return
    if settings.server.tls.cert_path is None:
        yield ("server", "tls", "cert_path"), f"missing; {_PROD} {_DEV_WAY}"
    if settings.server.tls.key_path is None:
        yield ("server", "tls", "key_path"), f"missing; {_PROD} {_DEV_WAY}"
    if not settings.audit.signs:
        yield (
            ("audit", "signing_key_path"),
            f"missing; {_PROD}: make a key with `syncctl key generate` {_DEV_WAY}",
        )
    if settings.encryption.kms.provider == "file":
        yield (
            ("encryption", "kms", "provider"),
            f'"file" keeps the key on this disk; prod mode needs a KMS, such as "pkcs11" {_DEV_WAY}',
        )
    yield from _network_problems(settings)


def _network_problems(settings: Settings) -> Iterator[Finding]:
    """Prod mode: what leaves this machine is encrypted, to a server whose certificate is checked."""
    far = [place for place in settings.kafka.bootstrap_servers.split(",") if not is_local(place)]
    if far and not settings.kafka.security.uses_tls:
        yield (
            ("kafka", "security", "protocol"),
            (
                f'"{settings.kafka.security.protocol}" has no TLS and {far[0].strip()} is not this machine;'
                f' prod mode needs "SSL" or "SASL_SSL" {_DEV_WAY}'
            ),
        )
    host = settings.connection.host
    if settings.connection.sslmode != "verify-full" and not all(map(is_local, host.split(","))):
        yield (
            ("connection", "sslmode"),
            (
                f'"{settings.connection.sslmode}" does not check who answers at {host}; prod mode needs'
                f' "verify-full" and sslrootcert where the database is not on this machine {_DEV_WAY}'
            ),
        )


def _name_problems(settings: Settings) -> Iterator[Finding]:
    """Names and numbers that must be unique."""
    ids = [settings.cluster.node_id, *(peer.node_id for peer in settings.peers)]
    names = [settings.cluster.node_name, *(peer.node_name for peer in settings.peers)]
    for number in _repeated(ids):
        yield ("peers",), f"node_id {number} is used twice; each node (this one too) has its own"
    for name in _repeated(names):
        yield (
            ("peers",),
            f'node_name "{name}" is used twice; each node (this one too) has its own',
        )
    for name in _repeated([publication.name for publication in settings.publications]):
        yield ("publications",), f'name "{name}" is used twice; write its tables in one entry'
    for index, publication in enumerate(settings.publications):
        for name in _repeated([table.name for table in publication.tables]):
            yield ("publications", index, "tables"), f'table "{name}" is named twice; write it once'
    for name in _repeated([entry.table for entry in settings.pci.columns]):
        yield ("pci", "columns"), f'table "{name}" is named twice; write its columns in one entry'
    for name in _repeated([entry.table for entry in settings.conflict.tables]):
        yield ("conflict", "tables"), f'table "{name}" is named twice; it has one strategy'


def _repeated(values: list[_T]) -> list[_T]:
    return [value for value, times in Counter(values).items() if times > 1]
