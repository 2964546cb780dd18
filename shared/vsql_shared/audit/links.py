"""A whole chain held by one signature: the last entry's, and the hashes by which it holds all before it.

Not here: the rules of epochs and batches (chain.py), columns and heads (verify.py). Pure. Rules:

* Each document's hash is what the next one names, so who signed the last one signed all of them: one
  signature is verified, however many entries there are. Twenty times as fast as verifying each.
* Documents are taken apart by their schema only: what is not canonical has another hash than was signed.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import fastavro

from vsql_shared.audit.dsse import (
    AUDIT_ENTRY,
    MAX_DOCUMENT_SIZE,
    SignedDocument,
    document_hash,
    verify_document,
)
from vsql_shared.audit.entries import ZERO_HASH, signed_place
from vsql_shared.audit.tree import Tree, grow
from vsql_shared.errors import ChainError
from vsql_shared.wire.pack import schema

if TYPE_CHECKING:
    from vsql_shared.audit.checkpoint import Log
    from vsql_shared.crypto.signing import TrustStore


class Linked(NamedTuple):
    """A chain up to some document: its tree, its size, and that document, not verified yet, with its hash."""

    tree: Tree = ()
    size: int = 0
    last: bytes = b""
    last_hash: bytes = ZERO_HASH


def follow(documents: Iterable[bytes], log: Log, start: Linked | None = None) -> Linked:
    """Walk a chain from its first document, or behind `start`, each linked to the one before.

    Raises ChainError.
    """
    linked = start or Linked()
    for document in documents:
        linked = link(linked, document, log)
    return linked


def link(linked: Linked, document: bytes, log: Log) -> Linked:
    """The chain with its next document. Raises ChainError where that is not the next one."""
    size = linked.size + 1
    entry = _entry(document, f"{log.chain}/{size}")
    found = (entry["cluster"], entry["chain"], entry["sequence"])
    if found != (log.cluster, log.chain, size):
        raise broken(log.chain, size, f"there stands entry {found[2]} of chain {found[1]} of {found[0]}")
    if entry["prev_event_hash"] != linked.last_hash:
        raise broken(log.chain, size, "it does not follow the entry before it: one of both was altered")
    last_hash = document_hash(document)
    return Linked(grow(linked.tree, linked.size, last_hash), size, document, last_hash)


def require_signed(linked: Linked, log: Log, trust: TrustStore) -> None:
    """Raise SignatureError or DecodeError unless the chain's writer has signed the last document."""
    document = SignedDocument.decode(linked.last)
    verify_document(trust, log.writer, document, AUDIT_ENTRY, signed_place)


def _entry(document: bytes, where: str) -> dict[str, Any]:
    try:
        if len(document) > MAX_DOCUMENT_SIZE:
            raise ValueError(len(document))  # noqa: TRY301  # as every other garbage
        outer: Any = fastavro.schemaless_reader(io.BytesIO(document), schema("signed_document"), None)
        inner: Any = fastavro.schemaless_reader(io.BytesIO(outer["payload"]), schema("audit_entry"), None)
    except Exception as error:  # fastavro raises many types on garbage; all mean the same here
        raise ChainError(f"no entry of a chain: {type(error).__name__}", record=where) from error
    return dict(inner)


def broken(chain: str, sequence: int, what: str) -> ChainError:
    """What is said of a chain whose entries are not one after the other."""
    return ChainError(
        f"chain {chain} does not verify: {what}",
        record=f"{chain}/{sequence}",
        hint="`syncctl audit verify` says more",
    )
