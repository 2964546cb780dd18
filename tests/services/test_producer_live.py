"""The live stream from a database's WAL to Kafka: nothing lost, nothing doubled, in the source's order."""

from __future__ import annotations

import pytest
from pydantic import SecretStr

from tests.services.conftest import NewSource
from vsql_shared.changes import TableName
from vsql_shared.pg import roles
from vsql_shared.pg.connect import connect

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


def test_a_producer_with_no_more_than_its_roles_privileges_streams_and_copies(
    new_source: NewSource,
) -> None:
    node = new_source(TABLES + "INSERT INTO one VALUES (1, 'before');", ["one", "two"])
    with connect(node.conninfo, application_name="test") as conn:
        roles.create(conn, {roles.PRODUCER: SecretStr("not needed here")})
        roles.grant_source(conn, {TableName("public", "one"): None, TableName("public", "two"): None})
    node.config.write_text(node.config.read_text().replace('user = "postgres"', f'user = "{roles.PRODUCER}"'))
    chain = node.add_copy()
    live = node.start()
    copy = node.start(chain, log="copy")
    node.wait(lambda: node.state()[0] == "running")
    end = "SELECT 1 FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND event_type = 'copy_finished'"
    node.wait(lambda: bool(node.query(end, chain)), what=node.log("copy"))
    node.execute("INSERT INTO one VALUES (2, 'after')")
    node.wait_confirmed()
    node.stop(copy)
    node.stop(live)
    assert [values[1] for _, values in node.read().rows("one")] == [b"after"]
    assert len(node.read(chain).changes) == 1
