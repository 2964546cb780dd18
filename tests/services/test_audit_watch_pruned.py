"""The background verification of a chain that was pruned: its base is no break, and every cut is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer
from psycopg.types.json import Jsonb

from tests.audit_history import CHAIN, CLUSTER, A, B, History, ordinary, trust
from tests.audit_segments import base, head_at
from tests.conftest import NewDatabase
from tests.services.test_audit_archive import altered, note_base, say
from tests.services.test_audit_trail import TABLE, as_attacker, check, node, store
from tests.services.test_audit_watch import EVERY, passed, published, read_whole, settings_for, state, watch
from tests.stack import Kafka
from vsql_shared.audit import watch_state
from vsql_shared.audit.bases import noted_begins, said_base, signed_base
from vsql_shared.audit.checkpoint import Log
from vsql_shared.audit.pruning import delete
from vsql_shared.audit.verify import noted_segments
from vsql_shared.errors import DecodeError
from vsql_shared.names import audit_topic
from vsql_shared.pg import nodes, roles
from vsql_shared.pg.connect import Connection
from vsql_shared.service.topic_auditor import TopicAuditor

LOG = Log(CLUSTER, CHAIN)
PRUNED = 9
"""Entries that go; the eighth, an operator's act, is kept."""


def made_history() -> History:
    """The ordinary one, which says then where it was pruned, and goes on."""
    history = ordinary()
    say(history, base(history, PRUNED))
    history.batch()
    return history


HISTORY = made_history()
BASE = base(HISTORY, PRUNED)
SIZE = len(HISTORY.entries)


def archive_rows(conn: Connection) -> None:
    """The row of a segment that has all that goes."""
    conn.execute(
        "INSERT INTO vsql_sync.audit_segments (chain, first_sequence, last_sequence, bucket, object_key,"
        " object_version, sha256, bytes, retain_until, head, note)"
        " VALUES (%s, 1, %s, 'b', 'k', 'v', %s, 1, %s, '{}', '')",
        (CHAIN, PRUNED, bytes(32), datetime(2100, 1, 1, tzinfo=UTC)),
    )


@pytest.fixture
def said(new_schema: NewDatabase) -> Iterator[Connection]:
    """The chain says its base, and the rows are still there."""
    with node(new_schema("pruned")) as conn:
        nodes.register_local(conn, 1, "node-a", CLUSTER, A.public_key)
        nodes.pin(conn, "node-b", B.public_key)
        archive_rows(conn)
        store(conn, HISTORY)
        yield conn


@pytest.fixture
def pruned(said: Connection) -> Connection:
    prune(said)
    return said


def prune(conn: Connection) -> None:
    assert delete(conn, BASE, LOG)[0] == PRUNED


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_a_pruned_chain_is_read_from_its_base_and_is_whole(pruned: Connection, size: int) -> None:
    assert passed(watch(pruned, size)) == []
    assert (state(pruned).verified_to, state(pruned).whole_to) == (SIZE, SIZE)
    assert watch_state.open_breaks(pruned) == []
    assert check(pruned).ok


def test_where_a_chain_begins_is_shown_once_its_rows_are_gone(said: Connection) -> None:
    roles.create(said)
    said.execute(f"SET ROLE {roles.VIEWER}".encode())
    assert noted_begins(said) == {}
    said.execute("RESET ROLE")
    prune(said)
    said.execute(f"SET ROLE {roles.VIEWER}".encode())
    assert noted_begins(said) == {CHAIN: PRUNED + 1}


def test_services_verify_a_pruned_chain_with_their_own_rights(pruned: Connection) -> None:
    roles.create(pruned)
    for role in (roles.PRODUCER, roles.CONSUMER):
        pruned.execute(f"SET ROLE {role}")
        assert passed(watch(pruned)) == []
        pruned.execute("RESET ROLE")
    assert state(pruned).whole_to == SIZE


@pytest.mark.parametrize("turns", range(8))
def test_a_chain_that_is_pruned_while_it_is_read_is_no_break(said: Connection, turns: int) -> None:
    watching = watch(said, 2)
    for _ in range(turns):
        assert watching.turn(trust(), 0.0) == []
    prune(said)
    assert passed(watching) == []
    assert passed(watching, EVERY + 1) == []
    assert (state(said).verified_to, state(said).whole_to) == (SIZE, SIZE)


