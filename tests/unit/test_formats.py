"""docs/formats.md is true: the product makes its examples, and a stranger verifies them by the page alone.

The stranger below imports nothing of the product: it reads the tables of the page, decodes the examples by
them, and follows the page's sentences with hashlib and the bare primitives.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tests.format_examples import PAGE, blocks, entry_fields, examples, shown
from vsql_shared.audit.entries import AuditEntry
from vsql_shared.audit.export_format import readable
from vsql_shared.crypto.announce import decode_announcement
from vsql_shared.wire.pack import decode_relation

TEXT = PAGE.read_text()
SHOWN = blocks(TEXT)
MADE = examples()


def test_the_page_shows_every_example_and_no_other() -> None:
    assert SHOWN.keys() == MADE.keys()


@pytest.mark.parametrize("name", MADE)
def test_an_example_is_what_the_product_makes(name: str) -> None:
    assert SHOWN[name] == shown(MADE[name])


# The stranger


def _tables() -> dict[str, list[tuple[str, str]]]:
    """Record → its (field, type) in order, from the page's tables."""
    found = {}
    for match in re.finditer(
        r"^#### (\w+).*\n\| field \| type .*\n\|---.*\n((?:\|.*\n)+)", TEXT, re.MULTILINE
    ):
        rows = [line.split("|")[1:3] for line in match[2].splitlines()]
        found[match[1]] = [(name.strip(), kind.strip()) for name, kind in rows]
    return found


RECORDS = _tables()


def raw(name: str) -> bytes:
    kind, lines = SHOWN[name]
    assert kind == "hex"
    return bytes.fromhex(lines)


def text(name: str) -> str:
    kind, lines = SHOWN[name]
    assert kind == "text"
    return lines


class Reader:
    """Avro by the table "type | bytes" of the page."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        self.at += count
        assert self.at <= len(self.data)
        return self.data[self.at - count : self.at]

    def long(self) -> int:
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value >> 1 if not value & 1 else -(value >> 1) - 1

    def value(self, kind: str) -> Any:
        if kind in ("int", "long"):
            return self.long()
        if kind == "boolean":
            return {b"\0": False, b"\1": True}[self.take(1)]
        if kind == "bytes":
            return self.take(self.long())
        if kind == "string":
            return self.take(self.long()).decode()
        if kind.startswith("fixed "):
            return self.take(int(kind.split()[1]))
        if kind.startswith("array of "):
            items = (
                [self.value(kind.removeprefix("array of ")) for _ in range(count)]
                if (count := self.long())
                else []
            )
            assert not count or self.take(1) == b"\0"
            return items
        return {name: self.value(field) for name, field in RECORDS[kind]}


def read(data: bytes, record: str) -> Any:
    reader = Reader(data)
    found = reader.value(record)
    assert reader.at == len(data)
    return found


def sha(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def tree_root(leaves: list[bytes]) -> bytes:
    """Of leaf hashes, as the page says it."""
    if len(leaves) < 2:
        return leaves[0] if leaves else sha()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return sha(b"\1", tree_root(leaves[:split]), tree_root(leaves[split:]))


def opened(name: str, key: str, payload: str) -> Any:
    """A signed document's payload, once its signature is verified by hand."""
    document = read(raw(name), "SignedDocument")
    kind = document["payload_type"].encode()
    message = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(document["payload"]), document["payload"])
    Ed25519PublicKey.from_public_bytes(raw(key)).verify(document["signature"], message)
    named = "SHA256:" + base64.b64encode(sha(raw(key))).decode().rstrip("=")
    assert (document["format"], document["signer"]) == (1, named)
    return read(document["payload"], payload)


