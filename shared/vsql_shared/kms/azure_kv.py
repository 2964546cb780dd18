"""KEKs in Azure Key Vault or Managed HSM: the key never leaves the service.

Not here: making keys and role assignments (docs/operations/keys.md). Plain HTTPS, and azure-identity (the
extra `azure`) for credentials. Not yet run against the live service by us: requests and answers are pure
functions below, tested with published values. Rules:

* kek_id is `<vault>/keys/<key>`, where <vault> is the vault's name or its whole host name; in announcements
  the version follows. The newest version wraps, all enabled ones unwrap.
* A token goes to hosts of Azure only (_DOMAINS), and to the configured vault only. Any key of that vault
  unwraps: a key is destroyed with all its versions, so a KEK that can be is another key.
* A vault wraps by RSA-OAEP-256, a Managed HSM with an AES key by A256KW. Neither takes a context: the data
  key's own HKDF binds it. RSA-2048 and RSA-3072 are weaker than AES-256; `versions` says so.
* Wrapping happens at the service, though the public key would do here: then Azure's log has it.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar
from urllib.parse import SplitResult, urlsplit

import azure.core.exceptions
import azure.identity

from vsql_shared.errors import ConfigError, DecodeError, KeyUnavailableError, TransientError
from vsql_shared.kms.base import AES_256_BITS, KekVersion, Retries, Wrapped, rsa_strength
from vsql_shared.kms.https import Https, Request

_T = TypeVar("_T")
API = "api-version=7.4"
RSA_OAEP = "RSA-OAEP-256"
AES_WRAP = "A256KW"
# Public cloud, China, US government; vaults and Managed HSMs.
_DOMAINS = frozenset({
    "vault.azure.net", "managedhsm.azure.net", "vault.azure.cn", "managedhsm.azure.cn",
    "vault.usgovcloudapi.net", "managedhsm.usgovcloudapi.net",
})  # fmt: skip
_KEK_ID = re.compile(r"([A-Za-z0-9-]{3,127})(?:\.([a-z.]+))?/keys/([A-Za-z0-9-]{1,127})")
_NOT_FOUND = 404
_VERSION = re.compile(r"[0-9A-Za-z]{1,64}")
_MAX_PAGES = 100  # of 25 versions each
_ALTERED = "the wrapping was altered, or made under another KEK; a deleted version is lost"
_GRANT = (
    "grant what docs/operations/keys.md lists to this node's identity, and open the vault's firewall to it"
)


class Place(NamedTuple):
    """Where a KEK is, without its version."""

    kek_id: str
    host: str
    key: str

    @property
    def scope(self) -> str:
        """What a token must be for: the service, not the vault."""
        return f"https://{self.host.partition('.')[2]}/.default"


class AzureKey(NamedTuple):
    """One version of a key."""

    version: str
    algorithm: str
    strength_bits: int
    enabled: bool


def split_kek_id(kek_id: str) -> Place:
    """Of a configured kek_id. Raises ConfigError."""
    found = _KEK_ID.fullmatch(kek_id)
    domain = (found[2] or "vault.azure.net") if found else ""
    if found is None or domain not in _DOMAINS:
        raise ConfigError(
            f"encryption.kms.kek_id = {kek_id!r} names no key of Azure Key Vault",
            hint='write "vault/keys/name", or "vault.managedhsm.azure.net/keys/name"; no version',
        )
    return Place(kek_id, f"{found[1].lower()}.{domain}", found[3])


def announced_place(kek_id: str, host: str) -> tuple[Place, str]:
    """Key and version an announcement names, in the vault at `host` and no other.

    Raises KeyUnavailableError.
    """
    name, _, version = kek_id.rpartition("/")
    try:
        place = split_kek_id(name)
    except ConfigError:
        place = None
    if place is None or place.host != host or _VERSION.fullmatch(version) is None:
        raise KeyUnavailableError(
            f"{kek_id!r} is no version of a key in {host}", hint="both nodes need the same vault"
        )
    return place, version


def key_request(place: Place, version: str = "") -> Request:  # no version is the newest
    """Ask what a version is."""
    tail = f"/{version}" if version else ""
    return Request("GET", f"https://{place.host}/keys/{place.key}{tail}?{API}")


def versions_request(place: Place) -> Request:
    """Ask for the first page of versions."""
    return Request("GET", f"https://{place.host}/keys/{place.key}/versions?{API}")


def deleted_request(place: Place) -> Request:
    """Ask for a key that was deleted and can be recovered."""
    return Request("GET", f"https://{place.host}/deletedkeys/{place.key}?{API}")


def wrap_request(place: Place, version: str, algorithm: str, secret: bytes) -> Request:
    """Wrap under a version."""
    return _operation(place, version, "wrapkey", algorithm, secret)


def unwrap_request(place: Place, version: str, algorithm: str, wrapped: bytes) -> Request:
    """Unwrap under a version."""
    return _operation(place, version, "unwrapkey", algorithm, wrapped)


def _operation(place: Place, version: str, verb: str, algorithm: str, data: bytes) -> Request:
    value = base64.urlsafe_b64encode(data).decode().rstrip("=")
    url = f"https://{place.host}/keys/{place.key}/{version}/{verb}?{API}"
    return Request("POST", url, {"alg": algorithm, "value": value})


def _unbase64(text: object) -> bytes:
    if not isinstance(text, str) or re.fullmatch(r"[A-Za-z0-9_-]+", text) is None:
        raise DecodeError("the service's answer holds no value")
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        raise DecodeError("the service's answer holds no value") from None


def _address(text: object) -> SplitResult:
    """The parts of an address in an answer; empty where it is none."""
    try:
        return urlsplit(text if isinstance(text, str) else "")
    except ValueError:  # brackets that hold no address
        return urlsplit("")


def _version_of(place: Place, kid: object) -> str:
    """The version an answer's kid names; it must be of our key."""
    parts = _address(kid)
    path = parts.path.split("/")
    ours = parts.hostname == place.host and path[1:3] == ["keys", place.key]
    if not ours or len(path) != 4 or _VERSION.fullmatch(path[3]) is None:
        raise DecodeError("the service's answer is about another key")
    return path[3]


