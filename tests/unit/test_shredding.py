"""Orders to destroy a KEK version, their approval, and the proof: what two people signed, nothing else."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from vsql_shared.audit.chain import EMPTY_HEAD, ChainWriter
from vsql_shared.audit.dsse import KEY_ANNOUNCEMENT, document_hash, sign_document
from vsql_shared.audit.entries import KEY_DESTROYED, OPERATOR_ACTION, AuditEntry, canonical_json
from vsql_shared.audit.shred_proof import Proven, verify_proof, write_proof
from vsql_shared.audit.shredding import (
    KEYS_PER_ENTRY,
    ORDER_TYPE,
    Covered,
    ShredOrder,
    destroyed,
    entry_details,
    keys_hash,
    open_order,
    sign_order,
    to_approve,
    verify_approval,
)
from vsql_shared.crypto.signing import PinnedKey, Signer
from vsql_shared.errors import DecodeError, RecordError, SignatureError, VerificationError

CLUSTER, NODE, CHAIN = "c", "node-a", "pub.node-a"
COPY = "pub.node-a.copy.node-b"
NOW = 1_790_000_000_000_000


def signer(name: str, seed: int) -> Signer:
    return Signer(Ed25519PrivateKey.from_private_bytes(bytes([seed] * 32)), name)


def pin(of: Signer) -> PinnedKey:
    return PinnedKey(of.node, of.public_key, of.fingerprint, revoked=False)


ALICE, BOB, MALLORY, ORIGIN = signer("alice", 1), signer("bob", 2), signer("mallory", 3), signer(NODE, 4)
PEOPLE = [pin(ALICE), pin(BOB)]
DEKS = [(CHAIN, f"dek-{n:02}") for n in range(5)] + [(COPY, "dek-copy")]


def an_order(deks: list[tuple[str, str]] = DEKS, **changes: Any) -> ShredOrder:
    chains = dict.fromkeys(chain for chain, _ in deks)
    order = ShredOrder(
        cluster=CLUSTER,
        node=NODE,
        kms_provider="pkcs11",
        kek_id="payments/0001",
        operator="alice",
        reason="retention is over",
        requested_at=NOW,
        not_before=NOW + 10,
        deks_sha256=keys_hash(deks),
        covers={
            chain: Covered(deks=sum(of == chain for of, _ in deks), tuples=7, unapplied_batches=1)
            for chain in chains
        },
    )
    return replace(order, **changes)


class Case:
    """Everything of one shredding, to be altered."""

    def __init__(self, deks: list[tuple[str, str]] = DEKS) -> None:
        self.order = an_order(deks)
        self.document = sign_order(ALICE, self.order)
        self.approver = BOB.fingerprint
        self.approval = BOB.sign(to_approve(self.document))
        self.deks = deks
        self.at = NOW + 20
        self.event_type = KEY_DESTROYED
        self.by, self.cluster = ORIGIN, CLUSTER
        self.details: list[dict[str, Any]] = self.make_details()

    def make_details(self) -> list[dict[str, Any]]:
        return [
            said
            for chain in dict.fromkeys(of for of, _ in self.deks)
            for said in entry_details(
                self.order, self.document, self.approver, chain,
                [dek_id for of, dek_id in self.deks if of == chain], self.at,
            )
        ]  # fmt: skip

    def entries(self) -> list[bytes]:
        writer = ChainWriter(self.by, self.cluster, CHAIN, EMPTY_HEAD, bytes(16), node=self.by.node)
        opened = writer.open_epoch(lsn=1, system_identifier="1", timeline=1)
        writer.commit(opened.entry_hash)
        out = []
        for said in self.details:
            made = writer.next(
                event_type=self.event_type,
                source_node_id=NODE,
                batch_lsn_start=1,
                batch_lsn_end=1,
                detail=canonical_json(said),
            )
            writer.commit(made.entry_hash)
            out.append(made.encoded)
        return out

    def proof(self) -> bytes:
        return write_proof(self.document, self.approver, self.approval, self.entries())

    def verify(self) -> Proven:
        return verify_proof(self.proof(), PEOPLE, [pin(ORIGIN)])


def test_a_proof_says_who_ordered_who_approved_when_and_which_keys_are_gone() -> None:
    found = Case().verify()
    assert (found.order.operator, found.approver, found.order.reason) == ("alice", "bob", "retention is over")
    assert found.destroyed_at == NOW + 20
    assert list(found.deks) == sorted(DEKS)
    assert [chain for chain, _ in found.entries] == [CHAIN, CHAIN]


def test_the_names_of_thousands_of_keys_are_spread_over_entries_that_fit() -> None:
    deks = [(CHAIN, f"dek-{n:032}") for n in range(2 * KEYS_PER_ENTRY + 1)]
    case = Case(deks)
    assert [len(said["deks"]) for said in case.details] == [KEYS_PER_ENTRY, KEYS_PER_ENTRY, 1]
    assert len(case.verify().deks) == len(deks)


def _same_person_twice(case: Case) -> None:
    second = signer("alice", 9)
    case.approver, case.approval = second.fingerprint, second.sign(to_approve(case.document))


def _altered(**changes: Any) -> Callable[[Case], None]:
    """The order is another one than was approved, signed again by who asks."""

    def alter(case: Case) -> None:
        case.order = replace(case.order, **changes)
        case.document = sign_order(ALICE, case.order)
        case.details = case.make_details()

    return alter


def _set(**values: Any) -> Callable[[Case], None]:
    def alter(case: Case) -> None:
        for name, value in values.items():
            setattr(case, name, value)

    return alter


def _said(**values: Any) -> Callable[[Case], None]:
    def alter(case: Case) -> None:
        case.details[0] |= values

    return alter


def _approve(by: Signer, what: Callable[[bytes], bytes] = to_approve) -> Callable[[Case], None]:
    def alter(case: Case) -> None:
        case.approver, case.approval = by.fingerprint, by.sign(what(case.document))

    return alter


def _other_order(case: Case) -> None:
    """Entries that belong to another order of the same people."""
    other = Case()
    other.order = an_order(reason="another one")
    other.document = sign_order(ALICE, other.order)
    case.details = other.make_details()


FORGERIES: dict[str, tuple[Callable[[Case], object], type[Exception]]] = {
    "who ordered approves, too": (_approve(ALICE), SignatureError),
    "who ordered approves with a second key": (_same_person_twice, SignatureError),
    "somebody who is not enrolled approves": (_approve(MALLORY), SignatureError),
    "the approval is of a signature over the order itself": (_approve(BOB, lambda d: d), SignatureError),
    "the approval is of nothing": (_set(approval=bytes(64)), SignatureError),
    "the approval is cut short": (_set(approval=b"short"), SignatureError),
    "the order names another KEK after the approval": (_altered(kek_id="payments/0002"), SignatureError),
    "the order gives another reason after the approval": (_altered(reason="another"), SignatureError),
    "the order was due earlier after the approval": (_altered(not_before=NOW), SignatureError),
    "a key is left out": (_said(deks=["dek-00"]), RecordError),
    "a key is slipped in": (_said(deks=[f"dek-{n:02}" for n in range(6)]), RecordError),
    "a key is named twice": (_said(deks=["dek-00", "dek-00", "dek-01", "dek-02", "dek-03"]), RecordError),
    "a key is said to be another chain's": (_said(chain=COPY), RecordError),
    "the entries are of another order": (_other_order, RecordError),
    "the entry names another KEK": (_said(kek_id="payments/0002"), RecordError),
    "it was destroyed before it was due": (_said(destroyed_at=NOW + 5), RecordError),
    "it was destroyed after the entry that says so": (_said(destroyed_at=2 * NOW), RecordError),
    "an entry is missing": (lambda case: case.details.pop(), RecordError),
    "there is no entry": (lambda case: case.details.clear(), RecordError),
    "the entries are signed by another node": (_set(by=signer(NODE, 8)), SignatureError),
    "the entries are of another cluster": (_set(cluster="other"), RecordError),
    "the entries are of another kind": (_set(event_type=OPERATOR_ACTION), DecodeError),
    "an entry names no keys": (_said(deks=[]), DecodeError),
    "an entry's keys are no names": (_said(deks=[1]), DecodeError),
}


@pytest.mark.parametrize(("forge", "error"), FORGERIES.values(), ids=FORGERIES.keys())
def test_a_proof_that_was_tampered_with_is_refused(
    forge: Callable[[Case], object], error: type[Exception]
) -> None:
    case = Case()
    forge(case)
    with pytest.raises(error):
        case.verify()


def test_clocks_of_two_machines_that_differ_a_little_do_not_spoil_a_proof() -> None:
    case = Case()
    case.at = time.time_ns() // 1000 + 60_000_000  # the database's clock is a minute ahead of the producer's
    case.details = case.make_details()
    assert case.verify().destroyed_at == case.at
    case.at += 600_000_000
    case.details = case.make_details()
    with pytest.raises(RecordError, match="do not follow each other"):
        case.verify()


def test_an_order_that_covers_nothing_is_no_proof_that_anything_was_destroyed() -> None:
    case = Case([])  # two people wanted it; whether it was done, or cancelled, nobody signed
    with pytest.raises(RecordError, match="no entry says"):
        case.verify()


def test_keys_in_a_proof_are_not_believed_the_verifier_has_their_own() -> None:
    proof = Case().proof()
    with pytest.raises(SignatureError, match="of operator alice is not enrolled"):
        verify_proof(proof, [pin(BOB)], [pin(ORIGIN)])
    with pytest.raises(SignatureError, match="is not enrolled"):
        verify_proof(proof, [pin(ALICE)], [pin(ORIGIN)])
    with pytest.raises(SignatureError, match="of node node-a is not among those given"):
        verify_proof(proof, PEOPLE, [pin(MALLORY)])


def test_every_cut_and_every_third_flipped_bit_of_a_proof_is_refused_with_our_own_error() -> None:
    proof = Case([(CHAIN, "dek-1")]).proof()
    for end in range(0, len(proof) - 2, 37):
        with pytest.raises((DecodeError, VerificationError)):
            verify_proof(proof[:end], PEOPLE, [pin(ORIGIN)])
    for bit in range(0, len(proof) * 8 - 8, 97):
        altered = bytearray(proof)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises((DecodeError, VerificationError)):
            verify_proof(bytes(altered), PEOPLE, [pin(ORIGIN)])


@given(st.binary(max_size=200))
def test_garbage_is_no_order_and_no_proof(data: bytes) -> None:
    with pytest.raises(DecodeError):
        ShredOrder.decode(data)
    with pytest.raises(DecodeError):
        verify_proof(data, PEOPLE, [pin(ORIGIN)])


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"covers": []},
        {"covers": {"x": {"deks": 1}}},
        {"covers": {"x": {"deks": -1, "tuples": 0, "unapplied_batches": 0}}},
        {"covers": {"x": {"deks": True, "tuples": 0, "unapplied_batches": 0}}},
        {"requested_at": "now"},
        {"reason": None},
        {"more": 1},
    ],
    ids=str,
)
def test_an_order_with_fields_of_another_kind_is_refused(change: dict[str, Any]) -> None:
    said = json.loads(an_order().encode()) | change
    with pytest.raises(DecodeError):
        ShredOrder.decode(canonical_json(said).encode())


def test_an_order_with_half_a_character_is_refused_with_our_own_error() -> None:
    half = an_order(reason="xx").encode().replace(b'"xx"', b'"\\ud800"')
    assert half != an_order(reason="xx").encode()
    with pytest.raises(DecodeError, match="canonical"):
        ShredOrder.decode(half)
    with pytest.raises(DecodeError, match="canonical"):
        open_order(sign_document(ALICE, ORDER_TYPE, half), PEOPLE)


def test_an_order_comes_back_from_its_bytes_and_only_from_those() -> None:
    order = an_order()
    assert ShredOrder.decode(order.encode()) == order
    with pytest.raises(DecodeError, match="canonical"):
        ShredOrder.decode(order.encode() + b" ")


def test_a_document_of_another_kind_is_no_order_whoever_signed_it() -> None:
    other = sign_document(ALICE, KEY_ANNOUNCEMENT, an_order().encode())
    with pytest.raises(DecodeError, match="expected"):
        open_order(other, PEOPLE)


def test_an_order_in_another_operators_name_is_refused() -> None:
    with pytest.raises(SignatureError):
        open_order(sign_order(BOB, an_order()), PEOPLE)


def test_the_approver_is_named_by_the_key_that_signed() -> None:
    document = sign_order(ALICE, an_order())
    assert verify_approval(document, BOB.fingerprint, BOB.sign(to_approve(document)), PEOPLE) == "bob"


def test_what_covers_is_hashed_does_not_depend_on_the_order_of_the_keys() -> None:
    assert keys_hash(DEKS) == keys_hash(reversed(DEKS)) != keys_hash(DEKS[1:])


def test_an_entry_that_is_no_destruction_says_nothing_of_keys() -> None:
    case = Case([(CHAIN, "dek-1")])
    payload = json.loads(case.proof())["entries"][0]
    assert document_hash(base64.b64decode(payload))  # the entry itself is whole
    case.event_type = OPERATOR_ACTION
    from vsql_shared.audit.dsse import SignedDocument

    entry = AuditEntry.decode(SignedDocument.decode(case.entries()[0]).payload)
    with pytest.raises(DecodeError, match="destroys no key"):
        destroyed(entry)
