"""The background verification: breaks of trail and topic are found, told once, and a restart goes on."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]  # no stubs say so

from tests.audit_history import CHAIN, CLUSTER, A, History, ordinary, trust
from tests.conftest import NewDatabase
from tests.nodes import Node
from tests.pairs import Pairs
from tests.services.test_audit_trail import TABLE, as_attacker, copy_of, node, store
from tests.stack import Kafka
from tests.waiting import until
from vsql_shared.audit import tree, watch_state
from vsql_shared.audit.checkpoint import Checkpoint, Log
from vsql_shared.audit.verify import Problem
from vsql_shared.audit.watch import TrailWatch
from vsql_shared.config import Settings, load_settings
from vsql_shared.names import audit_topic
from vsql_shared.pg import nodes, roles
from vsql_shared.pg.connect import Connection
from vsql_shared.service.topic_auditor import TopicAuditor

SIZE = len(ordinary().entries)
EVERY = 1000.0


@pytest.fixture
def conn(new_database: NewDatabase) -> Iterator[Connection]:
    """A node with an ordinary history."""
    with node(new_database("watch")) as conn:
        nodes.register_local(conn, 1, "node-a", CLUSTER, A.public_key)
        store(conn, ordinary())
        yield conn


def watch(conn: Connection, size: int = 3) -> TrailWatch:
    return TrailWatch(conn, CLUSTER, size, EVERY)


def passed(watching: TrailWatch, now: float = 0.0) -> list[Any]:
    """Turn until a pass has ended; the breaks that were new."""
    found = []
    for _ in range(100):
        found += watching.turn(trust(), now)
        if not watching.busy:
            return found
    raise AssertionError("the pass does not end")


def state(conn: Connection, chain: str = CHAIN) -> watch_state.Progress:
    return next(one for one in watch_state.progress(conn) if one.chain == chain)


def test_a_true_trail_is_verified_in_slices_and_said_to_be_whole(conn: Connection) -> None:
    watching = watch(conn)
    assert watching.turn(trust(), 0.0) == []
    assert state(conn).verified_to == 3
    assert passed(watching) == []
    assert (state(conn).verified_to, state(conn).whole_to) == (SIZE, SIZE)
    assert watch_state.open_breaks(conn) == []


def test_new_entries_are_verified_as_they_come(conn: Connection) -> None:
    watching = watch(conn)
    passed(watching)
    history = History(head=ordinary().head)
    history.open()
    store(conn, history)
    assert watching.turn(trust(), 1.0) == []
    assert (state(conn).verified_to, state(conn).whole_to) == (SIZE + 1, SIZE)


def test_another_service_goes_on_where_the_one_before_was(conn: Connection) -> None:
    watch(conn).turn(trust(), 0.0)
    second = watch(conn)
    assert second.busy
    at = conn.execute("SELECT (pass->>'sequence')::int FROM vsql_sync.audit_watch").fetchone()
    assert at == (3,)
    # What lies before the position is not read again in this pass, and is in the next one.
    as_attacker(conn, f"UPDATE {TABLE} SET row_count = 99 WHERE sequence = 2")
    assert passed(second) == []
    assert [one.sequence for one in passed(second, EVERY + 1)] == [2]


def test_a_service_that_starts_often_does_not_begin_anew_each_time(conn: Connection) -> None:
    passed(watch(conn))
    again = watch(conn)
    again.turn(trust(), 0.0)
    assert not again.busy


# What a superuser does to the rows → the entry, and words of what is said.
BREAKS: dict[str, tuple[str, int | None, str]] = {
    "a column is altered": (
        f"UPDATE {TABLE} SET row_count = 99 WHERE sequence = 5",
        5,
        "differs from its signed",
    ),
    "a signature is altered": (
        f"UPDATE {TABLE} SET document = set_byte(document, octet_length(document) - 2, 7) WHERE sequence = 6",
        6,
        "signature",
    ),
    "an entry is deleted": (f"DELETE FROM {TABLE} WHERE sequence = 4", 4, "missing"),
    "an entry at the edge of a slice is deleted": (f"DELETE FROM {TABLE} WHERE sequence = 3", 3, "missing"),
    "the first entry is deleted": (f"DELETE FROM {TABLE} WHERE sequence = 1", 1, "missing"),
    "the end is cut": (f"DELETE FROM {TABLE} WHERE sequence > 8", 9, "cut at its end"),
    "all is deleted": (f"DELETE FROM {TABLE}", 1, "cut at its end"),
    "a row is doubled": (copy_of(4), 4, "differs from its signed document"),
    "a row of no chain": (
        f"UPDATE {TABLE} SET chain = NULL WHERE sequence = 7",
        7,
        "a row without a chain",
    ),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_break_is_found_named_and_told_once(conn: Connection, case: str) -> None:
    statement, sequence, words = BREAKS[case]
    conn.execute(f"ALTER TABLE {TABLE} ALTER chain DROP NOT NULL")
    as_attacker(conn, statement)
    watching = watch(conn)
    found = passed(watching)
    assert sequence in {one.sequence for one in found}
    assert words in " ".join(one.what for one in found)
    assert passed(watching, EVERY + 1) == []
    shown = watch_state.open_breaks(conn)
    assert {(one.source, one.sequence) for one in shown} == {("trail", one.sequence) for one in found}
    logged = conn.execute("SELECT target_id FROM vsql_sync.audit_log WHERE action = 'audit.break'").fetchall()
    assert sorted(logged) == sorted((one.chain,) for one in found)


def test_a_row_behind_the_position_that_is_altered_is_found_when_it_is_the_last_one(conn: Connection) -> None:
    watching = watch(conn)
    watching.turn(trust(), 0.0)
    as_attacker(conn, f"UPDATE {TABLE} SET document = sha256('x') WHERE sequence = 3")
    found = passed(watching)
    assert (found[0].sequence, "not the one that was verified before" in found[0].what) == (3, True)


def test_a_cut_together_with_the_remembered_head_is_found_by_what_was_verified_before(
    conn: Connection,
) -> None:
    watching = watch(conn)
    passed(watching)
    as_attacker(conn, f"DELETE FROM {TABLE} WHERE sequence > 4")
    conn.execute(
        f"UPDATE vsql_sync.chain_heads SET sequence = 4, entry_hash = (SELECT sha256(document) FROM {TABLE}"
        " WHERE sequence = 4)"
    )
    found = watching.turn(trust(), 1.0)
    assert [(one.sequence, "was verified before" in one.what) for one in found] == [(SIZE, True)]


def test_a_chain_rewritten_with_the_key_is_found_by_what_was_verified_before(conn: Connection) -> None:
    watching = watch(conn, size=2)
    passed(watching)
    other = History()
    other.open()
    for _ in range(SIZE):
        other.batch(9)
    as_attacker(conn, f"DELETE FROM {TABLE}")
    conn.execute("DELETE FROM vsql_sync.chain_heads")
    store(conn, other)
    found = passed(watching, EVERY + 1)
    assert found
    assert "not the one that was verified before" in found[0].what


def test_a_break_that_is_mended_is_gone_and_stays_written(conn: Connection) -> None:
    as_attacker(conn, f"UPDATE {TABLE} SET row_count = row_count + 1 WHERE sequence = 5")
    watching = watch(conn)
    assert len(passed(watching)) == 1
    as_attacker(conn, f"UPDATE {TABLE} SET row_count = row_count - 1 WHERE sequence = 5")
    assert passed(watching, EVERY + 1) == []
    assert watch_state.open_breaks(conn) == []
    assert conn.execute(
        "SELECT count(*) FROM vsql_sync.audit_breaks WHERE gone_at IS NOT NULL"
    ).fetchone() == (1,)
    assert state(conn).whole_to == SIZE


@pytest.mark.parametrize(("size", "sequence"), [(4, 4), (SIZE + 5, SIZE + 1)])
def test_a_head_a_target_cosigned_must_be_in_the_trail(conn: Connection, size: int, sequence: int) -> None:
    watching = watch(conn)
    watching.cosigned = {CHAIN: {"node-b": (size, "00" * 32)}}
    found = passed(watching)
    assert [one.sequence for one in found] == [sequence]
    assert "co-signed" in found[0].what


def test_the_head_a_target_truly_cosigned_is_no_break(conn: Connection) -> None:
    root = tree.root_of(ordinary().head.tree)
    assert Checkpoint(Log(CLUSTER, CHAIN), SIZE, root).size == SIZE
    watching = watch(conn)
    watching.cosigned = {CHAIN: {"node-b": (SIZE, root.hex())}}
    assert passed(watching) == []


def test_other_chains_are_verified_where_one_is_broken(conn: Connection) -> None:
    store(conn, acknowledged_by_a())
    as_attacker(conn, f"UPDATE {TABLE} SET row_count = 99 WHERE sequence = 2 AND chain = '{CHAIN}'")
    watching = watch(conn)
    assert [one.chain for one in passed(watching)] == [CHAIN]
    assert state(conn, "bills.node-a").whole_to == 2


def acknowledged_by_a() -> History:
    history = History("bills.node-a")
    history.open()
    history.note()
    return history


def test_services_note_breaks_with_their_own_rights_and_can_order_nothing_else(conn: Connection) -> None:
    roles.create(conn)
    as_attacker(conn, f"UPDATE {TABLE} SET row_count = 99 WHERE sequence = 5")
    conn.execute(
        "INSERT INTO vsql_sync.streams (chain, direction, kind, publication, origin, target, state, desired)"
        " VALUES (%s, 'out', 'live', 'orders', 'node-a', '*', 'SYNCHRONIZED', 'running')",
        (CHAIN,),
    )
    conn.execute(f"SET ROLE {roles.PRODUCER}")
    assert len(passed(watch(conn))) == 1
    conn.execute("RESET ROLE")
    orders = conn.execute("SELECT role, chain, verb, args FROM vsql_sync.commands").fetchall()
    line = conn.execute("SELECT id FROM vsql_sync.audit_log WHERE action = 'audit.break'").fetchone()
    assert line is not None
    assert orders == [("producer", CHAIN, "note-break", {"audit_log": line[0]})]


# The topic


def settings_for(folder: Path, kafka: str) -> Settings:
    path = folder / "node.toml"
    path.write_text(
        f'[cluster]\nname = "{CLUSTER}"\nnode_id = 1\nnode_name = "node-a"\n'
        f'[connection]\ndatabase = "x"\n[server]\nmode = "dev"\n[kafka]\nbootstrap_servers = "{kafka}"\n'
        "[audit]\nverify_slice = 3\n"
    )
    return load_settings(path)


def published(kafka: Kafka, name: str, documents: list[bytes]) -> None:
    """The audit topic of the histories' cluster, made anew with these records."""
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    if name in admin.list_topics(timeout=10).topics:
        admin.delete_topics([name])[name].result(30)
        until(lambda: name not in admin.list_topics(timeout=10).topics)
    admin.create_topics([NewTopic(name, 1)])[name].result(30)
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers})
    for document in documents:
        producer.produce(name, document)
    assert producer.flush(30) == 0


