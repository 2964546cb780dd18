-- Nodes, the operators' log, and the tables of later features. Runs first; makes the schema.
--
-- Rules of all numbered files: names are schema-qualified, functions pin their search_path, no role is
-- named (roles belong to the server, not to the database: vsql_shared/pg/roles.py grants), nothing ends
-- a transaction (each file is one, and also a part of the extension's script).
-- TEXT node columns hold node names.

CREATE SCHEMA vsql_sync;
COMMENT ON SCHEMA vsql_sync IS 'vsql-sync: state of this node; never replicated';

-- Which numbered files this database has. Written by the installer, or by the extension's script.
CREATE TABLE vsql_sync.schema_version (
    version       INTEGER PRIMARY KEY CHECK (version > 0),
    name          TEXT NOT NULL,
    checksum      TEXT NOT NULL,                        -- SHA-256 of the file, hex
    applied_at    TIMESTAMPTZ NOT NULL DEFAULT now(),
    applied_by    TEXT NOT NULL DEFAULT session_user
);

-- The nodes this node knows, itself included. node_id and node_name are the same text; `number` is the
-- numeric id of the configuration (cluster.node_id).
CREATE TABLE vsql_sync.nodes (
    node_id           TEXT PRIMARY KEY CHECK (node_id ~ '^[a-z][a-z0-9-]{0,30}$'),
    node_name         TEXT NOT NULL CHECK (node_name = node_id),
    number            INTEGER NOT NULL UNIQUE CHECK (number BETWEEN 1 AND 1023),
    is_local          BOOLEAN NOT NULL DEFAULT false,
    cluster           TEXT NOT NULL,
    host              TEXT NOT NULL,
    port              INTEGER NOT NULL DEFAULT 5432,
    priority          INTEGER NOT NULL DEFAULT 50,
    is_coordinator    BOOLEAN NOT NULL DEFAULT false,
    last_seen         TIMESTAMPTZ,
    status            TEXT NOT NULL DEFAULT 'unknown'
                      CHECK (status IN ('unknown', 'healthy', 'degraded', 'unreachable', 'offline')),
    init_state        TEXT NOT NULL DEFAULT 'UNINITIALIZED'
                      CHECK (init_state IN ('UNINITIALIZED', 'PREPARING', 'COPYING', 'CATCHING_UP', 'SYNCHRONIZED',
                                            'DIVERGED', 'FAILED', 'REINITIALIZING')),
    init_reason       TEXT,
    init_changed_at   TIMESTAMPTZ NOT NULL DEFAULT now(),
    mode              TEXT NOT NULL DEFAULT 'uni-directional' CHECK (mode IN ('uni-directional', 'bidirectional')),
    region            TEXT,
    public_key        BYTEA CHECK (octet_length(public_key) = 32),
    key_fingerprint   TEXT,
    system_identifier TEXT,
    created_at        TIMESTAMPTZ NOT NULL DEFAULT now(),
    CHECK ((public_key IS NULL) = (key_fingerprint IS NULL))
);
-- A database is one node.
CREATE UNIQUE INDEX nodes_one_local ON vsql_sync.nodes (is_local) WHERE is_local;

CREATE TABLE vsql_sync.coordinator_state (
    key           TEXT PRIMARY KEY,
    value         JSONB NOT NULL,
    updated_at    TIMESTAMPTZ NOT NULL DEFAULT now()
);

-- What operators did. Rows come through vsql_sync.log_audit(), which fills actor and address itself.
CREATE TABLE vsql_sync.audit_log (
    id            BIGSERIAL PRIMARY KEY,
    occurred_at   TIMESTAMPTZ NOT NULL DEFAULT now(),
    action        TEXT NOT NULL,
    actor         TEXT NOT NULL,
    target_type   TEXT,
    target_id     TEXT,
    old_value     JSONB,
    new_value     JSONB,
    client_ip     INET,
    success       BOOLEAN NOT NULL DEFAULT true,
    error_message TEXT
);
CREATE INDEX audit_log_time ON vsql_sync.audit_log (occurred_at);
CREATE INDEX audit_log_target ON vsql_sync.audit_log (target_type, target_id);

CREATE TABLE vsql_sync.identity_ranges (
    id            BIGSERIAL PRIMARY KEY,
    table_schema  TEXT NOT NULL,
    table_name    TEXT NOT NULL,
    node_id       TEXT NOT NULL REFERENCES vsql_sync.nodes (node_id),
    range_start   BIGINT NOT NULL,
    range_end     BIGINT NOT NULL,
    allocated_at  TIMESTAMPTZ NOT NULL DEFAULT now(),
    status        TEXT NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'exhausted', 'released')),
    CHECK (range_start <= range_end),
    UNIQUE (table_schema, table_name, node_id, range_start)
);

