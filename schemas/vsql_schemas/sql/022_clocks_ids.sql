-- What this node knows of clocks, and ids that need no agreement between nodes (design 0026).

-- Written by the service that measures, read by status and by consumers of PCI data.
CREATE TABLE vsql_sync.clocks (
    node_id         TEXT PRIMARY KEY REFERENCES vsql_sync.nodes (node_id) ON DELETE CASCADE,
    offset_us       BIGINT,                             -- its database's clock minus ours; of this node: minus its host's
    uncertainty_us  BIGINT CHECK (uncertainty_us >= 0), -- the truth is at most this far from the offset
    measured_at     TIMESTAMPTZ,                        -- by our clock
    fresh_until     TIMESTAMPTZ,                        -- later it says nothing of now
    state           TEXT NOT NULL DEFAULT 'unknown' CHECK (state IN ('unknown', 'ok', 'warning', 'error')),
    asked_at        TIMESTAMPTZ,
    unanswered      INTEGER NOT NULL DEFAULT 0,         -- questions since the last answer
    ntp_source      TEXT,                               -- of this node: who says whether its host keeps time
    ntp_synchronised BOOLEAN,
    CHECK ((offset_us IS NULL) = (uncertainty_us IS NULL) AND (offset_us IS NULL) = (measured_at IS NULL)
           AND (offset_us IS NULL) = (fresh_until IS NULL))
) WITH (fillfactor = 50);                               -- updated all the time: stay HOT
COMMENT ON TABLE vsql_sync.clocks IS 'vsql-sync: how far the clocks of other nodes'' databases are from this one''s';

-- Changes of other nodes that had to wait until our clock was past them.
CREATE TABLE vsql_sync.future_commits (
    node_id         TEXT PRIMARY KEY REFERENCES vsql_sync.nodes (node_id) ON DELETE CASCADE,
    waits           BIGINT NOT NULL DEFAULT 0,
    most_ahead_us   BIGINT NOT NULL DEFAULT 0,          -- the farthest one; beyond max_clock_skew_ms the stream waits
    most_at         TIMESTAMPTZ,
    last_at         TIMESTAMPTZ NOT NULL DEFAULT now()
) WITH (fillfactor = 50);
COMMENT ON TABLE vsql_sync.future_commits IS 'vsql-sync: commits of other nodes that came from the future of this clock';

-- Ids: 41 bits of milliseconds since 2024, 10 of the node's number, 12 that count.
--
-- snowflake_values counts milliseconds and the twelve bits as one number, so it only ever goes up: what it gave is
-- never given again, whatever the clock does. Within a millisecond it is nextval(). It is brought up to the clock by
-- setval(), which would take back what others take in between. So: snowflake_turns is odd while that is done, and
-- whoever took a value counts it only if the turn was even before, and is the same after. One at a time does it, by a
-- lock that is no row's and no user's: it is given back by rolling back to before it was taken, which sequences do not
-- notice. So nobody waits for anybody's commit, and a session that is ended holds nothing. A turn that stayed odd, or
-- is odd after a crash (sequences jump ahead then), sends everybody to the lock, and the first one mends it.
CREATE SEQUENCE vsql_sync.snowflake_values AS BIGINT MINVALUE 0 MAXVALUE 9007199254740991 START 0;
CREATE SEQUENCE vsql_sync.snowflake_turns AS BIGINT MINVALUE 0 START 1;
-- A view, because nothing but LOCK TABLE takes this lock of one: ANALYZE in a transaction of the database's owner would
-- hold that of a table until its commit.
CREATE VIEW vsql_sync.snowflake_lock AS SELECT 1 AS one;
COMMENT ON VIEW vsql_sync.snowflake_lock IS 'vsql-sync: locked for a moment by snowflake_id(); nobody reads it';

-- Milliseconds since the ids' epoch, 2024-01-01 00:00 UTC, by this database's clock.
CREATE FUNCTION vsql_sync.snowflake_clock() RETURNS BIGINT
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$ SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint - 1704067200000 $$;
REVOKE EXECUTE ON FUNCTION vsql_sync.snowflake_clock() FROM PUBLIC;

-- Bring the values up to the clock, or one further; the value that is taken. Raises where the clock is too far back.
CREATE FUNCTION vsql_sync.snowflake_advance() RETURNS BIGINT
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_now   BIGINT;
    v_last  BIGINT;
    v_value BIGINT;
BEGIN
    BEGIN
        LOCK TABLE vsql_sync.snowflake_lock IN SHARE UPDATE EXCLUSIVE MODE;
        v_now := vsql_sync.snowflake_clock();
        v_last := coalesce(pg_sequence_last_value('vsql_sync.snowflake_values'), 0);
        IF v_now NOT BETWEEN 0 AND 2199023255551 THEN
            RAISE EXCEPTION 'no id can be made at this time: ids hold times from 2024 to 2093'
                USING ERRCODE = 'object_not_in_prerequisite_state', HINT = 'set the clock of this database''s server';
        END IF;
        -- A clock that went back: ids go on from the last one for so long, then nobody would believe their times.
        IF (v_last >> 12) - v_now > 60000 THEN
            RAISE EXCEPTION 'the clock of this database is % s behind the last id that was given: it was set back',
                round(((v_last >> 12) - v_now) / 1000.0, 1)
                USING ERRCODE = 'object_not_in_prerequisite_state',
                HINT = 'set it right, or wait until it is less than 60 s behind; where it was ahead when that id was'
                       ' given: vsql_sync.snowflake_restart() (docs/operations/ids.md)';
        END IF;
        IF coalesce(pg_sequence_last_value('vsql_sync.snowflake_turns'), 0) % 2 = 0 THEN
            PERFORM nextval('vsql_sync.snowflake_turns');
        END IF;
        -- Again: what was taken until the turn was odd counts.
        v_last := coalesce(pg_sequence_last_value('vsql_sync.snowflake_values'), 0);
        v_value := greatest(v_now << 12, v_last + 1);
        PERFORM setval('vsql_sync.snowflake_values', v_value);
        PERFORM nextval('vsql_sync.snowflake_turns');
        RAISE EXCEPTION USING ERRCODE = 'VS022', MESSAGE = 'this gives the lock back';
    EXCEPTION WHEN SQLSTATE 'VS022' THEN
        NULL;
    END;
    RETURN v_value;
