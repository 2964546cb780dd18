"""Values of every type of PostgreSQL, and the tables that hold them. Data and SQL texts only.

Not here: how they travel and are compared (tests/topology/test_values.py). A *kind* is a type with its
values; a *family* is a list of kinds that share three tables: `v_…`, with a number as its key and an array
column beside each column; `k_…`, whose key are the values themselves; `f_…`, without a key, identified by
whole rows.

A value is the type's input text; one that begins with "=" is an SQL expression.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

_KEY_CHARS = 60
_ARRAY_CHARS = 1_000

# Setting and value on the source's database, and on the target's role in its database: all of them other than
# the defaults, and other than each other's where more than two values exist.
SETTINGS: dict[str, tuple[str, str]] = {
    "DateStyle": ("SQL, DMY", "German"),
    "IntervalStyle": ("sql_standard", "iso_8601"),
    "TimeZone": ("Australia/Lord_Howe", "America/St_Johns"),
    "extra_float_digits": ("-15", "0"),
    "bytea_output": ("escape", "escape"),
    "client_encoding": ("LATIN1", "WIN1252"),
    "lc_monetary": ("C", "C.utf8"),
    "standard_conforming_strings": ("off", "off"),
    "backslash_quote": ("off", "on"),
    "xmloption": ("document", "document"),
    "search_path": ("nowhere", "elsewhere, pg_temp"),
    "array_nulls": ("off", "off"),
    "quote_all_identifiers": ("on", "on"),
    "transform_null_equals": ("on", "on"),
    "default_toast_compression": ("pglz", "pglz"),
    "default_transaction_isolation": ("serializable", "repeatable read"),
    "default_text_search_config": ("pg_catalog.german", "pg_catalog.simple"),
}

# Types of pg_catalog that no table of ours holds, and why. Nobody can write a value of theirs.
LEFT_OUT = {
    "gtsvector": "its input function refuses every value: it lives in GiST indexes",
    "pg_node_tree": "its input function refuses every value: the catalog's expressions",
    "pg_ndistinct": "its input function refuses every value: extended statistics",
    "pg_dependencies": "its input function refuses every value: extended statistics",
    "pg_mcv_list": "its input function refuses every value: extended statistics",
    "pg_brin_bloom_summary": "its input function refuses every value: it lives in BRIN indexes",
    "pg_brin_minmax_multi_summary": "its input function refuses every value: it lives in BRIN indexes",
}

EXTENSIONS = ("citext", "hstore", "ltree", "isn", "cube", "seg", "intarray", "lo")

TYPES_SQL = (
    'CREATE SCHEMA "Own Types";'
    + "".join(f"CREATE EXTENSION {name} SCHEMA public;" for name in EXTENSIONS)
    + r"""
