"""What the consumer holds and remembers: the clock's offset, announcements, fragments, what Kafka deleted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.sealed_chain import (
    AUDIT,
    CHAIN,
    CLUSTER,
    KEYS,
    ORIGIN,
    SealedChain,
    kek,
    kek_file,
    read,
    rows,
)
from vsql_consumers.clock import WINDOW_US, ClockOffset
from vsql_consumers.collect import Collector
from vsql_consumers.collected import Ready
from vsql_consumers.groups import Group
from vsql_consumers.state import Position
from vsql_consumers.unseal import Announcements
from vsql_shared import names
from vsql_shared.audit.chain import ChainReader
from vsql_shared.audit.dsse import sign_document
from vsql_shared.audit.entries import AuditEntry
from vsql_shared.crypto.announce import MEDIA_TYPE, KeyRing, encode_announcement, rewrap
from vsql_shared.crypto.signing import PinnedKey, TrustStore
from vsql_shared.errors import KeyUnavailableError, RecordError, SignatureError, UnsealError
from vsql_shared.kms.base import KekProvider
from vsql_shared.kms.file import FileKek, destroy_version, rotate_kek_file

SECOND = 1_000_000


def test_the_age_of_a_backlog_is_not_an_offset_of_clocks() -> None:
    clock = ClockOffset()
    clock.arrived(5, 100 * SECOND)  # read after a restart; the end was not seen yet
    clock.written(5, 60 * SECOND)
    assert clock.offset_us is None
    clock.ended(6)
    clock.arrived(6, 200 * SECOND)
    clock.arrived(7, 200 * SECOND)  # came with the one before: nobody knows for how long it lay there
    clock.written(7, 100 * SECOND)
    assert clock.offset_us is None
    clock.arrived(6, 200 * SECOND)
    clock.written(6, 200 * SECOND - 3000)
    assert clock.offset_us == 3000


def test_an_offset_of_clocks_that_changed_is_forgotten_after_two_windows() -> None:
    clock = ClockOffset()
    for offset, age in enumerate([1_000, 900_000, 900_000]):
        now = 10 * WINDOW_US + offset * WINDOW_US
        clock.ended(offset)
        clock.arrived(offset, now)
        clock.written(offset, now - age)
    assert clock.offset_us == 900_000


def _announcements(chain: SealedChain, held: int, trust: TrustStore | None = None) -> Announcements:
    return Announcements(CLUSTER, CHAIN, ORIGIN, trust or chain.trust, KeyRing(), 0, held)


def _manifests(chain: SealedChain, count: int) -> list[AuditEntry]:
    """Batches, each under a key of its own."""
    found = []
    for number in range(count):
        chain.new_key()
        found.append(chain.batch(rows("t", number)).entry)
    return found


def test_announcements_nobody_asked_for_are_bounded_and_every_key_is_found() -> None:
    chain = SealedChain()
    manifests = _manifests(chain, 40)
    held = _announcements(chain, 10)
    log = iter(list(enumerate(chain.log[KEYS])))
    most = 0

    def feed_until(wanted: str) -> None:
        nonlocal most
        held.wanted = wanted
        while not held.satisfied and (one := next(log, None)) is not None:
            held.feed(*KEYS, one[0], *one[1])
            most = max(most, len(held))
        held.wanted = ""

    feed_until("")
    for entry in manifests:
        if not held.knows(entry.dek_id):
            feed_until(entry.dek_id)
        assert held.open(entry, kek()).dek_id == entry.dek_id
    assert most <= 10
    assert len(held) == 1


def test_a_restart_in_the_middle_of_an_epoch_of_many_keys_finds_the_one_it_needs() -> None:
    chain = SealedChain()
    last = _manifests(chain, 40)[-1]
    held = _announcements(chain, 10)
    held.wanted = last.dek_id
    for offset, (key, value) in enumerate(chain.log[KEYS]):
        held.feed(*KEYS, offset, key, value)
        assert len(held) <= 10
    assert held.knows(last.dek_id)


def _announced_under(chain: SealedChain, provider: KekProvider) -> bytes:
    """The chain's present key, wrapped anew."""
    again = rewrap(chain.announcement, provider)
    return sign_document(chain.signer, MEDIA_TYPE, encode_announcement(again))


def _two_versions(folder: Path) -> tuple[FileKek, FileKek]:
    """A KEK file with the chain's version and a later one, and one that holds the later one only."""
    path = folder / "kek"
    path.write_bytes(kek_file().read_bytes())
    path.chmod(0o600)
    rotate_kek_file(path)
    newest = folder / "newest"
    newest.write_bytes(path.read_bytes())
    newest.chmod(0o600)
    destroy_version(newest, "test-kek/1")
    return FileKek(path, "test-kek"), FileKek(newest, "test-kek")


