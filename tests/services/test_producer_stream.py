"""What the live stream carries: large transactions and rows, TRUNCATE, other origins, types, keys, scope."""

from __future__ import annotations

import psycopg
import pytest

from tests.services.conftest import NewSource
from tests.stack import Stack
from vsql_shared.changes import Op
from vsql_shared.pg.connect import connect

TABLE = "CREATE TABLE t (id bigint PRIMARY KEY, note text)"
QUICK = "[limits]\nbatch_linger_ms = 1\nstatus_interval_ms = 100\ncommand_poll_ms = 100\n"


def key_of(value: bytes | None) -> int:
    return int.from_bytes(value or b"", "big")


def test_a_large_transaction_travels_in_fragments_between_two_small_ones(new_source: NewSource) -> None:
    config = QUICK + "batch_max_rows = 400\n"
    node = new_source(TABLE, ["t"], config=config)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.execute("INSERT INTO t VALUES (0, 'before')")
    node.execute("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 2000) g")
    node.execute("INSERT INTO t VALUES (2001, 'after')")
    node.wait_confirmed()
    node.stop(worker)
    back = node.read()
    assert [key_of(values[0]) for _, values in back.rows("t")] == list(range(2002))
    large = [m for m in back.manifests if m.row_count not in (1, 2)]
    assert [(m.row_count, m.continues) for m in large] == [(400, True)] * 4 + [(400, False)]
    ends = [m.batch_lsn_end for m in large]
    assert len(set(ends[:-1])) == 1
    assert ends[-1] > ends[0]
    starts = [m.batch_lsn_start for m in back.manifests][1:]
    assert starts == [m.batch_lsn_end for m in back.manifests][:-1]


def test_fragments_of_a_transaction_cut_off_by_a_kill_are_void_and_sent_anew(new_source: NewSource) -> None:
    config = QUICK + "batch_max_rows = 400\n"
    node = new_source(TABLE, ["t"], config=config)
    first = node.start(failpoints="producer.manifest-acked=kill:3")
    node.wait(lambda: node.state()[0] == "running")
    node.execute("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 3000) g")
    node.wait(lambda: first.poll() is not None)
    second = node.start(log="second")
    node.wait_confirmed()
    node.stop(second)
    back = node.read()
    openings = [entry.ref_sequence for entry in back.entries if entry.event_type == "epoch_opened"]
    assert openings[0] == 0
    assert openings[1] > 0
    assert [key_of(values[0]) for _, values in back.rows("t")] == list(range(1, 3001))


def test_a_row_larger_than_a_message_arrives_whole(new_source: NewSource) -> None:
    config = QUICK + 'message_max_bytes = "64KiB"\npack_max_bytes = "32KiB"\n'
    node = new_source(TABLE, ["t"], config=config)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.execute("INSERT INTO t VALUES (1, repeat('large', 60000)), (2, 'small')")
    node.wait_confirmed()
    node.stop(worker)
    assert [values[1] for _, values in node.read().rows("t")] == [b"large" * 60_000, b"small"]


def test_truncate_of_two_tables_is_two_records_of_one_position(new_source: NewSource) -> None:
    node = new_source(TABLE + "; CREATE TABLE u (id int PRIMARY KEY)", ["t", "u"], config=QUICK)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.execute("INSERT INTO t VALUES (1, 'a'); TRUNCATE t, u RESTART IDENTITY")
    node.wait_confirmed()
    node.stop(worker)
    _, one, two = node.read().changes
    assert (one.op, two.op, one.lsn == two.lsn) == (Op.TRUNCATE, Op.TRUNCATE, True)
    assert {one.table.table, two.table.table} == {"t", "u"}
    assert [change.plaintext for change in (one, two)] == [b"\2\0\0\0\2", b"\2\0\1\0\2"]


