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
    """A chain's tree, its size, and its last document, not verified yet."""

    tree: Tree
    size: int
    last: bytes


def follow(documents: Iterable[bytes], log: Log) -> Linked:
    """Walk a chain from its first document, each linked to the one before. Raises ChainError."""
    tree: Tree = ()
    size, previous, last = 0, ZERO_HASH, b""
    for last in documents:  # the last one is what is verified
        entry = _entry(last, f"{log.chain}/{size + 1}")
        found = (entry["cluster"], entry["chain"], entry["sequence"])
        if found != (log.cluster, log.chain, size + 1):
            raise _broken(log, size + 1, f"there stands entry {found[2]} of chain {found[1]} of {found[0]}")
        if entry["prev_event_hash"] != previous:
            raise _broken(log, size + 1, "it does not follow the entry before it: one of both was altered")
        previous = document_hash(last)
        tree, size = grow(tree, size, previous), size + 1
    return Linked(tree, size, last)


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


def _broken(log: Log, sequence: int, what: str) -> ChainError:
    return ChainError(
        f"chain {log.chain} does not verify: {what}",
        record=f"{log.chain}/{sequence}",
        hint="`syncctl audit verify` says more",
    )
