"""Where a pruned chain begins: the head behind its last entry that is gone, with a cosigned checkpoint of it.

Not here: pruning, and the tables bases lie in (bases.py). Pure. Rules:

* A base is believed only with its checkpoint: signed by the chain's writer, cosigned by another node, of the
  head's size, with the root of the head's tree.
* The chain says itself where it was pruned: `trail_pruned`, whose detail is the base. So the rest of the
  head (epoch, incarnation, hash, batch) is signed, too, and readers of the topic find it there.
* It names every table a batch below it had rows of: who joins must have a copy of each.
* It counts and hashes the entries below it that stay in the database (acts, skips, destroyed keys): none of
  them can be taken away.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from vsql_shared.audit.chain import ChainHead
from vsql_shared.audit.checkpoint import Checkpoint, Log, Opened, open_checkpoint
from vsql_shared.audit.entries import (
    BATCH_APPLIED,
    CHECKPOINT_COSIGNED,
    EPOCH_OPENED,
    REPLICATION_BATCH,
    TRAIL_PRUNED,
    AuditEntry,
    canonical_json,
)
from vsql_shared.audit.merkle import HASH_SIZE
from vsql_shared.audit.notes import COSIGNATURE, MAX_NOTE_SIZE, SignedNote
from vsql_shared.audit.tree import MAX_SIZE, is_known, root_of
from vsql_shared.errors import ChainError, DecodeError, SignatureError

FORMAT = 1
GONE = frozenset({REPLICATION_BATCH, BATCH_APPLIED, EPOCH_OPENED, CHECKPOINT_COSIGNED})
"""Entries that are not kept in the database below a base; as prune_audit has it (SQL 018)."""
_UUID_SIZE = 16
_MAX_TIMELINE = (1 << 31) - 1
_MAX_SYSTEM = 64
_NUMBERS = ("epoch", "sequence", "batch", "lsn_end", "unfinished_from", "event_timestamp", "timeline")
_MAX_NAME = 1024
_TEXTS = ("incarnation", "entry_hash", "system_identifier")


def head_value(head: ChainHead) -> dict[str, Any]:
    """A head as JSON has it: bytes in hex."""
    numbers: dict[str, Any] = {name: getattr(head, name) for name in _NUMBERS}
    return numbers | {
        "incarnation": head.incarnation.hex(),
        "entry_hash": head.entry_hash.hex(),
        "system_identifier": head.system_identifier,
        "tree": [one.hex() for one in head.tree],
    }


def parse_head(value: object) -> ChainHead:
    """The head in a JSON value. Raises DecodeError."""
    if not isinstance(value, Mapping) or value.keys() != {*_NUMBERS, *_TEXTS, "tree"}:
        raise DecodeError("no head of a chain: it has other members")
    for name in _NUMBERS:
        # bool is an int to Python, and none to us.
        if type(value[name]) is not int or not 0 <= value[name] <= MAX_SIZE * 2 + 1:
            raise DecodeError(f"head of a chain: {name} is no number")
    if value["timeline"] > _MAX_TIMELINE or not 0 < value["sequence"] <= MAX_SIZE:
        raise DecodeError("head of a chain: timeline or sequence out of range")
    system, tree = value["system_identifier"], value["tree"]
    if not isinstance(system, str) or len(system) > _MAX_SYSTEM or not isinstance(tree, list):
        raise DecodeError("head of a chain: system_identifier or tree is of another type")
    return ChainHead(
        **{name: value[name] for name in _NUMBERS},
        incarnation=_unhex(value["incarnation"], _UUID_SIZE),
        entry_hash=_unhex(value["entry_hash"], HASH_SIZE),
        system_identifier=system,
        tree=tuple(_unhex(one, HASH_SIZE) for one in tree),
    )


def _unhex(text: object, size: int) -> bytes:
    if not isinstance(text, str) or len(text) != 2 * size or text.strip("0123456789abcdef"):
        raise DecodeError(f"head of a chain: expected {size} bytes in hex")
    return bytes.fromhex(text)


def _tables(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise DecodeError("base of a chain: its tables are no names")
    try:
        wrong = [one for one in value if not 0 < len(one.encode()) <= _MAX_NAME or "\0" in one]
    except UnicodeEncodeError as error:  # JSON has halves of surrogate pairs
        raise DecodeError("base of a chain: a table's name holds what is no character") from error
    if wrong or value != sorted(set(value)):
        raise DecodeError("base of a chain: its tables are not names in their one order")
    return tuple(value)


@dataclass(frozen=True, slots=True)
class Kept:
    """Entries that are kept below a base: how many, and a chain of their hashes in order."""

    count: int = 0
    digest: bytes = bytes(HASH_SIZE)

    def take(self, entry_hash: bytes) -> Kept:
        """With the next entry."""
        return Kept(self.count + 1, hashlib.sha256(self.digest + entry_hash).digest())


NOTHING_KEPT = Kept()
"""Below a base: no entry is kept."""


def _kept(value: object) -> Kept:
    if not isinstance(value, Mapping) or value.keys() != {"count", "digest"}:
        raise DecodeError("base of a chain: kept has other members")
    if type(value["count"]) is not int or not 0 <= value["count"] <= MAX_SIZE:
        raise DecodeError("base of a chain: the number of kept entries is none")
    return Kept(value["count"], _unhex(value["digest"], HASH_SIZE))


@dataclass(frozen=True, slots=True)
class Base:
    """A head, its checkpoint with signature and cosignatures, and the tables of the batches below."""

    head: ChainHead
    note: str
    tables: tuple[str, ...] = ()
    """`schema.table` as entries name them, sorted."""
    kept: Kept = NOTHING_KEPT

    def detail(self) -> dict[str, Any]:
        """What the entry `trail_pruned` says."""
        return {
            "format": FORMAT,
            "head": head_value(self.head),
            "checkpoint": self.note,
            "tables": list(self.tables),
            "kept": {"count": self.kept.count, "digest": self.kept.digest.hex()},
        }

    def encode(self) -> str:
        """As it is stored."""
        return canonical_json(self.detail())

    @classmethod
    def decode(cls, text: str) -> Self:
        """Parse without verifying. One content has one encoding. Raises DecodeError."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DecodeError("no base of a chain: not JSON") from error
        if not isinstance(value, dict) or value.keys() != {"format", "head", "checkpoint", "tables", "kept"}:
            raise DecodeError("no base of a chain: it has other members")
        if type(value["format"]) is not int or value["format"] != FORMAT:
            raise DecodeError(f"base of a chain: format {str(value['format'])[:20]}, expected {FORMAT}")
        note = value["checkpoint"]
        if not isinstance(note, str) or len(note) > MAX_NOTE_SIZE:
            raise DecodeError("no base of a chain: its checkpoint is no text")
        made = cls(parse_head(value["head"]), note, _tables(value["tables"]), _kept(value["kept"]))
        if made.encode() != text:
            raise DecodeError("base of a chain: not in its one encoding")
        return made

    def verify(self, log: Log, keys: Iterable[tuple[str, bytes]], *, cosigned: bool = True) -> Opened:
        """Raise unless the checkpoint holds the head. `keys`: (node, public key) of those who are believed.

        1. Signed by the chain's writer (a tree of somebody's making). SignatureError.
        2. Cosigned by another node, unless `cosigned` is false: a reader may know the writer only.
        3. Of this chain, this size, this tree (another head beside a genuine checkpoint). ChainError.
        """
        opened = open_checkpoint(self.note, keys)
        opened.require_writer()
        if cosigned and not any(one.key.kind == COSIGNATURE for one in opened.signatures):
            raise SignatureError(f"the checkpoint below which {log.chain} is pruned is not cosigned")
        self.require_tree(log)
        return opened

    def require_tree(self, log: Log) -> None:
        """Step 3 alone, for whoever has the base from a signed entry. Raises ChainError, DecodeError."""
        if not is_known(self.head.tree, self.head.sequence):
            raise ChainError(f"chain {log.chain}: the tree of its base is not one of {self.head.sequence}")
        mine = Checkpoint(log, self.head.sequence, root_of(self.head.tree))
        said = Checkpoint.parse(SignedNote.decode(self.note).text)
        if said != mine:
            raise ChainError(
                f"chain {log.chain}: the checkpoint of its base is of {said.size} entries with"
                f" root {said.root.hex()}, the base has {mine.size} with {mine.root.hex()}"
            )


def base_in(entry: AuditEntry) -> Base | None:
    """The base an entry says; None where it is about something else. Raises DecodeError."""
    return Base.decode(entry.detail) if entry.event_type == TRAIL_PRUNED else None
