"""S3, or what speaks it, with Object Lock: objects that nobody can change or delete before their time.

Not here: what the objects hold. Needs the extra `aws` (boto3: for AWS's own chain of credentials). Rules:

* A bucket without Object Lock is refused, before anything is put there.
* An object is put with its SHA-256, which the service verifies, and its lock, in one request; only under a
  key that has no object yet. So a half object, or one without its lock, never stands.
* What is read is one version, named: nobody can put another one over it.
* What the service says of itself is not believed further than that: bytes are read back and verified by
  the caller.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple
from urllib.parse import urlsplit

import boto3
from botocore import exceptions as boto
from botocore.config import Config

from vsql_shared.config.kms_services import is_loopback
from vsql_shared.errors import ConfigError, RefusedError, StoreError, TransientError, VsqlSyncError

if TYPE_CHECKING:
    from vsql_shared.config.archive import ArchiveSettings

_TIMEOUT_SECONDS = 60.0
_BUSY = frozenset(
    {
        "SlowDown",
        "InternalError",
        "ServiceUnavailable",
        "RequestTimeout",
        "Throttling",
        "ConditionalRequestConflict",  # another request for this key was under way; nothing was stored
    }
)
_GONE = frozenset({"404", "405", "NoSuchKey", "NoSuchVersion"})  # 405: the mark of a deletion
_TAKEN = frozenset({"PreconditionFailed", "412"})
_NO_LOCK = "ObjectLockConfigurationNotFoundError"
_HINTS = {
    "AccessDenied": "grant what docs/operations/audit.md lists, in the bucket's policy and in IAM",
    "403": "grant what docs/operations/audit.md lists; without s3:ListBucket, what is not there is forbidden",
    "NoSuchBucket": "check audit.archive.bucket, the Region and the account",
    "RequestTimeTooSkewed": "set this machine's clock",
}
_CREDENTIALS = "check the credentials and the clock of this machine: `aws sts get-caller-identity`"


class Stored(NamedTuple):
    """An object as the service says it is."""

    key: str
    version: str
    size: int
    sha256: bytes
    mode: str
    retain_until: datetime | None


class Version(NamedTuple):
    """One version of an object in a listing; `deleted`: a marker that hides the others."""

    key: str
    version: str
    latest: bool
    deleted: bool


class S3Store:
    """One bucket, whose objects are locked."""

    def __init__(self, settings: ArchiveSettings) -> None:
        """Raises ConfigError, StoreError (credentials, policy), RefusedError (no lock), TransientError."""
        self.bucket = settings.bucket or ""
        self._mode = settings.lock_mode.upper()
        config = Config(
            connect_timeout=_TIMEOUT_SECONDS,
            read_timeout=_TIMEOUT_SECONDS,
            retries={"mode": "standard", "total_max_attempts": settings.attempts},
            # Other services have no host of its own for each bucket.
            s3={"addressing_style": "path" if settings.endpoint else "auto"},
        )
        with _translated("opening the archive"):
            session = boto3.session.Session(profile_name=settings.profile)
            self._client: Any = session.client(
                "s3",
                region_name=settings.region or session.region_name,
                endpoint_url=settings.endpoint,
                config=config,
            )
        _require_tls(str(self._client.meta.endpoint_url))
        self._require_locking()

    def _require_locking(self) -> None:
        what = f"bucket {self.bucket} locks no objects"
        hint = "make one with Object Lock: the archive is worth what its lock is worth"
        try:
            with _translated(f"looking at bucket {self.bucket}"):
                found = self._client.get_object_lock_configuration(Bucket=self.bucket)
        except StoreError as error:
            if isinstance(error.__cause__, boto.ClientError) and _code(error.__cause__) == _NO_LOCK:
                raise RefusedError(what, hint=hint) from error
            raise
        if found.get("ObjectLockConfiguration", {}).get("ObjectLockEnabled") != "Enabled":
            raise RefusedError(what, hint=hint)

    def put(self, key: str, file: BinaryIO, size: int, sha256: bytes, retain_until: datetime) -> bool:
        """Store an object under its lock; False where there is one under this key already."""
        try:
            with _translated(f"storing {key}"):
                self._client.put_object(
                    Bucket=self.bucket,
                    Key=key,
                    Body=file,
                    ContentLength=size,
                    ContentType="application/jsonl",
                    ChecksumAlgorithm="SHA256",
                    ChecksumSHA256=base64.b64encode(sha256).decode(),
                    ObjectLockMode=self._mode,
                    ObjectLockRetainUntilDate=retain_until,
                    IfNoneMatch="*",
                )
        except StoreError as error:
            if isinstance(error.__cause__, boto.ClientError) and _code(error.__cause__) in _TAKEN:
                return False
            raise
        return True

    def look(self, key: str, version: str | None = None) -> Stored | None:
        """What the service says of an object, of its newest version or of the one named; None: not there."""
        named = {"VersionId": version} if version else {}
        try:
            with _translated(f"looking at {key}"):
                found = self._client.head_object(Bucket=self.bucket, Key=key, ChecksumMode="ENABLED", **named)
        except StoreError as error:
            if isinstance(error.__cause__, boto.ClientError) and _code(error.__cause__) in _GONE:
                return None
            raise
        until = found.get("ObjectLockRetainUntilDate")
        return Stored(
            key,
            str(found.get("VersionId", "")),
            int(found.get("ContentLength", 0)),
            _checksum(found.get("ChecksumSHA256")),
            str(found.get("ObjectLockMode", "")),
            until.astimezone(UTC) if isinstance(until, datetime) else None,
        )

    def require_locked(self, stored: Stored, until: datetime) -> datetime:
        """Raise RefusedError unless the object's lock holds so long; gives until when it does."""
        accepted = ("COMPLIANCE",) if self._mode == "COMPLIANCE" else ("COMPLIANCE", "GOVERNANCE")
        if stored.mode not in accepted or stored.retain_until is None:
            raise RefusedError(
                f"{stored.key} is not locked as it must be: mode {stored.mode or 'none'}, not {accepted[0]}",
                hint="the service put it without its lock, or somebody lifted it",
            )
        if stored.retain_until < until:
            raise RefusedError(
                f"the lock of {stored.key} ends {stored.retain_until:%Y-%m-%d}, before {until:%Y-%m-%d}",
                hint="extend it (PutObjectRetention), then try again",
            )
        return stored.retain_until

    @contextmanager
    def read(self, key: str, version: str) -> Iterator[Callable[[int], bytes]]:
        """Bytes of one version: a function that gives the next so many, and b'' at the end."""
        with _translated(f"reading {key}"):
            body = self._client.get_object(Bucket=self.bucket, Key=key, VersionId=version)["Body"]

        def take(size: int) -> bytes:
            with _translated(f"reading {key}"):
                return bytes(body.read(size))

        try:
            yield take
        finally:
            body.close()

    def versions(self, prefix: str) -> Iterator[Version]:
        """Every version under a prefix, and every marker of a deletion, in the order of the keys."""
        with _translated(f"listing {prefix}"):
            for page in self._client.get_paginator("list_object_versions").paginate(
                Bucket=self.bucket, Prefix=prefix
            ):
                for name, deleted in (("Versions", False), ("DeleteMarkers", True)):
                    for one in page.get(name, ()):
                        yield Version(
                            str(one["Key"]), str(one["VersionId"]), bool(one.get("IsLatest")), deleted
                        )

    def close(self) -> None:
        """Give connections back."""
        self._client.close()


