"""How far back the trail goes, where it lies, and what decides how long it stays.

Rules: numbers and names only; sizes are PostgreSQL's estimates where counting would read all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vsql_shared.config.values import format_duration

if TYPE_CHECKING:
    from vsql_ctl.evidence.brokers import Brokers
    from vsql_shared.config import Settings
    from vsql_shared.pg.connect import Connection

_PARTITIONS = """
SELECT c.relname, pg_catalog.pg_get_expr(c.relpartbound, c.oid), nullif(c.reltuples, -1)::bigint,
       pg_catalog.pg_total_relation_size(c.oid)
FROM pg_catalog.pg_partition_tree('vsql_sync.vsql_sync_audit') t JOIN pg_catalog.pg_class c ON c.oid = t.relid
WHERE t.isleaf ORDER BY 1
"""
_CHAINS = """
SELECT h.chain, h.own, h.sequence, h.remembered_at,
       (SELECT pg_catalog.jsonb_build_object('sequence', a.sequence, 'time', a.event_timestamp)
        FROM vsql_sync.vsql_sync_audit a WHERE a.chain = h.chain ORDER BY a.sequence LIMIT 1)
FROM vsql_sync.chain_heads h ORDER BY 1
"""
_EXPORTS = """
SELECT occurred_at, actor, target_id FROM vsql_sync.audit_log
WHERE action = 'audit.export' ORDER BY id DESC
"""
_SEGMENTS = """
SELECT chain, first_sequence, last_sequence, bucket, object_key, object_version, encode(sha256, 'hex'), bytes,
       retain_until, verified_at
FROM vsql_sync.audit_segments ORDER BY chain, first_sequence
"""
_SEGMENT_COLUMNS = (
    "chain", "first_sequence", "last_sequence", "bucket", "object", "version", "sha256", "bytes",
    "retain_until", "verified_at",
)  # fmt: skip
_BASES = "SELECT chain, size, noted_at, base FROM vsql_sync.audit_bases ORDER BY 1, 2"
_STREAMS = "SELECT chain, direction, state, pruned_sequence FROM vsql_sync.streams ORDER BY 1, 2"


def trail(conn: Connection, settings: Settings) -> dict[str, Any]:
    """The trail in this node's database, its exports, and the settings that count."""
    from vsql_shared.audit import watch_state
    from vsql_shared.pg.connect import errors

    with errors("reading the state of retention"):
        return {
            "partitions": _rows(conn, ("table", "bounds", "entries_estimate", "bytes"), _PARTITIONS),
            "chains": _rows(conn, ("chain", "own", "last_sequence", "remembered_at", "first"), _CHAINS),
            "streams": _rows(conn, ("chain", "direction", "state", "data_topics_deleted_to"), _STREAMS),
            "archived": _rows(conn, _SEGMENT_COLUMNS, _SEGMENTS),
            "pruned": _rows(conn, ("chain", "entries", "noted_at", "base"), _BASES),
            "verified_in_background": watch_state.progress(conn),
            "breaks": watch_state.breaks(conn),
            "exports": _rows(conn, ("at", "by", "file"), _EXPORTS),
            "settings": {
                "kafka.retention": format_duration(settings.kafka.retention),
                "audit.retention_months": settings.audit.retention_months,
                "audit.online_months": settings.audit.online_months,
                "audit.archive.bucket": settings.audit.archive.bucket,
                "audit.archive.lock_mode": settings.audit.archive.lock_mode,
                "audit.leaf_retention": format_duration(settings.audit.leaf_retention),
                "audit.checkpoint_every": format_duration(settings.audit.checkpoint_every),
            },
        }


def _rows(conn: Connection, columns: Sequence[str], query: str) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in conn.execute(query.encode())]


def topics(settings: Settings, kafka: Brokers) -> set[str]:
    """Names of the topics of this cluster that this principal may see."""
    from confluent_kafka import KafkaException

    from vsql_shared import names
    from vsql_shared.kafka.clients import from_exception
    from vsql_shared.kafka.topics import TIMEOUT_SECONDS

    client = kafka.client()
    try:
        found = client.list_topics(timeout=TIMEOUT_SECONDS).topics
    except KafkaException as error:
        raise from_exception(error, "list the topics") from error
    ours = names.topic_prefix(f"{names.topic_part(settings.cluster.name)}.")
    return {str(name) for name in found if str(name).startswith(ours)}


def topic(settings: Settings, kafka: Brokers, name: str) -> dict[str, Any]:
    """A topic as the brokers keep it. Nothing here has just made one: what is not there is not waited for."""
    from vsql_shared.kafka.topics import describe_topic

    config, partitions = describe_topic(kafka.client(), name, settings, appear_seconds=0)
    keys = ("cleanup.policy", "retention.ms", "retention.bytes", "min.insync.replicas")
    return {"topic": name, "partitions": partitions, **{key: config.get(key) for key in keys}}
