"""Where archived segments lie: an object store that locks what it is given.

The client library is imported when a store is opened, so that `syncctl --help` loads none; a missing one is
an error that names the extra to install. Not here: what a segment is (audit/segment.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vsql_shared.errors import ConfigError

if TYPE_CHECKING:
    from vsql_shared.config.archive import ArchiveSettings
    from vsql_shared.objects.s3 import S3Store


def open_store(settings: ArchiveSettings) -> S3Store:
    """The configured bucket, which must lock its objects. Raises ConfigError, StoreError, RefusedError."""
    if settings.bucket is None:
        raise ConfigError(
            "audit.archive.bucket is not set: there is nowhere to put segments of the trail",
            hint="name a bucket with Object Lock (docs/operations/audit.md)",
        )
    try:
        from vsql_shared.objects.s3 import S3Store
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("boto3", "botocore"):
            raise
        raise ConfigError(
            f"audit.archive needs {error.name}, which is not installed",
            hint="install the extra: pip install 'vsql-sync[aws]'",
        ) from error
    return S3Store(settings)
