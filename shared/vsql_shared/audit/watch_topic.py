"""The audit topic read again and again, slice by slice, and held against this node's own trail.

Not here: reading Kafka (service/topic_auditor.py feeds documents), the trail by itself (watch.py). Rules:

* Every genuine entry of an own chain in the topic must be, with its hash, in the trail; what the trail had
  when the pass began must be in the topic when it ends.
* Only this node's own signature says that a chain is another one. A record that does not verify is noted,
  once a pass and under no chain's name, and hides nothing that comes after it. Genuine entries that come
  twice or too early are compared like all others, and what is missing is seen at the end.
* What targets say of own chains in theirs is held against the trail too: the hash each acknowledgement names,
  and the newest head each target co-signed. Forged records in their names count for nothing, and what they
  say ends nothing.
* A chain that was pruned is read from its base: what targets name from below it is compared as far as the
  trail still has it, and what is missing there is not; the topic's own records there are passed over, as
  readers do. The topic must say that base itself, in an entry behind it: else its beginning was cut off.
* Neither is first for good: a producer's entry is stored right after Kafka has it, an acknowledgement is in
  Kafka right after it is stored. What only one has is looked for again before it is a break.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from vsql_shared.audit.base import base_in
from vsql_shared.audit.chain import EMPTY_HEAD, Accepted, ChainHead, ChainReader, writer_of
from vsql_shared.audit.checkpoint import Log, cosigned_in
from vsql_shared.audit.compare import ack_target
from vsql_shared.audit.dsse import AUDIT_ENTRY, SignedDocument, document_hash, verify_document
from vsql_shared.audit.entries import EPOCH_OPENED, ZERO_HASH, AuditEntry, peek_chain, signed_place
from vsql_shared.audit.pruned import unsaid
from vsql_shared.audit.verify import Problem
from vsql_shared.audit.watch import NOBODYS, is_name
from vsql_shared.errors import ChainError, DecodeError, SignatureError

if TYPE_CHECKING:
    from vsql_shared.audit.base import Base
    from vsql_shared.crypto.signing import TrustStore

SETTLE_SECONDS = 60.0
"""How long an entry may be in Kafka and not in the trail; and in the trail, while Kafka does not move."""


class Named(NamedTuple):
    """An entry of an own chain as the topic has it, or as a target names it."""

    chain: str
    sequence: int
    entry_hash: bytes
    where: str
    target: str = ""
    """Who names it; empty: it is there itself."""

    @property
    def by(self) -> str:
        """For people."""
        return f"target {self.target} in {self.where}" if self.target else self.where


@dataclass(slots=True)
class TopicPass:
    """One reading of the topic, from its beginning to where it ended when the reading began."""

    cluster: str
    node: str
    ends: dict[int, int]
    """Partition → offset at which the pass ends."""
    trail: dict[str, int]
    """Own chain → its last sequence in the trail when the pass began."""
    next: dict[int, int] = field(default_factory=dict)
    cosigned: dict[str, dict[str, tuple[int, str]]] = field(default_factory=dict)
    """Own chain → target → (size, root in hex) of the newest head it co-signed."""
    broken: set[str] = field(default_factory=set)
    """Chains something was found of in this pass; NOBODYS for records that do not verify."""
    heads: dict[str, ChainHead] = field(default_factory=dict)
    bases: dict[str, Base] = field(default_factory=dict)
    """Own chain → the last base it says, as its entries in the trail have it."""
    _said: set[str] = field(default_factory=set)
    """Own chains whose base stands in the topic, too."""
    _done: set[tuple[str, str]] = field(default_factory=set)
    """(own chain, target or "") that contradicted the trail once: one break a pass is enough."""
    _ahead: dict[tuple[str, str], tuple[Named, float]] = field(default_factory=dict)
    """The first entry the trail did not have yet, and when that was seen."""
    _lacking: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Own chain → its last entry in Kafka where the trail has more, and since when it is that one."""

    @property
    def partition(self) -> int | None:
        """The next partition that is not read to its end."""
        return next((p for p, end in sorted(self.ends.items()) if self.next.get(p, 0) < end), None)

    @property
    def waits(self) -> bool:
        """Whether the trail has still to get an entry that Kafka has."""
        return bool(self._ahead)

    def pruned_further(self, bases: Mapping[str, Base]) -> bool:
        """Whether a chain begins behind more entries now than when the pass began."""
        return any(base.head.sequence > self._start(chain).sequence for chain, base in bases.items())

    def feed(self, trust: TrustStore, encoded: bytes, where: str) -> Named | Problem | None:
        """Take the next document: an entry to be held against the trail, a break, or nothing."""
        chain = ""
        try:
            document = SignedDocument.decode(encoded)
            chain = peek_chain(document.payload)[1]
            if writer_of(chain) == self.node:
                return self._own(trust, chain, encoded, document, where)
            acknowledged = ack_target(chain)
            if acknowledged is not None and writer_of(acknowledged[0]) == self.node:
                return self._told(trust, *acknowledged, document, where)
        except (DecodeError, SignatureError, ChainError) as error:
            return self._unread(chain, error.message, where)
        return None

    def _own(
        self, trust: TrustStore, chain: str, encoded: bytes, document: SignedDocument, where: str
    ) -> Named | None:
        """An entry of an own chain, if it counts."""
        if not is_name(chain):
            raise ChainError("its chain has a name no chain has")
        start = self._start(chain)
        head = self.heads.get(chain, start)
        reader = ChainReader(self.cluster, chain, self.node, trust, head, pruned=start.sequence)
        try:
            outcome = reader.accept(encoded, where)
        except ChainError:
            # Genuine or not? If it is, it repeats an entry, or comes after a hole: the trail says what it is.
            entry = self._genuine(trust, self.node, document)
            return Named(chain, entry.sequence, document_hash(encoded), where)
        if isinstance(outcome, Accepted):
            self.heads[chain] = outcome.new_head
            self._hear(chain, outcome.entry)
            return Named(chain, outcome.entry.sequence, outcome.entry_hash, where)
        # Void: the loser of a race and a fenced-off writer count for nothing, a repetition must be one.
        entry = self._genuine(trust, self.node, document)
        if entry.sequence <= start.sequence:
            return None  # whether it counted, those before it would say
        repeats = (entry.epoch, entry.incarnation) == (head.epoch, head.incarnation)
        if not repeats or entry.event_type == EPOCH_OPENED:
            return None
        return Named(chain, entry.sequence, document_hash(encoded), where)

    def _start(self, chain: str) -> ChainHead:
        """The head before the first entry the topic must have."""
        base = self.bases.get(chain)
        return EMPTY_HEAD if base is None else base.head

    def _hear(self, chain: str, entry: AuditEntry) -> None:
        """Note it where an entry of the topic says the base its chain is read from."""
        base = self.bases.get(chain)
        with suppress(DecodeError):  # an entry that says it otherwise says another one
            if base is not None and base_in(entry) == base:
                self._said.add(chain)

    def _genuine(self, trust: TrustStore, writer: str, document: SignedDocument) -> AuditEntry:
        """The entry, once a node is known to have signed it as its own, in this cluster."""
        entry = AuditEntry.decode(verify_document(trust, writer, document, AUDIT_ENTRY, signed_place))
        if (entry.cluster, entry.signer_node_id) != (self.cluster, writer):
            raise ChainError("it is an entry of another cluster, or in another node's name")
        return entry

    def _told(
        self, trust: TrustStore, chain: str, target: str, document: SignedDocument, where: str
    ) -> Named | None:
        """What a target says of an own chain. Its signature is enough: true once said is true.

        Of chains the trail does not have it can say anything; those this node wrote are on the topic.
        """
        if chain not in self.trail:
            return None
        entry = self._genuine(trust, target, document)
        claimed = cosigned_in(entry)
        if claimed is not None and claimed.log == Log(self.cluster, chain):
            known = self.cosigned.setdefault(chain, {})
            known[target] = max(known.get(target, (0, "")), (claimed.size, claimed.root.hex()))
        if not entry.ref_sequence or entry.ref_hash == ZERO_HASH:
            return None
        return Named(chain, entry.ref_sequence, entry.ref_hash, where, target)

    def _unread(self, chain: str, what: str, where: str) -> Problem | None:
        """A record that does not verify: a break where it is in this node's name, or in nobody's.

        Anybody who may write to the topic can make some: one a pass, and not in the name it claims.
        """
        try:
            own = not chain or writer_of(chain) == self.node
        except ChainError:
            own = True
        if not own or NOBODYS in self.broken:
            return None
        self.broken.add(NOBODYS)
        return Problem(NOBODYS, None, None, f"a record that does not verify, in {where}: {what}")

    def compare(
        self,
        named: Iterable[Named],
        stored: Mapping[tuple[str, int], bytes],
        last: Mapping[str, int],
        now: float,
    ) -> list[Problem]:
        """Hold entries against the trail: `stored` hashes, and each own chain's `last` sequence there."""
        found = []
        for one in named:
            there, start = stored.get((one.chain, one.sequence)), self._start(one.chain)
            if there is None and one.sequence <= start.sequence:
                # Pruned: of the last one that is gone, the base has the hash.
                there = start.entry_hash if one.sequence == start.sequence else one.entry_hash
            who = one.chain, one.target
            if there == one.entry_hash or who in self._done:
                continue
            if there is None and one.sequence > last.get(one.chain, 0):
                self._ahead.setdefault(who, (one, now))
                continue
            what = f"the trail lacks entry {one.sequence}, which {one.by} has"
            if there is not None:
                what = f"the trail has another entry {one.sequence} than {one.by} has"
            found.append(self._contradicts(one, what))
        return found

    def _contradicts(self, one: Named, what: str) -> Problem:
        self._done.add((one.chain, one.target))
        self.broken.add(one.chain)
        return Problem(one.chain, one.sequence, None, what)

    def overdue(self, now: float) -> list[Named]:
        """Entries the trail has not got in time; each is asked for once more."""
        late = [who for who, (_, since) in self._ahead.items() if now - since > SETTLE_SECONDS]
        return [self._ahead.pop(who)[0] for who in late]

    def still_ahead(self, late: Iterable[Named]) -> list[Problem]:
        """Those of them that are not there now either, after `compare` had them once more."""
        found = []
        for one in late:
            if self._ahead.pop((one.chain, one.target), None) is None:
                continue
            what = (
                f"{one.by} has entry {one.sequence}, the trail ends before it: it was cut at its end, or its"
                " writer stopped before it could store it (it adds it when it starts)"
            )
            found.append(self._contradicts(one, what))
        return found

    def lost(self, now: float) -> tuple[list[Problem], bool]:
        """At the end: what the trail had when the pass began and the topic does not have.

        The second is true where that is to be looked for again, behind the ends there are now.
        """
        found, waiting = [], False
        for chain, sequence in sorted(self.trail.items()):
            at = self.heads.get(chain, self._start(chain)).sequence
            if (chain, "") in self._done:
                continue
            if at >= sequence:
                found += self._unsaid(chain)
                continue
            before, since = self._lacking.get(chain, (-1, now))
            self._lacking[chain] = (at, since if before == at else now)
            waiting = waiting or before != at or now - since <= SETTLE_SECONDS
            what = (
                f"Kafka does not have entry {at + 1}, the trail had {sequence} by then: Kafka lost entries,"
                " or their writer stopped before it could publish them (it publishes them when it starts)"
            )
            found.append(Problem(chain, at + 1, None, what))
        if waiting:
            return [], True
        self.broken |= {problem.chain for problem in found}
        return found, False

    def _unsaid(self, chain: str) -> list[Problem]:
        """The topic has all of a chain but what it says of its beginning."""
        base = self.bases.get(chain)
        if base is None or chain in self._said:
            return []
        return [Problem(chain, base.head.sequence + 1, None, f"on the topic: {unsaid(base.head.sequence)}")]
