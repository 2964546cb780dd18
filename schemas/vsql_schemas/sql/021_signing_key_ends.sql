-- The end of a node's signing key, as an entry of its chains says it, signed by the key that followed
-- (docs/design/0025).

ALTER TABLE vsql_sync.signers
    -- This node's own key, revoked: {"chain": [last sequence that counts, "its hash"]}, as its table had it then.
    ADD COLUMN ended_heads JSONB NOT NULL DEFAULT '{}',
    -- This node's own key, retired: its own word for the key that follows (DSSE).
    ADD COLUMN handover BYTEA;

-- What was read of such entries, one row for each key and chain they name. Whoever reads a row verifies its document.
CREATE TABLE vsql_sync.signed_ends (
    fingerprint     TEXT NOT NULL,                      -- the key that ended
    chain           TEXT NOT NULL,
    sequence        BIGINT NOT NULL CHECK (sequence >= 0),
    entry_hash      BYTEA NOT NULL CHECK (octet_length(entry_hash) = 32),
    said_by         TEXT NOT NULL,                      -- the key that signed it
    document        BYTEA NOT NULL,
    noted_at        TIMESTAMPTZ NOT NULL DEFAULT now(),
    -- Not the first one only: a row that somebody made up must not stand in a true one's place.
    PRIMARY KEY (fingerprint, chain, said_by, sequence, entry_hash)
);

ALTER TABLE vsql_sync.stream_targets
    -- Keys of the target that have ended, as far as the stream's own worker has read its acknowledgements to where its
    -- next key says that they did. A row of signed_ends alone says nothing of what was read.
    ADD COLUMN ends_read TEXT[] NOT NULL DEFAULT '{}';

-- What targets have acknowledged, as far as anything may be forgotten for it. Once a target's key has ended, nothing is
-- until its next key has said where, and that was read: until then a thief's acknowledgement looks like one of the
-- target's. Nobody reads what acknowledges a stream that is finished: there the next key's word is enough.
CREATE VIEW vsql_sync.counted_targets AS
SELECT t.chain, t.target, t.mismatch, h.held,
       CASE WHEN h.held THEN 0 ELSE t.acked_sequence END AS acked_sequence,
       CASE WHEN NOT h.held THEN t.acked_lsn END AS acked_lsn,
       CASE WHEN NOT h.held THEN t.acked_target_lsn END AS acked_target_lsn
  FROM vsql_sync.stream_targets t CROSS JOIN LATERAL (
    SELECT EXISTS (
        SELECT FROM vsql_sync.signers s
         WHERE s.node_name = t.target AND coalesce(s.revoked_at, s.retired_at) IS NOT NULL
           AND s.fingerprint <> ALL (t.ends_read)
           AND NOT EXISTS (SELECT FROM vsql_sync.signed_ends e JOIN vsql_sync.streams f
                                ON f.chain = t.chain AND f.direction = 'out' AND f.state = 'FINISHED'
                            WHERE e.fingerprint = s.fingerprint AND e.chain = t.chain || '.ack.' || t.target
                              AND EXISTS (SELECT FROM vsql_sync.signers l
                                           WHERE l.fingerprint = e.said_by AND l.node_name = t.target
                                             AND l.revoked_at IS NULL AND l.retired_at IS NULL))) AS held) h;

-- A target's acknowledgements are read anew from their beginning: what of them counts was not known before. It stays one
-- that commits wait for, and a mark for tombstones that came from them goes (columns of SQL 023, looked up by the call).
CREATE FUNCTION vsql_sync.forget_acknowledgements(p_chain TEXT, p_target TEXT) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM vsql_sync.signers s
                    WHERE s.node_name = p_target AND coalesce(s.revoked_at, s.retired_at) IS NOT NULL) THEN
        RAISE EXCEPTION 'no signing key of node % has ended', p_target USING ERRCODE = 'insufficient_privilege';
    END IF;
    UPDATE vsql_sync.stream_targets
       SET acked_sequence = 0, acked_lsn = NULL, acked_target_lsn = NULL, acked_at = NULL, mismatch = NULL,
           ends_read = '{}', joined = joined OR acked_sequence > 0 OR synced_sequence > 0,
           synced_sequence = forgiven_sequence, held = NULL
     WHERE chain = p_chain AND target = p_target;
    IF FOUND THEN
        DELETE FROM vsql_sync.chain_heads WHERE chain = p_chain || '.ack.' || p_target AND NOT own;
        DELETE FROM vsql_sync.purge_marks m USING vsql_sync.streams s
         WHERE s.chain = p_chain AND m.publication = s.publication;
    END IF;
