-- The RFC 9162 tree of a chain's entries, remembered with its head: what this node co-signs a checkpoint from.
--
-- A tree is the roots of its complete subtrees, 32 bytes each, the largest first; empty with a sequence above 0:
-- the head was stored before there were trees.

ALTER TABLE vsql_sync.chain_heads
    ADD COLUMN tree BYTEA NOT NULL DEFAULT '' CHECK (octet_length(tree) % 32 = 0);
ALTER TABLE vsql_sync.apply_progress
    ADD COLUMN tree BYTEA NOT NULL DEFAULT '' CHECK (octet_length(tree) % 32 = 0);

-- Entries that are neither a manifest nor an acknowledgement: some of a million, looked for by their type when a
-- service starts (what was cosigned, decided, shredded, joined). Without this each look reads the whole chain.

CREATE INDEX vsql_sync_audit_rare ON vsql_sync.vsql_sync_audit (event_type, chain, sequence)
    WHERE event_type <> 'replication_batch' AND event_type <> 'batch_applied';
