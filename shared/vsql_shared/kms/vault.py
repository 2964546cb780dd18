"""KEKs in the transit engine of HashiCorp Vault or OpenBao: the key never leaves the server.

Not here: the server and the login (transit.py), making keys and policies (docs/operations/keys.md). Plain
HTTPS, no library. Tested with a real server where there is one (tests/services/test_kms_vault.py). Rules:

* kek_id is `<mount>/<key>`; in announcements `<mount>/<key>/<version>`. The newest version wraps; those from
  min_decryption_version on unwrap.
* An AEAD key (aes256-gcm96, aes128-gcm96, chacha20-poly1305) takes the key's context as associated data. RSA
  keys take none: there the data key's HKDF binds it. Derived keys are refused.
* A wrapping is the text the server gives, `vault:v<version>:<base64>`; its version must be kek_id's.
* A wrapping that an RSA key does not open is refused with status 500, as a failure of the server would be.
  Its text tells them apart, or an altered wrapping would look like a server to wait for.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any, NamedTuple

from vsql_shared.errors import DecodeError, KeyUnavailableError
from vsql_shared.kms.base import KekVersion, Wrapped, foreign, rsa_strength
from vsql_shared.kms.https import Answer, Request, refusal_text
from vsql_shared.kms.transit import (
    GRANT,
    Transit,
    TransitKey,
    is_version,
    key_request,
    split_key,
    to_base64,
    use_request,
)

_CIPHERTEXT = re.compile(r"vault:v([0-9]{1,9}):[A-Za-z0-9+/=]+")
_AEAD = {"aes256-gcm96": 256, "chacha20-poly1305": 256, "aes128-gcm96": 128}
_RSA = re.compile(r"rsa-([0-9]{4,5})")
_ALGORITHM = "vault-transit:"  # the key's type follows
_RSA_REFUSES = "failed to RSA decrypt the ciphertext"
_ALTERED = "the wrapping was altered, or made for another chain, or under another KEK of this name"


class VaultKey(NamedTuple):
    """What the server says of a key."""

    type: str
    strength_bits: int
    versions: tuple[int, ...]
    """Those that unwrap, ascending; the last one wraps."""

    @property
    def binds_context(self) -> bool:
        """Whether this type takes associated data."""
        return self.type in _AEAD


def split_kek_id(kek_id: str) -> TransitKey:
    """The key of a configured kek_id. Raises ConfigError."""
    return split_key("encryption.kms.kek_id", kek_id)


def encrypt_request(address: str, key: TransitKey, secret: bytes, aad: bytes | None) -> Request:
    """Wrap under the newest version."""
    return use_request(address, key, "encrypt", {"plaintext": to_base64(secret)} | _bound(aad))


def decrypt_request(address: str, key: TransitKey, ciphertext: str, aad: bytes | None) -> Request:
    """Unwrap; the ciphertext names its version."""
    return use_request(address, key, "decrypt", {"ciphertext": ciphertext} | _bound(aad))


def _bound(aad: bytes | None) -> dict[str, object]:
    return {} if aad is None else {"associated_data": to_base64(aad)}


def parse_key(body: dict[str, Any]) -> VaultKey:
    """The answer to `key_request`. Raises DecodeError, KeyUnavailableError (a key that cannot wrap)."""
    data = body.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("type"), str):
        raise DecodeError("the server's answer describes no key")
    kind, least = data["type"], data.get("min_decryption_version")
    keys = data.get("keys")
    if not isinstance(keys, dict) or not isinstance(least, int) or not all(map(is_version, keys)):
        raise DecodeError("the server's answer names no versions of the key")
    if data.get("derived"):
        raise KeyUnavailableError(
            "the transit key is derived: each use would need a context of its own",
            hint="make a key with derived=false",
        )
    rsa = _RSA.fullmatch(kind)
    if kind not in _AEAD and rsa is None:
        raise KeyUnavailableError(
            f"a transit key of type {kind!r} cannot wrap data keys", hint="make one of type aes256-gcm96"
        )
    strength = rsa_strength(int(rsa[1])) if rsa else _AEAD[kind]
    versions = tuple(sorted(number for number in map(int, keys) if number >= least))
    if not versions:
        raise KeyUnavailableError("the transit key has no version left that unwraps")
    return VaultKey(kind, strength, versions)


def parse_least_available(body: dict[str, Any]) -> int:
    """The oldest version whose material the server has: those before were trimmed. Raises DecodeError."""
    data = body.get("data")
    least = data.get("min_available_version", 0) if isinstance(data, dict) else None
    if type(least) is not int:
        raise DecodeError("the server's answer does not say which versions are available")
    return least


def parse_ciphertext(text: object) -> tuple[bytes, int]:
    """A wrapping and its version. Raises DecodeError."""
    found = _CIPHERTEXT.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise DecodeError("not a wrapping of the transit engine")
    return found[0].encode(), int(found[1])


def parse_encrypted(body: dict[str, Any]) -> tuple[bytes, int]:
    """The answer to `encrypt_request`: wrapping and version. Raises DecodeError."""
    data = body.get("data")
    return parse_ciphertext(data.get("ciphertext") if isinstance(data, dict) else None)


def parse_plaintext(body: dict[str, Any]) -> bytes:
    """The answer to `decrypt_request`. Raises DecodeError."""
    data = body.get("data")
    text = data.get("plaintext") if isinstance(data, dict) else None
    try:
        return base64.b64decode(text if isinstance(text, str) else "!", validate=True)
    except (binascii.Error, ValueError):
        raise DecodeError("the server's answer holds no unwrapped key") from None


def does_not_decrypt(answer: Answer) -> bool:
    """Whether the server's failure is that its RSA key does not open this wrapping, now or ever."""
    return answer.status == 500 and _RSA_REFUSES in refusal_text(answer)


