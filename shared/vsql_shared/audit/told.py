"""What a node signed with a key before it was revoked, told by its operator: the last entry, and its hash.

A peer that revokes a key trusts it for the entries it has seen. What the node signed after these, and before
it stopped, is refused there for good; its later entries, by a new key, link to it. An operator who has the
last genuine entry's number and hash from the node itself, by a way that is not Kafka, can hold what lies in
Kafka against them: linked hashes make everything before it genuine, too.

Of a chain that was pruned Kafka has no beginning. It may begin behind a base an entry of it says, whoever
made that: one from which the chain does not lead to the told entry, hash by hash, proves nothing either. Nor
does one above what this node had seen: of the entries between the two nothing would be proven, and what a
thief puts in their place would be trusted with them.

Not here: reading Kafka and changing what is trusted. Pure. Rule: a chain that does not lead to exactly this
entry proves nothing, whatever is in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from vsql_shared.audit.base import base_in
from vsql_shared.audit.chain import EMPTY_HEAD, Accepted, ChainHead, ChainReader, writer_of
from vsql_shared.audit.checkpoint import Log
from vsql_shared.audit.dsse import AUDIT_ENTRY, SignedDocument, verify_document
from vsql_shared.audit.entries import TRAIL_PRUNED, AuditEntry, peek_chain, signed_place
from vsql_shared.crypto.signing import PinnedKey, TrustStore
from vsql_shared.errors import ChainError, DecodeError, SignatureError

MAX_STARTS = 16
"""Bases that are tried, those that came first; a chain has one or two of them on the topic."""


def _trusting(keys: Iterable[PinnedKey], fingerprint: str, chain: str, sequence: int) -> TrustStore:
    """These keys, and this one as far as was told."""
    return TrustStore(
        replace(
            key,
            trusted_to={**key.trusted_to, chain: max(sequence, key.trusted_to.get(chain, 0))},
            # Of this node's own key: the end that is to be moved.
            ends={other: end for other, end in key.ends.items() if other != chain},
        )
        if key.fingerprint == fingerprint
        else key
        for key in keys
    )


class SaidBases:
    """Reads which bases entries of a chain say, up to the told entry; where a `ToldHead` may begin."""

    def __init__(
        self, cluster: str, chain: str, keys: Iterable[PinnedKey], fingerprint: str, sequence: int
    ) -> None:
        pins = tuple(keys)
        seen = [key.trusted_to.get(chain, 0) for key in pins if key.fingerprint == fingerprint]
        self._log, self._highest = Log(cluster, chain), min(max(seen, default=0), sequence - 1)
        self._trust = _trusting(pins, fingerprint, chain, sequence)
        self.starts: list[ChainHead] = []
        """Heads before the first entry that must be there, each once, as they came."""

    def feed(self, encoded: bytes, where: str) -> None:  # noqa: ARG002 - what reads the topic gives it
        """Take the next document of a partition; what says no base this node had seen counts for nothing."""
        try:
            document = SignedDocument.decode(encoded)
            # A signature takes long, and such entries are rare.
            if TRAIL_PRUNED.encode() not in document.payload or len(self.starts) >= MAX_STARTS:
                return
            payload = verify_document(self._trust, self._log.writer, document, AUDIT_ENTRY, signed_place)
            entry = AuditEntry.decode(payload)
            base = base_in(entry) if (entry.cluster, entry.chain) == self._log else None
            if base is None or base.head.sequence > self._highest or base.head in self.starts:
                return
            base.require_tree(self._log)
        except (DecodeError, SignatureError, ChainError):
            return
        self.starts.append(base.head)


class ToldHead:
    """Reads one chain from its beginning up to an entry, trusting a revoked key that far."""

    def __init__(
        self,
        cluster: str,
        chain: str,
        keys: Iterable[PinnedKey],
        fingerprint: str,
        sequence: int,
        told: bytes,
        starts: Iterable[ChainHead] = (),
    ) -> None:
        """`told`: the entry's hash, as the node's operator gave it; `starts`: where else it may begin."""
        trust = _trusting(keys, fingerprint, chain, sequence)
        self._readers = [
            ChainReader(cluster, chain, writer_of(chain), trust, start, pruned=start.sequence)
            for start in (EMPTY_HEAD, *starts)
        ]
        self._chain, self._sequence, self._told = chain, sequence, told
        self._reached = False
        self._refused: SignatureError | None = None

    def feed(self, encoded: bytes, where: str) -> None:
        """Take the next document of a partition. Raises ChainError once no beginning leads on.

        What is not the node's is passed over: anybody who may write to the topic can put it there.
        """
        if self._reached:
            return
        try:
            if peek_chain(SignedDocument.decode(encoded).payload)[1] != self._chain:
                return
        except DecodeError:
            return  # no entry of any chain; whether it stops the stream is for the stream to say
        for reader in tuple(self._readers):
            try:
                self._reached = self._reached or self._take(reader, encoded, where)
            except ChainError:
                if len(self._readers) == 1:
                    raise
                self._readers.remove(reader)

    def _take(self, reader: ChainReader, encoded: bytes, where: str) -> bool:
        """Whether this is the told entry, at the end of a chain that leads to it. Raises ChainError."""
        try:
            found = reader.accept(encoded, where)
        except SignatureError as error:
            self._refused = self._refused or error
            return False
        except DecodeError:
            return False  # a document of another kind, with this chain's name in it
        if not isinstance(found, Accepted) or found.entry.sequence < self._sequence:
            return False
        if found.entry_hash != self._told:
            raise ChainError(
                f"entry {self._sequence} of chain {self._chain} in Kafka has hash"
                f" {found.entry_hash.hex()}, not the one you were told",
                record=where,
                hint="what lies there is not what the node signed: somebody else used its key",
            )
        return True

    def require(self) -> None:
        """Raise ChainError unless the entry was found, SignatureError where something was passed over."""
        if not self._reached:
            raise self._refused or ChainError(
                f"chain {self._chain} ends at entry {self._readers[-1].head.sequence} in Kafka,"
                f" before entry {self._sequence}"
            )
