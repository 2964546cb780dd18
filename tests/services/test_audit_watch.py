"""The background verification: breaks of trail and topic are found, told once, and a restart goes on."""

from __future__ import annotations

import collections
import json
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]  # no stubs say so
from psycopg.errors import InsufficientPrivilege
from psycopg.rows import dict_row, tuple_row
from psycopg.types.json import Jsonb

from tests.audit_history import (
    ACKS,
    CHAIN,
    CLUSTER,
    A,
    B,
    History,
    acknowledged,
    entry,
    ordinary,
    signer,
    trust,
)
from tests.conftest import NewDatabase
from tests.nodes import Node
from tests.pairs import Pairs
from tests.services.test_audit_trail import TABLE, as_attacker, copy_of, node, store
from tests.stack import Kafka
from tests.waiting import until
from vsql_shared.audit import tree, watch_state
from vsql_shared.audit.dsse import AUDIT_ENTRY, sign_document
from vsql_shared.audit.verify import Problem
from vsql_shared.audit.watch import TrailWatch
from vsql_shared.config import Settings, load_settings
from vsql_shared.errors import VsqlSyncError
from vsql_shared.names import audit_topic
from vsql_shared.pg import nodes, roles
from vsql_shared.pg.connect import Connection, connect
from vsql_shared.service.auditor import Gauges, TopicTurns
from vsql_shared.service.topic_auditor import TopicAuditor

SIZE = len(ordinary().entries)
EVERY = 1000.0


@pytest.fixture
def conn(new_schema: NewDatabase) -> Iterator[Connection]:
    """A node with an ordinary history."""
    with node(new_schema("watch")) as conn:
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


def state(conn: Connection, chain: str = CHAIN, source: str = "trail") -> watch_state.Progress:
    return next(one for one in watch_state.progress(conn) if (one.source, one.chain) == (source, chain))


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


def test_a_service_that_starts_reads_everything_once_more(conn: Connection) -> None:
    passed(watch(conn))
    second = watch(conn)
    second.turn(trust(), 0.0)
    assert second.busy
    as_attacker(conn, f"UPDATE {TABLE} SET row_count = 99 WHERE sequence = 5")
    assert [one.sequence for one in passed(second)] == [5]


FORGED = ("'{}'", "'[]'", "'7'", """newest || '{"sequence": "x"}'""", """newest || '{"sequence": -5}'""")


@pytest.mark.parametrize("value", FORGED)
def test_nothing_that_is_written_into_its_table_ends_the_verification_or_makes_anything_whole(
    conn: Connection, value: str
) -> None:
    passed(watch(conn))
    as_attacker(conn, f"UPDATE {TABLE} SET row_count = 99 WHERE sequence = 2")
    conn.execute(
        f"UPDATE vsql_sync.audit_watch SET newest = {value}, whole_at = NULL, verified_at = '2100-01-01'"
    )
    found = passed(watch(conn))
    assert [one.sequence for one in found] == [2]
    assert state(conn).whole_at is None
    assert [one.sequence for one in watch_state.open_breaks(conn)] == [2]


def test_a_head_that_is_moved_forward_in_its_table_passes_no_break_over(conn: Connection) -> None:
    """What is new is then taken for verified, and the pass finds the break all the same."""
    watch(conn).turn(trust(), 0.0)
    as_attacker(conn, f"UPDATE {TABLE} SET row_count = 99 WHERE sequence = 5")
    head = Jsonb(watch_state.encode_head(ordinary().head))
    conn.execute("UPDATE vsql_sync.audit_watch SET newest = %s", (head,))
    assert [one.sequence for one in passed(watch(conn))] == [5]


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
    (gone,) = watch_state.breaks(conn)
    assert gone.gone_at is not None
    logged = conn.execute(
        "SELECT target_id, new_value->'breaks' FROM vsql_sync.audit_log WHERE action = 'audit.break-gone'"
    ).fetchall()
    assert logged == [(CHAIN, [1])]
    assert state(conn).whole_to == SIZE


