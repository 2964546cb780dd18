"""Checkpoints (c2sp.org/tlog-checkpoint): a chain's tree head as text that any party can sign.

Not here: signatures (notes.py), proofs (proofs.py), and where trees are stored. Pure. Rules:

* The text is three lines: origin, size, root. Extension lines are refused: nobody audits them.
* The origin names cluster and chain, so a checkpoint of one chain never passes for another's.
* The writer of the chain signs (`SIGNATURE`), everybody else cosigns (`COSIGNATURE`).
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

from vsql_shared.audit.chain import writer_of
from vsql_shared.audit.entries import CHECKPOINT_COSIGNED
from vsql_shared.audit.merkle import EMPTY_ROOT, HASH_SIZE
from vsql_shared.audit.notes import (
    COSIGNATURE,
    SIGNATURE,
    NoteKey,
    SignedNote,
    Verified,
    cosign_note,
    sign_note,
    unbase64,
    verify_note,
)
from vsql_shared.audit.tree import MAX_SIZE
from vsql_shared.errors import ChainError, DecodeError, RecordError, SignatureError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vsql_shared.audit.entries import AuditEntry
    from vsql_shared.crypto.signing import Signer

PREFIX = "vsql-sync"
_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}")


class Log(NamedTuple):
    """A chain as a log: its cluster and its name."""

    cluster: str
    chain: str

    @property
    def origin(self) -> str:
        """First line of its checkpoints, and the name under which its writer signs them."""
        return f"{PREFIX}/{self.cluster}/{self.chain}"

    @property
    def writer(self) -> str:
        """The node whose key signs. Raises ChainError for what is no chain."""
        return writer_of(self.chain)

    def key(self, public_key: bytes) -> NoteKey:
        """The writer's key, as it signs checkpoints of this chain."""
        return NoteKey(self.origin, SIGNATURE, public_key)


def cosigner_key(cluster: str, node: str, public_key: bytes) -> NoteKey:
    """A node's key, as it cosigns checkpoints of other nodes' chains."""
    return NoteKey(f"{PREFIX}/{cluster}/{node}", COSIGNATURE, public_key)


def number(text: str, where: str) -> int:
    """A decimal number in its only form. Raises DecodeError."""
    if _NUMBER.fullmatch(text) is None or int(text) > MAX_SIZE:
        raise DecodeError(f"{where}: {text[:40]!r} is no number of entries")
    return int(text)


def unhash(text: str, where: str) -> bytes:
    """A hash in base64, in its only form. Raises DecodeError."""
    raw = unbase64(text, where)
    if len(raw) != HASH_SIZE:
        raise DecodeError(f"{where}: {len(raw)} bytes, expected a hash of {HASH_SIZE}")
    return raw


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A chain's tree head: so many entries, this root."""

    log: Log
    size: int
    root: bytes

    @property
    def text(self) -> str:
        """What is signed."""
        return f"{self.log.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The tree head in a note's text. Raises DecodeError: not ours, extension lines, no chain's name."""
        lines = text.split("\n")
        if len(lines) != 4 or lines[3]:
            raise DecodeError(f"checkpoint of {len(lines) - 1} lines, expected origin, size and root")
        prefix, _, rest = lines[0].partition("/")
        cluster, _, chain = rest.partition("/")
        if prefix != PREFIX or not cluster or "/" in chain:
            raise DecodeError(f"checkpoint of {lines[0][:200]!r}, which is no chain of vsql-sync")
        try:
            writer_of(chain)
        except ChainError as error:
            raise DecodeError(f"checkpoint: {error.message}") from error
        made = cls(
            Log(cluster, chain), number(lines[1], "checkpoint, size"), unhash(lines[2], "checkpoint, root")
        )
        if made.size == 0 and made.root != EMPTY_ROOT:
            raise DecodeError("checkpoint of an empty chain with a root that is not the empty tree's")
        return made

    def sign(self, signer: Signer, at: int) -> SignedNote:
        """A note with this node's signature, or cosignature where the chain is another node's.

        `at`: seconds since 1970, of a cosignature.
        """
        return self.signed_by(signer, at, SignedNote(self.text, ()))

    def signed_by(self, signer: Signer, at: int, note: SignedNote) -> SignedNote:
        """`note`, whose text this must be, with this node's signature added."""
        if note.text != self.text:
            raise RecordError(f"a checkpoint of {self.log.chain} is to be signed under another text")
        if signer.node == self.log.writer:
            return note.add(sign_note(signer, self.log.origin, self.text))
        name = cosigner_key(self.log.cluster, signer.node, signer.public_key).name
        return note.add(cosign_note(signer, name, self.text, at))


class Opened(NamedTuple):
    """A checkpoint whose signatures verified."""

    checkpoint: Checkpoint
    note: SignedNote
    signatures: list[Verified]

    def require_writer(self) -> None:
        """Raise SignatureError unless the chain's own writer has signed."""
        if not any(one.key.kind == SIGNATURE for one in self.signatures):
            raise SignatureError(
                f"the checkpoint is not signed by node {self.checkpoint.log.writer}, whose chain it is",
                hint="`syncctl audit checkpoint --add FILE` on that node adds its signature",
            )


def open_checkpoint(encoded: str, keys: Iterable[tuple[str, bytes]]) -> Opened:
    """Parse and verify a checkpoint; `keys` are (node, public key) of those who are believed.

    A writer's key counts as the log's, another node's as a cosigner's. Raises DecodeError, SignatureError.
    """
    note = SignedNote.decode(encoded)
    checkpoint = Checkpoint.parse(note.text)
    log = checkpoint.log
    known = [
        log.key(public) if node == log.writer else cosigner_key(log.cluster, node, public)
        for node, public in keys
    ]
    return Opened(checkpoint, note, verify_note(note, known))


def cosigned_in(entry: AuditEntry) -> Checkpoint | None:
    """The head a `checkpoint_cosigned` entry is about; None in another entry, and where none can be read."""
    if entry.event_type != CHECKPOINT_COSIGNED:
        return None
    try:
        return Checkpoint.parse(SignedNote.decode(str(json.loads(entry.detail).get("note"))).text)
    except DecodeError:
        return None


def split_view(checkpoint: Checkpoint, otherwise: str) -> ChainError:
    """What is said of a chain that shows two histories."""
    return ChainError(
        f"split view: chain {checkpoint.log.chain} shows two histories: "
        f"the checkpoint of {checkpoint.size} entries has root {checkpoint.root.hex()}, {otherwise}",
        record=f"{checkpoint.log.chain}/{checkpoint.size}",
        hint=f"keep both documents: what node {checkpoint.log.writer} signed, and what contradicts it",
    )
