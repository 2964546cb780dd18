-- What a schema registry answered (design 0021): so that a restart does not need it.

CREATE TABLE vsql_sync.registry_ids (
    url             TEXT NOT NULL,
    subject         TEXT NOT NULL,
    schema_hash     BYTEA NOT NULL CHECK (octet_length(schema_hash) = 32), -- SHA-256 of the schema's text
    id              INTEGER NOT NULL CHECK (id > 0),
    answered_at     TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (url, subject, schema_hash)
);
COMMENT ON TABLE vsql_sync.registry_ids IS 'vsql-sync: ids a schema registry gave to the schema of packs';
