"""A node's Ed25519 signing key in the transit engine of Vault or OpenBao: the server signs, the key stays.

Not here: KEKs (vault.py), making keys and policies (docs/operations/keys.md). Plain HTTPS, no library. Rules:

* One public key under one label: version 1 of a transit key, and no other. Peers have pinned it; a key that
  is rotated in the server still signs as version 1 here, and the node's next key is another transit key.
* The server says by which version it signed (`vault:v<version>:…`); any other is refused.
* What it gives is verified with the public key it showed when this was opened, before anybody sees it: a key
  deleted and made anew under its name, or a server that answers anything else, is found at once.
* A version that may not sign any more, and a message that is too large, are refused with status 500, as a
  failure of the server would be. The text tells them apart, or a stream would wait for what never changes.
* The whole message goes to the server: Ed25519 (RFC 8032) over a digest would be another signature.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from typing_extensions import override

from vsql_shared.audit.dsse import MAX_DOCUMENT_SIZE
from vsql_shared.crypto.signing import PUBLIC_KEY_SIZE, SIGNATURE_SIZE, Signer, fingerprint
from vsql_shared.errors import DecodeError, KeyUnavailableError, TransientError
from vsql_shared.kms.https import Answer, Request, refusal_text
from vsql_shared.kms.transit import Transit, TransitKey, key_request, split_key, to_base64, use_request

SIGNING_VERSION = 1
_TYPE = "ed25519"
_SIGNATURE = re.compile(r"vault:v([0-9]{1,9}):([A-Za-z0-9+/]+={0,2})")
_TOO_LONG = "JSON string value exceeds allowed length"
_REFUSED = ("requested version for signing is less than the minimum", _TOO_LONG)
_LIMIT = "raise max_json_string_value_length of Vault's listener, or sign with a key in a file or a token"
# An entry of a chain is never larger. Of more than that Vault may read a part only, and then hangs up.
_LARGE = MAX_DOCUMENT_SIZE
_MAKE = "make one, for this node alone: vault write transit/keys/NAME type=ed25519"
_NEXT = "the node's next signing key is another transit key, under another audit.signing_key_label"


def sign_request(address: str, key: TransitKey, message: bytes) -> Request:
    """Sign under the one version."""
    body: dict[str, object] = {"input": to_base64(message), "key_version": SIGNING_VERSION}
    return use_request(address, key, "sign", body)


def parse_public_key(body: dict[str, Any]) -> bytes:
    """The raw public key of the one version. Raises DecodeError, KeyUnavailableError (no key that serves)."""
    data = body.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("type"), str):
        raise DecodeError("the server's answer describes no key")
    if data["type"] != _TYPE:
        raise KeyUnavailableError(
            f"a transit key of type {data['type'][:40]!r} makes no Ed25519 signatures", hint=_MAKE
        )
    if data.get("derived"):
        raise KeyUnavailableError(
            "the transit key is derived: it would be another key for each context",
            hint="make a key with derived=false",
        )
    versions = data.get("keys")
    if not isinstance(versions, dict):
        raise DecodeError("the server's answer names no versions of the key")
    if str(SIGNING_VERSION) not in versions:
        raise KeyUnavailableError(
            f"version {SIGNING_VERSION} of the transit key, which signs, is archived or gone", hint=_NEXT
        )
    version = versions[str(SIGNING_VERSION)]
    found = _decoded(version.get("public_key") if isinstance(version, dict) else None)
    if len(found) != PUBLIC_KEY_SIZE:
        raise DecodeError("the server's answer holds no Ed25519 public key")
    return found


def parse_signature(body: dict[str, Any]) -> bytes:
    """The 64 bytes of a signature by the one version. Raises DecodeError, KeyUnavailableError."""
    data = body.get("data")
    text = data.get("signature") if isinstance(data, dict) else None
    found = _SIGNATURE.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise DecodeError("not a signature of the transit engine")
    if int(found[1]) != SIGNING_VERSION:
        raise KeyUnavailableError(
            f"signed by version {int(found[1])} of the transit key, expected version {SIGNING_VERSION}",
            hint=f"no peer has that one's public key; {_NEXT}",
        )
    signature = _decoded(found[2])
    if len(signature) != SIGNATURE_SIZE:
        raise DecodeError(f"a signature of {len(signature)} bytes, expected {SIGNATURE_SIZE}")
    return signature


def may_not_sign(answer: Answer) -> bool:
    """Whether the server's failure is of this key or message, now and ever: no server to wait for."""
    return answer.status == 500 and any(text in refusal_text(answer) for text in _REFUSED)


def _decoded(text: object) -> bytes:
    try:
        return base64.b64decode(text if isinstance(text, str) else "!", validate=True)
    except (binascii.Error, ValueError):
        raise DecodeError("the server's answer holds no base64 where it should") from None


class VaultSigner(Signer):
    """The signing key of a node, in a transit engine. Looked up at construction: what is wrong shows then."""

    def __init__(self, label: str, transit: Transit, node: str) -> None:
        """Raises ConfigError, KeyUnavailableError (server, token, policy, key), TransientError."""
        self._key, self._transit = split_key("audit.signing_key_label", label), transit
        self.node = node
        request = key_request(transit.address, self._key)
        self.public_key = transit.ask(f"looking up {self._key}", request, _MAKE, parse_public_key)
        self.fingerprint = fingerprint(self.public_key)
        self._public = Ed25519PublicKey.from_public_bytes(self.public_key)

    @override
    def sign(self, message: bytes) -> bytes:
        """The 64-byte signature of `message`, made by the server.

        Raises KeyUnavailableError, TransientError.
        """
        request = sign_request(self._transit.address, self._key, message)
        hint = f"see what became of the key there; {_NEXT}"
        what = f"signing {len(message)} bytes with {self._key}"
        try:
            signature = self._transit.ask(what, request, hint, parse_signature, may_not_sign)
        except TransientError as error:
            if len(message) <= _LARGE:
                raise
            raise KeyUnavailableError(f"{what}: {error.message}", hint=_LIMIT) from error
        except KeyUnavailableError as error:
            if _TOO_LONG not in error.message:
                raise
            raise KeyUnavailableError(error.message, hint=_LIMIT) from error
        try:
            self._public.verify(signature, message)
        except InvalidSignature:
            raise KeyUnavailableError(
                f"what Vault signs with {self._key} is not by the key it showed before ({self.fingerprint})",
                hint=f"if the key was made anew under its name, no peer knows it; {_NEXT}",
            ) from None
        return signature
