-- Publications whose commits wait for their targets (docs/design/0027). What the triggers need stands in their arguments
-- and in the catalogs: a transaction with an old snapshot sees both as they are now, and no row that came later.

CREATE TABLE vsql_sync.synchronous_publications (
    publication    TEXT PRIMARY KEY REFERENCES vsql_sync.publications ON DELETE RESTRICT,
    standby_name   TEXT NOT NULL UNIQUE CHECK (standby_name ~ '^vsql_[0-9a-f]{16}$'),
    quorum         INTEGER CHECK (quorum > 0),          -- NULL: all synchronous targets
    enabled_at     TIMESTAMPTZ NOT NULL DEFAULT now(),
    enabled_by     TEXT NOT NULL DEFAULT session_user,
    degraded_at    TIMESTAMPTZ,
    degraded_reason TEXT,
    CHECK ((degraded_at IS NULL) = (degraded_reason IS NULL))
);

-- By OID: a table that is renamed stays what it is.
CREATE TABLE vsql_sync.synchronous_tables (
    publication    TEXT NOT NULL REFERENCES vsql_sync.synchronous_publications ON DELETE CASCADE,
    table_oid      OID NOT NULL,
    PRIMARY KEY (publication, table_oid)
);

-- Up to where a target's acknowledgements say that all of it stands there: an operator's decision on the target to
-- leave something out ends this, until the source's operator has degraded and restored the stream.
ALTER TABLE vsql_sync.stream_targets
    ADD COLUMN synced_sequence BIGINT NOT NULL DEFAULT 0,
    ADD COLUMN held TEXT,
    -- Up to where the source's operator let commits return without what was left out.
    ADD COLUMN forgiven_sequence BIGINT NOT NULL DEFAULT 0,
    -- It had acknowledged something when its acknowledgements were forgotten (SQL 021): it is needed all the same.
    ADD COLUMN joined BOOLEAN NOT NULL DEFAULT false;
UPDATE vsql_sync.stream_targets SET synced_sequence = acked_sequence;

-- One row for each transaction and table, gone again when it commits. Its deferred trigger has the last word: in a
-- second round, behind the deferred triggers of others that were queued before it.
CREATE UNLOGGED TABLE vsql_sync.synchronous_commits (
    xid            XID8 NOT NULL,
    table_oid      OID NOT NULL,
    standby_name   TEXT NOT NULL,
    publication    TEXT NOT NULL,
    round          INTEGER NOT NULL DEFAULT 1,
    PRIMARY KEY (xid, table_oid, publication)
);

-- Members of a value of synchronous_standby_names, in lower case, as PostgreSQL compares them.
CREATE FUNCTION vsql_sync.standby_members(p_value TEXT) RETURNS TEXT[]
    LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(array_agg(CASE WHEN m[1] LIKE '"%' THEN lower(replace(substr(m[1], 2, length(m[1]) - 2), '""', '"'))
                                   ELSE lower(m[1]) END), '{}')
      FROM regexp_matches(
               coalesce((regexp_match(p_value, '^\s*(?:(?:first|any)\s+)?\d+\s*\((.*)\)\s*$', 'i'))[1], p_value),
               '("(?:[^"]|"")*"|[^",()\s]+)', 'g') AS m
$$;

-- Why a commit would not wait for a standby of this name whatever others do; nothing where it would.
CREATE FUNCTION vsql_sync.standby_problem(p_value TEXT, p_name TEXT) RETURNS TEXT
    LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_members TEXT[];
    v_wanted  INTEGER;
BEGIN
    IF p_value = format('FIRST 1 (%s)', p_name) THEN
        RETURN NULL;
    END IF;
    v_members := vsql_sync.standby_members(p_value);
    v_wanted := coalesce((regexp_match(p_value, '^\s*(?:(?:first|any)\s+)?(\d+)\s*\(', 'i'))[1]::integer, 1);
    IF '*' = ANY (v_members) THEN
        RETURN 'synchronous_standby_names has a *, so that any standby lets commits return';
    ELSIF lower(p_name) <> ALL (v_members) THEN
        RETURN format('synchronous_standby_names has no %s', p_name);
    ELSIF v_wanted <> cardinality(v_members) THEN
        RETURN format('synchronous_standby_names asks for %s of %s names, so that others let commits return',
                      v_wanted, cardinality(v_members));
    ELSIF cardinality(v_members) <> (SELECT count(DISTINCT m) FROM unnest(v_members) m) THEN
        RETURN 'synchronous_standby_names has a name twice';
    END IF;
    RETURN NULL;