@pytest.mark.parametrize("version", [15, 18])
def test_changes_that_came_from_another_node_and_our_own_schema_are_not_sent(
    new_source: NewSource, version: int
) -> None:
    node = new_source(TABLE, ["t"], version=version, config=QUICK)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    origin = f"test_{node.cluster}"
    with psycopg.connect(node.conninfo) as conn:
        conn.execute("SELECT pg_replication_origin_create(%s)", [origin])
        conn.commit()
        conn.execute("SELECT pg_replication_origin_session_setup(%s)", [origin])
        conn.execute("INSERT INTO t VALUES (1, 'applied from elsewhere')")
    node.query("SELECT pg_replication_origin_drop(%s)::text", origin)
    node.execute("SELECT pg_logical_emit_message(true, 'app', 'hello'); INSERT INTO t VALUES (2, 'ours')")
    node.wait_confirmed()
    node.stop(worker)
    assert [key_of(values[0]) for _, values in node.read().rows("t")] == [2]


def test_a_type_bound_to_its_server_makes_the_session_text(new_source: NewSource) -> None:
    schema = (
        "CREATE TYPE mood AS ENUM ('sad'); CREATE TABLE t (id int PRIMARY KEY, a regclass, b mood[], c mood)"
    )
    node = new_source(schema, ["t"], config=QUICK)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.execute("INSERT INTO t VALUES (1, 'pg_class', '{sad}', 'sad')")
    node.wait_confirmed()
    node.stop(worker)
    back = node.read()
    assert back.rows("t") == [("I", (b"1", b"pg_class", b"{sad}", b"sad"))]
    assert [c.type_name for c in back.changes[0].relation.columns] == [
        "integer", "regclass", "public.mood[]", "public.mood"
    ]  # fmt: skip


def test_a_column_of_a_bound_type_added_later_restarts_the_session_as_text(new_source: NewSource) -> None:
    node = new_source(TABLE, ["t"], config=QUICK)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.execute("INSERT INTO t VALUES (1, 'binary')")
    node.wait_confirmed()
    node.execute("ALTER TABLE t ADD COLUMN ref regclass")
    node.execute("INSERT INTO t VALUES (2, 'text', 'pg_class')")
    node.wait_confirmed()
    node.stop(worker)
    assert node.read().rows("t") == [
        ("I", ((1).to_bytes(8, "big"), b"binary")),
        ("I", (b"2", b"text", b"pg_class")),
    ]


def test_an_idle_stream_confirms_while_another_database_writes(new_source: NewSource, stack: Stack) -> None:
    node = new_source(TABLE, ["t"], config=QUICK)
    other = stack.new_database(18, "other")
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    before = node.confirmed()
    entries = len(node.read().entries)
    node.execute("CREATE TABLE noise AS SELECT g FROM generate_series(1, 20000) g", other)
    wanted = int(node.query("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn")[0][0])
    node.wait(lambda: node.confirmed() >= wanted, 60, "an idle stream holds WAL")
    node.stop(worker)
    assert node.confirmed() > before
    assert len(node.read().entries) == entries


def test_a_data_key_is_replaced_by_force_before_it_has_sealed_too_much(new_source: NewSource) -> None:
    config = QUICK + "batch_max_rows = 100\n[encryption.dek]\nmax_tuples = 500\n"
    node = new_source(TABLE, ["t"], config=config)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    for start in range(0, 2000, 100):
        node.execute(f"INSERT INTO t SELECT g, 'x' FROM generate_series({start}, {start + 99}) g")
    node.wait_confirmed()
    node.stop(worker)
    back = node.read()
    assert len(back.rows("t")) == 2000
    used = dict(node.query("SELECT dek_id, tuples FROM vsql_sync.deks"))
    assert set(back.dek_ids) == set(used)
    assert len(used) >= 5
    assert max(used.values()) <= 500
    assert sum(used.values()) == sum(manifest.record_count for manifest in back.manifests)
    assert node.query("SELECT DISTINCT state FROM vsql_sync.deks") == [("retired",)]


