"""KEKs in Google Cloud KMS: the key never leaves the service.

Not here: making keys and roles (docs/operations/keys.md). Plain HTTPS, and google-auth (the extra `gcp`) for
credentials. Not yet run against the live service by us: requests and answers are pure functions below, tested
with published values. Rules:

* kek_id is `projects/…/locations/…/keyRings/…/cryptoKeys/…`; in announcements `/cryptoKeyVersions/<n>`
  follows. The key's primary version wraps, all enabled ones unwrap.
* The key's context is the additional authenticated data.
* CRC32C of everything sent and received is compared, as Google asks of its clients: a damaged wrapping would
  only show when it is needed.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from typing import Any, TypeVar

import google.auth
import google.auth.exceptions
import google.auth.transport.requests

from vsql_shared.errors import ConfigError, DecodeError, KeyUnavailableError, TransientError
from vsql_shared.kms.base import AES_256_BITS, KekVersion, Retries, Wrapped, foreign
from vsql_shared.kms.https import Https, Request

_T = TypeVar("_T")
ALGORITHM = "GOOGLE_SYMMETRIC_ENCRYPTION"  # AES-256-GCM; the blob names version and nonce itself
ADDRESS = "https://cloudkms.googleapis.com"
_SCOPE = "https://www.googleapis.com/auth/cloudkms"
_PART = r"[A-Za-z0-9_.:-]{1,63}"
_KEY = re.compile(rf"projects/{_PART}/locations/{_PART}/keyRings/{_PART}/cryptoKeys/{_PART}")
_VERSION = re.compile(rf"({_KEY.pattern})/cryptoKeyVersions/([0-9]{{1,9}})")
_MAX_PAGES = 100  # of 100 versions each
_ALTERED = "the wrapping was altered, or made for another chain, or under another key"
_GRANT = "grant what docs/operations/keys.md lists to the service account of this node"


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)  # noqa: PLW2901  # eight steps of one byte
        table.append(value)
    return table


_CRC = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli, RFC 3720): `zlib.crc32` has another polynomial."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def check_kek_id(kek_id: str) -> str:
    """The same. Raises ConfigError where it can name no key of Google Cloud KMS."""
    if _KEY.fullmatch(kek_id) is None:
        raise ConfigError(
            f"encryption.kms.kek_id = {kek_id!r} names no key of Google Cloud KMS",
            hint='write "projects/…/locations/…/keyRings/…/cryptoKeys/…", without a version',
        )
    return kek_id


def key_request(key: str) -> Request:
    """Ask what the key is."""
    return Request("GET", f"{ADDRESS}/v1/{key}")


def versions_request(key: str, page_token: str = "") -> Request:  # an empty token is the first page
    """Ask for a page of the key's enabled versions."""
    more = f"&pageToken={page_query(page_token)}" if page_token else ""
    return Request("GET", f"{ADDRESS}/v1/{key}/cryptoKeyVersions?pageSize=100&filter=state%3DENABLED{more}")


def page_query(token: str) -> str:
    """A page token for a query. Raises DecodeError when it is no such thing."""
    if re.fullmatch(r"[A-Za-z0-9_.~=/+-]{1,4096}", token) is None:
        raise DecodeError("the service gives a page token that is none")
    return token.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")


def encrypt_request(key: str, secret: bytes, aad: bytes) -> Request:
    """Wrap under the primary version."""
    return Request("POST", f"{ADDRESS}/v1/{key}:encrypt", _checked("plaintext", secret, aad))


def decrypt_request(key: str, ciphertext: bytes, aad: bytes) -> Request:
    """Unwrap; the ciphertext names its version."""
    return Request("POST", f"{ADDRESS}/v1/{key}:decrypt", _checked("ciphertext", ciphertext, aad))


def _checked(name: str, data: bytes, aad: bytes) -> dict[str, str]:
    """Data and context with their checksums; a 64-bit number is text in Google's JSON."""
    return {
        name: base64.b64encode(data).decode(),
        f"{name}Crc32c": str(crc32c(data)),
        "additionalAuthenticatedData": base64.b64encode(aad).decode(),
        "additionalAuthenticatedDataCrc32c": str(crc32c(aad)),
    }