class VaultKek:
    """A transit key. It is looked up at construction, so a wrong setting shows at start."""

    name = "vault"

    def __init__(self, kek_id: str, transit: Transit) -> None:
        """Raises ConfigError, KeyUnavailableError (server, token, policy, key), TransientError."""
        self._key, self._transit = split_kek_id(kek_id), transit
        self._look()

    @property
    def kek_id(self) -> str:
        """`<mount>/<key>/<version>` of the version that wraps."""
        return self._id_of(self._look().versions[-1])

    @property
    def strength_bits(self) -> int:
        """By the key's type."""
        return self._look().strength_bits

    def versions(self) -> list[KekVersion]:
        """All versions the server still unwraps with."""
        key = self._look()
        return [
            KekVersion(self._id_of(number), key.strength_bits, number == key.versions[-1])
            for number in key.versions
        ]

    def remains(self, kek_id: str) -> bool:
        """Whether it was not trimmed: one below min_decryption_version is archived and can come back."""
        name, _, version = kek_id.rpartition("/")
        if name != str(self._key) or not is_version(version):
            raise foreign(kek_id, str(self._key))
        request = key_request(self._transit.address, self._key)
        least = self._transit.ask(f"looking up {self._key}", request, GRANT, parse_least_available)
        return int(version) >= least

    def wrap(self, secret: bytes, context: bytes) -> Wrapped:
        """Encrypt a data key at the server, under the newest version."""
        key = self._look()
        aad = context if key.binds_context else None
        request = encrypt_request(self._transit.address, self._key, secret, aad)
        wrapped, version = self._transit.ask("wrapping a data key", request, GRANT, parse_encrypted)
        return Wrapped(wrapped, _ALGORITHM + key.type, self._id_of(version))

    def unwrap(self, wrapped: bytes, algorithm: str, context: bytes, kek_id: str) -> bytes:
        """Decrypt a data key at the server, under the version that wrapped it."""
        kind = algorithm.removeprefix(_ALGORITHM)
        if not algorithm.startswith(_ALGORITHM) or not (kind in _AEAD or _RSA.fullmatch(kind)):
            raise KeyUnavailableError(
                f"wrapping algorithm {algorithm!r} is unknown", hint=f"expected {_ALGORITHM} and a key type"
            )
        try:
            ciphertext, version = parse_ciphertext(wrapped.decode("ascii", "replace"))
        except DecodeError as error:
            raise KeyUnavailableError(f"a data key under {kek_id}: {error.message}", hint=_ALTERED) from error
        if self._id_of(version) != kek_id:
            raise KeyUnavailableError(
                f"a data key is wrapped under {self._id_of(version)}, its announcement says {kek_id}",
                hint="both nodes need the same encryption.kms.kek_id",
            )
        aad = context if kind in _AEAD else None
        request = decrypt_request(self._transit.address, self._key, ciphertext.decode(), aad)
        what = f"unwrapping a data key under {kek_id}"
        return self._transit.ask(what, request, _ALTERED, parse_plaintext, does_not_decrypt)

    def close(self) -> None:
        """Forget the token; the next use reads it again."""
        self._transit.forget()

    def _id_of(self, version: int) -> str:
        return f"{self._key}/{version}"

    def _look(self) -> VaultKey:
        request = key_request(self._transit.address, self._key)
        hint = "make the key first; check address, namespace and mount"
        return self._transit.ask(f"looking up {self._key}", request, hint, parse_key)
