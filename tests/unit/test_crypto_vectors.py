"""Test vectors: the published ones of the primitives, and our own of packs and announcements, format 1.

Our own are checked twice: by our code, and by plain HMAC, plain fastavro and the bare cipher.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import json
from importlib import resources
from pathlib import Path
from typing import Any

import fastavro
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import aes_key_unwrap_with_padding, aes_key_wrap_with_padding

from vsql_shared.changes import TableName, Transaction
from vsql_shared.crypto.announce import decode_announcement, encode_announcement, unwrap
from vsql_shared.crypto.dek import KeyLimits, OpeningKey, SealingKey, key_context
from vsql_shared.crypto.seal import open_tuples, seal_tuples
from vsql_shared.crypto.signing import PinnedKey, TrustStore, fingerprint, load_signer
from vsql_shared.kms.file import FileKek
from vsql_shared.wire.pack import (
    CLEAR,
    PackHeader,
    decode_header,
    decode_relation,
    decode_tuples,
    encode_header,
    encode_pack,
    encode_relation,
    header_digest,
    relation_hash,
    schema,
)

VECTORS = Path(__file__).parents[1] / "vectors"
PUBLISHED = json.loads((VECTORS / "published_crypto.json").read_text())
OURS = json.loads((VECTORS / "pack_v1.json").read_text())
unhex = bytes.fromhex


def cases(name: str) -> list[dict[str, bytes]]:
    return [{field: unhex(value) for field, value in case.items()} for case in PUBLISHED[name]["cases"]]


def hkdf(ikm: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869 from HMAC alone."""
    pseudo_random = hmac.new(salt or bytes(32), ikm, "sha256").digest()
    out = block = b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.new(pseudo_random, block + info + bytes([counter]), "sha256").digest()
        out += block
    return out[:length]


@pytest.mark.parametrize("case", cases("aes_256_gcm"))
def test_aes_256_gcm_agrees_with_its_authors(case: dict[str, bytes]) -> None:
    cipher = AESGCM(case["key"])
    assert cipher.encrypt(case["nonce"], case["plaintext"], case["aad"]) == case["sealed"]
    assert cipher.decrypt(case["nonce"], case["sealed"], case["aad"]) == case["plaintext"]


@pytest.mark.parametrize("case", cases("hkdf_sha_256"))
def test_the_hkdf_of_this_test_agrees_with_rfc_5869(case: dict[str, bytes]) -> None:
    assert hkdf(case["ikm"], case["salt"], case["info"], 42) == case["okm"]


@pytest.mark.parametrize("case", cases("ed25519"))
def test_a_signer_and_the_trust_store_agree_with_rfc_8032(case: dict[str, bytes], tmp_path: Path) -> None:
    pem = Ed25519PrivateKey.from_private_bytes(case["secret"]).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = tmp_path / "rfc.key"
    path.write_bytes(pem)
    signer = load_signer(path, "node-a", strict=False)
    assert signer.public_key == case["public"]
    assert signer.sign(case["message"]) == case["signature"]
    name = fingerprint(case["public"])
    trust = TrustStore([PinnedKey("node-a", case["public"], name, False)])
    trust.verify("node-a", name, case["signature"], case["message"])


@pytest.mark.parametrize("case", cases("aes_kwp"))
def test_key_wrap_with_padding_agrees_with_rfc_5649(case: dict[str, bytes]) -> None:
    assert aes_key_wrap_with_padding(case["kek"], case["plaintext"]) == case["wrapped"]
    assert aes_key_unwrap_with_padding(case["kek"], case["wrapped"]) == case["plaintext"]


def sealing_key() -> SealingKey:
    key = OURS["key"]
    return SealingKey(
        secret=unhex(key["secret"]),
        dek_id=key["dek_id"],
        created_at=key["created_at"],
        cluster=key["cluster"],
        chain=key["chain"],
        worker=key["worker"],
        nonce_salt=unhex(key["nonce_salt"]),
        limits=KeyLimits(),
    )


def pack_header() -> PackHeader:
    pack, key = OURS["pack"], OURS["key"]
    return PackHeader(
        key["cluster"],
        key["chain"],
        pack["origin"],
        TableName(pack["schema_name"], pack["table_name"]),
        pack["partition"],
        pack["epoch"],
        pack["batch"],
        key["dek_id"],
        unhex(OURS["relation"]["hash"]),
        tuple(Transaction(*transaction) for transaction in pack["transactions"]),
    )


