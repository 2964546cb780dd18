"""What somebody with every right on Kafka, and none on the nodes, does to the topics of a stream.

Not here: who reads the altered topics and what becomes of it (test_tampering.py). Records in, records out.
`REFUSED` names each alteration of what a node has not read yet; docs/threat-model.md lists them in its table.
A forger has what lies in Kafka and keys of his own; he never has a key of a node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.streams import Record
from vsql_shared.audit.dsse import AUDIT_ENTRY, KEY_ANNOUNCEMENT, SignedDocument, sign_document
from vsql_shared.audit.entries import EPOCH_OPENED, REPLICATION_BATCH, AuditEntry
from vsql_shared.changes import Op
from vsql_shared.crypto.announce import decode_announcement, encode_announcement
from vsql_shared.crypto.signing import Signer
from vsql_shared.wire.pack import (
    CLEAR_SIZE,
    NONCE_SIZE,
    decode_header,
    decode_tuples,
    encode_pack,
    length_prefix,
)


@dataclass(frozen=True)
class Taken:
    """The true records of a stream; `seen` is the next offset its reader had not read, by topic-partition."""

    chain: str
    records: list[Record]
    seen: dict[tuple[str, int], int]
    strange: list[Record]
    """Records of another cluster with the same names of nodes, publication and tables."""
    other: list[Record]
    """Packs of another stream of this cluster."""

    def new(self, suffix: str) -> list[int]:
        """Positions of this stream's packs of a table, or manifests, that were not read yet."""
        return [i for i in self._mine(suffix) if self._is_new(self.records[i])]

    def old(self, suffix: str) -> list[int]:
        """Positions of those that were."""
        return [i for i in self._mine(suffix) if not self._is_new(self.records[i])]

    def _is_new(self, record: Record) -> bool:
        return record.offset >= self.seen.get((record.topic, record.partition), 0)

    def _mine(self, suffix: str) -> list[int]:
        if suffix == ".audit":  # manifests of this stream
            return [i for i, r in enumerate(self.records) if r.topic.endswith(suffix) and self._is_mine(r)]
        mine = f".{self.chain}.public{suffix}"
        return [i for i, r in enumerate(self.records) if r.topic.endswith(mine)]

    def _is_mine(self, record: Record) -> bool:
        entry = entry_of(record)
        return entry.chain == self.chain and entry.event_type == REPLICATION_BATCH

    def put(self, at: int, *records: Record) -> list[Record]:
        """All records, with some more in front of one of them."""
        return [*self.records[:at], *records, *self.records[at:]]

    def swap_for(self, at: int, record: Record) -> list[Record]:
        """All records, with another one in the place of one of them."""
        return [*self.records[:at], record, *self.records[at + 1 :]]

    def without(self, gone: Sequence[int]) -> list[Record]:
        """All records but some."""
        left = set(gone)
        return [r for i, r in enumerate(self.records) if i not in left]


Change = Callable[[Taken], list[Record]]


# Forging


def stranger(node: str = "node-a") -> Signer:
    """A key nobody pinned, in the name of a node."""
    return Signer(Ed25519PrivateKey.from_private_bytes(b"k" * 32), node)


def entry_of(record: Record) -> AuditEntry:
    """The entry in a record of the audit topic."""
    return AuditEntry.decode(SignedDocument.decode(record.value or b"").payload)


def forged_entry(record: Record, *, claim_pinned: bool = False, **fields: Any) -> Record:
    """The record with an altered entry, signed by the stranger; under the pinned key's name if asked."""
    true = SignedDocument.decode(record.value or b"")
    forged = replace(AuditEntry.decode(true.payload), **fields)
    encoded = sign_document(stranger(), AUDIT_ENTRY, forged.encode())
    return replace(record, value=_renamed(encoded, true.signer) if claim_pinned else encoded)


def forged_announcement(record: Record) -> Record:
    """The announcement with a key of the forger's own, signed by the stranger."""
    true = decode_announcement(SignedDocument.decode(record.value or b"").payload)
    forged = replace(true, wrapped_dek=bytes(len(true.wrapped_dek)), commitment=bytes(32))
    return replace(record, value=sign_document(stranger(), KEY_ANNOUNCEMENT, encode_announcement(forged)))


def _renamed(encoded: bytes, signer: str) -> bytes:
    return replace(SignedDocument.decode(encoded), signer=signer).encode()