END
$$;

-- Why commits of this server would not wait for standbys, whatever it is set to; nothing where they do.
CREATE FUNCTION vsql_sync.server_problem() RETURNS TEXT
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_version INTEGER := current_setting('server_version_num')::integer;
BEGIN
    -- COMMIT PREPARED waits as its own session is set, and fires no trigger.
    IF current_setting('max_prepared_transactions')::integer > 0 THEN
        RETURN 'max_prepared_transactions is not 0, and COMMIT PREPARED would not wait';
    ELSIF current_setting('max_wal_senders')::integer = 0 THEN
        RETURN 'max_wal_senders is 0, by which no commit waits';
    -- While these start, commits return until the checkpointer has read the list.
    ELSIF v_version < (CASE v_version / 10000 WHEN 15 THEN 150013 WHEN 16 THEN 160009 WHEN 17 THEN 170005 ELSE 0 END) THEN
        RETURN format('PostgreSQL %s lets commits return while it starts; 15.13, 16.9 and 17.5 do not',
                      current_setting('server_version'));
    END IF;
    RETURN NULL;
END
$$;

-- What this server lacks for commits to wait; nothing where they do.
CREATE FUNCTION vsql_sync.synchronous_problem(p_name TEXT) RETURNS TEXT
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN coalesce(vsql_sync.server_problem(),
                    vsql_sync.standby_problem(current_setting('synchronous_standby_names'), p_name));
END
$$;

-- Whether PostgreSQL's publication sends a table, by itself or as a part of another. The function it asks looks into
-- the catalogs as they are, whatever the transaction's snapshot is.
CREATE FUNCTION vsql_sync.is_carried(p_publication TEXT, p_table OID) RETURNS BOOLEAN
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    -- One after the other: the last one locks every partition.
    SELECT CASE WHEN EXISTS (SELECT FROM pg_get_publication_tables(p_publication) t WHERE t.relid = p_table) THEN true
                WHEN EXISTS (SELECT FROM pg_get_publication_tables(p_publication) t
                              WHERE t.relid IN (SELECT a.relid FROM pg_partition_ancestors(p_table) a)) THEN true
                ELSE EXISTS (SELECT FROM pg_get_publication_tables(p_publication) t
                              WHERE t.relid IN (SELECT l.relid FROM pg_partition_tree(p_table) l WHERE l.isleaf)) END
$$;

CREATE FUNCTION vsql_sync.require_synchronous(p_name TEXT, p_publication TEXT, p_table OID) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_problem TEXT := vsql_sync.synchronous_problem(p_name);
BEGIN
    IF v_problem IS NULL AND NOT vsql_sync.is_carried(p_publication, p_table) THEN
        v_problem := format('publication %I does not send it any more', p_publication);
    END IF;
    IF v_problem IS NOT NULL THEN
        RAISE object_not_in_prerequisite_state USING
            MESSAGE = format('a change of table %s cannot be committed on its targets too: %s', p_table::regclass,
                             v_problem),
            HINT = 'An administrator mends it (syncctl sync status), or ends it (syncctl sync disable).';
    END IF;
    -- Of this transaction alone.
    PERFORM set_config('synchronous_commit', 'remote_apply', true);
END
$$;

-- AFTER each statement. Arguments: our name as a standby, the publication. What was applied here came from another
-- node, and this stream does not carry it.
CREATE FUNCTION vsql_sync.commit_on_targets() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF pg_replication_origin_session_is_setup() OR pg_current_xact_id_if_assigned() IS NULL THEN
        RETURN NULL;
    END IF;
    PERFORM vsql_sync.require_synchronous(TG_ARGV[0], TG_ARGV[1], TG_RELID);
    INSERT INTO vsql_sync.synchronous_commits (xid, table_oid, standby_name, publication)
    VALUES (pg_current_xact_id(), TG_RELID, TG_ARGV[0], TG_ARGV[1]) ON CONFLICT DO NOTHING;
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION vsql_sync.commit_on_targets() FROM PUBLIC;