def _checksum(text: object) -> bytes:
    try:
        return base64.b64decode(str(text or ""), validate=True)
    except binascii.Error:  # of a part-wise upload, which is none of ours
        return b""


def _code(error: boto.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def s3_error(error: Exception, what: str) -> VsqlSyncError:
    """Our error for boto3's. Its text has names and codes, never credentials."""
    if isinstance(error, boto.ClientError):
        code, said = _code(error), str(error.response.get("Error", {}).get("Message", ""))[:200]
        said = "".join(c if c.isprintable() else " " for c in said)
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in _BUSY or status >= 500:
            return TransientError(f"{what}: the object store is busy ({code})", hint="try again later")
        return StoreError(
            f"{what}: the object store refuses with {code}: {said}", hint=_HINTS.get(code, _CREDENTIALS)
        )
    if isinstance(error, (boto.NoRegionError, boto.ProfileNotFound, boto.InvalidRegionError)):
        return ConfigError(
            f"{what}: {error}", hint="set region and profile of [audit.archive], or AWS_REGION"
        )
    kind = type(error).__name__
    if isinstance(error, boto.SSLError):
        return StoreError(f"{what}: no trusted connection", hint="check endpoint and AWS_CA_BUNDLE")
    if isinstance(error, (boto.HTTPClientError, boto.ConnectionError)):
        return TransientError(f"{what}: no connection to the object store ({kind})", hint="try again later")
    return StoreError(f"{what}: AWS's client refuses with {kind}", hint=_CREDENTIALS)


def _require_tls(address: str) -> None:
    """AWS's client takes an address from the environment and from profiles, too, and any scheme."""
    parts = urlsplit(address)
    if parts.scheme != "https" and not is_loopback(parts.hostname):
        raise ConfigError(
            f"the archive is at {address}, without TLS",
            hint="see AWS_ENDPOINT_URL, AWS_ENDPOINT_URL_S3 and endpoint_url of the profile",
        )


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except (boto.ClientError, boto.BotoCoreError) as error:
        raise s3_error(error, what) from error
