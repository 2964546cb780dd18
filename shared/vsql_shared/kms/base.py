"""What every provider of key-encryption keys (KEKs) offers. A KEK never leaves its provider.

Not here: the choice of a provider (kms/__init__.py). Rules:

* `wrap` uses the newest version of the KEK; `unwrap` any version that still exists, named by kek_id.
* `context` (dek.key_context) says for which cluster, chain and data key a wrapping holds. A mechanism with
  additional authenticated data binds it; one without (AES key wrap) relies on the data key's own HKDF.
* What cannot be unwrapped raises KeyUnavailableError, whatever the reason was: a missing KEK version, a
  refused login, an altered wrapping. No message holds key bytes, a token or a password.
* A service that throttles or does not answer is asked again, a bounded number of times (Retries); then
  TransientError, and the stream waits. A name that can be no key of the provider is a ConfigError.
* `unwrap` asks where the configuration says: an announcement never chooses where a credential goes.
* A provider is used by one thread at a time.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from vsql_shared.errors import KeyUnavailableError

AES_GCM = "AES-256-GCM"  # nonce (12) ‖ ciphertext ‖ tag (16), context as additional authenticated data
AES_KWP = "AES-256-KWP"  # RFC 5649; no context
AES_256_BITS = 256  # what a KEK should have; less is accepted, and `syncctl key inventory` warns of it
LONGEST_PAUSE = 10.0  # seconds between two calls, whatever the service asks for

# NIST SP 800-57 part 1, table 2: modulus and the strength it has at least.
_RSA_STRENGTHS = ((15360, 256), (7680, 192), (3072, 128), (2048, 112))


class Retries(NamedTuple):
    """How long a key service is asked: [encryption.kms] attempts, retry_pause and timeout, in seconds."""

    attempts: int = 4
    pause: float = 0.2
    timeout: float = 10.0

    def pause_after(self, failed: int, asked: float | None = None) -> float:
        """Seconds to wait after the `failed`-th failure; `asked` is what the service wants."""
        return min(LONGEST_PAUSE, max(self.pause * 2.0 ** (failed - 1), asked or 0.0))


class Wrapped(NamedTuple):
    """A wrapped data key, how it was wrapped and under which KEK version; all stand in the announcement."""

    data: bytes
    algorithm: str
    kek_id: str


class KekVersion(NamedTuple):
    """One version of a KEK as `syncctl key inventory` lists it."""

    kek_id: str
    strength_bits: int
    active: bool  # the one that wraps


@runtime_checkable
class KekProvider(Protocol):
    """A place that keeps KEKs: a file (dev), an HSM, a cloud's key service."""

    @property
    def name(self) -> str:
        """As in `encryption.kms.provider` and in announcements."""
        ...

    @property
    def kek_id(self) -> str:
        """The wrapping KEK, with its version where there are versions."""
        ...

    @property
    def strength_bits(self) -> int:
        """Security strength of the wrapping KEK."""
        ...

    def versions(self) -> list[KekVersion]:
        """Every version that can unwrap, the wrapping one included."""
        ...

    def remains(self, kek_id: str) -> bool:
        """Whether a version is there in any state, or can come back: disabled and scheduled ones are there.

        Raises KeyUnavailableError when this provider cannot say so: it is no version of this KEK.
        """
        ...

    def wrap(self, secret: bytes, context: bytes) -> Wrapped:
        """Encrypt a data key under the newest KEK."""
        ...

    def unwrap(self, wrapped: bytes, algorithm: str, context: bytes, kek_id: str) -> bytes:
        """Decrypt a data key under the KEK `kek_id`. Raises KeyUnavailableError."""
        ...

    def close(self) -> None:
        """Give back sessions and forget keys."""
        ...


def weakness(version: KekVersion) -> str:
    """What an operator should know of a KEK weaker than the AES-256 keys it wraps; else nothing."""
    if version.strength_bits >= AES_256_BITS:
        return ""
    return (
        f"KEK {version.kek_id} has {version.strength_bits} bits of strength, the data keys it wraps have"
        f" {AES_256_BITS}: what they seal is as weak as the KEK; use an AES-256 key where the KMS has them"
    )


def rsa_strength(modulus_bits: int) -> int:
    """Security strength of an RSA key. Raises KeyUnavailableError below 2048 bits."""
    for least, strength in _RSA_STRENGTHS:
        if modulus_bits >= least:
            return strength
    raise KeyUnavailableError(
        f"an RSA key of {modulus_bits} bits protects nothing any more", hint="use RSA-3072, better AES-256"
    )


def foreign(kek_id: str, name: str) -> KeyUnavailableError:
    """A version of another KEK than the configured one: whether it is gone cannot be seen here."""
    return KeyUnavailableError(
        f"{kek_id} is no version of {name}, which [encryption.kms] names",
        hint="do this with a configuration that names the KEK's own provider and name",
    )


def context_names(context: bytes) -> tuple[str, str, str]:
    """Cluster, chain and dek_id of a key's context (dek.key_context), for services that take names."""
    parts: list[bytes] = []
    at = 0
    while at < len(context):
        size = int.from_bytes(context[at : at + 2], "big")
        parts.append(context[at + 2 : at + 2 + size])
        at += 2 + size
    try:
        cluster, chain, dek_id = (part.decode() for part in parts)
    except ValueError:  # not three of them, or not UTF-8
        raise KeyUnavailableError("a data key's context is not three names") from None
    if at != len(context):
        raise KeyUnavailableError("a data key's context is cut off")
    return cluster, chain, dek_id
