"""Signed documents and audit entries: one encoding, typed errors on anything else, committed vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from tests.audit_history import CHAIN, CLUSTER, A, B, History, entry, manifest_fields, ordinary, signer, trust
from vsql_shared.audit.dsse import (
    AUDIT_ENTRY,
    KEY_ANNOUNCEMENT,
    MAX_DOCUMENT_SIZE,
    SignedDocument,
    document_hash,
    open_document,
    pae,
    sign_document,
)
from vsql_shared.audit.entries import (
    BATCH_APPLIED,
    MAX_DETAIL_SIZE,
    AuditEntry,
    canonical_json,
    peek_chain,
)
from vsql_shared.audit.export_format import readable
from vsql_shared.audit.merkle import batch_root
from vsql_shared.changes import PartitionRoot
from vsql_shared.crypto.signing import Signer, TrustStore
from vsql_shared.errors import DecodeError, ProtocolError, SignatureError

VECTORS = Path(__file__).parent.parent / "vectors" / "audit_v1.json"
DOCUMENT = ordinary().documents[1]
PAYLOAD = SignedDocument.decode(DOCUMENT).payload


def test_pae_is_that_of_the_dsse_specification() -> None:
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )
    assert pae("ä", b"") == b"DSSEv1 2 \xc3\xa4 0 "


def vectors() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(VECTORS.read_text())["entries"]
    return found


@pytest.mark.parametrize("vector", vectors(), ids=lambda vector: str(vector["name"]))
def test_committed_vector_is_made_again_byte_by_byte(vector: dict[str, Any]) -> None:
    encoded = bytes.fromhex(vector["document"])
    document = SignedDocument.decode(encoded)
    made = AuditEntry.decode(document.payload)
    assert readable(made) == vector["entry"]
    assert made.encode().hex() == vector["payload"]
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(vector["private_key"]))
    assert sign_document(Signer(key, "node-a"), AUDIT_ENTRY, made.encode()) == encoded
    assert document_hash(encoded).hex() == vector["hash"]
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(vector["public_key"]))
    public.verify(bytes.fromhex(vector["signature"]), pae(AUDIT_ENTRY, document.payload))


def test_signed_document_opens_to_its_payload() -> None:
    encoded = sign_document(A, AUDIT_ENTRY, b"payload")
    assert open_document(trust(), "node-a", encoded, AUDIT_ENTRY) == b"payload"


def test_signature_of_another_kind_of_document_is_refused() -> None:
    encoded = sign_document(A, KEY_ANNOUNCEMENT, PAYLOAD)
    with pytest.raises(DecodeError, match="of type"):
        open_document(trust(), "node-a", encoded, AUDIT_ENTRY)
    document = SignedDocument.decode(encoded)
    renamed = SignedDocument(AUDIT_ENTRY, document.payload, document.signer, document.signature).encode()
    with pytest.raises(SignatureError):
        open_document(trust(), "node-a", renamed, AUDIT_ENTRY)


@pytest.mark.parametrize("who", [B, signer("node-a", "thief")], ids=["peer", "thief"])
def test_document_signed_by_somebody_else_is_refused(who: Signer) -> None:
    with pytest.raises(SignatureError):
        open_document(trust(), "node-a", sign_document(who, AUDIT_ENTRY, PAYLOAD), AUDIT_ENTRY)


def test_document_of_a_revoked_key_is_refused() -> None:
    with pytest.raises(SignatureError, match="revoked"):
        open_document(trust(A, revoked=[A]), "node-a", DOCUMENT, AUDIT_ENTRY)


def test_unsigned_document_passes_only_where_allowed() -> None:
    unsigned = sign_document(None, AUDIT_ENTRY, b"payload")
    assert open_document(TrustStore([], allow_unsigned=True), "node-a", unsigned, AUDIT_ENTRY) == b"payload"
    for store in (TrustStore([]), trust(A)):
        with pytest.raises(SignatureError):
            open_document(store, "node-a", unsigned, AUDIT_ENTRY)


def test_oversized_document_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(DecodeError, match="at most"):
        SignedDocument.decode(bytes(MAX_DOCUMENT_SIZE + 1))
    with pytest.raises(DecodeError, match="at most 10"):
        SignedDocument.decode(DOCUMENT, limit=10)


def padded(varint_at: int, data: bytes) -> bytes:
    """The same number in one byte more."""
    return data[:varint_at] + bytes([data[varint_at] | 0x80, 0]) + data[varint_at + 1 :]


GARBAGE = {
    "nothing": b"",
    "one byte": b"\x02",
    "garbage": b"\xff" * 40,
    "truncated": DOCUMENT[:-1],
    "trailing byte": DOCUMENT + b"\0",
    "another format": b"\x04" + DOCUMENT[1:],
    "padded number": padded(0, DOCUMENT),
    "negative length": b"\x02\x01" + DOCUMENT[2:],
    "huge length": b"\x02\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01" + DOCUMENT[2:],
    "not UTF-8": b"\x02\x02\xff\0\0\0",
}


@pytest.mark.parametrize("case", GARBAGE)
def test_what_is_no_document_gives_a_decode_error(case: str) -> None:
    with pytest.raises(DecodeError):
        SignedDocument.decode(GARBAGE[case])


PAYLOAD_GARBAGE = {
    "nothing": b"",
    "truncated": PAYLOAD[:-1],
    "trailing byte": PAYLOAD + b"\0",
    "another format": b"\x04" + PAYLOAD[1:],
    "padded number": padded(0, PAYLOAD),
    "another document": DOCUMENT,
}


@pytest.mark.parametrize("case", PAYLOAD_GARBAGE)
def test_what_is_no_entry_gives_a_decode_error(case: str) -> None:
    with pytest.raises(DecodeError):
        AuditEntry.decode(PAYLOAD_GARBAGE[case])


@given(data=st.binary(max_size=300))
def test_random_bytes_give_nothing_but_decode_errors(data: bytes) -> None:
    for decode in (SignedDocument.decode, AuditEntry.decode, peek_chain):
        try:
            decode(data)
        except DecodeError:
            continue
        assert decode is peek_chain  # a prefix of fields is short enough to be hit by chance


@given(at=st.integers(0, len(PAYLOAD) - 1), bit=st.integers(0, 7))
def test_flipped_bit_gives_a_decode_error_or_an_entry_of_exactly_these_bytes(at: int, bit: int) -> None:
    changed = PAYLOAD[:at] + bytes([PAYLOAD[at] ^ 1 << bit]) + PAYLOAD[at + 1 :]
    try:
        decoded = AuditEntry.decode(changed)
    except DecodeError:
        return
    assert decoded.encode() == changed
    assert decoded != AuditEntry.decode(PAYLOAD)


@given(at=st.integers(0, len(DOCUMENT) - 1), bit=st.integers(0, 7))
def test_flipped_bit_of_a_document_never_opens(at: int, bit: int) -> None:
    changed = DOCUMENT[:at] + bytes([DOCUMENT[at] ^ 1 << bit]) + DOCUMENT[at + 1 :]
    with pytest.raises((DecodeError, SignatureError)):
        open_document(trust(), "node-a", changed, AUDIT_ENTRY)


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)


@given(
    cluster=texts,
    detail=st.dictionaries(texts, st.integers() | texts | st.none() | st.booleans(), max_size=4),
    sequence=st.integers(1, 2**63 - 1),
    tables=st.sets(texts, max_size=4),
    verdicts=st.dictionaries(texts, st.integers(0, 1000), max_size=4),
)
def test_every_valid_entry_comes_back_as_it_was(
    cluster: str, detail: dict[str, object], sequence: int, tables: set[str], verdicts: dict[str, int]
) -> None:
    made = entry(
        cluster=cluster,
        detail=canonical_json(detail),
        sequence=sequence,
        tables_affected=tuple(sorted(tables)),
        verdicts=tuple(sorted(verdicts.items())),
        event_type=BATCH_APPLIED,
        batch=1,
        ref_epoch=1,
        ref_sequence=1,
        row_count=sum(verdicts.values()),
    )
    assert AuditEntry.decode(made.encode()) == made
    assert peek_chain(made.encode()) == (cluster, CHAIN)


def part(**other: object) -> PartitionRoot:
    """A valid partition of a manifest, but for `other`."""
    fields: dict[str, Any] = {
        "topic": "t",
        "partition": 0,
        "first_offset": 0,
        "last_offset": 9,
        "packs": 2,
        "records": 3,
        "sub_root": bytes(32),
    }
    return PartitionRoot(**{**fields, **other})


def manifest(**other: object) -> dict[str, object]:
    return {**manifest_fields(1), **other}


ACK = {"event_type": BATCH_APPLIED, "batch": 1, "ref_epoch": 1, "ref_sequence": 2, "row_count": 2}
# (field the message must name, what is wrong)
WRONG: list[tuple[str, dict[str, object]]] = [
    ("cluster", {"cluster": ""}),
    ("chain", {"chain": "a\0b"}),
    ("detail", {"detail": '{"a":"\0"}'}),
    ("event_type", {"event_type": "x" * 65}),
    ("row_count", {"row_count": -1}),
    ("batch_lsn_end", {"batch_lsn_end": 2**63}),
    ("epoch", {"epoch": 0}),
    ("sequence", {"sequence": 0}),
    ("event_timestamp", {"event_timestamp": 10**18}),
    ("event_timestamp", {"event_timestamp": -1}),
    ("timeline", {"timeline": 2**31}),
    ("batch_lsn_end", {"batch_lsn_start": 9, "batch_lsn_end": 8}),
    ("incarnation", {"incarnation": bytes(15)}),
    ("event_id", {"event_id": b""}),
    ("merkle_root", {"merkle_root": bytes(31)}),
    ("prev_event_hash", {"prev_event_hash": bytes(33)}),
    ("tables_affected", {"tables_affected": ("b", "a")}),
    ("tables_affected", {"tables_affected": ("a", "a")}),
    ("tables_affected", {"tables_affected": ("",)}),
    ("pci_columns", {"contains_pci": True, "pci_columns": ("a\0",)}),
    ("contains_pci", {"pci_columns": ("public.t.c",)}),
    ("verdicts", {"verdicts": (("b", 1), ("a", 1))}),
    ("verdicts", {"verdicts": (("", 1),)}),
    ("verdicts", {"verdicts": (("applied", -1),)}),
    ("detail", {"detail": ""}),
    ("detail", {"detail": "[]"}),
    ("detail", {"detail": '{"a": 1}'}),
    ("detail", {"detail": '{"b":1,"a":1}'}),
    ("detail", {"detail": '{"a":NaN}'}),
    ("detail", {"detail": "[" * 60_000}),
    ("detail", {"detail": canonical_json({"a": "x" * MAX_DETAIL_SIZE})}),
    ("merkle_root", {"merkle_root": bytes(32)}),
    ("merkle_root", {"row_count": 1}),
    ("batch", manifest(batch=0)),
    ("batch", manifest(partitions=())),
    ("record_count", manifest(record_count=4)),
    ("row_count", manifest(row_count=4)),
    ("merkle_root", manifest(merkle_root=bytes(32))),
    ("partitions", manifest(partitions=(part(topic="b"), part(topic="a")))),
    ("partitions", manifest(partitions=(part(), part()))),
    ("partitions", manifest(partitions=(part(topic=""),))),
    ("partitions", manifest(partitions=(part(partition=-1),))),
    ("partitions", manifest(partitions=(part(first_offset=10),))),
    ("partitions", manifest(partitions=(part(packs=0),))),
    ("partitions", manifest(partitions=(part(packs=4),))),
    ("partitions", manifest(partitions=(part(packs=2, first_offset=9),))),
    ("partitions", manifest(partitions=(part(sub_root=bytes(31)),))),
    ("ref_sequence", {**ACK, "ref_sequence": 0, "verdicts": (("applied", 2),)}),
    ("verdicts", {**ACK, "verdicts": (("applied", 1),)}),
    ("verdicts", {**ACK, "verdicts": ()}),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_entry_that_breaks_a_rule_is_neither_made_nor_read(case: int) -> None:
    field, wrong = WRONG[case]
    with pytest.raises(ProtocolError, match=f"field {field}"):
        entry(**wrong).encode()


def test_entry_of_wrong_types_gives_a_protocol_error() -> None:
    with pytest.raises(ProtocolError, match="cannot be encoded"):
        entry(dek_id="\ud800").encode()


def test_signed_entry_that_breaks_a_rule_is_refused_when_read() -> None:
    root = batch_root([bytes(32)])
    good = entry(**manifest(partitions=(part(),), record_count=3, merkle_root=root)).encode()
    with pytest.raises(DecodeError, match="merkle_root"):
        AuditEntry.decode(good.replace(root, bytes(32)))


def test_time_and_id_are_made_when_not_given() -> None:
    history = History()
    made = history.writer.open_epoch(lsn=1, system_identifier="1", timeline=1)
    assert made.entry.cluster == CLUSTER
    assert made.entry.event_timestamp > 1_700_000_000_000_000
    assert len(made.entry.event_id) == 16
