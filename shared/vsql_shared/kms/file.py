"""KEKs in a file. For development and tests: whoever can read the file can open everything.

Not for production (the configuration refuses it there). The file, one KEK with all its versions:

    vsql-sync-kek-file 1 aes-256 <kek id>
    <version> <base64 of 32 bytes>
    ...

Rules:

* Mode 0600, never overwritten by `generate_kek_file`; `rotate_kek_file` adds a version and replaces the
  file atomically. The highest version wraps, all of them unwrap.
* A version whose line is removed (`destroy_version`) is destroyed: what it wrapped cannot be opened again.
* AES-256-GCM with a random 96-bit nonce and the key's context as additional authenticated data. RFC 5649
  wrappings (an HSM's, of an exported KEK) are unwrapped too.
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
import tempfile
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap_with_padding

from vsql_shared.crypto.signing import write_new_file
from vsql_shared.errors import KeyUnavailableError
from vsql_shared.kms.base import AES_GCM, AES_KWP, KekVersion, Wrapped, foreign
from vsql_shared.private_files import read_private

MAGIC = "vsql-sync-kek-file"
KIND = "aes-256"
DEFAULT_KEK_ID = "vsql-sync-kek"
KEK_SIZE = 32
NONCE_SIZE = 12
_VERSION_DIGITS = 9
_GENERATE = "make one with `syncctl key generate --kek FILE`"


def generate_kek_file(path: Path, kek_id: str = DEFAULT_KEK_ID) -> str:
    """Write a new KEK file with one version; returns its kek_id. An existing file is never replaced."""
    write_new_file(path, _render(kek_id, {1: secrets.token_bytes(KEK_SIZE)}), 0o600)
    return f"{kek_id}/1"


def rotate_kek_file(path: Path) -> str:
    """Add a version, which wraps from now on; returns its kek_id. Older versions go on unwrapping."""
    kek_id, keys = _parse(path, _read(path))
    version = max(keys) + 1
    keys[version] = secrets.token_bytes(KEK_SIZE)
    _replace(path, _render(kek_id, keys))
    return f"{kek_id}/{version}"


def destroy_version(path: Path, kek_id: str) -> None:
    """Remove a version's line; one that is not there is gone already. Copies of the file are not our doing.

    Raises KeyUnavailableError for the version that wraps (producers would have none) and for another KEK's.
    """
    name, keys = _parse(path, _read(path))
    if kek_id.rpartition("/")[0] != name:
        raise foreign(kek_id, name)
    if kek_id == f"{name}/{max(keys)}":
        raise KeyUnavailableError(f"{kek_id} is the version that wraps", hint="make the next one first")
    left = {version: key for version, key in keys.items() if f"{name}/{version}" != kek_id}
    if left != keys:
        _replace(path, _render(name, left))


def _replace(path: Path, content: bytes) -> None:
    """Put a new content in the file's place, in one step."""
    try:
        handle, temporary = tempfile.mkstemp(prefix=path.name, dir=path.parent)  # 0600 by itself
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except OSError as error:
        raise KeyUnavailableError(
            f"cannot rewrite KEK file {path}: {error.strerror}", hint="check who may write to its directory"
        ) from error


def _render(kek_id: str, keys: dict[int, bytes]) -> bytes:
    if not kek_id or any(c.isspace() for c in kek_id):
        raise KeyUnavailableError(f"{kek_id!r} cannot name a KEK", hint="use a name without spaces")
    lines = [f"{MAGIC} 1 {KIND} {kek_id}"]
    lines += [f"{version} {base64.b64encode(key).decode()}" for version, key in sorted(keys.items())]
    return ("\n".join(lines) + "\n").encode()


def _read(path: Path, *, strict: bool = False) -> bytes:
    hint = f"check encryption.kms.file.path, or {_GENERATE}"
    return read_private(path, strict=strict, what="KEK file", hint=hint)


def _parse(path: Path, content: bytes) -> tuple[str, dict[int, bytes]]:
    """Name and versions of a KEK file. Errors name the line, never what stands in it."""
    lines = content.decode("utf-8", "replace").splitlines()
    head = lines[0].split() if lines else []
    if len(head) != 4 or head[:3] != [MAGIC, "1", KIND]:
        raise KeyUnavailableError(
            f"{path} is no KEK file: its first line is not '{MAGIC} 1 {KIND} <kek id>'", hint=_GENERATE
        )
    keys: dict[int, bytes] = {}
    for number, line in enumerate(lines[1:], start=2):
        version, key = _parse_line(path, number, line)
        if version in keys:
            raise KeyUnavailableError(f"{path} line {number}: version {version} stands there twice")
        keys[version] = key
    if not keys:
        raise KeyUnavailableError(f"KEK file {path} holds no key", hint=_GENERATE)
    return head[3], keys


