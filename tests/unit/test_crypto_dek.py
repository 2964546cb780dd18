"""Data keys: what is derived from them, nonces, limits, wiping, and which process may seal."""

from __future__ import annotations

import hashlib
import hmac
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsql_shared.crypto.dek import (
    MAX_BYTES,
    MAX_TUPLES,
    KeyLimits,
    OpeningKey,
    SealingKey,
    key_context,
)
from vsql_shared.crypto.seal import seal_tuples
from vsql_shared.errors import KeyUnavailableError, UnsealError
from vsql_shared.wire.pack import CLEAR, CLEAR_SIZE, NONCE_SIZE

DIGEST = hashlib.sha256(b"header").digest()
NAME = st.text(max_size=20)


def new_key(worker: int = 1, limits: KeyLimits | None = None) -> SealingKey:
    return SealingKey.generate("cluster", "pub.node-a", worker, limits or KeyLimits())


def seal(key: SealingKey, count: int, size: int = 8) -> list[bytes]:
    clears = [CLEAR.pack(0, 1, index, b"I") for index in range(count)]
    return seal_tuples(key, DIGEST, clears, [bytes(size)] * count)[0]


def nonces(records: list[bytes]) -> list[bytes]:
    return [record[CLEAR_SIZE : CLEAR_SIZE + NONCE_SIZE] for record in records]


@given(st.tuples(NAME, NAME, NAME), st.tuples(NAME, NAME, NAME))
def test_two_places_never_share_a_context(one: tuple[str, str, str], other: tuple[str, str, str]) -> None:
    assert (key_context(*one) == key_context(*other)) == (one == other)


def test_moving_a_letter_between_names_changes_the_context() -> None:
    assert key_context("ab", "c", "d") != key_context("a", "bc", "d")


def test_a_name_too_long_for_its_length_field_is_refused() -> None:
    with pytest.raises(KeyUnavailableError, match="longer than 65535"):
        key_context("c" * 65536, "", "")


def test_encryption_key_and_commitment_differ_and_neither_is_the_secret() -> None:
    key = new_key()
    context = key_context("cluster", "pub.node-a", key.dek_id)
    pseudo_random = hmac.new(bytes(32), key.secret, "sha256").digest()
    info = b"\x00\x1bvsql-sync/v1/dek/encryption" + context + b"\x01"
    encryption = hmac.new(pseudo_random, info, "sha256").digest()
    assert len({key.secret, key.commitment, encryption}) == 3


def test_two_generated_keys_share_neither_name_nor_secret_nor_commitment() -> None:
    one, other = new_key(), new_key()
    assert one.dek_id != other.dek_id
    assert one.secret != other.secret
    assert one.commitment != other.commitment


@pytest.mark.parametrize(
    ("cluster", "chain", "dek_id"),
    [("other", "pub.node-a", None), ("cluster", "pub.node-b", None), ("cluster", "pub.node-a", "dek-other")],
    ids=["another cluster", "another chain", "another name"],
)
def test_a_key_moved_elsewhere_is_not_the_announced_one(cluster: str, chain: str, dek_id: str | None) -> None:
    key = new_key()
    OpeningKey(key.secret, "cluster", "pub.node-a", key.dek_id, key.commitment)
    with pytest.raises(UnsealError, match="not the one its announcement commits to"):
        OpeningKey(key.secret, cluster, chain, dek_id or key.dek_id, key.commitment)


@pytest.mark.parametrize("commitment", [b"", bytes(31), bytes(32), bytes(33)])
def test_a_wrong_commitment_is_refused_whatever_its_size(commitment: bytes) -> None:
    key = new_key()
    with pytest.raises(UnsealError, match=key.dek_id):
        OpeningKey(key.secret, "cluster", "pub.node-a", key.dek_id, commitment)


@pytest.mark.parametrize("size", [0, 16, 31, 33, 64])
def test_a_secret_of_another_size_is_refused_on_both_sides(size: int) -> None:
    key = new_key()
    with pytest.raises(UnsealError):
        OpeningKey(bytes(size), "cluster", "pub.node-a", key.dek_id, key.commitment)
    with pytest.raises(KeyUnavailableError, match="32 bytes"):
        SealingKey(
            secret=bytes(size),
            dek_id="d",
            created_at=0,
            cluster="c",
            chain="h",
            worker=0,
            nonce_salt=b"\0\0",
            limits=KeyLimits(),
        )


def test_nonces_are_worker_salt_and_a_counter_without_gap() -> None:
    key = new_key(worker=0x0102)
    found = nonces([*seal(key, 3), *seal(key, 2)])
    assert {nonce[:2] for nonce in found} == {b"\x01\x02"}
    assert len({nonce[2:4] for nonce in found}) == 1
    assert [int.from_bytes(nonce[4:], "big") for nonce in found] == [0, 1, 2, 3, 4]


