"""What somebody who owns the broker can do to a chain's records: refused by name, and nothing given on.

Each attack alters the logs of an honest chain of six batches. Whatever the order of delivery, what comes out
is a prefix of the honest batches, and the altered batch is not in it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.unit.sealed_chain import (
    AUDIT,
    CHAIN,
    CLUSTER,
    KEYS,
    Reading,
    SealedChain,
    read,
    rows,
)
from vsql_consumers.collected import Decisions
from vsql_shared import names
from vsql_shared.audit.dsse import SignedDocument, sign_document
from vsql_shared.changes import Op
from vsql_shared.crypto.announce import MEDIA_TYPE, encode_announcement
from vsql_shared.errors import ChainError, RecordError, SignatureError, UnsealError

T = (names.data_topic(CLUSTER, CHAIN, "public", "t"), 0)
U = (names.data_topic(CLUSTER, CHAIN, "public", "u"), 0)
BATCHES = 6


def _chain() -> SealedChain:
    chain = SealedChain()
    for n in range(BATCHES):
        chain.batch(rows("t", *range(n * 10, n * 10 + 9)), rows("u", n, n + 100))
    return chain


def _flip(value: bytes | None, at: int, bit: int = 0) -> bytes:
    changed = bytearray(value or b"")
    changed[at] ^= 1 << bit
    return bytes(changed)


def _alter(place: tuple[str, int], number: int, at: int, bit: int = 0) -> Callable[[SealedChain], None]:
    def attack(chain: SealedChain) -> None:
        key, value = chain.log[place][number]
        chain.log[place][number] = (key, _flip(value, at, bit))

    return attack


def _drop(place: tuple[str, int], number: int) -> Callable[[SealedChain], None]:
    def attack(chain: SealedChain) -> None:
        del chain.log[place][number]

    return attack


def _delete(place: tuple[str, int], number: int) -> Callable[[SealedChain], None]:
    """Make a record disappear while the offsets stay: what an altered segment file looks like."""

    def attack(chain: SealedChain) -> None:
        chain.log[place][number] = (None, None)

    return attack


def _double(place: tuple[str, int], number: int, at: int | None = None) -> Callable[[SealedChain], None]:
    def attack(chain: SealedChain) -> None:
        log = chain.log[place]
        log.insert(len(log) if at is None else at, log[number])

    return attack


def _swap(place: tuple[str, int], one: int, two: int) -> Callable[[SealedChain], None]:
    def attack(chain: SealedChain) -> None:
        log = chain.log[place]
        log[one], log[two] = log[two], log[one]

    return attack


def _insert(place: tuple[str, int], at: int, value: bytes) -> Callable[[SealedChain], None]:
    def attack(chain: SealedChain) -> None:
        chain.log[place].insert(at, (None, value))

    return attack


def _move(
    source: tuple[str, int], number: int, target: tuple[str, int], at: int
) -> Callable[[SealedChain], None]:
    def attack(chain: SealedChain) -> None:
        chain.log[target][at] = chain.log[source][number]

    return attack


def _truncate(place: tuple[str, int]) -> Callable[[SealedChain], None]:
    def attack(chain: SealedChain) -> None:
        chain.log[place].pop()

    return attack


def _resign(chain: SealedChain, number: int, stranger: SealedChain) -> None:
    key, value = chain.log[AUDIT][number]
    document = SignedDocument.decode(value or b"")
    chain.log[AUDIT][number] = (
        key,
        sign_document(stranger.signer, document.payload_type, document.payload),
    )


def _stranger_signs(chain: SealedChain) -> None:
    _resign(chain, 3, SealedChain(seed=9))


def _strip_signature(chain: SealedChain) -> None:
    key, value = chain.log[AUDIT][3]
    document = SignedDocument.decode(value or b"")
    chain.log[AUDIT][3] = (key, replace(document, signer="", signature=b"").encode())


def _announce_again(chain: SealedChain) -> None:
    """The origin's own key signs a second, different announcement of a dek_id."""
    other = replace(chain.announcement, created_at=chain.announcement.created_at + 1)
    document = sign_document(chain.signer, MEDIA_TYPE, encode_announcement(other))
    chain.log[KEYS].append((other.dek_id.encode(), document))


