"""The applier's rules, one by one: order, folding, exactly once, anomalies, the first copy's positions."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from tests.conftest import NewDatabase
from tests.services.apply_pair import MakePair, Pair, finish, note_progress, pairs
from tests.services.apply_source import add_change, empty_batch
from vsql_consumers.apply import Applier
from vsql_consumers.write import ApplyLimits
from vsql_shared import lsn
from vsql_shared.changes import SEQUENCES, Column, Op, Relation, TableName, Transaction
from vsql_shared.errors import DatabaseError, DecodeError, TransientError
from vsql_shared.wire.signals import SequenceState, SequenceValue, encode_sequence

T = TableName("public", "t")
TABLE = "CREATE TABLE public.t (id int PRIMARY KEY, v text)"

FAILS_AT_COMMIT = """
CREATE TABLE public.late (x int); CREATE TABLE public.on_time (x int);
CREATE FUNCTION public.no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'secret %', new.x; END $$;
CREATE CONSTRAINT TRIGGER no AFTER INSERT ON public.late DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION public.no();
ALTER TABLE public.late ENABLE ALWAYS TRIGGER no"""

SEQUENCE_SYNC = """
CREATE TABLE vsql_sync.sequence_sync (chain TEXT, sequence_schema TEXT, sequence_name TEXT, last_value BIGINT,
    is_called BOOLEAN, set_back BIGINT, applied_at TIMESTAMPTZ DEFAULT now(),
    PRIMARY KEY (chain, sequence_schema, sequence_name))"""


@pytest.fixture
def make_pair(new_database: NewDatabase) -> Iterator[MakePair]:
    """Pairs of databases."""
    yield from pairs(new_database)


@pytest.fixture
def pair(make_pair: MakePair) -> Pair:
    return make_pair()


def test_inserts_are_copied_and_mixed_changes_are_folded_without_a_replay(pair: Pair) -> None:
    pair.tables(TABLE)
    pair.do("INSERT INTO t SELECT i, 'v' || i FROM generate_series(1, 3000) i")
    assert pair.carry() == [{"applied": 3000}]
    for i in range(1, 200):
        pair.do(f"UPDATE t SET v = v || '!' WHERE id = {i % 50}")
    pair.do("DELETE FROM t WHERE id % 5 = 0", "INSERT INTO t VALUES (5, NULL)", "DELETE FROM t WHERE id = 5")
    pair.do("UPDATE t SET id = id + 10000 WHERE id BETWEEN 100 AND 200")
    pair.carry()
    pair.equal("public.t")
    ways = pair.current().ways
    assert ways["copied"] == 3000
    assert ways["replayed"] == ways["upserted"] == 0
    assert ways["folded"] == sum(ways.values()) - 3000 > 800


def test_a_change_is_applied_once_however_often_it_is_given_before_the_commit(pair: Pair) -> None:
    pair.tables("CREATE TABLE public.t (v text); ALTER TABLE t REPLICA IDENTITY FULL")
    pair.do("INSERT INTO t VALUES ('a'), ('a')", "UPDATE t SET v = 'b' WHERE ctid = '(0,1)'")
    batches = pair.source.batches()
    applier = pair.current()
    for _ in range(3):
        assert applier.apply(batches) == [{"applied": 3}]
        applier.abort()
    assert pair.target.execute("SELECT count(*) FROM t").fetchone() == (0,)
    applier.apply(batches)
    finish(applier, batches)
    pair.equal("public.t")
    assert pair.target.execute("SELECT batch FROM vsql_sync.progress").fetchall() == [(batches[-1].batch,)]


def test_what_is_written_before_the_commit_fails_with_it(pair: Pair) -> None:
    pair.tables(TABLE)
    pair.do("INSERT INTO t VALUES (1, 'a')")
    batches = pair.source.batches()
    applier = pair.current()
    applier.apply(batches)

    def refuse(conn: psycopg.Connection[tuple[object, ...]]) -> None:
        note_progress(conn, 99)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        applier.finish(5, 0, refuse)
    assert pair.target.execute("SELECT count(*) FROM vsql_sync.progress").fetchone() == (0,)
    applier.apply(batches)
    finish(applier, batches)
    pair.equal("public.t")


def test_the_commit_carries_the_origins_position_and_time_and_no_later_one_does(pair: Pair) -> None:
    pair.tables(TABLE)
    pair.do("INSERT INTO t VALUES (1, 'a')")
    batches = pair.source.batches()
    applier = pair.current()
    applier.apply(batches)
    at = finish(applier, batches)
    row = pair.target.execute(
        "SELECT remote_lsn::text, local_lsn::text FROM pg_show_replication_origin_status()"
        " WHERE external_id = %s",
        (pair.origin,),
    ).fetchone()
    assert row == (lsn.text(batches[-1].lsn_end), lsn.text(at))
    stamp = pair.target.execute(
        "SELECT (extract(epoch FROM c.timestamp) * 1000000)::bigint, o.roname"
        " FROM t, pg_xact_commit_timestamp_origin(t.xmin) c"
        " JOIN pg_replication_origin o ON o.roident = c.roident"
    ).fetchone()
    assert stamp == (batches[-1].transactions[-1].commit_time, pair.origin)
    # A commit that was given a position and then fails must not leave it to the next one.
    pair.target.execute(FAILS_AT_COMMIT)
    with pytest.raises(DatabaseError):
        applier.finish(batches[-1].lsn_end + 1_000_000, 0, _write_late)
    pair.appliers[-1].execute("INSERT INTO public.on_time VALUES (1)")
    again = pair.target.execute(
        "SELECT remote_lsn::text FROM pg_show_replication_origin_status() WHERE external_id = %s",
        (pair.origin,),
    ).fetchone()
    assert again == (row[0],)


def _write_late(conn: psycopg.Connection[tuple[object, ...]]) -> None:
    conn.execute("INSERT INTO public.late VALUES (1)")


def test_rule_12_rows_written_earlier_in_the_same_transaction_are_found(pair: Pair) -> None:
    pair.tables(TABLE)
    pair.do(
        "INSERT INTO t SELECT i, 'new' FROM generate_series(1, 20) i",
        "UPDATE t SET v = 'changed' WHERE id <= 10",
        "DELETE FROM t WHERE id > 15",
        "UPDATE t SET id = id + 100 WHERE id < 3",
        "INSERT INTO t VALUES (1, 'again')",
    )
    batches = pair.source.batches(max_rows=7)
    applier = pair.current()
    assert [batch.continues for batch in batches] == [True] * (len(batches) - 1) + [False]
    for batch in batches:
        applier.apply([batch])
    finish(applier, batches)
    pair.equal("public.t")
    assert pair.anomalies() == {}


def test_values_of_unique_columns_that_rows_swap_arrive(pair: Pair) -> None:
    pair.tables("CREATE TABLE public.t (id int PRIMARY KEY, u int UNIQUE, v text)")
    pair.do("INSERT INTO t SELECT i, i, '' FROM generate_series(1, 10) i")
    pair.carry()
    pair.do(
        "UPDATE t SET u = -1 WHERE id = 1",
        "UPDATE t SET u = 1 WHERE id = 2",
        "UPDATE t SET u = 2 WHERE id = 1",
        "UPDATE t SET v = 'seen' WHERE id > 5",
    )
    pair.do(
        "UPDATE t SET id = 99 WHERE id = 3",
        "UPDATE t SET id = 3 WHERE id = 4",
        "UPDATE t SET id = 4 WHERE id = 99",
    )
    pair.carry()
    pair.equal("public.t")
    assert pair.anomalies() == {}
    assert pair.current().ways["replayed"] > 0


def test_rule_11_an_insert_and_delete_of_a_row_that_is_there_still_deletes_it(pair: Pair) -> None:
    pair.tables(TABLE)
    pair.target.execute("INSERT INTO t VALUES (1, 'mine')")
    pair.do("INSERT INTO t VALUES (1, 'a')", "DELETE FROM t WHERE id = 1")
    assert pair.carry() == [{"applied": 2}]
    pair.equal("public.t")
    assert pair.anomalies() == {"insert_exists": 1}


def test_an_insert_of_a_key_that_is_there_becomes_an_update(pair: Pair) -> None:
    pair.tables(TABLE, TABLE + "; ALTER TABLE t ADD extra text DEFAULT 'x'")
    pair.target.execute("INSERT INTO t VALUES (1, 'mine', 'kept'), (2, 'mine', 'kept')")
    pair.do("INSERT INTO t SELECT i, 'new' FROM generate_series(1, 50) i")
    assert pair.carry() == [{"applied": 50}]
    assert pair.target.execute("SELECT * FROM t ORDER BY id LIMIT 3").fetchall() == [
        (1, "new", "kept"), (2, "new", "kept"), (3, "new", "x")
    ]  # fmt: skip
    assert pair.anomalies() == pair.current().anomalies == {"insert_exists": 2}
    assert pair.current().ways["upserted"] == 50


def test_missing_rows_are_counted_by_batch_and_table_and_the_stream_goes_on(pair: Pair) -> None:
    pair.tables(TABLE + "; ALTER TABLE t ALTER v SET STORAGE EXTERNAL")
    pair.do("INSERT INTO t SELECT i, repeat('x', 3000) FROM generate_series(1, 6) i")
    pair.carry()
    pair.target.execute("DELETE FROM t WHERE id IN (1, 2, 3)")
    pair.do("UPDATE t SET v = 'new' WHERE id < 3", "UPDATE t SET v = 'new' WHERE id = 6")
    pair.do("DELETE FROM t WHERE id IN (3, 4)", "UPDATE t SET id = 20 WHERE id = 2")
    verdicts = pair.carry()
    assert verdicts == [{"applied": 1, "missing": 2}, {"applied": 1, "missing": 2}]
    assert pair.target.execute("SELECT id FROM t ORDER BY 1").fetchall() == [(5,), (6,)]
    assert pair.anomalies() == pair.current().anomalies == {"update_missing": 3, "delete_missing": 1}
    last = pair.target.execute("SELECT max(last_batch) FROM vsql_sync.anomalies").fetchone()
    assert last == (pair.source.batch - 1,)


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("UPDATE t SET v = 'b' WHERE id = 1", "update_missing"),
        ("DELETE FROM t WHERE id = 1", "delete_missing"),
        ("INSERT INTO t VALUES (7, 'secret')", "insert_exists"),
    ],
)
def test_on_anomaly_stop_names_the_change_and_writes_nothing(pair: Pair, statement: str, kind: str) -> None:
    pair.tables(TABLE)
    pair.do("INSERT INTO t VALUES (1, 'a'), (2, 'a')")
    pair.carry()
    pair.appliers.pop().close()
    pair.target.execute("DELETE FROM t WHERE id = 1; INSERT INTO t VALUES (7, 'mine')")
    pair.do("UPDATE t SET v = 'other' WHERE id = 2", statement)
    applier = pair.applier(on_anomaly="stop")
    batches = pair.source.batches()
    with pytest.raises(DatabaseError, match=rf"{kind} at public.t \(batch {batches[0].batch}, change 1\)"):
        applier.apply(batches)
    assert pair.target.execute("SELECT * FROM t ORDER BY 1").fetchall() == [(2, "a"), (7, "mine")]
    pair.target.execute("DELETE FROM t WHERE id = 7; INSERT INTO t VALUES (1, 'a')")
    applier.apply(batches)
    finish(applier, batches)
    pair.equal("public.t")


def test_truncate_of_several_tables_is_one_truncate(pair: Pair) -> None:
    ddl = (
        "CREATE TABLE public.a (id int PRIMARY KEY);"
        "CREATE TABLE public.b (id serial PRIMARY KEY, a int REFERENCES public.a)"
    )
    pair.tables(ddl)
    pair.do("INSERT INTO a VALUES (1), (2)", "INSERT INTO b (a) VALUES (1), (2)")
    pair.target.execute("SELECT setval('b_id_seq', 100)")
    pair.do("INSERT INTO a VALUES (3)", "TRUNCATE a, b RESTART IDENTITY", "INSERT INTO a VALUES (9)")
    assert [sum(v.values()) for v in pair.carry()] == [4, 4]
    pair.equal("public.a", "public.b")
    assert pair.target.execute("SELECT nextval('b_id_seq')").fetchone() == (1,)
    pair.do("TRUNCATE a CASCADE")
    pair.carry()
    pair.equal("public.a", "public.b")


def test_truncate_of_a_partitioned_target_and_between_changes_of_one_row(pair: Pair) -> None:
    pair.tables(
        TABLE,
        "CREATE TABLE public.t (id int PRIMARY KEY, v text) PARTITION BY HASH (id);"
        "CREATE TABLE public.t0 PARTITION OF public.t FOR VALUES WITH (MODULUS 1, REMAINDER 0)",
    )
    pair.do("INSERT INTO t VALUES (1, 'a'), (2, 'a')", "TRUNCATE t", "INSERT INTO t VALUES (1, 'b')")
    pair.carry()
    pair.equal("public.t")


def test_a_truncate_whose_tables_lie_in_two_fragments_is_run_at_its_last_table(pair: Pair) -> None:
    pair.tables(
        "CREATE TABLE public.a (id int PRIMARY KEY); CREATE TABLE public.b (id int REFERENCES public.a)"
    )
    pair.do("INSERT INTO a VALUES (1)", "INSERT INTO b VALUES (1)", "TRUNCATE a, b")
    batches = pair.source.batches(max_rows=3)
    assert [batch.ops[-1] for batch in batches] == [Op.TRUNCATE, Op.TRUNCATE]
    applier = pair.current()
    assert [applier.apply([batch]) for batch in batches] == [[{"applied": 3}], [{"applied": 1}]]
    finish(applier, batches)
    pair.equal("public.a", "public.b")


def test_rule_13_changes_the_first_copy_has_seen_are_passed_over(pair: Pair) -> None:
    pair.tables(TABLE + "; CREATE TABLE public.other (id int)")
    pair.do("INSERT INTO t VALUES (1, 'a'), (2, 'a')", "INSERT INTO other VALUES (1)")
    pair.do("UPDATE t SET v = 'b' WHERE id = 1", "DELETE FROM t WHERE id = 2")
    batches = pair.source.batches()
    copied_at = batches[1].transactions[0].commit_lsn + 1
    pair.target.execute("INSERT INTO t VALUES (1, 'b')")
    pair.do("UPDATE t SET v = 'c' WHERE id = 1", "INSERT INTO other VALUES (2)")
    batches += pair.source.batches()
    applier = pair.applier(skip={T: copied_at})
    assert applier.apply(batches) == [{"applied": 3}, {"applied": 2}, {"applied": 2}]
    finish(applier, batches)
    pair.equal("public.t", "public.other")
    assert pair.anomalies() == {}


def test_rule_13_one_batch_is_split_where_the_copy_was_made(pair: Pair) -> None:
    pair.tables(TABLE)
    relation = Relation(T, "d", (Column("id", True, 23, -1, "integer"), Column("v", False, 25, -1, "text")))
    batch = empty_batch()
    for number in range(1, 7):
        plain = b"N\0\2" + b"b\0\0\0\4" + number.to_bytes(4, "big") + b"n"
        add_change(batch, relation, Op.INSERT, plain, Transaction(number, 100 * number, 0))
    applier = pair.applier(skip={T: 301})
    assert applier.apply([batch]) == [{"applied": 6}]
    finish(applier, [batch])
    assert pair.target.execute("SELECT id FROM t ORDER BY 1").fetchall() == [(4,), (5,), (6,)]


def test_rule_13_a_truncate_leaves_alone_the_table_whose_copy_has_seen_it(pair: Pair) -> None:
    pair.tables(
        "CREATE TABLE public.a (id int PRIMARY KEY); CREATE TABLE public.b (id int REFERENCES public.a)"
    )
    pair.do("INSERT INTO a VALUES (1)")
    pair.do("TRUNCATE a, b CASCADE")
    batches = pair.source.batches()
    pair.target.execute("INSERT INTO a VALUES (5); INSERT INTO b VALUES (5)")
    copied_at = batches[-1].transactions[-1].commit_lsn + 1
    applier = pair.applier(skip={TableName("public", "b"): copied_at})
    assert applier.apply(batches) == [{"applied": 1}, {"applied": 2}]
    finish(applier, batches)
    assert pair.target.execute("SELECT * FROM a").fetchall() == []
    assert pair.target.execute("SELECT * FROM b").fetchall() == [(5,)]


def test_rows_of_a_first_copy_arrive_also_where_types_differ_or_rows_are_there(pair: Pair) -> None:
    pair.tables(TABLE, TABLE + "; CREATE TABLE public.w (v text, id numeric PRIMARY KEY)")
    pair.target.execute("INSERT INTO t VALUES (3, 'mine')")
    batch = empty_batch()
    for name in ("t", "w"):
        columns = (Column("id", True, 23, -1, "integer"), Column("v", False, 25, -1, "text"))
        for number in range(1, 6):
            plain = b"\0\2" + b"\0\0\0\4" + number.to_bytes(4, "big") + b"\0\0\0\1x"
            add_change(batch, Relation(TableName("public", name), "d", columns), Op.COPY, plain)
    applier = pair.current()
    assert applier.apply([batch]) == [{"applied": 10}]
    finish(applier, [batch])
    for name in ("t", "w"):
        rows = pair.target.execute(f"SELECT id, v FROM {name} ORDER BY id").fetchall()
        assert rows == [(n, "x") for n in range(1, 6)]
    assert pair.anomalies() == {"insert_exists": 1}


def test_copied_rows_and_changes_of_one_table_keep_their_order(pair: Pair) -> None:
    pair.tables(TABLE)
    relation = Relation(T, "d", (Column("id", True, 23, -1, "integer"), Column("v", False, 25, -1, "text")))
    batch = empty_batch()
    add_change(batch, relation, Op.COPY, b"\0\2" + b"\0\0\0\4\0\0\0\1" + b"\0\0\0\1x")
    add_change(batch, relation, Op.UPDATE, b"N\0\2" + b"b\0\0\0\4\0\0\0\1" + b"b\0\0\0\1y")
    applier = pair.current()
    applier.apply([batch])
    finish(applier, [batch])
    assert pair.target.execute("SELECT * FROM t").fetchall() == [(1, "y")]


def test_windows_are_bounded_and_many_inserts_go_before_a_change_that_follows_them(pair: Pair) -> None:
    pair.tables(TABLE)
    pair.do(
        "INSERT INTO t SELECT i, repeat('x', 100) FROM generate_series(1, 2500) i",
        "UPDATE t SET v = 'y' WHERE id % 100 = 0",
        "INSERT INTO t SELECT i, 'z' FROM generate_series(2501, 2600) i",
    )
    applier = pair.applier(
        limits=ApplyLimits(window_rows=1_000, window_bytes=50_000, copy_chunk_bytes=10_000)
    )
    batches = pair.source.batches()
    applier.apply(batches)
    finish(applier, batches)
    pair.equal("public.t")
    assert applier.ways == {"copied": 2500, "folded": 125}


def test_triggers_that_fire_for_replicas_see_changes_in_source_order(pair: Pair) -> None:
    target = (
        TABLE
        + "; CREATE TABLE public.other (id int PRIMARY KEY); CREATE TABLE public.seen (n serial, what text);"
        "CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO public.seen (what) SELECT concat_ws(' ', tg_op, coalesce(new.id, old.id),"
        " (SELECT count(*) FROM public.other)); RETURN NULL; END $$;"
        "CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON public.t FOR EACH ROW"
        " EXECUTE FUNCTION public.note(); ALTER TABLE public.t ENABLE REPLICA TRIGGER note"
    )
    pair.tables(TABLE + "; CREATE TABLE public.other (id int PRIMARY KEY)", target)
    pair.do(
        "INSERT INTO t VALUES (1, 'a'), (2, 'a')",
        "INSERT INTO other VALUES (1)",
        "UPDATE t SET v = 'b' WHERE id = 2",
        "UPDATE t SET v = 'b' WHERE id = 1",
        "INSERT INTO other VALUES (2)",
        "DELETE FROM t WHERE id = 2",
    )
    pair.carry()
    seen = pair.target.execute("SELECT what FROM seen ORDER BY n").fetchall()
    assert seen == [("INSERT 1 0",), ("INSERT 2 0",), ("UPDATE 2 1",), ("UPDATE 1 1",), ("DELETE 2 2",)]


def test_a_table_the_source_altered_is_written_with_the_new_descriptor(pair: Pair) -> None:
    pair.tables(TABLE)
    pair.do("INSERT INTO t VALUES (1, 'a')")
    pair.do("ALTER TABLE t ADD n int", "UPDATE t SET n = 1", "INSERT INTO t VALUES (2, 'b', 2)")
    pair.target.execute("ALTER TABLE t ADD n int")
    pair.carry()
    pair.equal("public.t")


@pytest.mark.parametrize(
    ("change", "query"),
    [
        ("ALTER TABLE t ALTER id TYPE bigint", "SELECT id, v, n FROM t"),
        ("ALTER TABLE t ALTER n TYPE float8 USING 0", "SELECT id, v, n::bigint FROM t"),
        ("ALTER TABLE t DROP n; ALTER TABLE t ADD n bigint", "SELECT id, v, n FROM t"),
        ("ALTER TABLE t DROP CONSTRAINT t_pkey", "SELECT id, v, n FROM t"),
        ("DROP TABLE t; CREATE TABLE t (n bigint, id int PRIMARY KEY, v text)", "SELECT id, v, n FROM t"),
    ],
)
def test_a_table_the_target_altered_is_looked_at_again(pair: Pair, change: str, query: str) -> None:
    """8 bytes of a bigint would be taken for a double without a word."""
    pair.tables("CREATE TABLE public.t (id int PRIMARY KEY, v text, n bigint)")
    pair.do("INSERT INTO t VALUES (1, 'a', 1)", "UPDATE t SET v = 'b'")
    pair.carry()
    pair.do("DELETE FROM t")
    pair.carry()
    pair.target.execute(change)
    pair.do("INSERT INTO t VALUES (2, 'a', 7), (3, 'b', 8)")
    pair.carry()
    pair.do("UPDATE t SET n = 9 WHERE id = 2", "DELETE FROM t WHERE id = 3")
    pair.carry()
    assert pair.target.execute(query).fetchall() == [(2, "a", 9)]
    assert pair.anomalies() == {}


def test_a_key_another_session_inserts_meanwhile_becomes_an_update(pair: Pair) -> None:
    """The slow path decides again after it waited: at READ COMMITTED it then sees the other's row."""
    pair.tables("CREATE TABLE public.t (id int PRIMARY KEY, u int UNIQUE, v text)")
    pair.target.execute("INSERT INTO t VALUES (5, 50, 'mine')")
    pair.do("INSERT INTO t VALUES (5, 50, 'new'), (6, 60, 'new')")
    assert pair.carry() == [{"applied": 2}]
    pair.equal("public.t")


