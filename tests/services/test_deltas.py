"""Columns that add up, on two real nodes: sums are those of all that was added, each once, at both.

No Kafka: changes are read from slots, and applied by the product (both_write.py).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from tests.conftest import NewDatabase
from tests.services.both_write import GENERATION, Both, Side, joined, prepared, table
from tests.stack import Stack
from tests.waiting import until
from vsql_consumers import purging, state, writers
from vsql_shared.changes import OpenedBatch, TableName
from vsql_shared.errors import DatabaseError, RefusedError, RowError, TransientError
from vsql_shared.pg import nodes, peers
from vsql_shared.pg.connect import connect
from vsql_shared.pg.peers import PeerRequest
from vsql_shared.strategies import GENERATIONS, Strategies, Strategy

KEYS = itertools.count(1)
ACCOUNT = TableName("public", "account")
KINDS = (
    ("i2", "int2"),
    ("i4", "int4"),
    ("i8", "int8"),
    ("n", "numeric"),
    ("n2", "numeric(12,2)"),
    ("f4", "float4"),
    ("f8", "float8"),
    ("m", "money"),
)
DDL = (
    table("account", "id int PRIMARY KEY, note text, bal numeric(12,2) NOT NULL DEFAULT 0", "last_write_wins")
    + table(
        "kinds",
        "id int PRIMARY KEY, " + ", ".join(f"{name} {kind} NOT NULL DEFAULT 0" for name, kind in KINDS),
        "last_write_wins",
    )
    + table("bare", "id int PRIMARY KEY, bal int NOT NULL DEFAULT 0", "last_write_wins")
    + table("padded", "code char(5) PRIMARY KEY, bal int NOT NULL DEFAULT 0", "last_write_wins")
    + table("dotted", "k numeric PRIMARY KEY, bal int NOT NULL DEFAULT 0", "last_write_wins")
    + "CREATE COLLATION public.any_case (provider = icu, locale = 'und-u-ks-level2', deterministic = false);"
    + table(
        "cased", "k text COLLATE public.any_case PRIMARY KEY, bal int NOT NULL DEFAULT 0", "last_write_wins"
    )
    + "CREATE DOMAIN public.code AS char(4);"
    + table(
        '"Odd ""% table"',
        '"k\'s" public.code, "%s" int, "Bal %" int NOT NULL DEFAULT 0, PRIMARY KEY ("%s", "k\'s")',
        "last_write_wins",
    )
)
TABLES = ("account", "kinds", "bare", "padded", "dotted", "cased", '"Odd ""% table"')
ADDING = {
    ACCOUNT: {"bal": ""},
    TableName("public", "kinds"): dict.fromkeys((name for name, _ in KINDS), ""),
    **{TableName("public", name): {"bal": ""} for name in ("bare", "padded", "dotted", "cased")},
    TableName("public", 'Odd "% table'): {"Bal %": ""},
}


def _pair(stack: Stack, schema_of: Callable[[int], str], ending: ExitStack, ddl: str, *tables: str) -> Both:
    there = [stack.new_database(18, name, schema_of(18)) for name in ("a", "b")]
    for conninfo in there:
        ending.callback(stack.drop_database, conninfo)
    return prepared(there[0], there[1], stack.new_cluster_name(), ddl, *tables)


@pytest.fixture(scope="module")
def both(stack: Stack, schema_of: Callable[[int], str]) -> Iterator[Both]:
    with ExitStack() as ending:
        made = joined(_pair(stack, schema_of, ending, DDL, *TABLES), Strategies(adding=ADDING))
        ending.callback(made.end)
        yield made


def _known(both: Both, bal: object = 100) -> int:
    key = next(KEYS)
    both.a.do(f"INSERT INTO public.account VALUES ({key}, 'both', {bal})")
    both.exchange()
    return key


def _row(side: Side, key: int) -> list[tuple[Any, ...]]:
    return side.rows(f"SELECT note, bal::text FROM public.account WHERE id = {key}")


def _logged(side: Side, key: object, name: str = "account") -> list[tuple[Any, ...]]:
    return side.rows(
        "SELECT conflict_type, resolution FROM vsql_sync.conflict_log"
        f" WHERE table_name = '{name}' AND row_key ->> 'id' = '{key}' ORDER BY id"
    )


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_both_sums_are_those_of_both_changes_and_the_rest_is_the_later_ones(both: Both, order: str) -> None:
    key = _known(both)
    sides = {"a": both.a, "b": both.b}
    first, second = (sides[name] for name in order)
    first.do(f"UPDATE public.account SET bal = bal - 30.50, note = 'first' WHERE id = {key}")
    second.do(f"UPDATE public.account SET bal = bal + 7.25, note = 'second' WHERE id = {key}")
    both.exchange()
    for side in (first, second):
        assert _row(side, key) == [("second", "76.75")]
    assert _logged(first, key) == [("update_origin_differs", "APPLIED_REMOTE")]
    assert _logged(second, key) == [("update_origin_differs", "KEPT_LOCAL")]


def test_what_only_adds_up_is_no_conflict_and_counts_as_applied(both: Both) -> None:
    key = _known(both)
    for side, amount in ((both.a, 1), (both.b, 10)):
        for _ in range(3):
            side.do(f"UPDATE public.account SET bal = bal + {amount} WHERE id = {key}")
    both.exchange()
    both.a.do(f"UPDATE public.account SET bal = bal + 1000 WHERE id = {key}")
    (batch,) = both.a.source.batches()
    verdicts = both.b.applier.apply_transaction(batch, 0, len(batch.ops))
    both.b.applier.finish(batch.lsn_end, batch.transactions[0].commit_time, lambda _: None)
    both.b.source.batches()
    assert verdicts == {"applied": 1}
    for side in (both.a, both.b):
        assert _row(side, key) == [("both", "1133.00")]
        assert _logged(side, key) == []


def test_a_change_that_falls_leaves_the_row_its_version(both: Both) -> None:
    """B's row is stamped by A's older change; what comes next is judged by the version it has."""
    key = _known(both)
    both.a.do(f"UPDATE public.account SET bal = bal + 1, note = 'older' WHERE id = {key}")
    both.a.do(f"UPDATE public.account SET bal = bal + 2, note = 'old' WHERE id = {key}")
    both.b.do(f"UPDATE public.account SET bal = bal + 4, note = 'young' WHERE id = {key}")
    both.exchange()
    assert _row(both.a, key) == _row(both.b, key) == [("young", "107.00")]
    said = both.b.rows(
        "SELECT v.node, v.at = o.timestamp FROM vsql_sync.row_versions v, public.account t,"
        " pg_xact_commit_timestamp_origin(t.xmin) o"
        f" WHERE t.id = {key} AND v.row_xmin = t.xmin AND v.table_name = 'account'"
    )
    assert said == [("node-b", False)]
    # The next local write ends it; and no row has its key again.
    both.b.do(f"UPDATE public.account SET note = 'younger' WHERE id = {key}")
    both.exchange()
    assert _row(both.a, key) == _row(both.b, key) == [("younger", "107.00")]
    both.b.do(f"DELETE FROM public.account WHERE id = {key}")
    both.exchange()
    assert _row(both.a, key) == []


def test_in_one_transaction_the_version_that_was_kept_counts_for_the_next_change(both: Both) -> None:
    key = _known(both)
    both.a.do(
        f"BEGIN; UPDATE public.account SET bal = bal + 1, note = 'x' WHERE id = {key};"
        f" UPDATE public.account SET bal = bal + 2, note = 'y' WHERE id = {key}; COMMIT"
    )
    both.b.do(f"UPDATE public.account SET note = 'young' WHERE id = {key}")
    both.exchange()
    assert _row(both.a, key) == _row(both.b, key) == [("young", "103.00")]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_each_type_adds_up(both: Both, name: str, kind: str) -> None:
    key = next(KEYS)
    # From one end of the type to the other: only the sum has to fit.
    begin, end = {"int2": (32767, -32768), "int4": (2147483647, -2147483648)}.get(kind, (1000, 17.25))
    if kind == "int8":
        begin, end = 9223372036854775807, -9223372036854775808
    both.a.do(f"INSERT INTO public.kinds (id, {name}) VALUES ({key}, ({begin})::numeric::{kind})")
    both.exchange()
    both.a.do(f"UPDATE public.kinds SET {name} = ({end})::numeric::{kind} WHERE id = {key}")
    if begin == 1000:
        both.b.do(f"UPDATE public.kinds SET {name} = {name} + 1::numeric::{kind} WHERE id = {key}")
        end += 1
    both.exchange()
    for side in (both.a, both.b):
        is_sum = f"SELECT {name} = ({end})::numeric::{kind} FROM public.kinds WHERE id = {key}"
        assert side.rows(is_sum) == [(True,)]


def test_a_delete_stands_over_what_is_added_and_its_key_is_never_used_again(both: Both) -> None:
    key = _known(both)
    both.a.do(f"DELETE FROM public.account WHERE id = {key}")
    both.b.do(f"UPDATE public.account SET bal = bal + 5, note = 'later' WHERE id = {key}")
    both.exchange()
    assert _row(both.a, key) == _row(both.b, key) == []
    assert _logged(both.a, key) == [("update_deleted", "KEPT_LOCAL")]
    assert _logged(both.b, key) == [("delete_origin_differs", "APPLIED_REMOTE")]
    for side in (both.a, both.b):
        with pytest.raises(psycopg.errors.UniqueViolation, match="was deleted, and its key cannot be used"):
            side.do(f"INSERT INTO public.account VALUES ({key}, 'again', 1)")


def test_two_inserts_of_one_key_are_a_persons_to_decide_and_a_delete_ends_both(both: Both) -> None:
    key = next(KEYS)
    both.a.do(f"INSERT INTO public.account VALUES ({key}, 'of a', 1)")
    both.b.do(f"INSERT INTO public.account VALUES ({key}, 'of b', 2)")
    both.exchange()
    assert (_row(both.a, key), _row(both.b, key)) == ([("of a", "1.00")], [("of b", "2.00")])
    for side in (both.a, both.b):
        assert _logged(side, key) == [("insert_exists", "PENDING")]
    both.a.do(f"DELETE FROM public.account WHERE id = {key}")
    both.exchange()
    assert _row(both.a, key) == _row(both.b, key) == []


def test_an_insert_of_a_key_that_the_other_had_inserted_and_deleted_falls(both: Both) -> None:
    key = next(KEYS)
    both.a.do(f"INSERT INTO public.account VALUES ({key}, 'of a', 1)")
    both.a.do(f"DELETE FROM public.account WHERE id = {key}")
    both.b.do(f"INSERT INTO public.account VALUES ({key}, 'of b', 2)")
    both.exchange()
    assert _row(both.a, key) == _row(both.b, key) == []
    assert _logged(both.a, key) == [("insert_deleted", "KEPT_LOCAL")]


# Keys

REUSES = {
    "one transaction": (
        "BEGIN; DELETE FROM public.account WHERE id = {0};"
        " INSERT INTO public.account VALUES ({0}, 'again', 1); COMMIT"
    ),
    "one statement": (
        "WITH gone AS (DELETE FROM public.account WHERE id = {0} RETURNING id)"
        " INSERT INTO public.account (id) SELECT id FROM gone"
    ),
    "merge": (
        "MERGE INTO public.account t USING (VALUES ({0}), (-{0})) s (n) ON s.n = t.id"
        " WHEN MATCHED THEN DELETE WHEN NOT MATCHED THEN INSERT (id) VALUES (-s.n)"
    ),
    "copy": (
        "BEGIN; DELETE FROM public.account WHERE id = {0};"
        " INSERT INTO public.account (id) SELECT {0} ON CONFLICT (id) DO UPDATE SET bal = 1; COMMIT"
    ),
    "repeatable read": (
        "BEGIN ISOLATION LEVEL REPEATABLE READ; DELETE FROM public.account WHERE id = {0};"
        " INSERT INTO public.account VALUES ({0}, 'again', 1); COMMIT"
    ),
}


@pytest.mark.parametrize("statement", REUSES.values(), ids=REUSES.keys())
def test_a_key_is_not_used_again_in_one_transaction_either(both: Both, statement: str) -> None:
    key = _known(both)
    try:
        with pytest.raises(psycopg.errors.UniqueViolation, match="cannot be used again"):
            both.a.do(statement.format(key))
    finally:
        both.a.source.conn.execute("ROLLBACK")
    assert _row(both.a, key) == [("both", "100.00")]


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read"])
def test_who_waited_for_a_deleter_does_not_get_its_key(both: Both, isolation: str) -> None:
    key = _known(both)
    failed: list[psycopg.Error] = []
    with psycopg.connect(both.a.conninfo) as holding, psycopg.connect(both.a.conninfo) as waiting:
        waiting.execute(f"SET default_transaction_isolation = '{isolation}'".encode())
        waiting.commit()
        waiting.execute("SELECT 1")
        holding.execute(f"DELETE FROM public.account WHERE id = {key}".encode())

        def run() -> None:
            try:
                waiting.execute(f"INSERT INTO public.account VALUES ({key}, 'again', 1)".encode())
            except psycopg.Error as error:
                failed.append(error)
            waiting.rollback()

        thread = threading.Thread(target=run)
        thread.start()
        waits = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s"
        until(
            lambda: both.a.conn.execute(waits, (waiting.info.backend_pid,)).fetchall() == [(True,)],
            20,
            lambda: f"{failed}",
        )
        holding.commit()
        thread.join(20)
    assert [error.sqlstate for error in failed] == ["23505"]
    assert "cannot be used again" in str(failed[0])
    both.exchange()
    assert _row(both.b, key) == []


MOVES = {
    "another": ("account", "{0}", "UPDATE public.account SET id = -{0} WHERE id = {0}"),
    "spelled anew": ("dotted", "{0}.0", "UPDATE public.dotted SET k = {0}.00 WHERE k = {0}"),
    "another case": ("cased", "'key{0}'", "UPDATE public.cased SET k = 'KEY{0}' WHERE k = 'key{0}'"),
    "merge": (
        "bare",
        "{0}",
        (
            "MERGE INTO public.bare t USING (SELECT {0}) s (n) ON t.id = s.n"
            " WHEN MATCHED THEN UPDATE SET id = -{0}"
        ),
    ),
}


@pytest.mark.parametrize(("name", "value", "move"), MOVES.values(), ids=MOVES.keys())
def test_a_key_is_not_changed_nor_spelled_anew(both: Both, name: str, value: str, move: str) -> None:
    key = next(KEYS)
    both.a.do(f"INSERT INTO public.{name} VALUES ({value.format(key)})")
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="the key of a row cannot be changed"):
        both.a.do(move.format(key))
    both.exchange()
    rows = f"SELECT * FROM public.{name} ORDER BY 1"
    assert both.b.rows(rows) == both.a.rows(rows)


def test_a_key_that_was_changed_past_the_triggers_stops_the_stream(both: Both) -> None:
    key = _known(both)
    with both.a.source.conn.transaction():
        both.a.source.conn.execute("SET LOCAL session_replication_role = replica")
        both.a.source.conn.execute(f"UPDATE public.account SET id = -{key} WHERE id = {key}".encode())
    with pytest.raises(RowError, match="given another key") as stopped:
        both.exchange()
    assert stopped.value.place is not None
    assert stopped.value.place.table == ACCOUNT
    with both.a.source.conn.transaction():
        both.a.source.conn.execute("SET LOCAL session_replication_role = replica")
        both.a.source.conn.execute(f"UPDATE public.account SET id = {key} WHERE id = -{key}".encode())
    both.a.source.batches()


def test_keys_compare_as_a_whole_in_every_type(both: Both) -> None:
    """Padded ones by all their characters; domains, odd names and keys of two columns."""
    odd = 'public."Odd ""% table"'
    for side in (both.a, both.b):
        side.conn.execute("DELETE FROM public.padded")
    both.a.do("INSERT INTO public.padded VALUES ('AB', 1), ('AC', 2), ('A', 3)")
    both.a.do(f"INSERT INTO {odd} VALUES ('AB', 1, 1), ('AC', 1, 2), ('AB', 2, 3)".replace("%", "%"))
    both.exchange()
    for side in (both.a, both.b):
        side.do("UPDATE public.padded SET bal = bal + 10 WHERE code = 'AC'")
        side.do(f"""UPDATE {odd} SET "Bal %" = "Bal %" + 10 WHERE "k's" = 'AC'""")
    both.a.do("DELETE FROM public.padded WHERE code = 'AB'")
    both.a.do(f"""DELETE FROM {odd} WHERE "k's" = 'AB' AND "%s" = 1""")
    both.exchange()
    for side in (both.a, both.b):
        assert side.rows("SELECT code, bal FROM public.padded ORDER BY 1") == [("A    ", 3), ("AC   ", 22)]
        assert side.rows(f"SELECT * FROM {odd} ORDER BY 2, 1") == [("AC  ", 1, 22), ("AB  ", 2, 3)]
    both.a.do("INSERT INTO public.padded VALUES ('AD', 4)")  # its first letter is a used key's
    with pytest.raises(psycopg.errors.UniqueViolation, match="cannot be used again"):
        both.b.do("INSERT INTO public.padded VALUES ('AB', 1)")
    with pytest.raises(psycopg.errors.UniqueViolation, match="cannot be used again"):
        both.b.do(f"INSERT INTO {odd} VALUES ('AB', 1, 1)")
    both.exchange()


# Exactly once


def _batches(both: Both, *statements: str) -> list[OpenedBatch]:
    with both.a.source.conn.transaction():
        for statement in statements:
            both.a.source.conn.execute(statement.encode())
    return both.a.source.batches()


def test_what_was_rolled_back_has_added_nothing(both: Both) -> None:
    """As after a crash before the commit, and as after an error behind it in the transaction."""
    key = _known(both)
    (batch,) = _batches(
        both,
        f"UPDATE public.account SET bal = bal + 1 WHERE id = {key}",
        f"UPDATE public.account SET bal = bal + 2 WHERE id = {key}",
    )
    for _ in range(3):
        both.b.applier.apply_transaction(batch, 0, len(batch.ops))
        both.b.applier.abort()
    both.b.apply([batch])
    both.b.source.batches()
    assert _row(both.b, key) == [("both", "103.00")]


def test_changes_of_one_row_in_one_transaction_add_each_once(both: Both) -> None:
    keys = [_known(both) for _ in range(3)]
    listed = ", ".join(map(str, keys))
    for side in (both.a, both.b):
        side.do(
            "DO $$ BEGIN FOR n IN 1..120 LOOP"
            f" UPDATE public.account SET bal = bal + n WHERE id IN ({listed}); END LOOP; END $$"
        )
    both.exchange()
    for side, key in itertools.product((both.a, both.b), keys):
        assert _row(side, key) == [("both", f"{100 + 2 * 120 * 121 // 2}.00")]


def test_rows_inserted_and_added_to_in_one_transaction(both: Both) -> None:
    first = next(KEYS)
    keys = [first, *(next(KEYS) for _ in range(9))]
    both.a.do(
        f"BEGIN; INSERT INTO public.account SELECT g, 'x', 1 FROM generate_series({first}, {keys[-1]}) g;"
        f" UPDATE public.account SET bal = bal + 10 WHERE id BETWEEN {first} AND {keys[-1]};"
        f" DELETE FROM public.account WHERE id = {first}; COMMIT"
    )
    both.exchange()
    assert _row(both.b, first) == []
    for key in keys[1:]:
        assert _row(both.b, key) == [("x", "11.00")]


def test_what_was_parked_adds_once_when_it_comes_late(both: Both) -> None:
    key = _known(both)
    late = _batches(both, f"UPDATE public.account SET bal = bal + 1, note = 'late' WHERE id = {key}")
    both.a.do(f"UPDATE public.account SET bal = bal + 2, note = 'since' WHERE id = {key}")
    both.b.apply(both.a.source.batches())
    (verdicts,) = both.b.applier.apply(late, late=True)
    assert verdicts == {"lost": 1}  # its note; what it adds is there
    both.b.applier.finish(late[0].lsn_end, late[0].transactions[0].commit_time, lambda _: None)
    both.b.source.batches()
    assert _row(both.a, key) == _row(both.b, key) == [("since", "103.00")]


def test_a_row_that_has_not_come_is_waited_for_and_nothing_is_added_before(both: Both) -> None:
    key = next(KEYS)
    parked = _batches(both, f"INSERT INTO public.account VALUES ({key}, 'x', 100)")
    adds = _batches(both, f"UPDATE public.account SET bal = bal + 5 WHERE id = {key}")
    with pytest.raises(RowError, match="adds to a row that is not here") as stopped:
        both.b.apply(adds)
    assert stopped.value.place is not None
    contest = writers.load(both.b.conn, state.load_stream(both.b.conn, both.cluster, "pub.node-a"))
    assert contest is not None
    both.b.applier.contend(replace(contest, sources=frozenset({"node-a", "node-c"})))
    with pytest.raises(TransientError, match="adds to a row that is not here yet, and waits"):
        both.b.apply(adds)
    both.b.applier.contend(contest)
    assert _row(both.b, key) == []
    both.b.applier.apply(parked, late=True)
    both.b.applier.finish(parked[0].lsn_end, parked[0].transactions[0].commit_time, lambda _: None)
    both.b.apply(adds)
    both.b.source.batches()
    assert _row(both.b, key) == [("x", "105.00")]


def test_an_insert_that_was_parked_falls_where_its_row_was_deleted_since(both: Both) -> None:
    key = next(KEYS)
    parked = _batches(both, f"INSERT INTO public.account VALUES ({key}, 'x', 100)")
    both.a.do(f"DELETE FROM public.account WHERE id = {key}")
    both.b.apply(both.a.source.batches())
    assert both.b.applier.apply(parked, late=True) == [{"lost": 1}]
    both.b.applier.finish(parked[0].lsn_end, parked[0].transactions[0].commit_time, lambda _: None)
    both.b.source.batches()
    assert _row(both.b, key) == []


def test_a_sum_that_does_not_fit_stops_and_is_added_once_there_is_room(both: Both) -> None:
    key = _known(both, 9_999_999_990)
    both.b.do(f"UPDATE public.account SET bal = bal + 9 WHERE id = {key}")
    both.a.do(f"UPDATE public.account SET bal = bal + 5 WHERE id = {key}")
    from_a, from_b = both.a.source.batches(), both.b.source.batches()
    for _ in range(2):
        with pytest.raises(RowError) as stopped:
            both.b.apply(from_a)
        assert stopped.value.sqlstate == "22003"
        assert "999" not in str(stopped.value)
        assert _row(both.b, key) == [("both", "9999999999.00")]
    with pytest.raises(RowError):
        both.a.apply(from_b)  # B's changes do not fit at A either
    for side, own in ((both.a, from_a), (both.b, from_b)):
        side.do(f"UPDATE public.account SET bal = bal - 100 WHERE id = {key}")
        own.extend(side.source.batches())
    both.a.apply(from_b)
    both.b.apply(from_a)
    for side in (both.a, both.b):
        side.source.batches()
        assert _row(side, key) == [("both", "9999999804.00")]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("name", ["n", "f4", "f8"])
def test_what_has_no_difference_is_refused(both: Both, name: str, value: str) -> None:
    key = next(KEYS)
    with pytest.raises(psycopg.errors.NumericValueOutOfRange, match="no difference to anything"):
        both.a.do(f"INSERT INTO public.kinds (id, {name}) VALUES ({key}, '{value}')")
    both.a.do(f"INSERT INTO public.kinds (id) VALUES ({key})")
    both.exchange()
    with both.a.source.conn.transaction():
        both.a.source.conn.execute("SET LOCAL session_replication_role = replica")
        both.a.source.conn.execute(f"UPDATE public.kinds SET {name} = '{value}' WHERE id = {key}".encode())
    with pytest.raises(RowError):
        both.exchange()
    assert both.b.rows(f"SELECT {name}::text FROM public.kinds WHERE id = {key}") == [("0",)]


@pytest.mark.parametrize(
    "strategy", ["first_write_wins", "node_priority", "keep_local", "apply_remote", "manual"]
)
def test_sums_are_equal_under_every_strategy(
    stack: Stack, schema_of: Callable[[int], str], strategy: Strategy
) -> None:
    with ExitStack() as ending:
        ddl = table("account", "id int PRIMARY KEY, note text, bal numeric(12,2) NOT NULL", strategy)
        both = joined(
            _pair(stack, schema_of, ending, ddl, "account"),
            Strategies(strategy, adding={ACCOUNT: {"bal": ""}}),
        )
        ending.callback(both.end)
        both.a.do("INSERT INTO public.account (id, note, bal) VALUES (1, 'x', 100)")
        both.exchange()
        both.a.do("UPDATE public.account SET bal = bal + 1, note = 'of a'")
        both.b.do("UPDATE public.account SET bal = bal + 10, note = 'of b'")
        both.exchange()
        both.b.do("UPDATE public.account SET bal = bal + 20")
        both.exchange()
        for side in (both.a, both.b):
            assert side.rows("SELECT bal FROM public.account") == [(131,)]
        notes = [side.rows("SELECT note FROM public.account")[0][0] for side in (both.a, both.b)]
        if strategy in ("first_write_wins", "node_priority"):
            assert notes[0] == notes[1]


# Adding a peer, and starting


ONE_ACCOUNT = table(
    "account", "id int PRIMARY KEY, note text, bal numeric NOT NULL DEFAULT 0", "last_write_wins"
)


@pytest.fixture
def apart(new_schema: NewDatabase, cluster_name: str) -> Iterator[Both]:
    """Two nodes that do not know each other yet."""
    made = prepared(new_schema("a"), new_schema("b"), cluster_name, ONE_ACCOUNT, "account")
    yield made
    for side in (made.a, made.b):
        side.conn.close()


NOTHING = "CREATE FUNCTION public.nothing() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$"


def _asked(**columns: str) -> PeerRequest:
    return PeerRequest(2, "node-b", mode="bidirectional", strategies=Strategies(adding={ACCOUNT: columns}))


UNFIT = {
    "null": ("ALTER TABLE public.account ALTER bal DROP NOT NULL", "bal", "may be NULL"),
    "missing": ("", "more", "column more is to add up, and is not there"),
    "text": ("", "note", "column note is of type text"),
    "key": ("", "id", "is part of the primary key"),
    "generated": (
        "ALTER TABLE public.account ADD g int NOT NULL GENERATED ALWAYS AS (1) STORED",
        "g",
        "is generated or an identity",
    ),
    "identity": (
        "ALTER TABLE public.account ADD g int NOT NULL GENERATED BY DEFAULT AS IDENTITY",
        "g",
        "is generated or an identity",
    ),
    "another identity": (
        "ALTER TABLE public.account ADD g int GENERATED ALWAYS AS IDENTITY",
        "bal",
        "is never written anew",
    ),
    "domain": (
        "CREATE DOMAIN public.amount AS numeric; ALTER TABLE public.account ADD d public.amount NOT NULL",
        "d",
        "and no domain",
    ),
    "infinite": ("INSERT INTO public.account VALUES (1, 'x', 'NaN')", "bal", "has NaN or infinity"),
}


@pytest.mark.parametrize(("change", "column", "why"), UNFIT.values(), ids=UNFIT.keys())
def test_a_column_that_cannot_add_up_is_refused_before_anything_is_changed(
    apart: Both, change: str, column: str, why: str
) -> None:
    if change:
        apart.a.conn.execute(change.encode())
        if "INSERT" not in change:
            apart.b.conn.execute(change.encode())
    with pytest.raises(RefusedError) as refused:
        peers.look(apart.a.conn, apart.b.conn, _asked(**{column: ""}))
    assert why in str(refused.value)
    assert apart.a.rows("SELECT count(*) FROM vsql_sync.multi_writer_tables") == [(0,)]


def test_a_function_for_another_type_is_refused_and_floats_and_checks_are_remarked_on(apart: Both) -> None:
    with pytest.raises(
        RefusedError, match=r"column bal is numeric, and its function .* is for double precision"
    ):
        peers.look(apart.a.conn, apart.b.conn, _asked(bal="double precision"))
    for side in (apart.a, apart.b):
        side.conn.execute("ALTER TABLE public.account ADD f real NOT NULL DEFAULT 0, ADD CHECK (bal >= 0)")
    planned = peers.look(apart.a.conn, apart.b.conn, _asked(bal="numeric", f="real"))
    remarks = "\n".join(planned.notes)
    assert "column f is real, whose sums depend on the order" in remarks
    assert "constraint account_bal_check holds on each node by itself" in remarks


def test_what_adds_up_is_chosen_once_and_every_file_says_the_same(apart: Both) -> None:
    peers.add(apart.a.conn, apart.b.conn, peers.look(apart.a.conn, apart.b.conn, _asked(bal="")))
    for asked in (_asked(), PeerRequest(2, "node-b", mode="bidirectional")):
        with pytest.raises(RefusedError, match="what adds up there is bal; nothing is asked for"):
            peers.look(apart.a.conn, apart.b.conn, asked)
    stream = state.load_stream(apart.b.conn, apart.cluster, "pub.node-a")
    apart.b.conn.execute("SELECT pg_replication_origin_create(%s)", (stream.origin_name,))
    for columns in ({"bal": ""}, None):
        said = Strategies() if columns is None else Strategies(adding={ACCOUNT: columns})
        contest = writers.load(apart.b.conn, stream, said)
        assert contest is not None
        assert contest.tables[ACCOUNT].adding == ("bal",)
    with pytest.raises(DatabaseError, match="bal adds up, and this node's file says bal, more"):
        writers.load(apart.b.conn, stream, Strategies(adding={ACCOUNT: {"bal": "", "more": ""}}))
    apart.b.conn.execute("SELECT pg_replication_origin_drop(%s)", (stream.origin_name,))


def test_a_table_that_became_unfit_is_refused_and_stops_the_start(apart: Both) -> None:
    peers.add(apart.a.conn, apart.b.conn, peers.look(apart.a.conn, apart.b.conn, _asked(bal="")))
    conn = apart.b.conn
    conn.execute(NOTHING + "; CREATE TABLE public.other (id int)")
    for statement in (
        "ALTER TABLE public.account ALTER bal DROP NOT NULL",
        "ALTER TABLE public.account RENAME bal TO other",
        "ALTER TABLE public.account ALTER note DROP NOT NULL, ALTER bal DROP NOT NULL",
        "ALTER TABLE public.account DISABLE TRIGGER vsql_sync_used",
        "ALTER TABLE public.account DISABLE TRIGGER vsql_sync_finite",
    ):
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="is written by every node"):
            conn.execute(statement.encode())
    with pytest.raises(psycopg.errors.DependentObjectsStillExist):
        conn.execute("ALTER TABLE public.account DROP bal")
    for name in ("vsql_sync_kept", "vsql_sync_used", "vsql_sync_deleted", "vsql_sync_truncate"):
        with pytest.raises(psycopg.errors.FeatureNotSupported, match=f"trigger {name} keeps what is done"):
            conn.execute(f"DROP TRIGGER {name} ON public.account".encode())
    conn.execute(
        "CREATE TRIGGER vsql_sync_mine AFTER INSERT ON public.other EXECUTE FUNCTION public.nothing()"
    )
    conn.execute("DROP TRIGGER vsql_sync_mine ON public.other")
    with conn.transaction(force_rollback=True):
        conn.execute("DROP TABLE public.account")


@pytest.mark.parametrize(
    ("name", "when", "why"),
    [
        ("vsql_sync_used", "AFTER INSERT", "trigger vsql_sync_used, which guards keys, is missing, switched"),
        ("vsql_sync_finite", "AFTER INSERT", "trigger vsql_sync_finite, which refuses NaN and infinity, is"),
        ("vsql_sync_deleted", "AFTER DELETE", "lacks triggers that were made for it"),
    ],
)
@pytest.mark.parametrize("replaced", [True, False])
def test_triggers_that_were_replaced_or_dropped_all_the_same_stop_the_start(
    apart: Both, name: str, when: str, why: str, *, replaced: bool
) -> None:
    """As where no superuser made the event triggers."""
    peers.add(apart.a.conn, apart.b.conn, peers.look(apart.a.conn, apart.b.conn, _asked(bal="")))
    conn = apart.b.conn
    conn.execute("ALTER EVENT TRIGGER vsql_sync_kept_triggers DISABLE")
    conn.execute(NOTHING)
    stream = state.load_stream(conn, apart.cluster, "pub.node-a")
    if replaced:
        made = f"CREATE OR REPLACE TRIGGER {name} {when} ON public.account EXECUTE FUNCTION public.nothing()"
        conn.execute(made.encode())
    else:
        conn.execute(f"DROP TRIGGER {name} ON public.account".encode())
    with pytest.raises(DatabaseError, match=why):
        writers.load(conn, stream)


def test_nothing_is_deleted_while_a_first_copy_is_under_way(apart: Both) -> None:
    """B would not know the key, and could use it."""
    apart.a.conn.execute("INSERT INTO public.account (id) VALUES (1), (2)")
    with psycopg.connect(apart.a.conninfo) as old:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT 1")
        peers.add(apart.a.conn, apart.b.conn, peers.look(apart.a.conn, apart.b.conn, _asked(bal="")))
        with pytest.raises(psycopg.errors.SerializationFailure):
            old.execute("DELETE FROM public.account WHERE id = 1")
    refused = "cannot be deleted until its first copy is done"
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match=refused):
        apart.a.conn.execute("DELETE FROM public.account WHERE id = 1")
    apart.a.conn.execute("UPDATE public.account SET bal = 1; INSERT INTO public.account (id) VALUES (3)")
    apart.a.conn.execute("UPDATE vsql_sync.streams SET state = 'FINISHED' WHERE kind = 'copy'")
    apart.a.conn.execute("DELETE FROM public.account WHERE id = 1")


@pytest.mark.parametrize("strategy", ["last_write_wins", "first_write_wins"])
def test_who_is_added_anew_learns_which_keys_were_used(
    apart: Both, new_schema: NewDatabase, strategy: Strategy
) -> None:
    """Another database takes B's place: the copy brings no tombstones, adding it does."""
    a, asked = apart.a.conn, _asked(bal="")
    asked = replace(asked, strategies=replace(asked.strategies, default=strategy))
    generations = f"ALTER TABLE public.account ADD {GENERATION}" if strategy in GENERATIONS else "SELECT 1"
    for conn in (a, apart.b.conn):
        conn.execute(generations.encode())
    peers.add(a, apart.b.conn, peers.look(a, apart.b.conn, asked))
    a.execute("UPDATE vsql_sync.streams SET state = 'FINISHED' WHERE kind = 'copy'")
    a.execute("INSERT INTO public.account (id) VALUES (1), (2); DELETE FROM public.account WHERE id = 1")
    a.execute("DELETE FROM vsql_sync.streams; DELETE FROM vsql_sync.stream_targets")
    a.execute("DELETE FROM vsql_sync.nodes WHERE NOT is_local")
    with (
        connect(new_schema("c"), application_name="anew") as anew,
        psycopg.connect(apart.a.conninfo) as old,
    ):
        nodes.register_local(anew, 2, "node-b", apart.cluster, bytes(range(2, 34)))
        anew.execute(ONE_ACCOUNT)
        anew.execute(generations.encode())
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT 1")
        peers.add(a, anew, peers.look(a, anew, asked))
        with pytest.raises(psycopg.errors.SerializationFailure):
            old.execute("DELETE FROM public.account WHERE id = 2")
        anew.execute("UPDATE vsql_sync.multi_writer_tables SET writable = true")
        with pytest.raises(psycopg.errors.UniqueViolation, match="cannot be used again"):
            anew.execute("INSERT INTO public.account (id) VALUES (1)")
        anew.execute("INSERT INTO public.account (id) VALUES (3)")


