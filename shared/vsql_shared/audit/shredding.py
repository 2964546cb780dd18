"""Shredding as documents: the order to destroy a KEK version, its approval, and what a chain says of it.

Not here: the KMS, the database and Kafka. Pure: bytes and values. Rules:

* An order is signed by one enrolled operator and approved by another one, with another key. The approval is a
  detached Ed25519 signature over the SHA-256 of the whole signed order, so it holds for that order only.
* An order says what it covers: which KEK version, how many data keys of which chains, and the SHA-256 of
  their names. What it does not name it does not destroy.
* A chain's `key_destroyed` entries name each data key; together they are exactly those the order covers.
* A reader takes "shredded" from such an entry and from nothing else: a key service that refuses says nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vsql_shared.audit.dsse import SignedDocument, document_hash, pae, sign_document
from vsql_shared.audit.entries import KEY_DESTROYED, SHREDDED, AuditEntry, canonical_json
from vsql_shared.crypto.signing import PinnedKey, Signer, TrustStore
from vsql_shared.errors import DecodeError, SignatureError

FORMAT = 1
ORDER_TYPE = "application/vnd.vsql-sync.shred-order.v1+json"
APPROVAL_TYPE = "application/vnd.vsql-sync.shred-approval.v1"
KEYS_PER_ENTRY = 1_000
"""Names of data keys in one entry: well below what `detail` may hold."""
_MAX_ORDER = 256 << 10
_KNOWN = "`syncctl key enroll` makes a key known; `key verify-proof` takes it by --operator NAME=FILE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Covered:
    """What an order takes away from one chain."""

    deks: int
    tuples: int
    unapplied_batches: int
    """Batches that some target had not acknowledged when the order was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShredOrder:
    """Destroy one version of a KEK. Times are µs since 1970."""

    cluster: str
    node: str
    kms_provider: str
    kek_id: str
    operator: str
    reason: str
    requested_at: int
    not_before: int
    deks_sha256: str
    covers: Mapping[str, Covered]
    """By chain."""

    def encode(self) -> bytes:
        """Canonical JSON: what is signed."""
        said = {name: getattr(self, name) for name in _FIELDS} | {
            "format": FORMAT,
            "covers": {chain: asdict(one) for chain, one in self.covers.items()},
        }
        return canonical_json(said).encode()

    @classmethod
    def decode(cls, payload: bytes) -> ShredOrder:
        """Parse a payload. Raises DecodeError: garbage, another format, not canonical."""
        raw = _object(payload, "shred order")
        if raw.pop("format", None) != FORMAT:
            raise DecodeError(f"this is no shred order of format {FORMAT}", hint="upgrade this node")
        covers = raw.pop("covers", None)
        if raw.keys() != set(_FIELDS) or not isinstance(covers, dict):
            raise DecodeError("a shred order lacks fields, or has others")
        for name, value in raw.items():
            if type(value) is not (int if name in _TIMES else str):
                raise DecodeError(f"field {name} of a shred order is of another type")
        try:
            found = cls(**raw, covers={chain: Covered(**one) for chain, one in covers.items()})
        except TypeError:
            raise DecodeError("a shred order does not say what it covers") from None
        counts = [count for one in found.covers.values() for count in asdict(one).values()]
        try:
            again = found.encode()
        except UnicodeEncodeError:  # half a character, which JSON can name and UTF-8 cannot
            again = b""
        if any(type(count) is not int or count < 0 for count in counts) or again != payload:
            raise DecodeError("a shred order is not in its canonical encoding")
        return found


_TIMES = ("requested_at", "not_before")
_FIELDS = (
    "cluster", "node", "kms_provider", "kek_id", "operator", "reason", "deks_sha256", *_TIMES,
)  # fmt: skip


def _object(payload: bytes, what: str) -> dict[str, Any]:
    if len(payload) > _MAX_ORDER:
        raise DecodeError(f"a {what} of {len(payload)} bytes, at most {_MAX_ORDER} are read")
    try:
        raw: Any = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"not a {what}: {type(error).__name__}") from error
    if not isinstance(raw, dict):
        raise DecodeError(f"not a {what}")
    return raw


def keys_hash(deks: Iterable[tuple[str, str]]) -> str:
    """SHA-256 over the (chain, dek_id) pairs in order, a line each: what an order covers, hex."""
    lines = sorted(f"{chain} {dek_id}\n" for chain, dek_id in deks)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def sign_order(signer: Signer, order: ShredOrder) -> bytes:
    """The order, signed by who asks for it."""
    return sign_document(signer, ORDER_TYPE, order.encode())