def test_a_second_applier_waits_for_the_origin(pair: Pair) -> None:
    pair.tables(TABLE)
    pair.applier()
    with pytest.raises(TransientError, match="already active"):
        pair.applier()


def test_staging_tables_are_dropped_when_nothing_comes(pair: Pair) -> None:
    pair.tables(TABLE)
    pair.do("INSERT INTO t VALUES (1, 'a')")
    pair.carry()
    pair.do("UPDATE t SET v = 'b'")
    pair.carry()
    count = "SELECT count(*) FROM pg_class WHERE relname LIKE 'vsql_stage%' AND relkind = 'r'"
    assert pair.target.execute(count).fetchone() == (1,)
    pair.current().rest()
    assert pair.target.execute(count).fetchone() == (0,)
    pair.do("UPDATE t SET v = 'c'")
    pair.carry()
    pair.equal("public.t")


def test_a_batch_of_a_descriptor_that_differs_in_its_salt_only_keeps_its_plan(pair: Pair) -> None:
    pair.tables(TABLE)
    applier = pair.current()
    for number in range(1, 4):
        columns = (Column("id", True, 23, -1, "integer"), Column("v", False, 25, -1, "text"))
        relation = Relation(T, "d", columns, bytes([number]) * 16)
        batch = empty_batch(number)
        plain = b"N\0\2" + b"b\0\0\0\4" + number.to_bytes(4, "big") + b"n"
        add_change(batch, relation, Op.INSERT, plain)
        applier.apply([batch])
        batch.ops[0] = Op.UPDATE
        applier.apply([batch])
        finish(applier, [batch])
    made = "SELECT relname FROM pg_class WHERE relname LIKE 'vsql_stage%' AND relkind = 'r'"
    assert pair.target.execute(made).fetchall() == [("vsql_stage_1",)]
    assert pair.target.execute("SELECT count(*) FROM t").fetchone() == (3,)


