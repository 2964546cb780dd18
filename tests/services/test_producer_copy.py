"""The first copy: what tables held before, from one snapshot, as a chain of its own that ends."""

from __future__ import annotations

import json

import pytest

from tests.services.conftest import NewSource
from tests.services.producer_node import PeerNode, SourceNode
from vsql_shared import lsn
from vsql_shared.audit.entries import COPY_FINISHED, COPY_STARTED
from vsql_shared.changes import Op

TABLES = """
CREATE TYPE mood AS ENUM ('sad', 'happy');
CREATE TABLE filled (id bigint PRIMARY KEY, note text, feels mood, ref regclass);
CREATE TABLE nothing (id bigint PRIMARY KEY);
CREATE TABLE many (id bigint, part int, PRIMARY KEY (id, part)) PARTITION BY LIST (part);
CREATE TABLE many_0 PARTITION OF many FOR VALUES IN (0);
CREATE TABLE many_1 PARTITION OF many FOR VALUES IN (1);
INSERT INTO filled VALUES (1, 'a', 'sad', 'pg_class'), (2, NULL, 'happy', NULL);
INSERT INTO many SELECT g, g % 2 FROM generate_series(1, 2500) g;
"""


def test_a_copy_of_an_idle_database_ends_and_names_empty_tables(new_source: NewSource) -> None:
    config = "[limits]\nbatch_max_rows = 1000\n"
    node = new_source(TABLES, ["filled", "nothing", "many"], config=config)
    chain = node.add_copy()
    live = node.start()
    copy = node.start(chain, log="copy")
    node.wait(lambda: finished(node, chain), what=f"the copy does not end\n{node.log('copy')}")
    node.stop(copy)
    node.stop(live)
    back = node.read(chain)
    started, ended = (
        next(json.loads(entry.detail) for entry in back.entries if entry.event_type == event)
        for event in (COPY_STARTED, COPY_FINISHED)
    )
    assert sorted(started["tables"]) == ["public.filled", "public.many", "public.nothing"]
    assert {table: said["rows"] for table, said in ended["tables"].items()} == {
        "public.filled": 2, "public.nothing": 0, "public.many": 2500
    }  # fmt: skip
    # A target that others write, too, opens once its clock is past what the source's says at the end.
    ((now,),) = node.query("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")
    assert 0 < now - ended["clock"] < 600 * 10**6
    at = lsn.parse(started["lsn"])
    assert {change.transaction[:2] for change in back.changes} == {(0, at)}
    assert {change.op for change in back.changes} == {Op.COPY}
    by_table: dict[str, list[bool]] = {}
    for manifest in back.manifests:
        assert len(manifest.tables_affected) == 1
        by_table.setdefault(manifest.tables_affected[0], []).append(manifest.continues)
    assert by_table == {"public.filled": [False], "public.many": [True, True, False]}
    filled = [change for change in back.changes if change.table.table == "filled"]
    assert [c.type_name for c in filled[0].relation.columns] == ["bigint", "text", "public.mood", "text"]
    assert b"pg_class" in filled[0].plaintext


LARGE = """
CREATE TABLE a AS SELECT g::bigint AS id FROM generate_series(1, 3000) g;
ALTER TABLE a ADD PRIMARY KEY (id);
CREATE TABLE b AS SELECT * FROM a;
ALTER TABLE b ADD PRIMARY KEY (id);
"""


@pytest.mark.parametrize("at", [1, 4, 8])
def test_a_copy_that_is_killed_goes_on_with_the_tables_that_are_not_complete(
    new_source: NewSource, at: int
) -> None:
    node = new_source(LARGE, ["a", "b"], config="[limits]\nbatch_max_rows = 500\ninflight_batches = 1\n")
    chain = node.add_copy()
    live = node.start()
    node.wait(lambda: node.state()[0] == "running")
    killed = node.start(chain, failpoints=f"copy.recorded=kill:{at}", log="killed")
    node.wait(lambda: killed.poll() is not None, what=node.log("killed"))
    node.execute("INSERT INTO a VALUES (3001); INSERT INTO b VALUES (3001)")
    again = node.start(chain, log="again")
    node.wait(lambda: finished(node, chain), what=f"the copy does not end\n{node.log('again')}")
    node.stop(again)
    node.stop(live)
    back = node.read(chain)
    copied = {
        table: [change.plaintext[-8:] for change in back.changes if change.table.table == table]
        for table in ("a", "b")
    }
    # What was complete before the kill keeps its first snapshot; the rest is read from the second one.
    ends = {table: 3000 if table == "a" and at == 8 else 3001 for table in ("a", "b")}
    for table, rows in copied.items():
        assert sorted(int.from_bytes(row, "big") for row in rows) == list(range(1, ends[table] + 1))
        positions = {c.transaction.commit_lsn for c in back.changes if c.table.table == table}
        assert len(positions) == 1


def finished(node: SourceNode, chain: str) -> bool:
    """Whether the copy's chain has its end."""
    return bool(
        node.query(
            "SELECT 1 FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND event_type = 'copy_finished'", chain
        )
    )


def test_a_copy_waits_for_the_live_streams_slot(new_source: NewSource) -> None:
    node = new_source(LARGE, ["a"])
    chain = node.add_copy()
    copy = node.start(chain, log="copy")
    node.wait(lambda: "waits for the slot" in node.log("copy"))
    live = node.start()
    node.wait(lambda: finished(node, chain), what=node.log("copy"))
    node.stop(copy)
    node.stop(live)


def test_topics_of_a_copy_go_when_its_target_has_acknowledged_everything(new_source: NewSource) -> None:
    node = new_source(LARGE, ["a"])
    target = PeerNode(node, "node-b")
    chain = node.add_copy()
    live = node.start()
    copy = node.start(chain, log="copy")
    node.wait(lambda: finished(node, chain), what=node.log("copy"))
    topic = f"{node.cluster}.pub.node-a.copy.node-b.public.a"
    assert topic in node.topics()
    target.acknowledge(chain)
    assert copy.wait(30) == 0
    assert topic not in node.topics()
    assert node.query("SELECT state FROM vsql_sync.streams WHERE chain = %s", chain) == [("FINISHED",)]
    node.stop(live)