-- At the commit: what was set between, by SET LOCAL or a function's own SET, does not stand.
CREATE FUNCTION vsql_sync.commit_on_targets_at_end() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NEW.round = 1 THEN
        UPDATE vsql_sync.synchronous_commits SET round = 2
         WHERE (xid, table_oid, publication) = (NEW.xid, NEW.table_oid, NEW.publication);
        RETURN NULL;
    END IF;
    DELETE FROM vsql_sync.synchronous_commits
     WHERE (xid, table_oid, publication) = (NEW.xid, NEW.table_oid, NEW.publication);
    -- A table the same transaction has dropped takes its rows with it.
    IF EXISTS (SELECT FROM pg_class WHERE oid = NEW.table_oid) THEN
        PERFORM vsql_sync.require_synchronous(NEW.standby_name, NEW.publication, NEW.table_oid);
    END IF;
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION vsql_sync.commit_on_targets_at_end() FROM PUBLIC;

CREATE CONSTRAINT TRIGGER vsql_sync_at_end AFTER INSERT OR UPDATE ON vsql_sync.synchronous_commits
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION vsql_sync.commit_on_targets_at_end();
ALTER TABLE vsql_sync.synchronous_commits ENABLE ALWAYS TRIGGER vsql_sync_at_end;

-- Tables that stand under the names a publication was decided for and that PostgreSQL's publication sends: one that was
-- dropped and made anew has another OID.
CREATE FUNCTION vsql_sync.published_now(p_publication TEXT) RETURNS SETOF OID
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT c.oid FROM vsql_sync.publication_tables t
      JOIN pg_namespace n ON n.nspname = t.table_schema
      JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = t.table_name AND c.relkind IN ('r', 'p')
     WHERE t.publication = p_publication
       AND CASE WHEN EXISTS (SELECT FROM pg_publication p WHERE p.pubname = p_publication)
                THEN vsql_sync.is_carried(p_publication, c.oid) END
$$;

-- Everything whose writes must wait: the tables, and what they have as partitions now.
CREATE FUNCTION vsql_sync.synchronous_relations() RETURNS TABLE (publication TEXT, standby_name TEXT, relation OID)
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT DISTINCT p.publication, p.standby_name, r.oid
      FROM vsql_sync.synchronous_publications p
     CROSS JOIN LATERAL (SELECT t.table_oid AS oid FROM vsql_sync.synchronous_tables t
                          WHERE t.publication = p.publication
                          UNION SELECT n.oid FROM vsql_sync.published_now(p.publication) n (oid)) o
      JOIN pg_class c ON c.oid = o.oid
     CROSS JOIN LATERAL (SELECT c.oid UNION SELECT l.relid FROM pg_partition_tree(c.oid) l) r
$$;

-- Makes the triggers that are missing; says how many. Half-made, they are what our own event triggers refuse: those
-- stand aside meanwhile, where there are any (then the user may do that).
CREATE FUNCTION vsql_sync.make_synchronous_triggers() RETURNS INTEGER
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_one  RECORD;
    v_made INTEGER := 0;
    v_role TEXT := current_setting('session_replication_role');
BEGIN
    -- What was made anew: from now on it may be renamed.
    INSERT INTO vsql_sync.synchronous_tables (publication, table_oid)
    SELECT p.publication, n.oid FROM vsql_sync.synchronous_publications p
     CROSS JOIN LATERAL vsql_sync.published_now(p.publication) n (oid)
    EXCEPT SELECT t.publication, t.table_oid FROM vsql_sync.synchronous_tables t
    ON CONFLICT DO NOTHING;
    FOR v_one IN SELECT r.* FROM vsql_sync.synchronous_relations() r
                  WHERE NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = r.relation
                                       AND t.tgname = 'vsql_sync_on_targets_' || substr(r.standby_name, 6))
    LOOP
        IF v_made = 0 AND EXISTS (SELECT FROM pg_event_trigger WHERE evtname = 'vsql_sync_synchronous') THEN
            PERFORM set_config('session_replication_role', 'replica', true);
        END IF;
        EXECUTE format('CREATE TRIGGER %I AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON %s FOR EACH STATEMENT'
                       ' EXECUTE FUNCTION vsql_sync.commit_on_targets(%L, %L)',
                       'vsql_sync_on_targets_' || substr(v_one.standby_name, 6), v_one.relation::regclass,
                       v_one.standby_name, v_one.publication);
        EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', v_one.relation::regclass,
                       'vsql_sync_on_targets_' || substr(v_one.standby_name, 6));
        v_made := v_made + 1;
    END LOOP;
    PERFORM set_config('session_replication_role', v_role, true)
      WHERE v_role <> current_setting('session_replication_role');
    RETURN v_made;
