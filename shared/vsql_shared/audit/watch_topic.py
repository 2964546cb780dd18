"""The audit topic read again and again, slice by slice, and held against this node's own trail.

Not here: reading Kafka (service/auditor.py feeds documents), the trail by itself (watch.py). Pure. Rules:

* Every genuine entry of an own chain in the topic must be, with its hash, in the trail; what the trail had
  when the pass began must be in the topic when it ends.
* What targets say of own chains in theirs is held against the trail too: the hash each acknowledgement names,
  and the newest head each target co-signed. Forged records in their names count for nothing.
* The topic may be ahead for a moment: an entry is stored right after Kafka has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from vsql_shared.audit.chain import EMPTY_HEAD, Accepted, ChainHead, ChainReader, writer_of
from vsql_shared.audit.checkpoint import Log, cosigned_in
from vsql_shared.audit.compare import ack_target
from vsql_shared.audit.dsse import AUDIT_ENTRY, SignedDocument, verify_document
from vsql_shared.audit.entries import ZERO_HASH, AuditEntry, peek_chain, signed_place
from vsql_shared.audit.verify import Problem
from vsql_shared.audit.watch_state import decode_head, encode_head
from vsql_shared.errors import ChainError, DecodeError, SignatureError

if TYPE_CHECKING:
    from vsql_shared.crypto.signing import TrustStore

SETTLE_SECONDS = 60.0
"""How long an entry may be in Kafka and not in the trail."""


class Named(NamedTuple):
    """An entry of an own chain as the topic has it, or as a target names it."""

    chain: str
    sequence: int
    entry_hash: bytes
    by: str
    """Where it stands, or who names it."""


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
    heads: dict[str, ChainHead] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)
    """Own chains with a break: they prove nothing more in this pass."""
    ahead: dict[str, tuple[int, str, float]] = field(default_factory=dict)
    """Own chain → an entry the trail did not have yet, its hash, and when that was seen (Unix time)."""
    cosigned: dict[str, dict[str, tuple[int, str]]] = field(default_factory=dict)
    """Own chain → target → (size, root in hex) of the newest head it co-signed."""
    broken: bool = False
    """Something was found in this pass."""

    @property
    def partition(self) -> int | None:
        """The next partition that is not read to its end."""
        return next((p for p, end in sorted(self.ends.items()) if self.next.get(p, 0) < end), None)

    def feed(self, trust: TrustStore, encoded: bytes, where: str) -> Named | Problem | None:
        """Take the next document: an entry to be held against the trail, a break, or nothing."""
        chain = ""
        try:
            document = SignedDocument.decode(encoded)
            chain = peek_chain(document.payload)[1]
            acknowledged = ack_target(chain)
            if writer_of(chain) == self.node:
                return self._own(trust, chain, encoded, where)
            if acknowledged is not None and writer_of(acknowledged[0]) == self.node:
                return self._told(trust, *acknowledged, document, where)
        except (DecodeError, SignatureError, ChainError) as error:
            return self._unread(chain, error.message, where)
        return None

    def _own(self, trust: TrustStore, chain: str, encoded: bytes, where: str) -> Named | None:
        """An entry of an own chain, if it counts."""
        if chain in self.bad:
            return None
        head = self.heads.get(chain, EMPTY_HEAD)
        outcome = ChainReader(self.cluster, chain, self.node, trust, head).accept(encoded, where)
        if not isinstance(outcome, Accepted):
            return None
        self.heads[chain] = outcome.new_head
        return Named(chain, outcome.entry.sequence, outcome.entry_hash, where)

    def _told(
        self, trust: TrustStore, chain: str, target: str, document: SignedDocument, where: str
    ) -> Named | None:
        """What a target says of an own chain. Its signature is enough: true once said is true."""
        entry = AuditEntry.decode(verify_document(trust, target, document, AUDIT_ENTRY, signed_place))
        if (entry.cluster, entry.signer_node_id) != (self.cluster, target):
            return None
        claimed = cosigned_in(entry)
        if claimed is not None and claimed.log == Log(self.cluster, chain):
            known = self.cosigned.setdefault(chain, {})
            known[target] = max(known.get(target, (0, "")), (claimed.size, claimed.root.hex()))
        if not entry.ref_sequence or entry.ref_hash == ZERO_HASH:
            return None
        return Named(chain, entry.ref_sequence, entry.ref_hash, f"target {target} in {where}")

    def _unread(self, chain: str, what: str, where: str) -> Problem | None:
        """A record that does not verify: a break where it is in this node's name, or in nobody's.

        One for each chain the node has, and one for all others: rubbish makes no flood of them.
        """
        try:
            own = not chain or writer_of(chain) == self.node
        except ChainError:
            own = True
        known = chain if chain in self.trail else ""
        if not own or known in self.bad:
            return None
        self.bad.add(known)
        return Problem(known, None, None, f"{where}: {what}")

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
            if one.chain in self.bad:
                continue
            there = stored.get((one.chain, one.sequence))
            if there is None and one.sequence > last.get(one.chain, 0):
                self.ahead.setdefault(one.chain, (one.sequence, one.entry_hash.hex(), now))
            elif there is None:
                what = f"the trail lacks entry {one.sequence}, which {one.by} has"
                found.append(Problem(one.chain, one.sequence, None, what))
            elif there != one.entry_hash:
                what = f"the trail has another entry {one.sequence} than {one.by} has"
                found.append(Problem(one.chain, one.sequence, None, what))
            self.bad |= {problem.chain for problem in found}
        return found

    def overdue(self, now: float) -> list[Named]:
        """Entries the trail has not got in time; each is asked for once more."""
        late = [
            Named(chain, sequence, bytes.fromhex(digest), "Kafka")
            for chain, (sequence, digest, since) in self.ahead.items()
            if now - since > SETTLE_SECONDS
        ]
        for one in late:
            del self.ahead[one.chain]
        return late

    def missing(self) -> list[Problem]:
        """At the end: what the trail had when the pass began, and the topic does not have."""
        found = []
        for chain, sequence in sorted(self.trail.items()):
            at = self.heads.get(chain, EMPTY_HEAD).sequence
            if at < sequence and chain not in self.bad:
                what = f"Kafka ends at {at}, the trail had {sequence} entries by then: Kafka lost entries"
                found.append(Problem(chain, at + 1, None, what))
        return found

    def to_json(self) -> dict[str, Any]:
        """What goes on after a restart."""
        return {
            "ends": self.ends,
            "trail": self.trail,
            "next": self.next,
            "heads": {chain: encode_head(head) for chain, head in self.heads.items()},
            "bad": sorted(self.bad),
            "ahead": self.ahead,
            "cosigned": self.cosigned,
            "broken": self.broken,
        }

    @classmethod
    def from_json(cls, cluster: str, node: str, text: str) -> TopicPass:
        """Goes on from what `to_json` gave."""
        raw = json.loads(text)
        return cls(
            cluster,
            node,
            _numbers(raw["ends"]),
            raw["trail"],
            _numbers(raw["next"]),
            {chain: decode_head(head) for chain, head in raw["heads"].items()},
            set(raw["bad"]),
            {chain: (one[0], one[1], one[2]) for chain, one in raw["ahead"].items()},
            {
                chain: {target: (one[0], one[1]) for target, one in targets.items()}
                for chain, targets in raw["cosigned"].items()
            },
            raw["broken"],
        )


def _numbers(raw: Mapping[str, int]) -> dict[int, int]:
    return {int(partition): offset for partition, offset in raw.items()}
