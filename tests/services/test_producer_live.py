"""The live stream from a database's WAL to Kafka: nothing lost, nothing doubled, in the source's order."""

from __future__ import annotations

import pytest

from tests.services.conftest import NewSource

TABLES = """
CREATE TABLE one (id bigint PRIMARY KEY, note text);
CREATE TABLE two (id bigint PRIMARY KEY, amount numeric(12,2));
"""


@pytest.mark.parametrize("version", [15, 18])
def test_changes_of_several_tables_arrive_in_source_order(new_source: NewSource, version: int) -> None:
    node = new_source(TABLES, ["one", "two"], version=version)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running", what="the stream does not run")
    node.execute(
        "INSERT INTO one VALUES (1, 'a'), (2, 'b'); INSERT INTO two VALUES (1, 1.5);"
        "UPDATE one SET note = 'c' WHERE id = 1; DELETE FROM one WHERE id = 2"
    )
    node.wait_confirmed()
    node.stop(worker)
    back = node.read()
    assert [(chr(change.op), change.table.table) for change in back.changes] == [
        ("I", "one"), ("I", "one"), ("I", "two"), ("U", "one"), ("D", "one")
    ]  # fmt: skip
    assert [values[1] for op, values in back.rows("one") if op != "D"] == [b"a", b"b", b"c"]
    assert len({change.transaction for change in back.changes}) == 1