END
$$;
REVOKE ALL ON FUNCTION vsql_sync.make_synchronous_triggers() FROM PUBLIC;

-- Takes the triggers of a publication off, also of tables that are none of its any more.
CREATE FUNCTION vsql_sync.drop_synchronous_triggers(p_name TEXT) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_one RECORD;
BEGIN
    FOR v_one IN SELECT t.tgrelid::regclass AS relation, t.tgname FROM pg_trigger t
                  WHERE t.tgfoid = 'vsql_sync.commit_on_targets()'::regprocedure AND NOT t.tgisinternal
                    AND t.tgname = 'vsql_sync_on_targets_' || substr(p_name, 6)
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', v_one.tgname, v_one.relation);
    END LOOP;
END
$$;
REVOKE ALL ON FUNCTION vsql_sync.drop_synchronous_triggers(TEXT) FROM PUBLIC;

-- Writes that would be committed here alone; nothing where all wait. `ancestor`: through which table.
CREATE FUNCTION vsql_sync.unwaited() RETURNS TABLE (publication TEXT, relation OID, why TEXT, ancestor OID)
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH here AS MATERIALIZED (SELECT r.* FROM vsql_sync.synchronous_relations() r)
    SELECT r.publication, r.relation, 'its trigger is missing, switched off or another one', NULL::oid
      FROM here r
     WHERE NOT EXISTS (SELECT FROM pg_trigger t
                        WHERE t.tgrelid = r.relation AND t.tgenabled = 'A' AND t.tgqual IS NULL AND t.tgattr = ''
                          AND t.tgfoid = 'vsql_sync.commit_on_targets()'::regprocedure
                          -- AFTER, for each statement, of INSERT, DELETE, UPDATE and TRUNCATE.
                          AND t.tgtype = 60
                          AND t.tgargs = convert_to(r.standby_name, 'UTF8') || '\x00'::bytea
                                         || convert_to(r.publication, 'UTF8') || '\x00'::bytea)
    UNION ALL
    SELECT r.publication, r.relation, format('publication %I does not send it', r.publication), NULL
      FROM here r
     WHERE CASE WHEN NOT EXISTS (SELECT FROM pg_publication p WHERE p.pubname = r.publication) THEN true
                -- By leaf, what has no leaf is not named.
                WHEN EXISTS (SELECT FROM pg_class c WHERE c.oid = r.relation AND c.relkind = 'p')
                     AND NOT EXISTS (SELECT FROM pg_partition_tree(r.relation) l WHERE l.isleaf) THEN false
                ELSE NOT vsql_sync.is_carried(r.publication, r.relation) END
    UNION ALL
    SELECT r.publication, r.relation, format('publication %I leaves out what is done to it', r.publication), NULL
      FROM here r JOIN pg_publication p ON p.pubname = r.publication
     WHERE NOT (p.pubinsert AND p.pubtruncate AND p.pubupdate AND p.pubdelete)
    UNION ALL
    -- A statement fires the triggers of the table it names, whichever tables' rows it changes.
    SELECT r.publication, r.relation,
           format('it can be written through %s, which is not waited for', i.inhparent::regclass), i.inhparent
      FROM here r JOIN pg_inherits i ON i.inhrelid = r.relation
     WHERE NOT EXISTS (SELECT FROM here a WHERE (a.publication, a.relation) = (r.publication, i.inhparent))
$$;

-- Forgets tables that are gone: their OIDs may become others'. One made anew under its name is taken when it is
-- published.
CREATE FUNCTION vsql_sync.forget_dropped() RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_one RECORD;
BEGIN
    FOR v_one IN DELETE FROM vsql_sync.synchronous_tables t USING pg_event_trigger_dropped_objects() d
                  WHERE d.classid = 'pg_class'::regclass AND d.objsubid = 0 AND d.objid = t.table_oid
              RETURNING t.publication, d.object_identity
    LOOP
        RAISE WARNING 'commits of table % waited for the targets of publication %: made anew, its commits wait once'
                      ' the publication has it again', v_one.object_identity, v_one.publication;
    END LOOP;