def test_the_session_decides_nothing_by_the_databases_defaults(pair: Pair) -> None:
    pair.tables("CREATE TABLE public.t (id int PRIMARY KEY, d date, i interval, x timestamptz)")
    name = pair.target.info.dbname
    for setting in ("DateStyle = 'SQL, DMY'", "IntervalStyle = 'sql_standard'", "TimeZone = 'Asia/Tokyo'"):
        pair.target.execute(f"ALTER DATABASE {name} SET {setting}")
    pair.source.binary = False
    pair.do("INSERT INTO t VALUES (1, '2024-02-03', '-1 day 02:00', '2024-01-01 00:00+00')")
    pair.carry()
    pair.equal("public.t")


def test_finish_without_changes_commits_what_the_caller_writes(pair: Pair) -> None:
    pair.tables(TABLE)
    assert pair.current().finish(1, 0, lambda conn: note_progress(conn, 3)) > 0
    assert pair.target.execute("SELECT batch FROM vsql_sync.progress").fetchall() == [(3,)]


def test_a_sequence_set_back_is_ahead_of_the_rows_before_they_are_committed(pair: Pair) -> None:
    """It went back, and then beyond what the target has: a crash behind the commit must find it there."""
    pair.tables("CREATE SEQUENCE public.s; CREATE TABLE public.t (id int PRIMARY KEY)")
    pair.target.execute(SEQUENCE_SYNC)
    pair.target.execute("SELECT setval('s', 100)")
    batch = empty_batch()
    value = SequenceValue(TableName("public", "s"), (), 1, 2_000, True, SequenceState.SET_BACK)
    add_change(batch, Relation(SEQUENCES, "n", ()), Op.SEQUENCE, encode_sequence(value))
    applier = pair.current()
    applier.apply([batch])
    reached: list[object] = []

    def before_commit(conn: psycopg.Connection[tuple[object, ...]]) -> None:
        reached.append(conn.execute("SELECT last_value FROM public.s").fetchone())

    applier.finish(1_000, 0, before_commit)
    assert reached == [(2_000,)]
    back = empty_batch(2)
    add_change(back, Relation(SEQUENCES, "n", ()), Op.SEQUENCE, encode_sequence(value._replace(last_value=3)))
    applier.apply([back])
    applier.finish(1_100, 0, before_commit)
    assert reached[1] == (2_000,)
    assert pair.target.execute("SELECT last_value, is_called FROM s").fetchone() == (3, True)


