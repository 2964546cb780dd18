"""The audit trail on a real PostgreSQL: append-only, written in groups, and verified against a superuser."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest

from tests.audit_history import (
    ACKS,
    CHAIN,
    CLUSTER,
    B,
    History,
    acknowledged,
    incarnation,
    manifest_fields,
    ordinary,
    signer,
    trust,
)
from tests.conftest import NewDatabase
from vsql_consumers import control as consumer_control
from vsql_producers import control as producer_control
from vsql_shared.audit.chain import EMPTY_HEAD, ChainReader, ChainWriter
from vsql_shared.audit.rows import COLUMNS
from vsql_shared.audit.store import (
    PartitionKeeper,
    ensure_partitions,
    insert_entries,
    iterate,
    load_head,
    recall_head,
    remember_head,
)
from vsql_shared.audit.verify import Report, verify_table
from vsql_shared.config import LimitsSettings
from vsql_shared.errors import ChainError, DatabaseError, DecodeError
from vsql_shared.pg import roles
from vsql_shared.pg.connect import Connection, connect
from vsql_shared.pg.migrate import install

TABLE = "vsql_sync.vsql_sync_audit"


def store(conn: Connection, *histories: History) -> None:
    for history in histories:
        insert_entries(conn, [(encoded, offset) for offset, encoded in enumerate(history.documents)])


@pytest.fixture
def conn(new_schema: NewDatabase) -> Iterator[Connection]:
    with node(new_schema("audit")) as conn:
        yield conn


@contextmanager
def node(conninfo: str) -> Iterator[Connection]:
    """A node's database, with the schema as `node init` installs it."""
    with connect(conninfo, application_name="test") as conn:
        install(conn)
        yield conn


def as_attacker(conn: Connection, statement: str, *values: object) -> int:
    """Run a statement as superuser with the rules of every partition switched off; rows touched."""
    with conn.transaction():
        parts = conn.execute(f"SELECT relid::regclass::text FROM pg_partition_tree('{TABLE}')").fetchall()
        for (part,) in parts:
            for rule in ("no_update", "no_delete"):
                conn.execute(f"ALTER TABLE {part} DISABLE RULE {rule}")
        touched = conn.execute(statement, values).rowcount
        for (part,) in parts:
            for rule in ("no_update", "no_delete"):
                conn.execute(f"ALTER TABLE {part} ENABLE ALWAYS RULE {rule}")
    return touched


def check(conn: Connection, chain: str | None = None) -> Report:
    return verify_table(conn, trust(), CLUSTER, chain)


def test_entries_come_back_as_they_were_written(conn: Connection) -> None:
    history = ordinary()
    store(conn, history)
    assert [one.encoded for one in iterate(conn, CHAIN)] == history.documents
    assert [one.kafka_offset for one in iterate(conn, CHAIN, 5)] == list(range(4, len(history.documents)))
    row = conn.execute(f"SELECT * FROM {TABLE} WHERE sequence = 2").fetchone()
    assert row is not None
    assert row[1] == "replication_batch"
    assert row[7] == ["public.orders"]


RARE = {
    "the last one of a chain": "chain = %(chain)s AND event_type = %(type)s ORDER BY sequence DESC LIMIT 1",
    "all of a chain": "chain = %(chain)s AND event_type = %(type)s ORDER BY sequence",
    "all of a kind": "event_type = %(type)s AND chain IS NOT NULL",
}


@pytest.mark.parametrize("case", RARE)
@pytest.mark.parametrize("kind", ["checkpoint_cosigned", "operator_action"])
def test_a_rare_entry_is_found_without_reading_the_chain(conn: Connection, case: str, kind: str) -> None:
    """Services look for some at each start; there are millions of the others."""
    store(conn, ordinary(1_000))
    conn.execute(f"ANALYZE {TABLE}")
    row = conn.execute(
        f"EXPLAIN (ANALYZE, FORMAT JSON) SELECT document FROM {TABLE} WHERE {RARE[case]}".encode(),
        {"chain": CHAIN, "type": kind},
    ).fetchone()
    assert row is not None
    assert "vsql_sync_audit" in json.dumps(row[0])
    assert _removed(row[0][0]["Plan"]) == 0, row[0]


def _removed(plan: dict[str, Any]) -> int:
    """Rows that were read, and were not wanted."""
    return int(plan.get("Rows Removed by Filter", 0)) + sum(map(_removed, plan.get("Plans", ())))