def test_a_row_of_no_chain_that_is_taken_away_is_gone(conn: Connection) -> None:
    conn.execute(f"ALTER TABLE {TABLE} ALTER chain DROP NOT NULL")
    as_attacker(conn, f"UPDATE {TABLE} SET chain = NULL WHERE sequence = {SIZE}")
    watching = watch(conn)
    assert {one.chain for one in passed(watching)} == {"", CHAIN}
    as_attacker(conn, f"UPDATE {TABLE} SET chain = '{CHAIN}' WHERE sequence = {SIZE}")
    assert passed(watching, EVERY + 1) == []
    assert watch_state.open_breaks(conn) == []


def test_an_altered_column_hides_no_later_break_and_its_chain_is_not_whole(conn: Connection) -> None:
    as_attacker(conn, f"UPDATE {TABLE} SET row_count = 99 WHERE sequence = 2")
    as_attacker(conn, f"UPDATE {TABLE} SET document = 'x' WHERE sequence = 8")
    assert [one.sequence for one in passed(watch(conn))] == [2, 8]
    assert state(conn).whole_at is None


def test_new_entries_of_a_chain_with_an_altered_column_are_verified_too(conn: Connection) -> None:
    as_attacker(conn, f"UPDATE {TABLE} SET row_count = 99 WHERE sequence = 2")
    watching = watch(conn)
    passed(watching)
    history = History(head=ordinary().head)
    history.open()
    store(conn, history)
    as_attacker(conn, f"UPDATE {TABLE} SET document = 'x' WHERE sequence = {SIZE + 1}")
    assert [one.sequence for one in watching.turn(trust(), 1.0)] == [SIZE + 1]


def test_many_altered_rows_are_no_flood(conn: Connection) -> None:
    history = History(head=ordinary().head)
    history.open()
    for _ in range(20):
        history.note()
    store(conn, history)
    as_attacker(conn, f"UPDATE {TABLE} SET row_count = 99")
    assert len(passed(watch(conn, size=7))) == 10


def test_a_break_that_lasts_is_one_row_however_the_trail_grows(conn: Connection) -> None:
    watching = watch(conn)
    watching.cosigned = {CHAIN: {"node-b": (1000, "00" * 32)}}
    assert len(passed(watching)) == 1
    history = History(head=ordinary().head)
    history.open()
    store(conn, history)
    watching.cosigned = {CHAIN: {"node-b": (1001, "00" * 32)}}
    assert passed(watching, EVERY + 1) == []
    assert state(conn).verified_to == SIZE + 1


def test_the_time_of_what_is_verified_is_that_of_the_newest_entry_there_is(conn: Connection) -> None:
    watching = watch(conn, size=3)
    watching.turn(trust(), 0.0)
    assert (state(conn).verified_to, state(conn).verified_at) == (3, None)
    passed(watching)
    before = state(conn).verified_at
    assert before is not None
    as_attacker(conn, f"UPDATE {TABLE} SET document = 'x' WHERE sequence = 5")
    passed(watching, EVERY + 1)
    assert state(conn).verified_at == before


def test_all_chains_together_have_one_slice_of_new_entries_a_turn(conn: Connection) -> None:
    for name in ("bills", "carts"):
        other = History(f"{name}.node-a")
        other.open()
        other.note()
        other.note()
        store(conn, other)
    watching = watch(conn, size=2)
    seen = []
    for _ in range(3):
        watching.turn(trust(), 0.0)
        seen.append({one.chain: one.verified_to for one in watch_state.progress(conn)})
    assert [sum(one.values()) <= most for one, most in zip(seen, (4, 6, 8), strict=True)] == [True] * 3, seen
    assert min(seen[-1].get(one, 0) for one in ("bills.node-a", "carts.node-a", CHAIN)) >= 2, seen


NASTY = "order\0.node-a", "x" * 5000 + ".node-a", "a\nb", "\ud800"