def test_a_key_announced_again_opens_without_the_kek_version_it_was_sealed_under(tmp_path: Path) -> None:
    both, newest = _two_versions(tmp_path)
    chain = SealedChain()
    entry = chain.batch(rows("t", 1)).entry
    held = _announcements(chain, 10)
    held.feed(*KEYS, 0, *chain.log[KEYS][0])
    with pytest.raises(KeyUnavailableError, match="does not hold test-kek/1"):
        held.open(entry, newest)
    held.feed(*KEYS, 1, entry.dek_id.encode(), _announced_under(chain, both))
    assert held.open(entry, newest).dek_id == entry.dek_id


def test_a_key_announced_again_behind_later_ones_does_not_make_those_forgotten(tmp_path: Path) -> None:
    both, newest = _two_versions(tmp_path)
    chain = SealedChain()
    first = chain.batch(rows("t", 1)).entry
    again = _announced_under(chain, both)
    chain.new_key()
    second = chain.batch(rows("t", 2)).entry
    held = _announcements(chain, 10)
    # As compaction leaves it: the first key's former announcement is gone.
    held.feed(*KEYS, 1, *chain.log[KEYS][-1])
    held.feed(*KEYS, 2, first.dek_id.encode(), again)
    assert held.open(first, newest).dek_id == first.dek_id
    assert held.open(second, both).dek_id == second.dek_id


def test_keys_announced_again_far_behind_are_looked_for_once_for_all_that_are_held(tmp_path: Path) -> None:
    both, newest = _two_versions(tmp_path)
    chain = SealedChain()
    manifests, again = [], []
    for number in range(40):
        chain.new_key()
        manifests.append(chain.batch(rows("t", number)).entry)
        again.append((manifests[-1].dek_id.encode(), _announced_under(chain, both)))
    log = [*chain.log[KEYS], *again]
    held, unread, looks = _announcements(chain, 10), iter(list(enumerate(log))), 0
    for entry in manifests:
        while not held.full and (one := next(unread, None)) is not None:
            held.feed(*KEYS, one[0], *one[1])
        try:
            key = held.open(entry, newest)
        except KeyUnavailableError:
            looks += 1
            for offset, record in enumerate(log):
                held.feed_again(entry.dek_id, *KEYS, offset, *record)
            key = held.open(entry, newest)
        assert key.dek_id == entry.dek_id
    assert 1 <= looks <= 8


def test_a_key_that_was_destroyed_is_neither_held_nor_opened_any_more() -> None:
    chain = SealedChain()
    entry = chain.batch(rows("t", 1)).entry
    held = _announcements(chain, 10)
    held.feed(*KEYS, 0, *chain.log[KEYS][0])
    key = held.open(entry, kek())
    held.destroy([entry.dek_id, "dek-of-another-chain"])
    assert not held.knows(entry.dek_id)
    assert not held.has_opened(entry.dek_id)
    with pytest.raises(KeyUnavailableError, match="was wiped"):
        _ = key.cipher


def test_an_announcement_by_a_key_that_was_revoked_since_does_not_stop_the_stream() -> None:
    chain = SealedChain()
    pin = PinnedKey(ORIGIN, chain.signer.public_key, chain.signer.fingerprint, revoked=True)
    held = _announcements(chain, 10, TrustStore([pin]))
    held.feed(*KEYS, 0, *chain.log[KEYS][0])
    assert not held.knows(chain.key.dek_id)


def test_what_a_revoked_key_signed_before_is_still_read_and_nothing_after() -> None:
    chain = SealedChain()
    chain.batch(rows("t", 1))
    known = chain.head.sequence
    chain.batch(rows("t", 2))
    pin = PinnedKey(
        ORIGIN, chain.signer.public_key, chain.signer.fingerprint, revoked=True, trusted_to={CHAIN: known}
    )
    reader = ChainReader(CLUSTER, CHAIN, ORIGIN, TrustStore([pin]))
    for number, (_, value) in enumerate(chain.log[AUDIT][:known]):
        assert reader.accept(value or b"", f"audit/0/{number}") is not None
    with pytest.raises(SignatureError, match="revoked"):
        reader.accept(chain.log[AUDIT][known][1] or b"", "audit/0/2")
    assert reader.head.sequence == known


