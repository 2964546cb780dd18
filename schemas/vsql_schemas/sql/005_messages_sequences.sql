-- Logical messages and sequences that leave with a publication (docs/design/0007).

ALTER TABLE vsql_sync.publications
    ADD COLUMN message_prefixes TEXT[] NOT NULL DEFAULT '{}',   -- logical messages with exactly these are carried
    ADD COLUMN sequences BOOLEAN NOT NULL DEFAULT false;        -- those its columns own or take their default from

-- Sequences that are named beside those.
CREATE TABLE vsql_sync.publication_sequences (
    publication     TEXT NOT NULL REFERENCES vsql_sync.publications ON DELETE CASCADE,
    sequence_schema TEXT NOT NULL,
    sequence_name   TEXT NOT NULL,
    PRIMARY KEY (publication, sequence_schema, sequence_name)
);

-- What an incoming stream said last of each sequence; written in the applying transaction.
CREATE TABLE vsql_sync.sequence_sync (
    chain           TEXT NOT NULL,
    sequence_schema TEXT NOT NULL,                      -- as the source names it
    sequence_name   TEXT NOT NULL,
    last_value      BIGINT NOT NULL,
    is_called       BOOLEAN NOT NULL,
    set_back        BIGINT NOT NULL DEFAULT 0,          -- how often the source's was set back, and this one after it
    applied_at      TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (chain, sequence_schema, sequence_name)
);