@pytest.mark.parametrize("name", NASTY, ids=["NUL", "long", "lines", "surrogate"])
def test_no_name_and_no_text_keeps_a_break_from_being_noted(conn: Connection, name: str) -> None:
    problem = Problem(name, 7, name, name * 10)
    assert watch_state.note(conn, "topic", problem)
    assert not watch_state.note(conn, "topic", problem)
    (shown,) = watch_state.open_breaks(conn)
    assert len(shown.what) <= 1000
    watch_state.end(conn, "topic", name)
    assert watch_state.open_breaks(conn) == []


@pytest.mark.parametrize(("size", "sequence"), [(4, 4), (SIZE + 5, None)])
def test_a_head_a_target_cosigned_must_be_in_the_trail(
    conn: Connection, size: int, sequence: int | None
) -> None:
    watching = watch(conn)
    watching.cosigned = {CHAIN: {"node-b": (size, "00" * 32)}}
    found = passed(watching)
    assert [one.sequence for one in found] == [sequence]
    assert "co-signed" in found[0].what


def test_the_head_a_target_truly_cosigned_is_no_break(conn: Connection) -> None:
    root = tree.root_of(ordinary().head.tree)
    watching = watch(conn)
    watching.cosigned = {CHAIN: {"node-b": (SIZE, root.hex())}}
    assert passed(watching) == []
    assert state(conn).whole_to == SIZE


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


def test_a_stream_that_is_stopped_owes_the_signed_note_until_it_runs(conn: Connection) -> None:
    conn.execute(
        "INSERT INTO vsql_sync.streams (chain, direction, kind, publication, origin, target, state, desired)"
        " VALUES (%s, 'out', 'live', 'orders', 'node-a', '*', 'SYNCHRONIZED', 'stopped')",
        (CHAIN,),
    )
    assert watch_state.note(conn, "trail", Problem(CHAIN, 5, None, "altered"))
    assert conn.execute("SELECT role, chain, verb FROM vsql_sync.commands").fetchall() == [
        ("producer", CHAIN, "note-break")
    ]


def test_no_service_makes_a_break_go_without_a_line_of_the_operators_log(conn: Connection) -> None:
    roles.create(conn)
    watch_state.note(conn, "trail", Problem(CHAIN, 5, None, "altered"))
    conn.execute(f"SET ROLE {roles.PRODUCER}")
    with pytest.raises(InsufficientPrivilege):
        conn.execute("UPDATE vsql_sync.audit_breaks SET gone_at = now()")
    watch_state.end(conn, "trail", CHAIN)
    conn.execute("RESET ROLE")
    lines = conn.execute("SELECT count(*) FROM vsql_sync.audit_log WHERE action = 'audit.break-gone'")
    assert lines.fetchone() == (1,)


def test_the_gauge_of_a_break_that_is_gone_or_that_another_shows_is_zero(conn: Connection) -> None:
    from vsql_shared.observe import metrics

    def shown(chain: str) -> float | None:
        labels = {"stream": chain, "node": "gauged"}
        return metrics.REGISTRY.get_sample_value("vsql_sync_audit_chain_breaks", labels)

    show = Gauges("gauged")
    for chain in ("", "gone.node-a"):
        watch_state.note(conn, "topic", Problem(chain, None, None, "x"))
        show(conn)
        assert shown(chain) == 1
    watch_state.end(conn, "topic", "gone.node-a")
    show(conn)
    assert (shown(""), shown("gone.node-a")) == (1, 0)
    show.close()
    assert shown("") == 0


# The topic


def settings_for(folder: Path, kafka: str, name: str = "node-a") -> Settings:
    path = folder / "node.toml"
    path.write_text(
        f'[cluster]\nname = "{CLUSTER}"\nnode_id = 1\nnode_name = "{name}"\n'
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
    # A broker under load may still answer for the topic of that name that was there before.
    until(lambda: _ends(kafka, name) == (0, 0))
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers})
    failed: list[object] = []
    for document in documents:
        producer.produce(name, document, on_delivery=lambda error, _: failed.append(error) if error else None)
    assert producer.flush(30) == 0
    assert failed == []
    until(lambda: _ends(kafka, name) == (0, len(documents)))


