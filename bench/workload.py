"""The table and the loads of the benchmarks: an orders table of 8 columns, about 165 bytes a row."""

from __future__ import annotations

import psycopg

ORDERS_SQL = """
CREATE TABLE orders (
    id           bigint PRIMARY KEY,
    customer_id  bigint NOT NULL,
    status       text NOT NULL,
    amount_cents bigint NOT NULL,
    currency     char(3) NOT NULL,
    created_at   timestamptz NOT NULL,
    updated_at   timestamptz NOT NULL,
    note         text NOT NULL
);
"""

# One procedure call per load: the client must not be what is measured.
_LOAD = """
CREATE PROCEDURE load_orders(first bigint, total bigint, per_tx int) LANGUAGE plpgsql AS $$
DECLARE i bigint := first;
BEGIN
    WHILE i < first + total LOOP
        INSERT INTO orders
        SELECT g, g % 9973, 'authorised', (g * 37) % 100000, 'EUR', now(), now(), repeat(md5(g::text), 3)
        FROM generate_series(i, least(i + per_tx, first + total) - 1) g;
        i := i + per_tx;
        COMMIT;
    END LOOP;
END $$
"""


def prepare(conninfo: str) -> None:
    """Create the load procedure at the source."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(_LOAD)


def load_orders(conninfo: str, first: int, total: int, per_tx: int) -> None:
    """Insert `total` orders beginning with id `first`, `per_tx` a transaction."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("SET synchronous_commit = off")
        connection.execute("CALL load_orders(%s, %s, %s)", (first, total, per_tx))
        connection.execute("SET synchronous_commit = on")
        connection.execute("SELECT txid_current()")  # flush what was committed asynchronously