def test_who_was_emptied_by_deleting_and_is_added_again_gets_its_rows(apart: Both) -> None:
    """They would meet the tombstones that the deletes left, wherever they are not copied as they are."""
    request = _asked(bal="")
    a, b = apart.a.conn, apart.b.conn
    peers.add(a, b, peers.look(a, b, request))
    a.execute("INSERT INTO public.account (id) VALUES (1)")
    b.execute("UPDATE vsql_sync.multi_writer_tables SET writable = true")
    b.execute("INSERT INTO public.account (id) VALUES (1); DELETE FROM public.account")
    # Again, while its streams are there: what it deleted is under way.
    peers.add(a, b, peers.look(a, b, request))
    a.execute("DELETE FROM vsql_sync.tombstones_1")
    for conn in (a, b):
        conn.execute("DELETE FROM vsql_sync.streams; DELETE FROM vsql_sync.stream_targets")
    with pytest.raises(RefusedError, match="rows that live on this node were deleted on the peer"):
        peers.add(a, b, peers.look(a, b, request))
    b.execute("DELETE FROM vsql_sync.multi_writer_tables")
    peers.add(a, b, peers.look(a, b, request))
    for side in (apart.a, apart.b):
        name = side.rows("SELECT tombstones FROM vsql_sync.multi_writer_tables")[0][0]
        assert side.rows(f"SELECT FROM vsql_sync.{name}") == []