END
$$;
REVOKE ALL ON FUNCTION vsql_sync.forget_dropped() FROM PUBLIC;

-- Puts the triggers that refuse clients' writes onto new partitions of tables that have them.
CREATE FUNCTION vsql_sync.close_new_partitions() RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_one  RECORD;
    v_role TEXT := current_setting('session_replication_role');
BEGIN
    IF NOT EXISTS (SELECT FROM vsql_sync.pci_write_policy WHERE policy = 'reject') THEN
        RETURN;
    END IF;
    FOR v_one IN SELECT DISTINCT l.relid, p.write_primary FROM vsql_sync.pci_write_policy p
                   JOIN pg_trigger t ON t.tgfoid = 'vsql_sync.refuse_away_from_primary()'::regprocedure
                  CROSS JOIN LATERAL pg_partition_tree(t.tgrelid) l
                  WHERE NOT EXISTS (SELECT FROM pg_trigger o WHERE o.tgrelid = l.relid AND o.tgfoid = t.tgfoid)
    LOOP
        PERFORM set_config('session_replication_role', 'replica', true);
        PERFORM vsql_sync.set_write_primary(v_one.relid, v_one.write_primary);
    END LOOP;
    PERFORM set_config('session_replication_role', v_role, true)
      WHERE v_role <> current_setting('session_replication_role');
END
$$;
REVOKE ALL ON FUNCTION vsql_sync.close_new_partitions() FROM PUBLIC;

-- After DDL: a new partition, or a table made anew, gets its triggers; what would let commits pass by is refused. Not
-- for what was there before, and is of other tables: else nothing could be mended, nor anything else be done.
CREATE FUNCTION vsql_sync.guard_synchronous() RETURNS event_trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_found   RECORD;
    v_any     BOOLEAN := TG_EVENT = 'sql_drop';
    v_touched OID[];
BEGIN
    IF TG_EVENT = 'ddl_command_end' THEN
        SELECT array_agg(CASE WHEN d.classid = 'pg_trigger'::regclass
                              THEN (SELECT t.tgrelid FROM pg_trigger t WHERE t.oid = d.objid) ELSE d.objid END),
               coalesce(bool_or(d.classid = 'pg_publication'::regclass), false)
          INTO v_touched, v_any
          FROM pg_event_trigger_ddl_commands() d
         WHERE d.classid IN ('pg_class'::regclass, 'pg_trigger'::regclass, 'pg_publication'::regclass);
        IF TG_TAG IN ('CREATE TABLE', 'ALTER TABLE', 'CREATE SCHEMA') THEN
            PERFORM vsql_sync.close_new_partitions();
        END IF;
    END IF;
    IF NOT EXISTS (SELECT FROM vsql_sync.synchronous_publications) THEN
        RETURN;
    END IF;
    IF TG_EVENT = 'sql_drop' THEN
        PERFORM vsql_sync.forget_dropped();
        IF TG_TAG IN ('DROP TABLE', 'DROP SCHEMA') THEN
            RETURN;
        END IF;
    ELSIF TG_TAG IN ('CREATE TABLE', 'ALTER TABLE', 'CREATE SCHEMA', 'ALTER PUBLICATION') THEN
        PERFORM vsql_sync.make_synchronous_triggers();
    END IF;
    SELECT u.relation::regclass AS name, u.why INTO v_found FROM vsql_sync.unwaited() u
     WHERE EXISTS (SELECT FROM pg_class c WHERE c.oid = u.relation)
       AND (v_any OR u.relation = ANY (v_touched) OR u.ancestor = ANY (v_touched)
            OR EXISTS (SELECT FROM pg_partition_ancestors(u.relation) a WHERE a.relid = ANY (v_touched))) LIMIT 1;
    IF FOUND THEN
        RAISE feature_not_supported USING
            MESSAGE = format('commits of table %s wait for its targets: %s', v_found.name, v_found.why),
            HINT = 'Leave it as it is, or end the waiting first: syncctl sync disable.';
    END IF;
END
$$;
REVOKE ALL ON FUNCTION vsql_sync.guard_synchronous() FROM PUBLIC;

