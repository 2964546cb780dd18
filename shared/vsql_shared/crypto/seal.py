"""Seal and open tuples, a batch's worth at a time. Hot: lists in, lists out, no call per tuple but OpenSSL's.

Not here: how a pack lies in bytes beyond its tuples (wire/pack.py), keys (dek.py). Rules:

* AAD = header digest ‖ clear fields. Nothing of the envelope or of the tuple's clear fields can be moved,
  swapped or replayed without the tuple failing to open.
* Encoded tuple = clear (15) ‖ nonce (12) ‖ Avro length ‖ ciphertext and tag;
  leaf = SHA-256(0x00 ‖ header digest ‖ encoded tuple).
* Nonces are reserved from the key before the first encryption, so an error half-way reuses none.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from itertools import repeat

from cryptography.exceptions import InvalidTag

from vsql_shared.crypto.dek import OpeningKey, SealingKey
from vsql_shared.errors import UnsealError
from vsql_shared.wire.pack import CLEAR_SIZE, SealedTuple, length_prefix

DIGEST_SIZE = 32
_NONCE = struct.Struct(">4sQ")  # prefix of the key and worker, counter


def seal_tuples(
    key: SealingKey, digest: bytes, clears: Sequence[bytes], plaintexts: Sequence[bytes]
) -> tuple[list[bytes], list[bytes]]:
    """Encrypt `plaintexts` under `key`; returns the encoded tuples and their leaves, in order.

    `digest` is the pack's header_digest, `clears` the packed clear fields (pack.CLEAR). Raises
    KeyUnavailableError, before anything is sealed, when the key's limits do not allow all of it.
    """
    count = len(plaintexts)
    if len(digest) != DIGEST_SIZE or len(clears) != count or not {CLEAR_SIZE}.issuperset(map(len, clears)):
        raise ValueError("a header digest of 32 bytes, and 15 bytes of clear fields for each plaintext")
    first = key.reserve(count, sum(map(len, plaintexts)))
    encrypt, sha, prefix_of = key.cipher.encrypt, hashlib.sha256, length_prefix
    leaf_prefix = b"\0" + digest
    nonces = map(_NONCE.pack, repeat(key.nonce_prefix), range(first, first + count))
    records: list[bytes] = []
    leaves: list[bytes] = []
    for clear, nonce, plaintext in zip(clears, nonces, plaintexts, strict=False):
        sealed = encrypt(nonce, plaintext, digest + clear)
        record = clear + nonce + prefix_of(len(sealed)) + sealed
        records.append(record)
        leaves.append(sha(leaf_prefix + record).digest())
    return records, leaves


def open_tuples(key: OpeningKey, tuples: Sequence[SealedTuple]) -> list[bytes]:
    """Decrypt tuples of one pack, in order. Raises UnsealError naming the first that does not open."""
    decrypt = key.cipher.decrypt
    out: list[bytes] = []
    append = out.append
    try:
        for _, _, _, _, nonce, ciphertext, aad, _ in tuples:
            append(decrypt(nonce, ciphertext, aad))
    except InvalidTag as error:
        index = tuples[len(out)].index
        raise UnsealError(
            f"tuple {index} of the batch does not open under data key {key.dek_id}",
            record=f"index {index}",
            hint="it was altered after it was sealed, or moved from another pack",
        ) from error
    return out
