"""A revoked key, trusted as far as its node tells: only for a chain that leads to exactly the told entry."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.sealed_chain import AUDIT, CHAIN, CLUSTER, KEYS, ORIGIN, SealedChain, kek, rows
from vsql_consumers.unseal import Announcements
from vsql_shared.audit.dsse import document_hash, sign_document
from vsql_shared.audit.told import ToldHead
from vsql_shared.crypto.announce import MEDIA_TYPE, KeyRing, encode_announcement
from vsql_shared.crypto.signing import PinnedKey, TrustStore
from vsql_shared.errors import ChainError, SignatureError


def a_chain() -> tuple[SealedChain, PinnedKey]:
    """Four batches, of which a peer had seen the first when it revoked the key."""
    chain = SealedChain()
    chain.batch(rows("t", 1))
    seen = chain.head.sequence
    for number in range(3):
        chain.batch(rows("t", number + 2))
    pin = PinnedKey(ORIGIN, chain.signer.public_key, chain.signer.fingerprint, True, None, {CHAIN: seen})
    return chain, pin


def read(told: ToldHead, chain: SealedChain, *, without: int | None = None) -> None:
    told.feed(b"rubbish of somebody else", "audit/0/99")
    for offset, (_, value) in enumerate(chain.log[AUDIT]):
        if value is not None and offset != without:
            told.feed(value, f"audit/0/{offset}")


def told_of(chain: SealedChain, pin: PinnedKey, sequence: int, entry_hash: bytes) -> ToldHead:
    return ToldHead(CLUSTER, CHAIN, [pin], chain.signer.fingerprint, sequence, entry_hash)


def test_a_chain_that_leads_to_the_told_entry_is_believed() -> None:
    chain, pin = a_chain()
    told = told_of(chain, pin, chain.head.sequence, chain.head.entry_hash)
    read(told, chain)
    told.require()


def test_a_told_entry_before_the_end_is_enough_and_what_follows_is_not_looked_at() -> None:
    chain, pin = a_chain()
    value = chain.log[AUDIT][-2][1]
    assert value is not None
    told = told_of(chain, pin, chain.head.sequence - 1, document_hash(value))
    read(told, chain)
    told.require()


def test_another_hash_is_refused() -> None:
    chain, pin = a_chain()
    with pytest.raises(ChainError, match="not the one you were told"):
        read(told_of(chain, pin, chain.head.sequence, bytes(32)), chain)


def test_a_chain_that_ends_before_the_told_entry_is_refused() -> None:
    chain, pin = a_chain()
    told = told_of(chain, pin, chain.head.sequence + 1, chain.head.entry_hash)
    read(told, chain)
    with pytest.raises(ChainError, match="before entry"):
        told.require()


def test_a_chain_signed_by_a_key_nobody_pinned_is_refused_whatever_it_ends_with() -> None:
    _, pin = a_chain()
    other = SealedChain(seed=9)
    other.batch(rows("t", 1))
    told = told_of(other, pin, other.head.sequence, other.head.entry_hash)
    read(told, other)
    with pytest.raises(SignatureError, match="is not pinned"):
        told.require()


def test_what_somebody_else_wrote_into_the_chain_s_place_keeps_nobody_from_the_told_entry() -> None:
    chain, pin = a_chain()
    other = SealedChain(seed=9)
    other.batch(rows("t", 1))
    told = told_of(chain, pin, chain.head.sequence, chain.head.entry_hash)
    read(told, other)  # the same chain by its words, by a key that is not the node's
    read(told, chain)
    told.require()


def test_a_chain_with_a_hole_proves_nothing() -> None:
    chain, pin = a_chain()
    with pytest.raises(ChainError):
        read(told_of(chain, pin, chain.head.sequence, chain.head.entry_hash), chain, without=2)


def test_data_keys_of_entries_that_still_count_are_read_although_their_announcer_was_revoked() -> None:
    chain, pin = a_chain()
    entry = chain.batch(rows("t", 9)).entry
    held = Announcements(CLUSTER, CHAIN, ORIGIN, TrustStore([pin]), KeyRing())
    held.feed(*KEYS, 0, *chain.log[KEYS][0])
    assert held.open(entry, kek()).dek_id == entry.dek_id


def test_a_revoked_key_takes_no_other_announcements_place() -> None:
    chain = SealedChain()
    entry = chain.batch(rows("t", 9)).entry
    thief = SealedChain(seed=9).signer
    revoked = PinnedKey(ORIGIN, thief.public_key, thief.fingerprint, True, None, {CHAIN: 5})
    living = PinnedKey(ORIGIN, chain.signer.public_key, chain.signer.fingerprint, revoked=False)
    held = Announcements(CLUSTER, CHAIN, ORIGIN, TrustStore([living, revoked]), KeyRing())
    held.feed(*KEYS, 0, *chain.log[KEYS][0])
    garbled = encode_announcement(replace(chain.announcement, wrapped_dek=b"garbled"))
    held.feed(*KEYS, 1, entry.dek_id.encode(), sign_document(thief, MEDIA_TYPE, garbled))
    assert held.announced(entry.dek_id) == chain.announcement
    assert held.open(entry, kek()).dek_id == entry.dek_id
