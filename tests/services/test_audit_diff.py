"""`syncctl audit diff` between two real databases: which tuples differ, and which side is not believed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.audit_history import ACKS, CHAIN, CLUSTER, B, History, manifest_fields, trust
from tests.conftest import NewDatabase
from tests.pairs import Pairs
from tests.services.test_audit_cli import Pair
from tests.services.test_audit_trail import as_attacker, store
from tests.stack.processes import kill_tree
from tests.waiting import until
from vsql_shared.audit import merkle
from vsql_shared.audit.leaf_diff import KeptLeaves, diff
from vsql_shared.audit.leaf_slots import SLOTS
from vsql_shared.audit.leaf_store import LeafKeeper, write_leaves
from vsql_shared.audit.leaves import part_leaves, sub_root
from vsql_shared.changes import PartitionRoot, PartLeaves
from vsql_shared.errors import RefusedError, SignatureError
from vsql_shared.names import advisory_key, data_topic
from vsql_shared.pg import roles
from vsql_shared.pg.connect import Connection, connect

KEEP, MOST = timedelta(days=7), 10**10
TOPIC = data_topic(CLUSTER, CHAIN, "public", "orders")
LEAVES = "vsql_sync.batch_leaves"

Batch = list[PartLeaves]


def digest(number: int, salt: str = "") -> bytes:
    return hashlib.sha256(b"%d%b" % (number, salt.encode())).digest()


def batch(*parts: Sequence[bytes]) -> Batch:
    """A batch of these topic-partitions."""
    return [part_leaves(one, leaves) for one, leaves in enumerate(parts)]


def root_of(kept: Batch) -> bytes:
    return merkle.batch_root([sub_root(one) for one in kept])


def signed(batches: Sequence[Batch]) -> History:
    """A source's chain of these batches."""
    history = History()
    history.open()
    for kept in batches:
        offset = 100 * history.head.batch
        roots = tuple(
            PartitionRoot(TOPIC, one.part, offset, offset + 99, 1, len(one.leaves) // 32, sub_root(one))
            for one in kept
        )
        records = sum(one.records for one in roots)
        made = manifest_fields(history.head.batch + 1, records) | {"record_count": records}
        history.add(
            **made | {"partitions": roots, "merkle_root": merkle.batch_root([r.sub_root for r in roots])}
        )
    return history


def keep(conn: Connection, history: History, batches: dict[int, Batch]) -> None:
    """What a service keeps, by its own means: batch number → leaves."""
    keeper = LeafKeeper(conn, KEEP, MOST)
    keeper.keep(0)
    sequences = {one.entry.batch: one.entry.sequence for one in history.entries if one.entry.batch}
    with conn.transaction():
        write_leaves(
            conn, keeper.slot, CHAIN, [(sequences[n], part) for n, kept in batches.items() for part in kept]
        )


def replicate(pair: Pair, source: History, ours: Sequence[Batch], theirs: dict[int, Batch]) -> None:
    """Fill both nodes: the source's batches, and where the target has others: `theirs`, which it signed."""
    acks = History(ACKS, B)
    acks.open()
    for made in source.entries:
        if made.entry.batch in theirs:
            acks.acknowledge(made, merkle_root=root_of(theirs[made.entry.batch]))
        elif made.entry.batch:
            acks.acknowledge(made)
    store(pair.conns["node-a"], source)
    store(pair.conns["node-b"], acks)
    same = dict(enumerate(ours, 1))
    keep(pair.conns["node-a"], source, same)
    keep(pair.conns["node-b"], source, same | theirs)


@pytest.fixture
def pair(tmp_path: Path, new_schema: NewDatabase, capsys: pytest.CaptureFixture[str]) -> Iterator[Pair]:
    made = Pair(tmp_path, new_schema("node_a"), new_schema("node_b"), capsys)
    yield made
    made.close()


def compared(pair: Pair, wanted: str, node: str = "node-a", *more: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of `audit diff` on a node, with the other one as its peer."""
    other = pair.infos["node-b" if node == "node-a" else "node-a"]
    arguments = ("audit", "diff", wanted, "--peer-connection", other, "--output", "json", *more)
    code, out, err = pair.syncctl(node, *arguments)
    assert out, err
    found: dict[str, Any] = json.loads(out)
    return code, found


def places(found: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
    """(batch, partition, position) of named tuples."""
    return [(one["batch"], one["partition"], one["position"]) for one in found]


# The bar


class Million(NamedTuple):
    """100 batches of 10,000 tuples, and the source's chain over them. Made once."""

    leaves: list[list[bytes]]
    batches: list[Batch]
    history: History


@cache
def million() -> Million:
    leaves = [[digest(10_000 * n + i) for i in range(10_000)] for n in range(100)]
    batches = [batch(one) for one in leaves]
    return Million(leaves, batches, signed(batches))


@pytest.mark.timeout(120)
def test_one_altered_tuple_among_a_million_is_named_in_three_exchanges(pair: Pair) -> None:
    leaves, batches, history = million()
    altered = batch([*leaves[41][:777], b"x" * 32, *leaves[41][778:]])
    replicate(pair, history, batches, {42: altered})
    code, found = compared(pair, "1..100")
    assert (code, found["tuples"], found["compared"], found["more"]) == (9, 1_000_000, 100, False)
    assert places(found["altered"]) == [(42, 0, 777)]
    assert (found["missing"], found["extra"], found["unfit"]) == ([], [], [])
    assert found["altered"][0]["topic"] == TOPIC
    assert found["altered"][0]["target_leaf"] == "78" * 32
    assert found["exchanges"] == 3
    assert found["differing_roots"] == [{"first": 42, "last": 42}]


@pytest.mark.timeout(120)
def test_three_altered_one_missing_and_one_extra_among_a_million_are_all_named(pair: Pair) -> None:
    leaves, batches, history = million()

    def altered(number: int, *at: int) -> list[bytes]:
        return [b"x%031d" % i if i in at else one for i, one in enumerate(leaves[number - 1])]

    gone = altered(7, 3)
    theirs = {
        1: batch(altered(1, 0)),
        7: batch(gone[:5_000] + gone[5_001:]),
        99: batch([*leaves[98], b"e" * 32]),
        100: batch(altered(100, 9_999)),
    }
    replicate(pair, history, batches, theirs)
    code, found = compared(pair, "1..100")
    assert code == 9
    assert places(found["altered"]) == [(1, 0, 0), (7, 0, 3), (100, 0, 9_999)]
    assert places(found["missing"]) == [(7, 0, 5_000)]
    assert places(found["extra"]) == [(99, 0, 10_000)]
    assert (found["unfit"], found["more"]) == ([], False)
    assert found["exchanges"] == 3


# Smaller ones


BATCHES = [batch([digest(100 * n + i) for i in range(20)], [digest(500 + n)]) for n in range(1, 7)]


@pytest.fixture
def replicated(pair: Pair) -> Pair:
    """Six batches of two partitions, the same on both sides."""
    replicate(pair, signed(BATCHES), BATCHES, {})
    return pair


@pytest.mark.parametrize("node", ["node-a", "node-b"])
def test_two_sides_that_are_equal_end_with_zero(replicated: Pair, node: str) -> None:
    code, found = compared(replicated, "1..6", node)
    assert (code, found["ok"], found["tuples"], found["compared"]) == (0, True, 126, 6)
    assert (found["source"], found["target"], found["chain"]) == ("node-a", "node-b", CHAIN)
    assert (found["not_kept"], found["not_acknowledged"], found["skipped"]) == ({}, [], [])
    other = replicated.infos["node-b" if node == "node-a" else "node-a"]
    code, out, _ = replicated.syncctl(node, "audit", "diff", "3", "--peer-connection", other)
    assert (code, "ok: nothing differs in 1 of 1 batches" in out) == (0, True)
    code, out, _ = replicated.syncctl(node, "audit", "diff", "3..9", "--peer-connection", other)
    assert (code, "ok: nothing differs in 4 of 7 batches" in out) == (0, True)


@pytest.mark.parametrize("node", ["node-a", "node-b"])
def test_a_difference_is_the_same_from_either_side(pair: Pair, node: str) -> None:
    theirs = {3: batch([digest(300 + i) for i in range(19)], [b"x" * 32])}
    replicate(pair, signed(BATCHES), BATCHES, theirs)
    code, found = compared(pair, "2..5", node)
    assert (code, places(found["altered"]), places(found["missing"])) == (9, [(3, 1, 0)], [(3, 0, 19)])
    other = pair.infos["node-b" if node == "node-a" else "node-a"]
    code, out, err = pair.syncctl(node, "audit", "diff", "2..5", "--peer-connection", other)
    assert (code, "1 altered, 1 missing, 0 extra" in err) == (9, True)
    assert f"missing      3         4  {TOPIC}" in out
    assert "another root than the source: batches 3" in out


# What somebody changes in the tables of leaves, after they were written.
TAMPERED = {
    "a leaf altered": f"UPDATE {LEAVES} SET leaves = set_byte(leaves, 70, 0) WHERE sequence = 4 AND part = 0",
    "two leaves exchanged": f"UPDATE {LEAVES} SET leaves = substring(leaves FROM 33 FOR 32) || substring("
    "leaves FROM 1 FOR 32) || substring(leaves FROM 65) WHERE sequence = 4 AND part = 0",
    "a leaf cut off": f"UPDATE {LEAVES} SET leaves = substring(leaves FROM 33)"
    " WHERE sequence = 4 AND part = 0",
    "a partition deleted": f"DELETE FROM {LEAVES} WHERE sequence = 4 AND part = 1",
    "a partition doubled": f"INSERT INTO {LEAVES} (slot, chain, sequence, part, leaves) SELECT 9,"
    f" chain, sequence, part, leaves FROM {LEAVES} WHERE sequence = 4 AND part = 1",
    "a partition of another number": f"UPDATE {LEAVES} SET part = 7 WHERE sequence = 4 AND part = 1",
    "another batch's leaves": f"UPDATE {LEAVES} a SET leaves = b.leaves FROM {LEAVES} b"
    " WHERE a.sequence = 4 AND b.sequence = 5 AND a.part = b.part AND a.chain = b.chain",
}


@pytest.mark.parametrize("node", ["node-a", "node-b"])
@pytest.mark.parametrize("case", TAMPERED)
def test_leaves_altered_in_the_table_name_the_side_that_does_not_fit_its_own_root(
    replicated: Pair, case: str, node: str
) -> None:
    assert replicated.conns[node].execute(TAMPERED[case]).rowcount > 0
    code, found = compared(replicated, "1..6")
    assert code == 9
    assert [(one["node"], one["batch"]) for one in found["unfit"]] == [(node, 3)]
    assert (found["altered"], found["missing"], found["extra"]) == ([], [], [])
    assert found["differing_roots"] == []


def test_leaves_altered_to_hide_a_difference_name_the_side_too(pair: Pair) -> None:
    """The target signed another root, and somebody gave it the source's leaves."""
    theirs = {3: batch([digest(300 + i) for i in range(19)], [b"x" * 32])}
    replicate(pair, signed(BATCHES), BATCHES, theirs)
    for part in BATCHES[2]:
        pair.conns["node-b"].execute(
            f"UPDATE {LEAVES} SET leaves = %s WHERE sequence = 4 AND part = %s", (part.leaves, part.part)
        )
    code, found = compared(pair, "1..6")
    assert code == 9
    assert [(one["node"], one["batch"]) for one in found["unfit"]] == [("node-b", 3)]
    assert found["differing_roots"] == [{"first": 3, "last": 3}]


def test_leaves_beyond_their_retention_are_said_to_be_gone(replicated: Pair) -> None:
    conn = replicated.conns["node-b"]
    conn.execute("UPDATE vsql_sync.leaf_slots SET begun_at = now() - interval '9 days'")
    keeper = LeafKeeper(conn, KEEP, MOST)
    assert keeper.keep(0)
    conn.execute("UPDATE vsql_sync.leaf_slots SET ended_at = begun_at WHERE ended_at IS NOT NULL")
    assert LeafKeeper(conn, KEEP, MOST).keep(0)
    code, found = compared(replicated, "1..6")
    assert (code, found["not_kept"], found["compared"]) == (0, {"node-b": [{"first": 1, "last": 6}]}, 0)
    other = replicated.infos["node-b"]
    code, out, _ = replicated.syncctl("node-a", "audit", "diff", "2..4", "--peer-connection", other)
    assert code == 0
    assert "node node-b keeps no leaves (beyond leaf_retention or leaf_max_size" in out
    assert "batches 2-4" in out


def test_where_roots_differ_and_leaves_are_gone_no_tuple_is_named_and_it_is_bad(pair: Pair) -> None:
    theirs = {3: batch([digest(300 + i) for i in range(19)], [b"x" * 32])}
    replicate(pair, signed(BATCHES), BATCHES, theirs)
    pair.conns["node-a"].execute(f"DELETE FROM {LEAVES} WHERE sequence IN (4, 5)")
    code, found = compared(pair, "1..6")
    assert (code, found["altered"], found["compared"]) == (9, [], 4)
    assert found["not_kept"] == {"node-a": [{"first": 3, "last": 4}]}
    assert found["differing_roots"] == [{"first": 3, "last": 3}]


def test_an_entry_of_the_peer_that_is_not_signed_by_it_stops_the_comparison(replicated: Pair) -> None:
    as_attacker(
        replicated.conns["node-b"],
        "UPDATE vsql_sync.vsql_sync_audit SET document = set_byte(document, octet_length(document) - 3,"
        " get_byte(document, octet_length(document) - 3) # 1)"
        " WHERE sequence = 4",
    )
    conns = replicated.conns
    with pytest.raises(SignatureError) as caught:
        diff(
            KeptLeaves(conns["node-a"], "node-a"), KeptLeaves(conns["node-b"], "node-b"), CHAIN, 1, 6, trust()
        )
    assert caught.value.record == f"{ACKS}/4"


# A peer whose database answers otherwise than ours would: what stands in the place of its leaves, and what is
# said of it.
HOSTILE = {
    "hashes of a wrong length": ("part, substring(leaves FROM 2) AS leaves", 9, "not to be believed"),
    "numbers for hashes": ("part, repeat('9', 640) AS leaves", 5, "does not exist"),
    "nothing": ("part, NULL::bytea AS leaves", 9, "size out of range"),
    "negative parts": ("-1 - part AS part, leaves", 9, "part out of range"),
    "other leaves": ("part, sha256(leaves) AS leaves", 9, "not to be believed"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_peer_whose_answers_are_no_answers_is_named_or_refused(replicated: Pair, case: str) -> None:
    conn = replicated.conns["node-b"]
    columns, expected, said = HOSTILE[case]
    conn.execute("ALTER TABLE vsql_sync.batch_leaves RENAME TO hidden")
    conn.execute(
        f"CREATE VIEW vsql_sync.batch_leaves AS SELECT chain, sequence, {columns} FROM vsql_sync.hidden"
    )
    other = replicated.infos["node-b"]
    code, _, err = replicated.syncctl("node-a", "audit", "diff", "1..6", "--peer-connection", other)
    assert (code, said in err, "Traceback" in err) == (expected, True, False), err


def test_a_source_whose_database_leaves_manifests_out_hides_no_difference(pair: Pair) -> None:
    theirs = {3: batch([digest(300 + i) for i in range(19)], [b"x" * 32])}
    replicate(pair, signed(BATCHES), BATCHES, theirs)
    as_attacker(pair.conns["node-a"], "DELETE FROM vsql_sync.vsql_sync_audit WHERE sequence IN (4, 6, 7)")
    code, found = compared(pair, "1..6", "node-b")
    assert (code, found["ok"], found["batches"]) == (9, False, 3)
    assert found["no_manifest"] == [{"first": 3, "last": 3}, {"first": 5, "last": 6}]


def test_a_range_the_target_has_signed_no_root_of_is_not_called_equal(replicated: Pair) -> None:
    as_attacker(replicated.conns["node-b"], "DELETE FROM vsql_sync.vsql_sync_audit WHERE batch >= 5")
    other = replicated.infos["node-b"]
    code, out, err = replicated.syncctl("node-a", "audit", "diff", "5..6", "--peer-connection", other)
    assert (code, "ok: nothing differs" in out, "nothing to compare" in err) == (4, False, True)
    code, found = compared(replicated, "4..6")
    assert (code, found["ok"], found["rooted"], found["complete"]) == (0, True, 1, False)


def test_ranges_and_streams_that_are_not_there_are_refused(replicated: Pair) -> None:
    other = replicated.infos["node-b"]

    def ran(*arguments: str) -> tuple[int, str]:
        code, _, err = replicated.syncctl("node-a", "audit", "diff", *arguments)
        return code, err

    assert ran("7..9", "--peer-connection", other)[0] == 4
    assert ran("1..200000", "--peer-connection", other)[0] == 4
    code, err = ran("1", "--peer-connection", other, "--chain", "bills.node-a")
    assert (code, CHAIN in err) == (4, True)
    assert ran("1", "--peer-connection", replicated.infos["node-a"])[0] == 2
    for wrong in ("0", "5..4", "-1", "1...3", "1..", "x", "1-3", "9" * 20):
        assert ran("--peer-connection", other, "--", wrong)[0] == 2
    assert ran("1")[0] == 2


def test_a_viewer_of_both_databases_may_compare(replicated: Pair, cluster_name: str) -> None:
    user = f"auditor_{cluster_name}"
    for conn in replicated.conns.values():
        roles.create(conn)
    conn = replicated.conns["node-a"]
    conn.execute(f'CREATE ROLE "{user}" LOGIN IN ROLE {roles.VIEWER}')
    try:
        replicated.user = user
        replicated.infos["node-b"] += f" user={user}"
        assert compared(replicated, "1..6")[0] == 0
    finally:
        conn.execute(f'DROP ROLE "{user}"')


# Keeping


def rows_of(conn: Connection) -> dict[int, int]:
    """Slot → rows."""
    return dict(conn.execute(f"SELECT slot, count(*) FROM {LEAVES} GROUP BY slot").fetchall())


def fill(conn: Connection, keeper: LeafKeeper, sequence: int, nbytes: int) -> None:
    write_leaves(conn, keeper.slot, CHAIN, [(sequence, PartLeaves(0, bytes(nbytes)))])


def test_what_is_kept_stays_within_its_bytes_and_the_newest_stay(pair: Pair) -> None:
    conn = pair.conns["node-a"]
    most = 4 << 20
    keeper = LeafKeeper(conn, KEEP, most, every=0)
    for number in range(1, 81):
        keeper.keep(number)
        fill(conn, keeper, number, 160_000)
    assert keeper.keep(100)
    assert keeper.nbytes <= most + 2 * 300_000
    kept = [row[0] for row in conn.execute(f"SELECT sequence FROM {LEAVES} ORDER BY sequence").fetchall()]
    assert kept[-1] == 80
    assert all(right == left + 1 for left, right in pairwise(kept))
    assert 12 <= len(kept) < 40


def test_nothing_is_kept_and_all_is_emptied_where_retention_is_none(replicated: Pair) -> None:
    conn = replicated.conns["node-a"]
    keeper = LeafKeeper(conn, timedelta(0), MOST)
    assert keeper.keep(0)
    assert (keeper.slot, rows_of(conn), keeper.nbytes) == (None, {}, 0)
    fill(conn, keeper, 9, 32)
    assert rows_of(conn) == {}


def test_a_reader_of_old_leaves_is_not_waited_for_and_they_go_later(
    replicated: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    conn = replicated.conns["node-a"]
    keeper = LeafKeeper(conn, timedelta(0), MOST, every=5)
    with connect(replicated.infos["node-a"], application_name="reader", autocommit=False) as reader:
        reader.execute(f"SELECT count(*) FROM {LEAVES}")
        assert not keeper.keep(0)
        assert "in the way" in caplog.text
        assert sum(rows_of(conn).values()) == 12
        reader.rollback()
    assert not keeper.keep(4), "too early"
    assert keeper.keep(5)
    assert rows_of(conn) == {}


def test_who_starts_while_an_old_slot_is_held_keeps_leaves_and_the_next_slot_is_begun(
    replicated: Pair,
) -> None:
    """pg_dump holds every slot from its first second to its last; a slot falls due meanwhile."""
    conn = replicated.conns["node-a"]
    conn.execute("UPDATE vsql_sync.leaf_slots SET begun_at = now() - interval '9 days'")
    conn.execute("UPDATE vsql_sync.leaf_slots SET ended_at = now() - interval '8 days' WHERE slot = 0")
    with connect(replicated.infos["node-a"], application_name="dump", autocommit=False) as dump:
        dump.execute(f"SELECT count(*) FROM {LEAVES}")
        keeper = LeafKeeper(conn, KEEP, MOST)
        assert not keeper.keep(0)
        assert (keeper.slot, "in the way" in keeper.problem) == (1, True)
        conn.execute("UPDATE vsql_sync.leaf_slots SET begun_at = now() - interval '1 day' WHERE slot = 1")
        later = LeafKeeper(conn, KEEP, MOST)
        assert not later.keep(0)
        assert later.slot == 2, "the next slot waits for the old one"
        fill(conn, later, 9, 32)
        dump.rollback()
    assert later.keep(60)
    assert (later.problem, rows_of(conn)) == ("", {2: 1})


def test_one_held_slot_keeps_no_other_from_being_emptied(pair: Pair) -> None:
    conn = pair.conns["node-a"]
    for slot in range(4):
        conn.execute(
            "INSERT INTO vsql_sync.leaf_slots VALUES (%s, now() - interval '9 days', CASE WHEN %s < 3 THEN"
            " now() - interval '8 days' END)",
            (slot, slot),
        )
        write_leaves(conn, slot, CHAIN, [(slot + 1, PartLeaves(0, bytes(32)))])
    with connect(pair.infos["node-a"], application_name="reader", autocommit=False) as reader:
        reader.execute("SELECT 1 FROM vsql_sync.batch_leaves_01")
        assert not LeafKeeper(conn, KEEP, MOST).keep(0)
        assert rows_of(conn) == {1: 1, 3: 1}
        reader.rollback()


def test_leaves_that_may_not_be_emptied_are_said_to_be_so_and_stop_nothing(
    replicated: Pair, cluster_name: str
) -> None:
    conn, user = replicated.conns["node-a"], f"keeper_{cluster_name}"
    conn.execute(
        f'CREATE ROLE "{user}" LOGIN; GRANT USAGE ON SCHEMA vsql_sync TO "{user}";'
        f' GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA vsql_sync TO "{user}"'
    )
    conn.execute("UPDATE vsql_sync.leaf_slots SET begun_at = now() - interval '1 day'")
    try:
        with connect(f"{replicated.infos['node-a']} user={user}", application_name="keeper") as own:
            keeper = LeafKeeper(own, KEEP, 1)
            assert not keeper.keep(0)
            assert (keeper.slot, "TRUNCATE" in keeper.problem) == (1, True)
            fill(own, keeper, 9, 32)
        assert rows_of(conn)[1] == 1
    finally:
        conn.execute(f'DROP OWNED BY "{user}"; DROP ROLE "{user}"')


def test_what_is_written_while_there_is_no_slot_is_counted(pair: Pair) -> None:
    conn = pair.conns["node-a"]
    with connect(pair.infos["node-a"], application_name="other", autocommit=False) as other:
        other.execute("SELECT pg_advisory_xact_lock(%s)", (advisory_key("leaves", "prune"),))
        keeper = LeafKeeper(conn, KEEP, MOST)
        assert not keeper.keep(0)
        keeper.write(conn, CHAIN, [(1, PartLeaves(0, bytes(32)))])
        assert (keeper.slot, keeper.figures["leaves_not_kept"], rows_of(conn)) == (None, 1, {})
        other.rollback()
    assert keeper.keep(1), "looked for again only much later"
    keeper.write(conn, CHAIN, [(2, PartLeaves(0, bytes(32)))])
    assert (keeper.figures["leaves_not_kept"], rows_of(conn)) == (1, {0: 1})


def test_a_slot_nobody_lists_is_emptied_before_it_is_written_to(pair: Pair) -> None:
    """A service with older settings wrote on for a moment after another one had emptied everything."""
    conn = pair.conns["node-a"]
    write_leaves(conn, 0, CHAIN, [(1, PartLeaves(0, bytes(32)))])
    keeper = LeafKeeper(conn, KEEP, MOST)
    assert keeper.keep(0)
    assert (keeper.slot, rows_of(conn)) == (1, {})
    write_leaves(conn, 5, CHAIN, [(1, PartLeaves(0, bytes(32)))])
    assert LeafKeeper(conn, timedelta(0), MOST).keep(0)
    assert rows_of(conn) == {}


def test_one_service_prunes_and_the_others_write_where_it_does(replicated: Pair) -> None:
    conn = replicated.conns["node-a"]
    with connect(replicated.infos["node-a"], application_name="other", autocommit=False) as other:
        other.execute("SELECT pg_advisory_xact_lock(%s)", (advisory_key("leaves", "prune"),))
        keeper = LeafKeeper(conn, KEEP, MOST)
        assert not keeper.keep(0)
        assert keeper.slot == 0
        other.rollback()


def test_each_slot_has_a_table_and_its_hashes_are_not_compressed(pair: Pair) -> None:
    rows = (
        pair.conns["node-a"]
        .execute(
            "SELECT c.relname, a.attstorage FROM pg_partition_tree('vsql_sync.batch_leaves') t"
            " JOIN pg_class c ON c.oid = t.relid AND t.isleaf"
            " JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'leaves' ORDER BY 1"
        )
        .fetchall()
    )
    assert rows == [(f"batch_leaves_{number:02}", "e") for number in range(SLOTS)]


# Replicated


TABLES = "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE u (id int PRIMARY KEY, v text);"
KEPT = f"SELECT sequence, part, leaves FROM {LEAVES} WHERE chain = 'pub.node-a' ORDER BY 1, 2"
MODES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "transactional": ((), {}),
    "partitioned": (
        ("--apply", "partitioned"),
        {"VSQL_SYNC__KAFKA__PARTITIONS": "3", "VSQL_SYNC__APPLY__MEMBERS": "2"},
    ),
}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("mode", MODES)
def test_both_sides_of_a_stream_keep_the_same_and_what_is_altered_is_found(pairs: Pairs, mode: str) -> None:
    arguments, env = MODES[mode]
    two = pairs(TABLES)
    for node in (two.a, two.b):
        node.env = env
    two.create(["t(*)", "u(*)"], publication_args=arguments)
    two.start()
    two.wait_in_step()
    for number in range(20):
        two.a.execute(
            f"INSERT INTO t SELECT n, 'x' FROM generate_series({number * 100}, {number * 100 + 99}) n;"
            f"INSERT INTO u SELECT n, 'x' FROM generate_series({number * 50}, {number * 50 + 49}) n;"
            f"UPDATE t SET v = 'y' WHERE id % 7 = 0 AND id >= {number * 100}"
        )
    two.wait_in_step()
    batches = two.a.query(
        "SELECT min(batch), max(batch), count(*) FROM vsql_sync.vsql_sync_audit"
        " WHERE chain = 'pub.node-a' AND event_type = 'replication_batch'"
    )[0]
    until(lambda: two.acknowledged_rows() == two.audited_rows(), 20, lambda: two.b.tail("consumer"))
    assert two.a.query(KEPT) == two.b.query(KEPT)
    assert {row[0] for row in two.a.query(KEPT)} == {
        row[0]
        for row in two.a.query(
            "SELECT sequence FROM vsql_sync.vsql_sync_audit"
            " WHERE chain = 'pub.node-a' AND event_type = 'replication_batch'"
        )
    }
    wanted = ("audit", "diff", f"{batches[0]}..{batches[1]}", "--peer-connection", two.b.conninfo)
    found = two.a.ctl_json(*wanted)
    assert (found["ok"], found["compared"]) == (True, batches[2])
    assert found["tuples"] >= 20 * 150
    altered = two.b.query(
        f"UPDATE {LEAVES} SET leaves = set_byte(leaves, 5, get_byte(leaves, 5) # 1) WHERE sequence ="
        f" (SELECT max(sequence) FROM {LEAVES} WHERE chain = 'pub.node-a') AND part = 0 RETURNING sequence"
    )
    done = two.a.ctl(*wanted, "--output", "json", check=False)
    assert done.returncode == 9
    found = json.loads(done.stdout)
    assert [(one["node"], one["sequence"]) for one in found["unfit"]] == [("node-b", altered[0][0])]


CRASHES = {
    "between a manifest's commit and what follows": ("producer", "producer.audit-committed"),
    "before rows and leaves are committed": ("consumer", "consumer.before-apply-commit"),
    "after they are": ("consumer", "consumer.after-apply-commit"),
}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("case", CRASHES)
def test_after_crashes_each_batch_has_its_leaves_once_on_both_sides(pairs: Pairs, case: str) -> None:
    role, point = CRASHES[case]
    two = pairs(TABLES)
    two.create(["t(*)", "u(*)"])
    two.start()
    two.wait_in_step()
    node = two.a if role == "producer" else two.b
    node.stop(role)
    node.start(role, {"VSQL_SYNC_ALLOW_FAILPOINTS": "1", "VSQL_SYNC_FAILPOINTS": f"{point}=kill:3"})

    def died() -> bool:
        two.a.execute("INSERT INTO t SELECT coalesce(max(id), 0) + 1, 'x' FROM t")
        return node.tail(role, 900).count(f'"failpoint": "{point}"') >= 3

    until(died, 60, lambda: node.tail(role))
    kill_tree(node.services.pop(role))
    node.start(role)
    two.wait_in_step(timeout=60)
    until(lambda: two.acknowledged_rows() == two.audited_rows(), 20, lambda: two.b.tail("consumer"))
    ours, theirs = two.a.query(KEPT), two.b.query(KEPT)
    assert ours == theirs
    places = [(sequence, part) for sequence, part, _ in ours]
    assert len(places) == len(set(places))
    manifests = two.a.query(
        "SELECT sequence FROM vsql_sync.vsql_sync_audit"
        " WHERE chain = 'pub.node-a' AND event_type = 'replication_batch'"
    )
    assert {sequence for sequence, _ in places} == {sequence for (sequence,) in manifests}


@pytest.mark.timeout(180)
def test_of_a_first_copy_no_leaves_are_kept(pairs: Pairs) -> None:
    two = pairs(TABLES)
    two.a.execute("INSERT INTO t SELECT n, 'x' FROM generate_series(1, 5000) n")
    two.create(["t(*)", "u(*)"])
    two.start()
    two.wait_in_step()
    two.a.execute("INSERT INTO t VALUES (5001, 'x')")
    two.wait_in_step()
    for node in (two.a, two.b):
        assert node.query(f"SELECT DISTINCT chain FROM {LEAVES}") == [("pub.node-a",)]


def test_a_range_that_is_too_large_to_compare_is_refused_before_anything_is_hashed(replicated: Pair) -> None:
    conns = replicated.conns
    ours, theirs = KeptLeaves(conns["node-a"], "node-a"), KeptLeaves(conns["node-b"], "node-b")
    with pytest.raises(RefusedError):
        diff(ours, theirs, CHAIN, 1, 20_001, trust())
    assert (ours.asked, theirs.asked) == (0, 0)
