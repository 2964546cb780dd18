"""Partitioned tables, by root and by leaf: moves, attached and detached ones, TRUNCATE, other layouts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from confluent_kafka.admin import AdminClient

from tests.nodes import TwoNodes
from tests.stack import Stack
from tests.topology.subscription.scenes import anomalies, commit, rows, running, same
from tests.topology.subscription.waiting import QUICK, says

pytestmark = [pytest.mark.topology, pytest.mark.timeout(300)]

BY_ROOT_SOURCE = """
CREATE TABLE ranged (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
CREATE TABLE ranged_low PARTITION OF ranged FOR VALUES FROM (0) TO (100);
CREATE TABLE ranged_high (v text, extra int, id int NOT NULL) ;
ALTER TABLE ranged_high DROP COLUMN extra; ALTER TABLE ranged_high ADD PRIMARY KEY (id);
ALTER TABLE ranged ATTACH PARTITION ranged_high FOR VALUES FROM (100) TO (200);
CREATE TABLE nested (id int, k text, v int, PRIMARY KEY (id, k)) PARTITION BY LIST (k);
CREATE TABLE nested_a PARTITION OF nested FOR VALUES IN ('a');
CREATE TABLE nested_b PARTITION OF nested FOR VALUES IN ('b') PARTITION BY RANGE (id);
CREATE TABLE nested_b1 PARTITION OF nested_b FOR VALUES FROM (0) TO (10);
CREATE TABLE nested_b2 PARTITION OF nested_b DEFAULT;
CREATE TABLE whole (a int, b int) PARTITION BY LIST (b);
CREATE TABLE whole_1 PARTITION OF whole FOR VALUES IN (1);
CREATE TABLE whole_2 PARTITION OF whole DEFAULT;
ALTER TABLE whole REPLICA IDENTITY FULL; ALTER TABLE whole_1 REPLICA IDENTITY FULL;
ALTER TABLE whole_2 REPLICA IDENTITY FULL;
CREATE TABLE plain_here (id int PRIMARY KEY, v text);
CREATE TABLE emptied (id int PRIMARY KEY) PARTITION BY RANGE (id);
CREATE TABLE emptied_1 PARTITION OF emptied FOR VALUES FROM (0) TO (10);
CREATE TABLE emptied_2 PARTITION OF emptied FOR VALUES FROM (10) TO (20);
INSERT INTO ranged SELECT g, 'copied' FROM generate_series(95, 104) g;
INSERT INTO nested SELECT g, (ARRAY['a', 'b'])[1 + g % 2], g FROM generate_series(1, 20) g;
INSERT INTO whole VALUES (1, 1), (1, 1), (2, 2);
INSERT INTO plain_here SELECT g, 'copied' FROM generate_series(1, 10) g;
"""
BY_ROOT_TARGET = """
CREATE TABLE ranged (v text, id int PRIMARY KEY) PARTITION BY HASH (id);
CREATE TABLE ranged_low PARTITION OF ranged FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE ranged_other PARTITION OF ranged FOR VALUES WITH (MODULUS 2, REMAINDER 1);
CREATE TABLE nested (id int, k text, v int, PRIMARY KEY (id, k));
CREATE TABLE whole (a int, b int) PARTITION BY RANGE (a);
CREATE TABLE whole_any PARTITION OF whole DEFAULT;
CREATE TABLE plain_here (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
CREATE TABLE plain_here_1 PARTITION OF plain_here FOR VALUES FROM (0) TO (5);
CREATE TABLE plain_here_2 PARTITION OF plain_here FOR VALUES FROM (5) TO (1000);
CREATE TABLE emptied (id int PRIMARY KEY);
"""
BY_ROOT = ("ranged", "nested", "whole", "plain_here", "emptied")


@pytest.fixture(scope="module")
def by_root(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    folder = tmp_path_factory.mktemp("by-root")
    with running(
        stack, folder, "", BY_ROOT, source=BY_ROOT_SOURCE, target=BY_ROOT_TARGET, config=QUICK
    ) as made:
        yield made


def test_rows_copied_and_changed_reach_a_target_of_another_layout(by_root: TwoNodes) -> None:
    assert len(same(by_root, *BY_ROOT[:4])) == 10
    commit(
        by_root,
        "INSERT INTO ranged VALUES (1, 'new'), (150, 'new'); UPDATE ranged SET v = 'changed' WHERE id > 100;"
        "DELETE FROM ranged_low WHERE id = 96",
        "UPDATE ranged SET id = id + 50 WHERE id BETWEEN 94 AND 99",  # from one partition to the other
        "UPDATE ranged SET id = id - 100, v = 'back' WHERE id BETWEEN 145 AND 149;"
        "DELETE FROM ranged WHERE id = 150",
        "UPDATE nested SET k = 'b', v = -v WHERE k = 'a' AND id > 10;"
        "UPDATE nested SET id = id + 100 WHERE k = 'b'",
        "INSERT INTO whole VALUES (3, 3);UPDATE whole SET b = 2 WHERE ctid = (SELECT min(ctid) FROM whole_1)",
        "DELETE FROM whole WHERE a = 2; UPDATE whole SET a = a + 1",
        "UPDATE plain_here SET id = id + 5 WHERE id = 10;"
        "UPDATE plain_here SET id = 0, v = 'moved' WHERE id = 9",
    )
    same(by_root, *BY_ROOT)
    assert [anomalies(by_root, table) for table in BY_ROOT] == [{}] * 5


def test_a_partition_attached_under_way_travels_and_a_detached_one_no_more(by_root: TwoNodes) -> None:
    commit(
        by_root,
        "CREATE TABLE ranged_new PARTITION OF ranged FOR VALUES FROM (200) TO (300);"
        "INSERT INTO ranged VALUES (200, 'n'), (201, 'n'); UPDATE ranged SET id = 202 WHERE id = 150",
        "CREATE TABLE ranged_late (id int PRIMARY KEY, v text);"
        "INSERT INTO ranged_late VALUES (300, 'before')",
        "ALTER TABLE ranged ATTACH PARTITION ranged_late FOR VALUES FROM (300) TO (400);"
        "INSERT INTO ranged VALUES (301, 'after')",
    )
    # What a table holds when it is attached was never a change of the published table.
    source, target = rows(by_root, "SELECT id FROM ranged WHERE id >= 200")
    assert source == [(200,), (201,), (300,), (301,)]
    assert target == [(200,), (201,), (301,)]
    commit(
        by_root,
        "ALTER TABLE ranged DETACH PARTITION ranged_late; INSERT INTO ranged_late VALUES (302, 'alone')",
        "DROP TABLE ranged_late; INSERT INTO ranged VALUES (203, 'n')",
    )
    assert rows(by_root, "SELECT id FROM ranged WHERE id > 202")[1] == [(203,), (301,)]


def test_the_table_is_truncated_as_a_whole_and_one_partition_only_at_the_source(by_root: TwoNodes) -> None:
    commit(by_root, "INSERT INTO emptied SELECT generate_series(5, 14)", "TRUNCATE emptied_1")
    assert rows(by_root, "SELECT count(*) FROM emptied") == ([(5,)], [(10,)])
    commit(by_root, "TRUNCATE emptied; INSERT INTO emptied VALUES (7)")
    assert same(by_root, "emptied") == [("7",)]
    dropped = by_root.a.ctl("publication", "create", "said", "--table", "emptied").stderr
    assert "does not send TRUNCATE of a single partition" in dropped


def test_a_partition_of_another_identity_is_named_before_rows_are_missed(by_root: TwoNodes) -> None:
    by_root.a.execute("CREATE TABLE whole_7 PARTITION OF whole FOR VALUES IN (7)")
    assert "public.whole_7" in says(by_root.a, "out", "its replica identity differs")
    by_root.a.execute("ALTER TABLE whole_7 REPLICA IDENTITY FULL")
    says(by_root.a, "out", "")
    commit(by_root, "INSERT INTO whole VALUES (7, 7), (8, 7); DELETE FROM whole WHERE a = 8")
    same(by_root, "whole")


LEAVES = """
CREATE TABLE facts (id int, at int, v text, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
CREATE TABLE facts_1 PARTITION OF facts FOR VALUES FROM (0) TO (10);
CREATE TABLE facts_2 PARTITION OF facts FOR VALUES FROM (10) TO (20) PARTITION BY LIST (at);
CREATE TABLE facts_2a PARTITION OF facts_2 FOR VALUES IN (10, 11);
CREATE TABLE facts_2b PARTITION OF facts_2 DEFAULT;
CREATE TABLE single (id int PRIMARY KEY, secret text, v int) PARTITION BY RANGE (id);
CREATE TABLE single_1 PARTITION OF single FOR VALUES FROM (0) TO (10);
CREATE TABLE single_2 PARTITION OF single FOR VALUES FROM (10) TO (20);
CREATE TABLE ordinary (id int PRIMARY KEY);
INSERT INTO facts SELECT g, g, 'copied' FROM generate_series(0, 19) g;
INSERT INTO single SELECT g, 'hidden', g FROM generate_series(0, 19) g;
"""
# Leaves of the source are here a partition of something else, tables of their own, partitioned themselves.
LEAVES_TARGET = """
CREATE TABLE other_root (v text, id int, at int, PRIMARY KEY (id, at)) PARTITION BY HASH (id, at);
CREATE TABLE facts_1 PARTITION OF other_root FOR VALUES WITH (MODULUS 1, REMAINDER 0);
CREATE TABLE facts_2a (id int, at int, v text, PRIMARY KEY (id, at));
CREATE TABLE facts_2b (id int, at int, v text, PRIMARY KEY (id, at)) PARTITION BY HASH (id);
CREATE TABLE facts_2b_0 PARTITION OF facts_2b FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE facts_2b_1 PARTITION OF facts_2b FOR VALUES WITH (MODULUS 2, REMAINDER 1);
CREATE TABLE single_1 (id int PRIMARY KEY, v int);
CREATE TABLE ordinary (id int PRIMARY KEY);
"""
BY_LEAF = ("facts", "single_1(id, v) WHERE (id > 2)", "ordinary")
FACTS = ("facts_1", "facts_2a", "facts_2b")


@pytest.fixture(scope="module")
def by_leaf(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    folder = tmp_path_factory.mktemp("by-leaf")
    with running(
        stack,
        folder,
        "",
        BY_LEAF,
        source=LEAVES,
        target=LEAVES_TARGET,
        publication_args=["--via-leaf"],
        config=QUICK,
    ) as made:
        yield made


def test_each_leaf_travels_under_its_own_name(by_leaf: TwoNodes) -> None:
    same(by_leaf, *FACTS)
    commit(
        by_leaf,
        "INSERT INTO facts VALUES (100, 1, 'new'), (101, 10, 'new'), (102, 19, 'new')",
        "UPDATE facts SET v = 'changed' WHERE at IN (2, 11, 12); DELETE FROM facts WHERE at = 3",
        "UPDATE facts SET at = at + 10 WHERE at < 5; UPDATE facts SET at = 4 WHERE id = 19",  # between leaves
        "UPDATE single SET v = -v; DELETE FROM single WHERE id = 2; UPDATE single SET id = 2 WHERE id = 5;"
        "DELETE FROM single WHERE id = 6; UPDATE single SET id = 6 WHERE id = 15",
    )
    assert sum(len(same(by_leaf, table)) for table in FACTS) == 22
    # Of the single partition: the columns and rows of its own list and filter.
    kept = by_leaf.a.query("SELECT id, v FROM single_1 WHERE id > 2 ORDER BY id")
    assert by_leaf.b.query("SELECT id, v FROM single_1 ORDER BY id") == kept
    assert (5, -5) not in kept
    topics = AdminClient({"bootstrap.servers": by_leaf.a.kafka}).list_topics(timeout=10).topics
    prefix = f"{by_leaf.cluster}.pub.node-a.public."
    live = {name.removeprefix(prefix).replace("_5f", "_") for name in topics if name.startswith(prefix)}
    assert live == {*FACTS, "single_1"}


def test_a_leaf_and_the_root_are_truncated(by_leaf: TwoNodes) -> None:
    commit(by_leaf, "TRUNCATE facts_2a")
    assert [len(same(by_leaf, table)) > 0 for table in FACTS] == [True, False, True]
    commit(
        by_leaf,
        "INSERT INTO facts VALUES (1000, 11, 'x'); TRUNCATE facts; INSERT INTO facts VALUES (1, 1, 'y')",
    )
    assert [len(same(by_leaf, table)) for table in FACTS] == [1, 0, 0]


def test_a_new_leaf_stops_where_the_target_lacks_it_and_goes_on_once_it_is_there(by_leaf: TwoNodes) -> None:
    by_leaf.a.execute(
        "CREATE TABLE facts_3 PARTITION OF facts FOR VALUES FROM (20) TO (30);"
        "INSERT INTO facts VALUES (3, 20, 'n')"
    )
    says(by_leaf.b, "in", "public.facts_3 is not in the target database")
    by_leaf.b.execute("CREATE TABLE facts_3 (id int, at int, v text, PRIMARY KEY (id, at))")
    commit(by_leaf, "UPDATE facts SET at = 21 WHERE id = 1")
    assert len(same(by_leaf, "facts_3", "facts_1", "facts_3")) == 2


def test_rows_of_a_leaf_arrive_that_was_detached_or_dropped_before_they_were_read(by_leaf: TwoNodes) -> None:
    by_leaf.b.execute("CREATE TABLE facts_9 (id int, at int, v text, PRIMARY KEY (id, at))")
    by_leaf.a.stop("producer")
    by_leaf.a.execute("INSERT INTO facts VALUES (7, 22, 'late'), (8, 23, 'late')")
    by_leaf.a.execute(
        "ALTER TABLE facts DETACH PARTITION facts_3; INSERT INTO facts_3 VALUES (9, 24, 'alone')"
    )
    # Nobody saw this one as a partition, so its name says nothing.
    for name, at in (("facts_9", 90), ("facts_8", 80)):
        by_leaf.a.execute(f"CREATE TABLE {name} PARTITION OF facts FOR VALUES FROM ({at}) TO ({at + 5})")
        by_leaf.a.execute(f"INSERT INTO facts VALUES (1, {at}, 'short')")
        by_leaf.a.execute(f"DROP TABLE {name}")
    by_leaf.a.execute("INSERT INTO ordinary VALUES (1)")
    by_leaf.a.start("producer")
    said = says(by_leaf.a, "out", "partition")
    assert "public.facts_9" in said or "--of" in said
    by_leaf.a.ctl("publication", "partition", "pub", "facts_9", "--of", "facts", "--yes")
    says(by_leaf.a, "out", "public.facts_8")
    by_leaf.a.ctl("publication", "partition", "pub", "facts_8", "--pass-over", "--yes")
    by_leaf.wait_in_step(timeout=60)
    assert by_leaf.b.query("SELECT id FROM facts_3 ORDER BY id") == [(1,), (3,), (7,), (8,)]
    assert by_leaf.b.query("SELECT id, at FROM facts_9") == [(1, 90)]
    assert by_leaf.b.query("SELECT id FROM ordinary") == [(1,)]
