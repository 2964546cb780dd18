"""Every value of every type arrives as it was, whatever both databases' settings are.

Compared are the text of each value under fixed settings, and the bytes of its send function where these mean
the same on both servers. `tests/values.py` has the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg
import pytest
from psycopg import sql

from tests.nodes import Node, TwoNodes
from tests.pairs import Pairs
from tests.stack import POSTGRES_VERSIONS, Stack
from tests.values import LEFT_OUT, SETTINGS, Scene

pytestmark = pytest.mark.topology

# Types the target alone has, so that no object of ours has the same OID on both servers.
_OTHERS = "".join(f"CREATE TYPE other_{n} AS ENUM ('x'); CREATE TABLE elsewhere_{n} ();" for n in range(7))
_FIXED = (
    "SET client_encoding = 'UTF8'; SET search_path = public, pg_catalog; SET DateStyle = 'ISO, YMD';"
    " SET IntervalStyle = 'postgres'; SET TimeZone = 'UTC'; SET extra_float_digits = 3;"
    " SET bytea_output = 'hex';"
    " SET lc_monetary = 'C'; SET standard_conforming_strings = on; SET xmloption = 'content';"
    " SET array_nulls = on; SET quote_all_identifiers = off; SET transform_null_equals = off"
)


def _session(node: Node) -> psycopg.Connection[tuple[Any, ...]]:
    """A session with fixed settings, in one transaction."""
    connection = psycopg.connect(node.conninfo, client_encoding="UTF8")
    connection.execute(_FIXED)
    return connection


def _run(node: Node, statements: Sequence[str]) -> None:
    with _session(node) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def _set_apart(pair: TwoNodes) -> None:
    """Give the two databases different settings: the source's for all, the target's for the role in it."""
    for node, at, whom in ((pair.a, 0, "DATABASE {}"), (pair.b, 1, "ROLE postgres IN DATABASE {}")):
        with psycopg.connect(node.conninfo, autocommit=True) as connection:
            scope = sql.SQL("ALTER " + whom).format(sql.Identifier(connection.info.dbname))
            for name, values in SETTINGS.items():
                # Lists of names are not one literal.
                value = sql.SQL(values[at]) if name == "search_path" else sql.Literal(values[at])
                connection.execute(sql.SQL("{} SET {} = {}").format(scope, sql.Identifier(name), value))


def _make(pairs: Pairs, scene: Scene, source: int, target: int) -> TwoNodes:
    """A pair whose first copy holds every value of the scene."""
    pair = pairs("", version=source, target_version=target)
    pair.b.execute(_OTHERS)
    for node in (pair.a, pair.b):
        _run(node, [scene.schema_sql()])
    _set_apart(pair)
    _run(pair.a, list(scene.load_sql(1)))
    pair.create(scene.tables())
    pair.start()
    pair.wait_in_step(timeout=50)
    return pair


# What a column is compared by, as SQL: its text, and its send function where the bytes mean the same on both
# servers (arrays and rows of types that are not built in hold their OIDs) and where there is one.
_COLUMNS = """
SELECT a.attname::text,
       CASE WHEN b.typtype <> 'd' AND b.typname <> 'segrange'  -- its bounds have no send function
             AND (s.proname NOT IN ('array_send', 'record_send', 'textsend')
                  OR s.proname = 'array_send' AND b.oid < 10000 AND e.typsend <> 0)
            THEN format('%%I.%%I', n.nspname, s.proname) END
  FROM pg_attribute a JOIN pg_type b ON b.oid = a.atttypid LEFT JOIN pg_proc s ON s.oid = b.typsend
  LEFT JOIN pg_namespace n ON n.oid = s.pronamespace LEFT JOIN pg_type e ON e.oid = b.typelem
 WHERE a.attrelid = ('public.' || %s::text)::regclass AND a.attnum > 0 ORDER BY a.attnum"""


def _rows(node: Node, table: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """What is compared, and the rows in an order that does not depend on the server."""
    columns = node.query(_COLUMNS, table)
    wanted = [f"{name}::text" for name, _ in columns]
    order = ", ".join(f'{value} COLLATE "C"' for value in wanted)
    if not table.endswith("_bound"):  # ids of objects, which differ
        wanted += [f"{send}({name})" for name, send in columns if send]
    with _session(node) as connection:
        query = f"SELECT {', '.join(wanted)} FROM {table} ORDER BY {order}"
        return wanted, connection.execute(query.encode(), binary=True).fetchall()


def _differences(pair: TwoNodes, tables: Sequence[str]) -> list[str]:
    """What differs, by table, row and value; tables that are empty at the source are a difference too."""
    found = []
    for table in tables:
        wanted, source = _rows(pair.a, table)
        _, target = _rows(pair.b, table)
        if len(source) != len(target) or not source:
            found.append(f"{table}: {len(source)} rows at the source, {len(target)} at the target")
        for number, (left, right) in enumerate(zip(source, target, strict=False)):
            found += [
                f"{table} row {number} {what}: {a!r:.200} became {b!r:.200}"
                for what, a, b in zip(wanted, left, right, strict=True)
                if a != b
            ]
    return found


def _check(pairs: Pairs, source: int, target: int, *, text: bool) -> None:
    scene = Scene(min(source, target), text)
    pair = _make(pairs, scene, source, target)
    assert _differences(pair, scene.tables()) == []
    assert _session_is_text(pair) == scene.text
    _run(pair.a, list(scene.load_sql(10_001)))
    _run(pair.a, list(scene.change_sql()))
    pair.wait_in_step(timeout=50)
    assert _differences(pair, scene.tables()) == []
    assert pair.b.query("SELECT * FROM vsql_sync.anomalies") == []
    pair.stop()


def _session_is_text(pair: TwoNodes) -> bool:
    ((query,),) = pair.a.query(
        "SELECT query FROM pg_stat_activity JOIN pg_replication_slots ON active_pid = pid"
        " WHERE database = current_database() AND NOT temporary"
    )
    assert "START_REPLICATION" in query
    return "\"binary\" 'false'" in query


@pytest.mark.parametrize(
    ("source", "target", "text"), [(18, 18, False), (17, 16, True), (15, 18, False), (18, 15, True)]
)
@pytest.mark.timeout(240)
def test_every_value_of_every_type_is_equal_on_the_target(
    pairs: Pairs, source: int, target: int, text: bool
) -> None:
    _check(pairs, source, target, text=text)


@pytest.mark.long
@pytest.mark.parametrize("text", [False, True], ids=["binary", "text"])
@pytest.mark.parametrize("target", POSTGRES_VERSIONS)
@pytest.mark.parametrize("source", POSTGRES_VERSIONS)
@pytest.mark.timeout(300)
def test_every_value_is_equal_between_all_versions(
    pairs: Pairs, source: int, target: int, text: bool
) -> None:
    _check(pairs, source, target, text=text)


@pytest.mark.parametrize("version", POSTGRES_VERSIONS)
def test_no_type_of_the_server_is_left_out(stack: Stack, version: int) -> None:
    scene = Scene(version, text=True)
    with psycopg.connect(stack.new_database(version, "types"), autocommit=True) as connection:
        connection.execute(scene.schema_sql().encode())
        known = {
            name
            for (name,) in connection.execute(
                "SELECT typname::text FROM pg_type WHERE typtype IN ('b', 'r', 'm') AND typnamespace ="
                " 'pg_catalog'::regnamespace"
                " AND (typcategory <> 'A' OR typname IN ('int2vector', 'oidvector'))"
            )
        }
        held = {
            name
            for (name,) in connection.execute(
                "SELECT DISTINCT t.typname::text FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid"
                " JOIN pg_class c ON c.oid = a.attrelid WHERE c.relname ~ '^v_' AND a.attnum > 0"
            )
        }
    assert known - held == set(LEFT_OUT) & known
    assert not held & set(LEFT_OUT)


@pytest.mark.parametrize("text", [False, True], ids=["binary", "text"])
def test_each_family_has_twenty_values_and_more(text: bool) -> None:
    scene = Scene(18, text)
    for family in scene.families():
        values = {value for row in scene.rows(family) for value in row if value != "NULL"}
        assert len(values) >= 20, family.name