def test_sealing_gives_the_stored_bytes() -> None:
    pack = OURS["pack"]
    head = encode_header(pack_header())
    assert head == unhex(pack["header"])
    assert header_digest(head) == unhex(pack["digest"]) == hashlib.sha256(head).digest()
    clears = [CLEAR.pack(t["tx"], t["lsn"], t["index"], t["op"].encode()) for t in pack["tuples"]]
    plaintexts = [unhex(t["plaintext"]) for t in pack["tuples"]]
    records, leaves = seal_tuples(sealing_key(), header_digest(head), clears, plaintexts)
    assert records == [unhex(record) for record in pack["records"]]
    assert leaves == [unhex(leaf) for leaf in pack["leaves"]]
    assert encode_pack(head, records) == unhex(pack["message"])


def test_opening_the_stored_bytes_gives_the_plaintexts() -> None:
    pack, key = OURS["pack"], OURS["key"]
    message = unhex(pack["message"])
    header, offset = decode_header(message)
    assert header == pack_header()
    tuples = decode_tuples(message, offset, header_digest(message[:offset]))
    assert [[t.tx, t.lsn, t.index, chr(t.op)] for t in tuples] == [
        [t["tx"], t["lsn"], t["index"], t["op"]] for t in pack["tuples"]
    ]
    assert [t.leaf for t in tuples] == [unhex(leaf) for leaf in pack["leaves"]]
    opening = OpeningKey(
        unhex(key["secret"]), key["cluster"], key["chain"], key["dek_id"], unhex(key["commitment"])
    )
    assert open_tuples(opening, tuples) == [unhex(t["plaintext"]) for t in pack["tuples"]]


def test_the_stored_pack_opens_with_nothing_but_fastavro_hmac_and_the_bare_cipher() -> None:
    pack, key = OURS["pack"], OURS["key"]
    context = b"".join(
        len(name).to_bytes(2, "big") + name.encode() for name in (key["cluster"], key["chain"], key["dek_id"])
    )
    assert context == unhex(key["context"]) == key_context(key["cluster"], key["chain"], key["dek_id"])

    def derived(label: bytes) -> bytes:
        return hkdf(unhex(key["secret"]), b"", len(label).to_bytes(2, "big") + label + context, 32)

    assert derived(b"vsql-sync/v1/dek/commitment") == unhex(key["commitment"])
    cipher = AESGCM(derived(b"vsql-sync/v1/dek/encryption"))
    record = read_whole(unhex(pack["message"]))
    for index, (sealed, expected) in enumerate(zip(record["tuples"], pack["tuples"], strict=True)):
        assert sealed["nonce"] == unhex(f"{key['worker']:04x}{key['nonce_salt']}{index:016x}")
        aad = unhex(pack["digest"]) + sealed["clear"]
        assert cipher.decrypt(sealed["nonce"], sealed["encrypted_tuple"], aad) == unhex(expected["plaintext"])


def read_whole(message: bytes) -> dict[str, Any]:
    """A pack as any Avro reader sees it, with the published schema alone."""
    text = resources.files("vsql_schemas").joinpath("avro/pack.avsc").read_text()
    stream = io.BytesIO(message)
    record: Any = fastavro.schemaless_reader(stream, fastavro.parse_schema(json.loads(text)), None)
    assert stream.read() == b""
    return dict(record)


def test_the_stored_descriptor_is_what_the_pack_names() -> None:
    encoded = unhex(OURS["relation"]["encoded"])
    assert relation_hash(encoded) == unhex(OURS["relation"]["hash"])
    relation = decode_relation(encoded)
    assert encode_relation(relation) == encoded
    assert [column.name for column in relation.columns] == ["id", "note"]
    assert unhex(OURS["pack"]["tuples"][0]["plaintext"]) == encoded


def test_the_stored_announcement_unwraps_to_the_stored_key(tmp_path: Path) -> None:
    stored, key = OURS["announcement"], OURS["key"]
    path = tmp_path / "kek"
    path.write_text(stored["kek_file"])
    path.chmod(0o600)
    provider = FileKek(path, "vector-kek")
    encoded = unhex(stored["encoded"])
    said = decode_announcement(encoded)
    assert encode_announcement(said) == encoded
    assert said.wrapped_dek == unhex(stored["wrapped_gcm"])
    raw: Any = fastavro.schemaless_reader(io.BytesIO(encoded), schema("key_announcement"), None)
    assert (raw["dek_id"], raw["kek_id"], raw["format"]) == (key["dek_id"], stored["kek_id"], 1)
    assert unwrap(said, provider).commitment == unhex(key["commitment"])
    padded = unhex(stored["wrapped_kwp_by_version_2"])
    assert provider.unwrap(padded, "AES-256-KWP", b"any", "vector-kek/2") == unhex(key["secret"])