def test_a_table_that_was_taken_out_and_is_added_again_has_triggers_of_its_new_tombstones(
    apart: Both,
) -> None:
    request = _asked(bal="")
    peers.add(apart.a.conn, apart.b.conn, peers.look(apart.a.conn, apart.b.conn, request))
    for side in (apart.a, apart.b):
        side.conn.execute("DELETE FROM vsql_sync.streams; DELETE FROM vsql_sync.stream_targets")
        side.conn.execute("DELETE FROM vsql_sync.multi_writer_tables")
    peers.add(apart.a.conn, apart.b.conn, peers.look(apart.a.conn, apart.b.conn, request))
    for side in (apart.a, apart.b):
        side.conn.execute("UPDATE vsql_sync.multi_writer_tables SET writable = true")
        side.conn.execute("UPDATE vsql_sync.streams SET state = 'FINISHED' WHERE kind = 'copy'")
        side.conn.execute("INSERT INTO public.account (id) VALUES (1); DELETE FROM public.account")
        name = side.rows("SELECT tombstones FROM vsql_sync.multi_writer_tables")[0][0]
        assert side.rows(f"SELECT id FROM vsql_sync.{name}") == [(1,)]


def test_used_keys_are_never_forgotten(both: Both) -> None:
    key = _known(both)
    both.a.do(f"DELETE FROM public.account WHERE id = {key}")
    both.exchange()
    name = both.a.rows("SELECT tombstones FROM vsql_sync.multi_writer_tables WHERE table_name = 'account'")[
        0
    ][0]
    stream = state.load_stream(both.a.conn, both.cluster, "pub.node-b")
    both.a.conn.execute("DELETE FROM vsql_sync.purge_marks")
    both.a.conn.execute(
        "INSERT INTO vsql_sync.purge_marks (publication, below, lsn, peer_lsn)"
        " VALUES ('pub', pg_current_xact_id(), '0/1', '0/1')"
    )
    both.a.conn.execute(
        "UPDATE vsql_sync.apply_progress SET lsn_end = 'FFFFFFFF/0' WHERE chain = %s", (stream.chain,)
    )
    purging.purge(both.a.conn, stream)
    both.a.conn.execute("DELETE FROM vsql_sync.purge_marks")
    assert both.a.rows(f"SELECT count(*) FROM vsql_sync.{name} WHERE id = {key}") == [(1,)]


