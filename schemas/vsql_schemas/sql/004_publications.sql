-- Publications of any shape of table: row filters, partitioned tables by leaf, columns let in later.

-- How PostgreSQL's publication sends partitioned tables: as their root, or each leaf by itself.
ALTER TABLE vsql_sync.publications ADD COLUMN via_leaf BOOLEAN NOT NULL DEFAULT false;

-- row_filter: as PostgreSQL prints it. added_columns: those of `columns` that were let in while a stream
-- ran; the WAL from before lacks them.
ALTER TABLE vsql_sync.publication_tables
    ADD COLUMN row_filter TEXT,
    ADD COLUMN added_columns TEXT[] NOT NULL DEFAULT '{}';

-- Leaves of tables that are published by leaf, kept when they are detached or dropped: the WAL may still hold
-- their rows. No root: an operator decided to pass over what the WAL holds of it.
CREATE TABLE vsql_sync.publication_leaves (
    publication   TEXT NOT NULL REFERENCES vsql_sync.publications ON DELETE CASCADE,
    table_schema  TEXT NOT NULL,
    table_name    TEXT NOT NULL,
    root_schema   TEXT,
    root_name     TEXT,
    seen_at       TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (publication, table_schema, table_name)
);