def to_approve(document: bytes) -> bytes:
    """The bytes an approver signs with Ed25519: the order's hash, under a type of its own."""
    return pae(APPROVAL_TYPE, document_hash(document))


def open_order(document: bytes, operators: Iterable[PinnedKey]) -> ShredOrder:
    """The order in a signed document, once its signature holds. Raises DecodeError, SignatureError.

    `operators`: enrolled keys; their `node` is the operator's name.
    """
    signed = SignedDocument.decode(document)
    if signed.payload_type != ORDER_TYPE:
        raise DecodeError(f"document of type {signed.payload_type[:100]!r}, expected {ORDER_TYPE!r}")
    order = ShredOrder.decode(signed.payload)
    operators = list(operators)
    _require_key_of(order.operator, signed.signer, operators)
    TrustStore(operators).verify(
        order.operator, signed.signer, signed.signature, pae(ORDER_TYPE, signed.payload)
    )
    return order


def _require_key_of(operator: str, signer: str, operators: Sequence[PinnedKey]) -> None:
    """Say of people what the trust in nodes would say of nodes."""
    owners = [one.node for one in operators if one.fingerprint == signer]
    if operator not in owners:
        raise SignatureError(
            f"key {signer[:100]!r} is {owners[0]}'s, not {operator}'s"
            if owners
            else f"key {signer[:100]!r} of operator {operator} is not enrolled",
            hint=_KNOWN,
        )


def verify_approval(document: bytes, approver: str, approval: bytes, operators: Sequence[PinnedKey]) -> str:
    """Name of the operator who approved. Raises DecodeError, SignatureError.

    1. Who approves is enrolled (a key from nowhere).
    2. Who approves is not who asked, neither by key nor by name (one person with two keys).
    3. The signature is over this very order (an approval of another one).
    """
    order = open_order(document, operators)
    asked = SignedDocument.decode(document).signer
    pin = next((one for one in operators if one.fingerprint == approver), None)
    if pin is None:
        raise SignatureError(
            f"the approver's key {approver[:100]!r} is not enrolled",
            hint=_KNOWN,
        )
    if approver == asked or pin.node == order.operator:
        raise SignatureError(
            f"{pin.node} ordered this and cannot approve it",
            hint="another operator approves, with another key",
        )
    TrustStore([pin]).verify(pin.node, approver, approval, to_approve(document))
    return pin.node


def entry_details(
    order: ShredOrder, document: bytes, approver: str, chain: str, deks: Sequence[str], at: int
) -> Iterator[dict[str, Any]]:
    """What the `key_destroyed` entries say of one chain's keys, as many as it takes; `at`: when it happened.

    Those of a first copy that is over stand in the live chain: nobody writes the copy's any more.
    """
    names = sorted(deks)
    parts = [names[i : i + KEYS_PER_ENTRY] for i in range(0, len(names), KEYS_PER_ENTRY)]
    for number, part in enumerate(parts, start=1):
        yield {
            "kms_provider": order.kms_provider,
            "kek_id": order.kek_id,
            "chain": chain,
            "order": document_hash(document).hex(),
            "requested_by": SignedDocument.decode(document).signer,
            "approved_by": approver,
            "destroyed_at": at,
            "deks": part,
            "part": number,
            "parts": len(parts),
        }


@dataclass(frozen=True, slots=True)
class Destroyed:
    """What one `key_destroyed` entry says."""

    kek_id: str
    chain: str
    """Whose keys these are."""
    order: str
    """SHA-256 of the signed order, hex."""
    deks: tuple[str, ...]
    sequence: int
    destroyed_at: int

    def as_detail(self) -> dict[str, Any]:
        """What an acknowledgement says of changes that were passed over for it."""
        return {SHREDDED: {"kek_id": self.kek_id, "sequence": self.sequence, "order": self.order}}


def destroyed(entry: AuditEntry) -> Destroyed:
    """Read a verified entry. Raises DecodeError when it does not say which data keys were destroyed."""
    if entry.event_type != KEY_DESTROYED:
        raise DecodeError(f"an entry of type {entry.event_type} destroys no key")
    said = _object(entry.detail.encode(), "destroy entry")
    kek_id, chain, order = (said.get(name) for name in ("kek_id", "chain", "order"))
    deks, at = said.get("deks"), said.get("destroyed_at")
    if (
        not all(isinstance(text, str) for text in (kek_id, chain, order))
        or not isinstance(at, int)
        or not isinstance(deks, list)
        or not deks
        or not all(isinstance(one, str) for one in deks)
    ):
        raise DecodeError(f"entry {entry.sequence} does not say which data keys were destroyed")
    return Destroyed(str(kek_id), str(chain), str(order), tuple(deks), entry.sequence, at)
