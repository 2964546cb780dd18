"""A node's Ed25519 signing key inside a PKCS#11 token: it signs there, its private half never leaves it.

Not here: KEKs (pkcs11.py). Needs the extra `pkcs11` and a token with CKM_EDDSA, as SoftHSM 2 has it. Rules:

* One key under one label: which key signs must not depend on what else is in the token. The next key has
  another label.
* What the token gives is checked with the public key before anybody sees it: a token that pre-hashes, or
  answers another form, is found at the first signature and not by a peer.
* A lost session is opened again, a bounded number of times, as for KEKs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pkcs11
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pkcs11 import exceptions as p11
from pkcs11.types import PrivateKey, PublicKey, Session, SignMixin
from pkcs11.util.ec import encode_named_curve_parameters
from pydantic import SecretStr
from typing_extensions import override

from vsql_shared.crypto.signing import PUBLIC_KEY_SIZE, Signer, fingerprint
from vsql_shared.errors import KeyUnavailableError
from vsql_shared.kms.pkcs11 import ATTEMPTS, LOST, PAUSE, open_session, translated

_ED25519 = "1.3.101.112"  # RFC 8410
_NEEDS = "the token must have CKM_EDDSA on edwards25519; keep the signing key in a file where it has not"

_T = TypeVar("_T")


class TokenSigner(Signer):
    """The signing key of a node, in a token."""

    def __init__(
        self, module: Path, token_label: str, key_label: str, pin: SecretStr | None, node: str
    ) -> None:
        """Raises KeyUnavailableError: module, token, PIN or key missing or wrong."""
        self._module, self._token_label, self._key_label, self._pin = module, token_label, key_label, pin
        self._session: Session | None = None
        self.node = node
        self.public_key = self._run(lambda session: _public_raw(session, key_label))
        self.fingerprint = fingerprint(self.public_key)
        self._public = Ed25519PublicKey.from_public_bytes(self.public_key)

    @override
    def sign(self, message: bytes) -> bytes:
        """The 64-byte signature of `message`, made in the token. Raises KeyUnavailableError."""

        def operation(session: Session) -> bytes:
            key = _only(session, self._key_label, pkcs11.ObjectClass.PRIVATE_KEY)
            if not isinstance(key, SignMixin):
                raise KeyUnavailableError(f"key {self._key_label!r} may not sign", hint="set CKA_SIGN")
            return key.sign(message, mechanism=pkcs11.Mechanism.EDDSA)

        signature = self._run(operation)
        try:
            self._public.verify(signature, message)
        except InvalidSignature:
            raise KeyUnavailableError(
                f"what token {self._token_label!r} signs with {self._key_label!r} is no Ed25519 signature",
                hint=_NEEDS,
            ) from None
        return signature

    def _run(self, operation: Callable[[Session], _T]) -> _T:
        """Do `operation` in a live session, opening a new one where it was lost."""
        for attempt in range(ATTEMPTS):
            with translated(f"signing with {self._key_label!r}", _NEEDS):
                try:
                    if self._session is None:
                        self._session = open_session(self._module, self._token_label, self._pin, rw=False)
                    return operation(self._session)
                except LOST:
                    self._session = None
                    if attempt + 1 == ATTEMPTS:
                        raise
            time.sleep(PAUSE * 2**attempt)
        raise KeyUnavailableError("no attempt was allowed")


def generate_signing_key(module: Path, token_label: str, key_label: str, pin: SecretStr | None) -> bytes:
    """Make an Ed25519 pair in the token that cannot be extracted; returns the raw public key.

    A label that is taken is refused: nothing is overwritten.
    """
    with translated(f"making signing key {key_label!r}", _NEEDS):
        session = open_session(module, token_label, pin, rw=True)
        try:
            if list(session.get_objects({pkcs11.Attribute.LABEL: key_label})):
                raise KeyUnavailableError(
                    f"token {token_label!r} holds a key {key_label!r} already",
                    hint="choose another audit.signing_key_label for the next key",
                )
            curve = {pkcs11.Attribute.EC_PARAMS: encode_named_curve_parameters(_ED25519)}
            made = session.create_domain_parameters(pkcs11.KeyType.EC_EDWARDS, curve, local=True)
            made.generate_keypair(
                mechanism=pkcs11.Mechanism.EC_EDWARDS_KEY_PAIR_GEN,
                store=True,
                label=key_label,
                id=key_label.encode(),
                private_template={
                    pkcs11.Attribute.PRIVATE: True,
                    pkcs11.Attribute.SENSITIVE: True,
                    pkcs11.Attribute.EXTRACTABLE: False,
                },
            )
            return _public_raw(session, key_label)
        finally:
            session.close()


def _only(session: Session, label: str, kind: pkcs11.ObjectClass) -> PrivateKey | PublicKey:
    wanted = {pkcs11.Attribute.CLASS: kind, pkcs11.Attribute.LABEL: label}
    found = [key for key in session.get_objects(wanted) if isinstance(key, PrivateKey | PublicKey)]
    if not found:
        # A session that was logged out sees no private keys: that is a lost one first.
        raise p11.UserNotLoggedIn
    if len(found) > 1 or found[0].key_type is not pkcs11.KeyType.EC_EDWARDS:
        raise KeyUnavailableError(
            f"label {label!r} in the token is not that of one Ed25519 key",
            hint="`syncctl key generate --signing-pkcs11` makes one, under a label of its own",
        )
    return found[0]


def _public_raw(session: Session, label: str) -> bytes:
    """Raw 32 bytes: CKA_EC_POINT is them, or an OCTET STRING of them."""
    _only(session, label, pkcs11.ObjectClass.PRIVATE_KEY)
    point = bytes(_only(session, label, pkcs11.ObjectClass.PUBLIC_KEY)[pkcs11.Attribute.EC_POINT])
    if len(point) == PUBLIC_KEY_SIZE + 2 and point[:2] == bytes((4, PUBLIC_KEY_SIZE)):
        point = point[2:]
    if len(point) != PUBLIC_KEY_SIZE:
        raise KeyUnavailableError(f"the token's key {label!r} is not on edwards25519", hint=_NEEDS)
    return point