# Many at once


def test_two_way_tpc_b_keeps_its_sums(stack: Stack, schema_of: Callable[[int], str]) -> None:
    """Clients of both nodes at once, each with its own history; appliers run beside them."""
    ddl = (
        table("branches", "bid int PRIMARY KEY, bbalance int NOT NULL", "last_write_wins")
        + table("tellers", "tid int PRIMARY KEY, bid int, tbalance int NOT NULL", "last_write_wins")
        + table(
            "accounts", "aid int PRIMARY KEY, bid int, abalance int NOT NULL, filler text", "last_write_wins"
        )
        + table("history", "hid uuid PRIMARY KEY, tid int, bid int, aid int, delta int", "last_write_wins")
    )
    adding = {
        TableName("public", name): {column: ""}
        for name, column in (("branches", "bbalance"), ("tellers", "tbalance"), ("accounts", "abalance"))
    }
    with ExitStack() as ending:
        both = joined(
            _pair(stack, schema_of, ending, ddl, "branches", "tellers", "accounts", "history"),
            Strategies(adding=adding),
        )
        ending.callback(both.end)
        both.a.do("INSERT INTO public.branches SELECT g, 0 FROM generate_series(1, 2) g")
        both.a.do("INSERT INTO public.tellers SELECT g, 1 + g % 2, 0 FROM generate_series(1, 6) g")
        both.a.do("INSERT INTO public.accounts SELECT g, 1 + g % 2, 0, 'f' FROM generate_series(1, 40) g")
        both.exchange()
        failures: list[str] = []
        clients = [
            threading.Thread(target=_bank, args=(side.conninfo, seed, failures))
            for seed, side in enumerate((both.a, both.b, both.a, both.b))
        ]
        for client in clients:
            client.start()
        while any(client.is_alive() for client in clients):
            _exchange_beside(both)
        assert failures == []
        _exchange_beside(both)
        sums = [side.rows(SUMS)[0] for side in (both.a, both.b)]
        assert sums[0] == sums[1]
        assert len(set(sums[0][:4])) == 1
        assert sums[0][4] > 2 * BOOKINGS
        for name in ("branches", "tellers", "accounts", "history"):
            rows = f"SELECT t::text FROM public.{name} t ORDER BY 1"
            assert both.a.rows(rows) == both.b.rows(rows), name