def read_whole(conn: Connection, settings: Settings, most: int = 200) -> list[Problem]:
    """Turn until a pass has ended; a new reader for every slice, as after a restart."""
    found: list[Problem] = []
    for number in range(most):
        with closing(TopicAuditor(conn, settings)) as reader:
            found += reader.turn(trust(), 1.0 + number)
        if watch_state.load_topic(conn) is None and number:
            return found
    raise AssertionError("the pass does not end")


def test_the_topic_is_read_slice_by_slice_and_a_cut_of_it_is_found(
    conn: Connection, kafka: Kafka, tmp_path: Path
) -> None:
    settings, topic = settings_for(tmp_path, kafka.bootstrap_servers), audit_topic(CLUSTER)
    documents = ordinary().documents
    published(kafka, topic, documents)
    assert read_whole(conn, settings) == []
    assert state(conn, watch_state.TOPIC).whole_to == SIZE
    published(kafka, topic, documents[:6])
    found = read_whole(conn, settings)
    assert [(one.chain, one.sequence) for one in found] == [(CHAIN, 7)]
    assert "Kafka lost entries" in found[0].what
    published(kafka, topic, documents)
    assert read_whole(conn, settings) == []
    assert watch_state.open_breaks(conn) == []


def test_a_topic_that_cannot_be_read_keeps_the_trail_from_nothing(conn: Connection, tmp_path: Path) -> None:
    with closing(TopicAuditor(conn, settings_for(tmp_path, "127.0.0.1:1"))) as reader:
        assert reader.turn(trust(), 1.0) == []
    assert passed(watch(conn)) == []
    assert state(conn).whole_to == SIZE


