"""[audit.archive]: where segments of the audit trail go before they may be pruned.

Rules: credentials come from AWS's own chain, none stands here; the bucket must lock its objects.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vsql_shared.config.kms_services import ServiceUrl
from vsql_shared.config.section import Section
from vsql_shared.config.values import Whole

_Name = Annotated[str, Field(min_length=1)]


class ArchiveSettings(Section):
    """[audit.archive]: an S3 bucket with Object Lock. Credentials come from AWS's own chain."""

    bucket: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")] | None = None
    """Bucket with Object Lock; nothing is archived, and nothing pruned, without one."""
    prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*$", max_length=200)] = (
        "vsql-sync-audit"
    )
    """What the keys of all objects begin with."""
    region: _Name | None = None
    """Region of the bucket; else AWS_REGION or the profile's."""
    profile: _Name | None = None
    """Profile of the AWS configuration files; else AWS_PROFILE or the default one."""
    endpoint: ServiceUrl | None = None
    """Address of another service that speaks S3, such as MinIO; else AWS's own for the region."""
    lock_mode: Literal["compliance", "governance"] = "compliance"
    """How objects are locked; "governance" accepts that some users may lift it."""
    segment_entries: Annotated[Whole, Field(ge=1, le=1_000_000)] = 20_000
    """Most entries of a segment, unless no cosigned checkpoint lies within so many."""
    attempts: Annotated[Whole, Field(ge=1, le=20)] = 5
    """How often a request is tried before it is given up."""