def test_a_stranger_verifies_the_documents_and_the_links_of_the_chain() -> None:
    first = opened("entry-1-document", "public-key", "AuditEntry")
    second = opened("entry-2-document", "public-key", "AuditEntry")
    assert text("fingerprint").strip() == read(raw("entry-1-document"), "SignedDocument")["signer"]
    assert first["prev_event_hash"] == bytes(32)
    assert second["prev_event_hash"] == sha(raw("entry-1-document")) == raw("entry-1-hash")
    assert sha(raw("entry-2-document")) == raw("entry-2-hash")
    assert [(e["event_type"], e["sequence"], e["epoch"]) for e in (first, second)] == [
        ("epoch_opened", 1, 1),
        ("replication_batch", 2, 1),
    ]
    for entry, name in ((first, "scope"), (second, "described")):
        assert json.loads(entry["detail"])[name] == sha(text(name).rstrip("\n").encode()).hex()
    assert json.loads(first["detail"])["targets"] == ["node-b"]
    message = raw("entry-2-pae")
    assert message.endswith(raw("entry-2"))
    Ed25519PublicKey.from_public_bytes(raw("public-key")).verify(raw("signature"), message)


def test_a_stranger_reads_in_the_tables_what_the_product_reads() -> None:
    entry = entry_fields(AuditEntry.decode(raw("entry-2")))
    mine = read(raw("entry-2"), "AuditEntry")
    assert mine.keys() == entry.keys()
    plain: dict[str, Any] = {
        name: value.hex() if isinstance(value, bytes) else value for name, value in mine.items()
    }
    plain["partitions"] = [{**one, "sub_root": one["sub_root"].hex()} for one in plain["partitions"]]
    assert plain == readable(AuditEntry.decode(raw("entry-2")))
    told = read(raw("announcement"), "KeyAnnouncement")
    assert told == {"format": 1, **entry_fields(decode_announcement(raw("announcement")))}
    relation = read(raw("descriptor"), "Relation")
    assert [one["name"] for one in relation["columns"]] == [
        one.name for one in decode_relation(raw("descriptor")).columns
    ]


def pack() -> tuple[dict[str, Any], bytes, list[tuple[dict[str, Any], bytes]]]:
    """Header, its digest, and the tuples, each with its own bytes."""
    reader = Reader(raw("pack"))
    header = reader.value("PackHeader")
    digest = sha(raw("pack")[: reader.at])
    tuples = []
    for _ in range(reader.long()):
        start = reader.at
        tuples.append((reader.value("Tuple"), raw("pack")[start : reader.at]))
    assert reader.take(1) == b"\0"
    assert reader.at == len(raw("pack"))
    return header, digest, tuples


def test_a_stranger_computes_the_manifests_root_from_the_pack() -> None:
    header, digest, tuples = pack()
    manifest = opened("entry-2-document", "public-key", "AuditEntry")
    leaves = [sha(b"\0", digest, encoded) for _, encoded in tuples]
    assert (digest, leaves[1]) == (raw("pack-digest"), raw("leaf"))
    assert raw("pack").startswith(raw("pack-header"))
    assert tree_root(leaves) == raw("sub-root") == manifest["partitions"][0]["sub_root"]
    assert sha(b"\0", raw("sub-root")) == raw("batch-root") == manifest["merkle_root"]
    assert (header["chain"], header["epoch"], header["batch"]) == (manifest["chain"], 1, manifest["batch"])
    assert header["dek_id"] == manifest["dek_id"]
    ack = opened("acknowledgement-document", "target-public-key", "AuditEntry")
    assert (ack["merkle_root"], ack["ref_hash"]) == (raw("batch-root"), raw("entry-2-hash"))
    assert (ack["chain"], ack["ref_sequence"]) == ("orders.node-a.ack.node-b", 2)


def test_a_stranger_takes_a_frame_off() -> None:
    framed = raw("framed-pack")
    assert (framed[0], int.from_bytes(framed[1:5], "big"), framed[5:]) == (0, 7, raw("pack"))
    assert raw("pack")[0] != 0