BOOKINGS = 25
"""Of each client."""
SUMS = """SELECT (SELECT sum(bbalance) FROM public.branches), (SELECT sum(tbalance) FROM public.tellers),
(SELECT sum(abalance) FROM public.accounts), (SELECT sum(delta) FROM public.history),
(SELECT count(*) FROM public.history)"""


def _bank(conninfo: str, seed: int, failures: list[str]) -> None:
    """TPC-B, and now and then a change of the rest."""
    with psycopg.connect(conninfo, autocommit=True) as conn:
        for number in range(BOOKINGS):
            time.sleep(0.02)
            at = number * 7 + seed * 13
            aid, tid, bid, delta = at % 40 + 1, at % 6 + 1, at % 2 + 1, at % 201 - 100
            try:
                with conn.transaction():
                    conn.execute("UPDATE accounts SET abalance = abalance + %s WHERE aid = %s", (delta, aid))
                    conn.execute("UPDATE tellers SET tbalance = tbalance + %s WHERE tid = %s", (delta, tid))
                    conn.execute("UPDATE branches SET bbalance = bbalance + %s WHERE bid = %s", (delta, bid))
                    conn.execute(
                        "INSERT INTO history VALUES (gen_random_uuid(), %s, %s, %s, %s)",
                        (tid, bid, aid, delta),
                    )
                    if number % 5 == 0:
                        conn.execute("UPDATE accounts SET filler = %s WHERE aid = %s", (f"{seed} {at}", aid))
            except psycopg.errors.DeadlockDetected:
                continue
            except psycopg.Error as error:
                failures.append(str(error))
                return


def _exchange_beside(both: Both) -> None:
    """What either did so far comes to the other, but for what came from there."""
    for source, target, origin in ((both.a, both.b, "node-b"), (both.b, both.a, "node-a")):
        own = source.rows(
            "SELECT o.roident::int FROM vsql_sync.streams s JOIN pg_replication_origin o"
            f" ON o.roname = s.origin_name WHERE s.direction = 'in' AND s.origin = '{origin}'"
        )[0][0]
        for batch in source.source.batches():
            xid = batch.transactions[0].xid
            by = source.rows(f"SELECT roident::int FROM pg_xact_commit_timestamp_origin('{xid}'::xid)")
            if by != [(own,)]:
                _apply_beside(target, batch)


def _apply_beside(side: Side, batch: OpenedBatch) -> None:
    for _ in range(20):
        try:
            side.apply([batch])
        except TransientError:
            continue  # a deadlock with a client
        return
    raise AssertionError("a transaction keeps meeting its clients")
