-- Partitioned apply: a publication's rows lie in several partitions, and several members apply them (design 0015).

ALTER TABLE vsql_sync.publications
    ADD COLUMN apply_mode TEXT NOT NULL DEFAULT 'transactional'
        CHECK (apply_mode IN ('transactional', 'partitioned'));

ALTER TABLE vsql_sync.streams                           -- 'in' live streams: how they are applied here
    ADD COLUMN apply_mode TEXT NOT NULL DEFAULT 'transactional'
        CHECK (apply_mode IN ('transactional', 'partitioned'));

-- A share is what lies in the Kafka partitions of one number, of all tables.
CREATE TABLE vsql_sync.shares (
    chain           TEXT NOT NULL,
    share           INTEGER NOT NULL CHECK (share >= 0),
    member          INTEGER,                            -- who applies it; NULL: nobody
    sequence        BIGINT NOT NULL DEFAULT 0,          -- last entry of the chain whose rows of this share are applied
    stopped_at      BIGINT,                             -- its member could not apply this entry; the coordinator does
    stopped_record  TEXT,                               -- what it refused there, if it did not verify
    stopped_error   TEXT,
    updated_at      TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (chain, share)
);

-- What a member found in its parts of a batch; together they become the batch's receipt.
CREATE TABLE vsql_sync.part_receipts (
    chain           TEXT NOT NULL,
    sequence        BIGINT NOT NULL,                    -- the manifest's
    share           INTEGER NOT NULL,                   -- the first of those it is about
    parts           JSONB NOT NULL,                     -- {"topic/partition": root, computed by this node, in hex}
    verdicts        JSONB NOT NULL,                     -- {"applied": n, ...}
    commit_time     TIMESTAMPTZ,                        -- of the last source transaction among them
    detail          JSONB NOT NULL DEFAULT '{}',        -- transactions that were passed over by decision
    PRIMARY KEY (chain, sequence, share)
);