def test_an_impossible_commit_time_is_refused(pair: Pair) -> None:
    pair.tables(TABLE)
    with pytest.raises(DecodeError):
        pair.current().finish(1, 2**63 - 1, lambda conn: note_progress(conn, 3))
    assert isinstance(pair.current(), Applier)
    assert pair.target.execute("SELECT count(*) FROM vsql_sync.progress").fetchone() == (0,)


def test_a_key_is_matched_whole_although_the_targets_index_has_a_part_of_it(pair: Pair) -> None:
    pair.tables(
        "CREATE TYPE public.pair AS (a int, b text);"
        'CREATE TABLE public.t (id int, p public.pair NOT NULL, k text COLLATE "C" NOT NULL, v int,'
        " PRIMARY KEY (id, p, k))",
        "CREATE TYPE public.pair AS (a int, b text);"
        'CREATE TABLE public.t (id int PRIMARY KEY, p public.pair, k text COLLATE "POSIX", v int)',
    )
    pair.do("INSERT INTO t SELECT i, ROW(i, 'x')::public.pair, 'k', 0 FROM generate_series(1, 9) i")
    pair.carry()
    pair.target.execute("UPDATE t SET p = ROW(0, 'other') WHERE id = 2")
    pair.do("UPDATE t SET v = 1", "DELETE FROM t WHERE id > 5")
    assert pair.carry() == [{"applied": 12, "missing": 1}]
    assert pair.target.execute("SELECT id, v FROM t ORDER BY 1").fetchall() == [
        (1, 1), (2, 0), (3, 1), (4, 1), (5, 1)
    ]  # fmt: skip


