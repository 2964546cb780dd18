"""Row filters: first copy and stream send the same rows; a change that crosses the filter is turned round."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.nodes import TwoNodes
from tests.stack import Stack
from tests.topology.subscription.scenes import anomalies, commit, rows, running
from tests.topology.subscription.waiting import QUICK, says

pytestmark = [pytest.mark.topology, pytest.mark.timeout(300)]

SCHEMA = """
CREATE TABLE orders (id int, region text, amount int, PRIMARY KEY (id, region));
CREATE TABLE states (id int, status text, note text); ALTER TABLE states REPLICA IDENTITY FULL;
CREATE TABLE "Odd ""one" ("a b" int PRIMARY KEY, v text);
CREATE TABLE emptied (id int PRIMARY KEY);
CREATE TABLE nulls (id int PRIMARY KEY, v int); ALTER TABLE nulls REPLICA IDENTITY FULL;
CREATE TABLE documents (id int, shown boolean, body text, PRIMARY KEY (id, shown));
ALTER TABLE documents ALTER body SET STORAGE EXTERNAL;
CREATE TABLE whole_documents (id int PRIMARY KEY, shown boolean, body text);
ALTER TABLE whole_documents ALTER body SET STORAGE EXTERNAL;
ALTER TABLE whole_documents REPLICA IDENTITY FULL;
"""
SOURCE = """
CREATE TABLE facts (id int, at date, v text, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
CREATE TABLE facts_old PARTITION OF facts FOR VALUES FROM (MINVALUE) TO ('2024-01-01');
CREATE TABLE facts_new PARTITION OF facts FOR VALUES FROM ('2024-01-01') TO (MAXVALUE);
INSERT INTO orders SELECT g, (ARRAY['US', 'EU', 'ASIA'])[1 + g % 3], g FROM generate_series(1, 30) g;
INSERT INTO states VALUES (1, 'active', 'one'), (2, 'gone', 'two'), (3, NULL, 'three');
INSERT INTO "Odd ""one" SELECT g, 'v%' || g FROM generate_series(1, 20) g;
INSERT INTO facts SELECT g, DATE '2023-01-01' + g * 30, 'f' FROM generate_series(1, 24) g;
INSERT INTO documents VALUES (1, true, repeat('x', 9000)), (2, false, repeat('y', 9000));
INSERT INTO whole_documents VALUES (1, true, repeat('x', 9000)), (2, false, repeat('y', 9000));
"""
TARGET = "CREATE TABLE facts (id int, at date, v text, PRIMARY KEY (id, at));"
TABLES = (
    "orders(*) WHERE region IN ('US', 'EU')",
    "states WHERE (status = 'active')",
    """ "Odd ""one" where ("a b" % 2 = 0 AND '(;--''' <> '') """,
    "emptied WHERE (id > 10)",
    "nulls WHERE (v IS NULL)",
    "facts WHERE (at >= DATE '2023-12-01')",
    "documents WHERE (shown)",
    "whole_documents WHERE (shown)",
)
KEPT = {
    "orders": "region IN ('US', 'EU')",
    "states": "status = 'active'",
    '"Odd ""one"': '"a b" % 2 = 0',
    "facts": "at >= DATE '2023-12-01'",
    "documents": "shown",
    "whole_documents": "shown",
}


@pytest.fixture(scope="module")
def pair(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    folder = tmp_path_factory.mktemp("row-filter")
    with running(stack, folder, SCHEMA, TABLES, source=SOURCE, target=TARGET, config=QUICK) as made:
        yield made


def _as_filtered(pair: TwoNodes, table: str) -> int:
    """Require that the target holds the rows of the filter and no others; how many."""
    source = pair.a.query(f'SELECT t::text FROM {table} t WHERE {KEPT[table]} ORDER BY t::text COLLATE "C"')
    target = pair.b.query(f'SELECT t::text FROM {table} t ORDER BY t::text COLLATE "C"')
    assert target == source, table
    return len(target)


def test_the_first_copy_has_the_rows_of_the_filter_only(pair: TwoNodes) -> None:
    pair.wait_in_step()
    assert {table: _as_filtered(pair, table) for table in KEPT if "documents" not in table} == {
        "orders": 20, "states": 1, '"Odd ""one"': 10, "facts": 13,
    }  # fmt: skip


def test_changes_outside_of_the_filter_never_leave(pair: TwoNodes) -> None:
    before = pair.audited_rows()
    commit(
        pair,
        "INSERT INTO orders VALUES (100, 'ASIA', 1); UPDATE orders SET amount = 2 WHERE region = 'ASIA';"
        "DELETE FROM orders WHERE region = 'ASIA' AND id < 10",
        "INSERT INTO states VALUES (9, 'gone', 'nine'), (10, NULL, 'ten')",
        "INSERT INTO facts VALUES (900, '2020-02-02', 'old'); UPDATE facts SET v = 'z' WHERE id = 900",
    )
    assert pair.audited_rows() == before
    assert _as_filtered(pair, "orders") == 20


def test_an_update_that_crosses_the_filter_becomes_an_insert_or_a_delete(pair: TwoNodes) -> None:
    commit(
        pair,
        "INSERT INTO orders VALUES (201, 'US', 1), (202, 'ASIA', 2), (203, 'EU', 3)",
        "UPDATE orders SET region = 'ASIA' WHERE id = 201",
        "UPDATE orders SET region = 'US' WHERE id = 202",
        "UPDATE orders SET region = 'US', amount = 33 WHERE id = 203",
    )
    assert rows(pair, "SELECT * FROM orders WHERE id > 200")[1] == [(202, "US", 2), (203, "US", 33)]
    commit(
        pair,
        "UPDATE states SET status = 'gone' WHERE id = 1; UPDATE states SET status = 'active' WHERE id = 2",
        "UPDATE states SET status = 'active' WHERE id = 3",
        "UPDATE states SET note = 'inside' WHERE id = 2; UPDATE states SET status = NULL WHERE id = 3",
        "DELETE FROM states WHERE id = 1",
    )
    assert rows(pair, "SELECT * FROM states")[1] == [(2, "active", "inside")]
    commit(pair, 'UPDATE "Odd ""one" SET "a b" = "a b" + 101', 'DELETE FROM "Odd ""one" WHERE "a b" > 115')
    assert [_as_filtered(pair, table) for table in ("orders", "states", '"Odd ""one"')] == [22, 1, 7]
    assert anomalies(pair, "orders") == anomalies(pair, "states") == anomalies(pair, 'Odd "one') == {}


def test_a_filter_by_null_sends_unknown_as_no(pair: TwoNodes) -> None:
    commit(
        pair,
        "INSERT INTO nulls VALUES (1, NULL), (2, 2), (3, NULL)",
        "UPDATE nulls SET v = 1 WHERE id = 1; UPDATE nulls SET v = NULL WHERE id = 2",
    )
    assert rows(pair, "SELECT * FROM nulls")[1] == [(2, None), (3, None)]


def test_the_root_s_filter_holds_for_rows_of_every_partition(pair: TwoNodes) -> None:
    commit(
        pair,
        "INSERT INTO facts VALUES (500, '2023-12-30', 'late'), (501, '2023-02-02', 'early'),"
        "(502, '2025-01-01', 'n')",
        # From the new partition to the old one, and out; the other way, and in; moved inside of the filter.
        "UPDATE facts SET at = '2023-03-03' WHERE id = 502",
        "UPDATE facts SET at = '2024-03-03' WHERE id = 501",
        "UPDATE facts SET at = '2024-04-04' WHERE id = 500; DELETE FROM facts_new WHERE id = 20",
    )
    assert _as_filtered(pair, "facts") == 14
    assert anomalies(pair, "facts") == {}


def test_truncate_is_not_filtered(pair: TwoNodes) -> None:
    commit(pair, "INSERT INTO emptied SELECT generate_series(1, 20)")
    assert len(pair.b.query("SELECT * FROM emptied")) == 10
    commit(pair, "TRUNCATE emptied")
    assert pair.b.query("SELECT * FROM emptied") == []


def test_filters_are_listed(pair: TwoNodes) -> None:
    (listed,) = pair.a.ctl_json("publication", "list")
    where = {table["table"]: table["where"] for table in listed["tables"]}
    assert where["states"] == "(status = 'active'::text)"
    assert "(status = 'active'::text)" in pair.a.ctl("publication", "list").stdout


def test_a_large_value_that_comes_into_the_filter_unsent_is_never_taken_for_null(pair: TwoNodes) -> None:
    commit(
        pair,
        "UPDATE whole_documents SET shown = NOT shown",
        "UPDATE documents SET shown = false WHERE id = 1",
    )
    assert _as_filtered(pair, "whole_documents") == 1
    assert _as_filtered(pair, "documents") == 0
    pair.a.execute("UPDATE documents SET shown = true, body = repeat('z', 9000) WHERE id = 1")
    pair.wait_in_step()
    assert _as_filtered(pair, "documents") == 1
    # The WAL has no body of this row: PostgreSQL's own subscriber would write NULL.
    pair.a.execute("UPDATE documents SET shown = true WHERE id = 2")
    assert "column 3" in says(pair.b, "in", "brought the row into the row filter")
    assert pair.b.query("SELECT id FROM documents WHERE body IS NULL") == []


def test_a_filter_changed_behind_our_back_stops_the_stream(pair: TwoNodes) -> None:
    pair.a.execute(
        "ALTER PUBLICATION pub DROP TABLE nulls; ALTER PUBLICATION pub ADD TABLE nulls WHERE (v > 5)"
    )
    assert "row filter" in says(pair.a, "out", "public.nulls")
    pair.a.execute(
        "ALTER PUBLICATION pub DROP TABLE nulls; ALTER PUBLICATION pub ADD TABLE nulls WHERE (v IS NULL)"
    )
    says(pair.a, "out", "")
