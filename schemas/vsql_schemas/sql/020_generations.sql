-- Generations: how many versions of a row led to this one. They are in the row (column vsql_generation) and travel
-- with it, in tables whose strategy orders by them: first_write_wins and node_priority (docs/design/0022).

ALTER TABLE vsql_sync.multi_writer_tables
    -- A key of which nothing is known begins above it. Tombstones that a first copy does not bring are below.
    ADD COLUMN generation_floor BIGINT NOT NULL DEFAULT 0,
    -- What it becomes once the peer's first copy is done.
    ADD COLUMN next_floor BIGINT;

-- What deciding by hand needs: which row it was, and between which versions.
ALTER TABLE vsql_sync.conflict_log
    ADD COLUMN row_key JSONB,                           -- none where there are no tuples
    ADD COLUMN local_generation BIGINT,
    ADD COLUMN remote_generation BIGINT;

-- "Both are of one key", as SQL, by the operators of a table's primary key, which may be in any schema.
CREATE FUNCTION vsql_sync.key_equality(p_table OID, p_left TEXT, p_right TEXT) RETURNS TEXT
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT string_agg(format(CASE t.typtype WHEN 'd'
                                  THEN 'CAST(%1$s.%3$I AS %6$s) OPERATOR(%4$I.%5$s) CAST(%2$s.%3$I AS %6$s)'
                                  ELSE '%1$s.%3$I OPERATOR(%4$I.%5$s) %2$s.%3$I' END,
                             p_left, p_right, a.attname, n.nspname, o.oprname, b.base), ' AND ' ORDER BY k.n)
      FROM pg_index i CROSS JOIN LATERAL generate_series(1, i.indnkeyatts) k (n)
      JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[k.n - 1]
      JOIN pg_type t ON t.oid = a.atttypid
      JOIN pg_opclass c ON c.oid = i.indclass[k.n - 1]
      JOIN pg_amop m ON m.amopfamily = c.opcfamily AND m.amoplefttype = c.opcintype
       AND m.amoprighttype = c.opcintype AND m.amopstrategy = 3 AND m.amopmethod = c.opcmethod
      JOIN pg_operator o ON o.oid = m.amopopr JOIN pg_namespace n ON n.oid = o.oprnamespace
     CROSS JOIN LATERAL (
        WITH RECURSIVE chain (oid, typtype, typbasetype) AS (
            SELECT t.oid, t.typtype, t.typbasetype
            UNION ALL
            SELECT d.oid, d.typtype, d.typbasetype FROM chain JOIN pg_type d ON d.oid = chain.typbasetype
             WHERE chain.typtype = 'd')
        SELECT format_type(oid, -1) AS base FROM chain WHERE typtype <> 'd') b
     WHERE i.indrelid = p_table AND i.indisprimary
$$;

-- BEFORE INSERT or UPDATE, per row. Fires for what is written here, not for what is applied: that has its own.
-- A value that is given is not taken: the next one is, above what the key's tombstone has.
-- Arguments: the table of tombstones, and "b and $1 are of one key".
CREATE FUNCTION vsql_sync.next_generation() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_floor  BIGINT;
    v_buried BIGINT;
BEGIN
    IF TG_OP = 'UPDATE' THEN
        IF NEW.vsql_generation IS NOT DISTINCT FROM OLD.vsql_generation THEN
            NEW.vsql_generation := OLD.vsql_generation + 1;
            RETURN NEW;
        END IF;
        v_floor := OLD.vsql_generation;
    ELSE
        SELECT m.generation_floor INTO v_floor FROM vsql_sync.multi_writer_tables m
         WHERE (m.table_schema, m.table_name) = (TG_TABLE_SCHEMA, TG_TABLE_NAME);
        -- A snapshot from before the table became one that every node writes has not this trigger either. One that was
        -- taken out of the list since keeps its trigger.
        IF NOT FOUND AND NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = TG_RELID AND t.tgname = TG_NAME) THEN
            RAISE serialization_failure USING
                MESSAGE = format('table %I.%I is since a moment ago written by every node', TG_TABLE_SCHEMA,
                                 TG_TABLE_NAME),
                HINT = 'Repeat the transaction.';
        END IF;
    END IF;
    EXECUTE format('SELECT b.vsql_generation FROM vsql_sync.%I b WHERE %s', TG_ARGV[0], TG_ARGV[1])
       INTO v_buried USING NEW;
    NEW.vsql_generation := greatest(v_floor, v_buried, 0) + 1;
    RETURN NEW;
END
$$;
REVOKE ALL ON FUNCTION vsql_sync.next_generation() FROM PUBLIC;

-- AFTER INSERT per statement, AFTER UPDATE of the key per row: now the keys are ours, and what was deleted while we
-- waited for them has left its tombstone. A row that is not above it is given its generation anew.
-- Arguments: the table of tombstones, the key's columns, "t and c are of one key", "b and c are".
CREATE FUNCTION vsql_sync.settle_generations() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET row_security = off AS $$
DECLARE
    v_come CONSTANT TEXT := CASE TG_LEVEL WHEN 'ROW' THEN '(SELECT ($1).*)' ELSE 'come' END;
