-- What was decided of columns follows them when they are renamed: PCI marks, lists of columns, row filters.
-- PostgreSQL's publication knows columns by number, and so do these from here on; names stay what was decided.

-- Where a marked column is. NULL: known by its name alone.
ALTER TABLE vsql_sync.pci_columns ADD COLUMN table_oid OID, ADD COLUMN attnum SMALLINT;
-- Names under which marked columns are, or may still stand in the WAL: that of the mark, and the present one.
CREATE VIEW vsql_sync.pci_marks AS
SELECT table_schema, table_name, column_name, marked_at FROM vsql_sync.pci_columns
UNION
SELECT n.nspname::text, c.relname::text, v.name, p.marked_at
FROM vsql_sync.pci_columns p
JOIN pg_catalog.pg_attribute a ON a.attrelid = p.table_oid AND a.attnum = p.attnum AND NOT a.attisdropped
JOIN pg_catalog.pg_class c ON c.oid = a.attrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
CROSS JOIN LATERAL (VALUES (p.column_name), (a.attname::text)) AS v (name);

-- A mark whose column was dropped belongs to the one of its name that was made since.
CREATE FUNCTION vsql_sync.anchor_marks() RETURNS VOID
LANGUAGE sql SET search_path = pg_catalog AS $$
    UPDATE vsql_sync.pci_columns p SET table_oid = a.attrelid, attnum = a.attnum
    FROM pg_attribute a
    WHERE a.attrelid = to_regclass(format('%I.%I', p.table_schema, p.table_name))
      AND a.attname = p.column_name AND NOT a.attisdropped
      AND NOT EXISTS (SELECT FROM pg_attribute o
          WHERE o.attrelid = p.table_oid AND o.attnum = p.attnum AND NOT o.attisdropped)
$$;

SELECT vsql_sync.anchor_marks();

-- attnums: beside `columns`, one each. filter_tree: the filter as PostgreSQL stores it, by column numbers.
ALTER TABLE vsql_sync.publication_tables
    ADD COLUMN table_oid OID, ADD COLUMN attnums SMALLINT[], ADD COLUMN filter_tree TEXT;

-- PostgreSQL's publications: their filters as text, and as trees without the places in the statement's text.
CREATE VIEW vsql_sync.publication_filters AS
SELECT b.pubname::text AS publication, x.prrelid AS table_oid,
    pg_catalog.pg_get_expr(x.prqual, x.prrelid) AS row_filter,
    pg_catalog.regexp_replace(x.prqual::text, ':location -?\d+', '', 'g') AS tree
FROM pg_catalog.pg_publication_rel x JOIN pg_catalog.pg_publication b ON b.oid = x.prpubid;

-- Note the numbers of what was decided by name a moment ago, of tables without a number of their own.
CREATE FUNCTION vsql_sync.note_places(p_publication TEXT) RETURNS VOID
LANGUAGE sql SET search_path = pg_catalog AS $$
    UPDATE vsql_sync.publication_tables t SET table_oid = r.oid,
        attnums = CASE WHEN t.columns IS NOT NULL THEN ARRAY(
            SELECT a.attnum FROM unnest(t.columns) WITH ORDINALITY u (name, place)
            LEFT JOIN pg_attribute a ON a.attrelid = r.oid AND a.attname = u.name AND NOT a.attisdropped
            ORDER BY u.place) END,
        filter_tree = (SELECT f.tree FROM vsql_sync.publication_filters f
            WHERE f.publication = t.publication AND f.table_oid = r.oid AND f.row_filter = t.row_filter)
    FROM pg_class r
    WHERE r.oid = to_regclass(format('%I.%I', t.table_schema, t.table_name))
      AND t.publication = p_publication AND t.table_oid IS NULL
$$;
SELECT vsql_sync.note_places(name) FROM vsql_sync.publications;

-- What is published, under the names columns have now. `decided` are those they had, in the same order;
-- `present` are all of the table's.
CREATE VIEW vsql_sync.published_tables AS
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
          WHERE a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped) AS present
FROM vsql_sync.publication_tables t
LEFT JOIN pg_catalog.pg_class r ON r.oid = t.table_oid
    AND r.oid = pg_catalog.to_regclass(pg_catalog.format('%I.%I', t.table_schema, t.table_name))
LEFT JOIN vsql_sync.publication_filters f ON f.publication = t.publication AND f.table_oid = r.oid;
