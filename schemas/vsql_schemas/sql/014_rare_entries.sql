-- Entries that are neither a manifest nor an acknowledgement: some of a million, looked for by their type when a
-- service starts (what was cosigned, decided, shredded, joined). Without this each look reads the whole chain.

CREATE INDEX vsql_sync_audit_rare ON vsql_sync.vsql_sync_audit (event_type, chain, sequence)
    WHERE event_type <> 'replication_batch' AND event_type <> 'batch_applied';
