"""Topics that were cut (DeleteRecords) or made anew: nothing is missed in silence, and what is whole goes on.

Each of the three kinds of topic, under a consumer that stands still, is away or runs, and at the producer's
next start. What is said stands in docs/design/0006, "Topics that were cut".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from tests.nodes import TwoNodes
from tests.pairs import Pairs
from tests.streams import alter_topic, cluster_topics
from tests.waiting import until
from vsql_shared import names
from vsql_shared.kafka.topics import delete_topics

pytestmark = [pytest.mark.topology, pytest.mark.timeout(240)]

TABLES = "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE u (id int PRIMARY KEY, v text)"
QUICK = "[limits]\nstatus_interval_ms = 200\nretry_backoff_max_ms = 1000\nbatch_linger_ms = 1\n"


@pytest.fixture
def pair(pairs: Pairs) -> TwoNodes:
    """In step, without a first copy."""
    made = pairs(TABLES, config=QUICK)
    made.create(["t(*)", "u(*)"], copy=False)
    made.start()
    made.a.execute("INSERT INTO t VALUES (0, 'first'); INSERT INTO u VALUES (0, 'first')")
    made.wait_in_step()
    _acknowledged(made)
    return made


def _acknowledged(pair: TwoNodes) -> None:
    """Until A has read what B acknowledged: after that nothing more is written by itself."""
    missing = (
        "SELECT 1 FROM vsql_sync.stream_targets WHERE acked_sequence <"
        " (SELECT max(sequence) FROM vsql_sync.vsql_sync_audit"
        " WHERE chain = %s AND event_type = 'replication_batch')"
    )
    until(lambda: not pair.a.query(missing, pair.chain))


def _insert(pair: TwoNodes, first: int, count: int = 3, table: str = "t") -> None:
    """Rows in batches of their own, all in Kafka when this returns."""
    for number in range(first, first + count):
        head = pair.heads()[0]
        pair.a.execute(f"INSERT INTO {table} VALUES ({number}, 'row')")
        until(lambda head=head: pair.heads()[0] > head)  # type: ignore[misc]  # bound now


def _deleted(admin: AdminClient, place: TopicPartition) -> bool:
    """Whether the broker has done it; it may not know yet that the topic is not compacted any more."""
    try:
        admin.delete_records([place])[place].result(20)
    except KafkaException as error:
        if error.args[0].code() != KafkaError.POLICY_VIOLATION:
            raise
        return False
    return True


def _delete_all(pair: TwoNodes, topic: str) -> None:
    """DeleteRecords up to the end, which only `delete` topics have."""
    compacted = topic.endswith((".audit", ".keys"))
    if compacted:
        alter_topic(pair.a.kafka, topic, cleanup_policy="delete")
    place = TopicPartition(topic, 0, -1)
    admin = AdminClient({"bootstrap.servers": pair.a.kafka})
    until(lambda: _deleted(admin, place))
    if compacted:
        alter_topic(pair.a.kafka, topic, cleanup_policy="compact")


def _delete_topic(pair: TwoNodes, topic: str) -> None:
    delete_topics(AdminClient({"bootstrap.servers": pair.a.kafka}), [topic])
    until(lambda: topic not in cluster_topics(pair.a.kafka, pair.cluster))


@contextmanager
def _standing_still(pair: TwoNodes) -> Iterator[None]:
    """B's consumer is there and does nothing: as one that lags, with its connections open."""
    found: list[psutil.Process] = pair.b.processes("consumer")
    for process in found:
        process.suspend()
    try:
        yield
    finally:
        for process in found:
            process.resume()


def _says(pair: TwoNodes, state: str, *words: str) -> str:
    """What B's stream says in a state, with all of these words in it."""

    def look() -> str:
        rows = pair.b.query(
            "SELECT coalesce(detail->'refused'->>'error', detail->>'last_error', '')"
            " || ' ' || coalesce(detail->'refused'->>'record', '')"
            " FROM vsql_sync.stream_status WHERE chain = %s AND direction = 'in' AND state = %s",
            pair.chain,
            state,
        )
        return str(rows[0][0]) if rows and all(word in rows[0][0] for word in words) else ""

    return until(look, 60, lambda: pair.b.tail("consumer"))


