"""Binary where it can be, text where it must be, chosen by the source; the target has the same either way."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.nodes import TwoNodes
from tests.stack import Stack
from tests.topology.subscription.scenes import commit, rows, running, same

pytestmark = [pytest.mark.topology, pytest.mark.timeout(300)]

# Column: type at the source, at the target, a value, and the target's text of it.
CONVERTED = {
    "wider": ("integer", "bigint", "7", "7"),
    "exact": ("bigint", "numeric", "-9223372036854775808", "-9223372036854775808"),
    "inexact": ("numeric", "double precision", "0.1", "0.1"),
    "fewer": ("bigint", "smallint", "32767", "32767"),
    "free": ("varchar(10)", "text", "ä b ", "ä b "),
    "padded": ("char(5)", "text", "ab", "ab   "),
    "bounded": ("text", "varchar(4)", "abcd", "abcd"),
    "truth": ("boolean", "text", "true", "t"),
    "host": ("inet", "text", "10.0.0.1", "10.0.0.1"),
    "letter": ('"char"', "text", "x", "x"),
    "mood_as_text": ("mood", "text", "ok", "ok"),
    "text_as_mood": ("text", "mood", "ok", "ok"),
    "mood_as_other": ("mood", "other_mood", "sad", "sad"),
    "document": ("text", "json", '{"a" : 1}', '{"a" : 1}'),
    "parsed": ("json", "jsonb", '{"a" : 1}', '{"a": 1}'),
    "checked": ("text", "positive", "1.50", "1.50"),
    "numbers": ("integer[]", "bigint[]", "[0:1]={1,NULL}", "[0:1]={1,NULL}"),
    "letters": ("varchar[]", "text[]", '{a,NULL,"NULL"}', '{a,NULL,"NULL"}'),
    "relation": ("text", "regclass", "-", "-"),
    "moment": ("timestamptz", "text", "2024-02-29 12:00:00+02", "2024-02-29 10:00:00+00"),
    "octets": ("bytea", "text", r"\x00ff", r"\x00ff"),
    "id": ("uuid", "text", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
    "span": ("interval", "text", "1 mon -1 day", "1 mon -1 days"),
}
TYPES = "CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE EXTENSION seg;"
SOURCE = f"""{TYPES}
CREATE TABLE converted (key char(5) PRIMARY KEY, {", ".join(f"{c} {t[0]}" for c, t in CONVERTED.items())});
CREATE TABLE labelled (id int PRIMARY KEY, m mood);
CREATE TABLE grown (id int PRIMARY KEY, s seg);
CREATE TABLE narrowed (id int PRIMARY KEY, n numeric);
CREATE TABLE spans (id int PRIMARY KEY, i interval, a interval[]);
"""
TARGET = f"""CREATE TYPE first_of_all AS ENUM ('x'); {TYPES}
CREATE TYPE other_mood AS ENUM ('glad', 'sad'); CREATE DOMAIN positive AS numeric CHECK (VALUE > 0);
CREATE TABLE converted (key text PRIMARY KEY, {", ".join(f"{c} {t[1]}" for c, t in CONVERTED.items())});
CREATE TABLE labelled (id int PRIMARY KEY, m mood);
CREATE TABLE grown (id int PRIMARY KEY, s seg);
CREATE TABLE narrowed (id int PRIMARY KEY, n integer);
CREATE TABLE spans (id int PRIMARY KEY, i interval, a interval[]);
"""
VALUES = ", ".join("'" + values[2] + "'" for values in CONVERTED.values())
TEXTS = tuple(values[3] for values in CONVERTED.values())
QUERY = f"SELECT key, {', '.join(f'{column}::text' for column in CONVERTED)} FROM converted"


FAST = "[limits]\nretry_backoff_max_ms = 1000"


@pytest.fixture(scope="module")
def pair(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    folder = tmp_path_factory.mktemp("binary")
    first = f"INSERT INTO converted VALUES ('copy', {VALUES}); INSERT INTO grown VALUES (0, '1.50')"
    tables = ("converted", "labelled", "grown", "narrowed", "spans")
    with running(
        stack, folder, "", tables, source=SOURCE + first, target=TARGET, versions=(18, 15), config=FAST
    ) as made:
        yield made


def _binary(pair: TwoNodes) -> bool:
    """Whether the stream's session is binary, as its server was told."""
    ((query,),) = pair.a.query(
        "SELECT query FROM pg_stat_activity JOIN pg_replication_slots ON active_pid = pid"
        " WHERE database = current_database() AND NOT temporary"
    )
    return "\"binary\" 'true'" in query


