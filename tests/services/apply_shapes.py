"""Tables of many shapes and random work on them, for tests of the applier.

Each shape is a table `public.t` (or what `table` says) whose rows are known by a number; `row` is the SQL of
a row's values. The work is random from a seed and runs on a real database: what that refuses is rolled back.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import psycopg


@dataclass(frozen=True)
class Shape:
    """A table, how a row of it is written and changed, and what the target has instead, if it differs."""

    ddl: str
    columns: str
    row: Callable[[int, random.Random], str]
    where: str
    updates: tuple[str, ...]
    table: str = "public.t"
    moves: tuple[str, ...] = ()
    target_ddl: str | None = None
    compared: str | None = None
    overriding: str = ""
    truncates: bool = True


def _numbered(i: int, _: random.Random) -> str:
    return str(i)


def _text(rng: random.Random) -> str:
    return "'" + "".join(rng.choice("abcé'€\\% ") for _ in range(rng.randint(0, 12))).replace("'", "''") + "'"


def _maybe(rng: random.Random, value: str) -> str:
    return "NULL" if rng.random() < 0.2 else value


_TYPES: tuple[tuple[str, Callable[[random.Random], str]], ...] = (
    ("boolean", lambda r: r.choice(("true", "false"))),
    ("int2", lambda r: f"'{r.randint(-(2**15), 2**15 - 1)}'"),
    ("int8", lambda r: f"'{r.randint(-(2**63), 2**63 - 1)}'"),
    ("float4", lambda r: r.choice(("'NaN'", "'-0'", "1.1", "'Infinity'", "3e-20"))),
    ("float8", lambda r: r.choice(("'NaN'", "'-0'", "0.1", "'-Infinity'", "1e300"))),
    ("numeric", lambda r: r.choice(("'NaN'", "1.0", "1.00", "12345678901234567890.000000001", "-0.5"))),
    ("numeric(10,2)", lambda r: f"{r.randint(-99999, 99999)}.5"),
    ("text", _text),
    ("varchar(20)", _text),
    ("char(15)", _text),
    ('"char"', lambda r: r.choice(("'x'", "''"))),
    ("name", lambda _: "'some name'"),
    ("bytea", lambda r: f"'\\x{r.randbytes(r.randint(0, 9)).hex()}'"),
    ("date", lambda r: r.choice(("'2024-02-29'", "'infinity'", "'0044-03-15 BC'"))),
    ("time", lambda _: "'23:59:59.999999'"),
    ("timetz", lambda _: "'04:05:06.789-08'"),
    ("timestamp", lambda r: r.choice(("'2024-01-01 00:00:00.000001'", "'-infinity'"))),
    ("timestamptz(3)", lambda _: "'2024-06-01 12:00:00.5+02'"),
    ("interval", lambda r: r.choice(("'1 mon -2 days 03:00:00.5'", "'-1 year'"))),
    ("uuid", lambda r: f"'{r.randbytes(16).hex()}'"),
    ("json", lambda _: """'{"b": 1,  "a": [null, "é"]}'"""),
    ("jsonb", lambda r: f"""'{{"b": {r.random()}, "a": [null]}}'"""),
    ("xml", lambda _: "'<a b=\"c\">é</a>'"),
    ("inet", lambda r: r.choice(("'10.0.0.1/8'", "'::1'"))),
    ("cidr", lambda _: "'192.168.0.0/24'"),
    ("macaddr8", lambda _: "'08:00:2b:01:02:03:04:05'"),
    ("point", lambda r: f"'({r.random()},2)'"),
    ("polygon", lambda _: "'((0,0),(1,1),(2,0))'"),
    ("bit(5)", lambda r: f"B'{r.randint(0, 31):05b}'"),
    ("varbit", lambda r: r.choice(("B''", "B'101'"))),
    ("tsvector", lambda _: "'a:1 fat:2,4 cat:3'"),
    ("int4range", lambda r: r.choice(("'empty'", "'[1,5)'", "'(,3)'"))),
    ("datemultirange", lambda _: "'{[2024-01-01,2024-02-01), [2025-01-01,)}'"),
    ("int4[]", lambda r: r.choice(("'{}'", "'{1,NULL,3}'", "'[0:1]={7,8}'", "'{{1,2},{3,4}}'"))),
    ("text[]", lambda _: "ARRAY['a,b', '\"', NULL, '']"),
    ("money", lambda _: "'12.34'"),
    ("pg_lsn", lambda _: "'16/B374D848'"),
    ("public.mood", lambda r: r.choice(("'sad'", "'ok'", "'it''s'"))),
    ("public.mood[]", lambda _: "'{sad,ok}'"),
    ("public.pair", lambda _: "ROW(1, 'a,b')"),
    ("public.short", lambda r: r.choice(("'abc'", "'x'"))),
)
_TYPE_DDL = """
CREATE TYPE public.mood AS ENUM ('sad', 'ok', 'it''s');
CREATE TYPE public.pair AS (a int, b text);
CREATE DOMAIN public.short AS varchar(5) NOT NULL CHECK (value <> 'bad');
"""


def _typed_row(i: int, rng: random.Random) -> str:
    values = [make(rng) if name == "public.short" else _maybe(rng, make(rng)) for name, make in _TYPES]
    return ", ".join([str(i), *values])


def _typed_ddl() -> str:
    columns = ", ".join(f"c{n} {name}" for n, (name, _) in enumerate(_TYPES))
    return _TYPE_DDL + f"CREATE TABLE public.t (id int PRIMARY KEY, {columns});"


def _simple(i: int, rng: random.Random) -> str:
    return f"{i}, {rng.randint(0, 99)}, {_maybe(rng, _text(rng))}"


_SIMPLE_UPDATES = ("n = n + 1", "v = v || 'x'", "v = NULL, n = {r}", "id = id")
_SIMPLE_COLUMNS = "id, n, v"

SHAPES: dict[str, Shape] = {
    "simple": Shape(
        "CREATE TABLE public.t (id int PRIMARY KEY, n int, v text)",
        _SIMPLE_COLUMNS,
        _simple,
        "id = {i}",
        _SIMPLE_UPDATES,
        moves=("id = id + 5000", "id = -id"),
    ),
    "every type": Shape(
        _typed_ddl(),
        ", ".join(["id", *(f"c{n}" for n in range(len(_TYPES)))]),
        _typed_row,
        "id = {i}",
        ("c7 = 'new', c0 = NULL", "c21 = '{{}}', c33 = '{{{{9}}}}'"),
        moves=("id = id + 5000",),
    ),
    "quoted names and a composite key": Shape(
        'CREATE SCHEMA "My %s Schema"; CREATE TABLE "My %s Schema"."Order ""Items""" '
        '("select" text, "%d" date, "a.b" int, "é€" text, PRIMARY KEY ("select", "%d"))',
        '"select", "%d", "a.b", "é€"',
        lambda i, r: f"'k{i % 7}', date '2024-01-01' + {i}, {r.randint(0, 9)}, {_text(r)}",
        "\"%d\" = date '2024-01-01' + {i}",
        ('"a.b" = {r}', '"é€" = NULL'),
        table='"My %s Schema"."Order ""Items"""',
        moves=("\"select\" = 'm{r}'", '"%d" = "%d" + 10000'),
    ),
    "full identity without a key": Shape(
        "CREATE TABLE public.t (id int, n int, v text); ALTER TABLE public.t REPLICA IDENTITY FULL",
        _SIMPLE_COLUMNS,
        lambda i, r: f"{_maybe(r, str(i % 20))}, {r.randint(0, 2)}, {_maybe(r, _text(r))}",
        "id = {i} % 20",
        _SIMPLE_UPDATES,
        moves=("id = {r}",),
    ),
    "full identity, types without equality": Shape(
        _TYPE_DDL + "CREATE TABLE public.t"
        "(id int, j json, p point, m public.mood, c public.pair, n numeric, a json[]);"
        "ALTER TABLE public.t REPLICA IDENTITY FULL",
        "id, j, p, m, c, n, a",
        lambda i, r: (
            f"{i % 5}, {_maybe(r, chr(39) + '[1]' + chr(39))}, '(1,2)', 'ok', ROW({r.randint(0, 3)}, 'x'),"
            f" {r.choice(('1.0', '1.00'))}, ARRAY['[1]'::json]"
        ),
        "id = {i} % 5",
        ("n = n + 1", "j = '[ 2]'", "p = NULL"),
        moves=("id = {r}",),
    ),
    "full identity with a key": Shape(
        "CREATE TABLE public.t (id int PRIMARY KEY, n int, v text);"
        "ALTER TABLE public.t REPLICA IDENTITY FULL",
        _SIMPLE_COLUMNS,
        _simple,
        "id = {i}",
        _SIMPLE_UPDATES,
        moves=("id = id + 5000",),
    ),
    "identity by index": Shape(
        "CREATE TABLE public.t (id int, n int NOT NULL, v text, u int NOT NULL);"
        "CREATE UNIQUE INDEX t_u ON public.t (u); ALTER TABLE public.t REPLICA IDENTITY USING INDEX t_u",
        "id, n, v, u",
        lambda i, r: f"{_simple(i, r)}, {i}",
        "u = {i}",
        ("n = n + 1", "id = NULL"),
        moves=("u = u + 5000",),
    ),
    "no key at the target": Shape(
        "CREATE TABLE public.t (id int PRIMARY KEY, n int, v text)",
        _SIMPLE_COLUMNS,
        _simple,
        "id = {i}",
        _SIMPLE_UPDATES,
        moves=("id = id + 5000",),
        target_ddl="CREATE TABLE public.t (v text, n int, id int)",
        compared="SELECT id, n, v FROM public.t",
    ),
    "a deferrable key at the target": Shape(
        "CREATE TABLE public.t (id int PRIMARY KEY, n int, v text)",
        _SIMPLE_COLUMNS,
        _simple,
        "id = {i}",
        _SIMPLE_UPDATES,
        moves=("id = id + 5000",),
        target_ddl="CREATE TABLE public.t (id int PRIMARY KEY DEFERRABLE, n int, v text)",
    ),
    "wider types and other columns at the target": Shape(
        "CREATE TABLE public.t (id int PRIMARY KEY, n int, v text)",
        _SIMPLE_COLUMNS,
        _simple,
        "id = {i}",
        _SIMPLE_UPDATES,
        moves=("id = id + 5000",),
        target_ddl="CREATE TABLE public.t"
        "(extra text DEFAULT 'mine', v varchar(4000), n numeric, id int8 PRIMARY KEY)",
        compared="SELECT id, n, v FROM public.t",
    ),
    "toasted values": Shape(
        "CREATE TABLE public.t (id int PRIMARY KEY, big text, n int, big2 text);"
        "ALTER TABLE public.t ALTER big SET STORAGE EXTERNAL, ALTER big2 SET STORAGE EXTERNAL",
        "id, big, n, big2",
        lambda i, r: f"{i}, repeat('x{i}', {r.choice((1, 2000))}), 0, repeat('y', {r.choice((0, 5000))})",
        "id = {i}",
        ("n = n + 1", "n = {r}, big = repeat('z', 3000)", "big2 = NULL", "big2 = repeat('{r}', 4000)"),
        moves=("id = id + 5000",),
    ),
    "toasted values with full identity": Shape(
        "CREATE TABLE public.t (id int, big text, n int);"
        "ALTER TABLE public.t REPLICA IDENTITY FULL, ALTER big SET STORAGE EXTERNAL",
        "id, big, n",
        lambda i, r: f"{i}, repeat('x{i}', {r.choice((1, 2000))}), 0",
        "id = {i}",
        ("n = n + 1", "big = repeat('z', 3000)"),
    ),
    "a toasted key": Shape(
        "CREATE TABLE public.t (id int, k text, n int, PRIMARY KEY (k));"
        "ALTER TABLE public.t ALTER k SET STORAGE EXTERNAL",
        "id, k, n",
        lambda i, _: f"{i}, '{i}' || repeat('abcdefgh', 300), 0",
        "id = {i}",
        ("n = n + 1", "n = {r}"),
        moves=("k = k || 'm'",),
    ),
    "identity columns and generated ones": Shape(
        "CREATE TABLE public.t (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, n int, v text,"
        " g int GENERATED ALWAYS AS (n * 2) STORED)",
        _SIMPLE_COLUMNS,
        _simple,
        "id = {i}",
        ("n = n + 1", "v = NULL, n = {r}"),
        overriding="OVERRIDING SYSTEM VALUE",
        moves=("id = DEFAULT",),
    ),
    "an identity column beside the key": Shape(
        "CREATE TABLE public.t (id int PRIMARY KEY, n int GENERATED ALWAYS AS IDENTITY, v text);"
        "ALTER TABLE public.t ALTER v SET STORAGE EXTERNAL",
        "id, v",
        lambda i, r: f"{i}, repeat('x', {r.choice((1, 3000))})",
        "id = {i}",
        ("v = v || 'x'", "n = DEFAULT"),
        moves=("id = id + 5000",),
    ),
    "only an identity column": Shape(
        "CREATE TABLE public.t (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY)",
        "id",
        _numbered,
        "id = {i}",
        (),
        overriding="OVERRIDING SYSTEM VALUE",
        moves=("id = DEFAULT",),
    ),
    "partitions at the target": Shape(
        "CREATE TABLE public.t (id int PRIMARY KEY, n int, v text)",
        _SIMPLE_COLUMNS,
        _simple,
        "id = {i}",
        _SIMPLE_UPDATES,
        moves=("id = id + 5000",),
        target_ddl="CREATE TABLE public.t (id int PRIMARY KEY, n int, v text) PARTITION BY HASH (id);"
        "CREATE TABLE public.t0 PARTITION OF public.t FOR VALUES WITH (MODULUS 2, REMAINDER 0);"
        "CREATE TABLE public.t1 PARTITION OF public.t FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
    ),
    "partitions at the target, no key": Shape(
        "CREATE TABLE public.t (id int, n int, v text); ALTER TABLE public.t REPLICA IDENTITY FULL",
        _SIMPLE_COLUMNS,
        _simple,
        "id = {i}",
        _SIMPLE_UPDATES,
        moves=("id = id + 5000",),
        target_ddl="CREATE TABLE public.t (id int, n int, v text) PARTITION BY HASH (id);"
        "CREATE TABLE public.t0 PARTITION OF public.t FOR VALUES WITH (MODULUS 2, REMAINDER 0);"
        "CREATE TABLE public.t1 PARTITION OF public.t FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
    ),
    "another collation at the target": Shape(
        'CREATE TABLE public.t (k text COLLATE "C" PRIMARY KEY, id int, v text)',
        "k, id, v",
        lambda i, r: f"'k{i}', {i}, {_text(r)}",
        "id = {i}",
        ("v = v || 'x'",),
        moves=("k = 'm' || k",),
        target_ddl='CREATE TABLE public.t (k text COLLATE "POSIX" PRIMARY KEY, id int, v text COLLATE "C")',
    ),
    "another collation, no key": Shape(
        'CREATE TABLE public.t (k text COLLATE "C", id int); ALTER TABLE public.t REPLICA IDENTITY FULL',
        "k, id",
        lambda i, _: f"'k{i}', {i}",
        "id = {i}",
        ("k = k || 'x'",),
        target_ddl='CREATE TABLE public.t (k text COLLATE "POSIX", id int)',
    ),
    "several unique keys": Shape(
        "CREATE TABLE public.t (id int PRIMARY KEY, n int, v text, u int UNIQUE, w int UNIQUE)",
        "id, n, v, u, w",
        lambda i, r: f"{_simple(i, r)}, {i}, {_maybe(r, str(-i))}",
        "id = {i}",
        ("n = n + 1", "u = {r} + 1000", "w = NULL", "w = {r}"),
        moves=("id = id + 5000",),
    ),
    "a trigger that fires for replicas": Shape(
        "CREATE TABLE public.t (id int PRIMARY KEY, n int, v text)",
        _SIMPLE_COLUMNS,
        _simple,
        "id = {i}",
        _SIMPLE_UPDATES,
        moves=("id = id + 5000",),
        target_ddl="CREATE TABLE public.t (id int PRIMARY KEY, n int, v text);"
        "CREATE FUNCTION public.noop() RETURNS trigger LANGUAGE plpgsql"
        " AS 'BEGIN RETURN coalesce(new, old); END';"
        "CREATE TRIGGER always BEFORE INSERT OR UPDATE OR DELETE ON public.t"
        " FOR EACH ROW EXECUTE FUNCTION public.noop();"
        "ALTER TABLE public.t ENABLE ALWAYS TRIGGER always",
    ),
    "an exclusion constraint": Shape(
        "CREATE TABLE public.t"
        "(id int PRIMARY KEY, n int, v text, r int4range, EXCLUDE USING gist (r WITH &&))",
        "id, n, v, r",
        lambda i, r: f"{_simple(i, r)}, int4range({i} * 10, {i} * 10 + 10)",
        "id = {i}",
        ("n = n + 1", "r = 'empty'", "r = int4range({r} * 10, {r} * 10 + 5)"),
        moves=("id = id + 5000",),
    ),
}

