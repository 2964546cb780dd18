"""Column lists: what is left out never leaves, whatever is done to tables and publications meanwhile."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from tests.nodes import TwoNodes
from tests.stack import Stack
from tests.topology.subscription.scenes import commit, rows, running
from tests.topology.subscription.waiting import QUICK, says
from tests.topology.test_leaks import _forms, _search

pytestmark = [pytest.mark.topology, pytest.mark.timeout(300)]

SCHEMA = """
CREATE TABLE cards (id int PRIMARY KEY, holder text, pan text);
CREATE TABLE merchants (id int PRIMARY KEY, name text);
CREATE TABLE by_month (id int, at int, v text, pan text, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
CREATE TABLE by_month_1 PARTITION OF by_month FOR VALUES FROM (0) TO (10);
CREATE TABLE by_month_2 (pan text, v text, at int, id int, PRIMARY KEY (id, at));
ALTER TABLE by_month ATTACH PARTITION by_month_2 FOR VALUES FROM (10) TO (20);
"""
TABLES = ("cards(*)", "merchants", "by_month(id, at, v)")
MARKS = ["--pci-column", "cards.pan", "--exclude-pci"]


@pytest.fixture(scope="module")
def marker() -> str:
    return secrets.token_hex(12)


@pytest.fixture(scope="module")
def scoped(stack: Stack, tmp_path_factory: pytest.TempPathFactory, marker: str) -> Iterator[TwoNodes]:
    """A publication without PCI columns, on a broker of its own whose files are searched at the end."""
    folder = tmp_path_factory.mktemp("scoped")
    broker = stack.own_kafka()
    source = f"""
        INSERT INTO cards SELECT g, 'holder', '{marker}' FROM generate_series(1, 5) g;
        INSERT INTO by_month SELECT g, g, 'v', '{marker}' FROM generate_series(1, 19) g;
        INSERT INTO merchants VALUES (1, 'one')"""
    with running(
        stack,
        folder,
        SCHEMA,
        TABLES,
        source=source,
        publication_args=MARKS,
        config=QUICK,
        kafka=broker.bootstrap_servers,
    ) as made:
        yield made
        found: list[str] = []
        assert broker.log_dir is not None
        assert _search(broker.log_dir, _forms(marker), found) > 10_000
        assert _search(folder, _forms(marker), found) > 1_000
        assert found == []


def test_only_listed_columns_arrive_by_copy_and_by_every_kind_of_change(
    scoped: TwoNodes, marker: str
) -> None:
    commit(
        scoped,
        f"INSERT INTO cards VALUES (10, 'h', '{marker}'), (11, 'h', '{marker}')",
        f"UPDATE cards SET pan = '{marker}x'; UPDATE cards SET holder = 'new' WHERE id = 10",
        "UPDATE cards SET id = 12 WHERE id = 11; DELETE FROM cards WHERE id = 1",
        f"INSERT INTO by_month VALUES (50, 5, 'n', '{marker}'), (51, 15, 'n', '{marker}')",
        "UPDATE by_month SET at = at + 10 WHERE at < 3; DELETE FROM by_month WHERE at = 15",
    )
    for query in ("SELECT id, holder FROM cards", "SELECT id, at, v FROM by_month"):
        source, target = rows(scoped, query)
        assert source == target
    assert scoped.b.query("SELECT count(*) FROM cards WHERE pan IS NOT NULL") == [(0,)]
    assert scoped.b.query("SELECT count(*) FROM by_month WHERE pan IS NOT NULL") == [(0,)]
    entries = scoped.a.ctl_json("audit", "list", "--contains-pci", "true")
    assert entries == []


def test_a_new_column_stays_out_until_it_is_let_in_also_with_a_backlog(scoped: TwoNodes, marker: str) -> None:
    scoped.a.stop("producer")
    scoped.a.execute("INSERT INTO merchants VALUES (2, 'before')")
    scoped.a.execute(f"ALTER TABLE merchants ADD COLUMN note text DEFAULT '{marker}'")
    scoped.a.execute(
        f"INSERT INTO merchants VALUES (3, 'after', '{marker}'); UPDATE merchants SET name = 'x' WHERE id = 1"
    )
    scoped.a.start("producer")
    scoped.wait_in_step()
    assert scoped.b.query("SELECT * FROM merchants ORDER BY id") == [(1, "x"), (2, "before"), (3, "after")]
    scoped.a.stop("producer")
    scoped.a.execute("UPDATE merchants SET note = 'open'; INSERT INTO merchants VALUES (4, 'unseen', 'note')")
    scoped.a.ctl("publication", "add-column", "pub", "merchants.note", "--yes")
    scoped.a.execute(
        "INSERT INTO merchants VALUES (5, 'seen', 'note'); UPDATE merchants SET note = 'n3' WHERE id = 3"
    )
    scoped.a.start("producer")
    says(scoped.b, "in", 'lacks column "note"')
    scoped.b.execute("ALTER TABLE merchants ADD COLUMN note text")
    scoped.wait_in_step()
    assert scoped.b.query("SELECT id, note FROM merchants ORDER BY id") == [
        (1, None), (2, None), (3, "n3"), (4, None), (5, "note"),
    ]  # fmt: skip


def test_a_marked_column_is_not_let_in(scoped: TwoNodes) -> None:
    done = scoped.a.ctl("publication", "add-column", "pub", "cards.pan", "--yes", check=False)
    assert done.returncode == 4
    assert "marked as PCI data" in done.stderr


def test_a_list_narrowed_behind_our_back_stops_the_stream_until_an_operator_lets_the_rows_pass(
    scoped: TwoNodes, marker: str
) -> None:
    scoped.a.stop("producer")
    others = "ONLY merchants (id, name, note), by_month (id, at, v)"
    scoped.a.execute(f"ALTER PUBLICATION pub SET TABLE cards (id), {others}")
    scoped.a.execute(f"INSERT INTO cards VALUES (30, 'lost', '{marker}')")
    scoped.a.start("producer")
    assert "public.cards" in says(scoped.a, "out", "lacks column holder")
    scoped.a.execute(f"ALTER PUBLICATION pub SET TABLE cards (id, holder), {others}")
    scoped.a.execute(f"INSERT INTO cards VALUES (31, 'kept', '{marker}')")
    says(scoped.a, "out", "did not send column holder")
    scoped.a.ctl("publication", "add-column", "pub", "cards.holder", "--yes")
    scoped.wait_in_step(timeout=60)
    assert scoped.b.query("SELECT id, holder FROM cards WHERE id >= 30 ORDER BY id") == [
        (30, None),
        (31, "kept"),
    ]


def test_a_list_widened_behind_our_back_stops_the_stream_before_the_column_is_sealed(
    scoped: TwoNodes, marker: str
) -> None:
    scoped.a.stop("producer")
    listed = "cards (id, holder), ONLY merchants (id, name, note), by_month (id, at, v)"
    scoped.a.execute(f"ALTER PUBLICATION pub SET TABLE {listed.replace('holder', 'holder, pan')}")
    scoped.a.execute(f"INSERT INTO cards VALUES (20, 'h', '{marker}')")
    scoped.a.start("producer")
    assert "public.cards" in says(scoped.a, "out", "pan")
    # Put back, the publication is right, and the WAL still holds the row with the column.
    scoped.a.execute(f"ALTER PUBLICATION pub SET TABLE {listed}")
    assert "which the publication leaves out" in says(scoped.a, "out", "sends column pan")
    assert scoped.b.query("SELECT * FROM cards WHERE id = 20") == []
