"""The end of a signing key as its chain says it: what counts, and what a thief with the key reaches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.audit_history import ACKS, CHAIN, CLUSTER, A, B, History, signer
from vsql_shared.audit.chain import Accepted, ChainHead, ChainReader, Void
from vsql_shared.audit.entries import SIGNING_KEY_ENDED, ZERO_HASH, canonical_json
from vsql_shared.audit.key_ends import (
    CHAINS_PER_ENTRY,
    RETIRED,
    REVOKED,
    KeyEnd,
    WayFinder,
    end_in,
    lesser,
    living,
    require_handover,
    said_in,
    sign_handover,
)
from vsql_shared.audit.rows import parse
from vsql_shared.crypto.signing import End, PinnedKey, Signer, TrustStore
from vsql_shared.errors import ChainError, DecodeError, KeyEndedError, SignatureError

NEXT, THIRD = signer("node-a", "next"), signer("node-a", "third")


def pinned(one: Signer, *, revoked: bool = False, **more: Any) -> PinnedKey:
    return replace(PinnedKey(one.node, one.public_key, one.fingerprint, revoked), **more)


def say(history: History, ended: Signer, end: End | None = None, act: str = REVOKED, **more: object) -> None:
    """The entry with which the next key says where another one ended; else where the chain has it end."""
    last = [one for one in history.entries if parse(one.encoded).document.signer == ended.fingerprint]
    end = end or (End(last[-1].entry.sequence, last[-1].entry_hash) if last else End(0, ZERO_HASH))
    detail = next(KeyEnd(ended.fingerprint, act, {history.chain: end}).as_details()) | more
    history.add(
        event_type=SIGNING_KEY_ENDED, batch_lsn_start=5, batch_lsn_end=5, detail=canonical_json(detail)
    )


def rotated(batches: int = 3, chain: str = CHAIN) -> tuple[History, End]:
    """A chain that the next key goes on with, and where the first one ended in it."""
    history = History(chain)
    history.open()
    for _ in range(batches):
        history.batch()
    end = End(history.head.sequence, history.head.entry_hash)
    history.by = NEXT
    history.open()
    say(history, A)
    history.batch()
    return history, end


def other(history: History, at: int, batches: int) -> History:
    """What a thief with the first key puts behind entry `at`: as many manifests of his own."""
    head = ChainReader(CLUSTER, history.chain, "node-a", TrustStore([pinned(A), pinned(NEXT)]))
    for document in history.documents[:at]:
        head.accept(document, "x")
    thief = History(history.chain, head=head.head)
    thief.writer.incarnation = head.head.incarnation
    thief._clock += 77  # other entries than the true ones
    for _ in range(batches):
        thief.batch(rows=9)
    return thief


def read(store: TrustStore, documents: list[bytes], chain: str = CHAIN) -> list[object]:
    """What a reader from the beginning takes each for: a hash that counts, 'void', or its error."""
    reader = ChainReader(CLUSTER, chain, "node-a", store)
    found: list[object] = []
    for document in documents:
        try:
            outcome = reader.accept(document, "shop.audit/0/0")
        except (ChainError, SignatureError) as error:
            return [*found, type(error)]
        found.append(outcome.entry_hash if isinstance(outcome, Accepted) else "void")
    return found


def hashes(history: History) -> list[object]:
    return [one.entry_hash for one in history.entries]


def ended(end: End) -> PinnedKey:
    return pinned(A, revoked=True, ends={CHAIN: end})


def with_way(end: End, documents: list[bytes]) -> TrustStore:
    finder = WayFinder(CHAIN, 0, end)
    for document in documents:
        finder.feed(document)
    return TrustStore([ended(end), pinned(NEXT)], ways={CHAIN: finder.way()})


def test_what_leads_to_the_signed_end_counts_although_the_key_was_revoked_unseen() -> None:
    history, end = rotated()
    assert read(TrustStore([pinned(A, revoked=True), pinned(NEXT)]), history.documents) == [KeyEndedError]
    assert read(TrustStore([ended(end), pinned(NEXT)]), history.documents) == hashes(history)


@pytest.mark.parametrize("before", [0, 1, 2, 3, 4])
def test_an_entry_laid_before_the_end_where_the_chain_has_none_counts_for_no_reader(before: int) -> None:
    """It follows the last true one, and lies before the next key's opening, or in place of unread ones."""
    history, end = rotated()
    at = min(before, end.sequence)
    documents = history.documents
    thief = other(history, at, 2) if at else History()
    if not at:
        thief.open(number=99)
        thief.batch(rows=9)
    attacked = documents[:at] + thief.documents + documents[at:]
    found = read(with_way(end, attacked), attacked)
    assert [one for one in found if one != "void"] == hashes(history)
    assert found.count("void") == len(thief.documents)