def _forged_pack_of_next_batch(chain: SealedChain) -> None:
    """Right epoch and next batch number, sealed under the real key by a thief: still no manifest's own."""
    honest = len(chain.log[T])
    chain.packs_of(rows("t", 666))
    forged = chain.log[T].pop()
    assert len(chain.log[T]) == honest
    chain.log[T].insert(honest - 3, forged)


ATTACKS: dict[str, tuple[Callable[[SealedChain], None], str, type[Exception]]] = {
    "a bit of a ciphertext is changed": (_alter(T, 4, -30), T[0], RecordError),
    "a bit of a nonce is changed": (_alter(T, 4, -200), T[0], RecordError),
    "a bit of the header is changed": (_alter(T, 4, 10), T[0], RecordError),
    "the last byte of a pack is changed": (_alter(U, 2, -1), U[0], RecordError),
    "a pack is deleted from the log": (_delete(T, 7), T[0], RecordError),
    "a pack is dropped and others move up": (_drop(T, 7), T[0], RecordError),
    "the last pack is cut off": (_truncate(T), T[0], RecordError),
    "a pack is repeated at the end of the log": (_double(T, 2), T[0], RecordError),
    "a pack is repeated within its batch": (_double(T, 4, 5), T[0], RecordError),
    "a pack is replayed into a later batch": (_double(T, 1, 9), T[0], RecordError),
    "two packs of a batch change places": (_swap(T, 3, 4), T[0], RecordError),
    "two packs of different batches change places": (_swap(T, 3, 7), T[0], RecordError),
    "a pack is moved to another table's topic": (_move(T, 3, U, 1), U[0], RecordError),
    "bytes that are no pack are inserted": (_insert(T, 5, b"garbage" * 20), T[0], RecordError),
    "an empty message is inserted": (_insert(U, 1, b""), U[0], RecordError),
    "a pack without manifest is forged into a batch": (_forged_pack_of_next_batch, T[0], RecordError),
    "a bit of a manifest's payload is changed": (_alter(AUDIT, 3, 200), AUDIT[0], Exception),
    "a bit of a manifest's signature is changed": (_alter(AUDIT, 3, -5), AUDIT[0], SignatureError),
    "a manifest is dropped": (_drop(AUDIT, 3), AUDIT[0], ChainError),
    "the first epoch entry is dropped": (_drop(AUDIT, 0), AUDIT[0], ChainError),
    "two manifests change places": (_swap(AUDIT, 3, 4), AUDIT[0], ChainError),
    "an old manifest is repeated": (_double(AUDIT, 2), AUDIT[0], ChainError),
    "bytes that are no entry are inserted": (_insert(AUDIT, 4, b"\0" * 64), AUDIT[0], RecordError),
    "a manifest is signed by a stranger": (_stranger_signs, AUDIT[0], SignatureError),
    "a manifest's signature is stripped": (_strip_signature, AUDIT[0], SignatureError),
    "a bit of an announcement is changed": (_alter(KEYS, 0, -90), KEYS[0], SignatureError),
    "an announcement is cut short": (
        lambda chain: chain.log[KEYS].__setitem__(0, (b"x", (chain.log[KEYS][0][1] or b"")[:-9])),
        KEYS[0],
        RecordError,
    ),
    "an announcement is filed under another name": (
        lambda chain: chain.log[KEYS].__setitem__(0, (b"dek-other", chain.log[KEYS][0][1])),
        KEYS[0],
        RecordError,
    ),
    "a key is announced twice, differently": (_announce_again, KEYS[0], RecordError),
    "the announcement is deleted": (_delete(KEYS, 0), "", UnsealError),
}


