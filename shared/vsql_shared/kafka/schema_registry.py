"""The schema of packs in a schema registry, by Confluent's REST API: three questions, asked once per process.

Not here: the bytes that stand before a pack (wire/framing.py). Nothing is ever read by a schema that comes
from a registry: it is told ours, for other people's tools. Procedure:

1. Look our schema up under its subject. It is there: that is its id, and reading was all the right we needed.
2. It is not, and `auto_register` is off: refused, naming the subject.
3. No such subject: register, and see to it that the subject accepts only what is compatible backwards. A
   registry that allows anything by itself and does not let us change that is a warning; so is a subject found
   like that by whoever may register: a producer may have ended between the two.
4. A subject with other schemas: it must require backward compatibility already, whoever made it decided; then
   register, and the registry compares. What it refuses is refused here.

`wait` is called before each question and in each pause: whoever waits for this says so, and may raise.

Two producers that register at once get one id: a registry takes equal schemas for one. A registry that does
not answer is a TransientError; what an operator must mend is a RegistryError. No message holds a credential.
"""

from __future__ import annotations

import base64
import json
import logging
import re
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import resources
from typing import Literal, NoReturn
from urllib.parse import quote

from vsql_shared.config.schema_registry import SchemaRegistrySettings
from vsql_shared.errors import ConfigError, RegistryError, TransientError
from vsql_shared.kms.base import Retries
from vsql_shared.kms.https import Answer, Https, Request
from vsql_shared.wire.framing import MAX_ID

_log = logging.getLogger(__name__)

Wait = Callable[[float], None]
Method = Literal["GET", "POST", "PUT"]

_MEDIA = "application/vnd.schemaregistry.v1+json"
_ATTEMPTS, _PAUSE = 3, 0.2
# Confluent's error codes of 404.
_NO_SUBJECT, _NO_SCHEMA = 40401, 40403
_LEVEL = "BACKWARD"
_STRICT_ENOUGH = frozenset({_LEVEL, "BACKWARD_TRANSITIVE", "FULL", "FULL_TRANSITIVE"})
_MAX_SHOWN = 300
# RFC 6750, section 2.1.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_OTHER_NAME = "give kafka.schema_registry.subject a name of its own"
_OTHER_ADDRESS = (
    "kafka.schema_registry.url must name a registry with Confluent's REST API; some have it below a path,"
    " such as /apis/ccompat/v7"
)


def pack_schema() -> str:
    """The Avro schema of a pack as it is registered: schemas/avro/pack.avsc, in one line."""
    text = resources.files("vsql_schemas").joinpath("avro/pack.avsc").read_text()
    return json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False)


