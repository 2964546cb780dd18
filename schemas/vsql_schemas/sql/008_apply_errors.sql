-- Operators' decisions on single source transactions that this node refuses to apply (design/0011).

ALTER TABLE vsql_sync.decisions DROP CONSTRAINT decisions_kind_check;
ALTER TABLE vsql_sync.decisions
    ADD COLUMN xid         BIGINT,                     -- *-transaction: the source transaction, as its packs name it
    ADD COLUMN commit_lsn  PG_LSN,
    ADD COLUMN commit_time TIMESTAMPTZ,
    ADD CONSTRAINT decisions_kind_check CHECK
        (kind IN ('ignore-record', 'skip-batch', 'skip-transaction', 'park-transaction')),
    ADD CONSTRAINT decisions_transaction_check CHECK
        (kind NOT LIKE '%-transaction' OR num_nulls(xid, commit_lsn, commit_time) = 0);
-- One decision for a transaction: it is skipped or parked, never both.
CREATE UNIQUE INDEX decisions_transaction ON vsql_sync.decisions (chain, xid, commit_lsn, commit_time)
    WHERE kind IN ('skip-transaction', 'park-transaction');

-- What the acknowledgement says beside its counts: transactions that were passed over.
ALTER TABLE vsql_sync.receipts ADD COLUMN detail JSONB NOT NULL DEFAULT '{}';

-- Source transactions that were parked, and where their sealed batches lie in the dead-letter topic.
CREATE TABLE vsql_sync.parked (
    decision      BIGINT PRIMARY KEY,
    chain         TEXT NOT NULL,
    xid           BIGINT NOT NULL,
    commit_lsn    PG_LSN NOT NULL,
    commit_time   TIMESTAMPTZ NOT NULL,
    parked_at     TIMESTAMPTZ NOT NULL DEFAULT now(),
    replayed_at   TIMESTAMPTZ,                         -- written with the rows: applied once at most
    verdicts      JSONB NOT NULL DEFAULT '{}',         -- of the replay
    replay_signed BOOLEAN NOT NULL DEFAULT false       -- the chain of acknowledgements says so
);
CREATE TABLE vsql_sync.parked_batches (
    decision      BIGINT NOT NULL REFERENCES vsql_sync.parked,
    sequence      BIGINT NOT NULL,                     -- the manifest's
    entry_hash    BYTEA NOT NULL,                      -- of the manifest that was verified
    topic         TEXT NOT NULL,                       -- the dead-letter topic, partition 0
    offsets       BIGINT[] NOT NULL,                   -- of its records: others write between them
    changes       BIGINT NOT NULL,                     -- of the transaction in this batch
    tables        TEXT[] NOT NULL,
    dek_id        TEXT NOT NULL,                       -- what it is sealed with
    descriptors   BYTEA[] NOT NULL,                    -- Avro Relations the batch names
    PRIMARY KEY (decision, sequence)
);
