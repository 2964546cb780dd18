-- The life of keys: every wrapping of a data key, operators' own keys, orders to destroy a KEK version.

-- The last announcement of each data key, as it was signed: its wrapped form, which a later KEK version wraps
-- anew. NULL: made before this file.
ALTER TABLE vsql_sync.deks ADD COLUMN announcement BYTEA;
ALTER TABLE vsql_sync.deks DROP CONSTRAINT deks_state_check;
ALTER TABLE vsql_sync.deks ADD CONSTRAINT deks_state_check
    CHECK (state IN ('active', 'retiring', 'retired', 'destroyed'));

-- Every KEK version that ever wrapped a data key. A key is gone only when all of these are.
CREATE TABLE vsql_sync.dek_wrappings (
    dek_id          TEXT NOT NULL REFERENCES vsql_sync.deks (dek_id),
    kms_provider    TEXT NOT NULL,
    kek_id          TEXT NOT NULL,
    announced_at    TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (dek_id, kms_provider, kek_id)
);
CREATE INDEX dek_wrappings_kek ON vsql_sync.dek_wrappings (kms_provider, kek_id);
INSERT INTO vsql_sync.dek_wrappings (dek_id, kms_provider, kek_id, announced_at)
SELECT dek_id, kms_provider, kek_id, created_at FROM vsql_sync.deks;

-- Public keys of people who may order and approve that a key is destroyed. Nothing is deleted: what they
-- signed must stay verifiable.
CREATE TABLE vsql_sync.operator_keys (
    fingerprint     TEXT PRIMARY KEY,
    operator        TEXT NOT NULL CHECK (operator <> ''),
    public_key      BYTEA NOT NULL CHECK (octet_length(public_key) = 32),
    enrolled_at     TIMESTAMPTZ NOT NULL DEFAULT now(),
    enrolled_by     TEXT NOT NULL DEFAULT session_user,
    ended_at        TIMESTAMPTZ,
    ended_reason    TEXT
);
CREATE UNIQUE INDEX operator_keys_one ON vsql_sync.operator_keys (operator) WHERE ended_at IS NULL;

-- Orders to destroy one version of a KEK, and with it every data key that no other version wraps.
-- requested (one signature), scheduled (two), destroyed, cancelled.
CREATE TABLE vsql_sync.shred_orders (
    id              BIGSERIAL PRIMARY KEY,
    kms_provider    TEXT NOT NULL,
    kek_id          TEXT NOT NULL,
    document        BYTEA NOT NULL,                     -- the order, signed by who asks
    approver        TEXT,                               -- fingerprint of who approves
    approval        BYTEA CHECK (octet_length(approval) = 64),
    state           TEXT NOT NULL DEFAULT 'requested'
                    CHECK (state IN ('requested', 'scheduled', 'destroyed', 'cancelled')),
    requested_at    TIMESTAMPTZ NOT NULL DEFAULT now(),
    not_before      TIMESTAMPTZ NOT NULL,
    approved_at     TIMESTAMPTZ,
    ended_at        TIMESTAMPTZ,
    ended_reason    TEXT,
    CHECK ((approver IS NULL) = (approval IS NULL)),
    CHECK (state IN ('requested', 'cancelled') OR approval IS NOT NULL)
);
-- One order at a time for one version.
CREATE UNIQUE INDEX shred_orders_one ON vsql_sync.shred_orders (kms_provider, kek_id)
    WHERE state <> 'cancelled';

ALTER TABLE vsql_sync.deks ADD COLUMN destroyed_by BIGINT REFERENCES vsql_sync.shred_orders (id);
ALTER TABLE vsql_sync.deks ADD CONSTRAINT deks_destroyed CHECK ((state = 'destroyed') = (destroyed_by IS NOT NULL));