def test_without_the_way_a_replaced_entry_is_seen_at_the_end_at_the_latest() -> None:
    history, end = rotated()
    thief = other(history, 2, 1)
    attacked = history.documents[:2] + thief.documents + history.documents[2:]
    found = read(TrustStore([ended(end), pinned(NEXT)]), attacked)
    assert found[-1] is ChainError


def test_nothing_by_the_ended_key_counts_behind_what_the_chain_itself_says() -> None:
    """An auditor who brings both public keys knows of no end but from the chain."""
    history, _ = rotated()
    documents = history.documents
    thief = History(head=history.head)
    thief.open(number=50)
    thief.batch()
    history.open()
    history.batch()
    attacked = documents + thief.documents + history.documents[len(documents) :]
    store = TrustStore([pinned(A), pinned(NEXT)])
    found = read(store, attacked)
    assert [one for one in found if one != "void"] == hashes(history)
    assert read(store, documents + thief.documents)[len(documents) :] == ["void", "void"]


def test_a_chain_that_says_another_end_than_it_has_is_refused() -> None:
    history, _ = rotated()
    at = next(n for n, one in enumerate(history.entries) if one.entry.event_type == SIGNING_KEY_ENDED)
    lying = History(head=read_head(history, at), by=NEXT)
    lying.writer.incarnation = lying.head.incarnation
    say(lying, A, End(2, history.entries[1].entry_hash))
    store = TrustStore([pinned(A), pinned(NEXT)])
    assert read(store, history.documents[:at] + lying.documents)[-1] is ChainError


def read_head(history: History, at: int) -> ChainHead:
    reader = ChainReader(CLUSTER, history.chain, "node-a", TrustStore([pinned(A), pinned(NEXT)]))
    for document in history.documents[:at]:
        reader.accept(document, "x")
    return reader.head


def said(document: bytes, *keys: PinnedKey, node: str = "node-a", cluster: str = CLUSTER) -> KeyEnd | None:
    return said_in(document, cluster, node, living(keys, node))


def test_only_a_living_key_of_the_node_says_where_another_one_ended() -> None:
    history, end = rotated()
    word = next(one.encoded for one in history.entries if one.entry.event_type == SIGNING_KEY_ENDED)
    found = said(word, pinned(NEXT), pinned(A, revoked=True))
    assert found is not None
    assert (found.key, found.act, found.ends) == (A.fingerprint, REVOKED, {CHAIN: end})
    for what, keys in {
        "nobody's": (),
        "ended itself": (pinned(NEXT, revoked=True),),
        "handed over itself": (pinned(NEXT, retired_at=1),),
        "another node's": (replace(pinned(NEXT), node="node-b"),),
    }.items():
        assert said(word, *keys) is None, what
    assert said(word, pinned(NEXT), cluster="other") is None
    altered = bytearray(word)
    altered[-1] ^= 1
    for garbage in (b"", b"signing_key_ended", bytes(altered), word[:-1], word + b"x"):
        assert said(garbage, pinned(NEXT)) is None


def test_a_key_does_not_end_itself_and_a_thief_ends_no_other() -> None:
    history = History()
    history.open()
    say(history, A)  # of the only key, by itself
    say(history, NEXT)  # of one that is to follow
    own, others = history.documents[1:]
    assert said(own, pinned(A)) is None
    # It is understood; whoever remembers it holds it against the keys that ended here, and NEXT has not.
    assert said(others, pinned(A)) is not None
    assert said(others, pinned(A, revoked=True), pinned(NEXT)) is None
    # In its own chain the first one changes nothing either.
    history.batch()
    assert read(TrustStore([pinned(A)]), history.documents) == hashes(history)