def _applied(pair: TwoNodes, table: str = "t") -> int:
    return int(pair.b.query(f"SELECT count(*) FROM {table}")[0][0])


def _whole(pair: TwoNodes) -> None:
    """The stream goes on and nothing is missing."""
    pair.wait_in_step(60)
    assert pair.differences() == []
    for node in (pair.a, pair.b):
        node.ctl("audit", "verify")


# The audit topic


def test_entries_deleted_before_a_consumer_that_was_away_read_them_are_diverged(pair: TwoNodes) -> None:
    audit = names.audit_topic(pair.cluster)
    pair.b.stop("consumer")
    _insert(pair, 1)
    _delete_all(pair, audit)
    pair.b.start("consumer")
    said = _says(pair, "diverged", audit, "deleted what lay before offset", "is not among what is left")
    assert "initialise this node anew" in said
    assert _applied(pair) == 1
    # The producer goes on; what B lacks it lacks, whatever comes.
    _insert(pair, 10, 1)
    pair.b.ctl("stream", "retry", "--chain", pair.chain, "--reason", "try")
    _says(pair, "diverged", audit)
    assert _applied(pair) == 1
    pair.stop()


def test_entries_deleted_under_a_running_consumer_that_lags_are_diverged(pair: TwoNodes) -> None:
    audit = names.audit_topic(pair.cluster)
    with _standing_still(pair):
        _insert(pair, 1, 8)
        _delete_all(pair, audit)
    _says(pair, "diverged", audit, "deleted what lay before offset")
    assert _applied(pair) < 9
    pair.stop()


def test_a_consumer_whose_next_entry_is_still_there_goes_on_whatever_was_deleted_before(
    pair: TwoNodes,
) -> None:
    """Acknowledgements and entries it has applied: the link to the next one shows that nothing is missing."""
    pair.b.stop("consumer")
    _delete_all(pair, names.audit_topic(pair.cluster))
    _insert(pair, 1)
    pair.b.start("consumer")
    _whole(pair)
    assert pair.b.query("SELECT 1 FROM vsql_sync.streams WHERE state = 'DIVERGED'") == []
    pair.stop()


def test_a_consumer_that_cannot_know_is_diverged_until_the_next_entry_shows_that_nothing_is_missing(
    pair: TwoNodes,
) -> None:
    pair.b.stop("consumer")
    _delete_all(pair, names.audit_topic(pair.cluster))
    pair.b.start("consumer")
    _says(pair, "diverged", "is not among what is left")
    _insert(pair, 1)
    pair.b.ctl("stream", "retry", "--chain", pair.chain, "--reason", "the source goes on")
    _whole(pair)
    pair.stop()


@pytest.mark.parametrize("running", [True, False], ids=["running", "away"])
def test_an_audit_topic_made_anew_is_filled_again_by_the_producer_and_the_consumer_goes_on(
    pair: TwoNodes, running: bool
) -> None:
    """All records are still there, so the chain is published again, at other offsets; B finds its place."""
    if not running:
        pair.stop()
    _delete_topic(pair, names.audit_topic(pair.cluster))
    if not running:
        pair.a.start("producer")
        until(lambda: pair.a.query("SELECT 1 FROM vsql_sync.stream_status WHERE state = 'running'"), 60)
        pair.b.start("consumer")
    pair.a.execute("INSERT INTO t VALUES (1, 'after'); INSERT INTO u VALUES (1, 'after')")

    def in_step() -> bool:
        """B may have looked before A had published it all: an operator has it look again."""
        if pair.b.query("SELECT 1 FROM vsql_sync.streams WHERE state = 'DIVERGED'"):
            pair.b.ctl("stream", "retry", "--chain", pair.chain, "--reason", "published again")
        return _applied(pair) == 2

    until(in_step, 180, lambda: f"{pair.a.tail('producer')}\n{pair.b.tail('consumer')}")
    _whole(pair)
    _acknowledged(pair)
    assert pair.a.query("SELECT mismatch FROM vsql_sync.stream_targets WHERE target = 'node-b'") == [(None,)]
    pair.stop()


