"""Columns that add up: other strategies, one writer alone, sessions and types of keys, hot rows.

No Kafka: changes are read from slots, and applied by the product (both_write.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from tests.services.both_write import Both, joined, prepared, table
from tests.stack import Stack
from vsql_consumers import state, writers
from vsql_shared.changes import TableName
from vsql_shared.errors import DivergedError
from vsql_shared.pg import nodes, peers
from vsql_shared.strategies import Strategies

KEYS = itertools.count(1)
REALS = {"f4": "real", "f8": "double precision", "n": "numeric"}
DDL = (
    table("firsts", "id int PRIMARY KEY, note text, bal int NOT NULL DEFAULT 0", "first_write_wins")
    + table("hot", "id int PRIMARY KEY, address text, bal int NOT NULL DEFAULT 0", "last_write_wins")
    + table(
        "reals",
        "id int PRIMARY KEY, "
        + ", ".join(f"{name} {kind} NOT NULL DEFAULT 0" for name, kind in REALS.items()),
        "last_write_wins",
    )
    + table("books", "k text PRIMARY KEY, note text, bal int NOT NULL DEFAULT 0", "last_write_wins")
    + "CREATE EXTENSION isn SCHEMA public;"
    + table("catalogue", "k public.isbn13 PRIMARY KEY, note text", "last_write_wins")
    + table("sold", "k public.isbn13 PRIMARY KEY, bal int NOT NULL DEFAULT 0", "last_write_wins")
)
TABLES = ("firsts", "hot", "reals", "books", "catalogue")
ADDING = {
    **{TableName("public", name): {"bal": ""} for name in ("firsts", "hot", "books")},
    TableName("public", "reals"): dict.fromkeys(REALS, ""),
}
STRATEGIES = Strategies(tables={TableName("public", "firsts"): "first_write_wins"}, adding=ADDING)


@pytest.fixture(scope="module")
def both(stack: Stack, schema_of: Callable[[int], str]) -> Iterator[Both]:
    with ExitStack() as ending:
        there = [stack.new_database(18, name, schema_of(18)) for name in ("a", "b")]
        for conninfo in there:
            ending.callback(stack.drop_database, conninfo)
        cluster = stack.new_cluster_name()
        made = joined(prepared(there[0], there[1], cluster, DDL, *TABLES), STRATEGIES)
        ending.callback(made.end)
        yield made


def _known(both: Both, name: str) -> int:
    key = next(KEYS)
    both.a.do(f"INSERT INTO public.{name} (id) VALUES ({key})")
    both.exchange()
    return key


def _rows(both: Both, name: str, key: object) -> list[tuple[Any, ...]]:
    """Of both nodes, which are alike."""
    text = f"SELECT t::text FROM public.{name} t WHERE t::text LIKE '({key},%'"
    found = both.a.rows(text)
    assert both.b.rows(text) == found
    return found


def _logged(both: Both, key: int) -> list[tuple[Any, ...]]:
    return both.a.rows(
        "SELECT conflict_type, resolution, local_origin FROM vsql_sync.conflict_log"
        f" WHERE table_name = 'firsts' AND row_key ->> 'id' = '{key}' ORDER BY id"
    )


# Strategies that order by generations


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
def test_rows_with_generations_are_inserted_at_any_isolation_and_used_keys_are_not(
    both: Both, isolation: str
) -> None:
    key = next(KEYS)
    with psycopg.connect(both.a.conninfo) as conn:
        conn.execute(f"SET TRANSACTION ISOLATION LEVEL {isolation}".encode())
        conn.execute(f"INSERT INTO public.firsts (id, bal) VALUES ({key}, 5)".encode())
    both.exchange()
    assert len(_rows(both, "firsts", key)) == 1
    both.a.do(f"DELETE FROM public.firsts WHERE id = {key}")
    with psycopg.connect(both.a.conninfo) as conn:
        conn.execute(f"SET TRANSACTION ISOLATION LEVEL {isolation}".encode())
        with pytest.raises(psycopg.errors.UniqueViolation, match="cannot be used again"):
            conn.execute(f"INSERT INTO public.firsts (id) VALUES ({key})".encode())
    both.exchange()


def test_a_version_that_was_kept_ends_where_the_same_transaction_stands_over_it(both: Both) -> None:
    key = _known(both, "firsts")
    both.a.do(f"UPDATE public.firsts SET note = 'of a' WHERE id = {key}")
    update = "UPDATE public.firsts SET note = '{}', bal = bal + 1 WHERE id = {};"
    both.b.do(f"BEGIN; {update.format('b 1', key)} {update.format('b 2', key)} COMMIT")
    both.exchange()
    said = (
        "SELECT v.node FROM vsql_sync.row_versions v, public.firsts t"
        f" WHERE t.id = {key} AND v.row_xmin = t.xmin AND v.table_name = 'firsts'"
    )
    assert both.a.rows(said) == []
    before = _logged(both, key)
    assert [one[1:] for one in before] == [("KEPT_LOCAL", "node-a"), ("APPLIED_REMOTE", "node-a")]
    both.b.do(update.format("b 3", key))
    both.exchange()
    assert _logged(both, key) == before, "the row was B's: this met nobody else's"
    assert "b 3" in _rows(both, "firsts", key)[0][0]
    assert both.a.rows(f"SELECT bal FROM public.firsts WHERE id = {key}") == [(3,)]


def test_a_version_without_a_time_is_not_taken_for_an_old_one(both: Both) -> None:
    key = _known(both, "firsts")
    both.b.do(f"UPDATE public.firsts SET note = 'of b' WHERE id = {key}")
    both.b.conn.execute(
        "INSERT INTO vsql_sync.row_versions"
        " (table_schema, table_name, row_key, row_xmin, at, node, generation)"
        " SELECT 'public', 'firsts', sha256(record_send(ROW(t.id))), t.xmin, NULL, 'node-b', 1"
        f" FROM public.firsts t WHERE id = {key}".encode()
    )
    both.a.do(f"UPDATE public.firsts SET note = 'of a' WHERE id = {key}")
    from_a = both.a.source.batches()
    with pytest.raises(DivergedError, match="which may be younger"):
        both.b.apply(from_a)
    both.b.applier.abort()
    both.b.conn.execute("DELETE FROM vsql_sync.row_versions")
    from_b = both.b.source.batches()
    both.b.apply(from_a)
    both.a.apply(from_b)
    for side in (both.a, both.b):
        side.source.batches()
    assert len(_rows(both, "firsts", key)) == 1


# Rounded and spelled


HISTORIES = {
    "digits": ("f8", "0.1", "1000.3", "0.1"),
    "far and back": ("f8", "5", "1e17", "5"),
    "end to end": ("f8", "-1.7e308", "1.7e308"),
    "negative zero": ("f8", "1", "-0.0", "0"),
    "real": ("f4", "0.1", "1e10", "0.1"),
    "fewer digits": ("n", "1.50", "2", "2.000", "0.5"),
}


@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES.keys())
def test_what_one_node_alone_writes_is_the_same_at_the_other_to_the_last_digit(
    both: Both, history: tuple[str, ...]
) -> None:
    name, first, *values = history
    key = next(KEYS)
    both.a.do(f"INSERT INTO public.reals (id, {name}) VALUES ({key}, '{first}')")
    both.exchange()
    for value in values:
        both.a.do(f"UPDATE public.reals SET {name} = '{value}' WHERE id = {key}")
        both.exchange()
        assert len(_rows(both, "reals", key)) == 1


def test_what_both_add_is_added(both: Both) -> None:
    key = next(KEYS)
    both.a.do(f"INSERT INTO public.reals VALUES ({key}, 1, 1, 1)")
    both.exchange()
    for side, value in ((both.a, 2), (both.b, 4.5)):
        side.do(f"UPDATE public.reals SET f4 = {value}, f8 = {value}, n = {value} WHERE id = {key}")
    both.exchange()
    assert _rows(both, "reals", key) == [(f"({key},5.5,5.5,5.5)",)]


# Sessions, and types of keys


def test_a_client_of_another_encoding_deletes_rows_it_cannot_read(both: Both) -> None:
    both.a.do("INSERT INTO public.books VALUES ('日本', 'x', 1)")
    both.exchange()
    both.a.do("UPDATE public.books SET note = 'older', bal = 2")
    both.b.do("UPDATE public.books SET note = 'younger', bal = 4")
    both.exchange()
    kept = "SELECT count(*) FROM vsql_sync.row_versions WHERE table_name = 'books'"
    assert both.b.rows(kept) == [(1,)]
    with psycopg.connect(both.b.conninfo, autocommit=True, client_encoding="latin1") as conn:
        conn.execute("DELETE FROM public.books WHERE note = 'younger'")
    both.exchange()
    assert both.a.rows("SELECT FROM public.books") == []


def test_a_key_without_a_binary_form_conflicts_as_any_other_and_its_table_has_nothing_to_add_up(
    both: Both,
) -> None:
    both.a.do("INSERT INTO public.catalogue VALUES ('978-0-393-04002-9', 'both')")
    both.exchange()
    both.a.do("UPDATE public.catalogue SET note = 'older'")
    both.b.do("UPDATE public.catalogue SET note = 'younger'")
    both.exchange()
    for side in (both.a, both.b):
        assert side.rows("SELECT note FROM public.catalogue") == [("younger",)]
    unfit = "SELECT vsql_sync.unfit_for_deltas('public.sold'::regclass, '{bal}')"
    (why,) = both.a.rows(unfit)
    assert "column k of the primary key is of type public.isbn13, which has no binary form" in why[0]


# Others


def test_a_booking_brings_the_rest_of_its_row_and_a_change_it_did_not_know_falls(both: Both) -> None:
    """What conflicts.md says of hot rows."""
    key = _known(both, "hot")
    both.a.do(f"UPDATE public.hot SET address = 'new' WHERE id = {key}")
    both.b.do(f"UPDATE public.hot SET bal = bal + 1 WHERE id = {key}")
    both.exchange()
    assert _rows(both, "hot", key) == [(f"({key},,1)",)]


def test_a_stream_of_another_publication_makes_no_third_writer(both: Both) -> None:
    conn = both.b.conn
    local = nodes.local(conn)
    other = replace(local, number=9, name="node-c", is_local=False, public_key=None, key_fingerprint=None)
    stream = state.load_stream(conn, both.cluster, "pub.node-a")
    with conn.transaction(force_rollback=True):
        nodes.register_peer(conn, other)
        (live,) = peers.plan_streams(other, "node-b", "other", copy=False)
        peers.write_incoming(conn, [live])
        conn.execute("SELECT pg_replication_origin_create(%s)", (live.origin_name,))
        contest = writers.load(conn, stream)
        assert contest is not None
        assert not contest.third_nodes
        conn.execute("UPDATE vsql_sync.streams SET publication = 'pub' WHERE origin = 'node-c'")
        contest = writers.load(conn, stream)
        assert contest is not None
        assert contest.third_nodes
