"""A target column that holds less than the source's: what fits arrives, what does not stops by name."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest

from tests.conftest import NewDatabase
from tests.services.apply_pair import MakePair, Pair, pairs
from vsql_consumers import fitting
from vsql_shared.errors import DatabaseError

# source type, target type, a value that fits, one that does not
NARROWER = [
    ("numeric(12,4)", "numeric(12,2)", "1.5", "1.234"),
    ("numeric", "numeric(12,2)", "1.50", "0.001"),
    ("numeric(6,-2)", "numeric(12,-3)", "123000", "123400"),
    ("public.amount", "numeric(12,2)", "1.5", "1.2345"),
    ("numeric(12,4)", "public.cents", "1.5", "1.2345"),
    ("numeric", "float8", "0.1", "0.1234567890123456789"),
    ("float8", "float4", "0.5", "0.1234567890123"),
    ("int8", "float8", "4503599627370496", "9007199254740993"),
    ("timestamptz", "timestamptz(0)", "2026-01-01 00:00:01+00", "2026-01-01 00:00:01.5+00"),
    ("timestamp(6)", "timestamp(3)", "2026-01-01 00:00:01.123", "2026-01-01 00:00:01.1234"),
    ("timestamp", "date", "2026-01-01 00:00:00", "2026-01-01 00:00:01"),
    ("timetz", "time", "12:00+00", "12:00+02"),
    ("time", "time(0)", "12:00", "12:00:00.5"),
    ("interval", "interval(0)", "1 mon 1 s", "1.5 s"),
    ("interval", "interval day", "3 days", "3 days 01:00"),
    ("text", "varchar(3)", "abc", "abc "),
    ("varchar(5)", "varchar(3)", "abc", "abc "),
    ("int", '"char"', "7", "123"),
    ("public.mood", '"char"', "b", "ab"),
    ("json", "varchar(3)", "[] ", "[]  "),
    ("jsonb", "name", "1", '"' + "n" * 63 + '"'),
    ("numeric", "money", "1.25", "1.239"),
    ("int", "oid", "1", "-1"),
    ("text", "name", "n", "n" * 64),
    ("text", "numeric(12,2)", "1.5", "1.234"),
    ("varchar", "timestamptz(0)", "2026-01-01", "2026-01-01 00:00:01.5"),
    ("numeric[]", "numeric(12,2)[]", "{1.50,NULL}", "{1.5,1.234}"),
    ("numeric[]", "float8[]", "{0.1}", "{0.1,0.1234567890123456789}"),
    ("timestamptz[]", "timestamptz(0)[]", "{2026-01-01}", "{2026-01-01,2026-01-01 00:00:01.5+00}"),
]
DOMAINS = """CREATE TYPE public.mood AS ENUM ('b', 'ab');
CREATE DOMAIN public.amount AS numeric(12,4); CREATE DOMAIN public.cents AS numeric(12,2);"""


@pytest.fixture
def make_pair(new_database: NewDatabase) -> Iterator[MakePair]:
    """Pairs of databases."""
    yield from pairs(new_database)


def _made(make_pair: MakePair, binary: bool) -> Pair:
    pair = make_pair(binary=binary)
    source = [f"CREATE TABLE public.t{n} (id int PRIMARY KEY, v {one[0]})" for n, one in enumerate(NARROWER)]
    target = [f"CREATE TABLE public.t{n} (id int PRIMARY KEY, v {one[1]})" for n, one in enumerate(NARROWER)]
    pair.tables(DOMAINS + ";".join(source), DOMAINS + ";".join(target))
    return pair


@pytest.mark.parametrize("binary", [True, False])
def test_a_value_that_would_be_rounded_is_refused_and_others_arrive(
    make_pair: MakePair, binary: bool
) -> None:
    pair = _made(make_pair, binary)
    for n, (_, _, fits, _) in enumerate(NARROWER):
        pair.do(
            f"INSERT INTO t{n} VALUES (1, '{fits}'), (2, NULL)", f"UPDATE t{n} SET v = '{fits}' WHERE id = 2"
        )
    pair.carry()
    for n, (source, target, fits, _) in enumerate(NARROWER):
        query = f"SELECT id, v = '{fits}'::{target} FROM t{n} ORDER BY 1"
        assert pair.target.execute(query.encode()).fetchall() == [(1, True), (2, True)], (source, target)
    pair.current().abort()
    for n, (source, target, _, rounded) in enumerate(NARROWER):
        for statement in (f"INSERT INTO t{n} VALUES (3, '{rounded}')", f"UPDATE t{n} SET v = '{rounded}'"):
            pair.do(statement)
            batches = pair.source.batches()
            with pytest.raises(DatabaseError) as caught:
                pair.current().apply(batches)
            pair.current().abort()
            assert f"public.t{n} (batch " in str(caught.value), (source, target)
            assert rounded.strip("{}") not in str(caught.value)
        kept = f"SELECT count(*) FROM t{n} WHERE v = '{NARROWER[n][2]}'::{target}"
        assert pair.target.execute(kept.encode()).fetchall() == [(2,)], (source, target)


TYPES = [
    "smallint", "integer", "bigint", "real", "double precision", "numeric", "numeric(10,2)", "numeric(12,4)",
    "numeric(12,-2)", "date", "time", "time(2)", "timetz", "timestamp", "timestamp(0)", "timestamptz",
    "timestamptz(3)", "interval", "interval(2)", "interval day to hour", "text", "varchar", "varchar(5)",
    "varchar(9)", "char(3)", "char(6)", "bpchar", "name",
]  # fmt: skip
VALUES = [
    "1", "-32768", "2147483647", "9007199254740993", "0.1", "1.25", "1.2345", "123400", "1e-7", "NaN",
    "Infinity", "2026-01-01", "2026-01-01 12:34:56.789012", "2026-01-01 12:34:56.789012+02", "12:34",
    "12:34:56.789", "12:34+02", "1 day", "1 mon 2 days 03:04:05.678901", "abc", "abc  ", "abcdefgh ",
    "n" * 70,
]  # fmt: skip


# Whether a value comes back changed from a column it was assigned to; an error is no change.
LOST = """
CREATE FUNCTION lost(source text, place text, base text, value text) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE kept boolean;
BEGIN
    EXECUTE format('INSERT INTO types (%1$I) SELECT CAST(CAST(CAST(%2$L AS %3$s) AS text) AS %4$s)'
        ' RETURNING CAST(CAST(%1$I AS text) AS %3$s) IS NOT DISTINCT FROM CAST(%2$L AS %3$s)',
        place, value, source, base) INTO kept;
    RETURN NOT kept;
