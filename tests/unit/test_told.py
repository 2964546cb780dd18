"""A revoked key, trusted as far as its node tells: only for a chain that leads to exactly the told entry."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.audit_history import A, History, ordinary
from tests.audit_segments import base, head_at
from tests.unit.sealed_chain import AUDIT, CHAIN, CLUSTER, KEYS, ORIGIN, SealedChain, kek, rows
from vsql_consumers.unseal import Announcements
from vsql_shared.audit.dsse import SignedDocument, document_hash, sign_document
from vsql_shared.audit.entries import TRAIL_PRUNED, canonical_json
from vsql_shared.audit.told import MAX_STARTS, SaidBases, ToldHead
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


# Of a chain that was pruned Kafka has no beginning.

HISTORY = ordinary()
BASE = base(HISTORY, 6)
_SAID = {"event_type": TRAIL_PRUNED, "batch_lsn_start": 9, "batch_lsn_end": 9}
HISTORY.add(**_SAID, detail=canonical_json(BASE.detail()))
HISTORY.batch()
HISTORY.batch()
SEEN = 9
"""The last entry a peer had seen when it revoked the key."""


def revoked(seen: int = SEEN) -> PinnedKey:
    return PinnedKey("node-a", A.public_key, A.fingerprint, True, None, {HISTORY.chain: seen})


def held(documents: list[bytes], sequence: int, told: bytes, seen: int = SEEN) -> ToldHead:
    """What `syncctl key trust` reads, in both its passes."""
    named = "shop", HISTORY.chain, [revoked(seen)], A.fingerprint, sequence
    bases = SaidBases(*named)
    for offset, document in enumerate(documents):
        bases.feed(document, f"audit/0/{offset}")
    head = ToldHead(*named, told, bases.starts)
    for offset, document in enumerate(documents):
        head.feed(document, f"audit/0/{offset}")
    return head


@pytest.mark.parametrize("left", [[], [0], [2, 4]], ids=["nothing", "one", "holes"])
def test_a_pruned_chain_that_leads_from_its_base_to_the_told_entry_is_believed(left: list[int]) -> None:
    documents = [*(HISTORY.documents[at] for at in left), *HISTORY.documents[6:]]
    held(documents, len(HISTORY.entries), HISTORY.head.entry_hash).require()


def test_a_pruned_chain_is_believed_up_to_the_told_entry_only_with_its_hash_and_without_a_hole() -> None:
    last, told = len(HISTORY.entries), HISTORY.head.entry_hash
    with pytest.raises(ChainError, match="not the one you were told"):
        held(HISTORY.documents[6:], last, bytes(32))
    for cut in (HISTORY.documents[7:], [*HISTORY.documents[6:9], *HISTORY.documents[10:]]):
        with pytest.raises(ChainError):
            held(cut, last, told)
    with pytest.raises(ChainError):  # the entry that says the base is not there, or nobody says one
        held([*HISTORY.documents[6:11]], 11, HISTORY.entries[10].entry_hash)


def test_a_base_a_thief_makes_leads_to_no_told_entry_and_keeps_nobody_from_it() -> None:
    """Who has the key says another base, as high as he likes, before the told entry."""
    thief = History(head=replace(head_at(HISTORY, 10), entry_hash=bytes(32)))
    thief.open()
    made = replace(base(HISTORY, 9), head=replace(head_at(HISTORY, 9), entry_hash=bytes(32)))
    thief.add(**_SAID, detail=canonical_json(made.detail()))
    documents = [*HISTORY.documents[6:], *thief.documents]
    held(documents, len(HISTORY.entries), HISTORY.head.entry_hash).require()
    with pytest.raises(ChainError):
        held([*thief.documents, *HISTORY.documents[10:]], len(HISTORY.entries), HISTORY.head.entry_hash)


def test_a_base_above_what_this_node_had_seen_proves_nothing_of_what_lies_between() -> None:
    """A thief's entries behind the seen ones, then genuine ones again: who goes on from 4 would read his."""
    thief = History(head=head_at(HISTORY, 4))
    thief.open(9)
    thief.batch(77)
    thief.add(**_SAID, detail=canonical_json(base(HISTORY, 9).detail()))
    documents = [*HISTORY.documents[:4], *thief.documents, *HISTORY.documents[9:]]
    with pytest.raises(ChainError):
        held(documents, len(HISTORY.entries), HISTORY.head.entry_hash, seen=4).require()
    with pytest.raises(ChainError):
        held(HISTORY.documents[6:], len(HISTORY.entries), HISTORY.head.entry_hash, seen=5).require()
    held(HISTORY.documents[6:], len(HISTORY.entries), HISTORY.head.entry_hash, seen=6).require()


def test_many_bases_of_a_thief_are_not_all_tried_and_displace_none_said_before() -> None:
    thief = History(head=HISTORY.head)
    thief.open()
    for number in range(2 * MAX_STARTS):
        made = replace(BASE, head=replace(BASE.head, timeline=number + 2))
        thief.add(**_SAID, detail=canonical_json(made.detail()))
    bases = SaidBases("shop", HISTORY.chain, [revoked()], A.fingerprint, 100)
    for document in [*HISTORY.documents[6:], *thief.documents]:
        bases.feed(document, "audit/0/1")
    assert bases.starts[0] == BASE.head
    assert len(bases.starts) == MAX_STARTS


def test_a_document_of_another_kind_with_the_chain_s_name_in_it_keeps_nobody_from_the_told_entry() -> None:
    payload = SignedDocument.decode(HISTORY.documents[0]).payload
    strange = SignedDocument("application/x", payload, "", b"").encode()
    held([strange, *HISTORY.documents], len(HISTORY.entries), HISTORY.head.entry_hash).require()


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
