"""What a valid configuration may ask for that this version does not do yet, and what is unwise in it.

Rules: a control that is configured and not enforced would be a lie, so services refuse to start
(`require_built`); `syncctl config check` shows the same list as notes. When a section is built, its
entry here goes.
"""

from __future__ import annotations

from collections.abc import Iterator

from vsql_shared.config.governance import AuditSettings, ConflictSettings
from vsql_shared.config.settings import Settings
from vsql_shared.errors import NotBuiltError


def not_built(settings: Settings) -> list[str]:
    """One line per key that asks for something this version does not have, naming key and value."""
    return [f"{key}: not built yet; {way}" for key, way in _missing(settings)]


def require_built(settings: Settings) -> None:
    """Refuse to run with a configuration that promises what this version does not do."""
    found = not_built(settings)
    if found:
        name = settings.source or "environment"
        head = f"{name}: {found[0]}" if len(found) == 1 else "\n  ".join([f"{name}: not built yet", *found])
        raise NotBuiltError(head, hint="services do not start with a control configured that is not enforced")


def _missing(settings: Settings) -> Iterator[tuple[str, str]]:
    """(key = value, what to write instead)."""
    yield from _missing_many_writers(settings)
    yield from _missing_control(settings)


def _missing_many_writers(settings: Settings) -> Iterator[tuple[str, str]]:
    """Bidirectional streams of a file, tables made by themselves, and what settles conflicts."""
    for index, peer in enumerate(settings.peers):
        if peer.mode == "bidirectional":
            yield (
                f'peers[{index}].mode = "bidirectional"',
                "leave the peer out of the file and add it by `syncctl node add-peer --mode bidirectional`",
            )
    if settings.replication.initialization.schema_sync.mode == "auto":
        yield 'replication.initialization.schema_sync.mode = "auto"', 'use "strict" or "manual"'
    for index, publication in enumerate(settings.publications):
        if publication.mode == "bidirectional":
            yield (
                f'publications[{index}].mode = "bidirectional"',
                "leave it out: `syncctl node add-peer --mode bidirectional` makes it so",
            )
    yield from _missing_conflict(settings.conflict)


def _missing_conflict(conflict: ConflictSettings) -> Iterator[tuple[str, str]]:
    """Conflict resolution beyond the default."""
    if conflict.pci_write_policy == "forward":
        yield 'conflict.pci_write_policy = "forward"', 'use "reject" or "accept_lww"'


def _missing_control(settings: Settings) -> Iterator[tuple[str, str]]:
    """Schema changes, key governance."""
    for key in ("enforce_governed_ddl", "audit_ddl"):
        if getattr(settings.ddl, key):
            yield f"ddl.{key} = true", "use false"
    if settings.cryptaply.enabled:
        yield "cryptaply.enabled = true", "use false"
    table = AuditSettings.model_fields["audit_table"].default
    if settings.audit.audit_table != table:
        yield f'audit.audit_table = "{settings.audit.audit_table}"', f'use "{table}"'


def advice(settings: Settings) -> list[str]:
    """What is allowed and unwise: shown by `config check`, logged by services at start."""
    return [f"{key}: {why}" for key, why in _unwise(settings)]


def _unwise(settings: Settings) -> Iterator[tuple[str, str]]:
    if not settings.is_prod:
        yield 'server.mode = "dev"', "for trials only; nothing insists on TLS or signatures"
        if not settings.audit.signs:
            yield "audit.signing_key_path", "no signing key: entries of the chain are not signed"
        return
    audit = settings.audit
    if audit.retention_months < 12 or audit.online_months < 3:
        yield (
            f"audit.retention_months = {audit.retention_months}, online_months = {audit.online_months}",
            "PCI DSS 10.5.1 asks for twelve months of audit trail, the newest three at hand",
        )
    kafka = settings.kafka
    if kafka.min_insync_replicas < 2:
        yield (
            f"kafka.min_insync_replicas = {kafka.min_insync_replicas}",
            "one disk can lose what was acknowledged; use replication_factor 3, min_insync_replicas 2",
        )
    if not kafka.security.uses_tls:
        yield (
            f'kafka.security.protocol = "{kafka.security.protocol}"',
            "records are sealed, but anybody on the network can write to the topics; use SASL_SSL or SSL",
        )
    if kafka.schema_registry.crosses_in_clear:
        yield (
            "kafka.schema_registry.url",
            "plain HTTP: anybody on the way can tell tools another schema; replication itself is not touched",
        )