EXCEPTION WHEN data_exception OR cannot_coerce THEN RETURN false;
END $$"""


@pytest.mark.parametrize("suffix", ["", "[]"])
def test_whatever_is_said_to_be_held_comes_back_as_it_came(make_pair: MakePair, suffix: str) -> None:
    conn = make_pair().target
    conn.execute("SET TimeZone = 'UTC'")
    conn.execute(LOST)
    columns = ", ".join(f"c{n} {type_}{suffix}" for n, type_ in enumerate(TYPES))
    conn.execute(f"CREATE TABLE types ({columns})".encode())
    known = conn.execute(
        "SELECT format_type(atttypid, atttypmod), attname, format_type(atttypid, -1),"
        " atttypid::int, atttypmod FROM pg_attribute WHERE attrelid = 'types'::regclass AND attnum > 0"
    ).fetchall()
    held = [
        (source[0], target[1], target[2])
        for source, target in product(known, repeat=2)
        if fitting.holds(*source[3:], *target[3:])
        # A string that becomes a number or a time is what its text says there; char(n) has no blanks.
        and not (
            fitting.is_text(source[3])
            and (fitting.is_number(target[3]) or fitting.is_time(target[3]) or target[3] in (1042, 1014))
            and source[3] != target[3]
        )
    ]
    assert len(known) < len(held) < len(known) ** 2
    values = [f'{{"{value}"}}' for value in VALUES] if suffix else VALUES
    found = conn.execute(
        "SELECT s, p, v FROM unnest(%s::text[], %s::text[], %s::text[]) AS h (s, p, b),"
        " unnest(%s::text[]) AS v WHERE lost(s, p, b, v)",
        (*map(list, zip(*held, strict=True)), values),
    ).fetchall()
    assert found == []


@pytest.mark.parametrize("identity", ["DEFAULT", "FULL"])
def test_a_row_that_cannot_be_here_is_not_found(make_pair: MakePair, identity: str) -> None:
    """One that was refused and skipped can still be changed and deleted at the source."""
    pair = make_pair()
    table = "CREATE TABLE public.t (id numeric({}) PRIMARY KEY, v text); ALTER TABLE t REPLICA IDENTITY "
    pair.tables(table.format("12,4") + identity, table.format("12,2") + identity)
    pair.do("INSERT INTO t VALUES (1.23, 'fits'), (2, 'fits')")
    pair.carry()
    pair.do("INSERT INTO t VALUES (1.2345, 'does not')")
    pair.source.batches()  # skipped
    pair.do("DELETE FROM t WHERE id = 1.2345")
    assert pair.carry() == [{"missing": 1}]
    assert pair.target.execute("SELECT id::text FROM t ORDER BY 1").fetchall() == [("1.23",), ("2.00",)]