def test_what_a_retired_key_signed_before_is_still_read_and_nothing_after() -> None:
    chain = SealedChain()
    first = chain.batch(rows("t", 1)).entry
    second = chain.batch(rows("t", 2)).entry
    assert second.event_timestamp > first.event_timestamp
    pin = PinnedKey(
        ORIGIN,
        chain.signer.public_key,
        chain.signer.fingerprint,
        revoked=False,
        retired_at=first.event_timestamp,
    )
    reading = read(chain.log, TrustStore([pin]))
    assert "retired" in str(reading.error)
    assert reading.entries == [1, 2]


def _ready(sequence: int, *, continues: bool) -> Ready:
    chain = SealedChain()
    while chain.head.sequence < sequence - 1:
        chain.batch(rows("t", chain.head.sequence))
    made = chain.batch(rows("t", 99), continues=continues)
    return Ready(sequence, chain.head, sequence, {}, made.entry, made.encoded, made.entry_hash, [], True)


def test_progress_never_stands_between_fragments_also_where_one_was_skipped() -> None:
    """Else a restart would not know where abandoned fragments begin, and refuse the next epoch for good."""
    group = Group.after(Position(), CHAIN)
    group.add_skipped(_ready(2, continues=True), "skipped")
    assert group.fragments
    group.add_skipped(_ready(3, continues=False), "skipped")
    assert not group.fragments


def test_a_batch_skipped_unread_is_acknowledged_in_its_place_among_the_others() -> None:
    chain = SealedChain()
    chain.batch(rows("t", 1))
    head = chain.head
    group = Group.after(Position(), CHAIN)
    group.add_skipped(Ready(head.sequence, head, 2, {}, None, b"", head.entry_hash, [], True), "lost")
    assert [(one.batch, one.manifest) for one in group.receipts] == [(1, b"")]
    # An entry without a batch stands at the batch before it: there is nothing to acknowledge.
    group.add_skipped(Ready(head.sequence + 1, head, 3, {}, None, b"", head.entry_hash, [], True), "lost")
    assert len(group.receipts) == 1


T = (names.data_topic(CLUSTER, CHAIN, "public", "t"), 0)


def _collector(chain: SealedChain, stored: int) -> Collector:
    reader = ChainReader(CLUSTER, CHAIN, ORIGIN, chain.trust)
    return Collector(reader, chain.trust, AUDIT, 0, {T: stored}, 1 << 20)


def test_orphans_that_kafka_deleted_stop_nothing() -> None:
    chain = SealedChain()
    chain.orphans([("t", ord("I"), b"x")])
    needed = len(chain.log[T])
    chain.restart()
    chain.batch(rows("t", 1))
    collector = _collector(chain, 0)
    collector.deleted_below(*T, needed)
    for place in (AUDIT, T):
        for offset, (_, value) in enumerate(chain.log[place]):
            if place == AUDIT or offset >= needed:
                collector.feed(*place, offset, value)
    given = []
    while (ready := collector.next_ready()) is not None:
        given.append(ready.sequence)
    assert given == [1, 2, 3]


def test_a_record_that_kafka_deleted_and_a_manifest_names_is_missed_by_name() -> None:
    chain = SealedChain(tuples_per_pack=1)
    chain.batch(rows("t", 1, 2, 3))
    collector = _collector(chain, 0)
    collector.feed(*T, 0, chain.log[T][0][1])
    collector.deleted_below(*T, 2)
    for offset, (_, value) in enumerate(chain.log[AUDIT]):
        collector.feed(*AUDIT, offset, value)
    assert collector.next_ready() is not None  # the epoch's entry
    with pytest.raises(RecordError, match="begins at offset 2") as refused:
        collector.next_ready()
    assert refused.value.record == f"{T[0]}/0/1"


def test_a_destroyed_key_leaves_memory_opened_or_not_and_no_other_does() -> None:
    chain = SealedChain()
    opened, waiting, living = _manifests(chain, 3)
    held = _announcements(chain, 10)
    for offset, (key, value) in enumerate(chain.log[KEYS]):
        held.feed(*KEYS, offset, key, value)
    gone, kept = held.open(opened, kek()), held.open(living, kek())
    held.destroy([opened.dek_id, waiting.dek_id])
    with pytest.raises(KeyUnavailableError, match="was wiped"):
        _ = gone.cipher
    for entry in (opened, waiting):
        assert not held.has_opened(entry.dek_id)
        with pytest.raises(UnsealError, match="was never announced"):
            held.open(entry, kek())
    assert held.open(living, kek()) is kept
    assert kept.cipher is not None