def _converted(pair: TwoNodes) -> dict[str, tuple[str, ...]]:
    return {row[0]: row[1:] for row in pair.b.query(QUERY)}


def _stopped(pair: TwoNodes, table: str) -> str:
    """What the consumer says of a table, once it does."""
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        found = pair.b.query(
            "SELECT detail->>'last_error' FROM vsql_sync.stream_status"
            " WHERE chain = %s AND state = 'blocked'",
            pair.chain,
        )
        if found and table in (found[0][0] or ""):
            return str(found[0][0])
        time.sleep(0.1)
    raise AssertionError(f"the consumer says nothing of {table}\n{pair.b.tail('consumer')}")


def test_values_become_those_of_the_targets_types_when_copied_and_in_binary(pair: TwoNodes) -> None:
    commit(pair, f"INSERT INTO converted VALUES ('live', {VALUES}), ('upd', {VALUES}), ('del', {VALUES})")
    assert _binary(pair)
    others = ", ".join(f"{column} = NULL" for column in CONVERTED)
    commit(
        pair,
        f"UPDATE converted SET {others} WHERE key = 'upd'",
        f"UPDATE converted SET ({', '.join(CONVERTED)}) = ROW({VALUES}) WHERE key = 'upd'",
        "DELETE FROM converted WHERE key = 'del'",
    )
    assert _converted(pair) == {"copy ": TEXTS, "live ": TEXTS, "upd  ": TEXTS}


def test_a_type_without_a_binary_form_does_not_make_the_session_text(pair: TwoNodes) -> None:
    commit(
        pair,
        "INSERT INTO grown VALUES (1, '~2.50 .. 3'), (2, NULL)",
        "UPDATE grown SET s = '7' WHERE id = 2",
    )
    assert same(pair, "grown") == [("0", "1.50"), ("1", "~2.50 .. 3"), ("2", "7")]
    assert _binary(pair)


def test_a_label_the_target_lacks_stops_the_stream_by_name_until_it_is_there(pair: TwoNodes) -> None:
    pair.a.execute("ALTER TYPE mood ADD VALUE 'secretly happy'")
    pair.a.execute("INSERT INTO labelled VALUES (1, 'ok'), (2, 'secretly happy')")
    error = _stopped(pair, "public.labelled")
    assert "change 1" in error
    assert "secretly" not in error
    pair.b.execute("ALTER TYPE mood ADD VALUE 'secretly happy'")
    pair.wait_in_step(timeout=40)
    assert same(pair, "labelled") == [("1", "ok"), ("2", "secretly happy")]


def test_a_value_the_targets_type_does_not_have_is_not_rounded(pair: TwoNodes) -> None:
    pair.a.execute("INSERT INTO narrowed VALUES (1, 1), (2, 1.5)")
    assert "change 1" in _stopped(pair, "public.narrowed")
    assert rows(pair, "SELECT * FROM narrowed")[1] == []
    pair.b.execute("ALTER TABLE narrowed ALTER n TYPE numeric")
    pair.wait_in_step(timeout=40)
    assert same(pair, "narrowed") == [("1", "1"), ("2", "1.5")]


def test_an_infinite_interval_is_no_huge_one_on_a_server_that_lacks_it(pair: TwoNodes) -> None:
    commit(pair, "INSERT INTO spans VALUES (1, '1 day', '{1 mon,NULL}')")
    pair.a.execute("INSERT INTO spans VALUES (2, 'infinity', '{-infinity}')")
    assert "change 0" in _stopped(pair, "public.spans")
    pair.b.execute("ALTER TABLE spans ALTER i TYPE text, ALTER a TYPE text[] USING a::text[]")
    pair.wait_in_step(timeout=40)
    assert same(pair, "spans") == [("1", "1 day", '{"1 mon",NULL}'), ("2", "infinity", "{-infinity}")]


def test_a_column_bound_to_its_server_turns_a_running_session_into_text(pair: TwoNodes) -> None:
    for node in (pair.b, pair.a):
        node.execute("ALTER TABLE grown ADD r regclass, ADD m mood[]")
    commit(pair, "INSERT INTO grown VALUES (9, '1', 'pg_class', '{ok,NULL}')")
    assert same(pair, "grown")[-1] == ("9", "1", "pg_class", "{ok,NULL}")
    assert not _binary(pair)
    commit(
        pair,
        f"INSERT INTO converted VALUES ('text', {VALUES})",
        "UPDATE converted SET key = 'moved' WHERE key = 'copy'",
    )
    assert set(_converted(pair).values()) == {TEXTS}
    assert set(_converted(pair)) >= {"text ", "moved"}