def test_rows_between_a_base_and_the_size_it_is_noted_for_are_not_passed_over(said: Connection) -> None:
    said.execute(
        "INSERT INTO vsql_sync.audit_kept SELECT chain, sequence, event_type, source_node_id, document"
        f" FROM {TABLE} WHERE sequence = 8"
    )
    said.execute(
        "INSERT INTO vsql_sync.audit_bases (chain, size, base) VALUES (%s, 6, %s)", (CHAIN, BASE.encode())
    )
    as_attacker(said, f"DELETE FROM {TABLE} WHERE sequence <= 6 OR sequence = {PRUNED}")
    as_attacker(said, f"UPDATE {TABLE} SET row_count = 99 WHERE sequence = 7")
    found = passed(watch(said))
    assert found
    assert all("noted for 6 entries is of 9" in one.what for one in found), found


def test_what_was_verified_before_and_is_pruned_now_keeps_no_service_from_going_on(said: Connection) -> None:
    watch(said, 5).turn(trust(), 0.0)
    assert state(said).verified_to == 5
    prune(said)
    assert passed(watch(said, 5)) == []
    assert state(said).whole_to == SIZE


def test_new_entries_of_a_pruned_chain_are_verified_as_they_come(pruned: Connection) -> None:
    watching = watch(pruned)
    passed(watching)
    more = History(head=HISTORY.head)
    more.open()
    store(pruned, more)
    assert watching.turn(trust(), 1.0) == []
    assert state(pruned).verified_to == SIZE + 1
    as_attacker(pruned, f"UPDATE {TABLE} SET row_count = 99 WHERE sequence = {PRUNED + 1}")
    assert [one.sequence for one in passed(watching, EVERY + 1)] == [PRUNED + 1]


def cut_further(conn: Connection) -> None:
    as_attacker(conn, f"DELETE FROM {TABLE} WHERE sequence <= 10")
    note_base(conn, base(HISTORY, 10))


def base_says(change: str) -> Callable[[Connection], None]:
    return lambda conn: altered(conn, "audit_bases", f"UPDATE vsql_sync.audit_bases SET base = {change}")


def kept_twice(conn: Connection) -> None:
    conn.execute(
        "INSERT INTO vsql_sync.audit_kept SELECT chain, 3, event_type, source_node_id, document"
        " FROM vsql_sync.audit_kept"
    )


def kept_without_document(conn: Connection) -> None:
    conn.execute("ALTER TABLE vsql_sync.audit_kept ALTER document DROP NOT NULL")
    altered(conn, "audit_kept", "UPDATE vsql_sync.audit_kept SET document = NULL")


# What a superuser does to a pruned chain → the entry that is named, and words of what is said.
ATTACKS: dict[str, tuple[Callable[[Connection], object], int | None, str]] = {
    "the base is deleted": (
        lambda conn: altered(conn, "audit_bases", "DELETE FROM vsql_sync.audit_bases"),
        1,
        "missing: sequence 1",
    ),
    "one entry more is cut off": (
        lambda conn: as_attacker(conn, f"DELETE FROM {TABLE} WHERE sequence = {PRUNED + 1}"),
        1,
        "missing: sequence 1",
    ),
    "all is cut off": (lambda conn: as_attacker(conn, f"DELETE FROM {TABLE}"), 1, "cut at its end"),
    "its end is cut off": (
        lambda conn: as_attacker(conn, f"DELETE FROM {TABLE} WHERE sequence = {SIZE}"),
        SIZE,
        "cut at its end",
    ),
    "an entry behind the base is taken out": (
        lambda conn: as_attacker(conn, f"DELETE FROM {TABLE} WHERE sequence = {PRUNED + 2}"),
        PRUNED + 2,
        "missing",
    ),
    "cut to a base the chain does not say": (
        cut_further,
        11,
        "no entry of it says that it was pruned up to 10",
    ),
    "another head in the base": (
        base_says("replace(base, '\"batch\":6', '\"batch\":5')"),
        10,
        "batch number",
    ),
    "another tree in the base": (
        base_says("regexp_replace(base, '\"tree\":\\[\"[0-9a-f]{64}', '\"tree\":[\"' || repeat('00', 32))"),
        None,
        "where it was pruned does not verify",
    ),
    "a base that is none": (base_says("'{}'"), None, "where it was pruned does not verify"),
    "what was kept is taken away": (
        lambda conn: altered(conn, "audit_kept", "DELETE FROM vsql_sync.audit_kept"),
        PRUNED,
        "0 entries are kept beside the trail, not the 1",
    ),
    "what was kept is altered": (
        lambda conn: altered(
            conn, "audit_kept", "UPDATE vsql_sync.audit_kept SET event_type = 'key_rotated'"
        ),
        8,
        "it is not what its row says",
    ),
    "what was kept loses its document": (kept_without_document, 8, "kept beside the trail"),
    "something is put beside what was kept": (kept_twice, 3, "it is not what its row says"),
    "nothing shows that it was archived": (
        lambda conn: altered(conn, "audit_segments", "DELETE FROM vsql_sync.audit_segments"),
        PRUNED,
        "noted cover 0",
    ),
}


