-- The signed audit trail and the heads of chains this node has seen. Runs after 001.
--
-- A row is one signed document and its fields in columns; the document is what counts, `syncctl audit verify`
-- compares the columns with it. Not covered by the signature: kafka_offset and written_at.

CREATE TABLE vsql_sync.vsql_sync_audit (
    event_id          UUID NOT NULL DEFAULT gen_random_uuid(),
    event_type        TEXT NOT NULL,                    -- replication_batch, epoch_opened, batch_applied, …
    event_timestamp   TIMESTAMPTZ NOT NULL DEFAULT now(),
    source_node_id    TEXT NOT NULL,
    target_node_id    TEXT NOT NULL,                    -- '*' in manifests
    batch_lsn_start   PG_LSN NOT NULL,
    batch_lsn_end     PG_LSN NOT NULL,
    tables_affected   TEXT[] NOT NULL,
    row_count         BIGINT NOT NULL,
    contains_pci      BOOLEAN NOT NULL,                 -- were any PCI-scoped columns included?
    pci_columns       TEXT[],
    dek_id            TEXT,                             -- which DEK encrypted this batch; NULL without a batch
    kek_id            TEXT,                             -- which KEK wrapped the DEK
    algorithm         TEXT DEFAULT 'AES-256-GCM',
    merkle_root       BYTEA NOT NULL,                   -- over all sealed tuples of the batch
    prev_event_hash   BYTEA,                            -- SHA-256 of the previous document; zeros for the first
    signer_node_id    TEXT NOT NULL,
    signature         BYTEA NOT NULL,                   -- Ed25519 over the document; empty when unsigned (dev)
    chain             TEXT NOT NULL,
    epoch             BIGINT NOT NULL,
    incarnation       UUID NOT NULL,
    sequence          BIGINT NOT NULL,                  -- without a gap from 1 in each chain
    batch             BIGINT NOT NULL,
    signer_key        TEXT NOT NULL,                    -- fingerprint of the signing key
    document          BYTEA NOT NULL,                   -- the SignedDocument, byte by byte as in Kafka
    kafka_offset      BIGINT,
    written_at        TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (event_id, event_timestamp)
) PARTITION BY RANGE (event_timestamp);
COMMENT ON TABLE vsql_sync.vsql_sync_audit IS 'vsql-sync: signed, hash-chained audit trail; append-only';
CREATE INDEX vsql_sync_audit_chain ON vsql_sync.vsql_sync_audit (chain, sequence);
CREATE INDEX vsql_sync_audit_time ON vsql_sync.vsql_sync_audit (event_timestamp);

-- Months nobody prepared land here, so that no insert ever fails.
CREATE TABLE vsql_sync.vsql_sync_audit_default PARTITION OF vsql_sync.vsql_sync_audit DEFAULT;

-- Make a table of the trail append-only. Rules and trigger are ALWAYS ones: they also hold in sessions with
-- session_replication_role = replica, which the consumer's are.
CREATE FUNCTION vsql_sync.make_append_only(p_table REGCLASS) RETURNS VOID
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    EXECUTE format('CREATE RULE no_update AS ON UPDATE TO %s DO INSTEAD NOTHING', p_table);
    EXECUTE format('CREATE RULE no_delete AS ON DELETE TO %s DO INSTEAD NOTHING', p_table);
    EXECUTE format('ALTER TABLE %s ENABLE ALWAYS RULE no_update', p_table);
    EXECUTE format('ALTER TABLE %s ENABLE ALWAYS RULE no_delete', p_table);
    EXECUTE format('CREATE TRIGGER no_truncate BEFORE TRUNCATE ON %s'
                   ' FOR EACH STATEMENT EXECUTE FUNCTION vsql_sync.refuse_change()', p_table);
    EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER no_truncate', p_table);
END
$$;
REVOKE EXECUTE ON FUNCTION vsql_sync.make_append_only(REGCLASS) FROM PUBLIC;

SELECT vsql_sync.make_append_only('vsql_sync.vsql_sync_audit');
SELECT vsql_sync.make_append_only('vsql_sync.vsql_sync_audit_default');

-- Make the partition of the month (UTC) in which p_at lies, and return its name. NULL when the default
-- partition already holds entries of that month: they stay there, because nothing moves an entry.
-- Runs as its owner: services may call it and own nothing. Attaching takes no lock that stops inserts.
CREATE FUNCTION vsql_sync.ensure_audit_partition(p_at TIMESTAMPTZ) RETURNS TEXT
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC'
AS $$
DECLARE
    v_from TIMESTAMPTZ := date_trunc('month', p_at, 'UTC');
    v_to   TIMESTAMPTZ := v_from + INTERVAL '1 month';
    v_name TEXT := 'vsql_sync_audit_p' || to_char(v_from, 'YYYYMM');
    v_part TEXT := format('vsql_sync.%I', v_name);
BEGIN
    IF p_at IS NULL OR p_at NOT BETWEEN now() - INTERVAL '1 year' AND now() + INTERVAL '1 year' THEN
        RAISE EXCEPTION 'no audit partition for %: more than a year from now', p_at
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    -- Two services at once: one makes it, the other finds it.
    PERFORM pg_advisory_xact_lock(hashtextextended('vsql_sync.ensure_audit_partition', 0));
    IF to_regclass(v_part) IS NOT NULL THEN
        RETURN v_name;
    END IF;
    IF EXISTS (SELECT FROM vsql_sync.vsql_sync_audit_default
               WHERE event_timestamp >= v_from AND event_timestamp < v_to) THEN
        RETURN NULL;
    END IF;
    EXECUTE format('CREATE TABLE %s (LIKE vsql_sync.vsql_sync_audit INCLUDING DEFAULTS)', v_part);
    PERFORM vsql_sync.make_append_only(v_part::regclass);
    EXECUTE format('ALTER TABLE vsql_sync.vsql_sync_audit ATTACH PARTITION %s FOR VALUES FROM (%L) TO (%L)',
                   v_part, v_from, v_to);
    RETURN v_name;
END
$$;
REVOKE EXECUTE ON FUNCTION vsql_sync.ensure_audit_partition(TIMESTAMPTZ) FROM PUBLIC;

SELECT vsql_sync.ensure_audit_partition(now()), vsql_sync.ensure_audit_partition(now() + INTERVAL '1 month');

-- The highest head this node has verified of each chain: its own ones and its peers'. A trail that was cut at
-- its end is caught by these rows, here or on the peer. The columns are a whole ChainHead, so that a reader
-- can go on from it.
CREATE TABLE vsql_sync.chain_heads (
    chain             TEXT PRIMARY KEY,
    own               BOOLEAN NOT NULL,                 -- true: the chain's entries are in this node's trail
    epoch             BIGINT NOT NULL,
    incarnation       UUID NOT NULL,
    sequence          BIGINT NOT NULL,
    entry_hash        BYTEA NOT NULL CHECK (octet_length(entry_hash) = 32),
    batch             BIGINT NOT NULL,
    lsn_end           PG_LSN NOT NULL,
    unfinished_from   BIGINT NOT NULL,                  -- first fragment of a transaction under way, or 0
    event_timestamp   TIMESTAMPTZ NOT NULL,
    system_identifier TEXT NOT NULL,
    timeline          INTEGER NOT NULL,
    kafka_offset      BIGINT,
    remembered_at     TIMESTAMPTZ NOT NULL DEFAULT now()
) WITH (fillfactor = 50);                               -- updated with every group of entries: stay HOT
