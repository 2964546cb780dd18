-- Retention of the audit trail: what was archived, what targets cosigned, and where a pruned chain begins.

-- Tree heads of this node's chains that other nodes cosigned: a segment ends at one.
CREATE TABLE vsql_sync.audit_cosigned (
    chain           TEXT NOT NULL,
    size            BIGINT NOT NULL CHECK (size > 0),
    node            TEXT NOT NULL,
    note            TEXT NOT NULL,                      -- the checkpoint with that node's cosignature
    noted_at        TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (chain, size, node)
);

-- Segments that lie in the archive, each read back and verified before its row was written.
CREATE TABLE vsql_sync.audit_segments (
    chain           TEXT NOT NULL,
    first_sequence  BIGINT NOT NULL,
    last_sequence   BIGINT NOT NULL CHECK (last_sequence >= first_sequence),
    bucket          TEXT NOT NULL,
    object_key      TEXT NOT NULL,
    object_version  TEXT NOT NULL,
    sha256          BYTEA NOT NULL CHECK (octet_length(sha256) = 32),
    bytes           BIGINT NOT NULL,
    retain_until    TIMESTAMPTZ NOT NULL,
    head            TEXT NOT NULL,                      -- the chain's head behind the last entry, as JSON
    note            TEXT NOT NULL,                      -- its checkpoint, signed and cosigned
    verified_at     TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (chain, first_sequence)
);

-- A segment begins with the first entry, or right behind another, and shares entries with none. Rows stay for good:
-- one that overlaps, or leaves a gap, would keep the chain from ever being pruned behind it.
CREATE FUNCTION vsql_sync.require_adjoining() RETURNS TRIGGER
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF (NEW.first_sequence <> 1 AND NOT EXISTS (
            SELECT FROM vsql_sync.audit_segments s
            WHERE s.chain = NEW.chain AND s.last_sequence = NEW.first_sequence - 1))
        OR EXISTS (
            SELECT FROM vsql_sync.audit_segments s
            WHERE s.chain = NEW.chain AND s.first_sequence <= NEW.last_sequence
              AND s.last_sequence >= NEW.first_sequence)
    THEN
        RAISE EXCEPTION 'chain %: a segment of entries % to % does not adjoin those that are noted',
            NEW.chain, NEW.first_sequence, NEW.last_sequence USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER adjoining BEFORE INSERT ON vsql_sync.audit_segments
    FOR EACH ROW EXECUTE FUNCTION vsql_sync.require_adjoining();
ALTER TABLE vsql_sync.audit_segments ENABLE ALWAYS TRIGGER adjoining;

-- Where a pruned chain begins: a row with each signed entry `trail_pruned` of it, in the same transaction.
CREATE TABLE vsql_sync.audit_bases (
    chain           TEXT NOT NULL,
    size            BIGINT NOT NULL CHECK (size > 0),   -- entries up to here may be gone
    base            TEXT NOT NULL,                      -- head, tree and cosigned checkpoint, as JSON
    noted_at        TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (chain, size)
);

-- Signed entries below a base that other tables are held against: acts, skips, what was destroyed.
CREATE TABLE vsql_sync.audit_kept (
    chain           TEXT NOT NULL,
    sequence        BIGINT NOT NULL,
    event_type      TEXT NOT NULL,
    source_node_id  TEXT NOT NULL,
    document        BYTEA NOT NULL,
    PRIMARY KEY (chain, sequence)
);
CREATE INDEX audit_kept_event ON vsql_sync.audit_kept (event_type);
SELECT vsql_sync.make_append_only('vsql_sync.audit_bases');
SELECT vsql_sync.make_append_only('vsql_sync.audit_segments');
SELECT vsql_sync.make_append_only('vsql_sync.audit_kept');

-- Signed entries this node has, on-line or kept.
CREATE VIEW vsql_sync.audit_documents AS
SELECT chain, sequence, event_type, source_node_id, document FROM vsql_sync.vsql_sync_audit
UNION ALL
SELECT chain, sequence, event_type, source_node_id, document FROM vsql_sync.audit_kept;

-- What may be deleted from the trail: entries up to a base that the chain says (audit_bases gets its row with
-- that entry), by the table's owner, as whom prune_audit runs. Rows are locked, and no table: all others go on.
-- A partition named directly keeps its own rule, without exception.
CREATE OR REPLACE RULE no_delete AS ON DELETE TO vsql_sync.vsql_sync_audit
    WHERE NOT EXISTS (
        SELECT FROM vsql_sync.audit_bases b
        JOIN pg_catalog.pg_class c ON c.oid = 'vsql_sync.vsql_sync_audit'::pg_catalog.regclass
        WHERE b.chain = OLD.chain AND b.size >= OLD.sequence
          AND pg_catalog.pg_get_userbyid(c.relowner) = current_user)
    DO INSTEAD NOTHING;