def test_rows_without_a_key_are_missing_too_and_the_equal_row_is_taken_first(pair: Pair) -> None:
    pair.tables("CREATE TABLE public.t (n numeric, v text); ALTER TABLE t REPLICA IDENTITY FULL")
    pair.do("INSERT INTO t VALUES (1.0, NULL), (1.00, NULL), (2, 'a'), (3, 'a')")
    pair.carry()
    pair.target.execute("DELETE FROM t WHERE n > 1")
    pair.do(
        "DELETE FROM t WHERE n::text = '1.00'",
        "UPDATE t SET v = 'b' WHERE n = 2",
        "DELETE FROM t WHERE n = 3",
    )
    assert pair.carry() == [{"applied": 1, "missing": 2}]
    assert pair.target.execute("SELECT n::text FROM t").fetchall() == [("1.0",)]
    assert pair.anomalies() == {"update_missing": 1, "delete_missing": 1}


def test_copied_rows_with_one_key_twice_are_written_one_by_one(pair: Pair) -> None:
    pair.tables(TABLE)
    relation = Relation(T, "d", (Column("id", True, 23, -1, "integer"), Column("v", False, 25, -1, "text")))
    batch = empty_batch()
    for number, text in ((1, b"a"), (2, b"b"), (1, b"c")):
        plain = b"\0\2" + b"\0\0\0\4" + number.to_bytes(4, "big") + b"\0\0\0\1" + text
        add_change(batch, relation, Op.COPY, plain)
    applier = pair.current()
    assert applier.apply([batch]) == [{"applied": 3}]
    finish(applier, [batch])
    assert pair.target.execute("SELECT * FROM t ORDER BY 1").fetchall() == [(1, "c"), (2, "b")]
    assert pair.anomalies() == {"insert_exists": 1}


