"""Signed notes, checkpoints and proofs as files: published vectors, round trips, every forgery refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.audit_history import CHAIN, CLUSTER, A, B, History, entry, ordinary, signer, trust
from vsql_shared.audit import tree
from vsql_shared.audit.checkpoint import Checkpoint, Log, cosigned_in, cosigner_key, open_checkpoint
from vsql_shared.audit.dsse import sign_document
from vsql_shared.audit.entries import canonical_json
from vsql_shared.audit.merkle import EMPTY_ROOT
from vsql_shared.audit.notes import COSIGNATURE, SIGNATURE, NoteKey, SignedNote, parse_vkey, verify_note
from vsql_shared.audit.proofs import ConsistencyProof, InclusionProof, require_prefix
from vsql_shared.crypto.signing import Signer
from vsql_shared.errors import ChainError, DecodeError, RecordError, SignatureError, VsqlSyncError

VECTOR: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "rfc9162_trees.json").read_text()
)["note"]
KEYS = [("node-a", A.public_key), ("node-b", B.public_key)]
LOG = Log(CLUSTER, CHAIN)
AT = 1_760_000_000
HISTORY = ordinary()
HASHES = [made.entry_hash for made in HISTORY.entries]
C = signer("node-c")


def head(size: int, hashes: list[bytes] = HASHES) -> Checkpoint:
    return Checkpoint(LOG, size, tree.root_of(tree.tree_of(hashes[:size])[0]))


def signed(size: int, *signers: Signer) -> str:
    checkpoint = head(size)
    note = SignedNote(checkpoint.text, ())
    for one in signers or (A,):
        note = checkpoint.signed_by(one, AT, note)
    return note.encode()


def proof_of(sequence: int, size: int, checkpoint: str | None = None) -> InclusionProof:
    hashes = tree.range_roots(HASHES, tree.inclusion_ranges(sequence - 1, size))
    document = HISTORY.documents[sequence - 1]
    return InclusionProof(document, sequence - 1, tuple(hashes), checkpoint or signed(size))


def test_the_published_note_verifies_and_is_written_back_byte_by_byte() -> None:
    key = parse_vkey(VECTOR["vkey"])
    assert key.vkey == VECTOR["vkey"]
    encoded = f"{VECTOR['text']}\n{VECTOR['signature']}"
    note = SignedNote.decode(encoded)
    assert note.encode() == encoded
    assert verify_note(note, [key]) == [(key, None)]
    with pytest.raises(SignatureError, match="does not verify"):
        verify_note(SignedNote(note.text.replace("is", "was"), note.signatures), [key])


def test_a_checkpoint_says_origin_size_and_root_and_is_signed_by_writer_and_peer() -> None:
    encoded = signed(5, A, B)
    lines = encoded.split("\n")
    assert lines[:2] == ["vsql-sync/shop/orders.node-a", "5"]
    assert base64.b64decode(lines[2]) == head(5).root
    opened = open_checkpoint(encoded, KEYS)
    opened.require_writer()
    assert opened.checkpoint == head(5)
    assert [(one.key.name, one.key.kind, one.at) for one in opened.signatures] == [
        ("vsql-sync/shop/orders.node-a", SIGNATURE, None),
        ("vsql-sync/shop/node-b", COSIGNATURE, AT),
    ]


def test_a_cosignature_covers_its_time_and_is_no_log_signature() -> None:
    note = SignedNote.decode(signed(5, B))
    with pytest.raises(SignatureError, match="node-a"):
        open_checkpoint(note.encode(), KEYS).require_writer()
    one = note.signatures[0]
    later = one._replace(blob=(AT + 1).to_bytes(8, "big") + one.blob[8:])
    with pytest.raises(SignatureError, match="does not verify"):
        open_checkpoint(SignedNote(note.text, (later,)).encode(), KEYS)
    stripped = one._replace(key_id=LOG.key(B.public_key).key_id, name=LOG.origin, blob=one.blob[8:])
    with pytest.raises(SignatureError):
        verify_note(SignedNote(note.text, (stripped,)), [LOG.key(B.public_key)])


def test_signing_again_takes_the_place_of_the_same_keys_signature() -> None:
    checkpoint = head(5)
    note = checkpoint.sign(A, AT)
    assert checkpoint.signed_by(A, AT + 9, note) == note
    twice = checkpoint.signed_by(B, AT + 9, checkpoint.signed_by(B, AT, note))
    assert [one.at for one in open_checkpoint(twice.encode(), KEYS).signatures] == [None, AT + 9]
    with pytest.raises(RecordError):
        checkpoint.signed_by(A, AT, SignedNote(head(4).text, ()))


def test_unknown_signatures_are_passed_over_and_altered_ones_of_known_keys_refuse_the_note() -> None:
    encoded = signed(5, A, C)
    assert len(open_checkpoint(encoded, KEYS).signatures) == 1
    with pytest.raises(SignatureError, match="no signature by a known key"):
        open_checkpoint(encoded, [("node-a", B.public_key)])
    note = SignedNote.decode(signed(5, A, B))
    for at in (0, 1):
        lines = list(note.signatures)
        lines[at] = lines[at]._replace(blob=lines[at].blob[:-1] + bytes([lines[at].blob[-1] ^ 1]))
        with pytest.raises(SignatureError, match="does not verify"):
            open_checkpoint(SignedNote(note.text, tuple(lines)).encode(), KEYS)


GOOD = signed(5)
MALFORMED: dict[str, str] = {
    "empty": "",
    "no signature": head(5).text,
    "no empty line": GOOD.replace("\n\n", "\n"),
    "no last newline": GOOD[:-1],
    "carriage return": GOOD.replace("\n", "\r\n"),
    "extension line": GOOD.replace("\n\n", "\nmore\n\n"),
    "leading zero": GOOD.replace("\n5\n", "\n05\n"),
    "negative": GOOD.replace("\n5\n", "\n-5\n"),
    "too many entries": GOOD.replace("\n5\n", "\n9223372036854775808\n"),
    "other digits": GOOD.replace("\n5\n", "\n٥\n"),
    "short root": GOOD.replace(base64.b64encode(head(5).root).decode(), "AAAA"),
    "root that is no base64": GOOD.replace(base64.b64encode(head(5).root).decode(), "!" * 44),
    "no prefix": GOOD.replace("vsql-sync/shop", "shop"),
    "no chain": GOOD.replace("orders.node-a", "orders"),
    "slash in the chain": GOOD.replace("orders.node-a", "orders/x.node-a"),
    "no dash": GOOD.replace("— ", "- "),
    "no name": GOOD.replace("— vsql-sync/shop/orders.node-a", "— "),
    "plus in a name": GOOD.replace("— vsql-sync/shop", "— vsql+sync/shop"),
    "short signature": GOOD[: GOOD.rindex(" ") + 1] + "AAAA\n",
    "signature that is no base64": GOOD[: GOOD.rindex(" ") + 1] + "A?\n",
    "many signatures": GOOD + GOOD[GOOD.index("— ") :] * 100,
    "empty chain with a root": GOOD.replace("\n5\n", "\n0\n"),
    "huge": "x" * (65 << 10),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_checkpoint_is_refused(case: str) -> None:
    with pytest.raises(DecodeError):
        open_checkpoint(MALFORMED[case], KEYS)


@given(st.text(max_size=200))
def test_garbage_is_refused_by_a_typed_error(text: str) -> None:
    for read in (
        SignedNote.decode,
        Checkpoint.parse,
        InclusionProof.decode,
        ConsistencyProof.decode,
        parse_vkey,
    ):
        with pytest.raises(DecodeError):
            read(text)


@given(at=st.integers(0, len(GOOD) - 1), to=st.characters(codec="utf-8"))
def test_no_changed_character_passes(at: int, to: str) -> None:
    changed = GOOD[:at] + to + GOOD[at + 1 :]
    if changed != GOOD:
        with pytest.raises(VsqlSyncError):
            open_checkpoint(changed, KEYS)


def test_an_empty_chain_has_the_empty_trees_root() -> None:
    encoded = signed(0)
    assert open_checkpoint(encoded, KEYS).checkpoint.root == EMPTY_ROOT
    require_prefix(head(0), head(5), ())
    with pytest.raises(RecordError):
        require_prefix(head(0), head(5), (bytes(32),))


def test_a_vkey_of_another_kind_or_with_another_id_is_refused() -> None:
    key = cosigner_key(CLUSTER, "node-b", B.public_key)
    assert parse_vkey(key.vkey) == key
    name, key_id, material = key.vkey.split("+", 2)
    for bad in (f"{name}+00000000+{material}", f"{name}+{key_id}+AAAA", f"{name}+{key_id}", "", "+++"):
        with pytest.raises(DecodeError):
            parse_vkey(bad)


@pytest.mark.parametrize("size", range(1, len(HASHES) + 1))
def test_every_entry_is_proven_to_a_stranger_with_the_public_key_alone(size: int) -> None:
    for sequence in range(1, size + 1):
        read = InclusionProof.decode(proof_of(sequence, size).encode())
        stored, opened = read.verify(trust(A), KEYS[:1])
        assert (stored.entry.sequence, opened.checkpoint.size) == (sequence, size)


def other_history() -> History:
    other = History()
    other.open()
    for rows in range(3, 12):
        other.batch(rows)
    return other


def forged() -> dict[str, Callable[[], InclusionProof]]:
    good = proof_of(3, 9)
    other = other_history()
    elsewhere = History(chain="bills.node-a")
    elsewhere.open()
    hashes = [*HASHES[:2], elsewhere.entries[0].entry_hash, *HASHES[3:9]]
    lying = head(9, hashes).sign(A, AT).encode()
    swapped = tuple(tree.range_roots(hashes, tree.inclusion_ranges(2, 9)))
    by_b = sign_document(
        B, "application/vnd.vsql-sync.audit-entry.v1+avro", HISTORY.entries[2].entry.encode()
    )
    return {
        "another place": lambda: InclusionProof(good.document, 3, good.hashes, good.checkpoint),
        "beyond the end": lambda: InclusionProof(good.document, 9, good.hashes, good.checkpoint),
        "another entry": lambda: InclusionProof(HISTORY.documents[3], 2, good.hashes, good.checkpoint),
        "an entry of another history": lambda: InclusionProof(
            other.documents[2], 2, good.hashes, good.checkpoint
        ),
        "the same entry signed by another": lambda: InclusionProof(by_b, 2, good.hashes, good.checkpoint),
        "a hash less": lambda: InclusionProof(good.document, 2, good.hashes[:-1], good.checkpoint),
        "a hash more": lambda: InclusionProof(good.document, 2, (*good.hashes, bytes(32)), good.checkpoint),
        "hashes in another order": lambda: InclusionProof(
            good.document, 2, good.hashes[::-1], good.checkpoint
        ),
        "a checkpoint of another size": lambda: proof_of(3, 9, signed(8)),
        "a checkpoint only a peer has signed": lambda: proof_of(3, 9, signed(9, B)),
        "a checkpoint of a stranger": lambda: proof_of(
            3, 9, head(9).sign(signer("node-a", "x"), AT).encode()
        ),
        "a leaf that is an entry of another chain": lambda: InclusionProof(
            elsewhere.documents[0], 2, swapped, lying
        ),
    }


@pytest.mark.parametrize("case", forged())
def test_a_forged_inclusion_proof_is_refused(case: str) -> None:
    proof = InclusionProof.decode(forged()[case]().encode())
    with pytest.raises((RecordError, SignatureError)):
        proof.verify(trust(A, B), KEYS)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("tlog-proof@v1", "tlog-proof@v2"),
        lambda text: text.replace("\nextra ", "\nmore "),
        lambda text: text.replace("\nindex ", "\nplace "),
        lambda text: text.replace("\nindex 2", "\nindex 02"),
        lambda text: text.replace("\nextra ", "\nextra ?"),
        lambda text: text.replace("\nextra ", "\nextra AA"),
        lambda text: text.split("\n\n")[0],
        lambda text: text.replace("\nindex 2\n", "\nindex 2\n" + ("A" * 43 + "=\n") * 64),
        lambda text: text.replace("\nindex 2\n", "\nindex 2\nAAAA\n"),
        lambda text: text + "x" * (2 << 20),
    ],
)
def test_a_malformed_inclusion_proof_is_refused(change: Callable[[str], str]) -> None:
    with pytest.raises(VsqlSyncError):
        InclusionProof.decode(change(proof_of(3, 9).encode())).verify(trust(A), KEYS)


def consistency(old: int, size: int) -> ConsistencyProof:
    hashes = tree.range_roots(HASHES, tree.consistency_ranges(old, size))
    return ConsistencyProof(old, tuple(hashes), signed(size))


@pytest.mark.parametrize("size", range(1, len(HASHES) + 1))
def test_every_earlier_checkpoint_is_a_prefix_and_one_of_another_history_is_not(size: int) -> None:
    other = [made.entry_hash for made in other_history().entries]
    for old in range(1, size + 1):
        read = ConsistencyProof.decode(consistency(old, size).encode())
        assert read.verify(head(old), KEYS).checkpoint == head(size)
        if old > 1:
            with pytest.raises((ChainError, RecordError), match=r"histories|lead"):
                read.verify(head(old, other), KEYS)


def test_two_roots_of_one_size_are_a_split_view() -> None:
    other = [made.entry_hash for made in other_history().entries]
    with pytest.raises(ChainError, match=r"split view: chain orders\.node-a shows two histories") as found:
        ConsistencyProof.decode(consistency(5, 5).encode()).verify(head(5, other), KEYS)
    assert found.value.record == "orders.node-a/5"
    assert head(5).root.hex() in found.value.message
    assert head(5, other).root.hex() in found.value.message


def test_a_consistency_proof_of_other_heads_or_bytes_is_refused() -> None:
    proof = consistency(3, 9)
    with pytest.raises(RecordError, match="from 3 entries"):
        proof.verify(head(4), KEYS)
    with pytest.raises(RecordError, match="of vsql-sync"):
        proof.verify(Checkpoint(Log(CLUSTER, "bills.node-a"), 3, head(3).root), KEYS)
    with pytest.raises(SignatureError):
        proof.verify(head(3), KEYS[1:])
    for bad in ("old x\n\n" + signed(9), "old 3\nAAAA\n\n" + signed(9), "older 3\n\n", "old 3\n"):
        with pytest.raises(DecodeError):
            ConsistencyProof.decode(bad)


def test_an_entry_names_the_head_it_cosigns_or_none() -> None:
    note = head(5).sign(B, AT).encode()
    for detail, expected in (
        ({"note": note}, head(5)),
        ({"note": "?"}, None),
        ({}, None),
        ({"note": 5}, None),
    ):
        made = entry(event_type="checkpoint_cosigned", detail=canonical_json(detail))
        assert cosigned_in(made) == expected
    assert cosigned_in(entry(detail=canonical_json({"note": note}))) is None


def test_one_key_under_two_names_or_kinds_has_two_ids() -> None:
    ids = {
        LOG.key(A.public_key).key_id,
        Log(CLUSTER, "bills.node-a").key(A.public_key).key_id,
        cosigner_key(CLUSTER, "node-a", A.public_key).key_id,
        NoteKey(LOG.origin, COSIGNATURE, A.public_key).key_id,
    }
    assert len(ids) == 4
