"""Several sessions that commit transactions of which everything is known, through crashes of their server.

Each transaction writes into several tables and says in its row of `ledger` what it left there: how many items
of what sum, and how many rows it changed. Invariants, of every state between two commits (`checker`):

* `no` numbers commits over all sessions, without a gap: the counter's lock is taken last and held until the
  commit, so that transactions overlap and are still numbered as they commit.
* `seq` numbers the transactions of a session, without a gap.
* Items of (session, seq) are as many, and sum up to as much, as its ledger row says.
* Balances sum up to nothing; all rows of `page`, which is truncated and filled again, have one number.

Rules: where a commit's answer is lost the server is asked once it is back; locks are taken in one order.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from typing import NamedTuple, TypeAlias

import psycopg
import psycopg.errors

ACCOUNTS = 20
TABLES_SQL = f"""
CREATE TABLE counter (id int PRIMARY KEY, n bigint NOT NULL);
CREATE TABLE ledger (no bigint PRIMARY KEY, session int NOT NULL, seq bigint NOT NULL, changes int NOT NULL,
    items int NOT NULL, total bigint NOT NULL, UNIQUE (session, seq));
CREATE TABLE items (id bigint PRIMARY KEY, session int NOT NULL, seq bigint NOT NULL, value bigint NOT NULL,
    note text);
CREATE INDEX ON items (session, seq);
CREATE TABLE "Accounts" (id int PRIMARY KEY, balance numeric(20,2) NOT NULL, note text);
CREATE TABLE page (line int PRIMARY KEY, no text NOT NULL);
INSERT INTO counter VALUES (1, 0);
INSERT INTO "Accounts" SELECT g, 0, (SELECT string_agg(md5((g * i)::text), '') FROM generate_series(1, 200) i)
    FROM generate_series(1, {ACCOUNTS}) g;
"""
"""Made with the same rows on both sides, so that a stream needs no first copy."""
NAMES = ("counter", "ledger", "items", "Accounts", "page")
TABLES = [f'"{name}"(*)' for name in NAMES]

_Ids: TypeAlias = Callable[[int], int]
_ID_RANGE = 10**12  # ids of items of one session
_SHUTDOWN = (psycopg.errors.AdminShutdown, psycopg.errors.CrashShutdown)
_BACK_SECONDS = 120.0  # how long a session waits for its server


class Commit(NamedTuple):
    """One transaction that stands."""

    no: int
    session: int
    seq: int
    changes: int


class Workload:
    """Sessions at work between `start` and `stop`; `stop` returns every transaction that was committed."""

    def __init__(self, conninfo: str, seed: int, sessions: int = 3, pause: float = 0.05) -> None:
        self._stop = threading.Event()
        self._sessions = [_Session(n, conninfo, seed, pause, self._stop) for n in range(1, sessions + 1)]

    def start(self) -> None:
        """Begin."""
        for session in self._sessions:
            session.start()

    def halt(self) -> None:
        """Tell the sessions to end."""
        self._stop.set()

    def stop(self) -> list[Commit]:
        """End each session after its transaction; raises what ended one before."""
        self.halt()
        for session in self._sessions:
            session.join(_BACK_SECONDS + 60)
            assert not session.is_alive(), f"session {session.number} hangs"
            if session.error is not None:
                raise session.error
        return sorted(commit for session in self._sessions for commit in session.commits)


class _Session(threading.Thread):
    """One session's transactions, one after the other."""

    def __init__(self, number: int, conninfo: str, seed: int, pause: float, stop: threading.Event) -> None:
        super().__init__(name=f"workload {number}", daemon=True)
        self.number, self.commits = number, list[Commit]()
        self.error: BaseException | None = None
        self._conninfo, self._pause, self._stopping = conninfo, pause, stop
        self._rng = random.Random(f"{seed} {number}")
        self._next_id = number * _ID_RANGE

    def run(self) -> None:
        """Connect, work, and connect again when the server went away."""
        try:
            while not self._stopping.is_set():
                connection = self._connect()
                try:
                    self._work(connection)
                except psycopg.OperationalError as error:
                    if not connection.broken and not isinstance(error, _SHUTDOWN):
                        raise
                finally:
                    connection.close()
        except BaseException as error:  # noqa: BLE001 - raised again by stop()
            self.error = error

    def _connect(self) -> psycopg.Connection:
        deadline = time.monotonic() + _BACK_SECONDS
        while True:
            try:
                return psycopg.connect(self._conninfo, connect_timeout=5)
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def _work(self, connection: psycopg.Connection) -> None:
        self._settle(connection)
        while not self._stopping.is_set():
            cursor = connection.cursor()
            # Counted before the commit: its answer may be lost.
            commit = _Transaction(cursor, self.number, len(self.commits) + 1, self._rng).write(self._ids)
            if self._rng.random() < 0.05:
                connection.rollback()
                continue
            connection.commit()
            self.commits.append(commit)
            time.sleep(self._rng.uniform(0, 2 * self._pause))

    def _settle(self, connection: psycopg.Connection) -> None:
        """Take up the commit whose answer was lost, if it stands."""
        row = connection.execute(
            "SELECT no, session, seq, changes FROM ledger WHERE session = %s AND seq > %s",
            (self.number, len(self.commits)),
        ).fetchone()
        connection.rollback()
        if row is not None:
            self.commits.append(Commit(*row))

    def _ids(self, count: int) -> int:
        """The first of `count` new ids of items."""
        self._next_id += count
        return self._next_id - count


