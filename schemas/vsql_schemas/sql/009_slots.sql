-- How far a stream confirmed its slot where there was nothing to send: a slot beyond it hides changes.

ALTER TABLE vsql_sync.streams
    ADD COLUMN confirmed_lsn PG_LSN;                    -- 'out' live streams; NULL: not noted yet