def parse_encrypted(body: dict[str, Any]) -> tuple[bytes, str]:
    """(ciphertext, name of the version). Raises DecodeError: damaged on the way, either way."""
    checks = ("verifiedPlaintextCrc32c", "verifiedAdditionalAuthenticatedDataCrc32c")
    if any(body.get(check) is not True for check in checks):
        raise DecodeError("the service did not get what was sent: it confirms no checksum")
    name = body.get("name")
    if not isinstance(name, str) or _VERSION.fullmatch(name) is None:
        raise DecodeError("the service names no version of the key")
    return _received(body, "ciphertext"), name


def parse_decrypted(body: dict[str, Any]) -> bytes:
    """The unwrapped key. Raises DecodeError."""
    return _received(body, "plaintext")


def _received(body: dict[str, Any], field: str) -> bytes:
    text, said = body.get(field), body.get(f"{field}Crc32c")
    try:
        data = base64.b64decode(text if isinstance(text, str) else "!", validate=True)
    except (binascii.Error, ValueError):
        raise DecodeError(f"the service's answer holds no {field}") from None
    if str(said) != str(crc32c(data)):
        raise DecodeError(f"the service's {field} was damaged on the way: its checksum differs")
    return data


def parse_key(body: dict[str, Any]) -> str:
    """The version that wraps, from the answer to `key_request`.

    Raises DecodeError, KeyUnavailableError (a key that cannot wrap).
    """
    purpose, primary = body.get("purpose"), body.get("primary")
    if purpose != "ENCRYPT_DECRYPT":
        raise KeyUnavailableError(
            f"the key's purpose is {purpose!r}",
            hint="a KEK is a key for symmetric encryption (ENCRYPT_DECRYPT)",
        )
    if not isinstance(primary, dict) or not isinstance(primary.get("name"), str):
        raise KeyUnavailableError("the key has no primary version", hint="set one, so that it can wrap")
    if primary.get("state") != "ENABLED":
        raise KeyUnavailableError(
            f"the key's primary version is {primary.get('state')}",
            hint="enable it, or make another one primary",
        )
    if primary.get("algorithm") not in (ALGORITHM, "EXTERNAL_SYMMETRIC_ENCRYPTION"):
        raise DecodeError(f"the key's primary version is for {primary.get('algorithm')!r}")
    return str(primary["name"])


def parse_versions(body: dict[str, Any]) -> tuple[list[str], str]:
    """(names of enabled versions, token of the next page or nothing). Raises DecodeError."""
    found, token = body.get("cryptoKeyVersions", []), body.get("nextPageToken", "")
    if not isinstance(found, list) or not isinstance(token, str):
        raise DecodeError("the service's answer lists no versions")
    names = [one.get("name") for one in found if isinstance(one, dict) and one.get("state") == "ENABLED"]
    if not all(isinstance(name, str) and _VERSION.fullmatch(name) for name in names):
        raise DecodeError("the service names a version that is none")
    return [str(name) for name in names], token


def parse_state(body: dict[str, Any]) -> str:
    """A version's state. Raises DecodeError."""
    state = body.get("state")
    if not isinstance(state, str):
        raise DecodeError("the service's answer names no state of the version")
    return state


def own_version(key: str, name: str) -> str:
    """The same, if it is a version of the key. Raises KeyUnavailableError.

    What is wrapped under another name every target refuses, and long after.
    """
    found = _VERSION.fullmatch(name)
    if found is None or found[1] != key:
        raise KeyUnavailableError(
            f"Google Cloud KMS speaks of {name[:300]!r}, asked for {key}",
            hint="write encryption.kms.kek_id as the service does, or see what stands in between",
        )
    return name


def version_number(name: str) -> int:
    """Of a version's name, for order."""
    return int(name.rpartition("/")[2])


