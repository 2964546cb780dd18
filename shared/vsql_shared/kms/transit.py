"""The transit engine of HashiCorp Vault or OpenBao as a server to ask: names of keys, login, calls.

Not here: what is asked. KEKs (vault.py) and a node's signing key (vault_signing.py) share this, and a server
asked for both is logged in to twice: they may have tokens of different lives. Rules:

* A key is named `<mount>/<key>`; a name that leads to another path of the server is refused.
* When the server refuses the token, it is read (or AppRole asked) once more before that is an error.
* No message holds a token, a secret or what was sent.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from pydantic import SecretStr

from vsql_shared.errors import ConfigError, KeyUnavailableError
from vsql_shared.kms.https import Answer, Https, Request, refusal_text

GRANT = "the token is not valid, or its policy lacks what docs/operations/keys.md lists"
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_VERSION = re.compile(r"[0-9]{1,9}")
_T = TypeVar("_T")


class TransitKey(NamedTuple):
    """Where a key is."""

    mount: str
    name: str

    def __str__(self) -> str:
        return f"{self.mount}/{self.name}"


def split_key(setting: str, value: str) -> TransitKey:
    """The key a setting names; the mount is `transit` where none is named. Raises ConfigError."""
    mount, slash, key = value.rpartition("/")
    mount = mount if slash else "transit"
    if not all(_NAME.fullmatch(part) and set(part) != {"."} for part in (*mount.split("/"), key)):
        raise ConfigError(f"{setting} = {value!r} names no transit key", hint='write "mount/key"')
    return TransitKey(mount, key)


def key_request(address: str, key: TransitKey) -> Request:
    """Ask what the key is."""
    return Request("GET", f"{address}/v1/{key.mount}/keys/{quote(key.name)}")


def use_request(address: str, key: TransitKey, verb: str, body: dict[str, object]) -> Request:
    """Have something done with the key."""
    return Request("POST", f"{address}/v1/{key.mount}/{verb}/{quote(key.name)}", body)


def to_base64(data: bytes) -> str:
    """Bytes as the engine takes them."""
    return base64.b64encode(data).decode()


def is_version(text: object) -> bool:
    """Whether that is how the engine writes a key's version."""
    return isinstance(text, str) and _VERSION.fullmatch(text) is not None


class Login(NamedTuple):
    """How to come by a token: `token` reads one; with `role_id`, AppRole gives one for `secret_id`."""

    token: Callable[[], SecretStr | None]
    role_id: str | None = None
    secret_id: Callable[[], SecretStr | None] = lambda: None
    mount: str = "approle"


class Transit:
    """One server, logged in to when it is first asked."""

    def __init__(self, address: str, login: Login, https: Https, namespace: str | None = None) -> None:
        self.address, self._login, self._https = address, login, https
        self._headers = {"X-Vault-Request": "true"} | ({"X-Vault-Namespace": namespace} if namespace else {})
        self._token: SecretStr | None = None

    def ask(
        self,
        what: str,
        request: Request,
        hint: str,
        parse: Callable[[dict[str, Any]], _T],
        final: Callable[[Answer], bool] = lambda _: False,
    ) -> _T:
        """What `parse` makes of a good answer. A refused token may be outdated: it is read once more.

        Raises KeyUnavailableError, TransientError; `final` is Https.send's.
        """
        answer = self._send(request, final)
        if answer.status == 403:
            self._token = None
            answer = self._send(request, final)
        return self._https.read(what, answer, parse, hint, GRANT)

    def forget(self) -> None:
        """Forget the token; the next use reads it again."""
        self._token = None

    def _send(self, request: Request, final: Callable[[Answer], bool]) -> Answer:
        if self._token is None:
            self._token = self._log_in()
        token = {"X-Vault-Token": self._token.get_secret_value()}
        return self._https.send(request, self._headers | token, final=final)

    def _log_in(self) -> SecretStr:
        login = self._login
        if login.role_id is None:
            return _given(login.token(), "token")
        secret = _given(login.secret_id(), "secret_id").get_secret_value()
        url = f"{self.address}/v1/auth/{login.mount}/login"
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
