-- The scope as it is signed and seen: kinds of PCI columns, columns taken out, what the streams really carried.
-- Scopes and observations are what reports stand on, and are append-only like the trail (docs/design/0017).

-- cardholder: account data, may be stored. authentication: CVV, track, PIN; never published.
ALTER TABLE vsql_sync.pci_columns
    ADD COLUMN kind TEXT NOT NULL DEFAULT 'cardholder' CHECK (kind IN ('cardholder', 'authentication'));

CREATE OR REPLACE VIEW vsql_sync.pci_marks AS
SELECT table_schema, table_name, column_name, marked_at, kind FROM vsql_sync.pci_columns
UNION
SELECT n.nspname::text, c.relname::text, v.name, p.marked_at, p.kind
FROM vsql_sync.pci_columns p
JOIN pg_catalog.pg_attribute a ON a.attrelid = p.table_oid AND a.attnum = p.attnum AND NOT a.attisdropped
JOIN pg_catalog.pg_class c ON c.oid = a.attrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
CROSS JOIN LATERAL (VALUES (p.column_name), (a.attname::text)) AS v (name);

-- Columns an operator looked at: they are not what their names suggest.
CREATE TABLE vsql_sync.pci_cleared (
    table_schema  TEXT NOT NULL,
    table_name    TEXT NOT NULL,
    column_name   TEXT NOT NULL,
    looks_like    TEXT NOT NULL,
    reason        TEXT NOT NULL CHECK (reason <> ''),
    cleared_at    TIMESTAMPTZ NOT NULL DEFAULT now(),
    cleared_by    TEXT NOT NULL DEFAULT session_user,
    PRIMARY KEY (table_schema, table_name, column_name)
);

-- Columns that were taken out: rows the WAL holds from before are sent without them.
ALTER TABLE vsql_sync.publication_tables ADD COLUMN removed_columns TEXT[] NOT NULL DEFAULT '{}';
CREATE OR REPLACE VIEW vsql_sync.published_tables AS
SELECT t.publication, t.table_schema, t.table_name,
    CASE WHEN t.columns IS NOT NULL THEN ARRAY(
        SELECT coalesce(a.attname::text, u.name)
        FROM ROWS FROM (unnest(t.columns), unnest(t.attnums)) WITH ORDINALITY u (name, attnum, place)
        LEFT JOIN pg_catalog.pg_attribute a
            ON a.attrelid = r.oid AND a.attnum = u.attnum AND NOT a.attisdropped
        ORDER BY u.place) END AS columns,
    CASE WHEN f.tree = t.filter_tree THEN f.row_filter ELSE t.row_filter END AS row_filter,
    t.added_columns, t.columns AS decided,
    ARRAY(SELECT a.attname::text FROM pg_catalog.pg_attribute a
          WHERE a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped) AS present,
    t.removed_columns
FROM vsql_sync.publication_tables t
LEFT JOIN pg_catalog.pg_class r ON r.oid = t.table_oid
    AND r.oid = pg_catalog.to_regclass(pg_catalog.format('%I.%I', t.table_schema, t.table_name))
LEFT JOIN vsql_sync.publication_filters f ON f.publication = t.publication AND f.table_oid = r.oid;

-- Scopes that epochs were opened under; their SHA-256 stands in the epoch's signed entry.
CREATE TABLE vsql_sync.scopes (
    chain         TEXT NOT NULL,
    sha256        TEXT NOT NULL,
    scope         TEXT NOT NULL,                        -- canonical JSON, as it was hashed
    written_at    TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (chain, sha256)
);
SELECT vsql_sync.make_append_only('vsql_sync.scopes');

-- Tables and columns as the producer described them in a batch, written before the batch left; their SHA-256
-- stands in the batch's signed manifest.
CREATE TABLE vsql_sync.scope_seen (
    chain         TEXT NOT NULL,
    epoch         BIGINT NOT NULL,
    batch         BIGINT NOT NULL,
    sha256        TEXT NOT NULL,
    seen          TEXT NOT NULL,                        -- canonical JSON, as it was hashed
    written_at    TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (chain, epoch, batch)
);
SELECT vsql_sync.make_append_only('vsql_sync.scope_seen');
