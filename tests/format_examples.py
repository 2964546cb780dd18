"""The worked examples of docs/formats.md, made by the product's own code from fixed keys and times.

One story: node-a sends one batch of one table to node-b, which acknowledges it. `tests/unit/test_formats.py`
compares the page with these bytes. After a change of the page: `python -m tests.format_examples` fills in its
blocks; a format that is in use never changes, it gets a new version and new examples beside the old ones.
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tests.audit_history import START, A, B, ack_fields, incarnation
from vsql_producers.joining import opening_detail
from vsql_producers.scope import Scope, document
from vsql_producers.scope_record import seen
from vsql_producers.transactions import Descriptor
from vsql_shared.audit import evidence, tree
from vsql_shared.audit import evidence_documents as documents
from vsql_shared.audit.base import Base
from vsql_shared.audit.chain import EMPTY_HEAD, ChainHead, ChainWriter, Prepared, advance
from vsql_shared.audit.checkpoint import Checkpoint, Log, cosigner_key
from vsql_shared.audit.dsse import AUDIT_ENTRY, KEY_ANNOUNCEMENT, SignedDocument, pae, sign_document
from vsql_shared.audit.entries import REPLICATION_BATCH, canonical_json
from vsql_shared.audit.export_format import FORMAT, VERSION, readable
from vsql_shared.audit.merkle import batch_root, root
from vsql_shared.audit.notes import SignedNote
from vsql_shared.audit.proofs import ConsistencyProof, InclusionProof
from vsql_shared.audit.scope_history import DESCRIBED, sha256_hex
from vsql_shared.changes import Column, PartitionRoot, Relation, TableName, Transaction
from vsql_shared.crypto.announce import KeyAnnouncement, encode_announcement
from vsql_shared.crypto.dek import ALGORITHM, KeyLimits, SealingKey, key_context
from vsql_shared.crypto.seal import seal_tuples
from vsql_shared.names import ack_chain, data_topic
from vsql_shared.wire.framing import frame
from vsql_shared.wire.pack import (
    CLEAR,
    PackHeader,
    encode_header,
    encode_pack,
    encode_relation,
    header_digest,
    relation_hash,
)

PAGE = Path(__file__).parents[1] / "docs" / "formats.md"
BLOCK = re.compile(r"^```(hex|text) ([a-z0-9-]+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
CLUSTER, CHAIN = "shop", "orders.node-a"
KEK = bytes(range(32))
DEK = bytes(range(32, 64))
DEK_ID = "dek-" + bytes(range(64, 80)).hex()
TABLE = TableName("public", "orders")
SALT = bytes(range(96, 112)).hex()
_WIDE = 48


def hex_lines(raw: bytes) -> str:
    """Hex as the page has it."""
    return "".join(f"{raw[at : at + _WIDE].hex()}\n" for at in range(0, len(raw), _WIDE))


def _tuple_data(*values: str) -> bytes:
    """TupleData of pgoutput, of text columns."""
    parts = (b"t" + len(value).to_bytes(4, "big") + value.encode() for value in values)
    return len(values).to_bytes(2, "big") + b"".join(parts)


class Batch(NamedTuple):
    """A sealed batch of one pack."""

    descriptor: bytes
    key: SealingKey
    header: bytes
    clears: list[bytes]
    records: list[bytes]
    leaves: list[bytes]

    @property
    def pack(self) -> bytes:
        """The Kafka message."""
        return encode_pack(self.header, self.records)


def batch() -> Batch:
    """A descriptor and one inserted row, sealed."""
    columns = (Column("id", True, 23, -1, "integer"), Column("note", False, 25, -1, "text"))
    descriptor = encode_relation(Relation(TABLE, "d", columns, bytes(range(16))))
    key = SealingKey(
        secret=DEK, dek_id=DEK_ID, created_at=START, cluster=CLUSTER, chain=CHAIN,
        worker=1, nonce_salt=b"\xbe\xef", limits=KeyLimits(),
    )  # fmt: skip
    at = Transaction(731, 0x16B3748, START + 5)
    header = encode_header(
        PackHeader(CLUSTER, CHAIN, "node-a", TABLE, 0, 1, 1, DEK_ID, relation_hash(descriptor), (at,))
    )
    clears = [CLEAR.pack(0, 0x16B3700, number, op) for number, op in enumerate((b"R", b"I"))]
    plaintexts = [descriptor, b"N" + _tuple_data("42", "hello")]
    records, leaves = seal_tuples(key, header_digest(header), clears, plaintexts)
    return Batch(descriptor, key, header, clears, records, leaves)


def announcement(key: SealingKey) -> bytes:
    """The data key's announcement, wrapped under a KEK of the provider `file`."""
    nonce = bytes(range(80, 92))
    wrapped = nonce + AESGCM(KEK).encrypt(nonce, DEK, key_context(CLUSTER, CHAIN, DEK_ID))
    return encode_announcement(
        KeyAnnouncement(
            CLUSTER,
            CHAIN,
            "node-a",
            DEK_ID,
            1,
            "file",
            "example-kek/1",
            "AES-256-GCM",
            ALGORITHM,
            wrapped,
            key.commitment,
            1,
            START,
        )
    )