def sealed_tuples(message: bytes) -> tuple[bytes, list[tuple[int, bytes]]]:
    """A pack's header, and (operation, bytes) of each of its tuples."""
    _, at = decode_header(message)
    header, found = message[:at], []
    for one in decode_tuples(message, at, bytes(32)):
        clear = one.aad[-CLEAR_SIZE:]
        found.append((one.op, clear + one.nonce + length_prefix(len(one.ciphertext)) + one.ciphertext))
    assert all(len(record) > CLEAR_SIZE + NONCE_SIZE for _, record in found)
    return header, found


def with_descriptor_of(pack: Record, other: Record) -> Record:
    """The pack with its descriptor of the table replaced by another pack's."""
    header, tuples = sealed_tuples(pack.value or b"")
    strange = next(record for op, record in sealed_tuples(other.value or b"")[1] if op == Op.RELATION)
    mixed = [strange if op == Op.RELATION else record for op, record in tuples]
    return replace(pack, value=encode_pack(header, mixed))


# Alterations


def _drop(suffix: str) -> Change:
    return lambda taken: taken.without(taken.new(suffix)[:1])


def _drop_two(suffix: str) -> Change:
    return lambda taken: taken.without(taken.new(suffix)[:2])


def _made_anew(suffix: str) -> Change:
    """The topic was deleted and made again: it begins with what was sent since."""
    return lambda taken: taken.without(taken.old(suffix))


def _swap(suffix: str) -> Change:
    def change(taken: Taken) -> list[Record]:
        i, j = taken.new(suffix)[:2]
        records = list(taken.records)
        records[i], records[j] = records[j], records[i]
        return records

    return change


def _flip(suffix: str, position: int, bit: int = 0) -> Change:
    def change(taken: Taken) -> list[Record]:
        i = taken.new(suffix)[0]
        size = len(taken.records[i].value or b"")
        return taken.swap_for(i, taken.records[i].flip(position % size, bit))

    return change


def _insert(suffix: str, value: bytes | None) -> Change:
    def change(taken: Taken) -> list[Record]:
        i = taken.new(suffix)[0]
        return taken.put(i, replace(taken.records[i], value=value))

    return change


def _repeat_inside(taken: Taken) -> list[Record]:
    i = taken.new(".t")[0]
    return taken.put(i + 1, *[taken.records[i]] * 2)


def _replay_old_pack(taken: Taken) -> list[Record]:
    return taken.put(taken.new(".t")[0], taken.records[taken.old(".t")[-1]])


def _replay_old_batch(taken: Taken) -> list[Record]:
    """Packs and manifest of the last batch that was applied, once more."""
    records = taken.records
    for suffix in (".audit", ".t", ".u"):
        old = taken.records[taken.old(suffix)[-1]]
        at = records.index(taken.records[taken.new(suffix)[0]])
        records = [*records[:at], old, *records[at:]]
    return records


def _older_epoch(taken: Taken) -> list[Record]:
    """A pack of the first epoch where the present one's first pack lies."""
    return taken.swap_for(taken.new(".t")[0], taken.records[taken.old(".t")[0]])


def _move_to_other_table(taken: Taken) -> list[Record]:
    i, j = taken.new(".t")[0], taken.new(".u")[0]
    return taken.swap_for(j, replace(taken.records[i], topic=taken.records[j].topic))


def _exchange_tables(taken: Taken) -> list[Record]:
    i, j = taken.new(".t")[0], taken.new(".u")[0]
    one, two = taken.records[i], taken.records[j]
    return [
        replace(two, topic=one.topic) if n == i else replace(one, topic=two.topic) if n == j else record
        for n, record in enumerate(taken.records)
    ]


def _strange_pack(taken: Taken) -> list[Record]:
    i = taken.new(".t")[0]
    return taken.swap_for(i, replace(taken.records[i], value=_last(taken.strange, ".t").value))


def _strange_manifest(taken: Taken) -> list[Record]:
    i = taken.new(".audit")[0]
    theirs = replace(taken, records=taken.strange, seen={})
    strange = taken.strange[theirs.new(".audit")[-1]]
    return taken.swap_for(i, replace(taken.records[i], value=strange.value))


def _other_stream(taken: Taken) -> list[Record]:
    i = taken.new(".t")[0]
    return taken.swap_for(i, replace(taken.records[i], value=_last(taken.other, "").value))


def _last(records: list[Record], suffix: str) -> Record:
    return next(r for r in reversed(records) if r.topic.endswith(suffix))


def _replace_descriptor(taken: Taken) -> list[Record]:
    i, old = taken.new(".t")[0], taken.records[taken.old(".t")[0]]
    return taken.swap_for(i, with_descriptor_of(taken.records[i], old))


