-- Verifying the trail in the background: how far it is, what it found, and who is told.

-- One row a chain of this node, and one for the audit topic. They are what status shows, and prove nothing: whoever
-- may write here can write anything. A service that starts believes none of it: it reads everything once more.
CREATE TABLE vsql_sync.audit_watch (
    source        TEXT NOT NULL CHECK (source IN ('trail', 'topic')),
    chain         TEXT NOT NULL,                        -- '' where source is topic: it is read as one
    verified_to   BIGINT NOT NULL DEFAULT 0,            -- the newest entry that was verified
    verified_at   TIMESTAMPTZ,                          -- when that was last seen to be the newest there is
    newest        JSONB,                                -- the head there
    whole_to      BIGINT,                               -- where the last pass that found nothing ended
    whole_at      TIMESTAMPTZ,
    PRIMARY KEY (source, chain)
) WITH (fillfactor = 50);                               -- updated all the time: stay HOT

-- What did not verify. A break that a later pass does not find any more is gone, and stays written.
CREATE TABLE vsql_sync.audit_breaks (
    id            BIGSERIAL PRIMARY KEY,
    source        TEXT NOT NULL CHECK (source IN ('trail', 'topic')),
    chain         TEXT NOT NULL,                        -- '': rows or records of no chain of this node
    sequence      BIGINT,
    event_id      TEXT,
    what          TEXT NOT NULL,
    found_at      TIMESTAMPTZ NOT NULL DEFAULT now(),
    gone_at       TIMESTAMPTZ
);
-- One place is broken once while it lasts, whatever words are found for it. No hash: FIPS mode has no md5.
CREATE UNIQUE INDEX audit_breaks_open ON vsql_sync.audit_breaks (source, chain, coalesce(sequence, 0))
    WHERE gone_at IS NULL;

-- Note a break: a row, a line of the operators' log, and the order to the worker of that chain to put that line's
-- hash into it, signed, now or when it starts. NULL when it is known already. Services may call it; they can order
-- nothing else. Texts are cut: what is noted cannot fail for its length, nor fill the log.
CREATE FUNCTION vsql_sync.note_audit_break(
    p_source TEXT, p_chain TEXT, p_sequence BIGINT, p_event_id TEXT, p_what TEXT
) RETURNS BIGINT
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_chain  TEXT := left(p_chain, 500);
    v_event  TEXT := left(p_event_id, 100);
    v_what   TEXT := left(p_what, 1000);
    v_id     BIGINT;
    v_log    BIGINT;
    v_order  BIGINT;
    v_stream RECORD;
BEGIN
    INSERT INTO vsql_sync.audit_breaks (source, chain, sequence, event_id, what)
    VALUES (p_source, v_chain, p_sequence, v_event, v_what) ON CONFLICT DO NOTHING RETURNING id INTO v_id;
    IF v_id IS NULL THEN
        RETURN NULL;
    END IF;
    v_log := vsql_sync.log_audit('audit.break', 'chain', v_chain, NULL, jsonb_build_object(
        'break', v_id, 'source', p_source, 'sequence', p_sequence, 'event_id', v_event, 'what', v_what));
    SELECT s.chain, CASE s.direction WHEN 'out' THEN 'producer' ELSE 'consumer' END AS role INTO v_stream
    FROM vsql_sync.streams s WHERE s.state <> 'FINISHED'
      AND CASE s.direction WHEN 'out' THEN s.chain = v_chain
          ELSE s.chain || '.ack.' || vsql_sync.local_node() = v_chain END LIMIT 1;
    IF FOUND THEN
        INSERT INTO vsql_sync.commands (role, chain, verb, args, reason)
        VALUES (v_stream.role, v_stream.chain, 'note-break', jsonb_build_object('audit_log', v_log),
                'the background verification found a break')
        RETURNING id INTO v_order;
        PERFORM pg_notify('vsql_sync_commands', v_order::text);
    END IF;
    RETURN v_id;
END
$$;
REVOKE EXECUTE ON FUNCTION vsql_sync.note_audit_break(TEXT, TEXT, BIGINT, TEXT, TEXT) FROM PUBLIC;

-- Breaks that a whole pass did not find any more are gone, and a line of the operators' log says which.
CREATE FUNCTION vsql_sync.end_audit_breaks(p_source TEXT, p_chain TEXT) RETURNS BIGINT
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_gone BIGINT[];
BEGIN
    WITH gone AS (
        UPDATE vsql_sync.audit_breaks SET gone_at = now()
        WHERE gone_at IS NULL AND source = p_source AND chain = left(p_chain, 500) RETURNING id
    )
    SELECT array_agg(id ORDER BY id) INTO v_gone FROM gone;
    IF v_gone IS NULL THEN
        RETURN 0;
    END IF;
    PERFORM vsql_sync.log_audit('audit.break-gone', 'chain', left(p_chain, 500), NULL,
        jsonb_build_object('source', p_source, 'breaks', to_jsonb(v_gone)));
    RETURN cardinality(v_gone);
END
$$;
REVOKE EXECUTE ON FUNCTION vsql_sync.end_audit_breaks(TEXT, TEXT) FROM PUBLIC;