class SchemaRegistry:
    """One registry, as `kafka.schema_registry` says."""

    def __init__(self, settings: SchemaRegistrySettings, wait: Wait = time.sleep) -> None:
        """Raises RegistryError (certificates), ConfigError (a secret's source)."""
        assert settings.url is not None  # noqa: S101 - who asks has looked
        self._url, self._subject = settings.url, settings.subject
        self._auto_register, self._wait = settings.auto_register, wait
        self._name = f"schema registry {self._url}"
        self._headers = {"Content-Type": _MEDIA, "Accept": f"{_MEDIA}, application/json"} | _credentials(
            settings
        )
        client = None
        if settings.cert_path is not None and settings.key_path is not None:
            client = (settings.cert_path, settings.key_path)
        retries = Retries(_ATTEMPTS, _PAUSE, settings.timeout.total_seconds())
        self._https = Https(self._name, self._url, retries, settings.ca_path, client, RegistryError)

    def id_of(self, schema: str) -> int:
        """The id of our schema under the subject, registered if need be: the procedure above."""
        path = f"/subjects/{quote(self._subject, safe='')}"
        found = self._look_up(path, schema)
        code = found.body.get("error_code")
        if found.status == 200:
            if self._auto_register:
                self._warn_of_level()
            return self._id(found)
        if found.status != 404 or code not in (_NO_SUBJECT, _NO_SCHEMA):
            self._refuse("looking up", found)
        if not self._auto_register:
            raise RegistryError(
                f"{self._name}: subject {self._subject} does not have the schema of packs, and"
                " kafka.schema_registry.auto_register is false",
                hint="`syncctl kafka schema` prints it; with --register it is registered",
            )
        if code == _NO_SCHEMA:
            self._require_strict()
        made = self._send("POST", f"{path}/versions", {"schema": schema})
        if made.status != 200:
            self._refuse("registering", made)
        if code == _NO_SUBJECT:
            self._make_strict()
        return self._id(made)

    def _look_up(self, path: str, schema: str) -> Answer:
        """Step 1. Registries compare texts, but for one that is asked to look at what they mean."""
        found = self._send("POST", path, {"schema": schema})
        if found.status == 404 and found.body.get("error_code") == _NO_SCHEMA:
            found = self._send("POST", f"{path}?normalize=true", {"schema": schema})
        return found

    def _require_strict(self) -> None:
        """Step 4: among other people's schemas only where the registry compares."""
        level = self._level()
        if level not in _STRICT_ENOUGH:
            raise RegistryError(
                f"{self._name}: subject {self._subject} has other schemas and compatibility {level}, which"
                " lets any schema follow any other",
                hint=f"{_OTHER_NAME}, or the subject compatibility {_LEVEL}",
            )

    def _make_strict(self) -> None:
        """Step 3: a subject of our making takes only what is compatible."""
        asked = self._ask_level()
        level = _level(asked)
        if asked.status == 200 and level in _STRICT_ENOUGH:
            return
        answer = self._send("PUT", self._config, {"compatibility": _LEVEL})
        if answer.status != 200:
            _log.warning(
                "%s: subject %s has compatibility %s, and we may not change that (%s); set it to %s",
                self._name, self._subject, level, _said(answer), _LEVEL,
            )  # fmt: skip

    def _warn_of_level(self) -> None:
        """Whoever made the subject sets it, and may have ended before. Who may not read it need not."""
        with suppress(TransientError):
            answer = self._ask_level()
            if answer.status == 200 and (level := _level(answer)) not in _STRICT_ENOUGH:
                _log.warning(
                    "%s: subject %s has compatibility %s; set it to %s",
                    self._name, self._subject, level, _LEVEL,
                )  # fmt: skip

    @property
    def _config(self) -> str:
        return f"/config/{quote(self._subject, safe='')}"

    def _level(self) -> str:
        """The compatibility the subject requires."""
        answer = self._ask_level()
        if answer.status != 200:
            self._refuse("asking for the compatibility of", answer)
        return _level(answer)

    def _ask_level(self) -> Answer:
        return self._send("GET", f"{self._config}?defaultToGlobal=true")

    def _send(self, method: Method, path: str, body: dict[str, str] | None = None) -> Answer:
        self._wait(0.0)
        return self._https.send(Request(method, f"{self._url}{path}", body), self._headers, self._wait)

    def _id(self, answer: Answer) -> int:
        found = answer.body.get("id")
        if type(found) is not int or not 0 < found <= MAX_ID:
            raise RegistryError(
                f"{self._name}: the answer for subject {self._subject} holds no id of a schema",
                hint=_OTHER_ADDRESS,
            )
        return found

    def _refuse(self, doing: str, answer: Answer) -> NoReturn:
        """Say what the registry said."""
        if answer.status == 409 and doing == "registering":
            raise RegistryError(
                f"{self._name}: the schema of packs is not compatible with what subject {self._subject} has:"
                f" {_said(answer)}",
                hint=_OTHER_NAME,
            )
        if answer.status in (401, 403):
            hint = "check the credentials in [kafka.schema_registry] and what they may do with this subject"
        elif answer.status == 422:
            hint = "the registry takes no schema now, or not this one: see whether it is read-only"
        elif answer.status >= 500:
            hint = "see the registry's own log"
        else:
            hint = _OTHER_ADDRESS
        raise RegistryError(
            f"{self._name}: {doing} subject {self._subject}: it answers {_said(answer)}", hint=hint
        )


def _credentials(settings: SchemaRegistrySettings) -> dict[str, str]:
    token = settings.read_token()
    if token is not None:
        if not _TOKEN.fullmatch(token.get_secret_value()):
            raise ConfigError(
                "kafka.schema_registry.token: is no bearer token", hint="letters, digits and -._~+/ alone"
            )
        return {"Authorization": f"Bearer {token.get_secret_value()}"}
    password = settings.read_password("kafka.schema_registry")
    if password is None:
        return {}
    pair = f"{settings.username}:{password.get_secret_value()}".encode()
    return {"Authorization": f"Basic {base64.b64encode(pair).decode()}"}


def _level(answer: Answer) -> str:
    """The compatibility an answer names; else what it says instead."""
    found = _printable(answer.body.get("compatibilityLevel")) if answer.status == 200 else ""
    return found or f"unknown ({_said(answer)})"


def _said(answer: Answer) -> str:
    """Status, code and text of an answer, for a message."""
    found = [answer.body.get("error_code"), answer.body.get("message")]
    text = ": ".join(shown for one in found if (shown := _printable(one)))
    return f"{answer.status} ({text})" if text else str(answer.status)


def _printable(value: object) -> str:
    if not isinstance(value, str | int):
        return ""
    return "".join(c if c.isprintable() else " " for c in str(value)[:_MAX_SHOWN])
