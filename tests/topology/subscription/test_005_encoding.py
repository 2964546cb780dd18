"""Databases of different encodings hold the same characters, or are refused before a stream exists."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.types.json import Jsonb

from tests.nodes import Node
from tests.pairs import Pairs
from tests.stack import Stack
from vsql_shared.pg.connect import connect
from vsql_shared.pg.encodings import WHOLE

pytestmark = [pytest.mark.topology, pytest.mark.timeout(300)]

SCHEMA = """
CREATE TYPE "größe" AS ENUM ('klein', 'groß');
CREATE TABLE "wörter" ("schlüssel" text PRIMARY KEY, w varchar(7), c char(3), n name, j jsonb, x xml,
    g "größe", s tsvector, a text[], "char" "char");
"""
ROW = """'größer', 'ß', 'Ñandú', '{"ä": "\\u00fc", "é": ["ÿ"]}', '<a>é</a>', 'groß', 'ö:1 a:2', '{ä,NULL}'"""
TEXTS = """SELECT ARRAY["schlüssel", w, c::text, n::text, j::text, x::text, g::text, s::text, a::text]
 FROM "wörter" ORDER BY "schlüssel" COLLATE "C\""""


def _database(stack: Stack, version: int, encoding: str) -> str:
    """A database of that encoding, in locale C."""
    server = stack.postgres(version).conninfo
    name = f"{encoding.lower()}_{secrets.token_hex(4)}"
    with psycopg.connect(server, autocommit=True) as connection:
        make = "CREATE DATABASE {} TEMPLATE template0 LOCALE 'C' ENCODING {}"
        connection.execute(sql.SQL(make).format(sql.Identifier(name), sql.Literal(encoding)))
    # What tests say is UTF-8, whatever the database is.
    return make_conninfo(server, dbname=name, client_encoding="UTF8")


def _insert(key: str, char: str) -> str:
    return f"INSERT INTO \"wörter\" VALUES ('{key}', {ROW}, '{char}')"


def _texts(node: Node) -> list[tuple[list[str]]]:
    return node.query(TEXTS)


@pytest.mark.parametrize(
    ("source", "target"), [((15, "LATIN1"), (18, "UTF8")), ((18, "LATIN9"), (15, "LATIN1"))], ids=str
)
def test_characters_are_the_same_in_another_encoding(
    pairs: Pairs, stack: Stack, source: tuple[int, str], target: tuple[int, str]
) -> None:
    databases = (_database(stack, *source), _database(stack, *target))
    pair = pairs(SCHEMA, conninfos=databases, config="[limits]\nretry_backoff_max_ms = 1000")
    pair.a.execute(_insert("Kopie", "a"))
    pair.create(['"wörter"(*)'])
    pair.start()
    pair.wait_in_step(timeout=60)
    pair.a.execute(_insert("Ärger", "b"))
    pair.a.execute("UPDATE \"wörter\" SET w = 'Übermut' WHERE \"schlüssel\" = 'Ärger'")
    pair.a.execute(_insert("Öde", "c"))
    pair.a.execute('UPDATE "wörter" SET "schlüssel" = \'Äste\' WHERE "schlüssel" = \'Ärger\'')
    pair.a.execute('DELETE FROM "wörter" WHERE "schlüssel" = \'Öde\'')
    pair.wait_in_step(timeout=60)
    assert [row[0][0] for row in _texts(pair.a)] == ["Kopie", "Äste"]
    assert _texts(pair.b) == _texts(pair.a)
    assert _texts(pair.b)[1][0][1:4] == ["Übermut", "ß", "Ñandú"]
    pair.stop()


def test_a_character_the_target_lacks_stops_the_stream_and_is_not_told(pairs: Pairs, stack: Stack) -> None:
    databases = (stack.new_database(18, "utf8"), _database(stack, 18, "LATIN1"))
    pair = pairs(
        "CREATE TABLE priced (id int PRIMARY KEY, v text)",
        conninfos=databases,
        config="[limits]\nretry_backoff_max_ms = 1000",
    )
    pair.create(["priced(*)"])
    pair.start()
    pair.a.execute("INSERT INTO priced VALUES (1, 'ä')")
    pair.wait_in_step(timeout=60)
    pair.a.execute("INSERT INTO priced VALUES (2, 'b'), (3, '7 €')")
    said = ""
    deadline = time.monotonic() + 60
    while "22P05" not in said and time.monotonic() < deadline:
        found = pair.b.query(
            "SELECT detail->>'last_error' FROM vsql_sync.stream_status WHERE chain = %s", pair.chain
        )
        said = str(found[0][0]) if found else ""
        time.sleep(0.1)
    assert "22P05" in said
    assert "public.priced (batch 2, change 1)" in said
    assert "€" not in said
    assert "encoding lacks a character" in said
    assert pair.b.query("SELECT id, v FROM priced") == [(1, "ä")]
    pair.stop()


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("SQL_ASCII", "server_encoding is SQL_ASCII"),
        ("WIN1252", "server_encoding is WIN1252"),
        ("EUC_JP", "server_encoding is EUC_JP"),
        ("MULE_INTERNAL", "conversion between UTF8 and MULE_INTERNAL is not supported"),
    ],
)
def test_an_encoding_that_does_not_hold_every_text_in_utf8_is_refused_by_name(
    stack: Stack, tmp_path: Path, encoding: str, said: str
) -> None:
    node = Node(tmp_path, "c", 1, "node-a", _database(stack, 18, encoding), "127.0.0.1:1")
    node.write_config(tmp_path / "kek.key")
    node.ctl("key", "generate", "--output", str(node.keys))
    done = node.ctl(
        "node", "init", "--node-id", "1", "--node-name", "node-a", "--cluster", "c",
        "--connection", node.conninfo, check=False,
    )  # fmt: skip
    assert done.returncode == 5
    assert said in done.stderr
    assert "ENCODING 'UTF8'" in done.stderr
    with psycopg.connect(node.conninfo, client_encoding="SQL_ASCII") as connection:
        found = connection.execute("SELECT FROM pg_namespace WHERE nspname = 'vsql_sync'").fetchall()
    assert found == []


@pytest.mark.parametrize("version", [15, 18])
def test_every_byte_of_an_allowed_encoding_comes_back_from_utf8(stack: Stack, version: int) -> None:
    with psycopg.connect(stack.postgres(version).conninfo) as connection:
        for encoding, codec in WHOLE.items():
            data = bytes(range(1, 256))
            (text, back), *_ = connection.execute(
                "SELECT convert_from(%s, %s), convert_to(convert_from(%s, %s), %s)",
                (data, encoding, data, encoding, encoding),
            ).fetchall()
            assert back == data, encoding
            assert text.encode(codec) == data, encoding


def test_what_is_said_of_a_stream_is_escaped_where_the_database_lacks_a_character(stack: Stack) -> None:
    with connect(_database(stack, 18, "LATIN1"), application_name="test") as conn:
        given = {"why": "7 € … ä"}
        row = conn.execute("SELECT %s::text, %s::jsonb", (given["why"], Jsonb(given))).fetchone()
    assert row == (r"7 \u20ac \u2026 ä", {"why": r"7 \u20ac \u2026 ä"})