class _Transaction:
    """The statements of one transaction; counts what they change."""

    def __init__(self, cursor: psycopg.Cursor, session: int, seq: int, rng: random.Random) -> None:
        self._cursor, self._session, self._seq, self._rng = cursor, session, seq, rng
        self._changes = self._items = self._total = 0

    def write(self, ids: _Ids) -> Commit:
        """Everything but the commit."""
        rng = self._rng
        self._insert(ids)
        if rng.random() < 0.5:
            self._change_older()
        if rng.random() < 0.3:
            self._delete_older()
        if rng.random() < 0.2:
            self._undo(ids)
        self._transfer()
        if rng.random() < 0.04:
            self._turn_page()
        self._run("UPDATE counter SET n = n + 1 RETURNING n")
        no = self._number()
        self._changes += 1
        self._cursor.execute(
            "INSERT INTO ledger VALUES (%s, %s, %s, %s, %s, %s)",
            (no, self._session, self._seq, self._changes, self._items, self._total),
        )
        return Commit(no, self._session, self._seq, self._changes)

    def _run(self, statement: str, *values: object) -> int:
        self._cursor.execute(statement, values or None)
        self._changes += self._cursor.rowcount
        return self._cursor.rowcount

    def _number(self) -> int:
        row = self._cursor.fetchone()
        assert row is not None
        return int(row[0])

    def _insert(self, ids: _Ids) -> None:
        """Mostly a few rows, now and then more than a few batches hold; some have a value out of line."""
        count = int(1500 ** self._rng.random() ** 2)
        first, factor = ids(count), self._rng.randrange(1, 100)
        self._run(
            "INSERT INTO items SELECT g, %s, %s, g %% 1000 * %s,"
            " CASE g %% 40 WHEN 1 THEN NULL WHEN 0 THEN"
            " (SELECT string_agg(md5((g * i)::text), '') FROM generate_series(1, 90) i) ELSE 'note ' || g END"
            " FROM generate_series(%s::bigint, %s) g",
            self._session, self._seq, factor, first, first + count - 1,
        )  # fmt: skip
        self._items = count
        self._total = sum(g % 1000 * factor for g in range(first, first + count))

    def _older(self) -> int:
        return max(1, self._seq - self._rng.randrange(1, 20))

    def _change_older(self) -> None:
        """Change values, or keys, of an earlier transaction's items, and its ledger row with them."""
        older, by = self._older(), self._rng.randrange(1, 50)
        if older == self._seq:
            return
        of = (self._session, older)
        if self._rng.random() < 0.3:
            self._run("UPDATE items SET id = -id WHERE session = %s AND seq = %s AND id > 0", *of)
            return
        found = self._run(
            "UPDATE items SET value = value + %s WHERE session = %s AND seq = %s AND id %% 3 = 0", by, *of
        )
        self._run("UPDATE ledger SET total = total + %s WHERE session = %s AND seq = %s", by * found, *of)

    def _delete_older(self) -> None:
        older = self._older()
        if older == self._seq:
            return
        of = (self._session, older)
        self._run("DELETE FROM items WHERE session = %s AND seq = %s AND id %% 5 = 1 RETURNING value", *of)
        gone = [int(row[0]) for row in self._cursor.fetchall()]
        self._run(
            "UPDATE ledger SET items = items - %s, total = total - %s WHERE session = %s AND seq = %s",
            len(gone), sum(gone), *of,
        )  # fmt: skip

    def _undo(self, ids: _Ids) -> None:
        """A savepoint that is rolled back leaves nothing; one inside of it neither."""
        first = ids(1)
        before = self._changes
        self._cursor.execute("SAVEPOINT a")
        self._run("INSERT INTO items VALUES (%s, %s, %s, 1, 'never')", first, self._session, self._seq)
        self._cursor.execute("SAVEPOINT b")
        self._run("DELETE FROM items WHERE session = %s AND seq = %s", self._session, self._seq)
        self._cursor.execute("RELEASE SAVEPOINT b")
        self._cursor.execute("ROLLBACK TO SAVEPOINT a")
        self._changes = before

    def _transfer(self) -> None:
        one, other = sorted(self._rng.sample(range(1, ACCOUNTS + 1), 2))
        amount = Decimal(self._rng.randrange(-10_000, 10_000)) / 100
        for account, sign in ((one, 1), (other, -1)):
            self._run('UPDATE "Accounts" SET balance = balance + %s WHERE id = %s', sign * amount, account)

    def _turn_page(self) -> None:
        self._cursor.execute("TRUNCATE page")
        self._changes += 1
        self._run(
            "INSERT INTO page SELECT g, %s FROM generate_series(1, %s) g",
            f"{self._session}/{self._seq}", self._rng.randrange(1, 30),
        )  # fmt: skip