SET search_path = public;
CREATE TYPE mood AS ENUM ('sad', 'ok');
ALTER TYPE mood ADD VALUE 'happy';
ALTER TYPE mood ADD VALUE 'worse than "sad"' BEFORE 'sad';
ALTER TYPE mood ADD VALUE '{,NULL}' AFTER 'ok';
ALTER TYPE mood ADD VALUE 'größer, 😀 \ ''';
CREATE TYPE "Own Types"."Mixed Case" AS ENUM ('A', 'a', ' ', 'b c');
CREATE DOMAIN positive AS numeric(12,3) CHECK (VALUE > 0);
CREATE DOMAIN small_positive AS positive CHECK (VALUE < 100);
CREATE DOMAIN label AS varchar(20) NOT NULL DEFAULT 'none';
CREATE DOMAIN moods AS mood[] CHECK (cardinality(VALUE) < 9);
CREATE DOMAIN "Own Types"."a mood" AS mood CHECK (VALUE <> 'ok');
CREATE TYPE plain_pair AS (n integer, t text);
CREATE TYPE rich AS (a integer[], b mood, c mood[], d positive, e plain_pair, f public.hstore, "g h" numeric);
CREATE DOMAIN checked_pair AS plain_pair CHECK ((VALUE).n IS NULL OR (VALUE).n < 1000);
CREATE TYPE floatrange AS RANGE (subtype = float8, subtype_diff = float8mi);
CREATE TYPE textrange AS RANGE (subtype = text, collation = "C");
CREATE TYPE moodrange AS RANGE (subtype = mood, multirange_type_name = moodranges);
CREATE TYPE segrange AS RANGE (subtype = public.seg);
CREATE TABLE row_type (id integer, note text, gone integer, at date);
ALTER TABLE row_type DROP COLUMN gone;
RESET search_path;
"""
)


@dataclass(frozen=True)
class Kind:
    """A type and its values.

    `array`: its arrays can travel in binary ("binary"), as text only ("text"), or are left out ("").
    `text_only`: the type is bound to its server, the session must be text.
    """

    type: str
    values: tuple[str, ...]
    key: bool = True
    array: str = "binary"
    text_only: bool = False
    later: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """Values that exist from a version on."""

    def of(self, version: int) -> tuple[str, ...]:
        """The values a server of this version knows, as SQL."""
        more = [v for since, values in self.later.items() if version >= since for v in values]
        return tuple(self._sql(value) for value in (*self.values, *more))

    def _sql(self, value: str) -> str:
        if value.startswith("="):
            return f"({value[1:]})::{self.type}"
        return "'" + value.replace("'", "''") + f"'::{self.type}"

    def arrays(self, version: int) -> tuple[str, ...]:
        """Arrays of them: empty, with NULLs, of two and three dimensions, with other lower bounds, long."""
        values = [v for v in self.of(version) if len(v) < _ARRAY_CHARS]
        one, two, three = (values * 3)[:3]
        made = [
            "'{}'",
            f"ARRAY[{one}, NULL, {two}]",
            f"ARRAY[[{one}, {two}], [{three}, NULL]]",
            f"ARRAY[[[{one}]], [[NULL]]]",
            f"array_fill({two}, ARRAY[2, 2], ARRAY[-1, 5])",
            f"ARRAY[{', '.join(values)}]",
            "ARRAY[NULL]",
        ]
        return tuple(f"{array}::{self.type}[]" for array in made)


@dataclass(frozen=True)
class Family:
    """Kinds that share tables."""

    name: str
    kinds: tuple[Kind, ...]


_INTS = ("0", "1", "-1", "7", "100")
_DIGITS = "1234567890" * 4
_WORDS = (
    "",
    "a",
    " ",
    "  two  ",
    "NULL",
    "null",
    r"\N",
    r"\\",
    r"a\tb",
    "tab\tnew\nline\rend",
    "'",
    '"',
    '""',
    "{}",
    '{"a",b}',
    "(a,b)",
    "$1",
    "%s",
    "ä",
    "Ünïcödé",
    "日本語",
    "😀👩‍👩‍👧",
    "e\u0301",
    "\u00a0\u200b\ufeff",
    "\U0010ffff",
    "\x01\x02\x1f\x7f",
    "İıſß",
    "-",
    "0",
    "true",
)
_FLOATS = (
    "0",
    "-0",
    "1",
    "-1",
    "0.1",
    "0.30000000000000004",
    "1e-5",
    "3.141592653589793",
    "NaN",
    "Infinity",
    "-Infinity",
    "123456789012",
    "1e15",
    "1e16",
    "-2.5",
    "0.3333333333333333",
    "16777217",
    "33554433",
    "9007199254740993",
)

NUMBERS = Family(
    "numbers",
    (
        Kind("smallint", (*_INTS, "32767", "-32768")),
        Kind("integer", (*_INTS, "2147483647", "-2147483648")),
        Kind("bigint", (*_INTS, "9223372036854775807", "-9223372036854775808", "9007199254740993")),
        Kind(
            "numeric",
            (
                *_INTS,
                "0.0",
                "0.00",
                "1.0",
                "1.10",
                "-0.1",
                "NaN",
                "Infinity",
                "-Infinity",
                "1e-20",
                "1e-1000",
                _DIGITS + "." + _DIGITS,
                "-99999999999999999999.99999",
                "10000",
                "99990000",
                "0.0001",
                "0.00010000",
                "1e100",
                "-1e-100",
                "9" * 30,
                "=('9' || repeat('9', 131071) || '.' || repeat('9', 16383))",
                "=('0.' || repeat('0', 16382) || '1')",
                "=repeat('1', 131072)",
            ),
        ),
        Kind("numeric(20,5)", (*_INTS, "1.5", "-99999.99999", "999999999999999.99999", "NaN")),
        Kind("numeric(5,-2)", ("0", "100", "-1200", "9999900", "149", "NaN")),
        Kind("numeric(3,5)", ("0", "0.00999", "-0.00001", "0.001", "NaN")),
        Kind("real", (*_FLOATS, "3.4028235e38", "1.1754944e-38", "1e-45", "-3.4028235e38")),
        Kind(
            "double precision",
            (
                *_FLOATS,
                "1.7976931348623157e308",
                "2.2250738585072014e-308",
                "5e-324",
                "-1.7976931348623157e308",
            ),
        ),
        Kind(
            "money",
            (
                "0",
                "1",
                "-1",
                "0.01",
                "-0.01",
                "1234.56",
                "-1234567.89",
                "92233720368547758.07",
                "-92233720368547758.08",
                "1000000",
            ),
        ),
        Kind("boolean", ("true", "false")),
    ),
)

TEXTS = Family(
    "texts",
    (
        Kind(
            "text",
            (
                *_WORDS,
                "=repeat('0123456789äö', 20000)",
                ("=(SELECT string_agg(md5(g::text), '') FROM generate_series(1, 2000) g)"),
            ),
        ),
        Kind("varchar", _WORDS),
        Kind("varchar(12)", tuple(w for w in _WORDS if len(w) <= 12)),
        Kind("char(12)", tuple(w for w in _WORDS if len(w) <= 12)),
        Kind("bpchar", _WORDS),
        Kind(
            '"char"',
            ("", "a", " ", "\\", "'", "{", ",", "0", "\x01", "\x7f"),
            later={16: (r"\200", r"\377")},  # 15 prints bytes that are no UTF8
        ),
        Kind("name", (*_WORDS, "n" * 63)),
        Kind("refcursor", ("", "c", "<unnamed portal 1>"), key=False),
        Kind("citext", (*_WORDS, "CaSe", "ÄÖ"), array="text"),
    ),
)

BYTES = Family(
    "bytes",
    (
        Kind(
            "bytea",
            (
                "",
                r"\x00",
                r"\xff",
                r"\x5c27225c",
                r"\x6162",
                r"\xdeadbeef",
                r"\x000000",
                "=sha256('a')",
                "=decode(repeat('00ff5c27', 30000), 'hex')",
                *(rf"\x{n:02x}" for n in (1, 10, 13, 32, 92, 127, 128, 254)),
            ),
        ),
        Kind("bit(1)", ("0", "1")),
        Kind("bit(13)", ("0000000000000", "1111111111111", "1010101010101", "0000000000001")),
        Kind("bit varying", ("", "0", "1", "10101", "1" * 100, "=repeat('10', 5000)")),
        Kind("bit varying(20)", ("", "01", "1" * 20)),
        Kind(
            "uuid",
            (
                "00000000-0000-0000-0000-000000000000",
                "ffffffff-ffff-ffff-ffff-ffffffffffff",
                "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
                "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A12",
                "{018f4d3c-7a5b-7000-8000-000000000001}",
            ),
        ),
    ),
)

_DATES = (
    "2000-01-01",
    "1999-12-31",
    "1970-01-01",
    "2024-02-29",
    "0001-01-01",
    "0001-12-31 BC",
    "4713-01-01 BC",
    "4714-11-24 BC",
    "9999-12-31",
    "21016-11-04",
    "294247-01-10",
    "1582-10-15",
    "2038-01-19",
    "infinity",
    "-infinity",
)
_TIMES = (
    "00:00:00",
    "24:00:00",
    "12:34:56.789012",
    "23:59:59.999999",
    "23:59:60",
    "00:00:00.000001",
    "13:00",
)
_STAMPS = (
    "2000-01-01 00:00:00",
    "1999-12-31 23:59:59.999999",
    "2024-02-29 12:00:00.5",
    "0001-01-01 00:00:00 BC",
    "4713-01-01 00:00:00 BC",
    "4714-11-24 00:00:00 BC",
    "21016-11-04 01:02:03",
    "294247-01-10 04:00:54.775807",
    "294276-12-31 23:59:59.999999",
    "2023-11-05 01:30:00",
    "2024-04-07 02:15:00",
    "infinity",
    "-infinity",
    "1900-01-01 00:00:00",
    "2024-12-31 24:00:00",
)
_INTERVALS = (
    "0",
    "1 day",
    "24 hours",
    "1 mon",
    "30 days",
    "-1 mons +2 days -03:04:05.000006",
    "1 year -1 day",
    "-0.000001 s",
    "178956970 years 7 mons",
    "-178956970 years -8 mons",
    "2147483647 days",
    "-2147483648 days",
    "2562047788:00:54.775807",
    "-2562047788:00:54.775807",
    "1 year 2 mons 3 days 04:05:06.789",
    "-1 days +00:00:01",
    "1.5 s",
    "100 years",
    "-5 mons -5 days -05:05:05.5",
    "25:00:00",
)

TIMES = Family(
    "times",
    (
        Kind("date", (*_DATES, "5874897-12-31")),
        Kind("time", _TIMES),
        Kind("time(3)", _TIMES),
        Kind(
            "timetz",
            (
                "00:00:00+00",
                "24:00:00+15:59:59",
                "00:00:00-15:59:59",
                "12:34:56.789012+05:30",
                "23:59:59.999999-08",
                "13:00:00+13:45:30",
                "24:00:00-00",
            ),
        ),
        Kind("timestamp", _STAMPS),
        Kind("timestamp(0)", _STAMPS[:8]),
        Kind(
            "timestamptz",
            (
                *(
                    s if "inf" in s else (s[:-3] + "+00 BC" if s.endswith("BC") else s + "+00")
                    for s in _STAMPS
                ),
                "1890-01-01 00:00:00+00:19:32",
                "2024-06-30 23:59:59.5-15:59:59",
            ),
        ),
        Kind("timestamptz(3)", ("2024-01-01 00:00:00.123456+02", "infinity", "0044-03-15 12:00:00+00 BC")),
        Kind("interval", _INTERVALS, later={17: ("infinity", "-infinity")}),
        Kind("interval(2)", _INTERVALS[:8]),
        Kind("interval day to second", ("0", "1 day", "3 04:05:06.7", "-1 -00:00:00.1")),
        Kind("interval year to month", ("0", "1-2", "-3-4")),
    ),
)

_JSON = (
    "null",
    "true",
    '""',
    '"a\\u00e4\\n\\"\\\\"',
    "0",
    "-0",
    "1.0",
    "1.00",
    "1e400",
    "12345678901234567890.123456789",
    "[]",
    "{}",
    '{"a": 1, "a": 2}',
    '  {"b" : [1 , 2,{"c":null}] }  ',
    '{"b":1,"a":2}',
    '["😀", "\\ud83d\\ude00"]',
    '{"": ""}',
    "[[[[[]]]]]",
    '"日本"',
    '{"key with \\"quotes\\"": "v"}',
)

DOCUMENTS = Family(
    "documents",
    (
        Kind(
            "json", (*_JSON, '"\\u0000"', "=(SELECT json_agg(g) FROM generate_series(1, 20000) g)"), key=False
        ),
        Kind(
            "jsonb", (*_JSON, "=(SELECT jsonb_object_agg(g, md5(g::text)) FROM generate_series(1, 3000) g)")
        ),
        Kind(
            "xml",
            (
                "<a/>",
                "",
                "text only",
                "<a>1</a><b/>",
                '<a b="c&amp;d">ä😀</a>',
                "<!-- c --><a/>",
                "<![CDATA[<x>]]>",
                "<a>\n\t</a>",
                '<?pi data?><a xmlns="urn:x"/>',
                "<!DOCTYPE a [<!ELEMENT a ANY>]><a/>",
                '<?xml version="1.0" standalone="yes"?><a/>',
                "=xmlelement(name big, repeat('x', 100000))",
            ),
            key=False,
        ),
        Kind(
            "jsonpath",
            (
                "$",
                "$.a[*] ? (@ > 1)",
                'strict $."a b".size()',
                "$[1 to last]",
                ('$.**{2} ? (@ like_regex "^a" flag "i")'),
                "lax $.a + 1",
            ),
            key=False,
        ),
        Kind(
            "hstore",
            ("", "a=>1", "a=>NULL", '"a b"=>"c\\"d", ""=>""', "a=>1, b=>2", '"ä"=>"😀"', 'NULL=>"null"'),
            array="text",
        ),
    ),
)

NETWORK = Family(
    "network",
    (
        Kind(
            "inet",
            (
                "10.0.0.1",
                "10.0.0.1/8",
                "0.0.0.0/0",
                "255.255.255.255",
                "::",
                "::1",
                "::ffff:1.2.3.4",
                "fe80::1/64",
                "2001:db8::/32",
                "192.168.1.5/24",
                "10.0.0.1/32",
                "::1/128",
            ),
        ),
        Kind(
            "cidr",
            ("10.0.0.0/8", "10.0.0.1/32", "0.0.0.0/0", "::/0", "2001:db8::/32", "::1/128", "192.168/16"),
        ),
        Kind("macaddr", ("00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff", "08:00:2b:01:02:03", "0800.2b01.0204")),
        Kind(
            "macaddr8",
            (
                "00:00:00:00:00:00:00:00",
                "ff:ff:ff:ff:ff:ff:ff:ff",
                "08:00:2b:01:02:03:04:05",
                "08:00:2b:01:02:03",
            ),
        ),
    ),
)

GEOMETRY = Family(
    "geometry",
    (
        Kind(
            "point",
            ("(0,0)", "(-0,0.1)", "(1e308,-1e-308)", "(NaN,Infinity)", "(3.141592653589793,-2.5)"),
            key=False,
        ),
        Kind("line", ("{1,2,3}", "{0,1,0}", "{-1.5,0.1,1e10}"), key=False),
        Kind("lseg", ("[(0,0),(1,1)]", "[(0.1,0.2),(-1e5,1e-5)]", "[(1,1),(1,1)]"), key=False),
        Kind("box", ("(1,1),(0,0)", "(0,0),(2,3)", "(1e10,0.1),(-0.1,-1e10)"), key=False),
        Kind("path", ("((0,0),(1,1))", "[(0,0),(1,1),(2,0)]", "[(0.1,0.2)]"), key=False),
        Kind("polygon", ("((0,0),(1,1),(1,0))", "((0.1,0.2))", "((0,0),(1e10,1),(-1e10,1e-10))"), key=False),
        Kind("circle", ("<(0,0),1>", "<(0.1,-0.2),0>", "<(1e10,1e-10),3.3>", "<(0,0),NaN>"), key=False),
        Kind("cube", ("(1)", "(1,2,3)", "(0,0),(1,1)", "(0.1,-1e10),(1e-10,3)", "()"), array="text"),
        Kind(
            "seg",
            ("1", "1.50", "1.5 .. 2.50", "< 3", "~0.1", "1 .. ", " .. 7.00", "5(+-)0.3"),
            key=False,
            array="text",
        ),
    ),
)

_RANGE_OF = {
    "int4": ("1", "10", "-2147483648"),
    "int8": ("1", "10", "-9223372036854775808"),
    "num": ("1.0", "1.10", "-1e30"),
    "date": ("2000-01-01", "2024-02-29", "4713-01-01 BC"),
    "ts": ("2000-01-01 00:00:00", "2024-02-29 12:00:00.5", "4713-01-01 00:00:00 BC"),
    "tstz": ("2000-01-01 00:00:00+00", "2024-02-29 12:00:00.5+00", "4713-01-01 00:00:00+00 BC"),
}


def _ranges() -> Iterator[Kind]:
    for name, (low, high, least) in _RANGE_OF.items():
        ranges = [
            f'["{low}","{high}")',
            f'("{low}","{high}"]',
            f'["{least}",)',
            f'(,"{high}"]',
            "(,)",
            "empty",
            f'["{low}","{low}"]',
        ]
        if name in ("date", "ts", "tstz"):
            ranges += ["[-infinity,infinity]", f'["{low}",infinity)']
        if name == "num":
            ranges += ["[1,NaN]", "[-Infinity,Infinity)", "[1.00,1.000]"]
        yield Kind(f"{name}range", tuple(ranges))
        some = [r for r in ranges if r != "empty"]
        yield Kind(
            f"{name}multirange",
            ("{}", *("{" + r + "}" for r in some), "{" + f'["{least}","{low}"),["{high}",)' + "}"),
        )


RANGES = Family(
    "ranges",
    (
        *_ranges(),
        Kind("floatrange", ("[0.1,0.30000000000000004)", "(,)", "empty", "[-Infinity,NaN]"), array="text"),
        Kind("floatmultirange", ("{}", "{[0.1,1),[2,3]}"), array="text"),
        Kind("textrange", ('["",a)', '["a b","c\\"d"]', '["(",")"]', "(,ä]"), array="text"),
    ),
)

SEARCH = Family(
    "search",
    (
        Kind(
            "tsvector",
            ("", "'a':1 'b':2A,3B", "'a b' 'c''d' 'e\\\\f'", "a fat cat sat", "'ä':16383", "'x':1,2,3,4,5D"),
        ),
        Kind(
            "tsquery",
            ("", "'a' & 'b'", "!'a' | ('b' <-> 'c':*AB)", "'a b' <5> 'c''d'", "'ä':*"),
            array="text",
            text_only=True,
        ),
        Kind("ltree", ("", "a", "Top.Child_1.x", "a.b.c.d.e.f.g"), array="text"),
        Kind("lquery", ("*.a.*{1,2}", "Top.!b|c*@%.*", "a.*{,3}"), key=False, array="text"),
        Kind("ltxtquery", ("a & b", "!a | b@", "a & (b | c%)"), key=False, array="text"),
        Kind("query_int", ("1", "1&2", "!(1|2)&3"), key=False, array="text"),
    ),
)

_ID = ("0", "1", "16384", "2147483648", "4294967295")

IDENTIFIERS = Family(
    "identifiers",
    (
        Kind("oid", _ID),
        Kind("xid", _ID, key=False),
        Kind("cid", _ID, key=False),
        Kind("xid8", ("0", "3", "4294967296", "18446744073709551615")),
        Kind("tid", ("(0,0)", "(0,1)", "(4294967295,65535)", "(1,2048)")),
        Kind("pg_lsn", ("0/0", "0/1", "16/B374D848", "FFFFFFFF/FFFFFFFF")),
        Kind("txid_snapshot", ("1:1:", "10:20:10,14,15", "1:9223372036854775807:"), key=False),
        Kind(
            "pg_snapshot",
            ("1:1:", "10:20:10,14,15", "4294967299:4294967399:4294967300,4294967305"),
            key=False,
        ),
        Kind("int2vector", ("", "1", "1 -32768 32767"), key=False, array="text", text_only=True),
        Kind("oidvector", ("", "1", "4294967295 0 1"), array="text", text_only=True),
        Kind("lo", ("0", "16385", "4294967295"), key=False, array="text"),
    ),
)

BOOKS = Family(
    "books",
    (
        Kind(
            "ean13",
            ("978-0-393-04002-9", "2205008962246", "2205008962240!", "0000000000000", "9999999999994"),
            array="text",
        ),
        Kind("isbn13", ("978-0-393-04002-9", "978-0-11-000533-1", "978-0-11-000533-4!"), array="text"),
        Kind("ismn13", ("979-0-060-11561-5", "979-0-2605-3208-3"), array="text"),
        Kind("issn13", ("977-1436-452-00-8", "977-0317-847-00-1"), array="text"),
        Kind("isbn", ("0-393-04002-X", "1-85326-158-0"), array="text"),
        Kind("ismn", ("M-060-11561-5", "M-2605-3208-3"), array="text"),
        Kind("issn", ("1436-4522", "0317-8471", "0000-0000"), array="text"),
        Kind("upc", ("220356483481", "036000291452"), array="text"),
    ),
)

OWN = Family(
    "own",
    (
        Kind("mood", ("sad", "ok", "happy", 'worse than "sad"', "{,NULL}", "größer, 😀 \\ '"), array="text"),
        Kind('"Own Types"."Mixed Case"', ("A", "a", " ", "b c"), array="text"),
        Kind("positive", ("0.001", "1", "999999999.999", "1.5"), array="text"),
        Kind("small_positive", ("0.001", "99.999"), array="text"),
        Kind("label", ("", "a", "größer 😀"), array=""),
        Kind('"Own Types"."a mood"', ("sad", "happy"), array="text"),
        Kind("plain_pair", ("(,)", "(1,)", '(2,"a ""b"", (c)")', '(-1,"")', "(3,😀)"), array="text"),
        Kind("checked_pair", ("(1,a)", "(,)"), array="text"),
        Kind("segrange", ("[1 .. 2,3)", "empty"), key=False, array="text", text_only=True),
        Kind("moodrange", ("[sad,happy)", "empty", '["worse than ""sad""",]', "(,)"), array="text"),
        Kind("moodranges", ("{}", "{[sad,ok),[happy,happy]}"), array="text"),
        Kind("moods", ("{}", "{sad,NULL}", "[3:4]={ok,happy}"), array="", text_only=True),
        Kind(
            "rich",
            (
                "=ROW(ARRAY[1,NULL], 'happy', ARRAY['sad','{,NULL}']::mood[], 1.5, ROW(7,'x'), 'a=>NULL', 1)",
                "=ROW(NULL, NULL, NULL, NULL, NULL, NULL, NULL)",
                "=ROW('{}', 'größer, 😀 \\ ''', '[0:1]={ok,NULL}', 2, ROW(NULL,''), '', 1.10)",
            ),
            key=False,
            array="text",
            text_only=True,
        ),
        Kind("row_type", ("=ROW(1, 'a', '2000-01-01')", "=ROW(NULL, '', 'infinity')"), array="text"),
        Kind("information_schema.sql_identifier", ("a", "A b"), array="text"),
        Kind("aclitem", ("postgres=r*w/postgres", "='=U/postgres'"), key=False, array="text"),
    ),
)