# A running service


@pytest.mark.timeout(240)
def test_a_running_service_finds_a_break_tells_it_everywhere_and_signs_it(pairs: Pairs) -> None:
    pair = pairs("CREATE TABLE t (id int PRIMARY KEY, v text)")
    pair.create(["t(*)"], copy=False)
    for each in (pair.a, pair.b):
        text = each.config.read_text()
        own = 'verify_every = "2s"\nverify_slice = 50\nverify_pause = "50ms"\n'
        each.config.write_text(text.replace("[metrics]", f"{own}\n[metrics]"))
    pair.start()
    for number in range(10):
        pair.a.execute(f"INSERT INTO t VALUES ({number}, 'x')")
    pair.wait_in_step()
    until(lambda: whole(pair.a, pair.chain) and whole(pair.b, f"{pair.chain}.ack.node-b"), timeout=60)
    until(lambda: whole(pair.a, "") and whole(pair.b, ""), timeout=60)
    assert pair.a.ctl_json("status")["audit"]["breaks"] == []
    altered = pair.a.query(
        "SELECT min(sequence) FROM vsql_sync.vsql_sync_audit WHERE event_type = 'replication_batch'"
    )[0][0]
    with node(pair.a.conninfo) as conn:
        as_attacker(conn, f"UPDATE {TABLE} SET row_count = 99 WHERE sequence = {altered}")
    until(lambda: pair.a.ctl_json("status")["audit"]["breaks"], timeout=60)
    (found,) = pair.a.ctl_json("status")["audit"]["breaks"]
    assert (found["source"], found["chain"], found["sequence"]) == ("trail", pair.chain, altered)
    assert "AUDIT BREAK" in pair.a.ctl("status").stdout
    assert "the audit trail does not verify" in pair.a.log_file("producer").read_text()
    assert f'vsql_sync_audit_chain_breaks{{node="node-a",stream="{pair.chain}"}} 1.0' in metrics(pair.a)
    acts = "SELECT count(*) FROM vsql_sync.vsql_sync_audit WHERE event_type = 'operator_action'"
    until(lambda: pair.a.query(acts) == [(1,)], timeout=30)
    # The stream itself goes on, and the target has nothing to say against it.
    pair.a.execute("INSERT INTO t VALUES (100, 'after')")
    pair.wait_in_step()
    assert pair.differences() == []
    assert pair.b.ctl_json("status")["audit"]["breaks"] == []
    done = pair.a.ctl("audit", "verify", check=False)
    assert (done.returncode, f"entry {altered}" in done.stderr) == (9, True)


def whole(of: Node, chain: str) -> bool:
    rows = of.query("SELECT whole_at IS NOT NULL FROM vsql_sync.audit_watch WHERE chain = %s", chain)
    return bool(rows == [(True,)])


def metrics(of: Node) -> str:
    """What the producer's service shows."""
    for line in of.log_file("producer").read_text().splitlines():
        if '"health"' in line:
            address = json.loads(line)["health"].removeprefix("http://")
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
                return str(answer.read().decode())
    raise AssertionError("no address of the service in its log")