def test_trail_of_two_chains_verifies_and_counts_its_tuples_without_abandoned_fragments(
    conn: Connection,
) -> None:
    source = ordinary(6)
    store(conn, source, acknowledged(source))
    report = check(conn)
    assert report.ok
    assert report.warnings == ()
    by_name = {one.chain: one for one in report.chains}
    assert by_name[CHAIN].tuples == 3 * 2 + 3 * 3
    assert by_name[CHAIN].abandoned_tuples == 9
    assert by_name[CHAIN].entries == len(source.entries)
    assert by_name[CHAIN].last_time == source.entries[-1].entry.event_timestamp
    assert by_name[ACKS].tuples == by_name[CHAIN].tuples


@pytest.mark.parametrize("shape", ["empty", "opened", "ordinary", "under way", "reopened", "acks"])
def test_head_read_from_the_table_is_the_head_the_reader_had(conn: Connection, shape: str) -> None:
    history = History()
    if shape in ("ordinary", "under way", "reopened", "acks"):
        history = ordinary(4)
    elif shape == "opened":
        history.open()
    if shape in ("under way", "reopened"):
        for _ in range(7):
            history.batch(continues=True)
        history.note()
    if shape == "reopened":
        history.open()
        history.open()
        history.note()
    if shape == "acks":
        history = acknowledged(history)
    store(conn, history)
    assert load_head(conn, history.chain) == history.head
    if history.entries:
        remembered = recall_head(conn, history.chain)
        assert remembered == (history.head, len(history.entries) - 1)
    else:
        assert recall_head(conn, CHAIN) is None


def test_writer_goes_on_from_the_head_in_the_table(conn: Connection) -> None:
    history = ordinary()
    store(conn, history)
    longer = History(head=load_head(conn, CHAIN))
    longer.open()
    longer.batch()
    store(conn, longer)
    assert check(conn).ok


def test_groups_of_any_size_extend_the_trail(conn: Connection) -> None:
    history = History()
    history.open()
    for _ in range(40):
        history.batch()
    documents = [(encoded, None) for encoded in history.documents]
    insert_entries(conn, documents[:1])
    insert_entries(conn, [])
    insert_entries(conn, documents[1:30])
    insert_entries(conn, documents[30:])
    assert check(conn).chains[0].entries == 41


def test_process_that_lost_its_epoch_cannot_write_to_the_trail(conn: Connection) -> None:
    history = History()
    history.open()
    store(conn, history)
    old = ChainWriter(history.by, CLUSTER, CHAIN, history.head, incarnation(1))
    late = old.next(**manifest_fields(1))
    history.open(2)
    insert_entries(conn, [(history.documents[-1], 1)])
    with pytest.raises(ChainError, match=r"epoch 1|fork|never opened"):
        insert_entries(conn, [(late.encoded, 2)])
    assert check(conn).chains[0].entries == 2


def test_two_first_writers_at_once_have_one_winner(conn: Connection) -> None:
    one, two = History(), History()
    one.open(1)
    two.open(2)
    with (
        connect(conn.info.dsn, application_name="rival") as rival,
        ThreadPoolExecutor(1) as pool,
    ):
        with conn.transaction():
            insert_entries(conn, [(one.documents[0], None)])
            late = pool.submit(insert_entries, rival, [(two.documents[0], None)])
            wait_for_lock(conn)
        with pytest.raises(ChainError, match="another process"):
            late.result(30)
    assert [found.encoded for found in iterate(conn, CHAIN)] == one.documents