def test_acknowledgements_that_were_deleted_do_not_keep_the_producer_from_working(pair: TwoNodes) -> None:
    """It reads them from where it was; that place is gone, and what it has read counts."""
    audit = names.audit_topic(pair.cluster)
    _insert(pair, 1)
    _acknowledged(pair)
    pair.a.stop("producer")
    pair.b.stop("consumer")
    # The next look begins before what is deleted: a source that was set back, or never noted what it read.
    pair.a.query(
        "UPDATE vsql_sync.chain_heads SET kafka_offset = 0 WHERE chain = %s", f"{pair.chain}.ack.node-b"
    )
    place = TopicPartition(audit, 0, 2)
    alter_topic(pair.a.kafka, audit, cleanup_policy="delete")
    admin = AdminClient({"bootstrap.servers": pair.a.kafka})  # its answers end with it
    admin.delete_records([place])[place].result(20)
    alter_topic(pair.a.kafka, audit, cleanup_policy="compact")
    pair.start()
    _insert(pair, 10)
    _whole(pair)
    _acknowledged(pair)
    assert pair.a.query("SELECT mismatch FROM vsql_sync.stream_targets WHERE target = 'node-b'") == [(None,)]
    pair.stop()


# Data topics


def _data(pair: TwoNodes, table: str) -> str:
    return names.data_topic(pair.cluster, pair.chain, "public", table)


@pytest.mark.parametrize("running", [True, False], ids=["running", "away"])
def test_records_deleted_before_they_were_read_are_missed_by_name_and_skipping_them_marks_the_table(
    pair: TwoNodes, running: bool
) -> None:
    topic = _data(pair, "t")
    if running:
        with _standing_still(pair):
            _insert(pair, 1, 8)
            _delete_all(pair, topic)
    else:
        pair.b.stop("consumer")
        _insert(pair, 1, 1)
        _delete_all(pair, topic)
        pair.b.start("consumer")
    said = _says(pair, "refused", topic)
    assert "Kafka begins at offset" in said
    if not running:
        sequence = pair.heads()[0]
        pair.b.ctl(
            "stream", "skip-batch", "--chain", pair.chain, "--sequence", str(sequence), "--reason", "gone",
            "--yes",
        )  # fmt: skip
        state = "SELECT state FROM vsql_sync.table_sync WHERE table_name = 't'"
        until(lambda: pair.b.query(state) == [("DIVERGED",)], 60)
    pair.stop()


def test_a_deleted_data_topic_is_missed_by_name_where_a_manifest_needs_it_and_by_nobody_else(
    pair: TwoNodes,
) -> None:
    pair.b.stop("consumer")
    _delete_topic(pair, _data(pair, "u"))
    _insert(pair, 1)
    pair.b.start("consumer")
    until(lambda: _applied(pair) == 4, 60, lambda: pair.b.tail("consumer"))
    pair.b.stop("consumer")
    _insert(pair, 10)
    _delete_topic(pair, _data(pair, "t"))
    pair.b.start("consumer")
    said = _says(pair, "refused", _data(pair, "t"))
    assert "Kafka has no partition" in said
    assert _applied(pair) == 4
    pair.stop()


# The keys topic


@pytest.mark.parametrize("anew", [True, False], ids=["made anew", "cut"])
def test_lost_announcements_are_missed_by_name_where_they_are_needed(pair: TwoNodes, anew: bool) -> None:
    keys = names.keys_topic(pair.cluster)
    pair.b.stop("consumer")
    (_delete_topic if anew else _delete_all)(pair, keys)
    # What was applied needs no key any more; the key in use was announced before, and is gone.
    pair.b.start("consumer")
    _insert(pair, 1, 1)
    assert "was never announced" in _says(pair, "refused", "data key")
    assert _applied(pair) == 1
    pair.stop()