def scope_text() -> str:
    """What the epoch says its publication may carry."""
    scope = Scope({TABLE: None}, {}, {})
    return canonical_json({**document("orders", scope), "salt": SALT})


def described_text(descriptor: bytes) -> str:
    """What the batch is the first one to describe."""
    made = seen([Descriptor(TABLE, descriptor, relation_hash(descriptor))])
    return canonical_json({**json.loads(made), "salt": SALT})


def _fixed(number: int) -> dict[str, Any]:
    return {"event_id": number.to_bytes(16, "big"), "event_timestamp": START + number}


def _open(writer: ChainWriter, number: int, **more: str) -> Prepared:
    made = writer.open_epoch(
        lsn=0x16B3000, system_identifier="7000", timeline=1, **{**_fixed(number), **more}
    )
    writer.commit(made.entry_hash)
    return made


def chain(sealed: Batch) -> tuple[Prepared, Prepared]:
    """The source's chain: its epoch and the manifest of the batch."""
    writer = ChainWriter(A, CLUSTER, CHAIN, EMPTY_HEAD, incarnation(1))
    scope = sha256_hex(scope_text())
    opened = _open(writer, 1, detail=opening_detail(["node-b"], scope))
    sub = root(sealed.leaves)
    part = PartitionRoot(data_topic(CLUSTER, CHAIN, *TABLE), 0, 0, 0, 1, 2, sub)
    manifest = writer.next(
        event_type=REPLICATION_BATCH, batch=1, batch_lsn_start=0x16B3700, batch_lsn_end=0x16B3780,
        tables_affected=("public.orders",), row_count=1, record_count=2, partitions=(part,),
        merkle_root=batch_root([sub]), dek_id=DEK_ID, kek_id="example-kek/1", algorithm=ALGORITHM,
        detail=canonical_json({DESCRIBED: sha256_hex(described_text(sealed.descriptor))}),
        **_fixed(2),
    )  # fmt: skip
    return opened, manifest


def acknowledgement(manifest: Prepared) -> Prepared:
    """The target's entry for the batch."""
    writer = ChainWriter(B, CLUSTER, ack_chain(CHAIN, "node-b"), EMPTY_HEAD, incarnation(2))
    _open(writer, 3, source_node_id="node-a", target_node_id="node-b")
    return writer.next(**{**ack_fields(manifest), **_fixed(4)})


def export(entries: list[Prepared]) -> str:
    """An export of the source's chain, without the schemas, which are the files of schemas/."""
    items = [
        {
            "chain": one.entry.chain, "sequence": one.entry.sequence, "hash": one.entry_hash.hex(),
            "kafka_offset": None, "document": base64.b64encode(one.encoded).decode(),
            "entry": readable(one.entry),
        }
        for one in entries
    ]  # fmt: skip
    last = entries[-1]
    ends = {"entries": 2, "first_sequence": 1, "last_sequence": 2, "last_hash": last.entry_hash.hex()}
    key = {
        "node": "node-a", "fingerprint": A.fingerprint,
        "public_key": base64.b64encode(A.public_key).decode(), "revoked_at": None,
    }  # fmt: skip
    header = {
        "format": FORMAT, "version": VERSION, "cluster": CLUSTER, "node": "node-a",
        "exported_at": "2025-10-09T08:54:00+00:00", "since": None, "keys": [key], "schemas": {},
    }  # fmt: skip
    whole = {"header": header, "entries": items, "end": {"entries": 2, "chains": {CHAIN: ends}}}
    return json.dumps(whole, indent=1) + "\n"


def _evidence(checkpoint: str) -> dict[str, bytes | str]:
    """A bundle of two files: a checkpoint of the page, and a configuration."""
    configuration = '[cluster]\nname = "shop"\nnode_id = 1\nnode_name = "node-a"\n'
    files = [
        evidence.file_of(
            f"checkpoints/{CHAIN}.checkpoint", documents.CHECKPOINT, "this node's chain", checkpoint.encode()
        ),
        evidence.file_of("configuration.toml", evidence.PLAIN, "secrets masked", configuration.encode()),
    ]
    missing = [("ACLs of Kafka", "the brokers have no authorizer")]
    made = evidence.build(
        CLUSTER, "node-a", ("2025-10-09T08:53:20Z", "2025-10-09T08:54:00Z"), "vsql-sync 0.1", files, missing
    )
    envelope = evidence.seal(made, A)
    return {
        "evidence-configuration": configuration,
        "evidence-payload": base64.b64decode(json.loads(envelope)["payload"]).decode() + "\n",
        "evidence-manifest": envelope.decode(),
    }


