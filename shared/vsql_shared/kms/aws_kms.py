"""KEKs in AWS KMS: the key never leaves the service.

Not here: making keys, aliases and grants (docs/operations/keys.md). Needs the extra `aws` (boto3: for
AWS's own chain of credentials). Rules:

* kek_id is an alias (`alias/name`), a key id or the ARN of either; in announcements it is the ARN of the key.
  Only symmetric keys (SYMMETRIC_DEFAULT: AES-256-GCM) are taken.
* Pointing the alias at another key is how a KEK gets a version that can be destroyed on its own: keys that an
  alias `alias/name/…` names are its versions. AWS's own rotation of a key's material is not seen here.
* Cluster, chain and dek_id are the encryption context: bound as additional authenticated data, in CloudTrail,
  and usable in the conditions of policies.
* A multi-Region key that another node wrapped under is asked for in this node's own Region.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore import exceptions as boto
from botocore.config import Config

from vsql_shared.config.kms_services import is_loopback
from vsql_shared.errors import ConfigError, KeyUnavailableError, TransientError, VsqlSyncError
from vsql_shared.kms.base import AES_256_BITS, KekVersion, Retries, Wrapped, context_names

ALGORITHM = "SYMMETRIC_DEFAULT"  # AWS's name; the blob names key and material itself
_NAME = r"(?:alias/[A-Za-z0-9/_-]{1,250}|(?:key/)?(?:mrk-)?[0-9A-Fa-f-]{32,36})"
_ARN = re.compile(
    r"(?P<head>arn:aws[a-z-]*:kms):(?P<region>[a-z0-9-]+):(?P<account>[0-9]{12}):(?P<name>" + _NAME + ")"
)
_KEY_ID = re.compile(_NAME)
_MAX_ALIASES = 10_000  # an account has 100,000 at most; nobody has so many versions of one KEK

# Try again: the service's own words for it, and those AWS says to treat so.
_BUSY = frozenset({
    "ThrottlingException", "Throttling", "TooManyRequestsException", "RequestLimitExceeded", "SlowDown",
    "LimitExceededException", "KMSInternalException", "DependencyTimeoutException", "KeyUnavailableException",
    "InternalFailure", "InternalError", "ServiceUnavailable", "ServiceUnavailableException", "RequestTimeout",
    "RequestTimeoutException",
})  # fmt: skip
_HINTS = {
    "NotFoundException": "check encryption.kms.kek_id, the Region and the account; a destroyed key is lost",
    "DisabledException": "enable the key; if it is to stay disabled, what it wrapped stays closed",
    "KMSInvalidStateException": "the key is disabled, or scheduled for deletion; cancel that if it is wrong",
    "AccessDeniedException": "grant what docs/operations/keys.md lists, in the key's policy and in IAM",
    "InvalidCiphertextException": "the wrapping was altered, or made for another chain, or under another key",
    "IncorrectKeyException": "the wrapping was made under another key than its announcement says",
    "InvalidKeyUsageException": "use a symmetric key for encryption and decryption",
}
_CREDENTIALS = "check the credentials and the clock of this machine: `aws sts get-caller-identity`"
_LOST = (
    boto.EndpointConnectionError,
    boto.ConnectTimeoutError,
    boto.ReadTimeoutError,
    boto.ConnectionClosedError,
    boto.ConnectionError,
    boto.HTTPClientError,
)


def encryption_context(context: bytes) -> dict[str, str]:
    """A key's context as AWS takes it."""
    cluster, chain, dek_id = context_names(context)
    return {"vsql-sync:cluster": cluster, "vsql-sync:chain": chain, "vsql-sync:dek-id": dek_id}


def check_kek_id(kek_id: str) -> str:
    """The same. Raises ConfigError where it can name no key of AWS KMS."""
    if _ARN.fullmatch(kek_id) is None and _KEY_ID.fullmatch(kek_id) is None:
        raise ConfigError(
            f"encryption.kms.kek_id = {kek_id!r} names no key of AWS KMS",
            hint='write "alias/name", a key id, or the ARN of one',
        )
    return kek_id


