-- Where a replication slot began: what was committed before it, and is in no manifest, will never be sent.

ALTER TABLE vsql_sync.streams
    ADD COLUMN slot_from PG_LSN;                        -- 'out' live streams; NULL: made by an older version
