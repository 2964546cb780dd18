"""Kafka as an incoming stream sees it: where many partitions begin and end, asked for at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import NewTopic  # type: ignore[attr-defined]  # re-exported without saying so

from tests.stack import Kafka
from vsql_consumers.source import Place, Source
from vsql_shared.config import Settings, load_settings
from vsql_shared.errors import BrokerError, TransientError
from vsql_shared.kafka.clients import make_admin, make_producer
from vsql_shared.kafka.topics import Kind, check_topic, ensure_topic

pytestmark = pytest.mark.services

RECORDS, DELETED = 5, 3


@pytest.fixture
def settings(kafka: Kafka, tmp_path: Path) -> Settings:
    file = tmp_path / "vsql-sync.toml"
    file.write_text(
        '[cluster]\nname = "c"\nnode_id = 1\nnode_name = "a"\n[connection]\ndatabase = "d"\n'
        '[server]\nmode = "dev"\n[encryption.kms.file]\npath = "kek"\n'
        f'[kafka]\nbootstrap_servers = "{kafka.bootstrap_servers}"\n'
    )
    return load_settings(file)


@pytest.fixture
def places(settings: Settings, cluster_name: str) -> list[Place]:
    """Four topics: empty, with records, with records of which the first were deleted, with all deleted."""
    admin, producer = make_admin(settings), make_producer(settings, "test")
    topics = [f"{cluster_name}.t{number}" for number in range(4)]
    for topic in topics:
        ensure_topic(admin, topic, "data", settings)
    for topic in topics[1:]:
        for _ in range(RECORDS):
            producer.produce(topic, b"x", partition=0)
    assert producer.flush(30) == 0
    gone = [TopicPartition(topics[2], 0, DELETED), TopicPartition(topics[3], 0, RECORDS)]
    for answer in admin.delete_records(gone).values():
        answer.result(30)
    return [(topic, 0) for topic in topics]


def test_a_dead_letter_topic_that_forgets_is_refused(settings: Settings, cluster_name: str) -> None:
    admin, theirs, ours = make_admin(settings), f"{cluster_name}.theirs", f"{cluster_name}.ours"
    admin.create_topics([NewTopic(theirs, num_partitions=1)])[theirs].result(30)
    with pytest.raises(BrokerError, match=r"retention\.ms = 604800000, expected -1"):
        ensure_topic(admin, theirs, "parked", settings)
    ensure_topic(admin, ours, "parked", settings)
    ensure_topic(admin, ours, "parked", settings)


LOSES: dict[str, tuple[Kind, dict[str, str], str]] = {
    "a broker that lacks records may lead": (
        "audit", {"unclean.leader.election.enable": "true"}, "election.enable = true, expected false"
    ),
    "records are deleted by age": ("data", {"retention.ms": "1000"}, "retention.ms = 1000, expected -1"),
    "records are deleted by size": ("data", {"retention.bytes": "9"}, "retention.bytes = 9, expected -1"),
    "entries are deleted": ("audit", {"cleanup.policy": "delete"}, "policy = delete, expected compact"),
    "data is compacted": ("data", {"cleanup.policy": "compact"}, "policy = compact, expected delete"),
    "one copy is enough": ("audit", {"min.insync.replicas": "1"}, "insync.replicas = 1, expected 2"),
}  # fmt: skip


@pytest.mark.parametrize("way", LOSES)
def test_a_topic_that_could_lose_records_is_refused_and_its_setting_named(
    settings: Settings, cluster_name: str, way: str
) -> None:
    """Rule 5: as it is made it passes; with this one setting altered it does not."""
    kind, altered, words = LOSES[way]
    values = {"replication_factor": 3, "min_insync_replicas": 2}
    safe = settings.model_copy(update={"kafka": settings.kafka.model_copy(update=values)})
    admin = make_admin(settings)
    good = {"cleanup.policy": "compact" if kind == "audit" else "delete", "min.insync.replicas": "2"}
    good |= {"unclean.leader.election.enable": "false", "retention.ms": "-1", "retention.bytes": "-1"}
    for topic, made in ((f"{cluster_name}.good", good), (f"{cluster_name}.bad", good | altered)):
        admin.create_topics([NewTopic(topic, num_partitions=1, config=made)])[topic].result(30)
    check_topic(admin, f"{cluster_name}.good", kind, safe)
    with pytest.raises(BrokerError, match=f"bad is not of the shape it needs: .*{words}"):
        check_topic(admin, f"{cluster_name}.bad", kind, safe)


@pytest.fixture
def source(settings: Settings, cluster_name: str) -> Iterator[Source]:
    made = Source(settings, "test", cluster_name)
    yield made
    made.close()


def test_the_bounds_of_many_partitions_are_those_of_each(source: Source, places: list[Place]) -> None:
    found = source.ends_of(places)
    assert found == dict(
        zip(places, [(0, 0), (0, RECORDS), (DELETED, RECORDS), (RECORDS, RECORDS)], strict=True)
    )
    assert found == {place: source.ends(*place) for place in places}
    assert source.ends_of([]) == {}


def test_a_topic_that_is_not_there_is_named_alone_and_among_many(source: Source, places: list[Place]) -> None:
    for asked in ([("not-there", 0)], [*places, ("not-there", 0)]):
        with pytest.raises(TransientError, match="not-there"):
            source.ends_of(asked)
    began = time.monotonic()
    assert source.assign([("not-there", 0, 5), (places[0][0], 7, 1)]) == [
        ("not-there", 0, 5),
        (places[0][0], 7, 1),
    ]
    assert time.monotonic() - began < 5, "a consumer does nothing else meanwhile"


def test_partitions_are_read_from_their_offsets_or_from_the_end_of_a_shorter_log(
    source: Source, places: list[Place]
) -> None:
    source.assign([(*places[0], 9), (*places[1], 2), (*places[2], 99), (*places[3], -1)])
    came: set[tuple[str, int]] = set()
    ends: set[tuple[str, int]] = set()
    for _ in range(100):
        polled = source.poll(0.2)
        assert polled.lost == []
        came |= {(record.topic, record.offset) for record in polled.records}
        ends |= {(record.topic, record.offset) for record in polled.ends}
        if len(ends) == len(places):
            break
    assert came == {(places[1][0], offset) for offset in range(2, RECORDS)}
    assert ends == {(places[0][0], 0), *((topic, RECORDS) for topic, _ in places[1:])}
