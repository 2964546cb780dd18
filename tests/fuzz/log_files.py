"""Parsers of checkpoints and proofs, and files to begin from; a part of the table in parsers.py."""

from __future__ import annotations

from tests.audit_history import A, B, ordinary, trust
from vsql_shared.audit import tree
from vsql_shared.audit.checkpoint import Checkpoint, Log, open_checkpoint
from vsql_shared.audit.notes import SignedNote
from vsql_shared.audit.proofs import INCLUSION_MARK, ConsistencyProof, InclusionProof
from vsql_shared.errors import DecodeError

KEYS = [("node-a", A.public_key), ("node-b", B.public_key)]


def _head(size: int) -> tuple[Checkpoint, str]:
    history = ordinary()
    made, _ = tree.tree_of(one.entry_hash for one in history.entries[:size])
    head = Checkpoint(Log(history.cluster, history.chain), size, tree.root_of(made))
    return head, head.signed_by(B, 9, head.sign(A, 9)).encode()


def checkpoints() -> list[bytes]:
    """Of two sizes."""
    return [_head(size)[1].encode() for size in (1, 9)]


def checkpoint(data: bytes) -> None:
    """A note, then a verified checkpoint; what verifies is what was signed."""
    text = data.decode("utf-8", "replace")
    note = SignedNote.decode(text)
    assert note.encode() == text
    assert Checkpoint.parse(note.text).text == note.text
    opened = open_checkpoint(text, KEYS)
    assert opened.checkpoint in [_head(size)[0] for size in (1, 9)]


def proofs() -> list[bytes]:
    """One of each kind."""
    history = ordinary()
    hashes = [one.entry_hash for one in history.entries]
    path = tree.range_roots(hashes, tree.inclusion_ranges(4, 9))
    prefix = tree.range_roots(hashes, tree.consistency_ranges(5, 9))
    note = _head(9)[1]
    return [
        InclusionProof(history.documents[4], 4, tuple(path), note).encode().encode(),
        ConsistencyProof(5, tuple(prefix), note).encode().encode(),
    ]


def proof(data: bytes) -> None:
    """Either kind; one that verifies is about the history it was made of."""
    text = data.decode("utf-8", "replace")
    if text.startswith(INCLUSION_MARK):
        inclusion = InclusionProof.decode(text)
        assert inclusion.encode() == text
        stored, _ = inclusion.verify(trust(A), KEYS)
        assert stored.encoded == ordinary().documents[inclusion.index]
        return
    consistency = ConsistencyProof.decode(text)
    assert consistency.encode() == text
    if consistency.old_size not in (1, 5, 9):
        raise DecodeError("a size no seed has")
    consistency.verify(_head(consistency.old_size)[0], KEYS)
