"""The first copy: what tables held before, from one snapshot, as a chain of its own that ends."""

from __future__ import annotations

import json
from pathlib import Path

from tests.services.producer_node import SourceNode
from tests.stack import Stack
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


def test_a_copy_of_an_idle_database_ends_and_names_empty_tables(stack: Stack, tmp_path: Path) -> None:
    config = "[limits]\nbatch_max_rows = 1000\n"
    node = SourceNode(stack, tmp_path, TABLES, ["filled", "nothing", "many"], config=config)
    chain = node.add_copy()
    live = node.start()
    copy = node.start(chain, log="copy")
    node.wait(
        lambda: bool(
            node.query(
                "SELECT 1 FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND event_type = 'copy_finished'",
                chain,
            )
        ),
        what=f"the copy does not end\n{node.log('copy')}",
    )
    node.stop(copy)
    node.stop(live)
    back = node.read(chain)
    started, finished = (
        next(json.loads(entry.detail) for entry in back.entries if entry.event_type == event)
        for event in (COPY_STARTED, COPY_FINISHED)
    )
    assert sorted(started["tables"]) == ["public.filled", "public.many", "public.nothing"]
    assert {table: said["rows"] for table, said in finished["tables"].items()} == {
        "public.filled": 2, "public.nothing": 0, "public.many": 2500
    }  # fmt: skip
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
