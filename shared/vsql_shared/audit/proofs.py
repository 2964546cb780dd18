"""Proofs as files: that an entry is in a chain, and that a chain's earlier head is a prefix of a later one.

Not here: making them from a table (heads.py) and the tree's arithmetic (tree.py, merkle.py). Pure. Rules:

* An inclusion proof is c2sp.org/tlog-proof@v1; its extra data is the entry's signed document, because the
  leaf is made of its hash. Nothing in the file is believed before it leads to the checkpoint's root.
* A consistency proof is the body of c2sp.org/tlog-witness' add-checkpoint: any witness takes it as it is.
* A proof verifies with public keys alone, off-line. Verification raises.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from vsql_shared.audit.checkpoint import Checkpoint, Opened, number, open_checkpoint, split_view, unhash
from vsql_shared.audit.dsse import AUDIT_ENTRY, document_hash, pae
from vsql_shared.audit.merkle import leaf_hash, verify_consistency, verify_inclusion
from vsql_shared.audit.notes import MAX_NOTE_SIZE, unbase64
from vsql_shared.audit.rows import StoredDocument, parse
from vsql_shared.errors import DecodeError, RecordError

if TYPE_CHECKING:
    from vsql_shared.crypto.signing import TrustStore

INCLUSION_MARK = "c2sp.org/tlog-proof@v1"
CONSISTENCY_MARK = "old "
MAX_PROOF_HASHES = 63
"""Of a tree of 2^63 leaves; C2SP's limit too."""
MAX_PROOF_SIZE = (4 << 20) // 3 + MAX_NOTE_SIZE + 64 * 64
"""Characters: the largest document in base64, a checkpoint and the hashes."""


def _hash_lines(hashes: Iterable[bytes]) -> str:
    return "".join(f"{base64.b64encode(one).decode()}\n" for one in hashes)


def _split(encoded: str, kind: str) -> tuple[list[str], str]:
    """The lines before the first empty one, and the checkpoint behind it."""
    if len(encoded) > MAX_PROOF_SIZE:
        raise DecodeError(f"{kind} longer than {MAX_PROOF_SIZE} characters")
    head, mark, checkpoint = encoded.partition("\n\n")
    if not mark:
        raise DecodeError(f"{kind} without a checkpoint behind it")
    return head.split("\n"), checkpoint


def _hashes(lines: list[str], kind: str) -> tuple[bytes, ...]:
    if len(lines) > MAX_PROOF_HASHES:
        raise DecodeError(f"{kind} of {len(lines)} hashes, at most {MAX_PROOF_HASHES} are read")
    return tuple(unhash(line, kind) for line in lines)