def _log_examples(entries: list[Prepared]) -> dict[str, bytes | str]:
    hashes = [one.entry_hash for one in entries]
    heads = [
        Checkpoint(Log(CLUSTER, CHAIN), size, tree.root_of(tree.tree_of(hashes[:size])[0])) for size in (1, 2)
    ]
    log, head = heads[1].log, heads[1]
    both = head.signed_by(B, START // 1_000_000, head.signed_by(A, 0, SignedNote(head.text, ()))).encode()
    path = tree.range_roots(hashes, tree.inclusion_ranges(1, 2))
    prefix = tree.range_roots(hashes, tree.consistency_ranges(1, 2))
    return {
        **_evidence(both),
        "tree-root": head.root,
        "checkpoint": both,
        "old-checkpoint": heads[0].signed_by(A, 0, SignedNote(heads[0].text, ())).encode(),
        "log-vkey": log.key(A.public_key).vkey + "\n",
        "cosigner-vkey": cosigner_key(CLUSTER, "node-b", B.public_key).vkey + "\n",
        "inclusion-proof": InclusionProof(entries[1].encoded, 1, tuple(path), both).encode(),
        "consistency-proof": ConsistencyProof(1, tuple(prefix), both).encode(),
        "base": Base(_head(entries), both, entries[1].entry.tables_affected).encode() + "\n",
    }


def _head(entries: list[Prepared]) -> ChainHead:
    head = EMPTY_HEAD
    for one in entries:
        head = advance(head, one.entry, one.entry_hash)
    return head


def examples() -> dict[str, bytes | str]:
    """Name of a block on the page → its bytes, or its text."""
    sealed = batch()
    opened, manifest = chain(sealed)
    ack = acknowledgement(manifest)
    told = announcement(sealed.key)
    digest = header_digest(sealed.header)
    return {
        "public-key": A.public_key,
        "target-public-key": B.public_key,
        "fingerprint": A.fingerprint + "\n",
        "descriptor": sealed.descriptor,
        "descriptor-hash": relation_hash(sealed.descriptor),
        "kek": KEK,
        "key-context": key_context(CLUSTER, CHAIN, DEK_ID),
        "commitment": sealed.key.commitment,
        "announcement": told,
        "announcement-document": sign_document(A, KEY_ANNOUNCEMENT, told),
        "pack": sealed.pack,
        "framed-pack": frame(7) + sealed.pack,
        "pack-header": sealed.header,
        "pack-digest": digest,
        "clear": sealed.clears[1],
        "tuple-aad": digest + sealed.clears[1],
        "tuple": sealed.records[1],
        "leaf": sealed.leaves[1],
        "sub-root": root(sealed.leaves),
        "batch-root": manifest.entry.merkle_root,
        "plaintext": b"N" + _tuple_data("42", "hello"),
        "scope": scope_text() + "\n",
        "described": described_text(sealed.descriptor) + "\n",
        "entry-1-document": opened.encoded,
        "entry-1-hash": opened.entry_hash,
        "entry-2": manifest.entry.encode(),
        "entry-2-pae": pae(AUDIT_ENTRY, manifest.entry.encode()),
        "entry-2-document": manifest.encoded,
        "entry-2-hash": manifest.entry_hash,
        "signature": SignedDocument.decode(manifest.encoded).signature,
        "acknowledgement-document": ack.encoded,
        "export": export([opened, manifest]),
        **_log_examples([opened, manifest]),
    }


def shown(value: bytes | str) -> tuple[str, str]:
    """(kind, lines) of a block."""
    return ("hex", hex_lines(value)) if isinstance(value, bytes) else ("text", value)


def blocks(page: str) -> dict[str, tuple[str, str]]:
    """Name → (kind, lines) of every block of the page."""
    return {match[2]: (match[1], match[3]) for match in BLOCK.finditer(page)}


def entry_fields(value: object) -> dict[str, object]:
    """A dataclass as a dict, one level deep."""
    return {one.name: getattr(value, one.name) for one in fields(value)}  # type: ignore[arg-type]  # a dataclass


def main() -> None:
    """Fill in the blocks of the page."""
    made = examples()

    def fill(match: re.Match[str]) -> str:
        kind, lines = shown(made[match[2]])
        return f"```{kind} {match[2]}\n{lines}```"

    PAGE.write_text(BLOCK.sub(fill, PAGE.read_text()))


if __name__ == "__main__":
    main()
