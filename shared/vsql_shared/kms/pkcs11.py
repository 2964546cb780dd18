"""KEKs inside a PKCS#11 token (HSM): wrapping happens in the token, the KEK never leaves it.

Not here: making tokens and PINs (the vendor's tools). Needs the extra `pkcs11`. Rules:

* The KEK is an AES-256 secret key found by its label; its versions bear the same label and differ in
  CKA_ID, read as a number: the highest wraps, all of them unwrap. kek_id = `<kek id>/<CKA_ID in hex>`.
* AES-256-GCM with the key's context as additional authenticated data where the token and the key can;
  else AES key wrap with padding (RFC 5649), which has no context: there the data key's HKDF binds it.
* A wrong PIN is never tried twice by a process, whoever asks again: tokens lock after a few.
* A lost session (token removed, module finalized, HSM restarted) is opened again, a bounded number of times.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pkcs11
from pkcs11 import exceptions as p11
from pkcs11.mechanisms import GCMParams
from pkcs11.types import DecryptMixin, EncryptMixin, SecretKey, Session, Token, UnwrapMixin, WrapMixin
from pydantic import SecretStr

from vsql_shared.errors import KeyUnavailableError
from vsql_shared.kms.base import AES_GCM, AES_KWP, KekVersion, Wrapped, foreign

KEK_BITS = 256
NONCE_SIZE = 12
TAG_BITS = 128
KWP_SIZE = 40  # of 32 bytes under RFC 5649; tokens whose "PAD" is another padding give 48
ATTEMPTS = 4
PAUSE = 0.2  # seconds before the first new attempt; doubles

_T = TypeVar("_T")
# Tokens and the PINs they refused, by a hash that means something in this process only.
_refused: set[tuple[str, str, bytes]] = set()
_HASH_KEY = secrets.token_bytes(32)
# What a lost session, a removed token or a restarted HSM looks like.
LOST = (
    p11.SessionHandleInvalid,
    p11.SessionClosed,
    p11.DeviceRemoved,
    p11.DeviceError,
    p11.TokenNotPresent,
    p11.UserNotLoggedIn,
    p11.KeyHandleInvalid,
    p11.ObjectHandleInvalid,
    p11.WrappingKeyHandleInvalid,
    p11.UnwrappingKeyHandleInvalid,
)
# What a module also says that read its token while another process wrote there, and then for ever.
_STALE = (p11.UserPinNotInitialized, p11.GeneralError)
_ASK_THE_HSM = "look into the HSM's own log; check the key's attributes with `pkcs11-tool --list-objects`"
_NO_GCM = (p11.MechanismInvalid, p11.MechanismParamInvalid, p11.FunctionNotSupported)


@contextmanager
def translated(what: str, hint: str = _ASK_THE_HSM) -> Iterator[None]:
    """Any other refusal of the token as KeyUnavailableError; PKCS#11 errors are names, they carry no data."""
    try:
        yield
    except p11.PKCS11Error as error:
        raise KeyUnavailableError(
            f"{what}: the token refuses with {type(error).__name__}",
            hint=hint,
        ) from error


def open_session(module: Path, token_label: str, pin: SecretStr | None, *, rw: bool) -> Session:
    """A logged-in session. Raises KeyUnavailableError, or one of LOST."""
    token = _find_token(module, token_label)
    where = f"token {token_label!r} of {module}"
    word = pin.get_secret_value() if pin else ""
    tried = (str(module), token_label, hmac.digest(_HASH_KEY, word.encode(), "sha256"))
    if tried in _refused:
        raise KeyUnavailableError(
            f"{where} refused this PIN before; it is not tried again, because tokens lock",
            hint="correct the PIN of encryption.kms.pkcs11; if the token's was mended, restart the service",
        )
    try:
        return _open(module, token, word, rw=rw)
    except (p11.PinIncorrect, p11.PinInvalid, p11.PinLenRange) as error:
        _refused.add(tried)
        raise KeyUnavailableError(
            f"{where} refuses the PIN",
            hint="correct the PIN of encryption.kms.pkcs11; tokens lock after a few wrong ones",
        ) from error
    except (p11.PinLocked, p11.PinExpired, p11.UserPinNotInitialized) as error:
        raise KeyUnavailableError(
            f"{where}: the user PIN is locked, expired or not set ({type(error).__name__})",
            hint="the security officer sets it again with the HSM's own tool",
        ) from error


def _open(module: Path, token: Token, word: str, *, rw: bool) -> Session:
    try:
        return _log_in(token, word, rw=rw)
    except _STALE:
        _list_tokens(module, anew=True)
        return _log_in(_find_token(module, token.label), word, rw=rw)