def _parse_line(path: Path, number: int, line: str) -> tuple[int, bytes]:
    version, _, encoded = line.partition(" ")
    try:
        key = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if (
        not (version.isascii() and version.isdigit() and len(version) <= _VERSION_DIGITS)
        or len(key) != KEK_SIZE
    ):
        raise KeyUnavailableError(
            f"{path} line {number} is no KEK version", hint="expected: a number, a space, base64 of 32 bytes"
        )
    return int(version), key


class FileKek:
    """The KEK of a file. Looks at the file again whenever it changed, so a rotation needs no restart."""

    name = "file"
    strength_bits = 256

    def __init__(self, path: Path, kek_id: str | None = None, *, strict: bool = True) -> None:
        """`kek_id` is the configured name, which the file must bear. Raises KeyUnavailableError."""
        self._path, self._expected, self._strict = path, kek_id, strict
        self._seen: tuple[int, int, int] | None = None
        self._id, self._keys = "", dict[int, bytes]()
        self._load()

    def _load(self) -> None:
        stamp = self._stamp()  # before: what is replaced while it is read is read again
        content = _read(self._path, strict=self._strict)
        found, keys = _parse(self._path, content)
        if self._expected is not None and found != self._expected:
            raise KeyUnavailableError(
                f"KEK file {self._path} holds {found!r}, expected {self._expected!r}",
                hint="set encryption.kms.kek_id to the file's, or name the right file",
            )
        self._id, self._keys = found, keys
        self._seen = stamp

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size

    def _refresh(self) -> None:
        if self._seen is None or self._stamp() != self._seen:
            self._load()

    @property
    def kek_id(self) -> str:
        """`<kek id>/<version>` of the version that wraps."""
        self._refresh()
        return f"{self._id}/{max(self._keys)}"

    def versions(self) -> list[KekVersion]:
        """All versions of the file."""
        self._refresh()
        newest = max(self._keys)
        return [KekVersion(f"{self._id}/{v}", self.strength_bits, v == newest) for v in sorted(self._keys)]

    def remains(self, kek_id: str) -> bool:
        """Whether the file has its line; of copies of the file nobody knows."""
        self._refresh()
        if kek_id.rpartition("/")[0] != self._id:
            raise foreign(kek_id, self._id)
        return self._version(kek_id) in self._keys

    def wrap(self, secret: bytes, context: bytes) -> Wrapped:
        """AES-256-GCM under the newest version."""
        self._refresh()
        version = max(self._keys)
        nonce = secrets.token_bytes(NONCE_SIZE)
        sealed = AESGCM(self._keys[version]).encrypt(nonce, secret, context)
        return Wrapped(nonce + sealed, AES_GCM, f"{self._id}/{version}")

    def unwrap(self, wrapped: bytes, algorithm: str, context: bytes, kek_id: str) -> bytes:
        """Open a wrapping of any version the file still holds."""
        self._refresh()
        key = self._keys.get(self._version(kek_id))
        if key is None:
            raise KeyUnavailableError(
                f"KEK file {self._path} does not hold {kek_id}",
                hint="copy the KEK file of the node that wrapped the key; a destroyed version is lost",
            )
        try:
            if algorithm == AES_GCM:
                return AESGCM(key).decrypt(wrapped[:NONCE_SIZE], wrapped[NONCE_SIZE:], context)
            if algorithm == AES_KWP:
                return aes_key_unwrap_with_padding(key, wrapped)
        except (InvalidTag, InvalidUnwrap, ValueError) as error:
            raise KeyUnavailableError(
                f"a data key does not unwrap under {kek_id}",
                hint="the wrapping was altered, or made for another chain, or under another KEK of this name",
            ) from error
        raise KeyUnavailableError(
            f"wrapping algorithm {algorithm!r} is unknown", hint=f"expected {AES_GCM} or {AES_KWP}"
        )

    def _version(self, kek_id: str) -> int:
        name, _, version = kek_id.rpartition("/")
        known = name == self._id and version.isascii() and version.isdigit()
        # As long as a line of the file may have it; Python refuses to read thousands of digits.
        return int(version) if known and len(version) <= _VERSION_DIGITS else -1

    def close(self) -> None:
        """Forget the keys; the next use reads the file again."""
        self._keys = {}
        self._seen = None