def derived(secret: bytes, label: bytes, context: bytes) -> bytes:
    """HKDF-SHA-256 of one block, from HMAC alone."""
    info = len(label).to_bytes(2, "big") + label + context
    return hmac.new(hmac.new(bytes(32), secret, "sha256").digest(), info + b"\1", "sha256").digest()


def test_a_stranger_with_the_kek_opens_the_tuples() -> None:
    told = opened("announcement-document", "public-key", "KeyAnnouncement")
    names = (told["cluster"], told["chain"], told["dek_id"])
    context = b"".join(len(one.encode()).to_bytes(2, "big") + one.encode() for one in names)
    assert context == raw("key-context")
    wrapped = told["wrapped_dek"]
    secret = AESGCM(raw("kek")).decrypt(wrapped[:12], wrapped[12:], context)
    assert derived(secret, b"vsql-sync/v1/dek/commitment", context) == raw("commitment") == told["commitment"]
    cipher = AESGCM(derived(secret, b"vsql-sync/v1/dek/encryption", context))
    header, digest, tuples = pack()
    plain = []
    for number, (one, _) in enumerate(tuples):
        assert one["nonce"][:2] == told["worker"].to_bytes(2, "big")
        assert one["nonce"][4:] == number.to_bytes(8, "big")
        plain.append(cipher.decrypt(one["nonce"], one["encrypted_tuple"], digest + one["clear"]))
    assert plain == [raw("descriptor"), raw("plaintext")]
    assert header["relation"] == sha(raw("descriptor")) == raw("descriptor-hash")
    second, encoded = tuples[1]
    assert (second["clear"], encoded) == (raw("clear"), raw("tuple"))
    assert raw("tuple-aad") == digest + raw("clear")
    assert int.from_bytes(second["clear"][2:10], "big") == 0x16B3700
    assert second["clear"][-1:] == b"I"


def signatures(note: str) -> tuple[str, list[tuple[str, bytes]]]:
    body, _, lines = note.rpartition("\n\n")
    split = [line.removeprefix("— ").split(" ") for line in lines.splitlines()]
    return body + "\n", [(name, base64.b64decode(one)) for name, one in split]


def check_checkpoint(note: str) -> tuple[int, bytes]:
    """Verify both kinds of signature; give size and root."""
    body, found = signatures(note)
    for name, blob in found:
        vkey = text("log-vkey" if name == body.split("\n")[0] else "cosigner-vkey").strip()
        named, key_id, material = vkey.split("+", 2)
        kind, public = base64.b64decode(material)[0], base64.b64decode(material)[1:]
        assert (name, blob[:4].hex()) == (named, key_id)
        assert sha(name.encode(), b"\n", bytes([kind]), public)[:4] == blob[:4]
        message, signature = body.encode(), blob[4:]
        if kind == 4:
            at = int.from_bytes(blob[4:12], "big")
            message, signature = f"cosignature/v1\ntime {at}\n{body}".encode(), blob[12:]
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    origin, size, root = body.splitlines()
    assert origin == "vsql-sync/shop/orders.node-a"
    return int(size), base64.b64decode(root)


def test_a_stranger_verifies_checkpoints_and_proofs() -> None:
    leaves = [sha(b"\0", sha(raw(f"entry-{number}-document"))) for number in (1, 2)]
    assert check_checkpoint(text("checkpoint")) == (2, tree_root(leaves))
    assert check_checkpoint(text("old-checkpoint")) == (1, leaves[0])
    assert raw("tree-root") == tree_root(leaves)
    head, _, note = text("inclusion-proof").partition("\n\n")
    mark, extra, index, sibling = head.splitlines()
    assert (mark, index) == ("c2sp.org/tlog-proof@v1", "index 1")
    assert base64.b64decode(extra.removeprefix("extra ")) == raw("entry-2-document")
    assert sha(b"\1", base64.b64decode(sibling), leaves[1]) == check_checkpoint(note)[1]
    head, _, note = text("consistency-proof").partition("\n\n")
    old, added = head.splitlines()
    assert old == "old 1"
    assert (
        sha(b"\1", check_checkpoint(text("old-checkpoint"))[1], base64.b64decode(added))
        == check_checkpoint(note)[1]
    )