def _ends(kafka: Kafka, name: str) -> tuple[int, int] | None:
    """The first and the next offset, as a client sees them that knows nothing yet; None before it may."""
    client = Consumer({"bootstrap.servers": kafka.bootstrap_servers, "group.id": "ends-of-a-test"})
    with closing(client), suppress(KafkaException):
        found: tuple[int, int] = client.get_watermark_offsets(TopicPartition(name, 0), timeout=10)
        return found
    return None


def read_whole(conn: Connection, settings: Settings, most: int = 200, step: float = 1.0) -> list[Problem]:
    """Turn until a pass has ended; `step`: seconds its clock goes on with each turn."""
    found: list[Problem] = []
    with closing(TopicAuditor(conn, settings)) as reader:
        for number in range(most):
            found += reader.turn(trust(), number * step)
            if number and not reader.busy:
                return found
    raise AssertionError("the pass does not end")


def test_the_topic_is_read_slice_by_slice_and_a_cut_of_it_is_found(
    conn: Connection, kafka: Kafka, tmp_path: Path
) -> None:
    settings, topic = settings_for(tmp_path, kafka.bootstrap_servers), audit_topic(CLUSTER)
    documents = ordinary().documents
    published(kafka, topic, documents)
    assert read_whole(conn, settings) == []
    assert state(conn, "", "topic").whole_to == SIZE
    published(kafka, topic, documents[:6])
    found = read_whole(conn, settings, step=10.0)
    assert [(one.chain, one.sequence) for one in found] == [(CHAIN, 7)]
    assert "Kafka lost entries" in found[0].what
    # It lasts, the trail grows: no other break.
    history = History(head=ordinary().head)
    history.open()
    store(conn, history)
    assert read_whole(conn, settings, step=10.0) == []
    published(kafka, topic, [*documents, *history.documents])
    assert read_whole(conn, settings) == []
    assert watch_state.open_breaks(conn) == []


def test_an_entry_that_comes_behind_the_end_of_a_pass_is_waited_for(
    conn: Connection, kafka: Kafka, tmp_path: Path
) -> None:
    """As a consumer's own acknowledgements do: they are in the table before they are in Kafka."""
    settings, topic = settings_for(tmp_path, kafka.bootstrap_servers), audit_topic(CLUSTER)
    documents = ordinary().documents
    published(kafka, topic, documents[:-1])
    with closing(TopicAuditor(conn, settings)) as reader:
        assert turned(conn, reader, 0, 20)
        producer = Producer({"bootstrap.servers": kafka.bootstrap_servers})
        producer.produce(topic, documents[-1])
        assert producer.flush(30) == 0
        assert not turned(conn, reader, 20, 40)
    assert state(conn, "", "topic").whole_to == SIZE


