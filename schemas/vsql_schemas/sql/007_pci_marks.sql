-- PCI marks follow their columns when they are renamed: what is signed of a batch must stay true.

-- Where the column was when it was marked. NULL: known by its name alone.
ALTER TABLE vsql_sync.pci_columns ADD COLUMN table_oid OID, ADD COLUMN attnum SMALLINT;
UPDATE vsql_sync.pci_columns p SET table_oid = a.attrelid, attnum = a.attnum
FROM pg_catalog.pg_attribute a
WHERE a.attrelid = pg_catalog.to_regclass(pg_catalog.format('%I.%I', p.table_schema, p.table_name))
  AND a.attname = p.column_name AND NOT a.attisdropped;

-- Names under which marked columns are, or may still stand in the WAL: that of the mark, and the present one.
CREATE VIEW vsql_sync.pci_marks AS
SELECT table_schema, table_name, column_name, marked_at FROM vsql_sync.pci_columns
UNION
SELECT p.table_schema, p.table_name, a.attname::text, p.marked_at
FROM vsql_sync.pci_columns p
JOIN pg_catalog.pg_attribute a ON a.attrelid = p.table_oid AND a.attnum = p.attnum AND NOT a.attisdropped;