BOUND = Family(
    "bound",
    tuple(
        Kind(name, values, key=name != "regproc", text_only=True)
        for name, values in {
            "regproc": ("now", "pg_catalog.sha256", "-"),
            "regprocedure": ("lower(text)", "abs(integer)", "0"),
            "regoper": ("||/", "|/", "0"),
            "regoperator": ("+(integer,integer)", "-(NONE,integer)", "0"),
            "regclass": ("pg_class", "public.row_type", "-", "4294967295", "pg_catalog.pg_class_oid_index"),
            "regtype": ("integer", "text[]", "public.mood", '"Own Types"."Mixed Case"[]', "numeric", "-"),
            "regrole": ("postgres", "-", "pg_monitor"),
            "regnamespace": ("public", "pg_catalog", '"Own Types"', "-"),
            "regconfig": ("english", "pg_catalog.simple", "-"),
            "regdictionary": ("simple", "english_stem", "-"),
            "regcollation": ('"C"', '"POSIX"', "-"),
        }.items()
    ),
)

FAMILIES = (
    NUMBERS,
    TEXTS,
    BYTES,
    TIMES,
    DOCUMENTS,
    NETWORK,
    GEOMETRY,
    RANGES,
    SEARCH,
    IDENTIFIERS,
    BOOKS,
    OWN,
    BOUND,
)