def local_arn(arn: str, region: str) -> str:
    """Where to ask for a key: a multi-Region key in our Region, any other where it is.

    Raises KeyUnavailableError when that is elsewhere, or the announcement names no key.
    """
    found = _ARN.fullmatch(arn)
    if found is None or not found["name"].startswith("key/"):
        raise KeyUnavailableError(
            f"{arn!r} is no ARN of an AWS KMS key", hint="both nodes need encryption.kms.provider aws-kms"
        )
    if found["region"] == region:
        return arn
    if found["name"].startswith("key/mrk-"):
        return f"{found['head']}:{region}:{found['account']}:{found['name']}"
    raise KeyUnavailableError(
        f"KEK {arn} is in Region {found['region']}, this node uses {region}",
        hint="set encryption.kms.aws.region on this node, or use a multi-Region key",
    )


def aws_error(error: Exception, what: str) -> VsqlSyncError:
    """Our error for boto3's. Its text has names and codes, never credentials or key bytes."""
    if isinstance(error, boto.ClientError):
        said = error.response.get("Error", {})
        code, text = str(said.get("Code", "")), str(said.get("Message", ""))[:200]
        text = "".join(c if c.isprintable() else " " for c in text)
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in _BUSY or status >= 500:
            return TransientError(f"{what}: AWS KMS is busy ({code})", hint="it is tried again")
        hint = _HINTS.get(code, _CREDENTIALS)
        return KeyUnavailableError(f"{what}: AWS KMS refuses with {code}: {text}", hint=hint)
    kind = type(error).__name__
    if isinstance(error, (boto.NoRegionError, boto.ProfileNotFound, boto.InvalidRegionError)):
        return ConfigError(
            f"{what}: {error}", hint="set region and profile of [encryption.kms.aws], or AWS_REGION"
        )
    if isinstance(error, boto.SSLError):
        return KeyUnavailableError(
            f"{what}: no trusted connection to AWS KMS", hint="check endpoint and AWS_CA_BUNDLE"
        )
    if isinstance(error, _LOST):
        return TransientError(f"{what}: no connection to AWS KMS ({kind})", hint="it is tried again")
    return KeyUnavailableError(f"{what}: AWS's client refuses with {kind}", hint=_CREDENTIALS)


def _require_tls(address: str) -> None:
    """AWS's client takes an address from the environment and from profiles, too, and any scheme."""
    parts = urlsplit(address)
    if parts.scheme != "https" and not is_loopback(parts.hostname):
        raise ConfigError(
            f"AWS KMS is asked at {address}, without TLS: data keys would cross the network in clear",
            hint="see AWS_ENDPOINT_URL, AWS_ENDPOINT_URL_KMS and endpoint_url of the profile",
        )


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except (boto.ClientError, boto.BotoCoreError) as error:
        raise aws_error(error, what) from error