@pytest.mark.parametrize("case", ATTACKS)
def test_what_is_done_to_a_pruned_chain_is_named_once_and_it_is_not_whole(
    pruned: Connection, case: str
) -> None:
    change, sequence, words = ATTACKS[case]
    change(pruned)
    watching = watch(pruned, 2)
    found = passed(watching)
    assert any(one.sequence == sequence and words in one.what for one in found), found
    assert passed(watching, EVERY + 1) == []
    assert [one.whole_at for one in watch_state.progress(pruned) if one.chain == CHAIN] in ([], [None])
    assert {(one.source, one.sequence) for one in watch_state.open_breaks(pruned)} == {
        ("trail", one.sequence) for one in found
    }


def test_a_chain_that_was_whole_and_is_cut_to_an_unsaid_base_is_found_by_the_next_pass(
    pruned: Connection,
) -> None:
    watching = watch(pruned)
    assert passed(watching) == []
    cut_further(pruned)
    assert [one.sequence for one in passed(watching, EVERY + 1)] == [11]


def test_a_beginning_that_is_cut_off_without_a_word_of_the_chain_is_a_break(
    new_schema: NewDatabase,
) -> None:
    """A genuine head, cosigned, is noted as a base: the chain itself does not say it."""
    with node(new_schema("cut")) as conn:
        nodes.register_local(conn, 1, "node-a", CLUSTER, A.public_key)
        nodes.pin(conn, "node-b", B.public_key)
        store(conn, ordinary())
        as_attacker(conn, f"DELETE FROM {TABLE} WHERE sequence <= 6")
        assert [one.sequence for one in passed(watch(conn))] == [1]
        note_base(conn, base(ordinary(), 6))
        assert [one.sequence for one in passed(watch(conn))] == [7]


def test_a_base_other_than_what_was_verified_there_before_is_a_break(said: Connection) -> None:
    head = replace(head_at(HISTORY, PRUNED), entry_hash=bytes(32))
    prune(said)
    said.execute(
        "INSERT INTO vsql_sync.audit_watch (source, chain, newest) VALUES ('trail', %s, %s)",
        (CHAIN, Jsonb(watch_state.encode_head(head))),
    )
    found = passed(watch(said))
    assert [(one.sequence, "was rewritten" in one.what) for one in found] == [(PRUNED, True)]


@pytest.mark.parametrize(("size", "found"), [(4, []), (PRUNED, [PRUNED])])
def test_what_a_target_cosigned_is_held_against_the_base(
    pruned: Connection, size: int, found: list[int]
) -> None:
    watching = watch(pruned)
    watching.cosigned = {CHAIN: {"node-b": (size, "00" * 32)}}
    assert [one.sequence for one in passed(watching)] == found


def test_the_base_a_chain_says_is_known_though_its_row_was_altered(said: Connection) -> None:
    assert said_base(said, trust(), LOG) == signed_base(said, trust(), LOG) == BASE
    base_says("'{}'")(said)
    assert signed_base(said, trust(), LOG) == BASE
    with pytest.raises(DecodeError):
        said_base(said, trust(), LOG)
    assert signed_base(said, trust(B), LOG) is None  # nobody known has signed it


def test_a_copy_of_an_entry_that_says_a_base_says_none(said: Connection) -> None:
    said.execute(
        "INSERT INTO vsql_sync.audit_kept SELECT chain, 99, event_type, source_node_id, document"
        f" FROM {TABLE} WHERE event_type = 'trail_pruned'"
    )
    as_attacker(said, f"DELETE FROM {TABLE} WHERE event_type = 'trail_pruned'")
    assert signed_base(said, trust(), LOG) is None