@pytest.mark.parametrize("at", [10, 60, -200, -30])
def test_a_root_that_does_not_match_is_traced_to_the_altered_record(at: int) -> None:
    chain = _chain()
    _alter(T, 4, at)(chain)
    reading = read(chain.log, chain.trust)
    assert reading.error is not None
    assert reading.error.record == f"{T[0]}/0/4"


def _is_prefix(reading: Reading, honest: list[bytes]) -> bool:
    return reading.texts == honest[: len(reading.texts)] and len(reading.texts) < len(honest)


# Records after the last manifest: everything was applied, and the stream still stops.
AFTER_THE_END = {"a pack is repeated at the end of the log", "an old manifest is repeated"}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("attack", list(ATTACKS))
def test_an_altered_record_is_refused_by_name_and_nothing_of_its_batch_comes_out(
    attack: str, seed: int
) -> None:
    alter, place, kind = ATTACKS[attack]
    chain = _chain()
    honest = read(chain.log, chain.trust).texts
    assert len(honest) == BATCHES * 11
    alter(chain)
    reading = read(chain.log, chain.trust, random.Random(seed))
    assert isinstance(reading.error, kind)
    assert place in reading.error.record
    assert reading.error.record
    if attack in AFTER_THE_END:
        assert reading.texts == honest[: len(reading.texts)]
    else:
        assert _is_prefix(reading, honest)


@pytest.mark.parametrize("byte", range(0, 600, 7))
def test_any_flipped_byte_of_any_kind_of_record_is_refused(byte: int) -> None:
    for place, number in ((T, 4), (U, 2), (AUDIT, 3), (KEYS, 0)):
        chain = _chain()
        honest = read(chain.log, chain.trust).texts
        size = len(chain.log[place][number][1] or b"")
        _alter(place, number, byte % size, byte % 8)(chain)
        reading = read(chain.log, chain.trust)
        assert reading.error is not None, (place, byte % size)
        assert _is_prefix(reading, honest), (place, byte % size)


def _decided(chain: SealedChain, **decisions: frozenset[object]) -> Reading:
    return read(chain.log, chain.trust, decisions=Decisions(**decisions))  # type: ignore[arg-type]  # any field


def test_an_ignored_record_is_passed_over_and_the_stream_goes_on_complete() -> None:
    chain = _chain()
    honest = read(chain.log, chain.trust).texts
    _double(T, 2)(chain)
    offset = len(chain.log[T]) - 1
    chain.batch(rows("u", 7))
    assert isinstance(read(chain.log, chain.trust).error, RecordError)
    reading = _decided(chain, ignored=frozenset({(*T, offset)}))
    assert reading.error is None
    assert reading.texts == [*honest, b"u:7"]


def test_ignoring_one_record_does_not_excuse_another() -> None:
    chain = _chain()
    _double(T, 2)(chain)
    _double(T, 2)(chain)
    reading = _decided(chain, ignored=frozenset({(*T, len(chain.log[T]) - 2)}))
    assert isinstance(reading.error, RecordError)
    assert reading.error.record.endswith(f"/{len(chain.log[T]) - 1}")


def test_a_skipped_batch_is_left_out_whole_and_the_next_ones_come() -> None:
    chain = _chain()
    _alter(T, 4, -30)(chain)
    broken = read(chain.log, chain.trust)
    assert broken.error is not None
    sequence = broken.entries[-1]
    reading = _decided(chain, skipped=frozenset({sequence}))
    assert reading.error is None
    assert reading.skipped == [sequence]
    assert len(reading.batches) == BATCHES - 1
    assert reading.collector is not None
    assert reading.collector.buffered == 0