CREATE TABLE vsql_sync.conflict_log (
    id             BIGSERIAL PRIMARY KEY,
    detected_at    TIMESTAMPTZ NOT NULL DEFAULT now(),
    subscription   TEXT NOT NULL,                       -- the chain
    table_schema   TEXT NOT NULL,
    table_name     TEXT NOT NULL,
    conflict_type  TEXT NOT NULL,
    local_tuple    JSONB,
    remote_tuple   JSONB,
    local_origin   TEXT,
    remote_origin  TEXT,
    local_xact_ts  TIMESTAMPTZ,
    remote_xact_ts TIMESTAMPTZ,
    origin_xid     BIGINT,
    resolution     TEXT CHECK (resolution IN ('PENDING', 'APPLIED_REMOTE', 'KEPT_LOCAL', 'MERGED', 'REVERTED')),
    resolved_at    TIMESTAMPTZ,
    resolved_by    TEXT
);
CREATE INDEX conflict_log_time ON vsql_sync.conflict_log (detected_at);
CREATE INDEX conflict_log_pending ON vsql_sync.conflict_log (table_schema, table_name) WHERE resolution = 'PENDING';
CREATE INDEX conflict_log_xid ON vsql_sync.conflict_log (origin_xid);

CREATE TABLE vsql_sync.ddl_queue (
    id               BIGSERIAL PRIMARY KEY,
    captured_at      TIMESTAMPTZ NOT NULL DEFAULT now(),
    origin_node      TEXT NOT NULL,
    ddl_command      TEXT NOT NULL,
    object_type      TEXT NOT NULL,
    object_schema    TEXT,
    object_name      TEXT,
    status           TEXT NOT NULL CHECK (status IN ('PENDING', 'APPROVED', 'APPLIED', 'REJECTED', 'FAILED')),
    pre_fingerprint  TEXT,
    post_fingerprint TEXT,
    applied_at       TIMESTAMPTZ,
    applied_by       TEXT,
    error_message    TEXT
);
CREATE INDEX ddl_queue_pending ON vsql_sync.ddl_queue (id) WHERE status = 'PENDING';

CREATE TABLE vsql_sync.schema_fingerprints (
    table_schema  TEXT NOT NULL,
    table_name    TEXT NOT NULL,
    fingerprint   TEXT NOT NULL,
    column_count  INTEGER NOT NULL,
    captured_at   TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (table_schema, table_name)
);

-- The highest numbered file this database has.
CREATE FUNCTION vsql_sync.version() RETURNS INTEGER
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$ SELECT max(version) FROM vsql_sync.schema_version $$;

-- Name of the node this database is; NULL before `syncctl node init`.
CREATE FUNCTION vsql_sync.local_node() RETURNS TEXT
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$ SELECT node_id FROM vsql_sync.nodes WHERE is_local $$;

