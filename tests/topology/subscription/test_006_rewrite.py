"""A table that is written anew by ALTER TABLE or VACUUM sends no rows for that, and those after it arrive."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.nodes import TwoNodes
from tests.stack import Stack
from tests.topology.subscription.scenes import anomalies, commit, running, same

pytestmark = [pytest.mark.topology, pytest.mark.timeout(300)]

SCHEMA = """
CREATE TABLE rewritten (id int PRIMARY KEY, v text);
CREATE TABLE dropped (gone int, id int PRIMARY KEY, v text, late text);
ALTER TABLE dropped DROP gone;
CREATE TABLE widened (id int PRIMARY KEY, n int);
CREATE TABLE counted (id int PRIMARY KEY, big text); ALTER TABLE counted ALTER big SET STORAGE EXTERNAL;
"""
SOURCE = """
INSERT INTO rewritten SELECT g, 'first' FROM generate_series(1, 20) g;
INSERT INTO dropped SELECT g, 'v', 'late' FROM generate_series(1, 3) g;
"""
TABLES = ("rewritten", "dropped", "widened", "counted")


@pytest.fixture(scope="module")
def pair(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    folder = tmp_path_factory.mktemp("rewrite")
    with running(stack, folder, SCHEMA, TABLES, source=SOURCE, versions=(16, 17)) as made:
        yield made


def _both(pair: TwoNodes, script: str) -> None:
    """Alter the target first: then it never lacks what a row needs."""
    pair.b.execute(script)
    pair.a.execute(script)


def test_a_rewrite_sends_nothing_and_a_column_with_a_new_default_arrives_filled(pair: TwoNodes) -> None:
    pair.wait_in_step()
    before = pair.audited_rows()
    _both(pair, "ALTER TABLE rewritten ADD made text DEFAULT 'd' || clock_timestamp()::date")
    commit(
        pair, "INSERT INTO rewritten VALUES (21, 'second', 'mine'); INSERT INTO rewritten VALUES (22, 'x')"
    )
    assert pair.audited_rows() - before == 2
    _both(pair, "ALTER TABLE rewritten ADD fast int DEFAULT 7")
    commit(pair, "UPDATE rewritten SET v = 'third' WHERE id < 4; DELETE FROM rewritten WHERE id = 20")
    assert pair.audited_rows() - before == 6
    assert len(same(pair, "rewritten")) == 21


def test_a_rewrite_and_changes_in_one_transaction(pair: TwoNodes) -> None:
    pair.b.execute("ALTER TABLE widened ALTER n TYPE bigint")
    commit(
        pair,
        "INSERT INTO widened VALUES (1, 1); ALTER TABLE widened ALTER n TYPE bigint;"
        " INSERT INTO widened VALUES (2, 5000000000); UPDATE widened SET n = n + 1",
    )
    assert same(pair, "widened") == [("1", "2"), ("2", "5000000001")]
    pair.b.execute("ALTER TABLE widened ALTER n TYPE numeric")
    commit(
        pair,
        "UPDATE widened SET n = n + 1; ALTER TABLE widened ALTER n TYPE numeric; UPDATE widened SET n = 1.5",
    )
    assert same(pair, "widened") == [("1", "1.5"), ("2", "1.5")]


def test_columns_dropped_and_added_again_stand_for_other_columns(pair: TwoNodes) -> None:
    commit(pair, "UPDATE dropped SET v = 'w' WHERE id = 1")
    _both(pair, "ALTER TABLE dropped DROP late, ADD late int")
    commit(
        pair,
        "INSERT INTO dropped VALUES (4, 'v', 44); UPDATE dropped SET late = 11 WHERE id = 1",
        "ALTER TABLE dropped REPLICA IDENTITY FULL; UPDATE dropped SET v = 'full' WHERE id = 2;"
        " DELETE FROM dropped WHERE id = 3",
    )
    assert same(pair, "dropped") == [("1", "w", "11"), ("2", "full", None), ("4", "v", "44")]
    assert anomalies(pair, "dropped") == {}


def test_vacuum_full_cluster_and_set_tablespace_move_rows_unseen(pair: TwoNodes) -> None:
    commit(pair, "INSERT INTO counted SELECT g, repeat(g::text, 3000) FROM generate_series(1, 9) g")
    before = pair.audited_rows()
    pair.a.query("VACUUM FULL counted")
    pair.a.query("CLUSTER counted USING counted_pkey")
    pair.a.execute("ALTER TABLE counted SET LOGGED; REINDEX TABLE counted")
    commit(pair, "UPDATE counted SET id = id + 100 WHERE id = 9")
    assert pair.audited_rows() - before == 1
    assert len(same(pair, "counted")) == 9