def wait_for_lock(conn: Connection) -> None:
    """Until the rival waits for this transaction."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        waits = conn.execute(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE application_name = 'rival' AND wait_event_type = 'Lock'"
        ).fetchone()
        if waits == (1,):
            return
        # The statistics of a transaction are a snapshot: drop it.
        conn.execute("SELECT pg_stat_clear_snapshot()")
        time.sleep(0.02)
    raise AssertionError("the rival never waited")


def test_services_write_and_a_viewer_verifies_with_their_own_rights(conn: Connection) -> None:
    roles.create(conn)
    source = ordinary()
    conn.execute("SET ROLE vsql_sync_producer")
    store(conn, source)
    ensure_partitions(conn)
    assert load_head(conn, CHAIN) == source.head
    conn.execute("SET ROLE vsql_sync_consumer")
    store(conn, acknowledged(source))
    assert remember_head(conn, "bills.node-a", source.head, 1)
    conn.execute("SET ROLE vsql_sync_viewer")
    assert check(conn).ok
    with pytest.raises(DatabaseError, match="permission denied"):
        store(conn, History(chain="bills.node-c"), ordinary())
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        conn.execute(f"TRUNCATE {TABLE}")


@pytest.mark.parametrize("skipped", [0, 3, 8])
def test_entry_that_does_not_follow_is_not_written(conn: Connection, skipped: int) -> None:
    documents = [(encoded, None) for encoded in ordinary().documents]
    with pytest.raises(ChainError):
        insert_entries(conn, documents[:skipped] + documents[skipped + 1 :])
    assert list(iterate(conn, CHAIN)) == []


def test_garbage_is_not_written(conn: Connection) -> None:
    with pytest.raises(DecodeError):
        insert_entries(conn, [(b"garbage", None)])


def test_remembered_head_only_moves_forward(conn: Connection) -> None:
    reader = ChainReader(CLUSTER, CHAIN, "node-a", trust())
    heads = []
    for encoded in ordinary().documents:
        reader.accept(encoded, "here")
        heads.append(reader.head)
    assert remember_head(conn, CHAIN, heads[4], 40)
    assert not remember_head(conn, CHAIN, heads[3], 30)
    assert recall_head(conn, CHAIN) == (heads[4], 40)
    assert remember_head(conn, CHAIN, heads[5], None)
    assert recall_head(conn, CHAIN) == (heads[5], None)


def test_head_of_an_own_chain_is_not_replaced_by_what_a_peer_says(conn: Connection) -> None:
    store(conn, ordinary())
    higher = ordinary(20).head
    assert not remember_head(conn, CHAIN, higher, None)
    assert check(conn).ok


@pytest.mark.parametrize("role", ["origin", "replica"])
@pytest.mark.parametrize("where", [TABLE, "vsql_sync.vsql_sync_audit_default"])
@pytest.mark.parametrize("statement", ["UPDATE {} SET row_count = 9", "DELETE FROM {}"])
def test_update_and_delete_do_nothing(conn: Connection, statement: str, where: str, role: str) -> None:
    store(conn, ordinary())
    conn.execute(f"SET session_replication_role = {role}")
    assert conn.execute(statement.format(where)).rowcount == 0
    assert check(conn).ok


@pytest.mark.parametrize("where", [TABLE, "vsql_sync.vsql_sync_audit_default"])
def test_truncate_is_refused(conn: Connection, where: str) -> None:
    store(conn, ordinary())
    conn.execute("SET session_replication_role = replica")
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
        conn.execute(f"TRUNCATE {where}")
    assert check(conn).ok


def test_months_have_partitions_that_are_append_only_too(conn: Connection) -> None:
    ensure_partitions(conn)
    name = conn.execute("SELECT vsql_sync.ensure_audit_partition(now() + interval '3 months')").fetchone()
    again = conn.execute("SELECT vsql_sync.ensure_audit_partition(now() + interval '3 months')").fetchone()
    assert name == again
    assert name is not None
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        conn.execute(f"TRUNCATE vsql_sync.{name[0]}")
    assert check(conn).warnings == ()


def test_entry_of_this_month_lies_in_its_partition(conn: Connection) -> None:
    history = History()
    history._clock = int(datetime.now(UTC).timestamp() * 1_000_000)
    history.open()
    store(conn, history)
    where = conn.execute(f"SELECT tableoid::regclass::text FROM {TABLE}").fetchone()
    assert where == (f"vsql_sync.vsql_sync_audit_p{datetime.now(UTC):%Y%m}",)
    assert check(conn).ok


def test_month_with_entries_in_the_default_partition_stays_there(conn: Connection) -> None:
    history = History()
    history._clock = int((datetime.now(UTC).timestamp() + 100 * 86_400) * 1_000_000)
    history.open()
    store(conn, history)
    moment = history.entries[0].entry.event_timestamp // 1_000_000
    made = conn.execute("SELECT vsql_sync.ensure_audit_partition(to_timestamp(%s))", (moment,)).fetchone()
    assert made == (None,)
    assert check(conn).ok


def test_partition_far_from_now_is_refused(conn: Connection) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        conn.execute("SELECT vsql_sync.ensure_audit_partition('2199-01-01')")


# Each column changed alone: (column, another value).
CHANGES: dict[str, str] = {
    "event_id": "gen_random_uuid()",
    "event_type": "'batch_applied'",
    "event_timestamp": "event_timestamp + interval '1 microsecond'",
    "source_node_id": "'node-b'",
    "target_node_id": "'node-b'",
    "batch_lsn_start": "'0/1'",
    "batch_lsn_end": "'7/1'",
    "tables_affected": "array_append(tables_affected, 'public.x')",
    "row_count": "row_count + 1",
    "contains_pci": "false",
    "pci_columns": "NULL",
    "dek_id": "'dek-2'",
    "kek_id": "NULL",
    "algorithm": "'AES-128-GCM'",
    "merkle_root": "sha256('x')",
    "prev_event_hash": "sha256('x')",
    "signer_node_id": "'node-b'",
    "signature": "set_byte(signature, 5, get_byte(signature, 5) # 1)",
    "epoch": "epoch + 1",
    "incarnation": "gen_random_uuid()",
    "batch": "batch + 1",
    "signer_key": "'SHA256:x'",
    "document": "set_byte(document, 300, get_byte(document, 300) # 1)",
}


@pytest.mark.parametrize("column", CHANGES)
def test_change_of_any_column_is_found_and_located(conn: Connection, column: str) -> None:
    store(conn, ordinary())
    assert as_attacker(conn, f"UPDATE {TABLE} SET {column} = {CHANGES[column]} WHERE sequence = 3") == 1
    report = check(conn)
    assert [(one.chain, one.sequence) for one in report.problems] == [(CHAIN, 3)]
    assert report.problems[0].event_id is not None


def test_every_column_of_the_document_is_among_the_changes() -> None:
    assert set(COLUMNS) - set(CHANGES) == {"chain", "sequence"}


@pytest.mark.parametrize("moment", ["'infinity'", "'-infinity'", "'200000-01-01'"])
def test_time_beyond_the_calendar_is_found_and_located(conn: Connection, moment: str) -> None:
    store(conn, ordinary())
    as_attacker(conn, f"UPDATE {TABLE} SET event_timestamp = {moment} WHERE sequence = 3")
    assert [one.sequence for one in check(conn).problems] == [3]


def copy_of(row: int, **other: object) -> str:
    """INSERT a copy of a row with some columns changed."""
    changed = json.dumps({"event_id": "00000000-0000-4000-8000-000000000001", **other})
    return (
        f"INSERT INTO {TABLE} SELECT (jsonb_populate_record(a, '{changed}')).* FROM {TABLE} a"
        f" WHERE sequence = {row} AND chain = '{CHAIN}'"
    )


SWAP = (
    f"UPDATE {TABLE} a SET document = b.document FROM {TABLE} b"
    " WHERE (a.sequence, b.sequence) IN ((3, 4), (4, 3))"
)
TAKE = (
    f"UPDATE {TABLE} SET document = (SELECT document FROM {TABLE} WHERE chain = '{ACKS}')"
    f" WHERE chain = '{CHAIN}' AND sequence = 4"
)
NOT_SIGNED = "not a signed document"

# (what a superuser does, first bad sequence, words of the report)
ATTACKS: dict[str, tuple[str, int, str]] = {
    "delete one": (f"DELETE FROM {TABLE} WHERE sequence = 4", 4, "missing"),
    "delete the first": (f"DELETE FROM {TABLE} WHERE sequence = 1", 1, "missing"),
    "delete the last": (f"DELETE FROM {TABLE} WHERE sequence = 11", 11, "cut at its end"),
    "delete a tail": (f"DELETE FROM {TABLE} WHERE sequence > 5", 6, "cut at its end"),
    "delete all": (f"DELETE FROM {TABLE}", 1, "cut at its end"),
    "move a row": (f"UPDATE {TABLE} SET sequence = 100 WHERE sequence = 4", 4, "missing"),
    "swap documents": (SWAP, 3, "gap"),
    "give away a row": (f"UPDATE {TABLE} SET chain = 'orders.node-c' WHERE sequence = 4", 4, "missing"),
    "take another chain's document": (TAKE, 4, f"an entry of chain {ACKS}"),
    "double a row": (copy_of(4), 4, "differs from its signed document"),
    "append a copy": (copy_of(11, sequence=12), 12, "repetition"),
    "append an old copy": (copy_of(3, sequence=12), 12, "epoch 1, which ended"),
    "insert before all": (copy_of(4, sequence=0), 0, "too many"),
    "garbage document": (f"UPDATE {TABLE} SET document = '\\x00' WHERE sequence = 4", 4, NOT_SIGNED),
    "empty document": (f"UPDATE {TABLE} SET document = '' WHERE sequence = 4", 4, NOT_SIGNED),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_superuser_without_the_key_is_found_out(conn: Connection, attack: str) -> None:
    statement, sequence, words = ATTACKS[attack]
    history = ordinary()
    assert len(history.entries) == 11
    short = History(ACKS, B)
    short.open()
    store(conn, history, short)
    assert as_attacker(conn, statement) > 0
    report = check(conn, CHAIN)
    assert [one.sequence for one in report.problems] == [sequence]
    assert words in report.problems[0].what
    assert not check(conn).ok


def test_row_without_a_chain_is_found(conn: Connection) -> None:
    store(conn, ordinary())
    conn.execute(f"ALTER TABLE {TABLE} ALTER chain DROP NOT NULL")
    as_attacker(conn, f"UPDATE {TABLE} SET chain = NULL WHERE sequence = 11")
    assert "a row without a chain" in [one.what for one in check(conn).problems]


def test_truncated_trail_is_found(conn: Connection) -> None:
    store(conn, ordinary())
    conn.execute("ALTER TABLE vsql_sync.vsql_sync_audit_default DISABLE TRIGGER no_truncate")
    conn.execute("TRUNCATE vsql_sync.vsql_sync_audit_default")
    report = check(conn)
    assert [one.sequence for one in report.problems] == [1]
    assert "vsql_sync_audit_default" in report.warnings[0]


def test_trail_signed_anew_with_a_key_nobody_pinned_is_found(conn: Connection) -> None:
    forged = History(by=signer("node-a", "thief"))
    forged.open()
    forged.batch()
    store(conn, forged)
    problem = check(conn).problems[0]
    assert problem.sequence == 1
    assert "not pinned" in problem.what


def test_entry_signed_by_a_peer_in_this_nodes_chain_is_found(conn: Connection) -> None:
    forged = History(by=B)
    forged.open()
    store(conn, forged)
    assert "node-a" in check(conn).problems[0].what


def test_trail_of_another_cluster_is_found(conn: Connection) -> None:
    foreign = History(cluster="other")
    foreign.open()
    store(conn, foreign)
    assert "cluster" in check(conn).problems[0].what


def test_name_that_is_no_chain_is_found(conn: Connection) -> None:
    odd = History(chain="nonsense")
    odd.open()
    store(conn, odd)
    assert "not the name of a chain" in check(conn).problems[0].what


def test_switched_off_rule_is_warned_of(conn: Connection) -> None:
    store(conn, ordinary())
    conn.execute(f"ALTER TABLE {TABLE} DISABLE RULE no_delete")
    report = check(conn)
    assert report.ok
    assert len(report.warnings) == 1


RULES = {
    "of what a base lets go, and more": f"CREATE OR REPLACE RULE no_delete AS ON DELETE TO {TABLE}"
    " WHERE NOT EXISTS (SELECT FROM vsql_sync.audit_bases b WHERE b.chain = OLD.chain"
    " AND b.size >= OLD.sequence) AND OLD.row_count > 0 DO INSTEAD NOTHING",
    "of something else": f"DROP RULE no_update ON {TABLE};"
    f" CREATE RULE no_update AS ON INSERT TO {TABLE} WHERE false DO INSTEAD NOTHING;"
    f" ALTER TABLE {TABLE} ENABLE ALWAYS RULE no_update",
    "that does something else": f"CREATE OR REPLACE RULE no_update AS ON UPDATE TO {TABLE}"
    " DO INSTEAD SELECT 1",
}


@pytest.mark.parametrize("case", RULES)
def test_a_rule_that_protects_less_under_its_old_name_is_warned_of(conn: Connection, case: str) -> None:
    store(conn, ordinary())
    assert check(conn).warnings == ()
    conn.execute(RULES[case].encode())
    assert len(check(conn).warnings) == 1


def test_altered_memory_is_warned_of(conn: Connection) -> None:
    store(conn, ordinary())
    conn.execute("UPDATE vsql_sync.chain_heads SET sequence = 4")
    assert "remembered head was altered" in check(conn).warnings[0]
    conn.execute("UPDATE vsql_sync.chain_heads SET sequence = 11, entry_hash = sha256('x')")
    assert [one.sequence for one in check(conn).problems] == [11]


def test_verification_of_one_chain_leaves_the_others_alone(conn: Connection) -> None:
    source = ordinary()
    store(conn, source, acknowledged(source))
    as_attacker(conn, f"DELETE FROM {TABLE} WHERE chain = '{CHAIN}' AND sequence = 2")
    assert check(conn, ACKS).ok
    assert [one.chain for one in check(conn).problems] == [CHAIN]


def test_database_without_the_schema_is_one_clear_error(new_database: NewDatabase) -> None:
    with connect(new_database("bare"), application_name="test") as bare:
        actions: list[Callable[[], object]] = [
            lambda: check(bare),
            lambda: load_head(bare, CHAIN),
            lambda: insert_entries(bare, [(ordinary().documents[0], None)]),
        ]
        for action in actions:
            with pytest.raises(DatabaseError, match="audit trail"):
                action()


@pytest.mark.parametrize("version", [15, 16, 17])
def test_trail_is_written_and_verified_on_older_servers(new_schema: NewDatabase, version: int) -> None:
    with node(new_schema("audit", version=version)) as conn:
        store(conn, ordinary())
        ensure_partitions(conn)
        assert check(conn).ok
        assert check(conn).warnings == ()
        assert as_attacker(conn, f"DELETE FROM {TABLE} WHERE sequence = 4") == 1
        assert [one.sequence for one in check(conn).problems] == [4]


def test_empty_chain_has_the_empty_head(conn: Connection) -> None:
    assert load_head(conn, CHAIN) == EMPTY_HEAD
    assert check(conn).chains == ()


NEXT_MONTH = "SELECT to_regclass('vsql_sync.vsql_sync_audit_p' || to_char({}, 'YYYYMM'))::text".format(
    "date_trunc('month', now(), 'UTC') + interval '1 month'"
)


def drop_next_month(conn: Connection) -> str:
    """As if this node had been running since the month before last."""
    [(name,)] = conn.execute(NEXT_MONTH.encode()).fetchall()
    conn.execute(f"DROP TABLE {name}")
    return str(name)


def test_a_months_partition_is_made_while_a_service_runs_on(conn: Connection) -> None:
    ensure_partitions(conn)
    keeper = PartitionKeeper(conn, every=3600)
    assert not keeper.keep(1000.0), "the services have just made them"
    name = drop_next_month(conn)
    assert not keeper.keep(4599.0)
    assert conn.execute(NEXT_MONTH.encode()).fetchall() == [(None,)]
    assert keeper.keep(4600.0)
    assert conn.execute(NEXT_MONTH.encode()).fetchall() == [(name,)]
    assert not keeper.keep(4601.0)
    assert keeper.keep(8200.0), "once an interval, needed or not"


def test_a_reader_of_the_trail_does_not_hold_up_the_service_that_wants_a_partition(
    conn: Connection,
) -> None:
    ensure_partitions(conn)
    keeper = PartitionKeeper(conn, every=3600)
    keeper.keep(0.0)
    drop_next_month(conn)
    with connect(conn.info.dsn, application_name="test", autocommit=False) as reader:
        reader.execute(f"SELECT count(*) FROM {TABLE}")
        began = time.monotonic()
        assert not keeper.keep(3600.0)
        assert time.monotonic() - began < 10
        assert not keeper.keep(3601.0), "not at every turn"
    assert keeper.keep(7200.0)
    assert conn.execute(NEXT_MONTH.encode()).fetchall() != [(None,)]


@pytest.mark.parametrize("control", [producer_control.Control, consumer_control.Control])
def test_services_look_after_the_partitions_whenever_they_write_their_status(
    conn: Connection, control: type[producer_control.Control | consumer_control.Control]
) -> None:
    ensure_partitions(conn)
    limits = LimitsSettings()
    made = control(conn, CHAIN, limits, partitions_every=0.2)

    def say() -> None:
        if isinstance(made, producer_control.Control):
            made.say("running", {}, time.monotonic())
        else:
            made.say("running", {})

    say()
    drop_next_month(conn)
    time.sleep(0.3)
    say()
    assert conn.execute(NEXT_MONTH.encode()).fetchall() != [(None,)]