END
$$;
REVOKE EXECUTE ON FUNCTION vsql_sync.snowflake_advance() FROM PUBLIC;

-- A new id of this node, for DEFAULT vsql_sync.snowflake_id(): greater than every one given before. Whoever inserts
-- may call it. Runs as its owner, who alone may move the sequences.
CREATE FUNCTION vsql_sync.snowflake_id() RETURNS BIGINT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_number BIGINT := (SELECT n.number FROM vsql_sync.nodes n WHERE n.is_local);
    v_turn   BIGINT := coalesce(pg_sequence_last_value('vsql_sync.snowflake_turns'), 0);
    -- As snowflake_clock() says it, without the call.
    v_now    BIGINT := floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint - 1704067200000;
    v_ahead  BIGINT := (coalesce(pg_sequence_last_value('vsql_sync.snowflake_values'), 0) >> 12) - v_now;
    v_value  BIGINT;
BEGIN
    IF v_number IS NULL THEN
        RAISE EXCEPTION 'this database is not a node, and ids have a node''s number in them'
            USING ERRCODE = 'object_not_in_prerequisite_state', HINT = 'run `syncctl node init` on it first';
    END IF;
    IF v_turn % 2 = 0 AND v_ahead BETWEEN 0 AND 60000 AND v_now >= 0 THEN
        v_value := nextval('vsql_sync.snowflake_values');
        IF coalesce(pg_sequence_last_value('vsql_sync.snowflake_turns'), 0) <> v_turn THEN
            v_value := NULL; -- taken while somebody brought them up to the clock
        END IF;
    END IF;
    IF v_value IS NULL THEN
        v_value := vsql_sync.snowflake_advance();
    END IF;
    RETURN ((v_value >> 12) << 22) | (v_number << 12) | (v_value & 4095);
END
$$;
COMMENT ON FUNCTION vsql_sync.snowflake_id() IS 'vsql-sync: a new id that no other node gives, for DEFAULT';

-- What an id says: when it was given, to the millisecond, by which node, and which one of that millisecond.
CREATE FUNCTION vsql_sync.snowflake_parts(id BIGINT, OUT given_at TIMESTAMPTZ, OUT node INTEGER, OUT sequence INTEGER)
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT to_timestamp(((id >> 22) + 1704067200000) / 1000.0), ((id >> 12) & 1023)::integer, (id & 4095)::integer
$$;
COMMENT ON FUNCTION vsql_sync.snowflake_parts(BIGINT) IS 'vsql-sync: time, node and count of an id of snowflake_id()';

-- Begin again at the clock after it was far ahead for a while. Ids of the time between may have been given: the caller
-- has looked, and says why. An operator's act: logged.
CREATE FUNCTION vsql_sync.snowflake_restart(p_reason TEXT) RETURNS VOID
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_now  BIGINT;
    v_last BIGINT;
BEGIN
    IF coalesce(btrim(p_reason), '') = '' THEN
        RAISE EXCEPTION 'beginning ids again needs a reason' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    BEGIN -- As snowflake_advance(): the lock is not held until the caller commits.
        LOCK TABLE vsql_sync.snowflake_lock IN SHARE UPDATE EXCLUSIVE MODE;
        v_now := vsql_sync.snowflake_clock();
        v_last := coalesce(pg_sequence_last_value('vsql_sync.snowflake_values'), 0);
        IF (v_last >> 12) - v_now <= 60000 THEN
            RAISE EXCEPTION 'ids are given: there is nothing to begin again'
                USING ERRCODE = 'object_not_in_prerequisite_state';
        END IF;
        IF coalesce(pg_sequence_last_value('vsql_sync.snowflake_turns'), 0) % 2 = 0 THEN
            PERFORM nextval('vsql_sync.snowflake_turns');
        END IF;
        PERFORM setval('vsql_sync.snowflake_values', v_now << 12);
        PERFORM nextval('vsql_sync.snowflake_turns');
        RAISE EXCEPTION USING ERRCODE = 'VS022', MESSAGE = 'this gives the lock back';
    EXCEPTION WHEN SQLSTATE 'VS022' THEN
        NULL;
    END;
    PERFORM vsql_sync.log_audit('ids.restart', 'node', vsql_sync.local_node(), jsonb_build_object('value', v_last),
        jsonb_build_object('value', v_now << 12, 'reason', left(p_reason, 1000)));
END
$$;
REVOKE EXECUTE ON FUNCTION vsql_sync.snowflake_restart(TEXT) FROM PUBLIC;