def test_staging_tables_outlive_a_rollback_and_are_made_anew_for_a_new_plan(pair: Pair) -> None:
    pair.tables(TABLE)
    pair.do("INSERT INTO t SELECT i, 'a' FROM generate_series(1, 3000) i")
    pair.carry()
    for text in "bcd":
        pair.do(f"UPDATE t SET v = '{text}'")
        batches = pair.source.batches()
        applier = pair.current()
        applier.apply(batches)
        applier.abort()
        applier.apply(batches)
        finish(applier, batches)
        pair.equal("public.t")
    pair.do("UPDATE t SET v = 'e' WHERE id < 2000", "UPDATE t SET v = 'f' WHERE id < 1000")
    applier = pair.current()
    batches = pair.source.batches(max_rows=1500)
    for batch in batches:
        applier.apply([batch])
    finish(applier, batches)
    pair.equal("public.t")
    made = "SELECT count(*) FROM pg_class WHERE relname LIKE 'vsql_stage%' AND relkind = 'r'"
    assert pair.target.execute(made).fetchone() == (1,)


def test_a_row_that_a_trigger_of_the_target_swallows_counts_as_applied(pair: Pair) -> None:
    pair.tables(
        TABLE,
        TABLE + "; CREATE FUNCTION public.eat() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
        "CREATE TRIGGER eat BEFORE INSERT ON public.t FOR EACH ROW WHEN (new.id = 3)"
        " EXECUTE FUNCTION public.eat(); ALTER TABLE public.t ENABLE ALWAYS TRIGGER eat",
    )
    pair.target.execute("INSERT INTO t VALUES (2, 'mine')")
    pair.do("INSERT INTO t VALUES (2, 'a'), (3, 'a'), (4, 'a')")
    assert pair.carry() == [{"applied": 3}]
    assert pair.target.execute("SELECT * FROM t ORDER BY 1").fetchall() == [(2, "a"), (4, "a")]
    assert pair.anomalies() == {"insert_exists": 1}