@dataclass(frozen=True, slots=True)
class InclusionProof:
    """That a document is entry `index` + 1 of the chain a checkpoint is of."""

    document: bytes
    index: int
    hashes: tuple[bytes, ...]
    checkpoint: str

    def encode(self) -> str:
        """The file's text."""
        extra = base64.b64encode(self.document).decode()
        head = f"{INCLUSION_MARK}\nextra {extra}\nindex {self.index}\n"
        return f"{head}{_hash_lines(self.hashes)}\n{self.checkpoint}"

    @classmethod
    def decode(cls, encoded: str) -> Self:
        """Parse without verifying. Raises DecodeError."""
        lines, checkpoint = _split(encoded, "inclusion proof")
        if len(lines) < 3 or lines[0] != INCLUSION_MARK or not lines[1].startswith("extra "):
            raise DecodeError(f"not an inclusion proof: expected {INCLUSION_MARK!r} and an extra line")
        if not lines[2].startswith("index "):
            raise DecodeError("inclusion proof: no index line")
        document = unbase64(lines[1].removeprefix("extra "), "inclusion proof, extra line")
        index = number(lines[2].removeprefix("index "), "inclusion proof, index")
        return cls(document, index, _hashes(lines[3:], "inclusion proof"), checkpoint)

    def verify(self, trust: TrustStore, keys: Iterable[tuple[str, bytes]]) -> tuple[StoredDocument, Opened]:
        """Give the entry once it is proven. Raises DecodeError, SignatureError, RecordError.

        1. The checkpoint is signed by the chain's writer (a tree of somebody's making).
        2. The document's hash is leaf `index` of that tree (another entry, another place).
        3. The document is signed by that writer, for that chain and place (a leaf that is no entry).
        """
        opened = open_checkpoint(self.checkpoint, keys)
        opened.require_writer()
        head = opened.checkpoint
        leaf = leaf_hash(document_hash(self.document))
        verify_inclusion(self.index, head.size, leaf, self.hashes, head.root)
        stored = parse(self.document)
        entry, document = stored.entry, stored.document
        if document.payload_type != AUDIT_ENTRY:
            raise DecodeError(f"the document is of type {document.payload_type[:100]!r}, no audit entry")
        trust.verify(head.log.writer, document.signer, document.signature, pae(AUDIT_ENTRY, document.payload))
        place = (entry.cluster, entry.chain, entry.sequence, entry.signer_node_id)
        expected = (head.log.cluster, head.log.chain, self.index + 1, head.log.writer)
        if place != expected:
            raise RecordError(
                f"the document says it is {_place(*place)}, the proof is of {_place(*expected)}"
            )
        return stored, opened


def _place(cluster: str, chain: str, sequence: int, node: str) -> str:
    return f"entry {sequence} of chain {chain} of cluster {cluster} by node {node}"


@dataclass(frozen=True, slots=True)
class ConsistencyProof:
    """That the tree of `old_size` entries is a prefix of the one a checkpoint is of."""

    old_size: int
    hashes: tuple[bytes, ...]
    checkpoint: str

    def encode(self) -> str:
        """The file's text."""
        return f"{CONSISTENCY_MARK}{self.old_size}\n{_hash_lines(self.hashes)}\n{self.checkpoint}"

    @classmethod
    def decode(cls, encoded: str) -> Self:
        """Parse without verifying. Raises DecodeError."""
        lines, checkpoint = _split(encoded, "consistency proof")
        if not lines[0].startswith(CONSISTENCY_MARK):
            raise DecodeError("not a consistency proof: expected an `old` line")
        old = number(lines[0].removeprefix(CONSISTENCY_MARK), "consistency proof, old size")
        return cls(old, _hashes(lines[1:], "consistency proof"), checkpoint)

    def verify(self, old: Checkpoint, keys: Iterable[tuple[str, bytes]]) -> Opened:
        """Give the later checkpoint once `old` is proven to be its prefix.

        Raises DecodeError, SignatureError, RecordError and ChainError.
        """
        opened = open_checkpoint(self.checkpoint, keys)
        head = opened.checkpoint
        if old.log != head.log or old.size != self.old_size:
            raise RecordError(
                f"the proof is from {self.old_size} entries of {head.log.origin}, "
                f"the earlier checkpoint is of {old.size} of {old.log.origin}",
                hint="give the checkpoint the proof was made from",
            )
        require_prefix(old, head, self.hashes)
        return opened


def require_prefix(old: Checkpoint, head: Checkpoint, hashes: tuple[bytes, ...]) -> None:
    """Raise unless the hashes prove `old` to be a prefix of `head`.

    ChainError ("split view") where both have one size and two roots: that proves itself. RecordError where
    the proof is none: it may have been altered.
    """
    if old.size == head.size and old.root != head.root:
        raise split_view(head, f"another one has root {old.root.hex()}")
    if old.size == 0:  # every tree begins with the empty one
        if hashes:
            raise RecordError("consistency proof from the empty tree: it has hashes")
        return
    try:
        verify_consistency(old.size, head.size, old.root, head.root, hashes)
    except RecordError as error:
        error.hint = (
            "have the proof made again from the chain itself; where none can be given, "
            "the two checkpoints are of two histories (split view)"
        )
        raise