@dataclass(frozen=True)
class Scene:
    """What one pair of nodes carries: the families' tables, for a server version, in binary or as text."""

    version: int
    text: bool

    def kinds(self, family: Family) -> list[Kind]:
        """The kinds that can travel in such a session."""
        return [kind for kind in family.kinds if self.text or not kind.text_only]

    def families(self) -> list[Family]:
        """The families that are not empty then."""
        return [family for family in FAMILIES if self.kinds(family)]

    def _arrays(self, kind: Kind) -> bool:
        return kind.array == "binary" or (kind.array == "text" and self.text)

    def tables_sql(self, family: Family) -> str:
        """CREATE TABLE of a family's tables."""
        kinds = self.kinds(family)
        columns = [f"c{n} {kind.type}" for n, kind in enumerate(kinds)]
        arrays = [f"a{n} {kind.type}[]" for n, kind in enumerate(kinds) if self._arrays(kind)]
        keys = [n for n, kind in enumerate(kinds) if kind.key]
        name = family.name
        made = f"CREATE TABLE v_{name} (id integer PRIMARY KEY, {', '.join([*columns, *arrays])});"
        if keys:
            key = ", ".join(f"c{n}" for n in keys)
            types = ", ".join(columns[n] for n in keys)
            made += f"CREATE TABLE k_{name} (m integer, {types}, n integer, PRIMARY KEY (m, {key}));"
        made += f"CREATE TABLE f_{name} (n integer, {', '.join(columns)});"
        return made + f"ALTER TABLE f_{name} REPLICA IDENTITY FULL;"

    def schema_sql(self) -> str:
        """Types and tables of all families."""
        tables = "".join(self.tables_sql(family) for family in self.families())
        return f"{TYPES_SQL} SET search_path = public; {tables} RESET search_path;"

    def tables(self) -> list[str]:
        """All tables."""
        made = [f"{letter}_{family.name}" for family in self.families() for letter in "vf"]
        return made + [f"k_{f.name}" for f in self.families() if any(k.key for k in self.kinds(f))]

    def rows(self, family: Family) -> list[list[str]]:
        """Rows of the v table but for its id, as SQL; what is used up is NULL, the last row is all NULL."""
        columns: list[Sequence[str]] = []
        kinds = self.kinds(family)
        columns += [kind.of(self.version) for kind in kinds]
        columns += [kind.arrays(self.version) for kind in kinds if self._arrays(kind)]
        # A NOT NULL domain takes no NULL: its values come again.
        fill = ["NULL"] * len(columns)
        for n, kind in enumerate(kinds):
            if kind.type == "label":
                fill[n] = columns[n][0]
        count = max(map(len, columns)) + 1
        return [
            [column[row] if row < len(column) else fill[n] for n, column in enumerate(columns)]
            for row in range(count)
        ]

    def keys(self, family: Family) -> list[list[str]]:
        """Rows of the k table but for m and n: every short value of every kind that can be a key."""
        columns = [
            [
                value
                for value in kind.of(self.version)
                if len(value) <= _KEY_CHARS + len(kind.type) and "repeat(" not in value
            ]
            for kind in self.kinds(family)
            if kind.key
        ]
        if not columns:
            return []
        return [[column[row % len(column)] for column in columns] for row in range(max(map(len, columns)))]

    def load_sql(self, first: int) -> Iterator[str]:
        """INSERTs of everything; keys of the tables begin at `first`."""
        for family in self.families():
            rows = self.rows(family)
            width = len(self.kinds(family))
            values = ", ".join(f"({first + n}, {', '.join(row)})" for n, row in enumerate(rows))
            yield f"INSERT INTO v_{family.name} VALUES {values}"
            whole = ", ".join(f"({first}, {', '.join(row[:width])})" for row in islice(rows, 0, None))
            yield f"INSERT INTO f_{family.name} VALUES {whole}"
            if keys := self.keys(family):
                values = ", ".join(f"({first}, {', '.join(key)}, {n})" for n, key in enumerate(keys))
                yield f"INSERT INTO k_{family.name} VALUES {values}"

    def change_sql(self) -> Iterator[str]:
        """UPDATEs and DELETEs of everything that is there, found by number, by key and by whole row."""
        for family in self.families():
            kinds, name = self.kinds(family), family.name
            columns = [f"c{n}" for n in range(len(kinds))]
            columns += [f"a{n}" for n, kind in enumerate(kinds) if self._arrays(kind)]
            # Each row takes the values of the next one.
            pairs = ", ".join(f"{column} = o.{column}" for column in columns)
            yield f"UPDATE v_{name} v SET {pairs} FROM v_{name} o WHERE o.id = v.id + 1 AND v.id % 3 < 2"
            yield f"DELETE FROM v_{name} WHERE id % 7 = 3"
            if any(kind.key for kind in kinds):
                yield f"UPDATE k_{name} SET n = n + 1000"
                yield f"UPDATE k_{name} SET m = m + 5000 WHERE n % 3 = 1"
                yield f"DELETE FROM k_{name} WHERE n % 4 = 2"
            yield f"UPDATE f_{name} SET n = n + 1"
            yield f"DELETE FROM f_{name} WHERE ctid IN (SELECT ctid FROM f_{name} ORDER BY ctid LIMIT 3)"
