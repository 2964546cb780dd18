-- Tables that every node writes: what their deleted rows leave behind, and how far a batch is that is applied
-- transaction by transaction. Tombstones of a table are a table of their own (docs/design/0022).

CREATE TABLE vsql_sync.multi_writer_tables (
    table_schema  TEXT NOT NULL,
    table_name    TEXT NOT NULL,
    publication   TEXT NOT NULL,
    tombstones    TEXT NOT NULL,                        -- name of the table of tombstones in vsql_sync
    key_columns   TEXT[] NOT NULL,
    strategy      TEXT NOT NULL DEFAULT 'last_write_wins'
                  CHECK (strategy IN ('last_write_wins', 'first_write_wins', 'node_priority',
                                      'keep_local', 'apply_remote', 'manual')),
    -- Whether clients may write it here: not before our own slot is there, and the first copy is done.
    writable      BOOLEAN NOT NULL DEFAULT false,
    PRIMARY KEY (table_schema, table_name)
);

-- Numbers of tables of tombstones: an OID may be another table's after a restore.
CREATE SEQUENCE vsql_sync.tombstones_number;

-- By what time all transactions below an id had ended: the most a row may be of whose commit nobody knows the
-- time any more. Written when a peer is added and once an hour.
CREATE TABLE vsql_sync.horizons (
    below              XID8 PRIMARY KEY,
    at                 TIMESTAMPTZ NOT NULL,
    system_identifier  BIGINT NOT NULL
);

CREATE FUNCTION vsql_sync.note_horizon() RETURNS void
    LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    INSERT INTO vsql_sync.horizons (below, at, system_identifier)
    SELECT pg_snapshot_xmin(pg_current_snapshot()), clock_timestamp(), system_identifier
      FROM pg_control_system()
    ON CONFLICT (below) DO NOTHING
$$;

-- The batch after apply_progress, as far as its transactions were committed.
CREATE TABLE vsql_sync.partial_batches (
    chain         TEXT PRIMARY KEY,
    sequence      BIGINT NOT NULL,
    entry_hash    BYTEA NOT NULL CHECK (octet_length(entry_hash) = 32),
    transactions  INTEGER NOT NULL CHECK (transactions > 0),
    verdicts      JSONB NOT NULL
);

-- Where the target's commit of the acknowledged batch ends in its own WAL.
ALTER TABLE vsql_sync.stream_targets ADD COLUMN acked_target_lsn PG_LSN;

-- Up to where tombstones may go, once both ways are past it (docs/design/0022): what had ended here, our WAL behind
-- it, and, once the peer has applied all of that, the peer's WAL behind that.
CREATE TABLE vsql_sync.purge_marks (
    publication  TEXT PRIMARY KEY,
    below        XID8 NOT NULL,
    lsn          PG_LSN NOT NULL,
    peer_lsn     PG_LSN,
    noted_at     TIMESTAMPTZ NOT NULL DEFAULT now()
);

-- Fires for what is deleted here, not for what is applied: the applier writes its own tombstones.
-- Arguments: the table of tombstones, then the key's columns.
CREATE FUNCTION vsql_sync.keep_tombstones() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_columns TEXT;
BEGIN
    SELECT string_agg(quote_ident(name), ', ' ORDER BY place) INTO v_columns
      FROM unnest(TG_ARGV[1:]) WITH ORDINALITY AS key (name, place);
    IF TG_LEVEL = 'STATEMENT' THEN
        EXECUTE format('INSERT INTO vsql_sync.%1$I (%2$s) SELECT %2$s FROM gone'
                       ' ON CONFLICT (%2$s) DO UPDATE SET %3$I = excluded.%3$I',
                       TG_ARGV[0], v_columns, TG_ARGV[1]);
        RETURN NULL;
    END IF;
    EXECUTE format('INSERT INTO vsql_sync.%1$I (%2$s) SELECT %3$s'
                   ' ON CONFLICT (%2$s) DO UPDATE SET %4$I = excluded.%4$I',
                   TG_ARGV[0], v_columns,
                   (SELECT string_agg('($1).' || quote_ident(name), ', ' ORDER BY place)
                      FROM unnest(TG_ARGV[1:]) WITH ORDINALITY AS key (name, place)),
                   TG_ARGV[1])
      USING OLD;
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION vsql_sync.keep_tombstones() FROM PUBLIC;

