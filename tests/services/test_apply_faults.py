"""What cannot be applied: one message that names table, batch and change; nothing written, no value said."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator

import psycopg
import pytest

from tests.conftest import NewDatabase
from tests.services.apply_pair import MakePair, Pair, finish, pairs
from tests.services.apply_source import add_change, empty_batch
from vsql_consumers.apply import Applier
from vsql_shared.changes import Column, Op, OpenedBatch, Relation, TableName
from vsql_shared.errors import DatabaseError, DecodeError, RowError, TransientError, VsqlSyncError

T = TableName("public", "t")
TABLE = "CREATE TABLE public.t (id int PRIMARY KEY, v text)"
COLUMNS = (Column("id", True, 23, -1, "integer"), Column("v", False, 25, -1, "text"))
MARKER = "marker-4711"


@pytest.fixture
def make_pair(new_database: NewDatabase) -> Iterator[MakePair]:
    """Pairs of databases."""
    yield from pairs(new_database)


@pytest.fixture
def pair(make_pair: MakePair) -> Pair:
    return make_pair()


def _tuple(number: int, text: bytes | None = None) -> bytes:
    value = b"n" if text is None else b"b" + len(text).to_bytes(4, "big") + text
    return b"\0\2" + b"b\0\0\0\4" + number.to_bytes(4, "big") + value


def _batch(*changes: tuple[int, bytes], relation: Relation | None = None) -> OpenedBatch:
    batch = empty_batch(17)
    for op, plaintext in changes:
        add_change(batch, relation or Relation(T, "d", COLUMNS), op, plaintext)
    return batch


def _shown(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


CONSTRAINTS = {
    "check": ("ADD CHECK (v <> 'marker-4711')", "CheckViolation", "constraint t_v_check"),
    "length": ("ALTER v TYPE varchar(10)", "StringDataRightTruncation", ""),
    "not null": ("ALTER v SET NOT NULL", "NotNullViolation", "column v"),
    "another unique key": ("ADD UNIQUE (v)", "UniqueViolation", "constraint t_v_key"),
    "an exclusion": ("ADD EXCLUDE USING btree (v WITH =)", "ExclusionViolation", "constraint t_v_excl"),
    "a type that takes less": ("ALTER v TYPE int USING v::int", "InvalidTextRepresentation", ""),
}
WORK = {
    "insert": "INSERT INTO t VALUES (11, '8'), (12, {value}), (13, {value})",
    "update": "UPDATE t SET v = {value} WHERE id IN (2, 3)",
    "move": "UPDATE t SET v = {value}, id = id + 100 WHERE id IN (2, 3)",
}


@pytest.mark.parametrize("name", CONSTRAINTS)
@pytest.mark.parametrize("kind", WORK)
def test_a_row_the_target_refuses_is_named_without_its_value(pair: Pair, name: str, kind: str) -> None:
    alter, error_name, place = CONSTRAINTS[name]
    pair.tables(TABLE)
    pair.do("INSERT INTO t SELECT i, i::text FROM generate_series(1, 5) i")
    pair.carry()
    pair.target.execute(f"ALTER TABLE t {alter}")
    pair.do("UPDATE t SET v = '77' WHERE id = 1")
    pair.do(WORK[kind].format(value="NULL" if name == "not null" else f"'{MARKER}'"))
    before = pair.target.execute("SELECT * FROM t ORDER BY 1").fetchall()
    with pytest.raises(DatabaseError) as caught:
        pair.carry()
    assert error_name in str(caught.value)
    assert place in str(caught.value)
    assert "public.t (batch 4, change " in str(caught.value)
    assert MARKER not in _shown(caught.value)
    assert pair.target.execute("SELECT * FROM t ORDER BY 1").fetchall() == before


TRIGGERS = {
    "SQL made of a value": (
        "EXECUTE 'SELECT ''x'' AS \"' || NEW.v || '\" FROM \"' || NEW.v || '\"'",
        "42P01",
    ),
    "a right, it says": ("RAISE EXCEPTION '%', NEW.v USING ERRCODE = '42501', HINT = NEW.v", "42501"),
    "a state, it says": ("RAISE EXCEPTION '%', NEW.v USING ERRCODE = '55000', HINT = NEW.v", "55000"),
    "try again, it says": ("RAISE EXCEPTION '%', NEW.v USING ERRCODE = '40001', HINT = NEW.v", "40001"),
    "a lock, it says": ("RAISE EXCEPTION '%', NEW.v USING ERRCODE = '55P03', HINT = NEW.v", "55P03"),
    "its own code": ("RAISE EXCEPTION '%', NEW.v USING ERRCODE = 'UE001', HINT = NEW.v", "UE001"),
}


@pytest.mark.parametrize("name", TRIGGERS)
def test_what_a_trigger_says_is_not_repeated_whatever_its_code(pair: Pair, name: str) -> None:
    body, state = TRIGGERS[name]
    pair.tables(TABLE)
    pair.target.execute(
        f"CREATE FUNCTION public.f() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {body}; RETURN NEW; END$$;"
        "CREATE TRIGGER f BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION public.f();"
        "ALTER TABLE t ENABLE ALWAYS TRIGGER f"
    )
    pair.do(f"INSERT INTO t VALUES (1, '{MARKER}')")
    with pytest.raises(VsqlSyncError, match=f"SQLSTATE {state}") as caught:
        pair.carry()
    assert MARKER not in _shown(caught.value) + str(caught.value) + caught.value.hint
    assert isinstance(caught.value, TransientError) is (state in ("40001", "55P03"))
    assert isinstance(caught.value, RowError) is (state == "UE001")


def test_an_error_names_the_very_change(pair: Pair) -> None:
    pair.tables(TABLE, "CREATE TABLE public.t (id int PRIMARY KEY, v text CHECK (v <> 'bad'))")
    changes = [(Op.INSERT, b"N" + _tuple(n, b"bad" if n == 250 else b"good")) for n in range(300)]
    with pytest.raises(DatabaseError, match=r"public.t \(batch 17, change 250\)"):
        pair.current().apply([_batch(*changes)])


def test_a_value_that_cannot_be_received_names_the_very_change(pair: Pair) -> None:
    pair.tables(TABLE)
    changes = [(Op.INSERT, b"N" + _tuple(n, b"\xff\xfe" if n == 250 else b"good")) for n in range(300)]
    with pytest.raises(DatabaseError, match=r"CharacterNotInRepertoire .*public.t \(batch 17, change 250\)"):
        pair.current().apply([_batch(*changes)])


def test_bytes_of_another_type_are_said_as_that(pair: Pair) -> None:
    pair.tables(TABLE)
    plain = b"N\0\2" + b"b\0\0\0\2\0\1" + b"n"
    with pytest.raises(DatabaseError) as caught:
        pair.current().apply([_batch((Op.INSERT, plain))])
    assert "a type of this name differs" in caught.value.hint


def test_a_missing_table_is_named_before_anything_is_written(pair: Pair) -> None:
    ddl = TABLE + "; CREATE TABLE public.u (id int PRIMARY KEY)"
    pair.tables(ddl, TABLE)
    pair.do("INSERT INTO t VALUES (1, 'a')", "INSERT INTO u VALUES (1)")
    batches = pair.source.batches()
    with pytest.raises(DatabaseError, match=r"table public\.u is not in the target database; create it"):
        pair.current().apply(batches)
    pair.target.execute("CREATE TABLE public.u (id int PRIMARY KEY)")
    pair.current().apply(batches)
    finish(pair.current(), batches)
    pair.equal("public.t", "public.u")


@pytest.mark.parametrize(
    ("ddl", "message"),
    [
        ("CREATE SCHEMA x", "public.t is not in the target"),
        ("CREATE VIEW public.t AS SELECT 1 AS id, 'a'::text AS v", "no ordinary or partitioned table"),
        ("CREATE SEQUENCE public.t", "public.t is no"),
        ("CREATE TABLE public.t (id int PRIMARY KEY)", 'lacks column "v"'),
        ("CREATE TABLE public.t (x int)", 'lacks columns "id", "v"'),
    ],
)
def test_a_target_of_the_wrong_shape_is_said(pair: Pair, ddl: str, message: str) -> None:
    pair.tables(TABLE, ddl)
    pair.do("INSERT INTO t VALUES (1, 'a')")
    with pytest.raises(DatabaseError, match=message):
        pair.carry()


def test_a_type_the_target_lacks_is_named(pair: Pair) -> None:
    pair.tables(
        "CREATE TYPE public.mood AS ENUM ('ok'); CREATE TABLE public.t (id int PRIMARY KEY, m public.mood)",
        "CREATE TABLE public.t (id int PRIMARY KEY, m text)",
    )
    pair.do("INSERT INTO t VALUES (1, 'ok')")
    batches = pair.source.batches()
    with pytest.raises(DatabaseError, match=r'column "m" of public.t has type public.mood on the source'):
        pair.current().apply(batches)
    pair.target.execute("CREATE TYPE public.mood AS ENUM ('ok')")
    pair.current().apply(batches)
    finish(pair.current(), batches)
    pair.equal("public.t")


@pytest.mark.parametrize(
    "schema", ["vsql_sync", "pg_catalog", "information_schema", "pg_toast", "pg_temp", "pg_temp_3"]
)
def test_our_own_tables_and_the_systems_are_never_written(pair: Pair, schema: str) -> None:
    pair.tables(TABLE)
    relation = Relation(TableName(schema, "anomalies"), "d", COLUMNS)
    with pytest.raises(DecodeError, match="no stream may write"):
        pair.current().apply([_batch((Op.INSERT, b"N" + _tuple(1)), relation=relation)])


def test_a_missing_privilege_says_so(pair: Pair) -> None:
    pair.tables(TABLE)
    pair.do("INSERT INTO t VALUES (1, 'a')", "UPDATE t SET v = 'b'")
    name = f"applier_{pair.target.info.backend_pid}"
    pair.target.execute(
        f"CREATE ROLE {name}; GRANT SELECT ON public.t TO {name};"
        f"GRANT EXECUTE ON FUNCTION pg_replication_origin_xact_reset() TO {name}"
    )
    applier = pair.current()
    pair.appliers[-1].execute(f"SET ROLE {name}")
    batches = pair.source.batches()
    try:
        with pytest.raises(DatabaseError, match="permission denied for table t") as caught:
            applier.apply(batches)
        assert "grant the consumer's role" in caught.value.hint
    finally:
        pair.appliers[-1].execute("RESET ROLE")
        pair.target.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")
    applier.apply(batches)
    finish(applier, batches)
    pair.equal("public.t")


def test_a_role_that_may_not_replicate_is_told_what_to_do(pair: Pair) -> None:
    name = f"plain_{pair.target.info.backend_pid}"
    pair.target.execute(f"CREATE ROLE {name}")
    conn = psycopg.connect(pair.conninfo, autocommit=True)
    pair.appliers.append(conn)
    conn.execute(f"SET ROLE {name}")
    try:
        with pytest.raises(DatabaseError, match="lacks a privilege") as caught:
            Applier(conn, "shop.a").setup(pair.origin)
        assert "node init" in caught.value.hint
    finally:
        conn.close()
        pair.target.execute(f"DROP ROLE {name}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([(Op.INSERT, b"N\0\2")], "cut off"),
        ([(Op.UPDATE, b"N" + _tuple(1) + b"!")], "bytes after"),
        ([(Op.TRUNCATE, b"\0\0\1\0\2")], "lacks table 0"),
        ([(Op.TRUNCATE, b"\0\0\0\0\2"), (Op.INSERT, b"N" + _tuple(1))], "interrupted"),
        ([(Op.TRUNCATE, b"\0\0\0\0\2"), (Op.TRUNCATE, b"\0\0\0\0\2")], "lacks table 1"),
        ([(Op.TRUNCATE, b"?")], "expected 5"),
        ([(Op.COPY, b"\0\3")], "another number of columns"),
    ],
)
def test_malformed_changes_are_refused_and_nothing_of_them_is_kept(
    pair: Pair, changes: list[tuple[int, bytes]], message: str
) -> None:
    pair.tables(TABLE)
    with pytest.raises(DecodeError, match=message):
        pair.current().apply([_batch((Op.INSERT, b"N" + _tuple(7)), *changes)])
    good = _batch((Op.INSERT, b"N" + _tuple(8)))
    pair.current().apply([good])
    finish(pair.current(), [good])
    assert pair.target.execute("SELECT id FROM t").fetchall() == [(8,)]


def test_a_truncate_that_is_not_whole_at_the_end_is_refused(pair: Pair) -> None:
    pair.tables(TABLE)
    batch = _batch((Op.TRUNCATE, b"\0\0\0\0\2"))
    pair.current().apply([batch])
    with pytest.raises(DecodeError, match="did not all come"):
        finish(pair.current(), [batch])


def test_updates_without_an_identity_are_refused(pair: Pair) -> None:
    pair.tables(TABLE)
    relation = Relation(T, "n", tuple(Column(c.name, False, c.type_oid, -1, c.type_name) for c in COLUMNS))
    with pytest.raises(DecodeError, match="no replica identity"):
        pair.current().apply([_batch((Op.DELETE, b"K" + _tuple(1)), relation=relation)])
    inserts = _batch((Op.INSERT, b"N" + _tuple(1)), relation=relation)
    pair.current().apply([inserts])
    finish(pair.current(), [inserts])
    assert pair.target.execute("SELECT id FROM t").fetchall() == [(1,)]


@pytest.mark.parametrize("target", [TABLE, "CREATE TABLE public.t (id int, v text)"])
def test_an_update_that_leaves_out_its_key_is_refused(pair: Pair, target: str) -> None:
    pair.tables(TABLE, target)
    with pytest.raises(DecodeError, match="leaves out a column of its key"):
        pair.current().apply([_batch((Op.UPDATE, b"N\0\2u" + b"n"))])


def test_markers_that_differ_within_a_change_are_refused_on_the_slow_path_too(pair: Pair) -> None:
    pair.tables(TABLE, "CREATE TABLE public.t (id int, v text)")
    old, new = b"K\0\2" + b"b\0\0\0\4\0\0\0\1n", b"N\0\2" + b"t\0\0\0\0011n"
    with pytest.raises(DecodeError, match="different markers"):
        pair.current().apply([_batch((Op.UPDATE, old + new))])


def test_a_descriptor_that_did_not_come_or_names_a_column_twice_is_refused(pair: Pair) -> None:
    pair.tables(TABLE)
    batch = _batch((Op.INSERT, b"N" + _tuple(1)))
    batch.relations.clear()
    with pytest.raises(DecodeError, match="descriptor it does not carry"):
        pair.current().apply([batch])
    twice = Relation(T, "d", (COLUMNS[0], COLUMNS[0]))
    with pytest.raises(DecodeError, match="names a column twice"):
        pair.current().apply([_batch((Op.INSERT, b"N" + _tuple(1)), relation=twice)])


def test_a_lost_connection_is_transient_and_the_next_applier_applies_once(pair: Pair) -> None:
    pair.tables(TABLE)
    pair.do("INSERT INTO t VALUES (1, 'a')")
    batches = pair.source.batches()
    applier = pair.applier()
    applier.apply(batches)
    pair.target.execute("SELECT pg_terminate_backend(%s, 5000)", (pair.appliers[-1].info.backend_pid,))
    with pytest.raises(TransientError):
        finish(applier, batches)
    with pytest.raises(TransientError):
        applier.apply(batches)
    again = pair.applier()
    again.apply(batches)
    finish(again, batches)
    pair.equal("public.t")


def test_a_deadlock_with_a_local_writer_is_transient_and_can_be_tried_again(pair: Pair) -> None:
    pair.tables(TABLE)
    pair.do("INSERT INTO t VALUES (1, 'a'), (2, 'a')")
    pair.carry()
    pair.target.execute("SET deadlock_timeout = '20s'")
    pair.do("UPDATE t SET v = 'b' WHERE id = 1")
    pair.do("UPDATE t SET v = 'b' WHERE id = 2")
    first, second = pair.source.batches()
    applier = pair.current()
    with pair.target.transaction():
        pair.target.execute("UPDATE t SET v = 'local' WHERE id = 2")
        applier.apply([first])
        waits = threading.Thread(target=_try, args=(pair.target, "UPDATE t SET v = 'local' WHERE id = 1"))
        waits.start()
        with pytest.raises(TransientError):
            applier.apply([second])
        waits.join()
    applier.apply([first, second])
    finish(applier, [first, second])
    pair.equal("public.t")


def _try(conn: psycopg.Connection[tuple[object, ...]], statement: str) -> None:
    conn.execute(statement.encode())


def test_an_error_after_the_last_row_is_ours_too(pair: Pair) -> None:
    pair.tables(TABLE, TABLE.replace("v text", "v text"))
    pair.target.execute("DROP TABLE vsql_sync.anomalies")
    with pytest.raises(VsqlSyncError, match="anomalies"):
        pair.current().apply([_batch((Op.DELETE, b"K" + _tuple(1)))])


def test_a_refused_row_of_a_table_without_a_key_is_named(pair: Pair) -> None:
    pair.tables(TABLE, "CREATE TABLE public.t (id int, v text CHECK (v <> 'bad'))")
    changes = [(Op.INSERT, b"N" + _tuple(n, b"bad" if n == 4 else b"good")) for n in range(9)]
    with pytest.raises(DatabaseError, match=r"CheckViolation .*public.t \(batch 17, change 4\)"):
        pair.current().apply([_batch(*changes)])