-- Only a superuser may make event triggers; without them the stream finds the same while it runs.
DO $$
BEGIN
    CREATE EVENT TRIGGER vsql_sync_synchronous ON ddl_command_end
        WHEN TAG IN ('CREATE TABLE', 'ALTER TABLE', 'CREATE SCHEMA', 'ALTER PUBLICATION', 'CREATE TRIGGER',
                     'ALTER TRIGGER')
        EXECUTE FUNCTION vsql_sync.guard_synchronous();
    CREATE EVENT TRIGGER vsql_sync_synchronous_drops ON sql_drop
        WHEN TAG IN ('DROP TRIGGER', 'DROP PUBLICATION', 'DROP OWNED', 'ALTER PUBLICATION', 'DROP TABLE', 'DROP SCHEMA')
        EXECUTE FUNCTION vsql_sync.guard_synchronous();
EXCEPTION WHEN insufficient_privilege THEN
    NULL;
END
$$;

-- How far a commit that applies another node's changes must be on this server's standbys: flushed here only, where
-- streams of ours are all there are.
CREATE FUNCTION vsql_sync.applier_level() RETURNS TEXT
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_names   TEXT := current_setting('synchronous_standby_names');
    v_members TEXT[];
BEGIN
    IF v_names = '' THEN
        RETURN 'on';
    END IF;
    v_members := vsql_sync.standby_members(v_names);
    IF cardinality(v_members) = 0
       OR EXISTS (SELECT FROM unnest(v_members) m
                   WHERE m NOT IN (SELECT p.standby_name FROM vsql_sync.synchronous_publications p)) THEN
        RETURN 'on';
    END IF;
    RETURN 'local';
END
$$;

-- Commits of this database that wait for a standby: how many, and since when the first one does.
CREATE FUNCTION vsql_sync.waiting_commits(OUT waiting BIGINT, OUT since TIMESTAMPTZ)
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT count(*), min(query_start) FROM pg_stat_activity
     WHERE datname = current_database() AND wait_event_type = 'IPC' AND wait_event = 'SyncRep'
$$;

-- Who may write tables with PCI data on this node, and which tables those are: on every other node than the primary
-- a write is refused where the policy is reject.
CREATE TABLE vsql_sync.pci_write_policy (
    one            BOOLEAN PRIMARY KEY DEFAULT true CHECK (one),
    write_primary  TEXT NOT NULL,
    policy         TEXT NOT NULL CHECK (policy IN ('reject', 'accept_lww')),
    decided_at     TIMESTAMPTZ NOT NULL DEFAULT now(),
    decided_by     TEXT NOT NULL DEFAULT session_user
);

-- BEFORE each statement. Argument: the primary. Applied changes come from there.
CREATE FUNCTION vsql_sync.refuse_away_from_primary() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT pg_replication_origin_session_is_setup() THEN
        RAISE read_only_sql_transaction USING
            MESSAGE = format('table %s holds cardholder data, and only node %s writes it', TG_RELID::regclass,
                             TG_ARGV[0]),
            HINT = format('Connect to the database of node %s for this write.', TG_ARGV[0]);
    END IF;
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION vsql_sync.refuse_away_from_primary() FROM PUBLIC;

-- Puts the refusing triggers onto a table and its partitions; without a primary, takes them off.
CREATE FUNCTION vsql_sync.set_write_primary(p_table OID, p_primary TEXT) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_one RECORD;
BEGIN
    FOR v_one IN SELECT c.oid FROM pg_class c
                  WHERE c.oid = p_table OR c.oid IN (SELECT relid FROM pg_partition_tree(p_table))
    LOOP
        EXECUTE format('DROP TRIGGER IF EXISTS vsql_sync_write_primary ON %s', v_one.oid::regclass);
        IF p_primary IS NOT NULL THEN
            EXECUTE format('CREATE TRIGGER vsql_sync_write_primary BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON %s'
                           ' FOR EACH STATEMENT EXECUTE FUNCTION vsql_sync.refuse_away_from_primary(%L)',
                           v_one.oid::regclass, p_primary);
            EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER vsql_sync_write_primary', v_one.oid::regclass);
        END IF;
    END LOOP;
END
$$;
REVOKE ALL ON FUNCTION vsql_sync.set_write_primary(OID, TEXT) FROM PUBLIC;
