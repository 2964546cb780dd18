"""The proof that a KEK version was destroyed: one file, verified with public keys alone.

Not here: making the documents in it (shredding.py) and reading the database (the command). Pure. What the
proof shows: who ordered it and why, who approved, when the node says it happened, and exactly which data keys
it took. What it does not show: that no copy of the KEK exists; that is the key service's word.

Verifying, with keys the verifier has from elsewhere, never from the file:

1. The order is signed by an operator's key (an order nobody gave).
2. The approval is another operator's, over this very order (one person alone).
3. Each entry is the node's, in its cluster, and names this order (entries of another order).
4. All entries together name exactly the data keys the order covers (a key left out, or slipped in).
5. Nothing happened before its time (an order carried out before it was due, an entry before the act).
   Order and act have the database's time, entries their producer's: these may differ by some minutes.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vsql_shared.audit.dsse import AUDIT_ENTRY, SignedDocument, document_hash, open_document
from vsql_shared.audit.entries import AuditEntry, canonical_json
from vsql_shared.audit.shredding import (
    Destroyed,
    ShredOrder,
    destroyed,
    keys_hash,
    open_order,
    verify_approval,
)
from vsql_shared.crypto.signing import PinnedKey, TrustStore
from vsql_shared.errors import DecodeError, RecordError, SignatureError

TYPE = "vsql-sync/shred-proof/v1"
MAX_SIZE = 256 << 20
_CLOCKS = 300_000_000
"""µs by which two machines' clocks may differ."""


@dataclass(frozen=True, slots=True)
class Proven:
    """What a proof shows."""

    order: ShredOrder
    approver: str
    destroyed_at: int
    deks: tuple[tuple[str, str], ...]
    """(chain, dek_id)"""
    entries: tuple[tuple[str, int], ...]
    """(chain, sequence) of the entries that say so."""


def write_proof(document: bytes, approver: str, approval: bytes, entries: Sequence[bytes]) -> bytes:
    """The file."""
    said = {
        "type": TYPE,
        "order": _text(document),
        "approver": approver,
        "approval": _text(approval),
        "entries": [_text(entry) for entry in entries],
    }
    return canonical_json(said).encode() + b"\n"


def verify_proof(proof: bytes, operators: Sequence[PinnedKey], node_keys: Sequence[PinnedKey]) -> Proven:
    """What the proof shows. Raises DecodeError, SignatureError, RecordError.

    `operators` and `node_keys` are the verifier's own; `node` of each is the operator's, the node's name.
    """
    said = _parse(proof)
    document, approval = _bytes(said["order"]), _bytes(said["approval"])
    order = open_order(document, operators)
    approver = verify_approval(document, said["approver"], approval, operators)
    found = [_entry(order, document, _bytes(text), node_keys) for text in said["entries"]]
    deks = tuple(sorted((one.chain, dek_id) for _, one in found for dek_id in one.deks))
    if keys_hash(deks) != order.deks_sha256 or len(set(deks)) != len(deks):
        raise RecordError(
            f"the entries name {len(deks)} data keys, and these are not exactly those the order covers"
        )
    counts = {chain: sum(of == chain for of, _ in deks) for chain, _ in deks}
    if counts != {chain: one.deks for chain, one in order.covers.items() if one.deks}:
        raise RecordError("the order's own count of data keys is not that of its chains")
    if not found:
        raise RecordError("no entry says that it was destroyed: the order covers no data key")
    at = max(one.destroyed_at for _, one in found)
    places = tuple((entry.chain, entry.sequence) for entry, _ in found)
    return Proven(order, approver, at, deks, places)


def _entry(
    order: ShredOrder, document: bytes, encoded: bytes, node_keys: Sequence[PinnedKey]
) -> tuple[AuditEntry, Destroyed]:
    """Steps 3 and 5 for one entry."""
    signer = SignedDocument.decode(encoded).signer
    if (order.node, signer) not in ((pin.node, pin.fingerprint) for pin in node_keys):
        raise SignatureError(
            f"an entry's key {signer[:100]!r} of node {order.node} is not among those given",
            hint="give the node's public key, former ones too, by --node NAME=FILE",
        )
    entry = AuditEntry.decode(open_document(TrustStore(node_keys), order.node, encoded, AUDIT_ENTRY))
    where = f"{entry.chain} sequence {entry.sequence}"
    if (entry.cluster, entry.signer_node_id) != (order.cluster, order.node):
        raise RecordError(f"an entry is of node {entry.signer_node_id} in {entry.cluster}", record=where)
    said = destroyed(entry)
    if said.order != document_hash(document).hex() or said.kek_id != order.kek_id:
        raise RecordError("an entry says that another order was carried out", record=where)
    at = said.destroyed_at
    if not order.requested_at <= order.not_before <= at <= entry.event_timestamp + _CLOCKS:
        raise RecordError("the times of order, destruction and entry do not follow each other", record=where)
    return entry, said


def _parse(proof: bytes) -> dict[str, Any]:
    if len(proof) > MAX_SIZE:
        raise DecodeError(f"a proof of {len(proof)} bytes, at most {MAX_SIZE} are read")
    try:
        raw: Any = json.loads(proof)
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"not a proof: {type(error).__name__}") from error
    texts = ("order", "approver", "approval")
    if not isinstance(raw, dict) or raw.get("type") != TYPE or raw.keys() != {"type", "entries", *texts}:
        raise DecodeError(f"not a proof of type {TYPE}")
    if not all(isinstance(raw[name], str) for name in texts) or not isinstance(raw["entries"], list):
        raise DecodeError("a field of the proof is of another type")
    return raw


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: object) -> bytes:
    try:
        return base64.b64decode(text if isinstance(text, str) else "!", validate=True)
    except (binascii.Error, ValueError):
        raise DecodeError("a field of the proof is not base64") from None