def test_two_workers_of_one_key_never_meet_even_with_the_same_salt() -> None:
    made: list[bytes] = []
    for worker in (0, 1, 255, 256, 65535):
        key = SealingKey(
            secret=bytes(32),
            dek_id="shared",
            created_at=0,
            cluster="c",
            chain="h",
            worker=worker,
            nonce_salt=b"\x00\x00",
            limits=KeyLimits(),
        )
        made += nonces(seal(key, 50))
    assert len(set(made)) == len(made) == 250


def test_nonces_with_their_keys_stay_unique_across_rotation() -> None:
    used: set[tuple[bytes, bytes]] = set()
    total = 0
    for _ in range(20):
        key = new_key(limits=KeyLimits(max_tuples=64, max_bytes=1 << 20))
        while key.room_for(16, 16 * 8):
            used |= {(key.secret, nonce) for nonce in nonces(seal(key, 16))}
            total += 16
    assert len(used) == total == 20 * 64


def test_threads_that_share_a_key_never_share_a_nonce() -> None:
    key = new_key()
    found: list[bytes] = []

    def work() -> None:
        for _ in range(50):
            found.extend(nonces(seal(key, 20)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == len(found) == 4 * 50 * 20


@pytest.mark.parametrize("worker", [-1, 65536])
def test_a_worker_number_that_does_not_fit_the_nonce_is_refused(worker: int) -> None:
    with pytest.raises(KeyUnavailableError, match="worker number"):
        new_key(worker=worker)


def test_the_limits_are_2_to_the_24_tuples_and_64_gib() -> None:
    assert (MAX_TUPLES, MAX_BYTES) == (16_777_216, 68_719_476_736)
    key = new_key()
    assert key.room_for(MAX_TUPLES, MAX_BYTES)
    assert not key.room_for(MAX_TUPLES + 1, 0)
    assert not key.room_for(0, MAX_BYTES + 1)
    key.reserve(MAX_TUPLES, 0)  # as if so many had been sealed
    with pytest.raises(KeyUnavailableError, match="pass its limits"):
        seal(key, 1)


@pytest.mark.parametrize(
    ("tuples", "nbytes"), [(0, 1), (1, 0), (-1, 1), (MAX_TUPLES + 1, 1), (1, MAX_BYTES + 1)]
)
def test_settings_may_lower_the_limits_and_never_raise_them(tuples: int, nbytes: int) -> None:
    with pytest.raises(KeyUnavailableError, match="limit of"):
        KeyLimits(tuples, nbytes)


def test_a_batch_that_would_pass_a_limit_is_refused_before_anything_is_sealed() -> None:
    key = new_key(limits=KeyLimits(max_tuples=10, max_bytes=100))
    seal(key, 9, size=1)
    assert (key.tuples_used, key.bytes_used) == (9, 9)
    assert key.room_for(1, 91)
    for count, size in ((2, 1), (1, 92)):
        assert not key.room_for(count, count * size)
        with pytest.raises(KeyUnavailableError, match="rotate the key first"):
            seal(key, count, size)
        assert (key.tuples_used, key.bytes_used) == (9, 9)
    seal(key, 1, size=91)
    assert not key.room_for(1, 0)


def test_a_wiped_key_neither_seals_nor_shows_its_secret() -> None:
    key = new_key()
    cipher = key.cipher
    key.wipe()
    assert bytes(key._secret) == bytes(32)
    assert cipher is not None
    for use in (lambda: seal(key, 1), lambda: key.secret, lambda: key.cipher):
        with pytest.raises(KeyUnavailableError, match="was wiped"):
            use()


def test_a_wiped_opening_key_opens_nothing() -> None:
    key = new_key()
    opening = OpeningKey(key.secret, "cluster", "pub.node-a", key.dek_id, key.commitment)
    opening.wipe()
    with pytest.raises(KeyUnavailableError, match="was wiped"):
        _ = opening.cipher


def test_no_representation_of_a_key_shows_the_secret() -> None:
    key = new_key()
    opening = OpeningKey(key.secret, "cluster", "pub.node-a", key.dek_id, key.commitment)
    shown = f"{key!r} {key} {opening!r} {opening} {vars(opening)!r}"
    assert key.secret.hex() not in shown
    assert repr(key.secret)[2:-1] not in shown


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # 3.12 warns of the timeout plugin's thread
def test_a_forked_child_cannot_repeat_its_parents_nonces() -> None:
    key = new_key()
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:  # only os calls here: the child must not come back into pytest
        try:
            key.reserve(1, 1)
            os.write(write_end, b"sealed")
        except KeyUnavailableError as error:
            os.write(write_end, error.message.encode())
        finally:
            os._exit(0)
    os.close(write_end)
    os.waitpid(child, 0)
    said = os.read(read_end, 1000).decode()
    os.close(read_end)
    assert said == f"data key {key.dek_id} belongs to another process"
    assert key.reserve(1, 1) == 0
