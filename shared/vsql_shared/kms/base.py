"""What every provider of key-encryption keys (KEKs) offers. A KEK never leaves its provider.

Not here: the choice of a provider (kms/__init__.py). Rules:

* `wrap` uses the newest version of the KEK; `unwrap` any version that still exists, named by kek_id.
* `context` (dek.key_context) says for which cluster, chain and data key a wrapping holds. A mechanism with
  additional authenticated data binds it; one without (AES key wrap) relies on the data key's own HKDF.
* What cannot be unwrapped raises KeyUnavailableError, whatever the reason was: a missing KEK version, a
  refused login, an altered wrapping. No message holds key bytes.
* A provider is used by one thread at a time.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

AES_GCM = "AES-256-GCM"  # nonce (12) ‖ ciphertext ‖ tag (16), context as additional authenticated data
AES_KWP = "AES-256-KWP"  # RFC 5649; no context


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

    def wrap(self, secret: bytes, context: bytes) -> Wrapped:
        """Encrypt a data key under the newest KEK."""
        ...

    def unwrap(self, wrapped: bytes, algorithm: str, context: bytes, kek_id: str) -> bytes:
        """Decrypt a data key under the KEK `kek_id`. Raises KeyUnavailableError."""
        ...

    def close(self) -> None:
        """Give back sessions and forget keys."""
        ...