-- BEFORE INSERT, UPDATE or DELETE, per statement: refuses until the table is open.
CREATE FUNCTION vsql_sync.require_writable() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF EXISTS (SELECT FROM vsql_sync.multi_writer_tables m
                WHERE (m.table_schema, m.table_name) = (TG_TABLE_SCHEMA, TG_TABLE_NAME) AND NOT m.writable) THEN
        RAISE object_not_in_prerequisite_state USING
            MESSAGE = format('table %I.%I is not open for writing yet on this node', TG_TABLE_SCHEMA, TG_TABLE_NAME),
            HINT = 'It opens by itself once its streams are started on this node and the first copy is done: '
                   'see syncctl status.';
    END IF;
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION vsql_sync.require_writable() FROM PUBLIC;

CREATE FUNCTION vsql_sync.refuse_truncate() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE feature_not_supported USING
        MESSAGE = format('table %I.%I is written by every node, and cannot be truncated', TG_TABLE_SCHEMA,
                         TG_TABLE_NAME),
        HINT = 'DELETE FROM it: rows that other nodes write meanwhile stay.';
END
$$;

-- Why a table cannot be one that every node writes; nothing where it can.
CREATE FUNCTION vsql_sync.unfit_for_many(p_table OID) RETURNS SETOF TEXT
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT 'is partitioned, a partition, or has parents or children; not built yet for tables that every node writes'
      FROM pg_class c WHERE c.oid = p_table
       AND (c.relkind <> 'r' OR EXISTS (SELECT FROM pg_inherits h WHERE p_table IN (h.inhrelid, h.inhparent)))
    UNION ALL
    SELECT 'has no primary key'
     WHERE NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = p_table AND i.indisprimary)
    UNION ALL
    SELECT format('its primary key %s is deferrable', i.indexrelid::regclass)
      FROM pg_index i WHERE i.indrelid = p_table AND i.indisprimary AND NOT i.indimmediate
    UNION ALL
    SELECT format('rows of two nodes could collide in %s: only the primary key may be unique, and nothing be excluded',
                  string_agg(quote_ident(c.relname), ', ' ORDER BY c.relname))
      FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
     WHERE i.indrelid = p_table AND NOT i.indisprimary AND (i.indisunique OR i.indisexclusion)
    HAVING count(*) > 0
    UNION ALL
    SELECT format('a change must bring the whole row; ALTER TABLE %s REPLICA IDENTITY FULL', c.oid::regclass)
      FROM pg_class c WHERE c.oid = p_table AND c.relkind = 'r' AND c.relreplident <> 'f'
    UNION ALL
    SELECT format('triggers that fire for replicated changes would make rows differ: %s',
                  string_agg(quote_ident(t.tgname), ', ' ORDER BY t.tgname))
      FROM pg_trigger t WHERE t.tgrelid = p_table AND t.tgenabled IN ('A', 'R') AND NOT t.tgisinternal
    HAVING count(*) > 0
$$;

-- Tables that every node writes and that have become unfit, or other than they were when they became so.
CREATE FUNCTION vsql_sync.unfit_tables() RETURNS TABLE (name TEXT, publication TEXT, why TEXT)
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH known AS (
        SELECT m.*, c.oid, b.oid AS buried
          FROM vsql_sync.multi_writer_tables m
          JOIN pg_namespace n ON n.nspname = m.table_schema
          JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = m.table_name
          LEFT JOIN pg_class b ON b.relname = m.tombstones AND b.relnamespace = 'vsql_sync'::regnamespace
    )
    SELECT format('%I.%I', k.table_schema, k.table_name), k.publication, u
      FROM known k, vsql_sync.unfit_for_many(k.oid) u
    UNION ALL
    SELECT format('%I.%I', k.table_schema, k.table_name), k.publication,
           format('what trigger %I is for would be lost without a trace while it is switched off', t.tgname)
      FROM known k JOIN pg_trigger t ON t.tgrelid = k.oid
     WHERE t.tgenabled = 'D'
       AND t.tgname IN ('vsql_sync_deleted', 'vsql_sync_moved', 'vsql_sync_truncate', 'vsql_sync_writable')
    UNION ALL
    SELECT format('%I.%I', k.table_schema, k.table_name), k.publication,
           'its primary key is not the one its tombstones have; give it back the columns and types it had'
      FROM known k
     WHERE (SELECT array_agg((a.attname, a.atttypid, a.atttypmod, a.attcollation)::text ORDER BY p.place)
              FROM pg_index i, unnest(i.indkey::int2[]) WITH ORDINALITY p (attnum, place), pg_attribute a
             WHERE i.indrelid = k.oid AND i.indisprimary AND p.place <= i.indnkeyatts
               AND a.attrelid = k.oid AND a.attnum = p.attnum)
           IS DISTINCT FROM
           (SELECT array_agg((a.attname, a.atttypid, a.atttypmod, a.attcollation)::text ORDER BY p.place)
              FROM unnest(k.key_columns) WITH ORDINALITY p (column_name, place), pg_attribute a
             WHERE a.attrelid = k.buried AND a.attname = p.column_name AND NOT a.attisdropped)