def test_a_stranger_goes_on_behind_a_base() -> None:
    found = json.loads(text("base"))
    assert found["format"] == 1
    head, (size, root) = found["head"], check_checkpoint(found["checkpoint"])
    assert {name for name, _ in signatures(found["checkpoint"])[1]} == {
        "vsql-sync/shop/orders.node-a",
        "vsql-sync/shop/node-b",
    }
    assert (head["sequence"], head["batch"], head["epoch"]) == (size, 1, 1)
    # Two entries are one complete subtree, whose root is the checkpoint's.
    assert [bytes.fromhex(one) for one in head["tree"]] == [root]
    assert bytes.fromhex(head["entry_hash"]) == raw("entry-2-hash")


def test_a_stranger_reads_the_export() -> None:
    export = json.loads(text("export"))
    assert (export["header"]["format"], export["header"]["version"]) == ("vsql-sync-audit-export", 1)
    assert base64.b64decode(export["header"]["keys"][0]["public_key"]) == raw("public-key")
    documents = [base64.b64decode(one["document"]) for one in export["entries"]]
    assert documents == [raw("entry-1-document"), raw("entry-2-document")]
    assert [one["hash"] for one in export["entries"]] == [sha(one).hex() for one in documents]
    assert export["end"]["chains"]["orders.node-a"]["last_hash"] == sha(documents[1]).hex()


def test_a_stranger_verifies_the_evidence_bundle() -> None:
    envelope = json.loads(text("evidence-manifest"))
    kind, payload = envelope["payloadType"].encode(), base64.b64decode(envelope["payload"])
    message = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
    (named,) = envelope["signatures"]
    assert named["keyid"] == text("fingerprint").strip()
    Ed25519PublicKey.from_public_bytes(raw("public-key")).verify(base64.b64decode(named["sig"]), message)
    assert payload == text("evidence-payload").rstrip("\n").encode()
    files = {one["path"]: one for one in json.loads(payload)["files"]}
    for path, shown_as in (
        ("checkpoints/orders.node-a.checkpoint", "checkpoint"),
        ("configuration.toml", "evidence-configuration"),
    ):
        content = text(shown_as).encode()
        assert (files[path]["sha256"], files[path]["size"]) == (sha(content).hex(), len(content))
    assert len(files) == 2


def _page_type(kind: Any, found: dict[str, list[tuple[str, str]]], fixed: dict[str, int]) -> str:
    """An Avro type in the page's words; records inside of it are noted in `found`."""
    if isinstance(kind, str):
        return f"fixed {fixed[kind]}" if kind in fixed else kind
    if kind["type"] == "fixed":
        fixed[kind["name"]] = kind["size"]
        return f"fixed {kind['size']}"
    if kind["type"] == "array":
        return f"array of {_page_type(kind['items'], found, fixed)}"
    name = str(kind["name"].rpartition(".")[2])
    found[name] = [(one["name"], _page_type(one["type"], found, fixed)) for one in kind["fields"]]
    return name


@pytest.mark.parametrize(
    "name",
    [
        "signed_document", "audit_entry", "key_announcement", "pack", "relation", "sequence_value",
        "clock_question", "clock_answer",
    ],
)  # fmt: skip
def test_every_record_of_the_schemas_is_on_the_page_with_its_types(name: str) -> None:
    """A field that is added to a schema and not to the page is found; so is one of another type."""
    from vsql_shared.wire.pack import schema

    found: dict[str, list[tuple[str, str]]] = {}
    whole = _page_type(schema(name), found, {})
    if name == "pack":  # the page has the header, and says that tuples follow
        assert found[whole].pop() == ("tuples", "array of Tuple")
        found["PackHeader"] = found.pop(whole)
    assert found == {record: RECORDS[record] for record in found}
