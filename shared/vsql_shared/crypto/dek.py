"""Data keys: the producer's sealing key with its nonces and limits, the consumer's opening key.

Not here: encryption of tuples (seal.py), announcement and wrapping (announce.py, kms/). Rules:

* A data key (DEK) is 32 random bytes. It encrypts nothing itself: HKDF-SHA-256 (RFC 5869, no salt) gives,
  under different labels, the AES-256-GCM key and a 32-byte commitment. GCM alone does not commit to its key;
  the commitment in the signed announcement does, so one ciphertext cannot open to two plaintexts.
* info = label ‖ context, context = cluster, chain and dek_id, each after its length: a key moved to another
  chain or name opens nothing.
* Nonce (12 bytes) = uint16 worker ‖ 2 random bytes ‖ uint64 counter. The counter alone makes it unique
  within a worker, the worker number across the workers of a key; the random bytes are no part of that.
* A key belongs to one process: it is never stored in clear, never resumed after a restart, and refuses to
  seal after a fork (the child would repeat the parent's nonces).
* At most 2^24 tuples or 64 GiB under one key, then KeyUnavailableError; the producer rotates before that.
"""

from __future__ import annotations

import hmac
import os
import secrets
import struct
import threading
import time
from dataclasses import dataclass

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from vsql_shared.errors import KeyUnavailableError, UnsealError
from vsql_shared.observe.process import lock_memory

ALGORITHM = "AES-256-GCM"
SECRET_SIZE = 32
COMMITMENT_SIZE = 32
MAX_TUPLES = 1 << 24  # far below GCM's bound of 2^32 invocations, so that a rotation late by far is safe
MAX_BYTES = 64 << 30  # plaintext bytes under one key
MAX_WORKER = 0xFFFF
_PREFIX = struct.Struct(">H2s")
_ENCRYPTION_LABEL = b"vsql-sync/v1/dek/encryption"
_COMMITMENT_LABEL = b"vsql-sync/v1/dek/commitment"

_SINCE_BOOT: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def lifetime_clock() -> float:
    """Seconds by which keys grow old; they pass while the machine is suspended, too, where it can say so."""
    return time.clock_gettime(_SINCE_BOOT)


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """How much one key seals: tuples, and plaintext bytes. Settings may lower them, never raise them."""

    max_tuples: int = MAX_TUPLES
    max_bytes: int = MAX_BYTES

    def __post_init__(self) -> None:
        for name, value, most in (
            ("tuples", self.max_tuples, MAX_TUPLES),
            ("bytes", self.max_bytes, MAX_BYTES),
        ):
            if not 0 < value <= most:
                raise KeyUnavailableError(
                    f"limit of {value} {name} for one data key", hint=f"choose 1 to {most} {name}"
                )


def key_context(cluster: str, chain: str, dek_id: str) -> bytes:
    """Canonical bytes of a key's place: each name as uint16 length and UTF-8. For HKDF and the KMS."""
    parts = [name.encode() for name in (cluster, chain, dek_id)]
    if any(len(part) > 0xFFFF for part in parts):
        raise KeyUnavailableError("a cluster, chain or key name is longer than 65535 bytes")
    return b"".join(len(part).to_bytes(2, "big") + part for part in parts)


def _derive(secret: bytes | bytearray, label: bytes, context: bytes) -> bytearray:
    """HKDF-SHA-256 into a buffer that can be zeroed. The label carries its length, as all of the context."""
    out = bytearray(32)
    info = len(label).to_bytes(2, "big") + label + context
    HKDF(hashes.SHA256(), length=32, salt=None, info=info).derive_into(secret, out)
    return out


def _cipher(secret: bytes | bytearray, context: bytes) -> tuple[AESGCM, bytes]:
    """The cipher and the commitment of a data key; the derived key itself is zeroed at once."""
    key = _derive(secret, _ENCRYPTION_LABEL, context)
    try:
        return AESGCM(key), bytes(_derive(secret, _COMMITMENT_LABEL, context))
    finally:
        zero(key)


def zero(buffer: bytearray) -> None:
    """Overwrite a buffer in place."""
    buffer[:] = bytes(len(buffer))