def test_a_data_key_can_last_for_one_batch_and_be_replaced_by_command(new_source: NewSource) -> None:
    config = QUICK + '[encryption.dek]\nrotation = "per-batch"\n'
    node = new_source(TABLE, ["t"], config=config)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    for number in range(3):
        node.execute(f"INSERT INTO t VALUES ({number}, 'x')")
        node.wait_confirmed()
    node.stop(worker)
    assert len(set(node.read().dek_ids)) == 3
    node.config.write_text(node.config.read_text().replace("per-batch", "per-session"))
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    for number in range(10, 14):
        if number == 12:
            node.execute(
                "INSERT INTO vsql_sync.commands (role, chain, verb) VALUES ('producer', NULL, 'rotate-dek')"
            )
            node.wait(lambda: bool(node.query("SELECT 1 FROM vsql_sync.command_results WHERE ok")))
        node.execute(f"INSERT INTO t VALUES ({number}, 'x')")
        node.wait_confirmed()
    node.stop(worker)
    keys = node.read().dek_ids[3:]
    assert keys[0] == keys[1] != keys[2] == keys[3]


def test_pci_columns_are_named_in_every_manifest_that_carries_them(new_source: NewSource) -> None:
    schema = TABLE + "; CREATE TABLE cards (id int PRIMARY KEY, pan text)"
    node = new_source(schema, ["t", "cards"], config=QUICK, pci_columns=[("cards", "pan")])
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.execute("INSERT INTO t VALUES (1, 'a')")
    node.wait_confirmed()
    node.execute("INSERT INTO cards VALUES (1, '4111')")
    node.wait_confirmed()
    node.stop(worker)
    assert [(m.tables_affected, m.contains_pci, m.pci_columns) for m in node.read().manifests] == [
        (("public.t",), False, ()),
        (("public.cards",), True, ("public.cards.pan",)),
    ]


def test_a_table_that_was_put_into_the_publication_behind_our_back_stops_the_stream_before_it_is_sealed(
    new_source: NewSource,
) -> None:
    config = QUICK + "retry_backoff_max_ms = 500\n"
    node = new_source(TABLE + "; CREATE TABLE secret (id int PRIMARY KEY)", ["t"], config=config)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.execute("ALTER PUBLICATION pub ADD TABLE secret")
    node.execute("INSERT INTO secret VALUES (1)")
    node.wait(lambda: "public.secret" in str(node.state()[1].get("last_error")))
    assert node.state()[0] == "waiting"
    assert not [record for record in node.topics() if record.endswith(".secret")]
    node.execute("ALTER PUBLICATION pub DROP TABLE secret")
    node.stop(worker)


def test_a_paused_stream_sends_nothing_and_goes_on_when_it_is_resumed(new_source: NewSource) -> None:
    node = new_source(TABLE, ["t"], config=QUICK)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.execute("UPDATE vsql_sync.streams SET desired = 'paused'")
    node.wait(lambda: node.state()[0] == "paused")
    node.execute("INSERT INTO t VALUES (1, 'a')")
    node.wait(lambda: node.state()[1]["lag_bytes"] > 0)
    assert node.read().manifests == []
    node.execute("UPDATE vsql_sync.streams SET desired = 'running'")
    node.wait_confirmed()
    node.stop(worker)
    assert len(node.read().rows("t")) == 1


def test_a_wrong_topic_shape_is_said_and_waited_for(new_source: NewSource) -> None:
    node = new_source(TABLE, ["t"], config=QUICK + "retry_backoff_max_ms = 500\n")
    node.make_topic("audit")
    worker = node.start()
    node.wait(lambda: "expected compact" in str(node.state()[1].get("last_error")))
    assert node.state()[0] == "waiting"
    node.stop(worker)


def test_a_session_of_the_producer_writes_the_audit_trail_durably(new_source: NewSource) -> None:
    node = new_source(TABLE, ["t"], config=QUICK)
    database = node.query("SELECT quote_ident(current_database())")[0][0]
    with connect(node.conninfo, application_name="test") as conn:
        conn.execute(f"ALTER DATABASE {database} SET synchronous_commit = off")
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.execute("INSERT INTO t VALUES (1, 'a')")
    node.wait_confirmed()
    position = node.query(
        "SELECT max(kafka_offset) IS NOT NULL FROM vsql_sync.vsql_sync_audit WHERE chain = %s", node.chain
    )
    assert position == [(True,)]
    node.stop(worker)
