-- What a publication sends of changes, as it was decided: PostgreSQL's own may be altered by others.

ALTER TABLE vsql_sync.publications ADD COLUMN insert_only BOOLEAN NOT NULL DEFAULT false;
UPDATE vsql_sync.publications v SET insert_only = NOT p.pubupdate
FROM pg_catalog.pg_publication p WHERE p.pubname = v.name;
