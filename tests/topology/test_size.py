"""Nothing is too large: transactions, values, rows of many columns, subtransactions.

Short forms run in `make test`; the full lengths are marked long. Memory is each process's peak (VmHWM).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import psutil
import psycopg
import pytest

from tests.nodes import TwoNodes
from tests.pairs import Pairs
from tests.stack import Stack
from tests.topology.subscription.scenes import commit, running, same

pytestmark = pytest.mark.topology

ALL_COLUMNS = 1600
# What a transaction of any size may take, and a row with one value of 255 MB.
TRANSACTION_MB, VALUE_MB, HUGE_VALUE_MB = 512, 255, 1500
IDLE_MB = 72
"""About what a worker takes before anything passes."""

WIDE = {
    # As many columns as PostgreSQL allows, and half as many in rows that nothing but all columns identifies.
    "wide": (ALL_COLUMNS, "int", "c0", ""),
    "wide_text": (ALL_COLUMNS, "text", "c0", ""),
    "wide_full": (900, "bigint", "", "ALTER TABLE wide_full REPLICA IDENTITY FULL;"),
}
SCHEMA = "CREATE TABLE t (id bigint PRIMARY KEY, v text); CREATE TABLE part_of (id int PRIMARY KEY, v text);"
SCHEMA += "CREATE TABLE nested (id int PRIMARY KEY, v text);"
for _name, (_count, _type, _key, _more) in WIDE.items():
    _columns = ", ".join(f"c{n} {_type}" + (" PRIMARY KEY" if f"c{n}" == _key else "") for n in range(_count))
    SCHEMA += f"CREATE TABLE {_name} ({_columns});{_more}"
TABLES = ("t", "part_of", "nested", *WIDE)
SHORT_VALUE_MB = 16
# A walsender that spills, and batches of which a transaction of this file needs many.
CONFIG = "[limits]\nbatch_max_rows = 1000\n"


@pytest.fixture(scope="module")
def pair(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    """One pair for the short forms; its first copy has a large value, too."""
    folder = tmp_path_factory.mktemp("size")
    first = f"INSERT INTO t VALUES (0, repeat(md5('first copy'), {SHORT_VALUE_MB} * 32768));"
    tables = [f"{name}(*)" for name in TABLES]
    with running(stack, folder, SCHEMA, tables, source=first, config=CONFIG) as made:
        yield made


def peaks(pair: TwoNodes) -> dict[str, float]:
    """Peak resident MB of every process of both services."""
    found: dict[str, float] = {}
    for node in (pair.a, pair.b):
        for role, process in node.services.items():
            service = psutil.Process(process.pid)
            for each in [service, *service.children(recursive=True)]:
                with contextlib.suppress(FileNotFoundError):
                    for line in Path(f"/proc/{each.pid}/status").read_text().splitlines():
                        if line.startswith("VmHWM"):
                            found[f"{role} of {node.name}, pid {each.pid}"] = int(line.split()[1]) / 1024
    assert len(found) >= 4, "a supervisor and a worker on each side"
    return found


def _sums(pair: TwoNodes, query: str) -> list[tuple[object, ...]]:
    """What a query gives at both nodes, which must be the same."""
    left, right = pair.a.query(query), pair.b.query(query)
    assert left == right, query
    return left


class _Reader:
    """A session of the target that looks all the time: what it saw is in `seen`."""

    def __init__(self, pair: TwoNodes, query: str) -> None:
        self.seen: set[object] = set()
        self.looks = 0
        self._conninfo, self._query = pair.b.conninfo, query
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        with psycopg.connect(self._conninfo, autocommit=True) as connection:
            while not self._stop.is_set():
                row = connection.execute(self._query).fetchone()
                assert row is not None
                self.seen.add(row[0])
                self.looks += 1
                time.sleep(0.01)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _batches(pair: TwoNodes) -> int:
    return int(
        pair.a.query(
            "SELECT count(*) FROM vsql_sync.vsql_sync_audit"
            " WHERE chain = %s AND event_type = 'replication_batch'",
            pair.chain,
        )[0][0]
    )


def _transaction(pair: TwoNodes, megabytes: int, timeout: float) -> None:
    """One transaction of about so many MB: rows come, change and go, and no reader sees a part of it."""
    rows, before = megabytes * 1024 // 10, _batches(pair)
    with _Reader(pair, "SELECT count(*) FROM part_of") as reader:
        pair.a.execute(
            f"INSERT INTO part_of SELECT g, repeat(md5(g::text), 300) FROM generate_series(1, {rows}) g;"
            "UPDATE part_of SET v = 'changed' WHERE id % 100 = 0; DELETE FROM part_of WHERE id % 1000 = 0"
        )
        pair.wait_in_step(timeout=timeout)
        time.sleep(0.2)
    left = rows - rows // 1000
    assert reader.seen == {0, left}, "a part of the transaction was to be seen"
    assert reader.looks > 10
    assert _batches(pair) - before > rows // 1000, "it went through in one piece: this proves nothing"
    assert _sums(
        pair, "SELECT count(*), sum(length(v)), count(*) FILTER (WHERE v = 'changed') FROM part_of"
    ) == [
        (
            left,
            (left - rows // 100 + rows // 1000) * 9600 + (rows // 100 - rows // 1000) * 7,
            rows // 100 - rows // 1000,
        )
    ]


def _value(pair: TwoNodes, megabytes: int, timeout: float) -> None:
    """A row with one value of so many MB comes, changes beside it, changes in it, and goes."""
    for statement in (
        f"INSERT INTO t VALUES (1, repeat(md5('a'), {megabytes} * 32768))",
        "UPDATE t SET id = 2 WHERE id = 1",
        f"UPDATE t SET v = repeat(md5('b'), {megabytes} * 32768) WHERE id = 2",
    ):
        pair.a.execute(statement)
        pair.wait_in_step(timeout=timeout)
        assert (
            _sums(pair, "SELECT id, octet_length(v), md5(v) FROM t WHERE id > 0")[0][1] == megabytes * 2**20
        )
    pair.a.execute("DELETE FROM t WHERE id = 2")
    pair.wait_in_step(timeout=timeout)
    assert _sums(pair, "SELECT id FROM t WHERE id > 0") == []


@pytest.mark.timeout(300)
def test_a_transaction_of_many_batches_is_seen_whole_or_not_at_all(pair: TwoNodes) -> None:
    _transaction(pair, 40, timeout=120)


@pytest.mark.timeout(300)
def test_a_value_larger_than_messages_and_batches_passes_copied_and_live(pair: TwoNodes) -> None:
    assert _sums(pair, "SELECT octet_length(v), md5(v) FROM t WHERE id = 0")[0][0] == SHORT_VALUE_MB * 2**20
    _value(pair, SHORT_VALUE_MB, timeout=60)


@pytest.mark.timeout(700)
@pytest.mark.parametrize("table", WIDE)
def test_rows_of_as_many_columns_as_there_may_be_are_written_changed_and_deleted(
    pair: TwoNodes, table: str
) -> None:
    count = WIDE[table][0]
    names = [f"c{n}" for n in range(count)]
    some = ", ".join(f"{name} = {number}" for number, name in enumerate(names) if number and number % 7 == 0)
    numbers = ", ".join(f"g + {n}" for n in range(count))
    commit(
        pair,
        f"INSERT INTO {table} SELECT {numbers} FROM generate_series(1, 12) g",
        f"UPDATE {table} SET c1 = NULL WHERE c0::int > 10; UPDATE {table} SET {some} WHERE c0::int % 5 = 0",
        f"UPDATE {table} SET c0 = (c0::int + 100) WHERE c0::int < 4; DELETE FROM {table} WHERE c0::int = 8",
        timeout=300,
    )
    commit(
        pair,
        f"DELETE FROM {table} WHERE c0::int = 9;"
        f"INSERT INTO {table} (c0, c{count - 1}) VALUES (9, 7), (8, 8);"
        f"UPDATE {table} SET c2 = c0 WHERE c0::int < 15",
        timeout=300,
    )
    assert len(same(pair, table)) == 12


@pytest.mark.timeout(300)
def test_ten_thousand_subtransactions_pass_and_those_taken_back_do_not(pair: TwoNodes) -> None:
    audited = pair.audited_rows()
    commit(
        pair,
        """
        DO $$ BEGIN FOR n IN 1 .. 10000 LOOP
            BEGIN
                INSERT INTO nested VALUES (n, 'v' || n);
                UPDATE nested SET v = v || '!' WHERE id = n - 1;
                IF n % 10 <> 0 THEN RAISE EXCEPTION 'take it back'; END IF;
            EXCEPTION WHEN raise_exception THEN NULL;
            END;
        END LOOP; END $$
        """,
    )
    assert len(same(pair, "nested")) == 1000
    assert pair.audited_rows() - audited == 1000
    with psycopg.connect(pair.a.conninfo) as connection:
        for number in range(1000):
            connection.execute(f"SAVEPOINT s{number}; UPDATE nested SET v = 'w{number}' WHERE id = 10")
        connection.execute("ROLLBACK TO s500; UPDATE nested SET v = v || ' is the last' WHERE id = 10")
    commit(pair)
    assert ("10", "w499 is the last") in same(pair, "nested")


@pytest.mark.timeout(300)
def test_none_of_it_takes_much_memory(pair: TwoNodes) -> None:
    """Run by itself it looks at idle processes, after the others at what all of them needed."""
    _value(pair, 1, timeout=40)
    assert max(peaks(pair).values()) < IDLE_MB + 5 * SHORT_VALUE_MB + 60, peaks(pair)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_transaction_of_two_gigabytes_passes_in_half_a_gigabyte(pairs: Pairs) -> None:
    large = pairs(SCHEMA)
    large.create(["part_of(*)"])
    large.start()
    _transaction(large, 2048, timeout=3000)
    assert max(peaks(large).values()) < TRANSACTION_MB, peaks(large)
    large.stop()


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("copied", [False, True], ids=["live", "copied"])
def test_a_value_of_255_mb_passes_in_one_and_a_half_gigabytes(pairs: Pairs, copied: bool) -> None:
    large = pairs(SCHEMA)
    if copied:
        value = f"repeat(md5(g::text), {VALUE_MB} * 32768)"
        large.a.execute(f"INSERT INTO t SELECT g, {value} FROM generate_series(-1, 0) g")
    large.create(["t(*)"])
    large.start()
    large.wait_in_step(timeout=900)
    if copied:
        assert _sums(large, "SELECT sum(octet_length(v)) FROM t") == [(2 * VALUE_MB * 2**20,)]
    else:
        _value(large, VALUE_MB, timeout=900)
    assert max(peaks(large).values()) < HUGE_VALUE_MB, peaks(large)
    large.stop()
