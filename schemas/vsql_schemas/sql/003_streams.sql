-- Streams, what they carry, how far they are, and the commands that steer them.
-- Runs after 001 (schema, nodes, the guide's tables) and 002 (audit). TEXT node columns hold node names.

-- Publications as this node knows them: PostgreSQL's publication of the same name plus our policy.
CREATE TABLE vsql_sync.publications (
    name          TEXT PRIMARY KEY CHECK (name ~ '^[a-z][a-z0-9_-]{0,62}$'),
    mode          TEXT NOT NULL DEFAULT 'uni-directional' CHECK (mode IN ('uni-directional', 'bidirectional')),
    exclude_pci   BOOLEAN NOT NULL DEFAULT false,
    created_at    TIMESTAMPTZ NOT NULL DEFAULT now(),
    created_by    TEXT NOT NULL DEFAULT session_user
);

-- columns NULL = all columns the table has.
CREATE TABLE vsql_sync.publication_tables (
    publication   TEXT NOT NULL REFERENCES vsql_sync.publications ON DELETE CASCADE,
    table_schema  TEXT NOT NULL,
    table_name    TEXT NOT NULL,
    columns       TEXT[],
    PRIMARY KEY (publication, table_schema, table_name)
);

-- Columns the operator marked as holding PCI data.
CREATE TABLE vsql_sync.pci_columns (
    table_schema  TEXT NOT NULL,
    table_name    TEXT NOT NULL,
    column_name   TEXT NOT NULL,
    marked_at     TIMESTAMPTZ NOT NULL DEFAULT now(),
    marked_by     TEXT NOT NULL DEFAULT session_user,
    PRIMARY KEY (table_schema, table_name, column_name)
);

-- Public keys this node trusts, pinned by an operator; never learnt from Kafka.
CREATE TABLE vsql_sync.signers (
    fingerprint   TEXT PRIMARY KEY,
    node_name     TEXT NOT NULL,
    public_key    BYTEA NOT NULL CHECK (octet_length(public_key) = 32),
    pinned_at     TIMESTAMPTZ NOT NULL DEFAULT now(),
    pinned_by     TEXT NOT NULL DEFAULT session_user,
    revoked_at    TIMESTAMPTZ,
    revoked_reason TEXT,
    retired_at    TIMESTAMPTZ,                          -- handed over: counts for what was signed before
    retired_reason TEXT,
    trusted_to    JSONB NOT NULL DEFAULT '{}'           -- revoked: {"chain": last sequence this node had seen}
);

-- One row per stream and direction on this node. direction 'out': this node's producer writes the chain;
-- 'in': this node's consumer applies it. kind 'copy' = first copy for one target.
-- state: NEW (nothing created yet), PREPARING, COPYING, CATCHING_UP, SYNCHRONIZED, DIVERGED, FAILED, PAUSED is in desired.
CREATE TABLE vsql_sync.streams (
    chain           TEXT NOT NULL,
    direction       TEXT NOT NULL CHECK (direction IN ('out', 'in')),
    kind            TEXT NOT NULL DEFAULT 'live' CHECK (kind IN ('live', 'copy')),
    publication     TEXT NOT NULL,
    origin          TEXT NOT NULL,
    target          TEXT NOT NULL DEFAULT '*',          -- '*' for an outgoing live stream
    slot_name       TEXT,                               -- 'out' live streams
    origin_name     TEXT,                               -- 'in' streams: replication origin
    audit_partition INTEGER NOT NULL DEFAULT 0,         -- of `chain`
    ack_partition   INTEGER NOT NULL DEFAULT 0,         -- of `<chain>.ack.<target>`
    desired         TEXT NOT NULL DEFAULT 'stopped' CHECK (desired IN ('stopped', 'running', 'paused')),
    desired_reason  TEXT,
    state           TEXT NOT NULL DEFAULT 'NEW'
                    CHECK (state IN ('NEW', 'PREPARING', 'COPYING', 'CATCHING_UP', 'SYNCHRONIZED', 'DIVERGED', 'FAILED', 'FINISHED')),
    state_reason    TEXT,
    slot_created    BOOLEAN NOT NULL DEFAULT false,     -- once true a missing slot is a gap, never re-created
    copy_wanted     BOOLEAN NOT NULL DEFAULT true,      -- 'in' live streams: first copy asked for
    pruned_sequence BIGINT NOT NULL DEFAULT 0,          -- 'out' live streams: records up to this entry were deleted
    created_at      TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (chain, direction)
);

-- Targets of this node's outgoing streams, with what they acknowledged.
CREATE TABLE vsql_sync.stream_targets (
    chain           TEXT NOT NULL,
    target          TEXT NOT NULL,
    acked_sequence  BIGINT NOT NULL DEFAULT 0,
    acked_lsn       PG_LSN,
    acked_at        TIMESTAMPTZ,
    mismatch        TEXT,                               -- first root that did not match, in words
    PRIMARY KEY (chain, target)
);

-- Progress of an incoming stream, written in the applying transaction.
CREATE TABLE vsql_sync.apply_progress (
    chain           TEXT PRIMARY KEY,
    epoch           BIGINT NOT NULL,
    incarnation     UUID NOT NULL,
    sequence        BIGINT NOT NULL,                    -- last applied entry of the chain
    entry_hash      BYTEA NOT NULL,
    batch           BIGINT NOT NULL,
    lsn_end         PG_LSN NOT NULL,
    commit_time     TIMESTAMPTZ,                        -- of the last applied source transaction
    audit_offset    BIGINT NOT NULL,                    -- next offset to read in the audit partition
    offsets         JSONB NOT NULL,                     -- {"topic": {"partition": next offset}}
    updated_at      TIMESTAMPTZ NOT NULL DEFAULT now()
);

-- What the applying transaction says of a batch; the signed acknowledgement follows from it after the commit.
CREATE TABLE vsql_sync.receipts (
    chain           TEXT NOT NULL,
    sequence        BIGINT NOT NULL,                    -- the manifest's
    epoch           BIGINT NOT NULL,
    batch           BIGINT NOT NULL,
    manifest        BYTEA NOT NULL,                     -- its SignedDocument, kept until acknowledged
    merkle_root     BYTEA NOT NULL,                     -- computed by this node
    verdicts        JSONB NOT NULL,                     -- {"applied": n, ...}
    acked           BOOLEAN NOT NULL DEFAULT false,
    applied_at      TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (chain, sequence)
);
CREATE INDEX receipts_unacked ON vsql_sync.receipts (chain, sequence) WHERE NOT acked;

-- Descriptors a resumed consumer needs before the source sends them again.
CREATE TABLE vsql_sync.relation_descriptors (
    chain           TEXT NOT NULL,
    hash            BYTEA NOT NULL,
    descriptor      BYTEA NOT NULL,                     -- Avro Relation
    stored_at       TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (chain, hash)
);

-- Tables of an incoming stream: since which LSN the live stream counts (rows before came with the copy).
CREATE TABLE vsql_sync.table_sync (
    chain           TEXT NOT NULL,                      -- the live chain
    table_schema    TEXT NOT NULL,
    table_name      TEXT NOT NULL,
    copy_lsn        PG_LSN,                             -- S: changes of transactions committing before it are in the copy
    copied_rows     BIGINT,
    state           TEXT NOT NULL DEFAULT 'SYNCHRONIZED'
                    CHECK (state IN ('COPYING', 'SYNCHRONIZED', 'DIVERGED')),
    reason          TEXT,
    PRIMARY KEY (chain, table_schema, table_name)
);

-- Changes that did not fit the target's rows: counts only, never values.
CREATE TABLE vsql_sync.anomalies (
    chain           TEXT NOT NULL,
    table_schema    TEXT NOT NULL,
    table_name      TEXT NOT NULL,
    kind            TEXT NOT NULL,                      -- insert_exists, update_missing, delete_missing
    count           BIGINT NOT NULL DEFAULT 0,
    last_batch      BIGINT,
    last_at         TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (chain, table_schema, table_name, kind)
);

-- Data keys this node's producers announced, and what they sealed.
CREATE TABLE vsql_sync.deks (
    dek_id          TEXT PRIMARY KEY,
    chain           TEXT NOT NULL,
    epoch           BIGINT NOT NULL,
    kms_provider    TEXT NOT NULL,
    kek_id          TEXT NOT NULL,
    algorithm       TEXT NOT NULL,
    created_at      TIMESTAMPTZ NOT NULL,
    retired_at      TIMESTAMPTZ,
    tuples          BIGINT NOT NULL DEFAULT 0,
    bytes           BIGINT NOT NULL DEFAULT 0,
    state           TEXT NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'retiring', 'retired'))
);

