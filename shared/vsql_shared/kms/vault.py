"""KEKs in the transit engine of HashiCorp Vault or OpenBao: the key never leaves the server.

Not here: making keys and policies (docs/operations/keys.md). Plain HTTPS, no library. Tested with a real
server where there is one (tests/services/test_kms_vault.py). Rules:

* kek_id is `<mount>/<key>`; in announcements `<mount>/<key>/<version>`. The newest version wraps; those from
  min_decryption_version on unwrap.
* An AEAD key (aes256-gcm96, aes128-gcm96, chacha20-poly1305) takes the key's context as associated data. RSA
  keys take none: there the data key's HKDF binds it. Derived keys are refused.
* A wrapping is the text the server gives, `vault:v<version>:<base64>`; its version must be kek_id's.
* A wrapping that an RSA key does not open is refused with status 500, as a failure of the server would be.
  Its text tells them apart, or an altered wrapping would look like a server to wait for.
* When the server refuses the token, it is read (or AppRole asked) once more before that is an error.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from pydantic import SecretStr

from vsql_shared.errors import ConfigError, DecodeError, KeyUnavailableError
from vsql_shared.kms.base import KekVersion, Wrapped, foreign, rsa_strength
from vsql_shared.kms.https import Answer, Https, Request, refusal_text

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_CIPHERTEXT = re.compile(r"vault:v([0-9]{1,9}):[A-Za-z0-9+/=]+")
_AEAD = {"aes256-gcm96": 256, "chacha20-poly1305": 256, "aes128-gcm96": 128}
_RSA = re.compile(r"rsa-([0-9]{4,5})")
_ALGORITHM = "vault-transit:"  # the key's type follows
_RSA_REFUSES = "failed to RSA decrypt the ciphertext"
_T = TypeVar("_T")
_GRANT = "the token is not valid, or its policy lacks what docs/operations/keys.md lists"
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


def split_kek_id(kek_id: str) -> tuple[str, str]:
    """(mount, key) of a configured kek_id; the mount is `transit` where none is named. Raises ConfigError."""
    mount, slash, key = kek_id.rpartition("/")
    mount = mount if slash else "transit"
    if not all(_NAME.fullmatch(part) and set(part) != {"."} for part in (*mount.split("/"), key)):
        raise ConfigError(
            f"encryption.kms.kek_id = {kek_id!r} names no transit key", hint='write "mount/key"'
        )
    return mount, key


def key_request(address: str, mount: str, key: str) -> Request:
    """Ask what the key is."""
    return Request("GET", f"{address}/v1/{mount}/keys/{quote(key)}")


def encrypt_request(address: str, mount: str, key: str, secret: bytes, aad: bytes | None) -> Request:
    """Wrap under the newest version."""
    return _crypt(address, f"{mount}/encrypt/{quote(key)}", {"plaintext": _b64(secret)}, aad)


def decrypt_request(address: str, mount: str, key: str, ciphertext: str, aad: bytes | None) -> Request:
    """Unwrap; the ciphertext names its version."""
    return _crypt(address, f"{mount}/decrypt/{quote(key)}", {"ciphertext": ciphertext}, aad)


def _crypt(address: str, path: str, body: dict[str, str], aad: bytes | None) -> Request:
    more = {} if aad is None else {"associated_data": _b64(aad)}
    return Request("POST", f"{address}/v1/{path}", body | more)


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def parse_key(body: dict[str, Any]) -> VaultKey:
    """The answer to `key_request`. Raises DecodeError, KeyUnavailableError (a key that cannot wrap)."""
    data = body.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("type"), str):
        raise DecodeError("the server's answer describes no key")
    kind, least = data["type"], data.get("min_decryption_version")
    keys = data.get("keys")
    if not isinstance(keys, dict) or not isinstance(least, int) or not all(map(_is_version, keys)):
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


def _is_version(text: object) -> bool:
    return isinstance(text, str) and re.fullmatch(r"[0-9]{1,9}", text) is not None


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


class Login(NamedTuple):
    """How to come by a token: `token` reads one; with `role_id`, AppRole gives one for `secret_id`."""

    token: Callable[[], SecretStr | None]
    role_id: str | None = None
    secret_id: Callable[[], SecretStr | None] = lambda: None
    mount: str = "approle"


class VaultKek:
    """A transit key. It is looked up at construction, so a wrong setting shows at start."""

    name = "vault"

    def __init__(
        self, kek_id: str, address: str, login: Login, https: Https, namespace: str | None = None
    ) -> None:
        """Raises ConfigError, KeyUnavailableError (server, token, policy, key), TransientError."""
        self._mount, self._key = split_kek_id(kek_id)
        self._address, self._login, self._https = address, login, https
        self._headers = {"X-Vault-Request": "true"} | ({"X-Vault-Namespace": namespace} if namespace else {})
        self._token: SecretStr | None = None
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
        ours = f"{self._mount}/{self._key}"
        if name != ours or not _is_version(version):
            raise foreign(kek_id, ours)
        request = key_request(self._address, self._mount, self._key)
        return int(version) >= self._ask(f"looking up {ours}", request, _GRANT, parse_least_available)

    def wrap(self, secret: bytes, context: bytes) -> Wrapped:
        """Encrypt a data key at the server, under the newest version."""
        key = self._look()
        aad = context if key.binds_context else None
        request = encrypt_request(self._address, self._mount, self._key, secret, aad)
        wrapped, version = self._ask("wrapping a data key", request, _GRANT, parse_encrypted)
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
        request = decrypt_request(self._address, self._mount, self._key, ciphertext.decode(), aad)
        what = f"unwrapping a data key under {kek_id}"
        return self._ask(what, request, _ALTERED, parse_plaintext)

    def close(self) -> None:
        """Forget the token; the next use reads it again."""
        self._token = None

    def _id_of(self, version: int) -> str:
        return f"{self._mount}/{self._key}/{version}"

    def _look(self) -> VaultKey:
        request = key_request(self._address, self._mount, self._key)
        hint = "make the key first; check address, namespace and mount"
        return self._ask(f"looking up {self._mount}/{self._key}", request, hint, parse_key)

    def _ask(self, what: str, request: Request, hint: str, parse: Callable[[dict[str, Any]], _T]) -> _T:
        """What `parse` makes of a good answer. A refused token may be outdated: it is read once more."""
        answer = self._send(request)
        if answer.status == 403:
            self._token = None
            answer = self._send(request)
        return self._https.read(what, answer, parse, hint, _GRANT)

    def _send(self, request: Request) -> Answer:
        if self._token is None:
            self._token = self._log_in()
        token = {"X-Vault-Token": self._token.get_secret_value()}
        return self._https.send(request, self._headers | token, final=does_not_decrypt)

    def _log_in(self) -> SecretStr:
        login = self._login
        if login.role_id is None:
            return _given(login.token(), "token")
        secret = _given(login.secret_id(), "secret_id").get_secret_value()
        url = f"{self._address}/v1/auth/{login.mount}/login"
        body = {"role_id": login.role_id, "secret_id": secret}
        answer = self._https.send(Request("POST", url, body), self._headers)
        auth = answer.body.get("auth")
        token = auth.get("client_token") if isinstance(auth, dict) else None
        if answer.status != 200 or not isinstance(token, str) or not token:
            raise KeyUnavailableError(
                f"AppRole login at Vault: it answers {answer.status}{refusal_text(answer)}",
                hint="check role_id, the secret and auth_mount of [encryption.kms.vault]",
            )
        return SecretStr(token)


def _given(secret: SecretStr | None, name: str) -> SecretStr:
    if (
        secret is None
        or not secret.get_secret_value().isascii()
        or not secret.get_secret_value().isprintable()
    ):
        raise KeyUnavailableError(
            f"[encryption.kms.vault] gives no {name}, or one that is not printable ASCII",
            hint=f"set {name}_file, {name}_command or VSQL_SYNC__ENCRYPTION__KMS__VAULT__{name.upper()}",
        )
    return secret