def _log_in(token: Token, word: str, *, rw: bool) -> Session:
    try:
        return token.open(rw=rw, user_pin=word or None)
    except p11.UserAlreadyLoggedIn:  # login belongs to the process: another session of ours did it
        return token.open(rw=rw)


def _find_token(module: Path, token_label: str) -> Token:
    if not module.is_file():
        raise KeyUnavailableError(
            f"PKCS#11 module {module} does not exist",
            hint="set encryption.kms.pkcs11.module to the HSM's library",
        )
    tokens = _list_tokens(module)
    for attempt in range(ATTEMPTS - 1):
        if token_label in tokens:
            break
        time.sleep(PAUSE * 2**attempt)
        tokens = _list_tokens(module, anew=True)
    if token_label not in tokens:
        present = ", ".join(sorted(repr(label) for label in tokens if label)) or "none"
        raise KeyUnavailableError(
            f"no token {token_label!r} in {module} (present: {present})",
            hint="set encryption.kms.pkcs11.token_label, or initialize the token with the HSM's own tool",
        )
    return tokens[token_label]


def _list_tokens(module: Path, *, anew: bool = False) -> dict[str, Token]:
    """The module's tokens by label; `anew` initializes it again.

    A module looks for its tokens when it is initialized, and may miss one that was plugged in later, or that
    another process was writing at that moment: asked again without that it says the same for ever.
    """
    try:
        library = pkcs11.lib(str(module))
        if anew:
            library.reinitialize()
    except (RuntimeError, OSError) as error:  # PKCS11Error is a RuntimeError
        raise KeyUnavailableError(
            f"PKCS#11 module {module} cannot be loaded ({type(error).__name__})",
            hint="it must be a PKCS#11 library for this machine; check the vendor's configuration file",
        ) from error
    return {token.label: token for token in library.get_tokens()}


def _attribute(key: SecretKey, attribute: pkcs11.Attribute) -> object:
    try:
        return key[attribute]
    except (p11.AttributeTypeInvalid, p11.AttributeSensitive):
        return None


def _number(key: SecretKey) -> int:
    return int.from_bytes(key.id, "big")


def _find_versions(session: Session, label: str) -> dict[int, SecretKey]:
    """All keys of this label by CKA_ID. Raises KeyUnavailableError when one of them can be no KEK."""
    found: dict[int, SecretKey] = {}
    wanted = {pkcs11.Attribute.CLASS: pkcs11.ObjectClass.SECRET_KEY, pkcs11.Attribute.LABEL: label}
    for key in session.get_objects(wanted):
        if not isinstance(key, SecretKey):
            continue
        if (
            key.key_type is not pkcs11.KeyType.AES
            or _attribute(key, pkcs11.Attribute.VALUE_LEN) != KEK_BITS // 8
        ):
            raise KeyUnavailableError(
                f"key {label!r} in the token is no AES-256 key",
                hint="make one with `syncctl key generate --kek-pkcs11`, under a label of its own",
            )
        if _number(key) in found:
            raise KeyUnavailableError(
                f"two keys in the token have the label {label!r} and the same CKA_ID",
                hint="give each version another CKA_ID; the highest wraps",
            )
        found[_number(key)] = key
    return found