class AwsKek:
    """A key of AWS KMS. It is looked up at construction, so a wrong setting shows at start."""

    name = "aws-kms"

    def __init__(
        self,
        kek_id: str,
        *,
        region: str | None = None,
        profile: str | None = None,
        endpoint: str | None = None,
        retries: Retries | None = None,
    ) -> None:
        """Raises ConfigError, KeyUnavailableError (credentials, policy, key), TransientError."""
        self._kek_id = check_kek_id(kek_id)
        bounds = retries or Retries()
        found = _ARN.fullmatch(kek_id)
        config = Config(
            connect_timeout=bounds.timeout,
            read_timeout=bounds.timeout,
            # boto3's standard mode: exponential pauses with jitter, at most 20 s.
            retries={"mode": "standard", "total_max_attempts": bounds.attempts},
        )
        with _translated("opening AWS KMS"):
            session = boto3.session.Session(profile_name=profile)
            where = region or (found["region"] if found else session.region_name)
            self._client: Any = session.client("kms", region_name=where, endpoint_url=endpoint, config=config)
        _require_tls(str(self._client.meta.endpoint_url))
        self._region: str = self._client.meta.region_name
        self._current()

    @property
    def kek_id(self) -> str:
        """ARN of the key that wraps."""
        return str(self._current()["Arn"])

    @property
    def strength_bits(self) -> int:
        """AES-256-GCM, whatever the key."""
        return AES_256_BITS

    def versions(self) -> list[KekVersion]:
        """The key that wraps, and those the aliases below the configured one name, if they are enabled."""
        current = self.kek_id
        others = {arn for arn in self._below_alias() if arn != current}
        return [
            *(KekVersion(arn, AES_256_BITS, active=False) for arn in sorted(others)),
            KekVersion(current, AES_256_BITS, active=True),
        ]

    def remains(self, kek_id: str) -> bool:
        """Whether AWS still knows the key: one that is disabled or pending deletion can come back."""
        try:
            self._client.describe_key(KeyId=local_arn(kek_id, self._region))
        except self._client.exceptions.NotFoundException:
            return False
        except (boto.BotoCoreError, boto.ClientError) as error:
            raise aws_error(error, f"looking up key {kek_id}") from error
        return True

    def wrap(self, secret: bytes, context: bytes) -> Wrapped:
        """Encrypt a data key at AWS, under the key the alias points at now."""
        with _translated("wrapping a data key"):
            answer = self._client.encrypt(
                KeyId=self._kek_id,
                Plaintext=secret,
                EncryptionContext=encryption_context(context),
                EncryptionAlgorithm=ALGORITHM,
            )
        return Wrapped(bytes(answer["CiphertextBlob"]), ALGORITHM, str(answer["KeyId"]))

    def unwrap(self, wrapped: bytes, algorithm: str, context: bytes, kek_id: str) -> bytes:
        """Decrypt a data key at AWS, under the key that wrapped it and no other."""
        if algorithm != ALGORITHM:
            raise KeyUnavailableError(
                f"wrapping algorithm {algorithm!r} is unknown", hint=f"expected {ALGORITHM}"
            )
        key = local_arn(kek_id, self._region)
        with _translated(f"unwrapping a data key under {kek_id}"):
            answer = self._client.decrypt(
                KeyId=key,
                CiphertextBlob=wrapped,
                EncryptionContext=encryption_context(context),
                EncryptionAlgorithm=algorithm,
            )
        return bytes(answer["Plaintext"])

    def close(self) -> None:
        """Give connections back; the next use opens others."""
        self._client.close()

    def _current(self) -> dict[str, Any]:
        found = self._describe(self._kek_id)
        if not _is_usable(found):
            raise KeyUnavailableError(
                f"key {found.get('Arn')} is {found.get('KeyState')}, of kind {found.get('KeySpec')}",
                hint=f"a KEK is an enabled key of kind {ALGORITHM}",
            )
        return found

    def _describe(self, key: str) -> dict[str, Any]:
        with _translated(f"looking up key {key}"):
            found: dict[str, Any] = self._client.describe_key(KeyId=key)["KeyMetadata"]
        return found

    def _below_alias(self) -> Iterator[str]:
        """ARNs of the enabled keys that `<alias>/…` name; none where kek_id is no alias."""
        _, found, name = self._kek_id.rpartition("alias/")
        if not found:
            return
        keys: list[str] = []
        with _translated("listing aliases"):
            pages = self._client.get_paginator("list_aliases").paginate(
                PaginationConfig={"MaxItems": _MAX_ALIASES}
            )
            for page in pages:
                keys += [
                    one["TargetKeyId"]
                    for one in page["Aliases"]
                    if "TargetKeyId" in one and one["AliasName"].startswith(f"alias/{name}/")
                ]
        for key in keys:
            described = self._describe(key)
            if _is_usable(described):
                yield str(described["Arn"])


def _is_usable(metadata: dict[str, Any]) -> bool:
    """Whether a key wraps and unwraps now."""
    return metadata.get("KeyState") == "Enabled" and metadata.get("KeySpec") == ALGORITHM
