"""The harness itself: a wrong expectation or a damaged target is found and named; a plan can be repeated."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.chaos import summary, workload
from tests.chaos.checker import CheckError, Reader, check_commits, check_counts, check_equal, check_snapshot
from tests.chaos.faults import plan
from tests.chaos.proxy import Proxy
from tests.chaos.scene import Result
from tests.chaos.workload import Commit, Workload
from tests.stack import Stack
from tests.stack.ports import release_port, reserve_port


@pytest.fixture(scope="module")
def source(stack: Stack) -> tuple[str, list[Commit]]:
    """A database the workload has worked in, and what it says it committed."""
    conninfo = stack.new_database(18, "source")
    with psycopg.connect(conninfo) as connection:
        connection.execute(workload.TABLES_SQL)
    load = Workload(conninfo, seed=1, pause=0.002)
    load.start()
    time.sleep(3)
    commits = load.stop()
    assert len(commits) > 60
    return conninfo, commits


@pytest.fixture
def target(stack: Stack, source: tuple[str, list[Commit]]) -> Iterator[str]:
    """A copy of it."""
    name = stack.new_database(18, "target")
    database, template = (conninfo_to_dict(one)["dbname"] for one in (name, source[0]))
    with psycopg.connect(make_conninfo(name, dbname="postgres"), autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {database}")
        connection.execute(f"CREATE DATABASE {database} TEMPLATE {template}")
    yield name
    stack.drop_database(name)


def test_an_equal_target_passes_every_check(source: tuple[str, list[Commit]], target: str) -> None:
    conninfo, commits = source
    seen = check_snapshot(target, {})
    assert seen[0] == len(commits)
    assert check_snapshot(conninfo, seen) == seen
    check_commits(target, commits)
    check_equal(conninfo, target)
    kinds = "SELECT count(*) FILTER (WHERE id < 0), max(octet_length(note)) FROM items"
    with psycopg.connect(target) as connection:
        keys_changed, longest = connection.execute(kinds).fetchall()[0]
        assert connection.execute("SELECT count(*) > 0 FROM page").fetchall() == [(True,)]
    assert keys_changed > 0
    assert longest > 2000


FIRST_ITEM = "(SELECT id FROM items ORDER BY id DESC LIMIT 1)"
LAST = "WHERE no = (SELECT max(no) FROM ledger)"
TORN = {
    "a row is lost": f"DELETE FROM items WHERE id = {FIRST_ITEM}",
    "a row is doubled": f"INSERT INTO items SELECT 0, session, seq, 0 FROM items WHERE id = {FIRST_ITEM}",
    "a change is lost": f"UPDATE items SET value = value - 1 WHERE id = {FIRST_ITEM}",
    "a transaction's ledger row is lost": "DELETE FROM ledger WHERE no = 17",
    "the last transaction is half there": f"DELETE FROM ledger {LAST}",
    "a transaction came before its turn": f"UPDATE ledger SET no = no + 1 {LAST}",
    "one side of a transfer is lost": 'UPDATE "Accounts" SET balance = balance + 1 WHERE id = 3',
    "a truncation is lost": "INSERT INTO page VALUES (999, '0/0')",
    "the counter was applied twice": "UPDATE counter SET n = n + 1",
}


@pytest.mark.parametrize("what", TORN)
def test_a_snapshot_is_refused_in_which(what: str, target: str) -> None:
    check_snapshot(target, {})
    _execute(target, TORN[what])
    with pytest.raises(CheckError):
        check_snapshot(target, {})


def test_a_snapshot_that_goes_back_is_refused(target: str) -> None:
    seen = check_snapshot(target, {})
    with pytest.raises(CheckError, match="session 2 went back"):
        check_snapshot(target, seen | {2: seen[2] + 1})


def test_a_value_no_sum_covers_is_found_by_the_comparison(
    source: tuple[str, list[Commit]], target: str
) -> None:
    _execute(target, f"UPDATE items SET note = 'x' WHERE id = {FIRST_ITEM}")
    check_snapshot(target, {})
    with pytest.raises(CheckError, match=r"tables differ: public\.items"):
        check_equal(source[0], target)


def test_a_commit_that_is_not_known_or_not_there_is_named(source: tuple[str, list[Commit]]) -> None:
    conninfo, commits = source
    with pytest.raises(CheckError, match=r"lost: \[\]; never committed: \[Commit\(no=5,"):
        check_commits(conninfo, [one for one in commits if one.no != 5])
    with pytest.raises(CheckError, match=r"lost: \[Commit\(no=99999,"):
        check_commits(conninfo, [*commits, Commit(99999, 1, 1, 1)])


def test_counts_that_differ_are_refused() -> None:
    check_counts(10, 10, 10)
    for sent, acknowledged in ((10, 9), (11, 11), (9, 10)):
        with pytest.raises(CheckError):
            check_counts(10, sent, acknowledged)


def test_the_reader_finds_a_torn_transaction_while_it_runs(target: str) -> None:
    reader = Reader(target)
    reader.start()
    while not reader.snapshots:
        time.sleep(0.05)
    _execute(target, TORN["a change is lost"])
    reader.join(20)
    with pytest.raises(CheckError, match="half a transaction"):
        reader.stop()


def test_a_reader_that_saw_nothing_is_no_pass(target: str) -> None:
    reader = Reader(make_conninfo(target, dbname="no_such_database"))
    reader.start()
    with pytest.raises(CheckError, match="0 snapshots"):
        reader.stop()


def _execute(conninfo: str, statement: str) -> None:
    with psycopg.connect(conninfo) as connection:
        connection.execute(statement)


def test_a_plan_is_its_seed_s_and_leaves_no_kind_out() -> None:
    names = [f"kind part{number}" for number in range(12)]
    steps = plan(7, 60, names)
    assert steps == plan(7, 60, reversed(names))
    assert steps != plan(8, 60, names)
    assert sorted(step.fault for step in steps[:12]) == sorted(names)
    assert all(0 < one.at <= other.at < 60 for one, other in itertools.pairwise(steps))


def test_a_proxy_cuts_stalls_and_leaves_connections_half_open(target: str) -> None:
    port = reserve_port()
    proxy = Proxy(port, int(conninfo_to_dict(target)["port"] or 0))
    way = make_conninfo(target, port=port, connect_timeout=2)
    try:
        with psycopg.connect(way, autocommit=True) as before:
            proxy.cut()
            with pytest.raises(psycopg.OperationalError):
                before.execute("SELECT 1")
            with pytest.raises(psycopg.OperationalError):
                psycopg.connect(way)
        proxy.heal()
        with psycopg.connect(way, autocommit=True) as kept:
            proxy.stall()
            with pytest.raises(psycopg.OperationalError, match="timeout"):
                psycopg.connect(way)
            proxy.heal()
            pid = kept.execute("SELECT pg_backend_pid()").fetchall()[0][0]
            proxy.half_open("server")
            with pytest.raises(psycopg.OperationalError):
                kept.execute("SELECT 1")
        with psycopg.connect(way, autocommit=True) as new:
            lives = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s"
            assert new.execute(lives, [pid]).fetchall() == [(1,)]
            proxy.heal()
            while new.execute(lives, [pid]).fetchall() == [(1,)]:
                time.sleep(0.05)
    finally:
        proxy.close()
        release_port(port)


def test_the_summary_adds_runs_up_and_knows_them_again(tmp_path: Path) -> None:
    file = tmp_path / "faults.md"
    file.write_text(f"# Text\n\n{summary.HEAD}\n{summary.RULE}\n")
    for seed in (1, 2, 3, 7):
        faults = Counter({"kill producer-worker": seed, "crash kafka": 2})
        summary.add(Result(seed, 60, faults, 100, 10, "lost" if seed == 7 else ""), "abc", file)
    summary.add(Result(1, 5, Counter(), 10, 10), "abc", file)
    long, short = summary.load(file)
    assert (long.commit, long.seconds, long.seeds, long.failed) == ("abc", 60, {1, 2, 3, 7}, {7})
    assert (long.commits, long.faults) == (400, Counter({"kill producer-worker": 13, "crash kafka": 8}))
    assert (short.seconds, short.seeds, short.failed) == (5, {1}, set())
    assert file.read_text().startswith("# Text\n")
    file.write_text("something else")
    with pytest.raises(summary.SummaryError):
        summary.load(file)