-- Operator's decisions on refused records and batches.
CREATE TABLE vsql_sync.decisions (
    id              BIGSERIAL PRIMARY KEY,
    chain           TEXT NOT NULL,
    kind            TEXT NOT NULL CHECK (kind IN ('ignore-record', 'skip-batch')),
    topic           TEXT,
    partition       INTEGER,
    kafka_offset    BIGINT,
    sequence        BIGINT,                             -- skip-batch: the manifest's sequence
    reason          TEXT NOT NULL CHECK (reason <> ''),
    decided_at      TIMESTAMPTZ NOT NULL DEFAULT now(),
    decided_by      TEXT NOT NULL DEFAULT session_user,
    honoured_at     TIMESTAMPTZ
);

-- Commands: written by syncctl, run once by the service they name.
CREATE TABLE vsql_sync.commands (
    id              BIGSERIAL PRIMARY KEY,
    role            TEXT NOT NULL CHECK (role IN ('producer', 'consumer')),
    chain           TEXT,                               -- NULL: every stream of that role
    verb            TEXT NOT NULL CHECK (verb ~ '^[a-z][a-z-]*$'),
    args            JSONB NOT NULL DEFAULT '{}',
    reason          TEXT NOT NULL DEFAULT '',
    requested_by    TEXT NOT NULL DEFAULT session_user,
    requested_at    TIMESTAMPTZ NOT NULL DEFAULT now()
);
-- One answer per worker that ran it.
CREATE TABLE vsql_sync.command_results (
    command_id      BIGINT NOT NULL REFERENCES vsql_sync.commands ON DELETE CASCADE,
    chain           TEXT NOT NULL,
    direction       TEXT NOT NULL,
    ok              BOOLEAN NOT NULL,
    message         TEXT NOT NULL DEFAULT '',
    finished_at     TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (command_id, chain, direction)
);

-- What the workers say of themselves. Unlogged: status writes must not feed the stream with WAL.
CREATE UNLOGGED TABLE vsql_sync.stream_status (
    chain           TEXT NOT NULL,
    direction       TEXT NOT NULL,
    state           TEXT NOT NULL,                      -- running, paused, waiting, refused, stopped, copying
    detail          JSONB NOT NULL,                     -- see docs/operations/status.md
    updated_at      TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (chain, direction)
);
