"""A schema registry's frame: packs with and without one are the same packs, and nothing follows from it."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Sequence

import fastavro
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.sealed_chain import AUDIT, KEYS, Log, SealedChain, read, rows
from tests.unit.test_batches_seal import LIMITS, PLACE, batch, described, descriptor, row
from vsql_producers.level import leaves_of
from vsql_producers.outlet import pack_limits
from vsql_producers.pgoutput import relation_key
from vsql_producers.seal import Place, Relations, SealedBatch, arrange, seal
from vsql_producers.transactions import RelationChange
from vsql_shared.audit.entries import AuditEntry
from vsql_shared.changes import TableName
from vsql_shared.config import LimitsSettings
from vsql_shared.crypto.dek import KeyLimits, SealingKey
from vsql_shared.errors import DecodeError, RecordError
from vsql_shared.kafka.schema_registry import pack_schema
from vsql_shared.wire.framing import FRAME_SIZE, MAX_ID, frame, without_frame
from vsql_shared.wire.pack import decode_header, decode_tuples, header_digest

IDS = st.integers(1, MAX_ID)


@given(IDS, st.binary(min_size=1).filter(lambda pack: pack[0] != 0))
def test_a_frame_comes_off_as_it_went_on(schema_id: int, pack: bytes) -> None:
    assert without_frame(frame(schema_id) + pack) == without_frame(pack) == pack
    assert frame(schema_id) == b"\0" + schema_id.to_bytes(4, "big")


@given(st.binary(max_size=20))
def test_any_bytes_are_told_apart_by_the_first_one(data: bytes) -> None:
    try:
        found = without_frame(data)
    except DecodeError:
        assert data[0] == 0
        assert len(data) <= FRAME_SIZE
    else:
        assert found == (data[FRAME_SIZE:] if data[:1] == b"\0" else data)


def _sealed(before: bytes) -> SealedBatch:
    key = SealingKey(
        secret=bytes(32), dek_id="dek-1", created_at=1, cluster="c", chain="pub.a", worker=1,
        nonce_salt=b"\0\0", limits=KeyLimits(),
    )  # fmt: skip
    made = batch([row(1, b"one"), row(2, b"two"), *[row(1, b"more")] * 7], relations=described("t", "u"))
    parts = arrange(made, Relations(), LIMITS.plaintext)
    return seal(made, parts, 9, key, PLACE._replace(frame=before), LIMITS)


def test_a_framed_batch_differs_from_a_bare_one_in_its_frames_alone() -> None:
    bare, framed = _sealed(b""), _sealed(frame(70_000))
    assert sum(len(topic.messages) for topic in bare.topics) == 4
    for one, other in zip(bare.topics, framed.topics, strict=True):
        assert other.messages == [frame(70_000) + message for message in one.messages]
        assert (one.sub_root, one.records) == (other.sub_root, other.records)


def test_a_framed_pack_of_the_largest_tuple_and_the_longest_names_is_no_larger_than_a_message_may_be() -> (
    None
):
    limits = LimitsSettings(message_max_bytes=1_000_000)
    # PostgreSQL's names have 63 bytes at most, nodes' 31, and 100 is more than any cluster's.
    long = "é" * 31 + "x"
    place = Place("c" * 100, f"{'p' * 63}.{'n' * 31}", "n" * 31, 1 << 40, frame(MAX_ID))
    bounds = pack_limits(limits)
    named = RelationChange(0, relation_key(1), descriptor("t")._replace(name=TableName(long, long)))
    for size in (bounds.plaintext - 100, bounds.plaintext, bounds.plaintext + 1, 3 * bounds.plaintext):
        made = batch([row(1, bytes(size))], relations=[named])
        key = SealingKey.generate(place.cluster, place.chain, 1, KeyLimits())
        sent = seal(made, arrange(made, Relations(), bounds.plaintext), 1 << 40, key, place, bounds)
        largest = max(len(message) for topic in sent.topics for message in topic.messages)
        assert bounds.plaintext // 2 < largest <= limits.message_max_bytes


def _stranger(message: bytes, schema: str) -> dict[str, object]:
    stream = io.BytesIO(message[FRAME_SIZE:])
    found = fastavro.schemaless_reader(stream, fastavro.parse_schema(json.loads(schema)), None)
    assert stream.tell() == len(message) - FRAME_SIZE
    assert isinstance(found, dict)
    return found


def test_any_avro_reader_reads_the_message_by_the_registered_schema() -> None:
    for topic in _sealed(frame(1)).topics:
        for message in topic.messages:
            found = _stranger(message, pack_schema())
            header, at = decode_header(message[FRAME_SIZE:])
            assert (found["chain"], found["batch"], found["table_name"]) == ("pub.a", 9, header.table.table)
            pack = message[FRAME_SIZE:]
            ours = decode_tuples(pack, at, header_digest(pack[:at]))
            tuples = found["tuples"]
            assert isinstance(tuples, list)
            assert [one["encrypted_tuple"] for one in tuples] == [one.ciphertext for one in ours]


def _chain() -> SealedChain:
    chain = SealedChain()
    chain.batch(rows("t", *range(9)), rows("u", 9, 10))
    chain.orphans(rows("t", 99))
    chain.restart()
    chain.batch(rows("u", 11), rows("t", *range(12, 20)))
    return chain


def _each_pack(log: Log, change: Callable[[bytes], bytes]) -> Log:
    """The log with every record of its data topics changed."""
    changed: Log = {}
    for place, records in log.items():
        data = place not in (AUDIT, KEYS)
        changed[place] = [(key, change(value) if data and value else value) for key, value in records]
    return changed


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1 << 32))
def test_a_stream_of_framed_and_bare_packs_is_the_stream_of_bare_ones(seed: int) -> None:
    chain, order = _chain(), random.Random(seed)
    mixed = _each_pack(
        chain.log,
        lambda pack: frame(order.randint(1, MAX_ID)) + pack if order.random() < 0.5 else pack,
    )
    wanted, found = read(chain.log, chain.trust), read(mixed, chain.trust, order)
    assert found.error is wanted.error is None
    assert found.texts == wanted.texts
    assert len(found.texts) == 20
    assert [batch.merkle_root for batch in found.batches] == [batch.merkle_root for batch in wanted.batches]


Attack = Callable[[Sequence[bytes]], list[bytes]]
ATTACKS: dict[str, tuple[Attack, str]] = {
    "a pack is there again, framed": (lambda p: [p[0], frame(1) + p[0], *p[1:]], "packs with"),
    "a pack is there again, bare": (lambda p: [frame(1) + p[0], p[0], *p[1:]], "packs with"),
    "a frame in a frame": (lambda p: [frame(1) * 2 + p[0], *p[1:]], "not a pack"),
    "a frame without a pack": (lambda p: [frame(1), *p[1:]], "not a pack: 5 bytes"),
    "a frame that is cut": (lambda p: [b"\0\0\1", *p[1:]], "not a pack: 3 bytes"),
    "one byte of five is missing": (lambda p: [frame(1)[:4] + p[0], *p[1:]], "not a pack"),
    "another magic byte": (lambda p: [b"\x01" + frame(1)[1:] + p[0], *p[1:]], "not a pack"),
    "a bit behind a frame": (
        lambda p: [frame(1) + p[0][:-9] + bytes((p[0][-9] ^ 1,)) + p[0][-8:], *p[1:]],
        "root",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_is_done_with_frames_is_refused_and_nothing_of_the_batch_comes_out(name: str) -> None:
    attack, wanted = ATTACKS[name]
    chain = SealedChain()
    chain.batch(rows("t", *range(9)))
    place = next(place for place in chain.log if place not in (AUDIT, KEYS))
    packs = [value for _, value in chain.log[place] if value is not None]
    assert len(packs) == 3
    chain.log[place] = [(None, value) for value in attack(packs)]
    found = read(chain.log, chain.trust)
    assert isinstance(found.error, RecordError)
    assert wanted in str(found.error)
    assert found.texts == []


def test_a_producer_that_reads_its_records_back_takes_both_forms() -> None:
    chain = SealedChain()
    entry: AuditEntry = chain.batch(rows("t", *range(9))).entry
    place = next(place for place in chain.log if place not in (AUDIT, KEYS))
    packs = [value for _, value in chain.log[place] if value is not None]
    bare = [leaves_of(entry, pack) for pack in packs]
    assert sum(map(len, bare)) == entry.record_count
    assert [leaves_of(entry, frame(5) + pack) for pack in packs] == bare
    assert leaves_of(entry, frame(5) * 2 + packs[0]) == []
