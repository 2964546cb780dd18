-- Leaf hashes of batches, by which a divergent tuple is named (design 0019): one row a batch and topic-partition.
--
-- Rows lie in one of 32 slots, used in turn; what is old, or too much, is emptied slot by slot (TRUNCATE), so
-- nothing is deleted row by row and no table is made or dropped while services run.

CREATE TABLE vsql_sync.batch_leaves (
    slot            SMALLINT NOT NULL,
    chain           TEXT NOT NULL,                      -- the stream's, at its target, too
    sequence        BIGINT NOT NULL,                    -- the manifest's
    part            INTEGER NOT NULL CHECK (part >= 0), -- place of the topic-partition in the manifest, from 0
    leaves          BYTEA NOT NULL CHECK (octet_length(leaves) > 0 AND octet_length(leaves) % 32 = 0),
    kept_at         TIMESTAMPTZ NOT NULL DEFAULT now()
) PARTITION BY LIST (slot);
COMMENT ON TABLE vsql_sync.batch_leaves IS 'vsql-sync: leaf hashes of sealed tuples, for syncctl audit diff';
-- Hashes do not compress.
ALTER TABLE vsql_sync.batch_leaves ALTER COLUMN leaves SET STORAGE EXTERNAL;
CREATE INDEX batch_leaves_place ON vsql_sync.batch_leaves (chain, sequence);

DO $$
BEGIN
    FOR n IN 0..31 LOOP
        -- What is emptied within days needs no vacuum before.
        EXECUTE format('CREATE TABLE vsql_sync.%I PARTITION OF vsql_sync.batch_leaves FOR VALUES IN (%s)'
                       ' WITH (autovacuum_vacuum_insert_threshold = -1,'
                       ' toast.autovacuum_vacuum_insert_threshold = -1)',
                       'batch_leaves_' || lpad(n::text, 2, '0'), n);
    END LOOP;
END
$$;

-- Slots that hold rows. The one without an end is written to.
CREATE TABLE vsql_sync.leaf_slots (
    slot            SMALLINT PRIMARY KEY CHECK (slot BETWEEN 0 AND 31),
    begun_at        TIMESTAMPTZ NOT NULL DEFAULT now(),
    ended_at        TIMESTAMPTZ
);
