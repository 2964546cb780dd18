"""Everything the catalog says of schema vsql_sync, as text, so that two databases can be compared.

Left out: oids, and the monthly partitions of the trail, which are made when they are needed.
"""

from __future__ import annotations

from vsql_shared.pg.connect import Connection

_RELATIONS = (
    "SELECT c.oid, c.relname, c.relkind::text || c.relpersistence::text || coalesce(c.relacl::text, '')"
    " || coalesce(c.reloptions::text, '') || coalesce(obj_description(c.oid, 'pg_class'), '')"
    " FROM pg_class c WHERE c.relnamespace = 'vsql_sync'::regnamespace"
    " AND c.relname !~ '^vsql_sync_audit_p\\d{6}' ORDER BY c.relname"
)
_PARTS = {
    "column": "SELECT attname || ' ' || format_type(atttypid, atttypmod)"
    " || attnotnull || attidentity::text"
    " || attgenerated::text || coalesce(pg_get_expr(adbin, adrelid), '') || coalesce(attacl::text, '')"
    " FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum"
    " WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
    "constraint": "SELECT conname || ' ' || pg_get_constraintdef(oid) FROM pg_constraint"
    " WHERE conrelid = %s ORDER BY 1",
    "index": "SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = %s ORDER BY 1",
    "trigger": "SELECT tgenabled::text || pg_get_triggerdef(oid) FROM pg_trigger"
    " WHERE tgrelid = %s AND NOT tgisinternal ORDER BY 1",
    "rule": "SELECT ev_enabled::text || pg_get_ruledef(oid) FROM pg_rewrite WHERE ev_class = %s ORDER BY 1",
}
_FUNCTIONS = (
    "SELECT pg_get_functiondef(oid) || coalesce(proacl::text, '') FROM pg_proc"
    " WHERE pronamespace = 'vsql_sync'::regnamespace ORDER BY oid::regprocedure::text"
)


def describe(conn: Connection) -> list[str]:
    """One line per thing."""
    lines = []
    for oid, name, text in conn.execute(_RELATIONS).fetchall():
        lines.append(f"{name}: {text}")
        for kind, query in _PARTS.items():
            lines += [f"{name} {kind}: {row[0]}" for row in conn.execute(query.encode(), (oid,))]
    lines += [row[0] for row in conn.execute(_FUNCTIONS)]
    lines += [
        str(row)
        for row in conn.execute("SELECT version, name, checksum FROM vsql_sync.schema_version ORDER BY 1")
    ]
    return lines
