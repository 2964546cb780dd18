"""A load of known size over five tables of different shapes, made inside the server so that it is fast.

`run(conninfo, changes, max_tx)` returns the exact number of row changes it committed; transactions hold 1 to
`max_tx` changes and mix inserts, updates and deletes over several tables. A seed makes it repeatable.
"""

from __future__ import annotations

import psycopg

TABLES_SQL = """
CREATE TABLE plain (id bigint PRIMARY KEY, n int NOT NULL, label text,
    at timestamptz DEFAULT clock_timestamp());
CREATE TABLE composite (region text, number int, amount numeric(12,3), flags bit(5),
    PRIMARY KEY (region, number));
CREATE TABLE documents (id uuid PRIMARY KEY, body jsonb, big text, tags text[], part int NOT NULL);
CREATE INDEX ON documents (part);
CREATE TABLE "Mixed Case" ("Key" bigint PRIMARY KEY, "Some Value" double precision, "when" date, net inet);
CREATE TABLE by_index (code text NOT NULL, valid daterange NOT NULL, rate real, id bigint NOT NULL);
CREATE UNIQUE INDEX by_index_id ON by_index (id);
ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_index_id;
"""
TABLES = ["plain(*)", "composite(*)", "documents(*)", '"Mixed Case"(*)', "by_index(*)"]

_PROCEDURE = """
CREATE OR REPLACE PROCEDURE run_load(first bigint, wanted bigint, max_tx int, seed float8, INOUT done bigint)
LANGUAGE plpgsql AS $$
DECLARE
    k bigint := first; size int; counted bigint; step int := 0; s text := repeat('x', 40);
BEGIN
    PERFORM setseed(seed);
    done := 0;
    WHILE done < wanted LOOP
        -- sizes from 1 up: most are small, some are as large as allowed
        size := least(greatest(1, floor(max_tx ^ random())::int), greatest(1, wanted - done)::int);
        step := step + 1;
        CASE step % 7
        WHEN 0 THEN
            INSERT INTO composite SELECT 'r' || (g % 7), g, (g % 1000000) * 1.5, (g % 32)::int::bit(5)
                FROM generate_series(k, k + size - 1) g;
        WHEN 1 THEN
            INSERT INTO documents SELECT md5(g::text)::uuid, jsonb_build_object('n', g, 'a', ARRAY[1,2]),
                CASE WHEN g % 50 = 0 THEN repeat(md5(g::text), 200) ELSE s END,
                ARRAY['a', NULL, g::text], g % 1000
                FROM generate_series(k, k + size - 1) g;
        WHEN 2 THEN
            INSERT INTO "Mixed Case" SELECT g, g / 3.0, date '2020-01-01' + (g % 1000)::int,
                '10.0.0.1'::inet + g % 9999
                FROM generate_series(k, k + size - 1) g;
        WHEN 3 THEN
            INSERT INTO by_index SELECT 'c' || g % 10,
                daterange(date '2020-01-01', date '2020-01-02' + (g % 99)::int), g / 7.0, g
                FROM generate_series(k, k + size - 1) g;
        ELSE
            INSERT INTO plain SELECT g, g % 1000, CASE WHEN g % 3 = 0 THEN NULL ELSE s || g END
                FROM generate_series(k, k + size - 1) g;
        END CASE;
        done := done + size;
        k := k + size;
        IF step % 2 = 0 THEN
            UPDATE plain SET n = plain.n + 1, label = label || '!'
                WHERE id BETWEEN k - 3 * size AND k - 2 * size;
            GET DIAGNOSTICS counted = ROW_COUNT; done := done + counted;
            UPDATE composite SET amount = amount + 1
                WHERE region = 'r1' AND number BETWEEN k - 5 * size AND k;
            GET DIAGNOSTICS counted = ROW_COUNT; done := done + counted;
        END IF;
        IF step % 3 = 0 THEN
            UPDATE documents SET body = body || '{"seen": true}' WHERE part = step % 1000;
            GET DIAGNOSTICS counted = ROW_COUNT; done := done + counted;
            UPDATE "Mixed Case" SET "Some Value" = -"Some Value"
                WHERE "Key" BETWEEN k - 4 * size AND k - 3 * size;
            GET DIAGNOSTICS counted = ROW_COUNT; done := done + counted;
            UPDATE by_index SET rate = rate * 2 WHERE id BETWEEN k - 4 * size AND k - 3 * size;
            GET DIAGNOSTICS counted = ROW_COUNT; done := done + counted;
        END IF;
        IF step % 5 = 0 THEN
            DELETE FROM plain WHERE id BETWEEN k - 9 * size AND k - 8 * size;
            GET DIAGNOSTICS counted = ROW_COUNT; done := done + counted;
            DELETE FROM by_index WHERE id BETWEEN k - 9 * size AND k - 8 * size;
            GET DIAGNOSTICS counted = ROW_COUNT; done := done + counted;
            UPDATE plain SET id = -id WHERE id BETWEEN k - 2 AND k;
            GET DIAGNOSTICS counted = ROW_COUNT; done := done + counted;
        END IF;
        IF step % 11 = 0 THEN  -- a rolled back subtransaction leaves nothing
            BEGIN
                INSERT INTO plain VALUES (k + 1000000000, 1, 'never');
                RAISE EXCEPTION 'undo';
            EXCEPTION WHEN OTHERS THEN NULL;
            END;
        END IF;
        COMMIT;
    END LOOP;
END $$
"""


def prepare(conninfo: str) -> None:
    """Create the load procedure."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(_PROCEDURE)


def run(conninfo: str, changes: int, max_tx: int, *, first: int = 1, seed: float = 0.5) -> int:
    """Make at least `changes` row changes; returns how many were committed. Keys begin at `first`."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        row = connection.execute(
            "CALL run_load(%s, %s, %s, %s, 0)", (first, changes, max_tx, seed)
        ).fetchone()
    assert row is not None
    return int(row[0])