def parse_result(place: Place, version: str, body: dict[str, Any]) -> bytes:
    """The answer to a wrapping or an unwrapping. Raises DecodeError."""
    if _version_of(place, body.get("kid")) != version:
        raise DecodeError("the service used another version than it was asked for")
    return _unbase64(body.get("value"))


def parse_key(place: Place, body: dict[str, Any]) -> AzureKey:
    """The answer to `key_request`. Raises DecodeError, KeyUnavailableError (a key that cannot wrap)."""
    key, attributes = body.get("key"), body.get("attributes")
    if not isinstance(key, dict) or not isinstance(attributes, dict):
        raise DecodeError("the service's answer describes no key")
    version, kind = _version_of(place, key.get("kid")), key.get("kty")
    enabled = attributes.get("enabled") is True
    if kind in ("RSA", "RSA-HSM"):
        bits = int.from_bytes(_unbase64(key.get("n")), "big").bit_length()
        return AzureKey(version, RSA_OAEP, rsa_strength(bits), enabled)
    if kind == "oct-HSM":  # A256KW is refused by the service for a shorter one
        return AzureKey(version, AES_WRAP, AES_256_BITS, enabled)
    raise KeyUnavailableError(
        f"a key of type {kind!r} cannot wrap data keys",
        hint="make an RSA key, or an AES key in a Managed HSM",
    )


def parse_versions(place: Place, body: dict[str, Any]) -> tuple[list[str], Request | None]:
    """(enabled versions of a page, how to ask for the next one). Raises DecodeError.

    The next page's address comes from the service: it must lead to the same vault: our token goes along.
    """
    found, following = body.get("value"), body.get("nextLink")
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise DecodeError("the service's answer lists no versions")
    names = [
        _version_of(place, one.get("kid"))
        for one in found
        if isinstance(one.get("attributes"), dict) and one["attributes"].get("enabled") is True
    ]
    if not following:
        return names, None
    parts = _address(following)
    plain = isinstance(following, str) and following.isascii() and following.isprintable()
    if not plain or parts.scheme != "https" or parts.netloc.removesuffix(":443") != place.host:
        raise DecodeError("the service's next page is at another place")
    return names, Request("GET", following)


