"""A producer's data keys with a real database, KEK file and Kafka: four policies, and a new KEK version."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import pairwise

import pytest

from tests.services.conftest import NewSource
from tests.services.producer_node import CHAIN, NODE, SourceNode
from vsql_producers.keys import DataKeys
from vsql_producers.publish import Publisher
from vsql_producers.seal import Place
from vsql_shared import names
from vsql_shared.audit.dsse import KEY_ANNOUNCEMENT, SignedDocument, sign_document
from vsql_shared.crypto.announce import decode_announcement, encode_announcement, unwrap
from vsql_shared.errors import KeyUnavailableError, RecordError
from vsql_shared.kafka.clients import make_admin, make_producer
from vsql_shared.kafka.topics import ensure_topic
from vsql_shared.kms import open_provider, open_signer
from vsql_shared.kms.file import destroy_version, rotate_kek_file
from vsql_shared.observe.metrics import StreamMetrics
from vsql_shared.pg.connect import connect

TABLE = "CREATE TABLE t (id bigint PRIMARY KEY, note text)"


@contextmanager
def data_keys(
    node: SourceNode, epoch: int, clock: Callable[[], float], meanwhile: Callable[[], object] = lambda: None
) -> Iterator[DataKeys]:
    """The keys of an epoch, as the pipeline has them; `clock` says how time goes.

    `meanwhile` is what somebody else does whenever an announcement is under way.
    """
    settings = node.settings
    ensure_topic(make_admin(settings), names.keys_topic(node.cluster), "keys", settings)
    publisher = Publisher(make_producer(settings, "keys"), names.audit_topic(node.cluster), 0, lambda: None)
    provider = open_provider(settings.encryption.kms, strict=False)
    with connect(node.conninfo, application_name="test") as conn:
        place = Place(node.cluster, CHAIN, NODE, epoch)
        metrics = StreamMetrics(CHAIN, NODE)

        def publish(topic: str, partition: int, key: bytes, value: bytes) -> int:
            meanwhile()
            return publisher.publish_now(topic, partition, key, value)

        yield DataKeys(
            settings.encryption,
            place,
            provider,
            open_signer(settings),
            conn,
            publish,
            metrics,
            1,
            clock=clock,
        )
    publisher.close()


@pytest.mark.parametrize(
    ("rotation", "changes"),
    [
        ("per-session", [False, False, False]),
        ("per-batch", [True, True, True]),
        ("hourly", [False, True, True]),
        ("daily", [False, False, True]),
    ],
)
def test_each_policy_ends_a_key_when_it_says_and_no_earlier(
    new_source: NewSource, rotation: str, changes: list[bool]
) -> None:
    node = new_source(TABLE, ["t"], config=f'[encryption.dek]\nrotation = "{rotation}"\n')
    now = 1_000.0
    with data_keys(node, 1, lambda: now) as keys:
        used = [keys.key_for(1, 10).dek_id]
        for later in (3_599.0, 3_601.0, 90_001.0):
            now = 1_000.0 + later
            used.append(keys.key_for(1, 10).dek_id)
        keys.close()
    assert [one != two for one, two in pairwise(used)] == changes
    states = dict(node.query("SELECT dek_id, state FROM vsql_sync.deks"))
    assert states == dict.fromkeys(used, "retired")
    wrapped = node.query("SELECT dek_id, kek_id FROM vsql_sync.dek_wrappings")
    assert sorted(wrapped) == sorted((dek_id, "test-kek/1") for dek_id in set(used))


def test_a_new_kek_version_wraps_the_next_key_and_those_still_needed(new_source: NewSource) -> None:
    node = new_source(TABLE, ["t"])
    kek = node.settings.encryption.kms.file.path
    assert kek is not None
    with data_keys(node, 1, lambda: 0.0) as keys:
        former = keys.key_for(1, 10).dek_id
        keys.rotate("command")
        used = keys.key_for(1, 10)
        rotate_kek_file(kek)
        done = keys.rotate_kek()
        assert (done.kek_id, set(done.rewrapped), done.left) == ("test-kek/2", {former, used.dek_id}, ())
        assert keys.rotate_kek().rewrapped == ()  # nothing is left to do
        after = keys.key_for(1, 10).dek_id
        assert keys.kek_id == "test-kek/2"
        commitment = used.commitment
        keys.close()
    destroy_version(kek, "test-kek/1")
    provider = open_provider(node.settings.encryption.kms, strict=False)
    opened = {}
    for record in node.records():
        if record.topic == names.keys_topic(node.cluster) and record.value is not None:
            said = decode_announcement(SignedDocument.decode(record.value).payload)
            with suppress(KeyUnavailableError):
                opened[said.dek_id] = unwrap(said, provider).commitment
    assert opened.keys() == {former, used.dek_id, after}
    assert opened[used.dek_id] == commitment
    wrappings = node.query("SELECT dek_id, kek_id FROM vsql_sync.dek_wrappings ORDER BY 1, 2")
    both = [(one, f"test-kek/{version}") for one in (former, used.dek_id) for version in (1, 2)]
    assert sorted(wrappings) == sorted([*both, (after, "test-kek/2")])


def test_keys_the_kms_does_not_open_stay_under_the_old_version_and_are_named(new_source: NewSource) -> None:
    node = new_source(TABLE, ["t"])
    kek = node.settings.encryption.kms.file.path
    assert kek is not None
    with data_keys(node, 1, lambda: 0.0) as keys:
        former = keys.key_for(1, 10).dek_id
        keys.rotate("command")
        used = keys.key_for(1, 10).dek_id
        rotate_kek_file(kek)
        destroy_version(kek, "test-kek/1")  # as if there were no right to unwrap
        done = keys.rotate_kek()
        keys.close()
    assert (done.rewrapped, done.left) == ((used,), (former,))
    assert "does not hold test-kek/1" in done.problem


@pytest.mark.parametrize("field", ["dek_id", "chain"])
def test_an_announcement_that_is_another_keys_than_its_row_is_not_signed_again(
    new_source: NewSource, field: str
) -> None:
    node = new_source(TABLE, ["t"])
    kek = node.settings.encryption.kms.file.path
    assert kek is not None
    with data_keys(node, 1, lambda: 0.0) as keys:
        used = keys.key_for(1, 10).dek_id
        (document,) = node.query("SELECT announcement FROM vsql_sync.deks")[0]
        said = decode_announcement(SignedDocument.decode(bytes(document)).payload)
        other = replace(said, dek_id="another") if field == "dek_id" else replace(said, chain="another")
        put = sign_document(open_signer(node.settings), KEY_ANNOUNCEMENT, encode_announcement(other))
        node.query("UPDATE vsql_sync.deks SET announcement = %s RETURNING 1", put)
        rotate_kek_file(kek)
        before = node.records()
        with pytest.raises(RecordError, match=f"the row of data key {used} holds the announcement of"):
            keys.rotate_kek()
        keys.close()
    assert node.records() == before
    assert node.query("SELECT kek_id FROM vsql_sync.dek_wrappings") == [("test-kek/1",)]
