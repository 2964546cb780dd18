"""What must hold of a workload's transactions at the target; whatever does not is a CheckError that says so.

`Reader` looks at the target while a run goes on, each time in one snapshot: transactions are whole, none is
missing between two that are there, and none that was seen goes away again. At the end both sides are equal
row by row, hold exactly what was committed, and their chains verify and count the same changes.

Rules: nothing here knows how changes travel; the sessions that look are no part of what is looked at, and go
directly to the servers; a check that cannot be made is a failure, not a pass.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import psycopg

from tests.chaos.workload import NAMES, Commit, Workload
from tests.nodes import TwoNodes, differences
from tests.waiting import until

Seen: TypeAlias = dict[int, int]
"""How many transactions of each session were seen; session 0 is all of them."""

_EVERY_SECONDS = 0.25
_IN_STEP_SECONDS = 300.0  # also after a connection that is only thought to be alive
_NUMBERS = "SELECT coalesce(max(no), 0), count(*), coalesce((SELECT n FROM counter), -1) FROM ledger"
_SESSIONS = "SELECT session, count(*), max(seq) FROM ledger GROUP BY session"
_TORN = """
SELECT session, seq, l.items, l.total, i.items, i.total FROM ledger l FULL JOIN
    (SELECT session, seq, count(*) AS items, sum(value) AS total FROM items GROUP BY session, seq) i
    USING (session, seq)
WHERE (l.items, l.total) IS DISTINCT FROM (coalesce(i.items, 0), coalesce(i.total, 0)) LIMIT 3
"""
_BALANCE = 'SELECT coalesce(sum(balance), 0) FROM "Accounts"'
_PAGE = "SELECT DISTINCT no FROM page"


class CheckError(AssertionError):
    """Something that was promised does not hold."""


@dataclass
class Watch:
    """What was committed and how often it was looked at, known at the end."""

    commits: list[Commit] = field(default_factory=list)
    snapshots: int = 0


def check_snapshot(conninfo: str, seen: Seen) -> Seen:
    """Check one snapshot of a target; returns what it showed, to compare the next one with."""
    with psycopg.connect(conninfo, connect_timeout=5) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        return _look(connection, seen)


def _look(connection: psycopg.Connection, seen: Seen) -> Seen:
    last, count, counter = _rows(connection, _NUMBERS)[0]
    if not last == count == counter:
        raise CheckError(f"{count} commits up to number {last} are there, and the counter says {counter}")
    shown = {0: count}
    for session, count, last in _rows(connection, _SESSIONS):
        if count != last:
            raise CheckError(f"session {session} has {count} transactions up to number {last}")
        shown[session] = count
    for session, before in seen.items():
        if shown.get(session, 0) < before:
            raise CheckError(f"session {session} went back from {before} to {shown.get(session, 0)}")
    if torn := _rows(connection, _TORN):
        raise CheckError(f"half a transaction (session, seq, items and sum expected, and found): {torn}")
    if (balance := _rows(connection, _BALANCE)[0][0]) != 0:
        raise CheckError(f"half a transfer: the balances' sum is {balance}")
    if len(pages := _rows(connection, _PAGE)) > 1:
        raise CheckError(f"the page has rows of several transactions: {pages}")
    return shown


def _rows(connection: psycopg.Connection, statement: str) -> list[tuple[Any, ...]]:
    return connection.execute(statement).fetchall()


class Reader(threading.Thread):
    """Checks snapshot after snapshot until `stop`, which raises what was found.

    Where the target does not answer it tries again; where it crashed, commits it had not flushed may be gone
    with it, and what was seen before counts no more.
    """

    def __init__(self, conninfo: str) -> None:
        super().__init__(name="reader", daemon=True)
        self.snapshots = 0
        self._conninfo, self._stopping = conninfo, threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        """Look, and look again."""
        seen: Seen = {}
        try:
            while not self._stopping.wait(_EVERY_SECONDS):
                try:
                    seen = check_snapshot(self._conninfo, seen)
                    self.snapshots += 1
                except psycopg.OperationalError:
                    seen = {}
        except BaseException as error:  # noqa: BLE001 - raised again by stop()
            self._error = error

    def halt(self) -> None:
        """End it, whatever it found."""
        self._stopping.set()

    def stop(self) -> None:
        """End it; raises what it found. A reader that saw nothing proves nothing."""
        self.halt()
        self.join(60)
        if self._error is not None:
            raise self._error
        if self.is_alive() or not self.snapshots:
            raise CheckError(f"the reader saw {self.snapshots} snapshots and {self.is_alive()=}")


def check_commits(conninfo: str, commits: Sequence[Commit]) -> None:
    """A database's ledger is exactly the list of what was committed."""
    with psycopg.connect(conninfo) as connection:
        found = [
            Commit(*row)
            for row in _rows(connection, "SELECT no, session, seq, changes FROM ledger ORDER BY no")
        ]
    if found != list(commits):
        known, there = set(commits), set(found)
        raise CheckError(
            f"lost: {sorted(known - there)[:3]}; never committed: {sorted(there - known)[:3]};"
            f" {len(known)} were committed and {len(there)} are there"
        )


def check_equal(source: str, target: str) -> None:
    """Both sides' tables are equal row by row."""
    if found := differences(source, target, [("public", name) for name in NAMES]):
        raise CheckError("tables differ: " + "; ".join(found))


def check_counts(changes: int, sent: int, acknowledged: int) -> None:
    """What was committed, what the source's chain says and what the target's acknowledges is the same."""
    if not changes == sent == acknowledged:
        raise CheckError(f"{changes} changes were committed, {sent} sent and {acknowledged} acknowledged")


def check_chains(pair: TwoNodes, changes: int) -> None:
    """Both trails verify, with Kafka and with one another; and they count the changes that were made."""
    for node, peer in ((pair.a, pair.b), (pair.b, pair.a)):
        verify = ("audit", "verify", "--kafka", "--peer-connection", peer.conninfo, "--output", "json")
        done = node.ctl(*verify, check=False)
        if done.returncode:
            raise CheckError(f"the trail of {node.name} does not verify: {done.stdout}{done.stderr}")
        tuples = {one["chain"]: one["tuples"] for one in json.loads(done.stdout)["chains"]}
        check_counts(changes, tuples[pair.chain], tuples[f"{pair.chain}.ack.node-b"])


def check_all(pair: TwoNodes, commits: Sequence[Commit]) -> None:
    """Everything that must hold once both sides are in step."""
    check_commits(pair.a.conninfo, commits)
    check_commits(pair.b.conninfo, commits)
    check_snapshot(pair.b.conninfo, {})
    check_equal(pair.a.conninfo, pair.b.conninfo)
    check_chains(pair, sum(commit.changes for commit in commits))


@contextmanager
def under_load(
    pair: TwoNodes, seed: int, pause: float = 0.05, in_step: float = _IN_STEP_SECONDS
) -> Iterator[Watch]:
    """Have sessions commit and a reader look while the block runs; then come in step and check everything."""
    watch, reader = Watch(), Reader(pair.b.conninfo)
    load = Workload(pair.a.conninfo, seed, pause=pause)
    load.start()
    reader.start()
    try:
        yield watch
        watch.commits = load.stop()
        changes = sum(commit.changes for commit in watch.commits)
        pair.wait_in_step(in_step)
        until(lambda: pair.acknowledged_rows() >= changes, 60, lambda: "not everything is acknowledged")
        reader.stop()
        watch.snapshots = reader.snapshots
        check_all(pair, watch.commits)
    finally:
        load.halt()
        reader.halt()