BEGIN
    IF current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
        -- The snapshot does not see such a tombstone; the index does, and says that we have to repeat.
        EXECUTE format('INSERT INTO vsql_sync.%1$I (%2$s, vsql_generation) SELECT %2$s, 0 FROM %3$s c'
                       ' ON CONFLICT DO NOTHING', TG_ARGV[0], TG_ARGV[1], v_come)
          USING NEW;
        EXECUTE format('DELETE FROM vsql_sync.%1$I b USING %2$s c WHERE %3$s AND b.vsql_generation = 0',
                       TG_ARGV[0], v_come, TG_ARGV[3])
          USING NEW;
    END IF;
    EXECUTE format('UPDATE ONLY %1$I.%2$I t SET vsql_generation = -1 FROM vsql_sync.%3$I b, %4$s c'
                   ' WHERE %5$s AND %6$s AND t.vsql_generation <= b.vsql_generation',
                   TG_TABLE_SCHEMA, TG_TABLE_NAME, TG_ARGV[0], v_come, TG_ARGV[2], TG_ARGV[3])
      USING NEW;
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION vsql_sync.settle_generations() FROM PUBLIC;

-- Instead of keep_tombstones, AFTER DELETE per statement and AFTER UPDATE of the key per row: a delete is a version,
-- too, one above the row it deleted. MERGE fires it after settle_generations: what was inserted under a key that was
-- deleted by the same command is settled here. Arguments: as settle_generations.
CREATE FUNCTION vsql_sync.keep_generations() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET row_security = off AS $$
BEGIN
    EXECUTE format('INSERT INTO vsql_sync.%1$I (%2$s, vsql_generation) SELECT %2$s, vsql_generation + 1 FROM %3$s c'
                   ' ON CONFLICT (%2$s) DO UPDATE SET vsql_generation = excluded.vsql_generation',
                   TG_ARGV[0], TG_ARGV[1], CASE TG_LEVEL WHEN 'ROW' THEN '(SELECT ($1).*)' ELSE 'gone' END)
      USING OLD;
    IF TG_LEVEL = 'STATEMENT' THEN
        EXECUTE format('UPDATE ONLY %1$I.%2$I t SET vsql_generation = -1 FROM vsql_sync.%3$I b, gone c'
                       ' WHERE %4$s AND %5$s AND t.vsql_generation <= b.vsql_generation',
                       TG_TABLE_SCHEMA, TG_TABLE_NAME, TG_ARGV[0], TG_ARGV[2], TG_ARGV[3]);
    END IF;
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION vsql_sync.keep_generations() FROM PUBLIC;

-- Why a table cannot be one whose strategy orders by generations; nothing where it can.
CREATE FUNCTION vsql_sync.unfit_for_generations(p_table OID) RETURNS SETOF TEXT
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT format('first_write_wins and node_priority need a column of their own, bigint, NOT NULL, no part of the key;'
                  ' ALTER TABLE %s ADD vsql_generation bigint NOT NULL DEFAULT 0, on every node', p_table::regclass)
     WHERE NOT EXISTS (
        SELECT FROM pg_attribute a
         WHERE a.attrelid = p_table AND a.attname = 'vsql_generation' AND NOT a.attisdropped AND a.attnotnull
           AND a.atttypid = 'bigint'::regtype AND a.attgenerated = '' AND a.attidentity = ''
           AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = p_table AND i.indisprimary
                              AND a.attnum = ANY (i.indkey::int2[])))
    UNION ALL
    SELECT format('generations are settled by vsql_sync.settle_generations(); GRANT UPDATE ON %s TO %I, its owner',
                  p_table::regclass, r.rolname)
      FROM pg_proc p JOIN pg_roles r ON r.oid = p.proowner
     WHERE p.oid = 'vsql_sync.settle_generations()'::regprocedure AND NOT has_table_privilege(r.oid, p_table, 'UPDATE')
    UNION ALL
    SELECT format('generations are settled by vsql_sync.settle_generations(), and row security would hide rows from %I,'
                  ' its owner', r.rolname)
      FROM pg_proc p JOIN pg_roles r ON r.oid = p.proowner, pg_class c
     WHERE p.oid = 'vsql_sync.settle_generations()'::regprocedure AND c.oid = p_table AND c.relrowsecurity
       AND NOT (r.rolsuper OR r.rolbypassrls OR (c.relowner = r.oid AND NOT c.relforcerowsecurity))
$$;

-- Such tables that have become unfit, or whose generations nobody keeps any more.
CREATE FUNCTION vsql_sync.unfit_generations() RETURNS TABLE (name TEXT, publication TEXT, why TEXT)
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH known AS (
        SELECT format('%I.%I', m.table_schema, m.table_name) AS name, m.publication, c.oid
          FROM vsql_sync.multi_writer_tables m
          JOIN pg_namespace n ON n.nspname = m.table_schema
          JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = m.table_name
         WHERE m.strategy IN ('first_write_wins', 'node_priority')
    )
    SELECT k.name, k.publication, u FROM known k, vsql_sync.unfit_for_generations(k.oid) u
    UNION ALL
    SELECT k.name, k.publication, format('trigger %I, which keeps generations, is missing or switched off', w)
      FROM known k, unnest(ARRAY['vsql_sync_generation', 'vsql_sync_settled', 'vsql_sync_taken']) w
     WHERE NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = k.oid AND t.tgname = w AND t.tgenabled = 'O')
$$;

CREATE FUNCTION vsql_sync.guard_generations() RETURNS event_trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_found RECORD;
BEGIN
    SELECT u.name, u.why INTO v_found FROM vsql_sync.unfit_generations() u
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
REVOKE ALL ON FUNCTION vsql_sync.guard_generations() FROM PUBLIC;

-- Only a superuser may make event triggers; without it a stream finds the same at its start.
DO $$
BEGIN
    CREATE EVENT TRIGGER vsql_sync_generations ON ddl_command_end
        WHEN TAG IN ('ALTER TABLE', 'ALTER TRIGGER')
        EXECUTE FUNCTION vsql_sync.guard_generations();
EXCEPTION WHEN insufficient_privilege THEN
    NULL;
END
$$;
