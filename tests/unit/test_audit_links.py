"""A chain held by its last signature: whatever is altered below it is found, by everybody without the key."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.audit_history import CHAIN, CLUSTER, A, B, History, ordinary, signer, trust
from vsql_shared.audit.checkpoint import Log
from vsql_shared.audit.dsse import AUDIT_ENTRY, KEY_ANNOUNCEMENT, SignedDocument, sign_document
from vsql_shared.audit.links import follow, link, require_signed
from vsql_shared.errors import ChainError, DecodeError, SignatureError

LOG = Log(CLUSTER, CHAIN)
HISTORY = ordinary()
DOCUMENTS = HISTORY.documents


@pytest.mark.parametrize("size", range(1, len(DOCUMENTS) + 1))
def test_every_prefix_is_held_by_its_own_last_signature(size: int) -> None:
    linked = follow(DOCUMENTS[:size], LOG)
    require_signed(linked, LOG, trust(A))
    assert (linked.size, linked.last) == (size, DOCUMENTS[size - 1])
    if size == len(DOCUMENTS):
        assert linked.tree == HISTORY.head.tree


@pytest.mark.parametrize("size", range(len(DOCUMENTS)))
def test_a_chain_goes_on_from_what_was_followed(size: int) -> None:
    linked = link(follow(DOCUMENTS[:size], LOG), DOCUMENTS[size], LOG)
    assert linked == follow(DOCUMENTS[: size + 1], LOG)
    for other in range(len(DOCUMENTS)):
        if other != size + 1:
            with pytest.raises(ChainError):
                link(linked, DOCUMENTS[other], LOG)


def test_a_chain_without_entries_has_the_empty_tree() -> None:
    linked = follow([], LOG)
    assert (linked.tree, linked.size) == ((), 0)
    with pytest.raises(DecodeError):
        require_signed(linked, LOG, trust(A))


def _resigned(at: int) -> bytes:
    """The same entry, signed by somebody else."""
    return sign_document(signer("node-a", "x"), AUDIT_ENTRY, HISTORY.entries[at].entry.encode())


def _flipped(encoded: bytes, at: int) -> bytes:
    return encoded[:at] + bytes([encoded[at] ^ 1]) + encoded[at + 1 :]


def _other() -> History:
    other = History()
    other.open()
    other.batch(9)
    return other


ALTERED: dict[str, Callable[[], list[bytes]]] = {
    "an entry is gone": lambda: DOCUMENTS[:3] + DOCUMENTS[4:],
    "the first one is gone": lambda: DOCUMENTS[1:],
    "an entry stands twice": lambda: DOCUMENTS[:4] + DOCUMENTS[3:],
    "two changed places": lambda: [*DOCUMENTS[:3], DOCUMENTS[4], DOCUMENTS[3], *DOCUMENTS[5:]],
    "an entry of another history": lambda: [*DOCUMENTS[:1], _other().documents[1], *DOCUMENTS[2:]],
    "an entry of another chain": lambda: [History(chain="bills.node-a").open().encoded, *DOCUMENTS[1:]],
    "an entry of another cluster": lambda: [History(cluster="shop2").open().encoded, *DOCUMENTS[1:]],
    "an entry signed by another": lambda: [*DOCUMENTS[:3], _resigned(3), *DOCUMENTS[4:]],
    "a bit of a signature": lambda: [*DOCUMENTS[:3], _flipped(DOCUMENTS[3], -1), *DOCUMENTS[4:]],
    "bytes behind an entry": lambda: [*DOCUMENTS[:3], DOCUMENTS[3] + b"\0", *DOCUMENTS[4:]],
    "garbage": lambda: [*DOCUMENTS[:3], b"garbage", *DOCUMENTS[4:]],
    "nothing": lambda: [*DOCUMENTS[:3], b"", *DOCUMENTS[4:]],
    "too much": lambda: [*DOCUMENTS[:3], bytes(2 << 20), *DOCUMENTS[4:]],
}


@pytest.mark.parametrize("case", ALTERED)
def test_what_is_altered_below_the_last_entry_is_found(case: str) -> None:
    with pytest.raises(ChainError):
        follow(ALTERED[case](), LOG)


@pytest.mark.parametrize("at", range(0, len(DOCUMENTS[-1]), 7))
def test_no_bit_of_the_last_entry_can_be_altered(at: int) -> None:
    with pytest.raises((ChainError, DecodeError, SignatureError)):
        require_signed(follow([*DOCUMENTS[:-1], _flipped(DOCUMENTS[-1], at)], LOG), LOG, trust(A, B))


def test_a_chain_rewritten_without_the_key_has_no_signature() -> None:
    forged = History(by=signer("node-a", "x"))
    forged.open()
    forged.batch(3)
    with pytest.raises(SignatureError):
        require_signed(follow(forged.documents, LOG), LOG, trust(A))


def test_a_last_entry_of_another_kind_or_of_another_node_is_no_signature() -> None:
    entry = HISTORY.entries[-1].entry.encode()
    for made in (sign_document(A, KEY_ANNOUNCEMENT, entry), sign_document(B, AUDIT_ENTRY, entry)):
        with pytest.raises((DecodeError, SignatureError)):
            require_signed(follow([*DOCUMENTS[:-1], made], LOG), LOG, trust(A, B))
    unsigned = SignedDocument(AUDIT_ENTRY, entry, "", b"").encode()
    with pytest.raises(SignatureError):
        require_signed(follow([*DOCUMENTS[:-1], unsigned], LOG), LOG, trust(A))