def _forge(*, claim_pinned: bool = False, **fields: Any) -> Change:
    """A manifest in the place of the next true one."""

    def change(taken: Taken) -> list[Record]:
        i = taken.new(".audit")[0]
        return taken.swap_for(i, forged_entry(taken.records[i], claim_pinned=claim_pinned, **fields))

    return change


def _forge_appended(taken: Taken) -> list[Record]:
    i = taken.new(".audit")[0]
    return taken.put(i, taken.records[i].flip(len(taken.records[i].value or b"") - 5))


def _forge_epoch(taken: Taken) -> list[Record]:
    """An epoch opened where the stream stands, which would make void what comes."""
    i = taken.new(".audit")[0]
    due = entry_of(taken.records[i])
    opened = next(r for r in taken.records if opens_epoch(r, taken.chain))
    forged = forged_entry(
        opened,
        epoch=due.epoch + 1,
        sequence=due.sequence,
        incarnation=b"i" * 16,
        prev_event_hash=due.prev_event_hash,
    )
    return taken.put(i, forged)


def opens_epoch(record: Record, chain: str) -> bool:
    """Whether a record is the entry that opens an epoch of a chain."""
    if not record.topic.endswith(".audit"):
        return False
    entry = entry_of(record)
    return (entry.chain, entry.event_type) == (chain, EPOCH_OPENED)


def _announcements(change: Callable[[Record], Record]) -> Change:
    # Every one: which of them is the live stream's, and not the first copy's, is nobody's to know here.
    return lambda taken: [change(r) if r.topic.endswith(".keys") else r for r in taken.records]


def _flip_middle(record: Record) -> Record:
    return record.flip(len(record.value or b"") // 2)


def _drop_announcements(taken: Taken) -> list[Record]:
    return [r for r in taken.records if not r.topic.endswith(".keys")]


HUGE = 3 << 20
"""Bytes; several times what Kafka takes by default and what a document may have."""

REFUSED: dict[str, tuple[Change, str]] = {
    "a bit of a sealed tuple is changed": (_flip(".t", -30), r"\.t"),
    "a bit of a pack's clear header is changed": (_flip(".t", 8, 1), r"\.t"),
    "a pack is dropped": (_drop(".t"), r"\.t|sequence|batch"),
    "two packs change places": (_swap(".t"), r"\.t"),
    "a pack is there three times": (_repeat_inside, r"\.t"),
    "an old pack is replayed": (_replay_old_pack, r"\.t"),
    "an old batch is replayed whole": (_replay_old_batch, r"\.t|\.u|audit"),
    "a pack of an older epoch takes a pack's place": (_older_epoch, r"\.t"),
    "a pack is moved to another table's topic": (_move_to_other_table, r"\.u|\.t"),
    "two packs of a batch exchange their tables": (_exchange_tables, r"\.u|\.t"),
    "a pack of another stream takes a pack's place": (_other_stream, r"\.t"),
    "a pack of another cluster with the same names takes a pack's place": (_strange_pack, r"\.t"),
    "a table's descriptor is replaced by an older one": (_replace_descriptor, r"\.t"),
    "bytes that are no pack are inserted": (_insert(".t", b"\x00garbage" * 9), r"\.t"),
    "an empty record is inserted": (_insert(".t", None), r"\.t"),
    "a huge record is inserted": (_insert(".t", b"\x5a" * HUGE), r"\.t"),
    "the data topic is deleted and made anew": (_made_anew(".t"), r"\.t"),
    "a bit of a manifest is changed": (_flip(".audit", 200, 3), r"audit"),
    "a manifest is dropped": (_drop(".audit"), r"audit"),
    "the audit topic is compacted away before it was read": (_drop_two(".audit"), r"audit"),
    "two manifests change places": (_swap(".audit"), r"audit"),
    "a forged manifest is appended": (_forge_appended, r"audit"),
    "a manifest is forged with another key": (_forge(kek_id="forged"), r"audit"),
    "a manifest is forged in the name of the pinned key": (_forge(claim_pinned=True, kek_id="f"), r"audit"),
    "a manifest of another cluster with the same names takes one's place": (_strange_manifest, r"audit"),
    "an opened epoch is forged": (_forge_epoch, r"audit"),
    "bytes that are no entry are inserted": (_insert(".audit", b"\x00garbage" * 9), r"audit"),
    "a huge entry is inserted": (_insert(".audit", b"\x5a" * HUGE), r"audit"),
    "a bit of a key announcement is changed": (_announcements(_flip_middle), r"keys"),
    "a key announcement is replaced by one of another key": (_announcements(forged_announcement), r"keys"),
    "all key announcements are dropped": (_drop_announcements, r"key|announce"),
}
"""Alterations of what was not read yet, and what the refusal names."""