def test_a_wide_row_is_found_by_an_index_whose_columns_are_in_any_order(pair: Pair) -> None:
    columns = ", ".join(f"c{n} int NOT NULL DEFAULT {n}" for n in range(330))
    table = f"CREATE TABLE public.t ({columns}); ALTER TABLE t REPLICA IDENTITY FULL"
    pair.tables(table, f"{table}; CREATE UNIQUE INDEX ON t (c200, c3, c201)")
    pair.do("INSERT INTO t DEFAULT VALUES", "UPDATE t SET c3 = 4, c7 = 8", "UPDATE t SET c201 = 5")
    pair.do(
        "INSERT INTO t (c3) VALUES (77)", "UPDATE t SET c9 = 1 WHERE c3 = 77", "DELETE FROM t WHERE c3 = 4"
    )
    pair.carry()
    pair.equal("public.t")
    assert not pair.anomalies()


def test_padding_is_no_reason_to_leave_a_domains_value_alone(pair: Pair) -> None:
    domains = "CREATE DOMAIN public.padded AS bpchar; CREATE DOMAIN public.strict AS int;"
    pair.tables(f"{domains} CREATE TABLE public.t (id int PRIMARY KEY, v padded, n strict)")
    pair.do("INSERT INTO t VALUES (1, 'a  ', -1)")
    pair.carry()
    pair.target.execute("ALTER DOMAIN public.strict ADD CONSTRAINT c CHECK (VALUE > 0) NOT VALID")
    pair.do("UPDATE t SET v = 'a' WHERE id = 1")
    pair.carry()
    assert pair.current().ways["replayed"] == 1
    assert pair.target.execute("SELECT octet_length(v::bpchar) FROM t").fetchone() == (1,)


