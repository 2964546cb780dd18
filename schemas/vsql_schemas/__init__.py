"""The contracts as data files: Avro schemas (avro/) and the vsql_sync SQL schema (sql/)."""
