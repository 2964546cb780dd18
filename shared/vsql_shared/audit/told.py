"""What a node signed with a key before it was revoked, told by its operator: the last entry, and its hash.

A peer that revokes a key trusts it for the entries it has seen. What the node signed after these, and before
it stopped, is refused there for good; its later entries, by a new key, link to it. An operator who has the
last genuine entry's number and hash from the node itself, by a way that is not Kafka, can hold what lies in
Kafka against them: linked hashes make everything before it genuine, too.

Not here: reading Kafka and changing what is trusted. Pure. Rule: a chain that does not lead to exactly this
entry proves nothing, whatever is in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from vsql_shared.audit.chain import Accepted, ChainReader, writer_of
from vsql_shared.audit.dsse import SignedDocument
from vsql_shared.audit.entries import peek_chain
from vsql_shared.crypto.signing import PinnedKey, TrustStore
from vsql_shared.errors import ChainError, DecodeError, SignatureError


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
    ) -> None:
        """`told`: the entry's hash, as the node's operator gave it."""
        trusted = [
            replace(key, trusted_to={**key.trusted_to, chain: max(sequence, key.trusted_to.get(chain, 0))})
            if key.fingerprint == fingerprint
            else key
            for key in keys
        ]
        self._reader = ChainReader(cluster, chain, writer_of(chain), TrustStore(trusted))
        self._sequence, self._told = sequence, told
        self._reached = False
        self._refused: SignatureError | None = None

    def feed(self, encoded: bytes, where: str) -> None:
        """Take the next document of a partition. Raises ChainError.

        What is not the node's is passed over: anybody who may write to the topic can put it there.
        """
        if self._reached:
            return
        try:
            if peek_chain(SignedDocument.decode(encoded).payload)[1] != self._reader.chain:
                return
        except DecodeError:
            return  # no entry of any chain; whether it stops the stream is for the stream to say
        try:
            found = self._reader.accept(encoded, where)
        except SignatureError as error:
            self._refused = self._refused or error
            return
        if not isinstance(found, Accepted) or found.entry.sequence < self._sequence:
            return
        if found.entry_hash != self._told:
            raise ChainError(
                f"entry {self._sequence} of chain {self._reader.chain} in Kafka has hash"
                f" {found.entry_hash.hex()}, not the one you were told",
                record=where,
                hint="what lies there is not what the node signed: somebody else used its key",
            )
        self._reached = True

    def require(self) -> None:
        """Raise ChainError unless the entry was found, SignatureError where something was passed over."""
        if not self._reached:
            raise self._refused or ChainError(
                f"chain {self._reader.chain} ends at entry {self._reader.head.sequence} in Kafka,"
                f" before entry {self._sequence}"
            )