def test_no_row_is_found_by_what_the_target_generates_itself(pair: Pair) -> None:
    pair.tables(
        "CREATE TABLE public.t (a int, b int); ALTER TABLE t REPLICA IDENTITY FULL",
        "CREATE TABLE public.t (a int, b int GENERATED ALWAYS AS (a * 2) STORED NOT NULL UNIQUE)",
    )
    pair.do(
        "INSERT INTO t VALUES (1, 7), (2, 8)", "DELETE FROM t WHERE a = 1", "UPDATE t SET a = 3 WHERE b = 8"
    )
    pair.carry()
    assert pair.target.execute("SELECT a, b FROM t").fetchall() == [(3, 6)]
    assert not set(pair.anomalies()) - {"generated_differs"}


def test_another_applier_in_the_same_session_stages_its_own_rows(pair: Pair) -> None:
    pair.tables(TABLE)
    pair.do("INSERT INTO t SELECT n, 'a' FROM generate_series(1, 9) n")
    pair.carry()
    for value in ("b", "c"):
        pair.do(f"UPDATE t SET v = '{value}' WHERE id > 3")
        # As a member does when its shares change: the connection stays.
        applier = Applier(pair.appliers[-1], "shop.a")
        applier.setup(pair.origin)
        pair.carry(applier)
        pair.equal("public.t")
