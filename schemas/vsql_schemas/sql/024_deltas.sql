-- Columns that add up: a change brings old and new value, and the row gets what it has plus the difference
-- (docs/design/0028). Their tables' keys are never changed and never used again.

ALTER TABLE vsql_sync.multi_writer_tables
    ADD COLUMN delta_columns TEXT[] NOT NULL DEFAULT '{}';

-- Versions of rows whose xmin says another one. One counts only while the row's xmin is the one it names, so the
-- next transaction that writes the row ends it without being told. row_key: sha256 of what record_send makes of the
-- key's columns, in the order of multi_writer_tables.key_columns, as they are spelled in the row. Only appliers make
-- it: record_send follows client_encoding, and theirs is always the same.
CREATE TABLE vsql_sync.row_versions (
    table_schema  TEXT NOT NULL,
    table_name    TEXT NOT NULL,
    row_key       BYTEA NOT NULL CHECK (octet_length(row_key) = 32),
    row_xmin      XID NOT NULL,
    at            TIMESTAMPTZ,                          -- none: nobody knows, and so the oldest
    node          TEXT NOT NULL,
    generation    BIGINT NOT NULL DEFAULT 1,
    PRIMARY KEY (table_schema, table_name, row_key)
);

-- AFTER UPDATE per row, where the key is not byte by byte what it was.
CREATE FUNCTION vsql_sync.refuse_key_change() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE feature_not_supported USING
        MESSAGE = format('table %I.%I has columns that add up: the key of a row cannot be changed, nor be spelled anew',
                         TG_TABLE_SCHEMA, TG_TABLE_NAME),
        HINT = 'INSERT a row under the new key, and DELETE the old one.';
END
$$;
REVOKE ALL ON FUNCTION vsql_sync.refuse_key_change() FROM PUBLIC;

-- AFTER INSERT or UPDATE per row, where a value that adds up is NaN or infinite.
CREATE FUNCTION vsql_sync.refuse_infinite() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE numeric_value_out_of_range USING
        MESSAGE = format('table %I.%I has columns that add up: NaN and infinity have no difference to anything',
                         TG_TABLE_SCHEMA, TG_TABLE_NAME);
END
$$;
REVOKE ALL ON FUNCTION vsql_sync.refuse_infinite() FROM PUBLIC;

-- AFTER INSERT per statement: the keys are ours by now, and whoever deleted one while we waited for it has left its
-- tombstone. Arguments: the table of tombstones, the key's columns, "b and c are of one key".
CREATE FUNCTION vsql_sync.refuse_used_keys() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_used BOOLEAN;
BEGIN
    EXECUTE format('SELECT EXISTS (SELECT FROM vsql_sync.%I b, come c WHERE %s)', TG_ARGV[0], TG_ARGV[2]) INTO v_used;
    IF NOT v_used AND current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
        -- The snapshot does not see a tombstone that is younger; the index does.
        BEGIN
            EXECUTE format('INSERT INTO vsql_sync.%1$I (%2$s) SELECT %2$s FROM come', TG_ARGV[0], TG_ARGV[1]);
            EXECUTE format('DELETE FROM vsql_sync.%I b USING come c WHERE %s', TG_ARGV[0], TG_ARGV[2]);
        EXCEPTION WHEN unique_violation THEN
            v_used := true;
        END;
    END IF;
    IF v_used THEN
        RAISE unique_violation USING
            MESSAGE = format('a row of table %I.%I with this key was deleted, and its key cannot be used again',
                             TG_TABLE_SCHEMA, TG_TABLE_NAME),
            HINT = 'The table has columns that add up: what other nodes still add to the old row would be added to the '
                   'new one. INSERT it under another key.',
            SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME;
    END IF;
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION vsql_sync.refuse_used_keys() FROM PUBLIC;

-- AFTER DELETE per statement, behind the trigger that leaves tombstones: nothing that was inserted by the same command
-- (MERGE) has a key it deleted. Argument: "t and c are of one key".
CREATE FUNCTION vsql_sync.settle_deleted() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET row_security = off AS $$
DECLARE
    v_used BOOLEAN;
BEGIN
    EXECUTE format('SELECT EXISTS (SELECT FROM ONLY %I.%I t, gone c WHERE %s)', TG_TABLE_SCHEMA, TG_TABLE_NAME,
                   TG_ARGV[0]) INTO v_used;
    IF v_used THEN
        RAISE unique_violation USING
            MESSAGE = format('a command deletes a row of table %I.%I and inserts another one with its key, which cannot'
                             ' be used again', TG_TABLE_SCHEMA, TG_TABLE_NAME),
            HINT = 'The table has columns that add up. UPDATE the row, or INSERT it under another key.',
            SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME;
    END IF;
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION vsql_sync.settle_deleted() FROM PUBLIC;

