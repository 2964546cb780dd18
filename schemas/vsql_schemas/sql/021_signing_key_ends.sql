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

-- What targets have acknowledged, as far as anything may be forgotten for it. Once a target's key has ended, nothing is
-- until its next key has said where: until then a thief's acknowledgement looks like one of the target's.
CREATE VIEW vsql_sync.counted_targets AS
SELECT t.chain, t.target, t.mismatch, h.held,
       CASE WHEN h.held THEN 0 ELSE t.acked_sequence END AS acked_sequence,
       CASE WHEN NOT h.held THEN t.acked_lsn END AS acked_lsn,
       CASE WHEN NOT h.held THEN t.acked_target_lsn END AS acked_target_lsn
  FROM vsql_sync.stream_targets t CROSS JOIN LATERAL (
    SELECT EXISTS (
        SELECT FROM vsql_sync.signers s
         WHERE s.node_name = t.target AND coalesce(s.revoked_at, s.retired_at) IS NOT NULL
           AND NOT EXISTS (SELECT FROM vsql_sync.signed_ends e
                            WHERE e.fingerprint = s.fingerprint AND e.chain = t.chain || '.ack.' || t.target
                              AND EXISTS (SELECT FROM vsql_sync.signers l
                                           WHERE l.fingerprint = e.said_by AND l.node_name = t.target
                                             AND l.revoked_at IS NULL AND l.retired_at IS NULL))) AS held) h;

-- A target's acknowledgements are read anew from their beginning: what of them counts was not known before.
CREATE FUNCTION vsql_sync.forget_acknowledgements(p_chain TEXT, p_target TEXT) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM vsql_sync.signers s
                    WHERE s.node_name = p_target AND coalesce(s.revoked_at, s.retired_at) IS NOT NULL) THEN
        RAISE EXCEPTION 'no signing key of node % has ended', p_target USING ERRCODE = 'insufficient_privilege';
    END IF;
    UPDATE vsql_sync.stream_targets
       SET acked_sequence = 0, acked_lsn = NULL, acked_target_lsn = NULL, acked_at = NULL, mismatch = NULL
     WHERE chain = p_chain AND target = p_target;
    IF FOUND THEN
        DELETE FROM vsql_sync.chain_heads WHERE chain = p_chain || '.ack.' || p_target AND NOT own;
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
