"""The end of a node's signing key as an entry of its chains: `signing_key_ended`, signed by the next key.

Not here: ending a key (pg/signers.py), remembering what was read (pg/key_ends.py). Pure. Rules
(docs/design/0025):

* Only a key that lives where the entry is read says anything of another one, and never of itself: a thief's
  entry, or one about a key nobody knows, changes nothing.
* It names the last entry of each chain, by number and hash, that the ended key counts for. What is behind it
  does not count, whenever it was signed and wherever it lies; what is before it only if it leads to it.
* Of two that differ the one that trusts less counts.
* A retired key has said itself which key follows (`handover`). That pins nothing; a wrong one is an error.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

from vsql_shared.audit.chain_names import writer_of
from vsql_shared.audit.dsse import AUDIT_ENTRY, SignedDocument, document_hash, pae, sign_document
from vsql_shared.audit.entries import SIGNING_KEY_ENDED, ZERO_HASH, AuditEntry, canonical_json, peek_chain
from vsql_shared.crypto.signing import End, PinnedKey, Signer, TrustStore, Way
from vsql_shared.errors import ChainError, DecodeError, SignatureError

HANDOVER = "application/vnd.vsql-sync.key-handover.v1+json"
RETIRED, REVOKED = "retired", "revoked"
CHAINS_PER_ENTRY = 150
"""A name of a chain has up to 200 bytes, its end 90 more; an entry's detail at most 64 KiB."""
_MARK = SIGNING_KEY_ENDED.encode()


class KeyEnd(NamedTuple):
    """How a key ended, and where; `handover` is the retired key's own word, a signed document."""

    key: str
    act: str
    ends: Mapping[str, End]
    handover: bytes = b""

    def as_details(self) -> Iterator[dict[str, Any]]:
        """Details of the entries that say it."""
        rest = iter(sorted(self.ends.items()))
        while page := list(islice(rest, CHAINS_PER_ENTRY)):
            said: dict[str, Any] = {
                "act": self.act,
                "ends": {chain: [end.sequence, end.entry_hash.hex()] for chain, end in page},
                "key": self.key,
            }
            if self.handover:
                said["handover"] = base64.b64encode(self.handover).decode()
            yield said


def end_in(entry: AuditEntry) -> KeyEnd | None:
    """What a verified entry says of a key; None where it is of another kind. Raises DecodeError."""
    if entry.event_type != SIGNING_KEY_ENDED:
        return None
    try:
        said = json.loads(entry.detail)
        ends = {
            str(chain): End(_number(sequence), bytes.fromhex(digest))
            for chain, (sequence, digest) in said["ends"].items()
        }
        found = KeyEnd(
            said["key"], said["act"], ends, base64.b64decode(said.get("handover", ""), validate=True)
        )
        others = [chain for chain in ends if writer_of(chain) != entry.signer_node_id]
    except (KeyError, TypeError, ValueError, AttributeError, ChainError) as error:
        raise DecodeError(f"entry {entry.sequence} of {entry.chain} names no end of a key") from error
    wrong = said["key"] != str(found.key) or found.act not in (RETIRED, REVOKED) or bool(others)
    if wrong or any(len(end.entry_hash) != len(ZERO_HASH) for end in ends.values()):
        raise DecodeError(f"entry {entry.sequence} of {entry.chain} names no end of a key of its node")
    return found