-- SHA-256 over a table's columns in their order: name, type with modifier, collation, NOT NULL, identity,
-- generated, default. Fields are length-prefixed, so that no choice of names makes two tables equal that are
-- not; types and defaults are written with their schemas. NULL when there is no such table, so that a missing
-- table never equals one without columns.
CREATE FUNCTION vsql_sync.compute_fingerprint(p_schema TEXT, p_table TEXT) RETURNS TEXT
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT encode(sha256(convert_to(coalesce((
        SELECT string_agg(octet_length(field) || ':' || field, ',' ORDER BY a.attnum, place)
        FROM pg_attribute a
        LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
        LEFT JOIN pg_collation c ON c.oid = a.attcollation
        CROSS JOIN LATERAL unnest(ARRAY[
            a.attname::text,
            format_type(a.atttypid, a.atttypmod),
            coalesce(c.collname::text, ''),
            a.attnotnull::text,
            a.attidentity::text,
            a.attgenerated::text,
            coalesce(pg_get_expr(d.adbin, d.adrelid), '')
        ]) WITH ORDINALITY AS fields (field, place)
        WHERE a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped
    ), ''), 'UTF8')), 'hex')
    FROM pg_class t
    JOIN pg_namespace n ON n.oid = t.relnamespace
    WHERE n.nspname = p_schema AND t.relname = p_table AND t.relkind IN ('r', 'p')
$$;

-- Store a table's fingerprint and return it; a table that is gone is forgotten, and NULL is returned.
CREATE FUNCTION vsql_sync.capture_fingerprint(p_schema TEXT, p_table TEXT) RETURNS TEXT
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_fingerprint TEXT := vsql_sync.compute_fingerprint(p_schema, p_table);
BEGIN
    IF v_fingerprint IS NULL THEN
        DELETE FROM vsql_sync.schema_fingerprints f WHERE f.table_schema = p_schema AND f.table_name = p_table;
        RETURN NULL;
    END IF;
    INSERT INTO vsql_sync.schema_fingerprints AS f (table_schema, table_name, fingerprint, column_count)
    SELECT p_schema, p_table, v_fingerprint, count(*)
    FROM pg_attribute a
    JOIN pg_class t ON t.oid = a.attrelid
    JOIN pg_namespace n ON n.oid = t.relnamespace
    WHERE n.nspname = p_schema AND t.relname = p_table AND a.attnum > 0 AND NOT a.attisdropped
    ON CONFLICT (table_schema, table_name) DO UPDATE
    SET fingerprint = excluded.fingerprint, column_count = excluded.column_count, captured_at = now();
    RETURN v_fingerprint;
END
$$;

-- Write one line of the operators' log. Runs as its owner: the caller cannot choose actor or address.
CREATE FUNCTION vsql_sync.log_audit(
    p_action TEXT, p_target_type TEXT DEFAULT NULL, p_target_id TEXT DEFAULT NULL,
    p_old JSONB DEFAULT NULL, p_new JSONB DEFAULT NULL, p_success BOOLEAN DEFAULT true, p_error TEXT DEFAULT NULL
) RETURNS BIGINT
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
    INSERT INTO vsql_sync.audit_log (action, actor, target_type, target_id, old_value, new_value, client_ip,
                                     success, error_message)
    VALUES (p_action, session_user, p_target_type, p_target_id, p_old, p_new, inet_client_addr(), p_success, p_error)
    RETURNING id
$$;
REVOKE EXECUTE ON FUNCTION vsql_sync.log_audit(TEXT, TEXT, TEXT, JSONB, JSONB, BOOLEAN, TEXT) FROM PUBLIC;

-- The operators' log only grows.
CREATE FUNCTION vsql_sync.refuse_change() RETURNS TRIGGER
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RAISE EXCEPTION '% of %.% is refused: the table is append-only', TG_OP, TG_TABLE_SCHEMA, TG_TABLE_NAME
        USING ERRCODE = 'insufficient_privilege';
END
$$;
CREATE TRIGGER audit_log_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON vsql_sync.audit_log
    FOR EACH STATEMENT EXECUTE FUNCTION vsql_sync.refuse_change();
-- Also in sessions with session_replication_role = replica, which the consumer's are.
ALTER TABLE vsql_sync.audit_log ENABLE ALWAYS TRIGGER audit_log_append_only;
