-- Verifying the trail in the background: how far it is, what it found, and who is told.

-- One row a chain of this node. Positions are kept so that a service that starts again goes on from there; they
-- are no proof of anything: whoever can write them can at most have entries looked at later.
CREATE TABLE vsql_sync.audit_watch (
    chain         TEXT PRIMARY KEY,                     -- '': the audit topic
    verified_to   BIGINT NOT NULL DEFAULT 0,            -- the newest entry that was verified
    verified_at   TIMESTAMPTZ,
    newest        JSONB,                                -- the head there
    pass          JSONB,                                -- of the pass over all of it; NULL between two
    pass_began_at TIMESTAMPTZ,
    whole_to      BIGINT,                               -- where the last pass that found nothing ended
    whole_at      TIMESTAMPTZ
) WITH (fillfactor = 50);                               -- updated with every slice: stay HOT

-- What did not verify. A break that a later pass does not find any more is gone, and stays written.
CREATE TABLE vsql_sync.audit_breaks (
    id            BIGSERIAL PRIMARY KEY,
    source        TEXT NOT NULL CHECK (source IN ('trail', 'topic')),
    chain         TEXT NOT NULL,                        -- '': rows or records of no chain
    sequence      BIGINT,
    event_id      TEXT,
    what          TEXT NOT NULL,
    found_at      TIMESTAMPTZ NOT NULL DEFAULT now(),
    gone_at       TIMESTAMPTZ
);
CREATE UNIQUE INDEX audit_breaks_open ON vsql_sync.audit_breaks (source, chain, coalesce(sequence, 0), md5(what))
    WHERE gone_at IS NULL;

-- Note a break: a row, a line of the operators' log, and the order to the worker of that chain to put that line's
-- hash into it, signed. NULL when it is known already. Services may call it; they can order nothing else.
CREATE FUNCTION vsql_sync.note_audit_break(
    p_source TEXT, p_chain TEXT, p_sequence BIGINT, p_event_id TEXT, p_what TEXT
) RETURNS BIGINT
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_id     BIGINT;
    v_log    BIGINT;
    v_order  BIGINT;
    v_stream RECORD;
BEGIN
    INSERT INTO vsql_sync.audit_breaks (source, chain, sequence, event_id, what)
    VALUES (p_source, p_chain, p_sequence, p_event_id, p_what) ON CONFLICT DO NOTHING RETURNING id INTO v_id;
    IF v_id IS NULL THEN
        RETURN NULL;
    END IF;
    v_log := vsql_sync.log_audit('audit.break', 'chain', p_chain, NULL, jsonb_build_object(
        'break', v_id, 'source', p_source, 'sequence', p_sequence, 'event_id', p_event_id, 'what', p_what));
    SELECT s.chain, CASE s.direction WHEN 'out' THEN 'producer' ELSE 'consumer' END AS role INTO v_stream
    FROM vsql_sync.streams s WHERE s.state <> 'FINISHED' AND s.desired <> 'stopped'
      AND CASE s.direction WHEN 'out' THEN s.chain = p_chain
          ELSE s.chain || '.ack.' || vsql_sync.local_node() = p_chain END LIMIT 1;
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