def _number(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("no sequence")
    return value


def said_in(encoded: bytes, cluster: str, node: str, living: Mapping[str, bytes]) -> KeyEnd | None:
    """What a document says of a key of `node`, if one of its living keys (fingerprint → key) signed it.

    None for everything else, garbage too: whoever may write to the topic can put it there.
    """
    if _MARK not in encoded:
        return None
    try:
        document = SignedDocument.decode(encoded)
        key = living.get(document.signer)
        if key is None or document.payload_type != AUDIT_ENTRY:
            return None
        trust = TrustStore([PinnedKey(node, key, document.signer, revoked=False)])
        trust.verify(node, document.signer, document.signature, pae(AUDIT_ENTRY, document.payload))
        entry = AuditEntry.decode(document.payload)
        if (entry.cluster, entry.signer_node_id, writer_of(entry.chain)) != (cluster, node, node):
            return None
        found = end_in(entry)
    except (DecodeError, SignatureError, ChainError):
        return None
    return None if found is None or found.key == document.signer else found


def lesser(one: End | None, other: End) -> End:
    """Of two ends of one key in one chain, that which trusts less."""
    return other if one is None else min(one, other)


def sign_handover(signer: Signer, cluster: str, following: str) -> bytes:
    """The word of a key that is retired for the one that follows (its fingerprint)."""
    said = {"cluster": cluster, "key": signer.fingerprint, "next": following, "node": signer.node}
    return sign_document(signer, HANDOVER, canonical_json(said).encode())


def require_handover(end: KeyEnd, cluster: str, node: str, key: bytes, following: str) -> None:
    """Raise SignatureError unless the ended key (`key`, raw) named the one that follows."""
    document = SignedDocument.decode(end.handover)
    trust = TrustStore([PinnedKey(node, key, end.key, revoked=False)])
    trust.verify(node, document.signer, document.signature, pae(HANDOVER, document.payload))
    wanted = {"cluster": cluster, "key": end.key, "next": following, "node": node}
    if document.payload_type != HANDOVER or document.payload != canonical_json(wanted).encode():
        raise SignatureError(
            f"key {end.key} of node {node} was handed over to another key than {following}",
            hint="find out from the node's operator which key follows; until then pin none",
        )


class WayFinder:
    """Finds the entries that lead to an end, among all that a chain's partition holds.

    Every entry is a possible one until the end is traced back: about 200 bytes are held for each. Hashes link
    them, so no signature is needed to know which the signed end covers.
    """

    def __init__(self, chain: str, after: int, end: End) -> None:
        self._chain, self._after, self._end = chain, after, end
        self._before: dict[bytes, bytes] = {}

    def feed(self, encoded: bytes) -> None:
        """Take the next document of the partition."""
        try:
            payload = SignedDocument.decode(encoded).payload
            if peek_chain(payload)[1] != self._chain:
                return
            entry = AuditEntry.decode(payload)
        except DecodeError:
            return
        if self._after < entry.sequence <= self._end.sequence:
            self._before[document_hash(encoded)] = entry.prev_event_hash

    def way(self) -> Way:
        """What was found, from the end back as far as it goes."""
        hashes: set[bytes] = set()
        at: bytes | None = self._end.entry_hash
        while at is not None and at in self._before and at not in hashes:
            hashes.add(at)
            at = self._before[at]
        return Way(self._after, frozenset(hashes))


class EndsSoFar:
    """What a reader has met of its chain's keys: what each signed last, and which of them have ended."""

    def __init__(self, chain: str) -> None:
        self._chain = chain
        self._last: dict[str, End] = {}
        self._ended: set[str] = set()

    def behind(self, signer: str) -> bool:
        """Whether the chain itself has said that this key ended."""
        return signer in self._ended

    def take(self, entry: AuditEntry, signer: str, entry_hash: bytes) -> None:
        """Take an accepted entry. Raises ChainError when it says an end that is not where the key's was."""
        self._last[signer] = End(entry.sequence, entry_hash)
        try:
            found = end_in(entry)
        except DecodeError as error:
            raise ChainError(f"chain {self._chain}: {error.message}") from error
        if found is None or found.key == signer:
            return
        last, said = self._last.get(found.key), found.ends.get(self._chain)
        if last is not None and said is not None and last != said:
            raise ChainError(
                f"chain {self._chain}: entry {entry.sequence} says key {found.key} ended with"
                f" {said.sequence}, the last it signed here is {last.sequence}"
            )
        if said is not None:
            self._ended.add(found.key)


def living(keys: Iterable[PinnedKey], node: str) -> dict[str, bytes]:
    """Fingerprint → key of the keys of a node that have not ended here."""
    return {key.fingerprint: key.public_key for key in keys if key.node == node and not key.ended}