ALTER TABLE vsql_sync.vsql_sync_audit ENABLE ALWAYS RULE no_delete;

-- How many entries of a chain the archive's segments cover from the first one on, without a gap or an overlap.
CREATE FUNCTION vsql_sync.archived_entries(p_chain TEXT, p_size BIGINT) RETURNS BIGINT
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE WHEN bool_and(first_sequence = due) THEN max(last_sequence) ELSE 0 END FROM (
        SELECT first_sequence, last_sequence,
            lag(last_sequence, 1, 0::bigint) OVER (ORDER BY first_sequence) + 1 AS due
        FROM vsql_sync.audit_segments WHERE chain = p_chain AND last_sequence <= p_size) s
$$;

-- Delete the rows of a chain up to the base its signed entry names; returns how many. All of it or nothing.
-- Entries that bring a batch or open an epoch go, the others are kept apart.
CREATE FUNCTION vsql_sync.prune_audit(p_chain TEXT, p_size BIGINT) RETURNS BIGINT
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC'
    SET lock_timeout = '2s'
AS $$
DECLARE
    v_deleted BIGINT;
    v_covered BIGINT := coalesce(vsql_sync.archived_entries(p_chain, p_size), 0);
BEGIN
    IF NOT EXISTS (SELECT FROM vsql_sync.audit_bases WHERE chain = p_chain AND size = p_size) THEN
        RAISE EXCEPTION 'chain % was not pruned at %: no signed entry says so', p_chain, p_size
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    -- Every entry lies in a segment that was read back.
    IF v_covered <> p_size THEN
        RAISE EXCEPTION 'chain %: segments in the archive cover % of % entries', p_chain, v_covered, p_size
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    INSERT INTO vsql_sync.audit_kept (chain, sequence, event_type, source_node_id, document)
        SELECT chain, sequence, event_type, source_node_id, document FROM vsql_sync.vsql_sync_audit
        WHERE chain = p_chain AND sequence <= p_size AND event_type NOT IN
            ('replication_batch', 'batch_applied', 'epoch_opened', 'checkpoint_cosigned');
    DELETE FROM vsql_sync.vsql_sync_audit WHERE chain = p_chain AND sequence <= p_size;
    GET DIAGNOSTICS v_deleted = ROW_COUNT;
    IF EXISTS (SELECT FROM vsql_sync.vsql_sync_audit WHERE chain = p_chain AND sequence <= p_size) THEN
        RAISE EXCEPTION 'chain %: entries up to % are left: who owns prune_audit must own the table, too', p_chain, p_size
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    RETURN v_deleted;
END
$$;
REVOKE EXECUTE ON FUNCTION vsql_sync.prune_audit(TEXT, BIGINT) FROM PUBLIC;

-- Drop partitions of months that are over and have no row left; returns how many.
CREATE FUNCTION vsql_sync.drop_empty_audit_partitions() RETURNS INTEGER
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC'
    SET lock_timeout = '2s'
AS $$
DECLARE
    v_name  TEXT;
    v_found BOOLEAN;
    v_count INTEGER := 0;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('vsql_sync.ensure_audit_partition', 0));
    FOR v_name IN
        SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'vsql_sync.vsql_sync_audit'::regclass
          AND c.relname ~ '^vsql_sync_audit_p[0-9]{6}$'
          AND to_date(right(c.relname, 6), 'YYYYMM') < date_trunc('month', now()) - INTERVAL '1 month'
        ORDER BY 1
    LOOP
        EXECUTE format('SELECT EXISTS (SELECT FROM vsql_sync.%I)', v_name) INTO v_found;
        CONTINUE WHEN v_found;
        -- Whoever writes an entry dated back into it comes before this lock, and is seen, or after the drop.
        EXECUTE format('LOCK TABLE vsql_sync.%I IN ACCESS EXCLUSIVE MODE', v_name);
        EXECUTE format('SELECT EXISTS (SELECT FROM vsql_sync.%I)', v_name) INTO v_found;
        CONTINUE WHEN v_found;
        EXECUTE format('DROP TABLE vsql_sync.%I', v_name);
        v_count := v_count + 1;
    END LOOP;
    RETURN v_count;
END
$$;
REVOKE EXECUTE ON FUNCTION vsql_sync.drop_empty_audit_partitions() FROM PUBLIC;