-- BEFORE DELETE per statement: a first copy brings no tombstones, and the peer could insert such a key.
CREATE FUNCTION vsql_sync.keep_while_copying() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_publication TEXT;
BEGIN
    IF current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
        -- Adding a peer writes this row: who began before that cannot know of the copy, and gets 40001.
        SELECT m.publication INTO v_publication FROM vsql_sync.multi_writer_tables m
         WHERE (m.table_schema, m.table_name) = (TG_TABLE_SCHEMA, TG_TABLE_NAME) FOR SHARE;
    ELSE
        SELECT m.publication INTO v_publication FROM vsql_sync.multi_writer_tables m
         WHERE (m.table_schema, m.table_name) = (TG_TABLE_SCHEMA, TG_TABLE_NAME);
    END IF;
    IF v_publication IS NULL THEN
        -- One that was taken out of the list since keeps its trigger.
        IF NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = TG_RELID AND t.tgname = TG_NAME) THEN
            RAISE serialization_failure USING
                MESSAGE = format('table %I.%I is since a moment ago written by every node', TG_TABLE_SCHEMA,
                                 TG_TABLE_NAME),
                HINT = 'Repeat the transaction.';
        END IF;
    ELSIF EXISTS (SELECT FROM vsql_sync.streams s
                   WHERE s.publication = v_publication AND s.direction = 'out' AND s.kind = 'copy'
                     AND s.state <> 'FINISHED') THEN
        RAISE object_not_in_prerequisite_state USING
            MESSAGE = format('rows of table %I.%I cannot be deleted until its first copy is done', TG_TABLE_SCHEMA,
                             TG_TABLE_NAME),
            HINT = 'The table has columns that add up, and a copy does not bring which keys were used. '
                   'See syncctl status; INSERT and UPDATE go on.';
    END IF;
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION vsql_sync.keep_while_copying() FROM PUBLIC;

-- Why columns of a table cannot add up; nothing where they can.
CREATE FUNCTION vsql_sync.unfit_for_deltas(p_table OID, p_columns TEXT[]) RETURNS SETOF TEXT
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH wanted AS (
        SELECT u.name, a.* FROM unnest(p_columns) u (name)
          LEFT JOIN pg_attribute a ON a.attrelid = p_table AND a.attname = u.name AND a.attnum > 0
           AND NOT a.attisdropped
    )
    SELECT format('column %I is to add up, and is not there', w.name) FROM wanted w WHERE w.attnum IS NULL
    UNION ALL
    SELECT format('column %I is of type %s; what adds up is smallint, integer, bigint, numeric, real, double precision'
                  ' or money, and no domain', w.name, format_type(w.atttypid, w.atttypmod))
      FROM wanted w WHERE w.attnum IS NOT NULL
       AND w.atttypid <> ALL ('{smallint,integer,bigint,numeric,real,double precision,money}'::regtype[]::oid[])
    UNION ALL
    SELECT format('column %1$I is to add up, and may be NULL, which has no difference to anything; ALTER TABLE %2$s'
                  ' ALTER %1$I SET NOT NULL, on every node', w.name, p_table::regclass)
      FROM wanted w WHERE NOT w.attnotnull
    UNION ALL
    SELECT format('column %I is to add up, and is generated or an identity', w.name)
      FROM wanted w WHERE w.attgenerated <> '' OR w.attidentity <> ''
    UNION ALL
    SELECT format('column %I is to add up, and is part of the primary key or keeps generations', w.name)
      FROM wanted w WHERE w.attname = 'vsql_generation'
        OR EXISTS (SELECT FROM pg_index i
                    WHERE i.indrelid = p_table AND i.indisprimary AND w.attnum = ANY (i.indkey::int2[]))
    UNION ALL
    SELECT format('column %I of the primary key is of type %s, which has no binary form to know rows by', a.attname,
                  format_type(a.atttypid, a.atttypmod))
      FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey::int2[])
      JOIN pg_type t ON t.oid = a.atttypid
     WHERE i.indrelid = p_table AND i.indisprimary AND t.typsend = 0
    UNION ALL
    SELECT format('column %I is GENERATED ALWAYS AS IDENTITY and no part of the primary key: a row with columns that'
                  ' add up is never written anew', a.attname)
      FROM pg_attribute a
     WHERE a.attrelid = p_table AND a.attnum > 0 AND NOT a.attisdropped AND a.attidentity = 'a'
       AND NOT EXISTS (SELECT FROM pg_index i
                        WHERE i.indrelid = p_table AND i.indisprimary AND a.attnum = ANY (i.indkey::int2[]))
    UNION ALL
    SELECT format('used keys are looked for by vsql_sync.settle_deleted(); GRANT SELECT ON %s TO %I, its owner',
                  p_table::regclass, r.rolname)
      FROM pg_proc p JOIN pg_roles r ON r.oid = p.proowner
     WHERE p.oid = 'vsql_sync.settle_deleted()'::regprocedure AND NOT has_table_privilege(r.oid, p_table, 'SELECT')
    UNION ALL
    SELECT format('used keys are looked for by vsql_sync.settle_deleted(), and row security would hide rows from %I,'
                  ' its owner', r.rolname)
      FROM pg_proc p JOIN pg_roles r ON r.oid = p.proowner, pg_class c
     WHERE p.oid = 'vsql_sync.settle_deleted()'::regprocedure AND c.oid = p_table AND c.relrowsecurity
       AND NOT (r.rolsuper OR r.rolbypassrls OR (c.relowner = r.oid AND NOT c.relforcerowsecurity))
