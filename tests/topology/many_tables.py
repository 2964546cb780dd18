"""A database of many tables of mixed shape, and sessions that work on all of them at random.

Not here: what is asserted. The shapes are those of tests/services/apply_shapes.py and some that need a
database of their own kind; each table lies in a schema of its own, so that every shape can be there often.
The work is drawn from a seed; but where sessions meet, the order of their commits is the server's.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import psycopg

from tests.services.apply_shapes import SHAPES, Shape

_WIDE = 150
# Rows of a table are known by numbers up to this, so that sessions meet at the same rows.
_NUMBERS = 40
# add-peer wants a key that rows can be found by.
_NO_PEER = "a deferrable key at the target"
# What the server refuses, by a constraint or because sessions met, is rolled back and goes on.
_REFUSED = (
    psycopg.errors.IntegrityError,
    psycopg.errors.DataError,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.SerializationFailure,  # a row that another session moved to another partition
    psycopg.errors.LockNotAvailable,
)


def _wide_row(i: int, rng: random.Random) -> str:
    return ", ".join([str(i), *(rng.choice(("NULL", f"'{rng.randint(0, 99)}'")) for _ in range(_WIDE))])


def _uuid(i: int) -> str:
    return f"'00000000-0000-4000-8000-{i:012d}'"


OWN_SHAPES: dict[str, Shape] = {
    "a uuid as key": Shape(
        "CREATE TABLE public.t (k uuid PRIMARY KEY, id int, tags text[], body jsonb, span int4range)",
        "k, id, tags, body, span",
        lambda i, r: f"{_uuid(i)}, {i}, ARRAY['a', NULL], '{{\"n\": {r.randint(0, 9)}}}', '[1,{i + 2})'",
        "id = {i}",
        ("tags = tags || '{r}'::text", "body = body || '{{\"seen\": [1, null]}}'", "span = 'empty'"),
        moves=("k = md5('{r}')::uuid",),
    ),
    "an enum and a date as key": Shape(
        "CREATE TYPE public.mood AS ENUM ('sad', 'ok', 'it''s');"
        "CREATE TABLE public.t (m public.mood, d date, id int, ms public.mood[], PRIMARY KEY (m, d))",
        "m, d, id, ms",
        lambda i, r: f"'{r.choice(('sad', 'ok'))}', date '2024-01-01' + {i}, {i}, '{{sad,NULL}}'",
        "id = {i}",
        ("ms = ms || 'ok'::public.mood", "ms = NULL"),
        moves=("m = 'it''s'", "d = d - 1000"),
    ),
    "many columns": Shape(
        "CREATE TABLE public.t (id int PRIMARY KEY, "
        + ", ".join(f"c{n} {('text', 'int', 'numeric')[n % 3]}" for n in range(_WIDE))
        + ")",
        ", ".join(["id", *(f"c{n}" for n in range(_WIDE))]),
        _wide_row,
        "id = {i}",
        ("c0 = c0 || 'x', c149 = {r}", "c1 = {r}, c2 = NULL", "c147 = repeat('w', 200)"),
        moves=("id = id + 5000",),
    ),
    "partitioned, published by its root": Shape(
        "CREATE TABLE public.t (id int, n int, v text, PRIMARY KEY (id, n)) PARTITION BY LIST (n);"
        "CREATE TABLE public.t0 PARTITION OF public.t FOR VALUES IN (0, 1, 2);"
        "CREATE TABLE public.t1 (v text, n int NOT NULL, id int NOT NULL);"
        "ALTER TABLE public.t ATTACH PARTITION public.t1 FOR VALUES IN (3, 4);"
        "CREATE TABLE public.t2 PARTITION OF public.t DEFAULT",
        "id, n, v",
        lambda i, r: f"{i}, {r.randint(0, 6)}, repeat('p', {i})",
        "id = {i}",
        ("v = v || 'x'", "v = NULL"),
        moves=("n = {r} % 7",),
    ),
    "rows that refer to rows of their own table": Shape(
        "CREATE TABLE public.t (id int PRIMARY KEY, parent int REFERENCES public.t ON DELETE SET NULL"
        " ON UPDATE CASCADE DEFERRABLE, v text)",
        "id, parent, v",
        lambda i, _: f"{i}, (SELECT max(id) FROM public.t WHERE id < {i}), 'child'",
        "id = {i}",
        ("parent = NULL", "parent = (SELECT min(id) FROM public.t)", "v = v || 'x'"),
        moves=("id = id + 5000",),
    ),
    "unique besides the key, and generated": Shape(
        "CREATE TABLE public.t (id int PRIMARY KEY, u text UNIQUE, n int,"
        " k int GENERATED ALWAYS AS (id + n) STORED, UNIQUE (n, u))",
        "id, u, n",
        lambda i, r: f"{i}, {r.choice(('NULL', chr(39) + 'u' + str(i) + chr(39)))}, {r.randint(0, 9)}",
        "id = {i}",
        ("u = 'u{r}'", "n = n + 1", "u = NULL"),
        moves=("id = id + 5000",),
    ),
}


def _placed(shape: Shape, number: int) -> Shape:
    """The shape in a schema of its own."""

    def put(text: str) -> str:
        return text.replace("public.", f"s{number:03}.").replace("My %s Schema", f"My %s Schema {number}")

    def row(i: int, rng: random.Random, made: Callable[[int, random.Random], str] = shape.row) -> str:
        return put(made(i, rng))

    return replace(
        shape,
        ddl=f"CREATE SCHEMA s{number:03}; {put(shape.ddl)};",
        target_ddl=put(shape.target_ddl) + ";" if shape.target_ddl else None,
        table=put(shape.table),
        updates=tuple(map(put, shape.updates)),
        moves=tuple(map(put, shape.moves)),
        row=row,
    )


def tables(count: int) -> list[Shape]:
    """`count` tables, shape after shape; of each what is compared is the whole row."""
    shapes = [
        shape
        for name, shape in {**SHAPES, **OWN_SHAPES}.items()
        if shape.compared is None and name != _NO_PEER
    ]
    return [_placed(shapes[number % len(shapes)], number) for number in range(count)]


def source_ddl(made: list[Shape]) -> str:
    """All tables as the source has them."""
    return "".join(shape.ddl for shape in made)


def target_ddl(made: list[Shape]) -> str:
    """All tables as the target has them."""
    return "".join(
        f"{shape.ddl.partition(';')[0]};{shape.target_ddl}" if shape.target_ddl else shape.ddl
        for shape in made
    )


class Session:
    """One connection that works on the tables at random, until it is told to stop."""

    def __init__(self, conninfo: str, made: list[Shape], seed: int) -> None:
        self._conninfo, self._tables, self._rng = conninfo, made, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.error: Exception | None = None

    def fill(self, rows: int) -> None:
        """Some rows in every table, in one transaction each."""
        with self._open() as conn:
            for shape in self._tables:
                with conn.transaction():
                    for i in range(1, rows + 1):
                        conn.execute(self._insert(shape, i).encode())

    def run(self, stop: threading.Event, pause: float = 0.0) -> None:
        """Transactions until `stop`, with a pause after each; `error` is what ended it, if not that."""
        try:
            with self._open() as conn:
                while not stop.is_set():
                    self._transaction(conn)
                    time.sleep(pause)
        except Exception as error:  # noqa: BLE001  # the test's own thread raises it
            self.error = error

    @contextmanager
    def _open(self) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
        with psycopg.connect(self._conninfo, autocommit=True) as conn:
            conn.execute("SET lock_timeout = '2s'")
            conn.execute("SET deadlock_timeout = '100ms'")
            yield conn

    def _transaction(self, conn: psycopg.Connection[tuple[object, ...]]) -> None:
        """One to four tables, with savepoints; now and then all of it is rolled back."""
        rng = self._rng
        chosen = rng.sample(self._tables, rng.choice((1, 1, 2, 4)))
        try:
            with conn.transaction() as whole:
                for _ in range(rng.choice((1, 2, 5, 10))):
                    self._savepoint(conn, rng.choice(chosen), undone=rng.random() < 0.1)
                if rng.random() < 0.01:
                    self.counts["truncate"] += 1
                    conn.execute(self._truncate(chosen).encode())
                if rng.random() < 0.05:
                    self.counts["rolled back"] += 1
                    raise psycopg.Rollback(whole)
            self.counts["committed"] += 1
            self.counts["over several tables"] += len(chosen) > 1
        except _REFUSED:
            self.counts["refused"] += 1

    def _savepoint(self, conn: psycopg.Connection[tuple[object, ...]], shape: Shape, *, undone: bool) -> None:
        kind, statement = self._statement(shape)
        try:
            with conn.transaction(force_rollback=undone):
                conn.execute(statement.encode())
            self.counts["savepoint undone" if undone else kind] += 1
        except (psycopg.errors.IntegrityError, psycopg.errors.DataError):
            self.counts["savepoint refused"] += 1

    def _truncate(self, chosen: list[Shape]) -> str:
        names = ", ".join(shape.table for shape in chosen if shape.truncates)
        return f"TRUNCATE {names} {self._rng.choice(('', 'RESTART IDENTITY', 'CASCADE'))}"

    def _statement(self, shape: Shape) -> tuple[str, str]:
        rng = self._rng
        i, r = rng.randint(1, _NUMBERS), rng.randint(1, _NUMBERS)
        where = shape.where.format(i=i)
        kind = rng.random()
        if kind < 0.1 and shape.moves:
            change = rng.choice(shape.moves).format(i=i, r=r)
            return "key change", f"UPDATE {shape.table} SET {change} WHERE {where}"
        if kind < 0.5 and shape.updates:
            change = rng.choice(shape.updates).format(i=i, r=r)
            return "update", f"UPDATE {shape.table} SET {change} WHERE {where}"
        if kind < 0.65:
            return "delete", f"DELETE FROM {shape.table} WHERE {where}"
        return "insert", f"DELETE FROM {shape.table} WHERE {where}; {self._insert(shape, i)}"

    def _insert(self, shape: Shape, i: int) -> str:
        row = shape.row(i, self._rng)
        return f"INSERT INTO {shape.table} ({shape.columns}) {shape.overriding} VALUES ({row})"


def work(conninfo: str, made: list[Shape], seed: int, seconds: float, sessions: int = 3) -> Counter[str]:
    """Have sessions work at once for so long; gives what they did. Raises what ended one of them early."""
    stop = threading.Event()
    workers = [Session(conninfo, made, seed * 100 + number) for number in range(sessions)]
    threads = [threading.Thread(target=worker.run, args=(stop, 0.005)) for worker in workers]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and all(thread.is_alive() for thread in threads):
        time.sleep(0.2)
    stop.set()
    for thread in threads:
        thread.join()
    for worker in workers:
        if worker.error is not None:
            raise worker.error
    return sum((worker.counts for worker in workers), Counter())