def test_a_skipped_batch_whose_records_are_gone_does_not_hold_the_stream() -> None:
    chain = _chain()
    last = chain.head.sequence
    for place in (T, U):
        chain.log[place].pop()
    reading = _decided(chain, skipped=frozenset({last}))
    assert reading.error is None
    assert len(reading.batches) == BATCHES - 1


@pytest.mark.parametrize("attack", [_alter(AUDIT, 3, -5), _drop(AUDIT, 3), _insert(AUDIT, 3, b"x" * 40)])
def test_an_entry_that_nobody_can_read_is_bridged_by_its_signed_successor(
    attack: Callable[[SealedChain], None],
) -> None:
    chain = _chain()
    before = len(chain.log[AUDIT])
    attack(chain)
    if len(chain.log[AUDIT]) > before:
        del chain.log[AUDIT][4]  # the genuine one is gone, garbage lies in its place
    reading = _decided(chain, skipped=frozenset({4}))
    assert reading.error is None
    assert reading.skipped == [4]
    assert [batch.batch for batch in reading.batches] == [1, 2, 4, 5, 6]


def test_a_decision_to_skip_does_not_let_a_stranger_continue_the_chain() -> None:
    chain = _chain()
    stranger = SealedChain(seed=9)
    chain.log[AUDIT][3] = (None, None)
    _resign(chain, 4, stranger)
    reading = _decided(chain, skipped=frozenset({4}))
    assert isinstance(reading.error, ChainError)
    assert len(reading.batches) == 2


def test_a_decision_to_skip_one_entry_does_not_excuse_two_that_are_missing() -> None:
    chain = _chain()
    del chain.log[AUDIT][3:5]
    reading = _decided(chain, skipped=frozenset({4}))
    assert isinstance(reading.error, ChainError)
    assert "gap" in reading.error.message
    assert len(reading.batches) == 2


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"row_count": 4}, "changes"),
        ({"dek_id": "dek-other"}, "dek_id"),
        ({"algorithm": "ROT13"}, "ROT13"),
        ({"tables_affected": ("public.t",)}, "does not list"),
    ],
)
def test_a_truly_signed_manifest_that_does_not_fit_its_records_is_refused(
    wrong: dict[str, object], says: str
) -> None:
    """Also the origin itself cannot sign what its records are not."""
    chain = SealedChain()
    prepared = chain.packs_of(rows("t", 1, 2), rows("u", 3))
    fields = {
        name: getattr(prepared.entry, name)
        for name in ("event_type", "batch", "batch_lsn_start", "batch_lsn_end", "tables_affected",
                     "row_count", "record_count", "partitions", "merkle_root", "dek_id", "kek_id",
                     "algorithm")
    }  # fmt: skip
    other = SealedChain()
    other.log[T], other.log[U] = chain.log[T], chain.log[U]
    chain.writer = type(chain.writer)(chain.signer, CLUSTER, CHAIN, chain.head, chain.head.incarnation)
    chain.publish(chain.writer.next(**{**fields, **wrong}))
    reading = read(chain.log, chain.trust)
    assert isinstance(reading.error, RecordError)
    assert says in reading.error.message
    assert reading.batches == []


def test_a_piece_without_an_end_is_refused() -> None:
    chain = SealedChain()
    chain.batch([("t", Op.INSERT, b"a"), ("t", Op.PIECE, b"b")])
    reading = read(chain.log, chain.trust)
    assert isinstance(reading.error, RecordError)
    assert T[0] in reading.error.record


def test_a_tuple_without_its_descriptor_is_refused() -> None:
    chain = SealedChain()
    chain.batch(rows("t", 1))
    chain.restart()
    chain._described = {"t"}  # this process forgets to send the descriptor again
    chain.relations["t"] = chain.relations["t"][:-1] + b"\x02"
    chain.batch(rows("t", 2))
    reading = read(chain.log, chain.trust)
    assert isinstance(reading.error, RecordError)
    assert "descriptor" in reading.error.message
    assert reading.texts == [b"t:1"]