$$;

-- Such tables that have become unfit, or whose keys nobody guards any more.
CREATE FUNCTION vsql_sync.unfit_deltas() RETURNS TABLE (name TEXT, publication TEXT, why TEXT)
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH known AS (
        SELECT format('%I.%I', m.table_schema, m.table_name) AS name, m.publication, m.delta_columns, c.oid
          FROM vsql_sync.multi_writer_tables m
          JOIN pg_namespace n ON n.nspname = m.table_schema
          JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = m.table_name
         WHERE m.delta_columns <> '{}'
    )
    SELECT k.name, k.publication, u FROM known k, vsql_sync.unfit_for_deltas(k.oid, k.delta_columns) u
    UNION ALL
    SELECT k.name, k.publication,
           format('trigger %I, which guards keys, is missing, switched off or another one', w.name)
      FROM known k, (VALUES ('vsql_sync_kept', 'vsql_sync.refuse_key_change()'::regprocedure),
                            ('vsql_sync_used', 'vsql_sync.refuse_used_keys()'),
                            ('vsql_sync_final', 'vsql_sync.settle_deleted()'),
                            ('vsql_sync_lasting', 'vsql_sync.keep_while_copying()')) w (name, function)
     WHERE NOT EXISTS (SELECT FROM pg_trigger t
                        WHERE t.tgrelid = k.oid AND t.tgname = w.name AND t.tgenabled = 'O' AND t.tgfoid = w.function)
    UNION ALL
    SELECT k.name, k.publication,
           'trigger vsql_sync_finite, which refuses NaN and infinity, is missing, switched off or another one'
      FROM known k
     WHERE NOT EXISTS (SELECT FROM pg_trigger t
                        WHERE t.tgrelid = k.oid AND t.tgname = 'vsql_sync_finite' AND t.tgenabled = 'O'
                          AND t.tgfoid = 'vsql_sync.refuse_infinite()'::regprocedure)
       AND EXISTS (SELECT FROM pg_attribute a
                    WHERE a.attrelid = k.oid AND a.attname = ANY (k.delta_columns)
                      AND a.atttypid = ANY ('{numeric,real,double precision}'::regtype[]::oid[]))
$$;

CREATE FUNCTION vsql_sync.guard_deltas() RETURNS event_trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_found RECORD;
BEGIN
    SELECT u.name, u.why INTO v_found FROM vsql_sync.unfit_deltas() u
     WHERE EXISTS (SELECT FROM pg_event_trigger_ddl_commands() d
                     LEFT JOIN pg_trigger t ON d.classid = 'pg_trigger'::regclass AND t.oid = d.objid
                    WHERE coalesce(t.tgrelid, d.objid) = u.name::regclass::oid)
     LIMIT 1;
    IF FOUND THEN
        RAISE feature_not_supported USING
            MESSAGE = format('table %s is written by every node: %s', v_found.name, v_found.why),
            HINT = 'Leave the table as it is, or stop its streams and take it out of vsql_sync.multi_writer_tables.';
    END IF;
END
$$;
REVOKE ALL ON FUNCTION vsql_sync.guard_deltas() FROM PUBLIC;

-- DROP TRIGGER of one that keeps what happens to rows of a table that every node writes: what is deleted or inserted
-- without it parts the nodes in silence, and the stream that runs looks at its start only. DROP TABLE goes on.
CREATE FUNCTION vsql_sync.guard_kept_triggers() RETURNS event_trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_found RECORD;
BEGIN
    SELECT format('%I.%I', m.table_schema, m.table_name) AS name, d.address_names[3] AS dropped INTO v_found
      FROM pg_event_trigger_dropped_objects() d
      JOIN vsql_sync.multi_writer_tables m
        ON (m.table_schema, m.table_name) = (d.address_names[1], d.address_names[2])
     WHERE d.object_type = 'trigger' AND starts_with(d.address_names[3], 'vsql_sync_')
     LIMIT 1;
    IF FOUND THEN
        RAISE feature_not_supported USING
            MESSAGE = format('table %s is written by every node, and trigger %I keeps what is done to it', v_found.name,
                             v_found.dropped),
            HINT = 'Leave the table as it is, or stop its streams and take it out of vsql_sync.multi_writer_tables.';
    END IF;
END
$$;
REVOKE ALL ON FUNCTION vsql_sync.guard_kept_triggers() FROM PUBLIC;

-- Only a superuser may make event triggers; without them a stream finds the same at its start.
DO $$
BEGIN
    CREATE EVENT TRIGGER vsql_sync_deltas ON ddl_command_end
        WHEN TAG IN ('ALTER TABLE', 'ALTER TRIGGER')
        EXECUTE FUNCTION vsql_sync.guard_deltas();
    CREATE EVENT TRIGGER vsql_sync_kept_triggers ON sql_drop
        WHEN TAG IN ('DROP TRIGGER')
        EXECUTE FUNCTION vsql_sync.guard_kept_triggers();
EXCEPTION WHEN insufficient_privilege THEN
    NULL;
END
$$;
