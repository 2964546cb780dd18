"""Secrets of the configuration: where they come from, and how they are hidden.

A secret is given by value, by a file or by a command, and is read at the moment it is used, so that a
rotated one is picked up by a new connection. Rules: exactly one source; the secret is a SecretStr until
it is handed to the client library; no message carries it, nor what the command printed.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from pydantic import SecretStr, model_validator
from typing_extensions import override

from vsql_shared.config.section import Section
from vsql_shared.config.values import ConfigPath, refusal
from vsql_shared.errors import ConfigError

MASK = "********"
# A command that asks a vault over the network; longer means it waits for somebody to type.
_COMMAND_SECONDS = 30
_SECRET_MAX_BYTES = 64 * 1024

_PAIR = re.compile(r"\s*(\w+)\s*=\s*('(?:[^'\\]|\\.)*'|(?:[^\s'\\]|\\.)*)\s*", re.DOTALL)
_SECRET_WORDS = ("password", "passwd", "secret", "token")


def one_source(name: str, *given: object) -> None:
    """Refuse a secret that is given in more than one way; which one wins would be a guess."""
    if sum(source is not None for source in given) > 1:
        raise refusal(f"give only one of {name}, {name}_file and {name}_command")


def read_secret(
    key: str, value: SecretStr | None, file: Path | None, command: str | None
) -> SecretStr | None:
    """The secret behind `key` from whichever source is set; None if none is."""
    if value is not None:
        return value
    if file is not None:
        return _from_file(f"{key}_file", file)
    if command is not None:
        return _from_command(f"{key}_command", command)
    return None


def _from_file(key: str, path: Path) -> SecretStr:
    try:
        with path.open("rb") as stream:
            content = stream.read(_SECRET_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{key}: cannot read {path}: {error.strerror}", hint="give a file this user may read"
        ) from None
    return _clean(key, content)


def _from_command(key: str, command: str) -> SecretStr:
    try:
        words = shlex.split(command)
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, timeout=_COMMAND_SECONDS, check=False
        )
    except (OSError, ValueError, IndexError):
        raise ConfigError(
            f"{key}: the command cannot be run", hint="give a program this user may execute"
        ) from None
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"{key}: no answer from the command within {_COMMAND_SECONDS} s",
            hint="it must print the secret without asking for anything",
        ) from None
    if done.returncode != 0:
        raise ConfigError(
            f"{key}: the command ended with exit code {done.returncode}",
            hint="run it by hand as the same user to see why; its output is not shown here",
        )
    return _clean(key, done.stdout)


def _clean(key: str, content: bytes) -> SecretStr:
    """One line of UTF-8, its line end removed, as `echo` and editors write one."""
    try:
        text = content.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        text = ""
    if not text or "\n" in text or "\0" in text or len(content) > _SECRET_MAX_BYTES:
        raise ConfigError(f"{key}: does not give one line of text", hint="the secret alone, in UTF-8")
    return SecretStr(text)


class PasswordSource(Section):
    """A password by value, by file or by command."""

    password: SecretStr | None = None
    """Password itself. Prefer password_file, password_command or the environment."""
    password_file: ConfigPath | None = None
    """File whose only line is the password."""
    password_command: str | None = None
    """Command that prints the password; run without a shell, each time a connection is opened."""

    @model_validator(mode="after")
    def _one_password(self) -> PasswordSource:
        one_source("password", self.password, self.password_file, self.password_command)
        return self

    def read_password(self, key: str) -> SecretStr | None:
        """The password from its source; `key` is the dotted section for messages."""
        return read_secret(f"{key}.password", self.password, self.password_file, self.password_command)


def quote_conninfo(value: str) -> str:
    """Quote a value for a libpq connection string."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def mask_conninfo(text: str) -> str:
    """The connection string with its passwords hidden; hidden whole where it cannot be understood."""
    if "://" in text:
        return _mask_uri(text)
    shown, at = [], 0
    while at < len(text):
        pair = _PAIR.match(text, at)
        if pair is None or pair.end() == at:
            return MASK
        hide = any(word in pair[1].lower() for word in _SECRET_WORDS)
        shown.append(f"{pair[1]}={MASK if hide else pair[2]}")
        at = pair.end()
    return " ".join(shown)


def _mask_uri(text: str) -> str:
    try:
        parts = urlsplit(text)
        query = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        return MASK
    if "@" in parts.path or "@" in parts.fragment or parts.fragment:
        return MASK  # an unescaped / or # in the password: where it ends cannot be told
    user, at, host = parts.netloc.rpartition("@")
    name, colon, _ = user.partition(":")
    hidden = [(k, MASK if any(word in k.lower() for word in _SECRET_WORDS) else v) for k, v in query]
    netloc = f"{name}{colon}{MASK if colon else ''}{at}{host}"
    return urlunsplit((parts.scheme, netloc, parts.path, urlencode(hidden, safe="*/"), ""))


class ConnectionString(SecretStr):
    """A libpq connection string. Shown with its passwords hidden; `get_secret_value()` is the whole."""

    @override
    def __str__(self) -> str:
        return mask_conninfo(self.get_secret_value())

    @override
    def __repr__(self) -> str:
        return f"ConnectionString({str(self)!r})"