class SealingKey:
    """The producer's data key: a cipher, its next nonce, and how much it has sealed. Thread-safe.

    The secret lies in memory locked against swapping, where the limit allows it.
    `wipe` zeroes the secret and drops the cipher, whose key schedule OpenSSL cleanses when it is freed.
    Out of reach are copies OpenSSL and HKDF make inside of their calls, and the bytes object a KMS client
    is given to wrap: those pages are freed, not overwritten.
    """

    def __init__(
        self,
        *,
        secret: bytes,
        dek_id: str,
        created_at: int,
        cluster: str,
        chain: str,
        worker: int,
        nonce_salt: bytes,
        limits: KeyLimits,
    ) -> None:
        """For tests with known randomness; everything else calls `generate`."""
        if not 0 <= worker <= MAX_WORKER:
            raise KeyUnavailableError(f"worker number {worker} is not in 0 to {MAX_WORKER}")
        if len(secret) != SECRET_SIZE or len(nonce_salt) != 2:
            raise KeyUnavailableError("a data key has 32 bytes and a nonce salt of 2")
        self.dek_id, self.created_at, self.worker, self.limits = dek_id, created_at, worker, limits
        self.cluster, self.chain = cluster, chain
        self.tuples_used = self.bytes_used = 0
        self.nonce_prefix = _PREFIX.pack(worker, nonce_salt)
        self._secret = bytearray(secret)
        lock_memory(self._secret)  # best effort: out of swap where the limit allows
        self._aead: AESGCM | None
        self._aead, self.commitment = _cipher(self._secret, key_context(cluster, chain, dek_id))
        self._process = os.getpid()
        self._lock = threading.Lock()

    @classmethod
    def generate(cls, cluster: str, chain: str, worker: int, limits: KeyLimits) -> SealingKey:
        """A new random key, for this process."""
        return cls(
            secret=secrets.token_bytes(SECRET_SIZE),
            dek_id=f"dek-{secrets.token_hex(16)}",
            created_at=time.time_ns() // 1000,
            cluster=cluster,
            chain=chain,
            worker=worker,
            nonce_salt=secrets.token_bytes(2),
            limits=limits,
        )

    @property
    def secret(self) -> bytes:
        """A copy of the clear key, for wrapping by a KMS and nothing else."""
        if self._aead is None:
            raise self._wiped()
        return bytes(self._secret)

    @property
    def cipher(self) -> AESGCM:
        """For seal.py, with nonces from `reserve` only."""
        if self._aead is None:
            raise self._wiped()
        return self._aead

    def room_for(self, tuples: int, nbytes: int) -> bool:
        """Whether so much more stays within the limits; if not, rotate."""
        return (
            self.tuples_used + tuples <= self.limits.max_tuples
            and self.bytes_used + nbytes <= self.limits.max_bytes
        )

    def reserve(self, tuples: int, nbytes: int) -> int:
        """Take `tuples` counter values for good and return the first; used or not, none comes again."""
        if os.getpid() != self._process:
            raise KeyUnavailableError(
                f"data key {self.dek_id} belongs to another process", hint="generate one"
            )
        with self._lock:
            if self._aead is None:
                raise self._wiped()
            if not self.room_for(tuples, nbytes):
                raise KeyUnavailableError(
                    f"data key {self.dek_id} has sealed {self.tuples_used} tuples and {self.bytes_used}"
                    f" bytes; {tuples} tuples and {nbytes} bytes more pass its limits",
                    hint="rotate the key first; raise the limits in [encryption.dek] if they were lowered",
                )
            first = self.tuples_used
            self.tuples_used += tuples
            self.bytes_used += nbytes
            return first

    def wipe(self) -> None:
        """Forget the key, as far as Python can (see the class); later use raises KeyUnavailableError."""
        with self._lock:
            zero(self._secret)
            self._aead = None

    def _wiped(self) -> KeyUnavailableError:
        return KeyUnavailableError(f"data key {self.dek_id} was wiped", hint="generate another one")


class OpeningKey:
    """The consumer's side of a data key; keeps the cipher only, not the secret."""

    def __init__(self, secret: bytes, cluster: str, chain: str, dek_id: str, commitment: bytes) -> None:
        """Raises UnsealError when `secret` is not the key the signed announcement committed to."""
        self.cluster, self.chain, self.dek_id = cluster, chain, dek_id
        self.commitment = commitment
        cipher, derived = _cipher(secret, key_context(cluster, chain, dek_id))
        if len(secret) != SECRET_SIZE or not hmac.compare_digest(derived, commitment):
            raise UnsealError(
                f"data key {dek_id} of chain {chain} is not the one its announcement commits to",
                hint="the announcement was altered, or the KMS unwrapped it with another key",
            )
        self._aead: AESGCM | None = cipher

    @property
    def cipher(self) -> AESGCM:
        """For seal.py."""
        if self._aead is None:
            raise KeyUnavailableError(
                f"data key {self.dek_id} was wiped", hint="unwrap its announcement again"
            )
        return self._aead

    def wipe(self) -> None:
        """Drop the cipher; OpenSSL cleanses its key schedule. The secret itself was the caller's to drop."""
        self._aead = None