def test_a_document_that_was_made_null_keeps_neither_trail_nor_topic_from_being_read(
    pruned: Connection, kafka: Kafka, tmp_path: Path
) -> None:
    pruned.execute(f"ALTER TABLE {TABLE} ALTER document DROP NOT NULL")
    as_attacker(pruned, f"UPDATE {TABLE} SET document = NULL WHERE sequence = 12")
    published(kafka, audit_topic(CLUSTER), HISTORY.documents[PRUNED:])
    settings = settings_for(tmp_path, kafka.bootstrap_servers)
    assert 12 in [one.sequence for one in read_whole(pruned, settings, step=10.0)]
    assert [one.sequence for one in passed(watch(pruned))] == [12]


def test_verify_says_what_the_archive_does_not_cover(pruned: Connection) -> None:
    assert noted_segments(pruned, check(pruned)) == []
    altered(pruned, "audit_segments", "DELETE FROM vsql_sync.audit_segments")
    assert [one.sequence for one in noted_segments(pruned, check(pruned))] == [PRUNED]


# The topic


# What Kafka has of the chain → the entry that is named; none where nothing is.
TOPICS: dict[str, tuple[list[bytes], list[int]]] = {
    "what was pruned is gone": (HISTORY.documents[PRUNED:], []),
    "nothing is gone": (HISTORY.documents, []),
    "some of it is gone": ([*HISTORY.documents[:2], *HISTORY.documents[5:]], []),
    "more is gone": (HISTORY.documents[PRUNED + 1 :], [PRUNED + 1]),
    "what says it is gone": ([*HISTORY.documents[PRUNED:11], *HISTORY.documents[12:]], [12]),
    "the end is gone": (HISTORY.documents[PRUNED:-1], [SIZE]),
}


@pytest.mark.parametrize("case", TOPICS)
def test_the_topic_of_a_pruned_chain_begins_at_its_base(
    pruned: Connection, kafka: Kafka, tmp_path: Path, case: str
) -> None:
    documents, places = TOPICS[case]
    published(kafka, audit_topic(CLUSTER), documents)
    found = read_whole(pruned, settings_for(tmp_path, kafka.bootstrap_servers), step=10.0)
    assert [(one.chain, one.sequence) for one in found] == [(CHAIN, place) for place in places]
    if not places:
        assert state(pruned, "", "topic").whole_to == len(documents)


def test_a_topic_without_its_beginning_and_without_a_base_is_a_break(
    new_schema: NewDatabase, kafka: Kafka, tmp_path: Path
) -> None:
    with node(new_schema("cut")) as conn:
        nodes.register_local(conn, 1, "node-a", CLUSTER, A.public_key)
        nodes.pin(conn, "node-b", B.public_key)
        store(conn, ordinary())
        note_base(conn, base(ordinary(), 6))  # a row says it, no entry does
        published(kafka, audit_topic(CLUSTER), ordinary().documents[6:])
        settings = settings_for(tmp_path, kafka.bootstrap_servers)
        assert [one.sequence for one in read_whole(conn, settings, step=10.0)] == [1]


def test_a_chain_that_is_pruned_while_the_topic_is_read_is_no_break(
    new_schema: NewDatabase, kafka: Kafka, tmp_path: Path
) -> None:
    first, later = HISTORY.entries[:11], HISTORY.entries[11:]
    with node(new_schema("moving")) as conn:
        nodes.register_local(conn, 1, "node-a", CLUSTER, A.public_key)
        nodes.pin(conn, "node-b", B.public_key)
        archive_rows(conn)
        store(conn, ordinary())
        settings, topic = settings_for(tmp_path, kafka.bootstrap_servers), audit_topic(CLUSTER)
        published(kafka, topic, [one.encoded for one in first])
        found: list[Any] = []
        with closing(TopicAuditor(conn, settings)) as reader:
            found += reader.turn(trust(), 0.0) + reader.turn(trust(), 1.0)
            assert reader.busy
            producer = Producer({"bootstrap.servers": kafka.bootstrap_servers})
            for one in later:
                producer.produce(topic, one.encoded)
            assert producer.flush(30) == 0
            rest = History(head=ordinary().head)
            rest.entries = later
            store(conn, rest)
            prune(conn)
            for second in range(2, 60):
                found += reader.turn(trust(), float(second))
                if any(one.source == "topic" for one in watch_state.progress(conn)):
                    break
        assert found == []
        assert state(conn, "", "topic").whole_to == SIZE