def test_of_two_words_of_one_end_the_one_that_trusts_less_counts() -> None:
    low, high = End(3, b"h" * 32), End(9, b"a" * 32)
    assert lesser(None, high) == high
    assert lesser(high, low) == lesser(low, high) == low


def test_the_retired_key_names_the_one_that_follows() -> None:
    word = sign_handover(A, CLUSTER, NEXT.fingerprint)
    end = KeyEnd(A.fingerprint, RETIRED, {}, word)
    require_handover(end, CLUSTER, "node-a", A.public_key, NEXT.fingerprint)
    for args in (
        (CLUSTER, "node-a", A.public_key, THIRD.fingerprint),
        ("other", "node-a", A.public_key, NEXT.fingerprint),
    ):
        with pytest.raises(SignatureError, match="handed over to another key"):
            require_handover(end, *args)
    forged = end._replace(handover=sign_handover(NEXT, CLUSTER, NEXT.fingerprint))
    with pytest.raises(SignatureError):
        require_handover(forged, CLUSTER, "node-a", A.public_key, NEXT.fingerprint)


def test_many_chains_are_said_in_several_entries() -> None:
    ends = {f"p{n}.node-a": End(n, bytes(32)) for n in range(2 * CHAINS_PER_ENTRY + 1)}
    details = list(KeyEnd(A.fingerprint, REVOKED, ends).as_details())
    assert len(details) == 3
    assert sum(len(one["ends"]) for one in details) == len(ends)
    assert all(len(canonical_json(one)) < 64 << 10 for one in details)


@pytest.mark.parametrize(
    "detail",
    [
        "{}",
        '{"act":"revoked","ends":[],"key":"x"}',
        '{"act":"gone","ends":{},"key":"x"}',
        '{"act":"revoked","ends":{"orders.node-b":[1,"%s"]},"key":"x"}' % ("00" * 32),
        '{"act":"revoked","ends":{"orders.node-a":[-1,"%s"]},"key":"x"}' % ("00" * 32),
        '{"act":"revoked","ends":{"orders.node-a":[true,"%s"]},"key":"x"}' % ("00" * 32),
        '{"act":"revoked","ends":{"orders.node-a":[1,"00"]},"key":"x"}',
        '{"act":"revoked","ends":{"orders.node-a":[1]},"key":"x"}',
        '{"act":"revoked","ends":{"nonsense":[1,"%s"]},"key":"x"}' % ("00" * 32),
        '{"act":"revoked","ends":{},"handover":"?","key":"x"}',
    ],
)
def test_what_names_no_end_is_refused_and_not_guessed(detail: str) -> None:
    history = History()
    history.open()
    history.add(event_type=SIGNING_KEY_ENDED, batch_lsn_start=5, batch_lsn_end=5, detail=detail)
    with pytest.raises(DecodeError):
        end_in(history.entries[-1].entry)
    assert read(TrustStore([pinned(A)]), history.documents)[-1] is ChainError


def test_an_acknowledgement_by_an_ended_key_counts_as_far_as_its_signed_end() -> None:
    acks = History(ACKS, by=B)
    manifests, _ = rotated()
    acks.open()
    acks.acknowledge(manifests.entries[1])
    end = End(acks.head.sequence, acks.head.entry_hash)
    acks.acknowledge(manifests.entries[2])
    store = TrustStore([replace(PinnedKey("node-b", B.public_key, B.fingerprint, True), ends={ACKS: end})])
    reader = ChainReader(CLUSTER, ACKS, "node-b", store)
    outcomes = [type(reader.accept(one, "x")) for one in acks.documents]
    assert outcomes == [Accepted, Accepted, Void]
    assert store.proven_from("node-b", ACKS) == end.sequence
    assert store.proven_from("node-a", ACKS) == 0


def test_a_key_announcement_of_an_ended_key_counts_no_more_than_its_end_allows() -> None:
    end = End(4, b"h" * 32)
    store = TrustStore([ended(end), pinned(NEXT)])
    assert store.known_up_to("node-a", A.fingerprint, CHAIN) == 4
    assert store.known_up_to("node-a", A.fingerprint, "other.node-a") == 0
    assert store.known_up_to("node-a", NEXT.fingerprint, CHAIN) == 0