END $$;
REVOKE ALL ON FUNCTION vsql_sync.forget_acknowledgements(TEXT, TEXT) FROM PUBLIC;

-- Called by whoever adds own entries, in that transaction: entries behind the end of a key that was revoked here are
-- refused, and a revocation waits for those that are being added. The number is "vsql" and one more.
CREATE FUNCTION vsql_sync.require_counted(p_signer TEXT, p_chain TEXT, p_sequence BIGINT) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(1987277165);
    IF EXISTS (SELECT FROM vsql_sync.signers s
                WHERE s.fingerprint = p_signer AND s.revoked_at IS NOT NULL
                  AND p_sequence > coalesce((s.ended_heads -> p_chain ->> 0)::bigint, 0)) THEN
        RAISE EXCEPTION 'key % was revoked, and entry % of chain % is not one it had signed by then',
            p_signer, p_sequence, p_chain USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
END $$;
REVOKE ALL ON FUNCTION vsql_sync.require_counted(TEXT, TEXT, BIGINT) FROM PUBLIC;

-- A line of the operators' log for a connection a service was refused, and an order to the stream's worker to put its
-- hash into the chain, signed, once it is let in. NULL: such an order waits already, or twenty others do. Services may
-- call it; they can order nothing else. Texts are cut: what is noted cannot fail for its length, nor fill the log.
CREATE FUNCTION vsql_sync.note_refused_connection(
    p_role TEXT, p_chain TEXT, p_place TEXT, p_cause TEXT, p_what TEXT
) RETURNS BIGINT
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_what  TEXT := left(p_what, 500);
    v_log   BIGINT;
    v_order BIGINT;
BEGIN
    IF p_place NOT IN ('kafka', 'postgresql') OR p_cause NOT IN ('authentication', 'authorization', 'tls')
       OR NOT EXISTS (SELECT FROM vsql_sync.streams s WHERE s.chain = p_chain
                         AND p_role = CASE s.direction WHEN 'out' THEN 'producer' ELSE 'consumer' END) THEN
        RAISE EXCEPTION 'no refused connection of a stream'
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    -- Two workers of one stream, the old one and the new.
    PERFORM pg_advisory_xact_lock(hashtextextended('vsql_sync refused ' || p_chain, 0));
    IF (SELECT count(*) >= 20 OR bool_or(c.args ->> 'what' = v_what) FROM vsql_sync.commands c
         WHERE c.role = p_role AND c.chain = p_chain AND c.verb = 'note-refusal'
           AND NOT EXISTS (SELECT FROM vsql_sync.command_results r WHERE r.command_id = c.id)) THEN
        RETURN NULL;
    END IF;
    v_log := vsql_sync.log_audit('connection.refused', p_place, p_chain, NULL,
                                 jsonb_build_object('role', p_role, 'cause', p_cause), false, v_what);
    INSERT INTO vsql_sync.commands (role, chain, verb, args, reason)
    VALUES (p_role, p_chain, 'note-refusal', jsonb_build_object('audit_log', v_log, 'what', v_what),
            'a connection was refused')
    RETURNING id INTO v_order;
    PERFORM pg_notify('vsql_sync_commands', v_order::text);
    RETURN v_log;
END $$;
REVOKE ALL ON FUNCTION vsql_sync.note_refused_connection(TEXT, TEXT, TEXT, TEXT, TEXT) FROM PUBLIC;