def generate_kek(module: Path, token_label: str, key_label: str, pin: SecretStr | None) -> str:
    """Make an AES-256 key in the token, or its next version; returns its CKA_ID in hex.

    It cannot be extracted, and can encrypt, decrypt, wrap and unwrap.
    """
    with translated(f"making KEK {key_label!r}"):
        session = open_session(module, token_label, pin, rw=True)
        try:
            version = max(_find_versions(session, key_label), default=0) + 1
            key_id = version.to_bytes(max(2, (version.bit_length() + 7) // 8), "big")
            session.generate_key(
                pkcs11.KeyType.AES,
                KEK_BITS,
                id=key_id,
                label=key_label,
                store=True,
                capabilities=pkcs11.MechanismFlag.ENCRYPT
                | pkcs11.MechanismFlag.DECRYPT
                | pkcs11.MechanismFlag.WRAP
                | pkcs11.MechanismFlag.UNWRAP,
                template={
                    pkcs11.Attribute.PRIVATE: True,
                    pkcs11.Attribute.SENSITIVE: True,
                    pkcs11.Attribute.EXTRACTABLE: False,
                },
            )
        finally:
            session.close()
    return key_id.hex()


def destroy_version(
    module: Path, token_label: str, key_label: str, pin: SecretStr | None, version: str
) -> None:
    """Destroy the key with this CKA_ID (hex) in the token; one that is not there is gone already.

    Raises KeyUnavailableError for the version that wraps: producers would have none.
    """
    with translated(f"destroying KEK {key_label!r} version {version}"):
        session = open_session(module, token_label, pin, rw=True)
        try:
            keys = _find_versions(session, key_label)
            for number, key in keys.items():
                if (key.id.hex() or "00") != version:
                    continue
                if number == max(keys):
                    raise KeyUnavailableError(
                        f"version {version} of {key_label!r} is the one that wraps",
                        hint="make the next one first",
                    )
                key.destroy()
        finally:
            session.close()


class Pkcs11Kek:
    """A KEK in a token. The session is opened at construction, so a wrong setting shows at start."""

    name = "pkcs11"
    strength_bits = KEK_BITS

    def __init__(
        self,
        module: Path,
        token_label: str,
        key_label: str,
        pin: SecretStr | None,
        *,
        kek_id: str,
        algorithm: str | None = None,
        attempts: int = ATTEMPTS,
        pause: float = PAUSE,
    ) -> None:
        """`kek_id` is the name all nodes share; `algorithm` forces AES_GCM or AES_KWP.

        Raises KeyUnavailableError: module, token, PIN or key missing or wrong.
        """
        self._module, self._token_label, self._key_label, self._pin = module, token_label, key_label, pin
        self._name, self._algorithm = kek_id, algorithm
        self._attempts, self._pause = attempts, pause
        self._session: Session | None = None
        self._proven = False  # the session has found a key, so it is, or was, logged in
        self._run("opening the KEK", self._newest)

    @property
    def kek_id(self) -> str:
        """`<kek id>/<CKA_ID in hex>` of the version that wraps."""
        return self._run("looking up the KEK", lambda session: self._id_of(self._newest(session)))

    def versions(self) -> list[KekVersion]:
        """All keys of the label."""

        def look(session: Session) -> list[KekVersion]:
            newest = _number(self._newest(session))
            keys = self._keys(session)
            return [KekVersion(self._id_of(keys[n]), KEK_BITS, n == newest) for n in sorted(keys)]

        return self._run("listing KEKs", look)

    def remains(self, kek_id: str) -> bool:
        """Whether the token has it: what is destroyed there does not come back."""
        if kek_id.rpartition("/")[0] != self._name:
            raise foreign(kek_id, self._name)
        return kek_id in [one.kek_id for one in self.versions()]

    def wrap(self, secret: bytes, context: bytes) -> Wrapped:
        """Encrypt a data key inside the token, under the newest version."""

        def operation(session: Session) -> Wrapped:
            key = self._newest(session)
            kek_id = self._id_of(key)
            if self._algorithm != AES_KWP and isinstance(key, EncryptMixin):
                try:
                    return Wrapped(_encrypt(key, secret, context), AES_GCM, kek_id)
                except _NO_GCM:
                    if self._algorithm == AES_GCM:
                        raise
            return Wrapped(_wrap_padded(session, key, secret), AES_KWP, kek_id)

        return self._run("wrapping a data key", operation)

    def unwrap(self, wrapped: bytes, algorithm: str, context: bytes, kek_id: str) -> bytes:
        """Decrypt a data key inside the token, under the version that wrapped it."""
        if algorithm not in {AES_GCM, AES_KWP}:
            raise KeyUnavailableError(
                f"wrapping algorithm {algorithm!r} is unknown", hint=f"expected {AES_GCM} or {AES_KWP}"
            )

        def operation(session: Session) -> bytes:
            key = self._version(session, kek_id)
            if algorithm == AES_GCM:
                return _decrypt(key, wrapped, context)
            return _unwrap_padded(key, wrapped)

        return self._run(
            f"unwrapping a data key under {kek_id}",
            operation,
            hint="the wrapping was altered, or is another chain's or another KEK's; see also the HSM's log",
        )

    def close(self) -> None:
        """Give the session back; the next use opens another."""
        session, self._session, self._proven = self._session, None, False
        if session is not None:
            try:
                session.close()
            except p11.PKCS11Error:
                return  # the session is lost already, which is what was asked for

    def _id_of(self, key: SecretKey) -> str:
        return f"{self._name}/{key.id.hex() or '00'}"

    def _keys(self, session: Session) -> dict[int, SecretKey]:
        """Versions by number.

        A session that saw keys and sees none any more may have been logged out by another one, because login
        belongs to the process: that is a lost session first, and a destroyed KEK only if it stays so.
        """
        keys = _find_versions(session, self._key_label)
        if not keys and self._proven:
            raise p11.UserNotLoggedIn
        self._proven = bool(keys)
        return keys

    def _newest(self, session: Session) -> SecretKey:
        keys = self._keys(session)
        if not keys:
            raise KeyUnavailableError(
                f"token {self._token_label!r} holds no key {self._key_label!r}",
                hint="make it with `syncctl key generate --kek-pkcs11`, or correct key_label"
                + ("" if self._pin else "; no PIN is set, and private keys are seen after login only"),
            )
        return keys[max(keys)]

    def _version(self, session: Session, kek_id: str) -> SecretKey:
        for key in self._keys(session).values():
            if self._id_of(key) == kek_id:
                return key
        raise KeyUnavailableError(
            f"token {self._token_label!r} does not hold KEK {kek_id} (label {self._key_label!r})",
            hint="both nodes need the same KEK in their tokens; a destroyed version is lost",
        )

    def _run(self, what: str, operation: Callable[[Session], _T], hint: str = _ASK_THE_HSM) -> _T:
        """Do `operation` in a live session, opening a new one where it was lost."""
        for attempt in range(self._attempts):
            with translated(what, hint):
                try:
                    if self._session is None:
                        self._session = open_session(self._module, self._token_label, self._pin, rw=False)
                    return operation(self._session)
                except LOST:
                    self.close()
                    if attempt + 1 == self._attempts:
                        raise
            time.sleep(self._pause * 2**attempt)
        raise KeyUnavailableError(f"{what}: no attempt was allowed", hint="set attempts to 1 or more")


def _forbidden(attribute: str) -> KeyUnavailableError:
    return KeyUnavailableError(
        f"the KEK's attribute {attribute} is false", hint=f"set {attribute} with the HSM's own tool"
    )


def _encrypt(key: EncryptMixin, secret: bytes, context: bytes) -> bytes:
    nonce = secrets.token_bytes(NONCE_SIZE)
    parameters = GCMParams(nonce, aad=context, tag_bits=TAG_BITS)
    sealed = key.encrypt(secret, mechanism=pkcs11.Mechanism.AES_GCM, mechanism_param=parameters)
    return nonce + b"".join([sealed] if isinstance(sealed, bytes) else sealed)


def _decrypt(key: SecretKey, wrapped: bytes, context: bytes) -> bytes:
    if len(wrapped) < NONCE_SIZE + TAG_BITS // 8:
        raise KeyUnavailableError(f"a wrapped data key of {len(wrapped)} bytes is too short")
    if not isinstance(key, DecryptMixin):
        raise _forbidden("CKA_DECRYPT")
    parameters = GCMParams(wrapped[:NONCE_SIZE], aad=context, tag_bits=TAG_BITS)
    opened = key.decrypt(wrapped[NONCE_SIZE:], mechanism=pkcs11.Mechanism.AES_GCM, mechanism_param=parameters)
    return b"".join([opened] if isinstance(opened, bytes) else opened)


def _wrap_padded(session: Session, key: SecretKey, secret: bytes) -> bytes:
    """RFC 5649. The data key becomes a session object for a moment, because C_WrapKey takes handles only."""
    if not isinstance(key, WrapMixin):
        raise _forbidden("CKA_WRAP")
    inner = session.create_object(
        {
            pkcs11.Attribute.CLASS: pkcs11.ObjectClass.SECRET_KEY,
            pkcs11.Attribute.KEY_TYPE: pkcs11.KeyType.GENERIC_SECRET,
            pkcs11.Attribute.TOKEN: False,
            pkcs11.Attribute.EXTRACTABLE: True,
            pkcs11.Attribute.SENSITIVE: False,
            pkcs11.Attribute.VALUE: secret,
        }
    )
    if not isinstance(inner, SecretKey):
        raise KeyUnavailableError("the token makes no session key of a data key", hint="use AES-256-GCM")
    try:
        wrapped = key.wrap_key(inner, mechanism=pkcs11.Mechanism.AES_KEY_WRAP_PAD)
    finally:
        inner.destroy()
    if len(wrapped) != KWP_SIZE:
        raise KeyUnavailableError(
            f"the token's key wrap gives {len(wrapped)} bytes, RFC 5649 gives {KWP_SIZE}",
            hint="use a token with AES-GCM or with key wrap after RFC 5649",
        )
    return wrapped


def _unwrap_padded(key: SecretKey, wrapped: bytes) -> bytes:
    if not isinstance(key, UnwrapMixin):
        raise _forbidden("CKA_UNWRAP")
    inner = key.unwrap_key(
        pkcs11.ObjectClass.SECRET_KEY,
        pkcs11.KeyType.GENERIC_SECRET,
        wrapped,
        mechanism=pkcs11.Mechanism.AES_KEY_WRAP_PAD,
        store=False,
        template={pkcs11.Attribute.EXTRACTABLE: True, pkcs11.Attribute.SENSITIVE: False},
    )
    try:
        return bytes(inner[pkcs11.Attribute.VALUE])
    finally:
        inner.destroy()