def test_a_reader_of_the_topic_that_fails_as_nobody_expects_is_begun_anew_and_the_trail_is_read_on(
    conn: Connection, kafka: Kafka, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows of another form stand for what nobody thought of: the reader cannot take them apart."""
    settings, topic = settings_for(tmp_path, kafka.bootstrap_servers), audit_topic(CLUSTER)
    published(kafka, topic, ordinary().documents)
    watching = watch(conn)
    with closing(TopicTurns(lambda: TopicAuditor(conn, settings))) as turns:
        assert turns.turn(trust(), 0.0) == []  # a pass is under way
        conn.row_factory = dict_row  # type: ignore[assignment]  # that is the fault
        assert turns.turn(trust(), 1.0) == []
        conn.row_factory = tuple_row
        assert "begun anew" in caplog.text
        assert turns.turn(trust(), 2.0) == watching.turn(trust(), 2.0) == []
        assert "topic" not in [one.source for one in watch_state.progress(conn)]
        for second in range(6, 40):
            assert turns.turn(trust(), float(second)) == watching.turn(trust(), float(second)) == []
    assert state(conn, "", "topic").whole_to == state(conn).whole_to == SIZE


def turned(conn: Connection, reader: TopicAuditor, begin: int, end: int) -> bool:
    """Whether the reader is busy after these seconds, in which it finds nothing."""
    for second in range(begin, end):
        assert reader.turn(trust(), float(second)) == []
    assert watch_state.open_breaks(conn) == []
    return reader.busy


def test_forged_records_end_no_pass_and_what_follows_them_is_found(
    conn: Connection, kafka: Kafka, tmp_path: Path
) -> None:
    settings, topic = settings_for(tmp_path, kafka.bootstrap_servers), audit_topic(CLUSTER)
    stolen = signer("node-a", "stolen")
    nul = entry(chain="order?.node-a").encode().replace(b"order?", b"order\0")
    forged = [
        b"garbage",
        *(
            sign_document(stolen, AUDIT_ENTRY, raw)
            for raw in (nul, entry(chain="x" * 5000 + ".node-a").encode())
        ),
        sign_document(stolen, AUDIT_ENTRY, entry().encode()),
    ]
    documents = ordinary().documents
    published(kafka, topic, [*forged, *documents])
    assert [(one.chain, one.sequence) for one in read_whole(conn, settings)] == [("", None)]
    # Every entry was compared: the topic is whole, and what was appended stays shown.
    assert state(conn, "", "topic").whole_to == SIZE + len(forged)
    published(kafka, topic, [*forged, *documents[:4], *documents[5:]])
    assert [(one.chain, one.sequence) for one in read_whole(conn, settings, step=10.0)] == [(CHAIN, 5)]
    published(kafka, topic, documents)
    assert read_whole(conn, settings) == []
    assert watch_state.open_breaks(conn) == []


def test_a_database_that_fails_within_a_slice_makes_nothing_whole(
    conn: Connection, kafka: Kafka, tmp_path: Path
) -> None:
    settings, topic = settings_for(tmp_path, kafka.bootstrap_servers), audit_topic(CLUSTER)
    published(kafka, topic, ordinary().documents)
    as_attacker(conn, f"UPDATE {TABLE} SET document = 'x' WHERE sequence = 1")
    conn.execute("SET lock_timeout = '100ms'")
    with (
        connect(conn.info.dsn, application_name="another") as other,
        other.transaction(),
        closing(TopicAuditor(conn, settings)) as reader,
    ):
        other.execute(f"LOCK TABLE {TABLE} IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(VsqlSyncError):
            collections.deque(reader.turn(trust(), float(number)) for number in range(20))
    assert [one for one in watch_state.progress(conn) if one.source == "topic"] == []
    assert [one.sequence for one in read_whole(conn, settings)] == [1]


def test_a_nodes_own_acknowledgements_are_verified_on_the_topic(
    new_schema: NewDatabase, kafka: Kafka, tmp_path: Path
) -> None:
    acks = acknowledged(ordinary())
    with node(new_schema("acks")) as conn:
        nodes.register_local(conn, 2, "node-b", CLUSTER, B.public_key)
        store(conn, acks)
        settings = settings_for(tmp_path, kafka.bootstrap_servers, "node-b")
        documents = [*ordinary().documents, *acks.documents]
        published(kafka, audit_topic(CLUSTER), documents)
        assert read_whole(conn, settings) == []
        fork = History(ACKS, B)
        fork.open()
        fork.acknowledge(ordinary().entries[3])
        published(kafka, audit_topic(CLUSTER), [*documents, fork.documents[1]])
        assert [(one.chain, one.sequence) for one in read_whole(conn, settings)] == [(ACKS, 2)]


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
    # The row comes first; the log follows, and the metric at the end of the same turn.
    broken = f'vsql_sync_audit_chain_breaks{{node="node-a",stream="{pair.chain}"}} 1.0'
    until(lambda: broken in metrics(pair.a), timeout=30)
    assert "the audit trail does not verify" in pair.a.log_file("producer").read_text()
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