$$;

-- Those of which PostgreSQL's publication does not send every change, or not whole.
CREATE FUNCTION vsql_sync.unsent_tables() RETURNS TABLE (name TEXT, publication TEXT, why TEXT)
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT format('%I.%I', m.table_schema, m.table_name), m.publication,
           CASE WHEN r.prrelid IS NULL THEN format('it is not in publication %I any more', m.publication)
                ELSE format('publication %I lists columns of it, filters its rows or leaves out what is done to it',
                            m.publication) END
      FROM vsql_sync.multi_writer_tables m
      JOIN pg_namespace n ON n.nspname = m.table_schema
      JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = m.table_name
      LEFT JOIN pg_publication p ON p.pubname = m.publication
      LEFT JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = c.oid
     WHERE r.prrelid IS NULL OR r.prattrs IS NOT NULL OR r.prqual IS NOT NULL
        OR NOT (p.pubinsert AND p.pubupdate AND p.pubdelete)
$$;

-- Refuses what the command at hand has made of a table. What was so before, or elsewhere, stands in the way of no
-- other command: the start of the stream says it.
CREATE FUNCTION vsql_sync.guard_definitions() RETURNS event_trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_touched OID[];
    v_found   RECORD;
BEGIN
    IF TG_EVENT = 'table_rewrite' THEN
        SELECT format('%I.%I', m.table_schema, m.table_name) AS name,
               'all its rows would get this node''s time and win over what other nodes wrote' AS why INTO v_found
          FROM vsql_sync.multi_writer_tables m
          JOIN pg_namespace n ON n.nspname = m.table_schema
          JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = m.table_name
         WHERE c.oid = pg_event_trigger_table_rewrite_oid();
    ELSIF TG_TAG = 'ALTER PUBLICATION' THEN
        SELECT array_agg(coalesce(r.prpubid, d.objid)) INTO v_touched
          FROM pg_event_trigger_ddl_commands() d
          LEFT JOIN pg_publication_rel r ON d.classid = 'pg_publication_rel'::regclass AND r.oid = d.objid;
        -- What DROP TABLE takes out of a publication is no command of its own: all of them are looked at then.
        SELECT u.name, u.why INTO v_found
          FROM vsql_sync.unsent_tables() u LEFT JOIN pg_publication p ON p.pubname = u.publication
         WHERE CASE WHEN p.oid IS NULL THEN EXISTS (
                        SELECT FROM pg_publication_rel r
                         WHERE r.prpubid = ANY (v_touched) AND r.prrelid = u.name::regclass::oid)
                    ELSE v_touched IS NULL OR p.oid = ANY (v_touched) END
         LIMIT 1;
    ELSE
        SELECT array_agg(coalesce(i.indrelid, t.tgrelid, d.objid)) INTO v_touched
          FROM pg_event_trigger_ddl_commands() d
          LEFT JOIN pg_index i ON d.classid = 'pg_class'::regclass AND i.indexrelid = d.objid
          LEFT JOIN pg_trigger t ON d.classid = 'pg_trigger'::regclass AND t.oid = d.objid;
        SELECT u.name, u.why INTO v_found
          FROM vsql_sync.unfit_tables() u
         WHERE u.name::regclass::oid = ANY (v_touched)
            OR EXISTS (SELECT FROM pg_inherits h
                        WHERE (h.inhrelid = u.name::regclass::oid AND h.inhparent = ANY (v_touched))
                           OR (h.inhparent = u.name::regclass::oid AND h.inhrelid = ANY (v_touched)))
         LIMIT 1;
    END IF;
    IF FOUND THEN
        RAISE feature_not_supported USING
            MESSAGE = format('table %s is written by every node: %s', v_found.name, v_found.why),
            HINT = 'Leave the table as it is, or stop its streams and take it out of vsql_sync.multi_writer_tables. '
                   'DROP an index that was made CONCURRENTLY: it is there all the same.';
    END IF;
END
$$;
REVOKE ALL ON FUNCTION vsql_sync.guard_definitions() FROM PUBLIC;

-- Only a superuser may make event triggers; without them a stream finds the same at its start.
DO $$
BEGIN
    CREATE EVENT TRIGGER vsql_sync_rewrites ON table_rewrite
        EXECUTE FUNCTION vsql_sync.guard_definitions();
    CREATE EVENT TRIGGER vsql_sync_definitions ON ddl_command_end
        WHEN TAG IN ('ALTER TABLE', 'ALTER PUBLICATION', 'CREATE INDEX', 'CREATE TRIGGER')
        EXECUTE FUNCTION vsql_sync.guard_definitions();
EXCEPTION WHEN insufficient_privilege THEN
    NULL;
END
$$;
