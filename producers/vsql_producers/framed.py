"""The frame before packs: asked for at a schema registry, and remembered in this node's database.

Not here: the questions (vsql_shared/kafka/schema_registry.py). Rules:

* A restart does not need the registry: where it does not answer, the id it gave before for this address,
  subject and schema stands. An id is never given to another schema.
* A registry that answers and refuses is obeyed. The first start needs its answer: no pack goes out bare where
  a registry is configured.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable

from vsql_shared.config.schema_registry import SchemaRegistrySettings
from vsql_shared.errors import TransientError
from vsql_shared.pg.connect import Connection, errors

_log = logging.getLogger(__name__)


def frame_of_packs(
    settings: SchemaRegistrySettings, conn: Connection, wait: Callable[[float], None]
) -> bytes:
    """What stands before each pack; nothing where no registry is configured.

    `wait` is called before each question and in each pause. Raises ConfigError (a secret's source),
    RegistryError, TransientError.
    """
    if settings.url is None:
        return b""
    # Whoever has no registry loads nothing that speaks to one.
    from vsql_shared.kafka.schema_registry import SchemaRegistry, pack_schema
    from vsql_shared.wire.framing import frame

    text = pack_schema()
    key = (settings.url, settings.subject, hashlib.sha256(text.encode()).digest())
    try:
        found = SchemaRegistry(settings, wait).id_of(text)
    except TransientError as error:
        remembered = _remembered(conn, key)
        if remembered is None:
            raise
        _log.warning("%s; packs carry id %d, which it gave before", error.message, remembered)
        return frame(remembered)
    with errors("remembering the schema's id"):
        conn.execute(
            "INSERT INTO vsql_sync.registry_ids (url, subject, schema_hash, id) VALUES (%s, %s, %s, %s)"
            " ON CONFLICT (url, subject, schema_hash) DO UPDATE SET id = excluded.id, answered_at = now()",
            (*key, found),
        )
    _log.info("packs carry id %d, of subject %s at %s", found, settings.subject, settings.url)
    return frame(found)


def _remembered(conn: Connection, key: tuple[str, str, bytes]) -> int | None:
    with errors("looking for the schema's id"):
        row = conn.execute(
            "SELECT id FROM vsql_sync.registry_ids WHERE url = %s AND subject = %s AND schema_hash = %s", key
        ).fetchone()
    return None if row is None else int(row[0])