class GcpKek:
    """A key of Google Cloud KMS. It is looked up at construction, so a wrong setting shows at start."""

    name = "gcp-kms"

    def __init__(self, kek_id: str, *, retries: Retries | None = None) -> None:
        """Raises ConfigError, KeyUnavailableError (credentials, roles, key), TransientError."""
        self._key = check_kek_id(kek_id)
        self._https = Https("Google Cloud KMS", ADDRESS, retries or Retries())
        self._credentials = _credentials()
        self._look()

    @property
    def kek_id(self) -> str:
        """Name of the version that wraps."""
        return self._look()

    @property
    def strength_bits(self) -> int:
        """AES-256-GCM, whatever the key's protection level."""
        return AES_256_BITS

    def versions(self) -> list[KekVersion]:
        """All enabled versions."""
        primary = self._look()
        names: list[str] = []
        token = ""
        for _ in range(_MAX_PAGES):
            page, token = self._ask(
                "listing versions", versions_request(self._key, token), _GRANT, parse_versions
            )
            names += page
            if not token:
                break
        return [KekVersion(name, AES_256_BITS, name == primary) for name in sorted(names, key=version_number)]

    def remains(self, kek_id: str) -> bool:
        """Whether its material is there: one whose destruction is scheduled can be restored."""
        found = _VERSION.fullmatch(kek_id)
        if found is None or found[1] != self._key:
            raise foreign(kek_id, self._key)
        request = Request("GET", f"{ADDRESS}/v1/{kek_id}")
        return self._ask(f"looking up {kek_id}", request, _GRANT, parse_state) != "DESTROYED"

    def wrap(self, secret: bytes, context: bytes) -> Wrapped:
        """Encrypt a data key at Google, under the primary version."""
        request = encrypt_request(self._key, secret, context)
        data, version = self._ask("wrapping a data key", request, _GRANT, parse_encrypted)
        return Wrapped(data, ALGORITHM, own_version(self._key, version))

    def unwrap(self, wrapped: bytes, algorithm: str, context: bytes, kek_id: str) -> bytes:
        """Decrypt a data key at Google."""
        if algorithm != ALGORITHM:
            raise KeyUnavailableError(
                f"wrapping algorithm {algorithm!r} is unknown", hint=f"expected {ALGORITHM}"
            )
        found = _VERSION.fullmatch(kek_id)
        if found is None or found[1] != self._key:
            raise KeyUnavailableError(
                f"{kek_id!r} is no version of {self._key}",
                hint="both nodes need the same encryption.kms.kek_id",
            )
        what = f"unwrapping a data key under {kek_id}"
        return self._ask(what, decrypt_request(self._key, wrapped, context), _ALTERED, parse_decrypted)

    def close(self) -> None:
        """Nothing is held open."""

    def _look(self) -> str:
        found = self._ask(f"looking up {self._key}", key_request(self._key), _GRANT, parse_key)
        return own_version(self._key, found)

    def _ask(self, what: str, request: Request, hint: str, parse: Callable[[dict[str, Any]], _T]) -> _T:
        answer = self._https.send(request, {"Authorization": f"Bearer {self._token()}"})
        return self._https.read(what, answer, parse, hint, _GRANT)

    def _token(self) -> str:
        try:
            if not self._credentials.valid:
                self._credentials.refresh(google.auth.transport.requests.Request())
        except google.auth.exceptions.TransportError as error:
            raise TransientError("no connection to Google for a token", hint="it is tried again") from error
        except google.auth.exceptions.GoogleAuthError as error:
            raise _no_credentials(error) from error
        return str(self._credentials.token)


def _credentials() -> Any:
    try:
        found, _ = google.auth.default(scopes=[_SCOPE])
    except google.auth.exceptions.GoogleAuthError as error:
        raise _no_credentials(error) from error
    return found


def _no_credentials(error: Exception) -> KeyUnavailableError:
    return KeyUnavailableError(
        f"no credentials for Google Cloud KMS ({type(error).__name__})",
        hint="give this node Application Default Credentials, such as GOOGLE_APPLICATION_CREDENTIALS",
    )