IN_TEXT = (
    "every type",
    "full identity, types without equality",
    "wider types and other columns at the target",
    "toasted values",
    "identity columns and generated ones",
)
"""Shapes that are also driven with every value sent as text."""


class Work:
    """Random transactions on a shape's table, the same for the same seed."""

    def __init__(self, conn: psycopg.Connection[tuple[object, ...]], shape: Shape, seed: int) -> None:
        self._conn, self._shape, self._rng = conn, shape, random.Random(seed)

    def transactions(self, count: int) -> None:
        """Run transactions of a few statements each; some are rolled back, by choice or by a constraint."""
        for _ in range(count):
            try:
                with self._conn.transaction() as transaction:
                    for _ in range(self._rng.choice((1, 1, 2, 5, 10))):
                        self._conn.execute(self._statement().encode())
                    if self._rng.random() < 0.05:
                        raise psycopg.Rollback(transaction)
            except psycopg.errors.IntegrityError:
                continue

    def _statement(self) -> str:
        shape, rng = self._shape, self._rng
        i, r = rng.randint(1, 60), rng.randint(1, 60)
        where = shape.where.format(i=i)
        kind = rng.random()
        if shape.truncates and kind < 0.01:
            return f"TRUNCATE {shape.table} RESTART IDENTITY"
        if kind < 0.1 and shape.moves:
            return f"UPDATE {shape.table} SET {rng.choice(shape.moves).format(i=i, r=r)} WHERE {where}"
        if kind < 0.5 and shape.updates:
            return f"UPDATE {shape.table} SET {rng.choice(shape.updates).format(i=i, r=r)} WHERE {where}"
        if kind < 0.6:
            return f"DELETE FROM {shape.table} WHERE {where}"
        row = shape.row(i, rng)
        return (
            f"DELETE FROM {shape.table} WHERE {where};"
            f" INSERT INTO {shape.table} ({shape.columns}) {shape.overriding} VALUES ({row})"
        )