class AzureKek:
    """A key of Azure. It is looked up at construction, so a wrong setting shows at start."""

    name = "azure-kv"

    def __init__(self, kek_id: str, *, retries: Retries | None = None) -> None:
        """Raises ConfigError, KeyUnavailableError (credentials, roles, key), TransientError."""
        self._place = split_kek_id(kek_id)
        self._https = Https("Azure Key Vault", f"https://{self._place.host}", retries or Retries())
        self._credential: Any = azure.identity.DefaultAzureCredential()
        self._newest()

    @property
    def kek_id(self) -> str:
        """`<vault>/keys/<key>/<version>` of the version that wraps."""
        return self._id_of(self._newest().version)

    @property
    def strength_bits(self) -> int:
        """Of the version that wraps; RSA keys have less than AES-256."""
        return self._newest().strength_bits

    def versions(self) -> list[KekVersion]:
        """All enabled versions, each asked for its size."""
        newest = self._newest().version
        names: list[str] = []
        request: Request | None = versions_request(self._place)
        for _ in range(_MAX_PAGES):
            if request is None:
                break
            page, request = self._ask(
                "listing versions", request, _GRANT, partial(parse_versions, self._place)
            )
            names += page
        keys = [self._key(name) for name in names]
        return [KekVersion(self._id_of(k.version), k.strength_bits, k.version == newest) for k in keys]

    def remains(self, kek_id: str) -> bool:
        """Whether its key is there, or deleted and not purged; a single version cannot be deleted."""
        place, version = announced_place(kek_id, self._place.host)
        what = f"looking up {kek_id}"
        for request in (key_request(place, version), deleted_request(place)):
            answer = self._https.send(request, {"Authorization": f"Bearer {self._token()}"})
            if answer.status != _NOT_FOUND:
                return self._https.read(what, answer, lambda _: True, _GRANT, _GRANT)
        return False

    def wrap(self, secret: bytes, context: bytes) -> Wrapped:  # noqa: ARG002  # no algorithm takes it
        """Encrypt a data key at Azure, under the newest version."""
        key = self._newest()
        what = f"wrapping a data key under {self._id_of(key.version)}"
        request = wrap_request(self._place, key.version, key.algorithm, secret)
        data = self._ask(what, request, _GRANT, partial(parse_result, self._place, key.version))
        return Wrapped(data, key.algorithm, self._id_of(key.version))

    def unwrap(self, wrapped: bytes, algorithm: str, context: bytes, kek_id: str) -> bytes:  # noqa: ARG002  # as above
        """Decrypt a data key at Azure, under the version that wrapped it."""
        if algorithm not in {RSA_OAEP, AES_WRAP}:
            raise KeyUnavailableError(
                f"wrapping algorithm {algorithm!r} is unknown", hint=f"expected {RSA_OAEP} or {AES_WRAP}"
            )
        place, version = announced_place(kek_id, self._place.host)
        request = unwrap_request(place, version, algorithm, wrapped)
        what = f"unwrapping a data key under {kek_id}"
        return self._ask(what, request, _ALTERED, partial(parse_result, place, version))

    def close(self) -> None:
        """Give connections back; the next use opens others."""
        self._credential.close()

    def _id_of(self, version: str) -> str:
        return f"{self._place.kek_id}/{version}"

    def _newest(self) -> AzureKey:
        key = self._key("")
        if not key.enabled:
            raise KeyUnavailableError(
                f"the newest version of {self._place.kek_id} is disabled",
                hint="enable it, or make another one",
            )
        return key

    def _key(self, version: str) -> AzureKey:
        request = key_request(self._place, version)
        return self._ask(
            f"looking up {self._id_of(version)}", request, _GRANT, partial(parse_key, self._place)
        )

    def _ask(self, what: str, request: Request, hint: str, parse: Callable[[dict[str, Any]], _T]) -> _T:
        answer = self._https.send(request, {"Authorization": f"Bearer {self._token()}"})
        return self._https.read(what, answer, parse, hint, _GRANT)

    def _token(self) -> str:
        try:
            return str(self._credential.get_token(self._place.scope).token)
        except azure.core.exceptions.ClientAuthenticationError as error:
            raise KeyUnavailableError(
                f"no token for Azure Key Vault ({type(error).__name__})",
                hint="give this node an identity, or AZURE_CLIENT_ID and the like; see its way to the login",
            ) from error
        except azure.core.exceptions.AzureError as error:
            raise TransientError(
                f"no token for Azure Key Vault ({type(error).__name__})", hint="it is tried again"
            ) from error
