"""A KEK's address in one line, as the keys of [encryption.kms] it stands for.

    file:/etc/vsql-sync/dev.kek
    pkcs11:token=vsql-sync;object=payments-kek?module-path=/usr/lib/libsofthsm2.so&pin-source=file:/etc/pin
    aws-kms://alias/payments-kek?region=eu-west-1        aws-kms://arn:aws:kms:eu-west-1:111122223333:key/…
    azure-kv://my-vault/keys/payments-kek
    gcp-kms://projects/p/locations/l/keyRings/r/cryptoKeys/k
    vault://vault.example:8200/transit/payments-kek

Rules: text to values, no file and no library is touched. PKCS#11 URIs follow RFC 7512. What is not understood
is refused, never passed over: an attribute that narrows the choice of a key must not be lost. No secret
stands in an address, so pin-value, passwords and users are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import unquote

from vsql_shared.config.values import refusal

_Keys = dict[str, object]
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_PATH_ATTRIBUTES = {"token": "token_label", "object": "key_label"}
_PIN_FILE = re.compile(r"(?:file:(?://(?:localhost)?(?=/))?)?(/.+|[^:|/][^:|]*)")


def kms_uri_keys(uri: str) -> _Keys:
    """The keys of [encryption.kms] an address stands for. Raises the refusal of a configuration value."""
    scheme, colon, rest = uri.partition(":")
    reader = _READERS.get(scheme)
    if not colon or reader is None:
        known = ", ".join(_READERS)
        raise refusal(f"an address of a KEK begins with one of {known} and a colon")
    if "#" in rest or any(c.isspace() or not c.isprintable() for c in rest):
        raise refusal("an address of a KEK holds no space and no #; write %20 and %23")
    return {"provider": scheme, **reader(rest)}


def _hierarchical(rest: str) -> tuple[str, dict[str, str]]:
    """What stands after `//`, and the query."""
    path, _, query = rest.partition("?")
    if not path.startswith("//") or not path.strip("/") or "@" in path:
        raise refusal("write the key after two slashes, without user or password")
    return _decoded(path.removeprefix("//").removeprefix("/")), _pairs(query, "&")


def _decoded(text: str) -> str:
    if _BAD_ESCAPE.search(text):
        raise refusal("a % in an address is followed by two hexadecimal digits")
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise refusal("an address is UTF-8 when its %-escapes are undone") from None


def _pairs(text: str, separator: str) -> dict[str, str]:
    """`name=value` attributes; one given twice would be a guess."""
    found: dict[str, str] = {}
    for part in filter(None, text.split(separator)):
        name, equals, value = part.partition("=")
        if not equals or not value:
            raise refusal(f'write "{name}=value" in the address of the KEK')
        if name in found:
            raise refusal(f'the address of the KEK says "{name}" twice')
        found[name] = _decoded(value)
    return found


def _known(pairs: dict[str, str], *names: str) -> None:
    strange = sorted(pairs.keys() - set(names))
    if strange:
        allowed = ", ".join(names) or "none"
        raise refusal(f'the address of the KEK says "{strange[0]}", which is not one of: {allowed}')


def _file(rest: str) -> _Keys:
    path = rest.removeprefix("//") if rest.startswith("///") else rest
    if not path or path.startswith("//"):
        raise refusal('write the KEK file as "file:/path"')
    return {"file": {"path": _decoded(path)}}


def _pkcs11(rest: str) -> _Keys:
    path, _, query = rest.partition("?")
    where, how = _pairs(path, ";"), _pairs(query, "&")
    if where.pop("type", "secret-key") != "secret-key":
        raise refusal('a KEK is of type "secret-key"')
    if "pin-value" in how:
        raise refusal("no PIN stands in an address; use pin-source, or pin_file, or pin_command")
    _known(where, *_PATH_ATTRIBUTES)
    _known(how, "module-path", "pin-source")
    section: dict[str, object] = {_PATH_ATTRIBUTES[name]: value for name, value in where.items()}
    if "module-path" in how:
        section["module"] = how["module-path"]
    if "pin-source" in how:
        found = _PIN_FILE.fullmatch(how["pin-source"])
        if found is None:
            raise refusal('write pin-source as a path or "file:/path"; a command goes to pin_command')
        section["pin_file"] = found[1]
    return {"pkcs11": section}


def _aws(rest: str) -> _Keys:
    key, query = _hierarchical(rest)
    _known(query, "region", "profile", "endpoint")
    return {"kek_id": key, **({"aws": query} if query else {})}


def _plain(rest: str) -> _Keys:
    key, query = _hierarchical(rest)
    _known(query)
    return {"kek_id": key}


def _vault(rest: str) -> _Keys:
    key, query = _hierarchical(rest)
    _known(query, "namespace")
    host, slash, name = key.partition("/")
    if not slash or "/" not in name:
        raise refusal('write "vault://host:8200/transit/name": address, mount, key')
    return {"kek_id": name, "vault": {"address": f"https://{host}", **query}}


_READERS: dict[str, Callable[[str], _Keys]] = {
    "file": _file,
    "pkcs11": _pkcs11,
    "aws-kms": _aws,
    "azure-kv": _plain,
    "gcp-kms": _plain,
    "vault": _vault,
}


def merge_kms_uri(given: dict[str, object]) -> dict[str, object]:
    """The section with the keys its `uri` stands for; a key that says something else is refused."""
    uri = given.get("uri")
    return _merged(given, kms_uri_keys(uri), "") if isinstance(uri, str) else given


def _merged(given: dict[str, object], meant: _Keys, at: str) -> dict[str, object]:
    result = dict(given)
    for name, value in meant.items():
        present = given.get(name)
        if isinstance(value, dict) and isinstance(present, dict):
            result[name] = _merged(present, value, f"{at}{name}.")
        elif present is None:
            result[name] = value
        elif str(present) != str(value):
            raise refusal(f"uri and {at}{name} say different things; leave one of them out")
    return result
